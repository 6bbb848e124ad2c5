//! One session: a keeper task that fetches and refreshes, and readers that never do. Since only the keeper fetches,
//! there is one exchange under way whoever asks, and a caller that hangs up cancels nothing.

use std::{
    collections::HashMap,
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};

use tokio::{
    sync::{Notify, watch},
    task::JoinHandle,
    time::{Instant, sleep_until, timeout_at},
};

use super::{
    Standing,
    budget::{Budget, Turn},
};
use crate::{
    attribute::PodUid,
    authorise::Grant,
    clock,
    exchange::{Credential, Issue},
    observe::{Urgency, log_refusal},
    refusal::{Memory, Reason, Refusal},
};

/// Refreshed when this much of the lifetime has passed, so that half of it is left whenever all is well: botocore
/// stretches what has less than 15 to 25 minutes left, and then signs with dead keys (boto/botocore#2670).
pub(crate) const REFRESH: (f64, f64) = (0.40, 0.48);
/// In normal operation nothing with less left is served.
const MIN_LEFT: Duration = Duration::from_secs(30 * 60);
/// In an outage, what has more left than this: SDKs may use credentials to their last second.
const LAST_RESORT: Duration = Duration::from_secs(60);
/// Full jitter over this range, doubled with each failure up to the end.
const BACKOFF: (Duration, Duration) = (Duration::from_millis(100), Duration::from_secs(30));
/// By how much the pauses are shorter while a pod waits.
const HURRY: u32 = 6;
/// When the API server has refused tokens for as many pods in a row, it is not about the pods.
const REFUSED_IN_A_ROW: usize = 3;
/// How long whoever asks for a session that nobody may use any more is told so.
const GONE: Duration = Duration::from_secs(5);

/// Whether the pod is live, and its service account still has what the grant says.
pub(super) type Holds = Arc<dyn Fn(&Grant) -> bool + Send + Sync>;

#[derive(Debug)]
pub(super) struct Slot {
    shared: Arc<Shared>,
    keeper: JoinHandle<()>,
}

#[derive(Debug, Default)]
struct Shared {
    state: watch::Sender<State>,
    /// That there should be credentials, and that a pod waits for them.
    wanted: AtomicBool,
    waiting: AtomicBool,
    wake: Notify,
    last_used: Mutex<Option<Instant>>,
    /// The pods that share this session: any one of them can stand for it at the API server.
    pods: Mutex<HashMap<PodUid, Member>>,
}

#[derive(Debug)]
struct Member {
    grant: Grant,
    /// When the API server last refused a token for this pod for a reason of the pod's own.
    refused: Option<Instant>,
}

#[derive(Debug, Clone, Default)]
struct State {
    held: Option<Held>,
    /// Of the last attempt, if that failed; and until when no other is made.
    failure: Option<(Refusal, Instant)>,
}

#[derive(Debug, Clone)]
struct Held {
    credential: Arc<Credential>,
    refresh_at: Instant,
    /// How long this node had slept when they were issued: the credentials age meanwhile, this clock does not.
    suspended: Duration,
}

impl Held {
    fn lifetime(&self) -> Duration {
        self.credential.expires_at().duration_since(self.credential.issued_at())
    }

    fn left(&self) -> Duration {
        self.left_at(Instant::now())
    }

    fn left_at(&self, now: Instant) -> Duration {
        let slept = clock::suspended().saturating_sub(self.suspended);
        self.credential.expires_at().saturating_duration_since(now + slept)
    }

    fn due(&self) -> bool {
        self.due_at(Instant::now())
    }

    fn due_at(&self, now: Instant) -> bool {
        now >= self.refresh_at || self.left_at(now) < self.enough()
    }

    /// Enough is left for any SDK.
    fn fresh(&self) -> bool {
        self.left() >= self.enough()
    }

    fn enough(&self) -> Duration {
        MIN_LEFT.min(self.lifetime() / 2)
    }
}

impl State {
    fn fresh(&self) -> Option<&Arc<Credential>> {
        self.held.as_ref().filter(|held| held.fresh()).map(|held| &held.credential)
    }

    fn last_resort(&self) -> Option<&Arc<Credential>> {
        self.held.as_ref().filter(|held| held.left() > LAST_RESORT).map(|held| &held.credential)
    }

