//! Tests of each rule of the pod index, and a property test of random events against a model.

use std::collections::BTreeMap;

use proptest::prelude::*;

use super::*;

fn pod(uid: &str, addresses: &[&str]) -> Pod {
    Pod::sample(&format!("pod-{uid}"), uid, "sa", addresses)
}

fn record(id: &str, uid: &str, address: &str) -> Event {
    Event::Record(Record::sample(id, uid, address))
}

fn pod_deleted(uid: &str) -> Event {
    Event::PodDeleted(PodUid(uid.into()))
}

/// Creates an index as an agent does when it starts: one scan of these records, then one list of these pods.
fn restarted(records: impl IntoIterator<Item = Event>, pods: impl IntoIterator<Item = Pod>) -> PodIndex {
    let mut index = PodIndex::default();
    scan(&mut index, records);
    list(&mut index, pods);
    index
}

fn scan(index: &mut PodIndex, records: impl IntoIterator<Item = Event>) {
    index.apply(Event::ScanStarted);
    let mut present = Vec::new();
    for event in records {
        if let Event::Record(record) = &event {
            present.push(record.id.clone());
        }
        index.apply(event);
    }
    index.apply(Event::RecordsSnapshot(present));
}

fn list(index: &mut PodIndex, pods: impl IntoIterator<Item = Pod>) {
    index.apply(Event::ListStarted);
    pods.into_iter().for_each(|pod| drop(index.apply(Event::Pod(pod))));
    index.apply(Event::ListDone);
}

fn ip(address: &str) -> IpAddr {
    address.parse().unwrap()
}

/// Creates an index with one list of these pods.
fn synced(pods: impl IntoIterator<Item = Pod>) -> PodIndex {
    let mut index = PodIndex::default();
    list(&mut index, pods);
    index
}

fn owner(index: &PodIndex, address: &str) -> String {
    match index.owner(ip(address)) {
        Owner::Pod(pod) => pod.uid.to_string(),
        Owner::Pending(uid) => format!("pending {uid}"),
        Owner::Unknown => "unknown".into(),
        Owner::Ambiguous(_) => "ambiguous".into(),
        Owner::Unproven(pod) => format!("unproven {}", pod.uid),
    }
}

#[test]
fn pod_owns_each_of_its_addresses() {
    let index = synced([pod("a", &["10.0.0.1", "fd00::1"])]);
    assert_eq!(owner(&index, "10.0.0.1"), "a");
    assert_eq!(owner(&index, "fd00::1"), "a");
    assert_eq!(owner(&index, "10.0.0.2"), "unknown");
}

#[test]
fn ended_or_host_network_pod_owns_nothing() {
    let ended = Pod { ended: true, ..pod("a", &["10.0.0.1"]) };
    let host = Pod { host_network: true, ..pod("b", &["10.0.0.2"]) };
    let index = synced([ended, host]);
    assert_eq!(owner(&index, "10.0.0.1"), "unknown");
    assert_eq!(owner(&index, "10.0.0.2"), "unknown");
}

#[test]
fn address_moves_when_former_pod_has_ended() {
    let mut index = synced([pod("a", &["10.0.0.1"]), pod("b", &["10.0.0.1"])]);
    assert_eq!(owner(&index, "10.0.0.1"), "ambiguous", "neither pod while both are live");
    index.apply(Event::Pod(Pod { ended: true, ..pod("a", &["10.0.0.1"]) }));
    assert_eq!(owner(&index, "10.0.0.1"), "b");
}

#[test]
fn record_identifies_pod_before_pod_ips() {
    let mut index = synced([pod("a", &[])]);
    index.apply(record("r", "a", "10.0.0.1"));
    assert_eq!(owner(&index, "10.0.0.1"), "a");
    index.apply(Event::Pod(pod("a", &["10.0.0.1"])));
    assert_eq!(owner(&index, "10.0.0.1"), "a");
}

/// The watch may lag or be dead, but the record proves that the address has a new owner.
#[test]
fn pending_record_takes_address_from_former_pod() {
    let mut index = synced([pod("a", &["10.0.0.1"])]);
    index.apply(record("r", "b", "10.0.0.1"));
    assert_eq!(owner(&index, "10.0.0.1"), "pending b");
    index.apply(Event::PodDeleted(PodUid("a".into())));
    index.apply(Event::Pod(pod("b", &[])));
    assert_eq!(owner(&index, "10.0.0.1"), "b");
}

