//! Command line and environment → [`Config`]: read first, given meaning once. Pure: nothing here touches the node.
//!
//! A wrong value is refused in one sentence that names the flag, the value and what would be right.

use std::{
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr},
    path::PathBuf,
    process::ExitCode,
    time::Duration,
};

use clap::{Args as ClapArgs, CommandFactory, Parser, Subcommand, error::ErrorKind};

use crate::{
    authorise::{Defaults, Scope},
    doctor,
    intercept::{Backend, HostAddresses, Limits},
    kubernetes::Mint,
    observe::LogFormat,
    serve::{
        imdsv2::{Namespaces, Required},
        upstream::{self, ALLOWABLE},
    },
};

/// Below this, SDKs such as botocore refetch on every call, or stretch what is left and sign with dead keys.
pub const MIN_SESSION: u32 = 1_800;
/// The longest session that STS grants for a role.
pub const MAX_SESSION: u32 = 43_200;
/// Exchanges of a node, per second and at once: docs/capacity.md says what thousands of nodes make of it.
pub const EXCHANGES: (u32, u32) = (20, 50);

#[derive(Debug, Parser)]
#[command(name = "kirsa", version, about, max_term_width = 100)]
struct Cli {
    #[command(subcommand)]
    command: CliCommand,
}

#[derive(Debug, Subcommand)]
enum CliCommand {
    /// Answer the instance metadata service for the pods of this node.
    Run(Box<RunArgs>),
    /// Remove the redirect that `run` leaves in place on purpose when it ends.
    Uninstall(UninstallArgs),
    /// Say what stands between this node's pods and their credentials, and what to do about it. Changes nothing.
    /// Takes the flags and the environment of `run`; ends with 1 if something failed.
    Doctor(Box<DoctorArgs>),
}

#[derive(Debug, ClapArgs)]
struct DoctorArgs {
    #[command(flatten)]
    run: RunArgs,
    /// For a person, or for a program.
    #[arg(long, default_value = "text", value_name = "FORMAT", help_heading = "Output")]
    output: doctor::Output,
    /// Do not exchange a token for a session, which would be dropped at once.
    #[arg(long, help_heading = "Output")]
    no_exchange: bool,
}

#[derive(Debug, ClapArgs)]
struct UninstallArgs {
    /// Which rules to look for: auto removes both kinds.
    #[arg(long, env = "KIRSA_INTERCEPT", default_value = "auto", value_name = "KIND")]
    intercept: Backend,
}

