//! Kubernetes objects as the parts that are not here would make them: what the scheduler, the kubelet and an
//! administrator do to nodes, service accounts and pods.

use std::net::IpAddr;
use std::path::PathBuf;

use anyhow::{Context, Result};
use k8s_openapi::api::authentication::v1::TokenRequest;
use k8s_openapi::api::core::v1::{Namespace, Node, Pod, ServiceAccount};
use k8s_openapi::api::rbac::v1::ClusterRoleBinding;
use kube::api::{Api, DeleteParams, Patch, PatchParams, PostParams};
use kube::core::NamespaceResourceScope;
use kube::{Client, Resource, ResourceExt};
use serde::de::DeserializeOwned;
use serde_json::{Value, json};

use super::ApiServer;

/// Server-side apply under one name: the same call creates and changes.
pub(super) fn server_side() -> PatchParams {
    PatchParams::apply("lab").force()
}

impl ApiServer {
    /// EKS publishes them to everybody: this is how AWS STS gets at them.
    pub(super) async fn publish_jwks(&self, client: Client) -> Result<()> {
        let binding = json!({
            "apiVersion": "rbac.authorization.k8s.io/v1",
            "kind": "ClusterRoleBinding",
            "metadata": {"name": "lab-public-issuer"},
            "roleRef": {
                "apiGroup": "rbac.authorization.k8s.io",
                "kind": "ClusterRole",
                "name": "system:service-account-issuer-discovery",
            },
            "subjects": [{"apiGroup": "rbac.authorization.k8s.io", "kind": "Group", "name": "system:unauthenticated"}],
        });
        Api::<ClusterRoleBinding>::all(client)
            .patch("lab-public-issuer", &server_side(), &Patch::Apply(binding))
            .await?;
        Ok(())
    }

    async fn api<K>(&self, namespace: &str) -> Result<Api<K>>
    where
        K: Resource<Scope = NamespaceResourceScope, DynamicType = ()>,
    {
        Ok(Api::namespaced(self.client().await?, namespace))
    }

    /// A node, as its kubelet registers it.
    pub async fn node(&self, name: &str) -> Result<()> {
        let node = json!({"apiVersion": "v1", "kind": "Node", "metadata": {"name": name}});
        Api::<Node>::all(self.client().await?).patch(name, &server_side(), &Patch::Apply(node)).await?;
        Ok(())
    }

