//! Last stage: [`ClientConn`] and HTTP request → response. A request passes the rate limit, the router (`route`), the
//! guards (`guards`) and the handler of its route (`imds`, `container`). `response` has the bytes of responses,
//! [`crate::refusal`] the status of each refusal.
//!
//! No part of a request is ever forwarded, and nothing in it identifies the caller: paths are parsed, normalized and
//! matched exactly, and responses come from this process.

mod connection_state;
pub mod container;
mod guards;
mod half_close;
mod imds;
pub mod imds_token;
pub mod imdsv2;
pub mod node_metadata;
mod response;
pub mod route;

#[cfg(test)]
mod hold_tests;
#[cfg(any(test, fuzzing))]
pub(crate) mod in_memory;

use std::{convert::Infallible, sync::Arc, time::Duration};

use bytes::Bytes;
use http::{HeaderName, HeaderValue, Method, Request, Response, Uri, header::CONNECTION, request::Parts};
use http_body_util::{BodyExt, Full, Limited};
use hyper::{body::Incoming, server::conn::http1, service::service_fn};
use hyper_util::{rt::TokioIo, server::graceful::Watcher};
use tokio::time::{Instant, timeout};
use tracing::debug;

use crate::{
    attribute::Attributor,
    authorize::Authorizer,
    cache::Cache,
    connections::{ConnectionPermit, Socket, Tracked},
    intercept::{Accepted, ClientConn, IncomingConn, MAX_DELAY, MetadataService, Rejected, SourceQuota},
    observe::{Metrics, Outcome, RefusalLog, log_refusal},
    refusal::{Reason, Refusal},
};
use connection_state::ConnectionState;
use container::TokenReviews;
use guards::RequestContext;
use half_close::HalfCloseGrace;
use imds_token::ImdsTokens;
use node_metadata::NodeMetadata;
use route::Route;

static TOKEN: HeaderName = HeaderName::from_static("x-aws-ec2-metadata-token");
const TOKEN_TTL: &str = "x-aws-ec2-metadata-token-ttl-seconds";

/// Maximum size of request line and headers, in bytes; hyper's minimum is 8 KiB.
const MAX_HEAD: usize = 16 << 10;
/// Maximum size of a body, in bytes; SDKs send none, or an empty one.
const MAX_BODY: usize = 16 << 10;
const BODY_TIMEOUT: Duration = Duration::from_secs(2);
/// Maximum lifetime of a connection that is rejected.
const REJECT_TIMEOUT: Duration = Duration::from_secs(1);

/// Everything that a response depends on.
#[derive(Debug)]
pub struct Server {
    pub attributor: Arc<Attributor>,
    pub authorizer: Arc<Authorizer>,
    pub cache: Arc<Cache>,
    pub imds_tokens: ImdsTokens,
    pub metadata: Arc<NodeMetadata>,
    pub require_imdsv2: imdsv2::RequireImdsV2,
    /// `None` if container credentials are not served.
    pub container: Option<TokenReviews>,
    pub metrics: Metrics,
    pub refusals: RefusalLog,
}

impl Server {
    /// Serves one connection until it ends.
    pub async fn handle_connection(self: Arc<Self>, incoming: IncomingConn, drain: Watcher) {
        match incoming.wait_for_permit().await {
            Ok(Accepted { stream, client, quota, permit }) => {
                // Responses are small and written at once: Nagle's algorithm would only delay them.
                let _ = stream.set_nodelay(true);
                self.serve_connection(stream, client, quota, permit, drain).await;
            }
            Err(rejected) => self.reject(rejected).await,
        }
    }

    /// Serves a connection over any stream, so that tests without a network run the same code.
    pub(crate) async fn serve_connection(
        &self,
        stream: impl Socket + Send + 'static,
        client: ClientConn,
        quota: SourceQuota,
        permit: Arc<ConnectionPermit>,
        drain: Watcher,
    ) {
        let state = ConnectionState::new(client, quota, permit.clone());
        let service = service_fn(|request| {
            // Before the future is first polled: hyper checks first whether the client is still there.
            permit.busy();
            async { Ok::<_, Infallible>(self.respond(&state, request).await) }
        });
        let stream = HalfCloseGrace::new(Tracked::new(stream, permit.clone()), permit.clone());
        let connection = http1::Builder::new().max_buf_size(MAX_HEAD).serve_connection(TokioIo::new(stream), service);
        match permit.drive(drain.watch(connection)).await {
            Ok(Ok(())) => {}
            Ok(Err(error)) => debug!(source = ?state.client, %error, "connection failed"),
            Err(timeout) => {
                self.metrics.connection_closed(timeout.label());
                debug!(source = ?state.client, ?timeout, "connection timed out");
            }
        }
    }

