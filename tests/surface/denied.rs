//! Pods that get nothing: what they are told. How soon is tested on a paused clock (`src/serve/hold_tests.rs`).

use std::time::Duration;

use anyhow::{Result, ensure};
use lab::agent::field;
use lab::http::{CREDENTIALS_PATH, Wire};
use lab::poll::poll;
use lab::sts::{Effect, Fault};
use lab::workloads::Workload;

use super::{PATIENCE, credentials, get, nobody_was_asked_but_sts_for, opens_the_session_of, site};

/// IMDS-24
#[test]
fn a_pod_without_a_role_is_told_so() -> Result<()> {
    let site = site()?;
    let idle = site.pod("idle")?;
    let agent = site.start()?;
    for path in [CREDENTIALS_PATH, &credentials("idle")] {
        ensure!(get(&idle, path)?.status == 404);
    }
    let refusal = agent.wait_for_refusal("no_role")?;
    ensure!(field(&refusal, "pod") == Some("idle") && field(&refusal, "service_account") == Some("idle"), "{refusal}");
    nobody_was_asked_but_sts_for(&site, &[])?;
    agent.stop()
}

/// IMDS-25
#[test]
fn a_pod_that_nobody_knows_is_told_to_come_back() -> Result<()> {
    let site = site()?;
    let stranger = site.stranger("stranger")?;
    let agent = site.start()?;
    for path in [CREDENTIALS_PATH, &credentials("stranger")] {
        ensure!(get(&stranger, path)?.status == 503);
    }
    let refusal = agent.wait_for_refusal("unknown_pod")?;
    ensure!(field(&refusal, "detail").is_some_and(|detail| detail.contains(&stranger.ip().to_string())), "{refusal}");
    nobody_was_asked_but_sts_for(&site, &[])?;
    agent.stop()
}

/// IMDS-25
#[test]
fn a_pod_that_becomes_known_while_it_waits_is_answered() -> Result<()> {
    let site = site()?;
    let late = site.stranger("late")?;
    let entry = site.with_role(&late)?;
    let agent = site.start()?;
    let mut waiting = Wire::open(&late, format!("GET {CREDENTIALS_PATH} HTTP/1.1\r\nHost: x\r\n\r\n"))?;
    site.put(entry)?;
    let answer = waiting.response()?;
    ensure!(answer.status == 200 && answer.body == "late-role", "{answer:?}");
    opens_the_session_of(&site, "late", &get(&late, &credentials("late"))?)?;
    agent.stop()
}

/// The answer follows what the address is now, on a connection too that was somebody else's.
#[test]
fn an_open_connection_ends_with_the_pod_whose_it_was() -> Result<()> {
    let site = site()?;
    let (first, second) = (site.pod_with_role("first")?, site.stranger("second")?);
    let second = Workload { pod: "second".into(), addresses: first.address().ips(), ..site.with_role(&second)? };
    let agent = site.start()?;
    let get = |path: &str| format!("GET {path} HTTP/1.1\r\nHost: 169.254.169.254\r\n\r\n");
    let mut wire = Wire::open(&first, get(CREDENTIALS_PATH))?;
    ensure!(wire.response()?.body == "first-role");

    site.remove("first")?;
    site.put(second)?;
    poll("the second pod to have the address", PATIENCE, || {
        super::get(&first, CREDENTIALS_PATH).is_ok_and(|answer| answer.body == "second-role").then_some(())
    })?;
    for path in [CREDENTIALS_PATH, &credentials("first"), &credentials("second")] {
        wire.send(get(path))?;
        let answer = wire.response()?;
        ensure!(answer.status == 503, "{path}: {answer:?}");
    }
    agent.stop()
}

/// The address may change hands while a request is held.
#[test]
fn what_was_fetched_for_one_pod_is_not_given_to_the_next_with_its_address() -> Result<()> {
    let site = site()?;
    let (first, second) = (site.pod_with_role("first")?, site.stranger("second")?);
    let second = Workload { addresses: first.address().ips(), ..site.with_role(&second)? };
    let delay = Fault::always(Effect::delay(Duration::from_secs(3)));
    site.sts.inject(delay.of_role(&site.arn("first")));
    let agent = site.start()?;
    let request = format!("GET {} HTTP/1.1\r\nHost: 169.254.169.254\r\n\r\n", credentials("first"));
    let mut held = Wire::open(&first, request)?;
    poll("the request to be held", PATIENCE, || {
        agent.metric("kirsa_cache_misses_total", &[]).is_ok_and(|misses| misses == 1.0).then_some(())
    })?;
    site.remove("first")?;
    site.put(second)?;
    poll("the second pod to have the address", PATIENCE, || {
        get(&first, CREDENTIALS_PATH).is_ok_and(|answer| answer.body == "second-role").then_some(())
    })?;
    ensure!(site.calls("first").iter().all(|call| call.outcome.is_none()), "STS was quicker than the change");
    let answer = held.response()?;
    ensure!(answer.status == 503, "{answer:?}");
    agent.stop()
}
