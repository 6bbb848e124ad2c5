//! Prints the table of docs/capacity.md, and asserts its claims on small clusters.

use std::{env, ops::Range, time::Duration};

use super::{
    Site,
    scenario::{Scenario, SimResult, simulate},
};
use crate::{
    cache::REFRESH_FRACTION,
    config::{EXCHANGES, START_WINDOW},
    kubernetes::watch,
};

/// AWS's quota for signed STS calls per second, account and region:
/// <https://docs.aws.amazon.com/IAM/latest/UserGuide/reference_iam-quotas.html>. AWS publishes no quota for
/// AssumeRoleWithWebIdentity, which is unsigned.
const STS_QUOTA: u64 = 600;
const STS_OUTAGE: Duration = minutes(30);

const fn minutes(n: u64) -> Duration {
    Duration::from_secs(n * 60)
}

fn parameter(name: &str, default: u32) -> u32 {
    env::var(name).ok().filter(|value| !value.is_empty()).map_or(default, |value| value.parse().expect(name))
}

/// Returns the rate of restarted watches, which the server ends after a timeout. The table does not include them.
fn watches_per_second(nodes: u32) -> f64 {
    2.0 * f64::from(nodes) / f64::from(watch::WATCH_TIMEOUT_SECONDS)
}

fn row(name: &str, result: &SimResult, without_jitter: &SimResult, when: Range<Duration>) {
    let (all, worst) = (result.sts_total(when.clone()), result.sts_worst(when.clone()));
    println!(
        "| {name} | {all} | {:.0} | **{worst}** | {:.1}× | {} | {} | {} | {:.1} s |",
        all as f64 / (when.end - when.start).as_secs_f64(),
        worst as f64 / STS_QUOTA as f64,
        without_jitter.sts_worst(when.clone()),
        result.api_worst(when),
        result.calls.refused,
        result.calls.longest.as_secs_f64(),
    );
}

/// Runs for `make simulate`. Environment variables: NODES; RUNS, the number of simulated nodes; PODS and ACCOUNTS (with
/// a role) per node; STS_MILLIS; SESSION and WINDOW in seconds.
#[test]
#[ignore = "takes minutes: make simulate"]
fn print_table() {
    let nodes = parameter("NODES", 5_000);
    let runs = parameter("RUNS", 500).min(nodes);
    let site = Site {
        pods: parameter("PODS", 40) as usize,
        accounts: parameter("ACCOUNTS", 20) as usize,
        sts: Duration::from_millis(parameter("STS_MILLIS", 200).into()),
        session: Duration::from_secs(parameter("SESSION", 3_600).into()),
        window: Duration::from_secs(parameter("WINDOW", START_WINDOW as u32).into()),
        jitter: true,
    };
    let (pods, accounts, session) = (site.pods, site.accounts, site.session.as_secs());
    println!(
        "{nodes} nodes, {pods} pods and {accounts} service accounts with a role on each: {} sessions of {session} s; \
         STS answers after {:?}\n",
        u64::from(nodes) * accounts as u64,
        site.sts
    );
    println!(
        "| | STS calls | per second | worst second | of {STS_QUOTA}/s | without jitter | API server, worst second | \
         pods refused | longest wait |\n|---|--:|--:|--:|--:|--:|--:|--:|--:|"
    );
    for (name, scenario) in [
        ("steady state, 1 h", Scenario::Steady),
        ("rolling update, 2 % of the nodes at a time", Scenario::Rollout(2)),
        ("rolling update, 10 %", Scenario::Rollout(10)),
        ("rolling update, 100 %", Scenario::Rollout(100)),
        ("new nodes and pods, all within 1 min", Scenario::NewNodes(minutes(1))),
        ("power cut, agents back within 10 s", Scenario::PowerCut(Duration::from_secs(10))),
        ("STS outage of 30 min", Scenario::StsOutage(STS_OUTAGE)),
    ] {
        let result = simulate(scenario, &site, nodes, runs);
        // Without jitter, all runs are alike.
        let without_jitter = simulate(scenario, &Site { jitter: false, ..site.clone() }, nodes, runs.div_ceil(10));
        if let Scenario::StsOutage(outage) = scenario {
            row(name, &result, &without_jitter, Duration::ZERO..outage);
            row("the 40 min after it", &result, &without_jitter, outage..result.duration);
        } else {
            row(name, &result, &without_jitter, Duration::ZERO..result.duration);
        }
    }
    println!("\nAPI server, in addition: {:.0} restarted watches per second", watches_per_second(nodes));
}

