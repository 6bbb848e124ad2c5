//! The API server away, in whole or for the watches alone.

use anyhow::{Result, ensure};
use lab::namespace::BASE;
use lab::net::Node;
use lab::poll::poll;
use lab::sts::{Effect, Fault};

use crate::rights::Way;
use crate::site::{Site, credentials, list, role, wait_for_metric};
use crate::{PATIENCE, SOON};

/// Packets between a node and the API server are dropped.
pub(crate) struct Cut<'a>(&'a Node);

impl<'a> Cut<'a> {
    /// All of them.
    pub(crate) fn all(node: &'a Node) -> Result<Self> {
        Self::of(node, "1-65535")
    }

    /// Those of the connections that are open now; others can be made.
    pub(crate) fn open_connections(node: &'a Node) -> Result<Self> {
        let open = node.netns().shell(&format!("ss -Htn state established dst {BASE}:6443"))?;
        let local = open.lines().filter_map(|line| line.split_whitespace().nth(2)?.rsplit_once(':'));
        let ports: Vec<&str> = local.map(|(_, port)| port).collect();
        ensure!(!ports.is_empty(), "no connection to the API server: {open:?}");
        Self::of(node, &format!("{{ {} }}", ports.join(", ")))
    }

    fn of(node: &'a Node, local: &str) -> Result<Self> {
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
fn readiness_names_what_is_pending_until_the_api_server_answers() -> Result<()> {
    let site = Site::new()?;
    let cut = Cut::all(&site.node)?;
    let agent = lab::agent::Agent::spawn(&site.node, &site.options)?;
    let pending = |wanted: &str| {
        poll(&format!("pending: {wanted:?}"), PATIENCE, || {
            agent.admin("/readyz").ok().filter(|ready| ready.status == 503 && ready.body == wanted)
        })
    };
    pending("pods\nservice accounts\n")?;
    ensure!(agent.admin("/healthz")?.status == 200);
    let pod = site.join("early")?;
    let answer = list(&pod)?;
    ensure!(answer.status == 503, "{answer:?}");
    agent.wait_for_refusal("starting")?;
    ensure!(pod.imds().put_token(60).is_ok());
    cut.heal()?;
    agent.wait_ready()?;
    agent.stop()
}

#[test]
fn while_the_api_server_is_away_what_is_known_is_served_and_nothing_is_denied() -> Result<()> {
    let site = Site::new()?;
    site.account("app")?;
    site.account("cold")?;
    let agent = site.start()?;
    let (pod, _) = site.run_recorded("app-0", "app")?;
    let key = site.serves(&pod, "app")?;
    let cut = Cut::all(&site.node)?;
    ensure!(site.serves(&pod, "app")? == key);

    // Made while the agent sees nothing.
    let (unknown, _) = site.run_recorded("app-1", "app")?;
    let (answer, document) = (list(&unknown)?, credentials(&unknown, &role("app"))?);
    ensure!(answer.status == 503 && document.status == 503, "{answer:?} {document:?}");
    // With its record alone, the agent knows that it is somebody whom it does not know.
    let uid = site.bind("cold-0", "cold")?;
    let cold = site.join("cold-0")?;
    site.records()?.add(&site.sandbox("cold-0", &uid), &cold)?;
    wait_for_metric(&agent, "kirsa_cni_records", &[("state", "pending")], 2.0)?;
    let answer = list(&cold)?;
    ensure!(answer.status == 503, "{answer:?}");
    ensure!(agent.admin("/readyz")?.status == 200, "not being ready would help nobody");
    ensure!(site.serves(&pod, "app")? == key);

    cut.heal()?;
    poll("the pod that was made meanwhile", PATIENCE, || site.serves(&unknown, "app").ok())?;
    poll("the pod that was bound meanwhile", PATIENCE, || site.serves(&cold, "cold").ok())?;
    ensure!(site.serves(&pod, "app")? == key, "the session was kept");
    agent.stop()
}

/// Whatever the agent believes: the API server mints no token for a pod that is gone. To a node it forbids what it
/// would otherwise not find.
fn a_dead_watch_hands_out_nobodys_credentials_and_is_found_out(way: Way, reason: &str) -> Result<()> {
    let site = Site::with(way)?;
    site.annotate("former", &[])?;
    site.account("next")?;
    let (former, sandbox) = site.run_recorded("former-0", "former")?;
    let agent = site.start()?;
    let cut = Cut::open_connections(&site.node)?;
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
    let next = site.join_at("next-0", address)?;
    site.records()?.add(&site.sandbox("next-0", &uid), &next)?;
    wait_for_metric(&agent, "kirsa_cni_records", &[("state", "pending")], 1.0)?;
    let document = credentials(&next, &role("former"))?;
    ensure!(document.status != 200, "{document:?}");
    // The record alone tells that the watch is dead; the next one goes by another connection.
    site.serves(&next, "next")?;
    let (late, _) = site.run_recorded("late-0", "next")?;
    site.serves(&late, "next")?;
    cut.heal()?;
    ensure!(site.calls("former").is_empty(), "{:?}", site.calls("former"));
    agent.stop()
}

#[test]
fn a_dead_watch_hands_out_nobodys_credentials_by_impersonation() -> Result<()> {
    a_dead_watch_hands_out_nobodys_credentials_and_is_found_out(Way::Impersonate, "token_forbidden")
}

#[test]
fn a_dead_watch_hands_out_nobodys_credentials_by_direct_minting() -> Result<()> {
    a_dead_watch_hands_out_nobodys_credentials_and_is_found_out(Way::Direct, "pod_gone")
}

/// Where there are no records, the live read for a pod that nobody has told of tells the same.
#[test]
fn without_records_a_live_read_finds_out_that_the_watch_is_dead() -> Result<()> {
    let site = Site::new()?;
    site.account("app")?;
    let agent = site.start()?;
    let cut = Cut::open_connections(&site.node)?;
    let pod = site.run("app-0", "app")?;
    site.serves(&pod, "app")?;
    agent.wait_for_log(|entry| entry["message"].as_str().is_some_and(|said| said.contains("relisting pods")))?;
    cut.heal()?;
    agent.stop()
}

/// Any pod of the session may be the one in whose name the token is asked for.
#[test]
fn a_pod_that_is_gone_does_not_cost_the_others_of_its_account_their_session() -> Result<()> {
    for way in Way::BOTH {
        let site = Site::with(way)?;
        site.annotate("app", &[])?;
        let pods = [site.run("app-0", "app")?, site.run("app-1", "app")?];
        let agent = site.start()?;
        let cut = Cut::open_connections(&site.node)?;
        site.account("app")?;
        // Both wait for the session, and one of them is gone before it can be had.
        site.sts.inject(Fault::always(Effect::error("Throttling")));
        for pod in &pods {
            poll("a session under way", SOON, || list(pod).ok().filter(|list| list.body.contains("503")))?;
        }
        site.delete("app-0")?;
        site.sts.heal();
        poll("the session of who is left", PATIENCE, || site.serves(&pods[1], "app").ok())?;
        cut.heal()?;
        agent.stop()?;
    }
    Ok(())
}