/// Values as they were given; [`Config`] is what they mean.
#[derive(Debug, ClapArgs)]
struct RunArgs {
    /// This node's name, as Kubernetes knows it (downward API: spec.nodeName).
    #[arg(long, env = "NODE_NAME", default_value = "", value_name = "NAME", help_heading = "Node")]
    node_name: String,
    /// This node's addresses, at most one of each family (downward API: status.hostIPs). kirsa listens on them, and
    /// the redirect leads to them.
    #[arg(
        long,
        env = "HOST_IP",
        value_delimiter = ',',
        required = true,
        value_name = "IP[,IP]",
        help_heading = "Node"
    )]
    host_ip: Vec<IpAddr>,
    /// Where the key of IMDSv2 session tokens survives a restart.
    #[arg(long, env = "KIRSA_STATE_DIR", default_value = "/var/lib/kirsa", value_name = "DIR", help_heading = "Node")]
    state_dir: PathBuf,

    /// How connections to the metadata address are brought here: nftables, iptables, whichever works, or by a
    /// redirect of your own.
    #[arg(long, env = "KIRSA_INTERCEPT", default_value = "auto", value_name = "KIND", help_heading = "Interception")]
    intercept: Backend,
    /// The port of the node that the redirect leads to.
    #[arg(long, env = "KIRSA_PORT", default_value_t = 8181, value_name = "PORT", help_heading = "Interception")]
    port: u16,
    /// Connections that are open at once, from all pods together; more are answered 503.
    #[arg(
        long,
        env = "KIRSA_MAX_CONNECTIONS",
        default_value_t = 2_048,
        value_name = "N",
        help_heading = "Interception"
    )]
    max_connections: usize,
    /// Connections that are open at once from one address; more are answered 503.
    #[arg(
        long,
        env = "KIRSA_MAX_CONNECTIONS_PER_SOURCE",
        default_value_t = 64,
        value_name = "N",
        help_heading = "Interception"
    )]
    max_connections_per_source: usize,
    /// Requests per second from one address, and as many at once; more are held up to 300 ms, then answered 503.
    #[arg(
        long,
        env = "KIRSA_MAX_REQUESTS_PER_SOURCE",
        default_value_t = 500,
        value_name = "N",
        help_heading = "Interception"
    )]
    max_requests_per_source: u32,

    /// Where the container runtime records the addresses of pods before they start; "none" waits for the API server
    /// to show them.
    #[arg(
        long,
        env = "KIRSA_CNI_RESULTS",
        default_value = "/var/lib/cni/results",
        value_name = "DIR",
        help_heading = "Attribution"
    )]
    cni_results: PathBuf,
    /// Workloads from a YAML file instead of Kubernetes; read again whenever it changes.
    #[arg(long, env = "KIRSA_WORKLOADS", value_name = "FILE", help_heading = "Attribution")]
    workloads: Option<PathBuf>,

    /// Credentials for the API server; without it, those of the pod that kirsa runs in.
    #[arg(long, env = "KUBECONFIG", value_name = "FILE", help_heading = "Kubernetes")]
    kubeconfig: Option<PathBuf>,
    /// How tokens of other pods' service accounts are minted: impersonating this node (Kubernetes >= 1.36), directly
    /// (fenced by an admission policy), or whichever the agent was granted.
    #[arg(long, env = "KIRSA_MINT", default_value = "auto", value_name = "WAY", help_heading = "Kubernetes")]
    mint: Mint,
    /// The audience of those tokens, unless the service account's annotation names another.
    #[arg(
        long,
        env = "KIRSA_AUDIENCE",
        default_value = "sts.amazonaws.com",
        value_name = "AUDIENCE",
        help_heading = "Kubernetes"
    )]
    audience: String,
    /// What the annotations that IRSA defines begin with, on service accounts.
    #[arg(
        long,
        env = "KIRSA_ANNOTATION_PREFIX",
        default_value = "eks.amazonaws.com",
        value_name = "PREFIX",
        help_heading = "Kubernetes"
    )]
    annotation_prefix: String,

    /// A taint of this node to take off once the agent is ready, such as kirsa.dev/not-ready: nodes that join with it
    /// get no other pods before.
    #[arg(
        long,
        env = "KIRSA_STARTUP_TAINT",
        default_value = "",
        hide_default_value = true,
        value_name = "KEY",
        help_heading = "Kubernetes"
    )]
    startup_taint: String,

    /// The AWS region whose STS is asked.
    #[arg(long, env = "AWS_REGION", value_name = "REGION", help_heading = "AWS")]
    region: Option<String>,
    /// Another STS: an S3-compatible store's (MinIO, Ceph), or a VPC endpoint.
    #[arg(long, env = "KIRSA_STS_ENDPOINT_URL", value_name = "URL", help_heading = "AWS")]
    sts_endpoint_url: Option<String>,

    /// How long a session lasts, in seconds, unless the service account's annotation says otherwise.
    #[arg(
        long,
        env = "KIRSA_SESSION_DURATION",
        default_value_t = 3_600,
        value_name = "SECONDS",
        help_heading = "Credentials"
    )]
    session_duration: u32,
    /// Who shares a session: the pods of one service account on this node, or nobody.
    #[arg(
        long,
        env = "KIRSA_SESSION_SCOPE",
        default_value = "service-account",
        value_name = "SCOPE",
        help_heading = "Credentials"
    )]
    session_scope: Scope,
    /// Exchanges per second that this node makes at most, each of them one TokenRequest and one call of STS. Pods that
    /// wait come before those that are going to, and these before refreshes.
    #[arg(long, env = "KIRSA_EXCHANGE_RATE", default_value_t = EXCHANGES.0, value_name = "N", help_heading = "Credentials")]
    exchange_rate: u32,
    /// Exchanges that may come at once, after a while without any.
    #[arg(long, env = "KIRSA_EXCHANGE_BURST", default_value_t = EXCHANGES.1, value_name = "N", help_heading = "Credentials")]
    exchange_burst: u32,
    /// Refuse IMDSv1 (requests without a session token), of all pods. Breaks boto2, botocore before 1.13, the JavaScript SDK
    /// before 2.575, the Go SDK before 1.25 and s3fs.
    #[arg(long, env = "KIRSA_REQUIRE_IMDSV2", help_heading = "Credentials")]
    require_imdsv2: bool,
    /// Refuse it of the pods of these namespaces: names with commas between, a * at the end of one for any ending.
    /// The annotation kirsa.dev/require-imdsv2 adds service accounts to them, and takes none away.
    #[arg(
        long,
        env = "KIRSA_REQUIRE_IMDSV2_NAMESPACES",
        value_delimiter = ',',
        value_name = "NAME[,NAME*]",
        help_heading = "Credentials"
    )]
    require_imdsv2_namespaces: Vec<String>,

    /// Serve container credentials too, as EKS Pod Identity does, at http://169.254.170.23/v1/credentials and
    /// http://[fd00:ec2::23]/v1/credentials, to pods that present a service account token of their own. Needs
    /// Kubernetes and the right to create tokenreviews. Not beside an EKS Pod Identity agent: it would get no more
    /// requests. A redirect of your own (--intercept none) must keep the destination.
    #[arg(long, env = "KIRSA_CONTAINER_CREDENTIALS", help_heading = "Container credentials")]
    container_credentials: bool,
    /// The audience of the tokens that pods present there.
    #[arg(
        long,
        env = "KIRSA_CONTAINER_AUDIENCE",
        default_value = "pods.eks.amazonaws.com",
        value_name = "AUDIENCE",
        help_heading = "Container credentials"
    )]
    container_audience: String,

    /// What pods may read of the node's own metadata, as exact paths with commas between, or "none". The identity
    /// document names the account of the pod's role.
    #[arg(
        long,
        env = "KIRSA_NODE_METADATA",
        default_value = upstream::DEFAULT,
        value_delimiter = ',',
        value_name = "PATH[,PATH]",
        help_heading = "Metadata"
    )]
    node_metadata: Vec<String>,
    /// A value to serve instead of the node's own, such as meta-data/placement/region=eu-central-1, for nodes that have
    /// no metadata service.
    #[arg(
        long,
        env = "KIRSA_NODE_METADATA_VALUE",
        value_delimiter = ',',
        value_name = "PATH=VALUE",
        help_heading = "Metadata"
    )]
    node_metadata_value: Vec<String>,

    /// Where metrics and health are served. Pods must not reach it.
    #[arg(
        long,
        env = "KIRSA_ADMIN_ADDRESS",
        default_value = "127.0.0.1:8182",
        value_name = "ADDRESS",
        help_heading = "Operation"
    )]
    admin_address: SocketAddr,
    /// How long open requests may take to end after SIGTERM, in seconds.
    #[arg(long, env = "KIRSA_DRAIN", default_value_t = 5, value_name = "SECONDS", help_heading = "Operation")]
    drain: u64,
    /// One JSON object a line, or text for a person.
    #[arg(long, env = "KIRSA_LOG_FORMAT", default_value = "json", value_name = "FORMAT", help_heading = "Operation")]
    log_format: LogFormat,
    /// What is logged, as `info` or `warn,kirsa=debug`.
    #[arg(long, env = "KIRSA_LOG_LEVEL", default_value = "info", value_name = "FILTER", help_heading = "Operation")]
    log_level: String,
}

