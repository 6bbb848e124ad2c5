//! Pods that keep asking while something else happens: what fails here would have failed an SDK.

use std::time::Duration;

use anyhow::{Context as _, ensure};

use super::ASK;
use crate::{cluster::Cluster, pods::Job};

const PODS: usize = 4;

pub struct Load {
    names: Vec<String>,
    seconds: u64,
}

/// Asks for its credentials fifty times a second, as no SDK does.
fn script(seconds: u64) -> String {
    format!(
        "{ASK} ask || exit 1; n=0; bad=0; end=$((EPOCHSECONDS + {seconds}))
        while [ $EPOCHSECONDS -lt $end ]; do
          at=$EPOCHREALTIME; n=$((n + 1))
          answer=$(timeout 1 wget -q -O - $imds$role 2>&1) || {{ bad=$((bad + 1)); first=${{first:-$at}}; last=$EPOCHREALTIME; why=$answer; }}
          sleep 0.02
        done
        say $n $bad ${{first:-0}} ${{last:-0}} $why"
    )
}

impl Load {
    /// Returns when it has begun.
    pub fn start(cluster: &Cluster, seconds: u64) -> anyhow::Result<Self> {
        cluster.identities(&["load".to_owned()])?;
        let names: Vec<String> = (0..PODS).map(|n| format!("load-{n}")).collect();
        let jobs: Vec<Job> = names.iter().map(|name| Job::new(name, "load", &script(seconds))).collect();
        cluster.start(&jobs)?;
        cluster.pods.wait("running pods", Duration::from_secs(30), |seen| {
            names.iter().all(|name| seen.get(name).is_some_and(|seen| seen.running)).then_some(())
        })?;
        Ok(Self { names, seconds })
    }

    /// Waits for its end; what was seen, where no request failed.
    pub fn end(self, cluster: &Cluster) -> anyhow::Result<String> {
        let ended = cluster.pods.ended(&self.names, Duration::from_secs(self.seconds + 60))?;
        cluster.clear()?;
        let (mut asked, mut failed, mut gap, mut whys) = (0, 0, 0.0_f64, Vec::new());
        for (_, message, code) in ended {
            ensure!(code == 0, "{message}");
            let mut words = message.splitn(5, ' ');
            let mut number = || words.next().and_then(|word| word.trim().parse::<f64>().ok()).context("a number");
            let (n, bad, first, last) = (number()?, number()?, number()?, number()?);
            asked += n as u64;
            failed += bad as u64;
            gap = gap.max(last - first);
            whys.extend(words.next().map(|why| why.trim().to_owned()).filter(|why| !why.is_empty()));
        }
        let told = format!("{failed} of {asked} requests failed, over {:.0} ms", gap * 1e3);
        ensure!(failed == 0, "{told}: {whys:?}");
        Ok(told)
    }
}
