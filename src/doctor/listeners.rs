//! Finds other agents by their listening sockets. The EKS Pod Identity agent listens on an address of its own, so it
//! conflicts only with container credentials.

use std::net::SocketAddr;

use super::{conflicts::CHECK, finding::Finding};
use crate::intercept::{METADATA_PORT, MetadataService, port};

/// Returns the address of a running EKS Pod Identity agent.
pub fn pod_identity_agent() -> Option<SocketAddr> {
    listener_of(MetadataService::Container)
}

/// Returns one finding per conflicting listener; none if there is no conflict.
pub(super) fn check(container_credentials: bool) -> Vec<Finding> {
    let mut findings = Vec::new();
    match listener_of(MetadataService::Container) {
        Some(address) if container_credentials => findings.push(Finding::warning(
            CHECK,
            format!("the EKS Pod Identity agent listens on {address}, and --container-credentials takes its requests"),
            "remove that agent, or do not set --container-credentials: pods now get the role of their service \
             account's annotation instead of the role of their association",
        )),
        Some(address) => findings.push(Finding::warning(
            CHECK,
            format!("the EKS Pod Identity agent listens on {address}, which pods learn from environment variables"),
            "no change is needed, it may stay; a pod with an association uses it if its SDK supports Pod Identity",
        )),
        None => {}
    }
    if let Some(address) = listener_of(MetadataService::Metadata) {
        findings.push(Finding::warning(
            CHECK,
            format!("a process on this node listens on {address}: another metadata service"),
            "remove it if the node does not need it; pods do not reach it while kirsa's redirect is in place",
        ));
    }
    findings
}

fn listener_of(service: MetadataService) -> Option<SocketAddr> {
    let addresses = [service.v4(), service.v6()];
    let listening = port::listening_sockets().into_iter().map(|socket| socket.address);
    listening.into_iter().find(|socket| socket.port() == METADATA_PORT && addresses.contains(&socket.ip()))
}
