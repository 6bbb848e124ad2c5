//! Outages of the API server: all connections, or only the open ones, which cuts the watches.

use anyhow::{Result, ensure};
use lab::namespace::BASE;
use lab::net::Node;
use lab::poll::poll;
use lab::sts::{Effect, Fault};

use crate::rights::AgentRights;
use crate::site::{Site, credentials, list, role, wait_for_metric};
use crate::{TIMEOUT, WATCH_TIMEOUT};

/// Drops packets between a node and the API server until healed.
pub(crate) struct ApiServerOutage<'a>(&'a Node);

impl<'a> ApiServerOutage<'a> {
    /// Drops all packets.
    pub(crate) fn start(node: &'a Node) -> Result<Self> {
        Self::drop_packets(node, "1-65535")
    }

    /// Drops packets of the currently open connections; new connections work.
    pub(crate) fn of_open_connections(node: &'a Node) -> Result<Self> {
        let open = node.netns().shell(&format!("ss -Htn state established dst {BASE}:6443"))?;
        let local = open.lines().filter_map(|line| line.split_whitespace().nth(2)?.rsplit_once(':'));
        let ports: Vec<&str> = local.map(|(_, port)| port).collect();
        ensure!(!ports.is_empty(), "no connection to the API server: {open:?}");
        Self::drop_packets(node, &format!("{{ {} }}", ports.join(", ")))
    }

    fn drop_packets(node: &'a Node, local: &str) -> Result<Self> {
        let there = format!("ip daddr {BASE} tcp dport 6443 tcp sport {local} drop");
        let back = format!("ip saddr {BASE} tcp sport 6443 tcp dport {local} drop");
        node.netns().shell(&format!(
            "nft 'table inet cut {{ \
             chain there {{ type filter hook output priority 0; {there}; }}; \
             chain back {{ type filter hook input priority 0; {back}; }}; }}'"
        ))?;
        Ok(Self(node))
    }

    pub(crate) fn heal(self) -> Result<()> {
        self.0.netns().shell("nft delete table inet cut")?;
        Ok(())
    }
}

#[test]
fn readiness_lists_pending_conditions() -> Result<()> {
    let site = Site::new()?;
    let outage = ApiServerOutage::start(&site.node)?;
    let agent = lab::agent::Agent::spawn(&site.node, &site.options)?;
    let pending = |expected: &str| {
        poll(&format!("pending: {expected:?}"), TIMEOUT, || {
            agent.admin("/readyz").ok().filter(|ready| ready.status == 503 && ready.body == expected)
        })
    };
    pending("pods\nservice accounts\n")?;
    ensure!(agent.admin("/healthz")?.status == 200);
    let pod = site.attach("early")?;
    let answer = list(&pod)?;
    ensure!(answer.status == 503, "{answer:?}");
    agent.wait_for_refusal("starting")?;
    ensure!(pod.imds().put_token(60).is_ok());
    outage.heal()?;
    agent.wait_ready()?;
    agent.stop()
}

#[test]
fn known_pods_are_served_during_outage() -> Result<()> {
    let site = Site::new()?;
    site.account("app")?;
    site.account("cold")?;
    let agent = site.start()?;
    let (pod, _) = site.run_recorded("app-0", "app")?;
    let key = site.assert_served(&pod, "app")?;
    let outage = ApiServerOutage::start(&site.node)?;
    ensure!(site.assert_served(&pod, "app")? == key);

    // Created during the outage.
    let (unknown, _) = site.run_recorded("app-1", "app")?;
    let (answer, document) = (list(&unknown)?, credentials(&unknown, &role("app"))?);
    ensure!(answer.status == 503 && document.status == 503, "{answer:?} {document:?}");
    // The record alone tells the agent that an unreported pod has the address.
    let uid = site.bind("cold-0", "cold")?;
    let cold = site.attach("cold-0")?;
    site.records()?.add(&site.sandbox("cold-0", &uid), &cold)?;
    wait_for_metric(&agent, "kirsa_cni_records", &[("state", "pending")], 2.0)?;
    let answer = list(&cold)?;
    ensure!(answer.status == 503, "{answer:?}");
    ensure!(agent.admin("/readyz")?.status == 200, "the agent stays ready during an outage");
    ensure!(site.assert_served(&pod, "app")? == key);

    outage.heal()?;
    poll("the pod that was created during the outage", TIMEOUT, || site.assert_served(&unknown, "app").ok())?;
    poll("the pod that was bound during the outage", TIMEOUT, || site.assert_served(&cold, "cold").ok())?;
    ensure!(site.assert_served(&pod, "app")? == key, "the session was kept");
    agent.stop()
}

