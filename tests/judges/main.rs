//! Judges that nobody here wrote: programs that read metadata beside credentials, AWS's own integration tests, and the
//! specifications that AWS tests its SDKs and its mock against. Where kirsa deviates on purpose, the test says why.
//!
//! `tests/clients/install.sh` gets the programs, in pinned versions. What cannot be had is skipped, and says so.

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

/// Longer than any judge takes on a busy machine. One that is made to retry for ever fails by this.
const DEADLINE: Duration = Duration::from_secs(120);

/// A node with an agent that has read the node's metadata.
struct Lab {
    site: Site,
    agent: Agent,
    /// Has a role.
    reader: Pod,
    /// Has none.
    idle: Pod,
}

impl Lab {
    fn start() -> Result<Self> {
        Self::of(Site::new(env!("CARGO_BIN_EXE_kirsa"))?)
    }

    fn of(site: Site) -> Result<Self> {
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

/// What a program said.
struct Said {
    status: ExitStatus,
    lines: Vec<String>,
}

impl Said {
    /// The lines of a program that succeeded.
    fn ok(self) -> Result<Vec<String>> {
        ensure!(self.status.success(), "{}: {:#?}", self.status, self.lines);
        Ok(self.lines)
    }
}

/// Runs a program in a pod to its end. Nothing that it prints may be the node's own.
fn run(pod: &Pod, command: Command) -> Result<Said> {
    let arguments = command.get_args().collect::<Vec<_>>();
    let what = format!("{} {arguments:?}", command.get_program().display());
    let mut process = Process::spawn(Some(pod.netns()), &what, command)?;
    let status = process.wait(DEADLINE).with_context(|| format!("{what}: {:#?}", process.lines()))?;
    poll("the end of its output", DEADLINE, || process.ended().then_some(()))?;
    let lines = process.lines();
    let Instance { account, credentials, .. } = Instance::default();
    let secrets = [NODE_ROLE, &account, &credentials.access_key_id, &credentials.secret_access_key, "join secret"];
    for secret in secrets {
        ensure!(!lines.iter().any(|line| line.contains(secret)), "{secret} leaked: {lines:#?}");
    }
    Ok(Said { status, lines })
}
