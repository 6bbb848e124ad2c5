//! The only module that reads the wall clock. Everything else counts in [`tokio::time::Instant`]: a clock step can neither
//! serve an expired credential nor drop a valid one, and tests run on a paused clock.
//!
//! Depends on no other module.

#![allow(clippy::disallowed_types)]

use std::time::{Duration, SystemTime, UNIX_EPOCH};

use jiff::Timestamp;
use nix::time::ClockId;
use serde::Deserialize;

/// Wall-clock time, in seconds since 1970-01-01T00:00:00Z.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Deserialize)]
pub struct UnixTime(pub u64);

impl UnixTime {
    pub fn now() -> Self {
        // A clock before 1970 reads as 1970.
        Self(SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |d| d.as_secs()))
    }

    /// Returns the duration from `other` to `self`; zero if `other` is later.
    pub fn since(self, other: Self) -> Duration {
        Duration::from_secs(self.0.saturating_sub(other.0))
    }

    /// Formats the time as `YYYY-MM-DDTHH:MM:SSZ`. Fractions and numeric offsets break boto2, minio-py and the Rust SDK.
    pub fn iso8601(self) -> String {
        let seconds = i64::try_from(self.0).unwrap_or(i64::MAX);
        Timestamp::from_second(seconds).unwrap_or(Timestamp::MAX).strftime("%Y-%m-%dT%H:%M:%SZ").to_string()
    }
}

/// Returns how long this machine has been suspended since boot, which [`tokio::time::Instant`] does not count.
pub fn suspended() -> Duration {
    let now = |clock: ClockId| clock.now().map_or(Duration::ZERO, Duration::from);
    // Read in this order, so that the time between the two reads never counts as suspended.
    let boottime = now(ClockId::CLOCK_BOOTTIME);
    boottime.saturating_sub(now(ClockId::CLOCK_MONOTONIC))
}

/// Returns a random factor from 0 to 1 for jitter, so that nodes, sessions and retries do not coincide.
pub fn jitter() -> f64 {
    #[cfg(test)]
    if let Some(fixed) = tests::FIXED_JITTER.get() {
        return fixed;
    }
    fastrand::f64()
}

/// Exponential backoff with equal jitter. The pause doubles up to a maximum; jitter keeps the nodes of a cluster from
/// retrying in step.
#[derive(Debug, Clone)]
pub struct Backoff {
    initial: Duration,
    max: Duration,
    next: Duration,
}

impl Backoff {
    pub const fn new(initial: Duration, max: Duration) -> Self {
        Self { initial, max, next: initial }
    }

    /// Returns the next pause: from half its nominal length to all of it.
    pub fn pause(&mut self) -> Duration {
        let pause = self.next.mul_f64(0.5 + jitter() / 2.0);
        self.next = (self.next * 2).min(self.max);
        pause
    }

    /// Returns to the initial pause after a success.
    pub fn reset(&mut self) {
        self.next = self.initial;
    }
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;

    thread_local! {
        /// Fixed jitter on this thread, to show what jitter prevents.
        pub(crate) static FIXED_JITTER: std::cell::Cell<Option<f64>> = const { std::cell::Cell::new(None) };
    }

    #[test]
    fn iso8601_has_whole_seconds_and_z() {
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
    fn pauses_grow_to_the_maximum_and_reset() {
        let mut backoff = Backoff::new(Duration::from_secs(1), Duration::from_secs(5));
        for nominal in [1, 2, 4, 5, 5].map(Duration::from_secs) {
            assert!((nominal / 2..=nominal).contains(&backoff.pause()), "{nominal:?}");
        }
        backoff.reset();
        assert!(backoff.pause() <= Duration::from_secs(1));
    }
}
