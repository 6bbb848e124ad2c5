//! Whoever has stolen an agent's credential: the token of its pod, and any request that can be thought of.

use anyhow::{Context, Result};
use http::{Method, Request};
use http_body_util::BodyExt;
use kube::Client;
use kube::client::Body;
use lab::apiserver::{ApiServer, client_of};
use lab::poll::poll;
use serde_json::{Value, json};
use tokio::runtime::Runtime;

use crate::PATIENCE;
use crate::rights::Way;
use crate::site::{AUDIENCE, blocking, runtime};

pub(crate) struct Thief {
    runtime: Runtime,
    client: Client,
}

/// One request.
#[derive(Clone, Debug)]
pub(crate) struct Attempt {
    method: Method,
    path: String,
    body: Option<Value>,
    headers: Vec<(&'static str, String)>,
}

impl Thief {
    /// With the credential of the agent that has those rights and runs on `node`.
    pub(crate) fn of(server: &ApiServer, way: Way, node: &str) -> Result<Self> {
        Self::with(&blocking(server.agent_kubeconfig(way.namespace(), "kirsa", node))?)
    }

    pub(crate) fn with(kubeconfig: &std::path::Path) -> Result<Self> {
        let runtime = runtime();
        let client = runtime.block_on(client_of(kubeconfig))?;
        Ok(Self { runtime, client })
    }

    /// The status and what the API server says.
    pub(crate) fn try_to(&self, attempt: &Attempt) -> Result<(u16, String)> {
        let mut request = Request::builder().method(&attempt.method).uri(&attempt.path);
        let content = if attempt.method == Method::PATCH { "application/merge-patch+json" } else { "application/json" };
        request = request.header("content-type", content);
        for (name, value) in &attempt.headers {
            request = request.header(*name, value);
        }
        let body = attempt.body.as_ref().map(|body| body.to_string().into_bytes());
        let request = request.body(Body::from(body.unwrap_or_default()))?;
        self.runtime.block_on(async {
            let answer = self.client.send(request).await.with_context(|| format!("{attempt:?}"))?;
            let status = answer.status().as_u16();
            let body = answer.into_body().collect().await?.to_bytes();
            Ok((status, String::from_utf8_lossy(&body).into_owned()))
        })
    }

    /// The manifests were applied; the API server's authorizers and admission learn of that a moment later.
    pub(crate) fn wait_until_granted(server: &ApiServer, way: Way) -> Result<()> {
        let node = format!("first-{}", way.namespace());
        let thief = Self::of(server, way, &node)?;
        blocking(server.service_account(&node, "app", &[]))?;
        let uid = blocking(server.pod(&node, "app", "app", &node))?;
        let bound = Attempt::token(&node, "app", AUDIENCE, Some(("app", &uid)));
        let mut wanted = vec![(Attempt::get("/api/v1/serviceaccounts"), 200)];
        match way {
            Way::Impersonate => wanted.push((bound.in_name_of_node(&node), 201)),
            Way::Direct => wanted.push((bound, 201)),
            Way::Either | Way::Changing => wanted.extend([(bound.clone().in_name_of_node(&node), 201), (bound, 201)]),
            Way::Container => {
                let review =
                    json!({"apiVersion": "authentication.k8s.io/v1", "kind": "TokenReview", "spec": {"token": "x"}});
                let review = Attempt::post("/apis/authentication.k8s.io/v1/tokenreviews", review);
                wanted.extend([(bound.in_name_of_node(&node), 201), (review, 201)]);
            }
            Way::Neither => {}
        }
        if way.is_fenced()? {
            // Refused by the policy alone.
            let pod = json!({"apiVersion": "v1", "kind": "Pod", "name": "app", "uid": uid});
            let attempt = Attempt::token_with(&node, "app", json!({"audiences": [], "boundObjectRef": pod}));
            wanted.push((
                if matches!(way, Way::Impersonate | Way::Container) { attempt.in_name_of_node(&node) } else { attempt },
                403,
            ));
        }
        wanted.iter().try_for_each(|(attempt, status)| thief.wait_until(attempt, *status))
    }

    pub(crate) fn wait_until(&self, attempt: &Attempt, status: u16) -> Result<()> {
        poll(&format!("{status} for {attempt:?}"), PATIENCE, || match self.try_to(attempt) {
            Ok((got, _)) => (got == status).then_some(Ok(())),
            Err(error) => Some(Err(error)),
        })?
    }
}

impl Attempt {
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

    /// A TokenRequest, bound to a pod by name and UID or to nothing.
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

    pub(crate) fn in_name_of(self, user: &str) -> Self {
        self.header("impersonate-user", user)
    }

    pub(crate) fn in_name_of_node(self, node: &str) -> Self {
        self.in_name_of(&format!("system:node:{node}"))
    }

    pub(crate) fn header(mut self, name: &'static str, value: &str) -> Self {
        self.headers.push((name, value.into()));
        self
    }
}
