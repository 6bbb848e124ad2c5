//! Second stage: [`Peer`] → [`Workload`]: which pod is calling.
//!
//! The answer rests on what the kernel says of the connection, what the API server says of this node's pods, and what
//! the node's own CNI records say of their addresses. The answer is the current owner or a refusal, never someone else.
//! Knows no HTTP and no AWS; nothing after it knows how the answer came about.

mod attachment;
pub mod cni;
pub mod directory;
pub mod file;
pub mod pod;
pub mod watch;

use std::{
    collections::{BTreeSet, HashMap, hash_map::Entry},
    fmt,
    future::Future,
    net::{IpAddr, Ipv4Addr},
    pin::Pin,
    sync::{
        Arc, Mutex, PoisonError, RwLock,
        atomic::{AtomicU64, Ordering},
    },
    time::Duration,
};

use tokio::{
    sync::{Notify, mpsc, watch as signal},
    time::{Instant, timeout, timeout_at},
};

pub use attachment::{Attachment, pod_ports};
pub use directory::{Change, Directory, Event};
pub use pod::{PodUid, ServiceAccountName};

use crate::{
    intercept::Peer,
    observe::Metrics,
    refusal::{Reason, Refusal},
};
use directory::Owner;
use pod::Pod;

/// Addresses that the AWS VPC CNI gives pods of IPv6 clusters for IPv4: only its plugin knows whose they are.
pub fn is_eks_egress(address: IpAddr) -> bool {
    matches!(address.to_canonical(), IpAddr::V4(v4) if v4.to_bits() >> 10 == Ipv4Addr::new(169, 254, 172, 0).to_bits() >> 10)
}

/// Many SDKs give up after 1 s, so a pod that is not known by now gets its answer before that.
pub const PATIENCE: Duration = Duration::from_millis(800);
/// When the watch seems to lag, one read of the API server; early enough to be back before [`PATIENCE`] ends.
const LIVE_READ_AFTER: Duration = Duration::from_millis(400);
/// Of one read, its waiting for others included.
const LIVE_READ_LIMIT: Duration = Duration::from_secs(10);
/// Between two reads for one address: a process that stays unknown may ask as often as it likes.
const LIVE_READ_PAUSE: Duration = Duration::from_secs(2);

/// A pod that is calling, or that was bound to this node and is going to. Only this stage makes one.
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

    /// When the pod was created, in seconds since the epoch by the API server's clock.
    pub fn created(&self) -> u64 {
        self.0.created
    }

    /// For tests of later stages.
    #[cfg(any(test, fuzzing))]
    pub(crate) fn sample(pod: &str, uid: &str, service_account: &str) -> Self {
        Self::sample_created(pod, uid, service_account, 0)
    }

    #[cfg(any(test, fuzzing))]
    pub(crate) fn sample_created(pod: &str, uid: &str, service_account: &str, created: u64) -> Self {
        Self(Arc::new(Pod { created, ..Pod::sample(pod, uid, service_account, &[]) }))
    }
}

impl fmt::Display for Workload {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.namespace(), self.pod())
    }
}

/// Asks the API server once who has an address, and applies the answer to the directory.
pub type LiveRead = Box<dyn Fn(IpAddr) -> Pin<Box<dyn Future<Output = ()> + Send>> + Send + Sync>;

/// The directory, as all connections share it: events go in, whoever waits is woken, nobody polls.
pub struct Attributor {
    directory: RwLock<Directory>,
    changed: signal::Sender<()>,
    /// How often the directory has changed.
    edition: AtomicU64,
    changes: mpsc::UnboundedSender<Change>,
    live_read: RwLock<Option<LiveRead>>,
    /// When each address was last read live, of the last seconds.
    reads: Mutex<HashMap<IpAddr, Instant>>,
    /// A pod is here that the watch should have told of.
    doubt: Notify,
    metrics: Metrics,
}

impl Attributor {
    /// The second value tells of pods that came and went, for whoever fetches ahead and clears up behind.
    pub fn new(metrics: Metrics) -> (Arc<Self>, mpsc::UnboundedReceiver<Change>) {
        let (changes, changed) = mpsc::unbounded_channel();
        let attributor = Self {
            directory: RwLock::default(),
            changed: signal::Sender::new(()),
            edition: AtomicU64::new(0),
            changes,
            live_read: RwLock::default(),
            reads: Mutex::default(),
            doubt: Notify::new(),
            metrics,
        };
        (Arc::new(attributor), changed)
    }

