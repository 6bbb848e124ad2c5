//! Tests that the agent may remove the startup taint of its Node and change no other field.

use std::sync::OnceLock;
use std::time::Duration;

use anyhow::{Context, Result, anyhow, bail, ensure};
use k8s_openapi::api::core::v1::Node;
use kube::Client;
use kube::api::{Api, Patch, PatchParams};
use lab::apiserver::{ApiServer, client_of};
use serde_json::{Value, json};

use crate::known;
use crate::kustomize::with;

/// How a field is protected.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Protection {
    /// The admission policy rejects a change.
    Policy,
    /// The API server rejects a change, or drops it.
    Immutable,
    /// The agent removes its own taint here; other rows cover other taints.
    Taints,
    /// The API server writes the field with each change, so the agent's own change cannot be distinguished.
    Bookkeeping,
}
use Protection::{Bookkeeping, Immutable, Policy, Taints};

/// Returns the fields of the metadata, each with a value that an attacker may set.
fn metadata() -> Vec<(&'static str, Protection, Value)> {
    vec![
        ("annotations", Policy, json!({"evil": "1"})),
        ("creationTimestamp", Immutable, json!("2001-01-01T00:00:00Z")),
        ("deletionGracePeriodSeconds", Immutable, json!(7)),
        ("deletionTimestamp", Immutable, json!("2001-01-01T00:00:00Z")),
        ("finalizers", Policy, json!(["evil.example/hold"])),
        ("generateName", Policy, json!("evil-")),
        ("generation", Immutable, json!(77)),
        ("labels", Policy, json!({"evil": "1"})),
        ("managedFields", Bookkeeping, json!([])),
        ("name", Immutable, json!("evil")),
        ("namespace", Immutable, json!("evil")),
        ("ownerReferences", Policy, json!([owner("evil")])),
        ("resourceVersion", Immutable, json!("1")),
        ("selfLink", Immutable, json!("/evil")),
        ("uid", Immutable, json!("7b1b4a0c-0000-4000-8000-000000000000")),
    ]
}

/// Returns the fields of the spec, each with a value that an attacker may set.
fn spec() -> Vec<(&'static str, Protection, Value)> {
    vec![
        ("configSource", Immutable, json!({"configMap": {"name": "e", "namespace": "e", "kubeletConfigKey": "e"}})),
        ("externalID", Immutable, json!("evil")),
        ("podCIDR", Policy, json!("10.77.0.0/24")),
        ("podCIDRs", Policy, json!(["10.77.0.0/24"])),
        // The API server drops it while its feature gate is off (the default); the policy covers it as every field.
        ("podPreemptionPolicy", Immutable, json!({"disableResizePreemption": ["evil"]})),
        ("providerID", Policy, json!("aws:///evil")),
        ("taints", Taints, json!([taint("evil")])),
        ("unschedulable", Policy, json!(true)),
    ]
}

fn owner(name: &str) -> Value {
    json!({"apiVersion": "v1", "kind": "ConfigMap", "name": name, "uid": format!("uid-{name}")})
}

fn taint(key: &str) -> Value {
    json!({"key": key, "effect": "NoSchedule"})
}

/// Returns an API server of its own, since a test of the chart removes the component from the shared one.
fn server() -> Result<&'static ApiServer> {
    static SERVER: OnceLock<Result<ApiServer>> = OnceLock::new();
    SERVER.get_or_init(ApiServer::another).as_ref().map_err(|error| anyhow!("{error:#}"))
}

