//! The first request of a pod: before, while and after its address becomes known, and before its credentials are there.

use std::time::Duration;

use anyhow::{Context, Result, ensure};
use k8s_openapi::api::core::v1::Pod as KubePod;
use kube::Api;
use kube::api::{Patch, PatchParams};
use lab::http::{CREDENTIALS_PATH, TOKEN, Wire};
use lab::net::Pod;
use lab::sts::{Effect, Fault};
use serde_json::json;
use tokio::time::Instant;

use crate::PATIENCE;
use crate::site::{Site, arn, list, role, runtime, wait_for_metric};

/// For how long a pod that is not known is waited for.
const HOLD: Duration = Duration::from_millis(800);

/// IMDS-18: the exchange starts at binding, and the pod's first request finds it done.
#[test]
fn credentials_are_there_before_the_first_request() -> Result<()> {
    let site = Site::new()?;
    site.account("app")?;
    let agent = site.start()?;
    let uid = site.bind("app-0", "app")?;
    let calls = site.sts.wait_for_outcomes(1, PATIENCE)?;
    ensure!(calls.len() == 1 && calls[0].role_arn == arn("app"), "{calls:?}");
    let bound = calls[0].claims.clone().and_then(|claims| claims.kubernetes?.pod).context("a pod-bound token")?;
    ensure!(bound.uid == uid && bound.name == "app-0", "{bound:?}");
    agent.wait_for_log(|entry| entry["message"] == "credentials issued" && entry["pod"] == "app-0")?;
    let pod = site.join("app-0")?;
    site.show(&pod)?;
    site.serves(&pod, "app")?;
    ensure!(agent.metric("kirsa_cache_hits_total", &[])? == 1.0);
    ensure!(agent.metric("kirsa_cache_misses_total", &[])? == 0.0);
    ensure!(site.calls("app").len() == 1);
    agent.stop()
}

/// The kubelet reports the address while the first request is held: it is the same pod still.
#[test]
fn a_request_is_held_through_what_is_told_of_its_pod_meanwhile() -> Result<()> {
    let site = Site::new()?;
    site.account("app")?;
    site.sts.inject(Fault::always(Effect::delay(Duration::from_secs(2))).of_role(&arn("app")));
    let agent = site.start()?;
    let uid = site.bind("app-0", "app")?;
    let pod = site.join("app-0")?;
    site.records()?.add(&site.sandbox("app-0", &uid), &pod)?;
    wait_for_metric(&agent, "kirsa_cni_records", &[("state", "in_use")], 1.0)?;
    let path = format!("{CREDENTIALS_PATH}{}", role("app"));
    let mut held = Wire::open(&pod, format!("GET {path} HTTP/1.1\r\nHost: 169.254.169.254\r\n\r\n"))?;
    wait_for_metric(&agent, "kirsa_cache_misses_total", &[], 1.0)?;
    site.show(&pod)?;
    site.belongs(&site.session(&held.response()?)?, "app")?;
    agent.stop()
}

/// Service account and pod are often created together, and the agent may hear of the pod first.
#[test]
fn an_account_that_gets_its_role_after_its_pod_was_bound_is_fetched_for_at_once() -> Result<()> {
    let site = Site::new()?;
    site.annotate("app", &[])?;
    site.trust(&arn("app"), "app");
    let agent = site.start()?;
    site.bind("app-0", "app")?;
    wait_for_metric(&agent, "kirsa_indexed_pods", &[], 2.0).context("the agent's own and this one")?;
    site.account("app")?;
    site.sts.wait_for_outcomes(1, PATIENCE)?;
    agent.wait_for_log(|entry| entry["message"] == "credentials issued" && entry["pod"] == "app-0")?;
    agent.stop()
}

