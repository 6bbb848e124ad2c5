//! One pod, its own credentials, by plain wget, over each family of addresses that there is.

use anyhow::ensure;

use super::{ASK, Scale};
use crate::{cluster::Cluster, pods::Job};

pub fn run(cluster: &Cluster, _: &Scale) -> anyhow::Result<String> {
    cluster.agent_ready()?;
    own_credentials(cluster, "smoke")?;
    let (message, code) = cluster.run(Job::new("no-role", "default", &format!("{ASK} ask || exit 1; say $key")))?;
    ensure!(code == 1 && message.contains("404"), "a pod without a role: {code} {message}");
    if !cluster.dual_stack()? {
        return Ok("a pod has its own credentials, one without a role has 404; IPv4 alone here".to_owned());
    }
    // Patiently: with some CNI plugins the kernel still looks whether somebody else has the new addresses.
    let patiently = "imds=http://[fd00:ec2::254]/latest/meta-data/iam/security-credentials/
        n=1; until ask || [ $n -gt 20 ]; do n=$((n + 1)); sleep 0.2; done";
    let attempts = ask_of(cluster, "smoke-ipv6", patiently)?;
    Ok(format!(
        "a pod has its own credentials over IPv4 at once and over IPv6 at attempt {attempts}, one without a role has 404"
    ))
}

/// A pod of a service account with a role of its own gets credentials of that role.
pub fn own_credentials(cluster: &Cluster, name: &str) -> anyhow::Result<()> {
    ask_of(cluster, name, "").map(drop)
}

/// What the script left in `$n`.
fn ask_of(cluster: &Cluster, name: &str, before: &str) -> anyhow::Result<String> {
    cluster.identities(&[name.to_owned()])?;
    let (message, code) = cluster.run(Job::new(name, name, &format!("{ASK} {before}\nask || exit 1; say $key $n")))?;
    ensure!(code == 0, "{message}");
    let (key, n) = message.trim().split_once(' ').unwrap_or((message.trim(), ""));
    let role = cluster.issued()?.remove(key);
    ensure!(role == Some(Cluster::role_arn(name)), "{message} was issued for {role:?}");
    Ok(n.to_owned())
}
