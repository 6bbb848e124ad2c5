//! Tests the redirect as the agent's self-test does: which server answers at the metadata address?

use std::{io::ErrorKind, net::IpAddr};

use http::header::SERVER;

use super::{finding::Finding, http::get};
use crate::{
    config::Config,
    intercept::{Backend, METADATA_PORT, MetadataService, connect_marked, has_route},
};

const REPAIR: &str = "start the agent; it applies the redirect at start and within 2 s of a removal. If it is running, \
                      its log says why it could not apply the redirect";

/// Tests the redirect from each of the node's addresses to each service.
pub(super) async fn check(config: &Config) -> Vec<Finding> {
    if config.intercept == Backend::None {
        let detail = "--intercept none: a redirect that kirsa does not own may apply to pods only, so it cannot be \
                      tested from the node";
        let fix = "run this in a pod and expect \"server: kirsa\": curl -si http://169.254.169.254/";
        return vec![Finding::skipped("redirect", detail).with_fix(fix)];
    }
    let mut findings = Vec::new();
    for (host, service) in config.rules().dnat_targets() {
        findings.push(test_from(host, service, config.port).await);
    }
    findings
}

async fn test_from(host: IpAddr, service: MetadataService, port: u16) -> Finding {
    let check = match (service, host) {
        (MetadataService::Metadata, IpAddr::V4(_)) => "redirect-ipv4",
        (MetadataService::Metadata, IpAddr::V6(_)) => "redirect-ipv6",
        (MetadataService::Container, IpAddr::V4(_)) => "container-redirect-ipv4",
        (MetadataService::Container, IpAddr::V6(_)) => "container-redirect-ipv6",
    };
    let path = format!("{host} to {} port {METADATA_PORT}", service.address_for(host));
    if !has_route(host, service) {
        return Finding::skipped(check, format!("{path}: not tested, since the node has no route there"));
    }
    let stream = match connect_marked(host, service).await {
        Ok(stream) => stream,
        Err(error) => {
            let detail = format!("{path}: {error}");
            return match error.kind() {
                ErrorKind::PermissionDenied => {
                    Finding::skipped(check, format!("{detail}: marking a connection requires CAP_NET_ADMIN"))
                }
                ErrorKind::AddrNotAvailable => Finding::failed(
                    check,
                    detail,
                    format!(
                        "set --host-ip to an address of this node (status.hostIPs), which {host} is not, and run in \
                         the node's network namespace (hostNetwork)"
                    ),
                ),
                ErrorKind::ConnectionRefused => {
                    let detail = format!("{detail}: the agent does not listen on port {port}, or there is no redirect");
                    Finding::failed(check, detail, "start the agent; if it does not start, its log says why")
                }
                _ => Finding::failed(check, format!("{detail}: the redirect is missing"), REPAIR),
            };
        }
    };
    match get(stream, "/").await {
        Ok(response) => match response.headers().get(SERVER).map(|server| String::from_utf8_lossy(server.as_bytes())) {
            Some(server) if server == "kirsa" => Finding::ok(check, format!("{path} is answered by kirsa")),
            server => {
                let server = server.unwrap_or_else(|| "a server without a Server header".into());
                let detail = format!("{path} is answered by {server}: pods' connections may get there too");
                Finding::failed(check, detail, REPAIR)
            }
        },
        Err(error) => Finding::failed(check, format!("{path} is not answered by an HTTP server: {error:#}"), REPAIR),
    }
}
