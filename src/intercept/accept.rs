//! Accepts connections within limits, and tells those that came through the redirect from those that came around it.

use std::{
    fmt,
    future::Future,
    net::{Ipv4Addr, Ipv6Addr, SocketAddr},
    sync::Arc,
    time::Duration,
};

use nix::sys::socket::{getsockopt, sockopt};
use tokio::{
    net::{TcpListener, TcpStream},
    time::{Instant, sleep},
};
use tracing::{debug, warn};

use super::{MAX_DELAY, Peer, Probe, Service, Share, around::Around, source::Sources};
use crate::{
    connections::{Bounds, ConnectionLimiter, Limit, Owner, Permit},
    observe::Metrics,
    refusal::{Reason, Refusal},
};

/// A client between two requests keeps its connection.
const GRACE: Duration = Duration::from_millis(100);
/// Connections that wait for a place or are told that there is none. One source with too many cannot use up more than
/// half of these.
const REJECTED: Bounds = Bounds { total: 64, per_owner: 32, grace: Duration::ZERO };
/// The same of connections that came around the redirect. These take no place of the others: the port may be reached
/// from other nodes.
const BYPASSING: Bounds = Bounds { total: 16, per_owner: 4, grace: Duration::ZERO };
/// How often a connection that waits tries again to get a place.
const RETRY: Duration = Duration::from_millis(25);

/// What pods may take.
#[derive(Debug, Clone, Copy)]
pub struct Limits {
    /// Connections at once, of all sources and of one.
    pub total: usize,
    pub per_source: usize,
    /// Requests per second, and as many at once.
    pub requests_per_source: u32,
}

/// Returns the UID of the pod that a connection comes from, if it is known already.
pub type PodOf = Box<dyn Fn(&Peer) -> Option<Arc<str>> + Send + Sync>;

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
    Waiting(Waiting),
    TurnedAway(TurnedAway),
}

impl Arrival {
    /// Waits a moment for a place if the connection has none.
    ///
    /// # Errors
    /// The connection and its refusal.
    pub async fn settle(self) -> Result<Accepted, TurnedAway> {
        match self {
            Self::Accepted(accepted) => Ok(accepted),
            Self::Waiting(waiting) => waiting.settle().await,
            Self::TurnedAway(turned_away) => Err(turned_away),
        }
    }
}

/// A connection that is served, and its share of the limits.
#[derive(Debug)]
pub struct Accepted {
    pub stream: TcpStream,
    pub peer: Peer,
    pub share: Share,
    /// Must be kept for as long as the connection is open.
    pub permit: Arc<Permit>,
}

/// A connection that is told why it is not served, and closed: SDKs retry after a 503, and give up after a reset.
#[derive(Debug)]
pub struct TurnedAway {
    pub stream: TcpStream,
    pub peer: Peer,
    pub refusal: Refusal,
    /// Must be kept for as long as the connection is open.
    pub permit: Arc<Permit>,
}

/// A connection above a limit, which gets a place if one becomes free soon.
#[derive(Debug)]
pub struct Waiting {
    stream: TcpStream,
    peer: Peer,
    acceptor: Arc<Acceptor>,
    permit: Arc<Permit>,
}

impl Waiting {
    async fn settle(self) -> Result<Accepted, TurnedAway> {
        let Self { stream, peer, acceptor, permit } = self;
        let until = Instant::now() + MAX_DELAY;
        loop {
            let is_evicted = tokio::select! {
                () = permit.evicted() => true,
                () = sleep(RETRY) => false,
            };
            match acceptor.place(&peer) {
                Ok((share, permit)) => return Ok(Accepted { stream, peer, share, permit }),
                Err(limit) if is_evicted || Instant::now() >= until => {
                    let refusal = acceptor.too_many(&peer, limit);
                    return Err(TurnedAway { stream, peer, refusal, permit });
                }
                Err(_) => {}
            }
        }
    }
}

/// The limits on connections, shared by all listeners.
pub struct Acceptor {
    places: Arc<ConnectionLimiter>,
    rejected: Arc<ConnectionLimiter>,
    bypassing: Arc<ConnectionLimiter>,
    sources: Arc<Sources>,
    direct: Direct,
    pod_of: PodOf,
    probe: Arc<Probe>,
    around: Around,
    metrics: Metrics,
}

