//! Checks the API server: connectivity, version, clock, and which identity can mint tokens.

use std::{path::Path, time::Duration};

use anyhow::Context;
use http::{Request, StatusCode, header::DATE};
use http_body_util::BodyExt;
use kube::{Client, client::Body};
use serde_json::Value;

use super::{clock, finding::Finding, rbac};
use crate::{
    clock::UnixTime,
    exchange::sts::http_date,
    kubernetes::{ClientFactory, Identity, MintMode, MintPermissions},
};

const CHECK: &str = "api-server";
const MINTING: &str = "minting";
/// Deadline of the version request, which takes milliseconds on a healthy API server.
const TIMEOUT: Duration = Duration::from_secs(10);
const CONNECTIVITY: &str = "check API-server health and this node's connectivity to it (KUBERNETES_SERVICE_HOST, \
                            firewalls, its certificate), or check --kubeconfig";

/// A reachable API server.
pub(super) struct Cluster {
    pub kubernetes: ClientFactory,
    /// Identity that may mint tokens.
    pub identity: Option<Identity>,
}

/// Returns the findings, and the API server if it is reachable.
pub(super) async fn check(
    node: &str,
    kubeconfig: Option<&Path>,
    mint: MintMode,
    components: rbac::Components,
) -> (Vec<Finding>, Option<Cluster>) {
    let connect = async {
        let kubernetes = ClientFactory::new(kubeconfig, node.to_owned()).await?;
        let client = kubernetes.call_client(Identity::Agent)?;
        let version = tokio::time::timeout(TIMEOUT, version(&client)).await;
        let version = version.with_context(|| format!("no response within {TIMEOUT:?}"))??;
        anyhow::Ok((kubernetes, client, version))
    };
    let (kubernetes, client, (version, time)) = match connect.await {
        Ok(connected) => connected,
        Err(error) => return (vec![Finding::failed(CHECK, format!("{error:#}"), CONNECTIVITY)], None),
    };
    let mut findings = vec![
        Finding::ok(CHECK, format!("reachable, version {version}")),
        clock::check("clock-api-server", "the API server", time, UnixTime::now()),
    ];
    let identity = match MintPermissions::query(&client).await.map(|granted| granted.identity(mint)) {
        Ok(Ok(identity)) => {
            findings.push(Finding::ok(
                MINTING,
                match identity {
                    Identity::Node => {
                        format!("impersonating node {node}: the API server limits the agent to this node's pods")
                    }
                    Identity::Agent => {
                        "direct: the API server does not check that a pod is on this node (SECURITY.md)".into()
                    }
                },
            ));
            Some(identity)
        }
        Ok(Err(error)) => {
            let fix = "apply that component of daemonset/, or set the other --minting";
            findings.push(Finding::failed(MINTING, error.to_string(), fix));
            None
        }
        Err(error) => {
            let fix = "restart the agent, since its own token may have been revoked, or set another --kubeconfig";
            findings.push(Finding::failed(MINTING, format!("{error:#}"), fix));
            return (findings, None);
        }
    };
    findings.extend(rbac::check(&client, identity, components).await);
    (findings, Some(Cluster { kubernetes, identity }))
}

async fn version(client: &Client) -> anyhow::Result<(String, Option<UnixTime>)> {
    let response = client.send(Request::get("/version").body(Body::empty())?).await?;
    let time = response.headers().get(DATE).and_then(|date| http_date(date.to_str().ok()?));
    let (head, body) = response.into_parts();
    anyhow::ensure!(head.status == StatusCode::OK, "GET /version: {}", head.status);
    let body: Value = serde_json::from_slice(&body.collect().await?.to_bytes()).context("GET /version")?;
    Ok((body["gitVersion"].as_str().context("GET /version: no gitVersion")?.to_owned(), time))
}
