//! Credentials before the first request, and none after the last pod.

use std::{
    collections::{BTreeMap, HashMap, HashSet},
    sync::Arc,
    time::Duration,
};

use futures::{StreamExt, future::BoxFuture, stream::FuturesUnordered};
use tokio::sync::mpsc;

use crate::{
    attribute::{Attributor, Change, PodUid, ServiceAccountName, Workload},
    authorize::Authorizer,
    cache::Cache,
    clock,
    observe::Condition,
};

/// Follows the pods of this node as they come and go.
#[derive(Clone)]
pub(super) struct FetchAhead {
    pub(super) attributor: Arc<Attributor>,
    pub(super) authorizer: Arc<Authorizer>,
    pub(super) cache: Arc<Cache>,
    /// Over how long the first prefetches are spread.
    pub(super) window: Duration,
}

/// Prefetches of changed accounts that wait for their moment. Further changes join the one that is pending: it fetches
/// by the terms of its moment. Bounded by the accounts of this node's pods.
#[derive(Default)]
struct Pending {
    accounts: HashSet<ServiceAccountName>,
    due: FuturesUnordered<BoxFuture<'static, ServiceAccountName>>,
}

impl Pending {
    fn put(&mut self, account: &ServiceAccountName, after: Duration) {
        if self.accounts.insert(account.clone()) {
            let account = account.clone();
            self.due.push(Box::pin(async move {
                tokio::time::sleep(after).await;
                account
            }));
        }
    }
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
        let mut pending = Pending::default();
        loop {
            tokio::select! {
                Some(change) = pods.recv() => self.take(change, Duration::ZERO),
                Some(account) = accounts.recv() => self.account_changed(&account, &mut pending),
                Some(account) = pending.due.next() => {
                    pending.accounts.remove(&account);
                    self.attributor.pods_of(&account).iter().for_each(|workload| self.fetch(workload));
                }
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
            let session = self.authorizer.grant_if_cached(&workload).map(|grant| grant.key().clone());
            let after = *moments.entry(session).or_insert_with(|| self.moment());
            self.take(Change::Bound(workload), after);
        }
    }

    fn note(&self, change: Change, bound: &mut BTreeMap<PodUid, Workload>) {
        match change {
            Change::Bound(workload) => drop(bound.insert(workload.uid().clone(), workload)),
            Change::Gone(pod) => {
                bound.remove(&pod);
                self.gone(&pod);
            }
        }
    }

    fn moment(&self) -> Duration {
        self.window.mul_f64(clock::jitter())
    }

    /// Its pods may have been told of before it was: the two watches are not in step. Where it has other terms now, all
    /// nodes learn of that in the same second, and pods that ask do not wait for this.
    fn account_changed(&self, account: &ServiceAccountName, pending: &mut Pending) {
        let pods = self.attributor.pods_of(account);
        let (served, unserved): (Vec<_>, Vec<_>) =
            pods.into_iter().partition(|workload| self.cache.serves(workload.uid()));
        unserved.iter().for_each(|workload| self.fetch(workload));
        if !served.is_empty() {
            pending.put(account, self.moment());
        }
    }

    fn take(&self, change: Change, after: Duration) {
        match change {
            Change::Gone(pod) => self.gone(&pod),
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

    fn gone(&self, pod: &PodUid) {
        self.cache.forget(pod);
        self.authorizer.forget_unused();
    }

    fn fetch(&self, workload: &Workload) {
        if self.prefetch(workload) || !self.authorizer.begin_fetch(workload) {
            return;
        }
        let (this, account) = (self.clone(), workload.service_account().clone());
        tokio::spawn(async move {
            this.authorizer.fetch_account(&account).await;
            // Those too that were bound meanwhile.
            for workload in this.attributor.pods_of(&account) {
                this.prefetch(&workload);
            }
        });
    }

    /// Returns whether it is known what the workload is going to be granted.
    fn prefetch(&self, workload: &Workload) -> bool {
        let grant = self.authorizer.grant_if_cached(workload);
        grant.inspect(|grant| self.cache.prefetch(grant)).is_some()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// `kubectl annotate` in a loop.
    #[tokio::test(start_paused = true)]
    async fn changes_of_an_account_share_one_moment() {
        let account = |name: &str| ServiceAccountName { namespace: "default".into(), name: name.into() };
        let mut pending = Pending::default();
        for _ in 0..1_000 {
            pending.put(&account("a"), Duration::from_secs(60));
            pending.put(&account("b"), Duration::from_secs(30));
        }
        assert_eq!((pending.due.len(), pending.accounts.len()), (2, 2));
        assert_eq!(pending.due.next().await, Some(account("b")), "each at its own moment");
    }
}
