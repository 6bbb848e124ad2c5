//! What can be made to go wrong, for one role or for all, and how often.

use std::time::Duration;

use serde::{Deserialize, Serialize};

/// Something that happens to calls of `AssumeRoleWithWebIdentity` instead of, or before, their answer.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Effect {
    /// Waits before anything else is done, in milliseconds.
    Delay(u64),
    /// Refuses with this code, in AWS's words unless others are given.
    Error {
        code: String,
        #[serde(default)]
        message: Option<String>,
    },
    /// Fails with this HTTP status, as a service behind a load balancer does.
    Status(u16),
    /// Reads the request and never answers.
    NoAnswer,
    /// Announces a whole answer, sends half of it and closes.
    HalfAnswer,
    /// Answers 200 with XML that ends in the middle of the session token, under the right length.
    TruncatedXml,
    /// Answers 200 with what is no XML.
    MalformedXml,
    /// Answers 200 with everything but credentials.
    NoCredentials,
    /// Resets the connection.
    Reset,
}

impl Effect {
    pub fn delay(duration: Duration) -> Self {
        Self::Delay(u64::try_from(duration.as_millis()).unwrap_or(u64::MAX))
    }

    pub fn error(code: &str) -> Self {
        Self::Error { code: code.to_owned(), message: None }
    }
}

/// Which of the calls are hit.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum When {
    /// Each, until the stand-in is healed.
    #[default]
    Always,
    /// The next so many.
    Next(u64),
    /// Each so-many-th, beginning with the so-many-th from now.
    OneIn(u64),
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Fault {
    /// Every role when there is none.
    #[serde(default)]
    pub role: Option<String>,
    pub effect: Effect,
    #[serde(default)]
    pub when: When,
}

impl Fault {
    pub fn always(effect: Effect) -> Self {
        Self { role: None, effect, when: When::Always }
    }

    pub fn next(count: u64, effect: Effect) -> Self {
        Self { role: None, effect, when: When::Next(count) }
    }

    pub fn one_in(count: u64, effect: Effect) -> Self {
        Self { role: None, effect, when: When::OneIn(count) }
    }

    /// Only for calls that ask for this role.
    pub fn of_role(mut self, arn: &str) -> Self {
        self.role = Some(arn.to_owned());
        self
    }
}

/// The faults in force, in the order in which they were set.
#[derive(Debug, Default)]
pub(super) struct Faults(Vec<Armed>);

#[derive(Debug)]
struct Armed {
    fault: Fault,
    seen: u64,
}

impl Faults {
    pub(super) fn add(&mut self, fault: Fault) {
        self.0.push(Armed { fault, seen: 0 });
    }

    pub(super) fn clear(&mut self) {
        self.0.clear();
    }

    /// What happens to the next call for `role`: all delays, and the first other effect.
    pub(super) fn strike(&mut self, role: &str) -> (Duration, Option<Effect>) {
        let mut delay = Duration::ZERO;
        let mut effect = None;
        for armed in &mut self.0 {
            if armed.fault.role.as_ref().is_some_and(|only| only != role) {
                continue;
            }
            let is_delay = matches!(armed.fault.effect, Effect::Delay(_));
            // What another effect forestalls keeps its count for a call that it can hit.
            if (!is_delay && effect.is_some()) || !armed.hits() {
                continue;
            }
            match armed.fault.effect {
                Effect::Delay(milliseconds) => delay += Duration::from_millis(milliseconds),
                ref other => effect = Some(other.clone()),
            }
        }
        (delay, effect)
    }
}

impl Armed {
    fn hits(&mut self) -> bool {
        self.seen += 1;
        match self.fault.when {
            When::Always => true,
            When::Next(count) => self.seen <= count,
            When::OneIn(count) => self.seen.is_multiple_of(count),
        }
    }
}
