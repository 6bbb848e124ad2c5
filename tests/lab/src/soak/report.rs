//! What was counted, and how it reads.

use std::collections::BTreeMap;
use std::fmt;
use std::time::Duration;

use anyhow::Result;

use super::Plan;
use super::fleet::Fleet;
use crate::agent::Agent;

#[derive(Debug, Default)]
pub(super) struct Tally {
    latencies: BTreeMap<&'static str, Vec<Duration>>,
    statuses: BTreeMap<(&'static str, u16), usize>,
    calls: usize,
    failures: BTreeMap<String, usize>,
    wrong: Vec<String>,
}

impl Tally {
    pub(super) fn latency(&mut self, route: &'static str, took: Duration) {
        self.latencies.entry(route).or_default().push(took);
    }

    pub(super) fn status(&mut self, route: &'static str, status: u16) {
        *self.statuses.entry((route, status)).or_default() += 1;
    }

    /// What an SDK has tried, and why it gave up.
    pub(super) fn call(&mut self, failed: Option<anyhow::Error>) {
        self.calls += 1;
        if let Some(error) = failed {
            *self.failures.entry(format!("{error:#}")).or_default() += 1;
        }
    }

    pub(super) fn wrong(&mut self, what: String) {
        self.wrong.push(what);
    }
}

#[derive(Debug)]
pub struct Report {
    plan: Plan,
    took: Duration,
    churned: u32,
    namespaces: usize,
    tally: Tally,
    /// Resident, and of that anonymous, in KiB.
    memory: Vec<(Duration, (u64, u64))>,
    issued: usize,
    failed: usize,
    least: f64,
    canary_hits: usize,
    refusals: BTreeMap<&'static str, f64>,
}

impl Report {
    pub(super) fn new(
        plan: &Plan,
        took: Duration,
        churned: u32,
        mut tally: Tally,
        memory: Vec<(Duration, (u64, u64))>,
        fleet: &Fleet,
        agent: &Agent,
    ) -> Result<Self> {
        tally.latencies.values_mut().for_each(|all| all.sort_unstable());
        let (issued, failed) = fleet.exchanges();
        let mut refusals = BTreeMap::new();
        for reason in ["unknown_pod", "ambiguous_address", "pod_gone", "exchange_timeout", "imds_token_invalid"] {
            refusals.insert(reason, agent.metric("kirsa_refusals_total", &[("reason", reason)])?);
        }
        Ok(Self {
            plan: plan.clone(),
            took,
            churned,
            namespaces: fleet.namespaces(),
            tally,
            memory,
            issued,
            failed,
            least: fleet.least_exchanges(),
            canary_hits: fleet.canary_hits(),
            refusals,
        })
    }

    pub fn requests(&self) -> usize {
        self.tally.statuses.values().sum()
    }

    pub fn wrong_identities(&self) -> &[String] {
        &self.tally.wrong
    }

    pub fn canary_hits(&self) -> usize {
        self.canary_hits
    }

    /// What SDKs wanted, and how often they gave up.
    pub fn calls(&self) -> (usize, usize) {
        (self.tally.calls, self.tally.failures.values().sum())
    }

    /// Exchanges that STS made, and that there had to be.
    pub fn exchanges(&self) -> (usize, f64) {
        (self.issued, self.least)
    }

    /// By how much anonymous memory grew from the second quarter to the last, in KiB.
    pub fn growth(&self) -> i64 {
        let quarter = self.memory.len().div_ceil(4).max(1);
        let mean = |part: &[(Duration, (u64, u64))]| {
            part.iter().map(|(_, (_, anonymous))| *anonymous as i64).sum::<i64>() / part.len().max(1) as i64
        };
        let early: Vec<_> = self.memory.iter().skip(quarter).take(quarter).copied().collect();
        mean(&self.memory[self.memory.len() - quarter..]) - mean(&early)
    }
}

impl fmt::Display for Report {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Plan { pods, accounts, churn, session, .. } = self.plan;
        let (calls, failures) = self.calls();
        let hours = self.took.as_secs_f64() / 3_600.0;
        writeln!(
            f,
            "{pods} pods of {accounts} service accounts in {} network namespaces, for {:.0} s; sessions of {session} s",
            self.namespaces,
            self.took.as_secs_f64()
        )?;
        writeln!(f, "churn               {} pods, {churn} a second wanted", self.churned)?;
        writeln!(f, "requests            {}", self.requests())?;
        writeln!(f, "calls of SDKs       {calls}, of which {failures} failed after all tries")?;
        for (why, count) in &self.tally.failures {
            writeln!(f, "                    {count} x {why}")?;
        }
        writeln!(f, "wrong identities    {}", self.tally.wrong.len())?;
        writeln!(f, "canary hits         {}", self.canary_hits)?;
        writeln!(f, "route               p50 ms    p99 ms    max ms    answers by status")?;
        for (route, all) in &self.tally.latencies {
            let at = |quantile: f64| all[((all.len() - 1) as f64 * quantile) as usize].as_secs_f64() * 1_000.0;
            let statuses = self.tally.statuses.iter().filter(|((of, _), _)| of == route);
            let statuses: Vec<_> = statuses.map(|((_, status), count)| format!("{status}: {count}")).collect();
            let statuses = statuses.join(", ");
            writeln!(f, "  {route:<14} {:>9.1} {:>9.1} {:>9.1}    {statuses}", at(0.5), at(0.99), at(1.0))?;
        }
        for (reason, count) in self.refusals.iter().filter(|(_, count)| **count > 0.0) {
            writeln!(f, "refused             {count} x {reason}")?;
        }
        writeln!(
            f,
            "exchanges           {} issued, {} failed; {:.0} are the least ({:.2} x); {:.0} an hour",
            self.issued,
            self.failed,
            self.least,
            self.issued as f64 / self.least,
            (self.issued + self.failed) as f64 / hours
        )?;
        write!(f, "memory in MiB       ")?;
        let step = self.memory.len().div_ceil(12).max(1);
        for (at, (resident, anonymous)) in self.memory.iter().step_by(step) {
            let mib = |kib: u64| kib as f64 / 1_024.0;
            write!(f, "{:.0} s: {:.1} ({:.1})  ", at.as_secs_f64(), mib(*resident), mib(*anonymous))?;
        }
        writeln!(
            f,
            "\n                    resident (anonymous); from the second quarter to the last {:+} KiB",
            self.growth()
        )
    }
}
