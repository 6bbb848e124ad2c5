//! Rate limits for repairing the redirect and for reading its rules.

use std::{sync::Arc, time::Duration};

use tokio::time::Instant;

use super::VERIFY;

/// Interval at which the rules are read back.
const READ_BACK: Duration = Duration::from_secs(30);
/// Limits reading to 2 % of the time when the tools are slow, as with very many iptables rules.
const READ_SHARE: u32 = 50;
/// Minimum time between repairs after netlink notifications.
const SPACING: Duration = Duration::from_millis(100);
/// Maximum delay between repairs that do not help.
const MAX_DELAY: Duration = Duration::from_secs(60);

#[derive(Debug)]
pub(super) struct Pace {
    /// Time of the last repair.
    pub applied: Option<Instant>,
    /// Delay before the next repair, after repairs that did not help.
    delay: Duration,
    /// Time and duration of the last reading.
    last_read: (Instant, Duration),
    /// The listing of the rules as they were applied.
    pub expected: Option<Arc<str>>,
    /// Time of the last check of policy routing.
    pub fenced: Option<Instant>,
    /// Whether the last check of policy routing failed, which is logged once.
    pub fence_failed: bool,
}

impl Pace {
    pub(super) fn new(expected: Option<Arc<str>>) -> Self {
        Self {
            applied: None,
            delay: Duration::ZERO,
            last_read: (Instant::now(), Duration::ZERO),
            expected,
            fenced: None,
            fence_failed: false,
        }
    }

    /// Whether another repair may run.
    pub(super) fn is_due(&self) -> bool {
        self.applied.is_none_or(|applied| applied.elapsed() >= self.delay)
    }

    /// Records a repair: one that did not help doubles the delay (backoff).
    pub(super) fn repaired(&mut self, helped: bool) {
        self.delay = if helped { Duration::ZERO } else { (self.delay * 2).clamp(VERIFY, MAX_DELAY) };
    }

    /// Waits until [`SPACING`] has passed since the last repair, so that a process that keeps removing the rules cannot
    /// keep this node busy.
    pub(super) async fn wait_spacing(&self) {
        if let Some(applied) = self.applied {
            tokio::time::sleep_until(applied + SPACING).await;
        }
    }

    /// Whether the rules should be read: after [`READ_BACK`], or when netlink notifications were lost.
    pub(super) fn read_is_due(&self, overran: impl FnOnce() -> bool) -> bool {
        let (at, took) = self.last_read;
        let pause = took * READ_SHARE;
        at.elapsed() >= READ_BACK.max(pause) || at.elapsed() >= pause && overran()
    }

    pub(super) fn record_read(&mut self, took: Duration) {
        self.last_read = (Instant::now(), took);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test(start_paused = true)]
    async fn repairs_that_do_not_help_back_off() {
        let (mut pace, start, mut repairs) = (Pace::new(None), Instant::now(), 0);
        while start.elapsed() < Duration::from_secs(600) {
            if pace.is_due() {
                pace.applied = Some(Instant::now());
                pace.repaired(false);
                repairs += 1;
            }
            tokio::time::advance(Duration::from_millis(35)).await;
        }
        assert!((10..=16).contains(&repairs), "{repairs}");
        pace.repaired(true);
        assert!(pace.is_due());
    }

    #[tokio::test(start_paused = true)]
    async fn slow_listings_are_read_less_often() {
        let mut pace = Pace::new(None);
        assert!(!pace.read_is_due(|| false) && pace.read_is_due(|| true), "lost notifications trigger a reading");
        tokio::time::advance(READ_BACK).await;
        assert!(pace.read_is_due(|| false));
        pace.record_read(Duration::from_secs(2));
        tokio::time::advance(READ_BACK).await;
        assert!(!pace.read_is_due(|| true));
        tokio::time::advance(Duration::from_secs(70)).await;
        assert!(pace.read_is_due(|| false));
    }
}
