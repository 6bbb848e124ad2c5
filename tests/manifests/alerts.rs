//! Tests the alerts of components/metrics: each fires for its cause only, and queries only existing metrics.

use std::collections::BTreeSet;
use std::fs;
use std::path::Path;

use anyhow::{Context, Result, ensure};
use kirsa::observe::Metrics;
use serde_json::Value;

use crate::{find, kustomize, output_of, text};

/// Metrics from kube-state-metrics.
const FOREIGN: [&str; 2] = ["kube_daemonset_status_number_unavailable", "kube_pod_container_resource_limits"];

fn rules() -> Result<Value> {
    Ok(find(&kustomize::with(&["metrics"])?, "PrometheusRule")?["spec"].clone())
}

fn each(rules: &Value) -> Vec<&Value> {
    let groups = rules["groups"].as_array().into_iter().flatten();
    groups.flat_map(|group| group["rules"].as_array().into_iter().flatten()).collect()
}

pub(crate) fn repository(path: &str) -> Result<String> {
    text(&Path::new(env!("CARGO_MANIFEST_DIR")).join(path))
}

#[test]
fn each_alert_fires_for_its_cause_only() -> Result<()> {
    let rules = rules()?;
    let folder = Path::new(lab::namespace::STATE).join("alerts");
    fs::create_dir_all(&folder)?;
    fs::write(folder.join("rules.yaml"), rules.to_string())?;
    let cases = repository("tests/manifests/alerts.yaml")?;
    fs::write(folder.join("alerts.yaml"), &cases)?;
    let path = |file: &str| folder.join(file).display().to_string();
    output_of("promtool", &["check", "rules", "--lint=all", "--lint-fatal", &path("rules.yaml")])?;
    output_of("promtool", &["test", "rules", &path("alerts.yaml")])?;
    for alert in each(&rules) {
        let name = alert["alert"].as_str().context("only alerts")?;
        let firing = format!("alertname=\"{name}\", alertstate=\"firing\"");
        ensure!(cases.contains(&firing), "no case fires {name}");
    }
    Ok(())
}

#[test]
fn each_alert_is_described_and_documented() -> Result<()> {
    let documentation = repository("docs/troubleshooting.md")?;
    let rules = rules()?;
    for alert in each(&rules) {
        let name = alert["alert"].as_str().context("a name")?;
        ensure!(documentation.contains(&format!("| `{name}` |")), "{name} is not in docs/troubleshooting.md");
        let annotation = |name: &str| alert["annotations"][name].as_str().unwrap_or_default().len();
        ensure!(annotation("summary") > 20 && annotation("description") > 60, "{alert}");
        ensure!(["critical", "warning"].contains(&alert["labels"]["severity"].as_str().unwrap_or_default()), "{alert}");
    }
    let named = documentation.split('`').filter(|word| word.starts_with("Kirsa")).collect::<BTreeSet<_>>();
    assert_eq!(named.len(), each(&rules).len(), "the documentation names an unknown alert: {named:?}");
    Ok(())
}

#[test]
fn alerts_query_existing_metrics_and_labels() -> Result<()> {
    let rules = rules()?;
    assert_known_metrics(&each(&rules).iter().filter_map(|rule| rule["expr"].as_str()).collect::<Vec<_>>())
}

/// Checks that the agent registers every metric and label value of the expressions, and that every outcome and reason
/// is in the table of refusals.
pub(crate) fn assert_known_metrics(expressions: &[&str]) -> Result<()> {
    let source = repository("src/observe/metrics.rs")?;
    let word = |c: char| !c.is_ascii_alphanumeric() && c != '_';
    let names: BTreeSet<&str> = expressions
        .iter()
        .flat_map(|expression| expression.split(word))
        .filter(|word| word.starts_with("kirsa_") || word.starts_with("kube_"))
        .collect();
    ensure!(names.len() > 8, "{names:?}");
    for name in names.into_iter().filter(|name| !FOREIGN.contains(name)) {
        let metric = name.trim_end_matches("_count").trim_end_matches("_bucket");
        ensure!(source.contains(&format!("\"{metric}\"")), "the agent has no metric {metric}");
    }
    let table = repository("src/refusal.rs")?;
    let labels = [("outcome=~\"", &table), ("outcome=\"", &table), ("reason=\"", &table)];
    let limiter = repository("src/cache/limiter.rs")?;
    let labels = labels.into_iter().chain([("step=\"", &source), ("priority!=\"", &limiter)]);
    for (label, known) in labels {
        for expression in expressions {
            let values = expression.split(label).skip(1).filter_map(|rest| rest.split('"').next());
            for value in values.flat_map(|values| values.split('|')) {
                ensure!(known.contains(&format!("\"{value}\"")), "{label}{value}: the agent has no such value");
            }
        }
    }
    Ok(())
}

/// The series is absent while no session is in use, so that no alert fires.
#[test]
fn first_expiry_is_read_at_each_scrape() -> Result<()> {
    let metrics = Metrics::new("test")?;
    let rendered = || -> Result<Option<String>> {
        let text = String::from_utf8(metrics.render()?)?;
        let line = text.lines().find(|line| line.starts_with("kirsa_credentials_left_seconds "));
        Ok(line.map(str::to_owned))
    };
    assert_eq!(rendered()?, None);
    let time_left = std::sync::Arc::new(parking_lot::Mutex::new(None));
    let source = time_left.clone();
    metrics.track_first_expiry(move || *source.lock());
    assert_eq!(rendered()?, None);
    for (seconds, line) in
        [(90, Some("kirsa_credentials_left_seconds 90")), (0, Some("kirsa_credentials_left_seconds 0"))]
    {
        *time_left.lock() = Some(std::time::Duration::from_secs(seconds));
        assert_eq!(rendered()?.as_deref(), line);
    }
    *time_left.lock() = None;
    assert_eq!(rendered()?, None);
    Ok(())
}
