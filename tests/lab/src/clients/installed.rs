//! Programs that `tests/clients/install.sh` installed into `target/clients`, one folder for each.

use std::{
    env, fs,
    io::Write as _,
    path::{Path, PathBuf},
    process::Command,
};

use anyhow::{Result, bail};

use crate::agent::REGION;

/// A program that nobody here wrote, in a folder of its own.
#[derive(Debug, Clone)]
pub struct Installed {
    pub folder: PathBuf,
    pub version: String,
}

impl Installed {
    /// # Errors
    /// Says why the program of that name is not there.
    pub fn find(name: &str) -> Result<Self> {
        let folder = root().join(name);
        if let Ok(version) = fs::read_to_string(folder.join("version")) {
            return Ok(Self { folder, version: version.trim().to_owned() });
        }
        match fs::read_to_string(folder.with_added_extension("skipped")) {
            Ok(reason) => bail!("{}", reason.trim()),
            Err(_) => bail!("not installed: make clients"),
        }
    }

    /// The same for a test, which is skipped without the program: prints why.
    pub fn find_or_skip(name: &str) -> Option<Self> {
        Self::find(name)
            // Not by a macro: what those print is shown with failures only.
            .inspect_err(|reason| drop(writeln!(std::io::stderr(), "skipped: {name}: {reason}")))
            .ok()
    }

    /// The file `client` of the folder, which the installation made.
    pub fn command(&self) -> Command {
        self.isolated(Command::new(self.folder.join("client")))
    }

    /// A script in `tests/clients/python`, with the packages in the folder.
    pub fn python(&self, script: &str) -> Command {
        let mut command = Command::new(python());
        command.arg(programs().join("python").join(script));
        self.isolated(command)
    }

    /// A line for `sh`, which finds the folder as `$CLIENT`.
    pub fn shell(&self, line: &str) -> Command {
        let mut command = Command::new("sh");
        command.args(["-c", line]);
        self.isolated(command)
    }

    fn isolated(&self, mut command: Command) -> Command {
        isolate(&mut command, &self.folder);
        command
    }
}

/// Takes away the settings and files that a default chain would ask before the metadata service.
pub(super) fn isolate(command: &mut Command, folder: &Path) {
    command
        .env_clear()
        .env("PATH", env::var_os("PATH").unwrap_or_default())
        .env("HOME", "/nonexistent")
        .env("AWS_REGION", REGION)
        .env("AWS_DEFAULT_REGION", REGION)
        .env("PYTHON", python())
        .env("PYTHONPATH", folder)
        .env("PYTHONDONTWRITEBYTECODE", "1")
        .env("PYTHONUNBUFFERED", "1")
        .env("PROGRAMS", programs())
        .env("CLIENT", folder);
}

pub(super) fn programs() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).with_file_name("clients")
}

pub(super) fn python() -> PathBuf {
    root().join("python/bin/python")
}

pub(super) fn root() -> PathBuf {
    let repository = Path::new(env!("CARGO_MANIFEST_DIR")).join("../..");
    env::var_os("CARGO_TARGET_DIR").map_or_else(|| repository.join("target"), PathBuf::from).join("clients")
}
