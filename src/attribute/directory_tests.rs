//! The directory against its rules one by one, and against a model under random events.

use proptest::prelude::*;

use super::*;

fn pod(uid: &str, addresses: &[&str]) -> Pod {
    Pod::sample(&format!("pod-{uid}"), uid, "sa", addresses)
}

fn record(id: &str, uid: &str, address: &str, written: i64) -> Event {
    Event::Record(Record { written: (written, 0), ..Record::sample(id, uid, address) })
}

fn pod_gone(uid: &str) -> Event {
    Event::PodGone(PodUid(uid.into()))
}

fn ip(address: &str) -> IpAddr {
    address.parse().unwrap()
}

/// A directory that has been told of these pods.
fn synced(pods: impl IntoIterator<Item = Pod>) -> Directory {
    let mut directory = Directory::default();
    directory.apply(Event::ListStarted);
    pods.into_iter().for_each(|pod| drop(directory.apply(Event::Pod(pod))));
    directory.apply(Event::ListDone);
    directory
}

fn owner(directory: &Directory, address: &str) -> String {
    match directory.owner(ip(address)) {
        Owner::Pod(pod) => pod.uid.to_string(),
        Owner::NotYet(uid) => format!("not yet {uid}"),
        Owner::Nobody => "nobody".into(),
        Owner::Several(_) => "several".into(),
    }
}

#[test]
fn every_address_of_a_pod_is_its_own() {
    let directory = synced([pod("a", &["10.0.0.1", "fd00::1"])]);
    assert_eq!(owner(&directory, "10.0.0.1"), "a");
    assert_eq!(owner(&directory, "fd00::1"), "a");
    assert_eq!(owner(&directory, "10.0.0.2"), "nobody");
}

#[test]
fn a_pod_that_has_ended_or_is_on_the_host_network_owns_nothing() {
    let ended = Pod { ended: true, ..pod("a", &["10.0.0.1"]) };
    let host = Pod { host_network: true, ..pod("b", &["10.0.0.2"]) };
    let directory = synced([ended, host]);
    assert_eq!(owner(&directory, "10.0.0.1"), "nobody");
    assert_eq!(owner(&directory, "10.0.0.2"), "nobody");
}

#[test]
fn an_address_goes_to_its_next_pod_when_the_former_has_ended() {
    let mut directory = synced([pod("a", &["10.0.0.1"]), pod("b", &["10.0.0.1"])]);
    assert_eq!(owner(&directory, "10.0.0.1"), "several", "neither while both live");
    directory.apply(Event::Pod(Pod { ended: true, ..pod("a", &["10.0.0.1"]) }));
    assert_eq!(owner(&directory, "10.0.0.1"), "b");
}

#[test]
fn a_record_makes_a_pod_known_before_its_address_is_shown() {
    let mut directory = synced([pod("a", &[])]);
    directory.apply(record("r", "a", "10.0.0.1", 1));
    assert_eq!(owner(&directory, "10.0.0.1"), "a");
    directory.apply(Event::Pod(pod("a", &["10.0.0.1"])));
    assert_eq!(owner(&directory, "10.0.0.1"), "a");
}

/// The watch may lag or be dead: the node says that the address has a new owner, whoever that is.
#[test]
fn a_record_of_an_unknown_pod_takes_the_address_from_its_former_owner() {
    let mut directory = synced([pod("a", &["10.0.0.1"])]);
    directory.apply(record("r", "b", "10.0.0.1", 1));
    assert_eq!(owner(&directory, "10.0.0.1"), "not yet b");
    directory.apply(Event::PodGone(PodUid("a".into())));
    directory.apply(Event::Pod(pod("b", &[])));
    assert_eq!(owner(&directory, "10.0.0.1"), "b");
}

#[test]
fn a_record_and_pod_ips_that_name_different_live_pods_contradict() {
    let mut directory = synced([pod("a", &["10.0.0.1"]), pod("b", &[])]);
    directory.apply(record("r", "b", "10.0.0.1", 1));
    assert_eq!(owner(&directory, "10.0.0.1"), "several");
}

