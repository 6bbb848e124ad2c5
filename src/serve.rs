//! Last stage: [`Peer`] and HTTP request → response. The only file that knows what success looks like on the wire; what
//! a no looks like stands in [`crate::refusal`].
//!
//! Nothing of a request is ever forwarded, and nothing in it decides who is calling: parse, normalise, match exactly,
//! answer from our own.

mod answer;
mod caller;
pub mod container;
mod hangup;
pub mod imdsv2;
pub mod route;
pub mod session;
pub mod upstream;

use std::{convert::Infallible, sync::Arc, time::Duration};

use bytes::Bytes;
use http::{HeaderMap, HeaderName, Method, Request, Response, Uri, request::Parts};
use http_body_util::{BodyExt, Full, Limited};
use hyper::{body::Incoming, server::conn::http1, service::service_fn};
use hyper_util::{rt::TokioIo, server::graceful::Watcher};
use tokio::{
    io::{AsyncRead, AsyncWrite},
    time::{Instant, timeout, timeout_at},
};
use tracing::debug;

use crate::{
    attribute::{Attributor, PATIENCE, Workload},
    authorise::{Authoriser, Grant},
    cache::{Cache, Standing},
    clock::UnixTime,
    exchange::Credential,
    intercept::{Accepted, MAX_DELAY, Peer, Service, Share},
    observe::{Metrics, Outcome, RefusalLog},
    refusal::{Reason, Refusal},
};
use caller::{Caller, Editions, Known};
use container::Tokens;
use hangup::Patient;
use route::Route;
use session::Sessions;
use upstream::NodeMetadata;

static TOKEN: HeaderName = HeaderName::from_static("x-aws-ec2-metadata-token");
const TOKEN_TTL: &str = "x-aws-ec2-metadata-token-ttl-seconds";

