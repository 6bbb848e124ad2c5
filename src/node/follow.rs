//! Where pods and service accounts are learnt from.

use std::{
    path::Path,
    sync::{Arc, OnceLock},
};

use tokio::{sync::mpsc, task::JoinSet};

use crate::{
    attribute::{self, Attributor, ServiceAccountName, file},
    authorise::{Authoriser, Told},
    kubernetes::{Identity, Kubernetes, Mint},
    observe::{Condition, Metrics},
};

/// In Kubernetes: find out how tokens may be minted, then follow this node's pods and the service accounts.
pub(super) struct Follow {
    pub(super) kubernetes: Kubernetes,
    pub(super) node_name: String,
    pub(super) mint: Mint,
    pub(super) metrics: Metrics,
    pub(super) attributor: Arc<Attributor>,
    /// Where service accounts go whose terms have changed.
    pub(super) changed: mpsc::UnboundedSender<ServiceAccountName>,
}

impl Follow {
    pub(super) async fn run(
        self,
        authoriser: Arc<Authoriser>,
        role_annotation: String,
        minting: Arc<OnceLock<kube::Client>>,
        (pods_known, accounts_known): (Condition, Condition),
    ) -> anyhow::Result<()> {
        let accounts_client = self.kubernetes.watch(Identity::Agent, self.metrics.watch("serviceaccounts"))?;
        let accounts = async {
            let told = |told| match told {
                Told::All => accounts_known.set(true),
                // Nobody listens any more: the agent is ending.
                Told::Changed(account) => drop(self.changed.send(account)),
                Told::Nothing => {}
            };
            authoriser.accounts().follow(accounts_client, &role_annotation, told).await;
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

/// Without Kubernetes.
pub(super) fn follow_file(
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
