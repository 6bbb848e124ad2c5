//! CNI records of the node: stale, malformed, conflicting or missing ones never cause a wrong attribution.

use std::fs;
use std::time::{Duration, UNIX_EPOCH};

use anyhow::{Result, ensure};
use k8s_openapi::api::core::v1::Pod;
use lab::agent::Agent;
use lab::cni::{Results, Sandbox};
use lab::poll::poll;

use crate::TIMEOUT;
use crate::site::{Site, credentials, list, role, wait_for_metric};

const SKIPPED: &str = "kirsa_cni_records_skipped_total";

fn wait_for_skipped(agent: &Agent, reason: &str, at_least: f64) -> Result<()> {
    poll(&format!("{reason} to be counted"), TIMEOUT, || {
        agent.metric(SKIPPED, &[("reason", reason)]).ok().filter(|count| *count >= at_least)
    })?;
    Ok(())
}

fn wait_for_states(agent: &Agent, in_use: f64, pending: f64, stale: f64) -> Result<()> {
    for (state, count) in [("in_use", in_use), ("pending", pending), ("stale", stale)] {
        wait_for_metric(agent, "kirsa_cni_records", &[("state", state)], count)?;
    }
    Ok(())
}

/// The records name live pods, but their addresses were reassigned by the reboot.
#[test]
fn records_from_before_boot_prove_nothing() -> Result<()> {
    let site = Site::new()?;
    let records = site.records()?;
    site.account("left")?;
    site.account("right")?;
    let uids = [site.bind("left", "left")?, site.bind("right", "right")?];
    let (left, right) = (site.attach("left")?, site.attach("right")?);
    let before = [site.sandbox("left", &uids[0]), site.sandbox("right", &uids[1])];
    // Before the reboot, each pod had the other's address.
    records.add_forged(&before[0], right.address())?;
    records.add_forged(&before[1], left.address())?;
    for sandbox in &before {
        records.age(sandbox, UNIX_EPOCH + Duration::from_secs(1_000_000_000))?;
    }
    let agent = site.start()?;
    wait_for_skipped(&agent, "before_boot", 2.0)?;
    for pod in [&left, &right] {
        let answer = list(pod)?;
        ensure!(answer.status == 503, "{answer:?}");
    }
    for (sandbox, pod) in before.iter().zip([&left, &right]) {
        records.add(&sandbox.restarted(1), pod)?;
    }
    wait_for_states(&agent, 2.0, 0.0, 0.0)?;
    site.assert_served(&left, "left")?;
    site.assert_served(&right, "right")?;
    agent.stop()
}

