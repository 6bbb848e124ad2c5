//! Last stage: [`ClientConn`] and HTTP request → response. What success looks like on the wire stands in `answer`, what a no
//! looks like in [`crate::refusal`], and nowhere else.
//!
//! Nothing of a request is ever forwarded, and nothing in it decides who is calling: parse, normalise, match exactly,
//! answer from our own.

mod answer;
mod caller;
pub mod container;
mod hangup;
mod identity;
mod imds;
pub mod imdsv2;
pub mod node_metadata;
pub mod route;
pub mod session_token;

#[cfg(test)]
mod hold_tests;
#[cfg(any(test, fuzzing))]
pub(crate) mod memory;

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
use caller::Caller;
use container::Tokens;
use hangup::Patient;
use identity::Asked;
use node_metadata::NodeMetadata;
use route::Route;
use session_token::Sessions;

static TOKEN: HeaderName = HeaderName::from_static("x-aws-ec2-metadata-token");
const TOKEN_TTL: &str = "x-aws-ec2-metadata-token-ttl-seconds";

/// Request line and headers, in bytes; hyper allows no less than 8 KiB.
const MAX_HEAD: usize = 16 << 10;
/// SDKs send no bodies, or empty ones.
const MAX_BODY: usize = 16 << 10;
const BODY_TIMEOUT: Duration = Duration::from_secs(2);
/// What a connection that is turned away may take.
const LAST_WORD: Duration = Duration::from_secs(1);

/// Everything that an answer depends on.
#[derive(Debug)]
pub struct Server {
    pub attributor: Arc<Attributor>,
    pub authorizer: Arc<Authorizer>,
    pub cache: Arc<Cache>,
    pub sessions: Sessions,
    pub metadata: Arc<NodeMetadata>,
    pub require_imdsv2: imdsv2::Required,
    /// Where container credentials are served.
    pub container: Option<Tokens>,
    pub metrics: Metrics,
    pub refusals: RefusalLog,
}

impl Server {
    /// Serves one connection to its end.
    pub async fn connection(self: Arc<Self>, conn: IncomingConn, drain: Watcher) {
        match conn.wait_for_permit().await {
            Ok(Accepted { stream, client, quota, permit }) => {
                // Answers are small and whole: waiting to fill a segment only delays them.
                let _ = stream.set_nodelay(true);
                self.converse(stream, client, quota, permit, drain).await;
            }
            Err(turned_away) => self.turn_away(turned_away).await,
        }
    }

    /// The same over any stream, so that what is tested without a network is what is run with one.
    pub(crate) async fn converse(
        &self,
        stream: impl Socket + Send + 'static,
        peer: ClientConn,
        share: SourceQuota,
        permit: Arc<ConnectionPermit>,
        drain: Watcher,
    ) {
        let caller = Caller::new(peer, share, permit.clone());
        let service = service_fn(|request| {
            // Not when it is first polled: before that hyper looks whether the client is still there.
            permit.busy();
            async { Ok::<_, Infallible>(self.answer(&caller, request).await) }
        });
        let stream = Patient::new(Tracked::new(stream, permit.clone()), permit.clone());
        let connection = http1::Builder::new().max_buf_size(MAX_HEAD).serve_connection(TokioIo::new(stream), service);
        match permit.drive(drain.watch(connection)).await {
            Ok(Ok(())) => {}
            Ok(Err(error)) => debug!(source = ?caller.peer, %error, "connection"),
            Err(timeout) => {
                self.metrics.connection_closed(timeout.label());
                debug!(source = ?caller.peer, ?timeout, "connection closed");
            }
        }
    }

    /// Answers the first request with a refusal, whatever it asks for, and closes.
    async fn turn_away(&self, turned_away: Rejected) {
        let Rejected { stream, client: peer, refusal, permit } = turned_away;
        let service = peer.service();
        let answer = |request: Request<Incoming>| {
            permit.busy();
            let route = route(service, request.uri());
            self.metrics.request(route.label(), Outcome::Refused(refusal.reason), Duration::ZERO);
            self.log(&peer, &refusal);
            std::future::ready(Ok::<_, Infallible>(answer::refuse(service, refusal.reason)))
        };
        let connection = http1::Builder::new()
            .keep_alive(false)
            .max_buf_size(MAX_HEAD)
            .serve_connection(TokioIo::new(Tracked::new(stream, permit.clone())), service_fn(answer));
        // The caller may be gone already, or never ask: neither matters.
        let _ = timeout(LAST_WORD, permit.drive(connection)).await;
    }

