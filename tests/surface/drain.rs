//! Shutdown of the agent.

use std::io::ErrorKind;
use std::time::Duration;

use anyhow::{Result, ensure};
use lab::agent::Agent;
use lab::http::{CREDENTIALS_PATH, Wire};
use lab::net::{METADATA, Pod};
use lab::poll::poll;
use lab::site::Site;
use lab::sts::{Effect, Fault};
use nix::sys::signal::Signal;

use super::{TIMEOUT, credentials, has_credentials_of, site};

fn is_refused(pod: &Pod) -> bool {
    pod.connect((METADATA, 80)).is_err_and(|error| error.kind() == ErrorKind::ConnectionRefused)
}

/// Starts an agent, and a request that waits because STS does not respond.
fn held(site: &Site, pod: &Pod, sts: Effect, drain: &str) -> Result<(Agent, Wire)> {
    site.sts.inject(Fault::always(sts));
    let agent = Agent::start(&site.node, &site.options.clone().flag("--drain", drain))?;
    let request = format!("GET {} HTTP/1.1\r\nHost: 169.254.169.254\r\n\r\n", credentials(pod.name()));
    let wire = Wire::open(pod, request)?;
    site.sts.wait_for_calls(1, TIMEOUT)?;
    poll("the request to be held", TIMEOUT, || {
        agent.metric("kirsa_cache_misses_total", &[]).is_ok_and(|misses| misses == 1.0).then_some(())
    })?;
    Ok((agent, wire))
}

/// IMDS-30
#[test]
fn drain_answers_held_request_and_refuses_new() -> Result<()> {
    let site = site()?;
    let reader = site.pod_with_role("reader")?;
    let (agent, mut held) = held(&site, &reader, Effect::delay(Duration::from_millis(1_500)), "10")?;
    // Idle connections do not delay the drain.
    let mut idle = Wire::open(&reader, format!("GET {CREDENTIALS_PATH} HTTP/1.1\r\nHost: x\r\n\r\n"))?;
    ensure!(idle.response()?.status == 200);
    agent.signal(Signal::SIGTERM)?;
    poll("new connections to be refused", TIMEOUT, || is_refused(&reader).then_some(()))?;
    ensure!(!agent.process().ended(), "the agent exited with a request in flight");
    has_credentials_of(&site, "reader", &held.response()?)?;
    held.closed()?;
    idle.closed()?;
    agent.wait_for_log(|entry| entry["message"] == "every request has ended")?;
    ensure!(agent.wait()?.success());
    ensure!(is_refused(&reader), "the redirect was removed");
    site.no_pod_got_outside()
}

#[test]
fn request_longer_than_drain_is_cut_off() -> Result<()> {
    let site = site()?;
    let reader = site.pod_with_role("reader")?;
    let (agent, mut held) = held(&site, &reader, Effect::NoAnswer, "1")?;
    agent.signal(Signal::SIGTERM)?;
    agent.wait_for_log(|entry| entry["message"] == "drain timed out with requests in flight")?;
    ensure!(agent.wait()?.success());
    held.closed()
}

#[test]
fn second_signal_ends_agent_at_once() -> Result<()> {
    let site = site()?;
    let reader = site.pod_with_role("reader")?;
    let (agent, mut held) = held(&site, &reader, Effect::NoAnswer, "30")?;
    agent.signal(Signal::SIGTERM)?;
    poll("new connections to be refused", TIMEOUT, || is_refused(&reader).then_some(()))?;
    // Repeat the signal: the agent listens for a second one only once the drain has begun.
    poll("its end", Duration::from_secs(2), || {
        agent.signal(Signal::SIGTERM).ok();
        agent.process().ended().then_some(())
    })?;
    ensure!(agent.wait()?.success());
    held.closed()
}
