//! Tests the dashboard of components/metrics: it queries existing metrics, in expressions that Prometheus accepts.

use std::collections::BTreeSet;
use std::fs;
use std::path::Path;

use anyhow::{Context, Result, ensure};
use serde_json::{Value, json};

use crate::alerts::{assert_known_metrics, repository};
use crate::{kustomize, output_of};

/// Returns the panels from the ConfigMap that Grafana reads.
fn panels() -> Result<Vec<Value>> {
    let objects = kustomize::with(&["metrics"])?;
    let labelled = |object: &&Value| object["metadata"]["labels"]["grafana_dashboard"] == "1";
    let file = objects.iter().find(labelled).and_then(|object| object["data"]["kirsa.json"].as_str());
    let dashboard: Value = serde_json::from_str(file.context("a ConfigMap that Grafana's sidecar finds")?)?;
    dashboard["panels"].as_array().cloned().context("panels")
}

/// Returns the expressions with Grafana's variables filled in.
fn expressions(panels: &[Value]) -> Vec<String> {
    let targets = panels.iter().flat_map(|panel| panel["targets"].as_array().into_iter().flatten());
    let expressions = targets.filter_map(|target| target["expr"].as_str());
    expressions.map(|expression| expression.replace("$__rate_interval", "2m").replace("$node", ".*")).collect()
}

#[test]
fn panels_query_existing_metrics_and_labels() -> Result<()> {
    let panels = panels()?;
    let expressions = expressions(&panels);
    assert_known_metrics(&expressions.iter().map(String::as_str).collect::<Vec<_>>())?;
    let rule =
        |(number, expression): (usize, &String)| json!({"record": format!("panel:{number}"), "expr": expression});
    let rules: Vec<_> = expressions.iter().enumerate().map(rule).collect();
    let file = Path::new(lab::namespace::STATE).join("dashboard.yaml");
    fs::write(&file, json!({"groups": [{"name": "dashboard", "rules": rules}]}).to_string())?;
    output_of("promtool", &["check", "rules", "--lint=none", &file.display().to_string()])?;
    // Check the labels of aggregations, then those of legends.
    let known = repository("src/observe/metrics.rs")?;
    let by = expressions.iter().flat_map(|expression| expression.split(" by (").skip(1));
    for label in by.filter_map(|rest| rest.split(')').next()).flat_map(|labels| labels.split(", ")) {
        ensure!(["le", "node"].contains(&label) || known.contains(&format!("\"{label}\"")), "{label}");
    }
    for target in panels.iter().flat_map(|panel| panel["targets"].as_array().into_iter().flatten()) {
        let (legend, query) = (target["legendFormat"].as_str().unwrap_or_default(), target["expr"].to_string());
        let label = legend.trim_matches(['{', '}']);
        ensure!(
            !legend.starts_with('{') || query.contains(&format!("({label})")) || query.contains(&format!(", {label})")),
            "{target}"
        );
    }
    Ok(())
}

#[test]
fn documentation_lists_exactly_the_metrics() -> Result<()> {
    let names = |text: &str, quote: char| -> BTreeSet<String> {
        text.split(quote).filter(|word| word.starts_with("kirsa_")).map(str::to_owned).collect()
    };
    let registered = names(&repository("src/observe/metrics.rs")?, '"');
    ensure!(registered.len() > 20, "{registered:?}");
    assert_eq!(names(&repository("docs/metrics.md")?, '`'), registered);
    Ok(())
}

#[test]
fn panels_are_described_and_do_not_overlap() -> Result<()> {
    let (mut ids, mut taken) = (BTreeSet::new(), BTreeSet::new());
    for panel in panels()? {
        ensure!(ids.insert(panel["id"].to_string()), "{panel}");
        ensure!(panel["description"].as_str().is_some_and(|text| text.len() > 15), "{panel}");
        let at = |name: &str| panel["gridPos"][name].as_u64().unwrap_or_default();
        ensure!(at("x") + at("w") <= 24 && at("w") > 0 && at("h") > 0, "{panel}");
        for x in at("x")..at("x") + at("w") {
            for y in at("y")..at("y") + at("h") {
                ensure!(taken.insert((x, y)), "{panel}: overlaps another panel");
            }
        }
    }
    Ok(())
}
