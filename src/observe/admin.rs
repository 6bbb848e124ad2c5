//! The admin port: metrics and health, for the kubelet and Prometheus. Pods cannot reach it through the metadata
//! address, and it serves no secret of theirs.

use std::{convert::Infallible, sync::Arc, time::Duration};

use bytes::Bytes;
use http::{Method, Request, Response, StatusCode, header::CONTENT_TYPE};
use http_body_util::Full;
use hyper::{body::Incoming, server::conn::http1, service::service_fn};
use hyper_util::rt::{TokioIo, TokioTimer};
use tokio::net::TcpListener;
use tracing::{debug, warn};

use super::{Metrics, Readiness};

/// What the agent holds, as JSON, for whoever debugs it.
pub type Page = Arc<dyn Fn() -> serde_json::Value + Send + Sync>;

/// Serves until it is dropped.
pub async fn serve_admin(listener: &TcpListener, metrics: &Metrics, readiness: &Readiness, slots: &Page) {
    loop {
        let stream = match listener.accept().await {
            Ok((stream, _)) => stream,
            Err(error) => {
                warn!(%error, "cannot accept on the admin port");
                tokio::time::sleep(Duration::from_millis(100)).await;
                continue;
            }
        };
        let (metrics, readiness, slots) = (metrics.clone(), readiness.clone(), slots.clone());
        tokio::spawn(async move {
            let answer = service_fn(|request: Request<Incoming>| {
                let response = answer(request.method(), request.uri().path(), &metrics, &readiness, &slots);
                async move { Ok::<_, Infallible>(response) }
            });
            let connection = http1::Builder::new()
                .timer(TokioTimer::new())
                .header_read_timeout(Duration::from_secs(30))
                .serve_connection(TokioIo::new(stream), answer);
            if let Err(error) = connection.await {
                debug!(%error, "admin connection");
            }
        });
    }
}

fn answer(
    method: &Method,
    path: &str,
    metrics: &Metrics,
    readiness: &Readiness,
    slots: &Page,
) -> Response<Full<Bytes>> {
    if !matches!(*method, Method::GET | Method::HEAD) {
        return text(StatusCode::METHOD_NOT_ALLOWED, "only GET and HEAD\n");
    }
    match path {
        // That this is answered at all says that the event loop turns: no more is asked of liveness.
        "/healthz" => text(StatusCode::OK, "ok\n"),
        "/readyz" => match readiness.pending() {
            pending if pending.is_empty() => text(StatusCode::OK, "ready\n"),
            pending => text(StatusCode::SERVICE_UNAVAILABLE, pending.join("\n") + "\n"),
        },
        "/metrics" => match metrics.render() {
            Ok(metrics) => text(StatusCode::OK, metrics),
            Err(error) => text(StatusCode::INTERNAL_SERVER_ERROR, format!("{error}\n")),
        },
        "/debug/slots" => text(StatusCode::OK, format!("{:#}\n", slots())),
        _ => text(StatusCode::NOT_FOUND, "/metrics\n/healthz\n/readyz\n/debug/slots\n"),
    }
}

fn text(status: StatusCode, body: impl Into<Bytes>) -> Response<Full<Bytes>> {
    let mut response = Response::new(Full::new(body.into()));
    *response.status_mut() = status;
    response.headers_mut().insert(CONTENT_TYPE, http::HeaderValue::from_static("text/plain; version=0.0.4"));
    response
}
