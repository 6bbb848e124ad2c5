//! The API server away, or saying no, while a session is missing, in hand, and due for its refresh.

use std::time::Duration;

use anyhow::{Context, Result, ensure};
use lab::agent::Agent;
use lab::net::{Pod, Shape};
use lab::poll::{poll, poll_every, timed};

use super::cluster::Cluster;
use super::{Held, LOOK, PATIENCE, credentials, each, is_refusal, list, refusal};

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Fault {
    /// SIGSTOP: connections stay, and nothing is answered.
    Stopped,
    /// SIGKILL: connections are refused.
    Killed,
    /// The API server answers from its cache, and fails at everything that it would have to read or write.
    WithoutEtcd,
    /// RBAC was changed: the agent may not mint any more.
    TokensForbidden,
}

/// One fault, and what it comes to.
struct Row {
    fault: Fault,
    /// Of an exchange, and part of what the log says of it: of the first that fails, and of the refresh, by when the
    /// connections that were open have been given up.
    cold: (&'static str, &'static str),
    refresh: (&'static str, &'static str),
    /// For a pod that had no role when it was last asked: the API server is asked again before it is told so.
    without_role: (u16, &'static str),
}

const AWAY: (u16, &str) = (503, "account_unavailable");
const SILENT: (&str, &str) = ("exchange_timeout", "timed out after 4 s waiting for the API server's TokenRequest");

fn table() -> Vec<Row> {
    let row = |fault, cold, refresh, without_role| Row { fault, cold, refresh, without_role };
    vec![
        row(Fault::Stopped, SILENT, ("token_unavailable", "deadline has elapsed"), AWAY),
        row(Fault::Killed, ("token_unavailable", "TokenRequest"), ("token_unavailable", "refused"), AWAY),
        row(Fault::WithoutEtcd, SILENT, SILENT, AWAY),
        row(Fault::TokensForbidden, ("token_forbidden", "403"), ("token_forbidden", "403"), (404, "no_role")),
    ]
}

impl Row {
    fn begin(&self, cluster: &Cluster) -> Result<()> {
        match self.fault {
            Fault::Stopped => cluster.api.pause(),
            Fault::Killed => cluster.api.kill(),
            Fault::WithoutEtcd => cluster.api.pause_etcd(),
            Fault::TokensForbidden => cluster.forbid_tokens(),
        }
    }

