//! Validates flags that clap's parsers cannot check, and converts them to [`Config`]. Stops at the first invalid value.

use std::{
    net::{IpAddr, Ipv4Addr, Ipv6Addr},
    path::PathBuf,
    time::Duration,
};

use super::{
    Config, Metadata, Source, Sts,
    args::{AttributionArgs, KubernetesArgs, RunArgs},
};
use crate::{
    intercept::{HostAddresses, Limits},
    serve::{
        imdsv2::{NamespacePattern, RequireImdsV2},
        node_metadata::{
            IDENTITY_DOCUMENT,
            groups::{self, Allowed},
        },
    },
};

/// S3-compatible stores have no regions, but the SDK needs a name.
const ANY_REGION: &str = "us-east-1";

/// Returns an error that names the flag, the value and the accepted form.
pub(super) fn wrong<T>(flag: &str, value: impl std::fmt::Display, right: &str) -> Result<T, String> {
    Err(format!("--{flag} {value}: {right}"))
}

impl TryFrom<RunArgs> for Config {
    type Error = String;

    fn try_from(args: RunArgs) -> Result<Self, String> {
        let RunArgs { node, interception, attribution, kubernetes, aws, credentials, container, metadata, operation } =
            args;
        log_level(&operation.log_level)?;
        audience("audience", &kubernetes.audience)?;
        audience("container-audience", &container.container_audience)?;
        annotation_prefix(&kubernetes.annotation_prefix)?;
        if container.container_credentials && attribution.workloads.is_some() {
            return wrong(
                "container-credentials",
                "with --workloads",
                "needs Kubernetes, whose API server reviews the tokens; remove one of the two flags",
            );
        }
        Ok(Self {
            host: host_addresses(&node.host_ip)?,
            port: interception.port,
            state_dir: node.state_dir,
            intercept: interception.intercept,
            limits: Limits {
                total: interception.max_connections,
                per_source: interception.max_connections_per_source,
                requests_per_source: interception.max_requests_per_source,
            },
            sts: sts([aws.region, aws.node_region], aws.sts_endpoint_url)?,
            annotation_prefix: kubernetes.annotation_prefix.clone(),
            audience: kubernetes.audience.clone(),
            source: source(node.node_name, attribution, kubernetes)?,
            session_duration: credentials.session_duration,
            session_scope: credentials.session_scope,
            exchange_rate: credentials.exchange_rate,
            exchange_burst: credentials.exchange_burst,
            start_window: Duration::from_secs(credentials.start_window),
            require_imdsv2: RequireImdsV2 {
                everywhere: credentials.require_imdsv2,
                namespaces: namespaces(&credentials.require_imdsv2_namespaces)?,
            },
            container_audience: container.container_credentials.then_some(container.container_audience),
            metadata: node_metadata(metadata.node_metadata, metadata.node_metadata_value)?,
            admin_address: operation.admin_address,
            admin_socket: unless_none(operation.admin_socket),
            drain: Duration::from_secs(operation.drain),
            log_format: operation.log_format,
            log_level: operation.log_level,
        })
    }
}

/// Returns the path, unless it is the word "none".
fn unless_none(path: PathBuf) -> Option<PathBuf> {
    (path.as_os_str() != "none").then_some(path)
}

fn source(node_name: String, attribution: AttributionArgs, kubernetes: KubernetesArgs) -> Result<Source, String> {
    if let Some(file) = attribution.workloads {
        return Ok(Source::File(file));
    }
    if node_name.is_empty() {
        return wrong(
            "node-name",
            "''",
            "must be the name of this node (downward API: spec.nodeName); --workloads runs without Kubernetes",
        );
    }
    Ok(Source::Kubernetes {
        node_name,
        kubeconfig: kubernetes.kubeconfig,
        mint: kubernetes.minting,
        cni_results: unless_none(attribution.cni_results),
        startup_taint: startup_taint(kubernetes.startup_taint)?,
    })
}

fn audience(flag: &str, audience: &str) -> Result<(), String> {
    if audience.is_empty() || audience.chars().any(char::is_whitespace) {
        return wrong(flag, format_args!("{audience:?}"), "must be one word, such as sts.amazonaws.com");
    }
    Ok(())
}

fn annotation_prefix(prefix: &str) -> Result<(), String> {
    if prefix.is_empty() || !prefix.chars().all(|c| c.is_ascii_alphanumeric() || "-.".contains(c)) {
        let right = "must be a DNS name without a slash, such as eks.amazonaws.com";
        return wrong("annotation-prefix", format_args!("{prefix:?}"), right);
    }
    Ok(())
}

