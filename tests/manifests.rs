//! The manifests under daemonset/, as a real API server takes them: base and every component, by its own kustomization.
//! kustomize itself is not needed; what the files use of it is little and stands below.

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, bail, ensure};
use lab::apiserver::ApiServer;
use serde_json::{Value, json};

lab::enter!();

const NAMESPACE: &str = "kirsa";
/// Their definitions come with other projects.
const CUSTOM: [&str; 3] = ["ServiceMonitor", "PrometheusRule", "CiliumLocalRedirectPolicy"];

fn folder(path: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("daemonset").join(path)
}

fn text(path: &Path) -> Result<String> {
    fs::read_to_string(path).with_context(|| path.display().to_string())
}

fn kustomization(path: &str) -> Result<Value> {
    let file = folder(path).join("kustomization.yaml");
    serde_saphyr::from_str(&text(&file)?).with_context(|| file.display().to_string())
}

fn components() -> Result<Vec<String>> {
    let mut names = Vec::new();
    for entry in fs::read_dir(folder("components"))? {
        names.push(format!("components/{}", entry?.file_name().to_string_lossy()));
    }
    ensure!(names.len() >= 6, "{names:?}");
    names.sort();
    Ok(names)
}

/// What is applied by itself, or added to the base.
fn all() -> Result<Vec<String>> {
    Ok(components()?.into_iter().chain(["base".into(), "uninstall".into()]).collect())
}

fn strings(value: &Value) -> Vec<String> {
    value.as_array().into_iter().flatten().filter_map(Value::as_str).map(str::to_owned).collect()
}

/// The objects of a kustomization, in its namespace.
fn objects(path: &str) -> Result<Vec<Value>> {
    let mut objects = Vec::new();
    for file in strings(&kustomization(path)?["resources"]) {
        let file = folder(path).join(file);
        let parsed: Vec<Value> =
            serde_saphyr::from_multiple(&text(&file)?).with_context(|| file.display().to_string())?;
        objects.extend(parsed);
    }
    for object in &mut objects {
        let kind = object["kind"].as_str().unwrap_or_default().to_owned();
        if ["ServiceAccount", "DaemonSet", "NetworkPolicy", "Service"].contains(&kind.as_str()) {
            object["metadata"]["namespace"] = NAMESPACE.into();
        }
    }
    Ok(objects)
}

/// Those of a kustomization's patches that are for the DaemonSet.
fn patches(path: &str) -> Result<Vec<Value>> {
    let mut operations = Vec::new();
    for patch in kustomization(path)?["patches"].as_array().into_iter().flatten() {
        ensure!(patch["target"] == json!({"kind": "DaemonSet", "name": "kirsa"}), "{path}: {patch}");
        let parsed: Vec<Value> = serde_saphyr::from_str(patch["patch"].as_str().context("an inline patch")?)?;
        operations.extend(parsed);
    }
    Ok(operations)
}

/// RFC 6902, as much of it as is used: an addition to a list, and a removal.
fn apply(target: &mut Value, operation: &Value) -> Result<()> {
    let path = operation["path"].as_str().context("a path")?;
    let (parent, last) = path.rsplit_once('/').context("a path")?;
    let parent = target.pointer_mut(parent).with_context(|| format!("nothing at {parent}"))?;
    match (operation["op"].as_str(), last, parent) {
        (Some("add"), "-", Value::Array(list)) => list.push(operation["value"].clone()),
        (Some("remove"), key, Value::Object(members)) => drop(members.remove(key).context("nothing to remove")?),
        _ => bail!("{operation}"),
    }
    Ok(())
}

fn yaml(objects: &[Value]) -> String {
    let known = objects.iter().filter(|object| !object["kind"].as_str().is_some_and(|kind| CUSTOM.contains(&kind)));
    known.map(Value::to_string).collect::<Vec<_>>().join("\n---\n")
}

fn daemonset() -> Result<Value> {
    objects("base")?.into_iter().find(|object| object["kind"] == "DaemonSet").context("the DaemonSet")
}

/// With what everything else is in, or runs as.
async fn server() -> Result<&'static ApiServer> {
    let server = ApiServer::get()?;
    let first = |object: &Value| object["kind"] == "Namespace" || object["kind"] == "ServiceAccount";
    let first: Vec<Value> = objects("base")?.into_iter().filter(first).collect();
    ensure!(first.len() == 2, "{first:?}");
    server.apply(&yaml(&first)).await?;
    Ok(server)
}

