//! The one place where wall-clock time enters. Everything else counts in [`tokio::time::Instant`], so that a clock
//! step can neither serve an expired credential nor drop a good one, and a paused clock drives every test.
//!
//! Knows nothing of kirsa.

#![allow(clippy::disallowed_types)]

use std::time::{Duration, SystemTime, UNIX_EPOCH};

use jiff::Timestamp;
use nix::time::ClockId;
use serde::Deserialize;

/// Seconds since 1970-01-01T00:00:00Z.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Deserialize)]
pub struct UnixTime(pub u64);

impl UnixTime {
    pub fn now() -> Self {
        // A clock before 1970 reads as 1970: everything dated by it has then expired, which is the safe side.
        Self(SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |d| d.as_secs()))
    }

    /// How far `self` lies after `other`; zero if it does not.
    pub fn since(self, other: Self) -> Duration {
        Duration::from_secs(self.0.saturating_sub(other.0))
    }

    /// Exactly `YYYY-MM-DDTHH:MM:SSZ`: fractions and numeric offsets break boto2, minio-py and the Rust SDK.
    pub fn iso8601(self) -> String {
        let seconds = i64::try_from(self.0).unwrap_or(i64::MAX);
        Timestamp::from_second(seconds).unwrap_or(Timestamp::MAX).strftime("%Y-%m-%dT%H:%M:%SZ").to_string()
    }
}

/// How long this machine has been suspended since it booted: time that [`tokio::time::Instant`] does not count.
pub fn suspended() -> Duration {
    let now = |clock: ClockId| clock.now().map_or(Duration::ZERO, Duration::from);
    // Read in this order, so that what passes between the two never counts as suspended.
    let boottime = now(ClockId::CLOCK_BOOTTIME);
    boottime.saturating_sub(now(ClockId::CLOCK_MONOTONIC))
}

/// Where in a range of times something happens, from 0 to 1: anywhere, so that nodes, sessions and tries do not meet.
pub fn jitter() -> f64 {
    #[cfg(test)]
    if let Some(everywhere) = tests::NO_JITTER.get() {
        return everywhere;
    }
    fastrand::f64()
}

/// Pauses between tries, each twice as long as the one before up to a last one, and with jitter: the nodes of a
/// cluster must not all come back at once.
#[derive(Debug, Clone)]
pub struct Backoff {
    first: Duration,
    last: Duration,
    next: Duration,
}

impl Backoff {
    pub const fn new(first: Duration, last: Duration) -> Self {
        Self { first, last, next: first }
    }

    /// From half the next pause to the whole.
    pub fn pause(&mut self) -> Duration {
        let pause = self.next.mul_f64(0.5 + jitter() / 2.0);
        self.next = (self.next * 2).min(self.last);
        pause
    }

    /// Something has succeeded.
    pub fn reset(&mut self) {
        self.next = self.first;
    }
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;

    thread_local! {
        /// The same place for all, on this thread: to see what jitter is good for.
        pub(crate) static NO_JITTER: std::cell::Cell<Option<f64>> = const { std::cell::Cell::new(None) };
    }

    #[test]
    fn dates_are_written_as_every_sdk_reads_them() {
        for (seconds, text) in [
            (0, "1970-01-01T00:00:00Z"),
            (951_782_399, "2000-02-28T23:59:59Z"),
            (951_782_400, "2000-02-29T00:00:00Z"),
            (1_709_164_800, "2024-02-29T00:00:00Z"),
            (4_107_542_399, "2100-02-28T23:59:59Z"),
            (4_107_542_400, "2100-03-01T00:00:00Z"),
            (u64::MAX, "9999-12-30T22:00:00Z"),
        ] {
            assert_eq!(UnixTime(seconds).iso8601(), text);
        }
    }

    #[test]
    fn pauses_grow_to_the_last_and_begin_anew_after_a_success() {
        let mut backoff = Backoff::new(Duration::from_secs(1), Duration::from_secs(5));
        for whole in [1, 2, 4, 5, 5].map(Duration::from_secs) {
            assert!((whole / 2..=whole).contains(&backoff.pause()), "{whole:?}");
        }
        backoff.reset();
        assert!(backoff.pause() <= Duration::from_secs(1));
    }
}
