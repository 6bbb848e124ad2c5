//! A node at work for as long as one likes: hundreds of pods that ask as SDKs do, come and go, with a real API server and
//! an STS that takes its time and sometimes fails. What comes of it is measured, and whose credentials who got is checked
//! for every single answer.

mod fleet;
mod pattern;
mod report;
mod seat;

use std::fs;
use std::path::PathBuf;
use std::sync::{Arc, Mutex};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use tokio::sync::mpsc;

use crate::agent::Agent;
use crate::poll::poll;
use crate::sts::{Effect, Fault};

use fleet::Fleet;
pub use report::Report;
use report::Tally;
use seat::Seat;

/// How long STS takes.
const STS: Duration = Duration::from_millis(200);
/// One in so many of its answers is a 503.
const ERRORS: u64 = 100;
const PATIENCE: Duration = Duration::from_secs(120);
/// Between looks at the agent's memory.
const LOOK: Duration = Duration::from_secs(5);

#[derive(Clone, Debug)]
pub struct Plan {
    /// At any time; each in its own place on the node, which others had before.
    pub pods: usize,
    pub accounts: usize,
    /// Pods that go and are followed by others, per second.
    pub churn: f64,
    /// In seconds: short ones are refreshed while one looks.
    pub session: u32,
    pub during: Duration,
}

/// Runs the agent of that path in the middle of it.
pub fn run(agent: impl Into<PathBuf>, plan: &Plan) -> Result<Report> {
    let mut fleet = Fleet::new(agent.into(), plan)?;
    let tally = Arc::new(Mutex::new(Tally::default()));
    let agent = fleet.start()?;
    let (seats, orders): (Vec<_>, Vec<_>) = (0..plan.pods)
        .map(|number| {
            let (orders, received) = mpsc::unbounded_channel();
            (Seat::new(&fleet, number, received, tally.clone()), orders)
        })
        .unzip();
    thread::scope(|scope| {
        // By network namespace, in which every socket has to be made.
        let mut by_host: Vec<Vec<Seat>> = fleet.hosts().iter().map(|_| Vec::new()).collect();
        for seat in seats {
            by_host[seat.host()].push(seat);
        }
        let hosts = fleet.hosts().to_vec();
        for (host, seats) in hosts.into_iter().zip(by_host) {
            scope.spawn(move || host.run(|| seat::serve(seats)));
        }
        // Ends all of them, however this goes.
        let orders = orders;
        work(&mut fleet, &agent, &orders, plan, &tally)
    })
}

fn work(
    fleet: &mut Fleet,
    agent: &Agent,
    orders: &[mpsc::UnboundedSender<seat::Order>],
    plan: &Plan,
    tally: &Mutex<Tally>,
) -> Result<Report> {
    for (seat, orders) in orders.iter().enumerate() {
        fleet.come(seat, orders)?;
        fleet.report()?;
    }
    let began = Instant::now();
    let mut memory = Vec::new();
    let (mut churned, mut looked) = (0, None::<Instant>);
    while began.elapsed() < plan.during {
        if looked.is_none_or(|looked| looked.elapsed() >= LOOK) {
            memory.push((began.elapsed(), resident(agent.process().id())?));
            looked = Some(Instant::now());
        }
        fleet.report()?;
        let due = Duration::from_secs_f64(f64::from(churned + 1) / plan.churn);
        match due.checked_sub(began.elapsed()) {
            None => {
                fleet.replace(orders)?;
                churned += 1;
            }
            Some(left) => thread::sleep(left.min(Duration::from_millis(100))),
        }
    }
    memory.push((began.elapsed(), resident(agent.process().id())?));
    let tally = std::mem::take(&mut *tally.lock().expect("no panic while held"));
    Report::new(plan, began.elapsed(), churned, tally, memory, fleet, agent)
}

/// In KiB: all that is in memory, and of that what is not the binary's own file.
fn resident(pid: u32) -> Result<(u64, u64)> {
    let status = fs::read_to_string(format!("/proc/{pid}/status"))?;
    let value = |name: &str| {
        let line = status.lines().find_map(|line| line.strip_prefix(name));
        line.and_then(|line| line.split_whitespace().next()?.parse().ok()).with_context(|| name.to_owned())
    };
    Ok((value("VmRSS:")?, value("RssAnon:")?))
}
