//! The log of the calls that reached the stand-in, and waiting for them.

use std::{
    sync::{Condvar, Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use anyhow::bail;
use jiff::Timestamp;
use serde::{Deserialize, Serialize};

use super::token::Claims;

/// One `AssumeRoleWithWebIdentity`, from the moment when it was read off the wire.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Call {
    pub at: Timestamp,
    pub role_arn: String,
    pub session_name: String,
    pub duration_seconds: Option<String>,
    pub policy: Option<String>,
    pub policy_arns: Vec<String>,
    /// What the token says, true or not; nothing when it is no token at all.
    pub claims: Option<Claims>,
    /// Nothing while the call is open; a client that hangs up leaves it so.
    pub outcome: Option<Outcome>,
    /// When that was decided, which is when an answer begins to be sent.
    pub decided: Option<Timestamp>,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Outcome {
    Issued {
        access_key_id: String,
    },
    Refused {
        code: String,
    },
    /// The answer was spoilt on its way by a fault.
    Spoilt,
}

#[derive(Debug, Default)]
pub(super) struct Log {
    kept: Mutex<Kept>,
    changed: Condvar,
}

#[derive(Debug, Default)]
struct Kept {
    /// How many calls were forgotten, so that the number of an open one stays right.
    forgotten: usize,
    calls: Vec<Call>,
}

impl Log {
    /// Returns the number to finish the call with.
    pub(super) fn open(&self, call: Call) -> usize {
        let mut kept = self.lock();
        kept.calls.push(call);
        self.changed.notify_all();
        kept.forgotten + kept.calls.len() - 1
    }

    pub(super) fn close(&self, number: usize, outcome: Outcome) {
        let mut kept = self.lock();
        if let Some(index) = number.checked_sub(kept.forgotten) {
            let call = &mut kept.calls[index];
            (call.outcome, call.decided) = (Some(outcome), Some(Timestamp::now()));
            self.changed.notify_all();
        }
    }

    pub(super) fn all(&self) -> Vec<Call> {
        self.lock().calls.clone()
    }

    pub(super) fn forget(&self) {
        let mut kept = self.lock();
        kept.forgotten += kept.calls.len();
        kept.calls.clear();
    }

    /// Waits until `enough` holds for the calls so far.
    pub(super) fn wait(&self, deadline: Duration, enough: impl Fn(&[Call]) -> bool) -> anyhow::Result<Vec<Call>> {
        let (kept, timeout) = self
            .changed
            .wait_timeout_while(self.lock(), deadline, |kept| !enough(&kept.calls))
            .unwrap_or_else(PoisonError::into_inner);
        if timeout.timed_out() {
            bail!("waited {deadline:?} for calls at the STS, saw {}: {:#?}", kept.calls.len(), kept.calls);
        }
        Ok(kept.calls.clone())
    }

    fn lock(&self) -> MutexGuard<'_, Kept> {
        self.kept.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
