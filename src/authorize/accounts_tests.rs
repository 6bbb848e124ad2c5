use std::{
    convert::Infallible,
    sync::atomic::{AtomicBool, AtomicUsize, Ordering},
};

use http::{Request, Response};
use kube::client::Body;

use super::*;
use crate::authorize::annotations::{Defaults, SessionAnnotations};

/// Returns an API server that takes 50 ms and fails the first `failures` requests with 500.
fn server(failures: usize) -> (Arc<AtomicUsize>, Client) {
    server_with_role(move |number| if number < failures { None } else { Some(Some("role")) })
}

/// Returns an API server that takes 50 ms, with one service account whose role depends on the number of the request.
/// `None`: status 500. `Some(None)`: the account has no role.
fn server_with_role(
    role: impl Fn(usize) -> Option<Option<&'static str>> + Send + Sync + 'static,
) -> (Arc<AtomicUsize>, Client) {
    let requests = Arc::new(AtomicUsize::new(0));
    let (counted, role) = (requests.clone(), Arc::new(role));
    let service = tower::service_fn(move |_: Request<Body>| {
        let (number, role) = (counted.fetch_add(1, Ordering::SeqCst), role.clone());
        async move {
            tokio::time::sleep(Duration::from_millis(50)).await;
            let (status, body) = match role(number) {
                None => (500, serde_json::json!({"kind": "Status", "apiVersion": "v1", "metadata": {}, "code": 500})),
                Some(role) => (200, serde_json::to_value(object(role)).unwrap()),
            };
            let response = Response::builder().status(status).body(Body::from(body.to_string().into_bytes()));
            Ok::<_, Infallible>(response.unwrap())
        }
    });
    (requests, Client::new(service, "default"))
}

fn object(role: Option<&str>) -> PartialObjectMeta<ServiceAccount> {
    let metadata = serde_json::json!({"name": "reader", "namespace": "default", "uid": "uid-1",
        "annotations": role.map(|role| BTreeMap::from([(ROLE, role)]))});
    serde_json::from_value(serde_json::json!({"kind": "PartialObjectMetadata", "apiVersion": "meta.k8s.io/v1",
        "metadata": metadata}))
    .unwrap()
}

/// Returns accounts after an empty list, and a flag for whether pods use them.
fn accounts(client: Client) -> (Arc<Accounts>, Arc<AtomicBool>) {
    let used = Arc::new(AtomicBool::new(true));
    let in_use = used.clone();
    let accounts = Arc::new(Accounts::for_kubernetes(client, move |_| in_use.load(Ordering::SeqCst)));
    accounts.apply(watcher::Event::Init, ROLE);
    assert_eq!(accounts.apply(watcher::Event::InitDone, ROLE), AccountEvent::Synced(Vec::new()));
    (accounts, used)
}

const ROLE: &str = "eks.amazonaws.com/role-arn";

fn workload() -> Workload {
    Workload::sample("a", "uid-a", "reader")
}

fn name() -> ServiceAccountName {
    workload().service_account().clone()
}

async fn role(accounts: &Accounts) -> Result<String, Reason> {
    let account = accounts.get_or_read(&workload(), ROLE).await;
    account.map(|account| account.annotations[ROLE].clone()).map_err(|refusal| refusal.reason)
}

#[tokio::test(start_paused = true)]
async fn live_read_is_shared_and_survives_hang_ups() {
    let (requests, client) = server(0);
    let (accounts, _) = accounts(client);
    for _ in 0..3 {
        let timeout = Duration::from_millis(10);
        assert!(tokio::time::timeout(timeout, role(&accounts)).await.is_err(), "hangs up");
    }
    assert_eq!(role(&accounts).await.as_deref(), Ok("role"));
    assert_eq!(requests.load(Ordering::SeqCst), 1);
}

