//! Rate limit for exchanges: a token bucket with a priority queue, and a circuit breaker for the upstream.
//!
//! One exchange is one TokenRequest and one AssumeRoleWithWebIdentity, so one bucket limits both. STS allows an account
//! a few hundred calls per second and region, which thousands of nodes share. Waiting pods come before prefetch, and
//! prefetch before refresh.

use std::{cmp::Reverse, collections::BTreeSet, sync::Arc, time::Duration};

use parking_lot::{Mutex, MutexGuard};
use tokio::{
    sync::Notify,
    time::{Instant, sleep},
};

use super::breaker::CircuitBreaker;
use crate::{
    observe::Metrics,
    refusal::{Refusal, RetryPolicy},
};

/// Maximum number of concurrent exchanges; each may take four seconds.
const MAX_CONCURRENT: usize = 32;

/// Why an exchange is made, least important first.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Priority {
    /// Refresh-ahead of credentials that are in use and still valid.
    Refresh,
    /// A pod was bound to the node and will ask soon.
    Prefetch,
    /// A pod waits for the result.
    Waiting,
}

impl Priority {
    fn label(self) -> &'static str {
        match self {
            Self::Refresh => "refresh",
            Self::Prefetch => "prefetch",
            Self::Waiting => "waiting",
        }
    }
}

#[derive(Debug)]
pub struct ExchangeLimiter {
    /// Exchanges per second.
    rate: f64,
    /// Capacity of the token bucket.
    burst: f64,
    state: Mutex<State>,
    changed: Notify,
    metrics: Metrics,
}

#[derive(Debug)]
struct State {
    tokens: f64,
    refilled: Instant,
    running: usize,
    queue: BTreeSet<Ticket>,
    next: u64,
    breaker: CircuitBreaker,
}

/// Order in the queue: higher priority first, then first come, first served.
type Ticket = (Reverse<Priority>, u64);

/// Distinguishes sessions, so that the breaker can tell one failing session from a failing upstream.
pub(super) type SessionId = usize;

/// Permission for one exchange, returned when dropped.
#[derive(Debug)]
pub(super) struct Permit {
    limiter: Arc<ExchangeLimiter>,
    session: SessionId,
    priority: Priority,
}

impl ExchangeLimiter {
    /// `rate` is in exchanges per second; `burst` is the capacity of the bucket.
    pub fn new(rate: u32, burst: u32, metrics: Metrics) -> Arc<Self> {
        let state = State {
            tokens: burst.into(),
            refilled: Instant::now(),
            running: 0,
            queue: BTreeSet::new(),
            next: 0,
            breaker: CircuitBreaker::default(),
        };
        Arc::new(Self {
            rate: rate.into(),
            burst: burst.into(),
            state: Mutex::new(state),
            changed: Notify::new(),
            metrics,
        })
    }

    /// Waits for a permit. Dropping the future leaves the queue.
    pub(super) async fn acquire(self: &Arc<Self>, priority: Priority, session: SessionId) -> Permit {
        let began = Instant::now();
        let position = QueuePosition::join(self, priority);
        loop {
            let changed = self.changed.notified();
            let pause = match self.try_acquire(&position.ticket) {
                Admission::Granted => break,
                Admission::RetryAfter(pause) => pause,
                Admission::Queued => Duration::MAX,
            };
            tokio::select! {
                () = changed => {}
                () = sleep(pause) => {}
            }
        }
        self.metrics.exchange_waited(priority.label(), began.elapsed());
        Permit { limiter: self.clone(), session, priority }
    }

