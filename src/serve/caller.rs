//! Who is at the other end of one connection, and what is remembered of that between its requests. Knows no route.

use std::sync::{Arc, Mutex, OnceLock, PoisonError};

use crate::{
    attribute::{PodUid, Workload},
    authorize::Grant,
    cache::SessionHandle,
    connections::{ConnectionPermit, Owner},
    intercept::{ClientConn, SourceQuota},
};

#[derive(Debug)]
pub(super) struct Caller {
    pub(super) peer: ClientConn,
    pub(super) share: SourceQuota,
    pub(super) permit: Arc<ConnectionPermit>,
    /// Fixed by the first request, whatever the directory says later.
    pod: OnceLock<PodUid>,
    known: Mutex<Option<Arc<Known>>>,
}

/// Of the directory and of the service accounts, read before whatever rests on them.
pub(super) type Editions = (u64, u64);

/// Whom the last request came from and what it was granted: the same now unless an edition has changed since. On a warm
/// connection, looking all of it up again would be most of the work.
#[derive(Debug)]
pub(super) struct Known {
    pub(super) editions: Editions,
    pub(super) workload: Workload,
    pub(super) grant: Grant,
    pub(super) session: SessionHandle,
}

impl Caller {
    pub(super) fn new(peer: ClientConn, share: SourceQuota, permit: Arc<ConnectionPermit>) -> Self {
        Self { peer, share, permit, pod: OnceLock::new(), known: Mutex::default() }
    }

    /// Whether it is still the pod that sent the connection's first request.
    pub(super) fn is_still(&self, workload: &Workload) -> bool {
        let pod = self.pod.get_or_init(|| {
            self.permit.set_owner(Owner::Pod(workload.uid().0.clone()));
            workload.uid().clone()
        });
        pod == workload.uid()
    }

    pub(super) fn known(&self, editions: Editions) -> Option<Arc<Known>> {
        let known = self.known.lock().unwrap_or_else(PoisonError::into_inner);
        known.as_ref().filter(|known| known.editions == editions).cloned()
    }

    pub(super) fn remember(&self, known: Arc<Known>) {
        *self.known.lock().unwrap_or_else(PoisonError::into_inner) = Some(known);
    }
}
