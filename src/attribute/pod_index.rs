//! Address → pod, as a state machine: [`PodIndex::apply`] takes events, [`PodIndex::owner`] answers. It decides who owns
//! an address after IP reuse. It has no clock and no I/O, so tests can cover every order of events.
//!
//! The API server defines *which pods exist*, from their binding to this node on. *Which address a pod has* comes from
//! the first of two sources: the pod's `podIPs`, or the CNI record that the container runtime writes before the pod
//! starts. The rules fail closed:
//!
//! - A pod that has ended (Succeeded, Failed) or uses the host network owns no address. A terminating pod owns its
//!   addresses until it is deleted.
//! - Where the runtime writes records, a pod owns an address only if one of its own records names it. The `podIPs` of a
//!   pod without a record conflict with another pod's record but prove nothing by themselves. A record from before the
//!   boot only confirms `podIPs`.
//! - A pod whose records have all been deleted has released its address, whatever the API server still reports.
//! - A pending record (its pod has not been reported by the API server yet) blocks its address for every other pod: the
//!   watch may lag or be dead. A record that is older than the pod list and names none of its pods is stale. It blocks
//!   pods that no record proves, and pods whose record arrived before it.
//!   A static pod's record has the kubelet's UID, which the pod's mirror in the API server refers to.
//! - An address with two live claimants belongs to neither.
//! - Records are ordered by arrival, not by time, since clocks can go back. If one scan finds two sandboxes of a pod,
//!   `podIPs` decide which is current; until they do, neither is.
//! - A live lookup is void if a pod was removed after the lookup began, so that a late answer cannot revive a deleted
//!   pod (TOCTOU).

use std::{
    cmp::Ordering,
    collections::{BTreeSet, HashMap, HashSet, hash_map::Entry},
    net::IpAddr,
    sync::Arc,
};

use super::{
    Workload,
    attachment::Attachment,
    pod::{Pod, PodUid, ServiceAccountName},
};

/// An event of one of the sources.
#[derive(Debug, Clone)]
pub enum Event {
    /// A list of all pods of this node begins (list or relist). Known pods stay until [`Event::ListDone`].
    ListStarted,
    /// A pod was listed, added or modified.
    Pod(Pod),
    /// A live lookup found these pods. It began when [`PodIndex::removals`] was `removals`.
    LiveLookup {
        removals: u64,
        pods: Vec<Pod>,
    },
    /// The list is complete: pods that it does not contain are removed.
    ListDone,
    PodDeleted(PodUid),
    /// A CNI record was written.
    Record(Record),
    /// The CNI record with this file name was deleted.
    RecordDeleted(Arc<str>),
    /// A scan begins: the order of its records, up to [`Event::RecordsSnapshot`], says nothing about their age.
    ScanStarted,
    /// The names of all existing records, at the end of a scan: all others are deleted.
    RecordsSnapshot(Vec<Arc<str>>),
}

/// A CNI record: the addresses that a pod was given on this node.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Record {
    /// The record's file name.
    pub id: Arc<str>,
    pub pod: PodUid,
    /// The interface in the pod.
    pub interface: Arc<str>,
    /// The pod's interfaces on the node.
    pub interfaces: Vec<Arc<str>>,
    /// MAC address of the pod's interface.
    pub mac: Option<[u8; 6]>,
    pub addresses: Vec<IpAddr>,
    /// The file is older than the boot: left over by the reboot, or written before the clock was set forward.
    pub before_boot: bool,
}

impl Record {
    #[cfg(any(test, fuzzing))]
    pub(crate) fn sample(id: &str, uid: &str, address: &str) -> Self {
        Self {
            id: id.into(),
            pod: PodUid(uid.into()),
            interface: "eth0".into(),
            interfaces: Vec::new(),
            mac: None,
            addresses: vec![address.parse().unwrap()],
            before_boot: false,
        }
    }
}

/// The effect of an event on a pod.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Change {
    /// The pod was bound to this node, and will request credentials soon.
    Bound(Workload),
    /// The pod ended or was removed, and will not request credentials again.
    Gone(PodUid),
}

/// The owner of an address.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Owner {
    Pod(Arc<Pod>),
    /// A record names a pod that the API server has not reported yet.
    Pending(PodUid),
    /// No pod claims the address.
    Unknown,
    /// Several live pods claim the address; contains their names.
    Ambiguous(String),
    /// The only claimant, but the runtime writes records and no current record proves the claim.
    Unproven(Arc<Pod>),
}

