//! Service accounts and their annotations: from one cluster-wide, metadata-only watch of which only the accounts are kept
//! that pods of this node use, or from a workloads file.
//!
//! The watch does not repeat an account for the first pod that uses it: one live read does.
//!
//! Before a pod is told that it has no role, one live read decides: an annotation that was added a moment ago must not
//! cost a pod its start, since SDKs do not ask twice after a 404.

use std::{
    collections::{BTreeMap, HashMap},
    future::Future,
    path::PathBuf,
    pin::Pin,
    sync::{Arc, Mutex, OnceLock, PoisonError},
    time::Duration,
};

use futures::{FutureExt, future::Shared};
use k8s_openapi::{api::core::v1::ServiceAccount, apimachinery::pkg::apis::meta::v1::ObjectMeta};
use kube::{Api, Client, api::PartialObjectMeta, runtime::watcher};
use tokio::{
    sync::{Semaphore, watch},
    time::{Instant, sleep},
};
use tracing::warn;

use super::{
    Key,
    known::{InUse, Known},
    terms,
};
use crate::{
    attribute::{ServiceAccountName, Workload, file::FileWorkload},
    clock::Backoff,
    kubernetes::{
        slim::Keep,
        watch::{Listing, Watch},
    },
    refusal::{Reason, Refusal},
};

/// How long a live read's answer holds, unless the watch tells of the account before.
const LIVE_READ_HOLDS: Duration = Duration::from_secs(10);
/// The same of one that failed: pods that ask all the time must not be a load of an API server in trouble.
const FAILURE_HOLDS: Duration = Duration::from_secs(1);
/// Maximum number of reads for one request that newer events overtake.
const READS: usize = 3;
/// Maximum number of concurrent reads for pods that were bound: each may take a connection.
const LEARNING_READS: usize = 4;
const LEARNING_BACKOFF: Backoff = Backoff::new(Duration::from_millis(500), Duration::from_secs(30));

/// A service account, as far as it matters here.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Account {
    pub(super) uid: Arc<str>,
    annotations: BTreeMap<String, String>,
    /// An annotation that is longer than any that could be right, with its length: not kept, but refused.
    pub(super) too_long: Option<(String, usize)>,
    pub(super) token_file: Option<PathBuf>,
    /// The key that all pods of the account share, and whether it requires IMDSv2: read at the first request.
    pub(super) shared: OnceLock<(Arc<Key>, bool)>,
}

impl Account {
    pub(super) fn annotation(&self, name: &str) -> Option<&str> {
        self.annotations.get(name).map(String::as_str)
    }

    pub(super) fn says_the_same(&self, other: &Self) -> bool {
        self.uid == other.uid && self.annotations == other.annotations && self.too_long == other.too_long
    }

    #[cfg(any(test, fuzzing))]
    pub(crate) fn of_annotations<'a>(uid: &str, annotations: impl IntoIterator<Item = (&'a str, &'a str)>) -> Self {
        let annotations = annotations.into_iter().map(|(name, value)| (name.to_owned(), value.to_owned())).collect();
        Self { uid: uid.into(), annotations, too_long: None, token_file: None, shared: OnceLock::new() }
    }
}

/// What an event of the watch meant.
#[derive(Debug, PartialEq, Eq)]
pub enum Told {
    /// Every service account has been told of. With those that are in use and were not among them.
    All(Vec<ServiceAccountName>),
    /// This one, which is in use, has a role, or other terms, since now.
    Changed(ServiceAccountName),
    Nothing,
}

/// The service accounts of this node's pods.
pub struct Accounts {
    known: Arc<Known>,
    /// Whether all have been told of.
    read: watch::Sender<bool>,
    live: Option<Live>,
}

/// Live reads, each of which is under way once whoever waits for it, and goes on when nobody does.
struct Live {
    client: Client,
    known: Arc<Known>,
    /// For requests.
    answers: Mutex<HashMap<ServiceAccountName, (Instant, Shared<Reading>)>>,
    /// For pods that were bound.
    turns: Semaphore,
}

/// The result of a live read.
#[derive(Debug, Clone)]
enum Answer {
    /// `None`: the account has no role, or does not exist.
    Current(Option<Arc<Account>>),
    /// Something newer came in between.
    Overtaken,
}

type Reading = Pin<Box<dyn Future<Output = Result<Answer, Refusal>> + Send>>;

impl Accounts {
    /// Keeps the accounts for which `in_use` returns true: those that live pods of this node use.
    pub fn of_kubernetes(client: Client, in_use: impl Fn(&ServiceAccountName) -> bool + Send + Sync + 'static) -> Self {
        let known = Arc::new(Known::new(Box::new(in_use)));
        Self { live: Some(Live::new(client, known.clone())), ..Self::new(known) }
    }