/// What kirsa was asked to do.
#[derive(Debug)]
pub enum Command {
    Run(Box<Config>),
    Uninstall(Backend),
    Doctor(Box<Config>, doctor::Options),
}

/// A valid configuration of `kirsa run`.
#[derive(Debug, Clone)]
pub struct Config {
    pub host: HostAddresses,
    pub port: u16,
    pub state_dir: PathBuf,
    pub intercept: Backend,
    pub limits: Limits,
    pub source: Source,
    pub sts: Sts,
    pub annotation_prefix: String,
    pub audience: String,
    pub session_duration: u32,
    pub session_scope: Scope,
    pub exchange_rate: u32,
    pub exchange_burst: u32,
    pub require_imdsv2: Required,
    /// The audience of the tokens that pods present for container credentials, where those are served.
    pub container_audience: Option<String>,
    pub metadata: Metadata,
    pub admin_address: SocketAddr,
    pub drain: Duration,
    pub log_format: LogFormat,
    pub log_level: String,
}

/// Where pods and their service accounts are learnt from.
#[derive(Debug, Clone)]
pub enum Source {
    File(PathBuf),
    Kubernetes {
        node_name: String,
        kubeconfig: Option<PathBuf>,
        mint: Mint,
        cni_results: Option<PathBuf>,
        startup_taint: Option<String>,
    },
}

impl Config {
    /// What a service account gets where its annotations say nothing else.
    pub fn defaults(&self) -> Defaults {
        Defaults {
            prefix: self.annotation_prefix.clone(),
            audience: self.audience.clone(),
            duration: self.session_duration,
            durations: MIN_SESSION..=MAX_SESSION,
            scope: self.session_scope,
            foreign_arns: self.sts.endpoint.is_some(),
        }
    }
}

/// Which STS is asked.
#[derive(Debug, Clone)]
pub struct Sts {
    pub region: String,
    pub endpoint: Option<String>,
}

