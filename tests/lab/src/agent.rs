//! The real `kirsa` binary on a [`Node`]: start it, read its log and metrics, end it in every way.
//! Knows its flags and ports, nothing of its inside.

use std::ffi::{OsStr, OsString};
use std::net::Ipv4Addr;
use std::os::unix::process::ExitStatusExt;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitStatus, Output};
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context, Result, bail};
use nix::sys::signal::Signal;
use serde_json::Value;

use crate::http::{Client, Response};
use crate::net::Node;
use crate::netns::Netns;
use crate::poll::poll;
use crate::process::Process;

/// Enough for anything that the agent does on a busy machine.
const PATIENCE: Duration = Duration::from_secs(20);

/// The region that every agent is in, unless a flag says otherwise.
pub const REGION: &str = "eu-central-1";

/// What to start, and how.
#[derive(Clone, Debug)]
pub struct Options {
    binary: PathBuf,
    arguments: Vec<OsString>,
    environment: Vec<(OsString, OsString)>,
    log_level: String,
}

impl Options {
    /// The binary under test: `env!("CARGO_BIN_EXE_kirsa")` in a test. `KIRSA_BIN` overrides it.
    pub fn new(binary: impl Into<PathBuf>) -> Self {
        let binary = std::env::var_os("KIRSA_BIN").map_or_else(|| binary.into(), PathBuf::from);
        Self { binary, arguments: Vec::new(), environment: Vec::new(), log_level: "info".into() }
    }

    /// A flag and its value, beside those that every node gives.
    pub fn flag(mut self, name: &str, value: impl AsRef<OsStr>) -> Self {
        self.arguments.extend([name.into(), value.as_ref().into()]);
        self
    }

    pub fn switch(mut self, name: &str) -> Self {
        self.arguments.push(name.into());
        self
    }

    pub fn env(mut self, name: &str, value: impl AsRef<OsStr>) -> Self {
        self.environment.push((name.into(), value.as_ref().into()));
        self
    }

    pub fn trace(mut self) -> Self {
        self.log_level = "trace".into();
        self
    }

    /// `kirsa run` with what the node knows: its name, its addresses, its disk.
    fn run_command(&self, node: &Node) -> Result<Command> {
        self.command_of_agent("run", node)
    }

    fn command_of_agent(&self, subcommand: &str, node: &Node) -> Result<Command> {
        let mut command = self.command(subcommand, node);
        command.arg("--node-name").arg(node.name());
        command.arg("--state-dir").arg(node.state().join("kirsa"));
        if !self.arguments.iter().any(|argument| argument == "--cni-results") {
            command.arg("--cni-results").arg(node.cni_results()?.folder());
        }
        command.args(["--log-format", "json", "--log-level", &self.log_level]);
        command.args(&self.arguments);
        Ok(command)
    }

    /// A subcommand on the node. Its environment is its own: no variable of the caller's, such as AWS_REGION or
    /// KUBECONFIG, configures the agent.
    fn command(&self, subcommand: &str, node: &Node) -> Command {
        let host_ips: Vec<String> = node.host_ips().iter().map(ToString::to_string).collect();
        let mut command = Command::new(&self.binary);
        command.env_clear().env("PATH", std::env::var_os("PATH").unwrap_or_default());
        command.env("RUST_BACKTRACE", "1").env("HOST_IP", host_ips.join(","));
        command.env("AWS_REGION", REGION);
        command.envs(self.environment.iter().map(|(name, value)| (name, value)));
        command.arg(subcommand);
        command
    }
}

/// A running agent; killed when dropped.
#[derive(Debug)]
pub struct Agent {
    process: Process,
    netns: Arc<Netns>,
}

impl Agent {
    /// Start it and return at once.
    pub fn spawn(node: &Node, options: &Options) -> Result<Self> {
        let process = Process::spawn(Some(node.netns()), "kirsa", options.run_command(node)?)?;
        Ok(Self { process, netns: node.netns().clone() })
    }

    /// Start it and wait until it says that it is ready.
    pub fn start(node: &Node, options: &Options) -> Result<Self> {
        let agent = Self::spawn(node, options)?;
        agent.wait_ready()?;
        Ok(agent)
    }

    /// `kirsa run` that is expected to end by itself: its exit status and its output.
    pub fn run_to_end(node: &Node, options: &Options) -> Result<Output> {
        let mut command = options.run_command(node)?;
        node.netns().output(&mut command).context("kirsa run")
    }

    /// `kirsa doctor`, with the flags of the agent and then its own.
    pub fn doctor(node: &Node, options: &Options, own: &[&str]) -> Result<Output> {
        let mut command = options.command_of_agent("doctor", node)?;
        command.args(own);
        node.netns().output(&mut command).context("kirsa doctor")
    }

