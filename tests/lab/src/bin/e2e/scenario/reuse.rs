//! Addresses that come back at once: two service accounts' pods churn through a network of thirteen addresses.

use std::{
    collections::HashMap,
    fs,
    time::{Duration, Instant},
};

use anyhow::ensure;

use super::{ASK, Scale};
use crate::{
    cluster::{Cluster, now},
    figures::spread,
    pods::Job,
};

/// Thirteen addresses to deal, in turn: with twelve pods the next one gets what the last one left.
const SMALL: &str = "10.244.1.208/28";
const PODS: usize = 12;
const CNI: &str = "/etc/cni/net.d/10-pods.conflist";

pub fn run(cluster: &Cluster, scale: &Scale) -> anyhow::Result<String> {
    cluster.agent_ready()?;
    let file = cluster.disk("node1", CNI);
    let before = fs::read_to_string(&file)?;
    fs::write(&file, before.replacen("10.244.1.0/24", SMALL, 1))?;
    let outcome = churn(cluster, Duration::from_secs(scale.churn));
    fs::write(&file, before)?;
    cluster.clear()?;
    outcome
}

fn churn(cluster: &Cluster, time: Duration) -> anyhow::Result<String> {
    let accounts = ["churn-a", "churn-b"].map(str::to_owned);
    cluster.identities(&accounts)?;
    // Half of them ask all their life, so that some are asking when their address is given away.
    let once = format!("{ASK} ask || exit 1; say $key");
    let often = format!(
        "{ASK} keys=; for n in 1 2 3 4 5 6 7 8; do ask || exit 1; keys=\"$keys $key\"; sleep 0.2; done; say $keys"
    );
    let mut turn = 0;
    let mut next = || {
        turn += 1;
        let account = &accounts[turn % 2];
        // The account's turn and the script's differ in their period: every pairing comes.
        Job::new(&format!("churn-{turn}"), account, if turn % 3 == 0 { &often } else { &once })
    };
    let mut living: HashMap<String, Job> = HashMap::new();
    let mut holders: HashMap<String, (String, f64)> = HashMap::new();
    let (mut asked, mut pods, mut failed, mut gaps) = (0, 0, Vec::new(), Vec::new());
    let end = Instant::now() + time;
    let mut outside = 0;
    while Instant::now() < end || !living.is_empty() {
        if Instant::now() < end && living.len() < PODS {
            let jobs: Vec<Job> = (living.len()..PODS).map(|_| next()).collect();
            cluster.start(&jobs)?;
            living.extend(jobs.into_iter().map(|job| (job.name.clone(), job)));
        }
        let names: Vec<String> = living.keys().cloned().collect();
        let done = cluster.pods.wait("the end of some pod", Duration::from_secs(60), |seen| {
            let done: Vec<_> = names
                .iter()
                .filter_map(|name| Some((name.clone(), seen.get(name)?.clone())))
                .filter(|(_, seen)| seen.ended.is_some())
                .collect();
            (!done.is_empty()).then_some(done)
        })?;
        let issued = cluster.issued()?;
        for (name, seen) in done {
            let Some(job) = living.remove(&name) else { continue };
            let (message, code) = seen.ended.unwrap_or_default();
            pods += 1;
            if code != 0 {
                failed.push(format!("{name}: {}", message.trim()));
            } else {
                for key in message.split_whitespace() {
                    asked += 1;
                    let role = issued.get(key);
                    ensure!(
                        role == Some(&Cluster::role_arn(&job.account)),
                        "{name} of {} got credentials of {role:?}",
                        job.account
                    );
                }
            }
            if let Some((shown, address)) = seen.address {
                outside += usize::from(!address.starts_with("10.244.1.2"));
                let before = holders.insert(address, (job.account.clone(), now()));
                if let Some((account, until)) = before
                    && account != job.account
                {
                    gaps.push((shown - until).max(0.0) * 1e3);
                }
            }
            cluster.delete(&name)?;
        }
    }
    ensure!(outside <= PODS, "{outside} addresses are not of {SMALL}");
    ensure!(failed.is_empty(), "{} of {pods} pods were refused: {:?}", failed.len(), failed);
    Ok(format!(
        "{pods} pods, {asked} credentials, each its own; addresses changed hands {} times, after {}",
        gaps.len(),
        spread(gaps)
    ))
}
