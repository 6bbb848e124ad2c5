//! Address → pod, as a state machine: [`Directory::apply`] takes events, [`Directory::owner`] answers. Pure: no clock,
//! no I/O, so that every order of events can be tested.
//!
//! *Who a pod is* comes from the API server, from its binding to this node on; *which address it has* from two
//! sources, whichever comes first: its `podIPs`, and the CNI record that the container runtime writes before the pod
//! starts. Rules, each on the safe side:
//!
//! - A pod that has ended (Succeeded, Failed) or uses the host's network owns no address. A terminating pod does until
//!   it is gone.
//! - Where the runtime writes records, an address is a pod's only by a record of that pod. The `podIPs` of a pod without
//!   one can contradict another pod's record, but prove nothing alone. A record from before the boot proves what
//!   `podIPs` say too, and nothing else.
//! - A pod whose records have all gone has released its address, whatever the API server still shows.
//! - A pending record (of a pod that the API server has not shown yet) blocks its address, whoever had it before: the
//!   watch may lag, or be dead. A record that was there before the pods were listed and names none of them is stale; it
//!   blocks those that no record proves, and those whose record arrived before it.
//!   A static pod's record names it by the kubelet's UID, which its mirror in the API server refers to.
//! - Two live claimants of an address: neither gets it.
//! - Records have no time, since clocks go back: they are ordered by arrival. Of two sandboxes of one pod that one scan
//!   found, `podIPs` tell which is current; until they do, neither is.
//! - A live read is void once a pod was removed after it began, so that no late answer brings back a deleted pod.

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

/// What the sources tell.
#[derive(Debug, Clone)]
pub enum Event {
    /// The API server is about to tell of every pod of this node. What is known stays until it has.
    ListStarted,
    /// A pod is as told.
    Pod(Pod),
    /// A live read found these pods. It began when [`Directory::removals`] was `began`.
    Read {
        began: u64,
        pods: Vec<Pod>,
    },
    /// Every pod has been told of: those that were not are gone.
    ListDone,
    PodGone(PodUid),
    /// A CNI record was written.
    Record(Record),
    /// A CNI record was removed.
    RecordGone(Arc<str>),
    /// The records that follow, up to [`Event::RecordsAre`], are read in no order.
    ScanStarted,
    /// No other CNI records are there than these.
    RecordsAre(Vec<Arc<str>>),
}

/// A CNI record: which pod was given which addresses on this node.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Record {
    /// The record's file name.
    pub id: Arc<str>,
    pub pod: PodUid,
    pub interface: Arc<str>,
    /// The node's interfaces that belong to it.
    pub interfaces: Vec<Arc<str>>,
    /// MAC address of the pod's interface.
    pub mac: Option<[u8; 6]>,
    pub addresses: Vec<IpAddr>,
    /// Dated before the node booted: left behind by the reboot, or written before the clock was set forward.
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

/// What became of a pod by an event.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Change {
    /// It was bound to this node, and is going to ask soon.
    Bound(Workload),
    /// It will not ask again.
    Gone(PodUid),
}

/// Who has an address.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Owner {
    Pod(Arc<Pod>),
    /// A pod that the API server has not shown yet.
    NotYet(PodUid),
    Nobody,
    /// Names the claimants.
    Several(String),
    /// The only claimant, but no current record proves it where the runtime writes records.
    Unproven(Arc<Pod>),
}

#[derive(Debug, Default)]
pub struct Directory {
    pods: HashMap<PodUid, Arc<Pod>>,
    records: HashMap<Arc<str>, Held>,
    records_of: HashMap<PodUid, BTreeSet<Arc<str>>>,
    /// Pods of `pods` whose last record of this boot was removed.
    released: HashSet<PodUid>,
    /// The runtime writes records: one named a pod that the API server shows, or arrived after the first scan.
    records_work: bool,
    /// Number of the last record event, or of the scan under way.
    arrivals: u64,
    scanning: bool,
    claims: HashMap<IpAddr, Claims>,
    synced: bool,
    /// Pods that the list under way has told of.
    listing: Option<HashSet<PodUid>>,
    /// How often pods were removed.
    removals: u64,
}

#[derive(Debug)]
struct Held {
    record: Record,
    /// Order of arrival. Records of one scan share it: their order is unknown.
    arrival: u64,
    /// Its pod was not in a list that began after the record was written, or has gone since: it is not going to show.
    outlived: bool,
    /// It was there when the list under way began.
    before_list: bool,
}

#[derive(Debug, Default)]
struct Claims {
    pods: BTreeSet<PodUid>,
    records: BTreeSet<Arc<str>>,
}

