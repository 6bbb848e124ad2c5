//! Wires the stages together into the agent. Besides `doctor`, only this module and its parts see every stage.

mod admin;
mod bridge;
mod container;
mod discovery;
mod prefetcher;
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
        self, Acceptor, BypassPolicy, ClientConn, HotRestart, Predecessor, Role, Roles, RuleChanges, SelfTest,
        rule::{self, Installed},
    },
    observe::{self, Admin, Metrics, Readiness},
    serve::{Server, imds_token::ImdsTokens, node_metadata::NodeMetadata},
};
use bridge::BridgePorts;
use discovery::{Discovery, Sources, Synced};
use prefetcher::Prefetcher;
use redirect::Redirect;

const VERSION: &str = env!("CARGO_PKG_VERSION");
/// Two threads, so that parsing a long list of pods does not delay requests.
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

/// Binds the port, applies the redirect, drops privileges, then serves. The first three happen before a second thread
/// exists, since capabilities belong to threads.
fn start(config: Config) -> anyhow::Result<()> {
    observe::start_logging(config.log_format, &config.log_level)?;
    info!(version = VERSION, "kirsa is starting");
    intercept::raise_descriptor_limit(config.limits.total);
    let mut predecessor = Predecessor::find(&config.state_dir);
    let pods = intercept::listen(config.host, config.port, predecessor.as_mut())?;
    let installed = rule::install(config.rules(), config.intercept)?;
    let imds_tokens = ImdsTokens::open(&config.state_dir)?;
    rule::drop_privileges(installed.as_ref()).context("cannot drop capabilities")?;

    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(WORKERS).enable_all().build()?;
    let ended = runtime.block_on(async {
        let admin = admin::listen(config.admin_address, predecessor.as_mut())?;
        let listeners = Listeners { pods, admin, predecessor };
        run(config, listeners, installed, imds_tokens, until_terminated()?).await
    });
    // Remaining tasks may be dropped: every request has ended or used up its drain time.
    runtime.shutdown_background();
    ended
}

/// The agent's listening sockets.
#[derive(Debug)]
pub struct Listeners {
    pub pods: Vec<std::net::TcpListener>,
    /// `None` while another process uses the address.
    pub admin: Option<std::net::TcpListener>,
    /// The previous agent, which may have passed some of these sockets (hot restart).
    pub predecessor: Option<Predecessor>,
}

impl Listeners {
    fn sockets(&self) -> impl Iterator<Item = BorrowedFd<'_>> {
        self.pods.iter().chain(&self.admin).map(AsFd::as_fd)
    }
}

