//! The pods of this node, from the API server: a watch that keeps to `spec.nodeName`, in a slim type of our own.
//!
//! A dead connection must be noticed, since a watch that has stopped attributes a reused address to its former pod:
//! the client's read timeout is a little longer than the API server's pause between bookmarks (one minute), and a pod
//! that shows on the node in any other way has the watch started anew at once.

use std::{net::IpAddr, sync::Arc, time::Duration};

use kube::{Api, Client, ResourceExt, api::ListParams, runtime::watcher::Event as Watched};
use tokio::{
    sync::Semaphore,
    time::{Instant, sleep_until},
};
use tracing::{info, warn};

use super::{Attributor, Event, LiveRead, PodUid, pod::SlimPod};
use crate::kubernetes::watch::{ListMode, Watch};

/// At once: a new pod's must not wait for a stranger's that is slow.
const LIVE_READS: usize = 4;
/// A read is void when a pod is removed meanwhile, and repeated: its answer may show that pod.
const LIVE_READ_TRIES: usize = 3;

/// A watch that is in doubt, and says nothing, is started anew; at most this often.
const DOUBT: Duration = Duration::from_secs(5);

/// Follows this node's pods until dropped; calls `synced` each time that all have been told of.
pub async fn follow(client: Client, node: String, attributor: Arc<Attributor>, synced: impl Fn()) {
    let fields = format!("spec.nodeName={node}");
    let mut watch = Watch::<SlimPod>::new("pods of this node", Api::all(client), Some(&fields), ListMode::Unpaged);
    loop {
        let (began, mut doubted) = (Instant::now(), false);
        loop {
            let event = tokio::select! {
                biased;
                event = watch.next() => event,
                () = attributor.doubted() => {
                    doubted = true;
                    continue;
                }
                () = sleep_until(began + DOUBT), if doubted => break,
            };
            doubted = false;
            let done = matches!(event, Watched::InitDone);
            translate(event).into_iter().for_each(|event| attributor.apply(event));
            if done {
                synced();
            }
        }
        info!(%node, "a pod is here that the watch has not told of: starting the watch anew");
        watch.relist();
    }
}

fn translate(event: Watched<SlimPod>) -> Option<Event> {
    Some(match event {
        Watched::Init => Event::ListStarted,
        Watched::InitDone => Event::ListDone,
        Watched::InitApply(pod) | Watched::Apply(pod) => Event::Pod(pod.into_pod()?),
        Watched::Delete(pod) => Event::PodGone(PodUid(pod.uid()?.into())),
    })
}

/// For an address that the watch has not shown: one read, of which few are under way whoever asks.
pub fn live_read(client: Client, node: String, attributor: Arc<Attributor>) -> LiveRead {
    let turns = Arc::new(Semaphore::new(LIVE_READS));
    let pods: Api<SlimPod> = Api::all(client);
    Box::new(move |address: IpAddr| {
        let (turns, pods, attributor, node) = (turns.clone(), pods.clone(), attributor.clone(), node.clone());
        Box::pin(async move {
            // Closed never; whoever waits for too long gives up by itself.
            let Ok(_turn) = turns.acquire().await else { return };
            let query = ListParams::default().fields(&format!("spec.nodeName={node},status.podIP={address}"));
            for _ in 0..LIVE_READ_TRIES {
                let began = attributor.removals();
                let mut found = pods.list(&query).await;
                if matches!(found, Err(ref error) if !matches!(error, kube::Error::Api(_))) {
                    // A connection of the pool that died in silence: the next one is new.
                    found = pods.list(&query).await;
                }
                match found {
                    Ok(found) => {
                        if attributor.found(began, found.items.into_iter().filter_map(SlimPod::into_pod).collect()) {
                            return;
                        }
                    }
                    Err(error) => {
                        warn!(%address, %error, "the API server could not be asked who has this address");
                        return;
                    }
                }
            }
        })
    })
}