impl Directory {
    pub fn apply(&mut self, event: Event) -> Vec<Change> {
        match event {
            Event::ListStarted => {
                self.listing = Some(HashSet::new());
                self.records.values_mut().for_each(|held| held.before_list = true);
                Vec::new()
            }
            Event::Pod(pod) => {
                if let Some(listed) = &mut self.listing {
                    listed.insert(pod.uid.clone());
                }
                self.put_pod(pod)
            }
            // The list under way may be older or newer than the read: it decides about pods that it does not name.
            Event::Read { began, pods } if began == self.removals => {
                pods.into_iter().flat_map(|pod| self.put_pod(pod)).collect()
            }
            Event::Read { .. } => Vec::new(),
            Event::ListDone => {
                self.removals += 1;
                let listed = self.listing.take().unwrap_or_default();
                let missing: Vec<_> = self.pods.keys().filter(|uid| !listed.contains(*uid)).cloned().collect();
                let changes = missing.into_iter().filter_map(|uid| self.remove_pod(&uid)).collect();
                for held in self.records.values_mut().filter(|held| held.before_list) {
                    held.outlived = !self.pods.contains_key(&held.record.pod);
                }
                self.synced = true;
                changes
            }
            Event::PodGone(uid) => {
                self.removals += 1;
                self.remove_pod(&uid).into_iter().collect()
            }
            Event::ScanStarted => {
                // A scan that was broken off goes on: what it did not reach is no newer.
                if !std::mem::replace(&mut self.scanning, true) {
                    self.arrivals += 1;
                }
                Vec::new()
            }
            Event::Record(record) => {
                self.put_record(record);
                Vec::new()
            }
            Event::RecordGone(id) => {
                self.remove_record(&id);
                Vec::new()
            }
            Event::RecordsAre(present) => {
                self.scanning = false;
                let present: HashSet<_> = present.into_iter().collect();
                let gone: Vec<_> = self.records.keys().filter(|id| !present.contains(*id)).cloned().collect();
                gone.iter().for_each(|id| self.remove_record(id));
                Vec::new()
            }
        }
    }

    /// Whether every pod of this node has been told of at least once.
    pub fn synced(&self) -> bool {
        self.synced
    }

