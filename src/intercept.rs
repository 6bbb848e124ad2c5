//! First stage: TCP connection → [`ClientConn`].
//!
//! Redirects pods' connections for the metadata address to the agent ([`rule`]), accepts them within limits, and gets
//! their source and original destination from the kernel. Knows no Kubernetes and no HTTP.

mod accept;
mod bypass;
mod hot_restart;
mod monitor;
mod netlink;
pub mod port;
pub mod rule;
mod self_test;
mod service;
mod source;

use std::{net::SocketAddr, os::fd::AsRawFd};

use anyhow::Context;
use nix::{
    errno::Errno,
    sys::{
        resource::{Resource, getrlimit, setrlimit},
        socket::{AddressFamily, Backlog, SockFlag, SockType, SockaddrStorage, setsockopt, socket, sockopt},
    },
};
use tracing::warn;

use crate::connections::Buffers;

pub use accept::{Accepted, Acceptor, BypassPolicy, IncomingConn, Limits, PodOf, Rejected};
pub use hot_restart::{HotRestart, Predecessor, Role, Roles};
pub use monitor::RuleChanges;
pub use netlink::{InterfaceRoute, bridge_ports, interface_routes};
pub use rule::{Backend, HostAddresses};
pub use self_test::{SelfTest, connect_marked, has_route};
pub use service::{CONTAINER_V4, CONTAINER_V6, METADATA_PORT, METADATA_V4, METADATA_V6, MetadataService};
pub use source::{MAX_DELAY, SourceQuota};

/// Sizes for requests below 1 KiB and responses of about 2 KiB. A request head of up to 16 KiB takes several windows.
const BUFFERS: Buffers = Buffers { receive: 4 << 10, send: 4 << 10 };
/// File descriptors for everything except served connections: 256 for STS, the API server, CNI records and `nft`, and
/// the rest for connections that are closing or rejected, and for the admin port.
const OTHER_DESCRIPTORS: usize = 256 + 64 + 64 + 16 + 3 * 32;

/// Source and destination of a connection, from the kernel. This is the only evidence of the caller's identity; it
/// contains nothing that the client sent.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ClientConn {
    source: SocketAddr,
    service: MetadataService,
}

impl ClientConn {
    /// Returns the client's address.
    pub fn source(&self) -> SocketAddr {
        self.source
    }

    /// Returns the service that the client connected to, before the redirect.
    pub fn service(&self) -> MetadataService {
        self.service
    }

    /// Returns a connection for tests of later stages.
    #[cfg(any(test, fuzzing))]
    pub(crate) fn from_pod(source: std::net::IpAddr) -> Self {
        Self::from_pod_to(source, MetadataService::Metadata)
    }

    #[cfg(any(test, fuzzing))]
    pub(crate) fn from_pod_to(source: std::net::IpAddr, service: MetadataService) -> Self {
        Self { source: (source, 40_000).into(), service }
    }
}

/// Raises the soft limit on file descriptors to the hard limit. A container runtime may set it to 1,024; an agent that
/// runs out of descriptors can neither accept connections, nor call STS, nor read CNI records.
pub fn raise_descriptor_limit(connections: usize) {
    let raised = getrlimit(Resource::RLIMIT_NOFILE)
        .and_then(|(_, hard)| setrlimit(Resource::RLIMIT_NOFILE, hard, hard).map(|()| hard));
    match raised {
        Ok(limit) if limit >= (connections + OTHER_DESCRIPTORS) as u64 => {}
        Ok(limit) => warn!(
            descriptors = limit,
            max_connections = connections,
            "file descriptor limit is too low for --max-connections: raise the limit of the container runtime \
             (LimitNOFILE), or lower --max-connections"
        ),
        Err(error) => warn!(%error, "cannot raise the file descriptor limit"),
    }
}

/// Listens on the node's addresses. Uses the predecessor's listening sockets where it has them (hot restart).
///
/// # Errors
/// Fails if the address does not exist, is in use, or takes a missing capability. The error names the address and the
/// fix.
pub fn listen(
    host: HostAddresses,
    port: u16,
    mut predecessor: Option<&mut Predecessor>,
) -> anyhow::Result<Vec<std::net::TcpListener>> {
    let mut listener = |address: SocketAddr| {
        let inherited = predecessor.as_mut().and_then(|predecessor| predecessor.pod_listener(address));
        let listener = inherited.map_or_else(|| bind(address), Ok)?;
        // An inherited socket may have the buffer sizes of another version.
        BUFFERS.apply(&listener).with_context(|| format!("cannot limit the socket buffers of {address}"))?;
        anyhow::Ok(listener)
    };
    if let Some(risk) = port::takeover_risk(port, port::first_unprivileged()) {
        warn!("--port {port}: {risk}");
    }
    let listeners = host.iter().map(|address| listener((address, port).into())).collect::<anyhow::Result<_>>()?;
    if let Some(predecessor) = predecessor {
        predecessor.release();
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
        // Use the kernel's limit (net.core.somaxconn): nix otherwise enforces musl's outdated SOMAXCONN.
        nix::sys::socket::listen(&listener, Backlog::MAXALLOWABLE)?;
        Ok(std::net::TcpListener::from(listener))
    };
    listening().map_err(|error: Errno| match error {
        Errno::EADDRNOTAVAIL => anyhow::anyhow!(
            "--host-ip {}: not an address of this node ({error}); set one of its addresses, and run the agent in the \
             node's network namespace (hostNetwork)",
            address.ip()
        ),
        Errno::EADDRINUSE => {
            let occupant = match port::Occupant::find(address) {
                Some(occupant) => occupant.to_string(),
                None => format!("another process listens on {address}"),
            };
            anyhow::anyhow!(
                "--port {}: in use: {occupant}. Redirected pods reach that process: stop it if it is not kirsa; stop \
                 the old agent if hot restart failed; or choose a free port",
                address.port()
            )
        }
        Errno::EACCES => anyhow::anyhow!(
            "--port {}: needs CAP_NET_BIND_SERVICE (securityContext.capabilities.add: [NET_BIND_SERVICE])",
            address.port()
        ),
        _ => anyhow::anyhow!("cannot listen on {address}: {error}"),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn descriptor_limit_is_raised_to_the_hard_limit() {
        let (_, hard) = getrlimit(Resource::RLIMIT_NOFILE).unwrap();
        setrlimit(Resource::RLIMIT_NOFILE, hard / 2, hard).unwrap();
        raise_descriptor_limit(2_048);
        assert_eq!(getrlimit(Resource::RLIMIT_NOFILE).unwrap(), (hard, hard));
    }
}