#[test]
fn record_and_pod_ips_of_two_live_pods_conflict() {
    let mut index = synced([pod("a", &["10.0.0.1"]), pod("b", &[])]);
    index.apply(record("r", "b", "10.0.0.1"));
    assert_eq!(owner(&index, "10.0.0.1"), "ambiguous");
}

/// The API server reports a deleted pod's address for a while after the node has reassigned it.
#[test]
fn deleted_record_releases_address() {
    let mut index = synced([pod("a", &["10.0.0.1"]), pod("b", &[])]);
    index.apply(record("ra", "a", "10.0.0.1"));
    index.apply(Event::RecordDeleted("ra".into()));
    assert_eq!(owner(&index, "10.0.0.1"), "unknown");
    index.apply(record("rb", "b", "10.0.0.1"));
    assert_eq!(owner(&index, "10.0.0.1"), "b");
}

/// After a crash, one scan finds the records of a deleted pod and of the address's next pod.
#[test]
fn stale_record_of_scan_yields_to_live_pod() {
    for swapped in [false, true] {
        let mut records = [record("r1", "gone", "10.0.0.1"), record("r2", "a", "10.0.0.1")];
        if swapped {
            records.reverse();
        }
        let others = [record("r3", "gone-too", "10.0.0.2")];
        let mut index = restarted(records.into_iter().chain(others), []);
        assert_eq!(owner(&index, "10.0.0.1"), "unknown");
        list(&mut index, [pod("a", &[])]);
        assert_eq!(owner(&index, "10.0.0.1"), "a");
        assert_eq!(owner(&index, "10.0.0.2"), "unknown");
        assert_eq!(index.record_states(), (1, 0, 2));
    }
}

/// Only the wall clock could order the two records.
#[test]
fn two_live_records_in_one_scan_are_ambiguous() {
    let mut index = restarted(
        [record("r1", "a", "10.0.0.1"), record("r2", "b", "10.0.0.1")],
        [pod("a", &["10.0.0.1"]), pod("b", &["10.0.0.1"])],
    );
    assert_eq!(owner(&index, "10.0.0.1"), "ambiguous");
    // Each of these resolves it: the pod ends, is deleted, loses its record, or gets another sandbox.
    for resolution in [
        Event::Pod(Pod { ended: true, ..pod("a", &["10.0.0.1"]) }),
        pod_deleted("a"),
        Event::RecordDeleted("r1".into()),
        record("r3", "a", "10.0.0.2"),
    ] {
        let moved = matches!(resolution, Event::Record(_));
        let mut index = restarted(
            [record("r1", "a", "10.0.0.1"), record("r2", "b", "10.0.0.1")],
            [pod("a", &[]), pod("b", &["10.0.0.1"])],
        );
        index.apply(resolution);
        assert_eq!(owner(&index, "10.0.0.1"), "b");
        assert_eq!(owner(&index, "10.0.0.2"), if moved { "a" } else { "unknown" });
    }
    index.apply(pod_deleted("b"));
    assert_eq!(owner(&index, "10.0.0.1"), "a");
}

#[test]
fn later_record_of_deleted_pod_blocks_earlier() {
    let mut index = synced([pod("a", &[])]);
    index.apply(record("ra", "a", "10.0.0.1"));
    index.apply(record("rb", "b", "10.0.0.1"));
    // Force-deleted: the pod may still run.
    index.apply(pod_deleted("b"));
    assert_eq!(owner(&index, "10.0.0.1"), "pending b");
    index.apply(Event::RecordDeleted("rb".into()));
    assert_eq!(owner(&index, "10.0.0.1"), "a");
}

#[test]
fn later_record_of_live_pod_beats_stale_one() {
    let mut index = restarted([record("old", "gone", "10.0.0.1")], [pod("a", &[])]);
    index.apply(record("new", "a", "10.0.0.1"));
    assert_eq!(owner(&index, "10.0.0.1"), "a");
    // Another scan does not make the old record newer.
    scan(&mut index, [record("new", "a", "10.0.0.1"), record("old", "gone", "10.0.0.1")]);
    assert_eq!(owner(&index, "10.0.0.1"), "a");
}

