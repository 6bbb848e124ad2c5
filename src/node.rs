//! Wiring: how the stages are put together. With its parts below, and `doctor`, the only place that sees them all.

mod admin;
mod ahead;
pub(crate) mod bridge;
mod container;
mod follow;
mod redirect;
#[cfg(test)]
mod simulation;

use std::{
    future::Future,
    os::fd::{AsFd, BorrowedFd},
    process::ExitCode,
    sync::Arc,
};

use anyhow::Context;
use hyper_util::server::graceful::GracefulShutdown;
use tokio::{
    net::TcpListener,
    signal::unix::{SignalKind, signal},
    sync::mpsc,
    task::JoinSet,
};
use tracing::{error, info, warn};

use crate::{
    attribute::Attributor,
    authorize::Grant,
    cache::{Cache, ExchangeLimiter},
    config::Config,
    exchange::{Exchange, sts::Sts},
    intercept::{
        self, Acceptor, Direct, Duties, Duty, Handover, Peer, Predecessor, Probe, RuleChanges,
        rule::{self, Installed},
    },
    observe::{self, Admin, Metrics, Readiness},
    serve::{Server, node_metadata::NodeMetadata, session_token::Sessions},
};
use bridge::BridgePorts;
use redirect::Redirect;

const VERSION: &str = env!("CARGO_PKG_VERSION");
/// Two, so that reading a long list of pods delays no pod's request.
const WORKERS: usize = 2;

/// Runs the agent until it is terminated.
pub fn main(config: Config) -> ExitCode {
    match start(config) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            error!(error = format!("{error:#}"), "kirsa failed");
            eprintln!("error: {error:#}");
            ExitCode::FAILURE
        }
    }
}

/// Bind, apply the redirect, drop privileges, serve: in this order, and the first three before there is a second
/// thread, since capabilities belong to threads.
fn start(config: Config) -> anyhow::Result<()> {
    observe::start_logging(config.log_format, &config.log_level)?;
    info!(version = VERSION, "kirsa starts");
    intercept::allow_descriptors(config.limits.total);
    let mut predecessor = Predecessor::find(&config.state_dir);
    let pods = intercept::listen(config.host, config.port, predecessor.as_mut())?;
    let installed = rule::install(config.rules(), config.intercept)?;
    let sessions = Sessions::open(&config.state_dir)?;
    rule::drop_privileges(installed.as_ref()).context("cannot drop capabilities")?;

    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(WORKERS).enable_all().build()?;
    let ended = runtime.block_on(async {
        let admin = admin::listen(config.admin_address, predecessor.as_mut())?;
        let listeners = Listeners { pods, admin, predecessor };
        run(config, listeners, installed, sessions, until_terminated()?).await
    });
    // Whatever still runs has nothing to lose: every request has ended, or has had its time.
    runtime.shutdown_background();
    ended
}

/// What the agent is reached by.
#[derive(Debug)]
pub struct Listeners {
    pub pods: Vec<std::net::TcpListener>,
    /// None while another agent has its address.
    pub admin: Option<std::net::TcpListener>,
    /// The agent that some of these may be from.
    pub predecessor: Option<Predecessor>,
}

impl Listeners {
    fn sockets(&self) -> impl Iterator<Item = BorrowedFd<'_>> {
        self.pods.iter().chain(&self.admin).map(AsFd::as_fd)
    }
}

