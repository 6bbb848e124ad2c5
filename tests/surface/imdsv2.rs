//! IMDSv2 required in some namespaces only (`--require-imdsv2-namespaces`).

use anyhow::{Result, ensure};
use lab::agent::Agent;
use lab::http::{CREDENTIALS_PATH, TOKEN};
use lab::net::Pod;
use lab::site::Site;
use lab::workloads::Workload;

use super::{credentials, get, get_with, site};

/// Starts a pod with a role in a namespace.
fn pod_in(site: &Site, namespace: &str, name: &str) -> Result<Pod> {
    let pod = site.stranger(name)?;
    site.put(Workload { namespace: namespace.into(), ..site.with_role(&pod)? })?;
    Ok(pod)
}

/// IMDS-5
#[test]
fn only_listed_namespaces_need_a_token() -> Result<()> {
    let site = site()?;
    let required = [pod_in(&site, "shop", "a")?, pod_in(&site, "team-x", "b")?];
    let free = [pod_in(&site, "shop-2", "c")?, pod_in(&site, "teams", "d")?];
    let idle = site.stranger("idle")?;
    site.put(Workload { namespace: "shop".into(), ..Workload::new(&idle, "idle") })?;
    // A service account cannot relax the requirement of its namespace.
    let lax = site.stranger("lax")?;
    let entry = site.with_role(&lax)?.annotation("kirsa.dev/require-imdsv2", "false");
    site.put(Workload { namespace: "shop".into(), ..entry })?;
    let options = site.options.clone().flag("--require-imdsv2-namespaces", "shop,team-*");
    let agent = Agent::start(&site.node, &options)?;
    for pod in required.iter().chain([&lax]) {
        let token = pod.imds().put_token(60)?;
        for path in ["/", "/latest/meta-data/", CREDENTIALS_PATH, &credentials(pod.name())] {
            ensure!(get(pod, path)?.status == 401, "{} {path} without a token", pod.name());
            let response = get_with(&mut pod.imds(), path, &[(TOKEN, &token)])?;
            ensure!(response.status == 200, "{} {path} with a token: {response:?}", pod.name());
        }
    }
    for pod in &free {
        for path in ["/", CREDENTIALS_PATH, &credentials(pod.name())] {
            ensure!(get(pod, path)?.status == 200, "{} {path}", pod.name());
        }
    }
    ensure!(get(&idle, CREDENTIALS_PATH)?.status == 401, "the token is checked before the role");
    let refusal = agent.wait_for_refusal("imds_token_required")?;
    ensure!(refusal.to_string().contains("--require-imdsv2-namespaces"), "{refusal}");
    agent.stop()
}

#[test]
fn invalid_namespace_list_fails_at_start() -> Result<()> {
    let site = site()?;
    for wrong in ["Shop", "a*b", "a_b", "shop,,x"] {
        let output = Agent::run_to_end(&site.node, &site.options.clone().flag("--require-imdsv2-namespaces", wrong))?;
        let stderr = String::from_utf8_lossy(&output.stderr);
        ensure!(
            output.status.code() == Some(2) && stderr.contains("--require-imdsv2-namespaces"),
            "{wrong}: {output:?}"
        );
    }
    Ok(())
}