#[test]
fn pending_record_blocks_in_any_order() {
    let mut index = synced([pod("a", &["10.0.0.1"])]);
    scan(&mut index, [record("ra", "a", "10.0.0.1"), record("rb", "b", "10.0.0.1")]);
    assert_eq!(owner(&index, "10.0.0.1"), "pending b");
    index.apply(record("rc", "a", "10.0.0.1"));
    assert_eq!(owner(&index, "10.0.0.1"), "pending b");
}

/// One scan finds two sandboxes of a pod: `podIPs` decide which is current.
#[test]
fn pod_ips_select_sandbox_of_one_scan() {
    let records = [record("r1", "a", "10.0.0.1"), record("r2", "a", "10.0.0.2"), record("r3", "b", "10.0.0.1")];
    let mut index = restarted(records, [pod("a", &[]), pod("b", &[])]);
    assert_eq!(owner(&index, "10.0.0.1"), "ambiguous");
    assert_eq!(owner(&index, "10.0.0.2"), "unproven a");
    index.apply(Event::Pod(pod("a", &["10.0.0.2"])));
    assert_eq!(owner(&index, "10.0.0.1"), "b");
    assert_eq!(owner(&index, "10.0.0.2"), "a");
}

/// The node crashed and rebooted with the same boot time: old records seem to be of this boot, and the API server
/// reports the old addresses for a while.
#[test]
fn reassigned_addresses_after_crash_recover() {
    let old = || [record("old-a", "a", "10.0.0.1"), record("old-b", "b", "10.0.0.2")];
    let reported = || [pod("a", &["10.0.0.1"]), pod("b", &["10.0.0.2"]), pod("heir", &[])];
    let mut index = restarted(old(), reported());
    index.apply(record("heir", "heir", "10.0.0.1"));
    assert_eq!(owner(&index, "10.0.0.1"), "ambiguous");
    // The kubelet stops each pod's dead sandbox before it creates another one.
    index.apply(Event::RecordDeleted("old-a".into()));
    assert_eq!(owner(&index, "10.0.0.1"), "heir");
    index.apply(record("new-a", "a", "10.0.0.2"));
    assert_eq!(owner(&index, "10.0.0.1"), "heir");
    assert_eq!(owner(&index, "10.0.0.2"), "ambiguous");
    index.apply(Event::RecordDeleted("old-b".into()));
    assert_eq!(owner(&index, "10.0.0.2"), "a");

    // The agent starts only now, and another pod's old record is left over.
    let records =
        [record("heir", "heir", "10.0.0.1"), record("new-a", "a", "10.0.0.2"), record("new-b", "b", "10.0.0.3")];
    let mut index = restarted(records.into_iter().chain(old().into_iter().skip(1)), reported());
    assert_eq!(owner(&index, "10.0.0.1"), "heir");
    assert_eq!(owner(&index, "10.0.0.2"), "ambiguous");
    index.apply(Event::Pod(pod("b", &["10.0.0.3"])));
    assert_eq!(owner(&index, "10.0.0.2"), "a");
    assert_eq!(owner(&index, "10.0.0.3"), "b");
}

/// A scan is interrupted, for example, when file descriptors run out.
#[test]
fn interrupted_scan_does_not_order_records() {
    let mut index = synced([pod("a", &[])]);
    index.apply(Event::ScanStarted);
    index.apply(record("r1", "a", "10.0.0.1"));
    scan(&mut index, [record("r1", "a", "10.0.0.1"), record("r2", "a", "10.0.0.2")]);
    assert_eq!(owner(&index, "10.0.0.1"), "unproven a");
    assert_eq!(owner(&index, "10.0.0.2"), "unproven a");
}

/// The agent restarted: the former owner's record is deleted, the next pod's is unreadable.
#[test]
fn pod_ips_prove_nothing_if_records_exist() {
    let reported = [pod("a", &["10.0.0.1"]), pod("c", &["10.0.0.3"])];
    let mut index = restarted([record("rc", "c", "10.0.0.3")], reported);
    assert_eq!(owner(&index, "10.0.0.1"), "unproven a");
    assert_eq!(owner(&index, "10.0.0.3"), "c");
    index.apply(record("ra", "a", "10.0.0.1"));
    assert_eq!(owner(&index, "10.0.0.1"), "a");
    // A record of the pod's other address proves nothing about this one.
    index.apply(Event::RecordDeleted("ra".into()));
    index.apply(record("ra2", "a", "10.0.0.2"));
    assert_eq!(owner(&index, "10.0.0.1"), "unknown");
}