    pub fn set_live_read(&self, read: LiveRead) {
        *self.live_read.write().unwrap_or_else(PoisonError::into_inner) = Some(read);
    }

    pub fn apply(&self, event: Event) {
        let changes = {
            let mut directory = self.directory.write().unwrap_or_else(PoisonError::into_inner);
            let changes = directory.apply(event);
            self.metrics.directory_pods.set(i64::try_from(directory.live_pods()).unwrap_or(i64::MAX));
            let (in_use, pending, stale) = directory.record_states();
            self.metrics.cni_records(in_use, pending, stale);
            // While nobody can read: whoever sees the old edition after that has read the old directory before it.
            self.edition.fetch_add(1, Ordering::SeqCst);
            changes
        };
        for change in changes {
            // Nobody listens any more: the agent is ending.
            let _ = self.changes.send(change);
        }
        self.changed.send_replace(());
    }

    /// For as long as it is the same, so is every answer of [`Attributor::peek`]. To be read before the answer.
    pub fn edition(&self) -> u64 {
        self.edition.load(Ordering::SeqCst)
    }

    /// Who is calling, as far as is known at this moment.
    ///
    /// # Errors
    /// The address has no owner yet, or too many, or the directory was not read yet.
    pub fn peek(&self, peer: &Peer) -> Result<Workload, Refusal> {
        let address = peer.source().ip();
        let directory = self.directory.read().unwrap_or_else(PoisonError::into_inner);
        match directory.owner(address) {
            Owner::Pod(pod) => Ok(Workload(pod)),
            Owner::Nobody | Owner::Unproven(_) if !directory.synced() => Err(Reason::Starting.into()),
            Owner::Nobody if is_eks_egress(address) => Err(Refusal::new(
                Reason::UnknownPod,
                format!(
                    "{address} is an IPv4 address that only the CNI plugin of an IPv6 EKS cluster knows: set \
                     AWS_EC2_METADATA_SERVICE_ENDPOINT_MODE=IPv6 in the pod"
                ),
            )),
            Owner::Nobody => Err(Refusal::new(Reason::UnknownPod, format!("nobody has {address}"))),
            Owner::NotYet(uid) => Err(Refusal::new(
                Reason::UnknownPod,
                format!("{address} belongs to pod UID {uid} by its CNI record; the API server has not shown it yet"),
            )),
            Owner::Unproven(pod) => Err(Refusal::new(
                Reason::UnknownPod,
                format!(
                    "no single CNI record proves that {address} is that of pod {}/{}: check that --cni-results is the \
                     runtime's folder, and recreate the pod",
                    pod.account.namespace, pod.name
                ),
            )),
            Owner::Several(claimants) => {
                Err(Refusal::new(Reason::AmbiguousAddress, format!("{address} is claimed by {claimants}")))
            }
        }
    }

    /// Who is calling; waits for the answer up to `until`.
    ///
    /// # Errors
    /// The last refusal, when no answer came in time.
    pub async fn attribute(&self, peer: &Peer, until: Instant) -> Result<Workload, Refusal> {
        // The usual case first: following changes costs more than the answer.
        if let Ok(workload) = self.peek(peer) {
            return Ok(workload);
        }
        let mut changed = self.changed.subscribe();
        let mut refusal = match self.peek(peer) {
            Ok(workload) => return Ok(workload),
            Err(refusal) => refusal,
        };
        let live_read = async {
            tokio::time::sleep(LIVE_READ_AFTER).await;
            // The API server knew of a pod with a record before the runtime did.
            if self.is_announced(peer.source().ip()) {
                self.doubt.notify_one();
            }
            self.read_live(peer.source().ip());
            std::future::pending::<()>().await;
        };
        tokio::pin!(live_read);
        loop {
            let woken = async {
                tokio::select! {
                    changed = changed.changed() => changed.is_ok(),
                    () = &mut live_read => true,
                }
            };
            match timeout_at(until, woken).await {
                Ok(true) => match self.peek(peer) {
                    Ok(workload) => return Ok(workload),
                    Err(later) => refusal = later,
                },
                Ok(false) | Err(_) => return Err(refusal),
            }
        }
    }

