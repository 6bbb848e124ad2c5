use std::{
    convert::Infallible,
    sync::atomic::{AtomicBool, AtomicUsize, Ordering},
};

use http::{Request, Response};
use kube::client::Body;

use super::*;
use crate::authorise::terms::{Defaults, Terms};

/// An API server that takes 50 ms, and says 500 as often as it is told to.
fn server(failures: usize) -> (Arc<AtomicUsize>, Client) {
    answering(move |number| if number < failures { None } else { Some(Some("role")) })
}

/// An API server that takes 50 ms, with one service account whose role depends on the number of the request. `None`:
/// 500. `Some(None)`: the account has no role.
fn answering(
    role: impl Fn(usize) -> Option<Option<&'static str>> + Send + Sync + 'static,
) -> (Arc<AtomicUsize>, Client) {
    let asked = Arc::new(AtomicUsize::new(0));
    let (counted, role) = (asked.clone(), Arc::new(role));
    let service = tower::service_fn(move |_: Request<Body>| {
        let (number, role) = (counted.fetch_add(1, Ordering::SeqCst), role.clone());
        async move {
            tokio::time::sleep(Duration::from_millis(50)).await;
            let (status, body) = match role(number) {
                None => (500, serde_json::json!({"kind": "Status", "apiVersion": "v1", "metadata": {}, "code": 500})),
                Some(role) => (200, serde_json::to_value(object(role)).unwrap()),
            };
            let answer = Response::builder().status(status).body(Body::from(body.to_string().into_bytes()));
            Ok::<_, Infallible>(answer.unwrap())
        }
    });
    (asked, Client::new(service, "default"))
}

fn object(role: Option<&str>) -> PartialObjectMeta<ServiceAccount> {
    let metadata = serde_json::json!({"name": "reader", "namespace": "default", "uid": "uid-1",
        "annotations": role.map(|role| BTreeMap::from([(ROLE, role)]))});
    serde_json::from_value(serde_json::json!({"kind": "PartialObjectMetadata", "apiVersion": "meta.k8s.io/v1",
        "metadata": metadata}))
    .unwrap()
}

/// Accounts after an empty list, and whether pods use them.
fn accounts(client: Client) -> (Arc<Accounts>, Arc<AtomicBool>) {
    let used = Arc::new(AtomicBool::new(true));
    let in_use = used.clone();
    let accounts = Arc::new(Accounts::of_kubernetes(client, move |_| in_use.load(Ordering::SeqCst)));
    accounts.apply(watcher::Event::Init, ROLE);
    assert_eq!(accounts.apply(watcher::Event::InitDone, ROLE), Told::All(Vec::new()));
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
    let found = accounts.find(&workload(), ROLE).await;
    found.map(|account| account.annotations[ROLE].clone()).map_err(|refusal| refusal.reason)
}

#[tokio::test(start_paused = true)]
async fn a_live_read_is_one_whoever_waits_and_goes_on_when_all_of_them_hang_up() {
    let (asked, client) = server(0);
    let (accounts, _) = accounts(client);
    for _ in 0..3 {
        let patience = Duration::from_millis(10);
        assert!(tokio::time::timeout(patience, role(&accounts)).await.is_err(), "hangs up");
    }
    assert_eq!(role(&accounts).await.as_deref(), Ok("role"));
    assert_eq!(asked.load(Ordering::SeqCst), 1);
}

#[tokio::test(start_paused = true)]
async fn a_live_read_that_failed_is_the_answer_to_all_for_a_moment() {
    let (asked, client) = server(1);
    let (accounts, _) = accounts(client);
    for answer in futures::future::join_all((0..20).map(|_| role(&accounts))).await {
        assert_eq!(answer, Err(Reason::AccountUnavailable));
    }
    assert!(role(&accounts).await.is_err());
    assert_eq!(asked.load(Ordering::SeqCst), 1, "each of them would have asked in its turn");
    tokio::time::advance(FAILURE_HOLDS).await;
    assert!(role(&accounts).await.is_ok());
}

/// Where nobody polled it, one that failed was remembered as if it had not.
#[tokio::test(start_paused = true)]
async fn a_live_read_that_failed_after_all_hung_up_is_not_the_answer_for_long() {
    let (asked, client) = server(1);
    let (accounts, _) = accounts(client);
    let patience = Duration::from_millis(10);
    assert!(tokio::time::timeout(patience, role(&accounts)).await.is_err(), "hangs up");
    tokio::time::sleep(FAILURE_HOLDS).await;
    assert!(role(&accounts).await.is_ok());
    assert_eq!(asked.load(Ordering::SeqCst), 2);
}

