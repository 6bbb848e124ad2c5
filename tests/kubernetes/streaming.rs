//! Lists that are streamed, and API servers that stream none: before Kubernetes 1.34, or with the feature gate off.

use anyhow::{Context, Result, ensure};
use lab::agent::{Agent, Options};
use lab::apiserver::ApiServer;
use lab::net::Node;
use serde_json::Value;

use crate::site::{ROLE_ARN, Site, blocking, wait_for_metric};

fn lists_are_not_streamed(agent: &Agent) -> usize {
    let said = |entry: &&Value| entry["message"].to_string().contains("does not support streaming lists");
    agent.log().iter().filter(said).count()
}

#[test]
fn lists_are_streamed_where_the_api_server_can() -> Result<()> {
    let site = Site::new()?;
    let agent = site.start()?;
    ensure!(lists_are_not_streamed(&agent) == 0, "{:?}", agent.log());
    agent.stop()
}

#[test]
fn pods_and_service_accounts_are_read_from_an_api_server_that_streams_no_lists() -> Result<()> {
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
    ensure!(lists_are_not_streamed(&agent) == 2, "{:?}", agent.log());
    // What was listed, and what is told after that.
    wait_for_metric(&agent, "kirsa_indexed_pods", &[], 1.0)?;
    agent.wait_for_log(|entry| entry["message"] == "refused" && entry["pod"] == "before-0").context("its session")?;
    blocking(api.pod("default", "after-0", "before", node.name()))?;
    wait_for_metric(&agent, "kirsa_indexed_pods", &[], 2.0)?;
    agent.stop()
}
