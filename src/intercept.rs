//! First stage: TCP connection → [`Peer`].
//!
//! Brings pods' connections to the metadata address here ([`rule`]), accepts them within limits, and learns from the
//! kernel who they come from and where they were meant to go. Knows no Kubernetes and no HTTP.

pub mod handover;
pub mod rule;
mod monitor;
mod probe;
mod service;
mod source;

use std::{
    future::Future,
    net::{Ipv4Addr, Ipv6Addr, SocketAddr},
    os::fd::AsRawFd,
    sync::Arc,
    time::Duration,
};

use nix::{
    errno::Errno,
    sys::{
        resource::{Resource, getrlimit, setrlimit},
        socket::{
            AddressFamily, Backlog, SockFlag, SockType, SockaddrStorage, getsockopt, setsockopt, socket, sockopt,
        },
    },
};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::{TcpListener, TcpStream},
    sync::{OwnedSemaphorePermit, Semaphore},
};
use tracing::{debug, warn};

use crate::observe::Metrics;

pub use handover::{Duties, Duty, Handover, Predecessor};
pub use monitor::RuleChanges;
pub use probe::{Probe, connect_marked};
pub use rule::{Backend, HostAddresses};
pub use service::{CONTAINER_V4, CONTAINER_V6, METADATA_PORT, METADATA_V4, METADATA_V6, Service};
use source::Sources;
pub use source::{MAX_DELAY, Share};

/// File descriptors for all but pods' connections: STS, the API server, CNI records, `nft`.
const OTHER_DESCRIPTORS: usize = 256;
/// Connections that are told "too many" at once.
const TURNED_AWAY: usize = 64;

/// Both ends of a connection as the kernel sees them: the only evidence of who is calling. Nothing that a client sends
/// is in here.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Peer {
    source: SocketAddr,
    destination: SocketAddr,
}

impl Peer {
    /// The caller's address.
    pub fn source(&self) -> SocketAddr {
        self.source
    }

    /// The address that the caller connected to, before the redirect.
    pub fn destination(&self) -> SocketAddr {
        self.destination
    }

    /// Which service was asked.
    pub fn service(&self) -> Service {
        Service::at(self.destination).unwrap_or(Service::Metadata)
    }

    /// For tests of later stages.
    #[cfg(any(test, fuzzing))]
    pub(crate) fn from_pod(source: std::net::IpAddr) -> Self {
        Self::from_pod_to(source, Service::Metadata)
    }

    #[cfg(any(test, fuzzing))]
    pub(crate) fn from_pod_to(source: std::net::IpAddr, service: Service) -> Self {
        Self { source: (source, 40_000).into(), destination: (service.v4(), METADATA_PORT).into() }
    }
}

/// What pods may take.
#[derive(Debug, Clone, Copy)]
pub struct Limits {
    /// Connections at once, of all sources and of one.
    pub total: usize,
    pub per_source: usize,
    /// Requests per second, and as many at once.
    pub requests_per_source: u32,
}

/// What to do with a connection that did not come from the metadata address.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Direct {
    /// Not attributed: it came around the redirect.
    Refuse,
    /// Somebody else's redirect (`--intercept none`) need not leave the original destination behind.
    Accept,
}

/// A connection that was accepted, and its share of the limits.
#[derive(Debug)]
pub struct Accepted {
    stream: TcpStream,
    /// `None`: it did not come through the redirect.
    peer: Option<Peer>,
    share: Share,
    _permit: OwnedSemaphorePermit,
}

impl Accepted {
    /// The connection, who it comes from (`None`: around the redirect), its share of the limits, and its place, which
    /// must be kept for as long as it is open.
    pub fn into_parts(self) -> (TcpStream, Option<Peer>, Share, impl Send) {
        (self.stream, self.peer, self.share, self._permit)
    }
}

