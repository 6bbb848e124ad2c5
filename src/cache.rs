//! [`Grant`] → [`Credential`] in hand: one slot for each session, which fetches once whoever waits, refreshes ahead of
//! expiry, and serves what it has while that is honest. Knows no HTTP, no Kubernetes and no AWS.

mod budget;
mod slot;

use std::{
    collections::HashMap,
    sync::{Arc, Mutex, MutexGuard, PoisonError, Weak},
    time::Duration,
};

use moka::sync::Cache as Map;
use tokio::time::Instant;

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

/// Slots at most, each of 8 KiB or less. A node runs some hundred pods; what is over this is evicted by use.
const MAX_SLOTS: u64 = 4_096;

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
    slots: Map<Arc<Key>, Arc<Slot>>,
    /// Which session a pod may use, so that the last one to go takes it along.
    of_pod: Mutex<HashMap<PodUid, Arc<Key>>>,
    issuer: Arc<dyn Issue>,
    budget: Arc<Budget>,
    holds: Holds,
    metrics: Metrics,
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
        Self { slots: Map::new(MAX_SLOTS), of_pod: Mutex::default(), issuer, budget, holds: Arc::new(holds), metrics }
    }

    /// Fetches ahead of the first request.
    pub fn prefetch(&self, grant: &Grant) {
        self.slot(grant).want(Urgency::Ahead);
    }

    /// How the session stands, for whoever is about to ask for its credentials; waits up to `until` for it to be
    /// decided.
    pub async fn standing(&self, grant: &Grant, until: Instant) -> Standing {
        let slot = self.slot(grant);
        slot.want(Urgency::Waiting);
        slot.standing(until).await
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

    /// A pod is gone: the sessions that only it could use are dropped, and so zeroed.
    pub fn forget(&self, pod: &PodUid) {
        {
            let mut of_pod = self.of_pod();
            if let Some(key) = of_pod.remove(pod)
                && let Some(slot) = self.slots.get(&key)
                && slot.leave(pod)
            {
                self.drop_slot(&key, &slot);
            }
            for (key, slot) in self.slots.iter().filter(|(_, slot)| slot.abandoned()) {
                self.drop_slot(&key, &slot);
            }
        }
        self.count();
    }

    fn drop_slot(&self, key: &Key, slot: &Slot) {
        self.slots.invalidate(key);
        slot.end();
    }

    /// What is held and how it stands, without a secret: for `/debug/slots`.
    pub fn describe(&self) -> serde_json::Value {
        let describe = |(key, slot): (Arc<Arc<Key>>, Arc<Slot>)| {
            let mut entry = slot.describe();
            entry["service_account"] = key.account.to_string().into();
            entry["role_arn"] = key.role.as_str().into();
            entry["session_name"] = key.session_name.as_str().into();
            entry
        };
        self.slots.iter().map(describe).collect()
    }

    /// How long until the first of the sessions in use expires. Those that nobody uses are left to expire.
    pub fn first_expiry(&self) -> Option<Duration> {
        self.slots.iter().filter_map(|(_, slot)| slot.left_in_use()).min()
    }

    fn slot(&self, grant: &Grant) -> Arc<Slot> {
        let (key, uid) = (grant.key(), grant.workload().uid());
        if let Some(slot) = self.slots.get(key).filter(|slot| slot.has(uid)) {
            return slot;
        }
        let slot = {
            // Held over both, so that no pod joins a slot that is being dropped.
            let mut of_pod = self.of_pod();
            let start = || Slot::start(self.issuer.clone(), self.budget.clone(), self.holds.clone());
            let slot = self.slots.get_with(key.clone(), start);
            // A pod that is gone, or whose account was changed meanwhile, would never leave again.
            if (self.holds)(grant) {
                slot.join(grant);
                if let Some(former) = of_pod.insert(uid.clone(), key.clone()).filter(|former| former != key)
                    && let Some(left) = self.slots.get(&former)
                    && left.leave(uid)
                {
                    // Whoever waits for it still holds it; otherwise it ends here.
                    self.slots.invalidate(&former);
                }
            }
            slot
        };
        self.count();
        slot
    }

    fn of_pod(&self) -> MutexGuard<'_, HashMap<PodUid, Arc<Key>>> {
        self.of_pod.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn count(&self) {
        self.slots.run_pending_tasks();
        self.metrics.cache_entries.set(i64::try_from(self.slots.entry_count()).unwrap_or(i64::MAX));
    }
}

impl std::fmt::Debug for Cache {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Cache").field("slots", &self.slots.entry_count()).finish_non_exhaustive()
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
        cache.count();
        assert_eq!(cache.slots.entry_count(), 2, "its last one, and that of the other pod");
        assert_eq!(cache.of_pod().len(), 2);
        assert!(cache.in_hand(&cache.session(&shared)).is_some(), "which lost nothing");
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
        cache.count();
        assert_eq!((cache.slots.entry_count(), cache.of_pod().len()), (0, 0), "dropped with its last pod");
    }
}
