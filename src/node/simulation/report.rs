//! The table, and what must hold of it.

use std::{env, ops::Range, time::Duration};

use super::{
    Site,
    scenario::{Played, Scenario, play},
};
use crate::{
    cache::REFRESH_FRACTION,
    config::{EXCHANGES, START_WINDOW},
    kubernetes::watch,
};

/// AWS publishes it for signed calls of STS, per second, account and region:
/// <https://docs.aws.amazon.com/IAM/latest/UserGuide/reference_iam-quotas.html>. For AssumeRoleWithWebIdentity, which
/// is unsigned, it publishes none.
const STS_QUOTA: u64 = 600;
const STS_AWAY: Duration = minutes(30);

const fn minutes(n: u64) -> Duration {
    Duration::from_secs(n * 60)
}

fn given(name: &str, default: u32) -> u32 {
    env::var(name).ok().filter(|value| !value.is_empty()).map_or(default, |value| value.parse().expect(name))
}

/// Of the API server, besides what the table has: watches end from the server's side and begin anew.
fn watches_per_second(nodes: u32) -> f64 {
    2.0 * f64::from(nodes) / f64::from(watch::WATCH_TIMEOUT_SECONDS)
}

fn row(name: &str, played: &Played, without: &Played, when: Range<Duration>) {
    let (all, worst) = (played.in_all(when.clone()), played.worst(when.clone()));
    println!(
        "| {name} | {all} | {:.0} | **{worst}** | {:.1}× | {} | {} | {} | {:.1} s |",
        all as f64 / (when.end - when.start).as_secs_f64(),
        worst as f64 / STS_QUOTA as f64,
        without.worst(when.clone()),
        played.api_worst(when),
        played.calls.refused,
        played.calls.longest.as_secs_f64(),
    );
}

/// `make simulate`: from the environment NODES, LIVES (how many of them are simulated), on each of them PODS and
/// ACCOUNTS with a role, STS_MILLIS, SESSION and WINDOW (seconds).
#[test]
#[ignore = "minutes of work: make simulate"]
fn simulate() {
    let nodes = given("NODES", 5_000);
    let lives = given("LIVES", 500).min(nodes);
    let site = Site {
        pods: given("PODS", 40) as usize,
        accounts: given("ACCOUNTS", 20) as usize,
        sts: Duration::from_millis(given("STS_MILLIS", 200).into()),
        session: Duration::from_secs(given("SESSION", 3_600).into()),
        window: Duration::from_secs(given("WINDOW", START_WINDOW as u32).into()),
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
        ("STS away for 30 min: meanwhile", Scenario::StsAway(STS_AWAY)),
    ] {
        let played = play(scenario, &site, nodes, lives);
        // Without jitter one life is like the other.
        let without = play(scenario, &Site { jitter: false, ..site.clone() }, nodes, lives.div_ceil(10));
        if let Scenario::StsAway(away) = scenario {
            row(name, &played, &without, Duration::ZERO..away);
            row("and the 40 min after", &played, &without, away..played.lasted);
        } else {
            row(name, &played, &without, Duration::ZERO..played.lasted);
        }
    }
    println!("\nAPI server, besides: {:.0} watches a second that begin anew", watches_per_second(nodes));
}

const WINDOW: Duration = Duration::from_secs(START_WINDOW);

fn small(jitter: bool) -> Site {
    Site { pods: 10, accounts: 5, sts: Duration::from_millis(200), session: minutes(60), window: WINDOW, jitter }
}

const NODES: u32 = 20;
const SESSIONS: u64 = 5 * NODES as u64;

/// Each session once in its time, whatever its pods ask: what a cluster costs follows from the refresh alone.
#[test]
fn in_steady_state_there_are_no_more_exchanges_than_refreshes() {
    let played = play(Scenario::Steady, &small(true), NODES, NODES);
    let between = minutes(30).mul_f64((REFRESH_FRACTION.0 + REFRESH_FRACTION.1) / 2.0);
    let least = SESSIONS as f64 * played.lasted.as_secs_f64() / between.as_secs_f64();
    let calls = played.in_all(Duration::ZERO..played.lasted) as f64;
    assert!((0.96..1.04).contains(&(calls / least)), "{calls} calls, {least:.0} refreshes are due");
    assert_eq!(played.calls.refused, 0);
}

#[test]
fn jitter_spreads_a_restart_of_all_agents_and_the_refreshes_after_it() {
    let roll = |jitter| play(Scenario::Rollout(100), &small(jitter), NODES, NODES);
    let (with, without) = (roll(true), roll(false));
    let (restart, refreshes) = (Duration::ZERO..minutes(2), minutes(20)..minutes(35));
    for played in [&with, &without] {
        assert_eq!(played.in_all(restart.clone()), SESSIONS, "one exchange for each session");
        let refreshed = played.in_all(refreshes.clone());
        assert!((SESSIONS * 8 / 10..=SESSIONS).contains(&refreshed), "{refreshed}: one refresh of those that are used");
        assert_eq!(played.calls.refused, 0);
    }
    let worst = |when: &Range<Duration>| (with.worst(when.clone()), without.worst(when.clone()));
    let (spread, bunched) = worst(&restart);
    assert!(spread * 2 <= bunched, "restart: {spread} instead of {bunched} in a second");
    let (spread, bunched) = worst(&refreshes);
    assert!(spread * 5 <= bunched, "refreshes: {spread} instead of {bunched} in a second");
}

/// By pods, the first of four to be drawn would fetch for all, and most sessions at the beginning of the window.
#[test]
fn a_restart_is_spread_by_sessions_however_many_pods_share_one() {
    let site = Site { pods: 20, ..small(true) };
    let played = play(Scenario::Rollout(100), &site, NODES, NODES);
    let first = played.in_all(Duration::ZERO..Duration::from_secs(5));
    assert!(first <= SESSIONS * 55 / 100, "{first} of {SESSIONS} in the first 5 of 13 s");
}

/// IMDS-20: half a session is left at least, so an outage as long as that is seen by nobody.
#[test]
fn half_an_hour_without_sts_is_seen_by_no_pod_and_its_end_brings_no_rush() {
    let played = play(Scenario::StsAway(STS_AWAY), &small(true), NODES, NODES);
    assert_eq!(played.calls.refused, 0);
    let back = played.worst(STS_AWAY..STS_AWAY + minutes(1));
    assert!(back * 4 <= SESSIONS, "{back} of {SESSIONS} sessions in one second");
}

#[test]
fn no_node_asks_more_than_its_budget_has_and_its_pods_wait_for_one_exchange() {
    let site = Site { pods: 100, accounts: 100, ..small(true) };
    let played = play(Scenario::PowerCut(Duration::from_secs(1)), &site, 1, 1);
    let worst = played.worst(Duration::ZERO..played.lasted);
    assert!(worst <= u64::from(EXCHANGES.0 + EXCHANGES.1), "{worst} in a second");
    assert_eq!(played.calls.refused, 0);
    assert!(played.calls.longest < Duration::from_secs(1), "{:?}", played.calls.longest);
    assert_eq!(played, play(Scenario::PowerCut(Duration::from_secs(1)), &site, 1, 1), "the same seed, the same calls");
}
