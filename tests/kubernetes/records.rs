//! The node's CNI records, and every way in which they can be wrong: never a wrong identity.

use std::fs;
use std::time::{Duration, UNIX_EPOCH};

use anyhow::{Result, ensure};
use k8s_openapi::api::core::v1::Pod;
use lab::agent::Agent;
use lab::cni::{Results, Sandbox};
use lab::poll::poll;

use crate::PATIENCE;
use crate::site::{Site, credentials, list, role, wait_for_metric};

const SKIPPED: &str = "kirsa_cni_records_skipped_total";

fn skipped(agent: &Agent, reason: &str, at_least: f64) -> Result<()> {
    poll(&format!("{reason} to be counted"), PATIENCE, || {
        agent.metric(SKIPPED, &[("reason", reason)]).ok().filter(|count| *count >= at_least)
    })?;
    Ok(())
}

fn states(agent: &Agent, in_use: f64, pending: f64, stale: f64) -> Result<()> {
    for (state, count) in [("in_use", in_use), ("pending", pending), ("stale", stale)] {
        wait_for_metric(agent, "kirsa_cni_records", &[("state", state)], count)?;
    }
    Ok(())
}

/// They name live pods, and addresses that were dealt anew since.
#[test]
fn records_from_before_the_boot_count_for_nothing() -> Result<()> {
    let site = Site::new()?;
    let records = site.records()?;
    site.account("left")?;
    site.account("right")?;
    let uids = [site.bind("left", "left")?, site.bind("right", "right")?];
    let (left, right) = (site.join("left")?, site.join("right")?);
    let before = [site.sandbox("left", &uids[0]), site.sandbox("right", &uids[1])];
    // As it was: each had the other's address.
    records.add_forged(&before[0], right.address())?;
    records.add_forged(&before[1], left.address())?;
    for sandbox in &before {
        records.age(sandbox, UNIX_EPOCH + Duration::from_secs(1_000_000_000))?;
    }
    let agent = site.start()?;
    skipped(&agent, "before_boot", 2.0)?;
    for pod in [&left, &right] {
        let answer = list(pod)?;
        ensure!(answer.status == 503, "{answer:?}");
    }
    for (sandbox, pod) in before.iter().zip([&left, &right]) {
        records.add(&sandbox.restarted(1), pod)?;
    }
    states(&agent, 2.0, 0.0, 0.0)?;
    site.serves(&left, "left")?;
    site.serves(&right, "right")?;
    agent.stop()
}

