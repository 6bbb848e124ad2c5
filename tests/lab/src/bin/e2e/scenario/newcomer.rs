//! A node that boots with pods waiting for it, the agent last: closed from the first packet on by the boot-time rule.

use std::{fs, time::Duration};

use anyhow::{Context as _, ensure};

use super::{ASK, Scale};
use crate::{
    cluster::{Cluster, NAMESPACE},
    pods::Job,
};

pub fn run(cluster: &Cluster, _: &Scale) -> anyhow::Result<String> {
    cluster.agent_ready()?;
    cluster.identities(&["early".to_owned()])?;
    cluster.hold_agent()?;
    let outcome = boot(cluster);
    cluster.admit_agent("node1")?;
    let served = outcome.and_then(|()| {
        cluster.agent_ready()?;
        let ended = cluster.pods.ended(&["early".to_owned()], Duration::from_secs(60))?;
        let (_, message, code) = ended.first().context("a pod")?;
        ensure!(*code == 0, "{message}");
        let mut words = message.split_whitespace();
        let refused: u64 = words.next().and_then(|n| n.parse().ok()).context("a count")?;
        let role = words.next().and_then(|key| cluster.issued().ok()?.remove(key));
        ensure!(role == Some(Cluster::role_arn("early")), "{message} was issued for {role:?}");
        Ok(refused)
    });
    cluster.release_agent("node1")?;
    cluster.agent_ready()?;
    cluster.clear()?;
    Ok(format!(
        "a pod that was there before the agent asked {} times in vain, reached nobody, and then had its own credentials",
        served?
    ))
}

fn boot(cluster: &Cluster) -> anyhow::Result<()> {
    cluster.script("machine-stop.sh", &["node1"])?;
    let rules = cluster.manifests("daemonset/boot/kirsa-boot.nft");
    ensure!(fs::exists(&rules)?, "{rules}");
    // As its systemd unit does it, before the kubelet.
    cluster.script_with("node.sh", &["1"], &[("BOOT_RULES", &rules)])?;
    let script = format!("{ASK} n=0; until ask; do n=$((n + 1)); sleep 0.1; done; say $n $key");
    cluster.start(&[Job::new("early", "early", &script)])?;
    cluster.pods.wait("an early pod", Duration::from_secs(60), |seen| {
        seen.get("early").filter(|seen| seen.running).map(drop)
    })?;
    cluster.until("attempts in vain", Duration::from_secs(30), || {
        let output = cluster.kubectl(&["-n", NAMESPACE, "exec", "early", "--", "cat", "/dev/termination-log"])?;
        Ok((output.contains("role list")).then_some(()))
    })
}
