//! What happens to a cluster: when its agents start, when their pods ask, when STS is away.

use std::{collections::BTreeMap, ops::Range, thread, time::Duration};

use super::{Calls, Life, Site, node};

const MINUTE: Duration = Duration::from_secs(60);
const HOUR: Duration = Duration::from_secs(3_600);
/// After the last start: long enough for the refreshes that follow it.
const AFTER: Duration = Duration::from_secs(40 * 60);
/// A replaced agent starts within this of its former one's end ...
const REPLACED: Duration = Duration::from_secs(3);
/// ... and counts as available this long after: minReadySeconds and the kubelet's ways.
const WAVE: Duration = Duration::from_secs(15);

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Scenario {
    /// Hours after anything happened.
    Steady,
    /// A rolling update, by how many of a hundred nodes at a time.
    Rollout(u32),
    /// New nodes with new pods, all within this.
    NewNodes(Duration),
    /// Everything comes back at once: agents within this, pods within half a minute of them.
    PowerCut(Duration),
    /// STS answers nobody for this long.
    StsAway(Duration),
}

/// The cluster's calls, by the second from the scenario's beginning on. Its nodes share `lives` that are simulated: as
/// many as there are nodes is exact, a tenth of them overrates the worst second a little.
pub(super) fn play(scenario: Scenario, site: &Site, nodes: u32, lives: u32) -> Played {
    let watched = scenario.watched();
    let share = |first: u32, step: u32| {
        let mut calls = Calls::default();
        for life in (first..lives).step_by(step as usize) {
            let mut random = fastrand::Rng::with_seed(u64::from(life) + 1);
            // An outage comes at another time of each life; else a life is the same whenever it starts.
            let away = scenario.sts_away().map(|away| (away, scenario.start(life, nodes, &mut random)));
            let lived = Life {
                until: watched.end,
                first_asked: scenario.first_asked(),
                sts_away: away.clone().map(|(away, start)| away.start - start..away.end - start),
            };
            let lived = node(site, &lived, random.u64(..));
            for number in (life..nodes).step_by(lives as usize) {
                let start = match &away {
                    Some((_, start)) => *start + REPLACED.mul_f64(random.f64()),
                    None => scenario.start(number, nodes, &mut random),
                };
                calls.add(&lived, start, &watched);
            }
        }
        calls
    };
    let threads = thread::available_parallelism().map_or(1, usize::from) as u32;
    let calls = thread::scope(|scope| {
        let share = &share;
        let shares: Vec<_> = (0..threads).map(|first| scope.spawn(move || share(first, threads))).collect();
        shares.into_iter().fold(Calls::default(), |mut all, calls| {
            all.add(&calls.join().expect("no panic in there"), Duration::ZERO, &(Duration::ZERO..Duration::MAX));
            all
        })
    });
    Played { calls, lasted: watched.end - watched.start }
}

#[derive(Debug, PartialEq, Eq)]
pub(super) struct Played {
    pub(super) calls: Calls,
    pub(super) lasted: Duration,
}

impl Played {
    /// Of STS.
    pub(super) fn in_all(&self, when: Range<Duration>) -> u64 {
        self.calls.sts.range(when.start.as_secs()..when.end.as_secs()).map(|(_, count)| count).sum()
    }

    /// Of STS, in one second.
    pub(super) fn worst(&self, when: Range<Duration>) -> u64 {
        worst(&self.calls.sts, when)
    }

    /// Of the API server, in one second, watches that begin anew excepted.
    pub(super) fn api_worst(&self, when: Range<Duration>) -> u64 {
        worst(&self.calls.api, when)
    }
}

fn worst(by_second: &BTreeMap<u64, u64>, when: Range<Duration>) -> u64 {
    by_second.range(when.start.as_secs()..when.end.as_secs()).map(|(_, count)| *count).max().unwrap_or(0)
}

impl Scenario {
    /// When what is counted happens. Before it, a cluster that is there already has come to rest.
    fn watched(self) -> Range<Duration> {
        let begins = match self {
            Self::Steady | Self::StsAway(_) => 2 * HOUR,
            _ => Duration::ZERO,
        };
        let lasts = match self {
            Self::Steady => HOUR,
            Self::Rollout(percent) => WAVE * 100u32.div_ceil(percent) + AFTER,
            Self::NewNodes(within) | Self::PowerCut(within) => within + AFTER,
            Self::StsAway(away) => away + AFTER,
        };
        begins..begins + lasts
    }

    fn start(self, number: u32, nodes: u32, random: &mut fastrand::Rng) -> Duration {
        match self {
            // Agents that started some time in an hour.
            Self::Steady | Self::StsAway(_) => HOUR.mul_f64(random.f64()),
            Self::Rollout(percent) => {
                let wave = number / (nodes * percent).div_ceil(100).max(1);
                WAVE * wave + REPLACED.mul_f64(random.f64())
            }
            Self::NewNodes(within) | Self::PowerCut(within) => within.mul_f64(random.f64()),
        }
    }

    fn first_asked(self) -> Duration {
        match self {
            Self::NewNodes(_) | Self::PowerCut(_) => MINUTE / 2,
            // They have credentials of the former agent.
            _ => 45 * MINUTE,
        }
    }

    fn sts_away(self) -> Option<Range<Duration>> {
        let Self::StsAway(away) = self else { return None };
        let begins = self.watched().start;
        Some(begins..begins + away)
    }
}

impl Calls {
    fn add(&mut self, node: &Self, start: Duration, watched: &Range<Duration>) {
        let (offset, watched) = (start.as_secs(), watched.start.as_secs()..watched.end.as_secs());
        for (all, of_node) in [(&mut self.api, &node.api), (&mut self.sts, &node.sts)] {
            for (second, count) in of_node {
                if let Some(second) = Some(second + offset).filter(|second| watched.contains(second)) {
                    *all.entry(second - watched.start).or_default() += count;
                }
            }
        }
        self.refused += node.refused;
        self.longest = self.longest.max(node.longest);
    }
}
