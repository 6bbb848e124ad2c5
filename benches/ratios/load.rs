//! Warm load: keep-alive connections out of a pod, each with one request at a time.
//!
//! Everything is as lean as it can be, since client and server share the machine: two threads, raw sockets, answers
//! that are counted by their length once the first has been read properly.

use std::net::TcpStream;
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use lab::http::{CREDENTIALS_PATH, Response};
use lab::net::{METADATA, Pod};
use tokio::io::{AsyncReadExt, AsyncWriteExt};

use crate::cost;
use crate::site::WARM;

const WARM_UP: Duration = Duration::from_millis(500);
const MEASURED: Duration = Duration::from_secs(4);
const THREADS: usize = 2;

/// Who is asked, and from where.
pub(crate) struct Target<'a> {
    pub(crate) pid: u32,
    pub(crate) pod: &'a Pod,
}

#[derive(Clone, Copy, Debug)]
pub(crate) struct Warm {
    /// Per second.
    pub(crate) requests: f64,
    pub(crate) p50: Duration,
    pub(crate) p99: Duration,
    /// Of the server's processor time, for 100,000 requests.
    pub(crate) cpu: Duration,
}

/// What SDKs send, less what differs between them.
fn request() -> String {
    format!(
        "GET {CREDENTIALS_PATH}{WARM} HTTP/1.1\r\nHost: {METADATA}\r\nUser-Agent: bench/1.0\r\nAccept: */*\r\n\
         Accept-Encoding: identity\r\n\r\n"
    )
}

/// An error unless both answer the same, the hour aside.
pub(crate) fn same_bytes(one: &Target<'_>, other: &Target<'_>) -> Result<()> {
    let answer = |target: &Target<'_>| {
        let mut answer: Response = target.pod.imds().raw(request().as_bytes())?;
        answer.headers.retain(|(name, _)| name != "date");
        anyhow::Ok(answer)
    };
    let (one, other) = (answer(one)?, answer(other)?);
    ensure!(one.status == 200 && one == other, "not the same answer:\n{one:?}\n{other:?}");
    Ok(())
}

pub(crate) fn run(target: &Target<'_>, connections: usize) -> Result<Warm> {
    load(target, connections, WARM_UP)?;
    let before = cost::cpu(target.pid)?;
    let began = Instant::now();
    let mut latencies = load(target, connections, MEASURED)?;
    let (took, used) = (began.elapsed(), cost::cpu(target.pid)? - before);
    latencies.sort_unstable();
    let quantile = |q: f64| latencies[((latencies.len() - 1) as f64 * q) as usize];
    let requests = latencies.len() as f64;
    Ok(Warm {
        requests: requests / took.as_secs_f64(),
        p50: quantile(0.5),
        p99: quantile(0.99),
        cpu: used.mul_f64(100_000.0 / requests),
    })
}

fn load(target: &Target<'_>, connections: usize, during: Duration) -> Result<Vec<Duration>> {
    let streams: Vec<TcpStream> =
        (0..connections).map(|_| target.pod.connect((METADATA, 80))).collect::<std::io::Result<_>>()?;
    let share = connections.div_ceil(THREADS);
    thread::scope(|scope| {
        let mut streams = streams.into_iter().peekable();
        let mut threads = Vec::new();
        while streams.peek().is_some() {
            let streams: Vec<_> = streams.by_ref().take(share).collect();
            threads.push(scope.spawn(move || drive_all(streams, during)));
        }
        let latencies: Result<Vec<_>> = threads.into_iter().map(|thread| thread.join().expect("no panic")).collect();
        Ok(latencies?.concat())
    })
}

fn drive_all(streams: Vec<TcpStream>, during: Duration) -> Result<Vec<Duration>> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    runtime.block_on(async {
        let until = Instant::now() + during;
        let mut connections = tokio::task::JoinSet::new();
        for stream in streams {
            connections.spawn(drive(stream, until));
        }
        let mut latencies = Vec::new();
        while let Some(connection) = connections.join_next().await {
            latencies.extend(connection??);
        }
        Ok(latencies)
    })
}

async fn drive(stream: TcpStream, until: Instant) -> Result<Vec<Duration>> {
    stream.set_nonblocking(true)?;
    stream.set_nodelay(true)?;
    let mut stream = tokio::net::TcpStream::from_std(stream)?;
    let request = request();
    let mut latencies = Vec::with_capacity(1 << 16);
    let mut answer = vec![0; 16 << 10];
    let mut length = None;
    loop {
        let began = Instant::now();
        stream.write_all(request.as_bytes()).await?;
        let mut read = 0;
        while length.is_none_or(|length| read < length) {
            let some = stream.read(&mut answer[read..]).await?;
            ensure!(some > 0, "the server closed the connection");
            read += some;
            if length.is_none() {
                length = whole(&answer[..read])?;
            }
        }
        ensure!(length == Some(read) && answer.starts_with(b"HTTP/1.1 200 "), "{:?}", answer[..read].utf8_chunks());
        let now = Instant::now();
        latencies.push(now - began);
        if now >= until {
            return Ok(latencies);
        }
    }
}

/// The length of an answer, head and body, once its head is there.
fn whole(answer: &[u8]) -> Result<Option<usize>> {
    let Some(head) = answer.windows(4).position(|window| window == b"\r\n\r\n") else { return Ok(None) };
    let text = std::str::from_utf8(&answer[..head])?.to_ascii_lowercase();
    let length = text.lines().find_map(|line| line.strip_prefix("content-length:"));
    let length: usize = length.with_context(|| text.clone())?.trim().parse()?;
    Ok(Some(head + 4 + length))
}
