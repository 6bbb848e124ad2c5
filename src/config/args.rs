//! The command line: what can be said, its defaults and its help. What it means, and what is wrong with it, is `check`'s.

use std::{
    net::{IpAddr, SocketAddr},
    path::PathBuf,
};

use clap::{Args as ClapArgs, Parser, Subcommand};

use super::{EXCHANGES, START_WINDOW};
use crate::{
    authorise::Scope,
    doctor,
    intercept::{Backend, port::DEFAULT_PORT},
    kubernetes::Mint,
    observe::LogFormat,
    serve::node_metadata,
};

#[derive(Debug, Parser)]
#[command(name = "kirsa", version, about, max_term_width = 100)]
pub(super) struct Cli {
    #[command(subcommand)]
    pub(super) command: CliCommand,
}

#[derive(Debug, Subcommand)]
pub(super) enum CliCommand {
    /// Answer the instance metadata service for the pods of this node.
    Run(Box<RunArgs>),
    /// Remove the redirect that `run` leaves in place on purpose when it ends.
    Uninstall(UninstallArgs),
    /// Say what stands between this node's pods and their credentials, and what to do about it. Changes nothing.
    /// Takes the flags and the environment of `run`; ends with 1 if something failed.
    Doctor(Box<DoctorArgs>),
    /// Ask the agent of this container how it is, as the kubelet's probes do: ends with 1 if it is not.
    Probe(ProbeArgs),
}

#[derive(Debug, ClapArgs)]
pub(super) struct ProbeArgs {
    /// Whether it runs, or whether it has what it needs to serve this node's pods.
    pub(super) health: doctor::Health,
    /// Where it is asked: what `run` was given.
    #[arg(long, env = "KIRSA_ADMIN_SOCKET", value_name = "PATH")]
    pub(super) admin_socket: PathBuf,
}

#[derive(Debug, ClapArgs)]
pub(super) struct DoctorArgs {
    #[command(flatten)]
    pub(super) run: RunArgs,
    /// For a person, or for a program.
    #[arg(long, default_value = "text", value_name = "FORMAT", help_heading = "Output")]
    pub(super) output: doctor::Output,
    /// Do not exchange a token for a session, which would be dropped at once.
    #[arg(long, help_heading = "Output")]
    pub(super) no_exchange: bool,
}

#[derive(Debug, ClapArgs)]
pub(super) struct UninstallArgs {
    /// Which rules to look for: auto removes both kinds.
    #[arg(long, env = "KIRSA_INTERCEPT", default_value = "auto", value_name = "KIND")]
    pub(super) intercept: Backend,
}

/// Values as they were given; [`Config`] is what they mean.
#[derive(Debug, ClapArgs)]
pub(super) struct RunArgs {
    /// This node's name, as Kubernetes knows it (downward API: spec.nodeName).
    #[arg(long, env = "NODE_NAME", default_value = "", value_name = "NAME", help_heading = "Node")]
    pub(super) node_name: String,
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
    pub(super) host_ip: Vec<IpAddr>,
    /// Where the key of IMDSv2 session tokens survives a restart.
    #[arg(long, env = "KIRSA_STATE_DIR", default_value = "/var/lib/kirsa", value_name = "DIR", help_heading = "Node")]
    pub(super) state_dir: PathBuf,

