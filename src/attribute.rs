//! Second stage: [`ClientConn`] → [`Workload`]: identifies the pod that is calling.
//!
//! Attribution combines three sources: the kernel's view of the connection, the API server's view of this node's pods,
//! and the node's own CNI records of pod addresses. It returns the current owner of the source address or a refusal
//! (it fails closed), never another pod. Knows no HTTP and no AWS; later stages do not know how a pod was identified.

mod attachment;
pub mod cni;
pub mod file;
pub mod pod;
pub mod pod_index;
pub mod watch;

use std::{
    collections::{BTreeSet, HashMap, hash_map::Entry},
    fmt,
    net::{IpAddr, Ipv4Addr},
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    time::Duration,
};

use futures::future::BoxFuture;
use parking_lot::{Mutex, RwLock};
use tokio::{
    sync::{Notify, mpsc, watch as signal},
    time::{Instant, timeout, timeout_at},
};

pub use attachment::{Attachment, pod_ports};
pub use pod::{PodUid, ServiceAccountName};
pub use pod_index::{Change, Event, PodIndex};

use crate::{
    clock::UnixTime,
    intercept::ClientConn,
    observe::Metrics,
    refusal::{Reason, Refusal},
};
use pod::Pod;
use pod_index::Owner;

/// Returns whether the AWS VPC CNI uses the address for IPv4 egress of pods in IPv6 clusters. Only its plugin knows
/// which pod has such an address.
pub fn is_eks_egress(address: IpAddr) -> bool {
    matches!(address.to_canonical(), IpAddr::V4(v4) if v4.to_bits() >> 10 == Ipv4Addr::new(169, 254, 172, 0).to_bits() >> 10)
}

/// Maximum wait for an unknown pod. Many SDKs time out after 1 s, so the refusal must be sent before that.
pub const ATTRIBUTION_TIMEOUT: Duration = Duration::from_millis(800);
/// Wait before a live lookup: the watch may lag. Early enough for an answer before [`ATTRIBUTION_TIMEOUT`].
const LIVE_LOOKUP_DELAY: Duration = Duration::from_millis(400);
/// Deadline of one live lookup, including its wait for other lookups.
const LIVE_LOOKUP_TIMEOUT: Duration = Duration::from_secs(10);
/// Minimum interval between live lookups of one address: rate-limits processes that stay unknown.
const LIVE_LOOKUP_INTERVAL: Duration = Duration::from_secs(2);

/// A pod of this node, identified as the caller or bound to the node and expected to call. Only this stage creates one.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Workload(Arc<Pod>);

impl Workload {
    pub fn uid(&self) -> &PodUid {
        &self.0.uid
    }

    pub fn namespace(&self) -> &str {
        &self.0.account.namespace
    }

    pub fn pod(&self) -> &str {
        &self.0.name
    }

    pub fn service_account(&self) -> &ServiceAccountName {
        &self.0.account
    }

    /// Returns the pod's creation time, by the API server's clock.
    pub fn created(&self) -> UnixTime {
        self.0.created
    }

    /// Creates a workload for tests of later stages.
    #[cfg(any(test, fuzzing))]
    pub(crate) fn sample(pod: &str, uid: &str, service_account: &str) -> Self {
        Self::sample_created(pod, uid, service_account, UnixTime(0))
    }

    #[cfg(any(test, fuzzing))]
    pub(crate) fn sample_created(pod: &str, uid: &str, service_account: &str, created: UnixTime) -> Self {
        Self(Arc::new(Pod { created, ..Pod::sample(pod, uid, service_account, &[]) }))
    }
}

impl fmt::Display for Workload {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.namespace(), self.pod())
    }
}

/// Asks the API server once which pod has an address, and applies the answer to the pod index.
pub type LiveLookup = Box<dyn Fn(IpAddr) -> BoxFuture<'static, ()> + Send + Sync>;

