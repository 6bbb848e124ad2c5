//! Objects that an attacker would read or change.

use serde_json::{Value, json};

use super::{AUDIENCE, ApiRequest, Attack, StolenToken};

/// Returns attacks that read pods or impersonate users.
pub(super) fn pods(stolen: &StolenToken) -> Vec<Attack> {
    let (node, namespace) = (stolen.node(), stolen.namespace.as_str());
    let pods = |query: &str| ApiRequest::get(&format!("/api/v1/pods{query}"));
    let (on_node, on_other_node) =
        (format!("?fieldSelector=spec.nodeName%3D{node}"), "?fieldSelector=spec.nodeName%3Dother");
    let watch = "&watch=1&timeoutSeconds=1";
    let one = ApiRequest::get(&format!("/api/v1/namespaces/{namespace}/pods/own"));
    let token = ApiRequest::token(namespace, "other", AUDIENCE, Some(("other", &stolen.other)));
    let accounts = "/api/v1/serviceaccounts";
    vec![
        Attack("list its node's pods as the node", pods(&on_node).impersonate_node(&node), [200, 403]),
        Attack(
            "watch its node's pods as the node",
            pods(&format!("{on_node}{watch}")).impersonate_node(&node),
            [200, 403],
        ),
        Attack("list another node's pods as the node", pods(on_other_node).impersonate_node(&node), [403, 403]),
        Attack(
            "watch another node's pods as the node",
            pods(&format!("{on_other_node}{watch}")).impersonate_node(&node),
            [403, 403],
        ),
        Attack("list all pods as the node", pods("").impersonate_node(&node), [403, 403]),
        Attack("get a pod as the node", one.clone().impersonate_node(&node), [403, 403]),
        // RBAC cannot restrict field selectors.
        Attack("list its node's pods", pods(&on_node), [403, 200]),
        Attack("list another node's pods", pods(on_other_node), [403, 200]),
        Attack("list all pods", pods(""), [403, 200]),
        Attack("get a pod", one, [403, 403]),
        Attack("list service accounts", ApiRequest::get(accounts), [200, 200]),
        Attack("list service accounts as the node", ApiRequest::get(accounts).impersonate_node(&node), [403, 403]),
        Attack("mint as another node", token.clone().impersonate_node(&format!("{namespace}-other")), [403, 403]),
        Attack("mint as a node that does not exist", token.clone().impersonate_node("none"), [403, 403]),
        Attack(
            "impersonate an account",
            token.impersonate(&format!("system:serviceaccount:{namespace}:other")),
            [403, 403],
        ),
        Attack("impersonate a user", ApiRequest::get("/api/v1/namespaces").impersonate("admin"), [403, 403]),
        Attack(
            "impersonate the agent of another namespace",
            pods("").impersonate("system:serviceaccount:other:kirsa"),
            [403, 403],
        ),
        Attack(
            "impersonate its node with a group",
            pods(&on_node).impersonate_node(&node).header("impersonate-group", "system:masters"),
            [403, 403],
        ),
        Attack(
            "impersonate its node with a UID",
            pods(&on_node).impersonate_node(&node).header("impersonate-uid", "1"),
            [403, 403],
        ),
    ]
}

