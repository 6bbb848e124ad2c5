//! Everything that STS may answer but credentials: what the pod sees, what the log and the metrics say.

use std::thread;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use lab::agent::Agent;
use lab::net::Pod;
use lab::poll::poll;
use lab::site::Site;
use lab::sts::{Effect, Fault};

use super::{PATIENCE, credentials, detail, list, refusal, session, site};

struct Case {
    effect: Effect,
    /// At the list and at the credentials.
    status: u16,
    reason: &'static str,
    /// Part of what the log says of it.
    said: &'static str,
}

fn case(effect: Effect, status: u16, reason: &'static str, said: &'static str) -> Case {
    Case { effect, status, reason, said }
}

fn code(code: &'static str, status: u16, reason: &'static str) -> Case {
    case(Effect::error(code), status, reason, code)
}

/// Somebody has to change something: remembered, not retried.
fn definite() -> Vec<Case> {
    vec![
        code("AccessDenied", 403, "access_denied"),
        code("IDPRejectedClaim", 403, "web_identity_refused"),
        code("InvalidIdentityToken", 403, "web_identity_refused"),
        code("ExpiredTokenException", 403, "web_identity_refused"),
        code("ExpiredToken", 403, "web_identity_refused"),
        code("MalformedPolicyDocument", 403, "bad_session_policy"),
        code("PackedPolicyTooLarge", 403, "bad_session_policy"),
        code("RegionDisabledException", 403, "region_disabled"),
        code("ValidationError", 403, "bad_sts_request"),
        code("SomethingNew", 403, "bad_sts_request"),
    ]
}

/// May pass by itself: retried.
fn transient() -> Vec<Case> {
    vec![
        code("Throttling", 503, "sts_throttled"),
        code("IDPCommunicationError", 503, "idp_unreachable"),
        case(Effect::Status(500), 503, "sts_unavailable", "500"),
        case(Effect::Status(503), 503, "sts_unavailable", "503"),
        case(Effect::Reset, 503, "sts_unavailable", "reset"),
        case(Effect::HalfAnswer, 503, "bad_sts_answer", "end of file"),
        case(Effect::TruncatedXml, 503, "bad_sts_answer", "cut short"),
        case(Effect::MalformedXml, 503, "bad_sts_answer", "200 without a code"),
        case(Effect::NoCredentials, 503, "bad_sts_answer", "no credentials"),
    ]
}

/// A pod for each case, whose role meets with that fault and no other.
fn start(cases: &[Case]) -> Result<(Site, Vec<Pod>, Agent)> {
    let site = site()?;
    let mut pods = Vec::new();
    for (number, case) in cases.iter().enumerate() {
        let name = format!("p{number}");
        pods.push(site.pod_with_role(&name)?);
        site.sts.inject(Fault::always(case.effect.clone()).of_role(&site.arn(&name)));
    }
    let agent = site.start()?;
    Ok((site, pods, agent))
}

/// Does `what` for every case at the same time.
fn each(cases: &[Case], pods: &[Pod], what: impl Fn(&Case, &Pod) -> Result<()> + Sync) -> Result<()> {
    thread::scope(|scope| {
        let what = &what;
        let run = |(case, pod)| move || what(case, pod).with_context(|| format!("{:?}", case.effect));
        let running: Vec<_> = cases.iter().zip(pods).map(|pair| scope.spawn(run(pair))).collect();
        running.into_iter().try_for_each(|running| running.join().unwrap())
    })
}

/// What an operator finds: the refusal's line, with advice, and both metrics.
fn is_observed(agent: &Agent, case: &Case, pod: &Pod) -> Result<()> {
    let entry = refusal(agent, pod, case.reason)?;
    ensure!(detail(&entry).contains(case.said), "{:?} in {entry}", case.said);
    ensure!(agent.metric("kirsa_refusals_total", &[("reason", case.reason)])? >= 1.0);
    ensure!(agent.metric("kirsa_exchange_seconds_count", &[("step", "sts"), ("outcome", case.reason)])? >= 1.0);
    Ok(())
}

/// IMDS-26
#[test]
fn what_waiting_does_not_mend_is_refused_at_the_list_and_asked_once() -> Result<()> {
    let cases = definite();
    let (site, pods, agent) = start(&cases)?;
    each(&cases, &pods, |case, pod| {
        for _ in 0..2 {
            let (list, document) = (list(pod)?, credentials(pod)?);
            ensure!(list.status == case.status && document.status == case.status, "{list:?} {document:?}");
            ensure!(list.body == document.body, "{list:?} {document:?}");
        }
        ensure!(site.calls(pod.name()).len() == 1, "{:?}", site.calls(pod.name()));
        is_observed(&agent, case, pod)
    })?;
    agent.stop()
}

/// IMDS-27
#[test]
fn what_may_pass_is_retried_within_the_hold_and_afterwards() -> Result<()> {
    let cases = transient();
    let (site, pods, agent) = start(&cases)?;
    each(&cases, &pods, |case, pod| {
        let (document, list) = (credentials(pod)?, list(pod)?);
        ensure!(list.status == case.status && document.status == case.status, "{list:?} {document:?}");
        ensure!(site.calls(pod.name()).len() > 2, "{:?}", site.calls(pod.name()));
        is_observed(&agent, case, pod)
    })?;
    site.sts.heal();
    each(&cases, &pods, |_, pod| {
        // The pause before the next try was 30 s at most by then.
        let answer = poll("credentials", PATIENCE + Duration::from_secs(30), || {
            credentials(pod).ok().filter(|answer| answer.status == 200)
        })?;
        session(&site, pod, &answer).map(drop)
    })?;
    agent.stop()
}
