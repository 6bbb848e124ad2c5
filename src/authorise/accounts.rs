//! Service accounts and their annotations: from one cluster-wide, metadata-only watch of which only the annotated ones
//! are kept, or from a workloads file.
//!
//! Before a pod is told that it has no role, one live read decides: an annotation that was added a moment ago must not
//! cost a pod its start, since SDKs do not ask twice after a 404.

use std::{
    collections::{BTreeMap, HashMap, HashSet},
    future::Future,
    path::PathBuf,
    pin::Pin,
    sync::{
        Arc, Mutex, OnceLock, PoisonError, RwLock,
        atomic::{AtomicU64, Ordering},
    },
    time::Duration,
};

use futures::{FutureExt, future::Shared};
use k8s_openapi::{api::core::v1::ServiceAccount, apimachinery::pkg::apis::meta::v1::ObjectMeta};
use kube::{Api, Client, api::PartialObjectMeta, runtime::watcher};
use tokio::{sync::watch, time::Instant};

use super::{Key, terms};
use crate::{
    attribute::{ServiceAccountName, Workload, file::FileWorkload},
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

    fn says_the_same(&self, other: &Self) -> bool {
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
    /// Every service account has been told of.
    All,
    /// This one has a role, or other terms, since now.
    Changed(ServiceAccountName),
    Nothing,
}

/// What is known of service accounts.
pub struct Accounts {
    known: RwLock<Known>,
    /// Whether all have been told of.
    read: watch::Sender<bool>,
    /// How often what is known has changed.
    edition: AtomicU64,
    live: Option<Live>,
}

#[derive(Debug, Default)]
struct Known {
    /// Only those with a role.
    annotated: HashMap<ServiceAccountName, Arc<Account>>,
    listing: Option<HashSet<ServiceAccountName>>,
}

/// Live reads, each of which is under way once whoever waits for it, and goes on when nobody does.
struct Live {
    client: Client,
    answers: Mutex<HashMap<ServiceAccountName, (Instant, Shared<Reading>)>>,
}

/// `None` inside: there is no such account.
type Reading = Pin<Box<dyn Future<Output = Result<Option<Arc<Account>>, Refusal>> + Send>>;

impl Accounts {
    pub fn of_kubernetes(client: Client) -> Self {
        Self::new(Some(Live { client, answers: Mutex::default() }))
    }

    pub fn of_file() -> Self {
        Self::new(None)
    }

    fn new(live: Option<Live>) -> Self {
        Self { known: RwLock::default(), read: watch::Sender::new(false), edition: AtomicU64::new(0), live }
    }

    /// Takes over what a workloads file says. `role_annotation` is where its `role` goes.
    pub fn replace(&self, workloads: &[FileWorkload], role_annotation: &str) {
        let annotated = workloads.iter().map(|workload| {
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
        });
        let replaced = Known { annotated: annotated.collect(), listing: None };
        let mut known = self.known.write().unwrap_or_else(PoisonError::into_inner);
        *known = replaced;
        self.edition.fetch_add(1, Ordering::SeqCst);
        self.read.send_replace(true);
    }

    /// Whether all service accounts have been told of at least once.
    pub(super) fn are_read(&self) -> bool {
        *self.read.borrow()
    }

    pub(super) fn edition(&self) -> u64 {
        self.edition.load(Ordering::SeqCst)
    }

    pub(super) fn annotated(&self, workload: &Workload) -> Option<Arc<Account>> {
        let known = self.known.read().unwrap_or_else(PoisonError::into_inner);
        known.annotated.get(workload.service_account()).cloned()
    }

    /// Waits while the service accounts are being read.
    pub(super) async fn find(&self, workload: &Workload, role_annotation: &str) -> Result<Arc<Account>, Refusal> {
        let name = workload.service_account();
        if name.name.is_empty() {
            return Err(Refusal::new(Reason::NoRole, format!("{workload} is a static pod: it has no service account")));
        }
        // The sender is held here: waiting cannot fail.
        let _ = self.read.subscribe().wait_for(|read| *read).await;
        if let Some(account) = self.annotated(workload) {
            return Ok(account);
        }
        let none =
            || Refusal::new(Reason::NoRole, format!("service account {name} has no annotation {role_annotation}"));
        match &self.live {
            Some(live) => live.read(name, role_annotation).await?.ok_or_else(none),
            None => Err(none()),
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
        let mut known = self.known.write().unwrap_or_else(PoisonError::into_inner);
        // Nobody can read before this ends.
        self.edition.fetch_add(1, Ordering::SeqCst);
        match event {
            watcher::Event::Init => known.listing = Some(HashSet::new()),
            watcher::Event::InitApply(account) | watcher::Event::Apply(account) => {
                let Some((name, account)) = slim(account.metadata, role_annotation) else { return Told::Nothing };
                let account = Some(account).filter(|account| account.annotation(role_annotation).is_some());
                self.forget_live(&name);
                if let Some(listing) = &mut known.listing {
                    listing.insert(name.clone());
                }
                let Some(account) = account else {
                    known.annotated.remove(&name);
                    return Told::Nothing;
                };
                let before = known.annotated.get(&name);
                let same = before.is_some_and(|before| before.says_the_same(&account));
                if !same {
                    known.annotated.insert(name.clone(), Arc::new(account));
                    // Of the first list, nothing is news.
                    if self.are_read() {
                        return Told::Changed(name);
                    }
                }
            }
            watcher::Event::Delete(account) => {
                if let Some((name, _)) = slim(account.metadata, role_annotation) {
                    self.forget_live(&name);
                    known.annotated.remove(&name);
                }
            }
            watcher::Event::InitDone => {
                let listed = known.listing.take().unwrap_or_default();
                known.annotated.retain(|name, _| listed.contains(name));
                self.read.send_replace(true);
                return Told::All;
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
    async fn read(&self, name: &ServiceAccountName, role_annotation: &str) -> Result<Option<Arc<Account>>, Refusal> {
        let answer = {
            let mut answers = self.answers.lock().unwrap_or_else(PoisonError::into_inner);
            answers.retain(|_, (asked, answer)| {
                let failed = matches!(answer.peek(), Some(Err(_)));
                asked.elapsed() < if failed { FAILURE_HOLDS } else { LIVE_READ_HOLDS }
            });
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
        let accounts: Api<ServiceAccount> = Api::namespaced(self.client.clone(), &name.namespace);
        let asked = name.clone();
        let read = tokio::spawn(async move { accounts.get_metadata_opt(&asked.name).await });
        Box::pin(async move {
            let found = match read.await {
                Ok(Ok(found)) => found,
                Ok(Err(error)) => return Err(unreadable(&name, &error)),
                Err(error) => return Err(unreadable(&name, &error)),
            };
            let read = |found: PartialObjectMeta<_>| slim(found.metadata, &role_annotation);
            Ok(found.and_then(read).map(|(_, account)| Arc::new(account)))
        })
    }
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
mod tests {
    use std::{convert::Infallible, sync::atomic::AtomicUsize};

    use http::{Request, Response};
    use kube::client::Body;

    use super::*;
    use crate::authorise::terms::{Defaults, Terms};

    /// An API server that takes 50 ms, and says 500 as often as it is told to.
    fn server(failures: usize) -> (Arc<AtomicUsize>, Client) {
        let asked = Arc::new(AtomicUsize::new(0));
        let counted = asked.clone();
        let service = tower::service_fn(move |_: Request<Body>| {
            let number = counted.fetch_add(1, Ordering::SeqCst);
            async move {
                tokio::time::sleep(Duration::from_millis(50)).await;
                let found = serde_json::json!({"kind": "PartialObjectMetadata", "apiVersion": "meta.k8s.io/v1",
                    "metadata": {"name": "reader", "namespace": "default", "uid": "uid-1"}});
                let (status, body) = if number < failures {
                    (500, serde_json::json!({"kind": "Status", "apiVersion": "v1", "metadata": {}, "code": 500}))
                } else {
                    (200, found)
                };
                let answer = Response::builder().status(status).body(Body::from(body.to_string().into_bytes()));
                Ok::<_, Infallible>(answer.unwrap())
            }
        });
        (asked, Client::new(service, "default"))
    }

    const ROLE: &str = "eks.amazonaws.com/role-arn";

    fn name() -> ServiceAccountName {
        ServiceAccountName { namespace: "default".into(), name: "reader".into() }
    }

    #[tokio::test(start_paused = true)]
    async fn a_live_read_is_one_whoever_waits_and_goes_on_when_all_of_them_hang_up() {
        let (asked, client) = server(0);
        let live = Live { client, answers: Mutex::default() };
        for _ in 0..3 {
            let patience = Duration::from_millis(10);
            assert!(tokio::time::timeout(patience, live.read(&name(), ROLE)).await.is_err(), "hangs up");
        }
        assert!(live.read(&name(), ROLE).await.unwrap().is_some());
        assert_eq!(asked.load(Ordering::SeqCst), 1);
    }

    #[tokio::test(start_paused = true)]
    async fn a_live_read_that_failed_is_the_answer_to_all_for_a_moment() {
        let (asked, client) = server(1);
        let live = Live { client, answers: Mutex::default() };
        let names: Vec<_> = (0..20).map(|_| name()).collect();
        for answer in futures::future::join_all(names.iter().map(|name| live.read(name, ROLE))).await {
            assert_eq!(answer.unwrap_err().reason, Reason::AccountUnavailable);
        }
        assert!(live.read(&name(), ROLE).await.is_err());
        assert_eq!(asked.load(Ordering::SeqCst), 1, "each of them would have asked in its turn");
        tokio::time::advance(FAILURE_HOLDS).await;
        assert!(live.read(&name(), ROLE).await.unwrap().is_some());
    }

    /// Where nobody polled it, one that failed was remembered as if it had not.
    #[tokio::test(start_paused = true)]
    async fn a_live_read_that_failed_after_all_hung_up_is_not_the_answer_for_long() {
        let (asked, client) = server(1);
        let live = Live { client, answers: Mutex::default() };
        let patience = Duration::from_millis(10);
        assert!(tokio::time::timeout(patience, live.read(&name(), ROLE)).await.is_err(), "hangs up");
        tokio::time::sleep(FAILURE_HOLDS).await;
        assert!(live.read(&name(), ROLE).await.unwrap().is_some());
        assert_eq!(asked.load(Ordering::SeqCst), 2);
    }

    /// Whoever may write service accounts in one namespace may not fill the memory of every agent.
    #[test]
    fn of_annotations_only_what_is_read_is_kept_and_none_that_is_too_long() {
        let told = |annotations: &[(&str, &str)]| {
            let own = |(name, value): &(&str, &str)| ((*name).to_owned(), (*value).to_owned());
            let metadata = ObjectMeta {
                namespace: Some("default".into()),
                name: Some("reader".into()),
                uid: Some("uid-1".into()),
                annotations: Some(annotations.iter().map(own).collect()),
                ..ObjectMeta::default()
            };
            slim(metadata, ROLE).unwrap().1
        };
        let junk = "x".repeat(200 << 10);
        let role = "arn:aws:iam::111122223333:role/reader";
        let kept = told(&[
            (ROLE, role),
            ("kirsa.dev/session-scope", "pod"),
            ("kirsa.dev/junk", &junk),
            ("eks.amazonaws.com/junk", &junk),
            ("kirsa.dev/role-arn", &junk),
            ("other/role-arn", &junk),
            ("role-arn", &junk),
            ("junk", &junk),
        ]);
        assert_eq!(kept.annotations.keys().collect::<Vec<_>>(), [ROLE, "kirsa.dev/session-scope"]);
        assert_eq!(kept.too_long, None);
        let defaults = Defaults::sample();
        assert!(Terms::read(&kept, &defaults).unwrap().is_some());
        for long in [ROLE, "kirsa.dev/session-policy", "kirsa.dev/session-policy-arns", "eks.amazonaws.com/audience"] {
            let mut annotations = vec![(ROLE, role)];
            annotations.retain(|(name, _)| *name != long);
            annotations.push((long, &junk));
            let account = told(&annotations);
            assert!(account.annotations.values().map(String::len).sum::<usize>() < 100, "{long}");
            let wrong = Terms::read(&account, &defaults).unwrap_err();
            assert!(wrong.contains(long) && wrong.contains("204800 bytes") && wrong.len() < 200, "{wrong}");
        }
        assert_eq!(Terms::read(&told(&[("kirsa.dev/session-policy", &junk)]), &defaults), Ok(None), "has no role");
    }

    /// Told of service accounts, whoever waited has the answer: SDKs that ask once get no other.
    #[tokio::test(start_paused = true)]
    async fn who_asks_while_the_service_accounts_are_read_waits_for_them() {
        let accounts = Accounts::of_file();
        let workload = Workload::sample("a", "uid-a", "reader");
        let asked = accounts.find(&workload, ROLE);
        tokio::pin!(asked);
        assert!(futures::poll!(&mut asked).is_pending() && !accounts.are_read());
        accounts.replace(&[], ROLE);
        assert_eq!(asked.await.unwrap_err().reason, Reason::NoRole);
    }
}
