//! What came of one client in one condition.

use std::time::Duration;

use super::run::{Call, End};
use crate::sts::Act;

#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Verdict {
    /// It signed with credentials of its own service account, and with no others.
    OwnRole,
    /// It said that it could not, and signed nothing.
    CleanFailure(String),
    /// Anything else.
    Wrong(String),
}

#[derive(Debug, Clone)]
pub struct Cell {
    pub verdict: Verdict,
    pub took: Duration,
}

impl Cell {
    /// `acts` are all that came from the pod during the call.
    pub(super) fn new(call: Call, own: &str, acts: &[Act]) -> Self {
        let foreign = acts.iter().find(|act| act.arn != own);
        let verdict = match (call.end, acts.is_empty()) {
            _ if foreign.is_some() => Verdict::Wrong(format!("signed as {:?}", foreign.map(|act| &act.arn))),
            (End::Broke(how), _) => Verdict::Wrong(how),
            (End::Succeeded, true) => Verdict::Wrong("said that it succeeded, and signed nothing".into()),
            (End::Succeeded, false) => Verdict::OwnRole,
            (End::Failed(why), true) => Verdict::CleanFailure(why),
            (End::Failed(why), false) => Verdict::Wrong(format!("signed, and failed: {why}")),
        };
        Self { verdict, took: call.took }
    }

    /// As the table shows it.
    pub(super) fn text(&self) -> String {
        let seconds = self.took.as_secs_f64();
        match self.verdict {
            Verdict::OwnRole => format!("{seconds:.1}"),
            Verdict::CleanFailure(_) => format!("– {seconds:.1}"),
            Verdict::Wrong(_) => format!("WRONG {seconds:.1}"),
        }
    }
}
