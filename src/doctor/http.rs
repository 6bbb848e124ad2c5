//! One GET over a connection that is there already: to whoever answers at the metadata address, and to the agent.

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

/// The agent answers in microseconds.
const WAIT: Duration = Duration::from_secs(3);
/// A page of metrics is a hundredth of this.
const MAX_BODY: usize = 4 << 20;

/// # Errors
/// What was answered is no HTTP, or nothing was.
pub(super) async fn get(stream: TcpStream, path: &str) -> anyhow::Result<Response<Bytes>> {
    let host = stream.peer_addr()?.ip();
    let host = if host.is_ipv6() { format!("[{host}]") } else { host.to_string() };
    get_of(stream, host, path).await
}

/// # Errors
/// What was answered is no HTTP, or nothing was.
pub(super) async fn get_of(
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
    timeout(WAIT, exchange).await.with_context(|| format!("no answer within {WAIT:?}"))?
}
