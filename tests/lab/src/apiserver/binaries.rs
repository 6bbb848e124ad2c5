//! Where kube-apiserver and etcd are: a folder that the caller names, or this repository's own build.

use std::env;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use anyhow::{Context, Result, bail};

const WANTED: [&str; 2] = ["etcd", "kube-apiserver"];

pub(super) fn locate() -> Result<PathBuf> {
    if let Some(folder) = env::var_os("KUBEBUILDER_ASSETS") {
        let folder = PathBuf::from(folder);
        if let Some(missing) = WANTED.into_iter().find(|name| !folder.join(name).is_file()) {
            bail!("KUBEBUILDER_ASSETS is {}, where there is no {missing}", folder.display());
        }
        return Ok(folder);
    }
    let repository = Path::new(env!("CARGO_MANIFEST_DIR")).join("../..").canonicalize()?;
    let script = repository.join("tests/cluster/build.sh");
    // Nothing to do, and no time spent, when the binaries are there. Otherwise Go's module cache has to be
    // filled already: there is no network in here.
    let output = Command::new(&script).args(WANTED).stdin(Stdio::null()).output();
    let output = output.with_context(|| script.display().to_string())?;
    if !output.status.success() {
        let stderr = String::from_utf8_lossy(&output.stderr);
        bail!(
            "no kube-apiserver and etcd: run tests/setup.sh, which builds them (it finds or gets Go), or set \
             KUBEBUILDER_ASSETS to a folder that has them ({})",
            stderr.trim().lines().last().unwrap_or("build.sh said nothing")
        );
    }
    Ok(repository.join("target/cluster/bin"))
}