/// The API server shows a deleted pod's address for a while after the node gave it to the next.
#[test]
fn a_pod_whose_record_is_gone_has_handed_its_address_back() {
    let mut directory = synced([pod("a", &["10.0.0.1"]), pod("b", &[])]);
    directory.apply(record("ra", "a", "10.0.0.1", 1));
    directory.apply(Event::RecordGone("ra".into()));
    assert_eq!(owner(&directory, "10.0.0.1"), "nobody");
    directory.apply(record("rb", "b", "10.0.0.1", 2));
    assert_eq!(owner(&directory, "10.0.0.1"), "b");
}

#[test]
fn records_left_behind_by_a_crash_do_not_stand_in_the_way() {
    let mut directory = Directory::default();
    directory.apply(record("old", "gone", "10.0.0.1", 1));
    directory.apply(record("new", "a", "10.0.0.1", 2));
    directory.apply(record("older", "gone-too", "10.0.0.2", 1));
    directory.apply(Event::ListStarted);
    directory.apply(Event::Pod(pod("a", &["10.0.0.1"])));
    directory.apply(Event::ListDone);
    assert_eq!(owner(&directory, "10.0.0.1"), "a");
    assert_eq!(owner(&directory, "10.0.0.2"), "nobody");
    assert_eq!(directory.record_states(), (1, 0, 2));
}

#[test]
fn read_overtaken_by_a_deletion_revives_nobody() {
    for deletion in [vec![pod_gone("a")], vec![Event::ListStarted, Event::ListDone]] {
        let mut directory = synced([pod("a", &["10.0.0.1"])]);
        let began = directory.removals();
        deletion.into_iter().for_each(|event| drop(directory.apply(event)));
        let read = |began| Event::Read { began, pods: vec![pod("a", &["10.0.0.1"])] };
        // However many pods are deleted after it.
        for number in 0..10_000 {
            directory.apply(pod_gone(&number.to_string()));
        }
        assert_eq!(directory.apply(read(began)), []);
        assert_eq!(owner(&directory, "10.0.0.1"), "nobody");
        directory.apply(read(directory.removals()));
        assert_eq!(owner(&directory, "10.0.0.1"), "a", "a read that began later tells the truth");
    }
}

/// Deleted before it was ever shown.
#[test]
fn read_of_a_pod_that_was_never_shown_revives_nobody() {
    let mut directory = synced([]);
    let began = directory.removals();
    directory.apply(pod_gone("a"));
    assert_eq!(directory.apply(Event::Read { began, pods: vec![pod("a", &["10.0.0.1"])] }), []);
    assert_eq!(owner(&directory, "10.0.0.1"), "nobody");
}

/// A list that is under way may be newer than the read.
#[test]
fn read_during_a_list_does_not_outlast_it() {
    let mut directory = synced([pod("a", &["10.0.0.1"])]);
    directory.apply(Event::ListStarted);
    directory.apply(Event::Read { began: directory.removals(), pods: vec![pod("a", &["10.0.0.1"])] });
    assert_eq!(directory.apply(Event::ListDone), [Change::Gone(PodUid("a".into()))]);
    assert_eq!(owner(&directory, "10.0.0.1"), "nobody");
}

/// An API server's cache may lag behind the node: the list then has the former pod, and the next one not yet.
#[test]
fn a_list_that_is_older_than_a_record_gives_nobody_an_address_back() {
    let mut directory = Directory::default();
    directory.apply(record("r", "b", "10.0.0.1", 1));
    directory.apply(Event::ListStarted);
    directory.apply(Event::Pod(pod("a", &["10.0.0.1"])));
    directory.apply(Event::ListDone);
    assert_eq!(owner(&directory, "10.0.0.1"), "not yet b");
    directory.apply(Event::Pod(pod("b", &[])));
    assert_eq!(owner(&directory, "10.0.0.1"), "several");
    directory.apply(Event::PodGone(PodUid("a".into())));
    assert_eq!(owner(&directory, "10.0.0.1"), "b");
}

/// A list is as old as its beginning.
#[test]
fn a_record_that_is_written_while_the_pods_are_listed_is_not_stale() {
    let mut directory = synced([pod("a", &["10.0.0.1"])]);
    directory.apply(Event::ListStarted);
    directory.apply(record("r", "b", "10.0.0.1", 1));
    directory.apply(Event::Pod(pod("a", &["10.0.0.1"])));
    directory.apply(Event::ListDone);
    assert_eq!(owner(&directory, "10.0.0.1"), "not yet b");
}

