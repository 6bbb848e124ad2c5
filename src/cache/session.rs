//! One session: a refresher task that makes exchanges, and readers that only wait for it (single-flight). A caller that
//! hangs up cancels nothing.

mod refresher;
mod state;

use std::{
    collections::HashMap,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};

use parking_lot::{Mutex, MutexGuard};
use tokio::{
    sync::{Notify, watch},
    task::JoinHandle,
    time::{Instant, timeout_at},
};

#[cfg(test)]
pub(crate) use self::state::REFRESH_FRACTION;
use self::state::{SessionState, is_pod_specific_failure};
use super::{ExchangeLimiter, Priority, SessionStatus};
use crate::{
    attribute::PodUid,
    authorize::Grant,
    exchange::{Credential, Issuer},
    refusal::{Reason, Refusal},
};

/// Maximum wait for a fresh credential where a sufficient one is held: the most impatient SDK gives up after 500 ms.
const WAIT_FOR_FRESHER: Duration = Duration::from_millis(350);

/// Returns whether the pod is live and its service account still gives it this grant.
pub(super) type GrantCheck = Arc<dyn Fn(&Grant) -> bool + Send + Sync>;

#[derive(Debug)]
pub(super) struct SessionEntry {
    shared: Arc<Shared>,
    refresher: JoinHandle<()>,
}

#[derive(Debug, Default)]
struct Shared {
    state: watch::Sender<SessionState>,
    refresh_requested: AtomicBool,
    /// A pod waits for the result: raises the priority and shortens delays.
    pod_waiting: AtomicBool,
    wake: Notify,
    last_used: Mutex<Option<Instant>>,
    /// The pods that share this session; the token of any of them will do. Lock order: `pods` before `state`.
    pods: Mutex<HashMap<PodUid, Member>>,
}

#[derive(Debug)]
struct Member {
    grant: Grant,
    /// Time of the last pod-specific refusal.
    last_refused: Option<Instant>,
}

impl SessionEntry {
    pub(super) fn start(issuer: Arc<dyn Issuer>, limiter: Arc<ExchangeLimiter>, check: GrantCheck) -> Arc<Self> {
        let shared = Arc::new(Shared::default());
        let refresher = tokio::spawn(shared.clone().refresh_loop(issuer, limiter, check));
        Arc::new(Self { shared, refresher })
    }

    /// Describes times in seconds from now, and the last error.
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

    /// Returns the time left of the credential, if it is in use and so has to be refreshed.
    pub(super) fn time_left_if_used(&self) -> Option<Duration> {
        let state = self.shared.state.borrow();
        let held = state.held.as_ref()?;
        self.shared.was_used_within(held.lifetime()).then(|| held.time_left())
    }

    /// Returns whether the refresher task has panicked.
    pub(super) fn has_failed(&self) -> bool {
        self.refresher.is_finished()
    }

    pub(super) fn has_pod(&self, pod: &PodUid) -> bool {
        self.shared.pods().contains_key(pod)
    }

    pub(super) fn join(&self, grant: &Grant) {
        {
            let mut pods = self.shared.pods();
            if pods.contains_key(grant.workload().uid()) {
                return;
            }
            pods.insert(grant.workload().uid().clone(), Member { grant: grant.clone(), last_refused: None });
        }
        // A pod-specific refusal of another pod does not apply to this one.
        if self
            .shared
            .state
            .send_if_modified(|state| state.failure.take_if(|failure| is_pod_specific_failure(failure)).is_some())
        {
            self.shared.wake.notify_one();
        }
    }

    /// Removes a pod. Returns whether it was the last one.
    pub(super) fn leave(&self, pod: &PodUid) -> bool {
        let mut pods = self.shared.pods();
        pods.remove(pod);
        pods.is_empty()
    }

    /// Returns whether the refresher has found that no pod may use it any more.
    pub(super) fn is_abandoned(&self) -> bool {
        self.shared.pods().is_empty()
            && self.shared.state.borrow().failure.as_ref().is_some_and(is_pod_specific_failure)
    }

    /// Stops the refresher, and the exchange in progress.
    pub(super) fn abort(&self) {
        self.refresher.abort();
    }

