//! What happens to a node: the agent killed, the runtime and the kubelet restarted, connection tracking flushed.

use std::time::Duration;

use anyhow::{Context as _, ensure};

use super::{ASK, Scale, smoke::own_credentials};
use crate::{cluster::Cluster, pods::Job};

pub fn run(cluster: &Cluster, _: &Scale) -> anyhow::Result<String> {
    cluster.agent_ready()?;
    killed(cluster)?;

    for part in ["kubelet", "containerd"] {
        let agent = restarts(cluster)?;
        cluster.script("restart.sh", &["node1", part])?;
        own_credentials(cluster, part).with_context(|| format!("after a restart of {part}"))?;
        ensure!(restarts(cluster)? == agent, "the agent was restarted with {part}");
    }

    cluster.on("node1", &["nft", "delete", "table", "inet", "kirsa"])?;
    cluster.until("the redirect again", Duration::from_secs(10), || {
        Ok(cluster.on("node1", &["nft", "list", "table", "inet", "kirsa"]).ok())
    })?;
    own_credentials(cluster, "flushed-rules").context("after the rules were flushed")?;

    cluster.kubectl(&["drain", "node1", "--ignore-daemonsets", "--force", "--delete-emptydir-data"])?;
    let drained = (|| {
        cluster.agent_ready().context("on a drained node")?;
        own_credentials(cluster, "drained").context("on a drained node")
    })();
    cluster.kubectl(&["uncordon", "node1"])?;
    drained?;
    let tries = flushed(cluster).context("after a flush of connection tracking")?;
    Ok(format!(
        "killed, rules flushed, kubelet and containerd restarted, node drained: credentials go on; after a flush of \
         connection tracking at attempt {tries}"
    ))
}

/// The agent's own connections to the API server end without a word: they are translated by kube-proxy.
fn flushed(cluster: &Cluster) -> anyhow::Result<u64> {
    cluster.on("node1", &["conntrack", "-F"])?;
    cluster.identities(&["flushed".to_owned()])?;
    let script =
        format!("{ASK} n=1; until ask; do n=$((n + 1)); [ $n -lt 20 ] || exit 1; sleep 0.5; done; say $n $key");
    let (message, code) = cluster.run(Job::new("flushed", "flushed", &script))?;
    ensure!(code == 0, "{message}");
    let (tries, key) = message.trim().split_once(' ').context("a count and a key")?;
    ensure!(cluster.issued()?.remove(key) == Some(Cluster::role_arn("flushed")), "{message}");
    Ok(tries.parse()?)
}

/// A request in flight is reset; then a pod is refused at once, and reaches nobody else; afterwards it is served.
fn killed(cluster: &Cluster) -> anyhow::Result<()> {
    cluster.identities(&["killed".to_owned()])?;
    let script = format!(
        "{ASK} ask || exit 1; touch /asking
        while :; do
          answer=$(timeout 1 wget -q -O - $imds 2>&1) || case $answer in *refused*) break ;; *reset* | *'getting response'*) ;; *) say $answer; exit 1 ;; esac
        done
        until ask; do sleep 0.1; done; say $key"
    );
    cluster.start(&[Job::new("killed", "killed", &script)])?;
    cluster.until("a pod that asks", Duration::from_secs(30), || {
        Ok(cluster.kubectl(&["-n", "e2e", "exec", "killed", "--", "ls", "/asking"]).ok())
    })?;
    let before = restarts(cluster)?;
    cluster.on("node1", &["pkill", "-KILL", "-xo", "kirsa"])?;
    let ended = cluster.pods.ended(&["killed".to_owned()], Duration::from_secs(60))?;
    let (_, message, code) = ended.first().context("a pod")?;
    ensure!(*code == 0, "with the agent killed: {message}");
    let role = cluster.issued()?.remove(message.trim());
    ensure!(role == Some(Cluster::role_arn("killed")), "{message} was issued for {role:?}");
    ensure!(restarts(cluster)? == before + 1, "the agent was not restarted");
    cluster.clear()?;
    cluster.agent_ready()
}

/// How often the agent's container on node1 was restarted.
fn restarts(cluster: &Cluster) -> anyhow::Result<u64> {
    let pod = cluster.agent_pod("node1")?;
    pod["status"]["containerStatuses"][0]["restartCount"].as_u64().context("a count of restarts")
}