/// What pods may know of the node: paths that are read from its own metadata service, and values that are given.
#[derive(Debug, Clone)]
pub struct Metadata {
    pub allowed: Vec<String>,
    pub given: Vec<(String, String)>,
}

/// Reads the process's own command line and environment.
///
/// # Errors
/// The exit code: 0 after `--help` and `--version`, 2 after saying what is wrong.
pub fn parse() -> Result<Command, ExitCode> {
    parse_from(std::env::args_os()).map_err(|error| {
        // Nothing is left to be done about a closed stderr.
        let _ = error.print();
        ExitCode::from(u8::try_from(error.exit_code()).unwrap_or(2))
    })
}

fn parse_from(args: impl IntoIterator<Item = std::ffi::OsString>) -> Result<Command, clap::Error> {
    let config = |args| {
        let config = Config::try_from(args).map(Box::new);
        config.map_err(|wrong| Cli::command().error(ErrorKind::ValueValidation, wrong))
    };
    match Cli::try_parse_from(args)?.command {
        CliCommand::Uninstall(args) => Ok(Command::Uninstall(args.intercept)),
        CliCommand::Run(args) => config(*args).map(Command::Run),
        CliCommand::Doctor(args) => {
            let options = doctor::Options { output: args.output, exchange: !args.no_exchange };
            config(args.run).map(|config| Command::Doctor(config, options))
        }
    }
}

/// The sentence that names the flag, the value and what would be right.
fn wrong<T>(flag: &str, value: impl std::fmt::Display, right: &str) -> Result<T, String> {
    Err(format!("--{flag} {value}: {right}"))
}

impl TryFrom<RunArgs> for Config {
    type Error = String;

    fn try_from(args: RunArgs) -> Result<Self, String> {
        let host = host_addresses(&args.host_ip)?;
        if args.port == 0 {
            return wrong("port", 0, "the redirect needs a fixed port, from 1 to 65535");
        }
        if args.max_connections == 0 || args.max_connections_per_source == 0 || args.max_requests_per_source == 0 {
            return wrong(
                "max-connections",
                0,
                "at least 1 connection, and 1 request a second, must be allowed, in total and per source",
            );
        }
        if args.exchange_rate == 0 || args.exchange_burst == 0 {
            return wrong("exchange-rate", 0, "at least 1 exchange a second, and 1 at once, must be allowed");
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
            sts: sts(args.region, args.sts_endpoint_url)?,
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
                    startup_taint: (!args.startup_taint.is_empty()).then_some(args.startup_taint),
                },
            },
            annotation_prefix: args.annotation_prefix,
            audience: args.audience,
            session_duration: args.session_duration,
            session_scope: args.session_scope,
            exchange_rate: args.exchange_rate,
            exchange_burst: args.exchange_burst,
            require_imdsv2: Required {
                everywhere: args.require_imdsv2,
                namespaces: namespaces(&args.require_imdsv2_namespaces)?,
            },
            container_audience: args.container_credentials.then_some(args.container_audience),
            metadata: metadata(args.node_metadata, args.node_metadata_value)?,
            admin_address: args.admin_address,
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
    let known = |flag: &str, path: &str| match ALLOWABLE.contains(&path) {
        true => Ok(()),
        false => wrong(flag, path, &format!("must be one of {}", ALLOWABLE.join(", "))),
    };
    let allowed = if allowed == ["none"] { Vec::new() } else { allowed };
    allowed.iter().try_for_each(|path| known("node-metadata", path))?;
    let mut given = Vec::new();
    for pair in values {
        let Some((path, value)) = pair.split_once('=').filter(|(_, value)| !value.is_empty()) else {
            return wrong("node-metadata-value", pair, "must be PATH=VALUE");
        };
        known("node-metadata-value", path)?;
        given.push((path.to_owned(), value.to_owned()));
    }
    Ok(Metadata { allowed, given })
}

