//! State of one connection: the client as the kernel sees it, and what its requests share. Knows no route.

use std::sync::{Arc, OnceLock};

use parking_lot::Mutex;

use crate::{
    attribute::{PodUid, Workload},
    authorize::Grant,
    cache::SessionHandle,
    connections::{ConnectionPermit, Owner},
    intercept::{ClientConn, SourceQuota},
};

#[derive(Debug)]
pub(super) struct ConnectionState {
    pub(super) client: ClientConn,
    pub(super) quota: SourceQuota,
    pub(super) permit: Arc<ConnectionPermit>,
    /// Fixed by the first request, whatever the pod index says later.
    pod: OnceLock<PodUid>,
    cached_grant: Mutex<Option<Arc<CachedGrant>>>,
}

/// Generations of the pod index and of the service accounts. They must be read before what they guard.
pub(super) type Generations = (u64, u64);

/// The pod and the grant of the connection's last request. They are valid until a generation changes. Without this
/// cache the lookups would be most of the work on a warm connection.
#[derive(Debug)]
pub(super) struct CachedGrant {
    pub(super) generations: Generations,
    pub(super) workload: Workload,
    pub(super) grant: Grant,
    pub(super) session: SessionHandle,
}

impl ConnectionState {
    pub(super) fn new(client: ClientConn, quota: SourceQuota, permit: Arc<ConnectionPermit>) -> Self {
        Self { client, quota, permit, pod: OnceLock::new(), cached_grant: Mutex::default() }
    }

    /// Returns whether this pod sent the connection's first request. The first call binds the connection to the pod.
    pub(super) fn is_bound_to(&self, workload: &Workload) -> bool {
        let pod = self.pod.get_or_init(|| {
            self.permit.set_owner(Owner::Pod(workload.uid().0.clone()));
            workload.uid().clone()
        });
        pod == workload.uid()
    }

    /// Returns the cached grant unless a generation has changed.
    pub(super) fn cached_grant(&self, generations: Generations) -> Option<Arc<CachedGrant>> {
        self.cached_grant.lock().as_ref().filter(|cached| cached.generations == generations).cloned()
    }

    pub(super) fn cache_grant(&self, grant: Arc<CachedGrant>) {
        *self.cached_grant.lock() = Some(grant);
    }
}
