//! Programs that come from Go modules: in a folder that the caller names, or this repository's own build.

use std::env;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use anyhow::{Context, Result, bail};

/// One that reads manifests: helm, kustomize or promtool.
pub fn locate(name: &str) -> Result<PathBuf> {
    let given = env::var_os("KUBEBUILDER_ASSETS").map(|folder| PathBuf::from(folder).join(name));
    match given.filter(|path| path.is_file()) {
        Some(path) => Ok(path),
        None => Ok(build(&[name])?.join(name)),
    }
}

/// The folder of the build, with these in it.
pub(crate) fn build(names: &[&str]) -> Result<PathBuf> {
    let repository = Path::new(env!("CARGO_MANIFEST_DIR")).join("../..").canonicalize()?;
    let script = repository.join("tests/cluster/build.sh");
    // Nothing to do, and no time spent, when the binaries are there. Otherwise Go's module cache has to be
    // filled already: there is no network in here.
    let output = Command::new(&script).args(names).stdin(Stdio::null()).output();
    let output = output.with_context(|| script.display().to_string())?;
    if !output.status.success() {
        let stderr = String::from_utf8_lossy(&output.stderr);
        bail!(
            "no {}: run tests/setup.sh, which builds them (it finds or gets Go), or set KUBEBUILDER_ASSETS to a folder \
             that has them ({})",
            names.join(" and "),
            stderr.trim().lines().last().unwrap_or("build.sh said nothing")
        );
    }
    Ok(repository.join("target/cluster/bin"))
}
