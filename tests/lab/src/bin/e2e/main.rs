//! Scenarios on a real node: the agent from its own manifest and image, real pods, a real kubelet. Drives a cluster that
//! `tests/e2e.sh` started; every scenario leaves it as it found it, so each can be run alone, again and again.

mod cluster;
mod control;
mod figures;
mod pods;
mod scenario;

use std::{path::PathBuf, process::ExitCode, time::Instant};

use clap::Parser;
use scenario::Scale;

use crate::cluster::Cluster;

#[derive(Parser)]
struct Args {
    /// The cluster's state directory.
    #[arg(long, default_value = "/tmp/kirsa-cluster")]
    state: PathBuf,
    /// Pods of the first-act scenario.
    #[arg(long, default_value_t = 200)]
    first_act: usize,
    /// Seconds of the address-reuse scenario.
    #[arg(long, default_value_t = 300)]
    churn: u64,
    /// Only these scenarios.
    scenarios: Vec<String>,
}

fn main() -> anyhow::Result<ExitCode> {
    let args = Args::parse();
    let cluster = Cluster::open(&args.state)?;
    let scale = Scale { first_act: args.first_act, churn: args.churn };
    let wanted = |name: &str| args.scenarios.is_empty() || args.scenarios.iter().any(|one| one == name);
    if let Some(unknown) = args.scenarios.iter().find(|name| !scenario::ALL.iter().any(|(known, _)| known == name)) {
        let names: Vec<&str> = scenario::ALL.iter().map(|(name, _)| *name).collect();
        anyhow::bail!("no scenario {unknown}: there are {}", names.join(", "));
    }
    let (mut passed, mut failed) = (0, 0);
    for (name, run) in scenario::ALL.iter().filter(|(name, _)| wanted(name)) {
        eprintln!("--- {name}");
        let start = Instant::now();
        cluster.excuse_leaks()?;
        let outcome = run(&cluster, &scale).and_then(|told| {
            // Whatever it is about: no pod may ever have reached the node's own metadata service.
            let new = cluster.new_leaks()?;
            anyhow::ensure!(new.is_empty(), "the node's metadata service was reached: {new:?}");
            Ok(told)
        });
        let seconds = start.elapsed().as_secs();
        match outcome {
            Ok(told) => {
                passed += 1;
                println!("ok     {name} ({seconds} s): {told}");
            }
            Err(error) => {
                failed += 1;
                println!("FAILED {name} ({seconds} s): {error:#}");
            }
        }
    }
    println!("{passed} passed, {failed} failed");
    Ok(if failed == 0 { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}
