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
    config::{Command, Config},
    doctor,
    exchange::{Exchange, sts::Sts},
    intercept::{
        self, Acceptor, BypassPolicy, ClientConn, HotRestart, Predecessor, Role, Roles, RuleChanges, SelfTest,
        rule::{self, Installed},
    },
    observe::{self, Admin, Metrics, Readiness},
    serve::{Server, imds_token::ImdsTokens, node_metadata::NodeMetadata},
};
use bridge::BridgePorts;
use redirect::Redirect;

const VERSION: &str = env!("CARGO_PKG_VERSION");
/// Two, so that reading a long list of pods delays no pod's request.
const WORKERS: usize = 2;

/// Does what was asked for, from the first line of the log to the exit code.
pub fn main(command: Command) -> ExitCode {
    match command {
        Command::Uninstall(backend) => match rule::uninstall(backend) {
            Ok(removed) if removed.is_empty() => {
                println!("nothing to remove: no rules of kirsa here");
                ExitCode::SUCCESS
            }
            Ok(removed) => {
                removed.iter().for_each(|what| println!("removed {what}"));
                ExitCode::SUCCESS
            }
            Err(error) => {
                eprintln!("error: {error:#}");
                ExitCode::FAILURE
            }
        },
        Command::Doctor(config, options) => doctor::main(&config, options),
        Command::Health(socket, health) => doctor::health(&socket, health),
        Command::Run(config) => match start(*config) {
            Ok(()) => ExitCode::SUCCESS,
            Err(error) => {
                error!(error = format!("{error:#}"), "kirsa ends");
                eprintln!("error: {error:#}");
                ExitCode::FAILURE
            }
        },
    }
}

/// Bind, apply the redirect, drop privileges, serve: in this order, and the first three before there is a second
/// thread, since capabilities belong to threads.
fn start(config: Config) -> anyhow::Result<()> {
    observe::start_logging(config.log_format, &config.log_level)?;
    info!(version = VERSION, "kirsa starts");
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
    imds_tokens: ImdsTokens,
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
    metrics.ask_credentials_left(move || expiring.first_expiry());
    let admin = Admin { metrics: metrics.clone(), readiness, sessions: Arc::new(move || described.describe()) };
    if let Some(path) = &config.admin_socket {
        tasks.spawn(admin::serve_local(admin.clone(), path)?);
    }
    let roles = Roles::new(listeners.predecessor.as_ref());
    let hot_restart = HotRestart::new(&config.state_dir, listeners.sockets(), roles.clone())?;
    tasks.spawn(admin::serve(admin, config.admin_address, listeners.admin, roles.clone()));
    let ahead = ahead::FetchAhead {
        attributor: attributor.clone(),
        authorizer: authorizer.clone(),
        cache: cache.clone(),
        window: config.start_window,
    };
    tasks.spawn(always(ahead.run(pods, accounts, conditions.clone())));
    let metadata = NodeMetadata::new(config.metadata.given, config.metadata.allowed);
    tasks.spawn(always(metadata.clone().poll()));
    let changes = RuleChanges::subscribe();
    let bridge = BridgePorts::new(attributor.clone(), installed.as_ref(), changes.clone(), metrics.clone());
    if listeners.predecessor.is_none() {
        bridge.begin().await;
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
            let others = listeners.predecessor.is_some();
            let redirect = Redirect::new(installed, others, changes, self_test, redirected, metrics.clone());
            let roles = roles.clone();
            tasks.spawn(always(async move { roles.run_while(Role::Redirect, || redirect.keep()).await }));
        }
        None => {
            redirected.set(true);
            metrics.redirect_verified(true);
        }
    }
    let bridge_roles = roles.clone();
    tasks.spawn(always(async move { bridge_roles.run_while(Role::Redirect, || bridge.keep()).await }));
    // With the listeners, so that at the first signal the next agent is told, and this one's listeners are its alone.
    listening.spawn(async move {
        let _taken = match listeners.predecessor {
            Some(predecessor) => {
                let synced = async {
                    conditions.0.met().await;
                    conditions.1.met().await;
                };
                predecessor
                    .take_over(&roles, synced)
                    .await
                    .inspect_err(|error| warn!(%error, "hot restart: cannot follow the old agent"))
                    .ok()
            }
            None => None,
        };
        hot_restart.serve().await;
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