/// The role list waits this long for the exchange, since clients give each request its own second: what the list waits
/// the credentials need not. Go's SDK v2 gives up after 500 ms.
const LIST_HOLD: Duration = Duration::from_millis(350);
/// The credentials are waited for this long; Go's SDKs give up after 5 s, and some clients never.
const CREDENTIALS_HOLD: Duration = Duration::from_secs(4);
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
        match (peer.service(), &head.method, route) {
            (Service::Metadata, &Method::PUT, Route::Token) => {
                drain(body).await?;
                self.token(peer, &head.headers)
            }
            (_, _, Route::Token) => Err(Reason::MethodNotAllowed.into()),
            (Service::Metadata, &Method::GET | &Method::HEAD, _) => self.read(caller, peer, route, &head.headers).await,
            (Service::Container, &Method::GET | &Method::HEAD, _) => {
                self.container(caller, peer, route, &head.headers).await
            }
            _ => Err(Reason::MethodNotAllowed.into()),
        }
    }

    /// Never waits: SDKs give it a second at most, and some never fall back to IMDSv1.
    fn token(&self, peer: &Peer, headers: &HeaderMap) -> Result<Response<Full<Bytes>>, Refusal> {
        // As EC2 does: a token must not be had through an open reverse proxy.
        if headers.contains_key("x-forwarded-for") {
            return Err(Reason::ForwardedToken.into());
        }
        let ttl = headers.get(TOKEN_TTL).and_then(|ttl| ttl.to_str().ok()).and_then(|ttl| ttl.parse().ok());
        let ttl: u32 = ttl.filter(|ttl| session::TTL.contains(ttl)).ok_or(Reason::BadTtl)?;
        let workload = self.attributor.peek(peer).ok();
        let token = self.sessions.issue(workload.as_ref(), peer.source().ip(), ttl, UnixTime::now());
        Ok(answer::token(token, ttl))
    }

    async fn read(
        &self,
        caller: &Caller,
        peer: &Peer,
        route: &Route<'_>,
        headers: &HeaderMap,
    ) -> Result<Response<Full<Bytes>>, Refusal> {
        let asked = Instant::now();
        match route {
            Route::Versions => self.anybody(peer, headers).map(|()| answer::text("latest")),
            Route::Metadata(path) if path == upstream::IDENTITY_DOCUMENT => {
                let document = self.metadata.value(path).ok_or(Reason::NotFound)?;
                let workload = self.caller(caller, peer, headers, asked).await?;
                let grant = self.grant(&workload, headers, asked + PATIENCE).await.ok();
                let account = grant.as_ref().and_then(|grant| grant.role().account());
                let document = upstream::identity_document(&document, account).ok_or(Reason::NotFound)?;
                Ok(answer::text(document))
            }
            Route::Metadata(path) => {
                self.anybody(peer, headers)?;
                self.metadata(path).ok_or_else(|| Reason::NotFound.into())
            }
            Route::IamInfo => {
                let workload = self.caller(caller, peer, headers, asked).await?;
                let grant = self.grant(&workload, headers, asked + PATIENCE).await?;
                answer::iam_info(grant.role(), UnixTime::now()).ok_or_else(|| Reason::NotFound.into())
            }
            Route::NotFound | Route::Token | Route::ContainerCredentials => {
                self.anybody(peer, headers).and(Err(Reason::NotFound.into()))
            }
            Route::RoleList => {
                let workload = self.caller(caller, peer, headers, asked).await?;
                let grant = self.grant(&workload, headers, asked + PATIENCE).await?;
                match self.cache.standing(&grant, asked + LIST_HOLD).await {
                    Standing::Failed(refusal) => Err(refusal),
                    // The name follows from the service account: nobody need wait for STS to learn it.
                    Standing::Ready | Standing::Pending => Ok(answer::text(grant.role().alias())),
                }
            }
            Route::Credentials { role, extended } => {
                let until = asked + CREDENTIALS_HOLD;
                let known = self.known(caller, peer, headers, asked, until).await?;
                let grant = &known.grant;
                // The service account decides the role. Another name is not found, whether there is such a role or not.
                if !grant.role().answers_to(role) {
                    return Err(Refusal::new(Reason::NotFound, format!("role {role} is not that of {grant}")));
                }
                let credential = self.credential(peer, &known, until).await?;
                Ok(answer::document(if *extended { credential.extended() } else { credential.document() }))
            }
        }
    }

    async fn credential(&self, peer: &Peer, known: &Known, until: Instant) -> Result<Arc<Credential>, Refusal> {
        let credential = match self.cache.in_hand(&known.session) {
            Some(credential) => credential,
            None => self.cache.get(&known.grant, until).await?,
        };
        // A last look: the address may have changed hands while this request was held. What else is told of the pod
        // meanwhile, such as that address, makes no other pod of it.
        if self.editions() != known.editions && self.attributor.peek(peer)?.uid() != known.workload.uid() {
            return Err(Refusal::new(Reason::UnknownPod, format!("{} lost its address meanwhile", known.workload)));
        }
        Ok(credential)
    }

    /// A value, or what there is below a path.
    fn metadata(&self, path: &str) -> Option<Response<Full<Bytes>>> {
        if let Some(value) = self.metadata.value(path) {
            return Some(answer::text(value));
        }
        let mut entries = self.metadata.entries(path);
        match path {
            "" => entries = vec!["dynamic".into(), "meta-data".into()],
            "meta-data" => entries.insert(0, "iam/".into()),
            "meta-data/iam" => entries = vec!["info".into(), "security-credentials/".into()],
            _ => {}
        }
        (!entries.is_empty()).then(|| answer::text(entries.join("\n")))
    }

    /// What is the same for every pod: only a session token that is wrong stands in the way.
    fn anybody(&self, peer: &Peer, headers: &HeaderMap) -> Result<(), Refusal> {
        self.session(peer, headers, self.attributor.peek(peer).ok().as_ref())
    }

    /// Who is calling, with a right session token.
    async fn caller(
        &self,
        caller: &Caller,
        peer: &Peer,
        headers: &HeaderMap,
        asked: Instant,
    ) -> Result<Workload, Refusal> {
        // What is wrong whoever is calling need not wait for who that is.
        self.session(peer, headers, None)?;
        let workload = self.attributed(caller, peer, asked).await?;
        self.session(peer, headers, Some(&workload))?;
        Ok(workload)
    }

    /// Who is calling, if it is still who it was on this connection's first request.
    async fn attributed(&self, caller: &Caller, peer: &Peer, asked: Instant) -> Result<Workload, Refusal> {
        let workload = self.attributor.attribute(peer, asked + PATIENCE).await?;
        if !caller.is_still(&workload) {
            return Err(Refusal::new(Reason::UnknownPod, "the address changed hands while this connection was open"));
        }
        Ok(workload)
    }

    fn session(&self, peer: &Peer, headers: &HeaderMap, workload: Option<&Workload>) -> Result<(), Refusal> {
        let Some(token) = headers.get(&TOKEN) else {
            return if self.require_imdsv2.of(workload) { Err(Reason::SessionRequired.into()) } else { Ok(()) };
        };
        let session = self.sessions.read(token.as_bytes(), UnixTime::now()).ok_or(Reason::SessionInvalid)?;
        match workload {
            Some(workload) if !self.sessions.belongs(&session, workload, peer.source().ip()) => {
                Err(Reason::SessionInvalid.into())
            }
            _ => Ok(()),
        }
    }

    async fn grant(&self, workload: &Workload, headers: &HeaderMap, until: Instant) -> Result<Grant, Refusal> {
        let grant = self.authorise(workload, until).await?;
        self.suffices(&grant, headers)?;
        Ok(grant)
    }

    async fn authorise(&self, workload: &Workload, until: Instant) -> Result<Grant, Refusal> {
        timeout_at(until, self.authoriser.authorise(workload)).await.unwrap_or_else(|_| {
            let account = workload.service_account();
            Err(Refusal::new(
                Reason::AccountUnavailable,
                format!("service account {account} could not be read in time"),
            ))
        })
    }

    /// Whether the request has a session token if what it asks for requires one.
    fn suffices(&self, grant: &Grant, headers: &HeaderMap) -> Result<(), Refusal> {
        let lacks = grant.requires_imdsv2() && !headers.contains_key(&TOKEN);
        if lacks { Err(Reason::SessionRequired.into()) } else { Ok(()) }
    }

    /// Who is calling and what it is granted: as remembered of the connection's last request, if nothing that the
    /// answer rests on has changed since.
    async fn known(
        &self,
        caller: &Caller,
        peer: &Peer,
        headers: &HeaderMap,
        asked: Instant,
        until: Instant,
    ) -> Result<Known, Refusal> {
        let editions = self.editions();
        if let Some(known) = caller.known(editions) {
            self.session(peer, headers, Some(&known.workload))?;
            self.suffices(&known.grant, headers)?;
            return Ok(known);
        }
        let workload = self.caller(caller, peer, headers, asked).await?;
        let grant = self.grant(&workload, headers, until).await?;
        let known = Known { editions, session: self.cache.session(&grant), workload, grant };
        // What a live read told holds for less long than an edition may.
        if self.authoriser.foresee(&known.workload).is_some() {
            caller.remember(known.clone());
        }
        Ok(known)
    }

    fn editions(&self) -> Editions {
        (self.attributor.edition(), self.authoriser.edition())
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
