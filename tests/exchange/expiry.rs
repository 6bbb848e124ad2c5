//! Refresh and expiry of a session, in real time, so with the shortest session that the agent accepts.

use std::time::Duration;

use anyhow::{Result, ensure};
use kirsa::clock::UnixTime;
use lab::agent::Agent;
use lab::poll::poll;
use lab::sts::{Effect, Fault, Outcome};

use super::redaction::{nothing_leaked, secrets_of};
use super::{credentials, list, refusal, session, site};

const LIFETIME: u32 = 124;
/// Half of the lifetime, by when it must have been refreshed, and a margin.
const REFRESH_TIMEOUT: Duration = Duration::from_secs(LIFETIME as u64 / 2 + 5);
/// Maximum pause between two polls.
const POLL_INTERVAL: Duration = Duration::from_secs(1);

/// IMDS-20, IMDS-22; no secret is logged meanwhile.
#[test]
fn session_is_refreshed_or_served_until_expiry() -> Result<()> {
    let site = site()?;
    site.sts.configure(|settings| settings.session_seconds = Some(LIFETIME));
    let (healthy, outage) = (site.pod_with_role("healthy")?, site.pod_with_role("outage")?);
    let revoked = site.pod_with_role("revoked")?;
    let agent = Agent::start(&site.node, &site.options.clone().trace())?;
    let open = |pod| session(&site, pod, &credentials(pod)?);
    let first = [open(&healthy)?, open(&outage)?, open(&revoked)?];
    site.sts.inject(Fault::always(Effect::Status(503)).of_role(&site.arn("outage")));
    site.sts.remove_role(&site.arn("revoked"));

    // The healthy session is refreshed; the others, whose refresh fails, are served as before.
    poll("the refresh", REFRESH_TIMEOUT, || {
        // Returns early when STS has been called.
        let _ = site.sts.wait_for_outcomes(site.sts.calls().len() + 1, POLL_INTERVAL);
        let now = [open(&healthy), open(&outage), open(&revoked)].map(|session| session.unwrap().access_key_id);
        assert!(now[1] == first[1].access_key_id && now[2] == first[2].access_key_id);
        let failed = site.calls("outage").len() > 1 && site.calls("revoked").len() > 1;
        (failed && now[0] != first[0].access_key_id).then_some(())
    })?;
    let calls = site.calls("healthy");
    ensure!(calls.len() == 2 && calls[1].session_name == calls[0].session_name, "{calls:?}");
    ensure!(calls.iter().all(|call| matches!(call.outcome, Some(Outcome::Issued { .. }))), "{calls:?}");
    let age = calls[1].at.duration_since(calls[0].at).as_secs_f64() / f64::from(LIFETIME);
    ensure!((0.39..0.50).contains(&age), "refreshed when {age:.2} of its life had passed");

    for (pod, first, status, reason) in
        [(&outage, &first[1], 503, "sts_unavailable"), (&revoked, &first[2], 403, "access_denied")]
    {
        refusal(&agent, pod, reason)?;
        let left = || first.expiration.as_second() - i64::try_from(UnixTime::now().0).unwrap();
        let (served, refused) = poll("the refusal", REFRESH_TIMEOUT, || {
            let _ = site.sts.wait_for_outcomes(site.sts.calls().len() + 1, POLL_INTERVAL);
            let (before, answer) = (left(), list(pod).unwrap());
            (answer.status != 200).then_some((before, answer))
        })?;
        ensure!((40..=60).contains(&served), "{}: refused with {served} s left", pod.name());
        ensure!(refused.status == status, "{}: {refused:?}", pod.name());
        ensure!(credentials(pod)?.status == status, "{}", pod.name());
    }
    nothing_leaked(&agent, &secrets_of(&site)?)?;
    agent.stop()
}
