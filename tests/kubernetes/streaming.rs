//! Streaming lists (`WatchList`), and API servers without them: before Kubernetes 1.34, or with the feature gate off.

use anyhow::{Context, Result, ensure};
use lab::agent::{Agent, Options};
use lab::apiserver::ApiServer;
use lab::net::Node;
use serde_json::Value;

use crate::site::{ROLE_ARN, Site, blocking, wait_for_metric};

fn fallbacks(agent: &Agent) -> usize {
    let is_fallback = |entry: &&Value| entry["message"].to_string().contains("does not support streaming lists");
    agent.log().iter().filter(is_fallback).count()
}

#[test]
fn lists_are_streamed_if_supported() -> Result<()> {
    let site = Site::new()?;
    let agent = site.start()?;
    ensure!(fallbacks(&agent) == 0, "{:?}", agent.log());
    agent.stop()
}

#[test]
fn lists_are_read_without_streaming_support() -> Result<()> {
    let api = ApiServer::another_with(&["--feature-gates=WatchList=false"])?;
    let node = Node::new()?;
    blocking(async {
        api.namespace("default").await?;
        let role = [(ROLE_ARN, "arn:aws:iam::111122223333:role/before")];
        api.service_account("default", "before", &role).await?;
        api.pod("default", "before-0", "before", node.name()).await
    })?;
    let options = Options::new(env!("CARGO_BIN_EXE_kirsa"))
        .flag("--kubeconfig", api.admin_kubeconfig())
        .flag("--sts-endpoint-url", "http://127.0.0.1:9");
    let agent = Agent::start(&node, &options)?;
    ensure!(fallbacks(&agent) == 2, "{:?}", agent.log());
    // The listed pod, and one that the watch reports later.
    wait_for_metric(&agent, "kirsa_indexed_pods", &[], 1.0)?;
    agent.wait_for_log(|entry| entry["message"] == "refused" && entry["pod"] == "before-0").context("its session")?;
    blocking(api.pod("default", "after-0", "before", node.name()))?;
    wait_for_metric(&agent, "kirsa_indexed_pods", &[], 2.0)?;
    agent.stop()
}
