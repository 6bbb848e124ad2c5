//! What the agent's own token is worth to a thief: everything that it must not do, tried with it.

use std::time::Duration;

use anyhow::{Context as _, ensure};
use http::Request;
use kube::{Client, client::Body};
use serde_json::{Value, json};

use super::Scale;
use crate::{
    cluster::{Cluster, NAMESPACE},
    pods::Job,
};

const OWN_PODS: &str = "/api/v1/pods?fieldSelector=spec.nodeName%3Dnode1";
const AUDIENCE: &str = "sts.amazonaws.com";
const API_AUDIENCE: &str = "https://kubernetes.default.svc.cluster.local";
/// Where the manifests that mint directly instead are.
const DIRECT: &str = "tests/cluster/overlay-direct";
const IMPERSONATION: &str = "daemonset/components/constrained-impersonation/rbac.yaml";

/// One attempt: what it is, the request, whom it impersonates, and the statuses that are right.
type Row = (&'static str, &'static str, String, Option<Value>, Option<&'static str>, &'static [u16]);

/// Both ways of minting, with the manifests of each and nothing else.
pub fn run(cluster: &Cluster, _: &Scale) -> anyhow::Result<String> {
    cluster.agent_ready()?;
    let outcome = both_ways(cluster);
    cluster.clear()?;
    let (first, second) = outcome?;
    Ok(format!(
        "{first} attempts by impersonation and {second} by direct minting, each allowed or refused as it must be"
    ))
}

fn both_ways(cluster: &Cluster) -> anyhow::Result<(usize, usize)> {
    let first = try_all(cluster, "constrained impersonation", &Targets::make(cluster)?.impersonating())?;
    cluster.clear()?;
    cluster.kubectl(&["delete", "-f", &cluster.manifests(IMPERSONATION)])?;
    let second = directly(cluster);
    for file in ["rbac.yaml", "admission.yaml"] {
        let file = cluster.manifests(&format!("daemonset/components/direct-minting/{file}"));
        cluster.kubectl(&["delete", "--ignore-not-found", "-f", &file])?;
    }
    install(cluster, "tests/cluster/overlay")?;
    Ok((first, second?))
}

fn directly(cluster: &Cluster) -> anyhow::Result<usize> {
    install(cluster, DIRECT)?;
    super::smoke::own_credentials(cluster, "direct")?;
    // A new policy is in force once the API server has compiled it, and what it allowed it remembers for ten seconds.
    let agent = agent(cluster)?;
    cluster.until("the admission policy, and an end of impersonation", Duration::from_secs(30), || {
        let (line, body) = minting(NAMESPACE, "rights", AUDIENCE, None);
        let minted = send(cluster, &agent, &line, &body, None)?.0;
        let listed = send(cluster, &agent, &format!("GET {OWN_PODS}"), &None, Some("system:node:node1"))?.0;
        Ok((minted == 403 && listed == 403).then_some(()))
    })?;
    try_all(cluster, "direct minting", &Targets::make(cluster)?.direct())
}

/// The agent finds out at its start which way it was granted.
fn install(cluster: &Cluster, overlay: &str) -> anyhow::Result<()> {
    cluster.kubectl(&["apply", "-k", &cluster.manifests(overlay)])?;
    cluster.kubectl(&["-n", "kirsa", "rollout", "restart", "daemonset/kirsa"])?;
    cluster.agent_ready()
}

fn named(pod: &Value) -> (String, String) {
    (text(&pod["metadata"]["name"]), text(&pod["metadata"]["uid"]))
}

fn try_all(cluster: &Cluster, way: &str, rows: &[Row]) -> anyhow::Result<usize> {
    let agent = agent(cluster)?;
    let mut wrong = Vec::new();
    for (what, method, path, body, whom, right) in rows {
        let request = (format!("{method} {path}"), body.clone());
        let (status, text) = send(cluster, &agent, &request.0, &request.1, *whom)?;
        eprintln!("  {way}: {what}: {status}");
        if !right.contains(&status) {
            wrong.push(format!("{what}: {status} instead of {right:?} ({text})"));
        }
    }
    ensure!(wrong.is_empty(), "{way}: {}", wrong.join("; "));
    Ok(rows.len())
}

