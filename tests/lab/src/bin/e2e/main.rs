//! Scenarios on a real node: the agent from its own manifest and image, real pods, a real kubelet. Drives a cluster that
//! `tests/e2e.sh` started; every scenario leaves it as it found it, so each can be run alone, again and again.

mod cluster;
mod control;
mod figures;
mod pods;
mod recovery;
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
    /// Runs none of them, and counts them as skipped for this reason.
    #[arg(long)]
    skip: Option<String>,
    /// Only these scenarios, in this order.
    scenarios: Vec<String>,
}

fn main() -> anyhow::Result<ExitCode> {
    let args = Args::parse();
    let mut wanted: Vec<_> = scenario::ALL.iter().collect();
    if !args.scenarios.is_empty() {
        let known: Vec<_> = scenario::ALL.iter().chain(scenario::ON_REQUEST).collect();
        wanted.clear();
        for name in &args.scenarios {
            let Some(one) = known.iter().find(|(known, _)| known == name) else {
                let names: Vec<&str> = known.iter().map(|(name, _)| *name).collect();
                anyhow::bail!("no scenario {name}: there are {}", names.join(", "));
            };
            wanted.push(one);
        }
    }
    if let Some(reason) = args.skip {
        wanted.iter().for_each(|(name, _)| println!("skipped {name}: {reason}"));
        return Ok(sum(0, 0, wanted.len()));
    }
    let cluster = Cluster::open(&args.state)?;
    let scale = Scale { first_act: args.first_act, churn: args.churn };
    let (mut passed, mut failed) = (0, 0);
    for (name, run) in wanted {
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
                cluster.tell_state();
                if let Err(error) = cluster.recover() {
                    println!("FAILED: the cluster is of no use for another scenario: {error:#}");
                    break;
                }
            }
        }
    }
    Ok(sum(passed, failed, 0))
}

/// The last line, in the words of cargo's test runner, so that whoever adds its lines up counts these too.
fn sum(passed: usize, failed: usize, skipped: usize) -> ExitCode {
    let (verdict, code) = if failed == 0 { ("ok", ExitCode::SUCCESS) } else { ("FAILED", ExitCode::FAILURE) };
    println!("test result: {verdict}. {passed} passed; {failed} failed; {skipped} ignored");
    code
}