    /// Answers the first request with the refusal, whatever its path, and closes the connection.
    async fn reject(&self, rejected: Rejected) {
        let Rejected { stream, client, refusal, permit } = rejected;
        let service = client.service();
        let refuse = |request: Request<Incoming>| {
            permit.busy();
            let route = route(service, request.uri());
            self.metrics.request(route.label(), Outcome::Refused(refusal.reason), Duration::ZERO);
            self.log(&client, &refusal);
            std::future::ready(Ok::<_, Infallible>(response::refuse(service, refusal.reason)))
        };
        let connection = http1::Builder::new()
            .keep_alive(false)
            .max_buf_size(MAX_HEAD)
            .serve_connection(TokioIo::new(Tracked::new(stream, permit.clone())), service_fn(refuse));
        // An error is expected: the client may have gone, or may never send a request.
        let _ = timeout(REJECT_TIMEOUT, permit.drive(connection)).await;
    }

    async fn respond(&self, state: &ConnectionState, request: Request<Incoming>) -> Response<Full<Bytes>> {
        let arrived = Instant::now();
        let (head, body) = request.into_parts();
        let service = state.client.service();
        let route = route(service, &head.uri);
        let result = self.dispatch(state, &route, &head, body, arrived).await;
        self.metrics.request(route.label(), Outcome::of(&result), arrived.elapsed());
        state.permit.idle();
        let mut response = result.unwrap_or_else(|refusal| {
            self.log(&state.client, &refusal);
            response::refuse(service, refusal.reason)
        });
        if state.permit.is_evicted() {
            response.headers_mut().insert(CONNECTION, HeaderValue::from_static("close"));
        }
        response
    }

    /// Applies the rate limit, and calls the handler of method and route.
    async fn dispatch(
        &self,
        state: &ConnectionState,
        route: &Route<'_>,
        head: &Parts,
        body: Incoming,
        arrived: Instant,
    ) -> Result<Response<Full<Bytes>>, Refusal> {
        let started = match state.quota.throttle(arrived) {
            Some(Duration::ZERO) => arrived,
            Some(delay) => {
                tokio::time::sleep(delay).await;
                Instant::now()
            }
            None => {
                // Delay the refusal as long as the longest delayed request: otherwise a tight loop would only run
                // faster.
                tokio::time::sleep(MAX_DELAY).await;
                return Err(Reason::TooManyRequests.into());
            }
        };
        let context = RequestContext { connection: state, headers: &head.headers, started };
        match (state.client.service(), &head.method, route) {
            (MetadataService::Metadata, &Method::PUT, Route::Token) => {
                read_body(body).await?;
                self.issue_token(&context)
            }
            (_, _, Route::Token) => Err(Reason::MethodNotAllowed.into()),
            (MetadataService::Metadata, &Method::GET | &Method::HEAD, _) => self.read_metadata(&context, route).await,
            (MetadataService::Container, &Method::GET | &Method::HEAD, _) => {
                self.container_credentials(&context, route).await
            }
            _ => Err(Reason::MethodNotAllowed.into()),
        }
    }

    /// Calls the handler of a route of the metadata service.
    async fn read_metadata(
        &self,
        context: &RequestContext<'_>,
        route: &Route<'_>,
    ) -> Result<Response<Full<Bytes>>, Refusal> {
        match route {
            Route::Versions => self.versions(context).await,
            Route::IdentityDocument => self.identity_document(context).await,
            Route::Metadata(path) => self.metadata(context, path).await,
            Route::IamInfo => self.iam_info(context).await,
            Route::RoleList => self.role_list(context).await,
            Route::Credentials { role, extended } => self.credentials(context, role, *extended).await,
            Route::NotFound | Route::Token | Route::ContainerCredentials => self.not_found(context).await,
        }
    }

    fn log(&self, client: &ClientConn, refusal: &Refusal) {
        if self.refusals.should_log(refusal.reason, client.source().ip()) {
            match self.attributor.lookup(client) {
                Ok(pod) => log_refusal(refusal, pod.namespace(), pod.pod(), &pod.service_account().name),
                Err(_) => log_refusal(refusal, "", "", ""),
            }
        }
    }
}

/// Routes by the request target without its query. The absolute and the authority form, which are for proxies, are not
/// found.
fn route(service: MetadataService, uri: &Uri) -> Route<'_> {
    let is_proxy_form = uri.scheme().is_some() || uri.authority().is_some();
    if is_proxy_form { Route::NotFound } else { Route::of(service, uri.path()) }
}

/// Reads the whole body, so that the connection stays usable. Reading also sends `100 Continue` to clients that wait
/// for it.
async fn read_body(body: Incoming) -> Result<(), Refusal> {
    let read = timeout(BODY_TIMEOUT, Limited::new(body, MAX_BODY).collect()).await;
    matches!(read, Ok(Ok(_))).then_some(()).ok_or_else(|| Reason::BadRequest.into())
}