/// The pod index, shared by all connections. Events change it and wake the requests that wait; nothing polls.
pub struct Attributor {
    index: RwLock<PodIndex>,
    changed: signal::Sender<()>,
    /// Number of events applied to the index.
    generation: AtomicU64,
    changes: mpsc::UnboundedSender<Change>,
    live_lookup: RwLock<Option<LiveLookup>>,
    /// Start of each address's last live lookup, for [`LIVE_LOOKUP_INTERVAL`].
    recent_lookups: Mutex<HashMap<IpAddr, Instant>>,
    /// A pod was seen that the watch should have reported.
    resync_requested: Notify,
    metrics: Metrics,
}

impl Attributor {
    /// Returns the attributor, and the pods that are bound and removed from now on, for prefetch and clean-up.
    pub fn new(metrics: Metrics) -> (Arc<Self>, mpsc::UnboundedReceiver<Change>) {
        let (changes, changed) = mpsc::unbounded_channel();
        let attributor = Self {
            index: RwLock::default(),
            changed: signal::Sender::new(()),
            generation: AtomicU64::new(0),
            changes,
            live_lookup: RwLock::default(),
            recent_lookups: Mutex::default(),
            resync_requested: Notify::new(),
            metrics,
        };
        (Arc::new(attributor), changed)
    }

    pub fn set_live_lookup(&self, lookup: LiveLookup) {
        *self.live_lookup.write() = Some(lookup);
    }

    pub fn apply(&self, event: Event) {
        let changes = {
            let mut index = self.index.write();
            let changes = index.apply(event);
            self.metrics.indexed_pods.set(i64::try_from(index.live_pods()).unwrap_or(i64::MAX));
            let (in_use, pending, stale) = index.record_states();
            self.metrics.cni_records(in_use, pending, stale);
            // Under the write lock: a reader that still sees the old generation has read the old index before it.
            self.generation.fetch_add(1, Ordering::SeqCst);
            changes
        };
        for change in changes {
            // Fails when the receiver is dropped, which happens at shutdown.
            let _ = self.changes.send(change);
        }
        self.changed.send_replace(());
    }

    /// Returns the generation of the index. While it is unchanged, so is every answer of [`Attributor::lookup`]. Read
    /// it before the lookup, so that a change between the two is noticed.
    pub fn generation(&self) -> u64 {
        self.generation.load(Ordering::SeqCst)
    }

    /// Returns the pod that is calling, without waiting.
    ///
    /// # Errors
    /// `Starting` if the pods of the node have not been listed yet; `AmbiguousAddress` if several pods claim the
    /// address; `UnknownPod` if no pod does, or if none can be proven to own it.
    pub fn lookup(&self, peer: &ClientConn) -> Result<Workload, Refusal> {
        let address = peer.source().ip();
        let index = self.index.read();
        match index.owner(address) {
            Owner::Pod(pod) => Ok(Workload(pod)),
            Owner::Unknown | Owner::Unproven(_) if !index.synced() => Err(Reason::Starting.into()),
            Owner::Unknown if is_eks_egress(address) => Err(Refusal::new(
                Reason::UnknownPod,
                format!(
                    "{address} is an IPv4 egress address of an IPv6 EKS cluster, which only its CNI plugin can map to \
                     a pod: set AWS_EC2_METADATA_SERVICE_ENDPOINT_MODE=IPv6 in the pod"
                ),
            )),
            Owner::Unknown => Err(Refusal::new(Reason::UnknownPod, format!("no pod of this node has {address}"))),
            Owner::Pending(uid) => Err(Refusal::new(
                Reason::UnknownPod,
                format!("a CNI record assigns {address} to pod UID {uid}, which the API server has not reported yet"),
            )),
            Owner::Unproven(pod) => Err(Refusal::new(
                Reason::UnknownPod,
                format!(
                    "no single CNI record proves that {address} belongs to pod {}/{}: check that --cni-results is the \
                     container runtime's directory, and recreate the pod",
                    pod.account.namespace, pod.name
                ),
            )),
            Owner::Ambiguous(claimants) => {
                Err(Refusal::new(Reason::AmbiguousAddress, format!("{address} is claimed by {claimants}")))
            }
        }
    }

