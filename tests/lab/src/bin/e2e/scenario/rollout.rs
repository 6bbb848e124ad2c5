//! A new version while pods keep asking: none of them is refused, since it takes over the listening sockets.

use anyhow::ensure;

use super::{Scale, load::Load};
use crate::cluster::Cluster;

pub fn run(cluster: &Cluster, _: &Scale) -> anyhow::Result<String> {
    cluster.agent_ready()?;
    let load = Load::start(cluster, 40)?;
    let uid = || anyhow::Ok(cluster.agent_pod("node1")?["metadata"]["uid"].clone());
    let before = uid()?;
    cluster.kubectl(&["-n", "kirsa", "rollout", "restart", "daemonset/kirsa"])?;
    cluster.agent_ready()?;
    ensure!(uid()? != before, "nothing was rolled out");
    Ok(format!("while the agent was replaced {}", load.end(cluster)?))
}
