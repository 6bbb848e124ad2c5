//! A pod from its binding to its end, and what becomes of its address.

use anyhow::{Context, Result, ensure};
use lab::agent::Agent;
use lab::http::Client;
use lab::net::Pod;
use lab::poll::poll;
use serde_json::json;

use crate::site::{Site, credentials, list, role, wait_for_metric};
use crate::{PATIENCE, SOON};

/// Beside the test's own, this node has the agent's pod.
const AGENT: f64 = 1.0;

fn is_forgotten(pod: &Pod) -> Result<()> {
    poll("nobody to have the address", SOON, || list(pod).ok().filter(|list| list.status == 503))?;
    ensure!(credentials(pod, "app-role")?.status == 503);
    Ok(())
}

#[test]
fn a_pod_is_served_from_pending_until_it_is_gone() -> Result<()> {
    let site = Site::new()?;
    site.account("app")?;
    site.annotate("late", &[])?;
    let agent = site.start()?;
    site.bind("app-0", "app")?;
    let pod = site.join("app-0")?;
    site.report("app-0", "Pending", &pod.address().ips())?;
    site.serves(&pod, "app").context("pending: its init containers run")?;
    site.show(&pod)?;
    site.serves(&pod, "app").context("running")?;

    // That tokens are minted for a pod that is being terminated shows with a session that nobody fetched before.
    let late = site.run("late-0", "late")?;
    wait_for_metric(&agent, "kirsa_indexed_pods", &[], AGENT + 2.0)?;
    for (name, pod, account) in [("app-0", &pod, "app"), ("late-0", &late, "late")] {
        crate::site::blocking(site.api.terminate_pod(site.namespace(), name))?;
        site.account(account)?;
        site.serves(pod, account).context("terminating")?;
    }
    site.delete("app-0")?;
    is_forgotten(&pod)?;
    site.serves(&late, "late")?;
    wait_for_metric(&agent, "kirsa_cache_entries", &[], 1.0).context("the session of the last pod goes with it")?;
    agent.stop()
}

/// Its `podIPs` stay in the API.
#[test]
fn a_pod_that_has_ended_has_no_address_any_more() -> Result<()> {
    let site = Site::new()?;
    site.account("app")?;
    site.account("other")?;
    let agent = site.start()?;
    for phase in ["Succeeded", "Failed"] {
        let name = format!("app-{}", phase.to_lowercase());
        let pod = site.run(&name, "app")?;
        site.serves(&pod, "app")?;
        site.report(&name, phase, &pod.address().ips())?;
        is_forgotten(&pod)?;
        let address = pod.address();
        pod.delete();
        let name = format!("after-{}", phase.to_lowercase());
        site.bind(&name, "other")?;
        let next = site.join_at(&name, address)?;
        site.show(&next)?;
        site.serves(&next, "other")?;
    }
    agent.stop()
}

/// Their address is the node's, and so is what comes from it.
#[test]
fn host_network_pods_are_not_attributed() -> Result<()> {
    let mut site = Site::new()?;
    site.options = site.options.flag("--intercept", "none");
    site.account("app")?;
    site.account("host")?;
    let agent = site.start()?;
    let spec = json!({"serviceAccountName": "host", "nodeName": site.node.name(), "hostNetwork": true});
    crate::site::blocking(site.api.create_pod(site.namespace(), "host-0", spec))?;
    site.report("host-0", "Running", &site.node.host_ips())?;
    wait_for_metric(&agent, "kirsa_indexed_pods", &[], AGENT + 1.0)?;
    let mut direct = Client::new(site.node.netns(), (site.node.host_ip(), 338));
    let answer = direct.role_list()?;
    ensure!(answer.status == 503, "{answer:?}");
    agent.wait_for_refusal("unknown_pod")?;

    // Nor does it take anybody's address by claiming it.
    let pod = site.run("app-0", "app")?;
    site.report("host-0", "Running", &pod.address().ips())?;
    let mut direct = Client::new(pod.netns(), (site.node.host_ip(), 338));
    poll("the pod's role", SOON, || direct.role_list().ok().filter(|list| list.body == role("app")))?;
    ensure!(site.calls("host").is_empty(), "nothing is fetched ahead for it");
    agent.stop()
}

