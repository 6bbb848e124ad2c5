//! Real AWS clients of every age in pods: whose credentials they sign with, and what they do when there are none.
//! Those that are quick to install; `make clients` runs all of them and prints the matrix.

use std::io::Write;
use std::path::Path;
use std::sync::{Mutex, MutexGuard, OnceLock, PoisonError};
use std::thread;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use lab::clients::{CLIENTS, Cell, Client, Condition, Set, Verdict, row};

lab::enter!();

const AGENT: &str = env!("CARGO_BIN_EXE_kirsa");
/// Clients have a second for a request and no more, which other programs must not take from them for long.
const AT_ONCE: usize = 3;
/// Where a time is the condition, a busy machine may have cost a client its one second.
const TRIES: usize = 3;
/// All that is not about time, in one go.
const CONDITIONS: [Condition; 7] = [
    Condition::Cold(0),
    Condition::Warm,
    Condition::Restarted,
    Condition::ImdsV2Required,
    Condition::NoRole,
    Condition::Denied,
    Condition::StsDown,
];

type Row = (&'static Client, Vec<(Condition, Cell)>);

/// IMDS-5, IMDS-6, IMDS-11: a signed call with the pod's own role, and with no other.
#[test]
fn every_client_signs_as_its_own_service_account() -> Result<()> {
    all(Condition::Cold(0), |_, cell| is_own(cell))?;
    all(Condition::Warm, |_, cell| is_own(cell))
}

/// IMDS-7: with the session token that the client has from the agent before.
#[test]
fn every_client_refreshes_after_the_agent_was_restarted() -> Result<()> {
    all(Condition::Restarted, |_, cell| is_own(cell))
}

/// IMDS-5
#[test]
fn with_imdsv2_required_those_that_know_it_go_on_and_the_others_fail() -> Result<()> {
    all(Condition::ImdsV2Required, |client, cell| if client.knows_imdsv2 { is_own(cell) } else { is_failure(cell, 20) })
}

/// IMDS-24: and none of them finds the node's credentials instead. What is measured here has the time that an
/// interpreter takes in it, and that of other programs.
#[test]
fn without_a_role_every_client_fails_at_once() -> Result<()> {
    all(Condition::NoRole, |_, cell| is_failure(cell, 20))
}

/// IMDS-26: no client aborts, which is what the Common Runtime does when credentials fail behind a good role list.
#[test]
fn a_client_whose_role_is_denied_fails_at_once() -> Result<()> {
    all(Condition::Denied, |_, cell| is_failure(cell, 20))
}

/// IMDS-27: in whatever time its retries take.
#[test]
fn a_client_whose_sts_is_down_fails_in_the_end() -> Result<()> {
    all(Condition::StsDown, |_, cell| is_failure(cell, 55))
}

/// IMDS-18
#[test]
fn every_client_succeeds_on_its_first_call_when_the_exchange_takes_1200_ms() -> Result<()> {
    in_time(Condition::Cold(1_200))
}

/// IMDS-18
#[test]
fn every_client_succeeds_a_second_after_its_pod_was_bound_when_the_exchange_takes_2_s() -> Result<()> {
    in_time(Condition::Bound(2_000))
}

/// One client after the other, and again if it missed its time.
fn in_time(condition: Condition) -> Result<()> {
    let _alone = alone();
    for client in installed() {
        let mut tries = 0;
        loop {
            tries += 1;
            let cells = row(client, Path::new(AGENT), &[condition]).context(client.name)?;
            let [(_, cell)] = &cells[..] else { anyhow::bail!("one condition, one cell: {cells:?}") };
            if matches!(cell.verdict, Verdict::CleanFailure(_)) && tries < TRIES {
                continue;
            }
            is_own(cell).with_context(|| format!("{}, {}", client.name, condition.title()))?;
            break;
        }
    }
    Ok(())
}

fn is_own(cell: &Cell) -> Result<()> {
    ensure!(cell.verdict == Verdict::OwnRole, "{cell:?}");
    Ok(())
}

fn is_failure(cell: &Cell, seconds: u64) -> Result<()> {
    let failed = matches!(cell.verdict, Verdict::CleanFailure(_));
    ensure!(failed && cell.took < Duration::from_secs(seconds), "{cell:?}");
    Ok(())
}

/// Checks one condition of every client.
fn all(condition: Condition, check: impl Fn(&Client, &Cell) -> Result<()>) -> Result<()> {
    for (client, cells) in matrix() {
        let cell = cells.iter().find(|(known, _)| *known == condition);
        let (_, cell) = cell.context("a condition that was not met")?;
        check(client, cell).with_context(|| format!("{}, {}", client.name, condition.title()))?;
    }
    Ok(())
}

/// Every client in every condition, by the first test that asks.
fn matrix() -> &'static [Row] {
    static MATRIX: OnceLock<Vec<Row>> = OnceLock::new();
    MATRIX.get_or_init(|| {
        let _alone = alone();
        let todo = Mutex::new(installed().into_iter());
        let next = || todo.lock().unwrap_or_else(PoisonError::into_inner).next();
        let work = || -> Vec<Row> {
            let rows = std::iter::from_fn(next).map(|client| {
                let cells = row(client, Path::new(AGENT), &CONDITIONS);
                (client, cells.unwrap_or_else(|error| panic!("{}: {error:#}", client.name)))
            });
            rows.collect()
        };
        thread::scope(|scope| {
            let workers: Vec<_> = (0..AT_ONCE).map(|_| scope.spawn(work)).collect();
            workers.into_iter().flat_map(|worker| worker.join().expect("the panic that was printed")).collect()
        })
    })
}

/// No two tests at the same time: each has clients that wait for a second and no longer.
fn alone() -> MutexGuard<'static, ()> {
    static ALONE: Mutex<()> = Mutex::new(());
    ALONE.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Says once which ones are not there, and why.
fn installed() -> Vec<&'static Client> {
    static SAID: OnceLock<Vec<&'static Client>> = OnceLock::new();
    let found = SAID.get_or_init(|| {
        let quick = CLIENTS.iter().filter(|client| client.is_in(Set::Quick));
        quick
            .filter(|client| match client.version() {
                Ok(_) => true,
                Err(reason) => {
                    // Not by a macro: what those print is shown with failures only.
                    let _ = writeln!(std::io::stderr(), "skipped: {}: {reason}", client.name);
                    false
                }
            })
            .collect()
    });
    found.clone()
}
