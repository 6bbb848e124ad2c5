//! Circuit breaker for the upstream (API server and STS). It opens when exchanges of several sessions fail in a row:
//! then the node tries one background exchange at a time, with growing pauses. After the first success it recovers
//! slowly, so that a fleet does not return all at once.

use std::time::Duration;

use tokio::time::Instant;

use super::limiter::SessionId;
use crate::clock;

/// Consecutive failures that open the breaker.
const FAILURE_THRESHOLD: u32 = 5;
/// Number of sessions among them: one bad role or account does not open it.
const SESSION_THRESHOLD: usize = 3;
/// Pause between two trials: full jitter, the first ceiling and the last; it doubles with each failure.
pub(super) const TRIAL_PAUSE: (Duration, Duration) = (Duration::from_secs(1), Duration::from_secs(30));
/// Maximum pause between two exchanges while recovering.
const RECOVERY_PAUSE: Duration = Duration::from_secs(6);

#[derive(Debug)]
pub(super) struct CircuitBreaker {
    consecutive_failures: u32,
    /// Sessions of these failures, up to the threshold.
    failing: Vec<SessionId>,
    recovering: bool,
    /// While open or recovering, no background exchange starts before this time.
    resume_at: Instant,
}

impl Default for CircuitBreaker {
    fn default() -> Self {
        Self { consecutive_failures: 0, failing: Vec::new(), recovering: false, resume_at: Instant::now() }
    }
}

impl CircuitBreaker {
    fn is_open(&self) -> bool {
        self.consecutive_failures >= FAILURE_THRESHOLD && self.failing.len() >= SESSION_THRESHOLD
    }

    /// Returns how long a background exchange must wait, if it must.
    pub(super) fn pause(&self, now: Instant) -> Option<Duration> {
        ((self.is_open() || self.recovering) && now < self.resume_at).then(|| self.resume_at - now)
    }

    /// Records the start of a background exchange. `last`: no other one is queued.
    pub(super) fn started(&mut self, now: Instant, last: bool) {
        if self.is_open() {
            // One trial at a time: its failure sets the time of the next.
            self.resume_at = now + TRIAL_PAUSE.1;
        } else if self.recovering {
            self.resume_at = now + RECOVERY_PAUSE.mul_f64(clock::jitter());
        }
        self.recovering &= !last;
    }

    /// Records a failure that may pass. Only background exchanges extend the pause: a pod that asks again and again must
    /// not delay the others.
    pub(super) fn failed(&mut self, session: SessionId, background: bool) {
        self.consecutive_failures = self.consecutive_failures.saturating_add(1);
        if self.failing.len() < SESSION_THRESHOLD && !self.failing.contains(&session) {
            self.failing.push(session);
        }
        if background {
            let doublings = self.consecutive_failures.saturating_sub(FAILURE_THRESHOLD).min(16);
            let ceiling = TRIAL_PAUSE.0.saturating_mul(1 << doublings).min(TRIAL_PAUSE.1);
            self.resume_at = Instant::now() + ceiling.mul_f64(clock::jitter());
        }
    }

    pub(super) fn succeeded(&mut self) {
        if self.is_open() {
            (self.recovering, self.resume_at) = (true, Instant::now());
        }
        self.consecutive_failures = 0;
        self.failing.clear();
    }
}