/// Serves this node's pods until `shutdown`, and then until open requests have ended or had their time.
///
/// # Errors
/// Something that the agent cannot do without.
pub async fn run(
    config: Config,
    listeners: Listeners,
    installed: Option<Installed>,
    sessions: Sessions,
    shutdown: impl Future<Output = ()>,
) -> anyhow::Result<()> {
    let metrics = Metrics::new(VERSION)?;
    let readiness = Readiness::default();
    let redirected = readiness.condition("redirect");
    let (attributor, pods) = Attributor::new(metrics.clone());
    let (changed, accounts) = mpsc::unbounded_channel();
    let mut tasks = JoinSet::new();

    let conditions = (readiness.condition("pods"), readiness.condition("service accounts"));
    let learning = follow::Learning {
        config: &config,
        attributor: attributor.clone(),
        changed,
        conditions: conditions.clone(),
        readiness: readiness.clone(),
        metrics: metrics.clone(),
    };
    let follow::Sources { authorizer, tokens, container } = learning.begin(&mut tasks).await?;

    let sts = Sts::new(config.sts.region.clone(), config.sts.endpoint.clone(), metrics.clone());
    let exchange = Exchange::new(tokens, sts, metrics.clone());
    let limiter = ExchangeLimiter::new(config.exchange_rate, config.exchange_burst, metrics.clone());
    let (live, roles) = (attributor.clone(), authorizer.clone());
    let check = move |grant: &Grant| live.is_live(grant.workload().uid()) && roles.is_current(grant);
    let cache = Arc::new(Cache::new(Arc::new(exchange), limiter, check, metrics.clone()));
    let (described, expiring) = (cache.clone(), cache.clone());
    metrics.track_first_expiry(move || expiring.first_expiry());
    let admin = Admin { metrics: metrics.clone(), readiness, sessions: Arc::new(move || described.describe()) };
    if let Some(path) = &config.admin_socket {
        tasks.spawn(admin::serve_local(admin.clone(), path)?);
    }
    let duties = Duties::new(listeners.predecessor.as_ref());
    let handover = Handover::new(&config.state_dir, listeners.sockets(), duties.clone())?;
    tasks.spawn(admin::serve(admin, config.admin_address, listeners.admin, duties.clone()));
    let ahead = ahead::FetchAhead {
        attributor: attributor.clone(),
        authorizer: authorizer.clone(),
        cache: cache.clone(),
        window: config.start_window,
    };
    tasks.spawn(always(ahead.run(pods, accounts, conditions.clone())));
    let metadata = NodeMetadata::new(config.metadata.given, config.metadata.allowed);
    tasks.spawn(always(metadata.clone().follow()));
    let changes = RuleChanges::subscribe();
    let bridge = BridgePorts::new(attributor.clone(), installed.as_ref(), changes.clone(), metrics.clone());
    if listeners.predecessor.is_none() {
        bridge.begin().await;
    }
    let server = Arc::new(Server {
        attributor: attributor.clone(),
        authorizer,
        cache,
        sessions,
        metadata,
        require_imdsv2: config.require_imdsv2.clone(),
        container,
        metrics: metrics.clone(),
        refusals: observe::RefusalLog::default(),
    });

    let graceful = Arc::new(GracefulShutdown::new());
    let probe = Arc::new(Probe::default());
    let direct = if installed.is_some() { Direct::Refuse } else { Direct::Accept };
    let pod_of = move |peer: &Peer| attributor.lookup(peer).ok().map(|workload| workload.uid().0.clone());
    let acceptor = Acceptor::new(config.limits, direct, Box::new(pod_of), probe.clone(), metrics.clone());
    let mut listening = JoinSet::new();
    for listener in listeners.pods {
        let (server, graceful, acceptor, duties) = (server.clone(), graceful.clone(), acceptor.clone(), duties.clone());
        let listener = TcpListener::from_std(listener)?;
        listening.spawn(async move {
            let serve = |arrival| server.clone().connection(arrival, graceful.watcher());
            duties.during(Duty::Pods, || acceptor.accept(&listener, &serve)).await;
        });
    }
    match installed {
        Some(installed) => {
            let others = listeners.predecessor.is_some();
            let redirect = Redirect::new(installed, others, changes, probe, redirected, metrics.clone());
            let duties = duties.clone();
            tasks.spawn(always(async move { duties.during(Duty::Redirect, || redirect.keep()).await }));
        }
        None => {
            redirected.set(true);
            metrics.redirect_verified(true);
        }
    }
    let of_redirect = duties.clone();
    tasks.spawn(always(async move { of_redirect.during(Duty::Redirect, || bridge.keep()).await }));
    // With the listeners, so that at the first signal the next agent is told, and this one's listeners are its alone.
    listening.spawn(async move {
        let _taken = match listeners.predecessor {
            Some(predecessor) => {
                let learnt = async {
                    conditions.0.met().await;
                    conditions.1.met().await;
                };
                predecessor.take(&duties, learnt).await.inspect_err(|error| warn!(%error, "hand-over")).ok()
            }
            None => None,
        };
        handover.offer().await;
        // There is no more to do, and the agent before must not think that this one has ended.
        std::future::pending().await
    });

    tokio::select! {
        () = shutdown => {}
        error = first_failure(&mut tasks, &mut listening) => return Err(error),
    }
    info!(drain = ?config.drain, "no more connections are taken; open requests may end. The redirect stays");
    let second = until_terminated()?;
    listening.shutdown().await;
    tokio::select! {
        () = drained(graceful) => info!("every request has ended"),
        () = tokio::time::sleep(config.drain) => warn!("requests were open still when --drain was over"),
        () = second => warn!("ended at once by a second signal"),
    }
    Ok(())
}

/// Returns when a task has failed that the agent cannot do without.
async fn first_failure(tasks: &mut JoinSet<anyhow::Result<()>>, listening: &mut JoinSet<()>) -> anyhow::Error {
    loop {
        let ended = tokio::select! {
            Some(ended) = tasks.join_next() => ended,
            Some(ended) = listening.join_next() => ended.map(Ok),
            else => return anyhow::anyhow!("no task of the agent is left"),
        };
        match ended {
            Ok(Ok(())) => {}
            Ok(Err(error)) => return error,
            Err(error) => return anyhow::anyhow!("a task of the agent failed: {error}"),
        }
    }
}

async fn drained(graceful: Arc<GracefulShutdown>) {
    // The listeners, which had the other references, are gone.
    if let Some(graceful) = Arc::into_inner(graceful) {
        graceful.shutdown().await;
    }
}

async fn always(task: impl Future<Output = ()>) -> anyhow::Result<()> {
    task.await;
    Ok(())
}

/// Resolves on SIGTERM or SIGINT.
fn until_terminated() -> anyhow::Result<impl Future<Output = ()>> {
    let (mut terminate, mut interrupt) = (signal(SignalKind::terminate())?, signal(SignalKind::interrupt())?);
    Ok(async move {
        tokio::select! {
            _ = terminate.recv() => {}
            _ = interrupt.recv() => {}
        }
    })
}