#[tokio::test(start_paused = true)]
async fn failed_live_read_is_cached_briefly() {
    let (requests, client) = server(1);
    let (accounts, _) = accounts(client);
    for result in futures::future::join_all((0..20).map(|_| role(&accounts))).await {
        assert_eq!(result, Err(Reason::AccountUnavailable));
    }
    assert!(role(&accounts).await.is_err());
    assert_eq!(requests.load(Ordering::SeqCst), 1, "all callers share one read");
    tokio::time::advance(FAILURE_TTL).await;
    assert!(role(&accounts).await.is_ok());
}

/// A shared future that nobody polls never shows its failure.
#[tokio::test(start_paused = true)]
async fn failure_after_hang_ups_expires_too() {
    let (requests, client) = server(1);
    let (accounts, _) = accounts(client);
    let timeout = Duration::from_millis(10);
    assert!(tokio::time::timeout(timeout, role(&accounts)).await.is_err(), "hangs up");
    tokio::time::sleep(FAILURE_TTL).await;
    assert!(role(&accounts).await.is_ok());
    assert_eq!(requests.load(Ordering::SeqCst), 2);
}

/// Otherwise a session whose account only a live read has shown would be dropped after a minute.
#[tokio::test(start_paused = true)]
async fn live_read_stores_the_account() {
    let (requests, client) = server(0);
    let (accounts, used) = accounts(client);
    assert!(role(&accounts).await.is_ok());
    assert!(accounts.get(&workload()).is_some());
    used.store(false, Ordering::SeqCst);
    accounts.forget_unused();
    assert!(accounts.get(&workload()).is_none());
    // The next pod causes a new read: a cached result would not store the account again.
    used.store(true, Ordering::SeqCst);
    assert!(role(&accounts).await.is_ok() && accounts.get(&workload()).is_some());
    assert_eq!(requests.load(Ordering::SeqCst), 2);
}

#[tokio::test(start_paused = true)]
async fn superseded_read_is_repeated() {
    // The role is removed while the first response is in flight.
    let (requests, client) = server_with_role(|number| Some((number == 0).then_some("stale")));
    let (accounts, _) = accounts(client);
    let deletes = async {
        tokio::time::sleep(Duration::from_millis(10)).await;
        assert_eq!(accounts.apply(watcher::Event::Delete(object(Some("stale"))), ROLE), AccountEvent::Unchanged);
    };
    assert_eq!(tokio::join!(role(&accounts), deletes).0, Err(Reason::NoRole));
    assert_eq!(requests.load(Ordering::SeqCst), 2);
    assert_eq!(accounts.get(&workload()), None);
}

#[tokio::test(start_paused = true)]
async fn reads_of_a_changing_account_are_bounded() {
    let (requests, client) = server_with_role(|_| Some(None));
    let (accounts, _) = accounts(client);
    let changes = async {
        loop {
            tokio::time::sleep(Duration::from_millis(10)).await;
            accounts.apply(watcher::Event::Apply(object(None)), ROLE);
        }
    };
    let result = tokio::select! { result = role(&accounts) => result, () = changes => unreachable!() };
    assert_eq!(result, Err(Reason::AccountUnavailable), "never a 404, which is final");
    assert_eq!(requests.load(Ordering::SeqCst), MAX_READS);
}

#[tokio::test(start_paused = true)]
async fn events_of_unused_accounts_are_ignored() {
    let (accounts, used) = accounts(server(0).1);
    used.store(false, Ordering::SeqCst);
    assert_eq!(accounts.apply(watcher::Event::Apply(object(Some("role"))), ROLE), AccountEvent::Unchanged);
    assert_eq!(accounts.get(&workload()), None);
    used.store(true, Ordering::SeqCst);
    assert_eq!(accounts.apply(watcher::Event::Apply(object(Some("role"))), ROLE), AccountEvent::Changed(name()));
    assert!(accounts.get(&workload()).is_some());
}

