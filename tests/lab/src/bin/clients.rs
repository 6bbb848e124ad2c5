//! The matrix of real clients and conditions: runs it, prints it, and writes it into a page.

use std::{
    env, fs,
    path::{Path, PathBuf},
    process::ExitCode,
    sync::Mutex,
    thread,
};

use anyhow::{Context, Result};
use clap::Parser;
use lab::clients::{self, CLIENTS, Client, Condition, Miss, Report, Set, into_page, row};

/// Runs AWS clients in pods, in every condition, against the agent beside this program (or KIRSA_BIN).
#[derive(Parser)]
struct Args {
    /// Only clients whose name has this in it.
    #[arg(long)]
    only: Option<String>,
    /// Only this condition, by the head of its column; may be given again.
    #[arg(long)]
    condition: Vec<String>,
    /// Without those that take long to install.
    #[arg(long)]
    quick: bool,
    /// How many clients run at the same time.
    #[arg(long, default_value_t = 1)]
    jobs: usize,
    /// The page that the table is written into: a whole table, of one run.
    #[arg(long, conflicts_with_all = ["only", "condition", "quick"])]
    page: Option<PathBuf>,
}

fn main() -> Result<ExitCode> {
    let args = Args::parse();
    let agent = match env::var_os("KIRSA_BIN") {
        Some(binary) => binary.into(),
        None => env::current_exe()?.with_file_name("kirsa"),
    };
    lab::namespace::enter();
    let set = if args.quick { Set::Quick } else { Set::All };
    let mut report = Report::default();
    let mut present = Vec::new();
    for client in CLIENTS.iter().filter(|client| client.is_in(set)) {
        if args.only.as_ref().is_some_and(|only| !client.name.contains(only)) {
            continue;
        }
        match client.version() {
            Ok(version) => present.push((client, version)),
            Err(reason) => report.skip(*client, reason.to_string()),
        }
    }
    for line in report.skipped() {
        eprintln!("{line}");
    }
    let wanted = |condition: &Condition| args.condition.is_empty() || args.condition.contains(&condition.title());
    let conditions: Vec<Condition> = Condition::ALL.into_iter().filter(wanted).collect();
    let mut report = run(&agent, present, report, &conditions, args.jobs)?;
    let misses = again(&agent, &mut report)?;
    print!("{}", report.table());
    if let Some(page) = args.page {
        let text = fs::read_to_string(&page).with_context(|| page.display().to_string())?;
        fs::write(&page, into_page(&text, &report)?)?;
    }
    for miss in &misses {
        println!("not as it should be: {}", miss.why);
    }
    Ok(if misses.is_empty() { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

fn run(
    agent: &Path,
    clients: Vec<(&Client, String)>,
    report: Report,
    conditions: &[Condition],
    jobs: usize,
) -> Result<Report> {
    let todo = Mutex::new(clients.into_iter());
    let report = Mutex::new(report);
    let next = || todo.lock().expect("no panic while held").next();
    let work = || -> Result<()> {
        while let Some((client, version)) = next() {
            eprintln!("{}: {version}", client.name);
            let cells = row(client, agent, conditions).with_context(|| client.name)?;
            report.lock().expect("no panic while held").add(*client, &version, cells);
        }
        Ok(())
    };
    thread::scope(|scope| {
        let workers: Vec<_> = (0..jobs.max(1)).map(|_| scope.spawn(work)).collect();
        workers.into_iter().try_for_each(|worker| worker.join().expect("a worker that panicked"))
    })?;
    Ok(report.into_inner().expect("no panic while held"))
}

/// Many of them give a request one second, which a busy machine may have cost them: what missed is tried again, alone.
/// What still does.
fn again(agent: &Path, report: &mut Report) -> Result<Vec<Miss>> {
    let mut left = Vec::new();
    for (client, condition, miss) in report.misses() {
        eprintln!("again, alone: {}", miss.why);
        let (cell, miss) = clients::again(&client, agent, condition)?;
        report.replace(client, condition, cell);
        left.extend(miss);
    }
    Ok(left)
}
