//! Prefetches credentials before a pod's first request, and drops them with the last pod that uses them.

use std::{
    collections::{BTreeMap, HashMap, HashSet},
    sync::Arc,
    time::Duration,
};

use futures::{StreamExt, future::BoxFuture, stream::FuturesUnordered};
use tokio::sync::mpsc;

use super::discovery::Synced;
use crate::{
    attribute::{Attributor, Change, PodUid, ServiceAccountName, Workload},
    authorize::Authorizer,
    cache::Cache,
    clock,
};

/// Prefetches for this node's pods as they come and go.
#[derive(Clone)]
pub(super) struct Prefetcher {
    pub(super) attributor: Arc<Attributor>,
    pub(super) authorizer: Arc<Authorizer>,
    pub(super) cache: Arc<Cache>,
    /// The window over which the first prefetches are spread (jitter).
    pub(super) window: Duration,
}

/// Delayed prefetches of changed service accounts. Further changes of an account join its pending prefetch, which uses
/// the annotations of the time when it runs. Bounded by the service accounts of this node's pods.
#[derive(Default)]
struct Delayed {
    accounts: HashSet<ServiceAccountName>,
    timers: FuturesUnordered<BoxFuture<'static, ServiceAccountName>>,
}

impl Delayed {
    fn schedule(&mut self, account: &ServiceAccountName, delay: Duration) {
        if self.accounts.insert(account.clone()) {
            let account = account.clone();
            self.timers.push(Box::pin(async move {
                tokio::time::sleep(delay).await;
                account
            }));
        }
    }
}

impl Prefetcher {
    pub(super) async fn run(
        self,
        mut pods: mpsc::UnboundedReceiver<Change>,
        mut accounts: mpsc::UnboundedReceiver<ServiceAccountName>,
        synced: Synced,
    ) {
        let preexisting = self.pods_until_synced(&mut pods, synced).await;
        self.spread(preexisting);
        let mut delayed = Delayed::default();
        loop {
            tokio::select! {
                Some(change) = pods.recv() => self.pod_changed(change, Duration::ZERO),
                Some(account) = accounts.recv() => self.account_changed(&account, &mut delayed),
                Some(account) = delayed.timers.next() => {
                    delayed.accounts.remove(&account);
                    self.attributor.pods_of(&account).iter().for_each(|workload| self.fetch(workload));
                }
                else => return,
            }
        }
    }

    /// Returns the pods that are bound when the initial lists are complete. Handling changes meanwhile bounds the
    /// result by the number of pods that a node can have, however long the lists take.
    async fn pods_until_synced(
        &self,
        pods: &mut mpsc::UnboundedReceiver<Change>,
        synced: Synced,
    ) -> BTreeMap<PodUid, Workload> {
        let mut bound = BTreeMap::new();
        let all_synced = synced.all();
        tokio::pin!(all_synced);
        loop {
            tokio::select! {
                () = &mut all_synced => break,
                Some(change) = pods.recv() => self.record(change, &mut bound),
            }
        }
        while let Ok(change) = pods.try_recv() {
            self.record(change, &mut bound);
        }
        bound
    }

    /// Prefetches for the pods that ran before this agent started. They have credentials for now, so the calls get
    /// jitter: all nodes of a rollout must not call STS in the same second. Each session gets one delay, since with one
    /// delay per pod the shortest would decide.
    fn spread(&self, preexisting: BTreeMap<PodUid, Workload>) {
        let mut delays = HashMap::new();
        for workload in preexisting.into_values() {
            let session = self.authorizer.grant_if_cached(&workload).map(|grant| grant.key().clone());
            let delay = *delays.entry(session).or_insert_with(|| self.jitter());
            self.pod_changed(Change::Bound(workload), delay);
        }
    }

    fn record(&self, change: Change, bound: &mut BTreeMap<PodUid, Workload>) {
        match change {
            Change::Bound(workload) => drop(bound.insert(workload.uid().clone(), workload)),
            Change::Gone(pod) => {
                bound.remove(&pod);
                self.pod_gone(&pod);
            }
        }
    }

    fn jitter(&self) -> Duration {
        self.window.mul_f64(clock::jitter())
    }

    /// Prefetches for the pods of a changed service account: at once for pods without a session, since the two watches
    /// are not synchronized and a pod may arrive before its account; with jitter for the others, since all nodes see
    /// the change in the same second. A pod that requests credentials meanwhile does not wait for the prefetch.
    fn account_changed(&self, account: &ServiceAccountName, delayed: &mut Delayed) {
        let pods = self.attributor.pods_of(account);
        let (served, unserved): (Vec<_>, Vec<_>) =
            pods.into_iter().partition(|workload| self.cache.serves(workload.uid()));
        unserved.iter().for_each(|workload| self.fetch(workload));
        if !served.is_empty() {
            delayed.schedule(account, self.jitter());
        }
    }

    fn pod_changed(&self, change: Change, delay: Duration) {
        match change {
            Change::Gone(pod) => self.pod_gone(&pod),
            Change::Bound(workload) if delay.is_zero() => self.fetch(&workload),
            Change::Bound(workload) => {
                let this = self.clone();
                tokio::spawn(async move {
                    tokio::time::sleep(delay).await;
                    if this.attributor.is_live(workload.uid()) {
                        this.fetch(&workload);
                    }
                });
            }
        }
    }

    fn pod_gone(&self, pod: &PodUid) {
        self.cache.forget(pod);
        self.authorizer.forget_unused();
    }

    /// Prefetches the pod's credentials, after reading its service account if it is not cached.
    fn fetch(&self, workload: &Workload) {
        if self.prefetch(workload) || !self.authorizer.begin_fetch(workload) {
            return;
        }
        let (this, account) = (self.clone(), workload.service_account().clone());
        tokio::spawn(async move {
            this.authorizer.fetch_account(&account).await;
            // Includes pods that were bound during the read.
            for workload in this.attributor.pods_of(&account) {
                this.prefetch(&workload);
            }
        });
    }

    /// Starts a prefetch if the service account is cached. Returns whether it is.
    fn prefetch(&self, workload: &Workload) -> bool {
        let grant = self.authorizer.grant_if_cached(workload);
        grant.inspect(|grant| self.cache.prefetch(grant)).is_some()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Simulates `kubectl annotate` in a loop.
    #[tokio::test(start_paused = true)]
    async fn repeated_changes_share_one_prefetch() {
        let account = |name: &str| ServiceAccountName { namespace: "default".into(), name: name.into() };
        let mut delayed = Delayed::default();
        for _ in 0..1_000 {
            delayed.schedule(&account("a"), Duration::from_secs(60));
            delayed.schedule(&account("b"), Duration::from_secs(30));
        }
        assert_eq!((delayed.timers.len(), delayed.accounts.len()), (2, 2));
        assert_eq!(delayed.timers.next().await, Some(account("b")), "each after its own delay");
    }
}
