//! A node that joins with the startup taint: no pod is put there before the agent is ready.

use std::time::Duration;

use anyhow::{Context as _, ensure};
use serde_json::Value;

use super::{ASK, Scale};
use crate::{
    cluster::{Cluster, NAMESPACE},
    pods::Job,
};

const TAINT: &str = "kirsa.dev/not-ready";
const OVERLAY: &str = "tests/cluster/overlay";
const TAINTED: &str = "tests/cluster/overlay-startup-taint";
const COMPONENT: &str = "daemonset/components/startup-taint";

pub fn run(cluster: &Cluster, _: &Scale) -> anyhow::Result<String> {
    cluster.agent_ready()?;
    cluster.identities(&["patient".to_owned()])?;
    cluster.kubectl(&["apply", "-k", &cluster.manifests(TAINTED)])?;
    cluster.hold_agent()?;
    let outcome = join(cluster);
    for file in ["rbac.yaml", "admission.yaml"] {
        let file = cluster.manifests(&format!("{COMPONENT}/{file}"));
        cluster.kubectl(&["delete", "--ignore-not-found", "-f", &file])?;
    }
    cluster.kubectl(&["apply", "-k", &cluster.manifests(OVERLAY)])?;
    cluster.release_agent("node1")?;
    cluster.agent_ready()?;
    cluster.clear()?;
    outcome?;
    Ok("a pod stays Pending on a node that joined with the taint; the agent takes it off; the pod's first request is \
        answered"
        .to_owned())
}

fn join(cluster: &Cluster) -> anyhow::Result<()> {
    // A node's taints are registered with it: it has to be a new one.
    cluster.script("machine-stop.sh", &["node1"])?;
    cluster.kubectl(&["delete", "node", "node1"])?;
    cluster.script_with("node.sh", &["1"], &[("TAINTS", &format!("{TAINT}=:NoSchedule"))])?;
    cluster.until("a new node", Duration::from_secs(120), || {
        cluster.kubectl(&["wait", "--for=condition=Ready", "node/node1", "--timeout=10s"]).map(Some)
    })?;
    ensure!(tainted(cluster)?, "the node joined without its taint");

    let script = format!("{ASK} ask || exit 1; say $key");
    cluster.start(&[Job { tolerant: false, ..Job::new("patient", "patient", &script) }])?;
    cluster.until("a pod that cannot be scheduled", Duration::from_secs(60), || {
        let path = "-o=jsonpath={.status.conditions[?(@.type=='PodScheduled')].message}";
        Ok(cluster.kubectl(&["-n", NAMESPACE, "get", "pod", "patient", path])?.contains("taint").then_some(()))
    })?;
    cluster.admit_agent("node1")?;
    cluster.until("a node without the taint", Duration::from_secs(120), || Ok((!tainted(cluster)?).then_some(())))?;
    let ended = cluster.pods.ended(&["patient".to_owned()], Duration::from_secs(120))?;
    let (_, message, code) = ended.first().context("a pod")?;
    ensure!(*code == 0, "once the taint was gone: {message}");
    let role = cluster.issued()?.remove(message.trim());
    ensure!(role == Some(Cluster::role_arn("patient")), "{message} was issued for {role:?}");
    Ok(())
}

fn tainted(cluster: &Cluster) -> anyhow::Result<bool> {
    let node: Value = serde_json::from_str(&cluster.kubectl(&["get", "node", "node1", "-o", "json"])?)?;
    Ok(node["spec"]["taints"].as_array().is_some_and(|taints| taints.iter().any(|taint| taint["key"] == TAINT)))
}
