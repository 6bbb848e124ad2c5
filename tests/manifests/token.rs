//! Tests the agent's own token: it lives for one hour, which the API server does not extend.

use anyhow::{Context, Result, ensure};
use base64::Engine;
use base64::prelude::BASE64_URL_SAFE_NO_PAD;
use k8s_openapi::api::authentication::v1::TokenRequest;
use k8s_openapi::api::core::v1::{Pod, ServiceAccount};
use kube::api::{Api, DeleteParams, PostParams};
use serde_json::{Value, json};

use crate::chart::template;
use crate::kustomize::{build, components, with};
use crate::{NAMESPACE, find, server};

const MOUNT: &str = "/var/run/secrets/kubernetes.io/serviceaccount";
const LIFETIME: i64 = 3_600;

fn list(value: &Value) -> impl Iterator<Item = &Value> {
    value.as_array().into_iter().flatten()
}

/// Returns the lifetime of each token that a pod mounts, with the mount paths of its volume.
fn mounted_tokens(spec: &Value) -> Vec<(Option<i64>, Vec<&str>)> {
    let mut tokens = Vec::new();
    for volume in list(&spec["volumes"]) {
        let mounts = list(&spec["containers"]).flat_map(|container| list(&container["volumeMounts"]));
        let mounts: Vec<&str> = mounts
            .filter(|mount| mount["name"] == volume["name"])
            .filter_map(|mount| mount["mountPath"].as_str())
            .collect();
        for source in list(&volume["projected"]["sources"]).filter(|source| source.get("serviceAccountToken").is_some())
        {
            tokens.push((source["serviceAccountToken"]["expirationSeconds"].as_i64(), mounts.clone()));
        }
    }
    tokens
}

#[test]
fn every_manifest_mounts_a_token_of_one_hour() -> Result<()> {
    let mut sets =
        vec![("chart".to_owned(), template("")?), ("chart iptables".to_owned(), template("intercept=iptables")?)];
    for component in components()? {
        sets.push((component.clone(), with(&[&component])?));
    }
    for (name, objects) in sets {
        let spec = &find(&objects, "DaemonSet")?["spec"]["template"]["spec"];
        ensure!(spec["automountServiceAccountToken"] == false, "{name}");
        ensure!(mounted_tokens(spec) == [(Some(LIFETIME), vec![MOUNT])], "{name}: {}", spec["volumes"]);
    }
    let uninstall = build("uninstall")?;
    let spec = &find(&uninstall, "DaemonSet")?["spec"]["template"]["spec"];
    ensure!(spec["automountServiceAccountToken"] == false && mounted_tokens(spec).is_empty(), "{spec}");
    Ok(())
}

/// Creates the pod through the API server's admission, which adds the automatic mount, and requests each token that
/// its volumes name as the kubelet does.
#[tokio::test]
async fn agent_token_lives_for_one_hour() -> Result<()> {
    let server = server().await?;
    let pods: Api<Pod> = Api::namespaced(server.client().await?, NAMESPACE);
    server.node("token-node").await?;
    let base = build("base")?;
    let mut pod = find(&base, "DaemonSet")?["spec"]["template"].clone();
    pod["metadata"]["name"] = "kirsa-token".into();
    pod["spec"]["nodeName"] = "token-node".into();
    let created = pods.create(&PostParams::default(), &serde_json::from_value(pod)?).await?;
    let uid = created.metadata.uid.clone().context("a UID")?;
    let admitted = serde_json::to_value(&created)?;
    let tokens = mounted_tokens(&admitted["spec"]);
    ensure!(tokens.len() == 1, "one token: {}", admitted["spec"]["volumes"]);
    let mut lifetimes = Vec::new();
    for seconds in [tokens[0].0.context("expirationSeconds")?, 3_607] {
        lifetimes.push(lifetime(&uid, seconds).await?);
    }
    pods.delete("kirsa-token", &DeleteParams::default().grace_period(0)).await?;
    ensure!(lifetimes[0] == LIFETIME, "{lifetimes:?}");
    ensure!(lifetimes[1] > 86_400, "this API server never extends a token, so the test is void: {lifetimes:?}");
    Ok(())
}

/// Returns `exp - iat` of a token for the API server that is bound to the pod.
async fn lifetime(uid: &str, seconds: i64) -> Result<i64> {
    let request: TokenRequest = serde_json::from_value(json!({
        "apiVersion": "authentication.k8s.io/v1",
        "kind": "TokenRequest",
        "spec": {
            "audiences": [],
            "expirationSeconds": seconds,
            "boundObjectRef": {"apiVersion": "v1", "kind": "Pod", "name": "kirsa-token", "uid": uid},
        },
    }))?;
    let accounts: Api<ServiceAccount> = Api::namespaced(server().await?.client().await?, NAMESPACE);
    let answer = accounts.create_token_request("kirsa", &PostParams::default(), &request).await?;
    let token = answer.status.context("a status")?.token;
    let payload = token.split('.').nth(1).context("a JWT")?;
    let claims: Value = serde_json::from_slice(&BASE64_URL_SAFE_NO_PAD.decode(payload)?)?;
    Ok(claims["exp"].as_i64().context("exp")? - claims["iat"].as_i64().context("iat")?)
}
