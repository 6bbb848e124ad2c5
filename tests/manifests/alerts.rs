//! The alerts of components/metrics.

use std::collections::BTreeSet;
use std::path::Path;

use anyhow::{Result, ensure};

use crate::{find, kustomize, text};

#[test]
fn alerts_ask_for_metrics_that_the_agent_has() -> Result<()> {
    let source = text(&Path::new(env!("CARGO_MANIFEST_DIR")).join("src/observe/metrics.rs"))?;
    let rules = find(&kustomize::with(&["metrics"])?, "PrometheusRule")?.to_string();
    let names: BTreeSet<&str> = rules
        .split(|c: char| !c.is_ascii_alphanumeric() && c != '_')
        .filter(|word| word.starts_with("kirsa_"))
        .collect();
    ensure!(names.len() > 5, "{names:?}");
    for name in names {
        let metric = name.trim_end_matches("_count").trim_end_matches("_bucket");
        ensure!(source.contains(&format!("\"{metric}\"")), "{metric} is no metric of the agent's");
    }
    Ok(())
}
