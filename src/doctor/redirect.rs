//! The redirect, tried as the agent tries it: who answers at the metadata address?

use std::{io::ErrorKind, net::IpAddr};

use http::header::SERVER;

use super::{finding::Finding, http::get};
use crate::{
    config::Config,
    intercept::{Backend, METADATA_PORT, MetadataService, connect_marked, has_route},
};

const AGAIN: &str = "the agent applies the redirect when it starts, and again within 2 s of its removal: if it runs, \
                     its log says what keeps it from that; if not, start it";

/// Once for each of the node's addresses and each service that is served.
pub(super) async fn check(config: &Config) -> Vec<Finding> {
    if config.intercept == Backend::None {
        let detail = "--intercept none: a redirect of somebody else's takes pods' connections only, so it cannot be \
                      tried from the node";
        let fix = "in a pod: curl -si http://169.254.169.254/ must answer with \"server: kirsa\"";
        return vec![Finding::skipped("redirect", detail).with_fix(fix)];
    }
    let mut findings = Vec::new();
    for (host, service) in config.rules().dnat_targets() {
        findings.push(try_from(host, service, config.port).await);
    }
    findings
}

async fn try_from(host: IpAddr, service: MetadataService, port: u16) -> Finding {
    let check = match (service, host) {
        (MetadataService::Metadata, IpAddr::V4(_)) => "redirect-ipv4",
        (MetadataService::Metadata, IpAddr::V6(_)) => "redirect-ipv6",
        (MetadataService::Container, IpAddr::V4(_)) => "container-redirect-ipv4",
        (MetadataService::Container, IpAddr::V6(_)) => "container-redirect-ipv6",
    };
    let way = format!("{host} to {} port {METADATA_PORT}", service.address_for(host));
    if !has_route(host, service) {
        return Finding::skipped(check, format!("{way}: the node has no route there, so it cannot be tried from it"));
    }
    let stream = match connect_marked(host, service).await {
        Ok(stream) => stream,
        Err(error) => {
            let detail = format!("{way}: {error}");
            return match error.kind() {
                ErrorKind::PermissionDenied => {
                    Finding::skipped(check, format!("{detail}: marking a connection takes CAP_NET_ADMIN"))
                }
                ErrorKind::AddrNotAvailable => Finding::failed(
                    check,
                    detail,
                    format!(
                        "--host-ip {host} is no address of this node: give one (status.hostIPs), and run in the \
                         node's network namespace (hostNetwork)"
                    ),
                ),
                ErrorKind::ConnectionRefused => {
                    let detail = format!("{detail}: the agent does not listen on port {port}, or there is no redirect");
                    Finding::failed(check, detail, "start the agent; if it does not start, its log says why")
                }
                _ => Finding::failed(check, format!("{detail}: the redirect is not there"), AGAIN),
            };
        }
    };
    match get(stream, "/").await {
        Ok(answer) => match answer.headers().get(SERVER).map(|server| String::from_utf8_lossy(server.as_bytes())) {
            Some(server) if server == "kirsa" => Finding::ok(check, format!("{way} is answered by kirsa")),
            server => {
                let server = server.unwrap_or_else(|| "a server without a name".into());
                let detail = format!("{way} is answered by {server}: pods' connections may get there too");
                Finding::failed(check, detail, AGAIN)
            }
        },
        Err(error) => Finding::failed(check, format!("{way} is answered by what is no HTTP server: {error:#}"), AGAIN),
    }
}
