//! The node goes down without a word and comes back: records of pods that are no more, addresses dealt anew.

use std::{fs, time::Duration};

use anyhow::{Context as _, ensure};

use super::{ASK, Scale};
use crate::{cluster::Cluster, pods::Job};

pub fn run(cluster: &Cluster, _: &Scale) -> anyhow::Result<String> {
    cluster.agent_ready()?;
    let accounts: Vec<String> = (0..6).map(|n| format!("boot-{n}")).collect();
    cluster.identities(&accounts)?;
    let script = format!("{ASK} until ask; do sleep 0.1; done; say $key");
    let living: Vec<Job> = accounts.iter().map(|name| Job::new(name, name, "sleep 1000")).collect();
    cluster.start(&living)?;
    cluster.pods.wait("running pods", Duration::from_secs(30), |seen| {
        accounts.iter().all(|name| seen.get(name).is_some_and(|seen| seen.running)).then_some(())
    })?;
    let records = || -> anyhow::Result<usize> {
        let folder = fs::read_dir(cluster.disk("node1", "/var/lib/cni/results"))?;
        Ok(folder.flatten().filter(|entry| entry.file_name().to_string_lossy().ends_with("-eth0")).count())
    };
    ensure!(records()? >= accounts.len(), "{} records", records()?);

    cluster.script("machine-stop.sh", &["node1"])?;
    let left = records()?;
    ensure!(left >= accounts.len(), "the crash took the records with it");
    // Of other accounts, so that an address means another one than its old record says.
    let heirs: Vec<Job> = (0..accounts.len())
        .map(|n| Job::new(&format!("heir-{n}"), &accounts[(n + 1) % accounts.len()], &script))
        .collect();
    cluster.script("node.sh", &["1"])?;
    cluster.start(&heirs)?;
    let names: Vec<String> = heirs.iter().map(|job| job.name.clone()).collect();
    let ended = cluster.pods.ended(&names, Duration::from_secs(120)).context("after the reboot")?;
    let issued = cluster.issued()?;
    for (job, (_, message, code)) in heirs.iter().zip(ended) {
        ensure!(code == 0, "{}: {message}", job.name);
        let role = issued.get(message.trim());
        ensure!(
            role == Some(&Cluster::role_arn(&job.account)),
            "{} of {} got credentials of {role:?}",
            job.name,
            job.account
        );
    }
    cluster.clear()?;
    cluster.agent_ready()?;
    Ok(format!("{left} records were left behind by the crash; every pod after it has its own credentials"))
}
