//! A node at work for a while, and what came of it: see [`lab::soak`].

use std::env;
use std::process::ExitCode;
use std::time::Duration;

use anyhow::{Context, Result};
use clap::Parser;
use lab::soak::{Plan, run};

/// Ends with 1 if somebody got what was not theirs, or got past the agent.
#[derive(Parser)]
struct Args {
    /// For how long, once all pods are there.
    #[arg(long, default_value_t = 5.0)]
    minutes: f64,
    #[arg(long, default_value_t = 250)]
    pods: usize,
    #[arg(long, default_value_t = 100)]
    accounts: usize,
    /// Pods per second that go and are followed by others.
    #[arg(long, default_value_t = 5.0)]
    churn: f64,
    /// In seconds.
    #[arg(long, default_value_t = 300)]
    session: u32,
}

fn main() -> Result<ExitCode> {
    let args = Args::parse();
    // Beside this program, as cargo leaves it.
    let agent = env::current_exe()?.with_file_name("kirsa");
    lab::namespace::enter();
    let plan = Plan {
        pods: args.pods,
        accounts: args.accounts,
        churn: args.churn,
        session: args.session,
        during: Duration::from_secs_f64(args.minutes * 60.0),
    };
    let report = run(agent, &plan).context("the soak did not come to its end")?;
    print!("{report}");
    for wrong in report.wrong_identities() {
        println!("WRONG  {wrong}");
    }
    let good = report.wrong_identities().is_empty() && report.canary_hits() == 0;
    Ok(if good { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}
