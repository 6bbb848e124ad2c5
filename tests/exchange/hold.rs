//! Which request waits for STS, and what it is told. How long, to the millisecond, is tested on a paused clock
//! (`src/serve/hold_tests.rs`).

use std::time::Duration;

use anyhow::{Result, ensure};
use lab::poll::poll;
use lab::sts::{Effect, Fault};

use super::{PATIENCE, credentials, list, refusal, session, site};

/// IMDS-17, IMDS-18
#[test]
fn with_an_sts_that_takes_1200_ms_the_list_does_not_wait_and_the_credentials_come() -> Result<()> {
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
fn with_an_sts_that_takes_10_s_the_credentials_come_with_the_next_exchange() -> Result<()> {
    let site = site()?;
    site.sts.inject(Fault::next(1, Effect::delay(Duration::from_secs(10))));
    let cold = site.pod_with_role("cold")?;
    let agent = site.start()?;
    ensure!(list(&cold)?.ok()? == "cold-role");
    // The exchange began with the list, and has four seconds itself: the next one may succeed before the hold ends.
    ensure!([200, 503].contains(&credentials(&cold)?.status));
    refusal(&agent, &cold, "exchange_timeout")?;
    poll("credentials", PATIENCE, || credentials(&cold).is_ok_and(|answer| answer.status == 200).then_some(()))?;
    agent.stop()
}

/// IMDS-17, IMDS-27
#[test]
fn an_sts_that_never_answers_is_told_of_and_forgotten_when_it_answers() -> Result<()> {
    let site = site()?;
    site.sts.inject(Fault::always(Effect::NoAnswer));
    let cold = site.pod_with_role("cold")?;
    let agent = site.start()?;
    ensure!(credentials(&cold)?.status == 503);
    ensure!(list(&cold)?.status == 503, "the list knows by now");
    refusal(&agent, &cold, "exchange_timeout")?;
    let timeouts = [("step", "sts"), ("outcome", "exchange_timeout")];
    ensure!(agent.metric("kirsa_exchange_seconds_count", &timeouts)? >= 1.0);
    site.sts.heal();
    poll("credentials", PATIENCE, || credentials(&cold).is_ok_and(|answer| answer.status == 200).then_some(()))?;
    agent.stop()
}

/// IMDS-27
#[test]
fn throttling_is_over_before_a_pod_hears_of_it() -> Result<()> {
    let site = site()?;
    site.sts.inject(Fault::next(2, Effect::error("Throttling")));
    let cold = site.pod_with_role("cold")?;
    let agent = site.start()?;
    session(&site, &cold, &credentials(&cold)?)?;
    ensure!(site.calls("cold").len() == 3, "{:?}", site.calls("cold"));
    ensure!(agent.metric("kirsa_exchange_seconds_count", &[("step", "sts"), ("outcome", "sts_throttled")])? == 2.0);
    agent.stop()
}

/// IMDS-27: a failure that the list may outwait is none that it knows of.
#[test]
fn the_list_waits_out_one_throttled_call() -> Result<()> {
    let site = site()?;
    site.sts.inject(Fault::next(1, Effect::error("Throttling")));
    let cold = site.pod_with_role("cold")?;
    let agent = site.start()?;
    ensure!(list(&cold)?.ok()? == "cold-role");
    session(&site, &cold, &credentials(&cold)?)?;
    agent.stop()
}

/// IMDS-26: only a failure that arrives between the list and the credentials is first told at the credentials.
#[test]
fn a_refusal_that_arrives_after_the_list_is_told_at_the_credentials_at_once() -> Result<()> {
    let site = site()?;
    site.sts.inject(Fault::always(Effect::delay(Duration::from_millis(1_200))));
    site.sts.inject(Fault::always(Effect::error("AccessDenied")));
    let denied = site.pod_with_role("denied")?;
    let agent = site.start()?;
    ensure!(list(&denied)?.status == 200, "nothing is known yet");
    ensure!(credentials(&denied)?.status == 403);
    ensure!(list(&denied)?.status == 403);
    agent.stop()
}