#[test]
fn the_newest_record_of_an_interface_counts() {
    let mut directory = synced([pod("a", &[])]);
    directory.apply(record("first-sandbox", "a", "10.0.0.1", 1));
    directory.apply(record("second-sandbox", "a", "10.0.0.2", 2));
    assert_eq!(owner(&directory, "10.0.0.1"), "nobody");
    assert_eq!(owner(&directory, "10.0.0.2"), "a");
}

#[test]
fn a_relist_never_makes_a_live_pod_unknown_and_forgets_those_it_does_not_name() {
    let mut directory = synced([pod("a", &["10.0.0.1"]), pod("b", &["10.0.0.2"])]);
    directory.apply(Event::ListStarted);
    assert_eq!(owner(&directory, "10.0.0.1"), "a");
    directory.apply(Event::Pod(pod("a", &["10.0.0.1"])));
    assert_eq!(owner(&directory, "10.0.0.2"), "b", "until the list is done");
    let changes = directory.apply(Event::ListDone);
    assert_eq!(changes, [Change::Gone(PodUid("b".into()))]);
    assert_eq!(owner(&directory, "10.0.0.2"), "nobody");
}

/// A live read that was overtaken by the watch says what was true before.
#[test]
fn a_pod_that_has_ended_does_not_live_again_whatever_is_told_later() {
    let mut directory = synced([pod("a", &["10.0.0.1"])]);
    directory.apply(Event::Pod(Pod { ended: true, ..pod("a", &["10.0.0.1"]) }));
    assert_eq!(directory.apply(Event::Pod(pod("a", &["10.0.0.1"]))), []);
    assert_eq!(owner(&directory, "10.0.0.1"), "nobody");
    assert!(!directory.is_live(&PodUid("a".into())));
    directory.apply(Event::Pod(pod("b", &["10.0.0.1"])));
    assert_eq!(owner(&directory, "10.0.0.1"), "b");
}

/// The runtime knows a static pod by another UID than its mirror in the API server has.
#[test]
fn the_record_of_a_static_pod_is_its_mirrors_and_takes_no_other_pods_address() {
    let mirror = Pod { mirror_of: Some(PodUid("hash".into())), ..pod("m", &["10.0.0.1"]) };
    let mut directory = synced([mirror, pod("a", &["10.0.0.2"])]);
    directory.apply(record("r", "hash", "10.0.0.1", 1));
    assert_eq!(owner(&directory, "10.0.0.1"), "m");
    // A mirror that refers to another pod's UID changes nothing for that pod.
    let liar = Pod { mirror_of: Some(PodUid("a".into())), ..pod("l", &["10.0.0.3"]) };
    directory.apply(Event::Pod(liar));
    directory.apply(record("s", "a", "10.0.0.2", 2));
    assert_eq!(owner(&directory, "10.0.0.2"), "a");
    // Nor does it speak for a pod that is still to be shown, at an address that is not its own.
    directory.apply(record("t", "hash", "10.0.0.4", 3));
    assert_eq!(owner(&directory, "10.0.0.4"), "not yet hash");
}

#[test]
fn whoever_fetches_ahead_is_told_once_of_each_pod() {
    let mut directory = Directory::default();
    let bound = directory.apply(Event::Pod(pod("a", &[])));
    assert!(matches!(&bound[..], [Change::Bound(workload)] if workload.pod() == "pod-a"));
    assert_eq!(directory.apply(Event::Pod(pod("a", &["10.0.0.1"]))), []);
    let ended = Pod { ended: true, ..pod("a", &["10.0.0.1"]) };
    assert_eq!(directory.apply(Event::Pod(ended)), [Change::Gone(PodUid("a".into()))]);
}

/// What truly happens on the node, and what of it has been told.
#[derive(Debug, Clone)]
enum Step {
    /// The node starts a pod of this number with this address, if no live one has it: the runtime leaves a record.
    Start(u8, u8),
    /// The node tears it down: the record goes, the address is free.
    Stop(u8),
    /// The API server tells of a pod as it is, or once was.
    Tell(u8),
    /// It tells that a pod is gone, if it is.
    TellGone(u8),
    /// It tells of everything, as it is.
    Relist,
    /// Another agent starts, which finds the records and is told of some of the pods that there are or were.
    Restart(u16),
}

