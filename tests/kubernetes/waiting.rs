//! First requests of pods: before, while and after the address becomes known, and before credentials are ready.

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

use crate::TIMEOUT;
use crate::site::{Site, arn, list, role, runtime, wait_for_metric};

/// Time for which a request of an unknown pod is held.
const HOLD: Duration = Duration::from_millis(800);

/// IMDS-18: the exchange starts when the pod is bound, and is complete before the pod's first request.
#[test]
fn credentials_are_prefetched_at_binding() -> Result<()> {
    let site = Site::new()?;
    site.account("app")?;
    let agent = site.start()?;
    let uid = site.bind("app-0", "app")?;
    let calls = site.sts.wait_for_outcomes(1, TIMEOUT)?;
    ensure!(calls.len() == 1 && calls[0].role_arn == arn("app"), "{calls:?}");
    let bound = calls[0].claims.clone().and_then(|claims| claims.kubernetes?.pod).context("a pod-bound token")?;
    ensure!(bound.uid == uid && bound.name == "app-0", "{bound:?}");
    agent.wait_for_log(|entry| entry["message"] == "credentials issued" && entry["pod"] == "app-0")?;
    let pod = site.attach("app-0")?;
    site.report_address(&pod)?;
    site.assert_served(&pod, "app")?;
    ensure!(agent.metric("kirsa_cache_hits_total", &[])? == 1.0);
    ensure!(agent.metric("kirsa_cache_misses_total", &[])? == 0.0);
    ensure!(site.calls("app").len() == 1);
    agent.stop()
}

/// The kubelet reports the address while the first request is held: the pod is still the same.
#[test]
fn held_request_survives_pod_update() -> Result<()> {
    let site = Site::new()?;
    site.account("app")?;
    site.sts.inject(Fault::always(Effect::delay(Duration::from_secs(2))).of_role(&arn("app")));
    let agent = site.start()?;
    let uid = site.bind("app-0", "app")?;
    let pod = site.attach("app-0")?;
    site.records()?.add(&site.sandbox("app-0", &uid), &pod)?;
    wait_for_metric(&agent, "kirsa_cni_records", &[("state", "in_use")], 1.0)?;
    let path = format!("{CREDENTIALS_PATH}{}", role("app"));
    let mut held = Wire::open(&pod, format!("GET {path} HTTP/1.1\r\nHost: 169.254.169.254\r\n\r\n"))?;
    wait_for_metric(&agent, "kirsa_cache_misses_total", &[], 1.0)?;
    site.report_address(&pod)?;
    site.assert_session_of(&site.session(&held.response()?)?, "app")?;
    agent.stop()
}

/// Service account and pod are often created together, and the watch may report the pod first.
#[test]
fn role_added_after_binding_is_prefetched() -> Result<()> {
    let site = Site::new()?;
    site.annotate("app", &[])?;
    site.trust(&arn("app"), "app");
    let agent = site.start()?;
    site.bind("app-0", "app")?;
    wait_for_metric(&agent, "kirsa_indexed_pods", &[], 2.0).context("the agent's own and this one")?;
    site.account("app")?;
    site.sts.wait_for_outcomes(1, TIMEOUT)?;
    agent.wait_for_log(|entry| entry["message"] == "credentials issued" && entry["pod"] == "app-0")?;
    agent.stop()
}

/// On a busy node, the API server reports the address seconds after the pod's first instruction.
#[test]
fn record_alone_identifies_pod() -> Result<()> {
    let site = Site::new()?;
    site.account("app")?;
    let agent = site.start()?;
    let uid = site.bind("app-0", "app")?;
    let pod = site.attach("app-0")?;
    site.records()?.add(&site.sandbox("app-0", &uid), &pod)?;
    // The runtime starts the container hundreds of milliseconds later.
    wait_for_metric(&agent, "kirsa_cni_records", &[("state", "in_use")], 1.0)?;
    agent.wait_for_log(|entry| entry["message"] == "credentials issued")?;
    site.assert_served(&pod, "app")?;
    agent.stop()
}

/// IMDS-25: the request is held until the event.
#[test]
fn request_waits_for_cni_record() -> Result<()> {
    let site = Site::new()?;
    site.account("app")?;
    let agent = site.start()?;
    let uid = site.bind("app-0", "app")?;
    let pod = site.attach("app-0")?;
    agent.wait_for_log(|entry| entry["message"] == "credentials issued")?;
    let mut held = open_request(&pod, &role("app"))?;
    held.quiet(HOLD / 4).context("the response came before the pod was known")?;
    site.records()?.add(&site.sandbox("app-0", &uid), &pod)?;
    site.assert_session_of(&site.session(&held.response()?)?, "app")?;
    agent.stop()
}

/// IMDS-25
#[test]
fn request_waits_for_pod_ips() -> Result<()> {
    let site = Site::new()?;
    site.account("app")?;
    let agent = site.start()?;
    let runtime = runtime();
    let api: Api<KubePod> = Api::namespaced(runtime.block_on(site.api.client())?, site.namespace());
    // On a busy machine, one API call may take longer than the hold: such an attempt is repeated.
    for attempt in 0..5 {
        let name = format!("app-{attempt}");
        site.bind(&name, "app")?;
        let pod = site.attach(&name)?;
        let status = json!({"status": {"podIP": pod.ip(), "podIPs": [{"ip": pod.ip()}]}});
        runtime.block_on(api.get(&name))?;
        let started = Instant::now();
        let mut held = open_request(&pod, &role("app"))?;
        held.quiet(HOLD / 4).context("the response came before the pod was known")?;
        runtime.block_on(api.patch_status(&name, &PatchParams::default(), &Patch::Merge(status)))?;
        let reported = started.elapsed();
        let answer = held.response()?;
        if reported < HOLD / 2 {
            site.assert_session_of(
                &site.session(&answer).with_context(|| format!("reported after {reported:?}"))?,
                "app",
            )?;
            return agent.stop();
        }
    }
    anyhow::bail!("the API server took longer than the hold five times")
}

/// IMDS-4, IMDS-7, IMDS-25
#[test]
fn unknown_pod_gets_503_and_keeps_imds_token() -> Result<()> {
    let site = Site::new()?;
    site.account("app")?;
    let agent = site.start()?;
    site.bind("app-0", "app")?;
    let pod = site.attach("app-0")?;
    let mut held = open_request(&pod, "")?;
    let token = pod.imds().put_token(21_600)?;
    ensure!(list(&pod)?.status == 503);
    ensure!(held.response()?.status == 503);
    agent.wait_for_refusal("unknown_pod")?;

    site.report_address(&pod)?;
    let answer = pod.imds().get(CREDENTIALS_PATH).header(TOKEN, &token).send()?;
    ensure!(answer.status == 200 && answer.body == role("app"), "{answer:?}");
    // The token is bound to that pod: another pod cannot use it.
    let other = site.run("app-1", "app")?;
    site.assert_served(&other, "app")?;
    let answer = other.imds().get(CREDENTIALS_PATH).header(TOKEN, &token).send()?;
    ensure!(answer.status == 401, "{answer:?}");
    agent.stop()
}

/// Opens a request for the role list, or for a role's credentials.
fn open_request(pod: &Pod, role: &str) -> Result<Wire> {
    Wire::open(pod, format!("GET {CREDENTIALS_PATH}{role} HTTP/1.1\r\nHost: 169.254.169.254\r\n\r\n"))
}
