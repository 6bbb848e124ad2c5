//! What the agent may change in its Node: the startup taint, and no other field that the API server knows.

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

#[derive(Clone, Copy, Debug, PartialEq)]
enum Decided {
    /// The admission policy refuses a change.
    Fenced,
    /// The API server refuses a change, or drops it.
    Immutable,
    /// The agent takes its taint off here; other rows cover other taints.
    Taints,
    /// The API server writes it with each change, so the agent's change cannot be told from that.
    Bookkeeping,
}
use Decided::{Bookkeeping, Fenced, Immutable, Taints};

/// A value that a thief may set.
fn metadata() -> Vec<(&'static str, Decided, Value)> {
    vec![
        ("annotations", Fenced, json!({"evil": "1"})),
        ("creationTimestamp", Immutable, json!("2001-01-01T00:00:00Z")),
        ("deletionGracePeriodSeconds", Immutable, json!(7)),
        ("deletionTimestamp", Immutable, json!("2001-01-01T00:00:00Z")),
        ("finalizers", Fenced, json!(["evil.example/hold"])),
        ("generateName", Fenced, json!("evil-")),
        ("generation", Immutable, json!(77)),
        ("labels", Fenced, json!({"evil": "1"})),
        ("managedFields", Bookkeeping, json!([])),
        ("name", Immutable, json!("evil")),
        ("namespace", Immutable, json!("evil")),
        ("ownerReferences", Fenced, json!([owner("evil")])),
        ("resourceVersion", Immutable, json!("1")),
        ("selfLink", Immutable, json!("/evil")),
        ("uid", Immutable, json!("7b1b4a0c-0000-4000-8000-000000000000")),
    ]
}

fn spec() -> Vec<(&'static str, Decided, Value)> {
    vec![
        ("configSource", Immutable, json!({"configMap": {"name": "e", "namespace": "e", "kubeletConfigKey": "e"}})),
        ("externalID", Immutable, json!("evil")),
        ("podCIDR", Fenced, json!("10.77.0.0/24")),
        ("podCIDRs", Fenced, json!(["10.77.0.0/24"])),
        // Dropped while its feature gate is off, as by default; with it, the policy's walk over all fields covers it.
        ("podPreemptionPolicy", Immutable, json!({"disableResizePreemption": ["evil"]})),
        ("providerID", Fenced, json!("aws:///evil")),
        ("taints", Taints, json!([taint("evil")])),
        ("unschedulable", Fenced, json!(true)),
    ]
}

fn owner(name: &str) -> Value {
    json!({"apiVersion": "v1", "kind": "ConfigMap", "name": name, "uid": format!("uid-{name}")})
}

fn taint(key: &str) -> Value {
    json!({"key": key, "effect": "NoSchedule"})
}

/// One of its own: a test of the chart removes the component from the program's.
fn server() -> Result<&'static ApiServer> {
    static SERVER: OnceLock<Result<ApiServer>> = OnceLock::new();
    SERVER.get_or_init(ApiServer::another).as_ref().map_err(|error| anyhow!("{error:#}"))
}

/// Applies the component and returns clients of an administrator and of the agent on `node`.
async fn clients(node: &str) -> Result<(Client, Client)> {
    let server = server()?;
    let component = with(&["startup-taint"])?;
    let of_taint = |object: &&Value| object["metadata"]["name"] == "kirsa-startup-taint";
    let component: Vec<Value> = component.iter().filter(of_taint).cloned().collect();
    ensure!(component.len() == 4, "{component:?}");
    server.apply(&known(&component)).await?;
    let agent = client_of(&server.agent_kubeconfig("kirsa", "kirsa", node).await?).await?;
    let mut last = String::new();
    for round in 0..200 {
        last = match patch(&agent, node, &json!({"metadata": {"labels": {"probe": round.to_string()}}})).await {
            Err(error) if error.to_string().contains("kirsa-startup-taint") => {
                // What got through before the policy took effect.
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
async fn every_field_of_a_node_is_decided() -> Result<()> {
    let request = http::Request::get("/openapi/v3/api/v1").body(Vec::new())?;
    let openapi: Value = serde_json::from_str(&server()?.client().await?.request_text(request).await?)?;
    let fields = |schema: &str| -> Result<Vec<String>> {
        let properties = openapi["components"]["schemas"][schema]["properties"].as_object();
        Ok(properties.with_context(|| schema.to_owned())?.keys().cloned().collect())
    };
    // The node's status is a subresource; the test of a full node shows that it stays.
    let mut node = fields("io.k8s.api.core.v1.Node")?;
    node.sort();
    ensure!(node == ["apiVersion", "kind", "metadata", "spec", "status"], "{node:?}");
    for (schema, decided) in
        [("io.k8s.apimachinery.pkg.apis.meta.v1.ObjectMeta", metadata()), ("io.k8s.api.core.v1.NodeSpec", spec())]
    {
        for field in fields(schema)? {
            ensure!(decided.iter().any(|(name, ..)| *name == field), "{schema}: nobody decided about {field}");
        }
    }
    Ok(())
}

#[tokio::test]
async fn no_field_of_an_empty_node_can_be_set() -> Result<()> {
    let (admin, agent) = clients("taint-empty").await?;
    for (part, fields) in [("metadata", metadata()), ("spec", spec())] {
        for (field, decided, value) in fields {
            if decided == Bookkeeping {
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
            if decided != Immutable {
                let refused = answer.err().is_some_and(|error| error.to_string().contains("kirsa-startup-taint"));
                ensure!(refused, "{part}.{field} is not refused by the policy");
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
            let other = other.into_iter().find(|(name, ..)| name == field).context("decided")?.2;
            for value in [Value::Null, other] {
                if value == *is {
                    continue;
                }
                // With what the agent may do, so that nothing but this field is a reason to refuse.
                let mut change = json!({"spec": {"taints": [taint("other")]}});
                change[part][field] = value.clone();
                let answer = patch(&agent, "taint-full", &change).await;
                // The API server fills podCIDR from podCIDRs, and so allows a removal that is none.
                let kept = member(&admin, "taint-full", part, field).await? == *is;
                ensure!(answer.is_err() || (field.starts_with("podCIDR") && kept), "{part}.{field}={value} is allowed");
            }
        }
    }
    patch(&admin, "taint-full", &json!({"spec": {"taints": full["spec"]["taints"]}})).await?;
    // A patch of the node leaves its status as it is.
    let status = json!({"status": {"allocatable": {"cpu": "64"}}, "spec": {"taints": [taint("other")]}});
    patch(&agent, "taint-full", &status).await.context("the agent takes its own taint off")?;
    ensure!(member(&admin, "taint-full", "spec", "taints").await?[0]["key"] == "other");
    ensure!(member(&admin, "taint-full", "status", "allocatable").await?["cpu"] != "64");
    Ok(())
}
