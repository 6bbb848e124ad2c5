//! One pod, its own credentials, by plain wget.

use anyhow::ensure;

use super::{ASK, Scale};
use crate::{cluster::Cluster, pods::Job};

pub fn run(cluster: &Cluster, _: &Scale) -> anyhow::Result<String> {
    cluster.agent_ready()?;
    own_credentials(cluster, "smoke")?;
    let (message, code) = cluster.run(Job::new("no-role", "default", &format!("{ASK} ask || exit 1; say $key")))?;
    ensure!(code == 1 && message.contains("404"), "a pod without a role: {code} {message}");
    Ok("a pod has its own credentials, one without a role has 404".to_owned())
}

/// A pod of a service account with a role of its own gets credentials of that role.
pub fn own_credentials(cluster: &Cluster, name: &str) -> anyhow::Result<()> {
    cluster.identities(&[name.to_owned()])?;
    let (message, code) = cluster.run(Job::new(name, name, &format!("{ASK} ask || exit 1; say $key")))?;
    ensure!(code == 0, "{message}");
    let role = cluster.issued()?.remove(message.trim());
    ensure!(role == Some(Cluster::role_arn(name)), "{message} was issued for {role:?}");
    Ok(())
}