#[test]
fn pod_ips_prove_nothing_before_first_list() {
    let mut index = PodIndex::default();
    index.apply(Event::ListStarted);
    index.apply(Event::Pod(pod("a", &["10.0.0.1"])));
    assert_eq!(owner(&index, "10.0.0.1"), "unproven a");
    index.apply(Event::ListDone);
    assert_eq!(owner(&index, "10.0.0.1"), "a");
}

/// Left-over records of a former runtime do not invalidate `podIPs` on a node where nothing writes records.
#[test]
fn records_of_unknown_pods_keep_pod_ips_valid() {
    let index = restarted([record("old", "gone", "10.0.0.9")], [pod("a", &["10.0.0.1"])]);
    assert_eq!(owner(&index, "10.0.0.1"), "a");
}

fn before_boot(id: &str, uid: &str, address: &str) -> Event {
    Event::Record(Record { before_boot: true, ..Record::sample(id, uid, address) })
}

/// The record was left over by a reboot, or written before the clock was set forward.
#[test]
fn record_before_boot_only_confirms_pod_ips() {
    let old = || [before_boot("ra", "a", "10.0.0.1"), before_boot("rg", "gone", "10.0.0.3")];
    let mut index = restarted(old(), [pod("a", &[]), pod("b", &["10.0.0.2"]), pod("c", &["10.0.0.3"]), pod("d", &[])]);
    index.apply(record("rb", "b", "10.0.0.2"));
    assert_eq!(owner(&index, "10.0.0.1"), "unknown");
    assert_eq!(owner(&index, "10.0.0.3"), "unproven c");
    index.apply(Event::Pod(pod("a", &["10.0.0.1"])));
    assert_eq!(owner(&index, "10.0.0.1"), "a");
    // The address was reassigned, or the pod moved.
    index.apply(record("rd", "d", "10.0.0.1"));
    assert_eq!(owner(&index, "10.0.0.1"), "ambiguous");
    index.apply(Event::RecordDeleted("rd".into()));
    index.apply(record("ra2", "a", "10.0.0.4"));
    assert_eq!(owner(&index, "10.0.0.1"), "unknown");
    index.apply(Event::RecordDeleted("ra2".into()));
    assert_eq!(owner(&index, "10.0.0.1"), "unknown", "the old record does not restore the address");
}

#[test]
fn live_lookup_before_deletion_revives_no_pod() {
    for deletion in [vec![pod_deleted("a")], vec![Event::ListStarted, Event::ListDone]] {
        let mut index = synced([pod("a", &["10.0.0.1"])]);
        let before = index.removals();
        deletion.into_iter().for_each(|event| drop(index.apply(event)));
        let lookup = |removals| Event::LiveLookup { removals, pods: vec![pod("a", &["10.0.0.1"])] };
        // Any number of later deletions.
        for number in 0..10_000 {
            index.apply(pod_deleted(&number.to_string()));
        }
        assert_eq!(index.apply(lookup(before)), []);
        assert_eq!(owner(&index, "10.0.0.1"), "unknown");
        index.apply(lookup(index.removals()));
        assert_eq!(owner(&index, "10.0.0.1"), "a", "a lookup that began later is valid");
    }
}

/// The pod was deleted before the watch reported it.
#[test]
fn live_lookup_of_unreported_pod_revives_no_pod() {
    let mut index = synced([]);
    let removals = index.removals();
    index.apply(pod_deleted("a"));
    assert_eq!(index.apply(Event::LiveLookup { removals, pods: vec![pod("a", &["10.0.0.1"])] }), []);
    assert_eq!(owner(&index, "10.0.0.1"), "unknown");
}

