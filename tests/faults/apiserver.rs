//! The API server is down or forbids tokens, while a session is missing, cached, and due for a refresh.

use std::time::Duration;

use anyhow::{Context, Result, ensure};
use lab::agent::Agent;
use lab::net::{Pod, Shape};
use lab::poll::{poll, poll_every, timed};

use super::cluster::Cluster;
use super::{Credentials, INTERVAL, TIMEOUT, credentials, for_each, is_refusal, list, wait_for_refusal};

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Fault {
    /// SIGSTOP: connections stay open, without responses.
    Stopped,
    /// SIGKILL: connections are refused.
    Killed,
    /// The API server responds from its cache, and fails at every read or write of etcd.
    WithoutEtcd,
    /// RBAC was changed: the agent may no longer mint tokens.
    TokensForbidden,
}

/// One fault and its effects.
struct Row {
    fault: Fault,
    /// Reason and part of the logged detail of the first exchange that fails.
    cold: (&'static str, &'static str),
    /// Reason and part of the logged detail of the refresh, which starts after open connections were abandoned.
    refresh: (&'static str, &'static str),
    /// Response to a pod that had no role before. The agent reads its service account again before it responds.
    without_role: (u16, &'static str),
}

const UNAVAILABLE: (u16, &str) = (503, "account_unavailable");
const SILENT: (&str, &str) = ("exchange_timeout", "timed out after 4 s waiting for the API server's TokenRequest");

fn table() -> Vec<Row> {
    let row = |fault, cold, refresh, without_role| Row { fault, cold, refresh, without_role };
    vec![
        row(Fault::Stopped, SILENT, ("token_unavailable", "deadline has elapsed"), UNAVAILABLE),
        row(Fault::Killed, ("token_unavailable", "TokenRequest"), ("token_unavailable", "refused"), UNAVAILABLE),
        row(Fault::WithoutEtcd, SILENT, SILENT, UNAVAILABLE),
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

/// Returns the agent's count of failed TokenRequests.
fn failed_tokens(agent: &Agent, reason: &str) -> Result<f64> {
    agent.metric("kirsa_exchange_seconds_count", &[("step", "token"), ("outcome", reason)])
}

/// IMDS-22, IMDS-25, IMDS-27
fn refuses_cold_pods_and_hides_from_warm_ones(row: &Row) -> Result<()> {
    let cluster = Cluster::new()?;
    let agent = cluster.start()?;
    let (cold, warm, without) = (cluster.pod("cold")?, cluster.pod("warm")?, cluster.pod("without")?);
    let stranger = cluster.node.pod("stranger", Shape::RoutedBare)?;
    cluster.give_role(&warm)?;
    // The agent prefetches as soon as it knows the role, so STS throttles until the fault begins.
    cluster.throttle(&cold);
    cluster.give_role(&cold)?;
    let first = Credentials::of(&warm)?;
    cluster.assert_owner(&warm, &first.access_key_id)?;
    // The result of a live read is cached for ten seconds.
    ensure!(list(&without)?.status == 404);
    row.begin(&cluster)?;
    // Once the fault has hit the pod, no token is on its way to STS. The pod keeps requesting until then, since the
    // agent's next retry on its own may be half a minute away.
    poll_every(INTERVAL, "the fault to hit a cold pod", TIMEOUT, || {
        let _ = list(&cold);
        agent.log().iter().any(|entry| is_refusal(entry, &cold, row.cold)).then_some(())
    })?;
    cluster.sts.heal();
    let throttled = cluster.calls(&cold);

    let answers = [list(&cold)?, credentials(&cold)?];
    ensure!([200, 503].contains(&answers[0].status) && answers[1].status == 503, "{answers:?}");
    wait_for_refusal(&agent, &cold, row.cold)?;
    ensure!(failed_tokens(&agent, row.cold.0)? >= 1.0);
    ensure!(list(&cold)?.status == 503);
    let answer = list(&stranger)?;
    ensure!(answer.status == 503, "{answer:?}");
    agent.wait_for_refusal("unknown_pod")?;
    let (status, reason) = row.without_role;
    poll_every(INTERVAL, "the cached lack of a role to expire", TIMEOUT, || {
        list(&without).ok().filter(|l| l.status == status)
    })?;
    agent.wait_for_refusal(reason)?;
    ensure!(agent.admin("/readyz")?.status == 200, "unready agents would not help");

    first.survives_failed_refresh(&warm, &agent, row.refresh)?;
    let (document, list) = first.is_served_until_last_minute(&warm)?;
    ensure!(document.status == 503 && list.status == 503, "{document:?} {list:?}");
    let calls = (cluster.calls(&warm), cluster.calls(&cold));
    ensure!(calls == (1, throttled), "STS was called without a token: {calls:?}");

    row.end(&cluster)?;
    let served = |pod: &Pod| {
        let (held, took) = timed(|| poll_every(INTERVAL, "credentials", TIMEOUT, || Credentials::of(pod).ok()));
        let held = held.with_context(|| pod.name().to_owned())?;
        cluster.assert_owner(pod, &held.access_key_id)?;
        eprintln!("{:?}: {} served {took:.1?} after the end of the fault", row.fault, pod.name());
        let before = if pod.name() == cold.name() { throttled } else { 0 };
        ensure!(cluster.calls(pod) <= before + 2, "{} calls of {}", cluster.calls(pod), pod.name());
        anyhow::Ok(())
    };
    [&cold, &warm].into_iter().try_for_each(served)?;
    // A new pod is found by the watch, which has recovered too.
    let late = cluster.pod("late")?;
    cluster.give_role(&late)?;
    cluster.assert_owner(&late, &Credentials::of(&late)?.access_key_id)?;
    agent.stop()
}

#[test]
fn api_server_faults_refuse_only_cold_pods() -> Result<()> {
    for_each(&table(), |row| {
        refuses_cold_pods_and_hides_from_warm_ones(row).with_context(|| format!("{:?}", row.fault))
    })
}

/// Simulates a load balancer that cuts connections every second. The agent finds new pods between two cuts, and keeps
/// the known ones.
#[test]
fn watch_cut_every_second_misses_no_pod() -> Result<()> {
    let cluster = Cluster::new()?;
    let (agent, proxy) = cluster.start_behind_proxy()?;
    let warm = cluster.pod("warm")?;
    cluster.give_role(&warm)?;
    let first = Credentials::of(&warm)?;
    let mut late = Vec::new();
    for round in 0..10 {
        let cut = poll("connections to cut", TIMEOUT, || Some(proxy.cut()).filter(|cut| *cut > 0))?;
        ensure!(cut > 0);
        first.is_served_to(&warm)?;
        if round % 3 == 0 {
            late.push(cluster.pod(&format!("late{round}"))?);
        }
        // The known pod is served all the time.
        let polls = std::cell::Cell::new(0);
        poll_every(Duration::from_millis(100), "a second", TIMEOUT, || {
            polls.set(polls.get() + 1);
            let served = first.is_served_to(&warm);
            (served.is_err() || polls.get() == 10).then_some(served)
        })??;
    }
    for pod in &late {
        cluster.give_role(pod)?;
        cluster.assert_owner(pod, &Credentials::of(pod)?.access_key_id)?;
    }
    for watch in ["pods", "serviceaccounts"] {
        let silence = || agent.metric("kirsa_watch_silence_seconds", &[("watch", watch)]);
        poll("data on the watch", TIMEOUT, || silence().ok().filter(|silence| *silence < 30.0))?;
    }
    ensure!(cluster.calls(&warm) == 1, "{}", cluster.calls(&warm));
    agent.stop()
}