#[derive(Debug, Default)]
pub struct PodIndex {
    pods: HashMap<PodUid, Arc<Pod>>,
    records: HashMap<Arc<str>, IndexedRecord>,
    records_of: HashMap<PodUid, BTreeSet<Arc<str>>>,
    /// Pods in `pods` whose last record since boot was deleted.
    released: HashSet<PodUid>,
    /// Set once a record names a pod that the API server reports, or arrives after the first scan.
    runtime_writes_records: bool,
    /// Number of the last record event, or of the current scan.
    arrivals: u64,
    scanning: bool,
    claimants: HashMap<IpAddr, Claimants>,
    synced: bool,
    /// Pods in the current list so far.
    listing: Option<HashSet<PodUid>>,
    /// Number of events that removed pods.
    removals: u64,
}

#[derive(Debug)]
struct IndexedRecord {
    record: Record,
    /// Order of arrival. Records of one scan share it: their order is unknown.
    arrival: u64,
    /// The record's pod was deleted, or missing from a list that began after the record arrived: it will not appear.
    orphaned: bool,
    /// The record existed when the current list began.
    before_list: bool,
}

/// The pods and records that name an address.
#[derive(Debug, Default)]
struct Claimants {
    pods: BTreeSet<PodUid>,
    records: BTreeSet<Arc<str>>,
}

impl PodIndex {
    pub fn apply(&mut self, event: Event) -> Vec<Change> {
        match event {
            Event::ListStarted => {
                self.listing = Some(HashSet::new());
                self.records.values_mut().for_each(|entry| entry.before_list = true);
                Vec::new()
            }
            Event::Pod(pod) => {
                if let Some(listed) = &mut self.listing {
                    listed.insert(pod.uid.clone());
                }
                self.put_pod(pod)
            }
            // Not inserted into `listing`: the current list may be newer than the lookup, and decides about these pods.
            Event::LiveLookup { removals, pods } if removals == self.removals => {
                pods.into_iter().flat_map(|pod| self.put_pod(pod)).collect()
            }
            Event::LiveLookup { .. } => Vec::new(),
            Event::ListDone => {
                self.removals += 1;
                let listed = self.listing.take().unwrap_or_default();
                let missing: Vec<_> = self.pods.keys().filter(|uid| !listed.contains(*uid)).cloned().collect();
                let changes = missing.into_iter().filter_map(|uid| self.remove_pod(&uid)).collect();
                for entry in self.records.values_mut().filter(|entry| entry.before_list) {
                    entry.orphaned = !self.pods.contains_key(&entry.record.pod);
                }
                self.synced = true;
                changes
            }
            Event::PodDeleted(uid) => {
                self.removals += 1;
                self.remove_pod(&uid).into_iter().collect()
            }
            Event::ScanStarted => {
                // Continues an interrupted scan: records that it did not reach are no newer than those that it did.
                if !std::mem::replace(&mut self.scanning, true) {
                    self.arrivals += 1;
                }
                Vec::new()
            }
            Event::Record(record) => {
                self.put_record(record);
                Vec::new()
            }
            Event::RecordDeleted(id) => {
                self.remove_record(&id);
                Vec::new()
            }
            Event::RecordsSnapshot(present) => {
                self.scanning = false;
                let present: HashSet<_> = present.into_iter().collect();
                let deleted: Vec<_> = self.records.keys().filter(|id| !present.contains(*id)).cloned().collect();
                deleted.iter().for_each(|id| self.remove_record(id));
                Vec::new()
            }
        }
    }

    /// Returns whether all pods of this node have been listed at least once.
    pub fn synced(&self) -> bool {
        self.synced
    }

    pub fn contains(&self, uid: &PodUid) -> bool {
        self.pods.contains_key(uid)
    }

    pub fn is_live(&self, uid: &PodUid) -> bool {
        self.pods.get(uid).is_some_and(|pod| !pod.ended)
    }

    pub fn pods_of<'a>(&'a self, account: &'a ServiceAccountName) -> impl Iterator<Item = &'a Arc<Pod>> {
        self.pods.values().filter(move |pod| pod.account == *account && !pod.ended && !pod.host_network)
    }

    pub fn live_pods(&self) -> usize {
        self.pods.values().filter(|pod| !pod.ended).count()
    }

