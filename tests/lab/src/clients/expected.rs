//! What is expected of whom: that a call succeeds or fails, and in what time.

use std::{path::Path, time::Duration};

use anyhow::{Context, Result};

use super::{
    cell::{Cell, Verdict},
    client::Client,
    condition::Condition,
    row::row,
};

/// In milliseconds: no client notices an exchange that takes no longer.
const NOBODY_NOTICES: u64 = 1_200;
/// Those that notice and wait (IMDS-18).
const WAITED_FOR: Duration = Duration::from_secs(3);
/// What a machine may be busy with between two things that a client does.
const SLACK: Duration = Duration::from_millis(500);

/// Where a client did otherwise.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Miss {
    pub why: String,
    /// A busy machine can do that, and does not do it each time.
    pub of_time: bool,
}

/// In `cells`, which are of one run.
pub fn miss(client: &Client, condition: Condition, cells: &[(Condition, Cell)]) -> Option<Miss> {
    let took = |cell: &Cell| format!("{}, {}, after {:.1} s", client.name, condition.title(), cell.took.as_secs_f64());
    let Some(cell) = cell(cells, condition) else {
        let why = format!("{}, {}: it was not run", client.name, condition.title());
        return Some(Miss { why, of_time: false });
    };
    let (success, within) = expected(client, condition);
    match (&cell.verdict, success) {
        (Verdict::Wrong(why), _) => return Some(Miss { why: format!("{}: {why}", took(cell)), of_time: false }),
        (Verdict::OwnRole, Some(false)) => {
            return Some(Miss { why: format!("{}: it succeeded", took(cell)), of_time: false });
        }
        (Verdict::CleanFailure(why), Some(true)) => {
            let of_time = matches!(condition, Condition::Cold(1..) | Condition::Bound(_));
            return Some(Miss { why: format!("{}: {why}", took(cell)), of_time });
        }
        (Verdict::OwnRole | Verdict::CleanFailure(_), _) => {}
    }
    // By what it takes when there is nothing to wait for: a machine that is slow, or was busy, is so for both.
    let start = self::cell(cells, Condition::Warm).map_or(Duration::ZERO, |warm| warm.took);
    let within = within? + 2 * start + SLACK;
    let why = format!("{}: it may take {:.1} s", took(cell), within.as_secs_f64());
    (cell.took > within).then_some(Miss { why, of_time: true })
}

/// The same condition once more, with nothing beside it: what came of it, and where it still missed.
pub fn again(client: &Client, agent: &Path, condition: Condition) -> Result<(Cell, Option<Miss>)> {
    // What is warm was cold before; and times are told by what is warm.
    let mut conditions = vec![Condition::Cold(0), Condition::Warm, condition];
    conditions.dedup();
    if condition == Condition::Cold(0) {
        conditions.pop();
    }
    let cells = row(client, agent, &conditions).context(client.name)?;
    let found = cell(&cells, condition).context("a condition that was not met")?.clone();
    Ok((found, miss(client, condition, &cells)))
}

/// Whether it succeeds, if that is not its own affair, and how long it may take beside its start.
fn expected(client: &Client, condition: Condition) -> (Option<bool>, Option<Duration>) {
    match condition {
        Condition::Cold(delay) if delay > NOBODY_NOTICES && client.waits => (Some(true), Some(WAITED_FOR)),
        Condition::Cold(delay) if delay > NOBODY_NOTICES => (None, None),
        Condition::Cold(_) | Condition::Bound(_) | Condition::Warm | Condition::Restarted => (Some(true), None),
        Condition::ImdsV2Required if client.knows_imdsv2 => (Some(true), None),
        // These are definite, and are told as what they are: a client that tries again was told something else.
        Condition::ImdsV2Required | Condition::NoRole | Condition::Denied => {
            (Some(false), Some(client.gives_up_within))
        }
        // In whatever time its retries take.
        Condition::StsDown => (Some(false), None),
    }
}

fn cell(cells: &[(Condition, Cell)], condition: Condition) -> Option<&Cell> {
    cells.iter().find(|(known, _)| *known == condition).map(|(_, cell)| cell)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::clients::CLIENTS;

    fn said_no_after(milliseconds: u64) -> Cell {
        Cell { verdict: Verdict::CleanFailure("no".into()), took: Duration::from_millis(milliseconds) }
    }

    fn of(name: &str, condition: Condition, cell: Cell, warm: u64) -> Option<Miss> {
        let client = CLIENTS.iter().find(|client| client.name == name).unwrap();
        let warm = Cell { verdict: Verdict::OwnRole, took: Duration::from_millis(warm) };
        miss(client, condition, &[(Condition::Warm, warm), (condition, cell)])
    }

    #[test]
    fn who_tries_again_after_a_definite_failure_takes_too_long() {
        assert_eq!(of("go2", Condition::NoRole, said_no_after(700), 0), None);
        assert!(of("go2", Condition::NoRole, said_no_after(900), 0).unwrap().of_time);
        assert_eq!(of("go2", Condition::NoRole, said_no_after(900), 100), None, "it took its time when warm too");
        assert_eq!(of("ruby", Condition::Denied, said_no_after(3_000), 0), None, "IMDS-24 has it so");
        assert_eq!(of("go2", Condition::StsDown, said_no_after(20_000), 0), None);
    }

    #[test]
    fn an_exchange_of_2_s_is_waited_for_by_those_that_wait() {
        assert!(of("go2", Condition::Cold(2_000), said_no_after(1_400), 0).unwrap().of_time);
        assert_eq!(of("boto3", Condition::Cold(2_000), said_no_after(1_400), 0), None);
        assert!(of("boto3", Condition::Cold(1_200), said_no_after(1_400), 0).is_some());
        let crash = Cell { verdict: Verdict::Wrong("SIGABRT".into()), ..said_no_after(1_400) };
        assert!(!of("boto3", Condition::Cold(2_000), crash, 0).unwrap().of_time);
    }
}