#[test]
fn other_files_are_skipped_and_counted() -> Result<()> {
    let site = Site::new()?;
    let records = site.records()?;
    site.account("app")?;
    let uid = site.bind("app-0", "app")?;
    let pod = site.attach("app-0")?;
    let sandbox = site.sandbox("app-0", &uid);
    records.add(&sandbox, &pod)?;
    records.truncate(&sandbox)?;
    let foreign =
        format!(r#"{{"kind":"cniCacheV1","ifName":"eth0","result":{{"ips":[{{"address":"{}/24"}}]}}}}"#, pod.ip());
    let junk = |content: &[u8], name: &str| records.write(name, content);
    let write_all = || -> Result<()> {
        junk(foreign.as_bytes(), "podman-1-eth0")?;
        junk(foreign.replace("cniCacheV1", "cniCacheV9").as_bytes(), "kit-2-eth0")?;
        junk(b"{}", "state.json")?;
        junk(b"", "empty")?;
        junk(&[0xff; 64], "binary")?;
        fs::File::create(records.folder().join("huge"))?.set_len((64 << 20) + 1)?;
        Ok(())
    };
    write_all()?;
    fs::create_dir(records.folder().join("folder"))?;
    std::os::unix::fs::symlink("nowhere", records.folder().join("link"))?;
    let agent = site.start()?;
    let expected = [("not_json", 3.0), ("foreign", 4.0), ("too_large", 1.0), ("unreadable", 1.0), ("loopback", 1.0)];
    for (reason, count) in expected {
        wait_for_skipped(&agent, reason, count)?;
    }
    wait_for_states(&agent, 0.0, 0.0, 0.0)?;
    ensure!(list(&pod)?.status == 503);
    // The same files as changes that inotify reports.
    let before = agent.metric(SKIPPED, &[])?;
    write_all()?;
    poll("the changes to be counted", TIMEOUT, || (agent.metric(SKIPPED, &[]).ok()? >= before + 6.0).then_some(()))?;
    records.add(&sandbox, &pod)?;
    wait_for_states(&agent, 1.0, 0.0, 0.0)?;
    site.assert_served(&pod, "app")?;
    // An unreadable record is not deleted.
    let before = agent.metric(SKIPPED, &[("reason", "not_json")])?;
    records.truncate(&sandbox)?;
    wait_for_skipped(&agent, "not_json", before + 1.0)?;
    wait_for_states(&agent, 1.0, 0.0, 0.0)?;
    site.assert_served(&pod, "app")?;
    records.remove(&sandbox)?;
    wait_for_states(&agent, 0.0, 0.0, 0.0)?;
    ensure!(list(&pod)?.status == 503);
    agent.stop()
}

#[test]
fn conflicting_record_is_ambiguous() -> Result<()> {
    let site = Site::new()?;
    let records = site.records()?;
    site.account("app")?;
    site.account("rival")?;
    let agent = site.start()?;
    let pod = site.run("app-0", "app")?;
    site.assert_served(&pod, "app")?;
    let rival = site.sandbox("rival-0", &site.bind("rival-0", "rival")?);
    records.add_forged(&rival, pod.address())?;
    wait_for_states(&agent, 1.0, 0.0, 0.0)?;
    let answer = list(&pod)?;
    ensure!(answer.status == 503, "{answer:?}");
    ensure!(agent.metric("kirsa_refusals_total", &[("reason", "ambiguous_address")])? == 1.0);
    let line = agent.wait_for_refusal("ambiguous_address")?;
    let detail = line["detail"].as_str().unwrap_or_default();
    let ns = site.namespace();
    ensure!(detail.contains(&format!("{ns}/app-0")) && detail.contains(&format!("{ns}/rival-0")), "{detail}");
    // The pod's own record does not resolve the conflict.
    let own = site.sandbox("app-0", &uid_of(&site, "app-0")?);
    records.add(&own, &pod)?;
    wait_for_states(&agent, 2.0, 0.0, 0.0)?;
    ensure!(list(&pod)?.status == 503);
    records.remove(&rival)?;
    wait_for_states(&agent, 1.0, 0.0, 0.0)?;
    site.assert_served(&pod, "app")?;
    agent.stop()
}

/// The pod's record may be lost or unreadable, and another pod may have the address by now.
#[test]
fn pod_ips_without_record_are_refused() -> Result<()> {
    let site = Site::new()?;
    ["app", "lost"].iter().try_for_each(|account| site.account(account))?;
    let (neighbor, _) = site.run_recorded("app-0", "app")?;
    let (pod, sandbox) = site.run_recorded("lost-0", "lost")?;
    site.records()?.truncate(&sandbox)?;
    let agent = site.start()?;
    site.assert_served(&neighbor, "app")?;
    ensure!(list(&pod)?.status == 503 && credentials(&pod, &role("lost"))?.status == 503);
    let line = agent.wait_for_refusal("unknown_pod")?;
    let detail = line["detail"].as_str().unwrap_or_default();
    ensure!(detail.contains(&format!("{}/lost-0", site.namespace())), "{detail}");
    site.records()?.add(&sandbox, &pod)?;
    site.assert_served(&pod, "lost")?;
    agent.stop()
}

/// The API server may not have reported the record's pod yet; until it does, no pod owns the address.
#[test]
fn record_of_unreported_pod_blocks_address() -> Result<()> {
    let site = Site::new()?;
    let records = site.records()?;
    site.account("app")?;
    // Seems stale: it exists before pods are listed, and names none of them.
    let stale = Sandbox::new("default", "gone", "11111111-2222-3333-4444-555555555555");
    let sandbox = site.sandbox("app-0", &site.bind("app-0", "app")?);
    let pod = site.attach("app-0")?;
    site.report_address(&pod)?;
    records.add_forged(&stale, pod.address())?;
    let agent = site.start()?;
    wait_for_states(&agent, 0.0, 0.0, 1.0)?;
    ensure!(list(&pod)?.status == 503, "the list may be older than that record and contain a former pod");
    // The pod's own record proves that it has the address.
    records.add(&sandbox, &pod)?;
    wait_for_states(&agent, 1.0, 0.0, 1.0)?;
    site.assert_served(&pod, "app")?;

    let unreported = Sandbox::new("default", "unreported", "99999999-2222-3333-4444-555555555555");
    records.add_forged(&unreported, pod.address())?;
    wait_for_states(&agent, 1.0, 1.0, 1.0)?;
    let answer = list(&pod)?;
    ensure!(answer.status == 503, "{answer:?}");
    records.remove(&unreported)?;
    wait_for_states(&agent, 1.0, 0.0, 1.0)?;
    site.assert_served(&pod, "app")?;
    agent.stop()
}

/// The newest record of a pod with a recreated sandbox wins.
#[test]
fn recreated_sandbox_moves_pod() -> Result<()> {
    let site = Site::new()?;
    let records = site.records()?;
    site.account("app")?;
    let agent = site.start()?;
    let sandbox = site.sandbox("app-0", &site.bind("app-0", "app")?);
    let (first, second) = (site.attach("app-0")?, site.attach("app-0")?);
    records.add(&sandbox, &first)?;
    wait_for_states(&agent, 1.0, 0.0, 0.0)?;
    site.assert_served(&first, "app")?;
    records.add(&sandbox.restarted(1), &second)?;
    wait_for_states(&agent, 2.0, 0.0, 0.0)?;
    site.assert_served(&second, "app")?;
    ensure!(list(&first)?.status == 503, "the first sandbox's address is free");
    agent.stop()
}

#[test]
fn record_directory_may_come_and_go() -> Result<()> {
    let mut site = Site::new()?;
    // A node that never ran a pod has no record directory.
    let directory = site.node.state().join("later/results");
    site.options = site.options.flag("--cni-results", &directory);
    site.account("app")?;
    let agent = site.start()?;
    let records = site.records()?;
    for round in 0..2 {
        let name = format!("app-{round}");
        let sandbox = site.sandbox(&name, &site.bind(&name, "app")?);
        let pod = site.attach(&name)?;
        records.add(&sandbox, &pod)?;
        fs::create_dir_all(&directory)?;
        copy(&records, &directory)?;
        wait_for_states(&agent, 1.0, 0.0, 0.0)?;
        site.assert_served(&pod, "app")?;
        fs::remove_dir_all(&directory)?;
        wait_for_states(&agent, 0.0, 0.0, 0.0)?;
        ensure!(list(&pod)?.status == 503, "its record is deleted, and its address was never reported");
        records.remove(&sandbox)?;
    }
    agent.stop()
}

/// A static pod's UID at the runtime differs from its mirror's at the API server. The mirror has no service account, so
/// it must not get the role of the namespace's `default` account.
#[test]
fn static_pod_has_no_role() -> Result<()> {
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
        let created = pods.create(&kube::api::PostParams::default(), &serde_json::from_value(object)?).await?;
        let account = created.spec.and_then(|spec| spec.service_account_name);
        ensure!(account.is_none_or(|name| name.is_empty()), "a mirror has no service account");
        Ok(())
    })?;
    let agent = site.start()?;
    let pod = site.attach("static")?;
    site.records()?.add(&site.sandbox("static", mirror), &pod)?;
    site.report_address(&pod)?;
    poll("404", TIMEOUT, || list(&pod).is_ok_and(|answer| answer.status == 404).then_some(()))?;
    agent.wait_for_refusal("no_role")?;
    // It does not share the session of a pod with that account.
    let (neighbor, _) = site.run_recorded("neighbor", "default")?;
    site.assert_served(&neighbor, "default")?;
    ensure!(list(&pod)?.status == 404 && credentials(&pod, &role("default"))?.status == 404);
    agent.stop()
}

#[test]
fn pod_ips_suffice_without_records() -> Result<()> {
    let mut site = Site::new()?;
    site.options = site.options.flag("--cni-results", "none");
    site.account("app")?;
    let agent = site.start()?;
    let sandbox = site.sandbox("app-0", &site.bind("app-0", "app")?);
    let pod = site.attach("app-0")?;
    site.records()?.add(&sandbox, &pod)?;
    ensure!(list(&pod)?.status == 503);
    site.report_address(&pod)?;
    site.assert_served(&pod, "app")?;
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
