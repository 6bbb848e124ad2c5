//! Address → pod, as a state machine: [`Directory::apply`] takes events, [`Directory::owner`] answers. Pure: no clock,
//! no I/O, so that every order of events can be tested.
//!
//! *Who a pod is* comes from the API server, from its binding to this node on; *which address it has* from two
//! sources, whichever comes first: its `podIPs`, and the CNI record that the container runtime writes before the pod
//! starts. Rules, each on the safe side:
//!
//! - A pod that has ended (Succeeded, Failed) or uses the host's network owns no address. A terminating pod does until
//!   it is gone.
//! - A pod whose records have all gone has handed its address back, whatever the API server still shows.
//! - A record of a pod that the watch has not shown yet makes its address *not yet known*, whoever had it before: the
//!   watch may lag, or be dead. A record that was there before the pods were listed and names none of them is stale;
//!   but what the API server shows of another pod alone is no proof of that, since that may be older than the record.
//!   A static pod's record names it by the kubelet's UID, which its mirror in the API server refers to.
//! - Two live claimants of an address: neither gets it.
//! - A live read is void once a pod was removed after it began, so that no late answer brings back a deleted pod.

use std::{
    collections::{BTreeSet, HashMap, HashSet, VecDeque, hash_map::Entry},
    net::IpAddr,
    sync::Arc,
};

use super::{
    Workload,
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
    pub addresses: Vec<IpAddr>,
    /// When it was written: seconds and nanoseconds of its modification time, compared with other records only.
    pub written: (i64, i64),
}

impl Record {
    #[cfg(test)]
    pub(super) fn sample(id: &str, uid: &str, address: &str) -> Self {
        Self {
            id: id.into(),
            pod: PodUid(uid.into()),
            interface: "eth0".into(),
            addresses: vec![address.parse().unwrap()],
            written: (1, 0),
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
}

#[derive(Debug, Default)]
pub struct Directory {
    pods: HashMap<PodUid, Arc<Pod>>,
    records: HashMap<Arc<str>, Held>,
    records_of: HashMap<PodUid, BTreeSet<Arc<str>>>,
    handed_back: HandedBack,
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
    /// Its pod was not in a list that began after the record was written, or has gone since: it is not going to show.
    outlived: bool,
    /// It was there when the list under way began.
    before_list: bool,
}

/// Pods whose records have all gone, the last few thousand of them: whatever is told of them later, and in whatever
/// order, they have no address any more.
#[derive(Debug, Default)]
struct HandedBack {
    pods: HashSet<PodUid>,
    in_order: VecDeque<PodUid>,
}

impl HandedBack {
    const MAX: usize = 4_096;

    fn remove(&mut self, pod: &PodUid) {
        if self.pods.remove(pod) {
            // Or it would be the oldest one day, and be forgotten when it has handed its address back again.
            self.in_order.retain(|other| other != pod);
        }
    }

    fn insert(&mut self, pod: PodUid) {
        if self.pods.insert(pod.clone()) {
            self.in_order.push_back(pod);
        }
        if self.in_order.len() > Self::MAX
            && let Some(oldest) = self.in_order.pop_front()
        {
            self.pods.remove(&oldest);
        }
    }
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
            Event::Record(record) => {
                self.put_record(record);
                Vec::new()
            }
            Event::RecordGone(id) => {
                self.remove_record(&id);
                Vec::new()
            }
            Event::RecordsAre(present) => {
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
        let in_use = self.records.values().filter(|held| self.is_live(&held.record.pod)).count();
        let pending = self.records.values().filter(|held| self.is_pending(held)).count();
        (in_use, pending, self.records.len() - in_use - pending)
    }

    /// How often pods were removed: a live read that began before the last removal is out of date.
    pub fn removals(&self) -> u64 {
        self.removals
    }

    pub fn owner(&self, address: IpAddr) -> Owner {
        let Some(claims) = self.claims.get(&address) else { return Owner::Nobody };
        let shown = claims.pods.iter().filter(|uid| !self.handed_back.pods.contains(*uid));
        let mut owners: Vec<&Arc<Pod>> = shown.filter_map(|uid| self.may_own(uid)).collect();
        let mut newest_live = None;
        let (mut newest_pending, mut newest_unknown): (Option<&Record>, Option<&Record>) = (None, None);
        for held in claims.records.iter().filter_map(|id| self.records.get(id)) {
            let record = &held.record;
            if let Some(pod) = self.may_own(&record.pod).filter(|_| self.is_newest(record)) {
                newest_live = newest_live.max(Some(record.written));
                if !owners.iter().any(|owner| owner.uid == pod.uid) {
                    owners.push(pod);
                }
            } else if !self.pods.contains_key(&record.pod)
                && !owners.iter().any(|owner| owner.mirror_of.as_ref() == Some(&record.pod))
            {
                let newest = if held.outlived { &mut newest_unknown } else { &mut newest_pending };
                *newest = newest.filter(|other| other.written >= record.written).or(Some(record));
            }
        }
        // What nobody else claims may be stale and stay so.
        let stale = newest_unknown.filter(|_| !owners.is_empty());
        if let Some(unknown) = newest_pending.into_iter().chain(stale).max_by_key(|record| record.written)
            && newest_live.is_none_or(|live| live <= unknown.written)
        {
            return Owner::NotYet(unknown.pod.clone());
        }
        match &owners[..] {
            [] => Owner::Nobody,
            [pod] => Owner::Pod(Arc::clone(pod)),
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

    /// A pod whose sandbox was made anew has two records for a while.
    fn is_newest(&self, record: &Record) -> bool {
        let of_its_pod = self.records_of.get(&record.pod).into_iter().flatten();
        of_its_pod
            .filter_map(|id| self.records.get(id))
            .all(|held| held.record.interface != record.interface || held.record.written <= record.written)
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
        let live = |pod: &Pod| !pod.ended && !pod.host_network;
        match (before.is_some_and(|before| live(&before)), live(&pod)) {
            (false, true) => vec![Change::Bound(Workload(pod))],
            (true, false) => vec![Change::Gone(pod.uid.clone())],
            _ => Vec::new(),
        }
    }

    fn remove_pod(&mut self, uid: &PodUid) -> Option<Change> {
        let pod = self.pods.remove(uid)?;
        self.unclaim(&pod);
        // Its records may outlast it; they must not look like those of a pod that is still to be shown.
        for id in self.records_of.get(uid).into_iter().flatten() {
            if let Some(held) = self.records.get_mut(id) {
                held.outlived = true;
            }
        }
        Some(Change::Gone(pod.uid.clone()))
    }

    fn put_record(&mut self, record: Record) {
        self.remove_record(&record.id);
        for address in &record.addresses {
            self.claims.entry(address.to_canonical()).or_default().records.insert(record.id.clone());
        }
        self.records_of.entry(record.pod.clone()).or_default().insert(record.id.clone());
        self.handed_back.remove(&record.pod);
        self.records.insert(record.id.clone(), Held { outlived: false, before_list: false, record });
    }

    fn remove_record(&mut self, id: &Arc<str>) {
        let Some(held) = self.records.remove(id) else { return };
        for address in &held.record.addresses {
            self.release(*address, |claims| claims.records.remove(id));
        }
        if let Entry::Occupied(mut records) = self.records_of.entry(held.record.pod) {
            records.get_mut().remove(id);
            if records.get().is_empty() {
                self.handed_back.insert(records.remove_entry().0);
            }
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
