//! Tests, request by request, what an attacker with an agent's stolen token can do at a real API server, in both
//! minting modes.

mod requests;
mod tokens;

use std::collections::BTreeSet;

use anyhow::{Context, Result, ensure};
use k8s_openapi::api::core::v1::Pod;
use lab::apiserver::{ApiServer, ISSUER};
use serde_json::{Value, json};

use crate::raw_client::{ApiRequest, RawClient};
use crate::rights::{AgentRights, api_server};
use crate::site::{AUDIENCE, blocking};

/// An agent's token, and the UIDs of pods that an attacker could target: one per node, a kube-system pod on the other
/// node, and the agent's own pod.
struct StolenToken {
    api: &'static ApiServer,
    client: RawClient,
    rights: AgentRights,
    namespace: String,
    own: String,
    other: String,
    system: String,
    agent: String,
}

/// An attack, its request, and the expected status with impersonation and with direct minting.
struct Attack(&'static str, ApiRequest, [u16; 2]);

impl StolenToken {
    fn new(rights: AgentRights, name: &str) -> Result<Self> {
        let api = api_server()?;
        let namespace = format!("{name}-{}", rights.namespace());
        let (own_node, other_node) = (format!("{namespace}-own"), format!("{namespace}-other"));
        let client = RawClient::for_agent(api, rights, &own_node)?;
        let create_pod = |namespace: &str, name: &str, node: &str| {
            blocking(async {
                api.node(node).await?;
                api.service_account(namespace, name, &[]).await?;
                api.pod(namespace, name, name, node).await
            })
        };
        let agent = blocking(api.read::<Pod>(rights.namespace(), &format!("kirsa-{own_node}")))?;
        Ok(Self {
            own: create_pod(&namespace, "own", &own_node)?,
            other: create_pod(&namespace, "other", &other_node)?,
            system: create_pod("kube-system", &namespace, &other_node)?,
            agent: agent.and_then(|pod| pod.metadata.uid).context("the agent's pod")?,
            api,
            client,
            rights,
            namespace,
        })
    }

    fn node(&self) -> String {
        format!("{}-own", self.namespace)
    }

    /// Sends the request as the user that mints tokens.
    fn as_minter(&self, request: ApiRequest) -> ApiRequest {
        if self.rights == AgentRights::Impersonation { request.impersonate_node(&self.node()) } else { request }
    }

    fn assert_statuses(&self, attacks: &[Attack]) -> Result<()> {
        let mut wrong = Vec::new();
        for Attack(what, request, expected) in attacks {
            let expected = expected[usize::from(self.rights == AgentRights::Direct)];
            let (status, body) = self.client.send(request)?;
            if status != expected {
                let body: String = body.chars().take(300).collect();
                wrong.push(format!("{what}: {status}, not {expected}: {body}"));
            }
        }
        ensure!(wrong.is_empty(), "{:?}\n{}", self.rights, wrong.join("\n"));
        Ok(())
    }
}

#[test]
fn tokens_are_limited_to_node_pods_and_sts() -> Result<()> {
    for rights in AgentRights::EACH_MODE {
        let stolen = StolenToken::new(rights, "tokens")?;
        // The Node authorizer may not know the pod yet.
        stolen.client.wait_until(&tokens::for_own_pod(&stolen), 201)?;
        stolen.assert_statuses(&tokens::attacks(&stolen)?)?;
    }
    Ok(())
}

#[test]
fn only_node_pods_and_accounts_are_readable() -> Result<()> {
    for rights in AgentRights::EACH_MODE {
        let stolen = StolenToken::new(rights, "requests")?;
        stolen.assert_statuses(&requests::pods(&stolen))?;
        stolen.assert_statuses(&requests::forbidden(&stolen))?;
    }
    Ok(())
}

/// Compares the API server's own list of rights with those that every service account has.
#[test]
fn agent_has_exactly_these_rights() -> Result<()> {
    let common: &[&str] = &["serviceaccounts: get list watch"];
    for (rights, own) in [
        (
            AgentRights::Impersonation,
            &[
                "nodes: impersonate:associated-node",
                "pods: impersonate-on:associated-node:list impersonate-on:associated-node:watch",
                "serviceaccounts/token: impersonate-on:associated-node:create",
            ][..],
        ),
        (AgentRights::Direct, &["pods: list watch", "serviceaccounts/token: create"][..]),
        (AgentRights::NoMinting, &[][..]),
    ] {
        let common_rules = rules(&unprivileged()?)?;
        let client = RawClient::for_agent(api_server()?, rights, &format!("rights-{}", rights.namespace()))?;
        let rules: BTreeSet<String> = rules(&client)?.difference(&common_rules).cloned().collect();
        let expected = common.iter().chain(own).map(|rule| (*rule).to_owned()).collect();
        ensure!(rules == expected, "{rights:?}: {rules:#?}");
    }
    Ok(())
}

/// The token in the agent's pod is bound to its node; an unbound token of the account has fewer rights.
#[test]
fn agent_token_without_node_mints_nothing() -> Result<()> {
    for rights in AgentRights::EACH_MODE {
        let stolen = StolenToken::new(rights, "unbound")?;
        let admin = RawClient::new(stolen.api.admin_kubeconfig())?;
        let spec = json!({"audiences": [], "expirationSeconds": 600});
        let token = token_in(&admin.send(&ApiRequest::token_with(rights.namespace(), "kirsa", spec))?)?;
        let kubeconfig = stolen.api.token_kubeconfig(&stolen.namespace, &token)?;
        let client = RawClient::new(&kubeconfig)?;
        let request = tokens::for_own_pod(&stolen);
        let (status, body) = client.send(&request)?;
        ensure!(status == 403, "{rights:?}: {status} {body}");
        stolen.client.wait_until(&request, 201)?;
    }
    Ok(())
}

/// The API server rejects a minted token, even as its own service account.
#[test]
fn minted_token_is_useless_in_cluster() -> Result<()> {
    for rights in AgentRights::EACH_MODE {
        let stolen = StolenToken::new(rights, "minted")?;
        let request = tokens::for_own_pod(&stolen);
        stolen.client.wait_until(&request, 201)?;
        let token = token_in(&stolen.client.send(&request)?)?;
        let kubeconfig = stolen.api.token_kubeconfig(&stolen.namespace, &token)?;
        let (status, body) = RawClient::new(&kubeconfig)?.send(&ApiRequest::get("/api"))?;
        ensure!(status == 401, "{rights:?}: {status} {body}");
    }
    Ok(())
}

/// Returns a client with the token of a service account that has no role bindings.
fn unprivileged() -> Result<RawClient> {
    let api = api_server()?;
    let uid = blocking(async {
        api.node("unprivileged").await?;
        api.service_account("unprivileged", "unprivileged", &[]).await?;
        match api.read::<Pod>("unprivileged", "unprivileged").await? {
            Some(pod) => pod.metadata.uid.context("a UID"),
            None => api.pod("unprivileged", "unprivileged", "unprivileged", "unprivileged").await,
        }
    })?;
    let token = blocking(api.token("unprivileged", "unprivileged", ("unprivileged", &uid), None))?;
    RawClient::new(&api.token_kubeconfig("unprivileged", &token)?)
}

/// Returns the client's rights, each as `resource: verb verb …`.
fn rules(client: &RawClient) -> Result<BTreeSet<String>> {
    let review = json!({
        "apiVersion": "authorization.k8s.io/v1",
        "kind": "SelfSubjectRulesReview",
        "spec": {"namespace": "default"},
    });
    let (status, body) =
        client.send(&ApiRequest::post("/apis/authorization.k8s.io/v1/selfsubjectrulesreviews", review))?;
    ensure!(status == 201, "{body}");
    let review: Value = serde_json::from_str(&body)?;
    let words = |value: &Value| -> Vec<String> {
        value.as_array().into_iter().flatten().filter_map(Value::as_str).map(str::to_owned).collect()
    };
    let rules = review["status"]["resourceRules"].as_array().context("rules")?;
    Ok(rules
        .iter()
        .map(|rule| format!("{}: {}", words(&rule["resources"]).join(" "), words(&rule["verbs"]).join(" ")))
        .collect())
}

fn token_in((status, body): &(u16, String)) -> Result<String> {
    ensure!(*status == 201, "{status} {body}");
    let response: Value = serde_json::from_str(body)?;
    Ok(response["status"]["token"].as_str().context("a token")?.into())
}
