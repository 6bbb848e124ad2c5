//! The guard of bridge ports, kept in step with the node's CNI records.

use std::{collections::BTreeSet, sync::Arc, time::Duration};

use tokio::{
    sync::Mutex,
    time::{Instant, sleep_until},
};
use tracing::{info, warn};

use crate::{
    attribute::{Attachment, Attributor, pod_ports},
    intercept::{
        RuleChanges,
        rule::{BridgeGuard, Installed, PodPort},
    },
    observe::Metrics,
};

/// How often links and the guard are looked at without a change of records.
const READ_BACK: Duration = Duration::from_secs(30);
/// Wait before the guard is tried again where it could not be applied.
const RETRY: Duration = Duration::from_secs(5);
/// Shortest time between repairs, so that a process that removes the guard as often cannot keep this node busy.
const SPACING: Duration = Duration::from_millis(100);

#[derive(Debug)]
pub(super) struct BridgePorts {
    attributor: Arc<Attributor>,
    /// None where nftables does not carry the redirect: then ports are only counted.
    guard: Option<BridgeGuard>,
    changes: RuleChanges,
    metrics: Metrics,
    state: Mutex<State>,
}

#[derive(Debug, Default)]
struct State {
    attachments: Option<BTreeSet<Attachment>>,
    ports: Option<BTreeSet<PodPort>>,
    /// How nft listed the guard after it was applied; none while it is not.
    listed: Option<String>,
    failed: bool,
    warned: bool,
    warned_of_ingress: bool,
    announced: bool,
    kept: bool,
}

impl State {
    /// Has everything looked at and applied again.
    fn forget(&mut self) {
        self.attachments = None;
        self.ports = None;
    }
}

impl BridgePorts {
    pub(super) fn new(
        attributor: Arc<Attributor>,
        installed: Option<&Installed>,
        changes: RuleChanges,
        metrics: Metrics,
    ) -> Self {
        let guard = installed.and_then(Installed::bridge_guard);
        Self { attributor, guard, changes, metrics, state: Mutex::default() }
    }

    /// Keeps the guard as the records say, until dropped.
    pub(super) async fn keep(&self) {
        let mut state = self.state.lock().await;
        let mut records = self.attributor.changes();
        if std::mem::replace(&mut state.kept, true) {
            // Another agent may have kept it since.
            state.forget();
        }
        loop {
            self.sync(&mut state).await;
            let next = Instant::now() + if state.failed { RETRY } else { READ_BACK };
            let spacing = Instant::now() + SPACING;
            tokio::select! {
                biased;
                () = self.changes.bridge_removed() => {
                    // Applied without a look, which takes time in which neighbors could pass for each other.
                    state.forget();
                    sleep_until(spacing).await;
                }
                () = sleep_until(next) => self.read_back(&mut state).await,
                () = self.records_changed(&mut records, &state) => {}
            }
        }
    }

    /// Applies the guard for the records that there are: before the first pod is served.
    pub(super) async fn begin(&self) {
        self.sync(&mut *self.state.lock().await).await;
    }

    /// Most events of the directory change no record.
    async fn records_changed(&self, records: &mut tokio::sync::watch::Receiver<()>, state: &State) {
        while records.changed().await.is_ok() {
            if state.attachments.as_ref() != Some(&self.attributor.attachments()) {
                return;
            }
        }
        std::future::pending().await
    }

    /// Has links looked at again, and the guard applied again if it is not as it was.
    async fn read_back(&self, state: &mut State) {
        state.attachments = None;
        let (Some(guard), Some(listed)) = (self.guard, state.listed.take_if(|_| !state.failed)) else { return };
        let listing = tokio::task::spawn_blocking(move || guard.listing()).await;
        if listing.is_ok_and(|listing| listing.is_ok_and(|listing| listing == listed)) {
            state.listed = Some(listed);
        } else {
            warn!("the guard of bridge ports is not as it was applied: applying it again");
            state.forget();
        }
    }

    async fn sync(&self, state: &mut State) {
        let attachments = self.attributor.attachments();
        if state.attachments.as_ref() == Some(&attachments) && !state.failed {
            return;
        }
        let (guard, known, of_records) = (self.guard, state.ports.clone(), attachments.clone());
        let work = move || apply(guard, known.as_ref(), &of_records);
        // The tool is a process, and listing links waits for the kernel: neither may hold up requests.
        let done = tokio::task::spawn_blocking(work).await.map_err(Into::into).and_then(|done| done);
        state.attachments = Some(attachments);
        state.failed = done.is_err();
        match done {
            Ok(applied) => self.applied(state, applied),
            Err(error) => self.failed(state, &error),
        }
    }

    fn applied(&self, state: &mut State, Applied { ports, listed, ingress }: Applied) {
        self.metrics.bridge_ports(ports.len(), self.guard.is_some());
        state.listed = listed.or(state.listed.take());
        if let Err(error) = ingress
            && !std::mem::replace(&mut state.warned_of_ingress, true)
        {
            let error = format!("{error:#}");
            warn!(error, "LLDP of pods is not guarded: a pod with CAP_NET_RAW may get a neighbor's answers by it");
        }
        if self.guard.is_none() && !ports.is_empty() && !std::mem::replace(&mut state.warned, true) {
            warn!(
                ports = ports.len(),
                "pods share a Linux bridge, and only --intercept nft can keep one with CAP_NET_RAW from reading \
                 another's credentials there: use it, or drop NET_RAW in pods"
            );
        }
        if self.guard.is_some() && !ports.is_empty() && !std::mem::replace(&mut state.announced, true) {
            info!(ports = ports.len(), "bridge ports of pods are guarded");
        }
        state.ports = Some(ports);
    }

    fn failed(&self, state: &mut State, error: &anyhow::Error) {
        let ports = state.attachments.as_ref().and_then(|attachments| pod_ports(attachments).ok());
        self.metrics.bridge_ports(ports.map_or(0, |ports| ports.len()), false);
        state.ports = None;
        if !std::mem::replace(&mut state.warned, true) {
            let error = format!("{error:#}");
            warn!(
                error,
                "bridge ports of pods cannot be guarded: a pod with CAP_NET_RAW on a shared Linux bridge gets its \
                 neighbors' credentials. Drop NET_RAW in pods"
            );
        }
    }
}

struct Applied {
    ports: BTreeSet<PodPort>,
    /// Of the guard, if it was applied now.
    listed: Option<String>,
    ingress: anyhow::Result<()>,
}

/// Applies the guard unless it is applied for these ports already.
fn apply(
    guard: Option<BridgeGuard>,
    known: Option<&BTreeSet<PodPort>>,
    attachments: &BTreeSet<Attachment>,
) -> anyhow::Result<Applied> {
    let ports = pod_ports(attachments)?;
    let Some(guard) = guard.filter(|_| known != Some(&ports)) else {
        return Ok(Applied { ports, listed: None, ingress: Ok(()) });
    };
    // A node without such ports gets no table; one that an agent before left is emptied.
    if known.is_none() && ports.is_empty() && guard.listing().is_err() {
        return Ok(Applied { ports, listed: None, ingress: Ok(()) });
    }
    guard.apply(&ports)?;
    let ingress = guard.apply_ingress(&ports);
    let listed = Some(guard.listing()?);
    Ok(Applied { ports, listed, ingress })
}