    /// Returns the number of records in use (of a live pod), pending (of a pod that may still appear) and stale.
    pub fn record_states(&self) -> (usize, usize, usize) {
        let since_boot = || self.records.values().filter(|entry| !entry.record.before_boot);
        let in_use = since_boot().filter(|entry| self.is_live(&entry.record.pod)).count();
        let pending = since_boot().filter(|entry| self.is_pending(entry)).count();
        (in_use, pending, since_boot().count() - in_use - pending)
    }

    /// Returns the number of removals: a live lookup that began before the last one is stale.
    pub fn removals(&self) -> u64 {
        self.removals
    }

    pub fn attachments(&self) -> BTreeSet<Attachment> {
        self.records.values().filter_map(|entry| Attachment::from_record(&entry.record)).collect()
    }

    pub fn owner(&self, address: IpAddr) -> Owner {
        let Some(claimants) = self.claimants.get(&address) else { return Owner::Unknown };
        // A pod's record is newer than its `podIPs`, for example after a reboot that reassigned addresses.
        let by_pod_ips = claimants.pods.iter();
        let by_pod_ips = by_pod_ips.filter(|uid| !self.released.contains(*uid) && !self.has_record_since_boot(uid));
        let mut owners: Vec<&Arc<Pod>> = by_pod_ips.filter_map(|uid| self.eligible_pod(uid)).collect();
        let mut proven = self.synced && !self.runtime_writes_records;
        let mut newest_live = None;
        let mut unknown: Vec<&IndexedRecord> = Vec::new();
        for entry in claimants.records.iter().filter_map(|id| self.records.get(id)) {
            let uid = &entry.record.pod;
            if entry.record.before_boot {
                proven |= owners.iter().any(|owner| owner.uid == *uid) && !self.has_record_since_boot(uid);
            } else if let Some(pod) = self.eligible_pod(uid) {
                match self.is_current(entry, pod) {
                    Some(false) => continue,
                    current => proven |= current.is_some(),
                }
                newest_live = newest_live.max(Some(entry.arrival));
                if !owners.iter().any(|owner| owner.uid == *uid) {
                    owners.push(pod);
                }
            } else if owners.iter().any(|owner| owner.mirror_of.as_ref() == Some(uid)) {
                proven = true;
            } else if !self.pods.contains_key(uid) {
                unknown.push(entry);
            }
        }
        // An orphaned record without rivals stays stale. If arrivals are equal, the list decides: it is newer than
        // both.
        let blocks = |entry: &&&IndexedRecord| {
            !entry.orphaned || (!owners.is_empty() && newest_live.is_none_or(|live| live < entry.arrival))
        };
        if let Some(entry) = unknown.iter().filter(blocks).max_by_key(|entry| entry.arrival) {
            return Owner::Pending(entry.record.pod.clone());
        }
        match &owners[..] {
            [] => Owner::Unknown,
            [pod] if proven => Owner::Pod(Arc::clone(pod)),
            [pod] => Owner::Unproven(Arc::clone(pod)),
            several => {
                let names: Vec<_> =
                    several.iter().map(|pod| format!("{}/{}", pod.account.namespace, pod.name)).collect();
                Owner::Ambiguous(names.join(" and "))
            }
        }
    }

    /// Returns the pod if it can own an address.
    fn eligible_pod(&self, uid: &PodUid) -> Option<&Arc<Pod>> {
        self.pods.get(uid).filter(|pod| !pod.ended && !pod.host_network)
    }

    fn is_pending(&self, entry: &IndexedRecord) -> bool {
        !entry.orphaned && !self.pods.contains_key(&entry.record.pod)
    }

    fn records_since_boot(&self, uid: &PodUid) -> impl Iterator<Item = &IndexedRecord> {
        let ids = self.records_of.get(uid).into_iter().flatten();
        ids.filter_map(|id| self.records.get(id)).filter(|entry| !entry.record.before_boot)
    }

    fn has_record_since_boot(&self, uid: &PodUid) -> bool {
        self.records_since_boot(uid).next().is_some()
    }

