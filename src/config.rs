//! Command line and environment → [`Config`]. Pure: nothing here touches the node. Owns all types of the command line.
//!
//! Errors name the flag, the value and the accepted form.

mod args;
mod check;

use std::{net::SocketAddr, path::PathBuf, process::ExitCode, time::Duration};

use clap::{CommandFactory, Parser, error::ErrorKind};

use self::args::{Cli, CliCommand};
pub use self::args::{Health, Output};
use crate::{
    authorize::{Defaults, SessionScope},
    intercept::{Backend, HostAddresses, Limits, rule::RedirectRules},
    kubernetes::MintMode,
    observe::LogFormat,
    serve::{imdsv2::RequireImdsV2, node_metadata::groups::Allowed},
};

/// Minimum session duration in seconds. With less, SDKs such as botocore fetch again on every call, or sign with expired
/// keys.
pub const MIN_SESSION: u32 = 1_800;
/// Maximum session duration in seconds that STS grants for a role.
pub const MAX_SESSION: u32 = 43_200;
/// Default rate limit of a node's exchanges, per second, and its burst. docs/capacity.md has the arithmetic for thousands
/// of nodes.
pub const EXCHANGES: (u32, u32) = (20, 50);
/// Default number of seconds over which a starting agent spreads the prefetch for pods that run already.
pub const START_WINDOW: u64 = 10;

/// The subcommand, with its validated options.
#[derive(Debug)]
pub enum Command {
    Run(Box<Config>),
    Uninstall(Backend),
    Doctor(Box<Config>, DoctorOptions),
    Health(PathBuf, Health),
}

/// Options of `kirsa doctor`.
#[derive(Debug, Clone, Copy)]
pub struct DoctorOptions {
    pub output: Output,
    /// Make a test exchange at STS.
    pub exchange: bool,
}

/// Validated configuration of `kirsa run`.
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
    pub session_scope: SessionScope,
    pub exchange_rate: u32,
    pub exchange_burst: u32,
    pub start_window: Duration,
    pub require_imdsv2: RequireImdsV2,
    /// Audience of the tokens that pods present for container credentials; `None` if these are not served.
    pub container_audience: Option<String>,
    pub metadata: Metadata,
    pub admin_address: SocketAddr,
    pub admin_socket: Option<PathBuf>,
    pub drain: Duration,
    pub log_format: LogFormat,
    pub log_level: String,
}

/// Source of pods and their service accounts.
#[derive(Debug, Clone)]
pub enum Source {
    File(PathBuf),
    Kubernetes {
        node_name: String,
        kubeconfig: Option<PathBuf>,
        mint: MintMode,
        cni_results: Option<PathBuf>,
        startup_taint: Option<String>,
    },
}

impl Config {
    /// Returns the rules that redirect pods' connections to this agent.
    pub fn rules(&self) -> RedirectRules {
        RedirectRules { host: self.host, port: self.port, container: self.container_audience.is_some() }
    }

    /// Returns the defaults for what annotations of service accounts can override.
    pub fn defaults(&self) -> Defaults {
        Defaults {
            prefix: self.annotation_prefix.clone(),
            audience: self.audience.clone(),
            duration: Duration::from_secs(self.session_duration.into()),
            durations: Duration::from_secs(MIN_SESSION.into())..=Duration::from_secs(MAX_SESSION.into()),
            scope: self.session_scope,
            store_arns: self.sts.endpoint.is_some(),
        }
    }
}

/// The STS endpoint.
#[derive(Debug, Clone)]
pub struct Sts {
    pub region: String,
    pub endpoint: Option<String>,
}

/// Node metadata that pods may read: paths and groups from the node's own metadata service, and fixed values.
#[derive(Debug, Clone)]
pub struct Metadata {
    pub allowed: Allowed,
    pub given: Vec<(String, String)>,
}

/// Parses the command line and environment of this process.
///
/// # Errors
/// The exit code: 0 after `--help` and `--version`, 2 after printing an error.
pub fn parse() -> Result<Command, ExitCode> {
    parse_from(std::env::args_os()).map_err(|error| {
        // Nothing can be done about a closed stderr.
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
        CliCommand::Health(args) => Ok(Command::Health(args.admin_socket, args.health)),
        CliCommand::Doctor(args) => {
            let options = DoctorOptions { output: args.output, exchange: !args.no_exchange };
            config(args.run).map(|config| Command::Doctor(config, options))
        }
    }
}

#[cfg(test)]
mod tests;
