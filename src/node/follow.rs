//! Where pods and service accounts are learnt from.

use std::{path::Path, sync::Arc, time::Duration};

use tokio::{sync::mpsc, task::JoinSet, time::sleep};
use tracing::info;

use super::{always, container};
use crate::{
    attribute::{self, Attributor, ServiceAccountName, cni, file, pod},
    authorize::{AccountEvent, Accounts, Authorizer, accounts},
    config::{Config, Source},
    exchange::token::{TokenMinter, TokenSource},
    kubernetes::{self, ClientFactory, Identity, MintMode},
    observe::{Condition, Metrics, Readiness},
    serve::container::TokenReviews,
};

/// The API server is asked no more often than this for the agent's rights, however many tokens it forbids.
const ASK_AGAIN: Duration = Duration::from_secs(30);

/// What is needed to begin, and where goes what is learnt.
pub(super) struct Learning<'a> {
    pub(super) config: &'a Config,
    pub(super) attributor: Arc<Attributor>,
    /// Where service accounts go whose terms have changed.
    pub(super) changed: mpsc::UnboundedSender<ServiceAccountName>,
    /// Met when the pods are known, and when the service accounts are.
    pub(super) conditions: (Condition, Condition),
    pub(super) readiness: Readiness,
    pub(super) metrics: Metrics,
}

/// What the stages to the right need of where pods come from.
pub(super) struct Sources {
    pub(super) authorizer: Arc<Authorizer>,
    pub(super) tokens: TokenSource,
    pub(super) container: Option<TokenReviews>,
}

impl Learning<'_> {
    /// # Errors
    /// What the configuration names cannot be used.
    pub(super) async fn begin(self, tasks: &mut JoinSet<anyhow::Result<()>>) -> anyhow::Result<Sources> {
        let defaults = self.config.defaults();
        let role_annotation = defaults.role_annotation();
        match self.config.source.clone() {
            Source::File(path) => {
                let authorizer = Arc::new(Authorizer::new(Accounts::for_file(), defaults));
                follow_file(&path, &self.attributor, &authorizer, role_annotation, &self.conditions, tasks)?;
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
                        "no CNI records are read: pods are known when the API server shows their address, which may be \
                         seconds after they have started"
                    );
                }
                if let Some(folder) = cni_results {
                    let records = cni::RecordWatcher::new(folder, self.attributor.clone(), self.metrics.clone());
                    // Before the pods are listed: what then names none of them is a leftover.
                    records.scan();
                    tasks.spawn(always(records.follow()));
                }
                if let Some(taint) = startup_taint {
                    let (client, node) = (kubernetes.call_client(Identity::Agent)?, node_name.clone());
                    tasks.spawn(always(async move {
                        self.readiness.ready().await;
                        kubernetes::taint::remove(client, &node, &taint).await;
                    }));
                }
                let container = container::tokens(&kubernetes, self.config.container_audience.clone())?;
                let minting = Arc::new(TokenMinter::default());
                let tokens = TokenSource::Kubernetes(minting.clone());
                let follow = Follow {
                    kubernetes,
                    node_name,
                    mint,
                    metrics: self.metrics,
                    attributor: self.attributor,
                    changed: self.changed,
                };
                tasks.spawn(follow.run(authorizer.clone(), role_annotation, minting, self.conditions));
                Ok(Sources { authorizer, tokens, container })
            }
        }
    }
}

/// In Kubernetes: find out how tokens may be minted, then follow this node's pods and their service accounts.
struct Follow {
    kubernetes: ClientFactory,
    node_name: String,
    mint: MintMode,
    metrics: Metrics,
    attributor: Arc<Attributor>,
    changed: mpsc::UnboundedSender<ServiceAccountName>,
}

impl Follow {
    async fn run(
        self,
        authorizer: Arc<Authorizer>,
        role_annotation: String,
        minting: Arc<TokenMinter>,
        (pods_known, accounts_known): (Condition, Condition),
    ) -> anyhow::Result<()> {
        let heard = self.metrics.watch("serviceaccounts");
        let accounts_client = self.kubernetes.watch_client(Identity::Agent, heard, accounts::keep(&role_annotation))?;
        let accounts = async {
            // Nobody listens any more: the agent is ending.
            let changed = |account| drop(self.changed.send(account));
            let told = |told| match told {
                AccountEvent::Synced(unlisted) => {
                    accounts_known.set(true);
                    unlisted.into_iter().for_each(changed);
                }
                AccountEvent::Changed(account) => changed(account),
                AccountEvent::Unchanged => {}
            };
            // The list keeps only the accounts of pods that are known.
            pods_known.met().await;
            authorizer.accounts().follow(accounts_client, &role_annotation, told).await;
            anyhow::Ok(())
        };
        let pods = async {
            let mut identity = self.kubernetes.resolve_identity(self.mint).await?;
            loop {
                let calls = self.kubernetes.call_client(identity)?;
                minting.set_client(calls);
                let reads = self.kubernetes.read_client(identity, pod::annotation_filter())?;
                let (node, attributor) = (self.node_name.clone(), self.attributor.clone());
                attributor.set_live_lookup(attribute::watch::live_lookup(reads, node.clone(), attributor.clone()));
                let client =
                    self.kubernetes.watch_client(identity, self.metrics.watch("pods"), pod::annotation_filter())?;
                tokio::select! {
                    () = attribute::watch::follow(client, node, attributor, || pods_known.set(true)) => {
                        return anyhow::Ok(());
                    }
                    other = self.another_way(identity, &minting) => identity = other,
                }
            }
        };
        tokio::try_join!(accounts, pods).map(|_| ())
    }

    /// Returns when tokens can be minted in another name than until now: rights may be exchanged while agents run.
    async fn another_way(&self, current: Identity, minting: &TokenMinter) -> Identity {
        loop {
            minting.wait_forbidden().await;
            // What is forbidden for a reason of one pod's is no matter of the agent's rights.
            if let Ok(other) = self.kubernetes.query_identity(self.mint).await
                && other != current
            {
                self.kubernetes.log_identity(other);
                return other;
            }
            sleep(ASK_AGAIN).await;
        }
    }
}

/// Without Kubernetes.
fn follow_file(
    path: &Path,
    attributor: &Arc<Attributor>,
    authorizer: &Arc<Authorizer>,
    role_annotation: String,
    conditions: &(Condition, Condition),
    tasks: &mut JoinSet<anyhow::Result<()>>,
) -> anyhow::Result<()> {
    let (attributor, authorizer) = (attributor.clone(), authorizer.clone());
    let take = move |workloads: Vec<file::FileWorkload>| {
        authorizer.accounts().replace(&workloads, &role_annotation);
        file::apply(&workloads, &attributor);
    };
    // A file that is wrong from the start is a mistake of the configuration; later, the last good one holds.
    take(file::read(path)?);
    conditions.0.set(true);
    conditions.1.set(true);
    tasks.spawn(file::follow(path.to_owned(), take));
    Ok(())
}