/// The API server shows the address later than the pod's first instruction runs, on a busy node by seconds.
#[test]
fn a_pod_that_only_its_record_names_is_answered() -> Result<()> {
    let site = Site::new()?;
    site.account("app")?;
    let agent = site.start()?;
    let uid = site.bind("app-0", "app")?;
    let pod = site.join("app-0")?;
    site.records()?.add(&site.sandbox("app-0", &uid), &pod)?;
    // The runtime starts the container hundreds of milliseconds after this.
    wait_for_metric(&agent, "kirsa_cni_records", &[("state", "in_use")], 1.0)?;
    agent.wait_for_log(|entry| entry["message"] == "credentials issued")?;
    site.serves(&pod, "app")?;
    agent.stop()
}

/// IMDS-25: the request is held, and the event ends that.
#[test]
fn a_request_before_the_record_is_held_until_it_is_written() -> Result<()> {
    let site = Site::new()?;
    site.account("app")?;
    let agent = site.start()?;
    let uid = site.bind("app-0", "app")?;
    let pod = site.join("app-0")?;
    agent.wait_for_log(|entry| entry["message"] == "credentials issued")?;
    let mut held = asking_for(&pod, &role("app"))?;
    held.quiet(HOLD / 4).context("answered before anybody could know the pod")?;
    site.records()?.add(&site.sandbox("app-0", &uid), &pod)?;
    site.belongs(&site.session(&held.response()?)?, "app")?;
    agent.stop()
}

/// IMDS-25
#[test]
fn a_request_before_the_api_server_shows_the_address_is_held_until_it_does() -> Result<()> {
    let site = Site::new()?;
    site.account("app")?;
    let agent = site.start()?;
    let runtime = runtime();
    let api: Api<KubePod> = Api::namespaced(runtime.block_on(site.api.client())?, site.namespace());
    // A machine that is too busy may take the whole hold for one call of the API server: that says nothing.
    for attempt in 0..5 {
        let name = format!("app-{attempt}");
        site.bind(&name, "app")?;
        let pod = site.join(&name)?;
        let status = json!({"status": {"podIP": pod.ip(), "podIPs": [{"ip": pod.ip()}]}});
        runtime.block_on(api.get(&name))?;
        let asked = Instant::now();
        let mut held = asking_for(&pod, &role("app"))?;
        held.quiet(HOLD / 4).context("answered before anybody could know the pod")?;
        runtime.block_on(api.patch_status(&name, &PatchParams::default(), &Patch::Merge(status)))?;
        let shown = asked.elapsed();
        let answer = held.response()?;
        if shown < HOLD / 2 {
            site.belongs(&site.session(&answer).with_context(|| format!("shown after {shown:?}"))?, "app")?;
            return agent.stop();
        }
    }
    anyhow::bail!("five times the API server took longer than the hold")
}

/// IMDS-4, IMDS-7, IMDS-25
#[test]
fn a_pod_that_stays_unknown_is_told_to_try_again_and_keeps_its_session_token() -> Result<()> {
    let site = Site::new()?;
    site.account("app")?;
    let agent = site.start()?;
    site.bind("app-0", "app")?;
    let pod = site.join("app-0")?;
    let mut held = asking_for(&pod, "")?;
    let token = pod.imds().put_token(21_600)?;
    ensure!(list(&pod)?.status == 503);
    ensure!(held.response()?.status == 503);
    agent.wait_for_refusal("unknown_pod")?;

    site.show(&pod)?;
    let answer = pod.imds().get(CREDENTIALS_PATH).header(TOKEN, &token).send()?;
    ensure!(answer.status == 200 && answer.body == role("app"), "{answer:?}");
    // Yet it is the pod's that asked, and no other's.
    let other = site.run("app-1", "app")?;
    site.serves(&other, "app")?;
    let answer = other.imds().get(CREDENTIALS_PATH).header(TOKEN, &token).send()?;
    ensure!(answer.status == 401, "{answer:?}");
    agent.stop()
}

/// An open request for the list, or for the credentials of a role.
fn asking_for(pod: &Pod, role: &str) -> Result<Wire> {
    Wire::open(pod, format!("GET {CREDENTIALS_PATH}{role} HTTP/1.1\r\nHost: 169.254.169.254\r\n\r\n"))
}
