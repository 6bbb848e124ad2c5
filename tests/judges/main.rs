//! Conformance tests with third-party judges: programs that read metadata, AWS's own integration tests, and the
//! specifications that AWS tests its SDKs and its mock with. Where kirsa deviates on purpose, the test says why.
//!
//! `tests/clients/install.sh` installs the programs in pinned versions. Tests of programs that are not installed are
//! skipped with a message.

mod debian;
mod ecr;
mod go_sdk;
mod groups;
mod metadata_mock;
mod python;
mod sdk_cases;

use std::process::{Command, ExitStatus};
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use lab::agent::{Agent, field};
use lab::imds::{Instance, NODE_ROLE};
use lab::net::Pod;
use lab::poll::poll;
use lab::process::Process;
use lab::site::Site;

lab::enter!();

/// Longer than any program takes on a busy machine. A program that retries forever fails by this timeout.
const TIMEOUT: Duration = Duration::from_secs(120);

/// A node with an agent that has fetched the node's metadata.
struct Lab {
    site: Site,
    agent: Agent,
    /// A pod with a role.
    reader: Pod,
    /// A pod without a role.
    idle: Pod,
}

impl Lab {
    fn start() -> Result<Self> {
        Self::with_site(Site::new(env!("CARGO_BIN_EXE_kirsa"))?)
    }

    fn with_site(site: Site) -> Result<Self> {
        let (reader, idle) = (site.pod_with_role("reader")?, site.pod("idle")?);
        let agent = site.start()?;
        agent.wait_for_log(|entry| field(entry, "message") == Some("node metadata read"))?;
        Ok(Self { site, agent, reader, idle })
    }

    /// Checks that no request reached the node's own service.
    fn stop(self) -> Result<()> {
        self.site.no_pod_got_outside()?;
        self.agent.stop()
    }
}

/// Exit status and output of a program.
struct Output {
    status: ExitStatus,
    lines: Vec<String>,
}

impl Output {
    /// Returns the lines if the program succeeded.
    fn ok(self) -> Result<Vec<String>> {
        ensure!(self.status.success(), "{}: {:#?}", self.status, self.lines);
        Ok(self.lines)
    }
}

/// Runs a program in a pod until it exits. Checks that its output has no secret of the node.
fn run(pod: &Pod, command: Command) -> Result<Output> {
    let arguments = command.get_args().collect::<Vec<_>>();
    let what = format!("{} {arguments:?}", command.get_program().display());
    let mut process = Process::spawn(Some(pod.netns()), &what, command)?;
    let status = process.wait(TIMEOUT).with_context(|| format!("{what}: {:#?}", process.lines()))?;
    poll("the end of its output", TIMEOUT, || process.ended().then_some(()))?;
    let lines = process.lines();
    let Instance { account, credentials, .. } = Instance::default();
    let secrets = [NODE_ROLE, &account, &credentials.access_key_id, &credentials.secret_access_key, "join secret"];
    for secret in secrets {
        ensure!(!lines.iter().any(|line| line.contains(secret)), "{secret} leaked: {lines:#?}");
    }
    Ok(Output { status, lines })
}
