//! What one source address may take: connections at once, and requests per second. A client in a tight loop slows
//! itself down, not the others.

use std::{
    collections::HashMap,
    net::IpAddr,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use tokio::time::Instant;

use super::Limits;
use crate::observe::Metrics;

/// A request that is over the rate is held this long at most: SDKs bear a delay better than a refusal, but not long.
pub const MAX_DELAY: Duration = Duration::from_millis(300);
/// Sources that are remembered before those that have been quiet are forgotten.
const REMEMBERED: usize = 1_024;

#[derive(Debug)]
pub(super) struct Sources {
    limits: Limits,
    seen: Mutex<HashMap<IpAddr, Arc<Mutex<Source>>>>,
    metrics: Metrics,
}

#[derive(Debug)]
struct Source {
    open: usize,
    /// Requests that may come at once; below zero, those that are held.
    tokens: f64,
    counted: Instant,
}

/// One connection's share of what its source may take.
#[derive(Debug)]
pub struct Share {
    source: Arc<Mutex<Source>>,
    sources: Arc<Sources>,
}

impl Sources {
    pub(super) fn new(limits: Limits, metrics: Metrics) -> Arc<Self> {
        Arc::new(Self { limits, seen: Mutex::default(), metrics })
    }

    /// `None` when the source has as many connections as it may.
    pub(super) fn share(self: &Arc<Self>, source: IpAddr) -> Option<Share> {
        let mut seen = self.seen();
        if seen.len() >= REMEMBERED {
            let rate = f64::from(self.limits.requests_per_source);
            seen.retain(|_, source| {
                let source = lock(source);
                source.open > 0 || source.tokens + rate * seconds(source.counted) < rate
            });
        }
        let fresh = || Source { open: 0, tokens: self.limits.requests_per_source.into(), counted: Instant::now() };
        let source = seen.entry(source).or_insert_with(|| Arc::new(Mutex::new(fresh()))).clone();
        {
            let mut source = lock(&source);
            if source.open >= self.limits.per_source {
                return None;
            }
            source.open += 1;
        }
        self.metrics.connections.inc();
        Some(Share { source, sources: self.clone() })
    }

    fn seen(&self) -> MutexGuard<'_, HashMap<IpAddr, Arc<Mutex<Source>>>> {
        lock(&self.seen)
    }
}

impl Share {
    /// For tests of later stages: of a source that has all it may have, and nothing else open.
    #[cfg(any(test, fuzzing))]
    pub(crate) fn sample(metrics: Metrics) -> Self {
        let limits = Limits { total: 1, per_source: 1, requests_per_source: u32::MAX };
        let source = Source { open: 1, tokens: u32::MAX.into(), counted: Instant::now() };
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
        lock(&self.source).open -= 1;
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

    fn sources(per_source: usize, requests_per_source: u32) -> Arc<Sources> {
        let limits = Limits { total: 10, per_source, requests_per_source };
        Sources::new(limits, Metrics::new("test").unwrap())
    }

    fn ip(last: u8) -> IpAddr {
        [10, 0, 0, last].into()
    }

    #[tokio::test(start_paused = true)]
    async fn connections_count_while_they_are_open_and_for_their_source_only() {
        let sources = sources(2, 10);
        let (first, _second) = (sources.share(ip(1)).unwrap(), sources.share(ip(1)).unwrap());
        assert!(sources.share(ip(1)).is_none());
        assert!(sources.share(ip(2)).is_some());
        drop(first);
        assert!(sources.share(ip(1)).is_some());
    }

    /// IMDS-29: held for 300 ms at most, then refused; also when every request comes by a connection of its own.
    #[tokio::test(start_paused = true)]
    async fn a_tight_loop_is_slowed_down_and_then_refused() {
        let sources = sources(2, 100);
        let ask = || sources.share(ip(1)).unwrap().request(Instant::now());
        let answers: Vec<_> = (0..200).map(|_| ask()).collect();
        assert_eq!(answers.iter().filter(|answer| **answer == Some(Duration::ZERO)).count(), 100);
        assert_eq!(answers.iter().filter(|answer| answer.is_none()).count(), 70);
        assert!(answers.iter().flatten().all(|delay| *delay <= MAX_DELAY));
        tokio::time::advance(Duration::from_secs(2)).await;
        assert_eq!(ask(), Some(Duration::ZERO));
    }

    #[tokio::test(start_paused = true)]
    async fn requests_that_are_counted_out_of_order_are_given_no_time_twice() {
        let sources = sources(2, 10);
        let share = sources.share(ip(1)).unwrap();
        let (former, later) = (Instant::now(), Instant::now() + Duration::from_secs(1));
        let at_once = |at| (0..100).take_while(|_| share.request(at) == Some(Duration::ZERO)).count();
        assert_eq!((at_once(later), at_once(former), at_once(later)), (10, 0, 0));
    }

    #[tokio::test(start_paused = true)]
    async fn quiet_sources_are_forgotten() {
        let sources = sources(2, 10);
        (0..=255).for_each(|last| {
            assert!(sources.share([10, 0, 1, last].into()).unwrap().request(Instant::now()).is_some())
        });
        tokio::time::advance(Duration::from_secs(2)).await;
        for third in 2..=10 {
            (0..=255).for_each(|last| drop(sources.share([10, 0, third, last].into())));
        }
        assert!(sources.seen().len() <= REMEMBERED, "{}", sources.seen().len());
    }
}
