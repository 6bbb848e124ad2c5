//! Finds pods that the redirect cannot serve: routed by interface, or with an address that only the CNI plugin knows.

use std::{collections::BTreeSet, net::IpAddr};

use nix::ifaddrs::getifaddrs;

use super::finding::Finding;
use crate::{
    attribute::{cni, is_eks_egress},
    config::{Config, Source},
    intercept::interface_routes,
};

const ROUTES: &str = "interface-routes";
const EGRESS: &str = "egress-ipv4";
/// Maximum number of items in one finding.
const MAX_SHOWN: usize = 8;

pub(super) fn check(config: &Config) -> Vec<Finding> {
    vec![check_interface_routes(), check_egress(config)]
}

/// Finds EKS security groups for pods in strict mode.
fn check_interface_routes() -> Finding {
    let routes = match interface_routes() {
        Ok(routes) => routes.iter().map(ToString::to_string).collect::<Vec<_>>(),
        Err(error) => return Finding::skipped(ROUTES, format!("policy routing rules cannot be listed: {error}")),
    };
    if routes.is_empty() {
        return Finding::ok(ROUTES, "no pod is routed by interface, which bypasses the redirect");
    }
    Finding::warning(
        ROUTES,
        format!(
            "pods that are routed by interface bypass the redirect and get 403 not_redirected: {} (EKS security groups \
             for pods in strict mode)",
            join(&routes)
        ),
        "set POD_SECURITY_GROUP_ENFORCING_MODE=standard on the aws-node DaemonSet and recreate these pods, or use IRSA \
         or EKS Pod Identity for them",
    )
}

/// Finds the egress IPv4 addresses of pods in EKS IPv6 clusters.
fn check_egress(config: &Config) -> Finding {
    let of_host = getifaddrs().into_iter().flatten().filter_map(|interface| {
        let address = interface.address.as_ref()?.as_sockaddr_in()?.ip();
        is_eks_egress(address.into()).then(|| format!("{address} on {}", interface.interface_name))
    });
    let of_records: BTreeSet<String> = match &config.source {
        Source::Kubernetes { cni_results: Some(folder), .. } => {
            let attachments = cni::attachments(folder).unwrap_or_default();
            let addresses = attachments.iter().flat_map(|attachment| &attachment.addresses);
            addresses.filter(|address| is_eks_egress(**address)).map(IpAddr::to_string).collect()
        }
        _ => BTreeSet::new(),
    };
    let found: Vec<String> = of_host.chain(of_records).collect();
    if found.is_empty() {
        return Finding::ok(EGRESS, "no pod has an IPv4 address that only the CNI plugin knows (169.254.172.0/22)");
    }
    Finding::warning(
        EGRESS,
        format!(
            "pods have IPv4 addresses that only the CNI plugin knows ({}), as in EKS IPv6 clusters: over IPv4 they get \
             503 unknown_pod",
            join(&found)
        ),
        "set AWS_EC2_METADATA_SERVICE_ENDPOINT_MODE=IPv6 in these pods",
    )
}

fn join(all: &[String]) -> String {
    let shown = all[..all.len().min(MAX_SHOWN)].join(", ");
    if all.len() > MAX_SHOWN { format!("{shown}, and {} more", all.len() - MAX_SHOWN) } else { shown }
}
