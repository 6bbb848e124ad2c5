//! How many exchanges this node makes, and in which order: waiting pods before prefetch, prefetch before refresh.
//!
//! One exchange is one TokenRequest and one AssumeRoleWithWebIdentity, so one budget bounds both. STS grants an
//! account some hundred calls a second in a region, which thousands of nodes share.

use std::{
    cmp::Reverse,
    collections::BTreeSet,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use tokio::{
    sync::Notify,
    time::{Instant, sleep},
};

use crate::observe::{Metrics, Urgency};

/// Exchanges that are under way at once; each may take four seconds.
const CONCURRENT: usize = 32;

/// A token bucket with a queue in order of urgency.
#[derive(Debug)]
pub struct Budget {
    /// Exchanges per second, and how many may come at once.
    rate: f64,
    burst: f64,
    state: Mutex<State>,
    changed: Notify,
    metrics: Metrics,
}

#[derive(Debug)]
struct State {
    tokens: f64,
    counted: Instant,
    running: usize,
    queue: BTreeSet<Ticket>,
    next: u64,
}

/// Most urgent first, then first come.
type Ticket = (Reverse<Urgency>, u64);

/// The right to one exchange, while it is held.
#[derive(Debug)]
pub(super) struct Turn(Arc<Budget>);

impl Budget {
    pub fn new(rate: u32, burst: u32, metrics: Metrics) -> Arc<Self> {
        let state =
            State { tokens: burst.into(), counted: Instant::now(), running: 0, queue: BTreeSet::new(), next: 0 };
        Arc::new(Self {
            rate: rate.into(),
            burst: burst.into(),
            state: Mutex::new(state),
            changed: Notify::new(),
            metrics,
        })
    }

    /// Waits until it is this one's turn; dropping the future gives up the place.
    pub(super) async fn turn(self: &Arc<Self>, urgency: Urgency) -> Turn {
        let began = Instant::now();
        let place = Place::take(self, urgency);
        loop {
            let changed = self.changed.notified();
            let pause = match self.try_begin(&place.ticket) {
                Begin::Now => break,
                Begin::InABit(pause) => pause,
                Begin::WhenOthersHave => Duration::MAX,
            };
            tokio::select! {
                () = changed => {}
                () = sleep(pause) => {}
            }
        }
        self.metrics.exchange_waited(urgency, began.elapsed());
        Turn(self.clone())
    }

    fn try_begin(&self, ticket: &Ticket) -> Begin {
        let mut state = self.state();
        let now = Instant::now();
        state.tokens = self.burst.min(state.tokens + self.rate * now.duration_since(state.counted).as_secs_f64());
        state.counted = now;
        if state.queue.first() != Some(ticket) || state.running >= CONCURRENT {
            return Begin::WhenOthersHave;
        }
        if state.tokens < 1.0 {
            return Begin::InABit(
                Duration::from_secs_f64((1.0 - state.tokens) / self.rate).max(Duration::from_millis(1)),
            );
        }
        state.tokens -= 1.0;
        state.running += 1;
        Begin::Now
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

enum Begin {
    Now,
    InABit(Duration),
    WhenOthersHave,
}

/// A place in the queue, given up when dropped.
struct Place<'a> {
    budget: &'a Budget,
    ticket: Ticket,
}

impl<'a> Place<'a> {
    fn take(budget: &'a Budget, urgency: Urgency) -> Self {
        let mut state = budget.state();
        let ticket = (Reverse(urgency), state.next);
        state.next += 1;
        state.queue.insert(ticket);
        Self { budget, ticket }
    }
}

impl Drop for Place<'_> {
    fn drop(&mut self) {
        self.budget.state().queue.remove(&self.ticket);
        self.budget.changed.notify_waiters();
    }
}

impl Drop for Turn {
    fn drop(&mut self) {
        self.0.state().running -= 1;
        self.0.changed.notify_waiters();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn budget(rate: u32, burst: u32) -> Arc<Budget> {
        Budget::new(rate, burst, Metrics::new("test").unwrap())
    }

    #[tokio::test(start_paused = true)]
    async fn a_burst_is_let_through_and_then_the_rate_holds() {
        let budget = budget(10, 5);
        let began = Instant::now();
        for _ in 0..25 {
            drop(budget.turn(Urgency::Ahead).await);
        }
        let took = began.elapsed().as_millis();
        assert!((2_000..2_100).contains(&took), "20 beyond the burst at 10 a second: {took} ms");
    }

    #[tokio::test(start_paused = true)]
    async fn waiting_pods_come_first_whoever_queued_before() {
        let budget = budget(1, 1);
        drop(budget.turn(Urgency::Refresh).await);
        let order = Arc::new(Mutex::new(Vec::new()));
        let queued = [Urgency::Refresh, Urgency::Ahead, Urgency::Waiting].map(|urgency| {
            let (budget, order) = (budget.clone(), order.clone());
            tokio::spawn(async move {
                let _turn = budget.turn(urgency).await;
                order.lock().unwrap().push(urgency);
            })
        });
        for task in queued {
            task.await.unwrap();
        }
        assert_eq!(*order.lock().unwrap(), [Urgency::Waiting, Urgency::Ahead, Urgency::Refresh]);
    }

    #[tokio::test(start_paused = true)]
    async fn no_more_run_at_once_than_may_and_whoever_gives_up_holds_up_nobody() {
        let budget = budget(1_000_000, 1_000);
        let mut turns = Vec::new();
        for _ in 0..CONCURRENT {
            turns.push(budget.turn(Urgency::Waiting).await);
        }
        let impatient = tokio::time::timeout(Duration::from_secs(1), budget.turn(Urgency::Waiting)).await;
        assert!(impatient.is_err());
        turns.pop();
        drop(budget.turn(Urgency::Refresh).await);
    }
}