/// The current list may be newer than the lookup.
#[test]
fn live_lookup_during_list_does_not_outlast_it() {
    let mut index = synced([pod("a", &["10.0.0.1"])]);
    index.apply(Event::ListStarted);
    index.apply(Event::LiveLookup { removals: index.removals(), pods: vec![pod("a", &["10.0.0.1"])] });
    assert_eq!(index.apply(Event::ListDone), [Change::Gone(PodUid("a".into()))]);
    assert_eq!(owner(&index, "10.0.0.1"), "unknown");
}

#[test]
fn release_survives_many_teardowns() {
    let mut index = synced([pod("a", &["10.0.0.1"])]);
    index.apply(record("ra", "a", "10.0.0.1"));
    index.apply(Event::RecordDeleted("ra".into()));
    for number in 0..10_000 {
        let id = format!("r{number}");
        index.apply(Event::Pod(pod(&id, &["10.0.0.2"])));
        index.apply(record(&id, &id, "10.0.0.2"));
        index.apply(Event::RecordDeleted(id.as_str().into()));
        index.apply(pod_deleted(&id));
    }
    assert_eq!(owner(&index, "10.0.0.1"), "unknown");
    assert_eq!(index.released.len(), 1, "at most one entry per pod of the API server");
}

/// A StatefulSet recreates a pod with the same name and service account and another UID.
#[test]
fn recreated_pod_is_another_pod() {
    let recreated = |uid: &str, addresses: &[&str]| Pod::sample("db-0", uid, "sa", addresses);
    let mut index = synced([recreated("first", &["10.0.0.1"])]);
    index.apply(record("r1", "first", "10.0.0.1"));
    index.apply(Event::RecordDeleted("r1".into()));
    index.apply(pod_deleted("first"));
    index.apply(Event::Pod(recreated("second", &[])));
    assert_eq!(owner(&index, "10.0.0.1"), "unknown");
    index.apply(record("r2", "second", "10.0.0.2"));
    assert_eq!(owner(&index, "10.0.0.1"), "unknown");
    assert_eq!(owner(&index, "10.0.0.2"), "second");
}

#[test]
fn two_pods_alternate_at_an_address() {
    let mut index = synced([pod("a", &["10.0.0.1"]), pod("b", &["10.0.0.1"])]);
    index.apply(record("r", "a", "10.0.0.1"));
    assert_eq!(owner(&index, "10.0.0.1"), "ambiguous");
    for round in 0..3 {
        index.apply(Event::RecordDeleted("r".into()));
        for uid in ["b", "a"] {
            let id = format!("{uid}{round}");
            index.apply(record(&id, uid, "10.0.0.1"));
            assert_eq!(owner(&index, "10.0.0.1"), if (round, uid) == (0, "b") { "b" } else { uid });
            index.apply(Event::RecordDeleted(id.into()));
            assert_eq!(owner(&index, "10.0.0.1"), "unknown");
        }
    }
}

/// The API server's cache may lag: the list then contains the former pod but not the next one.
#[test]
fn list_older_than_record_restores_no_address() {
    let mut index = PodIndex::default();
    index.apply(record("r", "b", "10.0.0.1"));
    index.apply(Event::ListStarted);
    index.apply(Event::Pod(pod("a", &["10.0.0.1"])));
    index.apply(Event::ListDone);
    assert_eq!(owner(&index, "10.0.0.1"), "pending b");
    index.apply(Event::Pod(pod("b", &[])));
    assert_eq!(owner(&index, "10.0.0.1"), "ambiguous");
    index.apply(Event::PodDeleted(PodUid("a".into())));
    assert_eq!(owner(&index, "10.0.0.1"), "b");
}

/// A list shows the state at its beginning.
#[test]
fn record_written_during_list_is_not_stale() {
    let mut index = synced([pod("a", &["10.0.0.1"])]);
    index.apply(Event::ListStarted);
    index.apply(record("r", "b", "10.0.0.1"));
    index.apply(Event::Pod(pod("a", &["10.0.0.1"])));
    index.apply(Event::ListDone);
    assert_eq!(owner(&index, "10.0.0.1"), "pending b");
}

#[test]
fn newest_record_of_interface_wins() {
    let mut index = synced([pod("a", &[])]);
    index.apply(record("first-sandbox", "a", "10.0.0.1"));
    index.apply(record("second-sandbox", "a", "10.0.0.2"));
    assert_eq!(owner(&index, "10.0.0.1"), "unknown");
    assert_eq!(owner(&index, "10.0.0.2"), "a");
}

