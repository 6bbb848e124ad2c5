//! The API server: reachable, which version, what time it has, and which way of minting is to be gone.

use std::{path::Path, time::Duration};

use anyhow::Context;
use http::{Request, StatusCode, header::DATE};
use http_body_util::BodyExt;
use kube::{Client, client::Body};
use serde_json::Value;

use super::{clock, finding::Finding, rights};
use crate::{
    clock::UnixTime,
    exchange::sts::http_date,
    kubernetes::{ClientFactory, Identity, MintMode, MintPermissions},
};

const CHECK: &str = "api-server";
const MINTING: &str = "minting";
/// Its own calls take milliseconds.
const WAIT: Duration = Duration::from_secs(10);
const REACH: &str = "check the way from this node to the API server (KUBERNETES_SERVICE_HOST, a firewall, its \
                     certificate), or --kubeconfig";

/// The API server as the agent reaches it.
pub(super) struct Cluster {
    pub kubernetes: ClientFactory,
    /// In whose name tokens are minted, if in any.
    pub identity: Option<Identity>,
}

/// Also returns the API server itself, if it answered.
pub(super) async fn check(
    node: &str,
    kubeconfig: Option<&Path>,
    mint: MintMode,
    parts: rights::Parts,
) -> (Vec<Finding>, Option<Cluster>) {
    let reached = async {
        let kubernetes = ClientFactory::new(kubeconfig, node.to_owned()).await?;
        let client = kubernetes.call_client(Identity::Agent)?;
        let answer = tokio::time::timeout(WAIT, version(&client)).await.context("no answer")??;
        anyhow::Ok((kubernetes, client, answer))
    };
    let (kubernetes, client, (version, time)) = match reached.await {
        Ok(reached) => reached,
        Err(error) => return (vec![Finding::failed(CHECK, format!("{error:#}"), REACH)], None),
    };
    let mut findings = vec![
        Finding::ok(CHECK, format!("answers, version {version}")),
        clock::check("clock-api-server", "the API server", time, UnixTime::now()),
    ];
    let identity = match MintPermissions::query(&client).await.map(|granted| granted.identity(mint)) {
        Ok(Ok(identity)) => {
            findings.push(Finding::ok(
                MINTING,
                match identity {
                    Identity::Node => format!("impersonating node {node}: the API server keeps the agent to its pods"),
                    Identity::Agent => {
                        "direct: the API server does not check that a pod is on this node (SECURITY.md)".into()
                    }
                },
            ));
            Some(identity)
        }
        Ok(Err(error)) => {
            let fix = "apply that component of daemonset/, or choose the other --minting";
            findings.push(Finding::failed(MINTING, error.to_string(), fix));
            None
        }
        Err(error) => {
            let fix = "the agent's own token may have been revoked: restart it, or give another --kubeconfig";
            findings.push(Finding::failed(MINTING, format!("{error:#}"), fix));
            return (findings, None);
        }
    };
    findings.extend(rights::check(&client, identity, parts).await);
    (findings, Some(Cluster { kubernetes, identity }))
}

async fn version(client: &Client) -> anyhow::Result<(String, Option<UnixTime>)> {
    let answer = client.send(Request::get("/version").body(Body::empty())?).await?;
    let time = answer.headers().get(DATE).and_then(|date| http_date(date.to_str().ok()?));
    let (head, body) = answer.into_parts();
    anyhow::ensure!(head.status == StatusCode::OK, "GET /version: {}", head.status);
    let body: Value = serde_json::from_slice(&body.collect().await?.to_bytes()).context("GET /version")?;
    Ok((body["gitVersion"].as_str().context("GET /version: no gitVersion")?.to_owned(), time))
}
