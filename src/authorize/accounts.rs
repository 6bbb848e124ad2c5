//! Service accounts and their annotations, from a cluster-wide, metadata-only watch or from a workloads file. Only the
//! accounts that pods of this node use are kept.
//!
//! The watch does not repeat an account when its first pod is bound, so the account is read live then.
//!
//! Before a pod gets a 404 because it has no role, its account is read live too: SDKs do not retry after a 404, and an
//! annotation that was just added must not cost a pod its start.

use std::{
    collections::{BTreeMap, HashMap},
    path::PathBuf,
    sync::{Arc, OnceLock},
    time::Duration,
};

use futures::{
    FutureExt,
    future::{BoxFuture, Shared},
};
use k8s_openapi::{api::core::v1::ServiceAccount, apimachinery::pkg::apis::meta::v1::ObjectMeta};
use kube::{Api, Client, api::PartialObjectMeta, runtime::watcher};
use parking_lot::Mutex;
use tokio::{
    sync::{Semaphore, watch},
    time::{Instant, sleep},
};
use tracing::warn;

use super::{
    SessionKey,
    account_store::{AccountStore, InUse},
    annotations,
};
use crate::{
    attribute::{ServiceAccountName, Workload, file::FileWorkload},
    clock::Backoff,
    kubernetes::{
        json_filter::AnnotationFilter,
        watch::{ListMode, Watch},
    },
    refusal::{Reason, Refusal},
};

/// How long the result of a live read is cached, unless the watch shows the account earlier. It caches negative results:
/// an account with a role goes to the store.
const RESULT_TTL: Duration = Duration::from_secs(10);
/// How long a failed read is cached, so that pods that retry do not load an API server in trouble.
const FAILURE_TTL: Duration = Duration::from_secs(1);
/// Maximum number of reads per request, if newer events supersede them.
const MAX_READS: usize = 3;
/// Maximum number of concurrent reads for newly bound pods. Each may take a connection.
const MAX_PREFETCH_READS: usize = 4;
const PREFETCH_BACKOFF: Backoff = Backoff::new(Duration::from_millis(500), Duration::from_secs(30));

/// A service account with the annotations that kirsa reads.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Account {
    pub(super) uid: Arc<str>,
    annotations: BTreeMap<String, String>,
    /// An annotation that exceeds its maximum length, with that length. Its value is dropped, and the account refused.
    pub(super) oversized: Option<(String, usize)>,
    pub(super) token_file: Option<PathBuf>,
    /// Session key that all pods of the account share, and whether it requires IMDSv2. Parsed at the first request.
    pub(super) shared_key: OnceLock<(Arc<SessionKey>, bool)>,
}

impl Account {
    pub(super) fn annotation(&self, name: &str) -> Option<&str> {
        self.annotations.get(name).map(String::as_str)
    }

    pub(super) fn same_spec(&self, other: &Self) -> bool {
        self.uid == other.uid && self.annotations == other.annotations && self.oversized == other.oversized
    }

    #[cfg(any(test, fuzzing))]
    pub(crate) fn from_annotations<'a>(uid: &str, annotations: impl IntoIterator<Item = (&'a str, &'a str)>) -> Self {
        let annotations = annotations.into_iter().map(|(name, value)| (name.to_owned(), value.to_owned())).collect();
        Self { uid: uid.into(), annotations, oversized: None, token_file: None, shared_key: OnceLock::new() }
    }
}

/// Effect of a watch event on the accounts of this node's pods.
#[derive(Debug, PartialEq, Eq)]
pub enum AccountEvent {
    /// A list is complete. Holds the accounts in use that it did not show, to be read again.
    Synced(Vec<ServiceAccountName>),
    /// An account in use has got a role, or its annotations have changed.
    Changed(ServiceAccountName),
    Unchanged,
}

/// The service accounts of this node's pods.
pub struct Accounts {
    store: Arc<AccountStore>,
    /// Whether the first list is complete.
    synced: watch::Sender<bool>,
    live: Option<LiveReads>,
}

/// Live reads with single-flight: callers share a read in flight, and it completes even if all of them hang up.
struct LiveReads {
    client: Client,
    store: Arc<AccountStore>,
    /// Reads for requests, in flight or cached.
    results: Mutex<HashMap<ServiceAccountName, (Instant, Shared<LiveRead>)>>,
    /// Permits for the reads of newly bound pods.
    prefetch_permits: Semaphore,
}

/// The result of a live read.
#[derive(Debug, Clone)]
enum ReadOutcome {
    /// `None`: the account has no role, or does not exist.
    Current(Option<Arc<Account>>),
    /// A newer event arrived while the read was in flight.
    Superseded,
}

type LiveRead = BoxFuture<'static, Result<ReadOutcome, Refusal>>;

impl Accounts {
    /// Returns the accounts of a cluster. Keeps those for which `in_use` returns true: live pods of this node use them.
    pub fn for_kubernetes(
        client: Client,
        in_use: impl Fn(&ServiceAccountName) -> bool + Send + Sync + 'static,
    ) -> Self {
        let store = Arc::new(AccountStore::new(Box::new(in_use)));
        Self { live: Some(LiveReads::new(client, store.clone())), ..Self::new(store) }
    }

