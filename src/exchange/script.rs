//! An issuer that returns scripted results, for tests.

use std::{
    collections::VecDeque,
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
    time::Duration,
};

use futures::future::BoxFuture;
use parking_lot::Mutex;
use tokio::time::sleep;

use super::{Credential, Issuer};
use crate::{
    authorize::Grant,
    refusal::{Reason, Refusal},
};

const HOUR: Duration = Duration::from_secs(3_600);

/// Returns the scripted results in order, each after its delay, and then fresh credentials without delay.
pub(crate) struct Script {
    results: Mutex<VecDeque<(Duration, Option<Reason>)>>,
    calls: AtomicUsize,
    /// Names of the pods of all calls, in order.
    pub(crate) pods: Mutex<Vec<String>>,
    session: Duration,
}

impl Default for Script {
    fn default() -> Self {
        Self { results: Mutex::default(), calls: AtomicUsize::default(), pods: Mutex::default(), session: HOUR }
    }
}

impl Script {
    pub(crate) fn new(results: impl IntoIterator<Item = (u64, Option<Reason>)>) -> Arc<Self> {
        let results = results.into_iter().map(|(millis, refusal)| (Duration::from_millis(millis), refusal)).collect();
        Arc::new(Self { results: Mutex::new(results), ..Self::default() })
    }

    /// Always returns fresh credentials, of sessions of that length.
    pub(crate) fn with_session(session: Duration) -> Arc<Self> {
        Arc::new(Self { session, ..Self::default() })
    }

    pub(crate) fn then(&self, millis: u64, refusal: Option<Reason>) {
        self.results.lock().push_back((Duration::from_millis(millis), refusal));
    }

    pub(crate) fn calls(&self) -> usize {
        self.calls.load(Ordering::SeqCst)
    }
}

impl Issuer for Script {
    fn issue<'a>(&'a self, grant: &'a Grant) -> BoxFuture<'a, Result<Credential, Refusal>> {
        let call = self.calls.fetch_add(1, Ordering::SeqCst) + 1;
        self.pods.lock().push(grant.workload().pod().to_owned());
        let (delay, refusal) = self.results.lock().pop_front().unwrap_or((Duration::ZERO, None));
        Box::pin(async move {
            sleep(delay).await;
            refusal.map_or_else(
                || Ok(Credential::sample(&format!("ASIA{call}"), self.session)),
                |reason| Err(reason.into()),
            )
        })
    }
}