/// Applies the component and returns clients of an administrator and of the agent on `node`.
async fn clients(node: &str) -> Result<(Client, Client)> {
    let server = server()?;
    let component = with(&["startup-taint"])?;
    let is_of_taint = |object: &&Value| object["metadata"]["name"] == "kirsa-startup-taint";
    let component: Vec<Value> = component.iter().filter(is_of_taint).cloned().collect();
    ensure!(component.len() == 4, "{component:?}");
    server.apply(&known(&component)).await?;
    let agent = client_of(&server.agent_kubeconfig("kirsa", "kirsa", node).await?).await?;
    let mut last = String::new();
    for round in 0..200 {
        last = match patch(&agent, node, &json!({"metadata": {"labels": {"probe": round.to_string()}}})).await {
            Err(error) if error.to_string().contains("kirsa-startup-taint") => {
                // Revert changes from before the policy took effect.
                let admin = server.client().await?;
                patch(&admin, node, &json!({"metadata": {"labels": null}})).await?;
                return Ok((admin, agent));
            }
            answer => format!("{answer:?}").chars().take(400).collect(),
        };
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
    bail!("the policy does not take effect: {last}")
}

async fn patch(client: &Client, node: &str, change: &Value) -> kube::Result<Node> {
    Api::<Node>::all(client.clone()).patch(node, &PatchParams::default(), &Patch::Merge(change)).await
}

async fn member(client: &Client, node: &str, part: &str, field: &str) -> Result<Value> {
    let node = serde_json::to_value(Api::<Node>::all(client.clone()).get(node).await?)?;
    Ok(node[part][field].clone())
}

#[tokio::test]
async fn every_field_of_a_node_is_listed() -> Result<()> {
    let request = http::Request::get("/openapi/v3/api/v1").body(Vec::new())?;
    let openapi: Value = serde_json::from_str(&server()?.client().await?.request_text(request).await?)?;
    let fields = |schema: &str| -> Result<Vec<String>> {
        let properties = openapi["components"]["schemas"][schema]["properties"].as_object();
        Ok(properties.with_context(|| schema.to_owned())?.keys().cloned().collect())
    };
    // The status is a subresource; the test of a full node shows that the agent cannot change it.
    let mut node = fields("io.k8s.api.core.v1.Node")?;
    node.sort();
    ensure!(node == ["apiVersion", "kind", "metadata", "spec", "status"], "{node:?}");
    for (schema, listed) in
        [("io.k8s.apimachinery.pkg.apis.meta.v1.ObjectMeta", metadata()), ("io.k8s.api.core.v1.NodeSpec", spec())]
    {
        for field in fields(schema)? {
            ensure!(listed.iter().any(|(name, ..)| *name == field), "{schema}: {field} is not listed");
        }
    }
    Ok(())
}

#[tokio::test]
async fn no_field_of_an_empty_node_can_be_set() -> Result<()> {
    let (admin, agent) = clients("taint-empty").await?;
    for (part, fields) in [("metadata", metadata()), ("spec", spec())] {
        for (field, protection, value) in fields {
            if protection == Bookkeeping {
                continue;
            }
            let before = member(&admin, "taint-empty", part, field).await?;
            let mut change = json!({part: {field: value}});
            if field == "podCIDRs" {
                change["spec"]["podCIDR"] = "10.77.0.0/24".into();
            }
            let answer = patch(&agent, "taint-empty", &change).await;
            let after = member(&admin, "taint-empty", part, field).await?;
            ensure!(after == before, "{part}.{field}: {before} became {after}");
            if protection != Immutable {
                let rejected = answer.err().is_some_and(|error| error.to_string().contains("kirsa-startup-taint"));
                ensure!(rejected, "the policy does not reject {part}.{field}");
            }
        }
    }
    Ok(())
}

#[tokio::test]
async fn no_field_of_a_full_node_can_be_changed() -> Result<()> {
    let (admin, agent) = clients("taint-full").await?;
    let full = json!({
        "metadata": {
            "labels": {"a": "1"}, "annotations": {"a": "1"}, "finalizers": ["a.example/a"], "ownerReferences": [owner("a")],
        },
        "spec": {
            "podCIDR": "10.76.0.0/24", "podCIDRs": ["10.76.0.0/24"], "providerID": "aws:///a", "unschedulable": true,
            "taints": [taint("other"), taint("kirsa.dev/not-ready")],
        },
        "status": {"allocatable": {"cpu": "1"}},
    });
    patch(&admin, "taint-full", &full).await?;
    for part in ["metadata", "spec"] {
        let Some(fields) = full[part].as_object() else { bail!("{part}") };
        for (field, is) in fields {
            let other = if part == "metadata" { metadata() } else { spec() };
            let other = other.into_iter().find(|(name, ..)| name == field).context("a listed field")?.2;
            for value in [Value::Null, other] {
                if value == *is {
                    continue;
                }
                // Include the permitted change, so that only this field is a reason to reject the patch.
                let mut change = json!({"spec": {"taints": [taint("other")]}});
                change[part][field] = value.clone();
                let answer = patch(&agent, "taint-full", &change).await;
                // The API server restores podCIDR from podCIDRs, so it accepts a removal without effect.
                let kept = member(&admin, "taint-full", part, field).await? == *is;
                ensure!(answer.is_err() || (field.starts_with("podCIDR") && kept), "{part}.{field}={value} is allowed");
            }
        }
    }
    patch(&admin, "taint-full", &json!({"spec": {"taints": full["spec"]["taints"]}})).await?;
    // A patch of the node does not change its status.
    let status = json!({"status": {"allocatable": {"cpu": "64"}}, "spec": {"taints": [taint("other")]}});
    patch(&agent, "taint-full", &status).await.context("removing the agent's own taint")?;
    ensure!(member(&admin, "taint-full", "spec", "taints").await?[0]["key"] == "other");
    ensure!(member(&admin, "taint-full", "status", "allocatable").await?["cpu"] != "64");
    Ok(())
}