/// Makes room for as many file descriptors as there may be connections: a container runtime may leave an agent with
/// 1,024, and what is without one then can neither accept, nor ask STS, nor read a CNI record.
pub fn make_room(connections: usize) {
    let raised = getrlimit(Resource::RLIMIT_NOFILE)
        .and_then(|(_, hard)| setrlimit(Resource::RLIMIT_NOFILE, hard, hard).map(|()| hard));
    match raised {
        Ok(most) if most >= (connections + OTHER_DESCRIPTORS) as u64 => {}
        Ok(most) => warn!(
            descriptors = most,
            max_connections = connections,
            "fewer file descriptors are allowed than connections: raise the limit of the container runtime \
             (LimitNOFILE), or lower --max-connections"
        ),
        Err(error) => warn!(%error, "cannot raise the number of file descriptors"),
    }
}

/// Listens on the node's addresses, with the sockets of the agent that ran before where it has them.
///
/// # Errors
/// Names the address and what to change.
pub fn listen(
    host: HostAddresses,
    port: u16,
    mut predecessor: Option<&mut Predecessor>,
) -> anyhow::Result<Vec<std::net::TcpListener>> {
    let mut listener = |address: SocketAddr| {
        let passed = predecessor.as_mut().and_then(|predecessor| predecessor.pods(address));
        passed.map_or_else(|| bind(address), Ok)
    };
    let listeners = host.iter().map(|address| listener((address, port).into())).collect::<anyhow::Result<_>>()?;
    if let Some(predecessor) = predecessor {
        predecessor.part();
    }
    Ok(listeners)
}

fn bind(address: SocketAddr) -> anyhow::Result<std::net::TcpListener> {
    let family = if address.is_ipv4() { AddressFamily::Inet } else { AddressFamily::Inet6 };
    let listening = || {
        let flags = SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK;
        let listener = socket(family, SockType::Stream, flags, None)?;
        setsockopt(&listener, sockopt::ReuseAddr, &true)?;
        if address.is_ipv6() {
            setsockopt(&listener, sockopt::Ipv6V6Only, &true)?;
        }
        nix::sys::socket::bind(listener.as_raw_fd(), &SockaddrStorage::from(address))?;
        // The kernel's limit (net.core.somaxconn): musl's constant is older than kernels, and nix holds to it.
        nix::sys::socket::listen(&listener, Backlog::MAXALLOWABLE)?;
        Ok(std::net::TcpListener::from(listener))
    };
    listening().map_err(|error: Errno| match error {
        Errno::EADDRNOTAVAIL => anyhow::anyhow!(
            "--host-ip {}: is no address of this node ({error}); give one, and run the agent in the node's network \
             namespace (hostNetwork)",
            address.ip()
        ),
        Errno::EADDRINUSE => {
            anyhow::anyhow!(
                "--port {}: another process listens on {address}; choose a free port, or end the agent that does not \
                 hand over",
                address.port()
            )
        }
        _ => anyhow::anyhow!("cannot listen on {address}: {error}"),
    })
}

/// Accepts connections and hands each to `serve` as a task of its own, until it is dropped.
pub async fn accept<F>(listener: &TcpListener, doors: &Doors, serve: &(impl Fn(Accepted) -> F + Sync))
where
    F: Future<Output = ()> + Send + 'static,
{
    let mut pause = Duration::ZERO;
    loop {
        match listener.accept().await {
            Ok((stream, source)) => {
                pause = Duration::ZERO;
                if let Some(accepted) = doors.admit(stream, source) {
                    tokio::spawn(serve(accepted));
                }
            }
            Err(error) => {
                // Out of file descriptors, most likely: without a pause this loop would spin until some come back.
                doors.metrics.connection_refused("accept_error");
                pause = (pause * 2).clamp(Duration::from_millis(10), Duration::from_secs(1));
                warn!(%error, ?pause, "cannot accept a connection");
                tokio::time::sleep(pause).await;
            }
        }
    }
}

