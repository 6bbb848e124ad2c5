//! Reflector for one kind of object: list, watch, relist. Lists are streamed object by object, since all service accounts
//! of a cluster in one response would need more memory than the agent has.
//!
//! Each list is consistent: as recent as its request. Most clients accept a list from the cache of any API server, which
//! may lag behind another one: it could bring back a deleted pod, or a role that was taken away.

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

/// `timeoutSeconds` of a watch, after which the server ends it. kube-apiserver's default is 30 to 60 minutes.
pub(crate) const WATCH_TIMEOUT_SECONDS: u32 = 240;
const BACKOFF: Backoff = Backoff::new(Duration::from_millis(200), Duration::from_secs(10));

/// Objects per page, each with up to 256 KiB of annotations: a page must fit into the agent's memory twice.
const PAGE_SIZE: u32 = 100;

/// Fallback for an API server that does not stream lists.
#[derive(Debug, Clone, Copy)]
pub enum ListMode {
    /// One response, served from the API server's memory since Kubernetes 1.31. Use it with a field selector: with pages,
    /// etcd would read all objects of the cluster for each page.
    Unpaged,
    /// Pages. Use it for more objects than fit into the agent's memory.
    Paged,
}

pub struct Watch<K> {
    /// Name of the resource, for the log.
    resource: &'static str,
    api: Api<K>,
    config: Config,
    mode: ListMode,
    streaming: bool,
    events: BoxStream<'static, Result<Event<K>, Error>>,
    backoff: Backoff,
    /// Earliest time of the next attempt.
    retry_at: Option<Instant>,
}

impl<K> Watch<K>
where
    K: Resource<DynamicType = ()> + Clone + Debug + DeserializeOwned + Send + 'static,
{
    /// Watches the objects that the field selector `fields` matches, or all.
    pub fn new(resource: &'static str, api: Api<K>, fields: Option<&str>, mode: ListMode) -> Self {
        let mut config = Config::default().timeout(WATCH_TIMEOUT_SECONDS);
        config.field_selector = fields.map(str::to_owned);
        let events = watcher(api.clone(), config.clone().streaming_lists()).boxed();
        Self { resource, api, config, mode, streaming: true, events, backoff: BACKOFF, retry_at: None }
    }

    /// Starts again with a list.
    pub fn relist(&mut self) {
        let config = self.config.clone();
        let config = match self.mode {
            _ if self.streaming => config.streaming_lists(),
            ListMode::Unpaged => Config { page_size: None, ..config },
            ListMode::Paged => Config { page_size: Some(PAGE_SIZE), ..config },
        };
        self.events = watcher(self.api.clone(), config).boxed();
    }

    /// Returns the next event. Retries failures with backoff. Cancel-safe.
    pub async fn next(&mut self) -> Event<K> {
        loop {
            if let Some(time) = self.retry_at {
                sleep_until(time).await;
                self.retry_at = None;
            }
            match self.events.next().await {
                Some(Ok(event)) => {
                    // The start of a list is not a success yet.
                    if !matches!(event, Event::Init) {
                        self.backoff.reset();
                    }
                    if matches!(event, Event::InitDone) {
                        info!("{} listed", self.resource);
                    }
                    return event;
                }
                Some(Err(error)) if self.streaming && is_streaming_unsupported(&error) => {
                    info!(
                        resource = self.resource,
                        "the API server does not support streaming lists: using plain lists"
                    );
                    self.streaming = false;
                    self.relist();
                }
                Some(Err(error)) => {
                    warn!(resource = self.resource, %error, "watch failed; known objects stay in use");
                    self.retry_at = Some(Instant::now() + self.backoff.pause());
                }
                None => self.relist(),
            }
        }
    }
}

/// Requests a consistent streamed list, where kube accepts any: without a resource version, the API server's list is as
/// recent as the request. See <https://kubernetes.io/docs/reference/using-api/api-concepts/#streaming-lists>.
pub(super) fn require_consistent_list(mut request: Request<Body>) -> Request<Body> {
    let uri = request.uri().to_string();
    if let Some((path, query)) = uri.split_once('?')
        && query.contains("sendInitialEvents=true")
    {
        let parameters: Vec<_> = query.split('&').filter(|parameter| *parameter != "resourceVersion=0").collect();
        if let Ok(uri) = format!("{path}?{}", parameters.join("&")).parse() {
            *request.uri_mut() = uri;
        }
    }
    request
}

/// Returns whether the API server rejected the form of the request. Streaming lists are enabled by default since Kubernetes
/// 1.34 (feature gate WatchList), and invalid if disabled.
fn is_streaming_unsupported(error: &Error) -> bool {
    let (Error::InitialListFailed(kube::Error::Api(status)) | Error::WatchStartFailed(kube::Error::Api(status))) =
        error
    else {
        return false;
    };
    matches!(status.code, 400 | 422)
}

