//! Everything that STS may answer but credentials.

use std::ops::RangeInclusive;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use lab::agent::Agent;
use lab::net::Pod;
use lab::poll::poll_every;
use lab::site::Site;
use lab::sts::{Effect, Fault};
use tokio::time::Instant;

use super::{Held, LIFETIME, LOOK, PATIENCE, credentials, each, failed_calls, list};
use super::{refusal, site};

/// One fault, and what it comes to.
struct Row {
    effect: Effect,
    /// Of the list, once the failure is known, and of the credentials.
    status: u16,
    reason: &'static str,
    /// Part of what the log says of it.
    said: &'static str,
    /// Calls of STS by the time that a pod's first list and first credentials have been answered.
    cold_calls: RangeInclusive<usize>,
    /// At least so far apart are the calls while nothing is missing but the refresh, on average.
    apart: Duration,
}

/// Somebody has to change something: remembered for so many seconds, not retried.
fn definite(code: &'static str, reason: &'static str, seconds: u64) -> Row {
    let apart = Duration::from_secs(seconds);
    Row { effect: Effect::error(code), status: 403, reason, said: code, cold_calls: 1..=1, apart }
}

/// What AWS says where it could not fetch the issuer's keys, with the code of a key that is wrong.
const KEY: &str = "Couldn't retrieve verification key from your identity provider";
/// What MinIO says of a token that is milliseconds old.
const EARLY: &str = "token used before issued";

fn says(code: &str, message: &str) -> Effect {
    Effect::Error { code: code.into(), message: Some(message.into()) }
}

/// May pass by itself: retried within the hold, ever more slowly.
fn transient(effect: Effect, reason: &'static str, said: &'static str) -> Row {
    // 0.1 s, doubled each time, with full jitter, and a sixth of that while a pod waits.
    Row { effect, status: 503, reason, said, cold_calls: 3..=30, apart: Duration::from_millis(300) }
}

/// Takes as long as the whole hold.
fn silent(effect: Effect) -> Row {
    let said = "timed out after 4 s waiting for STS";
    let apart = Duration::from_secs(3);
    Row { effect, status: 503, reason: "exchange_timeout", said, cold_calls: 1..=2, apart }
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
        transient(says("InvalidIdentityToken", KEY), "idp_unreachable", KEY),
        transient(says("InvalidParameterValue", EARLY), "token_not_yet_valid", EARLY),
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

/// A row with its pods: one whose session is missing when the fault begins, and one that has one.
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
    fn is_told_to_a_cold_pod(&self, site: &Site, agent: &Agent) -> Result<()> {
        let Row { status, reason, said, .. } = self.row;
        // Whether the first list knows already is a question of time.
        let first = list(&self.cold)?;
        ensure!(first.status == 200 || first.status == status, "{first:?}");
        let answer = credentials(&self.cold)?;
        let calls = site.calls(self.cold.name()).len();
        ensure!(answer.status == status, "{answer:?}");
        ensure!(self.row.cold_calls.contains(&calls), "{calls} calls");
        let later = list(&self.cold)?;
        ensure!(later.status == status && later.body == answer.body, "{later:?} {answer:?}");
        refusal(agent, &self.cold, (reason, said))?;
        ensure!(agent.metric("kirsa_refusals_total", &[("reason", reason)])? >= 1.0);
        ensure!(failed_calls(agent, reason)? >= 1.0);
        Ok(())
    }

    /// IMDS-22: a refresh that fails is nothing that a pod notices until a minute before the end.
    fn is_hidden_from_a_warm_pod(&self, site: &Site, agent: &Agent, first: &Held) -> Result<()> {
        let Row { status, reason, said, apart, .. } = self.row;
        let calls = || site.calls(self.warm.name()).len() - 1;
        ensure!(calls() == 0, "what is in hand asks nobody");
        first.is_served_while_its_refresh_fails(&self.warm, agent, (reason, said))?;
        let failing = Instant::now();
        let (document, list) = first.is_served_until_a_minute_before_its_end(&self.warm)?;
        ensure!(document.status == status && list.status == status, "{document:?} {list:?}");
        // With those of the hold that has just ended.
        let most = failing.elapsed().as_secs_f64() / apart.as_secs_f64() + *self.row.cold_calls.end() as f64;
        ensure!(calls() as f64 <= most, "{} calls within {:?}", calls(), failing.elapsed());
        Ok(())
    }

    fn heals(&self, site: &Site) -> Result<()> {
        for pod in [&self.cold, &self.warm] {
            let answer = poll_every(LOOK, "credentials", PATIENCE, || {
                credentials(pod).ok().filter(|answer| answer.status == 200)
            })?;
            let session = site.session(&answer.body)?;
            ensure!(session.role_arn == site.arn(pod.name()), "{} got {session:?}", pod.name());
        }
        Ok(())
    }
}

#[test]
fn whatever_sts_answers_is_told_to_cold_pods_and_hidden_from_warm_ones() -> Result<()> {
    let site = site()?;
    site.sts.configure(|settings| settings.session_seconds = Some(LIFETIME));
    let rows = table().into_iter().enumerate();
    let cases = rows.map(|(number, row)| Case::new(&site, number, row)).collect::<Result<Vec<_>>>()?;
    let agent = site.start()?;
    let mut firsts = Vec::new();
    for case in &cases {
        firsts.push(Held::by(&case.warm)?);
        case.fail(&site, &case.warm);
    }
    cases.iter().try_for_each(|case| site.give_role(&case.cold))?;
    each(&cases, |case| case.is_told_to_a_cold_pod(&site, &agent).with_context(|| case.context()))?;
    let warm: Vec<_> = cases.iter().zip(&firsts).collect();
    each(&warm, |(case, first)| case.is_hidden_from_a_warm_pod(&site, &agent, first).with_context(|| case.context()))?;
    site.sts.heal();
    each(&cases, |case| case.heals(&site).with_context(|| case.context()))?;
    site.no_pod_got_outside()?;
    agent.stop()
}
