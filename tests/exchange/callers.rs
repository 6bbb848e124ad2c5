//! Single-flight: concurrent callers share one exchange.

use std::thread;
use std::time::Duration;

use anyhow::{Result, ensure};
use lab::http::Wire;
use lab::poll::poll;
use lab::sts::{Effect, Fault, Outcome};
use lab::workloads::Workload;

use super::{TIMEOUT, credentials, credentials_path, list, refusal, session, site};

const CALLERS: usize = 50;

/// IMDS-19
#[test]
fn concurrent_callers_share_one_exchange() -> Result<()> {
    let site = site()?;
    let reader = site.pod_with_role("reader")?;
    site.sts.inject(Fault::always(Effect::delay(Duration::from_millis(700))));
    let agent = site.start()?;
    let answers = thread::scope(|scope| {
        let callers: Vec<_> = (0..CALLERS).map(|_| scope.spawn(|| credentials(&reader))).collect();
        callers.into_iter().map(|caller| caller.join().unwrap()).collect::<Result<Vec<_>>>()
    })?;
    for answer in &answers {
        session(&site, &reader, answer)?;
        ensure!(answer.body == answers[0].body, "two sessions");
    }
    ensure!(site.calls("reader").len() == 1, "{:?}", site.calls("reader"));
    ensure!(agent.metric("kirsa_exchange_seconds_count", &[("step", "sts"), ("outcome", "ok")])? == 1.0);
    agent.stop()
}

/// IMDS-19
#[test]
fn exchange_completes_after_callers_hang_up() -> Result<()> {
    let site = site()?;
    let reader = site.pod_with_role("reader")?;
    site.sts.inject(Fault::next(1, Effect::delay(Duration::from_secs(2))));
    let agent = site.start()?;
    let request = format!("GET {} HTTP/1.1\r\nHost: 169.254.169.254\r\n\r\n", credentials_path(&reader));
    let callers = (0..CALLERS).map(|_| Wire::open(&reader, &request)).collect::<Result<Vec<_>>>()?;
    poll("all requests to wait", TIMEOUT, || {
        agent.metric("kirsa_cache_misses_total", &[]).is_ok_and(|misses| misses == CALLERS as f64).then_some(())
    })?;
    drop(callers);
    poll("all connections to close", TIMEOUT, || {
        agent.metric("kirsa_connections", &[]).is_ok_and(|open| open == 0.0).then_some(())
    })?;
    ensure!(site.calls("reader").iter().all(|call| call.outcome.is_none()), "STS answered before the callers hung up");
    let calls = site.sts.wait_for_outcomes(1, TIMEOUT)?;
    ensure!(matches!(calls[0].outcome, Some(Outcome::Issued { .. })), "{calls:?}");
    session(&site, &reader, &credentials(&reader)?)?;
    ensure!(site.calls("reader").len() == 1, "{:?}", site.calls("reader"));
    agent.stop()
}

#[test]
fn session_scope_decides_who_shares_a_session() -> Result<()> {
    let site = site()?;
    for (account, scope, sessions) in [("shared", "service-account", 1), ("apart", "pod", 2)] {
        let pods = [site.stranger(&format!("{account}-0"))?, site.stranger(&format!("{account}-1"))?];
        let arn = site.arn(account);
        site.trust(&arn, account);
        let token = site.write_token(account, site.issuer.pod_token("default", account, account, account)?)?;
        for pod in &pods {
            let entry = Workload::new(pod, account).role(&arn, &token);
            site.put(entry.annotation("kirsa.dev/session-scope", scope))?;
        }
        let agent = site.start()?;
        let mut keys = Vec::new();
        for pod in &pods {
            let role = list(pod)?.ok()?;
            keys.push(site.session(&pod.imds().credentials(&role)?.ok()?)?.access_key_id);
        }
        keys.dedup();
        ensure!(keys.len() == sessions && site.calls(account).len() == sessions, "{account}: {keys:?}");
        let names: Vec<_> = site.calls(account).into_iter().map(|call| call.session_name).collect();
        match sessions {
            1 => ensure!(names == ["default.shared"], "{names:?}"),
            _ => ensure!(names.contains(&"default.apart.apart-1".to_owned()), "{names:?}"),
        }
        agent.stop()?;
    }
    Ok(())
}

/// IMDS-26: a denial is cached for all callers, shown at the role list too, and retried after ten seconds.
#[test]
fn access_denied_is_cached_for_ten_seconds() -> Result<()> {
    let site = site()?;
    let denied = site.pod_with_role("denied")?;
    site.sts.remove_role(&site.arn("denied"));
    let agent = site.start()?;
    for _ in 0..10 {
        ensure!(list(&denied)?.status == 403);
        ensure!(credentials(&denied)?.status == 403);
    }
    ensure!(site.calls("denied").len() == 1, "{:?}", site.calls("denied"));
    let entry = refusal(&agent, &denied, "access_denied")?;
    ensure!(super::detail(&entry).contains("AccessDenied") && super::detail(&entry).contains(&site.arn("denied")));

    site.trust(&site.arn("denied"), "denied");
    ensure!(list(&denied)?.status == 403, "within the ten seconds");
    // The ten seconds began before this.
    poll("credentials", Duration::from_secs(13), || {
        credentials(&denied).is_ok_and(|answer| answer.status == 200).then_some(())
    })?;
    ensure!(site.calls("denied").len() == 2, "{:?}", site.calls("denied"));
    agent.stop()
}
