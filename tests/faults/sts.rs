//! Every STS response other than credentials.

use std::ops::RangeInclusive;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use lab::agent::Agent;
use lab::net::Pod;
use lab::poll::poll_every;
use lab::site::Site;
use lab::sts::{Effect, Fault};
use tokio::time::Instant;

use super::{Credentials, INTERVAL, LIFETIME, TIMEOUT, credentials, failed_calls, for_each, list};
use super::{site, wait_for_refusal};

/// One fault and its effects.
struct Row {
    effect: Effect,
    /// Status of the list, once the failure is known, and of the credentials.
    status: u16,
    reason: &'static str,
    /// Part of the logged detail.
    detail: &'static str,
    /// STS calls until a pod's first list and first credentials were answered.
    cold_calls: RangeInclusive<usize>,
    /// Minimum average time between calls while only the refresh fails.
    apart: Duration,
}

/// An error that somebody has to fix: cached for this many seconds, not retried.
fn definite(code: &'static str, reason: &'static str, seconds: u64) -> Row {
    let apart = Duration::from_secs(seconds);
    Row { effect: Effect::error(code), status: 403, reason, detail: code, cold_calls: 1..=1, apart }
}

/// AWS's message if it could not fetch the issuer's keys; the code is that of an invalid key.
const KEY: &str = "Couldn't retrieve verification key from your identity provider";
/// MinIO's message about a token that is milliseconds old.
const EARLY: &str = "token used before issued";

fn error(code: &str, message: &str) -> Effect {
    Effect::Error { code: code.into(), message: Some(message.into()) }
}

/// An error that may pass: retried with backoff while the pod waits.
fn transient(effect: Effect, reason: &'static str, detail: &'static str) -> Row {
    // The delay starts at 0.1 s and doubles each time, with full jitter; it is a sixth of that while a pod waits.
    Row { effect, status: 503, reason, detail, cold_calls: 3..=30, apart: Duration::from_millis(300) }
}

/// A call that takes until the deadline.
fn silent(effect: Effect) -> Row {
    let detail = "timed out after 4 s waiting for STS";
    let apart = Duration::from_secs(3);
    Row { effect, status: 503, reason: "exchange_timeout", detail, cold_calls: 1..=2, apart }
}

fn table() -> Vec<Row> {
    vec![
        definite("AccessDenied", "access_denied", 10),
        definite("IDPRejectedClaim", "web_identity_refused", 10),
        definite("InvalidIdentityToken", "web_identity_refused", 10),
        definite("ExpiredTokenException", "web_identity_refused", 10),
        definite("ExpiredToken", "web_identity_refused", 10),
        definite("MalformedPolicyDocument", "bad_session_policy", 10),
        definite("PackedPolicyTooLarge", "bad_session_policy", 10),
        definite("RegionDisabledException", "region_disabled", 10),
        definite("ValidationError", "bad_sts_request", 10),
        definite("SomethingNew", "bad_sts_request", 10),
        transient(Effect::error("Throttling"), "sts_throttled", "Throttling"),
        transient(Effect::error("IDPCommunicationError"), "idp_unreachable", "IDPCommunicationError"),
        transient(error("InvalidIdentityToken", KEY), "idp_unreachable", KEY),
        transient(error("InvalidParameterValue", EARLY), "token_not_yet_valid", EARLY),
        transient(Effect::Status(500), "sts_unavailable", "500"),
        transient(Effect::Status(503), "sts_unavailable", "503"),
        transient(Effect::Reset, "sts_unavailable", "reset"),
        transient(Effect::HalfAnswer, "bad_sts_response", "end of file"),
        transient(Effect::TruncatedXml, "bad_sts_response", "truncated"),
        transient(Effect::MalformedXml, "bad_sts_response", "200 without a code"),
        transient(Effect::NoCredentials, "bad_sts_response", "no credentials"),
        silent(Effect::NoAnswer),
        silent(Effect::delay(Duration::from_secs(10))),
    ]
}

/// A row with two pods: a cold one, whose session is missing when the fault begins, and a warm one.
struct Case {
    row: Row,
    cold: Pod,
    warm: Pod,
}

