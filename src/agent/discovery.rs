//! Discovers this node's pods and their service accounts, from the API server or from a file.

use std::{path::Path, sync::Arc, time::Duration};

use tokio::{sync::mpsc, task::JoinSet, time::sleep};
use tracing::info;

use super::{container, never_fails};
use crate::{
    attribute::{self, Attributor, ServiceAccountName, cni, file, pod},
    authorize::{AccountEvent, Accounts, Authorizer, accounts},
    config::{Config, Source},
    exchange::token::{TokenMinter, TokenSource},
    kubernetes::{self, ClientFactory, Identity, MintMode},
    observe::{Condition, Metrics, Readiness},
    serve::container::TokenReviews,
};

/// Minimum interval between access reviews of the agent itself, however many TokenRequests are forbidden.
const REVIEW_INTERVAL: Duration = Duration::from_secs(30);

/// Readiness conditions that hold once the initial lists of pods and service accounts are complete.
#[derive(Debug, Clone)]
pub(super) struct Synced {
    pub(super) pods: Condition,
    pub(super) accounts: Condition,
}

impl Synced {
    pub(super) fn new(readiness: &Readiness) -> Self {
        Self { pods: readiness.condition("pods"), accounts: readiness.condition("service accounts") }
    }

    /// Waits until both initial lists are complete.
    pub(super) async fn all(&self) {
        self.pods.met().await;
        self.accounts.met().await;
    }

    pub(super) fn set_all(&self) {
        self.pods.set(true);
        self.accounts.set(true);
    }
}

/// Starts the discovery for the configured source.
pub(super) struct Discovery<'a> {
    pub(super) config: &'a Config,
    pub(super) attributor: Arc<Attributor>,
    /// Receives the service accounts whose session annotations changed.
    pub(super) changed: mpsc::UnboundedSender<ServiceAccountName>,
    pub(super) synced: Synced,
    pub(super) readiness: Readiness,
    pub(super) metrics: Metrics,
}

/// The parts of later stages that depend on the configured source.
pub(super) struct Sources {
    pub(super) authorizer: Arc<Authorizer>,
    pub(super) tokens: TokenSource,
    pub(super) container: Option<TokenReviews>,
}

impl Discovery<'_> {
    /// Starts the discovery tasks.
    ///
    /// # Errors
    /// Fails if the workloads file or the kubeconfig is invalid.
    pub(super) async fn start(self, tasks: &mut JoinSet<anyhow::Result<()>>) -> anyhow::Result<Sources> {
        let defaults = self.config.defaults();
        let role_annotation = defaults.role_annotation();
        match self.config.source.clone() {
            Source::File(path) => {
                let authorizer = Arc::new(Authorizer::new(Accounts::for_file(), defaults));
                follow_file(&path, &self.attributor, &authorizer, role_annotation, &self.synced, tasks)?;
                Ok(Sources { authorizer, tokens: TokenSource::File, container: None })
            }
            Source::Kubernetes { node_name, kubeconfig, mint, cni_results, startup_taint } => {
                let kubernetes = ClientFactory::new(kubeconfig.as_deref(), node_name.clone()).await?;
                let (reads, pods) = (accounts::keep(&role_annotation), self.attributor.clone());
                let accounts = Accounts::for_kubernetes(kubernetes.read_client(Identity::Agent, reads)?, move |name| {
                    pods.has_pods_of(name)
                });
                let authorizer = Arc::new(Authorizer::new(accounts, defaults));
                if cni_results.is_none() {
                    info!(
                        "the agent reads no CNI records: it knows a pod once the API server shows its address, which \
                         may be seconds after the pod started"
                    );
                }
                if let Some(folder) = cni_results {
                    let records = cni::RecordWatcher::new(folder, self.attributor.clone(), self.metrics.clone());
                    // Read the records before listing pods, so that records without a pod are known to be stale.
                    records.scan();
                    tasks.spawn(never_fails(records.follow()));
                }
                if let Some(taint) = startup_taint {
                    let (client, node) = (kubernetes.call_client(Identity::Agent)?, node_name.clone());
                    tasks.spawn(never_fails(async move {
                        self.readiness.ready().await;
                        kubernetes::taint::remove(client, &node, &taint).await;
                    }));
                }
                let container = container::tokens(&kubernetes, self.config.container_audience.clone())?;
                let minter = Arc::new(TokenMinter::default());
                let tokens = TokenSource::Kubernetes(minter.clone());
                let discovery = KubernetesDiscovery {
                    kubernetes,
                    node_name,
                    mint,
                    metrics: self.metrics,
                    attributor: self.attributor,
                    changed: self.changed,
                };
                tasks.spawn(discovery.run(authorizer.clone(), role_annotation, minter, self.synced));
                Ok(Sources { authorizer, tokens, container })
            }
        }
    }
}

