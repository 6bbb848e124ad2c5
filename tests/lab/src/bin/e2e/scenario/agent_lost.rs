//! The agent ends without being asked: killed, out of memory, evicted. Pods are refused for as long as it is away, reach
//! nobody else, and go on by themselves.

use std::time::Duration;

use anyhow::{Context as _, ensure};
use serde_json::{Value, json};

use super::{ASK, Scale};
use crate::{cluster::Cluster, pods::Job};

pub fn run(cluster: &Cluster, _: &Scale) -> anyhow::Result<String> {
    cluster.agent_ready()?;
    survived(cluster, "killed", |cluster| cluster.on("node1", &["pkill", "-KILL", "-xo", "kirsa"]).map(drop))
        .context("killed")?;
    restarted(cluster, "Error")?;
    survived(cluster, "starved", starve).context("out of memory")?;
    restarted(cluster, "OOMKilled")?;
    let before = uid(cluster)?;
    survived(cluster, "evicted", evict).context("evicted")?;
    ensure!(uid(cluster)? != before, "the agent was not evicted");
    Ok("killed by a signal, by the kernel for want of memory, evicted: refused at once meanwhile, served again after"
        .to_owned())
}

/// A request in flight may be reset; then a pod is refused at once, and reaches nobody else; afterwards it is served.
fn survived(cluster: &Cluster, name: &str, end: impl Fn(&Cluster) -> anyhow::Result<()>) -> anyhow::Result<()> {
    cluster.identities(&[name.to_owned()])?;
    let script = format!(
        "{ASK} until ask; do :; done; touch /asking
        while :; do
          answer=$(timeout 5 wget -q -O - $imds 2>&1) || case $answer in
            *refused*) break ;;
            *reset* | *'getting response'*) ;;
            *) say $answer; exit 1 ;;
          esac
        done
        until ask; do sleep 0.1; done; say $key"
    );
    cluster.start(&[Job::new(name, name, &script)])?;
    cluster.until("a pod that asks", Duration::from_secs(60), || {
        Ok(cluster.kubectl(&["-n", "e2e", "exec", name, "--", "ls", "/asking"]).ok())
    })?;
    end(cluster)?;
    let ended = cluster.pods.ended(&[name.to_owned()], Duration::from_secs(120))?;
    let (_, message, code) = ended.first().context("a pod")?;
    ensure!(*code == 0, "without the agent: {message}");
    let role = cluster.issued()?.remove(message.trim());
    ensure!(role == Some(Cluster::role_arn(name)), "{message} was issued for {role:?}");
    cluster.clear()?;
    cluster.agent_ready()
}

/// Takes memory away from the running agent, until the kernel has none to give it.
fn starve(cluster: &Cluster) -> anyhow::Result<()> {
    // cgroup v1 refuses a limit that it cannot reclaim its way to, v2 kills; both kill whoever then needs a page more.
    let script = r#"
        agent=$(pgrep -xo kirsa)
        group=$(sed -n 's/^[0-9]*:memory://p' /proc/$agent/cgroup)
        if [ -n "$group" ]; then file=/sys/fs/cgroup/memory$group/memory.limit_in_bytes
        else file=/sys/fs/cgroup$(sed -n 's/^0:://p' /proc/$agent/cgroup)/memory.max; fi
        limit=16384
        for try in $(seq 600); do
          [ -d /proc/$agent ] || exit 0
          # Down to the last page: whatever of the program is not in memory then cannot be read in either.
          for step in 256 32 4; do
            while [ $limit -gt 512 ] && echo $((limit - step))k 2>/dev/null >$file; do limit=$((limit - step)); done
          done
          for n in 1 2 3 4 5 6 7 8; do curl -s -m 1 -o /dev/null http://127.0.0.1:8182/metrics & done
          wait
        done
        echo "alive with $limit KiB" >&2; exit 1"#;
    cluster.on("node1", &["bash", "-c", script]).map(drop)
}

fn evict(cluster: &Cluster) -> anyhow::Result<()> {
    let name = cluster.agent_pod("node1")?["metadata"]["name"].as_str().context("a name")?.to_owned();
    let eviction = json!({
        "apiVersion": "policy/v1", "kind": "Eviction", "metadata": { "name": name, "namespace": "kirsa" }
    });
    let file = cluster.state.join("eviction.json");
    std::fs::write(&file, eviction.to_string())?;
    let path = format!("/api/v1/namespaces/kirsa/pods/{name}/eviction");
    cluster.kubectl(&["create", "--raw", &path, "-f", &file.display().to_string()]).map(drop)
}

fn uid(cluster: &Cluster) -> anyhow::Result<Value> {
    Ok(cluster.agent_pod("node1")?["metadata"]["uid"].clone())
}

/// Why the agent's container was started anew.
fn restarted(cluster: &Cluster, why: &str) -> anyhow::Result<()> {
    let pod = cluster.agent_pod("node1")?;
    let last = &pod["status"]["containerStatuses"][0]["lastState"]["terminated"];
    ensure!(last["reason"] == why, "the agent ended by {last}, not {why}");
    Ok(())
}
