//! The redirect of container credentials: there with the flag and not without it, and it fails closed as that of the
//! metadata service does.

use std::io::ErrorKind;
use std::net::SocketAddr;
use std::time::Duration;

use anyhow::{Result, ensure};
use lab::agent::{Agent, Options, field};
use lab::http::Client;
use lab::net::{CONTAINER, CONTAINER6, METADATA, Shape};
use lab::poll::poll;

use crate::PATIENCE;
use crate::container::{PATH, PODS_AUDIENCE, site, token};
use crate::site::Site;

/// Longer than any answer within this machine takes.
const NEVER: Duration = Duration::from_millis(400);

fn rules(site: &Site, backend: &str) -> Result<String> {
    site.node.netns().shell(match backend {
        "nft" => "! nft list tables | grep -q kirsa || nft list table inet kirsa",
        _ => "{ iptables-save; ip6tables-save; } | grep KIRSA || true",
    })
}

fn names_it(rules: &str) -> bool {
    rules.contains(&CONTAINER.to_string()) || rules.contains(&CONTAINER6.to_string())
}

fn it_is_there_with_the_flag_and_fails_closed(backend: &str) -> Result<()> {
    let mut site = site()?;
    let without = site.options.clone();
    site.options = site.options.flag("--intercept", backend);
    site.account("app")?;
    // Whoever gets around the redirect would reach this.
    site.node.vpc().ip([format!("addr add {CONTAINER}/32 dev lo")])?;
    let outside = site.node.vpc().listen((CONTAINER, 80).into())?;
    outside.set_nonblocking(true)?;
    let agent = site.start()?;
    let mut pods = Vec::new();
    for shape in Shape::ALL {
        let name = format!("app-{shape:?}").to_lowercase();
        let uid = site.bind(&name, "app")?;
        let pod = site.node.pod(&name, shape)?;
        site.show(&pod)?;
        let token = token(&site, "app", (&name, &uid), PODS_AUDIENCE)?;
        let v6 = pod.ip6().map(|_| SocketAddr::from((CONTAINER6, 80)));
        for target in [(CONTAINER, 80).into()].into_iter().chain(v6) {
            let answer = Client::new(pod.netns(), target).get(PATH).header("Authorization", &token).send()?;
            ensure!(answer.status == 200, "{shape:?} to {target}: {answer:?}");
        }
        let mut direct = Client::new(pod.netns(), (site.node.host_ip(), 338));
        let answer = direct.get(PATH).header("Authorization", &token).send()?;
        ensure!(answer.status == 403, "around the redirect: {answer:?}");
        pods.push(pod);
    }
    agent.kill()?;
    for pod in &pods {
        let kind = pod.connect((CONTAINER, 80)).map_err(|error| error.kind());
        ensure!(matches!(kind, Err(ErrorKind::ConnectionRefused)), "refused at once, by the rules that stay: {kind:?}");
    }
    site.node.netns().shell(match backend {
        "nft" => "nft flush chain inet kirsa prerouting",
        _ => "iptables -t nat -F; ip6tables -t nat -F",
    })?;
    for pod in &pods {
        let kind = pod.netns().connect((CONTAINER, 80).into(), NEVER).map_err(|error| error.kind());
        ensure!(
            matches!(kind, Err(ErrorKind::ConnectionRefused)),
            "what leads around the redirect is refused: {kind:?}"
        );
    }
    ensure!(outside.accept().is_err_and(|error| error.kind() == ErrorKind::WouldBlock), "a pod got outside");

    // Without the flag, the address is somebody else's again.
    ensure!(names_it(&rules(&site, backend)?));
    let options = without_flag(&site, backend)?;
    let agent = Agent::start(&site.node, &options)?;
    let now = rules(&site, backend)?;
    ensure!(!names_it(&now) && now.contains(&METADATA.to_string()), "{now}");
    agent.stop()?;
    let agent = Agent::start(&site.node, &without.flag("--intercept", backend))?;
    ensure!(names_it(&rules(&site, backend)?));
    agent.stop()?;
    let output = Agent::uninstall(&site.node, &Options::new(env!("CARGO_BIN_EXE_kirsa")))?;
    ensure!(output.status.success() && !rules(&site, backend)?.to_lowercase().contains("kirsa"), "{output:?}");
    Ok(())
}

/// As [`site`] makes them, less the switch.
fn without_flag(site: &Site, backend: &str) -> Result<Options> {
    let way = crate::rights::Way::Container.namespace();
    let kubeconfig = crate::site::blocking(site.api.agent_kubeconfig(way, "kirsa", site.node.name()))?;
    let options = Options::new(env!("CARGO_BIN_EXE_kirsa")).flag("--kubeconfig", &kubeconfig);
    Ok(options.flag("--sts-endpoint-url", site.sts.url()).flag("--intercept", backend))
}

#[test]
fn by_nft_it_is_there_with_the_flag_and_fails_closed() -> Result<()> {
    it_is_there_with_the_flag_and_fails_closed("nft")
}

#[test]
fn by_iptables_it_is_there_with_the_flag_and_fails_closed() -> Result<()> {
    it_is_there_with_the_flag_and_fails_closed("iptables")
}

/// Those of the metadata service lead here still, so only a probe of its own notices.
#[test]
fn its_rules_alone_come_back_when_somebody_removed_them() -> Result<()> {
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
    ensure!(removed.lines().count() == 2, "the redirect and its twin: {removed}");
    poll("the rules to come back", PATIENCE, || rules(&site, "nft").is_ok_and(|now| now == before).then_some(()))?;
    poll("a count of the repair", PATIENCE, || {
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

/// It binds that address on a dummy interface, which not every kernel has; which interface does not matter.
#[test]
fn beside_an_eks_agent_it_warns() -> Result<()> {
    let site = site()?;
    site.node.netns().ip([format!("addr add {CONTAINER}/32 dev lo")])?;
    let _eks = site.node.listen((CONTAINER, 80).into())?;
    let agent = site.start()?;
    agent.wait_for_log(|entry| {
        field(entry, "level") == Some("WARN")
            && field(entry, "message").is_some_and(|message| message.starts_with("the EKS Pod Identity agent listens"))
    })?;
    let output = Agent::doctor(&site.node, &site.options, &["--output", "json", "--no-exchange"])?;
    let report = String::from_utf8_lossy(&output.stdout);
    ensure!(report.contains("--container-credentials takes its requests"), "{report}");
    agent.stop()
}