    /// `kirsa health` at an `--admin-socket`.
    pub fn probe(node: &Node, options: &Options, socket: &Path, health: &str) -> Result<Output> {
        let mut command = options.command("health", node);
        command.arg(health).arg("--admin-socket").arg(socket);
        node.netns().output(&mut command).context("kirsa health")
    }

    /// `kirsa uninstall`.
    pub fn uninstall(node: &Node, options: &Options) -> Result<Output> {
        let mut command = options.command("uninstall", node);
        command.args(&options.arguments);
        node.netns().output(&mut command).context("kirsa uninstall")
    }

    pub fn process(&self) -> &Process {
        &self.process
    }

    /// A request to the admin port, from the node.
    pub fn admin(&self, path: &str) -> Result<Response> {
        Client::new(&self.netns, (Ipv4Addr::LOCALHOST, 8182)).get(path).send()
    }

    pub fn wait_ready(&self) -> Result<()> {
        let mut last = String::from("no answer");
        let ready = poll("kirsa ready", PATIENCE, || match self.admin("/readyz") {
            Ok(response) if response.status == 200 => Some(Ok(())),
            Ok(response) => {
                last = response.body;
                None
            }
            Err(_) => self.process.ended().then(|| Err(anyhow::anyhow!("kirsa ended"))),
        });
        ready.and_then(|end| end).with_context(|| format!("pending: {last}\n  {}", self.process.lines().join("\n  ")))
    }

    /// Every log line that is JSON.
    pub fn log(&self) -> Vec<Value> {
        self.process.lines().iter().filter_map(|line| serde_json::from_str(line).ok()).collect()
    }

    /// Wait for a log entry, from the start of the log on.
    pub fn wait_for_log(&self, wanted: impl Fn(&Value) -> bool) -> Result<Value> {
        self.wait_for_log_after(0, wanted)
    }

    /// Wait for a log entry behind a mark that [`Process::mark`] gave.
    pub fn wait_for_log_after(&self, mark: usize, wanted: impl Fn(&Value) -> bool) -> Result<Value> {
        let line = self
            .process
            .wait_for_line_after(mark, PATIENCE, |line| serde_json::from_str(line).is_ok_and(|entry| wanted(&entry)))?;
        Ok(serde_json::from_str(&line)?)
    }

    /// Wait for the next refusal with this reason.
    pub fn wait_for_refusal(&self, reason: &str) -> Result<Value> {
        self.wait_for_log(|entry| field(entry, "message") == Some("refused") && field(entry, "reason") == Some(reason))
    }

    /// The value of one series of `/metrics`, 0 where there is none yet. Labels that are not named are summed.
    pub fn metric(&self, name: &str, labels: &[(&str, &str)]) -> Result<f64> {
        let text = self.admin("/metrics")?.ok()?;
        Ok(text.lines().filter_map(|line| sample(line, name, labels)).sum())
    }

    pub fn signal(&self, signal: Signal) -> Result<()> {
        self.process.signal(signal)
    }

    /// SIGTERM, then its exit status.
    pub fn terminate(mut self) -> Result<ExitStatus> {
        self.process.terminate(PATIENCE)
    }

    /// Its exit status, once it has one.
    pub fn wait(mut self) -> Result<ExitStatus> {
        self.process.wait(PATIENCE)
    }

    /// SIGTERM; an error unless it ends with 0.
    pub fn stop(self) -> Result<()> {
        let status = self.terminate()?;
        if !status.success() {
            bail!("kirsa ended with {:?}, signal {:?}", status.code(), status.signal());
        }
        Ok(())
    }

    /// SIGKILL.
    pub fn kill(mut self) -> Result<()> {
        self.process.kill()
    }
}

impl Drop for Agent {
    /// Whoever ends it means to. Else a test has failed, and its log tells why; a test that passes shows no output.
    fn drop(&mut self) {
        if self.process.is_running() {
            let lines = self.process.lines();
            eprintln!(
                "kirsa was not ended; its last lines:\n  {}",
                lines[lines.len().saturating_sub(60)..].join("\n  ")
            );
        }
    }
}

/// A field of a log entry, wherever the formatter put it.
pub fn field<'a>(entry: &'a Value, name: &str) -> Option<&'a str> {
    entry.get(name).or_else(|| entry.get("fields")?.get(name))?.as_str()
}

/// The value in a line such as `name{label="value"} 3` if it is of that name and has those labels.
fn sample(line: &str, name: &str, labels: &[(&str, &str)]) -> Option<f64> {
    let (series, value) = line.rsplit_once(' ')?;
    let (series_name, series_labels) = series.split_once('{').unwrap_or((series, ""));
    let has = |(label, value): &(&str, &str)| {
        let pair = format!("{label}=\"{value}\"");
        series_labels.trim_end_matches('}').split(',').any(|known| known == pair)
    };
    if series_name != name || !labels.iter().all(has) {
        return None;
    }
    value.parse().ok()
}
