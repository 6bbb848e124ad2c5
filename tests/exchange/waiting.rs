//! Which requests wait for STS, and how they are answered. `src/serve/hold_tests.rs` tests the exact durations on a
//! paused clock.

use std::time::Duration;

use anyhow::{Result, ensure};
use lab::poll::poll;
use lab::sts::{Effect, Fault};

use super::{TIMEOUT, credentials, list, refusal, session, site};

/// IMDS-17, IMDS-18
#[test]
fn slow_sts_delays_credentials_but_not_the_list() -> Result<()> {
    let site = site()?;
    site.sts.inject(Fault::always(Effect::delay(Duration::from_millis(1_200))));
    let cold = site.pod_with_role("cold")?;
    let agent = site.start()?;
    ensure!(list(&cold)?.ok()? == "cold-role");
    session(&site, &cold, &credentials(&cold)?)?;
    ensure!(list(&cold)?.status == 200);
    ensure!(site.calls("cold").len() == 1, "{:?}", site.calls("cold"));
    agent.stop()
}

/// IMDS-17
#[test]
fn timed_out_exchange_is_retried() -> Result<()> {
    let site = site()?;
    site.sts.inject(Fault::next(1, Effect::delay(Duration::from_secs(10))));
    let cold = site.pod_with_role("cold")?;
    let agent = site.start()?;
    ensure!(list(&cold)?.ok()? == "cold-role");
    // The exchange began with the list and times out after four seconds: its retry may succeed before the request's deadline.
    ensure!([200, 503].contains(&credentials(&cold)?.status));
    refusal(&agent, &cold, "exchange_timeout")?;
    poll("credentials", TIMEOUT, || credentials(&cold).is_ok_and(|answer| answer.status == 200).then_some(()))?;
    agent.stop()
}

/// IMDS-17, IMDS-27
#[test]
fn unresponsive_sts_is_refused_until_it_answers() -> Result<()> {
    let site = site()?;
    site.sts.inject(Fault::always(Effect::NoAnswer));
    let cold = site.pod_with_role("cold")?;
    let agent = site.start()?;
    ensure!(credentials(&cold)?.status == 503);
    ensure!(list(&cold)?.status == 503, "the list reports the failure too");
    refusal(&agent, &cold, "exchange_timeout")?;
    let timeouts = [("step", "sts"), ("outcome", "exchange_timeout")];
    ensure!(agent.metric("kirsa_exchange_seconds_count", &timeouts)? >= 1.0);
    site.sts.heal();
    poll("credentials", TIMEOUT, || credentials(&cold).is_ok_and(|answer| answer.status == 200).then_some(()))?;
    agent.stop()
}

/// IMDS-27
#[test]
fn throttled_calls_are_retried_while_a_pod_waits() -> Result<()> {
    let site = site()?;
    site.sts.inject(Fault::next(2, Effect::error("Throttling")));
    let cold = site.pod_with_role("cold")?;
    let agent = site.start()?;
    session(&site, &cold, &credentials(&cold)?)?;
    ensure!(site.calls("cold").len() == 3, "{:?}", site.calls("cold"));
    ensure!(agent.metric("kirsa_exchange_seconds_count", &[("step", "sts"), ("outcome", "sts_throttled")])? == 2.0);
    agent.stop()
}

/// IMDS-27: the list waits for the retry of a transient failure.
#[test]
fn list_waits_for_retry_of_throttled_call() -> Result<()> {
    let site = site()?;
    site.sts.inject(Fault::next(1, Effect::error("Throttling")));
    let cold = site.pod_with_role("cold")?;
    let agent = site.start()?;
    ensure!(list(&cold)?.ok()? == "cold-role");
    session(&site, &cold, &credentials(&cold)?)?;
    agent.stop()
}

/// IMDS-26: a failure that arrives after the list has been answered is returned for the credentials.
#[test]
fn refusal_after_the_list_is_returned_at_once() -> Result<()> {
    let site = site()?;
    site.sts.inject(Fault::always(Effect::delay(Duration::from_millis(1_200))));
    site.sts.inject(Fault::always(Effect::error("AccessDenied")));
    let denied = site.pod_with_role("denied")?;
    let agent = site.start()?;
    ensure!(list(&denied)?.status == 200, "STS has not answered yet");
    ensure!(credentials(&denied)?.status == 403);
    ensure!(list(&denied)?.status == 403);
    agent.stop()
}