/// A session whose account is known by a live read alone would be dropped after a minute.
#[tokio::test(start_paused = true)]
async fn a_live_read_makes_an_account_known() {
    let (asked, client) = server(0);
    let (accounts, used) = accounts(client);
    assert!(role(&accounts).await.is_ok());
    assert!(accounts.annotated(&workload()).is_some());
    used.store(false, Ordering::SeqCst);
    accounts.forget_unused();
    assert!(accounts.annotated(&workload()).is_none());
    // The former answer is not for the next pod, which would not make the account known again.
    used.store(true, Ordering::SeqCst);
    assert!(role(&accounts).await.is_ok() && accounts.annotated(&workload()).is_some());
    assert_eq!(asked.load(Ordering::SeqCst), 2);
}

#[tokio::test(start_paused = true)]
async fn a_read_that_an_event_overtakes_is_repeated() {
    // The role goes while the first answer is on its way.
    let (asked, client) = answering(|number| Some((number == 0).then_some("stale")));
    let (accounts, _) = accounts(client);
    let deletes = async {
        tokio::time::sleep(Duration::from_millis(10)).await;
        assert_eq!(accounts.apply(watcher::Event::Delete(object(Some("stale"))), ROLE), Told::Nothing);
    };
    assert_eq!(tokio::join!(role(&accounts), deletes).0, Err(Reason::NoRole));
    assert_eq!(asked.load(Ordering::SeqCst), 2);
    assert_eq!(accounts.annotated(&workload()), None);
}

#[tokio::test(start_paused = true)]
async fn an_account_that_keeps_changing_is_no_endless_loop() {
    let (asked, client) = answering(|_| Some(None));
    let (accounts, _) = accounts(client);
    let changes = async {
        loop {
            tokio::time::sleep(Duration::from_millis(10)).await;
            accounts.apply(watcher::Event::Apply(object(None)), ROLE);
        }
    };
    let answer = tokio::select! { answer = role(&accounts) => answer, () = changes => unreachable!() };
    assert_eq!(answer, Err(Reason::AccountUnavailable), "never a 404, which is final");
    assert_eq!(asked.load(Ordering::SeqCst), READS);
}

/// Without a pod of the account, an event is no news, and leaves nothing behind.
#[tokio::test(start_paused = true)]
async fn events_of_unused_accounts_are_no_news() {
    let (accounts, used) = accounts(server(0).1);
    used.store(false, Ordering::SeqCst);
    assert_eq!(accounts.apply(watcher::Event::Apply(object(Some("role"))), ROLE), Told::Nothing);
    assert_eq!(accounts.annotated(&workload()), None);
    used.store(true, Ordering::SeqCst);
    assert_eq!(accounts.apply(watcher::Event::Apply(object(Some("role"))), ROLE), Told::Changed(name()));
    assert!(accounts.annotated(&workload()).is_some());
}

#[tokio::test(start_paused = true)]
async fn accounts_of_new_pods_are_read_until_known() {
    let (asked, client) = server(3);
    let (accounts, _) = accounts(client);
    assert!(accounts.begin_learning(&workload()) && !accounts.begin_learning(&workload()));
    accounts.learn(&name(), ROLE).await;
    assert!(accounts.annotated(&workload()).is_some() && !accounts.begin_learning(&workload()));
    assert_eq!(asked.load(Ordering::SeqCst), 4);
}

#[tokio::test(start_paused = true)]
async fn learning_ends_with_the_last_pod() {
    let (asked, client) = server(usize::MAX);
    let (accounts, used) = accounts(client);
    assert!(accounts.begin_learning(&workload()));
    let goes = async {
        tokio::time::sleep(Duration::from_secs(600)).await;
        used.store(false, Ordering::SeqCst);
    };
    let name = name();
    tokio::join!(accounts.learn(&name, ROLE), goes);
    let asked = asked.load(Ordering::SeqCst);
    assert!((20..60).contains(&asked), "{asked} reads in ten minutes of an outage");
    used.store(true, Ordering::SeqCst);
    assert!(accounts.begin_learning(&workload()), "the next pod's turn");
}

/// That a read for a prefetch found no role is not the answer to a request that comes later.
#[tokio::test(start_paused = true)]
async fn learning_answers_no_request() {
    let (asked, client) = answering(|number| Some((number > 0).then_some("added")));
    let (accounts, _) = accounts(client);
    assert!(accounts.begin_learning(&workload()));
    accounts.learn(&name(), ROLE).await;
    assert!(!accounts.begin_learning(&workload()), "that it has no role is known");
    assert_eq!(role(&accounts).await.as_deref(), Ok("added"));
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
    let workload = workload();
    let asked = accounts.find(&workload, ROLE);
    tokio::pin!(asked);
    assert!(futures::poll!(&mut asked).is_pending() && !accounts.are_read());
    accounts.replace(&[], ROLE);
    assert_eq!(asked.await.unwrap_err().reason, Reason::NoRole);
}
