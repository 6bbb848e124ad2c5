//! How many exchanges this node makes, and in which order: waiting pods before prefetch, prefetch before refresh.
//!
//! One exchange is one TokenRequest and one AssumeRoleWithWebIdentity, so one budget bounds both. STS grants an
//! account some hundred calls a second in a region, which thousands of nodes share.
//!
//! When exchange after exchange fails in ways that may pass, something upstream is away for all sessions: then one of
//! them at a time is tried, ever more rarely, for the whole node; and when it is back, all nodes must not come at once.
//! Pods that wait are not held up by that.

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

use crate::{
    clock,
    observe::{Metrics, Urgency},
    refusal::{Memory, Refusal},
};

/// Exchanges that are under way at once; each may take four seconds.
const CONCURRENT: usize = 32;

/// So many failures in a row, and of so many sessions, are no matter of one role or one account.
const TROUBLE: u32 = 5;
const IN_TROUBLE: usize = 3;
/// Between two tries of the whole node in trouble: full jitter over this range, doubled with each failure.
const PAUSE: (Duration, Duration) = (Duration::from_secs(1), Duration::from_secs(30));
/// Between two exchanges after that, at most, until nobody is left in the queue.
const RECOVERY: Duration = Duration::from_secs(6);

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
    /// Exchanges in a row that failed and may pass, and whose they were, of the first few.
    failures: u32,
    failing: Vec<Asking>,
    /// Something upstream has just come back.
    recovering: bool,
    /// In trouble and after it, no exchange that nobody waits for begins before.
    resume: Instant,
}

/// Most urgent first, then first come.
type Ticket = (Reverse<Urgency>, u64);

/// Tells sessions apart.
pub(super) type Asking = usize;

/// The right to one exchange, while it is held.
#[derive(Debug)]
pub(super) struct Turn {
    budget: Arc<Budget>,
    asking: Asking,
    urgency: Urgency,
}

impl State {
    fn in_trouble(&self) -> bool {
        self.failures >= TROUBLE && self.failing.len() >= IN_TROUBLE
    }
}

impl Budget {
    pub fn new(rate: u32, burst: u32, metrics: Metrics) -> Arc<Self> {
        let now = Instant::now();
        let state = State {
            tokens: burst.into(),
            counted: now,
            running: 0,
            queue: BTreeSet::new(),
            next: 0,
            failures: 0,
            failing: Vec::new(),
            recovering: false,
            resume: now,
        };
        Arc::new(Self {
            rate: rate.into(),
            burst: burst.into(),
            state: Mutex::new(state),
            changed: Notify::new(),
            metrics,
        })
    }

    /// Waits until it is this one's turn; dropping the future gives up the place.
    pub(super) async fn turn(self: &Arc<Self>, urgency: Urgency, asking: Asking) -> Turn {
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
        Turn { budget: self.clone(), asking, urgency }
    }

