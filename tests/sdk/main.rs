//! Unmodified SDKs in pods, each by its own default chain, at 169.254.169.254: who they then are.

use std::io::Write;
use std::process::Command;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use lab::agent::{Agent, Options};
use lab::net::Pod;
use lab::poll::timed;
use lab::sdk;
use lab::site::{ACCOUNT, Site};
use lab::sts::{Effect, Fault};
use serde_json::Value;

lab::enter!();

/// An SDK's program, if it can be run here.
type Sdk = fn(&str) -> Result<Command>;

fn boto(_: &str) -> Result<Command> {
    sdk::boto()
}

/// The SDK for Rust is part of the lab; the others are left out where their Python could not be had.
const SDKS: [(&str, Sdk); 3] = [("rust", sdk::rust), ("boto3", sdk::boto3), ("boto", boto)];

fn site() -> Result<Site> {
    Site::new(env!("CARGO_BIN_EXE_kirsa"))
}

/// A pod for each SDK that can be run here.
fn pods(site: &Site) -> Result<Vec<(Pod, Sdk)>> {
    let mut pods = Vec::new();
    for (name, sdk) in SDKS {
        if name == "rust" || sdk::is_prepared() {
            pods.push((site.stranger(name)?, sdk));
        } else {
            // Not by a macro: what those print is shown with failures only.
            writeln!(std::io::stderr(), "skipped: {name}: tests/setup.sh could not get it from PyPI")?;
        }
    }
    Ok(pods)
}

fn start(site: &Site, change: impl FnOnce(Options) -> Options) -> Result<Agent> {
    Agent::start(&site.node, &change(site.options.clone()))
}

/// What the SDK printed, and how long it took.
fn run(site: &Site, pod: &Pod, sdk: Sdk) -> Result<(Value, Duration)> {
    let (output, took) = timed(|| pod.run(&mut sdk(&site.sts.url())?));
    let output = output?;
    ensure!(output.status.success(), "{}: {}", pod.name(), String::from_utf8_lossy(&output.stderr));
    let shown = serde_json::from_slice(&output.stdout);
    Ok((shown.with_context(|| format!("{}: {:?}", pod.name(), output.stdout))?, took))
}

/// That the SDK is the role session of the pod's own service account, by its own word and by that of STS.
fn is_its_own(site: &Site, pod: &Pod, shown: &Value) -> Result<()> {
    let name = pod.name();
    let arn = format!("arn:aws:sts::{ACCOUNT}:assumed-role/{name}-role/default.{name}");
    if let Some(said) = shown.get("arn") {
        ensure!(*said == arn && shown["account"] == ACCOUNT, "{name}: {shown}");
    }
    ensure!(shown.get("method").is_none_or(|method| method == "iam-role"), "{name}: {shown}");
    let key = shown["access_key_id"].as_str().context("an access key id")?;
    let session = site.sts.session(key).with_context(|| format!("STS issued no {key}"))?;
    ensure!(session.arn == arn && session.claims.subject == format!("system:serviceaccount:default:{name}"));
    site.no_pod_got_outside()
}

#[test]
fn every_sdk_is_the_role_of_its_own_service_account() -> Result<()> {
    let site = site()?;
    let pods = pods(&site)?;
    for (pod, _) in &pods {
        site.put(site.with_role(pod)?)?;
    }
    let agent = start(&site, |options| options)?;
    for (pod, sdk) in &pods {
        // The second time from what is in hand.
        for _ in 0..2 {
            is_its_own(&site, pod, &run(&site, pod, *sdk)?.0)?;
        }
        ensure!(site.calls(pod.name()).len() == 1, "{:?}", site.calls(pod.name()));
    }
    agent.stop()
}

/// IMDS-18: one after the other, since each has a second for each of its requests and no more.
#[test]
fn every_sdk_succeeds_on_its_first_call_when_the_exchange_takes_1200_ms() -> Result<()> {
    let site = site()?;
    let pods = pods(&site)?;
    // Bound without a role, so that nothing is fetched ahead.
    for (pod, _) in &pods {
        site.put(lab::workloads::Workload::new(pod, pod.name()))?;
    }
    let agent = start(&site, |options| options)?;
    site.sts.inject(Fault::always(Effect::delay(Duration::from_millis(1_200))));
    for (pod, sdk) in &pods {
        let mark = agent.process().mark();
        site.put(site.with_role(pod)?)?;
        agent.wait_for_log_after(mark, |entry| lab::agent::field(entry, "message") == Some("workloads read"))?;
        ensure!(site.calls(pod.name()).is_empty(), "{} is not cold", pod.name());
        let (shown, took) = run(&site, pod, *sdk).with_context(|| format!("{}, cold", pod.name()))?;
        is_its_own(&site, pod, &shown)?;
        ensure!(took > Duration::from_millis(1_200) && site.calls(pod.name()).len() == 1, "{took:?}");
    }
    agent.stop()
}

/// IMDS-24: and none of them finds the node's credentials instead.
#[test]
fn an_sdk_in_a_pod_without_a_role_says_at_once_that_there_are_no_credentials() -> Result<()> {
    let site = site()?;
    let pods = pods(&site)?;
    for (pod, _) in &pods {
        site.put(lab::workloads::Workload::new(pod, pod.name()))?;
    }
    let agent = start(&site, |options| options)?;
    for (pod, sdk) in &pods {
        let (output, took) = timed(|| pod.run(&mut sdk(&site.sts.url())?));
        let output = output?;
        ensure!(!output.status.success(), "{}: {}", pod.name(), String::from_utf8_lossy(&output.stdout));
        // The requirement is 0.3 s and the start of the program, which takes most of this.
        ensure!(took < Duration::from_secs(5), "{}: {took:?}", pod.name());
    }
    ensure!(site.sts.calls().is_empty());
    site.no_pod_got_outside()?;
    agent.stop()
}

/// IMDS-5: those that know IMDSv2 notice nothing, and the others are told what is wrong in the log.
#[test]
fn with_imdsv2_required_sdks_that_know_it_go_on() -> Result<()> {
    let site = site()?;
    let pods = pods(&site)?;
    for (pod, _) in &pods {
        site.put(site.with_role(pod)?)?;
    }
    let agent = start(&site, |options| options.switch("--require-imdsv2"))?;
    for (pod, sdk) in &pods {
        match run(&site, pod, *sdk) {
            Ok((shown, _)) => is_its_own(&site, pod, &shown)?,
            Err(_) if pod.name() == "boto" => drop(agent.wait_for_refusal("session_required")?),
            Err(error) => return Err(error),
        }
    }
    agent.stop()
}
