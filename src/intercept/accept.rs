//! Accepts connections within limits, and separates redirected connections from those that bypassed the redirect.

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

use super::{
    ClientConn, MAX_DELAY, MetadataService, SelfTest, SourceQuota, bypass::BypassDetail, source::SourceLimits,
};
use crate::{
    connections::{Bounds, ConnectionLimiter, ConnectionPermit, Limit, Owner},
    observe::Metrics,
    refusal::{Reason, Refusal},
};

/// Minimum idle time before an eviction, so that a client between two requests keeps its connection.
const EVICTION_GRACE: Duration = Duration::from_millis(100);
/// Bounds on redirected connections that wait for a permit or get a rejection. One owner can use at most half.
const REJECTING_BOUNDS: Bounds = Bounds { total: 64, per_owner: 32, grace: Duration::ZERO };
/// Bounds on connections that bypassed the redirect and get a rejection. They are separate, because other nodes may
/// be able to reach the port.
const BYPASS_BOUNDS: Bounds = Bounds { total: 16, per_owner: 4, grace: Duration::ZERO };
/// Interval at which a waiting connection tries to get a permit.
const PERMIT_RETRY: Duration = Duration::from_millis(25);

/// Limits on pods' connections and requests.
#[derive(Debug, Clone, Copy)]
pub struct Limits {
    /// Maximum number of open connections, in total.
    pub total: usize,
    /// Maximum number of open connections of one source.
    pub per_source: usize,
    /// Rate limit in requests per second, and the burst size.
    pub requests_per_source: u32,
}

/// Returns the UID of the pod that a connection comes from, if it is known already.
pub type PodOf = Box<dyn Fn(&ClientConn) -> Option<Arc<str>> + Send + Sync>;

/// Decides about connections without a known original destination.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum BypassPolicy {
    /// Rejects them: they bypassed the redirect.
    Reject,
    /// Accepts them: another component's redirect (`--intercept none`) need not preserve the original destination.
    Accept,
}

/// An accepted TCP connection, and the decision about it.
#[derive(Debug)]
pub enum IncomingConn {
    Accepted(Accepted),
    Waiting(Waiting),
    Rejected(Rejected),
}

impl IncomingConn {
    /// Waits briefly for a permit if the connection has none.
    ///
    /// # Errors
    /// [`Rejected`] with [`Reason::TooManyConnections`] if no permit becomes free in time, or with
    /// [`Reason::NotRedirected`] if the connection bypassed the redirect.
    pub async fn wait_for_permit(self) -> Result<Accepted, Rejected> {
        match self {
            Self::Accepted(accepted) => Ok(accepted),
            Self::Waiting(waiting) => waiting.wait_for_permit().await,
            Self::Rejected(rejected) => Err(rejected),
        }
    }
}

/// A connection to serve.
#[derive(Debug)]
pub struct Accepted {
    pub stream: TcpStream,
    pub client: ClientConn,
    pub quota: SourceQuota,
    /// Must be kept for as long as the connection is open.
    pub permit: Arc<ConnectionPermit>,
}

/// A connection that gets an error response and is closed: SDKs retry after a 503, and give up after a reset.
#[derive(Debug)]
pub struct Rejected {
    pub stream: TcpStream,
    pub client: ClientConn,
    pub refusal: Refusal,
    /// Must be kept for as long as the connection is open.
    pub permit: Arc<ConnectionPermit>,
}

/// A connection above a limit, which is accepted if a permit becomes free soon.
#[derive(Debug)]
pub struct Waiting {
    stream: TcpStream,
    client: ClientConn,
    acceptor: Arc<Acceptor>,
    permit: Arc<ConnectionPermit>,
}

impl Waiting {
    async fn wait_for_permit(self) -> Result<Accepted, Rejected> {
        let Self { stream, client, acceptor, permit } = self;
        let deadline = Instant::now() + MAX_DELAY;
        loop {
            let is_evicted = tokio::select! {
                () = permit.evicted() => true,
                () = sleep(PERMIT_RETRY) => false,
            };
            match acceptor.try_admit(&client) {
                Ok((quota, permit)) => return Ok(Accepted { stream, client, quota, permit }),
                Err(limit) if is_evicted || Instant::now() >= deadline => {
                    let refusal = acceptor.refuse_over_limit(&client, limit);
                    return Err(Rejected { stream, client, refusal, permit });
                }
                Err(_) => {}
            }
        }
    }
}

/// Admission control, shared by all listeners.
pub struct Acceptor {
    serving: Arc<ConnectionLimiter>,
    rejecting: Arc<ConnectionLimiter>,
    rejecting_bypass: Arc<ConnectionLimiter>,
    sources: Arc<SourceLimits>,
    bypass_policy: BypassPolicy,
    bypass_detail: BypassDetail,
    pod_of: PodOf,
    self_test: Arc<SelfTest>,
    metrics: Metrics,
}

impl fmt::Debug for Acceptor {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Acceptor").field("bypass_policy", &self.bypass_policy).finish_non_exhaustive()
    }
}

