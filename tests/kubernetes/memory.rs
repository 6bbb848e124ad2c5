//! Memory that a tenant can make an agent hold: none for service accounts that no pod of the node uses, and none for
//! annotations that the agent does not read.

use std::fs;

use anyhow::{Context, Result, ensure};
use futures::{StreamExt, TryStreamExt, stream};
use k8s_openapi::api::core::v1::{Pod, ServiceAccount};
use kube::Api;
use kube::api::{Patch, PatchParams, PostParams};
use lab::agent::{Agent, Options};
use lab::apiserver::ApiServer;
use lab::net::Node;
use serde_json::{Value, json};

use crate::site::{ROLE_ARN, blocking, wait_for_metric};

/// Accounts of one tenant. The agent reads up to 24 KiB of each: all of them have 94 MiB.
const ACCOUNTS: usize = 4_000;
const CHANGES: usize = 500;
/// Maximum of the agent's anonymous memory, in KiB, as docs/capacity.md states it.
const BOUND: u64 = 24 << 10;
/// Concurrent requests of the tenant.
const AT_ONCE: usize = 16;

/// Each annotation that the agent reads, with its maximum length, but a role that is right.
fn annotations() -> Value {
    let long = "x".repeat(2_048);
    json!({
        ROLE_ARN: "arn:aws:iam::111122223333:role/tenant",
        "eks.amazonaws.com/audience": long,
        "eks.amazonaws.com/token-expiration": long,
        "eks.amazonaws.com/sts-regional-endpoints": long,
        "kirsa.dev/session-duration": long,
        "kirsa.dev/session-scope": long,
        "kirsa.dev/session-policy": long,
        "kirsa.dev/session-policy-arns": "x".repeat(8_192),
        "kirsa.dev/require-imdsv2": long,
    })
}

/// The shortest annotations, as many as the API server takes: 256 KiB of names.
fn five_byte_annotations() -> Value {
    (0..52_000).map(|number| (format!("{number:05}"), json!(""))).collect()
}

async fn create(api: &ApiServer, count: usize, annotations: &Value, at_once: usize) -> Result<()> {
    let accounts: Api<ServiceAccount> = Api::namespaced(api.client().await?, "tenant");
    stream::iter(0..count)
        .map(|number| {
            let metadata = json!({"name": format!("account-{number}"), "annotations": annotations});
            let account = serde_json::from_value(json!({"metadata": metadata}));
            let accounts = accounts.clone();
            async move { accounts.create(&PostParams::default(), &account?).await.map(drop).context("an account") }
        })
        .buffer_unordered(at_once)
        .try_collect()
        .await
}

/// Has the watch of every agent show some of the accounts once more.
async fn change(api: &ApiServer) -> Result<()> {
    let accounts: Api<ServiceAccount> = Api::namespaced(api.client().await?, "tenant");
    let change = Patch::Merge(json!({"metadata": {"annotations": {"kirsa.dev/session-scope": "y".repeat(2_048)}}}));
    stream::iter(0..CHANGES)
        .map(|number| {
            let (accounts, change) = (accounts.clone(), &change);
            async move {
                let name = format!("account-{number}");
                accounts.patch(&name, &PatchParams::default(), change).await.map(drop).context("a change")
            }
        })
        .buffer_unordered(AT_ONCE)
        .try_collect()
        .await
}

/// Current and peak anonymous memory, in KiB. The peak is of all memory: pages of the binary are subtracted.
fn memory(agent: &Agent) -> Result<(u64, u64)> {
    let status = fs::read_to_string(format!("/proc/{}/status", agent.process().id()))?;
    let value = |name: &str| {
        let line = status.lines().find_map(|line| line.strip_prefix(name)).with_context(|| name.to_owned())?;
        anyhow::Ok(line.split_whitespace().next().context("a number")?.parse::<u64>()?)
    };
    Ok((value("RssAnon:")?, value("VmHWM:")?.saturating_sub(value("RssFile:")?)))
}