/// Even if the agent's index is stale, the API server mints no token for a deleted pod: it returns 403 to a node, and
/// 404 with direct minting.
fn assert_dead_watch_fails_closed(rights: AgentRights, reason: &str) -> Result<()> {
    let site = Site::with_rights(rights)?;
    site.annotate("former", &[])?;
    site.account("next")?;
    let (former, sandbox) = site.run_recorded("former-0", "former")?;
    let agent = site.start()?;
    let outage = ApiServerOutage::of_open_connections(&site.node)?;
    site.delete("former-0")?;
    site.account("former")?;
    let document = credentials(&former, &role("former"))?;
    ensure!(document.status == 503, "{document:?}");
    agent.wait_for_refusal(reason)?;
    let answer = list(&former)?;
    ensure!(answer.status == 503, "{answer:?}");

    let address = former.address();
    former.delete();
    site.records()?.remove(&sandbox)?;
    let uid = site.bind("next-0", "next")?;
    let next = site.attach_at("next-0", address)?;
    site.records()?.add(&site.sandbox("next-0", &uid), &next)?;
    wait_for_metric(&agent, "kirsa_cni_records", &[("state", "pending")], 1.0)?;
    let document = credentials(&next, &role("former"))?;
    ensure!(document.status != 200, "{document:?}");
    // The pending record reveals that the watch is dead; the relist uses a new connection.
    site.assert_served(&next, "next")?;
    let (late, _) = site.run_recorded("late-0", "next")?;
    site.assert_served(&late, "next")?;
    outage.heal()?;
    ensure!(site.calls("former").is_empty(), "{:?}", site.calls("former"));
    agent.stop()
}

#[test]
fn dead_watch_fails_closed_by_impersonation() -> Result<()> {
    assert_dead_watch_fails_closed(AgentRights::Impersonation, "token_forbidden")
}

#[test]
fn dead_watch_fails_closed_by_direct_minting() -> Result<()> {
    assert_dead_watch_fails_closed(AgentRights::Direct, "pod_gone")
}

/// Without records, a live lookup that finds an unreported pod reveals the dead watch.
#[test]
fn live_lookup_detects_dead_watch() -> Result<()> {
    let site = Site::new()?;
    site.account("app")?;
    let agent = site.start()?;
    let outage = ApiServerOutage::of_open_connections(&site.node)?;
    let pod = site.run("app-0", "app")?;
    site.assert_served(&pod, "app")?;
    agent.wait_for_log(|entry| entry["message"].as_str().is_some_and(|message| message.contains("relisting pods")))?;
    outage.heal()?;
    agent.stop()
}

/// Any pod of a shared session may be the one that the token is minted for.
#[test]
fn deleted_pod_does_not_break_shared_session() -> Result<()> {
    for rights in AgentRights::EACH_MODE {
        let site = Site::with_rights(rights)?;
        site.annotate("app", &[])?;
        let pods = [site.run("app-0", "app")?, site.run("app-1", "app")?];
        let agent = site.start()?;
        let outage = ApiServerOutage::of_open_connections(&site.node)?;
        site.account("app")?;
        // Both pods wait for the session, and one is deleted before STS recovers.
        site.sts.inject(Fault::always(Effect::error("Throttling")));
        for pod in &pods {
            poll("an exchange in progress", WATCH_TIMEOUT, || list(pod).ok().filter(|list| list.body.contains("503")))?;
        }
        site.delete("app-0")?;
        site.sts.heal();
        poll("the session of the remaining pod", TIMEOUT, || site.assert_served(&pods[1], "app").ok())?;
        outage.heal()?;
        agent.stop()?;
    }
    Ok(())
}
