//! [`Grant`] → [`Credential`] in hand: one slot for each session, which fetches once whoever waits, refreshes ahead of
//! expiry, and serves what it has while that is honest. Knows no HTTP, no Kubernetes and no AWS.

mod budget;
mod slot;

use std::{
    collections::HashMap,
    sync::{Arc, Mutex, MutexGuard, PoisonError, Weak},
    time::Duration,
};

use tokio::time::Instant;
use tracing::error;

use crate::{
    attribute::PodUid,
    authorise::{Grant, Key},
    exchange::{Credential, Issue},
    observe::{Metrics, Urgency},
    refusal::Refusal,
};
pub use budget::Budget;
#[cfg(test)]
pub(crate) use slot::REFRESH;
use slot::{Holds, Slot};

/// How a session stands, without waiting for it.
#[derive(Debug)]
pub enum Standing {
    Ready,
    Failed(Refusal),
    Pending,
}

/// Where a session is found again, for as long as the cache keeps it.
#[derive(Debug, Clone)]
pub struct Session(Weak<Slot>);

/// The sessions of this node's pods.
pub struct Cache {
    sessions: Mutex<Sessions>,
    issuer: Arc<dyn Issue>,
    budget: Arc<Budget>,
    holds: Holds,
    metrics: Metrics,
}

/// A live pod has one session and no session is without a pod, so there are no more than pods.
#[derive(Debug, Default)]
struct Sessions {
    slots: HashMap<Arc<Key>, Arc<Slot>>,
    of_pod: HashMap<PodUid, Arc<Key>>,
}

impl Cache {
    /// `holds` says whether a grant that was made earlier would be made now: asked before each exchange, so that none
    /// is for a pod that is gone, or for a role that its service account has no more.
    pub fn new(
        issuer: Arc<dyn Issue>,
        budget: Arc<Budget>,
        holds: impl Fn(&Grant) -> bool + Send + Sync + 'static,
        metrics: Metrics,
    ) -> Self {
        Self { sessions: Mutex::default(), issuer, budget, holds: Arc::new(holds), metrics }
    }

    /// Fetches ahead of the first request.
    pub fn prefetch(&self, grant: &Grant) {
        self.slot(grant).want(Urgency::Ahead);
    }

    /// How the session stands, for whoever is about to ask for its credentials; waits up to `until` for it to be
    /// decided.
    pub async fn standing(&self, grant: &Grant, until: Instant) -> Standing {
        self.slot(grant).standing(until).await
    }

    /// The session of a grant, for whoever is going to ask again.
    pub fn session(&self, grant: &Grant) -> Session {
        Session(Arc::downgrade(&self.slot(grant)))
    }

    /// The credentials, if there is no need to wait for them.
    pub fn in_hand(&self, session: &Session) -> Option<Arc<Credential>> {
        let credential = session.0.upgrade()?.in_hand()?;
        self.metrics.cache_hits.inc();
        Some(credential)
    }

    /// The credentials, waited for where that is needed.
    ///
    /// # Errors
    /// A definite refusal at once, the last one when `until` has come.
    pub async fn get(&self, grant: &Grant, until: Instant) -> Result<Arc<Credential>, Refusal> {
        let slot = self.slot(grant);
        if let Some(credential) = slot.in_hand() {
            self.metrics.cache_hits.inc();
            return Ok(credential);
        }
        self.metrics.cache_misses.inc();
        slot.get(until).await
    }

    /// Whether the pod has a session, of whatever terms.
    pub fn serves(&self, pod: &PodUid) -> bool {
        self.sessions().of_pod.contains_key(pod)
    }

    /// A pod is gone: the sessions that only it could use are dropped, and so zeroed.
    pub fn forget(&self, pod: &PodUid) {
        let mut sessions = self.sessions();
        let left = sessions.of_pod.remove(pod);
        sessions.slots.retain(|key, slot| {
            let last = left.as_ref() == Some(key) && slot.leave(pod);
            let dropped = last || slot.abandoned();
            if dropped {
                slot.end();
            }
            !dropped
        });
        self.count(&sessions);
    }

    /// What is held and how it stands, without a secret: for `/debug/slots`.
    pub fn describe(&self) -> serde_json::Value {
        let describe = |(key, slot): (&Arc<Key>, &Arc<Slot>)| {
            let mut entry = slot.describe();
            entry["service_account"] = key.account.to_string().into();
            entry["role_arn"] = key.role.as_str().into();
            entry["session_name"] = key.session_name.as_str().into();
            entry
        };
        self.sessions().slots.iter().map(describe).collect()
    }

    /// How long until the first of the sessions in use expires. Those that nobody uses are left to expire.
    pub fn first_expiry(&self) -> Option<Duration> {
        self.sessions().slots.values().filter_map(|slot| slot.left_in_use()).min()
    }

