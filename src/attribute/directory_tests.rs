//! The directory against its rules one by one, and against a model under random events.

use std::collections::BTreeMap;

use proptest::prelude::*;

use super::*;

fn pod(uid: &str, addresses: &[&str]) -> Pod {
    Pod::sample(&format!("pod-{uid}"), uid, "sa", addresses)
}

fn record(id: &str, uid: &str, address: &str) -> Event {
    Event::Record(Record::sample(id, uid, address))
}

fn pod_gone(uid: &str) -> Event {
    Event::PodGone(PodUid(uid.into()))
}

/// Another agent starts: one scan of these records, then one list of these pods.
fn restarted(records: impl IntoIterator<Item = Event>, pods: impl IntoIterator<Item = Pod>) -> Directory {
    let mut directory = Directory::default();
    scan(&mut directory, records);
    list(&mut directory, pods);
    directory
}

fn scan(directory: &mut Directory, records: impl IntoIterator<Item = Event>) {
    directory.apply(Event::ScanStarted);
    let mut present = Vec::new();
    for event in records {
        if let Event::Record(record) = &event {
            present.push(record.id.clone());
        }
        directory.apply(event);
    }
    directory.apply(Event::RecordsAre(present));
}

fn list(directory: &mut Directory, pods: impl IntoIterator<Item = Pod>) {
    directory.apply(Event::ListStarted);
    pods.into_iter().for_each(|pod| drop(directory.apply(Event::Pod(pod))));
    directory.apply(Event::ListDone);
}

fn ip(address: &str) -> IpAddr {
    address.parse().unwrap()
}

/// A directory that has been told of these pods.
fn synced(pods: impl IntoIterator<Item = Pod>) -> Directory {
    let mut directory = Directory::default();
    list(&mut directory, pods);
    directory
}