fn sts(region: Option<String>, endpoint: Option<String>) -> Result<Sts, String> {
    if let Some(url) = &endpoint {
        let scheme = url.parse::<http::Uri>().ok().and_then(|uri| uri.scheme_str().map(str::to_owned));
        if !matches!(scheme.as_deref(), Some("http" | "https")) {
            return wrong("sts-endpoint-url", url, "must be an http:// or https:// URL");
        }
    }
    let grammar = |c: char| c.is_ascii_lowercase() || c.is_ascii_digit() || c == '-';
    match region.filter(|region| !region.is_empty()) {
        Some(region) if region.chars().all(grammar) => Ok(Sts { region, endpoint }),
        Some(region) => wrong("region", region, "must be an AWS region, such as eu-central-1"),
        // An S3-compatible store has no regions; the SDK wants a name all the same.
        None if endpoint.is_some() => Ok(Sts { region: "us-east-1".into(), endpoint }),
        None => {
            wrong("region", "''", "must be the AWS region whose STS is asked (or AWS_REGION), such as eu-central-1")
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn run(extra: &[&str]) -> Result<Config, String> {
        let base = ["kirsa", "run", "--node-name=n1", "--host-ip=10.0.0.1", "--region=eu-central-1"];
        match parse_from(base.iter().chain(extra).map(Into::into)) {
            Ok(Command::Run(config)) => Ok(*config),
            Ok(other) => panic!("{other:?}"),
            Err(error) => {
                assert_eq!(error.exit_code(), 2);
                Err(error.to_string())
            }
        }
    }

    #[test]
    fn a_plain_start_has_the_documented_defaults() {
        let config = run(&[]).unwrap();
        assert_eq!((config.port, config.session_duration, config.audience.as_str()), (8181, 3600, "sts.amazonaws.com"));
        assert!(matches!(config.source, Source::Kubernetes { cni_results: Some(_), .. }));
        assert!(matches!(run(&["--cni-results=none"]).unwrap().source, Source::Kubernetes { cni_results: None, .. }));
    }

    /// IMDS-20: the refusal says why.
    #[test]
    fn short_sessions_are_refused_with_the_reason() {
        let message = run(&["--session-duration=900"]).unwrap_err();
        assert!(message.contains("--session-duration 900") && message.contains("expired keys"), "{message}");
    }

    #[test]
    fn wrong_values_name_the_flag_the_value_and_the_right_form() {
        for (flag, named) in [
            ("--host-ip=10.0.0.2", "10.0.0.2: is the second of its family"),
            ("--host-ip=127.0.0.1", "--host-ip 127.0.0.1"),
            ("--host-ip=node1", "node1"),
            ("--port=0", "--port 0"),
            ("--require-imdsv2-namespaces=a,B", "--require-imdsv2-namespaces \"B\": must be the name of a namespace"),
            ("--region=EU", "--region EU"),
            ("--audience=a b", "--audience"),
            ("--container-audience=", "--container-audience"),
            ("--annotation-prefix=a/b", "--annotation-prefix"),
            ("--node-metadata=meta-data/iam/info", "--node-metadata meta-data/iam/info: must be one of"),
            ("--node-metadata-value=meta-data/mac", "must be PATH=VALUE"),
            ("--intercept=ebpf", "'ebpf'"),
            ("--mint=magic", "'magic'"),
        ] {
            let message = parse_from(
                ["kirsa", "run", "--node-name=n", "--sts-endpoint-url=http://sts", "--host-ip=10.0.0.1", flag]
                    .iter()
                    .map(Into::into),
            )
            .unwrap_err()
            .to_string();
            assert!(message.contains(named), "{flag}: {message}");
        }
    }

    #[test]
    fn an_endpoint_must_be_a_url_and_without_one_the_region_must_be_known() {
        let message = run(&["--sts-endpoint-url=minio:9000"]).unwrap_err();
        assert!(message.contains("--sts-endpoint-url minio:9000: must be"), "{message}");
        assert!(sts(None, None).unwrap_err().contains("--region"));
    }

    #[test]
    fn doctor_is_configured_as_run_is() {
        let args = ["kirsa", "doctor", "--host-ip=10.0.0.1", "--region=eu-central-1", "--node-name=n", "--port=9000"];
        let Ok(Command::Doctor(config, options)) = parse_from(args.iter().map(Into::into)) else { panic!() };
        assert_eq!((config.port, options.output, options.exchange), (9_000, doctor::Output::Text, true));
    }

    #[test]
    fn container_credentials_are_off_unless_asked_for_and_need_kubernetes() {
        assert_eq!(run(&[]).unwrap().container_audience, None);
        let on = run(&["--container-credentials"]).unwrap();
        assert_eq!(on.container_audience.as_deref(), Some("pods.eks.amazonaws.com"));
        let message = run(&["--container-credentials", "--workloads=w.yaml"]).unwrap_err();
        assert!(message.contains("--container-credentials with --workloads: needs Kubernetes"), "{message}");
    }

    #[test]
    fn without_kubernetes_no_node_name_is_needed() {
        let args = ["kirsa", "run", "--host-ip=10.0.0.1", "--sts-endpoint-url=http://minio:9000", "--workloads=w.yaml"];
        let Ok(Command::Run(config)) = parse_from(args.iter().map(Into::into)) else { panic!() };
        assert!(matches!(config.source, Source::File(_)));
    }
}
