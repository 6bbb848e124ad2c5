use std::sync::Mutex;

use super::*;

const ROLE: &str = "eks.amazonaws.com/role-arn";

fn name(name: &str) -> ServiceAccountName {
    ServiceAccountName { namespace: "default".into(), name: name.into() }
}

fn account(uid: &str, role: &str) -> Account {
    Account::of_annotations(uid, [(ROLE, role)])
}

type Pods = Arc<Mutex<HashSet<ServiceAccountName>>>;

/// With one pod, of service account `used`.
fn known() -> (Arc<Known>, Pods) {
    let pods = Pods::new(Mutex::new(HashSet::from([name("used")])));
    let used = pods.clone();
    (Arc::new(Known::new(Box::new(move |name| used.lock().unwrap().contains(name)))), pods)
}

fn kept(known: &Known) -> usize {
    known.read().accounts.len()
}

fn role(known: &Known, of: &str) -> Option<String> {
    known.with_role(&name(of)).and_then(|account| account.annotation(ROLE).map(str::to_owned))
}

#[test]
fn only_accounts_of_pods_are_kept() {
    let (known, _) = known();
    known.list_started();
    for other in 0..1_000 {
        assert!(!known.put(&name(&format!("other-{other}")), Some(account("uid", "other"))));
    }
    assert!(known.put(&name("used"), Some(account("uid", "role"))));
    assert_eq!(known.read().listed.as_ref().map(HashSet::len), Some(1), "names are no less memory than accounts");
    assert_eq!(known.list_done(), []);
    let before = known.edition();
    assert!(!known.put(&name("other-1"), Some(account("uid", "changed"))));
    assert!(!known.put(&name("other-1"), None));
    assert_eq!((kept(&known), known.edition()), (1, before), "a stranger's change is no news");
    assert_eq!(role(&known, "used").as_deref(), Some("role"));
}

#[test]
fn accounts_go_with_their_last_pod() {
    let (known, pods) = known();
    pods.lock().unwrap().insert(name("other"));
    known.put(&name("used"), Some(account("uid-1", "role")));
    known.put(&name("other"), None);
    let before = known.edition();
    known.forget_unused();
    assert_eq!((kept(&known), known.edition()), (2, before));
    pods.lock().unwrap().clear();
    known.forget_unused();
    assert_eq!(kept(&known), 0);
    assert_ne!(known.edition(), before, "connections must not remember it");
    // Without that call, the next event does the same.
    pods.lock().unwrap().insert(name("used"));
    known.put(&name("used"), Some(account("uid-1", "role")));
    pods.lock().unwrap().clear();
    assert!(!known.put(&name("used"), Some(account("uid-1", "changed"))));
    assert_eq!(kept(&known), 0);
}

#[test]
fn a_read_that_began_after_the_event_is_kept() {
    let (known, pods) = known();
    // The event comes before the pod; the read, which the pod causes, after it.
    assert!(!known.put(&name("new"), Some(account("uid-1", "role"))));
    pods.lock().unwrap().insert(name("new"));
    assert!(known.begin_learning(&name("new")));
    assert!(!known.begin_learning(&name("new")), "one read for all pods of an account");
    assert!(!known.end_learning(&name("new")));
    assert!(known.begin_read(&name("new")).end(Some(Arc::new(account("uid-1", "role")))));
    assert!(known.end_learning(&name("new")));
    assert_eq!(role(&known, "new").as_deref(), Some("role"));
    assert!(!known.begin_learning(&name("new")));
    assert!(!known.put(&name("new"), Some(account("uid-1", "role"))), "the watch repeats it");
    assert!(known.put(&name("new"), Some(account("uid-1", "changed"))));
}

#[test]
fn overtaken_reads_revive_nothing() {
    let (known, pods) = known();
    let stale = || Some(Arc::new(account("uid-1", "stale")));

    let read = known.begin_read(&name("used"));
    known.put(&name("used"), Some(account("uid-1", "role")));
    known.put(&name("used"), None);
    assert!(!read.end(stale()));
    assert_eq!(role(&known, "used"), None, "it was deleted meanwhile");

    let read = known.begin_read(&name("used"));
    known.put(&name("used"), Some(account("uid-2", "role")));
    assert!(!read.end(stale()));
    assert_eq!(role(&known, "used").as_deref(), Some("role"), "it was changed meanwhile");

    let (older, newer) = (known.begin_read(&name("used")), known.begin_read(&name("used")));
    assert!(newer.end(Some(Arc::new(account("uid-2", "newer")))));
    assert!(!older.end(None));
    assert_eq!(role(&known, "used").as_deref(), Some("newer"), "reads overtake each other");

    // Deleted while no pod used it: that event counts too.
    pods.lock().unwrap().clear();
    let read = known.begin_read(&name("used"));
    known.put(&name("used"), None);
    pods.lock().unwrap().insert(name("used"));
    assert!(!read.end(stale()));
    assert_eq!(role(&known, "used"), None);

    // Of another account.
    let read = known.begin_read(&name("used"));
    known.put(&name("other"), None);
    assert!(read.end(stale()));
}

#[test]
fn reads_that_a_list_overtook_revive_nothing() {
    let (known, pods) = known();
    known.put(&name("used"), Some(account("uid-1", "role")));
    known.list_started();
    let during = known.begin_read(&name("used"));
    // Deleted while the watch was down: the list does not show it, and no event will.
    assert!(during.end(Some(Arc::new(account("uid-1", "role")))));
    let in_flight = known.begin_read(&name("used"));
    assert_eq!(known.list_done(), [name("used")], "it is to be read again");
    assert!(!in_flight.end(Some(Arc::new(account("uid-1", "role")))));
    assert_eq!(kept(&known), 0);
    assert!(known.begin_learning(&name("used")));

    // Bound while the list was under way, and read before its end.
    known.list_started();
    pods.lock().unwrap().insert(name("late"));
    assert!(known.begin_read(&name("late")).end(Some(Arc::new(account("uid-3", "late")))));
    pods.lock().unwrap().remove(&name("used"));
    assert_eq!(known.list_done(), [name("late")]);
}

#[test]
fn reads_for_pods_that_are_gone_leave_nothing() {
    let (known, pods) = known();
    assert!(known.begin_learning(&name("used")));
    drop(known.begin_read(&name("used")));
    let read = known.begin_read(&name("used"));
    pods.lock().unwrap().clear();
    assert!(read.end(Some(Arc::new(account("uid-1", "role")))), "nothing newer came");
    assert!(known.end_learning(&name("used")));
    let state = known.read();
    assert!(state.accounts.is_empty() && state.reads.is_empty() && state.learning.is_empty(), "{state:?}");
}
