//! Synchronizes the bridge guard with the node's CNI records.

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

/// Interval at which links and the guard are rechecked without a change of records.
const READ_BACK: Duration = Duration::from_secs(30);
/// Delay before retrying to apply the guard.
const RETRY: Duration = Duration::from_secs(5);
/// Minimum time between repairs, so that a process that keeps removing the guard cannot keep this node busy.
const SPACING: Duration = Duration::from_millis(100);

#[derive(Debug)]
pub(super) struct BridgePorts {
    attributor: Arc<Attributor>,
    /// `None` unless nftables is the redirect's backend; ports are then only counted.
    guard: Option<BridgeGuard>,
    changes: RuleChanges,
    metrics: Metrics,
    state: Mutex<State>,
}

#[derive(Debug, Default)]
struct State {
    attachments: Option<BTreeSet<Attachment>>,
    ports: Option<BTreeSet<PodPort>>,
    /// The listing of the guard as it was applied; `None` while it is not applied.
    listed: Option<String>,
    failed: bool,
    warned: bool,
    warned_of_ingress: bool,
    logged: bool,
    was_maintained: bool,
}

impl State {
    /// Forces the next sync to check the links and apply the guard.
    fn reset(&mut self) {
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

    /// Keeps the guard in sync with the records until dropped.
    pub(super) async fn maintain(&self) {
        let mut state = self.state.lock().await;
        let mut records = self.attributor.changes();
        if std::mem::replace(&mut state.was_maintained, true) {
            // Another agent may have changed the guard in the meantime.
            state.reset();
        }
        loop {
            self.sync(&mut state).await;
            let next = Instant::now() + if state.failed { RETRY } else { READ_BACK };
            let spacing = Instant::now() + SPACING;
            tokio::select! {
                biased;
                () = self.changes.bridge_removed() => {
                    // Repair without reading the guard first: meanwhile, neighbors could impersonate each other.
                    state.reset();
                    sleep_until(spacing).await;
                }
                () = sleep_until(next) => self.read_back(&mut state).await,
                () = self.records_changed(&mut records, &state) => {}
            }
        }
    }

    /// Applies the guard for the present records, before the first pod is served.
    pub(super) async fn apply_initial(&self) {
        self.sync(&mut *self.state.lock().await).await;
    }

    /// Waits until a record changes. Most change notifications are about pods only.
    async fn records_changed(&self, records: &mut tokio::sync::watch::Receiver<()>, state: &State) {
        while records.changed().await.is_ok() {
            if state.attachments.as_ref() != Some(&self.attributor.attachments()) {
                return;
            }
        }
        std::future::pending().await
    }

    /// Forces a check of the links, and a repair if the guard differs from the one that was applied.
    async fn read_back(&self, state: &mut State) {
        state.attachments = None;
        let (Some(guard), Some(listed)) = (self.guard, state.listed.take_if(|_| !state.failed)) else { return };
        let listing = tokio::task::spawn_blocking(move || guard.listing()).await;
        if listing.is_ok_and(|listing| listing.is_ok_and(|listing| listing == listed)) {
            state.listed = Some(listed);
        } else {
            warn!("the bridge guard differs from the one that was applied: applying it again");
            state.reset();
        }
    }

    async fn sync(&self, state: &mut State) {
        let attachments = self.attributor.attachments();
        if state.attachments.as_ref() == Some(&attachments) && !state.failed {
            return;
        }
        let (guard, applied_ports, recorded) = (self.guard, state.ports.clone(), attachments.clone());
        let apply = move || apply(guard, applied_ports.as_ref(), &recorded);
        // Use a blocking thread: nft is a process, and listing links waits for the kernel.
        let result = tokio::task::spawn_blocking(apply).await.map_err(Into::into).and_then(|result| result);
        state.attachments = Some(attachments);
        state.failed = result.is_err();
        match result {
            Ok(applied) => self.record_applied(state, applied),
            Err(error) => self.record_failure(state, &error),
        }
    }

    fn record_applied(&self, state: &mut State, Applied { ports, listed, ingress }: Applied) {
        self.metrics.bridge_ports(ports.len(), self.guard.is_some());
        state.listed = listed.or(state.listed.take());
        if let Err(error) = ingress
            && !std::mem::replace(&mut state.warned_of_ingress, true)
        {
            let error = format!("{error:#}");
            warn!(
                error,
                "LLDP frames of pods are not blocked: a pod with CAP_NET_RAW may use them to get a neighbor's \
                 credentials"
            );
        }
        if self.guard.is_none() && !ports.is_empty() && !std::mem::replace(&mut state.warned, true) {
            warn!(
                ports = ports.len(),
                "pods share a Linux bridge without a guard: a pod with CAP_NET_RAW can get its neighbors' credentials. \
                 Use --intercept nft, or drop NET_RAW in pods"
            );
        }
        if self.guard.is_some() && !ports.is_empty() && !std::mem::replace(&mut state.logged, true) {
            info!(ports = ports.len(), "the bridge guard protects the ports of pods");
        }
        state.ports = Some(ports);
    }

    fn record_failure(&self, state: &mut State, error: &anyhow::Error) {
        let ports = state.attachments.as_ref().and_then(|attachments| pod_ports(attachments).ok());
        self.metrics.bridge_ports(ports.map_or(0, |ports| ports.len()), false);
        state.ports = None;
        if !std::mem::replace(&mut state.warned, true) {
            let error = format!("{error:#}");
            warn!(
                error,
                "the bridge guard cannot be applied: a pod with CAP_NET_RAW on a shared Linux bridge can get its \
                 neighbors' credentials. Drop NET_RAW in pods"
            );
        }
    }
}

struct Applied {
    ports: BTreeSet<PodPort>,
    /// The new listing of the guard, if it was applied.
    listed: Option<String>,
    ingress: anyhow::Result<()>,
}

/// Applies the guard unless `applied_ports` shows that it covers the same ports already.
fn apply(
    guard: Option<BridgeGuard>,
    applied_ports: Option<&BTreeSet<PodPort>>,
    attachments: &BTreeSet<Attachment>,
) -> anyhow::Result<Applied> {
    let ports = pod_ports(attachments)?;
    let Some(guard) = guard.filter(|_| applied_ports != Some(&ports)) else {
        return Ok(Applied { ports, listed: None, ingress: Ok(()) });
    };
    // A node without bridge ports gets no table, but a table that a previous agent left behind is emptied.
    if applied_ports.is_none() && ports.is_empty() && guard.listing().is_err() {
        return Ok(Applied { ports, listed: None, ingress: Ok(()) });
    }
    guard.apply(&ports)?;
    let ingress = guard.apply_ingress(&ports);
    let listed = Some(guard.listing()?);
    Ok(Applied { ports, listed, ingress })
}