/// Returns attacks that fail as the agent and as its node, in both minting modes.
pub(super) fn forbidden(stolen: &StolenToken) -> Vec<Attack> {
    let (node, namespace) = (stolen.node(), stolen.namespace.as_str());
    let pod = |rest: &str| format!("/api/v1/namespaces/{namespace}/pods/own{rest}");
    let rbac = |rest: &str| format!("/apis/rbac.authorization.k8s.io/v1/{rest}");
    let admission = |rest: &str| format!("/apis/admissionregistration.k8s.io/v1/{rest}");
    let empty = || json!({});
    let annotate = || json!({"metadata": {"annotations": {"eks.amazonaws.com/role-arn": "arn:aws:iam::1:role/a"}}});
    let administrator =
        json!({"apiGroup": "rbac.authorization.k8s.io", "kind": "ClusterRole", "name": "cluster-admin"});
    let binding = |kind: &str| {
        json!({"kind": kind, "apiVersion": "rbac.authorization.k8s.io/v1",
        "metadata": {"name": "attacker"}, "roleRef": administrator, "subjects": []})
    };
    let everything = json!({"rules": [{"apiGroups": ["*"], "resources": ["*"], "verbs": ["*"]}]});
    let get = ApiRequest::get;
    let (post, patch) = (|path: &str, body: Value| ApiRequest::post(path, body), ApiRequest::patch);
    let requests = [
        ("secrets", get("/api/v1/secrets")),
        ("secrets of kube-system", get("/api/v1/namespaces/kube-system/secrets")),
        ("a secret", get("/api/v1/namespaces/kube-system/secrets/s")),
        ("config maps", get("/api/v1/configmaps")),
        ("namespaces", get("/api/v1/namespaces")),
        ("nodes", get("/api/v1/nodes")),
        ("its node", get(&format!("/api/v1/nodes/{node}"))),
        ("nodes/proxy", get(&format!("/api/v1/nodes/{node}/proxy/pods"))),
        ("run by nodes/proxy", post(&format!("/api/v1/nodes/{node}/proxy/run/{namespace}/own/main"), empty())),
        ("change its node", patch(&format!("/api/v1/nodes/{node}"), annotate())),
        ("its node's status", patch(&format!("/api/v1/nodes/{node}/status"), annotate())),
        ("pods/exec", post(&pod("/exec?command=id&stdout=true"), empty())),
        ("pods/exec by GET", get(&pod("/exec?command=id&stdout=true"))),
        ("pods/attach", get(&pod("/attach"))),
        ("pods/portforward", get(&pod("/portforward"))),
        ("pods/log", get(&pod("/log"))),
        ("pods/proxy", get(&pod("/proxy/"))),
        ("pods/ephemeralcontainers", patch(&pod("/ephemeralcontainers"), empty())),
        ("pods/eviction", post(&pod("/eviction"), json!({"apiVersion": "policy/v1", "kind": "Eviction"}))),
        ("a pod's status", patch(&pod("/status"), json!({"status": {"podIP": "10.9.9.9"}}))),
        ("change a pod", patch(&pod(""), annotate())),
        ("delete a pod", ApiRequest::delete(&pod(""))),
        ("create a pod", post(&format!("/api/v1/namespaces/{namespace}/pods"), empty())),
        ("create a service account", post(&format!("/api/v1/namespaces/{namespace}/serviceaccounts"), empty())),
        (
            "annotate an account with a role",
            patch(&format!("/api/v1/namespaces/{namespace}/serviceaccounts/own"), annotate()),
        ),
        ("delete an account", ApiRequest::delete(&format!("/api/v1/namespaces/{namespace}/serviceaccounts/own"))),
        ("escalate a role", patch(&rbac("clusterroles/kirsa-serviceaccounts"), everything.clone())),
        ("create a role", post(&rbac("clusterroles"), everything)),
        ("bind cluster-admin", post(&rbac("clusterrolebindings"), binding("ClusterRoleBinding"))),
        (
            "bind cluster-admin in kube-system",
            post(&rbac("namespaces/kube-system/rolebindings"), binding("RoleBinding")),
        ),
        ("its own binding", patch(&rbac("clusterrolebindings/kirsa-serviceaccounts"), json!({"subjects": []}))),
        (
            "delete the admission policy",
            ApiRequest::delete(&admission("validatingadmissionpolicies/kirsa-token-scope")),
        ),
        (
            "delete the policy's binding",
            ApiRequest::delete(&admission("validatingadmissionpolicybindings/kirsa-token-scope")),
        ),
        ("create a webhook", post(&admission("mutatingwebhookconfigurations"), empty())),
        ("its own DaemonSet", patch("/apis/apps/v1/namespaces/kirsa/daemonsets/kirsa", annotate())),
        ("a certificate", post("/apis/certificates.k8s.io/v1/certificatesigningrequests", empty())),
        ("a lease", post("/apis/coordination.k8s.io/v1/namespaces/kube-node-lease/leases", empty())),
        ("an event", post(&format!("/api/v1/namespaces/{namespace}/events"), empty())),
        ("token reviews", post("/apis/authentication.k8s.io/v1/tokenreviews", empty())),
        ("subject access reviews", post("/apis/authorization.k8s.io/v1/subjectaccessreviews", empty())),
        ("the API server's metrics", get("/metrics")),
        ("its configuration", get("/configz")),
        ("custom resources", get("/apis/apiextensions.k8s.io/v1/customresourcedefinitions")),
    ];
    let both = |(what, request): (&'static str, ApiRequest)| {
        [Attack(what, request.clone(), [403, 403]), Attack(what, request.impersonate_node(&node), [403, 403])]
    };
    requests.into_iter().flat_map(both).collect()
}
