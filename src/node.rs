//! Wiring: the only file that sees every stage.

use std::{
    future::Future,
    net::IpAddr,
    path::Path,
    process::ExitCode,
    sync::{Arc, OnceLock},
    time::Duration,
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
    attribute::{self, Attributor, Change, Workload, cni, file},
    authorise::{Accounts, Authoriser, Defaults},
    cache::{Budget, Cache},
    config::{Command, Config, MAX_SESSION, MIN_SESSION, Source},
    exchange::{Exchange, sts::Sts, token::TokenSource},
    intercept::{
        self, Direct, Doors, Probe, RuleChanges,
        rule::{self, Installed, RuleSet},
    },
    kubernetes::{self, Identity, Kubernetes, Mint},
    observe::{self, Condition, Metrics, Readiness},
    serve::{Server, session::Sessions, upstream::NodeMetadata},
};

const VERSION: &str = env!("CARGO_PKG_VERSION");
/// Two, so that reading a long list of pods delays no pod's request.
const WORKERS: usize = 2;
/// Over how long the first prefetches are spread.
const START_WINDOW: Duration = Duration::from_secs(10);
/// How often the redirect is tried, whether the kernel says that rules changed or not: iptables-legacy's are not
/// announced.
const VERIFY: Duration = Duration::from_secs(2);

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
    let listeners = intercept::listen(config.host, config.port)?;
    let installed = rule::install(RuleSet { host: config.host, port: config.port }, config.intercept)?;
    let sessions = Sessions::open(&config.state_dir)?;
    rule::drop_privileges(installed.as_ref()).context("cannot drop capabilities")?;

    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(WORKERS).enable_all().build()?;
    let ended = runtime.block_on(async {
        let admin = TcpListener::bind(config.admin_address)
            .await
            .with_context(|| format!("--admin-address {}: cannot listen there", config.admin_address))?;
        let listeners = Listeners { pods: listeners, admin };
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
    pub admin: TcpListener,
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
    let redirect = readiness.condition("redirect");
    let (attributor, changes) = Attributor::new(metrics.clone());
    let mut tasks = JoinSet::new();

    let defaults = Defaults {
        prefix: config.annotation_prefix.clone(),
        audience: config.audience.clone(),
        duration: config.session_duration,
        durations: MIN_SESSION..=MAX_SESSION,
        scope: config.session_scope,
        foreign_arns: config.sts.endpoint.is_some(),
    };
    let role_annotation = format!("{}/role-arn", config.annotation_prefix);
    let conditions = (readiness.condition("pods"), readiness.condition("service accounts"));
    let (authoriser, tokens) = match config.source.clone() {
        Source::File(path) => {
            let authoriser = Arc::new(Authoriser::new(Accounts::of_file(), defaults));
            follow_file(&path, &attributor, &authoriser, role_annotation, &conditions, &mut tasks)?;
            (authoriser, TokenSource::File)
        }
        Source::Kubernetes { node_name, kubeconfig, mint, cni_results, startup_taint } => {
            let kubernetes = Kubernetes::new(kubeconfig.as_deref(), node_name.clone()).await?;
            let accounts = Accounts::of_kubernetes(kubernetes.calls(Identity::Agent)?);
            let authoriser = Arc::new(Authoriser::new(accounts, defaults));
            if let Some(folder) = cni_results {
                let records = cni::Records::new(folder, attributor.clone(), metrics.clone());
                // Before the pods are listed: what then names none of them is a leftover.
                records.scan();
                tasks.spawn(always(records.follow()));
            }
            if let Some(taint) = startup_taint {
                let (client, node) = (kubernetes.calls(Identity::Agent)?, node_name.clone());
                let readiness = readiness.clone();
                tasks.spawn(always(async move {
                    readiness.ready().await;
                    kubernetes::taint::remove(client, &node, &taint).await;
                }));
            }
            let minting = Arc::new(OnceLock::new());
            let tokens = TokenSource::Kubernetes(minting.clone());
            let follow =
                Follow { kubernetes, node_name, mint, metrics: metrics.clone(), attributor: attributor.clone() };
            tasks.spawn(follow.run(authoriser.clone(), role_annotation, minting, conditions.clone()));
            (authoriser, tokens)
        }
    };

    let sts = Sts::new(config.sts.region.clone(), config.sts.endpoint.clone(), metrics.clone());
    let exchange = Exchange::new(tokens, sts, metrics.clone());
    let budget = Budget::new(config.exchange_rate, config.exchange_burst, metrics.clone());
    let cache = Arc::new(Cache::new(Arc::new(exchange), budget, metrics.clone()));
    let described = cache.clone();
    let slots: observe::Page = Arc::new(move || described.describe());
    tasks.spawn(always(observe::serve_admin(listeners.admin, metrics.clone(), readiness.clone(), slots)));
    let ahead = FetchAhead { attributor: attributor.clone(), authoriser: authoriser.clone(), cache: cache.clone() };
    tasks.spawn(always(ahead.run(changes, conditions)));
    let metadata = NodeMetadata::new(config.metadata.given);
    tasks.spawn(always(metadata.clone().follow(config.metadata.allowed)));
    let server = Arc::new(Server {
        attributor,
        authoriser,
        cache,
        sessions,
        metadata,
        require_imdsv2: config.require_imdsv2,
        metrics: metrics.clone(),
        refusals: observe::RefusalLog::default(),
    });

    let graceful = Arc::new(GracefulShutdown::new());
    let probe = Arc::new(Probe::default());
    let direct = if installed.is_some() { Direct::Refuse } else { Direct::Accept };
    let doors = Doors::new(config.limits, direct, probe.clone(), metrics.clone());
    let mut doormen = JoinSet::new();
    for listener in listeners.pods {
        let (server, graceful) = (server.clone(), graceful.clone());
        let serve = move |accepted| server.clone().connection(accepted, graceful.watcher());
        doormen.spawn(intercept::accept(TcpListener::from_std(listener)?, doors.clone(), serve));
    }
    match installed {
        Some(installed) => {
            let addresses: Vec<IpAddr> = config.host.iter().collect();
            tasks.spawn(always(keep_redirect(installed, addresses, probe, redirect, metrics)));
        }
        None => redirect.set(true),
    }

    let failed = async {
        loop {
            match tasks.join_next().await {
                Some(Ok(Ok(()))) => {}
                Some(Ok(Err(error))) => return error,
                Some(Err(error)) => return anyhow::anyhow!("a task of the agent failed: {error}"),
                None => return anyhow::anyhow!("no task of the agent is left"),
            }
        }
    };
    tokio::select! {
        () = shutdown => {}
        error = failed => return Err(error),
    }
    info!(drain = ?config.drain, "no more connections are taken; open requests may end. The redirect stays");
    doormen.shutdown().await;
    let second = until_terminated()?;
    tokio::select! {
        () = drained(graceful) => info!("every request has ended"),
        () = tokio::time::sleep(config.drain) => warn!("requests were open still when --drain was over"),
        () = second => warn!("ended at once by a second signal"),
    }
    Ok(())
}

async fn drained(graceful: Arc<GracefulShutdown>) {
    // The doormen, who had the other references, are gone.
    if let Some(graceful) = Arc::into_inner(graceful) {
        graceful.shutdown().await;
    }
}

/// Kubernetes' side: find out how tokens may be minted, then follow this node's pods and the service accounts.
struct Follow {
    kubernetes: Kubernetes,
    node_name: String,
    mint: Mint,
    metrics: Metrics,
    attributor: Arc<Attributor>,
}

impl Follow {
    async fn run(
        self,
        authoriser: Arc<Authoriser>,
        role_annotation: String,
        minting: Arc<OnceLock<kube::Client>>,
        (pods_known, accounts_known): (Condition, Condition),
    ) -> anyhow::Result<()> {
        let accounts_client = self.kubernetes.watch(Identity::Agent, self.metrics.watch("serviceaccounts"))?;
        let accounts = async {
            authoriser.accounts().follow(accounts_client, &role_annotation, || accounts_known.set(true)).await;
            anyhow::Ok(())
        };
        let pods = async {
            let identity = self.kubernetes.choose(self.mint).await?;
            let calls = self.kubernetes.calls(identity)?;
            let _ = minting.set(calls.clone());
            let (node, attributor) = (self.node_name.clone(), self.attributor.clone());
            attributor.set_live_read(attribute::watch::live_read(calls, node.clone(), attributor.clone()));
            let client = self.kubernetes.watch(identity, self.metrics.watch("pods"))?;
            attribute::watch::follow(client, node, attributor, || pods_known.set(true)).await;
            anyhow::Ok(())
        };
        tokio::try_join!(accounts, pods).map(|_| ())
    }
}

fn follow_file(
    path: &Path,
    attributor: &Arc<Attributor>,
    authoriser: &Arc<Authoriser>,
    role_annotation: String,
    conditions: &(Condition, Condition),
    tasks: &mut JoinSet<anyhow::Result<()>>,
) -> anyhow::Result<()> {
    let (attributor, authoriser) = (attributor.clone(), authoriser.clone());
    let take = move |workloads: Vec<file::FileWorkload>| {
        authoriser.accounts().replace(&workloads, &role_annotation);
        file::apply(&workloads, &attributor);
    };
    // A file that is wrong from the start is a mistake of the configuration; later, the last good one holds.
    take(file::read(path)?);
    conditions.0.set(true);
    conditions.1.set(true);
    tasks.spawn(file::follow(path.to_owned(), take));
    Ok(())
}

/// Credentials before the first request, and none after the last pod.
#[derive(Clone)]
struct FetchAhead {
    attributor: Arc<Attributor>,
    authoriser: Arc<Authoriser>,
    cache: Arc<Cache>,
}

impl FetchAhead {
    async fn run(self, mut changes: mpsc::UnboundedReceiver<Change>, known: (Condition, Condition)) {
        known.0.met().await;
        known.1.met().await;
        // Pods that ran before this agent did: they have what they need for now, and all nodes of a roll-out must not
        // ask STS in the same second.
        while let Ok(change) = changes.try_recv() {
            self.take(change, START_WINDOW);
        }
        while let Some(change) = changes.recv().await {
            self.take(change, Duration::ZERO);
        }
    }

    fn take(&self, change: Change, within: Duration) {
        match change {
            Change::Gone(pod) => self.cache.forget(&pod),
            Change::Bound(workload) if within.is_zero() => self.fetch(&workload),
            Change::Bound(workload) => {
                let this = self.clone();
                tokio::spawn(async move {
                    tokio::time::sleep(within.mul_f64(fastrand::f64())).await;
                    if this.attributor.is_live(workload.uid()) {
                        this.fetch(&workload);
                    }
                });
            }
        }
    }

    fn fetch(&self, workload: &Workload) {
        if let Some(grant) = self.authoriser.foresee(workload) {
            self.cache.prefetch(&grant);
        }
    }
}

/// Tries the redirect again and again, and applies it when it does not lead here any more.
async fn keep_redirect(
    installed: Installed,
    addresses: Vec<IpAddr>,
    probe: Arc<Probe>,
    verified: Condition,
    metrics: Metrics,
) {
    metrics.rule_applied.inc();
    let mut warned = false;
    let changes = RuleChanges::subscribe();
    loop {
        let mut broken = None;
        for address in &addresses {
            if let Err(error) = probe.run(*address).await {
                broken = Some((*address, error));
            }
        }
        verified.set(broken.is_none());
        metrics.rule_verified.set(broken.is_none().into());
        match broken {
            None => warned = false,
            Some((address, error)) => {
                if !std::mem::replace(&mut warned, true) {
                    warn!(%address, %error, "the redirect does not lead here any more: applying it again");
                }
                // The tools are processes: waiting for them must not hold up requests.
                match tokio::task::spawn_blocking(move || installed.apply_again()).await {
                    Ok(Ok(())) => metrics.rule_repaired.inc(),
                    Ok(Err(error)) => error!(error = format!("{error:#}"), "the redirect cannot be applied"),
                    Err(error) => error!(%error, "the redirect cannot be applied"),
                }
            }
        }
        let _ = tokio::time::timeout(VERIFY, changes.next()).await;
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
