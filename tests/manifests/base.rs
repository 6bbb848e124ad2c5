//! The base, every component, and `uninstall`.

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
async fn the_api_server_accepts_the_base_every_component_and_uninstall() -> Result<()> {
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

/// Not its controller, which is not here: the pod itself, as the controller would make it. Any stricter level of pod
/// security refuses it, so that the namespace claims no more than is needed.
#[tokio::test]
async fn the_agents_pod_is_admitted_in_its_namespace_and_under_no_stricter_pod_security() -> Result<()> {
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
fn every_file_is_named_by_its_kustomization() -> Result<()> {
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
        ensure!(files == named, "{path}: {files:?} are there, {named:?} are named");
    }
    Ok(())
}

/// A misspelt one would be ignored without a word.
#[test]
fn every_variable_is_one_that_the_agent_reads() -> Result<()> {
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
            ensure!(known.contains(name), "{component}: {name} is no variable of `kirsa run`");
        }
    }
    Ok(())
}

/// As `kirsa run --help` names them.
pub(crate) fn variables_of_the_agent() -> Result<BTreeSet<String>> {
    let help = Command::new(env!("CARGO_BIN_EXE_kirsa")).args(["run", "--help"]).output()?;
    let help = String::from_utf8(help.stdout)?;
    let names = help.split("[env: ").skip(1).filter_map(|rest| rest.split('=').next());
    Ok(names.map(str::to_owned).collect())
}
