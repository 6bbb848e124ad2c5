//! Tokens that an attacker would mint.

use anyhow::Result;
use serde_json::{Value, json};

use super::{AUDIENCE, AgentRights, ApiRequest, Attack, ISSUER, StolenToken};

pub(super) fn for_own_pod(stolen: &StolenToken) -> ApiRequest {
    bound(stolen, "own", AUDIENCE, "own", &stolen.own)
}

fn bound(stolen: &StolenToken, account: &str, audience: &str, pod: &str, uid: &str) -> ApiRequest {
    stolen.as_minter(ApiRequest::token(&stolen.namespace, account, audience, Some((pod, uid))))
}

pub(super) fn attacks(stolen: &StolenToken) -> Result<Vec<Attack>> {
    let (own, other) = (stolen.own.as_str(), stolen.other.as_str());
    let to = |object: Value| {
        let spec = json!({"audiences": [AUDIENCE], "expirationSeconds": 600, "boundObjectRef": object});
        stolen.as_minter(ApiRequest::token_with(&stolen.namespace, "own", spec))
    };
    let with = |audiences: Value, seconds: u32| {
        let pod = json!({"apiVersion": "v1", "kind": "Pod", "name": "own", "uid": own});
        let spec = json!({"audiences": audiences, "expirationSeconds": seconds, "boundObjectRef": pod});
        stolen.as_minter(ApiRequest::token_with(&stolen.namespace, "own", spec))
    };
    let system = |audience| {
        let pod = (stolen.namespace.as_str(), stolen.system.as_str());
        stolen.as_minter(ApiRequest::token("kube-system", &stolen.namespace, audience, Some(pod)))
    };
    let agent_pod = format!("kirsa-{}", stolen.node());
    let agent = |audience| {
        let pod = (agent_pod.as_str(), stolen.agent.as_str());
        stolen.as_minter(ApiRequest::token(stolen.rights.namespace(), "kirsa", audience, Some(pod)))
    };
    // Without an admission policy, the agent can mint what its node can: for the API server, the tokens that pods
    // mount.
    let without_policy = if AgentRights::Impersonation.has_admission_policy()? { 403 } else { 201 };
    Ok(vec![
        Attack("for a pod of its node", for_own_pod(stolen), [201, 201]),
        // An admission policy cannot see which node a pod is on.
        Attack("for a pod of another node", bound(stolen, "other", AUDIENCE, "other", other), [403, 201]),
        Attack(
            "for its account, bound to another node's pod",
            bound(stolen, "own", AUDIENCE, "other", other),
            [403, 400],
        ),
        Attack("for another account, bound to its own pod", bound(stolen, "other", AUDIENCE, "own", own), [403, 400]),
        Attack("for kube-system", system(AUDIENCE), [403, 201]),
        // The agent's service account has no IAM role.
        Attack("for itself", agent(AUDIENCE), [201, 201]),
        Attack("for itself, for the API server", agent(ISSUER), [403, 403]),
        Attack("for kube-system, for the API server", system(ISSUER), [403, 403]),
        Attack("for the API server", with(json!([ISSUER]), 600), [403, 403]),
        Attack("for the API server as well", with(json!([AUDIENCE, ISSUER]), 600), [403, 403]),
        Attack("for the API server by default", with(json!([]), 600), [without_policy, 403]),
        Attack("for an unknown audience", with(json!(["other"]), 600), [403, 403]),
        Attack("for a day", with(json!([AUDIENCE]), 86_400), [without_policy, 403]),
        Attack("unbound", stolen.as_minter(ApiRequest::token(&stolen.namespace, "own", AUDIENCE, None)), [403, 403]),
        // The policies need no rule for attestations: they require a Pod reference, and the API server rejects both
        // together.
        Attack(
            "bound to its own pod, with attestations",
            stolen.as_minter(ApiRequest::token_with(
                &stolen.namespace,
                "own",
                json!({
                    "audiences": [AUDIENCE], "expirationSeconds": 600, "attestations": {"example.com/a": ["b"]},
                    "boundObjectRef": {"apiVersion": "v1", "kind": "Pod", "name": "own", "uid": own},
                }),
            )),
            [422, 422],
        ),
        Attack("bound by name", to(json!({"apiVersion": "v1", "kind": "Pod", "name": "own"})), [403, 403]),
        Attack("bound by UID", to(json!({"apiVersion": "v1", "kind": "Pod", "uid": own})), [403, 403]),
        Attack("bound to another pod's UID", bound(stolen, "own", AUDIENCE, "own", other), [403, 409]),
        Attack("bound to a deleted pod", bound(stolen, "own", AUDIENCE, "gone", own), [404, 404]),
        Attack("bound to a node", to(json!({"apiVersion": "v1", "kind": "Node", "name": stolen.node()})), [403, 403]),
        Attack(
            "bound to a secret",
            to(json!({"apiVersion": "v1", "kind": "Secret", "name": "s", "uid": own})),
            [403, 403],
        ),
        // With impersonation, the agent's own user cannot mint tokens.
        Attack("as itself", ApiRequest::token(&stolen.namespace, "own", AUDIENCE, Some(("own", own))), [403, 201]),
    ])
}