impl Case {
    fn new(site: &Site, number: usize, row: Row) -> Result<Self> {
        let case = Self {
            row,
            cold: site.pod(&format!("cold{number}"))?,
            warm: site.pod_with_role(&format!("warm{number}"))?,
        };
        case.fail(site, &case.cold);
        Ok(case)
    }

    fn fail(&self, site: &Site, pod: &Pod) {
        site.sts.inject(Fault::always(self.row.effect.clone()).of_role(&site.arn(pod.name())));
    }

    fn context(&self) -> String {
        format!("{:?}", self.row.effect)
    }

    /// IMDS-26, IMDS-27
    fn refuses_cold_pod(&self, site: &Site, agent: &Agent) -> Result<()> {
        let Row { status, reason, detail, .. } = self.row;
        // The first list may be answered before the failure is known.
        let first = list(&self.cold)?;
        ensure!(first.status == 200 || first.status == status, "{first:?}");
        let answer = credentials(&self.cold)?;
        let calls = site.calls(self.cold.name()).len();
        ensure!(answer.status == status, "{answer:?}");
        ensure!(self.row.cold_calls.contains(&calls), "{calls} calls");
        let later = list(&self.cold)?;
        ensure!(later.status == status && later.body == answer.body, "{later:?} {answer:?}");
        wait_for_refusal(agent, &self.cold, (reason, detail))?;
        ensure!(agent.metric("kirsa_refusals_total", &[("reason", reason)])? >= 1.0);
        ensure!(failed_calls(agent, reason)? >= 1.0);
        Ok(())
    }

    /// IMDS-22: a pod does not notice a failed refresh until a minute before the session expires.
    fn is_hidden_from_warm_pod(&self, site: &Site, agent: &Agent, first: &Credentials) -> Result<()> {
        let Row { status, reason, detail, apart, .. } = self.row;
        let calls = || site.calls(self.warm.name()).len() - 1;
        ensure!(calls() == 0, "a cached session causes no call");
        first.survives_failed_refresh(&self.warm, agent, (reason, detail))?;
        let failing = Instant::now();
        let (document, list) = first.is_served_until_last_minute(&self.warm)?;
        ensure!(document.status == status && list.status == status, "{document:?} {list:?}");
        // The limit includes the calls of the pod's request that has just ended.
        let most = failing.elapsed().as_secs_f64() / apart.as_secs_f64() + *self.row.cold_calls.end() as f64;
        ensure!(calls() as f64 <= most, "{} calls within {:?}", calls(), failing.elapsed());
        Ok(())
    }

    fn heals(&self, site: &Site) -> Result<()> {
        for pod in [&self.cold, &self.warm] {
            let answer = poll_every(INTERVAL, "credentials", TIMEOUT, || {
                credentials(pod).ok().filter(|answer| answer.status == 200)
            })?;
            let session = site.session(&answer.body)?;
            ensure!(session.role_arn == site.arn(pod.name()), "{} got {session:?}", pod.name());
        }
        Ok(())
    }
}

#[test]
fn sts_faults_refuse_only_cold_pods() -> Result<()> {
    let site = site()?;
    site.sts.configure(|settings| settings.session_seconds = Some(LIFETIME));
    let rows = table().into_iter().enumerate();
    let cases = rows.map(|(number, row)| Case::new(&site, number, row)).collect::<Result<Vec<_>>>()?;
    let agent = site.start()?;
    let mut firsts = Vec::new();
    for case in &cases {
        firsts.push(Credentials::of(&case.warm)?);
        case.fail(&site, &case.warm);
    }
    cases.iter().try_for_each(|case| site.give_role(&case.cold))?;
    for_each(&cases, |case| case.refuses_cold_pod(&site, &agent).with_context(|| case.context()))?;
    let warm: Vec<_> = cases.iter().zip(&firsts).collect();
    for_each(&warm, |(case, first)| {
        case.is_hidden_from_warm_pod(&site, &agent, first).with_context(|| case.context())
    })?;
    site.sts.heal();
    for_each(&cases, |case| case.heals(&site).with_context(|| case.context()))?;
    site.no_pod_got_outside()?;
    agent.stop()
}