/// Determines the identity for minting tokens, then watches this node's pods and their service accounts.
struct KubernetesDiscovery {
    kubernetes: ClientFactory,
    node_name: String,
    mint: MintMode,
    metrics: Metrics,
    attributor: Arc<Attributor>,
    changed: mpsc::UnboundedSender<ServiceAccountName>,
}

impl KubernetesDiscovery {
    async fn run(
        self,
        authorizer: Arc<Authorizer>,
        role_annotation: String,
        minter: Arc<TokenMinter>,
        synced: Synced,
    ) -> anyhow::Result<()> {
        let activity = self.metrics.watch("serviceaccounts");
        let accounts_client =
            self.kubernetes.watch_client(Identity::Agent, activity, accounts::keep(&role_annotation))?;
        let accounts = async {
            // Sending fails only while the agent shuts down.
            let changed = |account| drop(self.changed.send(account));
            let handle = |event| match event {
                AccountEvent::Synced(unlisted) => {
                    synced.accounts.set(true);
                    unlisted.into_iter().for_each(changed);
                }
                AccountEvent::Changed(account) => changed(account),
                AccountEvent::Unchanged => {}
            };
            // List the pods first: the agent keeps only the service accounts of known pods.
            synced.pods.met().await;
            authorizer.accounts().follow(accounts_client, &role_annotation, handle).await;
            anyhow::Ok(())
        };
        let pods = async {
            let mut identity = self.kubernetes.resolve_identity(self.mint).await?;
            loop {
                let calls = self.kubernetes.call_client(identity)?;
                minter.set_client(calls);
                let reads = self.kubernetes.read_client(identity, pod::annotation_filter())?;
                let (node, attributor) = (self.node_name.clone(), self.attributor.clone());
                attributor.set_live_lookup(attribute::watch::live_lookup(reads, node.clone(), attributor.clone()));
                let client =
                    self.kubernetes.watch_client(identity, self.metrics.watch("pods"), pod::annotation_filter())?;
                tokio::select! {
                    () = attribute::watch::follow(client, node, attributor, || synced.pods.set(true)) => {
                        return anyhow::Ok(());
                    }
                    other = self.reselect_identity(identity, &minter) => identity = other,
                }
            }
        };
        tokio::try_join!(accounts, pods).map(|_| ())
    }

    /// Returns when another identity than the current one may mint tokens: an operator may change RBAC at any time.
    async fn reselect_identity(&self, current: Identity, minter: &TokenMinter) -> Identity {
        loop {
            minter.wait_forbidden().await;
            // A TokenRequest may be forbidden for one pod only; then the identity stays the same.
            if let Ok(other) = self.kubernetes.query_identity(self.mint).await
                && other != current
            {
                self.kubernetes.log_identity(other);
                return other;
            }
            sleep(REVIEW_INTERVAL).await;
        }
    }
}

/// Discovers pods and roles from a file, without Kubernetes.
fn follow_file(
    path: &Path,
    attributor: &Arc<Attributor>,
    authorizer: &Arc<Authorizer>,
    role_annotation: String,
    synced: &Synced,
    tasks: &mut JoinSet<anyhow::Result<()>>,
) -> anyhow::Result<()> {
    let (attributor, authorizer) = (attributor.clone(), authorizer.clone());
    let apply = move |workloads: Vec<file::FileWorkload>| {
        authorizer.accounts().replace(&workloads, &role_annotation);
        file::apply(&workloads, &attributor);
    };
    // A file that is invalid at start is a configuration error; later, the last valid one stays in effect.
    apply(file::read(path)?);
    synced.set_all();
    tasks.spawn(file::follow(path.to_owned(), apply));
    Ok(())
}
