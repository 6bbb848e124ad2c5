//! After a scenario that failed: what the agent and the cluster had to say, and a cluster as the next one expects it.

use std::time::Duration;

use anyhow::Context as _;

use crate::cluster::Cluster;

const OVERLAY: &str = "tests/cluster/overlay";
/// Lines of a log.
const TAIL: usize = 40;

impl Cluster {
    /// To standard error: nobody can look any more once the cluster is gone.
    pub fn tell_state(&self) {
        let tell = |what: &str, text: anyhow::Result<String>| {
            let text = text.unwrap_or_else(|error| format!("{error:#}"));
            let lines: Vec<&str> = text.lines().collect();
            eprintln!("--- {what}");
            lines.iter().skip(lines.len().saturating_sub(TAIL)).for_each(|line| eprintln!("{line}"));
        };
        tell("pods", self.kubectl(&["get", "pods", "-A", "-o", "wide"]));
        // Of every agent that the node ran, oldest first: the one that refused may be gone.
        let complaints =
            "cat $(ls -tr /var/log/pods/kirsa_kirsa-*/kirsa/*.log) | grep -E '\"(WARN|ERROR)\"' | tail -n 40";
        tell("the agent's complaints", self.on("node1", &["sh", "-c", complaints]));
        tell("the kubelet", self.on("node1", &["tail", "-n", "15", &self.log("node1", "kubelet")]));
    }

    /// A node that is up and schedulable, the agent as the overlay has it, no pods of a scenario.
    pub fn recover(&self) -> anyhow::Result<()> {
        // Where a scenario stopped half-way through a boot, the machine is there and its programs are not.
        if self.kubectl(&["wait", "--for=condition=Ready", "node/node1", "--timeout=30s"]).is_err() {
            self.script("machine-stop.sh", &["node1"])?;
            self.script("node.sh", &["1"])?;
        }
        self.kubectl(&["uncordon", "node1"])?;
        self.kubectl(&["label", "node", "node1", "kirsa.dev/e2e-"])?;
        self.kubectl(&["taint", "node", "node1", "kirsa.dev/not-ready-"]).ok();
        // Anew, whatever was patched.
        self.kubectl(&["-n", "kirsa", "delete", "daemonset", "--all", "--timeout=60s"]).ok();
        self.kubectl(&["apply", "-k", &self.manifests(OVERLAY)])?;
        self.until("the agent", Duration::from_secs(120), || self.agent_ready().map(Some))?;
        self.clear().context("pods of the scenario that failed")
    }
}
