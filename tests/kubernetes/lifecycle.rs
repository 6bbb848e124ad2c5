//! Pod lifecycle from binding to deletion, and reuse of its IP address.

use anyhow::{Context, Result, ensure};
use lab::agent::Agent;
use lab::http::Client;
use lab::net::Pod;
use lab::poll::poll;
use serde_json::json;

use crate::site::{Site, credentials, list, role, wait_for_metric};
use crate::{TIMEOUT, WATCH_TIMEOUT};

/// The agent's own pod on this node, in addition to the test's pods.
const AGENT_PODS: f64 = 1.0;

fn assert_unknown(pod: &Pod) -> Result<()> {
    poll("the address to be unknown", WATCH_TIMEOUT, || list(pod).ok().filter(|list| list.status == 503))?;
    ensure!(credentials(pod, "app-role")?.status == 503);
    Ok(())
}

#[test]
fn pod_is_served_from_pending_to_deletion() -> Result<()> {
    let site = Site::new()?;
    site.account("app")?;
    site.annotate("late", &[])?;
    let agent = site.start()?;
    site.bind("app-0", "app")?;
    let pod = site.attach("app-0")?;
    site.report("app-0", "Pending", &pod.address().ips())?;
    site.assert_served(&pod, "app").context("pending: its init containers run")?;
    site.report_address(&pod)?;
    site.assert_served(&pod, "app").context("running")?;

    // A session that was not prefetched proves that tokens are minted for terminating pods.
    let late = site.run("late-0", "late")?;
    wait_for_metric(&agent, "kirsa_indexed_pods", &[], AGENT_PODS + 2.0)?;
    for (name, pod, account) in [("app-0", &pod, "app"), ("late-0", &late, "late")] {
        crate::site::blocking(site.api.terminate_pod(site.namespace(), name))?;
        site.account(account)?;
        site.assert_served(pod, account).context("terminating")?;
    }
    site.delete("app-0")?;
    assert_unknown(&pod)?;
    site.assert_served(&late, "late")?;
    wait_for_metric(&agent, "kirsa_cache_entries", &[], 1.0).context("the session of the last pod goes with it")?;
    agent.stop()
}

/// An ended pod keeps its `podIPs` in the API.
#[test]
fn ended_pod_owns_no_address() -> Result<()> {
    let site = Site::new()?;
    site.account("app")?;
    site.account("other")?;
    let agent = site.start()?;
    for phase in ["Succeeded", "Failed"] {
        let name = format!("app-{}", phase.to_lowercase());
        let pod = site.run(&name, "app")?;
        site.assert_served(&pod, "app")?;
        site.report(&name, phase, &pod.address().ips())?;
        assert_unknown(&pod)?;
        let address = pod.address();
        pod.delete();
        let name = format!("after-{}", phase.to_lowercase());
        site.bind(&name, "other")?;
        let next = site.attach_at(&name, address)?;
        site.report_address(&next)?;
        site.assert_served(&next, "other")?;
    }
    agent.stop()
}

/// Pods on the host network share the node's address.
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
    wait_for_metric(&agent, "kirsa_indexed_pods", &[], AGENT_PODS + 1.0)?;
    let mut direct = Client::new(site.node.netns(), (site.node.host_ip(), 338));
    let answer = direct.role_list()?;
    ensure!(answer.status == 503, "{answer:?}");
    agent.wait_for_refusal("unknown_pod")?;

    // A host-network pod cannot claim another pod's address.
    let pod = site.run("app-0", "app")?;
    site.report("host-0", "Running", &pod.address().ips())?;
    let mut direct = Client::new(pod.netns(), (site.node.host_ip(), 338));
    poll("the pod's role", WATCH_TIMEOUT, || direct.role_list().ok().filter(|list| list.body == role("app")))?;
    ensure!(site.calls("host").is_empty(), "nothing is prefetched for it");
    agent.stop()
}

#[test]
fn dual_stack_pod_is_known_by_both_addresses() -> Result<()> {
    let site = Site::new()?;
    site.account("app")?;
    let agent = site.start()?;
    let pod = site.run("app-0", "app")?;
    let key = site.assert_served(&pod, "app")?;
    if pod.ip6().is_some() {
        ensure!(site.session(&pod.imds6().credentials(&role("app"))?)?.access_key_id == key);
    }
    // The same by the CNI record alone.
    let uid = site.bind("app-1", "app")?;
    let pod = site.attach("app-1")?;
    site.records()?.add(&site.sandbox("app-1", &uid), &pod)?;
    site.assert_served(&pod, "app")?;
    if pod.ip6().is_some() {
        ensure!(site.session(&pod.imds6().credentials(&role("app"))?)?.access_key_id == key);
    }
    agent.stop()
}