    /// What can be served without waiting: what is fresh, or what there is while refreshing fails.
    fn in_hand(&self) -> Option<&Arc<Credential>> {
        self.fresh().or_else(|| self.failure.as_ref().and(self.last_resort()))
    }

    /// A failure that waiting does not mend.
    fn definite(&self) -> Option<&Refusal> {
        let (refusal, until) = self.failure.as_ref()?;
        (matches!(refusal.reason.spec().memory, Memory::Fixed(_)) && *until > Instant::now()).then_some(refusal)
    }

    /// A failure that a wait up to `until` cannot mend: no other try is made before.
    fn lasting(&self, until: Instant) -> Option<&Refusal> {
        let (_, next) = self.failure.as_ref()?;
        self.last_failure().filter(|_| self.definite().is_some() || *next >= until)
    }

    fn last_failure(&self) -> Option<&Refusal> {
        let (refusal, until) = self.failure.as_ref()?;
        let still_trying = refusal.reason.spec().memory == Memory::Backoff;
        (still_trying || *until > Instant::now()).then_some(refusal)
    }
}

impl Slot {
    pub(super) fn start(issuer: Arc<dyn Issue>, budget: Arc<Budget>, holds: Holds) -> Arc<Self> {
        let shared = Arc::new(Shared::default());
        let keeper = tokio::spawn(shared.clone().keep(issuer, budget, holds));
        Arc::new(Self { shared, keeper })
    }

    /// Seconds from now, and what went wrong last.
    pub(super) fn describe(&self) -> serde_json::Value {
        let state = self.shared.state.borrow();
        let until = |at: Instant| at.saturating_duration_since(Instant::now()).as_secs();
        let held = state.held.as_ref();
        serde_json::json!({
            "pods": self.shared.pods().len(),
            "access_key_id": held.map(|held| held.credential.access_key_id()),
            "age_seconds": held.map(|held| held.credential.issued_at().elapsed().as_secs()),
            "refresh_in_seconds": held.map(|held| until(held.refresh_at)),
            "expires_in_seconds": held.map(|held| until(held.credential.expires_at())),
            "last_error": state.failure.as_ref().map(|(refusal, _)| refusal.to_string()),
            "next_try_in_seconds": state.failure.as_ref().map(|(_, at)| until(*at)),
        })
    }

    /// How long what is held lasts, if it is used and so has to be refreshed.
    pub(super) fn left_in_use(&self) -> Option<Duration> {
        let state = self.shared.state.borrow();
        let held = state.held.as_ref()?;
        self.shared.used_within(held.lifetime()).then(|| held.left())
    }

    pub(super) fn has(&self, pod: &PodUid) -> bool {
        self.shared.pods().contains_key(pod)
    }

    pub(super) fn join(&self, grant: &Grant) {
        {
            let mut pods = self.shared.pods();
            if pods.contains_key(grant.workload().uid()) {
                return;
            }
            pods.insert(grant.workload().uid().clone(), Member { grant: grant.clone(), refused: None });
        }
        // What was refused to a former pod says nothing about this one.
        if self.shared.state.send_if_modified(|state| state.failure.take_if(|failure| of_a_pod(failure)).is_some()) {
            self.shared.wake.notify_one();
        }
    }

    /// True when that was the last pod of the session.
    pub(super) fn leave(&self, pod: &PodUid) -> bool {
        let mut pods = self.shared.pods();
        pods.remove(pod);
        pods.is_empty()
    }

    /// True when its keeper has found that no pod can use it any more.
    pub(super) fn abandoned(&self) -> bool {
        self.shared.pods().is_empty() && self.shared.state.borrow().failure.as_ref().is_some_and(of_a_pod)
    }

    /// Fetches nothing any more, what is under way included: a pod that waits for it is gone.
    pub(super) fn end(&self) {
        self.keeper.abort();
    }

    /// Sees to it that there are going to be credentials, without waiting.
    pub(super) fn want(&self, urgency: Urgency) {
        if urgency == Urgency::Waiting {
            self.shared.used();
        }
        self.shared.want(urgency);
    }

    pub(super) fn in_hand(&self) -> Option<Arc<Credential>> {
        let now = Instant::now();
        let (credential, due) = {
            let state = self.shared.state.borrow();
            // What is not due is fresh: all but a few requests end with this one look at the clock.
            match state.held.as_ref().filter(|held| !held.due_at(now)) {
                Some(held) => (held.credential.clone(), false),
                None => (state.in_hand()?.clone(), true),
            }
        };
        self.shared.used_at(now);
        if due {
            self.shared.want(Urgency::Refresh);
        }
        Some(credential)
    }