#[tokio::test]
async fn the_api_server_accepts_the_base_and_every_component() -> Result<()> {
    let server = server().await?;
    for kustomization in all()? {
        server.apply_dry_run(&yaml(&objects(&kustomization)?)).await.with_context(|| kustomization.clone())?;
    }
    for component in components()? {
        let mut daemonset = daemonset()?;
        for patch in patches(&component)? {
            apply(&mut daemonset, &patch).with_context(|| component.clone())?;
        }
        server.apply_dry_run(&yaml(&[daemonset])).await.with_context(|| component.clone())?;
    }
    Ok(())
}

/// Not its controller, which is not here: the pod itself, as the controller would make it. Any stricter level of pod
/// security refuses it, so that the namespace claims no more than is needed.
#[tokio::test]
async fn the_agents_pod_is_admitted_in_its_namespace_and_under_no_stricter_pod_security() -> Result<()> {
    let server = server().await?;
    let daemonset = daemonset()?;
    let mut pod = daemonset["spec"]["template"].clone();
    pod["apiVersion"] = "v1".into();
    pod["kind"] = "Pod".into();
    pod["metadata"]["name"] = "kirsa-x".into();
    let labels = &pod["metadata"]["labels"];
    let selector = daemonset["spec"]["selector"]["matchLabels"].as_object().context("a selector")?;
    ensure!(selector.iter().all(|(label, value)| labels[label] == *value), "{selector:?} {labels}");
    let mut inside = pod.clone();
    inside["metadata"]["namespace"] = NAMESPACE.into();
    server.apply_dry_run(&yaml(&[inside])).await?;

    server.service_account("strict", "kirsa", &[]).await?;
    let label = json!({"pod-security.kubernetes.io/enforce": "baseline"});
    let strict = json!({"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": "strict", "labels": label}});
    server.apply(&yaml(&[strict])).await?;
    pod["metadata"]["namespace"] = "strict".into();
    let refused = format!("{:#}", server.apply_dry_run(&yaml(&[pod])).await.expect_err("baseline admits it"));
    for need in ["host namespaces", "hostPath volumes", "NET_ADMIN"] {
        ensure!(refused.contains(need), "{need}: {refused}");
    }
    Ok(())
}

#[test]
fn every_file_is_named_by_its_kustomization() -> Result<()> {
    for path in all()? {
        let mut files = BTreeSet::new();
        for entry in fs::read_dir(folder(&path))? {
            files.insert(entry?.file_name().to_string_lossy().into_owned());
        }
        let kustomization = kustomization(&path)?;
        let generators = kustomization["configMapGenerator"].as_array().cloned().unwrap_or_default();
        let named = generators.iter().flat_map(|generator| strings(&generator["envs"]));
        let named = named.chain(strings(&kustomization["resources"])).chain(["kustomization.yaml".into()]).collect();
        ensure!(files == named, "{path}: {files:?} are there, {named:?} are named");
    }
    Ok(())
}

/// A misspelt one would be ignored without a word.
#[test]
fn every_variable_is_one_that_the_agent_reads() -> Result<()> {
    let help = Command::new(env!("CARGO_BIN_EXE_kirsa")).args(["run", "--help"]).output()?;
    let help = String::from_utf8(help.stdout)?;
    let mut variables: Vec<String> = text(&folder("base/config.env"))?.lines().map(str::to_owned).collect();
    for component in components()? {
        for generator in kustomization(&component)?["configMapGenerator"].as_array().into_iter().flatten() {
            variables.extend(strings(&generator["literals"]));
        }
    }
    let container = daemonset()?["spec"]["template"]["spec"]["containers"][0].clone();
    variables.extend(
        container["env"].as_array().into_iter().flatten().filter_map(|env| env["name"].as_str()).map(String::from),
    );
    let names = variables.iter().filter(|line| !line.starts_with('#')).filter_map(|line| line.split('=').next());
    for name in names.filter(|name| !name.is_empty()) {
        ensure!(help.contains(&format!("[env: {name}=")), "{name} is no variable of `kirsa run`");
    }
    Ok(())
}

#[test]
fn alerts_ask_for_metrics_that_the_agent_has() -> Result<()> {
    let source = text(&Path::new(env!("CARGO_MANIFEST_DIR")).join("src/observe/metrics.rs"))?;
    let rules = objects("components/metrics")?.into_iter().find(|object| object["kind"] == "PrometheusRule");
    let rules = rules.context("the PrometheusRule")?.to_string();
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