    pub async fn namespace(&self, name: &str) -> Result<()> {
        let namespace = json!({"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": name}});
        Api::<Namespace>::all(self.client().await?).patch(name, &server_side(), &Patch::Apply(namespace)).await?;
        Ok(())
    }

    /// A service account with exactly these annotations: made with its namespace, or changed.
    pub async fn service_account(&self, namespace: &str, name: &str, annotations: &[(&str, &str)]) -> Result<()> {
        self.namespace(namespace).await?;
        let annotations: serde_json::Map<String, Value> =
            annotations.iter().map(|&(key, value)| (key.into(), value.into())).collect();
        let account = json!({
            "apiVersion": "v1",
            "kind": "ServiceAccount",
            "metadata": {"name": name, "namespace": namespace, "annotations": annotations},
        });
        self.api::<ServiceAccount>(namespace).await?.patch(name, &server_side(), &Patch::Apply(account)).await?;
        Ok(())
    }

    /// A pod bound to a node, as the scheduler leaves it: pending and without an address. Returns its UID.
    pub async fn pod(&self, namespace: &str, name: &str, service_account: &str, node: &str) -> Result<String> {
        self.create_pod(namespace, name, json!({"serviceAccountName": service_account, "nodeName": node})).await
    }

    /// A pod with more in its spec, such as `hostNetwork`; its container is added. Returns its UID.
    pub async fn create_pod(&self, namespace: &str, name: &str, mut spec: Value) -> Result<String> {
        spec["containers"] = json!([{"name": "main", "image": "none"}]);
        let pod = json!({
            "apiVersion": "v1",
            "kind": "Pod",
            "metadata": {"name": name, "namespace": namespace},
            "spec": spec,
        });
        let api = self.api::<Pod>(namespace).await?;
        let created = api.create(&PostParams::default(), &serde_json::from_value(pod)?).await;
        let created = created.with_context(|| format!("pod {namespace}/{name}"))?;
        created.uid().context("the API server gives every object a UID")
    }

    /// What the kubelet reports about a pod.
    pub async fn set_pod_status(&self, namespace: &str, name: &str, phase: &str, ips: &[IpAddr]) -> Result<()> {
        let pod_ips: Vec<Value> = ips.iter().map(|ip| json!({ "ip": ip })).collect();
        let status = json!({"status": {"phase": phase, "podIP": ips.first(), "podIPs": pod_ips}});
        let api = self.api::<Pod>(namespace).await?;
        api.patch_status(name, &PatchParams::default(), &Patch::Merge(status)).await?;
        Ok(())
    }

    /// Delete a pod at once, as the kubelet does when its containers have ended.
    pub async fn delete_pod(&self, namespace: &str, name: &str) -> Result<()> {
        self.api::<Pod>(namespace).await?.delete(name, &DeleteParams::default().grace_period(0)).await?;
        Ok(())
    }

    /// Ask for a pod's end and leave it terminating.
    pub async fn terminate_pod(&self, namespace: &str, name: &str) -> Result<()> {
        self.api::<Pod>(namespace).await?.delete(name, &DeleteParams::default().grace_period(3600)).await?;
        Ok(())
    }

    /// What a volume would hold: a token of `service_account`, bound to a pod of it. Without audience: the
    /// API server's own.
    pub async fn token(
        &self,
        namespace: &str,
        service_account: &str,
        pod: (&str, &str),
        audience: Option<&str>,
    ) -> Result<String> {
        self.token_that_lasts(3_600, namespace, service_account, pod, audience).await
    }

    async fn token_that_lasts(
        &self,
        seconds: u32,
        namespace: &str,
        service_account: &str,
        pod: (&str, &str),
        audience: Option<&str>,
    ) -> Result<String> {
        let request = json!({
            "apiVersion": "authentication.k8s.io/v1",
            "kind": "TokenRequest",
            "spec": {
                "audiences": audience.into_iter().collect::<Vec<_>>(),
                "expirationSeconds": seconds,
                "boundObjectRef": {"apiVersion": "v1", "kind": "Pod", "name": pod.0, "uid": pod.1},
            },
        });
        let request: TokenRequest = serde_json::from_value(request)?;
        let api = self.api::<ServiceAccount>(namespace).await?;
        let answer = api.create_token_request(service_account, &PostParams::default(), &request).await?;
        Ok(answer.status.context("an answer has a status")?.token)
    }

    /// A kubeconfig with the token that an agent's pod on `node` would find in its volume. Node, namespace,
    /// service account and pod are made where they are missing.
    pub async fn agent_kubeconfig(&self, namespace: &str, service_account: &str, node: &str) -> Result<PathBuf> {
        self.node(node).await?;
        if self.api::<ServiceAccount>(namespace).await?.get_opt(service_account).await?.is_none() {
            self.service_account(namespace, service_account, &[]).await?;
        }
        let name = format!("{service_account}-{node}");
        let uid = match self.get_pod_uid(namespace, &name).await? {
            Some(uid) => uid,
            None => {
                let spec = json!({"serviceAccountName": service_account, "nodeName": node, "hostNetwork": true});
                self.create_pod(namespace, &name, spec).await?
            }
        };
        // Nobody renews it as the kubelet would, and an hour of `make soak` is longer than an hour.
        let token = self.token_that_lasts(86_400, namespace, service_account, (&name, &uid), None).await?;
        self.token_kubeconfig(&format!("{namespace}-{name}"), &token)
    }

    async fn get_pod_uid(&self, namespace: &str, name: &str) -> Result<Option<String>> {
        Ok(self.api::<Pod>(namespace).await?.get_opt(name).await?.and_then(|pod| pod.uid()))
    }

    /// Any object, read back.
    pub async fn read<K>(&self, namespace: &str, name: &str) -> Result<Option<K>>
    where
        K: Resource<Scope = NamespaceResourceScope, DynamicType = ()> + Clone + DeserializeOwned + std::fmt::Debug,
    {
        Ok(self.api::<K>(namespace).await?.get_opt(name).await?)
    }
}
