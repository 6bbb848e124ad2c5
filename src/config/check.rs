//! From values as they were given to what they mean; the first one that is wrong ends it.

use std::{
    net::{IpAddr, Ipv4Addr, Ipv6Addr},
    time::Duration,
};

use super::{Config, MAX_SESSION, MIN_SESSION, Metadata, Source, Sts, args::RunArgs};
use crate::{
    intercept::{HostAddresses, Limits},
    serve::{
        imdsv2::{Namespaces, Required},
        node_metadata::{
            IDENTITY_DOCUMENT,
            groups::{self, Allowed},
        },
    },
};

/// More than any node has memory for.
const MAX_CONNECTIONS: usize = 1 << 20;
/// In seconds: SDKs fetch anew when they have a quarter of an hour left.
const MAX_START_WINDOW: u64 = 900;

/// Of a store that has no regions.
const ANY_REGION: &str = "us-east-1";

/// The sentence that names the flag, the value and what would be right.
pub(super) fn wrong<T>(flag: &str, value: impl std::fmt::Display, right: &str) -> Result<T, String> {
    Err(format!("--{flag} {value}: {right}"))
}

impl TryFrom<RunArgs> for Config {
    type Error = String;

    fn try_from(args: RunArgs) -> Result<Self, String> {
        let host = host_addresses(&args.host_ip)?;
        if args.port == 0 {
            return wrong("port", 0, "the redirect needs a fixed port, from 1 to 65535");
        }
        for (flag, is_none) in [
            ("max-connections", args.max_connections == 0),
            ("max-connections-per-source", args.max_connections_per_source == 0),
            ("max-requests-per-source", args.max_requests_per_source == 0),
            ("exchange-rate", args.exchange_rate == 0),
            ("exchange-burst", args.exchange_burst == 0),
        ] {
            if is_none {
                return wrong(flag, 0, "must be 1 at least, or no pod would be served");
            }
        }
        if args.max_connections > MAX_CONNECTIONS {
            return wrong("max-connections", args.max_connections, "must be 1048576 at most: each may need 32 KiB");
        }
        log_level(&args.log_level)?;
        if args.start_window > MAX_START_WINDOW {
            return wrong(
                "start-window",
                args.start_window,
                "must be from 0 to 900 seconds: pods whose SDKs fetch anew meanwhile wait for STS",
            );
        }
        if !(MIN_SESSION..=MAX_SESSION).contains(&args.session_duration) {
            return wrong(
                "session-duration",
                args.session_duration,
                "must be from 1800 to 43200 seconds: with less, SDKs such as botocore and the Java SDK fetch again \
                 on every call, or stretch what is left and sign with expired keys",
            );
        }
        for (flag, audience) in [("audience", &args.audience), ("container-audience", &args.container_audience)] {
            if audience.is_empty() || audience.chars().any(char::is_whitespace) {
                return wrong(flag, format_args!("{audience:?}"), "must be one word, such as sts.amazonaws.com");
            }
        }
        if args.container_credentials && args.workloads.is_some() {
            return wrong(
                "container-credentials",
                "with --workloads",
                "needs Kubernetes, whose API server says which pod a token is of; leave one of the two out",
            );
        }
        let prefix_ok = |c: char| c.is_ascii_alphanumeric() || "-.".contains(c);
        if args.annotation_prefix.is_empty() || !args.annotation_prefix.chars().all(prefix_ok) {
            return wrong(
                "annotation-prefix",
                format_args!("{:?}", args.annotation_prefix),
                "must be a DNS name without a slash, such as eks.amazonaws.com",
            );
        }
        Ok(Self {
            host,
            port: args.port,
            state_dir: args.state_dir,
            intercept: args.intercept,
            limits: Limits {
                total: args.max_connections,
                per_source: args.max_connections_per_source,
                requests_per_source: args.max_requests_per_source,
            },
            sts: sts([args.region, args.node_region], args.sts_endpoint_url)?,
            source: match args.workloads {
                Some(file) => Source::File(file),
                None if args.node_name.is_empty() => {
                    return wrong(
                        "node-name",
                        "''",
                        "must be this node's name (downward API: spec.nodeName), or give --workloads to run without \
                         Kubernetes",
                    );
                }
                None => Source::Kubernetes {
                    node_name: args.node_name,
                    kubeconfig: args.kubeconfig,
                    mint: args.mint,
                    cni_results: (args.cni_results.as_os_str() != "none").then_some(args.cni_results),
                    startup_taint: startup_taint(args.startup_taint)?,
                },
            },
            annotation_prefix: args.annotation_prefix,
            audience: args.audience,
            session_duration: args.session_duration,
            session_scope: args.session_scope,
            exchange_rate: args.exchange_rate,
            exchange_burst: args.exchange_burst,
            start_window: Duration::from_secs(args.start_window),
            require_imdsv2: Required {
                everywhere: args.require_imdsv2,
                namespaces: namespaces(&args.require_imdsv2_namespaces)?,
            },
            container_audience: args.container_credentials.then_some(args.container_audience),
            metadata: metadata(args.node_metadata, args.node_metadata_value)?,
            admin_address: args.admin_address,
            admin_socket: (args.admin_socket.as_os_str() != "none").then_some(args.admin_socket),
            drain: Duration::from_secs(args.drain),
            log_format: args.log_format,
            log_level: args.log_level,
        })
    }
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

/// A word that is no level would be taken for the name of a module, and silence everything else.
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

fn namespaces(given: &[String]) -> Result<Vec<Namespaces>, String> {
    let read = |name: &String| match Namespaces::parse(name) {
        Some(namespaces) => Ok(namespaces),
        None => wrong(
            "require-imdsv2-namespaces",
            format_args!("{name:?}"),
            "must be the name of a namespace, or the beginning of some with a * after it, such as shop,team-*",
        ),
    };
    given.iter().map(read).collect()
}

fn metadata(allowed: Vec<String>, values: Vec<String>) -> Result<Metadata, String> {
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
                "is made of the other values: give meta-data/placement/region=…",
            );
        }
        given.push((path.to_owned(), value.to_owned()));
    }
    Ok(Metadata { allowed, given })
}

/// The first region that is no empty string: the downward API makes that of a label that is not there. What that label
/// says of a node outside AWS need not be AWS's grammar.
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
            "the node's label topology.kubernetes.io/region is no AWS region; give the one whose STS is asked with \
             --region (KIRSA_REGION in the DaemonSet's ConfigMap)",
        ),
        Some((region, _)) => wrong("region", region, "must be an AWS region, such as eu-central-1"),
        // An S3-compatible store has no regions; the SDK wants a name all the same.
        None if endpoint.is_some() => Ok(Sts { region: ANY_REGION.into(), endpoint }),
        None => wrong(
            "region",
            "''",
            "must be the AWS region whose STS is asked, such as eu-central-1 (KIRSA_REGION in the DaemonSet's \
                 ConfigMap; this pod has no label topology.kubernetes.io/region to take it from)",
        ),
    }
}
