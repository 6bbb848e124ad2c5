//! The dashboard of components/metrics: about metrics that there are, in expressions that Prometheus understands.

use std::collections::BTreeSet;
use std::fs;
use std::path::Path;

use anyhow::{Context, Result, ensure};
use serde_json::{Value, json};

use crate::alerts::{ask_for_what_there_is, repository};
use crate::{kustomize, printed};

/// As Grafana gets it, in the ConfigMap.
fn panels() -> Result<Vec<Value>> {
    let objects = kustomize::with(&["metrics"])?;
    let labelled = |object: &&Value| object["metadata"]["labels"]["grafana_dashboard"] == "1";
    let file = objects.iter().find(labelled).and_then(|object| object["data"]["kirsa.json"].as_str());
    let dashboard: Value = serde_json::from_str(file.context("a ConfigMap that Grafana's sidecar finds")?)?;
    dashboard["panels"].as_array().cloned().context("panels")
}

/// With what Grafana puts in for its variables.
fn expressions(panels: &[Value]) -> Vec<String> {
    let targets = panels.iter().flat_map(|panel| panel["targets"].as_array().into_iter().flatten());
    let asked = targets.filter_map(|target| target["expr"].as_str());
    asked.map(|asked| asked.replace("$__rate_interval", "2m").replace("$node", ".*")).collect()
}

#[test]
fn each_panel_asks_prometheus_for_what_the_agent_has() -> Result<()> {
    let panels = panels()?;
    let expressions = expressions(&panels);
    ask_for_what_there_is(&expressions.iter().map(String::as_str).collect::<Vec<_>>())?;
    let rule =
        |(number, expression): (usize, &String)| json!({"record": format!("panel:{number}"), "expr": expression});
    let rules: Vec<_> = expressions.iter().enumerate().map(rule).collect();
    let file = Path::new(lab::namespace::STATE).join("dashboard.yaml");
    fs::write(&file, json!({"groups": [{"name": "dashboard", "rules": rules}]}).to_string())?;
    printed("promtool", &["check", "rules", "--lint=none", &file.display().to_string()])?;
    // By what they are summed, and by what each line is named.
    let known = repository("src/observe/metrics.rs")?;
    let by = expressions.iter().flat_map(|expression| expression.split(" by (").skip(1));
    for label in by.filter_map(|rest| rest.split(')').next()).flat_map(|labels| labels.split(", ")) {
        ensure!(["le", "node"].contains(&label) || known.contains(&format!("\"{label}\"")), "{label}");
    }
    for target in panels.iter().flat_map(|panel| panel["targets"].as_array().into_iter().flatten()) {
        let (legend, asked) = (target["legendFormat"].as_str().unwrap_or_default(), target["expr"].to_string());
        let label = legend.trim_matches(['{', '}']);
        ensure!(
            !legend.starts_with('{') || asked.contains(&format!("({label})")) || asked.contains(&format!(", {label})")),
            "{target}"
        );
    }
    Ok(())
}

#[test]
fn each_metric_is_in_the_documentation_and_no_other() -> Result<()> {
    let names = |text: &str, quote: char| -> BTreeSet<String> {
        text.split(quote).filter(|word| word.starts_with("kirsa_")).map(str::to_owned).collect()
    };
    let registered = names(&repository("src/observe/metrics.rs")?, '"');
    ensure!(registered.len() > 20, "{registered:?}");
    assert_eq!(names(&repository("docs/metrics.md")?, '`'), registered);
    Ok(())
}

#[test]
fn each_panel_has_a_place_of_its_own_and_says_what_it_shows() -> Result<()> {
    let (mut ids, mut taken) = (BTreeSet::new(), BTreeSet::new());
    for panel in panels()? {
        ensure!(ids.insert(panel["id"].to_string()), "{panel}");
        ensure!(panel["description"].as_str().is_some_and(|text| text.len() > 15), "{panel}");
        let at = |name: &str| panel["gridPos"][name].as_u64().unwrap_or_default();
        ensure!(at("x") + at("w") <= 24 && at("w") > 0 && at("h") > 0, "{panel}");
        for x in at("x")..at("x") + at("w") {
            for y in at("y")..at("y") + at("h") {
                ensure!(taken.insert((x, y)), "{panel}: on another one");
            }
        }
    }
    Ok(())
}
