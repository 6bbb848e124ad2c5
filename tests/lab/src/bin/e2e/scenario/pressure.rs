//! What happens to a node: the runtime and the kubelet restarted, rules and connection tracking flushed, drained.

use std::time::Duration;

use anyhow::{Context as _, ensure};

use super::{ASK, Scale, smoke::own_credentials};
use crate::{
    cluster::{Cluster, now},
    pods::Job,
};

/// Seconds after which a connection that died in silence must have been noticed.
const FLUSH_FORGOTTEN: f64 = 120.0;
/// Pods that start at once.
const ROUND: usize = 10;

pub fn run(cluster: &Cluster, _: &Scale) -> anyhow::Result<String> {
    cluster.agent_ready()?;
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
    let (refused, seconds) = flushed(cluster).context("after a flush of connection tracking")?;
    Ok(format!(
        "rules flushed, kubelet and containerd restarted, node drained: credentials go on; after a flush of connection \
         tracking {refused} new pods were refused in {seconds:.0} s"
    ))
}

/// The agent's own connections to the API server end without a word: they are translated by kube-proxy. Until it has
/// noticed, it knows new pods by what it asks for one by one. How many were refused their first request, until two
/// rounds were not.
fn flushed(cluster: &Cluster) -> anyhow::Result<(usize, f64)> {
    let names: Vec<String> = (0..ROUND).map(|n| format!("flushed-{n}")).collect();
    cluster.identities(&names)?;
    let script = format!("{ASK} ask || exit 1; say $key");
    let jobs: Vec<Job> = names.iter().map(|name| Job::new(name, name, &script)).collect();
    cluster.on("node1", &["conntrack", "-F"])?;
    let start = now();
    let (mut refused, mut good, mut last) = (0, 0, start);
    while good < 2 {
        ensure!(now() < start + FLUSH_FORGOTTEN, "{refused} pods were refused, the last after {:.0} s", last - start);
        cluster.start(&jobs)?;
        let ended = cluster.pods.ended(&names, Duration::from_secs(120))?;
        good += 1;
        for (name, (_, message, code)) in names.iter().zip(ended) {
            if code == 0 {
                let role = cluster.issued()?.remove(message.trim());
                ensure!(role == Some(Cluster::role_arn(name)), "{name} was given credentials of {role:?}");
            } else {
                ensure!(message.contains("503"), "{name}: {message}");
                (refused, good, last) = (refused + 1, 0, now());
            }
        }
        cluster.clear()?;
    }
    Ok((refused, last - start))
}

/// How often the agent's container on node1 was restarted.
fn restarts(cluster: &Cluster) -> anyhow::Result<u64> {
    let pod = cluster.agent_pod("node1")?;
    pod["status"]["containerStatuses"][0]["restartCount"].as_u64().context("a count of restarts")
}