#[tokio::test(start_paused = true)]
async fn fetch_retries_until_the_account_is_known() {
    let (requests, client) = server(3);
    let (accounts, _) = accounts(client);
    assert!(accounts.begin_fetch(&workload()) && !accounts.begin_fetch(&workload()));
    accounts.fetch(&name(), ROLE).await;
    assert!(accounts.get(&workload()).is_some() && !accounts.begin_fetch(&workload()));
    assert_eq!(requests.load(Ordering::SeqCst), 4);
}

#[tokio::test(start_paused = true)]
async fn fetch_ends_with_the_last_pod() {
    let (requests, client) = server(usize::MAX);
    let (accounts, used) = accounts(client);
    assert!(accounts.begin_fetch(&workload()));
    let last_pod_ends = async {
        tokio::time::sleep(Duration::from_secs(600)).await;
        used.store(false, Ordering::SeqCst);
    };
    let name = name();
    tokio::join!(accounts.fetch(&name, ROLE), last_pod_ends);
    let reads = requests.load(Ordering::SeqCst);
    assert!((20..60).contains(&reads), "{reads} reads in ten minutes of an outage");
    used.store(true, Ordering::SeqCst);
    assert!(accounts.begin_fetch(&workload()), "the next pod starts a new fetch");
}

/// A request starts its own read even if a prefetch has just found no role.
#[tokio::test(start_paused = true)]
async fn fetch_result_is_not_cached_for_requests() {
    let (requests, client) = server_with_role(|number| Some((number > 0).then_some("added")));
    let (accounts, _) = accounts(client);
    assert!(accounts.begin_fetch(&workload()));
    accounts.fetch(&name(), ROLE).await;
    assert!(!accounts.begin_fetch(&workload()), "the account is known to have no role");
    assert_eq!(role(&accounts).await.as_deref(), Ok("added"));
    assert_eq!(requests.load(Ordering::SeqCst), 2);
}

/// A user with write access in one namespace must not fill the memory of every agent.
#[test]
fn unread_and_oversized_annotations_are_dropped() {
    let parse = |annotations: &[(&str, &str)]| {
        let own = |(name, value): &(&str, &str)| ((*name).to_owned(), (*value).to_owned());
        let metadata = ObjectMeta {
            namespace: Some("default".into()),
            name: Some("reader".into()),
            uid: Some("uid-1".into()),
            annotations: Some(annotations.iter().map(own).collect()),
            ..ObjectMeta::default()
        };
        parse_metadata(metadata, ROLE).unwrap().1
    };
    let junk = "x".repeat(200 << 10);
    let role = "arn:aws:iam::111122223333:role/reader";
    let kept = parse(&[
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
    assert_eq!(kept.oversized, None);
    let defaults = Defaults::sample();
    assert!(SessionAnnotations::parse(&kept, &defaults).unwrap().is_some());
    for long in [ROLE, "kirsa.dev/session-policy", "kirsa.dev/session-policy-arns", "eks.amazonaws.com/audience"] {
        let mut annotations = vec![(ROLE, role)];
        annotations.retain(|(name, _)| *name != long);
        annotations.push((long, &junk));
        let account = parse(&annotations);
        assert!(account.annotations.values().map(String::len).sum::<usize>() < 100, "{long}");
        let error = SessionAnnotations::parse(&account, &defaults).unwrap_err();
        assert!(error.contains(long) && error.contains("204800 bytes") && error.len() < 200, "{error}");
    }
    assert_eq!(
        SessionAnnotations::parse(&parse(&[("kirsa.dev/session-policy", &junk)]), &defaults),
        Ok(None),
        "has no role"
    );
}

/// SDKs do not retry after a 404, so a request waits for the first list.
#[tokio::test(start_paused = true)]
async fn request_waits_for_the_first_list() {
    let accounts = Accounts::for_file();
    let workload = workload();
    let request = accounts.get_or_read(&workload, ROLE);
    tokio::pin!(request);
    assert!(futures::poll!(&mut request).is_pending() && !accounts.is_synced());
    accounts.replace(&[], ROLE);
    assert_eq!(request.await.unwrap_err().reason, Reason::NoRole);
}