fn step() -> impl Strategy<Value = Step> {
    let (pod, address) = (0..12_u8, 0..3_u8);
    prop_oneof![
        4 => (pod.clone(), address).prop_map(|(pod, address)| Step::Start(pod, address)),
        3 => pod.clone().prop_map(Step::Stop),
        6 => pod.clone().prop_map(Step::Tell),
        3 => pod.prop_map(Step::TellGone),
        1 => Just(Step::Relist),
        1 => any::<u16>().prop_map(Step::Restart),
    ]
}

#[derive(Default)]
struct Node {
    directory: Directory,
    /// Pods that were ever started: address, and whether the node still runs them.
    pods: HashMap<u8, (u8, bool)>,
    /// When each was started.
    started: HashMap<u8, i64>,
    clock: i64,
    /// It has forgotten who handed back what: an address that nobody has may seem to be its former pod's.
    restarted: bool,
}

impl Node {
    fn apply(&mut self, step: &Step) {
        self.clock += 1;
        match *step {
            Step::Start(number, address) => {
                let taken = self.pods.values().any(|(has, runs)| *has == address && *runs);
                if !taken && !self.pods.contains_key(&number) {
                    self.pods.insert(number, (address, true));
                    self.started.insert(number, self.clock);
                    self.directory.apply(record(&format!("r{number}"), &number.to_string(), &at(address), self.clock));
                }
            }
            Step::Stop(number) => {
                if let Some((_, runs)) = self.pods.get_mut(&number) {
                    *runs = false;
                    self.directory.apply(Event::RecordGone(format!("r{number}").into()));
                }
            }
            Step::Tell(number) => drop(self.directory.apply(Event::Pod(self.told(number)))),
            Step::TellGone(number) => {
                if self.pods.get(&number).is_some_and(|(_, runs)| !runs) {
                    self.directory.apply(Event::PodGone(PodUid(number.to_string().into())));
                }
            }
            Step::Relist => {
                self.directory.apply(Event::ListStarted);
                let running: Vec<_> = self.pods.iter().filter(|(_, (_, runs))| *runs).map(|(pod, _)| *pod).collect();
                running.into_iter().for_each(|number| drop(self.directory.apply(Event::Pod(self.told(number)))));
                self.directory.apply(Event::ListDone);
            }
            Step::Restart(listed) => {
                self.directory = Directory::default();
                self.restarted = true;
                for (number, (address, _)) in self.pods.iter().filter(|(_, (_, runs))| *runs) {
                    let written = self.started[number];
                    self.directory.apply(record(&format!("r{number}"), &number.to_string(), &at(*address), written));
                }
                self.directory.apply(Event::ListStarted);
                for number in (0..12).filter(|number| listed & (1 << number) != 0) {
                    self.directory.apply(Event::Pod(self.told(number)));
                }
                self.directory.apply(Event::ListDone);
            }
        }
    }

    fn told(&self, number: u8) -> Pod {
        let address = self.pods.get(&number).map(|(address, _)| at(*address));
        pod(&number.to_string(), &address.as_deref().into_iter().collect::<Vec<_>>())
    }
}

fn at(address: u8) -> String {
    format!("10.0.0.{address}")
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 2_000, ..ProptestConfig::default() })]

    /// However late, twice or out of order the API server tells: the answer is the current owner or a refusal, never
    /// someone else.
    #[test]
    fn never_someone_else(steps in prop::collection::vec(step(), 1..80)) {
        let mut node = Node::default();
        node.directory.apply(Event::ListStarted);
        node.directory.apply(Event::ListDone);
        for step in &steps {
            node.apply(step);
            for address in 0..3 {
                if let Owner::Pod(pod) = node.directory.owner(ip(&at(address))) {
                    let truth = node.pods.iter().find(|(_, (has, runs))| *has == address && *runs);
                    if truth.is_none() && node.restarted {
                        continue;
                    }
                    prop_assert_eq!(
                        truth.map(|(number, _)| number.to_string()), Some(pod.uid.to_string()),
                        "{:?} made {} own {}", step, pod.uid, at(address)
                    );
                }
            }
        }
    }
}
