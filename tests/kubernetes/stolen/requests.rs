//! Everything that a thief would like to read or change.

use serde_json::{Value, json};

use super::{AUDIENCE, Attempt, Loot, Row};

/// Of pods, and in other names.
pub(super) fn pods(loot: &Loot) -> Vec<Row> {
    let (node, namespace) = (loot.node(), loot.namespace.as_str());
    let pods = |query: &str| Attempt::get(&format!("/api/v1/pods{query}"));
    let (own, other) = (format!("?fieldSelector=spec.nodeName%3D{node}"), "?fieldSelector=spec.nodeName%3Dother");
    let watch = "&watch=1&timeoutSeconds=1";
    let one = Attempt::get(&format!("/api/v1/namespaces/{namespace}/pods/mine"));
    let theirs = Attempt::token(namespace, "theirs", AUDIENCE, Some(("theirs", &loot.theirs)));
    let accounts = "/api/v1/serviceaccounts";
    vec![
        Row("list its node's pods as the node", pods(&own).in_name_of_node(&node), [200, 403]),
        Row("watch its node's pods as the node", pods(&format!("{own}{watch}")).in_name_of_node(&node), [200, 403]),
        Row("list another node's pods as the node", pods(other).in_name_of_node(&node), [403, 403]),
        Row(
            "watch another node's pods as the node",
            pods(&format!("{other}{watch}")).in_name_of_node(&node),
            [403, 403],
        ),
        Row("list all pods as the node", pods("").in_name_of_node(&node), [403, 403]),
        Row("get a pod as the node", one.clone().in_name_of_node(&node), [403, 403]),
        // RBAC knows no field selectors.
        Row("list its node's pods", pods(&own), [403, 200]),
        Row("list another node's pods", pods(other), [403, 200]),
        Row("list all pods", pods(""), [403, 200]),
        Row("get a pod", one, [403, 403]),
        Row("list service accounts", Attempt::get(accounts), [200, 200]),
        Row("list service accounts as the node", Attempt::get(accounts).in_name_of_node(&node), [403, 403]),
        Row("mint as another node", theirs.clone().in_name_of_node(&format!("{namespace}-theirs")), [403, 403]),
        Row("mint as a node that there is not", theirs.clone().in_name_of_node("none"), [403, 403]),
        Row("be an account", theirs.in_name_of(&format!("system:serviceaccount:{namespace}:theirs")), [403, 403]),
        Row("be a user", Attempt::get("/api/v1/namespaces").in_name_of("admin"), [403, 403]),
        Row("be the agent of another namespace", pods("").in_name_of("system:serviceaccount:other:kirsa"), [403, 403]),
        Row(
            "be its node in a group",
            pods(&own).in_name_of_node(&node).header("impersonate-group", "system:masters"),
            [403, 403],
        ),
        Row("be its node with a UID", pods(&own).in_name_of_node(&node).header("impersonate-uid", "1"), [403, 403]),
    ]
}

/// Each as the agent and as its node: never, in either way of minting.
pub(super) fn forbidden(loot: &Loot) -> Vec<Row> {
    let (node, namespace) = (loot.node(), loot.namespace.as_str());
    let pod = |rest: &str| format!("/api/v1/namespaces/{namespace}/pods/mine{rest}");
    let rbac = |rest: &str| format!("/apis/rbac.authorization.k8s.io/v1/{rest}");
    let admission = |rest: &str| format!("/apis/admissionregistration.k8s.io/v1/{rest}");
    let empty = || json!({});
    let annotate = || json!({"metadata": {"annotations": {"eks.amazonaws.com/role-arn": "arn:aws:iam::1:role/a"}}});
    let administrator =
        json!({"apiGroup": "rbac.authorization.k8s.io", "kind": "ClusterRole", "name": "cluster-admin"});
    let binding = |kind: &str| {
        json!({"kind": kind, "apiVersion": "rbac.authorization.k8s.io/v1",
        "metadata": {"name": "thief"}, "roleRef": administrator, "subjects": []})
    };
    let everything = json!({"rules": [{"apiGroups": ["*"], "resources": ["*"], "verbs": ["*"]}]});
    let get = Attempt::get;
    let (post, patch) = (|path: &str, body: Value| Attempt::post(path, body), Attempt::patch);
    let rows = [
        ("secrets", get("/api/v1/secrets")),
        ("secrets of kube-system", get("/api/v1/namespaces/kube-system/secrets")),
        ("a secret", get("/api/v1/namespaces/kube-system/secrets/s")),
        ("config maps", get("/api/v1/configmaps")),
        ("namespaces", get("/api/v1/namespaces")),
        ("nodes", get("/api/v1/nodes")),
        ("its node", get(&format!("/api/v1/nodes/{node}"))),
        ("nodes/proxy", get(&format!("/api/v1/nodes/{node}/proxy/pods"))),
        ("run by nodes/proxy", post(&format!("/api/v1/nodes/{node}/proxy/run/{namespace}/mine/main"), empty())),
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
        ("delete a pod", Attempt::delete(&pod(""))),
        ("make a pod", post(&format!("/api/v1/namespaces/{namespace}/pods"), empty())),
        ("make a service account", post(&format!("/api/v1/namespaces/{namespace}/serviceaccounts"), empty())),
        ("give an account a role", patch(&format!("/api/v1/namespaces/{namespace}/serviceaccounts/mine"), annotate())),
        ("delete an account", Attempt::delete(&format!("/api/v1/namespaces/{namespace}/serviceaccounts/mine"))),
        ("escalate a role", patch(&rbac("clusterroles/kirsa-serviceaccounts"), everything.clone())),
        ("make a role", post(&rbac("clusterroles"), everything)),
        ("bind an administrator", post(&rbac("clusterrolebindings"), binding("ClusterRoleBinding"))),
        ("bind one in kube-system", post(&rbac("namespaces/kube-system/rolebindings"), binding("RoleBinding"))),
        ("its own binding", patch(&rbac("clusterrolebindings/kirsa-serviceaccounts"), json!({"subjects": []}))),
        ("delete the fence", Attempt::delete(&admission("validatingadmissionpolicies/kirsa-token-scope"))),
        ("unbind the fence", Attempt::delete(&admission("validatingadmissionpolicybindings/kirsa-token-scope"))),
        ("make a webhook", post(&admission("mutatingwebhookconfigurations"), empty())),
        ("its own DaemonSet", patch("/apis/apps/v1/namespaces/kirsa/daemonsets/kirsa", annotate())),
        ("a certificate", post("/apis/certificates.k8s.io/v1/certificatesigningrequests", empty())),
        ("a lease", post("/apis/coordination.k8s.io/v1/namespaces/kube-node-lease/leases", empty())),
        ("an event", post(&format!("/api/v1/namespaces/{namespace}/events"), empty())),
        ("whose a token is", post("/apis/authentication.k8s.io/v1/tokenreviews", empty())),
        ("what others may", post("/apis/authorization.k8s.io/v1/subjectaccessreviews", empty())),
        ("the API server's metrics", get("/metrics")),
        ("its configuration", get("/configz")),
        ("custom resources", get("/apis/apiextensions.k8s.io/v1/customresourcedefinitions")),
    ];
    let both = |(what, attempt): (&'static str, Attempt)| {
        [Row(what, attempt.clone(), [403, 403]), Row(what, attempt.in_name_of_node(&node), [403, 403])]
    };
    rows.into_iter().flat_map(both).collect()
}