fn owner(directory: &Directory, address: &str) -> String {
    match directory.owner(ip(address)) {
        Owner::Pod(pod) => pod.uid.to_string(),
        Owner::NotYet(uid) => format!("not yet {uid}"),
        Owner::Nobody => "nobody".into(),
        Owner::Several(_) => "several".into(),
        Owner::Unproven(pod) => format!("unproven {}", pod.uid),
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
    directory.apply(record("r", "a", "10.0.0.1"));
    assert_eq!(owner(&directory, "10.0.0.1"), "a");
    directory.apply(Event::Pod(pod("a", &["10.0.0.1"])));
    assert_eq!(owner(&directory, "10.0.0.1"), "a");
}

/// The watch may lag or be dead: the node says that the address has a new owner, whoever that is.
#[test]
fn a_record_of_an_unknown_pod_takes_the_address_from_its_former_owner() {
    let mut directory = synced([pod("a", &["10.0.0.1"])]);
    directory.apply(record("r", "b", "10.0.0.1"));
    assert_eq!(owner(&directory, "10.0.0.1"), "not yet b");
    directory.apply(Event::PodGone(PodUid("a".into())));
    directory.apply(Event::Pod(pod("b", &[])));
    assert_eq!(owner(&directory, "10.0.0.1"), "b");
}

#[test]
fn a_record_and_pod_ips_that_name_different_live_pods_contradict() {
    let mut directory = synced([pod("a", &["10.0.0.1"]), pod("b", &[])]);
    directory.apply(record("r", "b", "10.0.0.1"));
    assert_eq!(owner(&directory, "10.0.0.1"), "several");
}

/// The API server shows a deleted pod's address for a while after the node gave it to the next.
#[test]
fn a_pod_whose_record_is_gone_has_handed_its_address_back() {
    let mut directory = synced([pod("a", &["10.0.0.1"]), pod("b", &[])]);
    directory.apply(record("ra", "a", "10.0.0.1"));
    directory.apply(Event::RecordGone("ra".into()));
    assert_eq!(owner(&directory, "10.0.0.1"), "nobody");
    directory.apply(record("rb", "b", "10.0.0.1"));
    assert_eq!(owner(&directory, "10.0.0.1"), "b");
}

/// After a crash one scan finds the record of a gone pod beside that of the address's next pod.
#[test]
fn stale_record_of_a_scan_yields_to_a_live_pods() {
    for swapped in [false, true] {
        let mut records = [record("r1", "gone", "10.0.0.1"), record("r2", "a", "10.0.0.1")];
        if swapped {
            records.reverse();
        }
        let others = [record("r3", "gone-too", "10.0.0.2")];
        let mut directory = restarted(records.into_iter().chain(others), []);
        assert_eq!(owner(&directory, "10.0.0.1"), "nobody");
        list(&mut directory, [pod("a", &[])]);
        assert_eq!(owner(&directory, "10.0.0.1"), "a");
        assert_eq!(owner(&directory, "10.0.0.2"), "nobody");
        assert_eq!(directory.record_states(), (1, 0, 2));
    }
}

/// Nothing but the wall clock could order the two.
#[test]
fn records_of_two_live_pods_in_one_scan_are_nobodys() {
    let mut directory = restarted(
        [record("r1", "a", "10.0.0.1"), record("r2", "b", "10.0.0.1")],
        [pod("a", &["10.0.0.1"]), pod("b", &["10.0.0.1"])],
    );
    assert_eq!(owner(&directory, "10.0.0.1"), "several");
    // Each of these heals it: the pod ends, is deleted, loses its record, or gets another sandbox.
    for healing in [
        Event::Pod(Pod { ended: true, ..pod("a", &["10.0.0.1"]) }),
        pod_gone("a"),
        Event::RecordGone("r1".into()),
        record("r3", "a", "10.0.0.2"),
    ] {
        let moved = matches!(healing, Event::Record(_));
        let mut directory = restarted(
            [record("r1", "a", "10.0.0.1"), record("r2", "b", "10.0.0.1")],
            [pod("a", &[]), pod("b", &["10.0.0.1"])],
        );
        directory.apply(healing);
        assert_eq!(owner(&directory, "10.0.0.1"), "b");
        assert_eq!(owner(&directory, "10.0.0.2"), if moved { "a" } else { "nobody" });
    }
    directory.apply(pod_gone("b"));
    assert_eq!(owner(&directory, "10.0.0.1"), "a");
}

#[test]
fn later_record_of_a_gone_pod_blocks_an_earlier_one() {
    let mut directory = synced([pod("a", &[])]);
    directory.apply(record("ra", "a", "10.0.0.1"));
    directory.apply(record("rb", "b", "10.0.0.1"));
    // Deleted by force: it may still run.
    directory.apply(pod_gone("b"));
    assert_eq!(owner(&directory, "10.0.0.1"), "not yet b");
    directory.apply(Event::RecordGone("rb".into()));
    assert_eq!(owner(&directory, "10.0.0.1"), "a");
}

#[test]
fn later_record_of_a_live_pod_beats_a_stale_one() {
    let mut directory = restarted([record("old", "gone", "10.0.0.1")], [pod("a", &[])]);
    directory.apply(record("new", "a", "10.0.0.1"));
    assert_eq!(owner(&directory, "10.0.0.1"), "a");
    // Reading it again makes it no newer.
    scan(&mut directory, [record("new", "a", "10.0.0.1"), record("old", "gone", "10.0.0.1")]);
    assert_eq!(owner(&directory, "10.0.0.1"), "a");
}

#[test]
fn pending_record_blocks_whenever_it_was_found() {
    let mut directory = synced([pod("a", &["10.0.0.1"])]);
    scan(&mut directory, [record("ra", "a", "10.0.0.1"), record("rb", "b", "10.0.0.1")]);
    assert_eq!(owner(&directory, "10.0.0.1"), "not yet b");
    directory.apply(record("rc", "a", "10.0.0.1"));
    assert_eq!(owner(&directory, "10.0.0.1"), "not yet b");
}

/// Two sandboxes of one pod found in one scan: `podIPs` tell which is current.
#[test]
fn sandboxes_of_one_scan_are_told_apart_by_pod_ips() {
    let records = [record("r1", "a", "10.0.0.1"), record("r2", "a", "10.0.0.2"), record("r3", "b", "10.0.0.1")];
    let mut directory = restarted(records, [pod("a", &[]), pod("b", &[])]);
    assert_eq!(owner(&directory, "10.0.0.1"), "several");
    assert_eq!(owner(&directory, "10.0.0.2"), "unproven a");
    directory.apply(Event::Pod(pod("a", &["10.0.0.2"])));
    assert_eq!(owner(&directory, "10.0.0.1"), "b");
    assert_eq!(owner(&directory, "10.0.0.2"), "a");
}

/// The machine lost power and came back with the same boot time: the old records seem to be of this boot, and the API
/// server shows the old addresses for a while.
#[test]
fn crash_that_deals_addresses_anew_heals() {
    let old = || [record("old-a", "a", "10.0.0.1"), record("old-b", "b", "10.0.0.2")];
    let shown = || [pod("a", &["10.0.0.1"]), pod("b", &["10.0.0.2"]), pod("heir", &[])];
    let mut directory = restarted(old(), shown());
    directory.apply(record("heir", "heir", "10.0.0.1"));
    assert_eq!(owner(&directory, "10.0.0.1"), "several");
    // The kubelet stops the dead sandbox of each pod before it makes another.
    directory.apply(Event::RecordGone("old-a".into()));
    assert_eq!(owner(&directory, "10.0.0.1"), "heir");
    directory.apply(record("new-a", "a", "10.0.0.2"));
    assert_eq!(owner(&directory, "10.0.0.1"), "heir");
    assert_eq!(owner(&directory, "10.0.0.2"), "several");
    directory.apply(Event::RecordGone("old-b".into()));
    assert_eq!(owner(&directory, "10.0.0.2"), "a");

    // The agent starts only now; another pod's old record stays behind.
    let records =
        [record("heir", "heir", "10.0.0.1"), record("new-a", "a", "10.0.0.2"), record("new-b", "b", "10.0.0.3")];
    let mut directory = restarted(records.into_iter().chain(old().into_iter().skip(1)), shown());
    assert_eq!(owner(&directory, "10.0.0.1"), "heir");
    assert_eq!(owner(&directory, "10.0.0.2"), "several");
    directory.apply(Event::Pod(pod("b", &["10.0.0.3"])));
    assert_eq!(owner(&directory, "10.0.0.2"), "a");
    assert_eq!(owner(&directory, "10.0.0.3"), "b");
}

/// As when file descriptors are used up in the middle of it.
#[test]
fn scan_that_was_broken_off_orders_nothing() {
    let mut directory = synced([pod("a", &[])]);
    directory.apply(Event::ScanStarted);
    directory.apply(record("r1", "a", "10.0.0.1"));
    scan(&mut directory, [record("r1", "a", "10.0.0.1"), record("r2", "a", "10.0.0.2")]);
    assert_eq!(owner(&directory, "10.0.0.1"), "unproven a");
    assert_eq!(owner(&directory, "10.0.0.2"), "unproven a");
}

/// The agent restarted: the former owner's record is gone, the next pod made its own unreadable.
#[test]
fn pod_ips_alone_prove_nothing_beside_records() {
    let shown = [pod("a", &["10.0.0.1"]), pod("c", &["10.0.0.3"])];
    let mut directory = restarted([record("rc", "c", "10.0.0.3")], shown);
    assert_eq!(owner(&directory, "10.0.0.1"), "unproven a");
    assert_eq!(owner(&directory, "10.0.0.3"), "c");
    directory.apply(record("ra", "a", "10.0.0.1"));
    assert_eq!(owner(&directory, "10.0.0.1"), "a");
    // The record of another address of the pod's proves nothing about this one.
    directory.apply(Event::RecordGone("ra".into()));
    directory.apply(record("ra2", "a", "10.0.0.2"));
    assert_eq!(owner(&directory, "10.0.0.1"), "nobody");
}

#[test]
fn pod_ips_prove_nothing_until_all_pods_are_listed() {
    let mut directory = Directory::default();
    directory.apply(Event::ListStarted);
    directory.apply(Event::Pod(pod("a", &["10.0.0.1"])));
    assert_eq!(owner(&directory, "10.0.0.1"), "unproven a");
    directory.apply(Event::ListDone);
    assert_eq!(owner(&directory, "10.0.0.1"), "a");
}

/// Leftovers of a former runtime do not make `podIPs` worthless on a node where nothing writes records.
#[test]
fn records_of_strangers_do_not_disable_pod_ips() {
    let directory = restarted([record("old", "gone", "10.0.0.9")], [pod("a", &["10.0.0.1"])]);
    assert_eq!(owner(&directory, "10.0.0.1"), "a");
}

fn before_boot(id: &str, uid: &str, address: &str) -> Event {
    Event::Record(Record { before_boot: true, ..Record::sample(id, uid, address) })
}

/// Left behind by a reboot, or written before the clock was set forward.
#[test]
fn record_from_before_the_boot_only_confirms_pod_ips() {
    let old = || [before_boot("ra", "a", "10.0.0.1"), before_boot("rg", "gone", "10.0.0.3")];
    let mut directory =
        restarted(old(), [pod("a", &[]), pod("b", &["10.0.0.2"]), pod("c", &["10.0.0.3"]), pod("d", &[])]);
    directory.apply(record("rb", "b", "10.0.0.2"));
    assert_eq!(owner(&directory, "10.0.0.1"), "nobody");
    assert_eq!(owner(&directory, "10.0.0.3"), "unproven c");
    directory.apply(Event::Pod(pod("a", &["10.0.0.1"])));
    assert_eq!(owner(&directory, "10.0.0.1"), "a");
    // The address was dealt anew, or the pod.
    directory.apply(record("rd", "d", "10.0.0.1"));
    assert_eq!(owner(&directory, "10.0.0.1"), "several");
    directory.apply(Event::RecordGone("rd".into()));
    directory.apply(record("ra2", "a", "10.0.0.4"));
    assert_eq!(owner(&directory, "10.0.0.1"), "nobody");
    directory.apply(Event::RecordGone("ra2".into()));
    assert_eq!(owner(&directory, "10.0.0.1"), "nobody", "its old record is no reason to give it back");
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

#[test]
fn teardowns_do_not_make_a_release_forgotten() {
    let mut directory = synced([pod("a", &["10.0.0.1"])]);
    directory.apply(record("ra", "a", "10.0.0.1"));
    directory.apply(Event::RecordGone("ra".into()));
    for number in 0..10_000 {
        let id = format!("r{number}");
        directory.apply(Event::Pod(pod(&id, &["10.0.0.2"])));
        directory.apply(record(&id, &id, "10.0.0.2"));
        directory.apply(Event::RecordGone(id.as_str().into()));
        directory.apply(pod_gone(&id));
    }
    assert_eq!(owner(&directory, "10.0.0.1"), "nobody");
    assert_eq!(directory.released.len(), 1, "no more than the API server shows");
}

/// As a StatefulSet has it: the same name and account, another UID.
#[test]
fn recreated_pod_of_the_same_name_is_another_pod() {
    let again = |uid: &str, addresses: &[&str]| Pod::sample("db-0", uid, "sa", addresses);
    let mut directory = synced([again("first", &["10.0.0.1"])]);
    directory.apply(record("r1", "first", "10.0.0.1"));
    directory.apply(Event::RecordGone("r1".into()));
    directory.apply(pod_gone("first"));
    directory.apply(Event::Pod(again("second", &[])));
    assert_eq!(owner(&directory, "10.0.0.1"), "nobody");
    directory.apply(record("r2", "second", "10.0.0.2"));
    assert_eq!(owner(&directory, "10.0.0.1"), "nobody");
    assert_eq!(owner(&directory, "10.0.0.2"), "second");
}

#[test]
fn two_pods_taking_turns_at_an_address() {
    let mut directory = synced([pod("a", &["10.0.0.1"]), pod("b", &["10.0.0.1"])]);
    directory.apply(record("r", "a", "10.0.0.1"));
    assert_eq!(owner(&directory, "10.0.0.1"), "several");
    for round in 0..3 {
        directory.apply(Event::RecordGone("r".into()));
        for uid in ["b", "a"] {
            let id = format!("{uid}{round}");
            directory.apply(record(&id, uid, "10.0.0.1"));
            assert_eq!(owner(&directory, "10.0.0.1"), if (round, uid) == (0, "b") { "b" } else { uid });
            directory.apply(Event::RecordGone(id.into()));
            assert_eq!(owner(&directory, "10.0.0.1"), "nobody");
        }
    }
}

/// An API server's cache may lag behind the node: the list then has the former pod, and the next one not yet.
#[test]
fn a_list_that_is_older_than_a_record_gives_nobody_an_address_back() {
    let mut directory = Directory::default();
    directory.apply(record("r", "b", "10.0.0.1"));
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
    directory.apply(record("r", "b", "10.0.0.1"));
    directory.apply(Event::Pod(pod("a", &["10.0.0.1"])));
    directory.apply(Event::ListDone);
    assert_eq!(owner(&directory, "10.0.0.1"), "not yet b");
}

#[test]
fn the_newest_record_of_an_interface_counts() {
    let mut directory = synced([pod("a", &[])]);
    directory.apply(record("first-sandbox", "a", "10.0.0.1"));
    directory.apply(record("second-sandbox", "a", "10.0.0.2"));
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
    directory.apply(record("r", "hash", "10.0.0.1"));
    assert_eq!(owner(&directory, "10.0.0.1"), "m");
    // A mirror that refers to another pod's UID changes nothing for that pod.
    let liar = Pod { mirror_of: Some(PodUid("a".into())), ..pod("l", &["10.0.0.3"]) };
    directory.apply(Event::Pod(liar));
    directory.apply(record("s", "a", "10.0.0.2"));
    assert_eq!(owner(&directory, "10.0.0.2"), "a");
    // Nor does it speak for a pod that is still to be shown, at an address that is not its own.
    directory.apply(record("t", "hash", "10.0.0.4"));
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
    /// The node starts a pod of this number with this address, if no live one has it: the runtime leaves a record,
    /// which the agent can read or not.
    Start(u8, u8, bool),
    /// The node tears it down: the record goes, the address is free.
    Stop(u8),
    /// Its sandbox dies, and its record stays. Together with an unreadable record of the next pod, nothing would tell.
    Crash(u8),
    /// The API server tells of a pod as it is, or once was.
    Tell(u8),
    /// It tells that a pod is gone, if it is.
    TellGone(u8),
    /// It tells of everything, as it is.
    Relist,
    /// The folder of records is read anew.
    Rescan,
    /// Another agent starts, which finds the records and is told of all pods that run and some of those that did.
    Restart(u16),
}

fn step() -> impl Strategy<Value = Step> {
    let (pod, address) = (0..12_u8, 0..3_u8);
    prop_oneof![
        4 => (pod.clone(), address, prop::bool::weighted(0.8)).prop_map(|(pod, at, read)| Step::Start(pod, at, read)),
        3 => pod.clone().prop_map(Step::Stop),
        1 => pod.clone().prop_map(Step::Crash),
        6 => pod.clone().prop_map(Step::Tell),
        3 => pod.prop_map(Step::TellGone),
        1 => Just(Step::Relist),
        1 => Just(Step::Rescan),
        1 => any::<u16>().prop_map(Step::Restart),
    ]
}

/// Has an address of its own and a record, all the time: this runtime writes records.
const NEIGHBOR: u8 = 99;

#[derive(Default)]
struct Node {
    directory: Directory,
    /// Pods that were ever started: address, and whether the node still runs them.
    pods: BTreeMap<u8, (u8, bool)>,
    /// Pods with a record that can be read.
    recorded: BTreeSet<u8>,
    crashed: bool,
    unreadable: bool,
}

impl Node {
    fn new() -> Self {
        let mut node = Self::default();
        node.apply(&Step::Start(NEIGHBOR, NEIGHBOR, true));
        node.apply(&Step::Restart(0));
        node
    }

    fn apply(&mut self, step: &Step) {
        match *step {
            Step::Start(number, address, readable) => {
                let taken = self.pods.values().any(|(has, runs)| *has == address && *runs);
                if !taken && !self.pods.contains_key(&number) {
                    self.pods.insert(number, (address, true));
                    if readable || self.crashed {
                        self.recorded.insert(number);
                        self.directory.apply(self.record(number));
                    } else {
                        self.unreadable = true;
                    }
                }
            }
            Step::Stop(number) => {
                if let Some((_, runs)) = self.pods.get_mut(&number) {
                    *runs = false;
                    self.recorded.remove(&number);
                    self.directory.apply(Event::RecordGone(format!("r{number}").into()));
                }
            }
            Step::Crash(number) if !self.unreadable => {
                if let Some((_, runs)) = self.pods.get_mut(&number) {
                    *runs = false;
                    self.crashed = true;
                }
            }
            Step::Crash(_) => {}
            Step::Tell(number) => drop(self.directory.apply(Event::Pod(self.told(number)))),
            Step::TellGone(number) => {
                if self.pods.get(&number).is_some_and(|(_, runs)| !runs) {
                    self.directory.apply(pod_gone(&number.to_string()));
                }
            }
            Step::Relist => self.list(0),
            Step::Rescan => self.scan(),
            Step::Restart(listed) => {
                self.directory = Directory::default();
                self.scan();
                self.list(listed);
            }
        }
    }

    fn scan(&mut self) {
        let records: Vec<_> = self.recorded.iter().map(|number| self.record(*number)).collect();
        scan(&mut self.directory, records);
    }

    fn list(&mut self, beside_running: u16) {
        let runs = |number: &u8| self.pods.get(number).is_some_and(|(_, runs)| *runs);
        let listed = (0..12).filter(|number| runs(number) || beside_running & (1 << number) != 0);
        let pods: Vec<_> = listed.chain([NEIGHBOR]).map(|number| self.told(number)).collect();
        list(&mut self.directory, pods);
    }

    fn record(&self, number: u8) -> Event {
        record(&format!("r{number}"), &number.to_string(), &at(self.pods[&number].0))
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

    /// However late, twice or out of order the API server tells, and whatever a crash left behind: the answer is the
    /// current owner or a refusal, never someone else.
    #[test]
    fn never_someone_else(steps in prop::collection::vec(step(), 1..80)) {
        let mut node = Node::new();
        for step in &steps {
            node.apply(step);
            for address in 0..3 {
                if let Owner::Pod(pod) = node.directory.owner(ip(&at(address))) {
                    let truth = node.pods.iter().find(|(_, (has, runs))| *has == address && *runs);
                    // An address that nobody has may seem to be that of the pod whose record a crash left behind.
                    let left = |uid: &str| node.crashed && node.recorded.iter().any(|number| number.to_string() == uid);
                    if truth.is_none() && left(&pod.uid.0) {
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