#[test]
fn a_dual_stack_pod_is_known_by_both_addresses() -> Result<()> {
    let site = Site::new()?;
    site.account("app")?;
    let agent = site.start()?;
    let pod = site.run("app-0", "app")?;
    let key = site.serves(&pod, "app")?;
    if pod.ip6().is_some() {
        ensure!(site.session(&pod.imds6().credentials(&role("app"))?)?.access_key_id == key);
    }
    // By its record alone, too.
    let uid = site.bind("app-1", "app")?;
    let pod = site.join("app-1")?;
    site.records()?.add(&site.sandbox("app-1", &uid), &pod)?;
    site.serves(&pod, "app")?;
    if pod.ip6().is_some() {
        ensure!(site.session(&pod.imds6().credentials(&role("app"))?)?.access_key_id == key);
    }
    agent.stop()
}

/// In which order the former pod goes and the next one comes.
#[derive(Clone, Copy, Debug)]
enum Handover {
    /// As the API server alone shows it, on a node where nothing writes records.
    WithoutRecords,
    /// The former is gone in every respect before the next comes.
    AfterDeletion,
    /// The next is on the node while the API server shows the former with the address still.
    BeforeDeletion,
    /// The same, and the former's record has stayed behind.
    WithALeftover,
}

#[test]
fn an_address_that_changes_hands_never_brings_the_former_ones_credentials() -> Result<()> {
    hand_over(&[Handover::AfterDeletion, Handover::BeforeDeletion, Handover::WithALeftover].repeat(3))
}

#[test]
fn an_address_changes_hands_without_records() -> Result<()> {
    hand_over(&[Handover::WithoutRecords; 4])
}

fn hand_over(rounds: &[Handover]) -> Result<()> {
    use Handover::{AfterDeletion, BeforeDeletion, WithALeftover, WithoutRecords};
    let site = Site::new()?;
    let accounts = ["left", "right"];
    accounts.iter().try_for_each(|account| site.account(account))?;
    let agent = site.start()?;
    let address = site.node.allocate();
    let mut former: Option<(String, String, Pod)> = None;
    for (round, handover) in rounds.iter().enumerate() {
        let account = accounts[round % 2];
        let name = format!("{account}-{round}");
        let records = site.records()?;
        let gone = former.take().map(|(name, uid, pod)| {
            pod.delete();
            (site.sandbox(&name, &uid), name)
        });
        let delete = || gone.as_ref().map_or(Ok(()), |(_, name)| site.delete(name));
        if !matches!(handover, WithALeftover)
            && let Some((sandbox, _)) = &gone
        {
            records.remove(sandbox)?;
            recorded(&agent, 0.0)?;
        }
        if matches!(handover, WithoutRecords | AfterDeletion) {
            delete()?;
            wait_for_metric(&agent, "kirsa_indexed_pods", &[], AGENT)?;
        }
        let uid = site.bind(&name, account)?;
        let pod = site.join_at(&name, address)?;
        if !matches!(handover, WithoutRecords) {
            records.add(&site.sandbox(&name, &uid), &pod)?;
            recorded(&agent, if matches!(handover, WithALeftover) && gone.is_some() { 2.0 } else { 1.0 })?;
        }
        let get_own = |what: &str| {
            poll(what, PATIENCE, || own_or_nothing(&site, &pod, account).transpose())
                .and_then(|answer| answer)
                .with_context(|| format!("round {round}, {handover:?}"))
        };
        match handover {
            WithoutRecords => {
                ensure!(own_or_nothing(&site, &pod, account)?.is_none());
                site.show(&pod)?;
            }
            WithALeftover if gone.is_some() => {
                ensure!(own_or_nothing(&site, &pod, account)?.is_none(), "two live pods claim {address:?}");
                delete()?;
            }
            _ => {}
        }
        get_own("the next pod's own credentials")?;
        if matches!(handover, BeforeDeletion) {
            delete()?;
        }
        site.show(&pod)?;
        get_own("the same when all is said")?;
        if matches!(handover, WithALeftover)
            && let Some((sandbox, _)) = &gone
        {
            records.remove(sandbox)?;
        }
        former = Some((name, uid, pod));
    }
    agent.stop()
}

fn recorded(agent: &Agent, count: f64) -> Result<()> {
    wait_for_metric(agent, "kirsa_cni_records", &[], count)
}

/// One look at everything that the pod can ask for: its own or nothing, and never anybody else's. What it got.
fn own_or_nothing(site: &Site, pod: &Pod, account: &str) -> Result<Option<()>> {
    let list = list(pod)?;
    ensure!(list.status == 503 || (list.status == 200 && list.body == role(account)), "{list:?}");
    let mut got = None;
    for name in ["left", "right"] {
        let document = credentials(pod, &role(name))?;
        if document.status == 200 {
            let session = site.session(&document)?;
            site.belongs(&session, account)?;
            got = Some(());
        } else {
            ensure!(document.status == 503 || (document.status == 404 && name != account), "{document:?}");
        }
    }
    Ok(got)
}
