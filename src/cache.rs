//! [`Grant`] → cached [`Credential`]. Each session has one refresher task (single-flight), which refreshes ahead of
//! expiry; in an outage the cache serves stale credentials as long as they are valid. Knows no HTTP, no Kubernetes and no
//! AWS.
//!
//! Sessions live in a plain map, not in a cache library: an entry lives exactly as long as a pod uses it, owns a task,
//! and is zeroed when dropped. Neither a time-to-live nor a capacity may evict it.

mod breaker;
mod limiter;
mod session;

use std::{
    collections::HashMap,
    sync::{Arc, Weak},
    time::Duration,
};

use parking_lot::{Mutex, MutexGuard};
use tokio::time::Instant;
use tracing::error;

use crate::{
    attribute::PodUid,
    authorize::{Grant, SessionKey},
    exchange::{Credential, Issuer},
    observe::Metrics,
    refusal::Refusal,
};
pub use limiter::{ExchangeLimiter, Priority};
#[cfg(test)]
pub(crate) use session::REFRESH_FRACTION;
use session::{GrantCheck, SessionEntry};

/// Status of a session, for callers that do not need its credentials.
#[derive(Debug)]
pub enum SessionStatus {
    Ready,
    Failed(Refusal),
    Pending,
}

/// Finds a session again without a lookup, for as long as the cache keeps it.
#[derive(Debug, Clone)]
pub struct SessionHandle(Weak<SessionEntry>);

/// The sessions of this node's pods.
pub struct Cache {
    sessions: Mutex<Sessions>,
    issuer: Arc<dyn Issuer>,
    limiter: Arc<ExchangeLimiter>,
    check: GrantCheck,
    metrics: Metrics,
}

/// Each live pod has one session, and each session has a pod: there are never more sessions than pods.
#[derive(Debug, Default)]
struct Sessions {
    entries: HashMap<Arc<SessionKey>, Arc<SessionEntry>>,
    by_pod: HashMap<PodUid, Arc<SessionKey>>,
}

impl Cache {
    /// `check` returns whether a grant would be made again now. It runs before each exchange, so that none is made for a
    /// deleted pod, or for a role that its service account no longer has.
    pub fn new(
        issuer: Arc<dyn Issuer>,
        budget: Arc<ExchangeLimiter>,
        check: impl Fn(&Grant) -> bool + Send + Sync + 'static,
        metrics: Metrics,
    ) -> Self {
        Self { sessions: Mutex::default(), issuer, limiter: budget, check: Arc::new(check), metrics }
    }

    /// Fetches credentials before the first request.
    pub fn prefetch(&self, grant: &Grant) {
        self.entry(grant).request_refresh(Priority::Prefetch);
    }

    /// Returns the session's status; waits until it is known, at most until `until`.
    pub async fn status(&self, grant: &Grant, until: Instant) -> SessionStatus {
        self.entry(grant).status(until).await
    }

    /// Returns a handle for later requests of the same connection.
    pub fn handle(&self, grant: &Grant) -> SessionHandle {
        SessionHandle(Arc::downgrade(&self.entry(grant)))
    }

    /// Returns the credentials if they are fresh, or stale while refreshing fails.
    pub fn get_cached(&self, session: &SessionHandle) -> Option<Arc<Credential>> {
        let credential = session.0.upgrade()?.get_cached()?;
        self.metrics.cache_hits.inc();
        Some(credential)
    }

    /// Returns the credentials; waits for an exchange if there are none.
    ///
    /// # Errors
    /// The exchange's refusal: at once if its `RetryPolicy` is `Fixed`, otherwise the last one when `until` has passed.
    /// `ExchangeTimeout` if no exchange has ended by then.
    pub async fn get(&self, grant: &Grant, until: Instant) -> Result<Arc<Credential>, Refusal> {
        let slot = self.entry(grant);
        if let Some(credential) = slot.get_cached() {
            self.metrics.cache_hits.inc();
            return Ok(credential);
        }
        self.metrics.cache_misses.inc();
        slot.get(until).await
    }

    /// Returns whether the pod has a session.
    pub fn serves(&self, pod: &PodUid) -> bool {
        self.sessions().by_pod.contains_key(pod)
    }

    /// Removes a deleted pod. Its session is dropped, and thereby zeroed, if no other pod uses it.
    pub fn forget(&self, pod: &PodUid) {
        let mut sessions = self.sessions();
        let left = sessions.by_pod.remove(pod);
        sessions.entries.retain(|key, entry| {
            let last = left.as_ref() == Some(key) && entry.leave(pod);
            let dropped = last || entry.is_abandoned();
            if dropped {
                entry.abort();
            }
            !dropped
        });
        self.count(&sessions);
    }

    /// Describes all sessions, without secrets, for `/debug/sessions`.
    pub fn describe(&self) -> serde_json::Value {
        let describe = |(key, entry): (&Arc<SessionKey>, &Arc<SessionEntry>)| {
            let mut description = entry.describe();
            description["service_account"] = key.account.to_string().into();
            description["role_arn"] = key.role.as_str().into();
            description["session_name"] = key.session_name.as_str().into();
            description
        };
        self.sessions().entries.iter().map(describe).collect()
    }

    /// Returns the time until the first session in use expires. Unused sessions are not refreshed and do not count.
    pub fn first_expiry(&self) -> Option<Duration> {
        self.sessions().entries.values().filter_map(|entry| entry.time_left_if_used()).min()
    }

