//! Checks the agent's RBAC permissions: all that daemonset/ grants, and no others (least privilege).

use std::collections::BTreeSet;

use k8s_openapi::api::authorization::v1::{SelfSubjectRulesReview, SelfSubjectRulesReviewSpec};
use kube::{Api, Client, api::PostParams};

use super::finding::Finding;
use crate::kubernetes::{Access, Identity, is_allowed};

const RBAC: &str = "rbac";
const EXCESS: &str = "rbac-excess";
/// Maximum number of excess rights in one finding.
const MAX_SHOWN: usize = 12;

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

/// Enabled features, each with a component of daemonset/ that grants its permissions.
#[derive(Debug, Clone, Copy)]
pub(super) struct Components {
    pub startup_taint: bool,
    pub container_credentials: bool,
}

/// Rights that would make a stolen agent token worth more than the pods' roles.
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
/// Rights of every service account, granted by the API server's default bindings.
const DEFAULT: [Access; 6] = [
    ("create", "authorization.k8s.io", "selfsubjectaccessreviews", None),
    ("create", "authorization.k8s.io", "selfsubjectrulesreviews", None),
    ("create", "authentication.k8s.io", "selfsubjectreviews", None),
    ("get", "certificates.k8s.io", "clustertrustbundles", None),
    ("list", "certificates.k8s.io", "clustertrustbundles", None),
    ("watch", "certificates.k8s.io", "clustertrustbundles", None),
];

/// Checks for missing and excess rights. `identity` is the identity that may mint tokens.
pub(super) async fn check(client: &Client, identity: Option<Identity>, enabled: Components) -> Vec<Finding> {
    let parts: [(&str, &[Access]); 4] = [
        ("daemonset/base/rbac.yaml", &BASE),
        match identity {
            Some(Identity::Node) => ("daemonset/components/constrained-impersonation", &IMPERSONATE),
            Some(Identity::Agent) => ("daemonset/components/direct-minting", &DIRECT),
            None => ("", &[]),
        },
        ("daemonset/components/startup-taint", if enabled.startup_taint { &TAINT } else { &[] }),
        ("daemonset/components/container-credentials", if enabled.container_credentials { &CONTAINER } else { &[] }),
    ];
    let granted: Vec<Access> = parts.iter().flat_map(|(_, part)| part.iter().copied()).collect();
    match missing_rights(client, &parts).await {
        Ok(finding) => {
            let excess = excess_rights(client, &granted).await;
            let failed = |error| vec![Finding::skipped(EXCESS, format!("the access review failed: {error:#}"))];
            [finding].into_iter().chain(excess.unwrap_or_else(failed)).collect()
        }
        Err(error) => vec![Finding::skipped(RBAC, format!("the access review failed: {error:#}"))],
    }
}

async fn missing_rights(client: &Client, parts: &[(&str, &[Access])]) -> anyhow::Result<Finding> {
    let (mut missing, mut apply) = (Vec::new(), Vec::new());
    let mut needed = 0;
    for (manifest, part) in parts {
        for access in *part {
            needed += 1;
            if !is_allowed(client, *access).await? {
                missing.push(name(*access));
                apply.push(*manifest);
            }
        }
    }
    apply.dedup();
    Ok(if missing.is_empty() {
        Finding::ok(RBAC, format!("all {needed} rights of daemonset/ are granted"))
    } else {
        Finding::failed(
            RBAC,
            format!("the agent may not {}", missing.join(", ")),
            format!("apply {}", apply.join(", ")),
        )
    })
}

async fn excess_rights(client: &Client, granted: &[Access]) -> anyhow::Result<Vec<Finding>> {
    if is_allowed(client, ("*", "*", "*", None)).await? {
        return Ok(vec![Finding::warning(
            EXCESS,
            "the agent may do everything",
            "remove the agent's service account from the binding to cluster-admin or to a rule with *: kubectl get \
             clusterrolebindings -o wide",
        )]);
    }
    let mut found = BTreeSet::new();
    let mut findings = Vec::new();
    for access in DANGEROUS {
        if !granted.contains(&access) && is_allowed(client, access).await? {
            let name = name(access);
            let fix = format!(
                "remove the rule with {name} from the roles bound to the agent's service account{}",
                origin(access)
            );
            findings.push(Finding::warning(EXCESS, format!("the agent may {name}, in every namespace"), fix));
            found.insert(name);
        }
    }
    let known: BTreeSet<String> = granted.iter().chain(&DEFAULT).map(|access| name(*access)).chain(found).collect();
    let mut others = BTreeSet::new();
    for namespace in [client.default_namespace(), "kube-system"] {
        others.extend(rights_in(client, namespace).await?.into_iter().filter(|right| !known.contains(right)));
    }
    if !others.is_empty() {
        let mut names: Vec<String> = others.into_iter().collect();
        let more = names.len().saturating_sub(MAX_SHOWN);
        names.truncate(MAX_SHOWN);
        let more = if more > 0 { format!(" and {more} more") } else { String::new() };
        findings.push(Finding::warning(
            EXCESS,
            format!("the agent may also {}{more}", names.join(", ")),
            "remove the rules that are not in daemonset/; rights that this cluster grants to every service account may \
             stay",
        ));
    }
    if findings.is_empty() {
        findings.push(Finding::ok(EXCESS, "no rights beyond daemonset/ are granted"));
    }
    Ok(findings)
}

/// Returns every right that RBAC grants in a namespace, cluster-wide rights included.
async fn rights_in(client: &Client, namespace: &str) -> anyhow::Result<Vec<String>> {
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
                rights.extend(rule.verbs.iter().map(|verb| join(verb, group, resource)));
            }
        }
    }
    Ok(rights)
}

fn name((verb, group, resource, subresource): Access) -> String {
    match subresource {
        Some(subresource) => join(verb, group, &format!("{resource}/{subresource}")),
        None => join(verb, group, resource),
    }
}

fn join(verb: &str, group: &str, resource: &str) -> String {
    if group.is_empty() { format!("{verb} {resource}") } else { format!("{verb} {resource}.{group}") }
}

/// Names the component that an excess right probably comes from.
fn origin(access: Access) -> &'static str {
    // The components of both minting modes may be applied, but only one is used.
    if DIRECT.contains(&access) { " (it is in daemonset/components/direct-minting, which is not used)" } else { "" }
}
