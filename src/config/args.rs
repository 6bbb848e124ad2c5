//! Command-line flags, their defaults and help. `check` validates the values. docs/flags.md is generated from here.

use std::{
    net::{IpAddr, SocketAddr},
    path::PathBuf,
};

use clap::{Args as ClapArgs, Parser, Subcommand, ValueEnum, builder::RangedU64ValueParser};

use super::{EXCHANGES, MAX_SESSION, MIN_SESSION, START_WINDOW};
use crate::{
    authorize::SessionScope,
    intercept::{Backend, port::DEFAULT_PORT},
    kubernetes::MintMode,
    observe::LogFormat,
    serve::node_metadata,
};

/// More than any node has memory for: each connection may need 60 KiB.
const MAX_CONNECTIONS: u64 = 1 << 20;
/// SDKs fetch credentials again when a quarter of an hour is left.
const MAX_START_WINDOW: u64 = 900;

#[derive(Debug, Parser)]
#[command(name = "kirsa", version, about, max_term_width = 100)]
pub(super) struct Cli {
    #[command(subcommand)]
    pub(super) command: CliCommand,
}

#[derive(Debug, Subcommand)]
pub(super) enum CliCommand {
    /// Serve AWS credentials over the instance metadata service to the pods of this node.
    Run(Box<RunArgs>),
    /// Remove the rules that `run` leaves in place when it exits, so that pods never reach the node's role.
    Uninstall(UninstallArgs),
    /// Check everything that pods need for their credentials, and print a fix for each problem. Changes nothing.
    /// Takes the flags and environment of `run`; exits 1 if a check failed.
    Doctor(Box<DoctorArgs>),
    /// Query this container's agent for liveness or readiness (for kubelet exec probes). Exits 1 if unhealthy.
    Health(HealthArgs),
}

