//! Token and STS exchanges: single-flight, refusals as pods see them, and the negative cache.

use std::thread;
use std::time::Duration;

use anyhow::{Result, ensure};
use lab::agent::{Agent, field};
use lab::apiserver::ISSUER;
use lab::http::{CREDENTIALS_PATH, Response, Wire};
use lab::net::Pod;
use lab::poll::poll;
use lab::sts::{Effect, Fault, Keys, Outcome, Provider, Role};
use tokio::time::Instant;

use crate::TIMEOUT;
use crate::rights::AgentRights;
use crate::site::{ROLE_ARN, Site, arn, credentials, list, role};

const CALLERS: usize = 50;
/// Lifetime of a final refusal in the negative cache.
const NEGATIVE_CACHE_TTL: Duration = Duration::from_secs(10);

/// Starts pods of an account that gets its role only after they were bound: nothing is prefetched.
fn start_cold_pods(site: &Site, account: &str) -> Result<[Pod; 2]> {
    site.annotate(account, &[])?;
    let pods = [site.run(&format!("{account}-0"), account)?, site.run(&format!("{account}-1"), account)?];
    for pod in &pods {
        ensure!(list(pod)?.status == 404);
    }
    site.account(account)?;
    // This path needs the role but no credentials.
    let info = || pods[0].imds().get("/latest/meta-data/iam/info").send();
    poll("the annotation", TIMEOUT, || info().ok().filter(|info| info.status == 200))?;
    Ok(pods)
}

fn exchanges(agent: &Agent) -> Result<(f64, f64)> {
    let count = |step| agent.metric("kirsa_exchange_seconds_count", &[("step", step)]);
    Ok((count("token")?, count("sts")?))
}

/// IMDS-19
#[test]
fn concurrent_requests_share_one_exchange() -> Result<()> {
    let site = Site::new()?;
    let agent = site.start()?;
    let pods = start_cold_pods(&site, "app")?;
    site.sts.inject(Fault::always(Effect::delay(Duration::from_millis(600))));
    let answers: Vec<Result<Response>> = thread::scope(|scope| {
        let callers = (0..CALLERS).map(|caller| {
            scope.spawn({
                let pod = &pods[caller % 2];
                move || credentials(pod, &role("app"))
            })
        });
        let callers: Vec<_> = callers.collect();
        callers.into_iter().map(|caller| caller.join().unwrap()).collect()
    });
    let mut keys = Vec::new();
    for answer in answers {
        let session = site.session(&answer?)?;
        site.assert_session_of(&session, "app")?;
        keys.push(session.access_key_id);
    }
    keys.dedup();
    ensure!(keys.len() == 1 && site.calls("app").len() == 1, "{keys:?} {:?}", site.calls("app"));
    ensure!(exchanges(&agent)? == (1.0, 1.0), "{:?}", exchanges(&agent)?);
    agent.stop()
}

/// IMDS-19
#[test]
fn disconnects_do_not_cancel_exchange() -> Result<()> {
    let site = Site::new()?;
    let agent = site.start()?;
    let pods = start_cold_pods(&site, "app")?;
    site.sts.inject(Fault::always(Effect::delay(Duration::from_millis(600))));
    let request = format!("GET {CREDENTIALS_PATH}{} HTTP/1.1\r\nHost: imds\r\n\r\n", role("app"));
    let callers = (0..CALLERS).map(|caller| Wire::open(&pods[caller % 2], &request));
    let callers: Vec<Wire> = callers.collect::<Result<_>>()?;
    site.sts.wait_for_calls(1, TIMEOUT)?;
    drop(callers);
    let calls = site.sts.wait_for_outcomes(1, TIMEOUT)?;
    ensure!(matches!(calls[0].outcome, Some(Outcome::Issued { .. })), "{calls:?}");
    site.assert_served(&pods[0], "app")?;
    ensure!(site.calls("app").len() == 1 && exchanges(&agent)? == (1.0, 1.0), "{:?}", exchanges(&agent)?);
    agent.stop()
}

/// IMDS-26
#[test]
fn access_denied_is_cached() -> Result<()> {
    let site = Site::new()?;
    site.annotate("app", &[(ROLE_ARN, &arn("app"))])?;
    site.sts.set_role(Role::trusting(&arn("app"), ISSUER, &site.subject("other")));
    let agent = site.start()?;
    let pod = site.run("app-0", "app")?;
    let line = agent.wait_for_refusal("access_denied")?;
    let denied_at = Instant::now();
    let detail = field(&line, "detail").unwrap_or_default();
    ensure!(detail.contains(&arn("app")) && detail.contains("403 AccessDenied"), "{detail}");
    for _ in 0..10 {
        let (list, document) = (list(&pod)?, credentials(&pod, &role("app"))?);
        ensure!(list.status == 403 && document.status == 403, "{list:?} {document:?}");
    }
    ensure!(agent.metric("kirsa_refusals_total", &[("reason", "access_denied")])? == 20.0);
    let calls = site.calls("app").len();
    ensure!(calls == 1 || denied_at.elapsed() >= NEGATIVE_CACHE_TTL, "{calls} calls within {:?}", denied_at.elapsed());

    // Once the refusal expires, the next request uses the current trust policy.
    site.trust(&arn("app"), "app");
    poll("the corrected trust policy", TIMEOUT, || list(&pod).ok().filter(|list| list.status == 200))?;
    ensure!(denied_at.elapsed() > NEGATIVE_CACHE_TTL - Duration::from_secs(1), "{:?}", denied_at.elapsed());
    site.assert_served(&pod, "app")?;
    ensure!(site.calls("app").len() == calls + 1);
    agent.stop()
}