    pub fn of_file() -> Self {
        // The file names the pods too.
        let in_use: InUse = Box::new(|_| true);
        Self::new(Arc::new(Known::new(in_use)))
    }

    fn new(known: Arc<Known>) -> Self {
        Self { known, read: watch::Sender::new(false), live: None }
    }

    /// Takes over what a workloads file says. `role_annotation` is where its `role` goes.
    pub fn replace(&self, workloads: &[FileWorkload], role_annotation: &str) {
        self.known.replace(workloads.iter().map(|workload| {
            let mut annotations = workload.annotations.clone();
            if let Some(role) = &workload.role {
                annotations.insert(role_annotation.to_owned(), role.clone());
            }
            let account = Account {
                uid: "".into(),
                annotations,
                too_long: None,
                token_file: workload.token_file.clone(),
                shared: OnceLock::new(),
            };
            (workload.pod.account.clone(), Arc::new(account))
        }));
        self.read.send_replace(true);
    }

    /// Whether all service accounts have been told of at least once.
    pub(super) fn are_read(&self) -> bool {
        *self.read.borrow()
    }

    pub(super) fn edition(&self) -> u64 {
        self.known.edition()
    }

    pub(super) fn annotated(&self, workload: &Workload) -> Option<Arc<Account>> {
        self.known.with_role(workload.service_account())
    }

    /// Drops the accounts that no pod uses any more.
    pub(super) fn forget_unused(&self) {
        self.known.forget_unused();
    }

    /// Waits while the service accounts are being read.
    pub(super) async fn find(&self, workload: &Workload, role_annotation: &str) -> Result<Arc<Account>, Refusal> {
        let name = workload.service_account();
        if name.name.is_empty() {
            return Err(Refusal::new(Reason::NoRole, format!("{workload} is a static pod: it has no service account")));
        }
        // The sender is held here: waiting cannot fail.
        let _ = self.read.subscribe().wait_for(|read| *read).await;
        let none =
            || Refusal::new(Reason::NoRole, format!("service account {name} has no annotation {role_annotation}"));
        for _ in 0..READS {
            if let Some(account) = self.annotated(workload) {
                return Ok(account);
            }
            let Some(live) = &self.live else { return Err(none()) };
            if let Answer::Current(account) = live.answer(name, role_annotation).await? {
                return account.ok_or_else(none);
            }
        }
        self.annotated(workload).ok_or_else(|| unreadable(name, &"it changes all the time"))
    }

    /// Returns whether [`Accounts::learn`] has to be called for a pod that was bound.
    pub(super) fn begin_learning(&self, workload: &Workload) -> bool {
        let name = workload.service_account();
        self.live.is_some() && !name.name.is_empty() && self.known.begin_learning(name)
    }

    /// Reads an account until it is known, or until no pod uses it any more. Requests that arrive meanwhile read for
    /// themselves: an annotation that was added after this read began counts for them.
    pub(super) async fn learn(&self, name: &ServiceAccountName, role_annotation: &str) {
        let Some(live) = &self.live else { return };
        let mut backoff = LEARNING_BACKOFF;
        while !self.known.end_learning(name) {
            if let Err(refusal) = live.learn(name, role_annotation).await {
                warn!(error = %refusal.detail, "prefetch waits for a service account; trying again");
                sleep(backoff.pause()).await;
            }
        }
    }

    /// Follows all service accounts until dropped, and passes on what each event meant.
    pub async fn follow(&self, client: Client, role_annotation: &str, told: impl Fn(Told)) {
        let accounts: Api<PartialObjectMeta<ServiceAccount>> = Api::all(client);
        let mut watch = Watch::new("service accounts", accounts, None, Listing::Pages);
        loop {
            let event = watch.next().await;
            told(self.apply(event, role_annotation));
        }
    }

    fn apply(&self, event: watcher::Event<PartialObjectMeta<ServiceAccount>>, role_annotation: &str) -> Told {
        match event {
            watcher::Event::Init => self.known.list_started(),
            watcher::Event::InitApply(account) | watcher::Event::Apply(account) => {
                let Some((name, account)) = slim(account.metadata, role_annotation) else { return Told::Nothing };
                self.forget_live(&name);
                let new = self.known.put(&name, with_role(account, role_annotation));
                // Of the first list, nothing is news.
                if new && self.are_read() {
                    return Told::Changed(name);
                }
            }
            watcher::Event::Delete(account) => {
                if let Some((name, _)) = slim(account.metadata, role_annotation) {
                    self.forget_live(&name);
                    self.known.put(&name, None);
                }
            }
            watcher::Event::InitDone => {
                let unlisted = self.known.list_done();
                self.read.send_replace(true);
                return Told::All(unlisted);
            }
        }
        Told::Nothing
    }

