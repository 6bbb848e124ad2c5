//! Self-test of the redirect: the agent connects through it to itself. This alone decides whether the redirect works;
//! reading the rules back does not.
//!
//! Packets of the node's own processes do not pass prerouting, so the rules have a copy in the output hook, which
//! matches only packets with [`MARK`]. Setting the mark takes CAP_NET_ADMIN or CAP_NET_RAW. Both rules are in one table
//! and have one target, so a process that flushes or replaces rule sets removes both.

use std::{
    collections::HashMap,
    io,
    net::{IpAddr, SocketAddr, UdpSocket},
    time::Duration,
};

use nix::sys::socket::{setsockopt, sockopt};
use parking_lot::Mutex;
use tokio::{
    net::{TcpSocket, TcpStream},
    sync::oneshot,
    time::timeout,
};

use super::{METADATA_PORT, MetadataService};

/// Mark of the self-test's packets. Uses only bits that kube-proxy (0xc000), Calico (0xffff0000 by default) and Cilium
/// (0x0f00 and above 0xffff) leave alone.
pub(super) const MARK: u32 = 0x6b;

/// Maximum time to connect. A connection within the node takes microseconds.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(1);

/// Maximum time until our listener accepts an established connection. After that, another process answered.
const ACCEPT_TIMEOUT: Duration = Duration::from_millis(200);

/// Connects from `host`, an address of this node, to the service through the redirect. The caller can then check which
/// process answers.
///
/// # Errors
/// The error of the connection; `TimedOut` after one second.
pub async fn connect_marked(host: IpAddr, service: MetadataService) -> io::Result<TcpStream> {
    let to = (service.address_for(host), METADATA_PORT).into();
    timeout(CONNECT_TIMEOUT, marked(host)?.connect(to)).await.unwrap_or_else(|_| Err(io::ErrorKind::TimedOut.into()))
}

/// Returns whether the node has a route from `host` to the service. Without a route no packet leaves, so a self-test is
/// impossible. Connecting a UDP socket looks up the route and sends nothing, so no firewall can interfere.
pub fn has_route(host: IpAddr, service: MetadataService) -> bool {
    let connect = || {
        let socket = UdpSocket::bind((host, 0))?;
        setsockopt(&socket, sockopt::Mark, &MARK)?;
        socket.connect((service.address_for(host), METADATA_PORT))
    };
    let unreachable =
        |error: io::Error| matches!(error.kind(), io::ErrorKind::NetworkUnreachable | io::ErrorKind::HostUnreachable);
    !connect().is_err_and(unreachable)
}

/// Creates a socket whose packets match the rules in the output hook.
fn marked(host: IpAddr) -> io::Result<TcpSocket> {
    let socket = if host.is_ipv4() { TcpSocket::new_v4()? } else { TcpSocket::new_v6()? };
    setsockopt(&socket, sockopt::Mark, &MARK)?;
    socket.bind((host, 0).into())?;
    Ok(socket)
}

/// The self-test's open connections by source address.
#[derive(Debug, Default)]
pub struct SelfTest {
    expected: Mutex<HashMap<SocketAddr, oneshot::Sender<()>>>,
}

impl SelfTest {
    /// Connects from `host`, an address of this node, to the service, and waits until our own listener accepts the
    /// connection.
    ///
    /// # Errors
    /// The error of the connection; `TimedOut` after one second; `Other` if another process accepted it.
    pub async fn run(&self, host: IpAddr, service: MetadataService) -> io::Result<()> {
        let (socket, to) = (marked(host)?, (service.address_for(host), METADATA_PORT).into());
        let source = socket.local_addr()?;
        let (claimed, accepted) = oneshot::channel();
        self.expected.lock().insert(source, claimed);
        let _expected = Expected { test: self, source };
        timeout(CONNECT_TIMEOUT, async {
            let _stream = socket.connect(to).await?;
            match timeout(ACCEPT_TIMEOUT, accepted).await {
                Ok(accepted) => accepted.map_err(io::Error::other),
                Err(_) => Err(io::Error::other("connected, but another process accepted the connection")),
            }
        })
        .await
        .unwrap_or_else(|_| Err(io::ErrorKind::TimedOut.into()))
    }

    /// Returns whether an accepted connection is the self-test's own. Pods never have an address of the node.
    pub(super) fn claim(&self, source: SocketAddr, destination: Option<SocketAddr>) -> bool {
        destination.is_some_and(|destination| MetadataService::at(destination).is_some())
            && self.expected.lock().remove(&source).is_some_and(|claimed| claimed.send(()).is_ok())
    }
}

/// Removes the entry also when the test is cancelled.
struct Expected<'a> {
    test: &'a SelfTest,
    source: SocketAddr,
}

impl Drop for Expected<'_> {
    fn drop(&mut self) {
        self.test.expected.lock().remove(&self.source);
    }
}