#[derive(Debug, ClapArgs)]
pub(super) struct HealthArgs {
    /// Liveness (the event loop runs) or readiness (redirect, pods and service accounts are in place).
    pub(super) health: Health,
    /// The agent's Unix socket: the value that `run` was given.
    #[arg(long, env = "KIRSA_ADMIN_SOCKET", value_name = "PATH")]
    pub(super) admin_socket: PathBuf,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum Health {
    Live,
    Ready,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum Output {
    Text,
    Json,
}

#[derive(Debug, ClapArgs)]
pub(super) struct DoctorArgs {
    #[command(flatten)]
    pub(super) run: RunArgs,
    /// Output format: text for people, json for programs.
    #[arg(long, default_value = "text", value_name = "FORMAT", help_heading = "Output")]
    pub(super) output: Output,
    /// Skip the test exchange of a token at STS. Its session is discarded.
    #[arg(long, help_heading = "Output")]
    pub(super) no_exchange: bool,
}

#[derive(Debug, ClapArgs)]
pub(super) struct UninstallArgs {
    /// Rules to remove; auto removes both kinds.
    #[arg(long, env = "KIRSA_INTERCEPT", default_value = "auto", value_name = "KIND")]
    pub(super) intercept: Backend,
}

/// Raw values of `kirsa run`; [`super::Config`] is the validated form.
#[derive(Debug, ClapArgs)]
pub(super) struct RunArgs {
    #[command(flatten, next_help_heading = "Node")]
    pub(super) node: NodeArgs,
    #[command(flatten, next_help_heading = "Interception")]
    pub(super) interception: InterceptionArgs,
    #[command(flatten, next_help_heading = "Attribution")]
    pub(super) attribution: AttributionArgs,
    #[command(flatten, next_help_heading = "Kubernetes")]
    pub(super) kubernetes: KubernetesArgs,
    #[command(flatten, next_help_heading = "AWS")]
    pub(super) aws: AwsArgs,
    #[command(flatten, next_help_heading = "Credentials")]
    pub(super) credentials: CredentialArgs,
    #[command(flatten, next_help_heading = "Container credentials")]
    pub(super) container: ContainerArgs,
    #[command(flatten, next_help_heading = "Metadata")]
    pub(super) metadata: MetadataArgs,
    #[command(flatten, next_help_heading = "Operation")]
    pub(super) operation: OperationArgs,
}

#[derive(Debug, ClapArgs)]
pub(super) struct NodeArgs {
    /// Name of this node (downward API: spec.nodeName).
    #[arg(long, env = "NODE_NAME", default_value = "", value_name = "NAME")]
    pub(super) node_name: String,
    /// Addresses of this node, at most one per family (downward API: status.hostIPs). kirsa listens on them, and the
    /// redirect leads to them.
    #[arg(long, env = "HOST_IP", value_delimiter = ',', required = true, value_name = "IP[,IP]")]
    pub(super) host_ip: Vec<IpAddr>,
    /// Directory that keeps the key of IMDS tokens across restarts, and the socket for hot restart.
    #[arg(long, env = "KIRSA_STATE_DIR", default_value = "/var/lib/kirsa", value_name = "DIR")]
    pub(super) state_dir: PathBuf,
}

#[derive(Debug, ClapArgs)]
pub(super) struct InterceptionArgs {
    /// How connections to the metadata address are redirected: nft, iptables, auto (the one that works), or none for a
    /// redirect of your own.
    #[arg(long, env = "KIRSA_INTERCEPT", default_value = "auto", value_name = "KIND")]
    pub(super) intercept: Backend,
    /// Port on this node that the redirect leads to. Use a privileged port (below 1024): an ordinary hostNetwork process
    /// could take any other one while the agent is down.
    #[arg(long, env = "KIRSA_PORT", default_value_t = DEFAULT_PORT, value_parser = clap::value_parser!(u16).range(1..))]
    #[arg(value_name = "PORT")]
    pub(super) port: u16,
    /// Maximum number of open connections of all pods. Another one evicts the longest-idle connection of the pod that
    /// holds most, or is refused with 503.
    #[arg(long, env = "KIRSA_MAX_CONNECTIONS", default_value_t = 2_048, value_name = "N")]
    #[arg(value_parser = RangedU64ValueParser::<usize>::new().range(1..=MAX_CONNECTIONS))]
    pub(super) max_connections: usize,
    /// Maximum number of open connections of one pod, or of one address while its pod is unknown. Another one evicts
    /// that pod's longest-idle connection, or is refused with 503.
    #[arg(long, env = "KIRSA_MAX_CONNECTIONS_PER_SOURCE", default_value_t = 64, value_name = "N")]
    #[arg(value_parser = RangedU64ValueParser::<usize>::new().range(1..=MAX_CONNECTIONS))]
    pub(super) max_connections_per_source: usize,
    /// Rate limit per pod, or per address while its pod is unknown, in requests per second; the burst is the same number. Excess requests are delayed
    /// up to 300 ms, then refused with 503.
    #[arg(long, env = "KIRSA_MAX_REQUESTS_PER_SOURCE", default_value_t = 500, value_name = "N")]
    #[arg(value_parser = clap::value_parser!(u32).range(1..))]
    pub(super) max_requests_per_source: u32,
}

#[derive(Debug, ClapArgs)]
pub(super) struct AttributionArgs {
    /// Directory where the container runtime records pods' addresses before they start; "none" relies on the API server
    /// alone.
    #[arg(long, env = "KIRSA_CNI_RESULTS", default_value = "/var/lib/cni/results", value_name = "DIR")]
    pub(super) cni_results: PathBuf,
    /// YAML file with workloads, instead of Kubernetes. It is read again when it changes.
    #[arg(long, env = "KIRSA_WORKLOADS", value_name = "FILE")]
    pub(super) workloads: Option<PathBuf>,
}

#[derive(Debug, ClapArgs)]
pub(super) struct KubernetesArgs {
    /// Kubeconfig for the API server. Default: the service account of kirsa's own pod.
    #[arg(long, env = "KUBECONFIG", value_name = "FILE")]
    pub(super) kubeconfig: Option<PathBuf>,
    /// How tokens of pods' service accounts are minted: impersonation (of this node, Kubernetes >= 1.36), direct (limited
    /// by an admission policy), or auto (the one that RBAC allows).
    #[arg(long, env = "KIRSA_MINTING", default_value = "auto", value_name = "MODE")]
    pub(super) minting: MintMode,
    /// Default audience of these tokens; an annotation of the service account overrides it.
    #[arg(long, env = "KIRSA_AUDIENCE", default_value = "sts.amazonaws.com", value_name = "AUDIENCE")]
    pub(super) audience: String,
    /// Prefix of IRSA's annotations on service accounts.
    #[arg(long, env = "KIRSA_ANNOTATION_PREFIX", default_value = "eks.amazonaws.com", value_name = "PREFIX")]
    pub(super) annotation_prefix: String,
    /// Key of a taint to remove from this node once the agent is ready, such as kirsa.dev/not-ready. Nodes that join with
    /// that taint get no other pods before.
    #[arg(long, env = "KIRSA_STARTUP_TAINT", default_value = "", hide_default_value = true, value_name = "KEY")]
    pub(super) startup_taint: String,
}

#[derive(Debug, ClapArgs)]
pub(super) struct AwsArgs {
    /// AWS region of the STS endpoint. Default: --node-region.
    #[arg(long, env = "KIRSA_REGION", value_name = "REGION")]
    pub(super) region: Option<String>,
    /// Region of this node (downward API: metadata.labels['topology.kubernetes.io/region']); empty means unknown.
    #[arg(long, env = "AWS_REGION", value_name = "REGION")]
    pub(super) node_region: Option<String>,
    /// STS endpoint to use instead of AWS's regional one: an S3-compatible store (MinIO, Ceph) or a VPC endpoint.
    #[arg(long, env = "KIRSA_STS_ENDPOINT_URL", value_name = "URL")]
    pub(super) sts_endpoint_url: Option<String>,
}

#[derive(Debug, ClapArgs)]
pub(super) struct CredentialArgs {
    /// Default session duration in seconds; an annotation of the service account overrides it. Minimum
    /// 1800, maximum 43200.
    #[arg(long, env = "KIRSA_SESSION_DURATION", default_value_t = 3_600, value_name = "SECONDS")]
    #[arg(value_parser = session_duration)]
    pub(super) session_duration: u32,
    /// Which pods share a session: service-account (its pods on this node) or pod (none).
    #[arg(long, env = "KIRSA_SESSION_SCOPE", default_value = "service-account", value_name = "SCOPE")]
    pub(super) session_scope: SessionScope,
    /// Rate limit of this node's exchanges per second. An exchange is one TokenRequest and one call of STS. Waiting pods
    /// come first, then prefetch, then refresh.
    #[arg(long, env = "KIRSA_EXCHANGE_RATE", default_value_t = EXCHANGES.0, value_name = "N")]
    #[arg(value_parser = clap::value_parser!(u32).range(1..))]
    pub(super) exchange_rate: u32,
    /// Capacity of that token bucket.
    #[arg(long, env = "KIRSA_EXCHANGE_BURST", default_value_t = EXCHANGES.1, value_name = "N")]
    #[arg(value_parser = clap::value_parser!(u32).range(1..))]
    pub(super) exchange_burst: u32,
    /// Seconds over which a starting agent spreads the prefetch for pods that run already. A longer window spreads the
    /// load of a roll-out on STS; a pod that asks earlier gets its own exchange.
    #[arg(long, env = "KIRSA_START_WINDOW", default_value_t = START_WINDOW, value_name = "SECONDS")]
    #[arg(value_parser = clap::value_parser!(u64).range(..=MAX_START_WINDOW))]
    pub(super) start_window: u64,
    /// Require IMDSv2 of all pods. Breaks boto 2, botocore up to 1.13.0, the JavaScript SDK before 2.575, the Go SDK
    /// before 1.25, rusoto, AsyncAws 1.18 and s3fs-fuse.
    #[arg(long, env = "KIRSA_REQUIRE_IMDSV2")]
    pub(super) require_imdsv2: bool,
    /// Require IMDSv2 in these namespaces: comma-separated names; a trailing * matches any suffix. The annotation
    /// kirsa.dev/require-imdsv2 adds service accounts.
    #[arg(long, env = "KIRSA_REQUIRE_IMDSV2_NAMESPACES", value_delimiter = ',', value_name = "NAME[,NAME*]")]
    pub(super) require_imdsv2_namespaces: Vec<String>,
}

#[derive(Debug, ClapArgs)]
pub(super) struct ContainerArgs {
    /// Also serve container credentials, as the EKS Pod Identity Agent does, at http://169.254.170.23/v1/credentials and
    /// http://[fd00:ec2::23]/v1/credentials, to pods that present a token of their own service account. Needs Kubernetes
    /// and the right to create tokenreviews. Takes the requests of an EKS Pod Identity Agent on the same node. A redirect
    /// of your own (--intercept none) must preserve the destination address.
    #[arg(long, env = "KIRSA_CONTAINER_CREDENTIALS")]
    pub(super) container_credentials: bool,
    /// Audience of the tokens that pods present there.
    #[arg(long, env = "KIRSA_CONTAINER_AUDIENCE", default_value = "pods.eks.amazonaws.com", value_name = "AUDIENCE")]
    pub(super) container_audience: String,
}

#[derive(Debug, ClapArgs)]
pub(super) struct MetadataArgs {
    /// Metadata of the node that pods may read: comma-separated exact paths and groups, or "none". Groups: vpc, tags,
    /// lifecycle, and "default" for the default list. The identity document names the account of the pod's role.
    #[arg(long, env = "KIRSA_NODE_METADATA", default_value = node_metadata::DEFAULT, value_delimiter = ',')]
    #[arg(value_name = "PATH|GROUP[,...]")]
    pub(super) node_metadata: Vec<String>,
    /// Values to serve instead of the node's own, such as meta-data/placement/region=eu-central-1, for nodes without a
    /// metadata service.
    #[arg(long, env = "KIRSA_NODE_METADATA_VALUE", value_delimiter = ',', value_name = "PATH=VALUE")]
    pub(super) node_metadata_value: Vec<String>,
}

#[derive(Debug, ClapArgs)]
pub(super) struct OperationArgs {
    /// Address for metrics and health. Pods must not reach it.
    #[arg(long, env = "KIRSA_ADMIN_ADDRESS", default_value = "127.0.0.1:8182", value_name = "ADDRESS")]
    pub(super) admin_address: SocketAddr,
    /// Unix socket for the same, of this process alone: during a hot restart two agents share the admin address.
    /// `kirsa health` asks there. "none" disables it.
    #[arg(long, env = "KIRSA_ADMIN_SOCKET", default_value = "none", value_name = "PATH")]
    pub(super) admin_socket: PathBuf,
    /// Seconds that open requests may take to finish after SIGTERM.
    #[arg(long, env = "KIRSA_DRAIN", default_value_t = 5, value_name = "SECONDS")]
    pub(super) drain: u64,
    /// Log format: json (one object per line) or text.
    #[arg(long, env = "KIRSA_LOG_FORMAT", default_value = "json", value_name = "FORMAT")]
    pub(super) log_format: LogFormat,
    /// Log level or filter, such as `info` or `warn,kirsa=debug`.
    #[arg(long, env = "KIRSA_LOG_LEVEL", default_value = "info", value_name = "FILTER")]
    pub(super) log_level: String,
}

fn session_duration(value: &str) -> Result<u32, String> {
    match value.parse() {
        Ok(seconds) if (MIN_SESSION..=MAX_SESSION).contains(&seconds) => Ok(seconds),
        _ => Err(format!(
            "must be from {MIN_SESSION} to {MAX_SESSION} seconds: with less, SDKs such as botocore and the Java SDK fetch \
             again on every call, or extend what is left and sign with expired keys"
        )),
    }
}
