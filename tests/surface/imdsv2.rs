//! IMDSv2 required in some namespaces and not in others.

use anyhow::{Result, ensure};
use lab::agent::Agent;
use lab::http::{CREDENTIALS_PATH, TOKEN};
use lab::net::Pod;
use lab::site::Site;
use lab::workloads::Workload;

use super::{credentials, get, get_with, site};

/// A pod with a role in that namespace.
fn pod_in(site: &Site, namespace: &str, name: &str) -> Result<Pod> {
    let pod = site.stranger(name)?;
    site.put(Workload { namespace: namespace.into(), ..site.with_role(&pod)? })?;
    Ok(pod)
}

/// IMDS-5
#[test]
fn namespaces_that_are_listed_get_nothing_without_a_token_and_the_others_notice_nothing() -> Result<()> {
    let site = site()?;
    let required = [pod_in(&site, "shop", "a")?, pod_in(&site, "team-x", "b")?];
    let free = [pod_in(&site, "shop-2", "c")?, pod_in(&site, "teams", "d")?];
    let idle = site.stranger("idle")?;
    site.put(Workload { namespace: "shop".into(), ..Workload::new(&idle, "idle") })?;
    // What the namespace requires a service account cannot take back.
    let lax = site.stranger("lax")?;
    let entry = site.with_role(&lax)?.annotation("kirsa.dev/require-imdsv2", "false");
    site.put(Workload { namespace: "shop".into(), ..entry })?;
    let options = site.options.clone().flag("--require-imdsv2-namespaces", "shop,team-*");
    let agent = Agent::start(&site.node, &options)?;
    for pod in required.iter().chain([&lax]) {
        let token = pod.imds().put_token(60)?;
        for path in ["/", "/latest/meta-data/", CREDENTIALS_PATH, &credentials(pod.name())] {
            ensure!(get(pod, path)?.status == 401, "{} {path} without a token", pod.name());
            let answer = get_with(&mut pod.imds(), path, &[(TOKEN, &token)])?;
            ensure!(answer.status == 200, "{} {path} with a token: {answer:?}", pod.name());
        }
    }
    for pod in &free {
        for path in ["/", CREDENTIALS_PATH, &credentials(pod.name())] {
            ensure!(get(pod, path)?.status == 200, "{} {path}", pod.name());
        }
    }
    ensure!(get(&idle, CREDENTIALS_PATH)?.status == 401, "who has no role learns of the token first");
    let refusal = agent.wait_for_refusal("imds_token_required")?;
    ensure!(refusal.to_string().contains("--require-imdsv2-namespaces"), "{refusal}");
    agent.stop()
}

#[test]
fn a_list_that_cannot_be_meant_is_refused_at_the_start() -> Result<()> {
    let site = site()?;
    for wrong in ["Shop", "a*b", "a_b", "shop,,x"] {
        let output = Agent::run_to_end(&site.node, &site.options.clone().flag("--require-imdsv2-namespaces", wrong))?;
        let said = String::from_utf8_lossy(&output.stderr);
        ensure!(output.status.code() == Some(2) && said.contains("--require-imdsv2-namespaces"), "{wrong}: {output:?}");
    }
    Ok(())
}