    fn try_acquire(&self, ticket: &Ticket) -> Admission {
        let mut state = self.state();
        let now = Instant::now();
        state.tokens = self.burst.min(state.tokens + self.rate * now.duration_since(state.refilled).as_secs_f64());
        state.refilled = now;
        if state.queue.first() != Some(ticket) || state.running >= MAX_CONCURRENT {
            return Admission::Queued;
        }
        // The breaker never holds up a pod that waits.
        let background = ticket.0 != Reverse(Priority::Waiting);
        if background && let Some(pause) = state.breaker.pause(now) {
            return Admission::RetryAfter(pause);
        }
        if state.tokens < 1.0 {
            let refill = Duration::from_secs_f64((1.0 - state.tokens) / self.rate);
            return Admission::RetryAfter(refill.max(Duration::from_millis(1)));
        }
        state.tokens -= 1.0;
        state.running += 1;
        if background {
            let last = state.queue.len() <= 1;
            state.breaker.started(now, last);
        }
        Admission::Granted
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock()
    }
}

enum Admission {
    Granted,
    RetryAfter(Duration),
    /// Not first in the queue, or too many exchanges are running: wait for a change.
    Queued,
}

/// A position in the queue, left when dropped.
struct QueuePosition<'a> {
    limiter: &'a ExchangeLimiter,
    ticket: Ticket,
}

impl<'a> QueuePosition<'a> {
    fn join(limiter: &'a ExchangeLimiter, priority: Priority) -> Self {
        let mut state = limiter.state();
        let ticket = (Reverse(priority), state.next);
        state.next += 1;
        state.queue.insert(ticket);
        Self { limiter, ticket }
    }
}

impl Drop for QueuePosition<'_> {
    fn drop(&mut self) {
        self.limiter.state().queue.remove(&self.ticket);
        self.limiter.changed.notify_waiters();
    }
}

impl Permit {
    /// Reports the outcome of the exchange to the circuit breaker.
    pub(super) fn finish(self, refusal: Option<&Refusal>) {
        let mut state = self.limiter.state();
        // A permanent refusal is an answer: the upstream works.
        if refusal.is_some_and(|refusal| refusal.reason.info().retry == RetryPolicy::Backoff) {
            state.breaker.failed(self.session, self.priority != Priority::Waiting);
        } else {
            state.breaker.succeeded();
        }
    }
}

