//! Bounds on the agent's memory: a tenant's service accounts without pods on the node, and unread annotations, take
//! none.

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

/// Service accounts of the tenant: up to 24 KiB of relevant annotations each, 94 MiB in total.
const ACCOUNTS: usize = 4_000;
const CHANGES: usize = 500;
/// Maximum of the agent's anonymous memory, in KiB, as docs/capacity.md states it.
const BOUND: u64 = 24 << 10;
/// Concurrent requests of the tenant.
const CONCURRENCY: usize = 16;

/// Returns every annotation that the agent reads, with its maximum length and a valid role.
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

/// Returns the shortest annotations, as many as the API server accepts: 256 KiB of names.
fn five_byte_annotations() -> Value {
    (0..52_000).map(|number| (format!("{number:05}"), json!(""))).collect()
}

async fn create(api: &ApiServer, count: usize, annotations: &Value, concurrency: usize) -> Result<()> {
    let accounts: Api<ServiceAccount> = Api::namespaced(api.client().await?, "tenant");
    stream::iter(0..count)
        .map(|number| {
            let metadata = json!({"name": format!("account-{number}"), "annotations": annotations});
            let account = serde_json::from_value(json!({"metadata": metadata}));
            let accounts = accounts.clone();
            async move { accounts.create(&PostParams::default(), &account?).await.map(drop).context("an account") }
        })
        .buffer_unordered(concurrency)
        .try_collect()
        .await
}

/// Changes some of the accounts, so that every agent's watch receives them again.
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
        .buffer_unordered(CONCURRENCY)
        .try_collect()
        .await
}

/// Returns current and peak anonymous memory, in KiB. The kernel reports the peak of all memory; this subtracts the
/// pages of the binary.
fn memory(agent: &Agent) -> Result<(u64, u64)> {
    let status = fs::read_to_string(format!("/proc/{}/status", agent.process().id()))?;
    let value = |name: &str| {
        let line = status.lines().find_map(|line| line.strip_prefix(name)).with_context(|| name.to_owned())?;
        anyhow::Ok(line.split_whitespace().next().context("a number")?.parse::<u64>()?)
    };
    Ok((value("RssAnon:")?, value("VmHWM:")?.saturating_sub(value("RssFile:")?)))
}

fn assert_bounded(agent: &Agent, when: &str) -> Result<()> {
    let (now, peak) = memory(agent)?;
    println!("{when}: {now} KiB, at most {peak} KiB");
    ensure!(now <= BOUND && peak <= BOUND, "{when}: {now} KiB, at most {peak} KiB");
    Ok(())
}

/// Waits until the pod's session is prefetched, which is refused because STS is unreachable.
fn wait_for_prefetch(agent: &Agent, pod: &str) -> Result<()> {
    agent.wait_for_log(|entry| entry["message"] == "refused" && entry["pod"] == pod).map(drop)
}

fn assert_stays_bounded(flags: &[&str]) -> Result<()> {
    let api = ApiServer::another_with(flags)?;
    let node = Node::new()?;
    let role = [(ROLE_ARN, "arn:aws:iam::111122223333:role/own")];
    blocking(async {
        api.namespace("tenant").await?;
        for name in ["before", "after"] {
            api.service_account("default", name, &role).await?;
        }
        api.pod("default", "before-0", "before", node.name()).await?;
        create(&api, ACCOUNTS, &annotations(), CONCURRENCY).await
    })?;
    let options = Options::new(env!("CARGO_BIN_EXE_kirsa"))
        .flag("--kubeconfig", api.admin_kubeconfig())
        .flag("--sts-endpoint-url", "http://127.0.0.1:9");
    let agent = Agent::start(&node, &options)?;
    wait_for_prefetch(&agent, "before-0")?;
    assert_bounded(&agent, "after the list")?;

    blocking(change(&api))?;
    // The watch reported this account earlier, when no pod of this node used it.
    blocking(api.pod("default", "after-0", "after", node.name()))?;
    wait_for_prefetch(&agent, "after-0")?;
    // One account is kept for a pod that uses it.
    blocking(api.pod("tenant", "tenant-0", "account-0", node.name()))?;
    wait_for_metric(&agent, "kirsa_indexed_pods", &[], 3.0)?;
    assert_bounded(&agent, "after the changes")?;
    agent.stop()
}

/// Each list is several times the bound: an API server without streaming lists sends it as one response.
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
    assert_bounded(&agent, "after the list")?;
    agent.stop()
}

#[test]
fn streamed_foreign_accounts_take_no_memory() -> Result<()> {
    assert_stays_bounded(&[])
}

#[test]
fn listed_foreign_accounts_take_no_memory() -> Result<()> {
    assert_stays_bounded(&["--feature-gates=WatchList=false"])
}
