//! A version that starts and never gets ready: the former one stays ready and serves, the roll-out goes no further, and
//! undoing it takes away what was new.

use std::time::{Duration, Instant};

use anyhow::{Context as _, ensure};
use serde_json::Value;

use super::{Scale, load::Load};
use crate::cluster::Cluster;

/// Longer than the kubelet needs to call a pod not ready.
const WATCHED: Duration = Duration::from_secs(25);

pub fn run(cluster: &Cluster, _: &Scale) -> anyhow::Result<String> {
    cluster.agent_ready()?;
    let load = Load::start(cluster, 60)?;
    let former = cluster.agent_pod("node1")?["metadata"]["uid"].clone();
    // Nobody listens there: it never learns which pods this node has.
    cluster.kubectl(&["-n", "kirsa", "set", "env", "daemonset/kirsa", "KUBERNETES_SERVICE_PORT=1"])?;
    let outcome = stays(cluster, &former);
    cluster.kubectl(&["-n", "kirsa", "rollout", "undo", "daemonset/kirsa"])?;
    cluster.agent_ready()?;
    outcome?;
    cluster
        .until("one agent", Duration::from_secs(60), || Ok((cluster.agent_pods("node1")?.len() == 1).then_some(())))?;
    ensure!(cluster.agent_pod("node1")?["metadata"]["uid"] == former, "another agent runs");
    Ok(format!("beside an agent that never got ready {}", load.end(cluster)?))
}

/// As long as it is watched the former agent is ready and the next one runs, and is not.
fn stays(cluster: &Cluster, former: &Value) -> anyhow::Result<()> {
    let next_runs =
        || Ok(cluster.agent_pods("node1")?.iter().any(|pod| is_new(pod, former) && started(pod)).then_some(()));
    cluster.until("the next agent to run", Duration::from_secs(60), next_runs)?;
    let until = Instant::now() + WATCHED;
    while Instant::now() < until {
        let pods = cluster.agent_pods("node1")?;
        ensure!(pods.len() == 2, "{} agents", pods.len());
        for pod in &pods {
            let ready = pod["status"]["containerStatuses"][0]["ready"].as_bool().context("its status")?;
            ensure!(ready != is_new(pod, former), "{} ready: {ready}", if ready { "the next" } else { "the former" });
        }
        std::thread::sleep(Duration::from_millis(500));
    }
    Ok(())
}

fn is_new(pod: &Value, former: &Value) -> bool {
    pod["metadata"]["uid"] != *former
}

fn started(pod: &Value) -> bool {
    pod["status"]["containerStatuses"][0]["started"] == true
}
