//! Sends one GET request over an open connection, to the agent or to whatever answers at the metadata address.

use std::time::Duration;

use anyhow::Context;
use bytes::Bytes;
use http::{Request, Response, header::HOST};
use http_body_util::{BodyExt, Empty, Limited};
use hyper::client::conn::http1;
use hyper_util::rt::TokioIo;
use tokio::{
    io::{AsyncRead, AsyncWrite},
    net::TcpStream,
    time::timeout,
};

/// Deadline of a request. The agent responds within microseconds.
const TIMEOUT: Duration = Duration::from_secs(3);
/// Maximum size of a response body in bytes, a hundred times that of the metrics page.
const MAX_BODY: usize = 4 << 20;

/// Sends a GET request with the peer's address as the Host header.
///
/// # Errors
/// Fails if no HTTP response arrives within [`TIMEOUT`], or if its body exceeds [`MAX_BODY`].
pub(super) async fn get(stream: TcpStream, path: &str) -> anyhow::Result<Response<Bytes>> {
    let host = stream.peer_addr()?.ip();
    let host = if host.is_ipv6() { format!("[{host}]") } else { host.to_string() };
    get_with_host(stream, host, path).await
}

/// Sends a GET request with this Host header.
///
/// # Errors
/// Fails if no HTTP response arrives within [`TIMEOUT`], or if its body exceeds [`MAX_BODY`].
pub(super) async fn get_with_host(
    stream: impl AsyncRead + AsyncWrite + Unpin + Send + 'static,
    host: String,
    path: &str,
) -> anyhow::Result<Response<Bytes>> {
    let exchange = async {
        let (mut sender, connection) = http1::handshake(TokioIo::new(stream)).await?;
        let connection = tokio::spawn(connection);
        let request = Request::get(path).header(HOST, host).body(Empty::<Bytes>::new())?;
        let (head, body) = sender.send_request(request).await?.into_parts();
        let body = Limited::new(body, MAX_BODY).collect().await.map_err(|error| anyhow::anyhow!("{error}"))?;
        connection.abort();
        Ok(Response::from_parts(head, body.to_bytes()))
    };
    timeout(TIMEOUT, exchange).await.with_context(|| format!("no response within {TIMEOUT:?}"))?
}
