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
    // Not at the first attempt: the kernel looks for a second or two whether somebody else has the new addresses.
    let patiently = "imds=http://[fd00:ec2::254]/latest/meta-data/iam/security-credentials/
        n=0; until ask || [ $n -gt 20 ]; do n=$((n + 1)); sleep 0.2; done";
    ask_of(cluster, "smoke-ipv6", patiently)?;
    Ok("a pod has its own credentials over IPv4 and over IPv6, one without a role has 404".to_owned())
}

/// A pod of a service account with a role of its own gets credentials of that role.
pub fn own_credentials(cluster: &Cluster, name: &str) -> anyhow::Result<()> {
    ask_of(cluster, name, "")
}

fn ask_of(cluster: &Cluster, name: &str, before: &str) -> anyhow::Result<()> {
    cluster.identities(&[name.to_owned()])?;
    let (message, code) = cluster.run(Job::new(name, name, &format!("{ASK} {before}\nask || exit 1; say $key")))?;
    ensure!(code == 0, "{message}");
    let role = cluster.issued()?.remove(message.trim());
    ensure!(role == Some(Cluster::role_arn(name)), "{message} was issued for {role:?}");
    Ok(())
}