    fn try_begin(&self, ticket: &Ticket) -> Begin {
        let mut state = self.state();
        let now = Instant::now();
        state.tokens = self.burst.min(state.tokens + self.rate * now.duration_since(state.counted).as_secs_f64());
        state.counted = now;
        if state.queue.first() != Some(ticket) || state.running >= CONCURRENT {
            return Begin::WhenOthersHave;
        }
        let in_trouble = state.in_trouble();
        let held_back = (in_trouble || state.recovering) && ticket.0 != Reverse(Urgency::Waiting);
        if held_back && now < state.resume {
            return Begin::InABit(state.resume - now);
        }
        if state.tokens < 1.0 {
            return Begin::InABit(
                Duration::from_secs_f64((1.0 - state.tokens) / self.rate).max(Duration::from_millis(1)),
            );
        }
        state.tokens -= 1.0;
        state.running += 1;
        if held_back {
            // One at a time: in trouble, the next when this one has failed and its pause is over.
            state.resume = now + if in_trouble { PAUSE.1 } else { RECOVERY.mul_f64(clock::jitter()) };
            state.recovering &= state.queue.len() > 1;
        }
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

impl Turn {
    /// The exchange has ended, and how.
    pub(super) fn ended(self, refusal: Option<&Refusal>) {
        let mut state = self.budget.state();
        // A definite no is an answer, too.
        if refusal.is_some_and(|refusal| refusal.reason.spec().memory == Memory::Backoff) {
            state.failures = state.failures.saturating_add(1);
            if state.failing.len() < IN_TROUBLE && !state.failing.contains(&self.asking) {
                state.failing.push(self.asking);
            }
            // A pod that asks again and again makes nobody else wait for longer.
            if self.urgency != Urgency::Waiting {
                let doublings = state.failures.saturating_sub(TROUBLE).min(16);
                let ceiling = PAUSE.0.saturating_mul(1 << doublings).min(PAUSE.1);
                state.resume = Instant::now() + ceiling.mul_f64(clock::jitter());
            }
        } else {
            if state.in_trouble() {
                (state.recovering, state.resume) = (true, Instant::now());
            }
            state.failures = 0;
            state.failing.clear();
        }
    }
}

impl Drop for Turn {
    fn drop(&mut self) {
        self.budget.state().running -= 1;
        self.budget.changed.notify_waiters();
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::refusal::Reason;

    fn budget(rate: u32, burst: u32) -> Arc<Budget> {
        Budget::new(rate, burst, Metrics::new("test").unwrap())
    }

    #[tokio::test(start_paused = true)]
    async fn a_burst_is_let_through_and_then_the_rate_holds() {
        let budget = budget(10, 5);
        let began = Instant::now();
        for _ in 0..25 {
            drop(budget.turn(Urgency::Ahead, 0).await);
        }
        let took = began.elapsed().as_millis();
        assert!((2_000..2_100).contains(&took), "20 beyond the burst at 10 a second: {took} ms");
    }

    #[tokio::test(start_paused = true)]
    async fn waiting_pods_come_first_whoever_queued_before() {
        let budget = budget(1, 1);
        drop(budget.turn(Urgency::Refresh, 0).await);
        let order = Arc::new(Mutex::new(Vec::new()));
        let queued = [Urgency::Refresh, Urgency::Ahead, Urgency::Waiting].map(|urgency| {
            let (budget, order) = (budget.clone(), order.clone());
            tokio::spawn(async move {
                let _turn = budget.turn(urgency, 0).await;
                order.lock().unwrap().push(urgency);
            })
        });
        for task in queued {
            task.await.unwrap();
        }
        assert_eq!(*order.lock().unwrap(), [Urgency::Waiting, Urgency::Ahead, Urgency::Refresh]);
    }

    /// Twenty sessions that are due, and nothing that answers for half an hour.
    #[tokio::test(start_paused = true)]
    async fn in_an_outage_the_node_tries_one_session_at_a_time_and_ever_more_rarely() {
        let budget = budget(20, 50);
        let away = Arc::new(std::sync::atomic::AtomicBool::new(true));
        let tries = Arc::new(Mutex::new(Vec::new()));
        let began = Instant::now();
        let sessions: Vec<_> = (0..20)
            .map(|session| {
                let (budget, away, tries) = (budget.clone(), away.clone(), tries.clone());
                tokio::spawn(async move {
                    loop {
                        let turn = budget.turn(Urgency::Refresh, session).await;
                        sleep(Duration::from_millis(100)).await;
                        tries.lock().unwrap().push(began.elapsed());
                        let failed = away.load(std::sync::atomic::Ordering::SeqCst);
                        turn.ended(failed.then(|| Reason::StsUnavailable.into()).as_ref());
                        if !failed {
                            return;
                        }
                        sleep(Duration::from_secs(15).mul_f64(fastrand::f64())).await;
                    }
                })
            })
            .collect();
        sleep(Duration::from_secs(1_800)).await;
        let tried = std::mem::take(&mut *tries.lock().unwrap());
        assert!((100..300).contains(&tried.len()), "{} tries in half an hour", tried.len());
        // Whoever waits is let through, and fails or succeeds by itself.
        let asked = Instant::now();
        budget.turn(Urgency::Waiting, 0).await.ended(Some(&Reason::StsUnavailable.into()));
        assert!(asked.elapsed() < Duration::from_millis(100), "{:?}", asked.elapsed());

        away.store(false, std::sync::atomic::Ordering::SeqCst);
        let back = Instant::now();
        for session in sessions {
            session.await.unwrap();
        }
        let took = back.elapsed().as_secs();
        assert!((20..180).contains(&took), "twenty sessions, 3 s apart on average: {took} s");
    }

    /// A role whose STS or admission fails, and two pods that ask for it all the time; nothing else succeeds meanwhile.
    #[tokio::test(start_paused = true)]
    async fn one_session_that_fails_holds_up_no_other() {
        let budget = budget(20, 50);
        for round in 0..100 {
            for urgency in [Urgency::Waiting, Urgency::Ahead] {
                budget.turn(urgency, 1).await.ended(Some(&Reason::StsUnavailable.into()));
            }
            if round % 10 == 9 {
                let began = Instant::now();
                budget.turn(Urgency::Refresh, 2).await.ended(None);
                budget.turn(Urgency::Ahead, 3).await.ended(Some(&Reason::AccessDenied.into()));
                assert!(began.elapsed() < Duration::from_millis(200), "{:?}", began.elapsed());
            }
        }
    }

    /// What is away is tried for the node at its own pace, however often pods ask.
    #[tokio::test(start_paused = true)]
    async fn pods_that_wait_in_vain_do_not_put_off_the_others() {
        let budget = budget(1_000, 1_000);
        for session in 0..10 {
            budget.turn(Urgency::Waiting, session).await.ended(Some(&Reason::StsUnavailable.into()));
        }
        let began = Instant::now();
        budget.turn(Urgency::Refresh, 20).await.ended(Some(&Reason::StsUnavailable.into()));
        assert!(began.elapsed() < Duration::from_millis(10));
        let asks = async {
            loop {
                budget.turn(Urgency::Waiting, 0).await.ended(Some(&Reason::StsUnavailable.into()));
                sleep(Duration::from_secs(1)).await;
            }
        };
        tokio::select! {
            () = asks => {}
            _ = budget.turn(Urgency::Refresh, 20) => {}
        }
        assert!(began.elapsed() <= PAUSE.1 + Duration::from_secs(1), "{:?}", began.elapsed());
    }

    #[tokio::test(start_paused = true)]
    async fn no_more_run_at_once_than_may_and_whoever_gives_up_holds_up_nobody() {
        let budget = budget(1_000_000, 1_000);
        let mut turns = Vec::new();
        for _ in 0..CONCURRENT {
            turns.push(budget.turn(Urgency::Waiting, 0).await);
        }
        let impatient = tokio::time::timeout(Duration::from_secs(1), budget.turn(Urgency::Waiting, 0)).await;
        assert!(impatient.is_err());
        turns.pop();
        drop(budget.turn(Urgency::Refresh, 0).await);
    }
}
