//! Interception with the real binary and real rules (fail closed): a pod's connection to the metadata address reaches
//! the agent or is refused, in every shape of pod network, with nft and with iptables, over IPv4 and IPv6.

mod policy;
mod site;

use std::io::ErrorKind;
use std::net::{IpAddr, TcpStream};
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use lab::agent::{Agent, Options};
use lab::http::Client;
use lab::imds::Instance;
use lab::net::{METADATA, Shape};
use lab::poll::poll;

use site::{Site, account};

lab::enter!();

/// Runs each test with both backends.
macro_rules! with_nft_and_iptables {
    ($($test:ident,)*) => {
        mod nft { $(#[test] fn $test() -> anyhow::Result<()> { super::$test("nft") })* }
        mod iptables { $(#[test] fn $test() -> anyhow::Result<()> { super::$test("iptables") })* }
    };
}

mod addresses;
mod leaks;

with_nft_and_iptables! {
    pods_of_every_shape_are_served,
    node_traffic_is_not_redirected,
    forwarded_packets_are_rejected,
    direct_connection_is_rejected,
    rules_survive_restart_until_uninstall,
    killed_agent_leaves_rules_that_refuse_pods,
    removed_rules_are_restored,
    policy_routing_alone_leaks_nothing,
    postrouting_alone_leaks_nothing,
    family_without_host_address_is_refused,
}

/// Time after which a connection counts as unanswered. Packets within this machine take far less.
const CONNECT_TIMEOUT: Duration = Duration::from_millis(400);
const TIMEOUT: Duration = Duration::from_secs(20);

fn error_kind(outcome: std::io::Result<TcpStream>) -> Option<ErrorKind> {
    outcome.err().map(|error| error.kind())
}

/// IMDS-1, IMDS-9, IMDS-11, IMDS-24, IMDS-25
fn pods_of_every_shape_are_served(backend: &'static str) -> Result<()> {
    let site = Site::new(backend)?;
    let idle = site.pod("idle")?;
    let agent = site.start()?;
    for pod in &site.pods {
        for mut imds in Site::clients(pod) {
            let what = format!("{:?} {imds:?}", pod.shape());
            let list = imds.role_list().context(what.clone())?;
            let role = format!("{}-role", account(pod.shape()));
            ensure!(list.status == 200 && list.body == role, "{what}: {list:?}");
            let session = site.session(&imds.credentials(&role)?.body)?;
            ensure!(session.role_arn == site.arn(pod.name()), "{what}: {session:?}");
        }
    }
    for mut imds in Site::clients(&idle) {
        ensure!(imds.role_list()?.status == 404);
    }
    let stranger = site.node.pod("stranger", Shape::Bridge)?;
    for mut imds in Site::clients(&stranger) {
        let list = imds.role_list()?;
        ensure!(list.status == 503, "{list:?}");
    }
    agent.wait_for_refusal("unknown_pod")?;
    site.no_pod_got_outside()?;
    agent.stop()
}

fn node_traffic_is_not_redirected(backend: &'static str) -> Result<()> {
    let site = Site::new(backend)?;
    let agent = site.start()?;
    for (host, target) in site.node.host_ips().into_iter().zip(site.targets(80)) {
        let path = "/latest/meta-data/instance-id";
        let body = Client::new(site.node.netns(), target).get(path).send()?.ok()?;
        ensure!(body == Instance::default().instance_id, "{body}");
        ensure!(site.hits().iter().any(|hit| hit.path == path && hit.from.ip() == host), "{:?}", site.hits());
    }
    agent.stop()
}

fn forwarded_packets_are_rejected(backend: &'static str) -> Result<()> {
    let site = Site::new(backend)?;
    let agent = site.start()?;
    // A running agent would restore the redirect.
    agent.kill()?;
    site.remove_redirect()?;
    for pod in &site.pods {
        for target in site.targets(80) {
            let kind = error_kind(pod.netns().connect(target, CONNECT_TIMEOUT));
            // iptables cannot reject in prerouting, so policy routing answers with ICMP errors. The client ignores them
            // for the first SYN, because it still holds its socket.
            let refused = kind == Some(ErrorKind::ConnectionRefused);
            ensure!(refused || backend == "iptables" && kind.is_some(), "{:?} to {target}: {kind:?}", pod.shape());
        }
    }
    site.no_pod_got_outside()?;
    for pod in &site.pods {
        // Only port 80 has credentials. Other ports must work, for example for DNS in other clouds.
        pod.netns().connect((METADATA, 8080).into(), TIMEOUT).context("another port of the metadata address")?;
    }
    Ok(())
}

/// Right after a flush, only policy routing is left.
fn policy_routing_alone_leaks_nothing(backend: &'static str) -> Result<()> {
    let site = Site::new(backend)?;
    site.start()?.kill()?;
    site.node.netns().shell("nft flush ruleset")?;
    for target in site.targets(80) {
        for pod in &site.pods {
            ensure!(
                error_kind(pod.netns().connect(target, CONNECT_TIMEOUT)).is_some(),
                "{:?} to {target}",
                pod.shape()
            );
        }
    }
    site.no_pod_got_outside()?;
    for target in site.targets(80) {
        let body = Client::new(site.node.netns(), target).get("/latest/meta-data/instance-id").send()?.ok()?;
        ensure!(body == Instance::default().instance_id, "the node itself cannot reach {target}: {body}");
    }
    Agent::uninstall(&site.node, &Options::new(env!("CARGO_BIN_EXE_kirsa")))?;
    let left = site.node.netns().shell("ip rule; ip -6 rule")?;
    ensure!(!left.contains("169.254.169.254") && !left.contains("fd00:ec2::254"), "{left}");
    Ok(())
}

/// IPVS sends a Service's connections from its own hook, which bypasses forwarding and policy routing.
fn postrouting_alone_leaks_nothing(backend: &'static str) -> Result<()> {
    let site = Site::new(backend)?;
    site.start()?.kill()?;
    let rules = match backend {
        "nft" => "for chain in prerouting refuse forward; do nft flush chain inet kirsa $chain; done",
        _ => "for i in iptables ip6tables; do $i -t nat -F; $i -F; done",
    };
    site.node.netns().shell(&format!("{rules}; ip rule del pref 6; ip -6 rule del pref 6 || true"))?;
    for pod in &site.pods {
        for target in site.targets(80) {
            let kind = error_kind(pod.netns().connect(target, CONNECT_TIMEOUT));
            ensure!(kind == Some(ErrorKind::TimedOut), "{:?} to {target}: {kind:?}", pod.shape());
        }
    }
    site.no_pod_got_outside()
}

/// The other address family has no DNAT target.
fn family_without_host_address_is_refused(backend: &'static str) -> Result<()> {
    for host in [true, false] {
        let mut site = Site::new(backend)?;
        let address = site.node.host_ips().into_iter().find(|address| address.is_ipv4() == host);
        // A kernel without IPv6 has one family only.
        let Some(address) = address else { continue };
        site.set_flag("--host-ip", &address.to_string());
        let agent = site.start()?;
        let check = |site: &Site| {
            for target in site.targets(80).into_iter().filter(|target| target.is_ipv4() != host) {
                for pod in &site.pods {
                    let kind = error_kind(pod.netns().connect(target, CONNECT_TIMEOUT));
                    ensure!(kind == Some(ErrorKind::ConnectionRefused), "{:?} to {target}: {kind:?}", pod.shape());
                }
            }
            site.no_pod_got_outside()
        };
        check(&site)?;
        let pod = &site.pods[0];
        let mut served = if host { pod.imds() } else { pod.imds6() };
        ensure!(served.role_list()?.status == 200);
        agent.kill()?;
        check(&site).context("after the agent was killed")?;
    }
    Ok(())
}

fn direct_connection_is_rejected(backend: &'static str) -> Result<()> {
    let site = Site::new(backend)?;
    let agent = site.start()?;
    let mut sent = 0.0;
    for pod in &site.pods {
        for host in site.node.host_ips() {
            let mut direct = Client::new(pod.netns(), (host, 338));
            let list = direct.get(lab::http::CREDENTIALS_PATH).send()?;
            ensure!(list.status == 403 && !list.body.contains("role"), "{:?} to {host}: {list:?}", pod.shape());
            sent += 1.0;
        }
    }
    ensure!(agent.metric("kirsa_refusals_total", &[("reason", "not_redirected")])? == sent);
    // The node itself is rejected too, although all its addresses are local.
    let mut local = Client::new(site.node.netns(), (site.node.host_ip(), 338));
    ensure!(local.get(lab::http::CREDENTIALS_PATH).send()?.status == 403);
    agent.stop()
}

fn rules_survive_restart_until_uninstall(backend: &'static str) -> Result<()> {
    let site = Site::new(backend)?;
    ensure!(!site.rules()?.to_lowercase().contains("kirsa"));
    let agent = site.start()?;
    let before = site.rules()?;
    let jump = if backend == "nft" { "table inet kirsa\n" } else { "-A FORWARD -j KIRSA-FORWARD\n" };
    let families = if backend == "nft" { 1 } else { 2 };
    ensure!(before.matches(jump).count() == families, "{before}");
    agent.stop()?;
    ensure!(site.rules()? == before, "the rules changed when the agent stopped");
    let agent = site.start()?;
    ensure!(site.rules()? == before, "before:\n{before}\nafter:\n{}", site.rules()?);
    agent.stop()?;

    let output = Agent::uninstall(&site.node, &Options::new(env!("CARGO_BIN_EXE_kirsa")))?;
    let text = String::from_utf8_lossy(&output.stdout);
    ensure!(output.status.success() && text.to_lowercase().contains("kirsa"), "{output:?}");
    ensure!(text.contains(if backend == "nft" {
        "nftables table inet kirsa"
    } else {
        "ip6tables chain KIRSA-FORWARD"
    }));
    ensure!(!site.rules()?.to_lowercase().contains("kirsa"), "{}", site.rules()?);
    let again = Agent::uninstall(&site.node, &Options::new(env!("CARGO_BIN_EXE_kirsa")))?;
    ensure!(again.status.success() && !again.stdout.is_empty(), "{again:?}");
    Ok(())
}

/// IMDS-30
fn killed_agent_leaves_rules_that_refuse_pods(backend: &'static str) -> Result<()> {
    let site = Site::new(backend)?;
    let agent = site.start()?;
    let rules = site.rules()?;
    agent.kill()?;
    ensure!(site.rules()? == rules);
    for pod in &site.pods {
        for target in site.targets(80) {
            let kind = error_kind(pod.connect(target));
            ensure!(kind == Some(ErrorKind::ConnectionRefused), "{:?} to {target}: {kind:?}", pod.shape());
        }
    }
    site.no_pod_got_outside()?;
    let agent = site.start()?;
    for pod in &site.pods {
        ensure!(pod.imds().role_list()?.status == 200);
    }
    agent.stop()
}

fn removed_rules_are_restored(backend: &'static str) -> Result<()> {
    let site = Site::new(backend)?;
    let agent = site.start()?;
    let rules = site.rules()?;
    site.remove_redirect()?;
    poll("the rules to be restored", TIMEOUT, || site.rules().is_ok_and(|now| now == rules).then_some(()))?;
    poll("the repair to be counted", TIMEOUT, || {
        agent.metric("kirsa_redirect_repaired_total", &[]).is_ok_and(|count| count >= 1.0).then_some(())
    })?;
    ensure!(site.pods[0].imds().role_list()?.status == 200);
    site.no_pod_got_outside()?;
    agent.stop()
}

/// The self-test uses neither chain, so only reading the rules back detects this.
#[test]
fn flushed_prerouting_and_forward_are_restored() -> Result<()> {
    let site = Site::new("nft")?;
    let agent = site.start()?;
    let rules = site.rules()?;
    site.node.netns().shell("nft 'flush chain inet kirsa prerouting; flush chain inet kirsa forward'")?;
    poll("the rules to be restored", TIMEOUT, || site.rules().is_ok_and(|now| now == rules).then_some(()))?;
    agent.stop()
}

#[test]
fn node_without_route_is_ready() -> Result<()> {
    let site = Site::new("nft")?;
    site.node.netns().shell("ip route del default; ip -6 route del default || true")?;
    let agent = site.start()?;
    ensure!(agent.metric("kirsa_redirect_repaired_total", &[])? == 0.0);
    ensure!(site.pods[0].imds().role_list()?.status == 200);
    agent.stop()
}

/// Another program accepts packets before our chain sees them.
#[test]
fn accept_before_the_iptables_jump_leaks_nothing() -> Result<()> {
    let site = Site::new("iptables")?;
    let agent = site.start()?;
    agent.kill()?;
    site.node.netns().shell(
        "for i in iptables ip6tables; do $i -t nat -F; $i -I FORWARD -j ACCEPT; done; ip rule del pref 6; \
         ip -6 rule del pref 6 || true",
    )?;
    for pod in &site.pods {
        for target in site.targets(80) {
            ensure!(
                error_kind(pod.netns().connect(target, CONNECT_TIMEOUT)).is_some(),
                "{:?} to {target}",
                pod.shape()
            );
        }
    }
    site.no_pod_got_outside()
}

#[test]
fn auto_prefers_nft_and_falls_back_to_iptables() -> Result<()> {
    let site = Site::new("auto")?;
    let agent = site.start()?;
    ensure!(site.node.netns().shell("nft list tables")?.contains("inet kirsa"));
    agent.stop()?;

    let site = Site::new("auto")?;
    let tools = site.node.state().join("bin");
    std::fs::create_dir(&tools)?;
    for tool in ["iptables", "iptables-restore", "ip6tables", "ip6tables-restore"] {
        let path = site.node.netns().shell(&format!("command -v {tool}"))?;
        std::os::unix::fs::symlink(path.trim(), tools.join(tool))?;
    }
    let agent = Agent::start(&site.node, &site.options.clone().env("PATH", &tools))?;
    ensure!(site.pods[0].imds().role_list()?.status == 200);
    agent.stop()
}

#[test]
fn unusable_redirect_is_reported_at_startup() -> Result<()> {
    let site = Site::new("nft")?;
    for (options, wanted) in [
        (site.options.clone().env("PATH", "/nonexistent"), "nft: not found"),
        (site.options.clone().flag("--host-ip", "10.9.9.9"), "--host-ip 10.9.9.9"),
    ] {
        let output = Agent::run_to_end(&site.node, &options)?;
        let text = String::from_utf8_lossy(&output.stderr);
        ensure!(output.status.code() == Some(1) && text.contains(wanted), "{wanted}: {output:?}");
    }
    Ok(())
}

/// Another component's redirect need not preserve the original destination.
#[test]
fn intercept_none_installs_no_rules() -> Result<()> {
    let site = Site::new("none")?;
    let agent = site.start()?;
    ensure!(site.node.netns().shell("nft list ruleset")?.is_empty());
    let pod = &site.pods[0];
    let mut direct = Client::new(pod.netns(), (IpAddr::V4(site.node.host_ip()), 338));
    ensure!(direct.role_list()?.status == 200);
    ensure!(agent.metric("kirsa_redirect_verified", &[])? == 1.0, "alerts depend on it");
    agent.stop()
}

/// A process on the agent's port receives pods' requests, so an unprivileged process must not be able to bind it.
#[test]
fn port_is_privileged_while_agent_is_down() -> Result<()> {
    let site = Site::new("nft")?;
    site.start()?.kill()?;
    let host = site.node.host_ip();
    let bind = |port: u16| {
        site.node.netns().run(move || {
            caps::clear(None, caps::CapSet::Effective)?;
            anyhow::Ok(std::net::TcpListener::bind((host, port)).err().map(|error| error.kind()))
        })
    };
    ensure!(bind(338)? == Some(ErrorKind::PermissionDenied), "{:?}", bind(338)?);
    ensure!(bind(8181)?.is_none(), "the test could not fail");
    site.start()?.stop()
}

#[test]
fn bind_capability_is_dropped_before_serving() -> Result<()> {
    const NET_BIND_SERVICE: u64 = 1 << 10;
    for backend in ["nft", "none"] {
        let site = Site::new(backend)?;
        let agent = site.start()?;
        let status = std::fs::read_to_string(format!("/proc/{}/status", agent.process().id()))?;
        let field = |name: &str| {
            let line = status.lines().find_map(|line| line.strip_prefix(name));
            line.map(str::trim).with_context(|| format!("no {name}"))
        };
        for set in ["CapInh:", "CapPrm:", "CapEff:", "CapBnd:", "CapAmb:"] {
            let held = u64::from_str_radix(field(set)?, 16)?;
            ensure!(held & NET_BIND_SERVICE == 0, "{backend}: {set} {held:#x}");
        }
        ensure!(field("NoNewPrivs:")? == "1", "a program that root executes could regain it");
        agent.stop()?;
    }
    Ok(())
}

#[test]
fn occupant_of_the_port_is_named() -> Result<()> {
    let site = Site::new("nft")?;
    let _occupant = site.node.netns().listen((site.node.host_ip(), 338).into())?;
    let output = Agent::run_to_end(&site.node, &site.options)?;
    let text = String::from_utf8_lossy(&output.stderr);
    let process = format!("process {} (", std::process::id());
    ensure!(output.status.code() == Some(1) && text.contains("--port 338: in use"), "{output:?}");
    ensure!(text.contains(&process) && text.contains("uid 0"), "{text}");
    ensure!(!site.rules()?.contains("kirsa"), "rules lead to the other process: {}", site.rules()?);
    Ok(())
}

#[test]
fn unprivileged_port_works_with_a_warning() -> Result<()> {
    let mut site = Site::new("nft")?;
    site.set_flag("--port", "8181");
    let agent = site.start()?;
    agent.wait_for_log(|entry| {
        entry["message"]
            .as_str()
            .is_some_and(|message| message.contains("any hostNetwork process can listen on port 8181"))
    })?;
    ensure!(site.pods[0].imds().role_list()?.status == 200);
    agent.stop()
}
