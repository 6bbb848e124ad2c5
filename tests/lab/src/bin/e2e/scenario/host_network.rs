//! A pod on the node's own network is, for the metadata service, the node.

use anyhow::ensure;

use super::Scale;
use crate::{cluster::Cluster, pods::Job};

pub fn run(cluster: &Cluster, _: &Scale) -> anyhow::Result<String> {
    cluster.agent_ready()?;
    cluster.identities(&["host".to_owned()])?;
    let url = "http://169.254.169.254/latest/meta-data/iam/security-credentials/";
    let script = format!("timeout 2 wget -q -O /dev/termination-log {url}");
    let (message, code) = cluster.run(Job { host_network: true, ..Job::new("host", "host", &script) })?;
    ensure!(code == 0 && message.contains(lab::imds::NODE_ROLE), "on the node's network: {code} {message}");

    // The agent's own port is no way in either: what comes to it directly is nobody.
    let url = "http://10.250.0.1:338/latest/meta-data/iam/security-credentials/";
    let script = format!("timeout 2 wget -O - {url} >/dev/termination-log 2>&1");
    for host_network in [true, false] {
        let name = if host_network { "direct-node" } else { "direct-pod" };
        let (message, code) = cluster.run(Job { host_network, ..Job::new(name, "host", &script) })?;
        ensure!(code != 0 && message.contains("403"), "{name}: {code} {message}");
    }
    Ok("a hostNetwork pod sees the node's metadata service, as the node does, and nothing on the agent's port"
        .to_owned())
}
