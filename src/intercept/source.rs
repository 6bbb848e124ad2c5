//! Limits the requests per second of one source: of a pod with all its addresses, or of an address whose pod is not
//! known. A client in a tight loop slows itself down, not the others.

use std::{
    collections::HashMap,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use tokio::time::Instant;

use super::Limits;
use crate::{connections::Owner, observe::Metrics};

/// A request that is over the rate is held this long at most: SDKs bear a delay better than a refusal, but not long.
pub const MAX_DELAY: Duration = Duration::from_millis(300);
/// Sources that are remembered before those that have been quiet are forgotten.
const REMEMBERED: usize = 1_024;

#[derive(Debug)]
pub(super) struct Sources {
    limits: Limits,
    seen: Mutex<HashMap<Owner, Arc<Mutex<Source>>>>,
    metrics: Metrics,
}

#[derive(Debug)]
struct Source {
    /// Requests that may come at once; below zero, those that are held.
    tokens: f64,
    counted: Instant,
}

/// One connection's share of what its source may ask, counted as open while it is kept.
#[derive(Debug)]
pub struct Share {
    source: Arc<Mutex<Source>>,
    sources: Arc<Sources>,
}

impl Sources {
    pub(super) fn new(limits: Limits, metrics: Metrics) -> Arc<Self> {
        Arc::new(Self { limits, seen: Mutex::default(), metrics })
    }

    pub(super) fn share(self: &Arc<Self>, owner: Owner) -> Share {
        let mut seen = self.seen();
        if seen.len() >= REMEMBERED {
            let rate = f64::from(self.limits.requests_per_source);
            seen.retain(|_, source| {
                let is_open = Arc::strong_count(source) > 1;
                let source = lock(source);
                is_open || source.tokens + rate * seconds(source.counted) < rate
            });
        }
        let fresh = || Source { tokens: self.limits.requests_per_source.into(), counted: Instant::now() };
        let source = seen.entry(owner).or_insert_with(|| Arc::new(Mutex::new(fresh()))).clone();
        self.metrics.connections.inc();
        Share { source, sources: self.clone() }
    }

    fn seen(&self) -> MutexGuard<'_, HashMap<Owner, Arc<Mutex<Source>>>> {
        lock(&self.seen)
    }
}

impl Share {
    /// For tests of later stages: of a source that nothing limits.
    #[cfg(any(test, fuzzing))]
    pub(crate) fn sample(metrics: Metrics) -> Self {
        let limits = Limits { total: 1, per_source: 1, requests_per_source: u32::MAX };
        let source = Source { tokens: u32::MAX.into(), counted: Instant::now() };
        metrics.connections.inc();
        Self { source: Arc::new(Mutex::new(source)), sources: Sources::new(limits, metrics) }
    }

    /// Counts a request that has just come; returns how long it must be held, `None` when that would be too long.
    pub fn request(&self, now: Instant) -> Option<Duration> {
        let rate = f64::from(self.sources.limits.requests_per_source);
        let mut source = lock(&self.source);
        // Another connection's may have come later and be counted already.
        let now = now.max(source.counted);
        source.tokens = rate.min(source.tokens + rate * now.duration_since(source.counted).as_secs_f64());
        source.counted = now;
        let delay = Duration::from_secs_f64((1.0 - source.tokens).max(0.0) / rate);
        (delay <= MAX_DELAY).then(|| {
            source.tokens -= 1.0;
            delay
        })
    }
}

impl Drop for Share {
    fn drop(&mut self) {
        self.sources.metrics.connections.dec();
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

fn seconds(since: Instant) -> f64 {
    since.elapsed().as_secs_f64()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sources(requests_per_source: u32) -> Arc<Sources> {
        let limits = Limits { total: 10, per_source: 2, requests_per_source };
        Sources::new(limits, Metrics::new("test").unwrap())
    }

    fn address(third: u8, last: u8) -> Owner {
        Owner::Address([10, 0, third, last].into())
    }

    /// IMDS-29: held for 300 ms at most, then refused; also when every request comes by a connection of its own.
    #[tokio::test(start_paused = true)]
    async fn a_tight_loop_is_slowed_down_and_then_refused() {
        let sources = sources(100);
        let ask = || sources.share(address(0, 1)).request(Instant::now());
        let answers: Vec<_> = (0..200).map(|_| ask()).collect();
        assert_eq!(answers.iter().filter(|answer| **answer == Some(Duration::ZERO)).count(), 100);
        assert_eq!(answers.iter().filter(|answer| answer.is_none()).count(), 70);
        assert!(answers.iter().flatten().all(|delay| *delay <= MAX_DELAY));
        tokio::time::advance(Duration::from_secs(2)).await;
        assert_eq!(ask(), Some(Duration::ZERO));
    }

    #[tokio::test(start_paused = true)]
    async fn requests_that_are_counted_out_of_order_are_given_no_time_twice() {
        let sources = sources(10);
        let share = sources.share(address(0, 1));
        let (former, later) = (Instant::now(), Instant::now() + Duration::from_secs(1));
        let at_once = |at| (0..100).take_while(|_| share.request(at) == Some(Duration::ZERO)).count();
        assert_eq!((at_once(later), at_once(former), at_once(later)), (10, 0, 0));
    }

    #[tokio::test(start_paused = true)]
    async fn quiet_sources_are_forgotten() {
        let sources = sources(10);
        (0..=255).for_each(|last| assert!(sources.share(address(1, last)).request(Instant::now()).is_some()));
        tokio::time::advance(Duration::from_secs(2)).await;
        for third in 2..=10 {
            (0..=255).for_each(|last| drop(sources.share(address(third, last))));
        }
        assert!(sources.seen().len() <= REMEMBERED, "{}", sources.seen().len());
    }
}
