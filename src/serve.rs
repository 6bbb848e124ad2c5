//! Last stage: [`Peer`] and HTTP request → response. What success looks like on the wire stands in `answer`, what a no
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
pub mod route;
pub mod session;
pub mod upstream;

use std::{convert::Infallible, sync::Arc, time::Duration};

use bytes::Bytes;
use http::{HeaderName, Method, Request, Response, Uri, request::Parts};
use http_body_util::{BodyExt, Full, Limited};
use hyper::{body::Incoming, server::conn::http1, service::service_fn};
use hyper_util::{rt::TokioIo, server::graceful::Watcher};
use tokio::{
    io::{AsyncRead, AsyncWrite},
    time::{Instant, timeout},
};
use tracing::debug;

use crate::{
    attribute::Attributor,
    authorise::Authoriser,
    cache::Cache,
    intercept::{Accepted, MAX_DELAY, Peer, Service, Share},
    observe::{Metrics, Outcome, RefusalLog},
    refusal::{Reason, Refusal},
};
use caller::Caller;
use container::Tokens;
use hangup::Patient;
use identity::Asked;
use route::Route;
use session::Sessions;
use upstream::NodeMetadata;

static TOKEN: HeaderName = HeaderName::from_static("x-aws-ec2-metadata-token");
const TOKEN_TTL: &str = "x-aws-ec2-metadata-token-ttl-seconds";

/// Request line and headers, in bytes; hyper allows no less than 8 KiB.
const MAX_HEAD: usize = 16 << 10;
/// SDKs send no bodies, or empty ones.
const MAX_BODY: usize = 16 << 10;
const BODY_TIMEOUT: Duration = Duration::from_secs(2);

/// Everything that an answer depends on.
#[derive(Debug)]
pub struct Server {
    pub attributor: Arc<Attributor>,
    pub authoriser: Arc<Authoriser>,
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
    pub async fn connection(self: Arc<Self>, accepted: Accepted, drain: Watcher) {
        let (stream, peer, share, _place) = accepted.into_parts();
        // Answers are small and whole: waiting to fill a segment only delays them.
        let _ = stream.set_nodelay(true);
        self.converse(stream, peer, share, drain).await;
    }

    /// The same over any stream, so that what is tested without a network is what is run with one.
    pub(crate) async fn converse(
        &self,
        stream: impl AsyncRead + AsyncWrite + Unpin + Send + 'static,
        peer: Option<Peer>,
        share: Share,
        drain: Watcher,
    ) {
        let caller = Arc::new(Caller::new(peer, share));
        let service = service_fn(|request| {
            // Not when it is first polled: before that hyper looks whether the client is still there.
            caller.step();
            async { Ok::<_, Infallible>(self.answer(&caller, request).await) }
        });
        let stream = TokioIo::new(Patient::new(stream, caller.clone()));
        let connection = http1::Builder::new().max_buf_size(MAX_HEAD).serve_connection(stream, service);
        tokio::select! {
            ended = drain.watch(connection) => if let Err(error) = ended {
                debug!(source = ?caller.peer, %error, "connection");
            },
            () = caller.idle() => debug!(source = ?caller.peer, "idle for too long: closed"),
        }
    }

    async fn answer(&self, caller: &Caller, request: Request<Incoming>) -> Response<Full<Bytes>> {
        let (head, body) = request.into_parts();
        let service = caller.peer.as_ref().map_or(Service::Metadata, Peer::service);
        let route = target(&head.uri).map_or(Route::NotFound, |path| Route::of(service, path));
        let result = self.respond(caller, &route, &head, body).await;
        self.metrics.request(route.label(), Outcome::of(&result));
        caller.step();
        result.unwrap_or_else(|refusal| {
            self.log(caller, &refusal);
            answer::refuse(service, refusal.reason)
        })
    }

    async fn respond(
        &self,
        caller: &Caller,
        route: &Route<'_>,
        head: &Parts,
        body: Incoming,
    ) -> Result<Response<Full<Bytes>>, Refusal> {
        match caller.share.request() {
            Some(Duration::ZERO) => {}
            Some(delay) => tokio::time::sleep(delay).await,
            None => {
                // As long as the last one that is not refused: a client in a tight loop would only ask faster.
                tokio::time::sleep(MAX_DELAY).await;
                return Err(Reason::TooManyRequests.into());
            }
        }
        let peer = caller.peer.as_ref().ok_or(Reason::NotRedirected)?;
        let asked = Asked { caller, peer, headers: &head.headers, at: Instant::now() };
        match (peer.service(), &head.method, route) {
            (Service::Metadata, &Method::PUT, Route::Token) => {
                drain(body).await?;
                self.token(&asked)
            }
            (_, _, Route::Token) => Err(Reason::MethodNotAllowed.into()),
            (Service::Metadata, &Method::GET | &Method::HEAD, _) => self.read(&asked, route).await,
            (Service::Container, &Method::GET | &Method::HEAD, _) => self.container(&asked, route).await,
            _ => Err(Reason::MethodNotAllowed.into()),
        }
    }

    /// A line for each route; what it answers is a function of its own.
    async fn read(&self, asked: &Asked<'_>, route: &Route<'_>) -> Result<Response<Full<Bytes>>, Refusal> {
        match route {
            Route::Versions => self.versions(asked).await,
            Route::Metadata(path) if path == upstream::IDENTITY_DOCUMENT => self.identity_document(asked).await,
            Route::Metadata(path) => self.metadata(asked, path).await,
            Route::IamInfo => self.iam_info(asked).await,
            Route::RoleList => self.role_list(asked).await,
            Route::Credentials { role, extended } => self.credentials(asked, role, *extended).await,
            Route::NotFound | Route::Token | Route::ContainerCredentials => self.not_found(asked).await,
        }
    }

    fn log(&self, caller: &Caller, refusal: &Refusal) {
        let workload = caller.peer.as_ref().and_then(|peer| self.attributor.peek(peer).ok());
        let source = caller.peer.as_ref().map(|peer| peer.source().ip());
        self.refusals.refused(refusal, source, |log| match &workload {
            Some(workload) => log(workload.namespace(), workload.pod(), &workload.service_account().name),
            None => log("", "", ""),
        });
    }
}

/// The request target without its query; `None` for the forms that are for proxies.
fn target(uri: &Uri) -> Option<&str> {
    (uri.scheme().is_none() && uri.authority().is_none()).then(|| uri.path())
}

/// Reads a body to its end, so that the connection stays usable; a client that awaits `100 Continue` gets it by that.
async fn drain(body: Incoming) -> Result<(), Refusal> {
    let whole = timeout(BODY_TIMEOUT, Limited::new(body, MAX_BODY).collect()).await;
    matches!(whole, Ok(Ok(_))).then_some(()).ok_or_else(|| Reason::BadRequest.into())
}
