//! Token and STS: how often they are asked, what of their refusals reaches a pod, and for how long it is remembered.

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

use crate::PATIENCE;
use crate::rights::Way;
use crate::site::{ROLE_ARN, Site, arn, credentials, list, role};

const CALLERS: usize = 50;
/// For how long a refusal that trying again cannot mend is remembered.
const MEMORY: Duration = Duration::from_secs(10);

/// Pods of an account that had no role when they were bound, and has one now: nothing was fetched ahead.
fn cold(site: &Site, account: &str) -> Result<[Pod; 2]> {
    site.annotate(account, &[])?;
    let pods = [site.run(&format!("{account}-0"), account)?, site.run(&format!("{account}-1"), account)?];
    for pod in &pods {
        ensure!(list(pod)?.status == 404);
    }
    site.account(account)?;
    // Which takes the role, and no credentials.
    let info = || pods[0].imds().get("/latest/meta-data/iam/info").send();
    poll("the annotation", PATIENCE, || info().ok().filter(|info| info.status == 200))?;
    Ok(pods)
}

fn exchanges(agent: &Agent) -> Result<(f64, f64)> {
    let count = |step| agent.metric("kirsa_exchange_seconds_count", &[("step", step)]);
    Ok((count("token")?, count("sts")?))
}

/// IMDS-19
#[test]
fn fifty_callers_at_once_cost_one_token_and_one_call_of_sts() -> Result<()> {
    let site = Site::new()?;
    let agent = site.start()?;
    let pods = cold(&site, "app")?;
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
        site.belongs(&session, "app")?;
        keys.push(session.access_key_id);
    }
    keys.dedup();
    ensure!(keys.len() == 1 && site.calls("app").len() == 1, "{keys:?} {:?}", site.calls("app"));
    ensure!(exchanges(&agent)? == (1.0, 1.0), "{:?}", exchanges(&agent)?);
    agent.stop()
}

/// IMDS-19
#[test]
fn fifty_callers_that_hang_up_cancel_nothing() -> Result<()> {
    let site = Site::new()?;
    let agent = site.start()?;
    let pods = cold(&site, "app")?;
    site.sts.inject(Fault::always(Effect::delay(Duration::from_millis(600))));
    let request = format!("GET {CREDENTIALS_PATH}{} HTTP/1.1\r\nHost: imds\r\n\r\n", role("app"));
    let callers = (0..CALLERS).map(|caller| Wire::open(&pods[caller % 2], &request));
    let callers: Vec<Wire> = callers.collect::<Result<_>>()?;
    site.sts.wait_for_calls(1, PATIENCE)?;
    drop(callers);
    let calls = site.sts.wait_for_outcomes(1, PATIENCE)?;
    ensure!(matches!(calls[0].outcome, Some(Outcome::Issued { .. })), "{calls:?}");
    site.serves(&pods[0], "app")?;
    ensure!(site.calls("app").len() == 1 && exchanges(&agent)? == (1.0, 1.0), "{:?}", exchanges(&agent)?);
    agent.stop()
}

/// IMDS-26
#[test]
fn a_role_that_does_not_trust_the_account_is_denied_and_that_is_remembered() -> Result<()> {
    let site = Site::new()?;
    site.annotate("app", &[(ROLE_ARN, &arn("app"))])?;
    site.sts.set_role(Role::trusting(&arn("app"), ISSUER, &site.subject("somebody-else")));
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
    ensure!(calls == 1 || denied_at.elapsed() >= MEMORY, "{calls} calls within {:?}", denied_at.elapsed());

    // Once it is forgotten, the next request finds the policy as it is then.
    site.trust(&arn("app"), "app");
    poll("the corrected trust policy", PATIENCE, || list(&pod).ok().filter(|list| list.status == 200))?;
    ensure!(denied_at.elapsed() > MEMORY - Duration::from_secs(1), "{:?}", denied_at.elapsed());
    site.serves(&pod, "app")?;
    ensure!(site.calls("app").len() == calls + 1);
    agent.stop()
}

/// IMDS-27
#[test]
fn throttling_is_tried_again_within_the_hold() -> Result<()> {
    let site = Site::new()?;
    let agent = site.start()?;
    let pods = cold(&site, "app")?;
    site.sts.inject(Fault::next(2, Effect::error("Throttling")));
    site.belongs(&site.session(&credentials(&pods[0], &role("app"))?)?, "app")?;
    ensure!(site.calls("app").len() == 3, "{:?}", site.calls("app"));
    agent.wait_for_refusal("sts_throttled")?;

    // What does not pass is no more than "try again", for the list at once and for the credentials when they have
    // been held.
    site.account("busy")?;
    site.sts.inject(Fault::always(Effect::error("Throttling")));
    let pod = site.run("busy-0", "busy")?;
    ensure!(credentials(&pod, &role("busy"))?.status == 503);
    ensure!(list(&pod)?.status == 503);
    agent.stop()
}

/// Each with the status that ends or goes on, and the label that an operator finds in the table of failures.
#[test]
fn what_sts_refuses_is_reported_as_what_it_is() -> Result<()> {
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
        refused(&agent, &pod, &account, status, reason, code)?;
    }
    // Not by a fault: the provider is there for other audiences, and the role allows no session of an hour.
    let jwks = crate::site::blocking(site.api.jwks())?;
    site.account("audience")?;
    let keys = Keys::Given(serde_json::from_value(jwks)?);
    site.sts.set_provider(Provider { client_ids: vec!["other".into()], ..Provider::new(ISSUER, keys.clone()) });
    let pod = site.run("audience", "audience")?;
    refused(&agent, &pod, "audience", 403, "web_identity_refused", "Incorrect token audience")?;
    site.sts.set_provider(Provider::new(ISSUER, keys));
    site.account("short")?;
    site.sts.set_role(Role::trusting(&arn("short"), ISSUER, &site.subject("short")).max_session_duration(1_800));
    let pod = site.run("short", "short")?;
    refused(&agent, &pod, "short", 403, "bad_sts_request", "MaxSessionDuration")?;
    agent.stop()
}

/// The audience that an account asks for must be one that the agent may have: what the API server says is in the log.
#[test]
fn an_audience_that_the_rights_do_not_name_gets_no_token() -> Result<()> {
    for way in Way::BOTH {
        let site = Site::with(way)?;
        site.trust(&arn("app"), "app");
        site.annotate("app", &[(ROLE_ARN, &arn("app")), ("eks.amazonaws.com/audience", "other")])?;
        let agent = site.start()?;
        let pod = site.run("app-0", "app")?;
        refused(&agent, &pod, "app", 503, "token_forbidden", "audience other: 403")?;
        ensure!(site.sts.calls().is_empty());
        agent.stop()?;
    }
    Ok(())
}

fn refused(agent: &Agent, pod: &Pod, account: &str, status: u16, reason: &str, said: &str) -> Result<()> {
    let line = agent.wait_for_log(|entry| {
        let is = |name, value| field(entry, name) == Some(value);
        is("message", "refused") && is("reason", reason) && is("service_account", account)
    })?;
    let detail = field(&line, "detail").unwrap_or_default();
    ensure!(detail.contains(said), "{detail}");
    for answer in [credentials(pod, &role(account))?, list(pod)?] {
        ensure!(answer.status == status, "{account}: {answer:?}");
    }
    Ok(())
}