    /// Unless somebody has just done so. Whatever comes of it wakes whoever waits, and is of use to whoever comes next:
    /// the read goes on when this caller has given up.
    fn read_live(&self, address: IpAddr) {
        let read = self.live_read.read().unwrap_or_else(PoisonError::into_inner);
        let Some(read) = read.as_ref() else { return };
        let now = Instant::now();
        let mut reads = self.reads.lock().unwrap_or_else(PoisonError::into_inner);
        reads.retain(|_, at| now.duration_since(*at) < LIVE_READ_PAUSE);
        if let Entry::Vacant(entry) = reads.entry(address) {
            entry.insert(now);
            tokio::spawn(timeout(LIVE_READ_LIMIT, read(address)));
        }
    }

    /// Returns when a pod has shown here of which the watch should have told: it may be dead.
    pub(super) async fn doubted(&self) {
        self.doubt.notified().await;
    }

    /// How often pods were removed: to be read before a live read begins.
    fn removals(&self) -> u64 {
        self.directory.read().unwrap_or_else(PoisonError::into_inner).removals()
    }

    /// Applies what a live read found, and returns whether it counted: not if a pod was removed after it `began`. A pod
    /// that nobody had told of casts doubt on the watch.
    fn found(&self, began: u64, pods: Vec<Pod>) -> bool {
        if pods.is_empty() {
            return true;
        }
        let untold = {
            let directory = self.directory.read().unwrap_or_else(PoisonError::into_inner);
            if directory.removals() != began {
                return false;
            }
            pods.iter().any(|pod| !directory.knows(&pod.uid))
        };
        self.apply(Event::Read { began, pods });
        if untold {
            // After that, so that a list which begins by it does not count the pod among its own.
            self.doubt.notify_one();
        }
        true
    }

    fn is_announced(&self, address: IpAddr) -> bool {
        let directory = self.directory.read().unwrap_or_else(PoisonError::into_inner);
        directory.synced() && matches!(directory.owner(address), Owner::NotYet(_))
    }

    /// The live pods of a service account on this node.
    pub fn pods_of(&self, account: &ServiceAccountName) -> Vec<Workload> {
        let directory = self.directory.read().unwrap_or_else(PoisonError::into_inner);
        directory.pods_of(account).map(|pod| Workload(pod.clone())).collect()
    }

    /// Whether a live pod on this node uses the service account, and can ask for credentials.
    pub fn uses(&self, account: &ServiceAccountName) -> bool {
        let directory = self.directory.read().unwrap_or_else(PoisonError::into_inner);
        directory.pods_of(account).next().is_some()
    }

    /// Where the node's pods are attached to it, by their CNI records.
    pub fn attachments(&self) -> BTreeSet<Attachment> {
        self.directory.read().unwrap_or_else(PoisonError::into_inner).attachments()
    }

    /// Changes with every event of the directory.
    pub fn changes(&self) -> signal::Receiver<()> {
        self.changed.subscribe()
    }

    /// Whether the pod is one of this node's live ones still.
    pub fn is_live(&self, uid: &PodUid) -> bool {
        self.directory.read().unwrap_or_else(PoisonError::into_inner).is_live(uid)
    }
}

