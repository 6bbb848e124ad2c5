//! A client of the API server that sends arbitrary requests with an agent's token, as an attacker with a stolen one.

use anyhow::{Context, Result};
use http::{Method, Request};
use http_body_util::BodyExt;
use kube::Client;
use kube::client::Body;
use lab::apiserver::{ApiServer, client_of};
use lab::poll::poll;
use serde_json::{Value, json};
use tokio::runtime::Runtime;

use crate::TIMEOUT;
use crate::rights::AgentRights;
use crate::site::{AUDIENCE, blocking, runtime};

pub(crate) struct RawClient {
    runtime: Runtime,
    client: Client,
}

/// A request to the API server.
#[derive(Clone, Debug)]
pub(crate) struct ApiRequest {
    method: Method,
    path: String,
    body: Option<Value>,
    headers: Vec<(&'static str, String)>,
}

impl RawClient {
    /// Creates a client with the token of the agent that has these rights and runs on `node`.
    pub(crate) fn for_agent(server: &ApiServer, rights: AgentRights, node: &str) -> Result<Self> {
        Self::new(&blocking(server.agent_kubeconfig(rights.namespace(), "kirsa", node))?)
    }

    pub(crate) fn new(kubeconfig: &std::path::Path) -> Result<Self> {
        let runtime = runtime();
        let client = runtime.block_on(client_of(kubeconfig))?;
        Ok(Self { runtime, client })
    }

    /// Returns the response's status and body.
    pub(crate) fn send(&self, request: &ApiRequest) -> Result<(u16, String)> {
        let mut http = Request::builder().method(&request.method).uri(&request.path);
        let content = if request.method == Method::PATCH { "application/merge-patch+json" } else { "application/json" };
        http = http.header("content-type", content);
        for (name, value) in &request.headers {
            http = http.header(*name, value);
        }
        let body = request.body.as_ref().map(|body| body.to_string().into_bytes());
        let http = http.body(Body::from(body.unwrap_or_default()))?;
        self.runtime.block_on(async {
            let response = self.client.send(http).await.with_context(|| format!("{request:?}"))?;
            let status = response.status().as_u16();
            let body = response.into_body().collect().await?.to_bytes();
            Ok((status, String::from_utf8_lossy(&body).into_owned()))
        })
    }

    /// Waits until the API server's authorizers and admission plugins apply the manifests.
    pub(crate) fn wait_for_rights(server: &ApiServer, rights: AgentRights) -> Result<()> {
        let node = format!("first-{}", rights.namespace());
        let client = Self::for_agent(server, rights, &node)?;
        blocking(server.service_account(&node, "app", &[]))?;
        let uid = blocking(server.pod(&node, "app", "app", &node))?;
        let bound = ApiRequest::token(&node, "app", AUDIENCE, Some(("app", &uid)));
        let mut expected = vec![(ApiRequest::get("/api/v1/serviceaccounts"), 200)];
        match rights {
            AgentRights::Impersonation => expected.push((bound.impersonate_node(&node), 201)),
            AgentRights::Direct => expected.push((bound, 201)),
            AgentRights::BothModes | AgentRights::Revocable => {
                expected.extend([(bound.clone().impersonate_node(&node), 201), (bound, 201)])
            }
            AgentRights::ContainerCredentials => {
                let review =
                    json!({"apiVersion": "authentication.k8s.io/v1", "kind": "TokenReview", "spec": {"token": "x"}});
                let review = ApiRequest::post("/apis/authentication.k8s.io/v1/tokenreviews", review);
                expected.extend([(bound.impersonate_node(&node), 201), (review, 201)]);
            }
            AgentRights::NoMinting => {}
        }
        if rights.has_admission_policy()? {
            // Only the admission policy rejects this request.
            let pod = json!({"apiVersion": "v1", "kind": "Pod", "name": "app", "uid": uid});
            let request = ApiRequest::token_with(&node, "app", json!({"audiences": [], "boundObjectRef": pod}));
            expected.push((
                if matches!(rights, AgentRights::Impersonation | AgentRights::ContainerCredentials) {
                    request.impersonate_node(&node)
                } else {
                    request
                },
                403,
            ));
        }
        expected.iter().try_for_each(|(request, status)| client.wait_until(request, *status))
    }

    pub(crate) fn wait_until(&self, request: &ApiRequest, status: u16) -> Result<()> {
        poll(&format!("{status} for {request:?}"), TIMEOUT, || match self.send(request) {
            Ok((got, _)) => (got == status).then_some(Ok(())),
            Err(error) => Some(Err(error)),
        })?
    }
}

impl ApiRequest {
    fn new(method: Method, path: &str, body: Option<Value>) -> Self {
        Self { method, path: path.into(), body, headers: Vec::new() }
    }

    pub(crate) fn get(path: &str) -> Self {
        Self::new(Method::GET, path, None)
    }

    pub(crate) fn delete(path: &str) -> Self {
        Self::new(Method::DELETE, path, None)
    }

    pub(crate) fn post(path: &str, body: Value) -> Self {
        Self::new(Method::POST, path, Some(body))
    }

    pub(crate) fn patch(path: &str, body: Value) -> Self {
        Self::new(Method::PATCH, path, Some(body))
    }

    /// Creates a TokenRequest, bound to a pod by name and UID, or unbound.
    pub(crate) fn token(namespace: &str, account: &str, audience: &str, pod: Option<(&str, &str)>) -> Self {
        let bound = pod.map(|(name, uid)| json!({"apiVersion": "v1", "kind": "Pod", "name": name, "uid": uid}));
        Self::token_with(
            namespace,
            account,
            json!({"audiences": [audience], "expirationSeconds": 600, "boundObjectRef": bound}),
        )
    }

    pub(crate) fn token_with(namespace: &str, account: &str, spec: Value) -> Self {
        let body = json!({"apiVersion": "authentication.k8s.io/v1", "kind": "TokenRequest", "spec": spec});
        Self::post(&format!("/api/v1/namespaces/{namespace}/serviceaccounts/{account}/token"), body)
    }

    pub(crate) fn impersonate(self, user: &str) -> Self {
        self.header("impersonate-user", user)
    }

    pub(crate) fn impersonate_node(self, node: &str) -> Self {
        self.impersonate(&format!("system:node:{node}"))
    }

    pub(crate) fn header(mut self, name: &'static str, value: &str) -> Self {
        self.headers.push((name, value.into()));
        self
    }
}