const WINDOW: Duration = Duration::from_secs(START_WINDOW);

fn small(jitter: bool) -> Site {
    Site { pods: 10, accounts: 5, sts: Duration::from_millis(200), session: minutes(60), window: WINDOW, jitter }
}

const NODES: u32 = 20;
const SESSIONS: u64 = 5 * NODES as u64;

/// The cluster's load depends on the refreshes alone: each session is exchanged once per period, whatever pods request.
#[test]
fn steady_state_exchanges_equal_refreshes() {
    let result = simulate(Scenario::Steady, &small(true), NODES, NODES);
    let period = minutes(30).mul_f64((REFRESH_FRACTION.0 + REFRESH_FRACTION.1) / 2.0);
    let due = SESSIONS as f64 * result.duration.as_secs_f64() / period.as_secs_f64();
    let calls = result.sts_total(Duration::ZERO..result.duration) as f64;
    assert!((0.96..1.04).contains(&(calls / due)), "{calls} calls, {due:.0} refreshes are due");
    assert_eq!(result.calls.refused, 0);
}

#[test]
fn jitter_spreads_restarts_and_refreshes() {
    let rollout = |jitter| simulate(Scenario::Rollout(100), &small(jitter), NODES, NODES);
    let (with, without) = (rollout(true), rollout(false));
    let (restart, refreshes) = (Duration::ZERO..minutes(2), minutes(20)..minutes(35));
    for result in [&with, &without] {
        assert_eq!(result.sts_total(restart.clone()), SESSIONS, "one exchange per session");
        let refreshed = result.sts_total(refreshes.clone());
        assert!((SESSIONS * 8 / 10..=SESSIONS).contains(&refreshed), "{refreshed}: one refresh per session in use");
        assert_eq!(result.calls.refused, 0);
    }
    let worst = |when: &Range<Duration>| (with.sts_worst(when.clone()), without.sts_worst(when.clone()));
    let (spread, bunched) = worst(&restart);
    assert!(spread * 2 <= bunched, "restart: {spread} instead of {bunched} in a second");
    let (spread, bunched) = worst(&refreshes);
    assert!(spread * 5 <= bunched, "refreshes: {spread} instead of {bunched} in a second");
}

/// With jitter per pod, the shortest delay of four pods would decide, and most exchanges would come early in the
/// window.
#[test]
fn restart_jitter_is_per_session_not_per_pod() {
    let site = Site { pods: 20, ..small(true) };
    let result = simulate(Scenario::Rollout(100), &site, NODES, NODES);
    let first = result.sts_total(Duration::ZERO..Duration::from_secs(5));
    assert!(first <= SESSIONS * 55 / 100, "{first} of {SESSIONS} in the first 5 of 13 s");
}

/// IMDS-20: cached sessions have at least half of their lifetime left, so pods do not notice an outage of that length.
#[test]
fn sts_outage_of_30_min_refuses_no_pod() {
    let result = simulate(Scenario::StsOutage(STS_OUTAGE), &small(true), NODES, NODES);
    assert_eq!(result.calls.refused, 0);
    let after = result.sts_worst(STS_OUTAGE..STS_OUTAGE + minutes(1));
    assert!(after * 4 <= SESSIONS, "{after} of {SESSIONS} sessions in one second");
}

#[test]
fn rate_limit_holds_after_a_power_cut() {
    let site = Site { pods: 100, accounts: 100, ..small(true) };
    let restart = || simulate(Scenario::PowerCut(Duration::from_secs(1)), &site, 1, 1);
    let result = restart();
    let worst = result.sts_worst(Duration::ZERO..result.duration);
    assert!(worst <= u64::from(EXCHANGES.0 + EXCHANGES.1), "{worst} in a second");
    assert_eq!(result.calls.refused, 0);
    assert!(result.calls.longest < Duration::from_secs(1), "{:?}", result.calls.longest);
    assert_eq!(result, restart(), "the same seed produces the same calls");
}