/// A client with the token that lies in the agent's pod.
fn agent(cluster: &Cluster) -> anyhow::Result<Client> {
    let uid = text(&cluster.agent_pod("node1")?["metadata"]["uid"]);
    let volumes = format!("/var/lib/kubelet/pods/{uid}/volumes/kubernetes.io~projected");
    let token = cluster.on("node1", &["sh", "-c", &format!("cat {volumes}/*/token")])?;
    let admin = std::fs::read_to_string(cluster.state.join("admin.kubeconfig"))?;
    let (clusters, _) = admin.split_once("users:").context("a kubeconfig")?;
    let path = cluster.state.join("thief.kubeconfig");
    std::fs::write(&path, format!("{clusters}users: [{{name: admin, user: {{token: {}}}}}]\n", token.trim()))?;
    cluster.block_on(lab::apiserver::client_of(&path))
}

fn text(value: &Value) -> String {
    value.as_str().unwrap_or_default().to_owned()
}

fn send(
    cluster: &Cluster,
    client: &Client,
    line: &str,
    body: &Option<Value>,
    whom: Option<&str>,
) -> anyhow::Result<(u16, String)> {
    let (method, path) = line.split_once(' ').context("a request")?;
    let mut request = Request::builder().method(method).uri(path);
    if let Some(whom) = whom {
        request = request.header("Impersonate-User", whom);
        if whom == "admin" {
            request = request.header("Impersonate-Group", "system:masters");
        }
    }
    let body = match body {
        Some(body) => {
            let kind = if method == "PATCH" { "application/merge-patch+json" } else { "application/json" };
            request = request.header("Content-Type", kind);
            Body::from(body.to_string().into_bytes())
        }
        None => Body::empty(),
    };
    cluster.block_on(async {
        let response = client.send(request.body(body)?).await?;
        let status = response.status().as_u16();
        let text = if status >= 400 {
            String::from_utf8_lossy(&response.into_body().collect_bytes().await?).into_owned()
        } else {
            String::new()
        };
        Ok((status, text))
    })
}

/// `POST` of a TokenRequest.
fn minting(namespace: &str, account: &str, audience: &str, bound: Option<(&str, &str)>) -> (String, Option<Value>) {
    let mut spec = json!({ "audiences": [audience], "expirationSeconds": 600 });
    if let Some((name, uid)) = bound {
        spec["boundObjectRef"] = json!({ "apiVersion": "v1", "kind": "Pod", "name": name, "uid": uid });
    }
    let request = json!({ "apiVersion": "authentication.k8s.io/v1", "kind": "TokenRequest", "spec": spec });
    (format!("POST /api/v1/namespaces/{namespace}/serviceaccounts/{account}/token"), Some(request))
}

/// Pods here and on another node.
struct Targets {
    here: String,
    elsewhere: String,
    agent: (String, String),
}

