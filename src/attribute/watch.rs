//! Watches this node's pods at the API server, filtered by `spec.nodeName` and deserialized into a slim type.
//!
//! A dead connection must be detected, since a watch that has stopped would attribute a reused address to its former
//! pod. The client's read timeout is therefore slightly longer than the API server's interval between bookmarks (one
//! minute), and a pod that is first seen in any other way triggers a relist.

use std::{net::IpAddr, sync::Arc, time::Duration};

use kube::{Api, Client, ResourceExt, api::ListParams, runtime::watcher::Event as Watched};
use tokio::{
    sync::Semaphore,
    time::{Instant, sleep_until},
};
use tracing::{info, warn};

use super::{Attributor, Event, LiveLookup, PodUid, pod::SlimPod};
use crate::kubernetes::watch::{ListMode, Watch};

/// Maximum concurrent live lookups: more than one, so that a slow one does not delay a new pod's.
const MAX_LIVE_LOOKUPS: usize = 4;
/// Attempts per live lookup. A lookup is void, and is repeated, if a pod is removed meanwhile: it may contain that pod.
const LIVE_LOOKUP_ATTEMPTS: usize = 3;

/// A silent watch is restarted this long after it began, if a resync was requested; also the minimum time between
/// restarts.
const RESYNC_DELAY: Duration = Duration::from_secs(5);

/// Watches this node's pods until dropped; calls `synced` after each complete list.
pub async fn follow(client: Client, node: String, attributor: Arc<Attributor>, synced: impl Fn()) {
    let fields = format!("spec.nodeName={node}");
    let mut watch = Watch::<SlimPod>::new("pods of this node", Api::all(client), Some(&fields), ListMode::Unpaged);
    loop {
        let (began, mut resync_requested) = (Instant::now(), false);
        loop {
            let event = tokio::select! {
                biased;
                event = watch.next() => event,
                () = attributor.resync_requested() => {
                    resync_requested = true;
                    continue;
                }
                () = sleep_until(began + RESYNC_DELAY), if resync_requested => break,
            };
            // An event proves that the watch is alive.
            resync_requested = false;
            let done = matches!(event, Watched::InitDone);
            translate(event).into_iter().for_each(|event| attributor.apply(event));
            if done {
                synced();
            }
        }
        info!(%node, "the watch missed a pod of this node: relisting pods");
        watch.relist();
    }
}

fn translate(event: Watched<SlimPod>) -> Option<Event> {
    Some(match event {
        Watched::Init => Event::ListStarted,
        Watched::InitDone => Event::ListDone,
        Watched::InitApply(pod) | Watched::Apply(pod) => Event::Pod(pod.into_pod()?),
        Watched::Delete(pod) => Event::PodDeleted(PodUid(pod.uid()?.into())),
    })
}

/// Returns the live lookup: one API-server read for an address that the watch has not reported, with bounded
/// concurrency.
pub fn live_lookup(client: Client, node: String, attributor: Arc<Attributor>) -> LiveLookup {
    let permits = Arc::new(Semaphore::new(MAX_LIVE_LOOKUPS));
    let pods: Api<SlimPod> = Api::all(client);
    Box::new(move |address: IpAddr| {
        let (permits, pods, attributor, node) = (permits.clone(), pods.clone(), attributor.clone(), node.clone());
        Box::pin(async move {
            // The semaphore is never closed; the caller's timeout bounds this wait.
            let Ok(_permit) = permits.acquire().await else { return };
            let query = ListParams::default().fields(&format!("spec.nodeName={node},status.podIP={address}"));
            for _ in 0..LIVE_LOOKUP_ATTEMPTS {
                let removals = attributor.removals();
                let mut listed = pods.list(&query).await;
                if matches!(listed, Err(ref error) if !matches!(error, kube::Error::Api(_))) {
                    // The pooled connection may have been dead; the retry opens a new one.
                    listed = pods.list(&query).await;
                }
                match listed {
                    Ok(listed) => {
                        let pods = listed.items.into_iter().filter_map(SlimPod::into_pod).collect();
                        if attributor.apply_live(removals, pods) {
                            return;
                        }
                    }
                    Err(error) => {
                        warn!(%address, %error, "live lookup of the pod with this address failed at the API server");
                        return;
                    }
                }
            }
        })
    })
}
