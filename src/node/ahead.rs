//! Credentials before the first request, and none after the last pod.

use std::{
    collections::{BTreeMap, HashMap},
    sync::Arc,
    time::Duration,
};

use tokio::sync::mpsc;

use crate::{
    attribute::{Attributor, Change, PodUid, ServiceAccountName, Workload},
    authorise::Authoriser,
    cache::Cache,
    clock,
    observe::Condition,
};

/// Follows the pods of this node as they come and go.
#[derive(Clone)]
pub(super) struct FetchAhead {
    pub(super) attributor: Arc<Attributor>,
    pub(super) authoriser: Arc<Authoriser>,
    pub(super) cache: Arc<Cache>,
    /// Over how long the first prefetches are spread.
    pub(super) window: Duration,
}

impl FetchAhead {
    pub(super) async fn run(
        self,
        mut pods: mpsc::UnboundedReceiver<Change>,
        mut accounts: mpsc::UnboundedReceiver<ServiceAccountName>,
        known: (Condition, Condition),
    ) {
        let early = self.bound_until(&mut pods, known).await;
        self.spread(early);
        loop {
            tokio::select! {
                Some(change) = pods.recv() => self.take(change, Duration::ZERO),
                Some(account) = accounts.recv() => self.account_changed(&account),
                else => return,
            }
        }
    }

    /// The pods that are bound by the time that all is known. However long that takes, and whatever comes and goes
    /// meanwhile, they are no more than the node has.
    async fn bound_until(
        &self,
        pods: &mut mpsc::UnboundedReceiver<Change>,
        known: (Condition, Condition),
    ) -> BTreeMap<PodUid, Workload> {
        let mut bound = BTreeMap::new();
        let all_is_known = async {
            known.0.met().await;
            known.1.met().await;
        };
        tokio::pin!(all_is_known);
        loop {
            tokio::select! {
                () = &mut all_is_known => break,
                Some(change) = pods.recv() => self.note(change, &mut bound),
            }
        }
        while let Ok(change) = pods.try_recv() {
            self.note(change, &mut bound);
        }
        bound
    }

    /// Pods that ran before this agent did: they have what they need for now, and all nodes of a roll-out must not ask
    /// STS in the same second. One moment for each session: of one for each pod, the first would be early.
    fn spread(&self, early: BTreeMap<PodUid, Workload>) {
        let mut moments = HashMap::new();
        for workload in early.into_values() {
            let session = self.authoriser.foresee(&workload).map(|grant| grant.key().clone());
            let after = *moments.entry(session).or_insert_with(|| self.moment());
            self.take(Change::Bound(workload), after);
        }
    }

    fn note(&self, change: Change, bound: &mut BTreeMap<PodUid, Workload>) {
        match change {
            Change::Bound(workload) => drop(bound.insert(workload.uid().clone(), workload)),
            Change::Gone(pod) => {
                bound.remove(&pod);
                self.cache.forget(&pod);
            }
        }
    }

    fn moment(&self) -> Duration {
        self.window.mul_f64(clock::jitter())
    }

    /// Its pods may have been told of before it was: the two watches are not in step. Where it has other terms now, all
    /// nodes learn of that in the same second, and pods that ask do not wait for this.
    fn account_changed(&self, account: &ServiceAccountName) {
        let moment = self.moment();
        for workload in self.attributor.pods_of(account) {
            let after = if self.cache.serves(workload.uid()) { moment } else { Duration::ZERO };
            self.take(Change::Bound(workload), after);
        }
    }

    fn take(&self, change: Change, after: Duration) {
        match change {
            Change::Gone(pod) => self.cache.forget(&pod),
            Change::Bound(workload) if after.is_zero() => self.fetch(&workload),
            Change::Bound(workload) => {
                let this = self.clone();
                tokio::spawn(async move {
                    tokio::time::sleep(after).await;
                    if this.attributor.is_live(workload.uid()) {
                        this.fetch(&workload);
                    }
                });
            }
        }
    }

    fn fetch(&self, workload: &Workload) {
        if let Some(grant) = self.authoriser.foresee(workload) {
            self.cache.prefetch(&grant);
        }
    }
}
