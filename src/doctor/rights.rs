//! What the agent may do at the API server: all that daemonset/ grants, and nothing else.

use std::collections::BTreeSet;

use k8s_openapi::api::authorization::v1::{SelfSubjectRulesReview, SelfSubjectRulesReviewSpec};
use kube::{Api, Client, api::PostParams};

use super::finding::Finding;
use crate::kubernetes::{Access, Identity, is_allowed};

const RBAC: &str = "rbac";
const WIDTH: &str = "rbac-width";
/// Names that are shown of what else the agent may do.
const SHOWN: usize = 12;

const BASE: [Access; 3] = [
    ("get", "", "serviceaccounts", None),
    ("list", "", "serviceaccounts", None),
    ("watch", "", "serviceaccounts", None),
];
const IMPERSONATE: [Access; 4] = [
    ("impersonate:associated-node", "authentication.k8s.io", "nodes", None),
    ("impersonate-on:associated-node:list", "", "pods", None),
    ("impersonate-on:associated-node:watch", "", "pods", None),
    ("impersonate-on:associated-node:create", "", "serviceaccounts", Some("token")),
];
const DIRECT: [Access; 3] =
    [("list", "", "pods", None), ("watch", "", "pods", None), ("create", "", "serviceaccounts", Some("token"))];
const TAINT: [Access; 2] = [("get", "", "nodes", None), ("patch", "", "nodes", None)];

const CONTAINER: [Access; 1] = [("create", "authentication.k8s.io", "tokenreviews", None)];

/// What else was asked for.
#[derive(Debug, Clone, Copy)]
pub(super) struct Parts {
    pub taint: bool,
    pub container: bool,
}

/// Each would make a stolen credential of the agent worth more than pods' roles.
const DANGEROUS: [Access; 13] = [
    ("get", "", "secrets", None),
    ("list", "", "secrets", None),
    ("create", "", "pods", None),
    ("create", "", "pods", Some("exec")),
    ("get", "", "nodes", Some("proxy")),
    ("escalate", "rbac.authorization.k8s.io", "clusterroles", None),
    ("bind", "rbac.authorization.k8s.io", "clusterroles", None),
    ("impersonate", "", "users", None),
    ("impersonate", "", "groups", None),
    ("impersonate", "", "serviceaccounts", None),
    ("get", "", "pods", None),
    ("create", "", "serviceaccounts", Some("token")),
    ("list", "", "pods", None),
];
/// What every service account may, by the API server's own bindings.
const EVERYBODY: [Access; 6] = [
    ("create", "authorization.k8s.io", "selfsubjectaccessreviews", None),
    ("create", "authorization.k8s.io", "selfsubjectrulesreviews", None),
    ("create", "authentication.k8s.io", "selfsubjectreviews", None),
    ("get", "certificates.k8s.io", "clustertrustbundles", None),
    ("list", "certificates.k8s.io", "clustertrustbundles", None),
    ("watch", "certificates.k8s.io", "clustertrustbundles", None),
];

/// `identity` is in whose name tokens are minted, if any.
pub(super) async fn check(client: &Client, identity: Option<Identity>, asked: Parts) -> Vec<Finding> {
    let parts: [(&str, &[Access]); 4] = [
        ("daemonset/base/rbac.yaml", &BASE),
        match identity {
            Some(Identity::Node) => ("daemonset/components/constrained-impersonation", &IMPERSONATE),
            Some(Identity::Agent) => ("daemonset/components/direct-minting", &DIRECT),
            None => ("", &[]),
        },
        ("daemonset/components/startup-taint", if asked.taint { &TAINT } else { &[] }),
        ("daemonset/components/container-credentials", if asked.container { &CONTAINER } else { &[] }),
    ];
    let granted: Vec<Access> = parts.iter().flat_map(|(_, part)| part.iter().copied()).collect();
    match missing(client, &parts).await {
        Ok(finding) => {
            let width = width(client, &granted).await;
            let unsaid = |error| vec![Finding::skipped(WIDTH, format!("the API server does not say: {error:#}"))];
            [finding].into_iter().chain(width.unwrap_or_else(unsaid)).collect()
        }
        Err(error) => vec![Finding::skipped(RBAC, format!("the API server does not say: {error:#}"))],
    }
}