    /// Returns the pod that is calling; waits until it is known, at most until `until`.
    ///
    /// # Errors
    /// The last refusal of [`Attributor::lookup`] if the pod is not known by `until`.
    pub async fn attribute(&self, peer: &ClientConn, until: Instant) -> Result<Workload, Refusal> {
        // Fast path: subscribing to changes costs more than the lookup.
        if let Ok(workload) = self.lookup(peer) {
            return Ok(workload);
        }
        let mut changed = self.changed.subscribe();
        let mut refusal = match self.lookup(peer) {
            Ok(workload) => return Ok(workload),
            Err(refusal) => refusal,
        };
        let live_lookup = async {
            tokio::time::sleep(LIVE_LOOKUP_DELAY).await;
            // The API server knew a pod that has a record before the runtime did, so the watch should have reported it.
            if self.is_pending(peer.source().ip()) {
                self.resync_requested.notify_one();
            }
            self.lookup_live(peer.source().ip());
            std::future::pending::<()>().await;
        };
        tokio::pin!(live_lookup);
        loop {
            let woken = async {
                tokio::select! {
                    changed = changed.changed() => changed.is_ok(),
                    () = &mut live_lookup => true,
                }
            };
            match timeout_at(until, woken).await {
                Ok(true) => match self.lookup(peer) {
                    Ok(workload) => return Ok(workload),
                    Err(later) => refusal = later,
                },
                Ok(false) | Err(_) => return Err(refusal),
            }
        }
    }

    /// Starts a live lookup, unless the address had one within [`LIVE_LOOKUP_INTERVAL`]. The lookup outlives its
    /// caller: its result wakes every waiting request and helps later ones.
    fn lookup_live(&self, address: IpAddr) {
        let lookup = self.live_lookup.read();
        let Some(lookup) = lookup.as_ref() else { return };
        let now = Instant::now();
        let mut recent = self.recent_lookups.lock();
        recent.retain(|_, at| now.duration_since(*at) < LIVE_LOOKUP_INTERVAL);
        if let Entry::Vacant(entry) = recent.entry(address) {
            entry.insert(now);
            tokio::spawn(timeout(LIVE_LOOKUP_TIMEOUT, lookup(address)));
        }
    }

    /// Waits until a pod is seen that the watch should have reported: the watch may be dead.
    pub(super) async fn resync_requested(&self) {
        self.resync_requested.notified().await;
    }

    /// Returns how many removals the index has seen. Read it before a live lookup begins.
    fn removals(&self) -> u64 {
        self.index.read().removals()
    }

    /// Applies the pods that a live lookup found, and returns whether they were valid: they are not if a pod was
    /// removed since `removals` was read. Requests a resync if the watch had not reported one of them.
    fn apply_live(&self, removals: u64, pods: Vec<Pod>) -> bool {
        if pods.is_empty() {
            return true;
        }
        let unreported = {
            let index = self.index.read();
            if index.removals() != removals {
                return false;
            }
            pods.iter().any(|pod| !index.contains(&pod.uid))
        };
        self.apply(Event::LiveLookup { removals, pods });
        if unreported {
            // After the event: a list that this request starts must not count the pod as listed.
            self.resync_requested.notify_one();
        }
        true
    }

    fn is_pending(&self, address: IpAddr) -> bool {
        let index = self.index.read();
        index.synced() && matches!(index.owner(address), Owner::Pending(_))
    }

    /// Returns the live pods of a service account on this node.
    pub fn pods_of(&self, account: &ServiceAccountName) -> Vec<Workload> {
        self.index.read().pods_of(account).map(|pod| Workload(pod.clone())).collect()
    }

    /// Returns whether a live pod on this node uses the service account and can request credentials.
    pub fn has_pods_of(&self, account: &ServiceAccountName) -> bool {
        self.index.read().pods_of(account).next().is_some()
    }

    /// Returns where the node's pods are attached to it, by their CNI records.
    pub fn attachments(&self) -> BTreeSet<Attachment> {
        self.index.read().attachments()
    }

    /// Returns a receiver that changes with every event of the index.
    pub fn changes(&self) -> signal::Receiver<()> {
        self.changed.subscribe()
    }

    /// Returns whether the pod is still a live pod of this node.
    pub fn is_live(&self, uid: &PodUid) -> bool {
        self.index.read().is_live(uid)
    }
}

impl fmt::Debug for Attributor {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Attributor").finish_non_exhaustive()
    }
}

#[cfg(test)]
mod tests;
