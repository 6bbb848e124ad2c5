//! The admin pages: metrics and health, for Prometheus at a port and for the kubelet's probes at a socket. Pods cannot
//! reach them through the metadata address, and they hold no secret of theirs. Where the port is open to more than
//! loopback any pod may ask there, so names of pods and roles are for this node's own processes.

use std::{convert::Infallible, fmt, io, net::SocketAddr, sync::Arc, time::Duration};

use bytes::Bytes;
use http::{Method, Request, Response, StatusCode, header::CONTENT_TYPE};
use http_body_util::Full;
use hyper::{body::Incoming, server::conn::http1, service::service_fn};
use hyper_util::rt::{TokioIo, TokioTimer};
use tokio::{
    io::{AsyncRead, AsyncWrite},
    net::{TcpListener, UnixListener},
    sync::Semaphore,
    time::timeout,
};
use tracing::{debug, warn};

use super::{Metrics, Readiness};

/// What the agent holds, as JSON, for whoever debugs it.
pub type Page = Arc<dyn Fn() -> serde_json::Value + Send + Sync>;

/// A few Prometheuses; whoever opens more must not take the file descriptors that pods' connections need. As many
/// again from this node itself, so that nobody elsewhere keeps its own programs out.
const CONNECTIONS: usize = 64;
/// However slowly somebody reads, or often asks: the place is another's then.
const LONGEST: Duration = Duration::from_secs(600);

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
        let (here, elsewhere) = (Arc::new(Semaphore::new(CONNECTIONS)), Arc::new(Semaphore::new(CONNECTIONS)));
        loop {
            let Some((stream, from)) = accepted(listener.accept().await).await else { continue };
            let is_here = is_here(from);
            self.converse(stream, if is_here { &here } else { &elsewhere }, is_here);
        }
    }

    /// The same on a socket in the file system: this process's own, while two agents of a node share the port.
    pub async fn serve_local(&self, listener: &UnixListener) {
        let here = Arc::new(Semaphore::new(CONNECTIONS));
        loop {
            let Some((stream, _)) = accepted(listener.accept().await).await else { continue };
            self.converse(stream, &here, true);
        }
    }

    fn converse(
        &self,
        stream: impl AsyncRead + AsyncWrite + Unpin + Send + 'static,
        places: &Arc<Semaphore>,
        is_here: bool,
    ) {
        let Ok(place) = places.clone().try_acquire_owned() else {
            debug!(is_here, "too many connections to the admin port");
            return;
        };
        let admin = self.clone();
        tokio::spawn(async move {
            let _place = place;
            let answer = service_fn(|request: Request<Incoming>| {
                let response = admin.answer(request.method(), request.uri().path(), is_here);
                async move { Ok::<_, Infallible>(response) }
            });
            let connection = http1::Builder::new()
                .timer(TokioTimer::new())
                .header_read_timeout(Duration::from_secs(30))
                .serve_connection(TokioIo::new(stream), answer);
            if let Ok(Err(error)) = timeout(LONGEST, connection).await {
                debug!(%error, "admin connection");
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

/// By an address that nobody can have elsewhere.
fn is_here(from: SocketAddr) -> bool {
    from.ip().to_canonical().is_loopback()
}

fn text(status: StatusCode, body: impl Into<Bytes>) -> Response<Full<Bytes>> {
    let mut response = Response::new(Full::new(body.into()));
    *response.status_mut() = status;
    response.headers_mut().insert(CONTENT_TYPE, http::HeaderValue::from_static("text/plain; version=0.0.4"));
    response
}