/// The limits on connections, shared by all listeners.
#[derive(Debug)]
pub struct Doors {
    total: Arc<Semaphore>,
    turning_away: Arc<Semaphore>,
    sources: Arc<Sources>,
    direct: Direct,
    probe: Arc<Probe>,
    metrics: Metrics,
}

impl Doors {
    pub fn new(limits: Limits, direct: Direct, probe: Arc<Probe>, metrics: Metrics) -> Arc<Self> {
        Arc::new(Self {
            total: Arc::new(Semaphore::new(limits.total)),
            turning_away: Arc::new(Semaphore::new(TURNED_AWAY)),
            sources: Sources::new(limits, metrics.clone()),
            direct,
            probe,
            metrics,
        })
    }

    fn admit(&self, stream: TcpStream, source: SocketAddr) -> Option<Accepted> {
        let source = SocketAddr::new(source.ip().to_canonical(), source.port());
        let destination = original_destination(&stream);
        if self.probe.arrived(source, destination) {
            return None;
        }
        let Ok(permit) = self.total.clone().try_acquire_owned() else { return self.refuse(stream, source, "total") };
        let Some(share) = self.sources.share(source.ip()) else {
            return self.refuse(stream, source, "per_source");
        };
        let peer = match destination {
            Some(destination) if Service::at(destination).is_some() => Some(Peer { source, destination }),
            _ if self.direct == Direct::Accept => {
                Some(Peer { source, destination: (METADATA_V4, METADATA_PORT).into() })
            }
            _ => None,
        };
        Some(Accepted { stream, peer, share, _permit: permit })
    }

    /// Politely, as long as that costs little: what is over this too is closed without a word.
    fn refuse(&self, stream: TcpStream, source: SocketAddr, limit: &'static str) -> Option<Accepted> {
        self.metrics.connection_refused(limit);
        debug!(source = %source.ip(), limit, "too many connections");
        if let Ok(turn) = self.turning_away.clone().try_acquire_owned() {
            tokio::spawn(turn_away(stream, turn));
        }
        None
    }
}

/// A 503 rather than a reset: SDKs retry the one and give up on the other. The answer is fixed, so that turning a
/// connection away costs less than serving it.
async fn turn_away(mut stream: TcpStream, _turn: OwnedSemaphorePermit) {
    const BUSY: &[u8] =
        b"HTTP/1.1 503 Service Unavailable\r\nContent-Type: text/plain\r\nContent-Length: 21\r\nConnection: close\r\n\r\n\
          too many connections\n";
    let say = async {
        // Closing with the request unread would reset the connection, and take the answer along.
        let mut unread = [0; 4 << 10];
        let _read = stream.read(&mut unread).await?;
        stream.write_all(BUSY).await?;
        stream.shutdown().await?;
        while stream.read(&mut unread).await? > 0 {}
        std::io::Result::Ok(())
    };
    // The caller may be gone already, or never read: neither matters.
    let _ = tokio::time::timeout(Duration::from_secs(1), say).await;
}

/// What conntrack remembers of the connection before DNAT. `None` when there was no DNAT.
fn original_destination(stream: &TcpStream) -> Option<SocketAddr> {
    if let Ok(v4) = getsockopt(stream, sockopt::OriginalDst) {
        let address = Ipv4Addr::from(u32::from_be(v4.sin_addr.s_addr));
        return Some((address, u16::from_be(v4.sin_port)).into());
    }
    let v6 = getsockopt(stream, sockopt::Ip6tOriginalDst).ok()?;
    Some((Ipv6Addr::from(v6.sin6_addr.s6_addr), u16::from_be(v6.sin6_port)).into())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn as_many_file_descriptors_as_are_allowed_are_used() {
        let (_, hard) = getrlimit(Resource::RLIMIT_NOFILE).unwrap();
        setrlimit(Resource::RLIMIT_NOFILE, hard / 2, hard).unwrap();
        make_room(2_048);
        assert_eq!(getrlimit(Resource::RLIMIT_NOFILE).unwrap(), (hard, hard));
    }
}