    /// Returns the accounts of a workloads file; [`Accounts::replace`] fills them.
    pub fn for_file() -> Self {
        // The file lists the pods too, so each account is in use.
        let in_use: InUse = Box::new(|_| true);
        Self::new(Arc::new(AccountStore::new(in_use)))
    }

    fn new(store: Arc<AccountStore>) -> Self {
        Self { store, synced: watch::Sender::new(false), live: None }
    }

    /// Replaces all accounts by those of a workloads file. Its `role` becomes the annotation `role_annotation`.
    pub fn replace(&self, workloads: &[FileWorkload], role_annotation: &str) {
        self.store.replace(workloads.iter().map(|workload| {
            let mut annotations = workload.annotations.clone();
            if let Some(role) = &workload.role {
                annotations.insert(role_annotation.to_owned(), role.clone());
            }
            let account = Account {
                uid: "".into(),
                annotations,
                oversized: None,
                token_file: workload.token_file.clone(),
                shared_key: OnceLock::new(),
            };
            (workload.pod.account.clone(), Arc::new(account))
        }));
        self.synced.send_replace(true);
    }

    /// Returns whether the service accounts have been listed at least once.
    pub(super) fn is_synced(&self) -> bool {
        *self.synced.borrow()
    }

    pub(super) fn generation(&self) -> u64 {
        self.store.generation()
    }

    /// Returns the workload's account if it is known to have a role.
    pub(super) fn get(&self, workload: &Workload) -> Option<Arc<Account>> {
        self.store.get(workload.service_account())
    }

    /// Drops the accounts that no pod uses any more.
    pub(super) fn forget_unused(&self) {
        self.store.forget_unused();
    }

    /// Returns the workload's account, by a live read if it is not known to have a role. Waits for the first list.
    pub(super) async fn get_or_read(
        &self,
        workload: &Workload,
        role_annotation: &str,
    ) -> Result<Arc<Account>, Refusal> {
        let name = workload.service_account();
        if name.name.is_empty() {
            return Err(Refusal::new(Reason::NoRole, format!("{workload} is a static pod: it has no service account")));
        }
        // Cannot fail: `self` owns the sender.
        let _ = self.synced.subscribe().wait_for(|synced| *synced).await;
        let no_role =
            || Refusal::new(Reason::NoRole, format!("service account {name} has no annotation {role_annotation}"));
        for _ in 0..MAX_READS {
            if let Some(account) = self.get(workload) {
                return Ok(account);
            }
            let Some(live) = &self.live else { return Err(no_role()) };
            if let ReadOutcome::Current(account) = live.read_shared(name, role_annotation).await? {
                return account.ok_or_else(no_role);
            }
        }
        self.get(workload).ok_or_else(|| unavailable(name, &"it changed during each read"))
    }

    /// Returns whether the caller must call [`Accounts::fetch`] for a newly bound pod.
    pub(super) fn begin_fetch(&self, workload: &Workload) -> bool {
        let name = workload.service_account();
        self.live.is_some() && !name.name.is_empty() && self.store.begin_fetch(name)
    }

    /// Reads an account until it is known, or until no pod uses it any more. Requests that arrive meanwhile start their own
    /// read: they must see an annotation that was added after this read began.
    pub(super) async fn fetch(&self, name: &ServiceAccountName, role_annotation: &str) {
        let Some(live) = &self.live else { return };
        let mut backoff = PREFETCH_BACKOFF;
        while !self.store.finish_fetch(name) {
            if let Err(refusal) = live.read_for_prefetch(name, role_annotation).await {
                warn!(error = %refusal.detail, "reading a service account for prefetch failed; retrying");
                sleep(backoff.pause()).await;
            }
        }
    }

    /// Follows the watch of all service accounts until dropped, and reports the effect of each event.
    pub async fn follow(&self, client: Client, role_annotation: &str, on_event: impl Fn(AccountEvent)) {
        let accounts: Api<PartialObjectMeta<ServiceAccount>> = Api::all(client);
        let mut watch = Watch::new("service accounts", accounts, None, ListMode::Paged);
        loop {
            let event = watch.next().await;
            on_event(self.apply(event, role_annotation));
        }
    }

    fn apply(&self, event: watcher::Event<PartialObjectMeta<ServiceAccount>>, role_annotation: &str) -> AccountEvent {
        match event {
            watcher::Event::Init => self.store.list_started(),
            watcher::Event::InitApply(account) | watcher::Event::Apply(account) => {
                let Some((name, account)) = parse_metadata(account.metadata, role_annotation) else {
                    return AccountEvent::Unchanged;
                };
                self.invalidate_live_read(&name);
                let changed = self.store.apply(&name, with_role(account, role_annotation));
                // The first list is reported as a whole.
                if changed && self.is_synced() {
                    return AccountEvent::Changed(name);
                }
            }
            watcher::Event::Delete(account) => {
                if let Some((name, _)) = parse_metadata(account.metadata, role_annotation) {
                    self.invalidate_live_read(&name);
                    self.store.apply(&name, None);
                }
            }
            watcher::Event::InitDone => {
                let unlisted = self.store.list_done();
                self.synced.send_replace(true);
                return AccountEvent::Synced(unlisted);
            }
        }
        AccountEvent::Unchanged
    }

