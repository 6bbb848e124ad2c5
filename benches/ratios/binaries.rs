//! Builds what is measured as it would ship: release, static. Knows cargo and nothing of the measurements.

use std::env;
use std::path::PathBuf;
use std::process::{Command, Stdio};

use anyhow::{Context, Result, ensure};
use serde_json::Value;

#[derive(Debug)]
pub(crate) struct Binaries {
    pub(crate) kirsa: PathBuf,
    pub(crate) bare_hyper: PathBuf,
}

impl Binaries {
    /// One after the other: in one build each would get the features of the other's dependencies too. `KIRSA_BIN` names
    /// an agent to measure instead.
    pub(crate) fn build() -> Result<Self> {
        let kirsa = env::var_os("KIRSA_BIN").map_or_else(|| build("kirsa", "kirsa"), |given| Ok(given.into()));
        Ok(Self { kirsa: kirsa?, bare_hyper: build("lab", "bare-hyper")? })
    }
}

fn build(package: &str, binary: &str) -> Result<PathBuf> {
    let triple = format!("{}-unknown-linux-musl", env::consts::ARCH);
    eprintln!("bench: building {binary} for {triple}");
    let musl_gcc = Command::new("musl-gcc").arg("--version").stdout(Stdio::null()).status();
    musl_gcc.context("aws-lc is C and needs musl-gcc (Debian: musl-tools)")?;
    let mut cargo = Command::new(env::var_os("CARGO").unwrap_or_else(|| "cargo".into()));
    cargo.current_dir(env!("CARGO_MANIFEST_DIR")).env(format!("CC_{}", triple.replace('-', "_")), "musl-gcc");
    cargo.args(["build", "--release", "--locked", "--target", &triple, "--package", package, "--bin", binary]);
    cargo.args(["--quiet", "--message-format", "json-render-diagnostics"]).stderr(Stdio::inherit());
    let output = cargo.output().context("cargo")?;
    ensure!(output.status.success(), "{binary} cannot be built");
    let messages = output.stdout.split(|byte| *byte == b'\n').filter_map(|line| serde_json::from_slice(line).ok());
    let mut built = messages.filter_map(|message: Value| Some(PathBuf::from(message["executable"].as_str()?)));
    built.next_back().with_context(|| format!("cargo named no executable for {binary}"))
}
