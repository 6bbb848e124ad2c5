//! One client: how it is started, and whether it is there.

use std::{process::Command, time::Duration};

use anyhow::Result;

use super::installed::{Installed, isolate, programs, python, root};
use crate::sts;

/// Which clients are meant.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Set {
    /// Those that every test run can afford.
    Quick,
    All,
}

/// What runs a client.
#[derive(Debug, Clone, Copy)]
pub(super) enum Start {
    /// A script in `tests/clients/python`.
    Python(&'static str),
    /// A script in `tests/clients/node`.
    Node(&'static str),
    /// The program that the installation built.
    Built,
    /// The same; it is one call, whose exit status tells what came of it.
    Once,
    /// The class `Client` that the installation compiled.
    Java,
    /// A shell line that is one call as well.
    Shell(&'static str),
    /// The SDK that the lab itself is built with, by these arguments of `sdk-client`.
    Lab(&'static [&'static str]),
}

/// A client in one version.
#[derive(Debug, Clone, Copy)]
pub struct Client {
    /// Also that of its folder.
    pub name: &'static str,
    pub(super) start: Start,
    pub(super) quick: bool,
    /// Whether it knows session tokens.
    pub knows_imdsv2: bool,
    /// Whether it waits longer than a second for an answer, or asks again for long enough.
    pub(super) waits: bool,
    /// Within what time of its first request it says that it has no credentials, once it was told so.
    pub(super) gives_up_within: Duration,
    /// Whether its calls are those of one client object, which keeps the credentials that it has.
    pub keeps: bool,
}

impl Client {
    pub fn is_in(&self, set: Set) -> bool {
        self.quick || set == Set::All
    }

    /// What it is, or why it cannot be run here.
    pub fn version(&self) -> Result<String> {
        Ok(Installed::find(self.name)?.version)
    }

    /// Calls that each end with a line on standard output, the next one when a line comes in; one call without.
    pub(super) fn talks(&self) -> bool {
        !matches!(self.start, Start::Shell(_) | Start::Once)
    }

    pub(super) fn command(&self, sts: &str, store: &str) -> Result<Command> {
        let (folder, programs) = (root().join(self.name), programs());
        let mut command = match self.start {
            Start::Python(script) => with(python(), [programs.join("python").join(script)]),
            Start::Node(script) => with("node", [programs.join("node").join(script)]),
            Start::Built | Start::Once => Command::new(folder.join("client")),
            Start::Java => {
                let mut java = with("java", ["-XX:TieredStopAtLevel=1", "-Xshare:auto", "-cp"]);
                java.arg(format!("{0}:{0}/lib/*", folder.display())).arg("Client");
                java
            }
            Start::Shell(line) => with("sh", ["-c", line]),
            Start::Lab(arguments) => with(crate::sdk::built("sdk-client")?, arguments),
        };
        isolate(&mut command, &folder);
        command
            .env("STS_URL", sts)
            .env("S3_URL", store)
            .env("BUCKET", sts::BUCKET)
            .env("KEY", sts::KEY)
            .env("NODE_PATH", folder.join("node_modules"))
            .env("NODE_NO_WARNINGS", "1");
        Ok(command)
    }
}

fn with<S: AsRef<std::ffi::OsStr>>(
    program: impl AsRef<std::ffi::OsStr>,
    arguments: impl IntoIterator<Item = S>,
) -> Command {
    let mut command = Command::new(program);
    command.args(arguments);
    command
}
