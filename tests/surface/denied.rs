//! Responses to pods that get no credentials. `src/serve/hold_tests.rs` tests their timing on a paused clock.

use std::time::Duration;

use anyhow::{Result, ensure};
use lab::agent::field;
use lab::http::{CREDENTIALS_PATH, Wire};
use lab::poll::poll;
use lab::sts::{Effect, Fault};
use lab::workloads::Workload;

use super::{TIMEOUT, credentials, get, has_credentials_of, no_upstream_calls_except_sts, site};

/// IMDS-24
#[test]
fn pod_without_role_gets_404() -> Result<()> {
    let site = site()?;
    let idle = site.pod("idle")?;
    let agent = site.start()?;
    for path in [CREDENTIALS_PATH, &credentials("idle")] {
        ensure!(get(&idle, path)?.status == 404);
    }
    let refusal = agent.wait_for_refusal("no_role")?;
    ensure!(field(&refusal, "pod") == Some("idle") && field(&refusal, "service_account") == Some("idle"), "{refusal}");
    no_upstream_calls_except_sts(&site, &[])?;
    agent.stop()
}

/// IMDS-25
#[test]
fn unknown_pod_gets_503() -> Result<()> {
    let site = site()?;
    let stranger = site.stranger("stranger")?;
    let agent = site.start()?;
    for path in [CREDENTIALS_PATH, &credentials("stranger")] {
        ensure!(get(&stranger, path)?.status == 503);
    }
    let refusal = agent.wait_for_refusal("unknown_pod")?;
    ensure!(field(&refusal, "detail").is_some_and(|detail| detail.contains(&stranger.ip().to_string())), "{refusal}");
    no_upstream_calls_except_sts(&site, &[])?;
    agent.stop()
}

/// IMDS-25
#[test]
fn pod_that_becomes_known_is_answered() -> Result<()> {
    let site = site()?;
    let late = site.stranger("late")?;
    let entry = site.with_role(&late)?;
    let agent = site.start()?;
    let mut waiting = Wire::open(&late, format!("GET {CREDENTIALS_PATH} HTTP/1.1\r\nHost: x\r\n\r\n"))?;
    site.put(entry)?;
    let response = waiting.response()?;
    ensure!(response.status == 200 && response.body == "late-role", "{response:?}");
    has_credentials_of(&site, "late", &get(&late, &credentials("late"))?)?;
    agent.stop()
}

/// A new pod with the address of the former one gets nothing on the former one's connection.
#[test]
fn open_connection_is_bound_to_its_pod() -> Result<()> {
    let site = site()?;
    let (first, second) = (site.pod_with_role("first")?, site.stranger("second")?);
    let second = Workload { pod: "second".into(), addresses: first.address().ips(), ..site.with_role(&second)? };
    let agent = site.start()?;
    let get = |path: &str| format!("GET {path} HTTP/1.1\r\nHost: 169.254.169.254\r\n\r\n");
    let mut wire = Wire::open(&first, get(CREDENTIALS_PATH))?;
    ensure!(wire.response()?.body == "first-role");

    site.remove("first")?;
    site.put(second)?;
    poll("the second pod to have the address", TIMEOUT, || {
        super::get(&first, CREDENTIALS_PATH).is_ok_and(|response| response.body == "second-role").then_some(())
    })?;
    for path in [CREDENTIALS_PATH, &credentials("first"), &credentials("second")] {
        wire.send(get(path))?;
        let response = wire.response()?;
        ensure!(response.status == 503, "{path}: {response:?}");
    }
    agent.stop()
}

/// The address may move to another pod while a request waits.
#[test]
fn reused_ip_gets_no_held_credentials() -> Result<()> {
    let site = site()?;
    let (first, second) = (site.pod_with_role("first")?, site.stranger("second")?);
    let second = Workload { addresses: first.address().ips(), ..site.with_role(&second)? };
    let delay = Fault::always(Effect::delay(Duration::from_secs(3)));
    site.sts.inject(delay.of_role(&site.arn("first")));
    let agent = site.start()?;
    let request = format!("GET {} HTTP/1.1\r\nHost: 169.254.169.254\r\n\r\n", credentials("first"));
    let mut held = Wire::open(&first, request)?;
    poll("the request to be held", TIMEOUT, || {
        agent.metric("kirsa_cache_misses_total", &[]).is_ok_and(|misses| misses == 1.0).then_some(())
    })?;
    site.remove("first")?;
    site.put(second)?;
    poll("the second pod to have the address", TIMEOUT, || {
        get(&first, CREDENTIALS_PATH).is_ok_and(|response| response.body == "second-role").then_some(())
    })?;
    ensure!(site.calls("first").iter().all(|call| call.outcome.is_none()), "STS responded before the address moved");
    let response = held.response()?;
    ensure!(response.status == 503, "{response:?}");
    agent.stop()
}
