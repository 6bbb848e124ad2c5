//! The pods of this node, from the API server: a watch that keeps to `spec.nodeName`, in a slim type of our own.
//!
//! A dead connection must be noticed, since a watch that has stopped attributes a reused address to its former pod:
//! the client's read timeout is a little longer than the API server's pause between bookmarks (one minute), and a pod
//! that shows on the node in any other way has the watch started anew at once.

use std::{net::IpAddr, sync::Arc, time::Duration};

use futures::StreamExt;
use kube::{
    Api, Client, ResourceExt,
    api::ListParams,
    runtime::watcher::{self, Error, watcher},
};
use tokio::{
    sync::Semaphore,
    time::{Instant, sleep_until},
};
use tracing::{info, warn};

use super::{Attributor, Event, LiveRead, PodUid, pod::SlimPod};

/// Small pages, so that a relist of full-size pods never needs much memory at once.
const PAGE: u32 = 50;
/// Ends a watch from the server's side; kube-apiserver's own default is 30 to 60 minutes.
pub(crate) const WATCH_SECONDS: u32 = 240;
/// Between tries, with jitter, so that a node's agents do not all come back at once.
const BACKOFF: (Duration, Duration) = (Duration::from_millis(200), Duration::from_secs(10));

/// At once: a new pod's must not wait for a stranger's that is slow.
const LIVE_READS: usize = 4;

/// A watch that is in doubt, and says nothing, is started anew; at most this often.
const DOUBT: Duration = Duration::from_secs(5);

/// Follows this node's pods until dropped; calls `synced` each time that all have been told of.
pub async fn follow(client: Client, node: String, attributor: Arc<Attributor>, synced: impl Fn()) {
    let pods: Api<SlimPod> = Api::all(client);
    let config = watcher::Config::default().fields(&format!("spec.nodeName={node}")).timeout(WATCH_SECONDS);
    // Streamed objects come one by one; API servers before 1.34 may not know how, and get paged lists.
    let mut streaming = true;
    let mut pause = BACKOFF.0;
    loop {
        let config =
            if streaming { config.clone().streaming_lists() } else { config.clone().any_semantic().page_size(PAGE) };
        let mut events = std::pin::pin!(watcher(pods.clone(), config));
        let (began, mut doubted) = (Instant::now(), false);
        loop {
            let event = tokio::select! {
                biased;
                event = events.next() => event,
                () = attributor.doubted() => {
                    doubted = true;
                    continue;
                }
                () = sleep_until(began + DOUBT), if doubted => {
                    info!(%node, "a pod is here that the watch has not told of: starting the watch anew");
                    break;
                }
            };
            let Some(event) = event else { break };
            doubted = false;
            match event {
                Ok(event) => {
                    pause = BACKOFF.0;
                    if matches!(event, watcher::Event::InitDone) {
                        info!(%node, "pods of this node read");
                    }
                    let done = matches!(event, watcher::Event::InitDone);
                    translate(event).into_iter().for_each(|event| attributor.apply(event));
                    if done {
                        synced();
                    }
                }
                Err(error) if streaming && not_understood(&error) => {
                    info!("this API server streams no lists: reading pages");
                    streaming = false;
                    break;
                }
                Err(error) => {
                    warn!(%node, error = %error, "watch of this node's pods failed; what is known stays in use");
                    let jitter = pause.mul_f64(0.5 + fastrand::f64() / 2.0);
                    tokio::time::sleep(jitter).await;
                    pause = (pause * 2).min(BACKOFF.1);
                }
            }
        }
    }
}

/// The API server refused the form of the request, not its content.
fn not_understood(error: &Error) -> bool {
    let (Error::InitialListFailed(kube::Error::Api(status)) | Error::WatchStartFailed(kube::Error::Api(status))) =
        error
    else {
        return false;
    };
    matches!(status.code, 400 | 422)
}

fn translate(event: watcher::Event<SlimPod>) -> Option<Event> {
    Some(match event {
        watcher::Event::Init => Event::ListStarted,
        watcher::Event::InitDone => Event::ListDone,
        watcher::Event::InitApply(pod) | watcher::Event::Apply(pod) => Event::Pod(pod.into_pod()?),
        watcher::Event::Delete(pod) => Event::PodGone(PodUid(pod.uid()?.into())),
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
            let mut found = pods.list(&query).await;
            if matches!(found, Err(ref error) if !matches!(error, kube::Error::Api(_))) {
                // A connection of the pool that died in silence: the next one is new.
                found = pods.list(&query).await;
            }
            match found {
                Ok(found) => {
                    let pods = found.items.into_iter().filter_map(SlimPod::into_pod);
                    pods.for_each(|pod| attributor.found(pod));
                }
                Err(error) => warn!(%address, %error, "the API server could not be asked who has this address"),
            }
        })
    })
}
