//! First stage: TCP connection → [`Peer`].
//!
//! Brings pods' connections to the metadata address here ([`rule`]), accepts them within limits, and learns from the
//! kernel who they come from and where they were meant to go. Knows no Kubernetes and no HTTP.

pub mod handover;
pub mod rule;
mod accept;
mod around;
mod monitor;
mod netlink;
pub mod port;
mod probe;
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

pub use accept::{Accepted, Acceptor, Arrival, Direct, Limits, PodOf, TurnedAway};
pub use handover::{Duties, Duty, Handover, Predecessor};
pub use monitor::RuleChanges;
pub use netlink::{InterfaceRoute, bridge_ports, interface_routes};
pub use probe::{Probe, connect_marked, has_route};
pub use rule::{Backend, HostAddresses};
pub use service::{CONTAINER_V4, CONTAINER_V6, METADATA_PORT, METADATA_V4, METADATA_V6, Service};
pub use source::{MAX_DELAY, Share};

/// Requests have less than 1 KiB and responses some 2 KiB. A head may have 16 KiB, and arrives in several windows then.
const BUFFERS: Buffers = Buffers { receive: 4 << 10, send: 4 << 10 };
/// File descriptors for all but the connections that are served: 256 for STS, the API server, CNI records and `nft`,
/// and those of connections that are closing or refused, or to the admin port.
const OTHER_DESCRIPTORS: usize = 256 + 64 + 64 + 16 + 3 * 32;

/// A connection as the kernel sees it, where from and where to: the only evidence of who is calling. Nothing that a
/// client sends is in here.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Peer {
    source: SocketAddr,
    service: Service,
}

impl Peer {
    /// The caller's address.
    pub fn source(&self) -> SocketAddr {
        self.source
    }

    /// Which service it connected to, before the redirect.
    pub fn service(&self) -> Service {
        self.service
    }

    /// For tests of later stages.
    #[cfg(any(test, fuzzing))]
    pub(crate) fn from_pod(source: std::net::IpAddr) -> Self {
        Self::from_pod_to(source, Service::Metadata)
    }

    #[cfg(any(test, fuzzing))]
    pub(crate) fn from_pod_to(source: std::net::IpAddr, service: Service) -> Self {
        Self { source: (source, 40_000).into(), service }
    }
}

/// Allows as many file descriptors as there may be connections: a container runtime may leave an agent with
/// 1,024, and what is without one then can neither accept, nor ask STS, nor read a CNI record.
pub fn allow_descriptors(connections: usize) {
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
        let listener = passed.map_or_else(|| bind(address), Ok)?;
        // Also of a socket that an agent of another version has bound.
        BUFFERS.apply(&listener).with_context(|| format!("cannot limit the socket buffers of {address}"))?;
        anyhow::Ok(listener)
    };
    if let Some(risk) = port::unprivileged(port, port::first_unprivileged()) {
        warn!("--port {port}: {risk}");
    }
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
            let occupant = match port::Occupant::find(address) {
                Some(occupant) => occupant.to_string(),
                None => format!("another process has {address}"),
            };
            anyhow::anyhow!(
                "--port {}: in use: {occupant}. Pods whose connections are redirected reach that process: end it if it \
                 is not an agent of kirsa; end the agent that does not hand over; or choose a free port",
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
    fn as_many_file_descriptors_as_are_allowed_are_used() {
        let (_, hard) = getrlimit(Resource::RLIMIT_NOFILE).unwrap();
        setrlimit(Resource::RLIMIT_NOFILE, hard / 2, hard).unwrap();
        allow_descriptors(2_048);
        assert_eq!(getrlimit(Resource::RLIMIT_NOFILE).unwrap(), (hard, hard));
    }
}
