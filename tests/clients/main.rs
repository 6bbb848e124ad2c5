//! Real AWS clients of every age in pods: whose credentials they sign with, and what they do when there are none.
//! Those that are quick to install; `make clients` runs all of them and prints the matrix.

use std::io::Write;
use std::path::Path;
use std::sync::{Mutex, MutexGuard, OnceLock, PoisonError};
use std::thread;

use anyhow::{Result, ensure};
use lab::clients::{CLIENTS, Cell, Client, Condition, Kept, Miss, Set, again, kept, miss, row};

lab::enter!();

const AGENT: &str = env!("CARGO_BIN_EXE_kirsa");
/// Clients have a second for a request and no more, which other programs must not take from them for long.
const AT_ONCE: usize = 3;
/// Where a time is the condition, a busy machine may have cost a client its one second.
const TRIES: usize = 3;
/// In one go; the second of them lets clients that have a second be late.
const CONDITIONS: [Condition; 8] = [
    Condition::Cold(0),
    Condition::Cold(2_000),
    Condition::Warm,
    Condition::Restarted,
    Condition::ImdsV2Required,
    Condition::NoRole,
    Condition::Denied,
    Condition::StsDown,
];
/// A client that has a second for each request is in time, or it fails.
const IN_TIME: [Condition; 2] = [Condition::Cold(1_200), Condition::Bound(2_000)];

type Row = (&'static Client, Vec<(Condition, Cell)>);

/// IMDS-5, IMDS-6, IMDS-11: a signed call with the pod's own role, and with no other.
#[test]
fn every_client_signs_as_its_own_service_account() -> Result<()> {
    all(Condition::Cold(0))?;
    all(Condition::Warm)
}

/// IMDS-7: with the session token that the client has from the agent before.
#[test]
fn every_client_refreshes_after_the_agent_was_restarted() -> Result<()> {
    all(Condition::Restarted)
}

/// IMDS-5
#[test]
fn with_imdsv2_required_those_that_know_it_go_on_and_the_others_fail_at_once() -> Result<()> {
    all(Condition::ImdsV2Required)
}

/// IMDS-24: and none of them finds the node's credentials instead.
#[test]
fn without_a_role_every_client_fails_at_once() -> Result<()> {
    all(Condition::NoRole)
}

/// IMDS-24, IMDS-26: no client aborts, which is what the Common Runtime does when credentials fail behind a good role
/// list.
#[test]
fn a_client_whose_role_is_denied_fails_at_once() -> Result<()> {
    all(Condition::Denied)
}

/// IMDS-27: in whatever time its retries take.
#[test]
fn a_client_whose_sts_is_down_fails_in_the_end() -> Result<()> {
    all(Condition::StsDown)
}

/// IMDS-18
#[test]
fn every_client_succeeds_on_its_first_call_when_the_exchange_takes_1200_ms() -> Result<()> {
    all(Condition::Cold(1_200))
}

/// IMDS-18: the others, which give each request one second, say that they have none.
#[test]
fn every_client_that_waits_succeeds_within_3_s_when_the_exchange_takes_2_s() -> Result<()> {
    all(Condition::Cold(2_000))
}

/// IMDS-18
#[test]
fn every_client_succeeds_a_second_after_its_pod_was_bound_when_the_exchange_takes_2_s() -> Result<()> {
    all(Condition::Bound(2_000))
}

/// IMDS-21
#[test]
fn a_client_that_keeps_credentials_asks_for_them_once() -> Result<()> {
    let keeping = installed().into_iter().filter(|client| client.keeps).collect();
    let misses =
        at_once(AT_ONCE, keeping, kept).into_iter().filter_map(|(client, Kept { signed_requests, fetches })| {
            let why = format!("{}: {fetches} for {signed_requests} signed requests", client.name);
            (signed_requests < 2 || fetches != 1.0).then_some(Ok(Some(Miss { why, of_time: false })))
        });
    told(misses)
}

/// What every client made of one condition.
fn all(condition: Condition) -> Result<()> {
    let rows = if IN_TIME.contains(&condition) { one_by_one() } else { matrix() };
    told(rows.iter().map(|(client, cells)| in_the_end(client, condition, cells)))
}

/// Where it still misses what is expected of it, after it was tried again, alone, for a miss that a busy machine makes.
fn in_the_end(client: &Client, condition: Condition, cells: &[(Condition, Cell)]) -> Result<Option<Miss>> {
    let mut missed = miss(client, condition, cells);
    for _ in 1..TRIES {
        if !missed.as_ref().is_some_and(|miss| miss.of_time) {
            break;
        }
        let _alone = alone();
        (_, missed) = again(client, Path::new(AGENT), condition)?;
    }
    Ok(missed)
}

fn told(misses: impl Iterator<Item = Result<Option<Miss>>>) -> Result<()> {
    let misses: Vec<_> = misses.filter_map(Result::transpose).collect::<Result<_>>()?;
    let why: Vec<_> = misses.into_iter().map(|miss| miss.why).collect();
    ensure!(why.is_empty(), "{}", why.join("\n"));
    Ok(())
}

/// Every client in every condition in which it need not be in time, by the first test that asks.
fn matrix() -> &'static [Row] {
    static MATRIX: OnceLock<Vec<Row>> = OnceLock::new();
    MATRIX.get_or_init(|| at_once(AT_ONCE, installed(), |client, agent| row(client, agent, &CONDITIONS)))
}

/// And in those in which it must be.
fn one_by_one() -> &'static [Row] {
    static ONE_BY_ONE: OnceLock<Vec<Row>> = OnceLock::new();
    ONE_BY_ONE.get_or_init(|| at_once(1, installed(), |client, agent| row(client, agent, &IN_TIME)))
}

/// So many of them at the same time, and nothing else.
fn at_once<T: Send>(
    many: usize,
    clients: Vec<&'static Client>,
    work: impl Fn(&Client, &Path) -> Result<T> + Sync,
) -> Vec<(&'static Client, T)> {
    let _alone = alone();
    let todo = Mutex::new(clients.into_iter());
    let next = || todo.lock().unwrap_or_else(PoisonError::into_inner).next();
    let one = |client: &'static Client| {
        let done = work(client, Path::new(AGENT));
        (client, done.unwrap_or_else(|error| panic!("{}: {error:#}", client.name)))
    };
    let some = || std::iter::from_fn(next).map(one).collect::<Vec<_>>();
    thread::scope(|scope| {
        let workers: Vec<_> = (0..many).map(|_| scope.spawn(some)).collect();
        workers.into_iter().flat_map(|worker| worker.join().expect("the panic that was printed")).collect()
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
