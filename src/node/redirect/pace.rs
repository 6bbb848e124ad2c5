//! How often the redirect may be repaired and its rules read.

use std::{sync::Arc, time::Duration};

use tokio::time::Instant;

use super::VERIFY;

/// How often the rules are read back.
const READ_BACK: Duration = Duration::from_secs(30);
/// Bounds reading to 2 % of the time where the tools are slow, as with very many iptables rules.
const READ_SHARE: u32 = 50;
/// Shortest time between repairs of announced removals.
const SPACING: Duration = Duration::from_millis(100);
/// Longest wait before another repair where repairs do not help.
const MAX_DELAY: Duration = Duration::from_secs(60);

#[derive(Debug)]
pub(super) struct Pace {
    /// When the rules were applied last.
    pub applied: Option<Instant>,
    /// Wait after repairs that did not help.
    delay: Duration,
    /// When the rules were read last, and how long that took.
    read: (Instant, Duration),
    /// The listing that stands for rules as they were applied.
    pub expected: Option<Arc<str>>,
    /// When policy routing was checked last.
    pub fenced: Option<Instant>,
    pub fence_failed: bool,
}

impl Pace {
    pub(super) fn new(expected: Option<Arc<str>>) -> Self {
        Self {
            applied: None,
            delay: Duration::ZERO,
            read: (Instant::now(), Duration::ZERO),
            expected,
            fenced: None,
            fence_failed: false,
        }
    }

    pub(super) fn is_due(&self) -> bool {
        self.applied.is_none_or(|applied| applied.elapsed() >= self.delay)
    }

    pub(super) fn helped(&mut self, helped: bool) {
        self.delay = if helped { Duration::ZERO } else { (self.delay * 2).clamp(VERIFY, MAX_DELAY) };
    }

    /// Waits until rules may be applied again: a process that keeps removing ours cannot keep this node busy.
    pub(super) async fn spaced(&self) {
        if let Some(applied) = self.applied {
            tokio::time::sleep_until(applied + SPACING).await;
        }
    }

    /// Whether the rules should be read: after [`READ_BACK`], or after an overrun of announcements.
    pub(super) fn read_is_due(&self, overran: impl FnOnce() -> bool) -> bool {
        let (at, took) = self.read;
        let rest = took * READ_SHARE;
        at.elapsed() >= READ_BACK.max(rest) || at.elapsed() >= rest && overran()
    }

    pub(super) fn read(&mut self, took: Duration) {
        self.read = (Instant::now(), took);
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
                pace.helped(false);
                repairs += 1;
            }
            tokio::time::advance(Duration::from_millis(35)).await;
        }
        assert!((10..=16).contains(&repairs), "{repairs}");
        pace.helped(true);
        assert!(pace.is_due());
    }

    #[tokio::test(start_paused = true)]
    async fn slow_listings_are_read_less_often() {
        let mut pace = Pace::new(None);
        assert!(!pace.read_is_due(|| false) && pace.read_is_due(|| true), "lost announcements are a reason to read");
        tokio::time::advance(READ_BACK).await;
        assert!(pace.read_is_due(|| false));
        pace.read(Duration::from_secs(2));
        tokio::time::advance(READ_BACK).await;
        assert!(!pace.read_is_due(|| true));
        tokio::time::advance(Duration::from_secs(70)).await;
        assert!(pace.read_is_due(|| false));
    }
}