#[test]
fn relist_keeps_live_pods_and_removes_others() {
    let mut index = synced([pod("a", &["10.0.0.1"]), pod("b", &["10.0.0.2"])]);
    index.apply(Event::ListStarted);
    assert_eq!(owner(&index, "10.0.0.1"), "a");
    index.apply(Event::Pod(pod("a", &["10.0.0.1"])));
    assert_eq!(owner(&index, "10.0.0.2"), "b", "until the list is done");
    let changes = index.apply(Event::ListDone);
    assert_eq!(changes, [Change::Gone(PodUid("b".into()))]);
    assert_eq!(owner(&index, "10.0.0.2"), "unknown");
}

/// A stale live lookup may report a phase that the watch has already superseded.
#[test]
fn ended_pod_stays_ended() {
    let mut index = synced([pod("a", &["10.0.0.1"])]);
    index.apply(Event::Pod(Pod { ended: true, ..pod("a", &["10.0.0.1"]) }));
    assert_eq!(index.apply(Event::Pod(pod("a", &["10.0.0.1"]))), []);
    assert_eq!(owner(&index, "10.0.0.1"), "unknown");
    assert!(!index.is_live(&PodUid("a".into())));
    index.apply(Event::Pod(pod("b", &["10.0.0.1"])));
    assert_eq!(owner(&index, "10.0.0.1"), "b");
}

/// A static pod's UID at the runtime differs from that of its mirror in the API server.
#[test]
fn record_of_static_pod_belongs_to_its_mirror() {
    let mirror = Pod { mirror_of: Some(PodUid("hash".into())), ..pod("m", &["10.0.0.1"]) };
    let mut index = synced([mirror, pod("a", &["10.0.0.2"])]);
    index.apply(record("r", "hash", "10.0.0.1"));
    assert_eq!(owner(&index, "10.0.0.1"), "m");
    // A mirror that refers to another pod's UID does not affect that pod.
    let forged = Pod { mirror_of: Some(PodUid("a".into())), ..pod("l", &["10.0.0.3"]) };
    index.apply(Event::Pod(forged));
    index.apply(record("s", "a", "10.0.0.2"));
    assert_eq!(owner(&index, "10.0.0.2"), "a");
    // A mirror does not claim a pending pod's record at an address that is not its own.
    index.apply(record("t", "hash", "10.0.0.4"));
    assert_eq!(owner(&index, "10.0.0.4"), "pending hash");
}

#[test]
fn each_pod_is_bound_once_and_gone_once() {
    let mut index = PodIndex::default();
    let bound = index.apply(Event::Pod(pod("a", &[])));
    assert!(matches!(&bound[..], [Change::Bound(workload)] if workload.pod() == "pod-a"));
    assert_eq!(index.apply(Event::Pod(pod("a", &["10.0.0.1"]))), []);
    let ended = Pod { ended: true, ..pod("a", &["10.0.0.1"]) };
    assert_eq!(index.apply(Event::Pod(ended)), [Change::Gone(PodUid("a".into()))]);
}

/// An event on the node, or a report of one to the index.
#[derive(Debug, Clone)]
enum Step {
    /// The node starts the pod with this number at this address, if the address is free; the runtime writes a record,
    /// which is readable or not.
    Start(u8, u8, bool),
    /// The node tears the pod down: deletes the record and frees the address.
    Stop(u8),
    /// The sandbox crashes and its record stays. Not combined with unreadable records: nothing could detect that.
    Crash(u8),
    /// The API server reports a pod in its current or a former state.
    Report(u8),
    /// The API server reports that a pod was deleted, if it was.
    ReportDeleted(u8),
    /// The API server lists all pods in their current state.
    Relist,
    /// The agent scans the directory of records again.
    Rescan,
    /// The agent restarts: scans the records, and lists all running pods and some former ones.
    Restart(u16),
}

