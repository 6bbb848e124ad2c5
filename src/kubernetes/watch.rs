//! A list of objects and what becomes of them, for as long as anybody asks: streamed one by one, since a cluster's
//! service accounts in one answer need more memory than the agent has.
//!
//! Each list is as fresh as the request for it. An API server may lag behind another; a list of its own state, which is
//! what clients usually begin with, could bring back a pod that is gone, or a role that was taken away.
//!
//! Knows of what kind they are by name only.

use std::{fmt::Debug, time::Duration};

use futures::{StreamExt, stream::BoxStream};
use http::Request;
use kube::{
    Api, Resource,
    client::Body,
    runtime::watcher::{Config, Error, Event, watcher},
};
use serde::de::DeserializeOwned;
use tokio::time::{Instant, sleep_until};
use tracing::{info, warn};

use crate::clock::Backoff;

/// Ends a watch from the server's side; kube-apiserver's own default is 30 to 60 minutes.
pub(crate) const SECONDS: u32 = 240;
const BACKOFF: Backoff = Backoff::new(Duration::from_millis(200), Duration::from_secs(10));

/// Objects in one answer, each with up to 256 KiB of annotations: a page must fit into the agent's memory twice.
const PAGE: u32 = 100;

/// What is asked of an API server that streams no lists.
#[derive(Debug, Clone, Copy)]
pub enum Listing {
    /// One answer, which is made from memory since Kubernetes 1.31. For a selection: of pages, etcd would read the whole
    /// cluster's for each.
    Whole,
    /// Pages. For what is more than the agent can bear at once.
    Pages,
}

pub struct Watch<K> {
    /// What is watched, for the log.
    of: &'static str,
    api: Api<K>,
    config: Config,
    listing: Listing,
    streaming: bool,
    events: BoxStream<'static, Result<Event<K>, Error>>,
    backoff: Backoff,
    /// No sooner than then is the next try.
    paused: Option<Instant>,
}

impl<K> Watch<K>
where
    K: Resource<DynamicType = ()> + Clone + Debug + DeserializeOwned + Send + 'static,
{
    /// Of what `fields` selects, or of all.
    pub fn new(of: &'static str, api: Api<K>, fields: Option<&str>, listing: Listing) -> Self {
        let mut config = Config::default().timeout(SECONDS);
        config.field_selector = fields.map(str::to_owned);
        let events = watcher(api.clone(), config.clone().streaming_lists()).boxed();
        Self { of, api, config, listing, streaming: true, events, backoff: BACKOFF, paused: None }
    }

    /// From the list on once more.
    pub fn renew(&mut self) {
        let config = self.config.clone();
        let config = match self.listing {
            _ if self.streaming => config.streaming_lists(),
            Listing::Whole => Config { page_size: None, ..config },
            Listing::Pages => Config { page_size: Some(PAGE), ..config },
        };
        self.events = watcher(self.api.clone(), config).boxed();
    }

    /// Whatever fails is tried until it does not. Loses nothing when dropped.
    pub async fn next(&mut self) -> Event<K> {
        loop {
            if let Some(then) = self.paused {
                sleep_until(then).await;
                self.paused = None;
            }
            match self.events.next().await {
                Some(Ok(event)) => {
                    // That a list has begun is no success yet.
                    if !matches!(event, Event::Init) {
                        self.backoff.reset();
                    }
                    if matches!(event, Event::InitDone) {
                        info!("{} read", self.of);
                    }
                    return event;
                }
                Some(Err(error)) if self.streaming && not_understood(&error) => {
                    info!(of = self.of, "this API server streams no lists: asking for answers to lists");
                    self.streaming = false;
                    self.renew();
                }
                Some(Err(error)) => {
                    warn!(of = self.of, %error, "watch failed; what is known stays in use");
                    self.paused = Some(Instant::now() + self.backoff.pause());
                }
                None => self.renew(),
            }
        }
    }
}

/// Asks for a streamed list as fresh as the request, where kube asks for any: without a resource version, the API server
/// makes sure that its memory is up to date before it says that all was told (Kubernetes API concepts, "Streaming
/// lists").
pub(super) fn up_to_date(mut request: Request<Body>) -> Request<Body> {
    let asked = request.uri().to_string();
    if let Some((path, query)) = asked.split_once('?')
        && query.contains("sendInitialEvents=true")
    {
        let fresh: Vec<_> = query.split('&').filter(|parameter| *parameter != "resourceVersion=0").collect();
        if let Ok(uri) = format!("{path}?{}", fresh.join("&")).parse() {
            *request.uri_mut() = uri;
        }
    }
    request
}

/// The API server refused the form of the request, not its content: streamed lists are on by default since Kubernetes
/// 1.34 (feature gate WatchList), and with it off they are invalid.
fn not_understood(error: &Error) -> bool {
    let (Error::InitialListFailed(kube::Error::Api(status)) | Error::WatchStartFailed(kube::Error::Api(status))) =
        error
    else {
        return false;
    };
    matches!(status.code, 400 | 422)
}

