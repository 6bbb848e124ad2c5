//! Who is at the other end of one connection, and what is remembered of that between its requests. Knows no route.

use std::{
    sync::{
        Arc, Mutex, OnceLock, PoisonError,
        atomic::{AtomicU32, Ordering},
    },
    time::Duration,
};

use tokio::time::sleep;

use crate::{
    attribute::{PodUid, Workload},
    authorise::Grant,
    cache::SessionHandle,
    intercept::{Peer, Share},
};

/// SDKs keep a connection for a minute between requests. One that ends no request in as many looks, however slowly it
/// sends, is closed: after 75 to 100 s.
const LOOKS: u32 = 3;
const LOOK: Duration = Duration::from_secs(25);

#[derive(Debug)]
pub(super) struct Caller {
    pub(super) peer: Peer,
    pub(super) share: Share,
    /// Fixed by the first request, whatever the directory says later.
    pod: OnceLock<PodUid>,
    known: Mutex<Option<Arc<Known>>>,
    /// Requests begun and ended: odd while one is being answered.
    steps: AtomicU32,
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
    pub(super) fn new(peer: Peer, share: Share) -> Self {
        Self { peer, share, pod: OnceLock::new(), known: Mutex::default(), steps: AtomicU32::new(0) }
    }

    /// Whether it is still the pod that sent the connection's first request.
    pub(super) fn is_still(&self, workload: &Workload) -> bool {
        self.pod.get_or_init(|| workload.uid().clone()) == workload.uid()
    }

    pub(super) fn known(&self, editions: Editions) -> Option<Arc<Known>> {
        let known = self.known.lock().unwrap_or_else(PoisonError::into_inner);
        known.as_ref().filter(|known| known.editions == editions).cloned()
    }

    pub(super) fn remember(&self, known: Arc<Known>) {
        *self.known.lock().unwrap_or_else(PoisonError::into_inner) = Some(known);
    }

    /// A request has begun, or has ended.
    pub(super) fn step(&self) {
        self.steps.fetch_add(1, Ordering::Relaxed);
    }

    pub(super) fn is_being_answered(&self) -> bool {
        !self.steps.load(Ordering::Relaxed).is_multiple_of(2)
    }

    /// Returns when no request has ended for a while and none is being answered. One timer for the connection, where
    /// hyper's own would be a new one for every request.
    pub(super) async fn idle(&self) {
        let (mut seen, mut quiet) = (self.steps.load(Ordering::Relaxed), 0);
        while quiet < LOOKS {
            sleep(LOOK).await;
            let steps = self.steps.load(Ordering::Relaxed);
            let still = steps == seen && steps.is_multiple_of(2);
            quiet = if still { quiet + 1 } else { 0 };
            seen = steps;
        }
    }
}