    fn entry(&self, grant: &Grant) -> Arc<SessionEntry> {
        let (key, uid) = (grant.key(), grant.workload().uid());
        let start = || SessionEntry::start(self.issuer.clone(), self.limiter.clone(), self.check.clone());
        let mut sessions = self.sessions();
        let known = sessions.entries.get(key).cloned();
        if let Some(entry) = known.as_ref().filter(|entry| entry.has_failed()) {
            error!(role_arn = %key.role, service_account = %key.account, "refresher task panicked: starting it again");
            entry.abort();
        }
        let known = known.filter(|entry| !entry.has_failed());
        if let Some(entry) = known.as_ref().filter(|entry| entry.has_pod(uid)) {
            return entry.clone();
        }
        // Nothing would ever remove a pod that is deleted already, or whose account was changed meanwhile.
        if !(self.check)(grant) {
            return known.unwrap_or_else(start);
        }
        let entry = known.unwrap_or_else(start);
        entry.join(grant);
        sessions.entries.insert(key.clone(), entry.clone());
        if let Some(former) = sessions.by_pod.insert(uid.clone(), key.clone()).filter(|former| former != key)
            && sessions.entries.get(&former).is_some_and(|former| former.leave(uid))
        {
            // Callers that wait for it keep it alive; otherwise it ends here.
            sessions.entries.remove(&former);
        }
        self.count(&sessions);
        entry
    }

    fn sessions(&self) -> MutexGuard<'_, Sessions> {
        self.sessions.lock()
    }

    fn count(&self, sessions: &Sessions) {
        self.metrics.cache_entries.set(i64::try_from(sessions.entries.len()).unwrap_or(i64::MAX));
    }
}

impl std::fmt::Debug for Cache {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Cache").field("sessions", &self.sessions().entries.len()).finish_non_exhaustive()
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

    impl Issuer for Always {
        fn issue<'a>(
            &'a self,
            grant: &'a Grant,
        ) -> Pin<Box<dyn Future<Output = Result<Credential, Refusal>> + Send + 'a>> {
            Box::pin(async { Ok(Credential::sample(grant.role().name(), Duration::from_secs(3_600))) })
        }
    }

    fn cache(check: impl Fn(&Grant) -> bool + Send + Sync + 'static) -> Cache {
        let metrics = Metrics::new("test").unwrap();
        Cache::new(Arc::new(Always), ExchangeLimiter::new(1_000, 1_000, metrics.clone()), check, metrics)
    }

    fn grant(pod: &str, role: &str) -> Grant {
        let role = format!("arn:aws:iam::111122223333:role/{role}");
        Grant::sample(Workload::sample(pod, &format!("uid-{pod}"), "reader"), &role)
    }

    /// Sessions, and pods that have one.
    fn held(cache: &Cache) -> (usize, usize) {
        let sessions = cache.sessions();
        (sessions.entries.len(), sessions.by_pod.len())
    }

    fn in_4s() -> Instant {
        Instant::now() + Duration::from_secs(4)
    }

    /// Whoever may change a service account can do so as often as it likes.
    #[tokio::test(start_paused = true)]
    async fn pod_has_one_session_after_account_changes() {
        let cache = cache(|_| true);
        let shared = grant("b", "role-0");
        cache.get(&shared, in_4s()).await.unwrap();
        for number in 0..100 {
            let role = format!("role-{number}");
            let credential = cache.get(&grant("a", &role), in_4s()).await.unwrap();
            assert_eq!(credential.access_key_id(), role);
        }
        assert_eq!(held(&cache), (2, 2), "its last one, and that of the other pod");
        assert!(cache.get_cached(&cache.handle(&shared)).is_some(), "which lost nothing");
    }

    /// A defect of a library must not cost a service account its credentials for as long as the agent runs.
    #[tokio::test(start_paused = true)]
    async fn panicked_refresher_is_restarted() {
        #[derive(Debug, Default)]
        struct PanicsOnce(AtomicBool);
        impl Issuer for PanicsOnce {
            fn issue<'a>(
                &'a self,
                grant: &'a Grant,
            ) -> Pin<Box<dyn Future<Output = Result<Credential, Refusal>> + Send + 'a>> {
                assert!(self.0.swap(true, SeqCst), "for the test");
                Always.issue(grant)
            }
        }
        let metrics = Metrics::new("test").unwrap();
        let budget = ExchangeLimiter::new(1_000, 1_000, metrics.clone());
        let cache = Cache::new(Arc::new(PanicsOnce::default()), budget, |_| true, metrics);
        assert!(cache.get(&grant("a", "role"), in_4s()).await.is_err());
        assert_eq!(cache.get(&grant("a", "role"), in_4s()).await.unwrap().access_key_id(), "role");
    }

    /// Between the look at who is calling and this, a pod may be deleted.
    #[tokio::test(start_paused = true)]
    async fn deleted_pod_joins_no_session() {
        let live = Arc::new(AtomicBool::new(true));
        let cache = cache({
            let live = live.clone();
            move |grant| grant.workload().pod() != "gone" || live.load(SeqCst)
        });
        cache.get(&grant("a", "role"), in_4s()).await.unwrap();
        live.store(false, SeqCst);
        cache.forget(grant("gone", "role").workload().uid());
        cache.handle(&grant("gone", "role"));
        cache.forget(grant("a", "role").workload().uid());
        assert_eq!(held(&cache), (0, 0), "dropped with its last pod");
    }
}
