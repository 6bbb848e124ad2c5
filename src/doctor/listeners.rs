//! Other agents for the metadata address, by what listens. The EKS Pod Identity agent answers at an address of its own
//! and is no rival, unless container credentials are served.

use std::net::SocketAddr;

use super::{finding::Finding, others::CHECK};
use crate::intercept::{METADATA_PORT, MetadataService, port};

/// Where an EKS Pod Identity agent listens, if one does.
pub fn pod_identity_agent() -> Option<SocketAddr> {
    on(MetadataService::Container)
}

/// Says nothing where there are none.
pub(super) fn check(container: bool) -> Vec<Finding> {
    let mut findings = Vec::new();
    match on(MetadataService::Container) {
        Some(at) if container => findings.push(Finding::warning(
            CHECK,
            format!("the EKS Pod Identity agent listens on {at}, and --container-credentials takes its requests"),
            "pods get the role of their service account's annotation instead of that of their association: leave \
             --container-credentials out, or remove that agent",
        )),
        Some(at) => findings.push(Finding::warning(
            CHECK,
            format!("the EKS Pod Identity agent listens on {at}: another address, which pods learn from variables"),
            "it may stay; a pod whose SDK knows Pod Identity and that has an association uses that one",
        )),
        None => {}
    }
    if let Some(at) = on(MetadataService::Metadata) {
        findings.push(Finding::warning(
            CHECK,
            format!("a process of this node listens on {at}: another metadata service"),
            "pods do not reach it while our redirect is there; remove it if the node does not need it",
        ));
    }
    findings
}

fn on(service: MetadataService) -> Option<SocketAddr> {
    let of = [service.v4(), service.v6()];
    let listening = port::listening_sockets().into_iter().map(|socket| socket.address);
    listening.into_iter().find(|at| at.port() == METADATA_PORT && of.contains(&at.ip()))
}