impl Targets {
    fn make(cluster: &Cluster) -> anyhow::Result<Self> {
        cluster.identities(&["rights".to_owned(), "foreign".to_owned()])?;
        cluster.start(&[Job::new("here", "rights", "sleep 1000")])?;
        // Of a node that is a name only: the pod garbage collector lets it be for the better part of a minute.
        cluster.apply(&json!({
            "apiVersion": "v1", "kind": "Pod",
            "metadata": { "name": "elsewhere", "namespace": NAMESPACE },
            "spec": {
                "serviceAccountName": "foreign", "nodeName": "elsewhere", "automountServiceAccountToken": false,
                "containers": [{ "name": "c", "image": "kirsa-box:1" }]
            }
        }))?;
        let uid = |name: &'static str| {
            cluster.pods.wait(name, Duration::from_secs(30), move |seen| {
                seen.get(name).filter(|seen| seen.bound.is_some()).map(|seen| seen.uid.clone())
            })
        };
        let agent = named(&cluster.agent_pod("node1")?);
        Ok(Self { here: uid("here")?, elsewhere: uid("elsewhere")?, agent })
    }

    fn impersonating(&self) -> Vec<Row> {
        let me = Some("system:node:node1");
        let mint = |what, account, audience, bound, whom, right: &'static [u16]| -> Row {
            let (line, body) = minting(NAMESPACE, account, audience, bound);
            (what, "POST", line.trim_start_matches("POST ").to_owned(), body, whom, right)
        };
        let here = Some(("here", self.here.as_str()));
        let there = Some(("elsewhere", self.elsewhere.as_str()));
        let mut rows: Vec<Row> = vec![
            mint("mint for a pod of this node", "rights", AUDIENCE, here, me, &[201]),
            mint("mint for a pod of another node", "foreign", AUDIENCE, there, me, &[403]),
            mint("mint for an account of this node, bound to a pod of another", "rights", AUDIENCE, there, me, &[403]),
            mint(
                "mint for an account of another node, bound to a pod of this one",
                "foreign",
                AUDIENCE,
                here,
                me,
                &[403],
            ),
            mint(
                "mint with another pod's UID",
                "rights",
                AUDIENCE,
                Some(("here", self.elsewhere.as_str())),
                me,
                &[403, 409],
            ),
            mint("mint unbound", "rights", AUDIENCE, None, me, &[403]),
            mint("mint for another audience", "rights", "https://elsewhere", here, me, &[403]),
            mint("mint for the API server's audience", "rights", API_AUDIENCE, here, me, &[403]),
            mint("mint as another node", "foreign", AUDIENCE, there, Some("system:node:elsewhere"), &[403]),
            mint("mint as itself", "rights", AUDIENCE, here, None, &[403]),
            ("impersonate an administrator", "GET", "/api/v1/namespaces".into(), None, Some("admin"), &[403]),
            (
                "impersonate a service account",
                "GET",
                "/api/v1/namespaces".into(),
                None,
                Some("system:serviceaccount:e2e:rights"),
                &[403],
            ),
            ("list pods of this node", "GET", OWN_PODS.into(), None, me, &[200]),
            (
                "list pods of another node",
                "GET",
                "/api/v1/pods?fieldSelector=spec.nodeName%3Delsewhere".into(),
                None,
                me,
                &[403],
            ),
            ("list all pods as the node", "GET", "/api/v1/pods".into(), None, me, &[403]),
            ("list all pods as itself", "GET", "/api/v1/pods".into(), None, None, &[403]),
            ("secrets as the node", "GET", "/api/v1/secrets".into(), None, me, &[403]),
            ("config maps as the node", "GET", "/api/v1/configmaps".into(), None, me, &[403]),
            ("change its node as the node", "PATCH", "/api/v1/nodes/node1".into(), Some(json!({})), me, &[403]),
            (
                "delete a pod as the node",
                "DELETE",
                format!("/api/v1/namespaces/{NAMESPACE}/pods/here"),
                None,
                me,
                &[403],
            ),
            (
                "report a pod's status as the node",
                "PATCH",
                format!("/api/v1/namespaces/{NAMESPACE}/pods/here/status"),
                Some(json!({})),
                me,
                &[403],
            ),
            (
                "ask for a certificate as the node",
                "POST",
                "/apis/certificates.k8s.io/v1/certificatesigningrequests".into(),
                Some(certificate()),
                me,
                &[403],
            ),
        ];
        rows.extend(as_itself());
        rows
    }

    fn direct(&self) -> Vec<Row> {
        let mint = |what, namespace, account, audience, bound, right: &'static [u16]| -> Row {
            let (line, body) = minting(namespace, account, audience, bound);
            (what, "POST", line.trim_start_matches("POST ").to_owned(), body, None, right)
        };
        let here = Some(("here", self.here.as_str()));
        let there = Some(("elsewhere", self.elsewhere.as_str()));
        let agent = Some((self.agent.0.as_str(), self.agent.1.as_str()));
        let mut rows: Vec<Row> = vec![
            mint("mint for a pod of this node", NAMESPACE, "rights", AUDIENCE, here, &[201]),
            // The price of this way: the policy cannot see where the pod is.
            mint("mint for a pod of another node", NAMESPACE, "foreign", AUDIENCE, there, &[201]),
            mint("mint for an account, bound to a pod of another", NAMESPACE, "rights", AUDIENCE, there, &[400, 403]),
            mint(
                "mint with another pod's UID",
                NAMESPACE,
                "rights",
                AUDIENCE,
                Some(("here", self.elsewhere.as_str())),
                &[403, 409],
            ),
            mint("mint unbound", NAMESPACE, "rights", AUDIENCE, None, &[403]),
            mint("mint for another audience", NAMESPACE, "rights", "https://elsewhere", here, &[403]),
            mint("mint for the API server's audience", NAMESPACE, "rights", API_AUDIENCE, here, &[403]),
            mint("mint unbound in kube-system", "kube-system", "default", AUDIENCE, None, &[403]),
            mint(
                "mint for the API server in kube-system",
                "kube-system",
                "daemon-set-controller",
                API_AUDIENCE,
                None,
                &[403],
            ),
            mint("mint for the API server for itself", "kirsa", "kirsa", API_AUDIENCE, agent, &[403]),
            ("impersonate its node", "GET", OWN_PODS.into(), None, Some("system:node:node1"), &[403]),
            ("list pods", "GET", "/api/v1/pods".into(), None, None, &[200]),
        ];
        rows.extend(as_itself());
        rows
    }
}

