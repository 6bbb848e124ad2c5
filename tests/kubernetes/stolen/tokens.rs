//! Every token that a thief would like to have.

use anyhow::Result;
use serde_json::{Value, json};

use super::{AUDIENCE, Attempt, ISSUER, Loot, Row, Way};

pub(super) fn of_its_own_pod(loot: &Loot) -> Attempt {
    bound(loot, "mine", AUDIENCE, "mine", &loot.mine)
}

fn bound(loot: &Loot, account: &str, audience: &str, pod: &str, uid: &str) -> Attempt {
    loot.as_agent(Attempt::token(&loot.namespace, account, audience, Some((pod, uid))))
}

pub(super) fn rows(loot: &Loot) -> Result<Vec<Row>> {
    let (mine, theirs) = (loot.mine.as_str(), loot.theirs.as_str());
    let to = |object: Value| {
        let spec = json!({"audiences": [AUDIENCE], "expirationSeconds": 600, "boundObjectRef": object});
        loot.as_agent(Attempt::token_with(&loot.namespace, "mine", spec))
    };
    let with = |audiences: Value, seconds: u32| {
        let pod = json!({"apiVersion": "v1", "kind": "Pod", "name": "mine", "uid": mine});
        let spec = json!({"audiences": audiences, "expirationSeconds": seconds, "boundObjectRef": pod});
        loot.as_agent(Attempt::token_with(&loot.namespace, "mine", spec))
    };
    let system = |audience| {
        let pod = (loot.namespace.as_str(), loot.system.as_str());
        loot.as_agent(Attempt::token("kube-system", &loot.namespace, audience, Some(pod)))
    };
    let agent_pod = format!("kirsa-{}", loot.node());
    let agent = |audience| {
        let pod = (agent_pod.as_str(), loot.agent.as_str());
        loot.as_agent(Attempt::token(loot.way.namespace(), "kirsa", audience, Some(pod)))
    };
    // Without a fence of its own, what nodes may have anyway: for the API server, what the pod mounts.
    let unfenced = if Way::Impersonate.is_fenced()? { 403 } else { 201 };
    Ok(vec![
        Row("for a pod of its node", of_its_own_pod(loot), [201, 201]),
        // An admission policy cannot see which node a pod is on.
        Row("for a pod of another node", bound(loot, "theirs", AUDIENCE, "theirs", theirs), [403, 201]),
        Row(
            "for its account, bound to another node's pod",
            bound(loot, "mine", AUDIENCE, "theirs", theirs),
            [403, 400],
        ),
        Row("for another account, bound to its own pod", bound(loot, "theirs", AUDIENCE, "mine", mine), [403, 400]),
        Row("for kube-system", system(AUDIENCE), [403, 201]),
        // It has no role.
        Row("for itself", agent(AUDIENCE), [201, 201]),
        Row("for itself, for the API server", agent(ISSUER), [403, 403]),
        Row("for kube-system, for the API server", system(ISSUER), [403, 403]),
        Row("for the API server", with(json!([ISSUER]), 600), [403, 403]),
        Row("for the API server as well", with(json!([AUDIENCE, ISSUER]), 600), [403, 403]),
        Row("for the API server by default", with(json!([]), 600), [unfenced, 403]),
        Row("for an audience of nobody's", with(json!(["other"]), 600), [403, 403]),
        Row("for a day", with(json!([AUDIENCE]), 86_400), [unfenced, 403]),
        Row("unbound", loot.as_agent(Attempt::token(&loot.namespace, "mine", AUDIENCE, None)), [403, 403]),
        // The policies demand a Pod reference, with which the API server takes no attestations: they need no rule.
        Row(
            "bound to its own pod, with attestations",
            loot.as_agent(Attempt::token_with(
                &loot.namespace,
                "mine",
                json!({
                    "audiences": [AUDIENCE], "expirationSeconds": 600, "attestations": {"example.com/a": ["b"]},
                    "boundObjectRef": {"apiVersion": "v1", "kind": "Pod", "name": "mine", "uid": mine},
                }),
            )),
            [422, 422],
        ),
        Row("bound by name", to(json!({"apiVersion": "v1", "kind": "Pod", "name": "mine"})), [403, 403]),
        Row("bound by UID", to(json!({"apiVersion": "v1", "kind": "Pod", "uid": mine})), [403, 403]),
        Row("bound to another pod's UID", bound(loot, "mine", AUDIENCE, "mine", theirs), [403, 409]),
        Row("bound to a pod that is gone", bound(loot, "mine", AUDIENCE, "gone", mine), [404, 404]),
        Row("bound to a node", to(json!({"apiVersion": "v1", "kind": "Node", "name": loot.node()})), [403, 403]),
        Row(
            "bound to a secret",
            to(json!({"apiVersion": "v1", "kind": "Secret", "name": "s", "uid": mine})),
            [403, 403],
        ),
        // By impersonation, the agent itself may mint nothing.
        Row("as itself", Attempt::token(&loot.namespace, "mine", AUDIENCE, Some(("mine", mine))), [403, 201]),
    ])
}
