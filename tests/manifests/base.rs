//! Tests the base, every component, and `uninstall`.

use std::collections::BTreeSet;
use std::fs;
use std::process::Command;

use anyhow::{Context, Result, ensure};
use serde_json::{Value, json};

use crate::kustomize::{build, components, kustomization, with};
use crate::{NAMESPACE, find, folder, known, server};

fn strings(value: &Value) -> Vec<String> {
    value.as_array().into_iter().flatten().filter_map(Value::as_str).map(str::to_owned).collect()
}

#[tokio::test]
async fn api_server_accepts_base_and_components() -> Result<()> {
    let server = server().await?;
    for component in components()? {
        let objects = with(&[&component])?;
        server.apply_dry_run(&known(&objects)).await.with_context(|| component.clone())?;
    }
    for path in ["", "uninstall"] {
        server.apply_dry_run(&known(&build(path)?)).await.context(path)?;
    }
    Ok(())
}

/// Creates the pod itself, since no DaemonSet controller runs. A stricter Pod Security level rejects it, which shows
/// that the namespace's level is not higher than needed.
#[tokio::test]
async fn agent_pod_needs_its_pod_security_level() -> Result<()> {
    let server = server().await?;
    let base = build("base")?;
    let daemonset = find(&base, "DaemonSet")?;
    let mut pod = daemonset["spec"]["template"].clone();
    pod["apiVersion"] = "v1".into();
    pod["kind"] = "Pod".into();
    pod["metadata"]["name"] = "kirsa-x".into();
    let labels = &pod["metadata"]["labels"];
    let selector = daemonset["spec"]["selector"]["matchLabels"].as_object().context("a selector")?;
    ensure!(selector.iter().all(|(label, value)| labels[label] == *value), "{selector:?} {labels}");
    let mut inside = pod.clone();
    inside["metadata"]["namespace"] = NAMESPACE.into();
    server.apply_dry_run(&known(&[inside])).await?;

    server.service_account("strict", "kirsa", &[]).await?;
    let label = json!({"pod-security.kubernetes.io/enforce": "baseline"});
    let strict = json!({"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": "strict", "labels": label}});
    server.apply(&known(&[strict])).await?;
    pod["metadata"]["namespace"] = "strict".into();
    let refused = format!("{:#}", server.apply_dry_run(&known(&[pod])).await.expect_err("baseline admits it"));
    for need in ["host namespaces", "hostPath volumes", "NET_ADMIN"] {
        ensure!(refused.contains(need), "{need}: {refused}");
    }
    Ok(())
}

#[test]
fn every_file_is_in_its_kustomization() -> Result<()> {
    let components = components()?.into_iter().map(|name| format!("components/{name}"));
    for path in components.chain(["base".into(), "uninstall".into()]) {
        let mut files = BTreeSet::new();
        for entry in fs::read_dir(folder(&path))? {
            files.insert(entry?.file_name().to_string_lossy().into_owned());
        }
        let kustomization = kustomization(&path)?;
        let generators = kustomization["configMapGenerator"].as_array().cloned().unwrap_or_default();
        let files_of = generators.iter().flat_map(|generator| strings(&generator["files"]));
        let files_of = files_of.filter_map(|file| file.split_once('=').map(|(_, file)| file.to_owned()));
        let named = generators.iter().flat_map(|generator| strings(&generator["envs"])).chain(files_of);
        let named = named.chain(strings(&kustomization["resources"])).chain(["kustomization.yaml".into()]).collect();
        ensure!(files == named, "{path}: the files are {files:?}, the kustomization has {named:?}");
    }
    Ok(())
}

/// The agent silently ignores a misspelled variable.
#[test]
fn agent_reads_every_variable() -> Result<()> {
    let known = variables_of_the_agent()?;
    for component in components()? {
        let objects = with(&[&component])?;
        let container = &find(&objects, "DaemonSet")?["spec"]["template"]["spec"]["containers"][0];
        let env = container["env"].as_array().context("its environment")?;
        let env = env.iter().filter_map(|variable| variable["name"].as_str());
        let config = &container["envFrom"][0]["configMapRef"]["name"];
        let config =
            objects.iter().find(|object| object["kind"] == "ConfigMap" && object["metadata"]["name"] == *config);
        let data = config.and_then(|config| config["data"].as_object()).context("its ConfigMap")?;
        for name in env.chain(data.keys().map(String::as_str)) {
            ensure!(known.contains(name), "{component}: `kirsa run` does not read {name}");
        }
    }
    Ok(())
}

/// Returns the variables in `kirsa run --help`.
pub(crate) fn variables_of_the_agent() -> Result<BTreeSet<String>> {
    let help = Command::new(env!("CARGO_BIN_EXE_kirsa")).args(["run", "--help"]).output()?;
    let help = String::from_utf8(help.stdout)?;
    let names = help.split("[env: ").skip(1).filter_map(|rest| rest.split('=').next());
    Ok(names.map(str::to_owned).collect())
}
