//! Builds the base and its components with the real kustomize.

use std::fs;
use std::path::Path;

use anyhow::{Context, Result, ensure};
use serde_json::Value;

use crate::{folder, objects, output_of, text};

/// Builds a directory of daemonset/.
pub(crate) fn build(path: &str) -> Result<Vec<Value>> {
    let folder = folder(path);
    objects(&output_of("kustomize", &["build", folder.to_str().context("UTF-8")?])?)
}

/// Builds an overlay of the base and these components.
pub(crate) fn with(components: &[&str]) -> Result<Vec<Value>> {
    // kustomize rejects absolute paths.
    let root = format!("../../..{}", folder("").display());
    let overlay = Path::new(lab::namespace::STATE).join(format!("overlay-{}", components.join("+")));
    fs::create_dir_all(&overlay)?;
    let mut kustomization = format!("resources: [{root}/base]\ncomponents:\n");
    for component in components {
        kustomization.push_str(&format!("- {root}/components/{component}\n"));
    }
    fs::write(overlay.join("kustomization.yaml"), kustomization)?;
    objects(&output_of("kustomize", &["build", overlay.to_str().context("UTF-8")?])?)
}

pub(crate) fn components() -> Result<Vec<String>> {
    let mut names = Vec::new();
    for entry in fs::read_dir(folder("components"))? {
        names.push(entry?.file_name().to_string_lossy().into_owned());
    }
    ensure!(names.len() >= 6, "{names:?}");
    names.sort();
    Ok(names)
}

/// Returns the parsed kustomization.yaml.
pub(crate) fn kustomization(path: &str) -> Result<Value> {
    let file = folder(path).join("kustomization.yaml");
    serde_saphyr::from_str(&text(&file)?).with_context(|| file.display().to_string())
}
