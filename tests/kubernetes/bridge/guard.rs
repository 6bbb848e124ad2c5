//! Lifecycle of the bridge-port guard: changed records, restarted agents and deleted tables.

use anyhow::{Context, Result, ensure};
use lab::agent::{Agent, Options};
use lab::poll::poll;

use super::Bridge;
use crate::TIMEOUT;
use crate::site::Site;

#[test]
fn guard_follows_records_and_is_restored() -> Result<()> {
    let bridge = Bridge::new("nft")?;
    let agent = bridge.start("guarded")?;
    let (node, records) = (bridge.site.node.netns(), bridge.site.records()?);
    let port = format!("\"{}\" . {}", bridge.victim.host_interface(), bridge.victim.ip());
    ensure!(bridge.table().contains(&port), "{}", bridge.table());
    records.remove(&bridge.sandbox)?;
    poll("the port to be removed", TIMEOUT, || (!bridge.table().contains(&port)).then_some(()))?;
    records.add(&bridge.sandbox, &bridge.victim)?;
    poll("the port to be added", TIMEOUT, || bridge.table().contains(&port).then_some(()))?;

    let before = bridge.table();
    node.shell("nft delete table bridge kirsa")?;
    poll("the guard to be restored", TIMEOUT, || (bridge.table() == before).then_some(()))?;
    agent.stop()?;
    ensure!(bridge.table() == before, "the guard must stay while no agent runs");
    let agent = bridge.start("guarded")?;
    ensure!(bridge.table() == before, "{}", bridge.table());
    agent.stop()?;
    let output = Agent::uninstall(&bridge.site.node, &Options::new(env!("CARGO_BIN_EXE_kirsa")))?;
    ensure!(String::from_utf8_lossy(&output.stdout).contains("nftables table bridge kirsa"), "{output:?}");
    ensure!(!node.shell("nft list tables")?.contains("kirsa"));
    Ok(())
}

#[test]
fn doctor_reports_unguarded_bridge_ports() -> Result<()> {
    let bridge = Bridge::new("nft")?;
    let node = &bridge.site.node;
    let finding = || {
        let output = Agent::doctor(node, &bridge.site.options, &["--no-exchange", "--output", "json"])?;
        let report: serde_json::Value = serde_json::from_slice(&output.stdout)?;
        let findings = report["findings"].as_array().context("findings")?;
        findings
            .iter()
            .find(|finding| finding["check"] == "bridge-ports")
            .cloned()
            .context("the finding on bridge ports")
    };
    let unguarded = finding()?;
    ensure!(unguarded["verdict"] == "warning", "{unguarded}");
    let detail = unguarded["detail"].as_str().unwrap_or_default();
    ensure!(detail.contains("2 ports of cni0 belong to pods and are not guarded"), "{unguarded}");
    let agent = bridge.start("guarded")?;
    ensure!(finding()?["verdict"] == "ok", "{}", finding()?);
    node.netns().shell("nft delete table netdev kirsa_ingress")?;
    ensure!(finding()?["detail"].as_str().is_some_and(|detail| detail.contains("LLDP")), "{}", finding()?);
    agent.stop()
}

#[test]
fn hot_restart_keeps_guard() -> Result<()> {
    let bridge = Bridge::new("nft")?;
    let agent = bridge.start("guarded")?;
    let next = Agent::spawn(&bridge.site.node, &bridge.site.options)?;
    next.wait_for_log(|entry| entry["message"] == "hot restart: took over from the old agent")?;
    agent.stop()?;
    let port = format!("\"{}\" . {}", bridge.victim.host_interface(), bridge.victim.ip());
    ensure!(bridge.table().contains(&port), "{}", bridge.table());
    bridge.site.records()?.remove(&bridge.sandbox)?;
    poll("the port to be removed", TIMEOUT, || (!bridge.table().contains(&port)).then_some(()))?;
    next.stop()
}

/// Pods on routed veth interfaces share no bridge.
#[test]
fn routed_pods_get_no_guard() -> Result<()> {
    let site = Site::new()?;
    site.account("app")?;
    let uid = site.bind("app", "app")?;
    let pod = site.attach("app")?;
    site.records()?.add(&site.sandbox("app", &uid), &pod)?;
    let agent = site.start()?;
    site.assert_served(&pod, "app")?;
    ensure!(!site.node.netns().shell("nft list tables")?.contains("bridge kirsa"));
    agent.stop()
}