impl<K> Debug for Watch<K> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Watch").field("resource", &self.resource).finish_non_exhaustive()
    }
}

#[cfg(test)]
mod tests {
    use std::{convert::Infallible, sync::Arc};

    use http::Response;
    use k8s_openapi::api::core::v1::ServiceAccount;
    use kube::{Client, api::PartialObjectMeta};
    use parking_lot::Mutex;
    use serde_json::{Value, json};
    use tower::util::MapRequest;

    use super::*;

    /// Returns an API server with one service account that responds by `respond`, and the queries that it has received.
    fn server(respond: fn(&str, usize) -> (u16, String)) -> (Arc<Mutex<Vec<String>>>, Client) {
        let queries = Arc::new(Mutex::new(Vec::new()));
        let received = queries.clone();
        let service = tower::service_fn(move |request: Request<Body>| {
            let query = request.uri().query().unwrap_or_default().to_owned();
            let mut received = received.lock();
            let (status, body) = respond(&query, received.len());
            received.push(query);
            let response = Response::builder().status(status).body(Body::from(body.into_bytes())).unwrap();
            std::future::ready(Ok::<_, Infallible>(response))
        });
        (queries, Client::new(MapRequest::new(service, require_consistent_list), "default"))
    }

    fn account(version: &str) -> Value {
        json!({"kind": "PartialObjectMetadata", "apiVersion": "meta.k8s.io/v1",
            "metadata": {"name": "reader", "namespace": "default", "uid": "uid-1", "resourceVersion": version}})
    }

    fn rejected(code: u16) -> (u16, String) {
        let status = json!({"kind": "Status", "apiVersion": "v1", "metadata": {}, "status": "Failure", "code": code});
        (code, status.to_string())
    }

    fn listed() -> (u16, String) {
        let list = json!({"kind": "PartialObjectMetadataList", "apiVersion": "meta.k8s.io/v1",
            "metadata": {"resourceVersion": "7"}, "items": [account("5")]});
        (200, list.to_string())
    }

    async fn list_names(client: Client, mode: ListMode) -> Vec<String> {
        let accounts: Api<PartialObjectMeta<ServiceAccount>> = Api::all(client);
        let mut watch = Watch::new("service accounts", accounts, None, mode);
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
    async fn list_is_streamed_and_consistent() {
        let (queries, client) = server(|_, _| {
            let end = json!({"kind": "PartialObjectMetadata", "apiVersion": "meta.k8s.io/v1", "metadata":
                {"resourceVersion": "7", "annotations": {"k8s.io/initial-events-end": "true"}}});
            let events = [json!({"type": "ADDED", "object": account("5")}), json!({"type": "BOOKMARK", "object": end})];
            (200, events.map(|event| format!("{event}\n")).concat())
        });
        assert_eq!(list_names(client, ListMode::Paged).await, ["reader"]);
        let queries = queries.lock();
        assert!(queries.len() == 1 && queries[0].contains("sendInitialEvents=true"), "{queries:?}");
        assert!(!queries[0].contains("resourceVersion="), "not consistent: {queries:?}");
    }

    /// Kubernetes before 1.34, or with the feature gate off.
    #[tokio::test(start_paused = true)]
    async fn plain_lists_replace_unsupported_streaming() {
        for (mode, query) in [(ListMode::Unpaged, ""), (ListMode::Paged, "&limit=100")] {
            let (queries, client) =
                server(|query, _| if query.contains("sendInitialEvents") { rejected(422) } else { listed() });
            let began = Instant::now();
            assert_eq!(list_names(client, mode).await, ["reader"]);
            assert_eq!(began.elapsed(), Duration::ZERO, "an unsupported feature is not a failure");
            let queries = queries.lock();
            assert!(queries.len() == 2 && queries[1] == query, "{queries:?}");
        }
    }

    /// A started list must not reset the backoff: it would cause six requests a second to an API server in trouble.
    #[tokio::test(start_paused = true)]
    async fn backoff_grows_until_a_list_succeeds() {
        let (queries, client) = server(|query, received| match received {
            _ if query.contains("sendInitialEvents") => rejected(422),
            ..=12 => rejected(500),
            _ => listed(),
        });
        let began = Instant::now();
        assert_eq!(list_names(client, ListMode::Paged).await, ["reader"]);
        assert_eq!(queries.lock().len(), 14);
        assert!(began.elapsed() > Duration::from_secs(36), "{:?}", began.elapsed());
    }
}