    pub(super) async fn get(&self, until: Instant) -> Result<Arc<Credential>, Refusal> {
        let mut state = self.shared.state.subscribe();
        loop {
            // Again after each failure: whoever still waits, waits for the next try.
            self.want(Urgency::Waiting);
            {
                let state = state.borrow_and_update();
                if let Some(credential) = state.in_hand() {
                    return Ok(credential.clone());
                }
                if let Some(refusal) = state.definite() {
                    return Err(refusal.clone());
                }
            }
            if !matches!(timeout_at(until, state.changed()).await, Ok(Ok(()))) {
                let state = state.borrow();
                return state.last_resort().cloned().ok_or_else(|| {
                    state.last_failure().cloned().unwrap_or_else(|| {
                        Refusal::new(
                            Reason::ExchangeTimeout,
                            "the exchange has not ended yet; the next request may find it done",
                        )
                    })
                });
            }
        }
    }

    pub(super) async fn standing(&self, until: Instant) -> Standing {
        let mut state = self.shared.state.subscribe();
        loop {
            {
                let state = state.borrow_and_update();
                if state.in_hand().is_some() {
                    return Standing::Ready;
                }
                if let Some(refusal) = state.lasting(until) {
                    return Standing::Failed(refusal.clone());
                }
            }
            if !matches!(timeout_at(until, state.changed()).await, Ok(Ok(()))) {
                let state = state.borrow();
                return state.last_failure().map_or(Standing::Pending, |refusal| Standing::Failed(refusal.clone()));
            }
        }
    }
}

impl Drop for Slot {
    fn drop(&mut self) {
        self.keeper.abort();
    }
}

impl Shared {
    async fn keep(self: Arc<Self>, issuer: Arc<dyn Issue>, budget: Arc<Budget>, holds: Holds) {
        let mut failures = 0;
        let mut refused_in_a_row = 0;
        loop {
            self.due().await;
            let turn = self.turn(&budget).await;
            let Some(grant) = self.stand_in(&holds) else {
                // Nobody may use it any more, so nobody shall; a new pod wakes it.
                self.satisfied();
                let nobody = Refusal::new(Reason::PodGone, "no live pod's service account has this role any more");
                let until = Instant::now() + GONE;
                self.state.send_replace(State { held: None, failure: Some((nobody, until)) });
                continue;
            };
            let issued = issuer.issue(&grant).await;
            turn.ended(issued.as_ref().err());
            match issued {
                Ok(credential) => {
                    (failures, refused_in_a_row) = (0, 0);
                    self.satisfied();
                    self.state.send_replace(State { held: Some(hold(credential)), failure: None });
                }
                Err(refusal) => {
                    if is_about_its_pod(&refusal) {
                        refused_in_a_row += 1;
                        if refused_in_a_row < self.refused(grant.workload().uid()).min(REFUSED_IN_A_ROW) {
                            continue;
                        }
                        refused_in_a_row = 0;
                    }
                    let workload = grant.workload();
                    log_refusal(&refusal, workload.namespace(), workload.pod(), &workload.service_account().name);
                    let pause = match refusal.reason.spec().memory {
                        Memory::Fixed(pause) => {
                            // Whoever asks after that makes it be tried again.
                            self.satisfied();
                            pause
                        }
                        Memory::Backoff | Memory::None => {
                            self.waiting.store(false, Ordering::SeqCst);
                            backoff(failures)
                        }
                    };
                    failures += 1;
                    let until = Instant::now() + pause;
                    self.state.send_modify(|state| state.failure = Some((refusal, until)));
                    self.rest(pause).await;
                }
            }
        }
    }

    /// Lets a pause pass: a shorter one while a pod waits, none if it does not apply any more.
    async fn rest(&self, pause: Duration) {
        let began = Instant::now();
        while self.state.borrow().failure.is_some() {
            let woken = self.wake.notified();
            let pause = if self.waiting.load(Ordering::SeqCst) { pause / HURRY } else { pause };
            tokio::select! {
                () = sleep_until(began + pause) => return,
                () = woken => {}
            }
        }
    }

