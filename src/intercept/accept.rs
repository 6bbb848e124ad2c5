//! Accepts connections within limits, and tells those that came through the redirect from those that came around it.

use std::{
    future::Future,
    net::{Ipv4Addr, Ipv6Addr, SocketAddr},
    sync::Arc,
    time::Duration,
};

use nix::sys::socket::{getsockopt, sockopt};
use tokio::{
    net::{TcpListener, TcpStream},
    sync::{OwnedSemaphorePermit, Semaphore},
};
use tracing::{debug, warn};

use super::{Peer, Probe, Service, Share, source::Sources};
use crate::{
    observe::Metrics,
    refusal::{Reason, Refusal},
};

/// Connections that are told at once why they are not served: of pods that have too many open, and of whoever came
/// around the redirect. These take no place of the others: the port may be reached from other nodes.
const TURNED_AWAY: usize = 64;
const TURNED_AWAY_AROUND: usize = 16;

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
    /// Turned away: it came around the redirect.
    Refuse,
    /// Somebody else's redirect (`--intercept none`) need not leave the original destination behind.
    Accept,
}

/// A connection, and what becomes of it.
#[derive(Debug)]
pub enum Arrival {
    Accepted(Accepted),
    TurnedAway(TurnedAway),
}

/// A connection that is served, and its share of the limits.
#[derive(Debug)]
pub struct Accepted {
    pub stream: TcpStream,
    pub peer: Peer,
    pub share: Share,
    /// Must be kept for as long as the connection is open.
    pub place: Place,
}

/// A connection that is told why it is not served, and closed: SDKs retry after a 503, and give up after a reset.
#[derive(Debug)]
pub struct TurnedAway {
    pub stream: TcpStream,
    pub peer: Peer,
    pub refusal: Refusal,
    /// Must be kept for as long as the connection is open.
    pub place: Place,
}

/// One of the connections that may be open at once.
#[derive(Debug)]
pub struct Place(#[expect(dead_code, reason = "given up when dropped")] OwnedSemaphorePermit);

/// The limits on connections, shared by all listeners.
#[derive(Debug)]
pub struct Acceptor {
    total: Arc<Semaphore>,
    turning_away: Arc<Semaphore>,
    turning_away_around: Arc<Semaphore>,
    sources: Arc<Sources>,
    direct: Direct,
    probe: Arc<Probe>,
    metrics: Metrics,
}

impl Acceptor {
    pub fn new(limits: Limits, direct: Direct, probe: Arc<Probe>, metrics: Metrics) -> Arc<Self> {
        Arc::new(Self {
            total: Arc::new(Semaphore::new(limits.total)),
            turning_away: Arc::new(Semaphore::new(TURNED_AWAY)),
            turning_away_around: Arc::new(Semaphore::new(TURNED_AWAY_AROUND)),
            sources: Sources::new(limits, metrics.clone()),
            direct,
            probe,
            metrics,
        })
    }

    /// Accepts connections and hands each to `serve` as a task of its own, until it is dropped.
    pub async fn accept<F>(&self, listener: &TcpListener, serve: &(impl Fn(Arrival) -> F + Sync))
    where
        F: Future<Output = ()> + Send + 'static,
    {
        let mut pause = Duration::ZERO;
        loop {
            match listener.accept().await {
                Ok((stream, source)) => {
                    pause = Duration::ZERO;
                    if let Some(arrival) = self.admit(stream, source) {
                        tokio::spawn(serve(arrival));
                    }
                }
                Err(error) => {
                    // Out of file descriptors, most likely: without a pause this loop would spin until some come back.
                    self.metrics.connection_refused("accept_error");
                    pause = (pause * 2).clamp(Duration::from_millis(10), Duration::from_secs(1));
                    warn!(%error, ?pause, "cannot accept a connection");
                    tokio::time::sleep(pause).await;
                }
            }
        }
    }

    fn admit(&self, stream: TcpStream, source: SocketAddr) -> Option<Arrival> {
        let source = SocketAddr::new(source.ip().to_canonical(), source.port());
        let destination = original_destination(&stream);
        if self.probe.arrived(source, destination) {
            return None;
        }
        let around = (self.direct == Direct::Accept).then_some(Service::Metadata);
        let service = destination.and_then(Service::at).or(around);
        let no = match self.room(source, service) {
            Ok((peer, share, place)) => return Some(Arrival::Accepted(Accepted { stream, peer, share, place })),
            Err(no) => no,
        };
        self.metrics.connection_refused(no.limit);
        debug!(source = %source.ip(), limit = no.limit, "turned away");
        // What is over this too is closed without a word.
        let place = Place(no.queue.clone().try_acquire_owned().ok()?);
        let peer = Peer { source, service: service.unwrap_or(Service::Metadata) };
        Some(Arrival::TurnedAway(TurnedAway { stream, peer, refusal: no.refusal, place }))
    }

    fn room(&self, source: SocketAddr, service: Option<Service>) -> Result<(Peer, Share, Place), No<'_>> {
        let no = |limit, reason, detail: &str, queue| {
            Err(No { limit, refusal: Refusal::new(reason, format!("{} {detail}", source.ip())), queue })
        };
        let Some(service) = service else {
            let detail = "connected to an address of the node";
            return no("not_redirected", Reason::NotRedirected, detail, &self.turning_away_around);
        };
        let Ok(place) = self.total.clone().try_acquire_owned() else {
            let detail = "is one too many: all places are taken";
            return no("total", Reason::TooManyConnections, detail, &self.turning_away);
        };
        let Some(share) = self.sources.share(source.ip()) else {
            let detail = "has as many connections open as it may";
            return no("per_source", Reason::TooManyConnections, detail, &self.turning_away);
        };
        Ok((Peer { source, service }, share, Place(place)))
    }
}

/// Why there is no room for a connection, and where that is said.
struct No<'a> {
    limit: &'static str,
    refusal: Refusal,
    queue: &'a Arc<Semaphore>,
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
