//! What the benchmark measures the agent against: hyper and nothing else. It listens as the agent does, runs on the
//! same runtime and answers every request with the same bytes, whoever asks for what.

use std::{
    convert::Infallible,
    fs,
    net::{SocketAddr, TcpListener},
    path::PathBuf,
};

use anyhow::Context as _;
use bytes::Bytes;
use clap::Parser;
use http::{HeaderValue, Response, header};
use http_body_util::Full;
use hyper::{server::conn::http1, service::service_fn};
use hyper_util::rt::TokioIo;
use socket2::{Domain, Socket, Type};

/// The agent's own number.
const WORKERS: usize = 2;

#[derive(Parser)]
struct Args {
    #[arg(long)]
    listen: SocketAddr,
    /// The file whose content is the body of every answer.
    #[arg(long)]
    body: PathBuf,
}

fn main() -> anyhow::Result<()> {
    let args = Args::parse();
    let body = Bytes::from(fs::read(&args.body).with_context(|| args.body.display().to_string())?);
    let listener = listen(args.listen).with_context(|| format!("--listen {}", args.listen))?;
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(WORKERS).enable_all().build()?;
    // A worker accepts, as in the agent: what is accepted on another thread has to be handed over first.
    runtime.block_on(async { tokio::spawn(accept(listener, body)).await? })
}

fn listen(address: SocketAddr) -> std::io::Result<TcpListener> {
    let socket = Socket::new(Domain::for_address(address), Type::STREAM.nonblocking(), None)?;
    socket.set_reuse_address(true)?;
    socket.set_reuse_port(true)?;
    socket.bind(&address.into())?;
    socket.listen(1_024)?;
    Ok(socket.into())
}

async fn accept(listener: TcpListener, body: Bytes) -> anyhow::Result<()> {
    let listener = tokio::net::TcpListener::from_std(listener)?;
    loop {
        let (stream, _) = listener.accept().await?;
        stream.set_nodelay(true)?;
        let body = body.clone();
        tokio::spawn(async move {
            let service = service_fn(|_| std::future::ready(Ok::<_, Infallible>(answer(body.clone()))));
            // A client that goes away is not an event of its own.
            let _ = http1::Builder::new().serve_connection(TokioIo::new(stream), service).await;
        });
    }
}

fn answer(body: Bytes) -> Response<Full<Bytes>> {
    let mut response = Response::new(Full::new(body));
    response.headers_mut().insert(header::CONTENT_TYPE, HeaderValue::from_static("application/json"));
    response.headers_mut().insert(header::SERVER, HeaderValue::from_static("kirsa"));
    response
}