fn is_bounded(agent: &Agent, when: &str) -> Result<()> {
    let (now, peak) = memory(agent)?;
    println!("{when}: {now} KiB, at most {peak} KiB");
    ensure!(now <= BOUND && peak <= BOUND, "{when}: {now} KiB, at most {peak} KiB");
    Ok(())
}

/// The session of a pod whose account has a role is fetched; STS is away.
fn is_fetched_for(agent: &Agent, pod: &str) -> Result<()> {
    agent.wait_for_log(|entry| entry["message"] == "refused" && entry["pod"] == pod).map(drop)
}

fn stays_bounded(flags: &[&str]) -> Result<()> {
    let api = ApiServer::another_with(flags)?;
    let node = Node::new()?;
    let role = [(ROLE_ARN, "arn:aws:iam::111122223333:role/own")];
    blocking(async {
        api.namespace("tenant").await?;
        for name in ["before", "after"] {
            api.service_account("default", name, &role).await?;
        }
        api.pod("default", "before-0", "before", node.name()).await?;
        create(&api, ACCOUNTS, &annotations(), AT_ONCE).await
    })?;
    let options = Options::new(env!("CARGO_BIN_EXE_kirsa"))
        .flag("--kubeconfig", api.admin_kubeconfig())
        .flag("--sts-endpoint-url", "http://127.0.0.1:9");
    let agent = Agent::start(&node, &options)?;
    is_fetched_for(&agent, "before-0")?;
    is_bounded(&agent, "after the list")?;

    blocking(change(&api))?;
    // The watch showed this account before, when no pod of this node used it.
    blocking(api.pod("default", "after-0", "after", node.name()))?;
    is_fetched_for(&agent, "after-0")?;
    // Of a pod that uses one of them, one is kept.
    blocking(api.pod("tenant", "tenant-0", "account-0", node.name()))?;
    wait_for_metric(&agent, "kirsa_indexed_pods", &[], 3.0)?;
    is_bounded(&agent, "after the changes")?;
    agent.stop()
}

/// Each of these lists alone is several times the bound: an API server that does not stream sends it as one body.
#[test]
fn listed_annotations_take_no_memory() -> Result<()> {
    const ACCOUNTS: usize = 20;
    const PODS: usize = 10;
    let api = ApiServer::another_with(&["--feature-gates=WatchList=false"])?;
    let node = Node::new()?;
    let annotations = five_byte_annotations();
    blocking(async {
        api.namespace("tenant").await?;
        create(&api, ACCOUNTS, &annotations, 2).await?;
        api.service_account("default", "own", &[(ROLE_ARN, "arn:aws:iam::111122223333:role/own")]).await?;
        let pods: Api<Pod> = Api::namespaced(api.client().await?, "default");
        let change = Patch::Merge(json!({"metadata": {"annotations": annotations}}));
        for number in 0..PODS {
            let name = format!("pod-{number}");
            api.pod("default", &name, "own", node.name()).await?;
            pods.patch(&name, &PatchParams::default(), &change).await?;
        }
        anyhow::Ok(())
    })?;
    let options = Options::new(env!("CARGO_BIN_EXE_kirsa"))
        .flag("--kubeconfig", api.admin_kubeconfig())
        .flag("--sts-endpoint-url", "http://127.0.0.1:9");
    let agent = Agent::start(&node, &options)?;
    wait_for_metric(&agent, "kirsa_indexed_pods", &[], PODS as f64)?;
    is_bounded(&agent, "after the list")?;
    agent.stop()
}

#[test]
fn streamed_accounts_of_others_take_no_memory() -> Result<()> {
    stays_bounded(&[])
}

#[test]
fn listed_accounts_of_others_take_no_memory() -> Result<()> {
    stays_bounded(&["--feature-gates=WatchList=false"])
}