    /// Returns whether the record belongs to its pod's current sandbox: a pod whose sandbox was recreated has two
    /// records for a while. `None` if neither arrival nor `podIPs` decide.
    fn is_current(&self, entry: &IndexedRecord, pod: &Pod) -> Option<bool> {
        let of_interface = self
            .records_since_boot(&entry.record.pod)
            .filter(|other| other.record.interface == entry.record.interface && other.record.id != entry.record.id);
        let others: Vec<_> = of_interface.collect();
        let reported =
            |entry: &IndexedRecord| entry.record.addresses.iter().any(|address| pod.addresses.contains(address));
        match others.iter().map(|other| other.arrival).max().cmp(&Some(entry.arrival)) {
            Ordering::Less => Some(true),
            Ordering::Greater => Some(false),
            Ordering::Equal if reported(entry) => Some(true),
            Ordering::Equal if others.iter().any(|other| other.arrival == entry.arrival && reported(other)) => {
                Some(false)
            }
            Ordering::Equal => None,
        }
    }

    fn put_pod(&mut self, mut pod: Pod) -> Vec<Change> {
        // Succeeded and Failed are final (https://kubernetes.io/docs/concepts/workloads/pods/pod-lifecycle/#pod-phase):
        // a live phase after one of them comes from a stale live lookup.
        pod.ended |= self.pods.get(&pod.uid).is_some_and(|before| before.ended);
        let pod = Arc::new(pod);
        let before = self.pods.insert(pod.uid.clone(), pod.clone());
        if before.as_ref() == Some(&pod) {
            return Vec::new();
        }
        if let Some(before) = &before {
            self.remove_pod_claims(before);
        }
        for address in &pod.addresses {
            self.claimants.entry(address.to_canonical()).or_default().pods.insert(pod.uid.clone());
        }
        self.runtime_writes_records |= self.has_record_since_boot(&pod.uid);
        let live = |pod: &Pod| !pod.ended && !pod.host_network;
        match (before.is_some_and(|before| live(&before)), live(&pod)) {
            (false, true) => vec![Change::Bound(Workload(pod))],
            (true, false) => vec![Change::Gone(pod.uid.clone())],
            _ => Vec::new(),
        }
    }

    fn remove_pod(&mut self, uid: &PodUid) -> Option<Change> {
        // Records may outlive their pod; they must not look like records of a pod that is yet to appear.
        for id in self.records_of.get(uid).into_iter().flatten() {
            if let Some(entry) = self.records.get_mut(id) {
                entry.orphaned = true;
            }
        }
        let pod = self.pods.remove(uid)?;
        self.remove_pod_claims(&pod);
        self.released.remove(uid);
        Some(Change::Gone(pod.uid.clone()))
    }

    fn put_record(&mut self, record: Record) {
        // An unchanged record that is read again keeps its arrival.
        if self.records.get(&record.id).is_some_and(|entry| entry.record == record) {
            return;
        }
        if !self.scanning {
            self.arrivals += 1;
        }
        self.remove_record(&record.id);
        for address in &record.addresses {
            self.claimants.entry(address.to_canonical()).or_default().records.insert(record.id.clone());
        }
        self.records_of.entry(record.pod.clone()).or_default().insert(record.id.clone());
        if !record.before_boot {
            self.released.remove(&record.pod);
            self.runtime_writes_records |= !self.scanning || self.pods.contains_key(&record.pod);
        }
        let entry = IndexedRecord { arrival: self.arrivals, orphaned: false, before_list: false, record };
        self.records.insert(entry.record.id.clone(), entry);
    }

    fn remove_record(&mut self, id: &Arc<str>) {
        let Some(entry) = self.records.remove(id) else { return };
        for address in &entry.record.addresses {
            self.remove_claim(*address, |claimants| claimants.records.remove(id));
        }
        let uid = entry.record.pod;
        if let Entry::Occupied(mut records) = self.records_of.entry(uid.clone()) {
            records.get_mut().remove(id);
            if records.get().is_empty() {
                records.remove();
            }
        }
        if self.pods.contains_key(&uid) && !self.has_record_since_boot(&uid) {
            self.released.insert(uid);
        }
    }

    fn remove_pod_claims(&mut self, pod: &Pod) {
        for address in &pod.addresses {
            self.remove_claim(*address, |claimants| claimants.pods.remove(&pod.uid));
        }
    }

    fn remove_claim(&mut self, address: IpAddr, remove: impl FnOnce(&mut Claimants) -> bool) {
        if let Entry::Occupied(mut entry) = self.claimants.entry(address.to_canonical()) {
            remove(entry.get_mut());
            if entry.get().pods.is_empty() && entry.get().records.is_empty() {
                entry.remove();
            }
        }
    }
}

#[cfg(test)]
#[path = "pod_index_tests.rs"]
mod tests;
