//! Serves one bound listener over HTTP/1.1, or HTTP/2 where its TLS offers that, on a thread of its own, until dropped.
//!
//! The thread makes its sockets in the network namespace of the thread that started it, and works
//! beside any runtime, a paused clock included. Knows nothing of what is served.

use std::{
    convert::Infallible,
    future::Future,
    io,
    net::{SocketAddr, TcpListener},
    sync::Arc,
    thread::JoinHandle,
    time::Duration,
};

use anyhow::Context as _;
use bytes::Bytes;
use http::{Request, Response, StatusCode};
use http_body_util::{BodyExt as _, Full, Limited, combinators::UnsyncBoxBody};
use hyper::{
    server::conn::{http1, http2},
    service::service_fn,
};
use hyper_util::rt::{TokioExecutor, TokioIo};
use tokio::{net::TcpStream, sync::oneshot};
use tokio_rustls::TlsAcceptor;

/// What a handler answers with; an `Err` cuts the connection without an answer.
pub(crate) type Answer = io::Result<Response<Body>>;
pub(crate) type Body = UnsyncBoxBody<Bytes, io::Error>;

/// Larger than any request of the protocols here, small enough to keep a mistake cheap.
const BODY_LIMIT: usize = 1 << 20;

/// The other end of a connection.
#[derive(Clone)]
pub(crate) struct Peer {
    pub(crate) address: SocketAddr,
    socket: Arc<socket2::Socket>,
}

impl Peer {
    /// Makes the end of this connection a TCP reset instead of an orderly close.
    pub(crate) fn reset(&self) -> io::Error {
        let _ = self.socket.set_linger(Some(Duration::ZERO));
        io::Error::from(io::ErrorKind::ConnectionReset)
    }
}

#[derive(Debug)]
pub(crate) struct Server {
    address: SocketAddr,
    stop: Option<oneshot::Sender<Infallible>>,
    thread: Option<JoinHandle<()>>,
}

impl Server {
    pub(crate) fn start<H, F>(
        name: &str,
        listener: TcpListener,
        tls: Option<Arc<rustls::ServerConfig>>,
        handler: H,
    ) -> anyhow::Result<Self>
    where
        H: Fn(Peer, Request<Bytes>) -> F + Clone + Send + 'static,
        F: Future<Output = Answer> + Send + 'static,
    {
        let address = listener.local_addr().context("a listener without an address")?;
        listener.set_nonblocking(true)?;
        let (stop, stopped) = oneshot::channel::<Infallible>();
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
        let acceptor = tls.map(TlsAcceptor::from);
        let thread = std::thread::Builder::new().name(name.to_owned()).spawn(move || {
            runtime.block_on(async {
                let listener = tokio::net::TcpListener::from_std(listener).expect("a listening socket");
                tokio::select! {
                    () = accept(listener, acceptor, handler) => {}
                    _ = stopped => {}
                }
            });
            // Handlers may be waiting for ever by design.
            runtime.shutdown_background();
        })?;
        Ok(Self { address, stop: Some(stop), thread: Some(thread) })
    }

    pub(crate) fn address(&self) -> SocketAddr {
        self.address
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        drop(self.stop.take());
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

async fn accept<H, F>(listener: tokio::net::TcpListener, tls: Option<TlsAcceptor>, handler: H)
where
    H: Fn(Peer, Request<Bytes>) -> F + Clone + Send + 'static,
    F: Future<Output = Answer> + Send + 'static,
{
    loop {
        // The only errors of accept here are those of a connection that is already gone.
        let Ok((stream, address)) = listener.accept().await else { continue };
        let (tls, handler) = (tls.clone(), handler.clone());
        tokio::spawn(async move {
            let Ok((stream, peer)) = split(stream, address) else { return };
            match tls {
                None => serve(TokioIo::new(stream), false, peer, handler).await,
                Some(tls) => {
                    if let Ok(stream) = tls.accept(stream).await {
                        let http2 = stream.get_ref().1.alpn_protocol() == Some(&b"h2"[..]);
                        serve(TokioIo::new(stream), http2, peer, handler).await;
                    }
                }
            }
        });
    }
}

/// Keeps a second handle on the socket, so that a handler can decide how the connection ends.
fn split(stream: TcpStream, address: SocketAddr) -> io::Result<(TcpStream, Peer)> {
    stream.set_nodelay(true)?;
    let socket = socket2::SockRef::from(&stream).try_clone()?;
    Ok((stream, Peer { address, socket: Arc::new(socket) }))
}

async fn serve<I, H, F>(stream: I, http2: bool, peer: Peer, handler: H)
where
    I: hyper::rt::Read + hyper::rt::Write + Unpin + Send + 'static,
    H: Fn(Peer, Request<Bytes>) -> F + Clone + Send + 'static,
    F: Future<Output = Answer> + Send + 'static,
{
    let service = service_fn(move |request: Request<hyper::body::Incoming>| {
        let (peer, handler) = (peer.clone(), handler.clone());
        async move {
            let (head, body) = request.into_parts();
            match Limited::new(body, BODY_LIMIT).collect().await {
                Ok(body) => handler(peer, Request::from_parts(head, body.to_bytes())).await,
                Err(_) => Ok(answer(StatusCode::PAYLOAD_TOO_LARGE, "text/plain", "")),
            }
        }
    });
    // A client that goes away is not an event of its own.
    let _ = if http2 {
        http2::Builder::new(TokioExecutor::new()).serve_connection(stream, service).await
    } else {
        http1::Builder::new().serve_connection(stream, service).await
    };
}

pub(crate) fn full(body: impl Into<Bytes>) -> Body {
    Full::new(body.into()).map_err(|never| match never {}).boxed_unsync()
}

pub(crate) fn answer(status: StatusCode, content_type: &'static str, body: impl Into<Bytes>) -> Response<Body> {
    let mut response = Response::new(full(body));
    *response.status_mut() = status;
    response.headers_mut().insert(http::header::CONTENT_TYPE, http::HeaderValue::from_static(content_type));
    response
}