    /// How connections to the metadata address are brought here: nftables, iptables, whichever works, or by a
    /// redirect of your own.
    #[arg(long, env = "KIRSA_INTERCEPT", default_value = "auto", value_name = "KIND", help_heading = "Interception")]
    pub(super) intercept: Backend,
    /// The node's port that the redirect leads to. A privileged one (below 1024), so that no ordinary process can take
    /// it while the agent is down.
    #[arg(long, env = "KIRSA_PORT", default_value_t = DEFAULT_PORT, value_name = "PORT", help_heading = "Interception")]
    pub(super) port: u16,
    /// Connections that are open at once, from all pods together; more are answered 503.
    #[arg(
        long,
        env = "KIRSA_MAX_CONNECTIONS",
        default_value_t = 2_048,
        value_name = "N",
        help_heading = "Interception"
    )]
    pub(super) max_connections: usize,
    /// Connections that are open at once from one address; more are answered 503.
    #[arg(
        long,
        env = "KIRSA_MAX_CONNECTIONS_PER_SOURCE",
        default_value_t = 64,
        value_name = "N",
        help_heading = "Interception"
    )]
    pub(super) max_connections_per_source: usize,
    /// Requests per second from one address, and as many at once; more are held up to 300 ms, then answered 503.
    #[arg(
        long,
        env = "KIRSA_MAX_REQUESTS_PER_SOURCE",
        default_value_t = 500,
        value_name = "N",
        help_heading = "Interception"
    )]
    pub(super) max_requests_per_source: u32,

    /// Where the container runtime records the addresses of pods before they start; "none" waits for the API server
    /// to show them.
    #[arg(
        long,
        env = "KIRSA_CNI_RESULTS",
        default_value = "/var/lib/cni/results",
        value_name = "DIR",
        help_heading = "Attribution"
    )]
    pub(super) cni_results: PathBuf,
    /// Workloads from a YAML file instead of Kubernetes; read again whenever it changes.
    #[arg(long, env = "KIRSA_WORKLOADS", value_name = "FILE", help_heading = "Attribution")]
    pub(super) workloads: Option<PathBuf>,

    /// Credentials for the API server; without it, those of the pod that kirsa runs in.
    #[arg(long, env = "KUBECONFIG", value_name = "FILE", help_heading = "Kubernetes")]
    pub(super) kubeconfig: Option<PathBuf>,
    /// How tokens of other pods' service accounts are minted: impersonating this node (Kubernetes >= 1.36), directly
    /// (fenced by an admission policy), or whichever the agent was granted.
    #[arg(long, env = "KIRSA_MINT", default_value = "auto", value_name = "WAY", help_heading = "Kubernetes")]
    pub(super) mint: Mint,
    /// The audience of those tokens, unless the service account's annotation names another.
    #[arg(
        long,
        env = "KIRSA_AUDIENCE",
        default_value = "sts.amazonaws.com",
        value_name = "AUDIENCE",
        help_heading = "Kubernetes"
    )]
    pub(super) audience: String,
    /// What the annotations that IRSA defines begin with, on service accounts.
    #[arg(
        long,
        env = "KIRSA_ANNOTATION_PREFIX",
        default_value = "eks.amazonaws.com",
        value_name = "PREFIX",
        help_heading = "Kubernetes"
    )]
    pub(super) annotation_prefix: String,

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
    pub(super) startup_taint: String,

    /// The AWS region whose STS is asked. Without it, --node-region.
    #[arg(long, env = "KIRSA_REGION", value_name = "REGION", help_heading = "AWS")]
    pub(super) region: Option<String>,
    /// The region of this node (downward API: metadata.labels['topology.kubernetes.io/region']); an empty one is none.
    #[arg(long, env = "AWS_REGION", value_name = "REGION", help_heading = "AWS")]
    pub(super) node_region: Option<String>,
    /// Another STS: an S3-compatible store's (MinIO, Ceph), or a VPC endpoint.
    #[arg(long, env = "KIRSA_STS_ENDPOINT_URL", value_name = "URL", help_heading = "AWS")]
    pub(super) sts_endpoint_url: Option<String>,

    /// How long a session lasts, in seconds, unless the service account's annotation says otherwise.
    #[arg(
        long,
        env = "KIRSA_SESSION_DURATION",
        default_value_t = 3_600,
        value_name = "SECONDS",
        help_heading = "Credentials"
    )]
    pub(super) session_duration: u32,
    /// Who shares a session: the pods of one service account on this node, or nobody.
    #[arg(
        long,
        env = "KIRSA_SESSION_SCOPE",
        default_value = "service-account",
        value_name = "SCOPE",
        help_heading = "Credentials"
    )]
    pub(super) session_scope: Scope,
    /// Exchanges per second that this node makes at most, each of them one TokenRequest and one call of STS. Pods that
    /// wait come before those that are going to, and these before refreshes.
    #[arg(long, env = "KIRSA_EXCHANGE_RATE", default_value_t = EXCHANGES.0, value_name = "N", help_heading = "Credentials")]
    pub(super) exchange_rate: u32,
    /// Exchanges that may come at once, after a while without any.
    #[arg(long, env = "KIRSA_EXCHANGE_BURST", default_value_t = EXCHANGES.1, value_name = "N", help_heading = "Credentials")]
    pub(super) exchange_burst: u32,
    /// Over how many seconds the sessions of pods that run already are fetched when the agent starts. With more, an
    /// update of thousands of nodes asks less of STS at once; a pod that asks before waits for its own exchange.
    #[arg(long, env = "KIRSA_START_WINDOW", default_value_t = START_WINDOW, value_name = "SECONDS", help_heading = "Credentials")]
    pub(super) start_window: u64,
    /// Refuse IMDSv1 (requests without a session token), of all pods. Breaks boto 2, botocore up to 1.13.0, the
    /// JavaScript SDK before 2.575, the Go SDK before 1.25, rusoto, AsyncAws 1.18 and s3fs-fuse.
    #[arg(long, env = "KIRSA_REQUIRE_IMDSV2", help_heading = "Credentials")]
    pub(super) require_imdsv2: bool,
    /// Refuse it of the pods of these namespaces: names with commas between, a * at the end of one for any ending.
    /// The annotation kirsa.dev/require-imdsv2 adds service accounts to them, and takes none away.
    #[arg(
        long,
        env = "KIRSA_REQUIRE_IMDSV2_NAMESPACES",
        value_delimiter = ',',
        value_name = "NAME[,NAME*]",
        help_heading = "Credentials"
    )]
    pub(super) require_imdsv2_namespaces: Vec<String>,

    /// Serve container credentials too, as EKS Pod Identity does, at http://169.254.170.23/v1/credentials and
    /// http://[fd00:ec2::23]/v1/credentials, to pods that present a service account token of their own. Needs
    /// Kubernetes and the right to create tokenreviews. Not beside an EKS Pod Identity agent: it would get no more
    /// requests. A redirect of your own (--intercept none) must keep the destination.
    #[arg(long, env = "KIRSA_CONTAINER_CREDENTIALS", help_heading = "Container credentials")]
    pub(super) container_credentials: bool,
    /// The audience of the tokens that pods present there.
    #[arg(
        long,
        env = "KIRSA_CONTAINER_AUDIENCE",
        default_value = "pods.eks.amazonaws.com",
        value_name = "AUDIENCE",
        help_heading = "Container credentials"
    )]
    pub(super) container_audience: String,

    /// What pods may read of the node's own metadata: exact paths and groups with commas between, or "none". The
    /// groups are vpc, tags, lifecycle, and "default" for the default list. The identity document names the account of
    /// the pod's role.
    #[arg(
        long,
        env = "KIRSA_NODE_METADATA",
        default_value = node_metadata::DEFAULT,
        value_delimiter = ',',
        value_name = "PATH|GROUP[,...]",
        help_heading = "Metadata"
    )]
    pub(super) node_metadata: Vec<String>,
    /// A value to serve instead of the node's own, such as meta-data/placement/region=eu-central-1, for nodes that have
    /// no metadata service.
    #[arg(
        long,
        env = "KIRSA_NODE_METADATA_VALUE",
        value_delimiter = ',',
        value_name = "PATH=VALUE",
        help_heading = "Metadata"
    )]
    pub(super) node_metadata_value: Vec<String>,

    /// Where metrics and health are served. Pods must not reach it.
    #[arg(
        long,
        env = "KIRSA_ADMIN_ADDRESS",
        default_value = "127.0.0.1:8182",
        value_name = "ADDRESS",
        help_heading = "Operation"
    )]
    pub(super) admin_address: SocketAddr,
    /// A Unix socket where the same is served, of this process alone: while one agent hands over to the next, they
    /// share the admin address. `kirsa probe` asks there; none for no such socket.
    #[arg(long, env = "KIRSA_ADMIN_SOCKET", default_value = "none", value_name = "PATH", help_heading = "Operation")]
    pub(super) admin_socket: PathBuf,
    /// How long open requests may take to end after SIGTERM, in seconds.
    #[arg(long, env = "KIRSA_DRAIN", default_value_t = 5, value_name = "SECONDS", help_heading = "Operation")]
    pub(super) drain: u64,
    /// One JSON object a line, or text for a person.
    #[arg(long, env = "KIRSA_LOG_FORMAT", default_value = "json", value_name = "FORMAT", help_heading = "Operation")]
    pub(super) log_format: LogFormat,
    /// What is logged, as `info` or `warn,kirsa=debug`.
    #[arg(long, env = "KIRSA_LOG_LEVEL", default_value = "info", value_name = "FILTER", help_heading = "Operation")]
    pub(super) log_level: String,
}