fn certificate() -> Value {
    json!({
        "apiVersion": "certificates.k8s.io/v1", "kind": "CertificateSigningRequest", "metadata": { "name": "thief" },
        "spec": { "request": "", "signerName": "kubernetes.io/kube-apiserver-client-kubelet", "usages": ["client auth"] }
    })
}

/// What the agent's own identity must not do, whichever way it mints.
fn as_itself() -> Vec<Row> {
    let role = |verbs: Value| {
        json!({
            "apiVersion": "rbac.authorization.k8s.io/v1", "kind": "ClusterRole", "metadata": { "name": "thief" },
            "rules": [{ "apiGroups": [""], "resources": ["secrets"], "verbs": verbs }]
        })
    };
    let binding = json!({
        "apiVersion": "rbac.authorization.k8s.io/v1", "kind": "ClusterRoleBinding", "metadata": { "name": "thief" },
        "roleRef": { "apiGroup": "rbac.authorization.k8s.io", "kind": "ClusterRole", "name": "cluster-admin" },
        "subjects": [{ "kind": "ServiceAccount", "name": "kirsa", "namespace": "kirsa" }]
    });
    let pod = json!({
        "apiVersion": "v1", "kind": "Pod", "metadata": { "name": "thief" },
        "spec": { "serviceAccountName": "kirsa", "containers": [{ "name": "c", "image": "kirsa-box:1" }] }
    });
    vec![
        ("list service accounts", "GET", "/api/v1/serviceaccounts?limit=1".into(), None, None, &[200]),
        (
            "change a service account",
            "PATCH",
            format!("/api/v1/namespaces/{NAMESPACE}/serviceaccounts/rights"),
            Some(json!({})),
            None,
            &[403],
        ),
        ("secrets", "GET", "/api/v1/secrets".into(), None, None, &[403]),
        ("secrets of its own namespace", "GET", "/api/v1/namespaces/kirsa/secrets".into(), None, None, &[403]),
        ("config maps of kube-system", "GET", "/api/v1/namespaces/kube-system/configmaps".into(), None, None, &[403]),
        ("nodes", "GET", "/api/v1/nodes/node1".into(), None, None, &[403]),
        ("change its node", "PATCH", "/api/v1/nodes/node1".into(), Some(json!({})), None, &[403]),
        ("the kubelet's API", "GET", "/api/v1/nodes/node1/proxy/pods".into(), None, None, &[403]),
        (
            "exec in a pod",
            "POST",
            format!("/api/v1/namespaces/{NAMESPACE}/pods/here/exec?command=id&stdout=1"),
            None,
            None,
            &[403],
        ),
        ("a pod's log", "GET", format!("/api/v1/namespaces/{NAMESPACE}/pods/here/log"), None, None, &[403]),
        ("create a pod", "POST", "/api/v1/namespaces/kirsa/pods".into(), Some(pod), None, &[403]),
        (
            "create a role",
            "POST",
            "/apis/rbac.authorization.k8s.io/v1/clusterroles".into(),
            Some(role(json!(["*"]))),
            None,
            &[403],
        ),
        (
            "escalate its own role",
            "PATCH",
            "/apis/rbac.authorization.k8s.io/v1/clusterroles/kirsa-serviceaccounts".into(),
            Some(role(json!(["*"]))),
            None,
            &[403],
        ),
        (
            "bind itself to cluster-admin",
            "POST",
            "/apis/rbac.authorization.k8s.io/v1/clusterrolebindings".into(),
            Some(binding),
            None,
            &[403],
        ),
    ]
}
