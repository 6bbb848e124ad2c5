//! Rate limit per source: a token bucket for each pod (with all its addresses), or for each address whose pod is
//! unknown. A client in a tight loop slows down itself, not others.

use std::{collections::HashMap, sync::Arc, time::Duration};

use parking_lot::Mutex;
use tokio::time::Instant;

use super::Limits;
use crate::{connections::Owner, observe::Metrics};

/// Maximum time that a request over the rate is held. SDKs tolerate a short delay better than a refusal.
pub const MAX_DELAY: Duration = Duration::from_millis(300);
/// Number of buckets from which on full ones without connections are removed.
const CLEANUP_THRESHOLD: usize = 1_024;

#[derive(Debug)]
pub(super) struct SourceLimits {
    limits: Limits,
    buckets: Mutex<HashMap<Owner, Arc<Mutex<TokenBucket>>>>,
    metrics: Metrics,
}

#[derive(Debug)]
struct TokenBucket {
    /// Requests that may come at once. Negative while requests are held.
    tokens: f64,
    refilled: Instant,
}

/// One connection's access to the token bucket of its source. Counts as an open connection until dropped.
#[derive(Debug)]
pub struct SourceQuota {
    bucket: Arc<Mutex<TokenBucket>>,
    limits: Arc<SourceLimits>,
}

impl SourceLimits {
    pub(super) fn new(limits: Limits, metrics: Metrics) -> Arc<Self> {
        Arc::new(Self { limits, buckets: Mutex::default(), metrics })
    }

    pub(super) fn quota(self: &Arc<Self>, owner: Owner) -> SourceQuota {
        let mut buckets = self.buckets.lock();
        if buckets.len() >= CLEANUP_THRESHOLD {
            let rate = f64::from(self.limits.requests_per_source);
            buckets.retain(|_, bucket| {
                let is_open = Arc::strong_count(bucket) > 1;
                let bucket = bucket.lock();
                is_open || bucket.tokens + rate * bucket.refilled.elapsed().as_secs_f64() < rate
            });
        }
        let full = || TokenBucket { tokens: self.limits.requests_per_source.into(), refilled: Instant::now() };
        let bucket = buckets.entry(owner).or_insert_with(|| Arc::new(Mutex::new(full()))).clone();
        self.metrics.connections.inc();
        SourceQuota { bucket, limits: self.clone() }
    }
}

impl SourceQuota {
    /// Returns an unlimited quota, for tests of later stages.
    #[cfg(any(test, fuzzing))]
    pub(crate) fn sample(metrics: Metrics) -> Self {
        let limits = Limits { total: 1, per_source: 1, requests_per_source: u32::MAX };
        let bucket = TokenBucket { tokens: u32::MAX.into(), refilled: Instant::now() };
        metrics.connections.inc();
        Self { bucket: Arc::new(Mutex::new(bucket)), limits: SourceLimits::new(limits, metrics) }
    }

    /// Counts a request that arrived at `now`. Returns how long to hold it, or `None` if it must be refused.
    pub fn throttle(&self, now: Instant) -> Option<Duration> {
        let rate = f64::from(self.limits.limits.requests_per_source);
        let mut bucket = self.bucket.lock();
        // A later request of another connection may have been counted already.
        let now = now.max(bucket.refilled);
        bucket.tokens = rate.min(bucket.tokens + rate * now.duration_since(bucket.refilled).as_secs_f64());
        bucket.refilled = now;
        let delay = Duration::from_secs_f64((1.0 - bucket.tokens).max(0.0) / rate);
        (delay <= MAX_DELAY).then(|| {
            bucket.tokens -= 1.0;
            delay
        })
    }
}

impl Drop for SourceQuota {
    fn drop(&mut self) {
        self.limits.metrics.connections.dec();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn limits(requests_per_source: u32) -> Arc<SourceLimits> {
        let config = Limits { total: 10, per_source: 2, requests_per_source };
        SourceLimits::new(config, Metrics::new("test").unwrap())
    }

    fn address(third: u8, last: u8) -> Owner {
        Owner::Address([10, 0, third, last].into())
    }

    /// IMDS-29: requests are held for at most 300 ms, then refused, even if each opens its own connection.
    #[tokio::test(start_paused = true)]
    async fn tight_loop_is_delayed_and_then_refused() {
        let limits = limits(100);
        let request = || limits.quota(address(0, 1)).throttle(Instant::now());
        let delays: Vec<_> = (0..200).map(|_| request()).collect();
        assert_eq!(delays.iter().filter(|delay| **delay == Some(Duration::ZERO)).count(), 100);
        assert_eq!(delays.iter().filter(|delay| delay.is_none()).count(), 70);
        assert!(delays.iter().flatten().all(|delay| *delay <= MAX_DELAY));
        tokio::time::advance(Duration::from_secs(2)).await;
        assert_eq!(request(), Some(Duration::ZERO));
    }

    #[tokio::test(start_paused = true)]
    async fn out_of_order_requests_refill_only_once() {
        let limits = limits(10);
        let quota = limits.quota(address(0, 1));
        let (earlier, later) = (Instant::now(), Instant::now() + Duration::from_secs(1));
        let at_once = |at| (0..100).take_while(|_| quota.throttle(at) == Some(Duration::ZERO)).count();
        assert_eq!((at_once(later), at_once(earlier), at_once(later)), (10, 0, 0));
    }

    #[tokio::test(start_paused = true)]
    async fn idle_buckets_are_removed() {
        let limits = limits(10);
        (0..=255).for_each(|last| assert!(limits.quota(address(1, last)).throttle(Instant::now()).is_some()));
        tokio::time::advance(Duration::from_secs(2)).await;
        for third in 2..=10 {
            (0..=255).for_each(|last| drop(limits.quota(address(third, last))));
        }
        assert!(limits.buckets.lock().len() <= CLEANUP_THRESHOLD, "{}", limits.buckets.lock().len());
    }
}
