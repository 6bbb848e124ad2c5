//! What issues credentials as a test has written it down.

use std::{
    collections::VecDeque,
    future::Future,
    pin::Pin,
    sync::{
        Arc, Mutex,
        atomic::{AtomicUsize, Ordering},
    },
    time::Duration,
};

use tokio::time::sleep;

use super::{Credential, Issuer};
use crate::{
    authorise::Grant,
    refusal::{Reason, Refusal},
};

const HOUR: Duration = Duration::from_secs(3_600);

/// Answers in the given order, each after its delay; then always with fresh credentials, at once.
pub(crate) struct Script {
    answers: Mutex<VecDeque<(Duration, Option<Reason>)>>,
    calls: AtomicUsize,
    /// In whose name it was asked, in order.
    pub(crate) pods: Mutex<Vec<String>>,
    session: Duration,
}

impl Default for Script {
    fn default() -> Self {
        Self { answers: Mutex::default(), calls: AtomicUsize::default(), pods: Mutex::default(), session: HOUR }
    }
}

impl Script {
    pub(crate) fn new(answers: impl IntoIterator<Item = (u64, Option<Reason>)>) -> Arc<Self> {
        let answers = answers.into_iter().map(|(millis, answer)| (Duration::from_millis(millis), answer)).collect();
        Arc::new(Self { answers: Mutex::new(answers), ..Self::default() })
    }

    /// Always with fresh credentials, of sessions of that length.
    pub(crate) fn of(session: Duration) -> Arc<Self> {
        Arc::new(Self { session, ..Self::default() })
    }

    pub(crate) fn then(&self, millis: u64, answer: Option<Reason>) {
        self.answers.lock().unwrap().push_back((Duration::from_millis(millis), answer));
    }

    pub(crate) fn calls(&self) -> usize {
        self.calls.load(Ordering::SeqCst)
    }
}

impl Issuer for Script {
    fn issue<'a>(&'a self, grant: &'a Grant) -> Pin<Box<dyn Future<Output = Result<Credential, Refusal>> + Send + 'a>> {
        let call = self.calls.fetch_add(1, Ordering::SeqCst) + 1;
        self.pods.lock().unwrap().push(grant.workload().pod().to_owned());
        let (delay, answer) = self.answers.lock().unwrap().pop_front().unwrap_or((Duration::ZERO, None));
        Box::pin(async move {
            sleep(delay).await;
            answer.map_or_else(
                || Ok(Credential::sample(&format!("ASIA{call}"), self.session)),
                |reason| Err(reason.into()),
            )
        })
    }
}