    /// Returns when the next exchange should begin.
    async fn due(&self) {
        loop {
            let woken = self.wake.notified();
            let held = self.state.borrow().held.clone();
            let wanted = self.wanted.load(Ordering::SeqCst);
            match held {
                Some(held) if !held.due() => tokio::select! {
                    () = sleep_until(held.refresh_at) => {}
                    () = woken => {}
                },
                Some(held) if wanted || self.used_within(held.lifetime()) => return,
                Some(held) => tokio::select! {
                    () = sleep_until(held.credential.expires_at()) => drop(self.state.send_replace(State::default())),
                    () = woken => {}
                },
                None if wanted => return,
                None => woken.await,
            }
        }
    }

    /// A turn under the budget, at the urgency that this exchange has by then: a pod may come to wait for a prefetch.
    async fn turn(&self, budget: &Arc<Budget>) -> Turn {
        loop {
            let woken = self.wake.notified();
            let urgency = if self.waiting.load(Ordering::SeqCst) {
                Urgency::Waiting
            } else if self.state.borrow().fresh().is_some() {
                Urgency::Refresh
            } else {
                Urgency::Ahead
            };
            tokio::select! {
                biased;
                turn = budget.turn(urgency) => return turn,
                () = woken, if urgency != Urgency::Waiting => {}
            }
        }
    }

    fn want(&self, urgency: Urgency) {
        let settled = {
            let state = self.state.borrow();
            state.definite().is_some() || state.held.as_ref().is_some_and(|held| !held.due())
        };
        if settled {
            return;
        }
        let more_urgent = urgency == Urgency::Waiting && !self.waiting.swap(true, Ordering::SeqCst);
        if !self.wanted.swap(true, Ordering::SeqCst) || more_urgent {
            self.wake.notify_one();
        }
    }

    fn satisfied(&self) {
        self.wanted.store(false, Ordering::SeqCst);
        self.waiting.store(false, Ordering::SeqCst);
    }

    fn used(&self) {
        self.used_at(Instant::now());
    }

    fn used_at(&self, now: Instant) {
        *self.last_used.lock().unwrap_or_else(PoisonError::into_inner) = Some(now);
    }

    fn used_within(&self, lifetime: Duration) -> bool {
        self.last_used.lock().unwrap_or_else(PoisonError::into_inner).is_some_and(|used| used.elapsed() < lifetime)
    }

    /// A pod that the session is asked for in the name of: the one whose last refusal is the longest ago. Those that
    /// may not use it any more are forgotten.
    fn stand_in(&self, holds: &Holds) -> Option<Grant> {
        let mut pods = self.pods();
        pods.retain(|_, member| holds(&member.grant));
        pods.values().min_by_key(|member| member.refused).map(|member| member.grant.clone())
    }

    /// Notes that this pod was refused; how many pods there are.
    fn refused(&self, pod: &PodUid) -> usize {
        let mut pods = self.pods();
        if let Some(member) = pods.get_mut(pod) {
            member.refused = Some(Instant::now());
        }
        pods.len()
    }

    fn pods(&self) -> MutexGuard<'_, HashMap<PodUid, Member>> {
        self.pods.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// One pod that is gone says nothing about the others of its service account. Asked as the node, the API server forbids
/// what it would otherwise not find.
fn is_about_its_pod(refusal: &Refusal) -> bool {
    matches!(refusal.reason, Reason::PodGone | Reason::TokenForbidden)
}

fn of_a_pod((refusal, _): &(Refusal, Instant)) -> bool {
    is_about_its_pod(refusal)
}

fn hold(credential: Credential) -> Held {
    let lifetime = credential.expires_at().duration_since(credential.issued_at());
    let share = REFRESH.0 + (REFRESH.1 - REFRESH.0) * clock::jitter();
    let refresh_at = credential.issued_at() + lifetime.mul_f64(share);
    Held { credential: Arc::new(credential), refresh_at, suspended: clock::suspended() }
}

fn backoff(failures: u32) -> Duration {
    let ceiling = BACKOFF.0.saturating_mul(1 << failures.min(16)).min(BACKOFF.1);
    ceiling.mul_f64(clock::jitter()).max(BACKOFF.0 / 10)
}

#[cfg(test)]
#[path = "slot_tests.rs"]
mod tests;
