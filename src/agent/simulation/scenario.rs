//! Scenarios of a cluster: when agents start, when pods send requests, and when STS fails.

use std::{collections::BTreeMap, ops::Range, thread, time::Duration};

use super::{Calls, NodeRun, Site, simulate_node};

const MINUTE: Duration = Duration::from_secs(60);
const HOUR: Duration = Duration::from_secs(3_600);
/// Time that is simulated after the last start: long enough for the refreshes that follow it.
const AFTER: Duration = Duration::from_secs(40 * 60);
/// Maximum time between the end of an agent and the start of its replacement.
const REPLACEMENT: Duration = Duration::from_secs(3);
/// Time until a replaced agent counts as available: minReadySeconds and the delays of the kubelet.
const WAVE: Duration = Duration::from_secs(15);

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Scenario {
    /// Hours after any event.
    Steady,
    /// A rolling update, with this percentage of the nodes at a time.
    Rollout(u32),
    /// New nodes with new pods, all within this time.
    NewNodes(Duration),
    /// A cluster restart: agents start within this time, pods within half a minute after them.
    PowerCut(Duration),
    /// An STS outage of this duration.
    StsOutage(Duration),
}

/// Simulates the cluster and returns its calls per second, from the beginning of the scenario. The nodes share `runs`
/// simulated runs: as many runs as nodes are exact, a tenth of them overestimates the worst second slightly.
pub(super) fn simulate(scenario: Scenario, site: &Site, nodes: u32, runs: u32) -> SimResult {
    let measured = scenario.measured();
    let share = |first: u32, step: u32| {
        let mut calls = Calls::default();
        for number in (first..runs).step_by(step as usize) {
            let mut random = fastrand::Rng::with_seed(u64::from(number) + 1);
            // An outage hits each run at another time; without one, a run is the same whenever it starts.
            let outage = scenario.sts_outage().map(|outage| (outage, scenario.start(number, nodes, &mut random)));
            let run = NodeRun {
                until: measured.end,
                first_requests: scenario.first_requests(),
                sts_outage: outage.clone().map(|(outage, start)| outage.start - start..outage.end - start),
            };
            let of_node = simulate_node(site, &run, random.u64(..));
            for node in (number..nodes).step_by(runs as usize) {
                let start = match &outage {
                    Some((_, start)) => *start + REPLACEMENT.mul_f64(random.f64()),
                    None => scenario.start(node, nodes, &mut random),
                };
                calls.add(&of_node, start, &measured);
            }
        }
        calls
    };
    let threads = thread::available_parallelism().map_or(1, usize::from) as u32;
    let calls = thread::scope(|scope| {
        let share = &share;
        let shares: Vec<_> = (0..threads).map(|first| scope.spawn(move || share(first, threads))).collect();
        shares.into_iter().fold(Calls::default(), |mut all, calls| {
            all.add(&calls.join().expect("no panic"), Duration::ZERO, &(Duration::ZERO..Duration::MAX));
            all
        })
    });
    SimResult { calls, duration: measured.end - measured.start }
}

#[derive(Debug, PartialEq, Eq)]
pub(super) struct SimResult {
    pub(super) calls: Calls,
    pub(super) duration: Duration,
}

impl SimResult {
    /// Returns the number of STS calls.
    pub(super) fn sts_total(&self, when: Range<Duration>) -> u64 {
        self.calls.sts.range(when.start.as_secs()..when.end.as_secs()).map(|(_, count)| count).sum()
    }

    /// Returns the number of STS calls in the worst second.
    pub(super) fn sts_worst(&self, when: Range<Duration>) -> u64 {
        worst(&self.calls.sts, when)
    }

    /// Returns the number of API calls in the worst second, without restarted watches.
    pub(super) fn api_worst(&self, when: Range<Duration>) -> u64 {
        worst(&self.calls.api, when)
    }
}

fn worst(by_second: &BTreeMap<u64, u64>, when: Range<Duration>) -> u64 {
    by_second.range(when.start.as_secs()..when.end.as_secs()).map(|(_, count)| *count).max().unwrap_or(0)
}

impl Scenario {
    /// Returns the period in which calls are counted. It starts after an existing cluster has settled.
    fn measured(self) -> Range<Duration> {
        let start = match self {
            Self::Steady | Self::StsOutage(_) => 2 * HOUR,
            _ => Duration::ZERO,
        };
        let duration = match self {
            Self::Steady => HOUR,
            Self::Rollout(percent) => WAVE * 100u32.div_ceil(percent) + AFTER,
            Self::NewNodes(within) | Self::PowerCut(within) => within + AFTER,
            Self::StsOutage(outage) => outage + AFTER,
        };
        start..start + duration
    }

    /// Returns the time when the agent of a node starts.
    fn start(self, node: u32, nodes: u32, random: &mut fastrand::Rng) -> Duration {
        match self {
            // Agents started at random times within an hour.
            Self::Steady | Self::StsOutage(_) => HOUR.mul_f64(random.f64()),
            Self::Rollout(percent) => {
                let wave = node / (nodes * percent).div_ceil(100).max(1);
                WAVE * wave + REPLACEMENT.mul_f64(random.f64())
            }
            Self::NewNodes(within) | Self::PowerCut(within) => within.mul_f64(random.f64()),
        }
    }

    /// Returns the window in which the pods of a node send their first request.
    fn first_requests(self) -> Duration {
        match self {
            Self::NewNodes(_) | Self::PowerCut(_) => MINUTE / 2,
            // The pods still have credentials from the previous agent.
            _ => 45 * MINUTE,
        }
    }

    fn sts_outage(self) -> Option<Range<Duration>> {
        let Self::StsOutage(outage) = self else { return None };
        let start = self.measured().start;
        Some(start..start + outage)
    }
}

impl Calls {
    /// Adds the calls of a node that started at `start` and fall into the measured period.
    fn add(&mut self, node: &Self, start: Duration, measured: &Range<Duration>) {
        let (offset, measured) = (start.as_secs(), measured.start.as_secs()..measured.end.as_secs());
        for (all, of_node) in [(&mut self.api, &node.api), (&mut self.sts, &node.sts)] {
            for (second, count) in of_node {
                if let Some(second) = Some(second + offset).filter(|second| measured.contains(second)) {
                    *all.entry(second - measured.start).or_default() += count;
                }
            }
        }
        self.refused += node.refused;
        self.longest = self.longest.max(node.longest);
    }
}