/// Order in which an address's former pod is removed and its next pod appears.
#[derive(Clone, Copy, Debug)]
enum Reuse {
    /// The node has no records: only the API server reports addresses.
    WithoutRecords,
    /// The former pod and its record are deleted before the next pod starts.
    AfterDeletion,
    /// The next pod starts while the API server still reports the former one with the address.
    BeforeDeletion,
    /// The same, and the former pod's record still exists.
    WithStaleRecord,
}

#[test]
fn reused_ip_gets_only_own_credentials() -> Result<()> {
    reuse_address(&[Reuse::AfterDeletion, Reuse::BeforeDeletion, Reuse::WithStaleRecord].repeat(3))
}

#[test]
fn reused_ip_without_records() -> Result<()> {
    reuse_address(&[Reuse::WithoutRecords; 4])
}

fn reuse_address(rounds: &[Reuse]) -> Result<()> {
    use Reuse::{AfterDeletion, BeforeDeletion, WithStaleRecord, WithoutRecords};
    let site = Site::new()?;
    let accounts = ["left", "right"];
    accounts.iter().try_for_each(|account| site.account(account))?;
    let agent = site.start()?;
    let address = site.node.allocate();
    let mut former: Option<(String, String, Pod)> = None;
    for (round, reuse) in rounds.iter().enumerate() {
        let account = accounts[round % 2];
        let name = format!("{account}-{round}");
        let records = site.records()?;
        let deleted = former.take().map(|(name, uid, pod)| {
            pod.delete();
            (site.sandbox(&name, &uid), name)
        });
        let delete = || deleted.as_ref().map_or(Ok(()), |(_, name)| site.delete(name));
        if !matches!(reuse, WithStaleRecord)
            && let Some((sandbox, _)) = &deleted
        {
            records.remove(sandbox)?;
            wait_for_records(&agent, 0.0)?;
        }
        if matches!(reuse, WithoutRecords | AfterDeletion) {
            delete()?;
            wait_for_metric(&agent, "kirsa_indexed_pods", &[], AGENT_PODS)?;
        }
        let uid = site.bind(&name, account)?;
        let pod = site.attach_at(&name, address)?;
        if !matches!(reuse, WithoutRecords) {
            records.add(&site.sandbox(&name, &uid), &pod)?;
            wait_for_records(&agent, if matches!(reuse, WithStaleRecord) && deleted.is_some() { 2.0 } else { 1.0 })?;
        }
        let wait_for_own = |what: &str| {
            poll(what, TIMEOUT, || own_or_nothing(&site, &pod, account).transpose())
                .and_then(|answer| answer)
                .with_context(|| format!("round {round}, {reuse:?}"))
        };
        match reuse {
            WithoutRecords => {
                ensure!(own_or_nothing(&site, &pod, account)?.is_none());
                site.report_address(&pod)?;
            }
            WithStaleRecord if deleted.is_some() => {
                ensure!(own_or_nothing(&site, &pod, account)?.is_none(), "two live pods claim {address:?}");
                delete()?;
            }
            _ => {}
        }
        wait_for_own("the next pod's own credentials")?;
        if matches!(reuse, BeforeDeletion) {
            delete()?;
        }
        site.report_address(&pod)?;
        wait_for_own("the same after both sources have reported it")?;
        if matches!(reuse, WithStaleRecord)
            && let Some((sandbox, _)) = &deleted
        {
            records.remove(sandbox)?;
        }
        former = Some((name, uid, pod));
    }
    agent.stop()
}

fn wait_for_records(agent: &Agent, count: f64) -> Result<()> {
    wait_for_metric(agent, "kirsa_cni_records", &[], count)
}

/// Requests everything that a pod can request once: it must get its own credentials or none. Returns whether it got
/// any.
fn own_or_nothing(site: &Site, pod: &Pod, account: &str) -> Result<Option<()>> {
    let list = list(pod)?;
    ensure!(list.status == 503 || (list.status == 200 && list.body == role(account)), "{list:?}");
    let mut got = None;
    for name in ["left", "right"] {
        let document = credentials(pod, &role(name))?;
        if document.status == 200 {
            let session = site.session(&document)?;
            site.assert_session_of(&session, account)?;
            got = Some(());
        } else {
            ensure!(document.status == 503 || (document.status == 404 && name != account), "{document:?}");
        }
    }
    Ok(got)
}
