//! The redirect of container credentials: installed only with the flag, and it fails closed like the metadata
//! service's.

use std::io::ErrorKind;
use std::net::SocketAddr;
use std::time::Duration;

use anyhow::{Result, ensure};
use lab::agent::{Agent, Options, field};
use lab::http::Client;
use lab::net::{CONTAINER, CONTAINER6, METADATA, Shape};
use lab::poll::poll;

use crate::TIMEOUT;
use crate::container::{PATH, PODS_AUDIENCE, site, token};
use crate::site::Site;

/// Timeout for connections that must not be accepted: longer than any response on this machine takes.
const CONNECT_TIMEOUT: Duration = Duration::from_millis(400);

fn rules(site: &Site, backend: &str) -> Result<String> {
    site.node.netns().shell(match backend {
        "nft" => "! nft list tables | grep -q kirsa || nft list table inet kirsa",
        _ => "{ iptables-save; ip6tables-save; } | grep KIRSA || true",
    })
}

fn contains_container_address(rules: &str) -> bool {
    rules.contains(&CONTAINER.to_string()) || rules.contains(&CONTAINER6.to_string())
}

fn assert_redirect_fails_closed(backend: &str) -> Result<()> {
    let mut site = site()?;
    let without = site.options.clone();
    site.options = site.options.flag("--intercept", backend);
    site.account("app")?;
    // A pod that bypasses the redirect would reach this listener.
    site.node.vpc().ip([format!("addr add {CONTAINER}/32 dev lo")])?;
    let outside = site.node.vpc().listen((CONTAINER, 80).into())?;
    outside.set_nonblocking(true)?;
    let agent = site.start()?;
    let mut pods = Vec::new();
    for shape in Shape::ALL {
        let name = format!("app-{shape:?}").to_lowercase();
        let uid = site.bind(&name, "app")?;
        let pod = site.node.pod(&name, shape)?;
        site.report_address(&pod)?;
        let token = token(&site, "app", (&name, &uid), PODS_AUDIENCE)?;
        let v6 = pod.ip6().map(|_| SocketAddr::from((CONTAINER6, 80)));
        for target in [(CONTAINER, 80).into()].into_iter().chain(v6) {
            let answer = Client::new(pod.netns(), target).get(PATH).header("Authorization", &token).send()?;
            ensure!(answer.status == 200, "{shape:?} to {target}: {answer:?}");
        }
        let mut direct = Client::new(pod.netns(), (site.node.host_ip(), 338));
        let answer = direct.get(PATH).header("Authorization", &token).send()?;
        ensure!(answer.status == 403, "bypassing the redirect: {answer:?}");
        pods.push(pod);
    }
    agent.kill()?;
    for pod in &pods {
        let kind = pod.connect((CONTAINER, 80)).map_err(|error| error.kind());
        ensure!(matches!(kind, Err(ErrorKind::ConnectionRefused)), "refused by the remaining rules: {kind:?}");
    }
    site.node.netns().shell(match backend {
        "nft" => "nft flush chain inet kirsa prerouting",
        _ => "iptables -t nat -F; ip6tables -t nat -F",
    })?;
    for pod in &pods {
        let kind = pod.netns().connect((CONTAINER, 80).into(), CONNECT_TIMEOUT).map_err(|error| error.kind());
        ensure!(
            matches!(kind, Err(ErrorKind::ConnectionRefused)),
            "connections that bypass the redirect are refused: {kind:?}"
        );
    }
    ensure!(outside.accept().is_err_and(|error| error.kind() == ErrorKind::WouldBlock), "a pod bypassed the redirect");

    // Without the flag, the agent does not redirect the address.
    ensure!(contains_container_address(&rules(&site, backend)?));
    let options = without_flag(&site, backend)?;
    let agent = Agent::start(&site.node, &options)?;
    let now = rules(&site, backend)?;
    ensure!(!contains_container_address(&now) && now.contains(&METADATA.to_string()), "{now}");
    agent.stop()?;
    let agent = Agent::start(&site.node, &without.flag("--intercept", backend))?;
    ensure!(contains_container_address(&rules(&site, backend)?));
    agent.stop()?;
    let output = Agent::uninstall(&site.node, &Options::new(env!("CARGO_BIN_EXE_kirsa")))?;
    ensure!(output.status.success() && !rules(&site, backend)?.to_lowercase().contains("kirsa"), "{output:?}");
    Ok(())
}

/// Returns the options of [`site`] without `--container-credentials`.
fn without_flag(site: &Site, backend: &str) -> Result<Options> {
    let rights = crate::rights::AgentRights::ContainerCredentials.namespace();
    let kubeconfig = crate::site::blocking(site.api.agent_kubeconfig(rights, "kirsa", site.node.name()))?;
    let options = Options::new(env!("CARGO_BIN_EXE_kirsa")).flag("--kubeconfig", &kubeconfig);
    Ok(options.flag("--sts-endpoint-url", site.sts.url()).flag("--intercept", backend))
}

#[test]
fn nft_redirect_fails_closed() -> Result<()> {
    assert_redirect_fails_closed("nft")
}

#[test]
fn iptables_redirect_fails_closed() -> Result<()> {
    assert_redirect_fails_closed("iptables")
}

/// The metadata service's redirect still works, so only the self-test of this redirect notices.
#[test]
fn removed_redirect_rules_are_restored() -> Result<()> {
    let site = site()?;
    let agent = site.start()?;
    let healthy = doctor(&site)?;
    ensure!(healthy.contains("ok       container-redirect-ipv4"), "{healthy}");
    let before = rules(&site, "nft")?;
    let removed = site.node.netns().shell(&format!(
        "for chain in prerouting output; do
           for handle in $(nft -a list chain inet kirsa $chain | awk '/{CONTAINER}/ {{print $NF}}'); do
             nft delete rule inet kirsa $chain handle $handle && echo deleted
           done
         done"
    ))?;
    ensure!(removed.lines().count() == 2, "the rules for pods and for the host: {removed}");
    poll("the rules to be restored", TIMEOUT, || rules(&site, "nft").is_ok_and(|now| now == before).then_some(()))?;
    poll("the repair to be counted", TIMEOUT, || {
        agent.metric("kirsa_redirect_repaired_total", &[]).is_ok_and(|count| count >= 1.0).then_some(())
    })?;
    agent.kill()?;
    let refused = doctor(&site)?;
    ensure!(refused.contains("failed   container-redirect-ipv4"), "{refused}");
    Ok(())
}

fn doctor(site: &Site) -> Result<String> {
    let output = Agent::doctor(&site.node, &site.options, &["--no-exchange"])?;
    Ok(String::from_utf8(output.stdout)?)
}

/// The EKS agent uses a dummy interface, which not every kernel has; any interface gives the same result.
#[test]
fn eks_pod_identity_agent_is_reported() -> Result<()> {
    let site = site()?;
    site.node.netns().ip([format!("addr add {CONTAINER}/32 dev lo")])?;
    let _eks = site.node.listen((CONTAINER, 80).into())?;
    let agent = site.start()?;
    agent.wait_for_log(|entry| {
        field(entry, "level") == Some("WARN")
            && field(entry, "message").is_some_and(|message| message.starts_with("an EKS Pod Identity agent listens"))
    })?;
    let output = Agent::doctor(&site.node, &site.options, &["--output", "json", "--no-exchange"])?;
    let report = String::from_utf8_lossy(&output.stdout);
    ensure!(report.contains("--container-credentials takes its requests"), "{report}");
    agent.stop()
}
