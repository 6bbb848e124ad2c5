//! Where kube-apiserver and etcd are: a folder that the caller names, or this repository's own build.

use std::env;
use std::path::PathBuf;

use anyhow::{Result, bail};

use crate::tools;

const WANTED: [&str; 2] = ["etcd", "kube-apiserver"];

pub(super) fn locate() -> Result<PathBuf> {
    let Some(folder) = env::var_os("KUBEBUILDER_ASSETS").map(PathBuf::from) else { return tools::build(&WANTED) };
    if let Some(missing) = WANTED.into_iter().find(|name| !folder.join(name).is_file()) {
        bail!("KUBEBUILDER_ASSETS is {}, where there is no {missing}", folder.display());
    }
    Ok(folder)
}
