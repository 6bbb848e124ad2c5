//! Command line and environment → [`Config`]: read first, given meaning once. Pure: nothing here touches the node.
//!
//! A wrong value is refused in one sentence that names the flag, the value and what would be right.

mod args;
mod check;

use std::{net::SocketAddr, path::PathBuf, process::ExitCode, time::Duration};

use clap::{CommandFactory, Parser, error::ErrorKind};

use self::args::{Cli, CliCommand};
use crate::{
    authorise::{Defaults, Scope},
    doctor,
    intercept::{Backend, HostAddresses, Limits, rule::RuleSet},
    kubernetes::Mint,
    observe::LogFormat,
    serve::{imdsv2::Required, node_metadata::groups::Allowed},
};

/// Below this, SDKs such as botocore refetch on every call, or stretch what is left and sign with dead keys.
pub const MIN_SESSION: u32 = 1_800;
/// The longest session that STS grants for a role.
pub const MAX_SESSION: u32 = 43_200;
/// Exchanges of a node, per second and at once: docs/capacity.md says what thousands of nodes make of it.
pub const EXCHANGES: (u32, u32) = (20, 50);

/// Over how many seconds an agent spreads the exchanges of the pods that run already when it starts.
pub const START_WINDOW: u64 = 10;

/// What kirsa was asked to do.
#[derive(Debug)]
pub enum Command {
    Run(Box<Config>),
    Uninstall(Backend),
    Doctor(Box<Config>, doctor::Options),
    Probe(PathBuf, doctor::Health),
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
    pub start_window: Duration,
    pub require_imdsv2: Required,
    /// The audience of the tokens that pods present for container credentials, where those are served.
    pub container_audience: Option<String>,
    pub metadata: Metadata,
    pub admin_address: SocketAddr,
    pub admin_socket: Option<PathBuf>,
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
    /// What brings pods' connections here.
    pub fn rules(&self) -> RuleSet {
        RuleSet { host: self.host, port: self.port, container: self.container_audience.is_some() }
    }

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

/// What pods may know of the node: paths and groups that are read from its own metadata service, and values that are
/// given.
#[derive(Debug, Clone)]
pub struct Metadata {
    pub allowed: Allowed,
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
        CliCommand::Probe(args) => Ok(Command::Probe(args.admin_socket, args.health)),
        CliCommand::Doctor(args) => {
            let options = doctor::Options { output: args.output, exchange: !args.no_exchange };
            config(args.run).map(|config| Command::Doctor(config, options))
        }
    }
}

#[cfg(test)]
mod tests;
