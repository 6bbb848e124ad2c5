//! The admin pages: metrics and health, for Prometheus at a port and for the kubelet's probes at a socket. Pods cannot
//! reach them through the metadata address, and they hold no secret of theirs. Where the port is open to more than
//! loopback any pod may ask there, so names of pods and roles are for this node's own processes.

use std::{
    convert::Infallible,
    fmt, io,
    net::{IpAddr, Ipv4Addr},
    sync::Arc,
    time::Duration,
};

use bytes::Bytes;
use http::{
    HeaderValue, Method, Request, Response, StatusCode,
    header::{CONNECTION, CONTENT_TYPE},
};
use http_body_util::Full;
use hyper::{body::Incoming, server::conn::http1, service::service_fn};
use hyper_util::rt::TokioIo;
use tokio::net::{TcpListener, UnixListener};
use tracing::{debug, warn};

use super::{Metrics, Readiness};
use crate::connections::{Bounds, ConnectionLimiter, Owner, Socket, Tracked};

/// What the agent holds, as JSON, for whoever debugs it.
pub type Page = Arc<dyn Fn() -> serde_json::Value + Send + Sync>;

/// Connections from elsewhere: of a few Prometheuses, and of any pod where the port is exposed. A new one evicts the
/// longest-idle one of the address that holds most, so that pods cannot keep Prometheus out.
const ELSEWHERE: Bounds = Bounds { total: 32, per_owner: 8, grace: Duration::ZERO };
/// Connections from this node's loopback, and at the Unix socket, so that nobody elsewhere keeps its own programs out.
const HERE: Bounds = Bounds { total: 32, per_owner: 32, grace: Duration::ZERO };
const LOOPBACK: IpAddr = IpAddr::V4(Ipv4Addr::LOCALHOST);
/// Maximum size of a request in bytes.
const MAX_HEAD: usize = 16 << 10;

/// What is answered, wherever it is asked.
#[derive(Clone)]
pub struct Admin {
    pub metrics: Metrics,
    pub readiness: Readiness,
    pub sessions: Page,
}

impl fmt::Debug for Admin {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Admin").field("readiness", &self.readiness).finish_non_exhaustive()
    }
}

impl Admin {
    /// Serves until it is dropped.
    pub async fn serve(&self, listener: &TcpListener) {
        let (here, elsewhere) = (ConnectionLimiter::new(HERE), ConnectionLimiter::new(ELSEWHERE));
        loop {
            let Some((stream, from)) = accepted(listener.accept().await).await else { continue };
            let from = from.ip().to_canonical();
            let limiter = if from.is_loopback() { &here } else { &elsewhere };
            self.converse(stream, limiter, from);
            limiter.yield_to_evicted().await;
        }
    }

    /// The same on a socket in the file system: this process's own, while two agents of a node share the port.
    pub async fn serve_local(&self, listener: &UnixListener) {
        let here = ConnectionLimiter::new(HERE);
        loop {
            let Some((stream, _)) = accepted(listener.accept().await).await else { continue };
            self.converse(stream, &here, LOOPBACK);
            here.yield_to_evicted().await;
        }
    }

    /// Pages that name pods and roles are for loopback, whose addresses nobody can have elsewhere.
    fn converse(&self, stream: impl Socket + Send + 'static, limiter: &Arc<ConnectionLimiter>, from: IpAddr) {
        let Ok((permit, _)) = limiter.try_admit(Owner::Address(from)) else {
            debug!(%from, "too many connections to the admin port");
            return;
        };
        let admin = self.clone();
        tokio::spawn(async move {
            let answer = service_fn(|request: Request<Incoming>| {
                permit.busy();
                let mut response = admin.answer(request.method(), request.uri().path(), from.is_loopback());
                permit.idle();
                if permit.is_evicted() {
                    response.headers_mut().insert(CONNECTION, HeaderValue::from_static("close"));
                }
                async move { Ok::<_, Infallible>(response) }
            });
            let stream = TokioIo::new(Tracked::new(stream, permit.clone()));
            let connection = http1::Builder::new().max_buf_size(MAX_HEAD).serve_connection(stream, answer);
            match permit.drive(connection).await {
                Ok(Ok(())) => {}
                Ok(Err(error)) => debug!(%from, %error, "admin connection"),
                Err(timeout) => debug!(%from, ?timeout, "admin connection closed"),
            }
        });
    }

    fn answer(&self, method: &Method, path: &str, is_here: bool) -> Response<Full<Bytes>> {
        if !matches!(*method, Method::GET | Method::HEAD) {
            return text(StatusCode::METHOD_NOT_ALLOWED, "only GET and HEAD\n");
        }
        match path {
            // That this is answered at all says that the event loop turns: no more is asked of liveness.
            "/healthz" => text(StatusCode::OK, "ok\n"),
            "/readyz" => match self.readiness.pending() {
                pending if pending.is_empty() => text(StatusCode::OK, "ready\n"),
                pending => text(StatusCode::SERVICE_UNAVAILABLE, pending.join("\n") + "\n"),
            },
            "/metrics" => match self.metrics.render() {
                Ok(metrics) => text(StatusCode::OK, metrics),
                Err(error) => text(StatusCode::INTERNAL_SERVER_ERROR, format!("{error}\n")),
            },
            "/debug/sessions" if is_here => text(StatusCode::OK, format!("{:#}\n", (self.sessions)())),
            "/debug/sessions" => text(StatusCode::FORBIDDEN, "only from this node: 127.0.0.1\n"),
            _ => text(StatusCode::NOT_FOUND, "/metrics\n/healthz\n/readyz\n/debug/sessions\n"),
        }
    }
}

/// A moment of rest after an error: those of want pass.
async fn accepted<T>(accepted: io::Result<T>) -> Option<T> {
    match accepted {
        Ok(accepted) => Some(accepted),
        Err(error) => {
            warn!(%error, "cannot accept on the admin port");
            tokio::time::sleep(Duration::from_millis(100)).await;
            None
        }
    }
}

fn text(status: StatusCode, body: impl Into<Bytes>) -> Response<Full<Bytes>> {
    let mut response = Response::new(Full::new(body.into()));
    *response.status_mut() = status;
    response.headers_mut().insert(CONTENT_TYPE, HeaderValue::from_static("text/plain; version=0.0.4"));
    response
}