impl fmt::Debug for Acceptor {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Acceptor").field("direct", &self.direct).finish_non_exhaustive()
    }
}

impl Acceptor {
    pub fn new(limits: Limits, direct: Direct, pod_of: PodOf, probe: Arc<Probe>, metrics: Metrics) -> Arc<Self> {
        let bounds = Bounds { total: limits.total, per_owner: limits.per_source, grace: GRACE };
        Arc::new(Self {
            places: ConnectionLimiter::new(bounds),
            rejected: ConnectionLimiter::new(REJECTED),
            bypassing: ConnectionLimiter::new(BYPASSING),
            sources: Sources::new(limits, metrics.clone()),
            direct,
            pod_of,
            probe,
            around: Around::default(),
            metrics,
        })
    }

    /// Accepts connections and hands each to `serve` as a task of its own, until it is dropped.
    pub async fn accept<F>(self: &Arc<Self>, listener: &TcpListener, serve: &(impl Fn(Arrival) -> F + Sync))
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
                    self.places.let_evicted_end().await;
                }
                Err(error) => {
                    // Out of file descriptors, most likely: without a pause this loop would spin until some come back.
                    self.metrics.connection_refused("accept_error");
                    pause = (pause * 2).clamp(Duration::from_millis(10), Duration::from_secs(1));
                    warn!(%error, ?pause, "cannot accept a connection");
                    sleep(pause).await;
                }
            }
        }
    }

    fn admit(self: &Arc<Self>, stream: TcpStream, source: SocketAddr) -> Option<Arrival> {
        let source = SocketAddr::new(source.ip().to_canonical(), source.port());
        let destination = original_destination(&stream);
        if self.probe.arrived(source, destination) {
            return None;
        }
        let around = (self.direct == Direct::Accept).then_some(Service::Metadata);
        let Some(service) = destination.and_then(Service::at).or(around) else {
            return self.turn_away_bypassing(stream, Peer { source, service: Service::Metadata });
        };
        let peer = Peer { source, service };
        let limit = match self.place(&peer) {
            Ok((share, permit)) => return Some(Arrival::Accepted(Accepted { stream, peer, share, permit })),
            Err(limit) => limit,
        };
        match self.rejected.try_admit(self.owner(&peer)) {
            Ok((permit, _)) => Some(Arrival::Waiting(Waiting { stream, peer, acceptor: self.clone(), permit })),
            Err(_) => {
                // What is over this too is closed without a word.
                self.too_many(&peer, limit);
                None
            }
        }
    }

    /// Takes a place, in that of another connection if it must.
    fn place(&self, peer: &Peer) -> Result<(Share, Arc<Permit>), Limit> {
        let owner = self.owner(peer);
        let (permit, evicted) = self.places.try_admit(owner.clone())?;
        if let Some(limit) = evicted {
            self.metrics.connection_closed(label(limit));
        }
        Ok((self.sources.share(owner), permit))
    }

    fn owner(&self, peer: &Peer) -> Owner {
        (self.pod_of)(peer).map_or(Owner::Address(peer.source.ip()), Owner::Pod)
    }

    fn too_many(&self, peer: &Peer, limit: Limit) -> Refusal {
        let detail = match limit {
            Limit::Total => "is one too many: all places are taken",
            Limit::PerOwner => "has as many connections open as it may",
        };
        self.refuse(peer, label(limit), Reason::TooManyConnections, detail)
    }

    fn turn_away_bypassing(&self, stream: TcpStream, peer: Peer) -> Option<Arrival> {
        let detail = self.around.detail();
        let refusal = self.refuse(&peer, "not_redirected", Reason::NotRedirected, &detail);
        let (permit, _) = self.bypassing.try_admit(Owner::Address(peer.source.ip())).ok()?;
        Some(Arrival::TurnedAway(TurnedAway { stream, peer, refusal, permit }))
    }

    fn refuse(&self, peer: &Peer, limit: &'static str, reason: Reason, detail: &str) -> Refusal {
        let source = peer.source.ip();
        self.metrics.connection_refused(limit);
        debug!(%source, limit, "connection refused");
        Refusal::new(reason, format!("{source} {detail}"))
    }
}

fn label(limit: Limit) -> &'static str {
    match limit {
        Limit::PerOwner => "per_source",
        Limit::Total => "total",
    }
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