    fn forget_live(&self, name: &ServiceAccountName) {
        if let Some(live) = &self.live {
            live.answers.lock().unwrap_or_else(PoisonError::into_inner).remove(name);
        }
    }
}

impl Live {
    fn new(client: Client, known: Arc<Known>) -> Self {
        Self { client, known, answers: Mutex::default(), turns: Semaphore::new(LEARNING_READS) }
    }

    async fn answer(&self, name: &ServiceAccountName, role_annotation: &str) -> Result<Answer, Refusal> {
        let answer = {
            let mut answers = self.answers.lock().unwrap_or_else(PoisonError::into_inner);
            answers.retain(|_, (asked, answer)| asked.elapsed() < holds(answer.peek()));
            let begin = || {
                let answer = self.begin(name.clone(), role_annotation.to_owned()).shared();
                // It is known to have failed also where nobody waits for it any more.
                tokio::spawn(answer.clone());
                (Instant::now(), answer)
            };
            answers.entry(name.clone()).or_insert_with(begin).1.clone()
        };
        answer.await
    }

    fn begin(&self, name: ServiceAccountName, role_annotation: String) -> Reading {
        let (client, known, asked) = (self.client.clone(), self.known.clone(), name.clone());
        let read = tokio::spawn(async move { read(client, &known, &asked, &role_annotation).await });
        Box::pin(async move { read.await.unwrap_or_else(|error| Err(unreadable(&name, &error))) })
    }

    async fn learn(&self, name: &ServiceAccountName, role_annotation: &str) -> Result<Answer, Refusal> {
        // Never closed.
        let _turn = self.turns.acquire().await;
        read(self.client.clone(), &self.known, name, role_annotation).await
    }
}

/// How long the answer to requests holds. An account with a role is not kept here: it is known while it is used.
fn holds(answer: Option<&Result<Answer, Refusal>>) -> Duration {
    match answer {
        None | Some(Ok(Answer::Current(None))) => LIVE_READ_HOLDS,
        Some(Err(_)) => FAILURE_HOLDS,
        Some(Ok(_)) => Duration::ZERO,
    }
}

async fn read(
    client: Client,
    known: &Arc<Known>,
    name: &ServiceAccountName,
    role_annotation: &str,
) -> Result<Answer, Refusal> {
    let read = known.begin_read(name);
    let accounts: Api<ServiceAccount> = Api::namespaced(client, &name.namespace);
    let found = accounts.get_metadata_opt(&name.name).await.map_err(|error| unreadable(name, &error))?;
    let account = found.and_then(|found| slim(found.metadata, role_annotation));
    let account = account.and_then(|(_, account)| with_role(account, role_annotation)).map(Arc::new);
    Ok(if read.end(account.clone()) { Answer::Current(account) } else { Answer::Overtaken })
}

fn with_role(account: Account, role_annotation: &str) -> Option<Account> {
    Some(account).filter(|account| account.annotation(role_annotation).is_some())
}

fn unreadable(name: &ServiceAccountName, why: &dyn std::fmt::Display) -> Refusal {
    Refusal::new(Reason::AccountUnavailable, format!("service account {name} could not be read: {why}"))
}

/// The annotations of service accounts that clients of the API server receive.
pub fn keep(role_annotation: &str) -> Keep {
    let role_annotation = role_annotation.to_owned();
    Arc::new(move |name| terms::longest(name, &role_annotation))
}

/// An account's name, and of the account what is read of it: whoever may write service accounts in one namespace must
/// not fill every agent of the cluster with annotations of up to 256 KiB each.
fn slim(metadata: ObjectMeta, role_annotation: &str) -> Option<(ServiceAccountName, Account)> {
    let name = ServiceAccountName { namespace: metadata.namespace?.into(), name: metadata.name?.into() };
    let (mut annotations, mut too_long) = (BTreeMap::new(), None);
    for (name, value) in metadata.annotations.unwrap_or_default() {
        let Some(longest) = terms::longest(&name, role_annotation) else { continue };
        let length = value.len();
        annotations.insert(name.clone(), if length <= longest { value } else { String::new() });
        if length > longest {
            too_long = Some((name, length));
        }
    }
    let uid = metadata.uid?.into();
    Some((name, Account { uid, annotations, too_long, token_file: None, shared: OnceLock::new() }))
}

impl std::fmt::Debug for Accounts {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Accounts").finish_non_exhaustive()
    }
}

#[cfg(test)]
#[path = "accounts_tests.rs"]
mod tests;
