//! Self-test of the redirect: a connection of our own through it. It decides; rules that are read back do not.
//!
//! Packets of this node's own processes do not pass prerouting, so the rule set has a twin for the output hook that
//! takes only packets with [`MARK`], which takes CAP_NET_ADMIN or CAP_NET_RAW to set. Both lead to the same address
//! from the same table, so whoever flushes or replaces rule sets removes both.

use std::{
    collections::HashMap,
    io,
    net::{IpAddr, SocketAddr, UdpSocket},
    sync::{Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use nix::sys::socket::{setsockopt, sockopt};
use tokio::{
    net::{TcpSocket, TcpStream},
    sync::oneshot,
    time::timeout,
};

use super::{METADATA_PORT, Service};

/// Marks the probe's packets. Only bits that kube-proxy (0xc000), Calico (0xffff0000 by default) and Cilium (0x0f00
/// and above 0xffff) leave alone.
pub(super) const MARK: u32 = 0x6b;

/// A connection within this node takes microseconds; what takes longer did not arrive.
const WAIT: Duration = Duration::from_secs(1);

/// Time for the listener to see a connection that is established: what takes longer was answered by another process.
const ARRIVAL: Duration = Duration::from_millis(200);

/// Connects from one of this node's addresses to a service's of the same family, the way that pods' connections are
/// led, so that whoever asks sees who answers there.
///
/// # Errors
/// What happened instead.
pub async fn connect_marked(from: IpAddr, service: Service) -> io::Result<TcpStream> {
    let to = (service.of_family(from), METADATA_PORT).into();
    timeout(WAIT, marked(from)?.connect(to)).await.unwrap_or_else(|_| Err(io::ErrorKind::TimedOut.into()))
}

/// Whether the node has a route from this address to the service. Without one no packet leaves, so there is no such
/// way to test. Connecting a UDP socket looks up the route and sends nothing, so no firewall can answer.
pub fn has_route(from: IpAddr, service: Service) -> bool {
    let connect = || {
        let socket = UdpSocket::bind((from, 0))?;
        setsockopt(&socket, sockopt::Mark, &MARK)?;
        socket.connect((service.of_family(from), METADATA_PORT))
    };
    let unreachable =
        |error: io::Error| matches!(error.kind(), io::ErrorKind::NetworkUnreachable | io::ErrorKind::HostUnreachable);
    !connect().is_err_and(unreachable)
}

/// A socket whose packets the rule's twin takes.
fn marked(from: IpAddr) -> io::Result<TcpSocket> {
    let socket = if from.is_ipv4() { TcpSocket::new_v4()? } else { TcpSocket::new_v6()? };
    setsockopt(&socket, sockopt::Mark, &MARK)?;
    socket.bind((from, 0).into())?;
    Ok(socket)
}

#[derive(Debug, Default)]
pub struct Probe {
    expected: Mutex<HashMap<SocketAddr, oneshot::Sender<()>>>,
}

impl Probe {
    /// Connects from one of this node's addresses to a service's of the same family, and waits until our own listener
    /// sees that connection.
    ///
    /// # Errors
    /// What happened instead.
    pub async fn run(&self, from: IpAddr, service: Service) -> io::Result<()> {
        let (socket, to) = (marked(from)?, (service.of_family(from), METADATA_PORT).into());
        let source = socket.local_addr()?;
        let (arrived, arrival) = oneshot::channel();
        self.expected().insert(source, arrived);
        let _expected = Expected { probe: self, source };
        timeout(WAIT, async {
            let _stream = socket.connect(to).await?;
            match timeout(ARRIVAL, arrival).await {
                Ok(arrived) => arrived.map_err(io::Error::other),
                Err(_) => Err(io::Error::other("connected, but not to this agent")),
            }
        })
        .await
        .unwrap_or_else(|_| Err(io::ErrorKind::TimedOut.into()))
    }

    /// Asked about every connection: true if it is one of the probe's own. No pod has this node's address.
    pub(super) fn arrived(&self, source: SocketAddr, destination: Option<SocketAddr>) -> bool {
        destination.is_some_and(|destination| Service::at(destination).is_some())
            && self.expected().remove(&source).is_some_and(|arrived| arrived.send(()).is_ok())
    }

    fn expected(&self) -> MutexGuard<'_, HashMap<SocketAddr, oneshot::Sender<()>>> {
        self.expected.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Removes the entry also when the run is cancelled.
struct Expected<'a> {
    probe: &'a Probe,
    source: SocketAddr,
}

impl Drop for Expected<'_> {
    fn drop(&mut self) {
        self.probe.expected().remove(&self.source);
    }
}
