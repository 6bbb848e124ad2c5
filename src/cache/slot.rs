//! One session: a keeper task that fetches and refreshes, and readers that never do. Since only the keeper fetches,
//! there is one exchange under way whoever asks, and a caller that hangs up cancels nothing.

mod keeper;
mod state;

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
    time::{Instant, timeout_at},
};

#[cfg(test)]
pub(crate) use self::state::REFRESH;
use self::state::{State, of_a_pod};
use super::{Standing, budget::Budget};
use crate::{
    attribute::PodUid,
    authorise::Grant,
    exchange::{Credential, Issue},
    observe::Urgency,
    refusal::{Reason, Refusal},
};

/// How long fresh credentials are waited for where there are some that are good yet: the most impatient SDK gives up
/// after 500 ms.
const WHILE_GOOD: Duration = Duration::from_millis(350);

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
    /// The pods that share this session: any one of them can stand for it at the API server. Locked before the state,
    /// where both are needed.
    pods: Mutex<HashMap<PodUid, Member>>,
}

#[derive(Debug)]
struct Member {
    grant: Grant,
    /// When the API server last refused a token for this pod for a reason of the pod's own.
    refused: Option<Instant>,
}

impl Slot {
    pub(super) fn start(issuer: Arc<dyn Issue>, budget: Arc<Budget>, holds: Holds) -> Arc<Self> {
        let shared = Arc::new(Shared::default());
        let keeper = tokio::spawn(shared.clone().keep(issuer, budget, holds));
        Arc::new(Self { shared, keeper })
    }

    /// Seconds from now, and what went wrong last.
    pub(super) fn describe(&self) -> serde_json::Value {
        let pods = self.shared.pods().len();
        let state = self.shared.state.borrow();
        let until = |at: Instant| at.saturating_duration_since(Instant::now()).as_secs();
        let held = state.held.as_ref();
        serde_json::json!({
            "pods": pods,
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

    /// Its keeper has panicked: nothing is fetched any more.
    pub(super) fn has_failed(&self) -> bool {
        self.keeper.is_finished()
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
        let good = state.borrow().good().is_some();
        let until = if good { until.min(Instant::now() + WHILE_GOOD) } else { until };
        loop {
            let answer = {
                let state = state.borrow_and_update();
                let refused = || state.definite().cloned().map(Err);
                state.in_hand().cloned().map(Ok).or_else(refused)
            };
            // Again after each failure: whoever still waits, waits for the next try. After that look: a refusal that
            // was over by then cannot hold this up, or nobody would ask for what is waited for.
            self.want(Urgency::Waiting);
            if let Some(answer) = answer {
                return answer;
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
            let standing = {
                let state = state.borrow_and_update();
                match state.in_hand() {
                    Some(_) => Some(Standing::Ready),
                    None => state.lasting(until).cloned().map(Standing::Failed),
                }
            };
            self.want(Urgency::Waiting);
            if let Some(standing) = standing {
                return standing;
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

    fn pods(&self) -> MutexGuard<'_, HashMap<PodUid, Member>> {
        self.pods.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
#[path = "slot_tests.rs"]
mod tests;