impl fmt::Debug for Attributor {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Attributor").finish_non_exhaustive()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn attributor() -> Arc<Attributor> {
        let (attributor, _) = Attributor::new(Metrics::new("test").unwrap());
        attributor.apply(Event::ListStarted);
        attributor.apply(Event::ListDone);
        attributor
    }

    fn peer(address: &str) -> Peer {
        Peer::from_pod(address.parse().unwrap())
    }

    /// IMDS-25: the wait ends with the event, not with the time.
    #[tokio::test(start_paused = true)]
    async fn who_is_not_known_yet_is_waited_for() {
        let attributor = attributor();
        let began = Instant::now();
        let told = async {
            tokio::time::sleep(Duration::from_millis(300)).await;
            attributor.apply(Event::Pod(Pod::sample("a", "uid-a", "sa", &["10.0.0.1"])));
        };
        let peer = peer("10.0.0.1");
        let (answer, ()) = tokio::join!(attributor.attribute(&peer, began + PATIENCE), told);
        assert_eq!(answer.unwrap().pod(), "a");
        assert!(began.elapsed() < Duration::from_millis(310));
    }

    #[tokio::test(start_paused = true)]
    async fn whoever_stays_unknown_is_read_live_once_and_then_refused() {
        let attributor = attributor();
        let reads = Arc::new(std::sync::atomic::AtomicUsize::new(0));
        let counted = reads.clone();
        attributor.set_live_read(Box::new(move |_| {
            counted.fetch_add(1, std::sync::atomic::Ordering::SeqCst);
            Box::pin(async {})
        }));
        let began = Instant::now();
        let refusal = attributor.attribute(&peer("10.0.0.1"), began + PATIENCE).await.unwrap_err();
        assert_eq!(refusal.reason, Reason::UnknownPod);
        assert!(began.elapsed() >= PATIENCE && began.elapsed() < PATIENCE + Duration::from_millis(10));
        assert_eq!(reads.load(std::sync::atomic::Ordering::SeqCst), 1);

        // However many ask at once, and again; another address has its own.
        for (address, expected) in [("10.0.0.1", 1), ("10.0.0.2", 2), ("10.0.0.1", 3)] {
            let (asked, until) = (peer(address), Instant::now() + PATIENCE);
            let all = (0..50).map(|_| attributor.attribute(&asked, until));
            for answer in futures::future::join_all(all).await {
                assert_eq!(answer.unwrap_err().reason, Reason::UnknownPod);
            }
            assert_eq!(reads.load(std::sync::atomic::Ordering::SeqCst), expected, "{address}");
        }
    }

    #[tokio::test(start_paused = true)]
    async fn a_pod_that_its_record_announces_and_nobody_shows_casts_doubt_on_the_watch() {
        let attributor = attributor();
        let asks = |address: &str| {
            let (attributor, peer) = (attributor.clone(), peer(address));
            async move { attributor.attribute(&peer, Instant::now() + PATIENCE).await.unwrap_err() }
        };
        asks("10.0.0.1").await;
        assert!(timeout_at(Instant::now(), attributor.doubted()).await.is_err(), "a stranger is no reason");
        attributor.apply(Event::Record(directory::Record::sample("r", "uid-a", "10.0.0.1")));
        asks("10.0.0.1").await;
        assert!(timeout_at(Instant::now(), attributor.doubted()).await.is_ok());

        attributor.apply(Event::Pod(Pod::sample("b", "uid-b", "sa", &[])));
        attributor.found(attributor.removals(), vec![Pod::sample("b", "uid-b", "sa", &["10.0.0.2"])]);
        assert!(timeout_at(Instant::now(), attributor.doubted()).await.is_err(), "its address may come later");
        attributor.found(attributor.removals(), vec![Pod::sample("c", "uid-c", "sa", &["10.0.0.3"])]);
        assert!(timeout_at(Instant::now(), attributor.doubted()).await.is_ok());

        let began = attributor.removals();
        attributor.apply(Event::PodGone(PodUid("uid-d".into())));
        assert!(!attributor.found(began, vec![Pod::sample("d", "uid-d", "sa", &["10.0.0.4"])]), "to be read again");
        assert!(attributor.peek(&peer("10.0.0.4")).is_err());
    }

    #[test]
    fn egress_addresses_are_refused_with_their_fix() {
        let attributor = attributor();
        for (address, is_egress) in
            [("169.254.172.0", true), ("169.254.175.255", true), ("169.254.171.255", false), ("169.254.176.0", false)]
        {
            let refusal = attributor.peek(&peer(address)).unwrap_err();
            assert_eq!(refusal.reason, Reason::UnknownPod);
            assert_eq!(refusal.detail.contains("ENDPOINT_MODE=IPv6"), is_egress, "{}", refusal.detail);
        }
    }

    #[tokio::test(start_paused = true)]
    async fn two_claimants_get_nothing() {
        let attributor = attributor();
        for uid in ["a", "b"] {
            attributor.apply(Event::Pod(Pod::sample(uid, uid, "sa", &["10.0.0.1"])));
        }
        let refusal = attributor.attribute(&peer("10.0.0.1"), Instant::now() + PATIENCE).await.unwrap_err();
        assert_eq!(refusal.reason, Reason::AmbiguousAddress);
        assert!(refusal.detail.contains("default/a and default/b"), "{}", refusal.detail);
    }
}
