//! The kubelet's credential provider for ECR, which signs with the credentials from the instance's metadata.
//! Source: <https://github.com/kubernetes/cloud-provider-aws/tree/master/cmd/ecr-credential-provider>

use std::net::TcpListener;
use std::process::Command;

use anyhow::{Context, Result, ensure};
use lab::clients::Installed;
use lab::namespace::BASE;
use lab::site::ACCOUNT;
use lab::sts::{PASSWORD, Registry};
use serde_json::{Value, json};

use super::{Lab, run};

const REGISTRY: &str = "111122223333.dkr.ecr.eu-central-1.amazonaws.com";

/// Returns the command of the provider, with a request on standard input like the kubelet's.
fn provider(registry: &Registry) -> Option<Command> {
    let provider = Installed::find_or_skip("ecr-credential-provider")?;
    let request = json!({
        "apiVersion": "credentialprovider.kubelet.k8s.io/v1",
        "kind": "CredentialProviderRequest",
        "image": format!("{REGISTRY}/app:1"),
    });
    let mut command = provider.shell("printf %s \"$REQUEST\" | \"$CLIENT/client\"");
    command.env("REQUEST", request.to_string()).env("AWS_ENDPOINT_URL_ECR", registry.url());
    Some(command)
}

#[test]
fn ecr_provider_logs_in_as_the_pods_role() -> Result<()> {
    let lab = Lab::start()?;
    let registry = lab.site.sts.start_registry(TcpListener::bind((BASE, 0))?)?;
    let Some(command) = provider(&registry) else { return Ok(()) };
    let lines = run(&lab.reader, command)?.ok()?;
    let response: Value =
        serde_json::from_str(lines.last().context("a response")?).with_context(|| format!("{lines:#?}"))?;
    ensure!(response["auth"][REGISTRY]["password"] == PASSWORD, "{response}");
    let acts = lab.site.sts.acts();
    let own = format!("arn:aws:sts::{ACCOUNT}:assumed-role/reader-role/default.reader");
    ensure!(acts.len() == 1 && acts[0].arn == own && acts[0].from == lab.reader.ip(), "{acts:?}");
    lab.stop()
}

#[test]
fn without_role_ecr_provider_fails() -> Result<()> {
    let lab = Lab::start()?;
    let registry = lab.site.sts.start_registry(TcpListener::bind((BASE, 0))?)?;
    let Some(command) = provider(&registry) else { return Ok(()) };
    let output = run(&lab.idle, command)?;
    ensure!(!output.status.success() && lab.site.sts.acts().is_empty(), "{}: {:#?}", output.status, output.lines);
    lab.stop()
}