    fn slot(&self, grant: &Grant) -> Arc<Slot> {
        let (key, uid) = (grant.key(), grant.workload().uid());
        let start = || Slot::start(self.issuer.clone(), self.budget.clone(), self.holds.clone());
        let mut sessions = self.sessions();
        let known = sessions.slots.get(key).cloned();
        if let Some(slot) = known.as_ref().filter(|slot| slot.has_failed()) {
            error!(role_arn = %key.role, service_account = %key.account, "a session's task has failed: starting it anew");
            slot.end();
        }
        let known = known.filter(|slot| !slot.has_failed());
        if let Some(slot) = known.as_ref().filter(|slot| slot.has(uid)) {
            return slot.clone();
        }
        // A pod that is gone, or whose account was changed meanwhile, would never leave again.
        if !(self.holds)(grant) {
            return known.unwrap_or_else(start);
        }
        let slot = known.unwrap_or_else(start);
        slot.join(grant);
        sessions.slots.insert(key.clone(), slot.clone());
        if let Some(former) = sessions.of_pod.insert(uid.clone(), key.clone()).filter(|former| former != key)
            && sessions.slots.get(&former).is_some_and(|left| left.leave(uid))
        {
            // Whoever waits for it still holds it; otherwise it ends here.
            sessions.slots.remove(&former);
        }
        self.count(&sessions);
        slot
    }

    fn sessions(&self) -> MutexGuard<'_, Sessions> {
        self.sessions.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn count(&self, sessions: &Sessions) {
        self.metrics.cache_entries.set(i64::try_from(sessions.slots.len()).unwrap_or(i64::MAX));
    }
}

impl std::fmt::Debug for Cache {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Cache").field("slots", &self.sessions().slots.len()).finish_non_exhaustive()
    }
}

#[cfg(test)]
#[path = "cache/model_tests.rs"]
mod model_tests;

#[cfg(test)]
mod tests {
    use std::{
        future::Future,
        pin::Pin,
        sync::atomic::{AtomicBool, Ordering::SeqCst},
    };

    use super::*;
    use crate::attribute::Workload;

    #[derive(Debug)]
    struct Always;

    impl Issue for Always {
        fn issue<'a>(
            &'a self,
            grant: &'a Grant,
        ) -> Pin<Box<dyn Future<Output = Result<Credential, Refusal>> + Send + 'a>> {
            Box::pin(async { Ok(Credential::sample(grant.role().name(), Duration::from_secs(3_600))) })
        }
    }

    fn cache(holds: impl Fn(&Grant) -> bool + Send + Sync + 'static) -> Cache {
        let metrics = Metrics::new("test").unwrap();
        Cache::new(Arc::new(Always), Budget::new(1_000, 1_000, metrics.clone()), holds, metrics)
    }

    fn grant(pod: &str, role: &str) -> Grant {
        let role = format!("arn:aws:iam::111122223333:role/{role}");
        Grant::sample(Workload::sample(pod, &format!("uid-{pod}"), "reader"), &role)
    }

    /// Sessions, and pods that have one.
    fn held(cache: &Cache) -> (usize, usize) {
        let sessions = cache.sessions();
        (sessions.slots.len(), sessions.of_pod.len())
    }

    fn in_4s() -> Instant {
        Instant::now() + Duration::from_secs(4)
    }

    /// Whoever may change a service account can do so as often as it likes.
    #[tokio::test(start_paused = true)]
    async fn a_pod_takes_the_place_of_one_session_however_often_its_account_is_changed() {
        let cache = cache(|_| true);
        let shared = grant("b", "role-0");
        cache.get(&shared, in_4s()).await.unwrap();
        for number in 0..100 {
            let role = format!("role-{number}");
            let credential = cache.get(&grant("a", &role), in_4s()).await.unwrap();
            assert_eq!(credential.access_key_id(), role);
        }
        assert_eq!(held(&cache), (2, 2), "its last one, and that of the other pod");
        assert!(cache.in_hand(&cache.session(&shared)).is_some(), "which lost nothing");
    }

    /// A defect of a library must not cost a service account its credentials for as long as the agent runs.
    #[tokio::test(start_paused = true)]
    async fn a_session_whose_task_has_panicked_is_started_anew() {
        #[derive(Debug, Default)]
        struct PanicsOnce(AtomicBool);
        impl Issue for PanicsOnce {
            fn issue<'a>(
                &'a self,
                grant: &'a Grant,
            ) -> Pin<Box<dyn Future<Output = Result<Credential, Refusal>> + Send + 'a>> {
                assert!(self.0.swap(true, SeqCst), "for the test");
                Always.issue(grant)
            }
        }
        let metrics = Metrics::new("test").unwrap();
        let budget = Budget::new(1_000, 1_000, metrics.clone());
        let cache = Cache::new(Arc::new(PanicsOnce::default()), budget, |_| true, metrics);
        assert!(cache.get(&grant("a", "role"), in_4s()).await.is_err());
        assert_eq!(cache.get(&grant("a", "role"), in_4s()).await.unwrap().access_key_id(), "role");
    }

    /// Between the look at who is calling and this, a pod may be deleted.
    #[tokio::test(start_paused = true)]
    async fn a_pod_that_is_gone_joins_no_session() {
        let live = Arc::new(AtomicBool::new(true));
        let cache = cache({
            let live = live.clone();
            move |grant| grant.workload().pod() != "gone" || live.load(SeqCst)
        });
        cache.get(&grant("a", "role"), in_4s()).await.unwrap();
        live.store(false, SeqCst);
        cache.forget(grant("gone", "role").workload().uid());
        cache.session(&grant("gone", "role"));
        cache.forget(grant("a", "role").workload().uid());
        assert_eq!(held(&cache), (0, 0), "dropped with its last pod");
    }
}
