use parking_lot::Mutex;

use super::*;

const ROLE: &str = "eks.amazonaws.com/role-arn";

fn name(name: &str) -> ServiceAccountName {
    ServiceAccountName { namespace: "default".into(), name: name.into() }
}

fn account(uid: &str, role: &str) -> Account {
    Account::from_annotations(uid, [(ROLE, role)])
}

type Pods = Arc<Mutex<HashSet<ServiceAccountName>>>;

/// Returns a store on a node with one pod, of service account `used`.
fn store() -> (Arc<AccountStore>, Pods) {
    let pods = Pods::new(Mutex::new(HashSet::from([name("used")])));
    let used = pods.clone();
    (Arc::new(AccountStore::new(Box::new(move |name| used.lock().contains(name)))), pods)
}

fn len(store: &AccountStore) -> usize {
    store.read().accounts.len()
}

fn role(store: &AccountStore, account: &str) -> Option<String> {
    store.get(&name(account)).and_then(|account| account.annotation(ROLE).map(str::to_owned))
}

#[test]
fn only_accounts_in_use_are_kept() {
    let (store, _) = store();
    store.list_started();
    for other in 0..1_000 {
        assert!(!store.apply(&name(&format!("other-{other}")), Some(account("uid", "other"))));
    }
    assert!(store.apply(&name("used"), Some(account("uid", "role"))));
    assert_eq!(store.read().listed.as_ref().map(HashSet::len), Some(1), "names of other accounts are not kept either");
    assert_eq!(store.list_done(), []);
    let before = store.generation();
    assert!(!store.apply(&name("other-1"), Some(account("uid", "changed"))));
    assert!(!store.apply(&name("other-1"), None));
    assert_eq!((len(&store), store.generation()), (1, before), "changes of other accounts are ignored");
    assert_eq!(role(&store, "used").as_deref(), Some("role"));
}

#[test]
fn accounts_are_dropped_with_their_last_pod() {
    let (store, pods) = store();
    pods.lock().insert(name("other"));
    store.apply(&name("used"), Some(account("uid-1", "role")));
    store.apply(&name("other"), None);
    let before = store.generation();
    store.forget_unused();
    assert_eq!((len(&store), store.generation()), (2, before));
    pods.lock().clear();
    store.forget_unused();
    assert_eq!(len(&store), 0);
    assert_ne!(store.generation(), before, "connections must drop their cached grant");
    // The next event drops an unused account too.
    pods.lock().insert(name("used"));
    store.apply(&name("used"), Some(account("uid-1", "role")));
    pods.lock().clear();
    assert!(!store.apply(&name("used"), Some(account("uid-1", "changed"))));
    assert_eq!(len(&store), 0);
}

#[test]
fn read_that_began_after_the_event_is_kept() {
    let (store, pods) = store();
    // The event comes before the pod, and the read that the pod causes after it.
    assert!(!store.apply(&name("new"), Some(account("uid-1", "role"))));
    pods.lock().insert(name("new"));
    assert!(store.begin_fetch(&name("new")));
    assert!(!store.begin_fetch(&name("new")), "one fetch for all pods of an account");
    assert!(!store.finish_fetch(&name("new")));
    assert!(store.begin_read(&name("new")).commit(Some(Arc::new(account("uid-1", "role")))));
    assert!(store.finish_fetch(&name("new")));
    assert_eq!(role(&store, "new").as_deref(), Some("role"));
    assert!(!store.begin_fetch(&name("new")));
    assert!(!store.apply(&name("new"), Some(account("uid-1", "role"))), "the watch repeats it");
    assert!(store.apply(&name("new"), Some(account("uid-1", "changed"))));
}

#[test]
fn superseded_reads_are_discarded() {
    let (store, pods) = store();
    let stale = || Some(Arc::new(account("uid-1", "stale")));

    let read = store.begin_read(&name("used"));
    store.apply(&name("used"), Some(account("uid-1", "role")));
    store.apply(&name("used"), None);
    assert!(!read.commit(stale()));
    assert_eq!(role(&store, "used"), None, "the account was deleted during the read");

    let read = store.begin_read(&name("used"));
    store.apply(&name("used"), Some(account("uid-2", "role")));
    assert!(!read.commit(stale()));
    assert_eq!(role(&store, "used").as_deref(), Some("role"), "the account was changed during the read");

    let (older, newer) = (store.begin_read(&name("used")), store.begin_read(&name("used")));
    assert!(newer.commit(Some(Arc::new(account("uid-2", "newer")))));
    assert!(!older.commit(None));
    assert_eq!(role(&store, "used").as_deref(), Some("newer"), "a later read supersedes an earlier one");

    // A deletion counts even while no pod uses the account.
    pods.lock().clear();
    let read = store.begin_read(&name("used"));
    store.apply(&name("used"), None);
    pods.lock().insert(name("used"));
    assert!(!read.commit(stale()));
    assert_eq!(role(&store, "used"), None);

    // An event of another account supersedes nothing.
    let read = store.begin_read(&name("used"));
    store.apply(&name("other"), None);
    assert!(read.commit(stale()));
}

#[test]
fn reads_older_than_a_list_are_discarded() {
    let (store, pods) = store();
    store.apply(&name("used"), Some(account("uid-1", "role")));
    store.list_started();
    let during = store.begin_read(&name("used"));
    // Deleted while the watch was down: the list does not show it, and no event follows.
    assert!(during.commit(Some(Arc::new(account("uid-1", "role")))));
    let in_flight = store.begin_read(&name("used"));
    assert_eq!(store.list_done(), [name("used")], "it must be read again");
    assert!(!in_flight.commit(Some(Arc::new(account("uid-1", "role")))));
    assert_eq!(len(&store), 0);
    assert!(store.begin_fetch(&name("used")));

    // Bound while the list was in progress, and read before its end.
    store.list_started();
    pods.lock().insert(name("late"));
    assert!(store.begin_read(&name("late")).commit(Some(Arc::new(account("uid-3", "late")))));
    pods.lock().remove(&name("used"));
    assert_eq!(store.list_done(), [name("late")]);
}

#[test]
fn reads_for_deleted_pods_leave_nothing() {
    let (store, pods) = store();
    assert!(store.begin_fetch(&name("used")));
    drop(store.begin_read(&name("used")));
    let read = store.begin_read(&name("used"));
    pods.lock().clear();
    assert!(read.commit(Some(Arc::new(account("uid-1", "role")))), "nothing superseded it");
    assert!(store.finish_fetch(&name("used")));
    let state = store.read();
    assert!(state.accounts.is_empty() && state.reads.is_empty() && state.fetching.is_empty(), "{state:?}");
}
