//! Manifests as a user applies them: any kinds, many documents in one text.

use anyhow::{Context, Result};
use kube::api::{Api, Patch, PatchParams};
use kube::core::{DynamicObject, GroupVersionKind};
use kube::discovery::{Scope, pinned_kind};
use kube::{Client, ResourceExt};

use super::ApiServer;
use super::objects::server_side;

impl ApiServer {
    /// As `kubectl apply --server-side`.
    pub async fn apply(&self, manifests: &str) -> Result<()> {
        self.apply_with(manifests, server_side()).await
    }

    /// As `kubectl apply --dry-run=server`: the API server validates and admits, and stores nothing.
    pub async fn apply_dry_run(&self, manifests: &str) -> Result<()> {
        self.apply_with(manifests, PatchParams { dry_run: true, ..server_side() }).await
    }

    async fn apply_with(&self, manifests: &str, params: PatchParams) -> Result<()> {
        let client = self.client().await?;
        let objects: Vec<DynamicObject> = serde_saphyr::from_multiple(manifests)?;
        for object in objects {
            apply_one(&client, &object, &params).await.with_context(|| format!("applying {}", object.name_any()))?;
        }
        Ok(())
    }
}

async fn apply_one(client: &Client, object: &DynamicObject, params: &PatchParams) -> Result<()> {
    let types = object.types.as_ref().context("a manifest has apiVersion and kind")?;
    let (resource, capabilities) = pinned_kind(client, &GroupVersionKind::try_from(types)?).await?;
    let api: Api<DynamicObject> = match (capabilities.scope, object.namespace()) {
        (Scope::Namespaced, Some(namespace)) => Api::namespaced_with(client.clone(), &namespace, &resource),
        (Scope::Namespaced, None) => Api::default_namespaced_with(client.clone(), &resource),
        (Scope::Cluster, _) => Api::all_with(client.clone(), &resource),
    };
    api.patch(&object.name_any(), params, &Patch::Apply(object)).await?;
    Ok(())
}
