//! A new version while pods keep asking: none of them is refused, since it takes over the listening sockets.

use std::time::Duration;

use anyhow::{Context as _, ensure};

use super::{ASK, Scale};
use crate::{cluster::Cluster, pods::Job};

const LOADS: usize = 4;
const SECONDS: u64 = 40;

/// Asks for its credentials fifty times a second, as no SDK does: what fails here would have failed one.
fn load() -> String {
    format!(
        "{ASK} ask || exit 1; n=0; bad=0; end=$((EPOCHSECONDS + {SECONDS}))
        while [ $EPOCHSECONDS -lt $end ]; do
          at=$EPOCHREALTIME; n=$((n + 1))
          answer=$(timeout 1 wget -q -O - $imds$role 2>&1) || {{ bad=$((bad + 1)); first=${{first:-$at}}; last=$EPOCHREALTIME; why=$answer; }}
          sleep 0.02
        done
        say $n $bad ${{first:-0}} ${{last:-0}} $why"
    )
}

pub fn run(cluster: &Cluster, _: &Scale) -> anyhow::Result<String> {
    cluster.agent_ready()?;
    cluster.identities(&["load".to_owned()])?;
    let names: Vec<String> = (0..LOADS).map(|n| format!("load-{n}")).collect();
    let jobs: Vec<Job> = names.iter().map(|name| Job::new(name, "load", &load())).collect();
    cluster.start(&jobs)?;
    cluster.pods.wait("running pods", Duration::from_secs(30), |seen| {
        names.iter().all(|name| seen.get(name).is_some_and(|seen| seen.running)).then_some(())
    })?;
    let uid = || anyhow::Ok(cluster.agent_pod("node1")?["metadata"]["uid"].clone());
    let before = uid()?;
    cluster.kubectl(&["-n", "kirsa", "rollout", "restart", "daemonset/kirsa"])?;
    cluster.agent_ready()?;
    ensure!(uid()? != before, "nothing was rolled out");
    let ended = cluster.pods.ended(&names, Duration::from_secs(SECONDS + 60))?;
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
    let told = format!("{failed} of {asked} requests failed while the agent was replaced, over {:.0} ms", gap * 1e3);
    ensure!(failed == 0, "{told}: {whys:?}");
    Ok(told)
}
