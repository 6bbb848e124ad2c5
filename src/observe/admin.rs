//! The admin pages: metrics and health, on a TCP port for Prometheus and on a Unix socket for the kubelet's probes.
//! Pods cannot reach them through the metadata address, and no page contains a secret. If the port is exposed beyond
//! loopback, any pod can connect to it, so pages that name pods and roles are served only to this node's own processes.

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

/// Renders internal state as JSON for debugging.
pub type DebugPage = Arc<dyn Fn() -> serde_json::Value + Send + Sync>;

/// Limits for remote connections: those of Prometheus, and of any pod if the port is exposed. A new connection evicts
/// the longest-idle one of the address with the most connections, so that pods cannot lock Prometheus out.
const REMOTE: Bounds = Bounds { total: 32, per_owner: 8, grace: Duration::ZERO };
/// Limits for connections over loopback or the Unix socket, so that remote clients cannot lock local ones out.
const LOCAL: Bounds = Bounds { total: 32, per_owner: 32, grace: Duration::ZERO };
const LOOPBACK: IpAddr = IpAddr::V4(Ipv4Addr::LOCALHOST);
/// Maximum size of a request head in bytes.
const MAX_HEAD: usize = 16 << 10;
/// Pause after a failed accept, since running out of file descriptors is temporary.
const ACCEPT_RETRY: Duration = Duration::from_millis(100);

/// The admin server, shared by all of its listeners.
#[derive(Clone)]
pub struct Admin {
    pub metrics: Metrics,
    pub readiness: Readiness,
    pub sessions: DebugPage,
}

impl fmt::Debug for Admin {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Admin").field("readiness", &self.readiness).finish_non_exhaustive()
    }
}

impl Admin {
    /// Serves the TCP port until dropped.
    pub async fn serve(&self, listener: &TcpListener) {
        let (local, remote) = (ConnectionLimiter::new(LOCAL), ConnectionLimiter::new(REMOTE));
        loop {
            let Some((stream, from)) = accept_or_pause(listener.accept().await).await else { continue };
            let from = from.ip().to_canonical();
            let limiter = if from.is_loopback() { &local } else { &remote };
            self.serve_connection(stream, limiter, from);
            limiter.yield_to_evicted().await;
        }
    }

    /// Serves a Unix socket until dropped. Only this process answers there, even while two agents share the TCP port.
    pub async fn serve_local(&self, listener: &UnixListener) {
        let local = ConnectionLimiter::new(LOCAL);
        loop {
            let Some((stream, _)) = accept_or_pause(listener.accept().await).await else { continue };
            self.serve_connection(stream, &local, LOOPBACK);
            local.yield_to_evicted().await;
        }
    }

    /// Spawns a task that serves one connection. Pages that name pods and roles are served only over loopback, whose
    /// addresses cannot be used by another host.
    fn serve_connection(&self, stream: impl Socket + Send + 'static, limiter: &Arc<ConnectionLimiter>, from: IpAddr) {
        let Ok((permit, _)) = limiter.try_admit(Owner::Address(from)) else {
            debug!(%from, "admin connection rejected: too many connections");
            return;
        };
        let admin = self.clone();
        tokio::spawn(async move {
            let respond = service_fn(|request: Request<Incoming>| {
                permit.busy();
                let mut response = admin.respond(request.method(), request.uri().path(), from.is_loopback());
                permit.idle();
                if permit.is_evicted() {
                    response.headers_mut().insert(CONNECTION, HeaderValue::from_static("close"));
                }
                async move { Ok::<_, Infallible>(response) }
            });
            let stream = TokioIo::new(Tracked::new(stream, permit.clone()));
            let connection = http1::Builder::new().max_buf_size(MAX_HEAD).serve_connection(stream, respond);
            match permit.drive(connection).await {
                Ok(Ok(())) => {}
                Ok(Err(error)) => debug!(%from, %error, "admin connection failed"),
                Err(timeout) => debug!(%from, ?timeout, "admin connection timed out"),
            }
        });
    }

    fn respond(&self, method: &Method, path: &str, is_local: bool) -> Response<Full<Bytes>> {
        if !matches!(*method, Method::GET | Method::HEAD) {
            return text(StatusCode::METHOD_NOT_ALLOWED, "only GET and HEAD\n");
        }
        match path {
            // Any response proves that the event loop runs, which is all that liveness means.
            "/healthz" => text(StatusCode::OK, "ok\n"),
            "/readyz" => match self.readiness.pending() {
                pending if pending.is_empty() => text(StatusCode::OK, "ready\n"),
                pending => text(StatusCode::SERVICE_UNAVAILABLE, pending.join("\n") + "\n"),
            },
            "/metrics" => match self.metrics.render() {
                Ok(metrics) => text(StatusCode::OK, metrics),
                Err(error) => text(StatusCode::INTERNAL_SERVER_ERROR, format!("{error}\n")),
            },
            "/debug/sessions" if is_local => text(StatusCode::OK, format!("{:#}\n", (self.sessions)())),
            "/debug/sessions" => text(StatusCode::FORBIDDEN, "only from this node: 127.0.0.1\n"),
            _ => text(StatusCode::NOT_FOUND, "/metrics\n/healthz\n/readyz\n/debug/sessions\n"),
        }
    }
}

/// Logs a failed accept and pauses.
async fn accept_or_pause<T>(accepted: io::Result<T>) -> Option<T> {
    match accepted {
        Ok(accepted) => Some(accepted),
        Err(error) => {
            warn!(%error, "cannot accept an admin connection");
            tokio::time::sleep(ACCEPT_RETRY).await;
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