fn step() -> impl Strategy<Value = Step> {
    let (pod, address) = (0..12_u8, 0..3_u8);
    prop_oneof![
        4 => (pod.clone(), address, prop::bool::weighted(0.8)).prop_map(|(pod, at, read)| Step::Start(pod, at, read)),
        3 => pod.clone().prop_map(Step::Stop),
        1 => pod.clone().prop_map(Step::Crash),
        6 => pod.clone().prop_map(Step::Report),
        3 => pod.prop_map(Step::ReportDeleted),
        1 => Just(Step::Relist),
        1 => Just(Step::Rescan),
        1 => any::<u16>().prop_map(Step::Restart),
    ]
}

/// A pod that always has its own address and a record: proves that the runtime writes records.
const NEIGHBOR: u8 = 99;

#[derive(Default)]
struct Node {
    index: PodIndex,
    /// All pods ever started: address, and whether the pod still runs.
    pods: BTreeMap<u8, (u8, bool)>,
    /// Pods with a readable record.
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
                let in_use = self.pods.values().any(|(has, runs)| *has == address && *runs);
                if !in_use && !self.pods.contains_key(&number) {
                    self.pods.insert(number, (address, true));
                    if readable || self.crashed {
                        self.recorded.insert(number);
                        self.index.apply(self.record(number));
                    } else {
                        self.unreadable = true;
                    }
                }
            }
            Step::Stop(number) => {
                if let Some((_, runs)) = self.pods.get_mut(&number) {
                    *runs = false;
                    self.recorded.remove(&number);
                    self.index.apply(Event::RecordDeleted(format!("r{number}").into()));
                }
            }
            Step::Crash(number) if !self.unreadable => {
                if let Some((_, runs)) = self.pods.get_mut(&number) {
                    *runs = false;
                    self.crashed = true;
                }
            }
            Step::Crash(_) => {}
            Step::Report(number) => drop(self.index.apply(Event::Pod(self.reported(number)))),
            Step::ReportDeleted(number) => {
                if self.pods.get(&number).is_some_and(|(_, runs)| !runs) {
                    self.index.apply(pod_deleted(&number.to_string()));
                }
            }
            Step::Relist => self.list(0),
            Step::Rescan => self.scan(),
            Step::Restart(listed) => {
                self.index = PodIndex::default();
                self.scan();
                self.list(listed);
            }
        }
    }

    fn scan(&mut self) {
        let records: Vec<_> = self.recorded.iter().map(|number| self.record(*number)).collect();
        scan(&mut self.index, records);
    }

    fn list(&mut self, beside_running: u16) {
        let runs = |number: &u8| self.pods.get(number).is_some_and(|(_, runs)| *runs);
        let listed = (0..12).filter(|number| runs(number) || beside_running & (1 << number) != 0);
        let pods: Vec<_> = listed.chain([NEIGHBOR]).map(|number| self.reported(number)).collect();
        list(&mut self.index, pods);
    }

    fn record(&self, number: u8) -> Event {
        record(&format!("r{number}"), &number.to_string(), &at(self.pods[&number].0))
    }

    fn reported(&self, number: u8) -> Pod {
        let address = self.pods.get(&number).map(|(address, _)| at(*address));
        pod(&number.to_string(), &address.as_deref().into_iter().collect::<Vec<_>>())
    }
}

fn at(address: u8) -> String {
    format!("10.0.0.{address}")
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 2_000, ..ProptestConfig::default() })]

    /// Reports may be late, duplicated or reordered, and a crash may leave records behind: the answer is the current
    /// owner or a refusal, never another pod.
    #[test]
    fn owner_is_never_another_pod(steps in prop::collection::vec(step(), 1..80)) {
        let mut node = Node::new();
        for step in &steps {
            node.apply(step);
            for address in 0..3 {
                if let Owner::Pod(pod) = node.index.owner(ip(&at(address))) {
                    let truth = node.pods.iter().find(|(_, (has, runs))| *has == address && *runs);
                    // A free address may be attributed to the pod whose record a crash left behind.
                    let stale = |uid: &str| node.crashed && node.recorded.iter().any(|number| number.to_string() == uid);
                    if truth.is_none() && stale(&pod.uid.0) {
                        continue;
                    }
                    prop_assert_eq!(
                        truth.map(|(number, _)| number.to_string()), Some(pod.uid.to_string()),
                        "after {:?}, {} owns {}", step, pod.uid, at(address)
                    );
                }
            }
        }
    }
}
