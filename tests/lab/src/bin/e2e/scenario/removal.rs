//! Taking the agent away, taking the rule away, and coming back over connections that were open meanwhile.

use std::time::Duration;

use anyhow::{Context as _, ensure};

use super::{ASK, Scale, smoke::own_credentials};
use crate::{cluster::Cluster, pods::Job};

const OVERLAY: &str = "tests/cluster/overlay";
const UNINSTALL: &str = "tests/cluster/overlay-uninstall";

pub fn run(cluster: &Cluster, _: &Scale) -> anyhow::Result<String> {
    cluster.agent_ready()?;
    cluster.kubectl(&["delete", "-k", &cluster.manifests(OVERLAY)])?;
    let outcome = without_agent(cluster);
    cluster.kubectl(&["delete", "--ignore-not-found", "-k", &cluster.manifests(UNINSTALL)])?;
    cluster.kubectl(&["apply", "-k", &cluster.manifests(OVERLAY)])?;
    cluster.agent_ready()?;
    outcome?;
    back(cluster)?;
    cluster.clear()?;
    Ok("the rule outlives the agent and refuses; uninstall removes it; connections open by then are cut when it returns".to_owned())
}

/// Ends with a connection that was opened past the agent.
fn without_agent(cluster: &Cluster) -> anyhow::Result<()> {
    let table = |cluster: &Cluster| cluster.on("node1", &["nft", "list", "table", "inet", "kirsa"]).is_ok();
    cluster.until("the end of the agent", Duration::from_secs(60), || {
        Ok(cluster.on("node1", &["pgrep", "-x", "kirsa"]).is_err().then_some(()))
    })?;
    ensure!(table(cluster), "the rule went with the agent");
    let (message, code) = cluster.run(Job::new("refused", "default", &format!("{ASK} ask || exit 1")))?;
    ensure!(code == 1 && message.contains("refused"), "without the agent: {code} {message}");
    ensure!(cluster.new_leaks()?.is_empty(), "without the agent the node's metadata service was reached");

    cluster.kubectl(&["apply", "-k", &cluster.manifests(UNINSTALL)])?;
    cluster.kubectl(&["-n", "kirsa", "rollout", "status", "daemonset/kirsa-uninstall", "--timeout=60s"])?;
    ensure!(!table(cluster), "uninstall left the rule");

    // A request, and another on the same connection as soon as it is told to.
    let script = r"request() { printf 'GET /latest/meta-data/%s HTTP/1.1\r\nHost: imds\r\n\r\n' $1; }
        { request before; until [ -e /go ]; do sleep 0.1; done; request after; sleep 3; touch /asked; } |
          nc 169.254.169.254 80 >/answers &
        until [ -e /asked ]; do sleep 0.1; done";
    cluster.start(&[Job::new("open", "default", script)])?;
    cluster.until("a connection past the agent", Duration::from_secs(30), || {
        Ok(cluster.new_leaks()?.iter().any(|hit| hit["path"] == "/latest/meta-data/before").then_some(()))
    })?;
    cluster.excuse_leaks()
}

fn back(cluster: &Cluster) -> anyhow::Result<()> {
    cluster.kubectl(&["-n", "e2e", "exec", "open", "--", "touch", "/go"])?;
    cluster.pods.ended(&["open".to_owned()], Duration::from_secs(30)).context("the open connection's pod")?;
    ensure!(cluster.new_leaks()?.is_empty(), "the open connection was not cut: {:?}", cluster.new_leaks()?);
    own_credentials(cluster, "back")
}