    async fn answer(&self, caller: &Caller, request: Request<Incoming>) -> Response<Full<Bytes>> {
        let arrived = Instant::now();
        let (head, body) = request.into_parts();
        let service = caller.peer.service();
        let route = route(service, &head.uri);
        let result = self.respond(caller, &route, &head, body, arrived).await;
        self.metrics.request(route.label(), Outcome::of(&result), arrived.elapsed());
        caller.permit.idle();
        let mut response = result.unwrap_or_else(|refusal| {
            self.log(&caller.peer, &refusal);
            answer::refuse(service, refusal.reason)
        });
        if caller.permit.is_evicted() {
            response.headers_mut().insert(CONNECTION, HeaderValue::from_static("close"));
        }
        response
    }

    async fn respond(
        &self,
        caller: &Caller,
        route: &Route<'_>,
        head: &Parts,
        body: Incoming,
        arrived: Instant,
    ) -> Result<Response<Full<Bytes>>, Refusal> {
        let at = match caller.share.throttle(arrived) {
            Some(Duration::ZERO) => arrived,
            Some(delay) => {
                tokio::time::sleep(delay).await;
                Instant::now()
            }
            None => {
                // As long as the last one that is not refused: a client in a tight loop would only ask faster.
                tokio::time::sleep(MAX_DELAY).await;
                return Err(Reason::TooManyRequests.into());
            }
        };
        let asked = Asked { caller, headers: &head.headers, at };
        match (caller.peer.service(), &head.method, route) {
            (MetadataService::Metadata, &Method::PUT, Route::Token) => {
                drain(body).await?;
                self.token(&asked)
            }
            (_, _, Route::Token) => Err(Reason::MethodNotAllowed.into()),
            (MetadataService::Metadata, &Method::GET | &Method::HEAD, _) => self.read(&asked, route).await,
            (MetadataService::Container, &Method::GET | &Method::HEAD, _) => self.container(&asked, route).await,
            _ => Err(Reason::MethodNotAllowed.into()),
        }
    }

    /// A line for each route; what it answers is a function of its own.
    async fn read(&self, asked: &Asked<'_>, route: &Route<'_>) -> Result<Response<Full<Bytes>>, Refusal> {
        match route {
            Route::Versions => self.versions(asked).await,
            Route::IdentityDocument => self.identity_document(asked).await,
            Route::Metadata(path) => self.metadata(asked, path).await,
            Route::IamInfo => self.iam_info(asked).await,
            Route::RoleList => self.role_list(asked).await,
            Route::Credentials { role, extended } => self.credentials(asked, role, *extended).await,
            Route::NotFound | Route::Token | Route::ContainerCredentials => self.not_found(asked).await,
        }
    }

    fn log(&self, peer: &ClientConn, refusal: &Refusal) {
        if self.refusals.is_news(refusal.reason, peer.source().ip()) {
            match self.attributor.lookup(peer) {
                Ok(pod) => log_refusal(refusal, pod.namespace(), pod.pod(), &pod.service_account().name),
                Err(_) => log_refusal(refusal, "", "", ""),
            }
        }
    }
}

/// By the request target without its query. The forms that are for proxies are not found.
fn route(service: MetadataService, uri: &Uri) -> Route<'_> {
    let for_proxies = uri.scheme().is_some() || uri.authority().is_some();
    if for_proxies { Route::NotFound } else { Route::of(service, uri.path()) }
}

/// Reads a body to its end, so that the connection stays usable; a client that awaits `100 Continue` gets it by that.
async fn drain(body: Incoming) -> Result<(), Refusal> {
    let whole = timeout(BODY_TIMEOUT, Limited::new(body, MAX_BODY).collect()).await;
    matches!(whole, Ok(Ok(_))).then_some(()).ok_or_else(|| Reason::BadRequest.into())
}
