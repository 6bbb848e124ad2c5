//! What the running agent holds, as the kernel tells it.

use anyhow::{Context as _, ensure};

use super::Scale;
use crate::cluster::Cluster;

/// CAP_NET_ADMIN, by its number in capabilities(7).
const NET_ADMIN: u64 = 1 << 12;
/// CAP_NET_BIND_SERVICE, which the container gets and the agent drops.
const NET_BIND_SERVICE: u64 = 1 << 10;

pub fn run(cluster: &Cluster, _: &Scale) -> anyhow::Result<String> {
    cluster.agent_ready()?;
    let status = cluster.on("node1", &["sh", "-c", "cat /proc/$(pgrep -xo kirsa)/status"])?;
    let field = |name: &str| {
        let line = status.lines().find_map(|line| line.strip_prefix(name));
        line.map(|value| value.trim_start_matches(':').trim().to_owned()).with_context(|| format!("no {name}"))
    };
    for set in ["CapInh", "CapPrm", "CapEff", "CapBnd", "CapAmb"] {
        let held = u64::from_str_radix(&field(set)?, 16)?;
        // Shrinking the bounding set takes SETPCAP, which the container does not get; no_new_privs stands in for it.
        let allowed = if set == "CapBnd" { NET_ADMIN | NET_BIND_SERVICE } else { NET_ADMIN };
        ensure!(held & !allowed == 0, "{set} holds {held:#x}: more than {allowed:#x}");
    }
    ensure!(field("NoNewPrivs")? == "1", "it could gain privileges");
    ensure!(field("Seccomp")? == "2", "no seccomp filter");
    let writable = cluster.on(
        "node1",
        &["sh", "-c", "awk '$5 == \"/\" || $5 == \"/var/lib/cni\" {print $5, $6}' /proc/$(pgrep -xo kirsa)/mountinfo"],
    )?;
    for line in writable.lines() {
        ensure!(line.contains(" ro,") || line.ends_with(" ro"), "writable: {line}");
    }
    ensure!(writable.lines().count() == 2, "mounts: {writable}");
    let memory = field("VmRSS")?;
    Ok(format!("NET_ADMIN alone, no new privileges, seccomp, read-only root and records; {memory} resident"))
}