/// Serves this node's pods until `shutdown`, then drains: waits for requests in flight for at most `--drain`.
///
/// # Errors
/// Fails if a required part cannot start, or fails later.
pub async fn run(
    config: Config,
    listeners: Listeners,
    installed: Option<Installed>,
    imds_tokens: ImdsTokens,
    shutdown: impl Future<Output = ()>,
) -> anyhow::Result<()> {
    let metrics = Metrics::new(VERSION)?;
    let readiness = Readiness::default();
    let redirect_verified = readiness.condition("redirect");
    let (attributor, pods) = Attributor::new(metrics.clone());
    let (changed, accounts) = mpsc::unbounded_channel();
    let mut tasks = JoinSet::new();

    let synced = Synced::new(&readiness);
    let discovery = Discovery {
        config: &config,
        attributor: attributor.clone(),
        changed,
        synced: synced.clone(),
        readiness: readiness.clone(),
        metrics: metrics.clone(),
    };
    let Sources { authorizer, tokens, container } = discovery.start(&mut tasks).await?;

    let sts = Sts::new(config.sts.region.clone(), config.sts.endpoint.clone(), metrics.clone());
    let exchange = Exchange::new(tokens, sts, metrics.clone());
    let limiter = ExchangeLimiter::new(config.exchange_rate, config.exchange_burst, metrics.clone());
    let (pod_check, grant_check) = (attributor.clone(), authorizer.clone());
    let check = move |grant: &Grant| pod_check.is_live(grant.workload().uid()) && grant_check.is_current(grant);
    let cache = Arc::new(Cache::new(Arc::new(exchange), limiter, check, metrics.clone()));
    let (debug_cache, expiry_cache) = (cache.clone(), cache.clone());
    metrics.track_first_expiry(move || expiry_cache.first_expiry());
    let admin = Admin { metrics: metrics.clone(), readiness, sessions: Arc::new(move || debug_cache.describe()) };
    if let Some(path) = &config.admin_socket {
        tasks.spawn(admin::serve_local(admin.clone(), path)?);
    }
    let roles = Roles::new(listeners.predecessor.as_ref());
    let hot_restart = HotRestart::new(&config.state_dir, listeners.sockets(), roles.clone())?;
    tasks.spawn(admin::serve(admin, config.admin_address, listeners.admin, roles.clone()));
    let prefetcher = Prefetcher {
        attributor: attributor.clone(),
        authorizer: authorizer.clone(),
        cache: cache.clone(),
        window: config.start_window,
    };
    tasks.spawn(never_fails(prefetcher.run(pods, accounts, synced.clone())));
    let metadata = NodeMetadata::new(config.metadata.given, config.metadata.allowed);
    tasks.spawn(never_fails(metadata.clone().poll()));
    let changes = RuleChanges::subscribe();
    let bridge = BridgePorts::new(attributor.clone(), installed.as_ref(), changes.clone(), metrics.clone());
    if listeners.predecessor.is_none() {
        bridge.apply_initial().await;
    }
    let server = Arc::new(Server {
        attributor: attributor.clone(),
        authorizer,
        cache,
        imds_tokens,
        metadata,
        require_imdsv2: config.require_imdsv2.clone(),
        container,
        metrics: metrics.clone(),
        refusals: observe::RefusalLog::default(),
    });

    let graceful = Arc::new(GracefulShutdown::new());
    let self_test = Arc::new(SelfTest::default());
    let bypass_policy = if installed.is_some() { BypassPolicy::Reject } else { BypassPolicy::Accept };
    let pod_of = move |peer: &ClientConn| attributor.lookup(peer).ok().map(|workload| workload.uid().0.clone());
    let acceptor = Acceptor::new(config.limits, bypass_policy, Box::new(pod_of), self_test.clone(), metrics.clone());
    let mut listening = JoinSet::new();
    for listener in listeners.pods {
        let (server, graceful, acceptor, roles) = (server.clone(), graceful.clone(), acceptor.clone(), roles.clone());
        let listener = TcpListener::from_std(listener)?;
        listening.spawn(async move {
            let serve = |conn| server.clone().handle_connection(conn, graceful.watcher());
            roles.run_while(Role::Pods, || acceptor.accept(&listener, &serve)).await;
        });
    }
    match installed {
        Some(installed) => {
            let has_predecessor = listeners.predecessor.is_some();
            let redirect =
                Redirect::new(installed, has_predecessor, changes, self_test, redirect_verified, metrics.clone());
            let roles = roles.clone();
            tasks.spawn(never_fails(async move { roles.run_while(Role::Redirect, || redirect.maintain()).await }));
        }
        None => {
            redirect_verified.set(true);
            metrics.redirect_verified(true);
        }
    }
    let bridge_roles = roles.clone();
    tasks.spawn(never_fails(async move { bridge_roles.run_while(Role::Redirect, || bridge.maintain()).await }));
    // Spawned with the listeners: at the first signal the next agent must learn of the shutdown and own the sockets.
    listening.spawn(async move {
        let _taken = match listeners.predecessor {
            Some(predecessor) => {
                let taken = predecessor.take_over(&roles, synced.all()).await;
                taken.inspect_err(|error| warn!(%error, "the hot restart failed")).ok()
            }
            None => None,
        };
        hot_restart.serve().await;
        // Keep the connection to the previous agent open, which would otherwise take this one for dead.
        std::future::pending().await
    });

    tokio::select! {
        () = shutdown => {}
        error = first_failure(&mut tasks, &mut listening) => return Err(error),
    }
    info!(drain = ?config.drain, "drain started: the agent accepts no more connections, the redirect stays");
    let second_signal = until_terminated()?;
    listening.shutdown().await;
    tokio::select! {
        () = drained(graceful) => info!("every request has ended"),
        () = tokio::time::sleep(config.drain) => warn!("drain timed out with requests in flight"),
        () = second_signal => warn!("a second signal ended the drain"),
    }
    Ok(())
}

/// Waits for the first task that fails.
async fn first_failure(tasks: &mut JoinSet<anyhow::Result<()>>, listening: &mut JoinSet<()>) -> anyhow::Error {
    loop {
        let ended = tokio::select! {
            Some(ended) = tasks.join_next() => ended,
            Some(ended) = listening.join_next() => ended.map(Ok),
            else => return anyhow::anyhow!("every task of the agent has ended"),
        };
        match ended {
            Ok(Ok(())) => {}
            Ok(Err(error)) => return error,
            Err(error) => return anyhow::anyhow!("a task of the agent failed: {error}"),
        }
    }
}

/// Waits until every connection has ended.
async fn drained(graceful: Arc<GracefulShutdown>) {
    // The listeners, which held the other references, are gone.
    if let Some(graceful) = Arc::into_inner(graceful) {
        graceful.shutdown().await;
    }
}

/// Adapts a task without a result to the task set.
async fn never_fails(task: impl Future<Output = ()>) -> anyhow::Result<()> {
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