#[test]
fn what_is_no_record_is_skipped_and_counted() -> Result<()> {
    let site = Site::new()?;
    let records = site.records()?;
    site.account("app")?;
    let uid = site.bind("app-0", "app")?;
    let pod = site.join("app-0")?;
    let sandbox = site.sandbox("app-0", &uid);
    records.add(&sandbox, &pod)?;
    records.truncate(&sandbox)?;
    let foreign =
        format!(r#"{{"kind":"cniCacheV1","ifName":"eth0","result":{{"ips":[{{"address":"{}/24"}}]}}}}"#, pod.ip());
    let junk = |content: &[u8], name: &str| records.write(name, content);
    let lay_out = || -> Result<()> {
        junk(foreign.as_bytes(), "podman-1-eth0")?;
        junk(foreign.replace("cniCacheV1", "cniCacheV9").as_bytes(), "kit-2-eth0")?;
        junk(b"{}", "state.json")?;
        junk(b"", "empty")?;
        junk(&[0xff; 64], "binary")?;
        fs::File::create(records.folder().join("huge"))?.set_len((64 << 20) + 1)?;
        Ok(())
    };
    lay_out()?;
    fs::create_dir(records.folder().join("folder"))?;
    std::os::unix::fs::symlink("nowhere", records.folder().join("link"))?;
    let agent = site.start()?;
    let wanted = [("not_json", 3.0), ("foreign", 4.0), ("too_large", 1.0), ("unreadable", 1.0), ("loopback", 1.0)];
    for (reason, count) in wanted {
        skipped(&agent, reason, count)?;
    }
    states(&agent, 0.0, 0.0, 0.0)?;
    ensure!(list(&pod)?.status == 503);
    // The same again, as changes.
    let before = agent.metric(SKIPPED, &[])?;
    lay_out()?;
    poll("the changes to be counted", PATIENCE, || (agent.metric(SKIPPED, &[]).ok()? >= before + 6.0).then_some(()))?;
    records.add(&sandbox, &pod)?;
    states(&agent, 1.0, 0.0, 0.0)?;
    site.serves(&pod, "app")?;
    // An unreadable record is not a removed one.
    let before = agent.metric(SKIPPED, &[("reason", "not_json")])?;
    records.truncate(&sandbox)?;
    skipped(&agent, "not_json", before + 1.0)?;
    states(&agent, 1.0, 0.0, 0.0)?;
    site.serves(&pod, "app")?;
    records.remove(&sandbox)?;
    states(&agent, 0.0, 0.0, 0.0)?;
    ensure!(list(&pod)?.status == 503);
    agent.stop()
}

#[test]
fn a_record_that_contradicts_the_api_server_is_nobodys() -> Result<()> {
    let site = Site::new()?;
    let records = site.records()?;
    site.account("app")?;
    site.account("liar")?;
    let agent = site.start()?;
    let pod = site.run("app-0", "app")?;
    site.serves(&pod, "app")?;
    let liar = site.sandbox("liar-0", &site.bind("liar-0", "liar")?);
    records.add_forged(&liar, pod.address())?;
    states(&agent, 1.0, 0.0, 0.0)?;
    let answer = list(&pod)?;
    ensure!(answer.status == 503, "{answer:?}");
    ensure!(agent.metric("kirsa_refusals_total", &[("reason", "ambiguous_address")])? == 1.0);
    let line = agent.wait_for_refusal("ambiguous_address")?;
    let detail = line["detail"].as_str().unwrap_or_default();
    let ns = site.namespace();
    ensure!(detail.contains(&format!("{ns}/app-0")) && detail.contains(&format!("{ns}/liar-0")), "{detail}");
    // The record of the pod itself does not decide it either.
    let own = site.sandbox("app-0", &uid_of(&site, "app-0")?);
    records.add(&own, &pod)?;
    states(&agent, 2.0, 0.0, 0.0)?;
    ensure!(list(&pod)?.status == 503);
    records.remove(&liar)?;
    states(&agent, 1.0, 0.0, 0.0)?;
    site.serves(&pod, "app")?;
    agent.stop()
}

/// Its record may be lost or unreadable, and the address another pod's by now.
#[test]
fn shown_address_without_a_record_is_refused() -> Result<()> {
    let site = Site::new()?;
    ["app", "lost"].iter().try_for_each(|account| site.account(account))?;
    let (neighbor, _) = site.run_recorded("app-0", "app")?;
    let (pod, sandbox) = site.run_recorded("lost-0", "lost")?;
    site.records()?.truncate(&sandbox)?;
    let agent = site.start()?;
    site.serves(&neighbor, "app")?;
    ensure!(list(&pod)?.status == 503 && credentials(&pod, &role("lost"))?.status == 503);
    let line = agent.wait_for_refusal("unknown_pod")?;
    let detail = line["detail"].as_str().unwrap_or_default();
    ensure!(detail.contains(&format!("{}/lost-0", site.namespace())), "{detail}");
    site.records()?.add(&sandbox, &pod)?;
    site.serves(&pod, "lost")?;
    agent.stop()
}

/// A record's pod may be about to show: until it has, the address is nobody's, whoever else claims it.
#[test]
fn a_record_of_a_pod_that_nobody_has_shown_blocks_its_address_until_it_goes() -> Result<()> {
    let site = Site::new()?;
    let records = site.records()?;
    site.account("app")?;
    // Left behind, it seems: it was there before the pods were listed, and none of them is its.
    let leftover = Sandbox::new("default", "gone", "11111111-2222-3333-4444-555555555555");
    let sandbox = site.sandbox("app-0", &site.bind("app-0", "app")?);
    let pod = site.join("app-0")?;
    site.show(&pod)?;
    records.add_forged(&leftover, pod.address())?;
    let agent = site.start()?;
    states(&agent, 0.0, 0.0, 1.0)?;
    ensure!(list(&pod)?.status == 503, "the list may be older than that record, and have its former pod");
    // A pod that has the address has a record of its own.
    records.add(&sandbox, &pod)?;
    states(&agent, 1.0, 0.0, 1.0)?;
    site.serves(&pod, "app")?;

    let stranger = Sandbox::new("default", "stranger", "99999999-2222-3333-4444-555555555555");
    records.add_forged(&stranger, pod.address())?;
    states(&agent, 1.0, 1.0, 1.0)?;
    let answer = list(&pod)?;
    ensure!(answer.status == 503, "{answer:?}");
    records.remove(&stranger)?;
    states(&agent, 1.0, 0.0, 1.0)?;
    site.serves(&pod, "app")?;
    agent.stop()
}

/// Of a pod whose sandbox was made anew the newest record counts.
#[test]
fn a_sandbox_that_was_made_anew_moves_its_pod() -> Result<()> {
    let site = Site::new()?;
    let records = site.records()?;
    site.account("app")?;
    let agent = site.start()?;
    let sandbox = site.sandbox("app-0", &site.bind("app-0", "app")?);
    let (first, second) = (site.join("app-0")?, site.join("app-0")?);
    records.add(&sandbox, &first)?;
    states(&agent, 1.0, 0.0, 0.0)?;
    site.serves(&first, "app")?;
    records.add(&sandbox.restarted(1), &second)?;
    states(&agent, 2.0, 0.0, 0.0)?;
    site.serves(&second, "app")?;
    ensure!(list(&first)?.status == 503, "the first sandbox's address is free");
    agent.stop()
}

#[test]
fn the_folder_may_come_later_go_and_come_again() -> Result<()> {
    let mut site = Site::new()?;
    // A node that never ran a pod has none.
    let folder = site.node.state().join("later/results");
    site.options = site.options.flag("--cni-results", &folder);
    site.account("app")?;
    let agent = site.start()?;
    let made = site.records()?;
    for round in 0..2 {
        let name = format!("app-{round}");
        let sandbox = site.sandbox(&name, &site.bind(&name, "app")?);
        let pod = site.join(&name)?;
        made.add(&sandbox, &pod)?;
        fs::create_dir_all(&folder)?;
        copy(&made, &folder)?;
        states(&agent, 1.0, 0.0, 0.0)?;
        site.serves(&pod, "app")?;
        fs::remove_dir_all(&folder)?;
        states(&agent, 0.0, 0.0, 0.0)?;
        ensure!(list(&pod)?.status == 503, "its record is gone, and it was never shown");
        made.remove(&sandbox)?;
    }
    agent.stop()
}

/// The runtime knows it by the kubelet's UID, the API server by that of its mirror, which has no service account: that
/// of its namespace, whatever role it has, is other pods'.
#[test]
fn a_static_pod_has_no_role_and_is_told_so() -> Result<()> {
    let site = Site::new()?;
    site.account("default")?;
    let mirror = "0123456789abcdef0123456789abcdef";
    let object = serde_json::json!({
        "apiVersion": "v1",
        "kind": "Pod",
        "metadata": {"name": "static", "annotations": {"kubernetes.io/config.mirror": mirror}},
        "spec": {"nodeName": site.node.name(), "containers": [{"name": "main", "image": "none"}]},
    });
    crate::site::blocking(async {
        let pods: kube::Api<Pod> = kube::Api::namespaced(site.api.client().await?, site.namespace());
        let made = pods.create(&kube::api::PostParams::default(), &serde_json::from_value(object)?).await?;
        let account = made.spec.and_then(|spec| spec.service_account_name);
        ensure!(account.is_none_or(|name| name.is_empty()), "the API server gives a mirror none");
        Ok(())
    })?;
    let agent = site.start()?;
    let pod = site.join("static")?;
    site.records()?.add(&site.sandbox("static", mirror), &pod)?;
    site.show(&pod)?;
    poll("the answer that there is no role", PATIENCE, || {
        list(&pod).is_ok_and(|answer| answer.status == 404).then_some(())
    })?;
    agent.wait_for_refusal("no_role")?;
    // Its neighbour of that account is not asked for in its name.
    let (neighbour, _) = site.run_recorded("neighbour", "default")?;
    site.serves(&neighbour, "default")?;
    ensure!(list(&pod)?.status == 404 && credentials(&pod, &role("default"))?.status == 404);
    agent.stop()
}

#[test]
fn without_records_the_api_server_alone_tells() -> Result<()> {
    let mut site = Site::new()?;
    site.options = site.options.flag("--cni-results", "none");
    site.account("app")?;
    let agent = site.start()?;
    let sandbox = site.sandbox("app-0", &site.bind("app-0", "app")?);
    let pod = site.join("app-0")?;
    site.records()?.add(&sandbox, &pod)?;
    ensure!(list(&pod)?.status == 503);
    site.show(&pod)?;
    site.serves(&pod, "app")?;
    agent.stop()
}

fn copy(from: &Results, to: &std::path::Path) -> Result<()> {
    for entry in fs::read_dir(from.folder())? {
        let entry = entry?;
        fs::copy(entry.path(), to.join(entry.file_name()))?;
    }
    Ok(())
}

fn uid_of(site: &Site, name: &str) -> Result<String> {
    let pod = crate::site::blocking(site.api.read::<Pod>(site.namespace(), name))?;
    pod.and_then(|pod| pod.metadata.uid).ok_or_else(|| anyhow::anyhow!("no pod {name}"))
}