/// IMDS-27
#[test]
fn throttling_is_retried_while_request_waits() -> Result<()> {
    let site = Site::new()?;
    let agent = site.start()?;
    let pods = start_cold_pods(&site, "app")?;
    site.sts.inject(Fault::next(2, Effect::error("Throttling")));
    site.assert_session_of(&site.session(&credentials(&pods[0], &role("app"))?)?, "app")?;
    ensure!(site.calls("app").len() == 3, "{:?}", site.calls("app"));
    agent.wait_for_refusal("sts_throttled")?;

    // While throttling lasts, both return 503: the list at once, the credentials after the hold.
    site.account("busy")?;
    site.sts.inject(Fault::always(Effect::error("Throttling")));
    let pod = site.run("busy-0", "busy")?;
    ensure!(credentials(&pod, &role("busy"))?.status == 503);
    ensure!(list(&pod)?.status == 503);
    agent.stop()
}

/// Each error has the status that stops or continues retries, and the reason that docs/failures.md lists.
#[test]
fn sts_errors_map_to_reasons() -> Result<()> {
    let site = Site::new()?;
    let agent = site.start()?;
    for (code, status, reason) in [
        ("ExpiredTokenException", 403, "web_identity_refused"),
        ("InvalidIdentityToken", 403, "web_identity_refused"),
        ("IDPCommunicationError", 503, "idp_unreachable"),
        ("RegionDisabledException", 403, "region_disabled"),
        ("PackedPolicyTooLarge", 403, "bad_session_policy"),
    ] {
        let account = code.to_lowercase();
        site.account(&account)?;
        site.sts.inject(Fault::always(Effect::error(code)).of_role(&arn(&account)));
        let pod = site.run(&account, &account)?;
        assert_refused(&agent, &pod, &account, status, reason, code)?;
    }
    // Configured rather than injected: a provider for other audiences, and a role without one-hour sessions.
    let jwks = crate::site::blocking(site.api.jwks())?;
    site.account("audience")?;
    let keys = Keys::Given(serde_json::from_value(jwks)?);
    site.sts.set_provider(Provider { client_ids: vec!["other".into()], ..Provider::new(ISSUER, keys.clone()) });
    let pod = site.run("audience", "audience")?;
    assert_refused(&agent, &pod, "audience", 403, "web_identity_refused", "Incorrect token audience")?;
    site.sts.set_provider(Provider::new(ISSUER, keys));
    site.account("short")?;
    site.sts.set_role(Role::trusting(&arn("short"), ISSUER, &site.subject("short")).max_session_duration(1_800));
    let pod = site.run("short", "short")?;
    assert_refused(&agent, &pod, "short", 403, "bad_sts_request", "MaxSessionDuration")?;
    agent.stop()
}

/// The account's audience must be one that the agent's rights allow; the API server's message is in the log.
#[test]
fn unlisted_audience_gets_no_token() -> Result<()> {
    for rights in AgentRights::EACH_MODE {
        let site = Site::with_rights(rights)?;
        site.trust(&arn("app"), "app");
        site.annotate("app", &[(ROLE_ARN, &arn("app")), ("eks.amazonaws.com/audience", "other")])?;
        let agent = site.start()?;
        let pod = site.run("app-0", "app")?;
        assert_refused(&agent, &pod, "app", 503, "token_forbidden", "audience other: 403")?;
        ensure!(site.sts.calls().is_empty());
        agent.stop()?;
    }
    Ok(())
}

fn assert_refused(agent: &Agent, pod: &Pod, account: &str, status: u16, reason: &str, message: &str) -> Result<()> {
    let line = agent.wait_for_log(|entry| {
        let is = |name, value| field(entry, name) == Some(value);
        is("message", "refused") && is("reason", reason) && is("service_account", account)
    })?;
    let detail = field(&line, "detail").unwrap_or_default();
    ensure!(detail.contains(message), "{detail}");
    for answer in [credentials(pod, &role(account))?, list(pod)?] {
        ensure!(answer.status == status, "{account}: {answer:?}");
    }
    Ok(())
}
