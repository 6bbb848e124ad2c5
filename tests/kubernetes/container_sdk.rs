//! An unmodified SDK that uses container credentials, configured as by the EKS Pod Identity webhook.

use std::fs;
use std::io::Write;

use anyhow::{Context, Result, ensure};
use lab::sdk;

use crate::container::{PATH, PODS_AUDIENCE, run, site, token};
use crate::site::{arn, blocking};

const HOSTS: [&str; 2] = ["169.254.170.23", "[fd00:ec2::23]"];

#[test]
fn boto3_gets_role_of_service_account() -> Result<()> {
    if !sdk::is_prepared() {
        writeln!(std::io::stderr(), "skipped: boto3: tests/setup.sh could not get it from PyPI")?;
        return Ok(());
    }
    let site = site()?;
    site.account("app")?;
    let agent = site.start()?;
    let (pod, uid) = run(&site, "app-0", "app")?;
    let file = site.node.state().join("eks-pod-identity-token");
    fs::write(&file, token(&site, "app", ("app-0", &uid), PODS_AUDIENCE)?)?;
    let hosts = if pod.ip6().is_some() { &HOSTS[..] } else { &HOSTS[..1] };
    for host in hosts {
        let mut command = sdk::boto3(&site.sts.url())?;
        command.env("AWS_CONTAINER_CREDENTIALS_FULL_URI", format!("http://{host}{PATH}"));
        command.env("AWS_CONTAINER_AUTHORIZATION_TOKEN_FILE", &file);
        let output = pod.run(&mut command)?;
        ensure!(output.status.success(), "{host}: {}", String::from_utf8_lossy(&output.stderr));
        let shown: serde_json::Value = serde_json::from_slice(&output.stdout)?;
        ensure!(shown["method"] == "container-role", "{host}: {shown}");
        let session = site.sts.session(shown["access_key_id"].as_str().context("a key")?).context("a session")?;
        ensure!(session.role_arn == arn("app") && shown["arn"] == session.arn, "{shown}");
    }
    // With another pod's token, the pod gets no credentials.
    let (_, other) = run(&site, "app-1", "app")?;
    fs::write(&file, blocking(site.api.token(site.namespace(), "app", ("app-1", &other), Some(PODS_AUDIENCE)))?)?;
    let mut command = sdk::boto3(&site.sts.url())?;
    command.env("AWS_CONTAINER_CREDENTIALS_FULL_URI", format!("http://{}{PATH}", HOSTS[0]));
    command.env("AWS_CONTAINER_AUTHORIZATION_TOKEN_FILE", &file);
    let output = pod.run(&mut command)?;
    ensure!(!output.status.success(), "{}", String::from_utf8_lossy(&output.stdout));
    agent.wait_for_refusal("container_token_mismatch")?;
    agent.stop()
}
