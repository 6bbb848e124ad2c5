//! Startup taint: a node joins with it, so that no pod starts there before the agent is ready.

use std::time::Duration;

use k8s_openapi::api::core::v1::{Node, Taint};
use kube::{
    Api, Client,
    api::{Patch, PatchParams},
};
use serde_json::json;
use tracing::{info, warn};

use crate::clock::Backoff;

/// Removes the taint from the node, and retries until that succeeds.
pub async fn remove(client: Client, node: &str, key: &str) {
    let nodes: Api<Node> = Api::all(client);
    let mut backoff = Backoff::new(Duration::from_millis(200), Duration::from_secs(10));
    loop {
        match remove_once(&nodes, node, key).await {
            Ok(true) => return info!(node, key, "startup taint removed: pods may start on this node"),
            Ok(false) => return,
            Err(error) => {
                warn!(
                    node, key, %error,
                    "removing the startup taint failed; retrying (the agent needs daemonset/components/startup-taint)"
                );
                tokio::time::sleep(backoff.pause()).await;
            }
        }
    }
}

/// Returns false if the node does not have the taint.
async fn remove_once(nodes: &Api<Node>, node: &str, key: &str) -> kube::Result<bool> {
    let found = nodes.get(node).await?;
    let taints = found.spec.and_then(|spec| spec.taints).unwrap_or_default();
    let (ours, others): (Vec<Taint>, Vec<Taint>) = taints.into_iter().partition(|taint| taint.key == key);
    if ours.is_empty() {
        return Ok(false);
    }
    // Optimistic locking by resourceVersion: a concurrent change of the taints must not be undone.
    let patch = json!({
        "metadata": { "resourceVersion": found.metadata.resource_version },
        "spec": { "taints": others },
    });
    nodes.patch(node, &PatchParams::default(), &Patch::Merge(patch)).await?;
    Ok(true)
}