impl<K> Debug for Watch<K> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Watch").field("of", &self.of).finish_non_exhaustive()
    }
}

#[cfg(test)]
mod tests {
    use std::{
        convert::Infallible,
        sync::{Arc, Mutex},
    };

    use http::Response;
    use k8s_openapi::api::core::v1::ServiceAccount;
    use kube::{Client, api::PartialObjectMeta};
    use serde_json::{Value, json};
    use tower::util::MapRequest;

    use super::*;

    /// An API server with one service account: it answers as `how` says, and remembers what it was asked.
    fn server(how: fn(&str, usize) -> (u16, String)) -> (Arc<Mutex<Vec<String>>>, Client) {
        let asked = Arc::new(Mutex::new(Vec::new()));
        let noted = asked.clone();
        let service = tower::service_fn(move |request: Request<Body>| {
            let query = request.uri().query().unwrap_or_default().to_owned();
            let mut noted = noted.lock().unwrap();
            let (status, body) = how(&query, noted.len());
            noted.push(query);
            let answer = Response::builder().status(status).body(Body::from(body.into_bytes())).unwrap();
            std::future::ready(Ok::<_, Infallible>(answer))
        });
        (asked, Client::new(MapRequest::new(service, up_to_date), "default"))
    }

    fn account(version: &str) -> Value {
        json!({"kind": "PartialObjectMetadata", "apiVersion": "meta.k8s.io/v1",
            "metadata": {"name": "reader", "namespace": "default", "uid": "uid-1", "resourceVersion": version}})
    }

    fn refused(code: u16) -> (u16, String) {
        let status = json!({"kind": "Status", "apiVersion": "v1", "metadata": {}, "status": "Failure", "code": code});
        (code, status.to_string())
    }

    fn listed() -> (u16, String) {
        let list = json!({"kind": "PartialObjectMetadataList", "apiVersion": "meta.k8s.io/v1",
            "metadata": {"resourceVersion": "7"}, "items": [account("5")]});
        (200, list.to_string())
    }

    async fn until_listed(client: Client, listing: Listing) -> Vec<String> {
        let accounts: Api<PartialObjectMeta<ServiceAccount>> = Api::all(client);
        let mut watch = Watch::new("service accounts", accounts, None, listing);
        let mut names = Vec::new();
        loop {
            match watch.next().await {
                Event::Init => {}
                Event::InitApply(account) => names.extend(account.metadata.name),
                Event::InitDone => return names,
                other => panic!("{other:?}"),
            }
        }
    }

    #[tokio::test(start_paused = true)]
    async fn a_list_is_streamed() {
        let (asked, client) = server(|_, _| {
            let end = json!({"kind": "PartialObjectMetadata", "apiVersion": "meta.k8s.io/v1", "metadata":
                {"resourceVersion": "7", "annotations": {"k8s.io/initial-events-end": "true"}}});
            let events = [json!({"type": "ADDED", "object": account("5")}), json!({"type": "BOOKMARK", "object": end})];
            (200, events.map(|event| format!("{event}\n")).concat())
        });
        assert_eq!(until_listed(client, Listing::Pages).await, ["reader"]);
        let asked = asked.lock().unwrap();
        assert!(asked.len() == 1 && asked[0].contains("sendInitialEvents=true"), "{asked:?}");
        assert!(!asked[0].contains("resourceVersion="), "of any age: {asked:?}");
    }

    /// Kubernetes before 1.34, or with the feature gate off.
    #[tokio::test(start_paused = true)]
    async fn an_api_server_that_streams_no_lists_is_asked_for_answers() {
        for (listing, query) in [(Listing::Whole, ""), (Listing::Pages, "&limit=100")] {
            let (asked, client) =
                server(|query, _| if query.contains("sendInitialEvents") { refused(422) } else { listed() });
            let began = Instant::now();
            assert_eq!(until_listed(client, listing).await, ["reader"]);
            assert_eq!(began.elapsed(), Duration::ZERO, "nothing has failed");
            let asked = asked.lock().unwrap();
            assert!(asked.len() == 2 && asked[1] == query, "{asked:?}");
        }
    }

    /// Where each list that begins was taken for a success, an API server in trouble was asked six times a second.
    #[tokio::test(start_paused = true)]
    async fn pauses_grow_while_no_list_comes_to_anything() {
        let (asked, client) = server(|query, asked| match asked {
            _ if query.contains("sendInitialEvents") => refused(422),
            ..=12 => refused(500),
            _ => listed(),
        });
        let began = Instant::now();
        assert_eq!(until_listed(client, Listing::Pages).await, ["reader"]);
        assert_eq!(asked.lock().unwrap().len(), 14);
        assert!(began.elapsed() > Duration::from_secs(36), "{:?}", began.elapsed());
    }
}