fn host_addresses(given: &[IpAddr]) -> Result<HostAddresses, String> {
    let mut host = HostAddresses { v4: None::<Ipv4Addr>, v6: None::<Ipv6Addr> };
    for address in given {
        if address.is_loopback() || address.is_unspecified() || address.is_multicast() {
            return wrong(
                "host-ip",
                address,
                "must be an address of this node that pods can reach; redirecting to loopback would need \
                 route_localnet (CVE-2020-8558)",
            );
        }
        let taken = match address {
            IpAddr::V4(v4) => host.v4.replace(*v4).is_some(),
            IpAddr::V6(v6) => host.v6.replace(*v6).is_some(),
        };
        if taken {
            return wrong(
                "host-ip",
                address,
                "is the second of its family; give at most one IPv4 and one IPv6 address",
            );
        }
    }
    Ok(host)
}

/// Rejects unknown levels: the filter would take one for a module name, and drop all other messages.
fn log_level(given: &str) -> Result<(), String> {
    const LEVELS: [&str; 6] = ["off", "error", "warn", "info", "debug", "trace"];
    let right = "must be off, error, warn, info, debug or trace, or directives such as warn,kirsa=debug";
    let is_level = |word: &str| LEVELS.iter().any(|level| level.eq_ignore_ascii_case(word));
    for directive in given.split(',').map(str::trim).filter(|directive| !directive.is_empty()) {
        if !is_level(directive) && !directive.rsplit_once('=').is_some_and(|(_, level)| is_level(level)) {
            return wrong("log-level", given, right);
        }
    }
    if given.trim().is_empty() { wrong("log-level", "''", right) } else { Ok(()) }
}

fn startup_taint(key: String) -> Result<Option<String>, String> {
    if key.contains([':', '=']) || key.contains(char::is_whitespace) {
        return wrong("startup-taint", key, "must be the taint's key alone, such as kirsa.dev/not-ready");
    }
    Ok((!key.is_empty()).then_some(key))
}

fn namespaces(given: &[String]) -> Result<Vec<NamespacePattern>, String> {
    let read = |name: &String| match NamespacePattern::parse(name) {
        Some(namespaces) => Ok(namespaces),
        None => wrong(
            "require-imdsv2-namespaces",
            format_args!("{name:?}"),
            "must be the name of a namespace, or a prefix followed by *, such as shop,team-*",
        ),
    };
    given.iter().map(read).collect()
}

fn node_metadata(allowed: Vec<String>, values: Vec<String>) -> Result<Metadata, String> {
    let allowed = Allowed::parse(&allowed).or_else(|(word, right)| wrong("node-metadata", word, &right))?;
    let mut given = Vec::new();
    for pair in values {
        let Some((path, value)) = pair.split_once('=').filter(|(_, value)| !value.is_empty()) else {
            return wrong("node-metadata-value", pair, "must be PATH=VALUE");
        };
        groups::check(path, "").or_else(|right| wrong("node-metadata-value", path, &right))?;
        if path == IDENTITY_DOCUMENT {
            return wrong(
                "node-metadata-value",
                path,
                "is generated from the other values: set meta-data/placement/region=…",
            );
        }
        given.push((path.to_owned(), value.to_owned()));
    }
    Ok(Metadata { allowed, given })
}

/// Chooses the first non-empty region: the downward API turns a missing label into an empty string. Outside AWS that
/// label need not be an AWS region.
pub(super) fn sts(regions: [Option<String>; 2], endpoint: Option<String>) -> Result<Sts, String> {
    if let Some(url) = &endpoint {
        let scheme = url.parse::<http::Uri>().ok().and_then(|uri| uri.scheme_str().map(str::to_owned));
        if !matches!(scheme.as_deref(), Some("http" | "https")) {
            return wrong("sts-endpoint-url", url, "must be an http:// or https:// URL");
        }
    }
    let grammar = |c: char| c.is_ascii_lowercase() || c.is_ascii_digit() || c == '-';
    let flags = ["region", "node-region"];
    match regions
        .into_iter()
        .zip(flags)
        .find_map(|(given, flag)| Some((given?, flag)).filter(|(region, _)| !region.is_empty()))
    {
        Some((region, _)) if region.chars().all(grammar) => Ok(Sts { region, endpoint }),
        Some((_, "node-region")) if endpoint.is_some() => Ok(Sts { region: ANY_REGION.into(), endpoint }),
        Some((region, "node-region")) => wrong(
            "node-region",
            region,
            "the node's label topology.kubernetes.io/region is not an AWS region; set the region of the STS endpoint with \
             --region (KIRSA_REGION in the DaemonSet's ConfigMap)",
        ),
        Some((region, _)) => wrong("region", region, "must be an AWS region, such as eu-central-1"),
        None if endpoint.is_some() => Ok(Sts { region: ANY_REGION.into(), endpoint }),
        None => wrong(
            "region",
            "''",
            "must be the AWS region of the STS endpoint, such as eu-central-1 (KIRSA_REGION in the DaemonSet's ConfigMap; \
             this pod has no label topology.kubernetes.io/region to take it from)",
        ),
    }
}
