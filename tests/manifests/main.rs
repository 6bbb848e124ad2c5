//! Tests the manifests in daemonset/ with the tools of their users: kustomize, helm, a real API server, promtool.

mod affinity;
mod alerts;
mod base;
mod chart;
mod dashboard;
mod kustomize;
mod release;
mod startup_taint;
mod token;

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};

use anyhow::{Context, Result, ensure};
use lab::apiserver::ApiServer;
use lab::tools;
use serde_json::Value;

lab::enter!();

const NAMESPACE: &str = "kirsa";
/// Kinds whose CustomResourceDefinitions come with other projects.
const CUSTOM: [&str; 3] = ["ServiceMonitor", "PrometheusRule", "CiliumLocalRedirectPolicy"];

fn folder(path: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("daemonset").join(path)
}

fn text(path: &Path) -> Result<String> {
    fs::read_to_string(path).with_context(|| path.display().to_string())
}

/// Runs a tool with a home directory of its own.
fn run(name: &str, arguments: &[&str]) -> Result<Output> {
    let mut command = Command::new(tools::locate(name)?);
    command.args(arguments).env("HOME", lab::namespace::STATE).env_remove("KUBECONFIG");
    command.output().with_context(|| format!("{name} {arguments:?}"))
}

/// Runs a tool and returns its output if it succeeds.
fn output_of(name: &str, arguments: &[&str]) -> Result<String> {
    let output = run(name, arguments)?;
    let (stdout, stderr) = (String::from_utf8(output.stdout)?, String::from_utf8_lossy(&output.stderr));
    ensure!(output.status.success(), "{name} {arguments:?}: {stderr}{stdout}");
    Ok(stdout)
}

fn objects(yaml: &str) -> Result<Vec<Value>> {
    let objects: Vec<Value> = serde_saphyr::from_multiple(yaml)?;
    Ok(objects.into_iter().filter(|object| !object.is_null()).collect())
}

/// Returns the objects that an API server without CRDs accepts, as one YAML document.
fn known(objects: &[Value]) -> String {
    let known = objects.iter().filter(|object| !object["kind"].as_str().is_some_and(|kind| CUSTOM.contains(&kind)));
    known.map(Value::to_string).collect::<Vec<_>>().join("\n---\n")
}

fn find<'a>(objects: &'a [Value], kind: &str) -> Result<&'a Value> {
    objects.iter().find(|object| object["kind"] == kind).with_context(|| format!("no {kind}"))
}

/// Starts the API server with the namespace and the service account of the base.
async fn server() -> Result<&'static ApiServer> {
    let server = ApiServer::get()?;
    let first = |object: &Value| object["kind"] == "Namespace" || object["kind"] == "ServiceAccount";
    let first: Vec<Value> = kustomize::build("base")?.into_iter().filter(first).collect();
    ensure!(first.len() == 2, "{first:?}");
    server.apply(&known(&first)).await?;
    Ok(server)
}
