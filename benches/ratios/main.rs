//! The agent against bare hyper, both as they would ship (release, static), in one run on one machine: what is left in
//! a ratio is what the agent itself costs. Pods, redirect, API server and STS are the lab's.
//!
//! Prints a table with the aims beside the results and writes `summary.json`; misses no aim by failing.

// It measures real time; the ban is for code whose time tests have to turn.
#![allow(clippy::disallowed_types)]

mod binaries;
mod cold;
mod cost;
mod fair;
mod load;
mod report;
mod site;

use anyhow::{Context, Result};
use lab::agent::Agent;
use lab::poll::timed;

use binaries::Binaries;
use report::Report;
use site::Site;

/// Of everything that is repeated; the median counts.
const ROUNDS: usize = 3;

fn main() -> Result<()> {
    // Before the namespaces, in which there is no network.
    let binaries = Binaries::build()?;
    lab::namespace::enter();
    measure(&binaries)?.publish()
}

fn measure(binaries: &Binaries) -> Result<Report> {
    let mut report = Report::default();
    eprintln!("bench: starting kube-apiserver and filling it with pods");
    let site = Site::new(binaries)?;

    eprintln!("bench: starting the agent {ROUNDS} times");
    let mut agent = None;
    for _ in 0..ROUNDS {
        // The last one stays.
        agent.take().map_or(Ok(()), Agent::stop)?;
        let (started, took) = timed(|| Agent::start(&site.node, &site.options));
        agent = Some(started?);
        report.start_to_ready.push(took);
    }
    let agent = agent.context("at least one round")?;
    site.wait_for_sessions(&agent)?;
    report.idle = cost::memory(agent.process().id())?;

    let bare = site.start_bare()?;
    report.bare_idle = cost::memory(bare.process.id())?;
    let kirsa = load::Target { pid: agent.process().id(), pod: &site.warm_pod };
    let hyper = load::Target { pid: bare.process.id(), pod: &bare.pod };
    load::same_bytes(&kirsa, &hyper)?;
    for round in 1..=ROUNDS {
        for connections in [1, 32] {
            eprintln!("bench: round {round} of {ROUNDS}, {connections} connections");
            let results = report.warm.entry(connections).or_default();
            results.kirsa.push(load::run(&kirsa, connections)?);
            results.bare.push(load::run(&hyper, connections)?);
        }
    }

    eprintln!("bench: cold callers");
    report.cold_overhead = cold::overhead(&site, &agent)?;
    report.cold_calls = cold::herd(&site)?;
    report.loaded = cost::memory(agent.process().id())?;
    agent.stop()?;

    eprintln!("bench: a quiet pod beside a hot one, and restarts");
    for _ in 0..ROUNDS {
        report.quiet.push(fair::quiet_beside_hot(&binaries.kirsa)?);
    }
    report.restart_gaps = fair::restart_gaps(&binaries.kirsa, ROUNDS)?;
    Ok(report)
}