    pub fn knows(&self, uid: &PodUid) -> bool {
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

    /// Records that name a live pod, that name one which may yet show, and that are of no use.
    pub fn record_states(&self) -> (usize, usize, usize) {
        let since_boot = || self.records.values().filter(|held| !held.record.before_boot);
        let in_use = since_boot().filter(|held| self.is_live(&held.record.pod)).count();
        let pending = since_boot().filter(|held| self.is_pending(held)).count();
        (in_use, pending, since_boot().count() - in_use - pending)
    }

    /// How often pods were removed: a live read that began before the last removal is out of date.
    pub fn removals(&self) -> u64 {
        self.removals
    }

    pub fn attachments(&self) -> BTreeSet<Attachment> {
        self.records.values().filter_map(|held| Attachment::of(&held.record)).collect()
    }

    pub fn owner(&self, address: IpAddr) -> Owner {
        let Some(claims) = self.claims.get(&address) else { return Owner::Nobody };
        // A pod's record is newer than what the API server shows of the pod, as after a reboot that dealt addresses anew.
        let shown = claims.pods.iter().filter(|uid| !self.released.contains(*uid) && !self.has_record_since_boot(uid));
        let mut owners: Vec<&Arc<Pod>> = shown.filter_map(|uid| self.may_own(uid)).collect();
        let mut proven = self.synced && !self.records_work;
        let mut newest_live = None;
        let mut unknown: Vec<&Held> = Vec::new();
        for held in claims.records.iter().filter_map(|id| self.records.get(id)) {
            let uid = &held.record.pod;
            if held.record.before_boot {
                proven |= owners.iter().any(|owner| owner.uid == *uid) && !self.has_record_since_boot(uid);
            } else if let Some(pod) = self.may_own(uid) {
                match self.is_current(held, pod) {
                    Some(false) => continue,
                    current => proven |= current.is_some(),
                }
                newest_live = newest_live.max(Some(held.arrival));
                if !owners.iter().any(|owner| owner.uid == *uid) {
                    owners.push(pod);
                }
            } else if owners.iter().any(|owner| owner.mirror_of.as_ref() == Some(uid)) {
                proven = true;
            } else if !self.pods.contains_key(uid) {
                unknown.push(held);
            }
        }
        // What nobody else claims may stay stale. A tie of arrival is decided by the list, which is newer than both.
        let blocks = |held: &&&Held| {
            !held.outlived || (!owners.is_empty() && newest_live.is_none_or(|live| live < held.arrival))
        };
        if let Some(held) = unknown.iter().filter(blocks).max_by_key(|held| held.arrival) {
            return Owner::NotYet(held.record.pod.clone());
        }
        match &owners[..] {
            [] => Owner::Nobody,
            [pod] if proven => Owner::Pod(Arc::clone(pod)),
            [pod] => Owner::Unproven(Arc::clone(pod)),
            several => {
                let names: Vec<_> =
                    several.iter().map(|pod| format!("{}/{}", pod.account.namespace, pod.name)).collect();
                Owner::Several(names.join(" and "))
            }
        }
    }

    fn may_own(&self, uid: &PodUid) -> Option<&Arc<Pod>> {
        self.pods.get(uid).filter(|pod| !pod.ended && !pod.host_network)
    }

    fn is_pending(&self, held: &Held) -> bool {
        !held.outlived && !self.pods.contains_key(&held.record.pod)
    }

    fn records_since_boot(&self, uid: &PodUid) -> impl Iterator<Item = &Held> {
        let ids = self.records_of.get(uid).into_iter().flatten();
        ids.filter_map(|id| self.records.get(id)).filter(|held| !held.record.before_boot)
    }

    fn has_record_since_boot(&self, uid: &PodUid) -> bool {
        self.records_since_boot(uid).next().is_some()
    }

    /// Whether the record is of its pod's current sandbox: a pod whose sandbox was made anew has two records for a
    /// while. `None` where neither arrival nor `podIPs` tell.
    fn is_current(&self, held: &Held, pod: &Pod) -> Option<bool> {
        let of_interface = self
            .records_since_boot(&held.record.pod)
            .filter(|other| other.record.interface == held.record.interface && other.record.id != held.record.id);
        let others: Vec<_> = of_interface.collect();
        let shown = |held: &Held| held.record.addresses.iter().any(|address| pod.addresses.contains(address));
        match others.iter().map(|other| other.arrival).max().cmp(&Some(held.arrival)) {
            Ordering::Less => Some(true),
            Ordering::Greater => Some(false),
            Ordering::Equal if shown(held) => Some(true),
            Ordering::Equal if others.iter().any(|other| other.arrival == held.arrival && shown(other)) => Some(false),
            Ordering::Equal => None,
        }
    }

    fn put_pod(&mut self, mut pod: Pod) -> Vec<Change> {
        // No pod leaves these phases (Kubernetes, "Pod lifecycle"): who says so is a live read that was overtaken.
        pod.ended |= self.pods.get(&pod.uid).is_some_and(|before| before.ended);
        let pod = Arc::new(pod);
        let before = self.pods.insert(pod.uid.clone(), pod.clone());
        if before.as_ref() == Some(&pod) {
            return Vec::new();
        }
        if let Some(before) = &before {
            self.unclaim(before);
        }
        for address in &pod.addresses {
            self.claims.entry(address.to_canonical()).or_default().pods.insert(pod.uid.clone());
        }
        self.records_work |= self.has_record_since_boot(&pod.uid);
        let live = |pod: &Pod| !pod.ended && !pod.host_network;
        match (before.is_some_and(|before| live(&before)), live(&pod)) {
            (false, true) => vec![Change::Bound(Workload(pod))],
            (true, false) => vec![Change::Gone(pod.uid.clone())],
            _ => Vec::new(),
        }
    }

    fn remove_pod(&mut self, uid: &PodUid) -> Option<Change> {
        // Its records may outlast it; they must not look like those of a pod that is still to be shown.
        for id in self.records_of.get(uid).into_iter().flatten() {
            if let Some(held) = self.records.get_mut(id) {
                held.outlived = true;
            }
        }
        let pod = self.pods.remove(uid)?;
        self.unclaim(&pod);
        self.released.remove(uid);
        Some(Change::Gone(pod.uid.clone()))
    }

    fn put_record(&mut self, record: Record) {
        // Read again, unchanged: it is as old as it was.
        if self.records.get(&record.id).is_some_and(|held| held.record == record) {
            return;
        }
        if !self.scanning {
            self.arrivals += 1;
        }
        self.remove_record(&record.id);
        for address in &record.addresses {
            self.claims.entry(address.to_canonical()).or_default().records.insert(record.id.clone());
        }
        self.records_of.entry(record.pod.clone()).or_default().insert(record.id.clone());
        if !record.before_boot {
            self.released.remove(&record.pod);
            self.records_work |= !self.scanning || self.pods.contains_key(&record.pod);
        }
        let held = Held { arrival: self.arrivals, outlived: false, before_list: false, record };
        self.records.insert(held.record.id.clone(), held);
    }

    fn remove_record(&mut self, id: &Arc<str>) {
        let Some(held) = self.records.remove(id) else { return };
        for address in &held.record.addresses {
            self.release(*address, |claims| claims.records.remove(id));
        }
        let uid = held.record.pod;
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

    fn unclaim(&mut self, pod: &Pod) {
        for address in &pod.addresses {
            self.release(*address, |claims| claims.pods.remove(&pod.uid));
        }
    }

    fn release(&mut self, address: IpAddr, claim: impl FnOnce(&mut Claims) -> bool) {
        if let Entry::Occupied(mut entry) = self.claims.entry(address.to_canonical()) {
            claim(entry.get_mut());
            if entry.get().pods.is_empty() && entry.get().records.is_empty() {
                entry.remove();
            }
        }
    }
}

#[cfg(test)]
#[path = "directory_tests.rs"]
mod tests;