impl Acceptor {
    pub fn new(
        limits: Limits,
        bypass_policy: BypassPolicy,
        pod_of: PodOf,
        self_test: Arc<SelfTest>,
        metrics: Metrics,
    ) -> Arc<Self> {
        let bounds = Bounds { total: limits.total, per_owner: limits.per_source, grace: EVICTION_GRACE };
        Arc::new(Self {
            serving: ConnectionLimiter::new(bounds),
            rejecting: ConnectionLimiter::new(REJECTING_BOUNDS),
            rejecting_bypass: ConnectionLimiter::new(BYPASS_BOUNDS),
            sources: SourceLimits::new(limits, metrics.clone()),
            bypass_policy,
            bypass_detail: BypassDetail::default(),
            pod_of,
            self_test,
            metrics,
        })
    }

    /// Accepts connections and spawns `serve` for each. Never returns.
    pub async fn accept<F>(self: &Arc<Self>, listener: &TcpListener, serve: &(impl Fn(IncomingConn) -> F + Sync))
    where
        F: Future<Output = ()> + Send + 'static,
    {
        let mut pause = Duration::ZERO;
        loop {
            match listener.accept().await {
                Ok((stream, source)) => {
                    pause = Duration::ZERO;
                    if let Some(conn) = self.classify(stream, source) {
                        tokio::spawn(serve(conn));
                    }
                    self.serving.yield_to_evicted().await;
                }
                Err(error) => {
                    // The process is most likely out of file descriptors. Without a pause this loop would spin.
                    self.metrics.connection_refused("accept_error");
                    pause = (pause * 2).clamp(Duration::from_millis(10), Duration::from_secs(1));
                    warn!(%error, ?pause, "cannot accept a connection");
                    sleep(pause).await;
                }
            }
        }
    }

    /// Returns `None` for connections to close without a response: those of the self-test, and those above all bounds.
    fn classify(self: &Arc<Self>, stream: TcpStream, source: SocketAddr) -> Option<IncomingConn> {
        let source = SocketAddr::new(source.ip().to_canonical(), source.port());
        let destination = original_destination(&stream);
        if self.self_test.claim(source, destination) {
            return None;
        }
        let default = (self.bypass_policy == BypassPolicy::Accept).then_some(MetadataService::Metadata);
        let Some(service) = destination.and_then(MetadataService::at).or(default) else {
            return self.reject_bypass(stream, ClientConn { source, service: MetadataService::Metadata });
        };
        let client = ClientConn { source, service };
        let limit = match self.try_admit(&client) {
            Ok((quota, permit)) => return Some(IncomingConn::Accepted(Accepted { stream, client, quota, permit })),
            Err(limit) => limit,
        };
        match self.rejecting.try_admit(self.owner(&client)) {
            Ok((permit, _)) => Some(IncomingConn::Waiting(Waiting { stream, client, acceptor: self.clone(), permit })),
            Err(_) => {
                self.refuse_over_limit(&client, limit);
                None
            }
        }
    }

    /// Issues a permit, evicting another connection if necessary and possible.
    fn try_admit(&self, client: &ClientConn) -> Result<(SourceQuota, Arc<ConnectionPermit>), Limit> {
        let owner = self.owner(client);
        let (permit, evicted) = self.serving.try_admit(owner.clone())?;
        if let Some(limit) = evicted {
            self.metrics.connection_closed(label(limit));
        }
        Ok((self.sources.quota(owner), permit))
    }

    fn owner(&self, client: &ClientConn) -> Owner {
        (self.pod_of)(client).map_or(Owner::Address(client.source.ip()), Owner::Pod)
    }

    fn refuse_over_limit(&self, client: &ClientConn, limit: Limit) -> Refusal {
        let detail = match limit {
            Limit::Total => "exceeds the limit on all connections (--max-connections)",
            Limit::PerOwner => "exceeds the limit on connections of one source (--max-connections-per-source)",
        };
        self.refuse(client, label(limit), Reason::TooManyConnections, detail)
    }

    fn reject_bypass(&self, stream: TcpStream, client: ClientConn) -> Option<IncomingConn> {
        let detail = self.bypass_detail.get();
        let refusal = self.refuse(&client, "not_redirected", Reason::NotRedirected, &detail);
        let (permit, _) = self.rejecting_bypass.try_admit(Owner::Address(client.source.ip())).ok()?;
        Some(IncomingConn::Rejected(Rejected { stream, client, refusal, permit }))
    }

    fn refuse(&self, client: &ClientConn, limit: &'static str, reason: Reason, detail: &str) -> Refusal {
        let source = client.source.ip();
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

/// Returns the destination before DNAT, from conntrack. `None` when there was no DNAT.
fn original_destination(stream: &TcpStream) -> Option<SocketAddr> {
    if let Ok(v4) = getsockopt(stream, sockopt::OriginalDst) {
        let address = Ipv4Addr::from(u32::from_be(v4.sin_addr.s_addr));
        return Some((address, u16::from_be(v4.sin_port)).into());
    }
    let v6 = getsockopt(stream, sockopt::Ip6tOriginalDst).ok()?;
    Some((Ipv6Addr::from(v6.sin6_addr.s6_addr), u16::from_be(v6.sin6_port)).into())
}