async fn missing(client: &Client, parts: &[(&str, &[Access])]) -> anyhow::Result<Finding> {
    let (mut lacking, mut apply) = (Vec::new(), Vec::new());
    let mut asked = 0;
    for (manifest, part) in parts {
        for access in *part {
            asked += 1;
            if !is_allowed(client, *access).await? {
                lacking.push(name(*access));
                apply.push(*manifest);
            }
        }
    }
    apply.dedup();
    Ok(if lacking.is_empty() {
        Finding::ok(RBAC, format!("all {asked} rights of daemonset/ are granted"))
    } else {
        Finding::failed(
            RBAC,
            format!("the agent may not {}", lacking.join(", ")),
            format!("apply {}", apply.join(", ")),
        )
    })
}

async fn width(client: &Client, granted: &[Access]) -> anyhow::Result<Vec<Finding>> {
    if is_allowed(client, ("*", "*", "*", None)).await? {
        return Ok(vec![Finding::warning(
            WIDTH,
            "the agent may do everything",
            "take its service account out of whatever binds it to cluster-admin or to a rule with *: kubectl get \
             clusterrolebindings -o wide",
        )]);
    }
    let mut found = BTreeSet::new();
    let mut findings = Vec::new();
    for access in DANGEROUS {
        if !granted.contains(&access) && is_allowed(client, access).await? {
            let name = name(access);
            let fix =
                format!("remove the rule with {name} from what binds the agent's service account{}", origin(access));
            findings.push(Finding::warning(WIDTH, format!("the agent may {name}, in every namespace"), fix));
            found.insert(name);
        }
    }
    let known: BTreeSet<String> = granted.iter().chain(&EVERYBODY).map(|access| name(*access)).chain(found).collect();
    let mut beyond = BTreeSet::new();
    for namespace in [client.default_namespace(), "kube-system"] {
        beyond.extend(rules(client, namespace).await?.into_iter().filter(|right| !known.contains(right)));
    }
    if !beyond.is_empty() {
        let mut names: Vec<String> = beyond.into_iter().collect();
        let more = names.len().saturating_sub(SHOWN);
        names.truncate(SHOWN);
        let more = if more > 0 { format!(" and {more} more") } else { String::new() };
        findings.push(Finding::warning(
            WIDTH,
            format!("the agent may also {}{more}", names.join(", ")),
            "remove the rules that daemonset/ does not have; what this cluster grants to every service account may stay",
        ));
    }
    if findings.is_empty() {
        findings.push(Finding::ok(WIDTH, "nothing beyond daemonset/ is granted"));
    }
    Ok(findings)
}

/// Every right that RBAC grants in a namespace, cluster-wide ones included.
async fn rules(client: &Client, namespace: &str) -> anyhow::Result<Vec<String>> {
    let review = SelfSubjectRulesReview {
        spec: SelfSubjectRulesReviewSpec { namespace: Some(namespace.into()) },
        ..SelfSubjectRulesReview::default()
    };
    let reviews: Api<SelfSubjectRulesReview> = Api::all(client.clone());
    let status = reviews.create(&PostParams::default(), &review).await?.status.unwrap_or_default();
    let mut rights = Vec::new();
    for rule in &status.resource_rules {
        let groups = rule.api_groups.as_deref().unwrap_or_default();
        for resource in rule.resources.iter().flatten() {
            for group in groups {
                rights.extend(rule.verbs.iter().map(|verb| named(verb, group, resource)));
            }
        }
    }
    Ok(rights)
}

fn name((verb, group, resource, subresource): Access) -> String {
    match subresource {
        Some(subresource) => named(verb, group, &format!("{resource}/{subresource}")),
        None => named(verb, group, resource),
    }
}

fn named(verb: &str, group: &str, resource: &str) -> String {
    if group.is_empty() { format!("{verb} {resource}") } else { format!("{verb} {resource}.{group}") }
}

fn origin(access: Access) -> &'static str {
    // Both ways of minting may have been applied: only one is used.
    if DIRECT.contains(&access) { " (daemonset/components/direct-minting has it, and is not used)" } else { "" }
}