impl Drop for Permit {
    fn drop(&mut self) {
        self.limiter.state().running -= 1;
        self.limiter.changed.notify_waiters();
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cache::breaker;
    use crate::refusal::Reason;

    fn limiter(rate: u32, burst: u32) -> Arc<ExchangeLimiter> {
        ExchangeLimiter::new(rate, burst, Metrics::new("test").unwrap())
    }

    #[tokio::test(start_paused = true)]
    async fn burst_passes_then_rate_applies() {
        let limiter = limiter(10, 5);
        let began = Instant::now();
        for _ in 0..25 {
            drop(limiter.acquire(Priority::Prefetch, 0).await);
        }
        let took = began.elapsed().as_millis();
        assert!((2_000..2_100).contains(&took), "20 beyond the burst at 10 a second: {took} ms");
    }

    #[tokio::test(start_paused = true)]
    async fn waiting_pods_come_first() {
        let limiter = limiter(1, 1);
        drop(limiter.acquire(Priority::Refresh, 0).await);
        let order = Arc::new(Mutex::new(Vec::new()));
        let queued = [Priority::Refresh, Priority::Prefetch, Priority::Waiting].map(|priority| {
            let (limiter, order) = (limiter.clone(), order.clone());
            tokio::spawn(async move {
                let _permit = limiter.acquire(priority, 0).await;
                order.lock().push(priority);
            })
        });
        for task in queued {
            task.await.unwrap();
        }
        assert_eq!(*order.lock(), [Priority::Waiting, Priority::Prefetch, Priority::Refresh]);
    }

    /// Twenty sessions need a refresh, and the upstream is down for half an hour.
    #[tokio::test(start_paused = true)]
    async fn open_breaker_attempts_one_session_at_a_time() {
        let limiter = limiter(20, 50);
        let down = Arc::new(std::sync::atomic::AtomicBool::new(true));
        let attempts = Arc::new(Mutex::new(Vec::new()));
        let began = Instant::now();
        let sessions: Vec<_> = (0..20)
            .map(|session| {
                let (limiter, down, attempts) = (limiter.clone(), down.clone(), attempts.clone());
                tokio::spawn(async move {
                    loop {
                        let permit = limiter.acquire(Priority::Refresh, session).await;
                        sleep(Duration::from_millis(100)).await;
                        attempts.lock().push(began.elapsed());
                        let failed = down.load(std::sync::atomic::Ordering::SeqCst);
                        permit.finish(failed.then(|| Reason::StsUnavailable.into()).as_ref());
                        if !failed {
                            return;
                        }
                        sleep(Duration::from_secs(15).mul_f64(fastrand::f64())).await;
                    }
                })
            })
            .collect();
        sleep(Duration::from_secs(1_800)).await;
        let tried = std::mem::take(&mut *attempts.lock());
        assert!((100..300).contains(&tried.len()), "{} attempts in half an hour", tried.len());
        // A waiting pod is admitted at once.
        let asked = Instant::now();
        limiter.acquire(Priority::Waiting, 0).await.finish(Some(&Reason::StsUnavailable.into()));
        assert!(asked.elapsed() < Duration::from_millis(100), "{:?}", asked.elapsed());

        down.store(false, std::sync::atomic::Ordering::SeqCst);
        let back = Instant::now();
        for session in sessions {
            session.await.unwrap();
        }
        let took = back.elapsed().as_secs();
        assert!((20..180).contains(&took), "twenty sessions, 3 s apart on average: {took} s");
    }

    /// One role fails permanently, and two of its pods ask all the time.
    #[tokio::test(start_paused = true)]
    async fn one_failing_session_delays_no_other() {
        let limiter = limiter(20, 50);
        for round in 0..100 {
            for priority in [Priority::Waiting, Priority::Prefetch] {
                limiter.acquire(priority, 1).await.finish(Some(&Reason::StsUnavailable.into()));
            }
            if round % 10 == 9 {
                let began = Instant::now();
                limiter.acquire(Priority::Refresh, 2).await.finish(None);
                limiter.acquire(Priority::Prefetch, 3).await.finish(Some(&Reason::AccessDenied.into()));
                assert!(began.elapsed() < Duration::from_millis(200), "{:?}", began.elapsed());
            }
        }
    }

    /// However often pods ask, the node makes its own trials on schedule.
    #[tokio::test(start_paused = true)]
    async fn waiting_pods_do_not_extend_the_pause() {
        let limiter = limiter(1_000, 1_000);
        for session in 0..10 {
            limiter.acquire(Priority::Waiting, session).await.finish(Some(&Reason::StsUnavailable.into()));
        }
        let began = Instant::now();
        limiter.acquire(Priority::Refresh, 20).await.finish(Some(&Reason::StsUnavailable.into()));
        assert!(began.elapsed() < Duration::from_millis(10));
        let asks = async {
            loop {
                limiter.acquire(Priority::Waiting, 0).await.finish(Some(&Reason::StsUnavailable.into()));
                sleep(Duration::from_secs(1)).await;
            }
        };
        tokio::select! {
            () = asks => {}
            _ = limiter.acquire(Priority::Refresh, 20) => {}
        }
        assert!(began.elapsed() <= breaker::TRIAL_PAUSE.1 + Duration::from_secs(1), "{:?}", began.elapsed());
    }

    #[tokio::test(start_paused = true)]
    async fn concurrency_is_limited() {
        let limiter = limiter(1_000_000, 1_000);
        let mut permits = Vec::new();
        for _ in 0..MAX_CONCURRENT {
            permits.push(limiter.acquire(Priority::Waiting, 0).await);
        }
        let timed_out = tokio::time::timeout(Duration::from_secs(1), limiter.acquire(Priority::Waiting, 0)).await;
        assert!(timed_out.is_err());
        permits.pop();
        drop(limiter.acquire(Priority::Refresh, 0).await);
    }
}