    fn invalidate_live_read(&self, name: &ServiceAccountName) {
        if let Some(live) = &self.live {
            live.results.lock().remove(name);
        }
    }
}

impl LiveReads {
    fn new(client: Client, store: Arc<AccountStore>) -> Self {
        Self { client, store, results: Mutex::default(), prefetch_permits: Semaphore::new(MAX_PREFETCH_READS) }
    }

    /// Joins the read in flight or its cached result, or starts a read.
    async fn read_shared(&self, name: &ServiceAccountName, role_annotation: &str) -> Result<ReadOutcome, Refusal> {
        let result = {
            let mut results = self.results.lock();
            results.retain(|_, (started, result)| started.elapsed() < ttl(result.peek()));
            let start = || {
                let result = self.start(name.clone(), role_annotation.to_owned()).shared();
                // Polls the shared future even if all callers hang up, so that `peek` sees a failure.
                tokio::spawn(result.clone());
                (Instant::now(), result)
            };
            results.entry(name.clone()).or_insert_with(start).1.clone()
        };
        result.await
    }

    fn start(&self, name: ServiceAccountName, role_annotation: String) -> LiveRead {
        let (client, store, account) = (self.client.clone(), self.store.clone(), name.clone());
        let task = tokio::spawn(async move { read(client, &store, &account, &role_annotation).await });
        Box::pin(async move { task.await.unwrap_or_else(|error| Err(unavailable(&name, &error))) })
    }

    async fn read_for_prefetch(
        &self,
        name: &ServiceAccountName,
        role_annotation: &str,
    ) -> Result<ReadOutcome, Refusal> {
        // Cannot fail: the semaphore is never closed.
        let _permit = self.prefetch_permits.acquire().await;
        read(self.client.clone(), &self.store, name, role_annotation).await
    }
}

/// Returns how long a result is cached for requests. An account with a role is not cached here: the store has it.
fn ttl(result: Option<&Result<ReadOutcome, Refusal>>) -> Duration {
    match result {
        None | Some(Ok(ReadOutcome::Current(None))) => RESULT_TTL,
        Some(Err(_)) => FAILURE_TTL,
        Some(Ok(_)) => Duration::ZERO,
    }
}

async fn read(
    client: Client,
    store: &Arc<AccountStore>,
    name: &ServiceAccountName,
    role_annotation: &str,
) -> Result<ReadOutcome, Refusal> {
    let read = store.begin_read(name);
    let accounts: Api<ServiceAccount> = Api::namespaced(client, &name.namespace);
    let found = accounts.get_metadata_opt(&name.name).await.map_err(|error| unavailable(name, &error))?;
    let account = found.and_then(|found| parse_metadata(found.metadata, role_annotation));
    let account = account.and_then(|(_, account)| with_role(account, role_annotation)).map(Arc::new);
    Ok(if read.commit(account.clone()) { ReadOutcome::Current(account) } else { ReadOutcome::Superseded })
}

fn with_role(account: Account, role_annotation: &str) -> Option<Account> {
    Some(account).filter(|account| account.annotation(role_annotation).is_some())
}

fn unavailable(name: &ServiceAccountName, cause: &dyn std::fmt::Display) -> Refusal {
    Refusal::new(Reason::AccountUnavailable, format!("service account {name} could not be read: {cause}"))
}

/// Returns the filter for annotations of service accounts that clients of the API server receive.
pub fn keep(role_annotation: &str) -> AnnotationFilter {
    let role_annotation = role_annotation.to_owned();
    Arc::new(move |name| annotations::max_len(name, &role_annotation))
}

/// Returns an account's name, and the account with the annotations that kirsa reads. An account may have 256 KiB of
/// annotations: a user with write access in one namespace must not fill the memory of every agent.
fn parse_metadata(metadata: ObjectMeta, role_annotation: &str) -> Option<(ServiceAccountName, Account)> {
    let name = ServiceAccountName { namespace: metadata.namespace?.into(), name: metadata.name?.into() };
    let (mut kept, mut oversized) = (BTreeMap::new(), None);
    for (name, value) in metadata.annotations.unwrap_or_default() {
        let Some(max_len) = annotations::max_len(&name, role_annotation) else { continue };
        let length = value.len();
        kept.insert(name.clone(), if length <= max_len { value } else { String::new() });
        if length > max_len {
            oversized = Some((name, length));
        }
    }
    let uid = metadata.uid?.into();
    Some((name, Account { uid, annotations: kept, oversized, token_file: None, shared_key: OnceLock::new() }))
}

impl std::fmt::Debug for Accounts {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Accounts").finish_non_exhaustive()
    }
}

#[cfg(test)]
#[path = "accounts_tests.rs"]
mod tests;