    /// Asks for credentials without waiting for them.
    pub(super) fn request_refresh(&self, priority: Priority) {
        if priority == Priority::Waiting {
            self.shared.mark_used();
        }
        self.shared.request_refresh(priority);
    }

    pub(super) fn get_cached(&self) -> Option<Arc<Credential>> {
        let now = Instant::now();
        let (credential, needs_refresh) = {
            let state = self.shared.state.borrow();
            // Warm path: one clock read. What needs no refresh is fresh.
            match state.held.as_ref().filter(|held| !held.needs_refresh_at(now)) {
                Some(held) => (held.credential.clone(), false),
                None => (state.usable()?.clone(), true),
            }
        };
        self.shared.mark_used_at(now);
        if needs_refresh {
            self.shared.request_refresh(Priority::Refresh);
        }
        Some(credential)
    }

    pub(super) async fn get(&self, until: Instant) -> Result<Arc<Credential>, Refusal> {
        let mut state = self.shared.state.subscribe();
        let sufficient = state.borrow().sufficient().is_some();
        let until = if sufficient { until.min(Instant::now() + WAIT_FOR_FRESHER) } else { until };
        loop {
            let answer = {
                let state = state.borrow_and_update();
                let refused = || state.permanent_failure().cloned().map(Err);
                state.usable().cloned().map(Ok).or_else(refused)
            };
            // Repeat the request after each failure, since this caller waits for the next attempt. Do it after reading
            // the state: a refusal that expires in between must not leave the request unmade.
            self.request_refresh(Priority::Waiting);
            if let Some(answer) = answer {
                return answer;
            }
            if !matches!(timeout_at(until, state.changed()).await, Ok(Ok(()))) {
                let state = state.borrow();
                return state.stale_but_usable().cloned().ok_or_else(|| {
                    state.last_failure().cloned().unwrap_or_else(|| {
                        Refusal::new(
                            Reason::ExchangeTimeout,
                            "the exchange is still in progress; the next request may find its result",
                        )
                    })
                });
            }
        }
    }

    pub(super) async fn status(&self, until: Instant) -> SessionStatus {
        let mut state = self.shared.state.subscribe();
        loop {
            let status = {
                let state = state.borrow_and_update();
                match state.usable() {
                    Some(_) => Some(SessionStatus::Ready),
                    None => state.failure_until(until).cloned().map(SessionStatus::Failed),
                }
            };
            self.request_refresh(Priority::Waiting);
            if let Some(status) = status {
                return status;
            }
            if !matches!(timeout_at(until, state.changed()).await, Ok(Ok(()))) {
                let state = state.borrow();
                return state
                    .last_failure()
                    .map_or(SessionStatus::Pending, |refusal| SessionStatus::Failed(refusal.clone()));
            }
        }
    }
}

impl Drop for SessionEntry {
    fn drop(&mut self) {
        self.refresher.abort();
    }
}

impl Shared {
    fn request_refresh(&self, priority: Priority) {
        let nothing_to_do = {
            let state = self.state.borrow();
            state.permanent_failure().is_some() || state.held.as_ref().is_some_and(|held| !held.needs_refresh())
        };
        if nothing_to_do {
            return;
        }
        let raises_priority = priority == Priority::Waiting && !self.pod_waiting.swap(true, Ordering::SeqCst);
        if !self.refresh_requested.swap(true, Ordering::SeqCst) || raises_priority {
            self.wake.notify_one();
        }
    }

    fn clear_requests(&self) {
        self.refresh_requested.store(false, Ordering::SeqCst);
        self.pod_waiting.store(false, Ordering::SeqCst);
    }

    fn mark_used(&self) {
        self.mark_used_at(Instant::now());
    }

    fn mark_used_at(&self, now: Instant) {
        *self.last_used.lock() = Some(now);
    }

    fn was_used_within(&self, lifetime: Duration) -> bool {
        self.last_used.lock().is_some_and(|used| used.elapsed() < lifetime)
    }

    fn pods(&self) -> MutexGuard<'_, HashMap<PodUid, Member>> {
        self.pods.lock()
    }
}

#[cfg(test)]
#[path = "session_tests.rs"]
mod tests;