    fn end(&self, cluster: &Cluster) -> Result<()> {
        match self.fault {
            Fault::Stopped => cluster.api.resume(),
            Fault::Killed => cluster.api.restart(),
            Fault::WithoutEtcd => cluster.api.resume_etcd(),
            Fault::TokensForbidden => cluster.allow_tokens(),
        }
    }
}

/// Requests for tokens that have failed, as the agent counts them.
fn failed_tokens(agent: &Agent, reason: &str) -> Result<f64> {
    agent.metric("kirsa_exchange_seconds_count", &[("step", "token"), ("outcome", reason)])
}

/// IMDS-22, IMDS-25, IMDS-27
fn is_told_to_cold_pods_and_hidden_from_warm_ones(row: &Row) -> Result<()> {
    let cluster = Cluster::new()?;
    let agent = cluster.start()?;
    let (cold, warm, without) = (cluster.pod("cold")?, cluster.pod("warm")?, cluster.pod("without")?);
    let stranger = cluster.node.pod("stranger", Shape::RoutedBare)?;
    cluster.give_role(&warm)?;
    // A role is fetched for as soon as it is known: STS throttles until the fault is there.
    cluster.throttle(&cold);
    cluster.give_role(&cold)?;
    let first = Held::by(&warm)?;
    cluster.are_of(&warm, &first.access_key_id)?;
    // The answer of a live read holds for ten seconds.
    ensure!(list(&without)?.status == 404);
    row.begin(&cluster)?;
    // Once the fault has hit it, no token is on its way to STS any more. It asks until then: nobody's next try may be
    // half a minute away.
    poll_every(LOOK, "the fault to hit a cold pod", PATIENCE, || {
        let _ = list(&cold);
        agent.log().iter().any(|entry| is_refusal(entry, &cold, row.cold)).then_some(())
    })?;
    cluster.sts.heal();
    let throttled = cluster.calls(&cold);

    let answers = [list(&cold)?, credentials(&cold)?];
    ensure!([200, 503].contains(&answers[0].status) && answers[1].status == 503, "{answers:?}");
    refusal(&agent, &cold, row.cold)?;
    ensure!(failed_tokens(&agent, row.cold.0)? >= 1.0);
    ensure!(list(&cold)?.status == 503);
    let answer = list(&stranger)?;
    ensure!(answer.status == 503, "{answer:?}");
    agent.wait_for_refusal("unknown_pod")?;
    let (status, reason) = row.without_role;
    poll_every(LOOK, "no role to be known no more", PATIENCE, || list(&without).ok().filter(|l| l.status == status))?;
    agent.wait_for_refusal(reason)?;
    ensure!(agent.admin("/readyz")?.status == 200, "not being ready would help nobody");

    first.is_served_while_its_refresh_fails(&warm, &agent, row.refresh)?;
    let (document, list) = first.is_served_until_a_minute_before_its_end(&warm)?;
    ensure!(document.status == 503 && list.status == 503, "{document:?} {list:?}");
    let calls = (cluster.calls(&warm), cluster.calls(&cold));
    ensure!(calls == (1, throttled), "without a token there is nothing to ask STS: {calls:?}");

    row.end(&cluster)?;
    let served = |pod: &Pod| {
        let (held, took) = timed(|| poll_every(LOOK, "credentials", PATIENCE, || Held::by(pod).ok()));
        let held = held.with_context(|| pod.name().to_owned())?;
        cluster.are_of(pod, &held.access_key_id)?;
        eprintln!("{:?}: {} served {took:.1?} after its end", row.fault, pod.name());
        let before = if pod.name() == cold.name() { throttled } else { 0 };
        ensure!(cluster.calls(pod) <= before + 2, "{} calls of {}", cluster.calls(pod), pod.name());
        anyhow::Ok(())
    };
    [&cold, &warm].into_iter().try_for_each(served)?;
    // What comes now is known by the watch, which has recovered too.
    let late = cluster.pod("late")?;
    cluster.give_role(&late)?;
    cluster.are_of(&late, &Held::by(&late)?.access_key_id)?;
    agent.stop()
}

#[test]
fn whatever_the_api_server_fails_at_is_told_to_cold_pods_and_hidden_from_warm_ones() -> Result<()> {
    each(&table(), |row| {
        is_told_to_cold_pods_and_hidden_from_warm_ones(row).with_context(|| format!("{:?}", row.fault))
    })
}

/// A load balancer that gives connections a second each. What comes meanwhile is seen between two cuts, and what is
/// known stays known.
#[test]
fn a_watch_that_is_cut_every_second_forgets_nobody_and_learns_of_everybody() -> Result<()> {
    let cluster = Cluster::new()?;
    let (agent, proxy) = cluster.start_behind_proxy()?;
    let warm = cluster.pod("warm")?;
    cluster.give_role(&warm)?;
    let first = Held::by(&warm)?;
    let mut late = Vec::new();
    for round in 0..10 {
        let cut = poll("connections to cut", PATIENCE, || Some(proxy.cut()).filter(|cut| *cut > 0))?;
        ensure!(cut > 0);
        first.is_served_to(&warm)?;
        if round % 3 == 0 {
            late.push(cluster.pod(&format!("late{round}"))?);
        }
        // Each answer of a look is one of the pod that is known.
        let end = std::cell::Cell::new(0);
        poll_every(Duration::from_millis(100), "a second", PATIENCE, || {
            end.set(end.get() + 1);
            let served = first.is_served_to(&warm);
            (served.is_err() || end.get() == 10).then_some(served)
        })??;
    }
    for pod in &late {
        cluster.give_role(pod)?;
        cluster.are_of(pod, &Held::by(pod)?.access_key_id)?;
    }
    for watch in ["pods", "serviceaccounts"] {
        let heard = || agent.metric("kirsa_watch_silence_seconds", &[("watch", watch)]);
        poll("the watch to be heard", PATIENCE, || heard().ok().filter(|silence| *silence < 30.0))?;
    }
    ensure!(cluster.calls(&warm) == 1, "{}", cluster.calls(&warm));
    agent.stop()
}
