//! Interception, through the real binary and real rules: a pod's connection to the metadata address reaches the agent
//! or nobody, in every shape of pod network, with nft and with iptables, over IPv4 and IPv6.

mod addresses;
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

/// Every test once with each way to redirect.
macro_rules! with_nft_and_iptables {
    ($($test:ident,)*) => {
        mod nft { $(#[test] fn $test() -> anyhow::Result<()> { super::$test("nft") })* }
        mod iptables { $(#[test] fn $test() -> anyhow::Result<()> { super::$test("iptables") })* }
    };
}

mod leaks;

with_nft_and_iptables! {
    pods_of_every_shape_are_redirected_attributed_and_answered,
    the_nodes_own_traffic_is_left_alone,
    forwarded_packets_get_nowhere,
    a_direct_connection_is_not_attributed,
    the_rules_are_the_same_after_a_restart_and_gone_after_uninstall,
    a_killed_agent_leaves_its_rules_and_pods_are_refused_at_once,
    rules_that_somebody_removed_come_back,
    policy_routing_alone_leaks_nothing,
    postrouting_alone_leaks_nothing,
    family_without_host_address_is_refused,
}

/// Longer than any answer within this machine takes.
const NEVER: Duration = Duration::from_millis(400);
const PATIENCE: Duration = Duration::from_secs(20);

fn error_kind(outcome: std::io::Result<TcpStream>) -> Option<ErrorKind> {
    outcome.err().map(|error| error.kind())
}

/// IMDS-1, IMDS-9, IMDS-11, IMDS-24, IMDS-25
fn pods_of_every_shape_are_redirected_attributed_and_answered(backend: &'static str) -> Result<()> {
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

fn the_nodes_own_traffic_is_left_alone(backend: &'static str) -> Result<()> {
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

fn forwarded_packets_get_nowhere(backend: &'static str) -> Result<()> {
    let site = Site::new(backend)?;
    let agent = site.start()?;
    // Nobody is left to put it back.
    agent.kill()?;
    site.remove_redirect()?;
    for pod in &site.pods {
        for target in site.targets(80) {
            let kind = error_kind(pod.netns().connect(target, NEVER));
            // iptables cannot reject before routing, so policy routing answers there with ICMP errors: ignored at the
            // first SYN, since the connecting process still holds its socket.
            let refused = kind == Some(ErrorKind::ConnectionRefused);
            ensure!(refused || backend == "iptables" && kind.is_some(), "{:?} to {target}: {kind:?}", pod.shape());
        }
    }
    site.no_pod_got_outside()?;
    for pod in &site.pods {
        // DNS of other clouds, say: only port 80 carries credentials.
        pod.netns().connect((METADATA, 8080).into(), PATIENCE).context("another port of the metadata address")?;
    }
    Ok(())
}

/// Only policy routing is left, as in the moment after a flush.
fn policy_routing_alone_leaks_nothing(backend: &'static str) -> Result<()> {
    let site = Site::new(backend)?;
    site.start()?.kill()?;
    site.node.netns().shell("nft flush ruleset")?;
    for target in site.targets(80) {
        for pod in &site.pods {
            ensure!(error_kind(pod.netns().connect(target, NEVER)).is_some(), "{:?} to {target}", pod.shape());
        }
    }
    site.no_pod_got_outside()?;
    for target in site.targets(80) {
        let body = Client::new(site.node.netns(), target).get("/latest/meta-data/instance-id").send()?.ok()?;
        ensure!(body == Instance::default().instance_id, "the node's own way to {target} is closed: {body}");
    }
    Agent::uninstall(&site.node, &Options::new(env!("CARGO_BIN_EXE_kirsa")))?;
    let left = site.node.netns().shell("ip rule; ip -6 rule")?;
    ensure!(!left.contains("169.254.169.254") && !left.contains("fd00:ec2::254"), "{left}");
    Ok(())
}

/// IPVS sends a Service's connections from its own hook, past forwarding and policy routing.
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
            let kind = error_kind(pod.netns().connect(target, NEVER));
            ensure!(kind == Some(ErrorKind::TimedOut), "{:?} to {target}: {kind:?}", pod.shape());
        }
    }
    site.no_pod_got_outside()
}

/// The other family has no address to lead its connections to.
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
                    let kind = error_kind(pod.netns().connect(target, NEVER));
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
        check(&site).context("after the agent")?;
    }
    Ok(())
}

fn a_direct_connection_is_not_attributed(backend: &'static str) -> Result<()> {
    let site = Site::new(backend)?;
    let agent = site.start()?;
    let mut asked = 0.0;
    for pod in &site.pods {
        for host in site.node.host_ips() {
            let mut direct = Client::new(pod.netns(), (host, 338));
            let list = direct.get(lab::http::CREDENTIALS_PATH).send()?;
            ensure!(list.status == 403 && !list.body.contains("role"), "{:?} to {host}: {list:?}", pod.shape());
            asked += 1.0;
        }
    }
    ensure!(agent.metric("kirsa_refusals_total", &[("reason", "not_redirected")])? == asked);
    // Nor from the node, where every address is local.
    let mut local = Client::new(site.node.netns(), (site.node.host_ip(), 338));
    ensure!(local.get(lab::http::CREDENTIALS_PATH).send()?.status == 403);
    agent.stop()
}

fn the_rules_are_the_same_after_a_restart_and_gone_after_uninstall(backend: &'static str) -> Result<()> {
    let site = Site::new(backend)?;
    ensure!(!site.rules()?.to_lowercase().contains("kirsa"));
    let agent = site.start()?;
    let before = site.rules()?;
    let jump = if backend == "nft" { "table inet kirsa\n" } else { "-A FORWARD -j KIRSA-FORWARD\n" };
    let families = if backend == "nft" { 1 } else { 2 };
    ensure!(before.matches(jump).count() == families, "{before}");
    agent.stop()?;
    ensure!(site.rules()? == before, "the rules do not stay");
    let agent = site.start()?;
    ensure!(site.rules()? == before, "before:\n{before}\nafter:\n{}", site.rules()?);
    agent.stop()?;

    let output = Agent::uninstall(&site.node, &Options::new(env!("CARGO_BIN_EXE_kirsa")))?;
    let said = String::from_utf8_lossy(&output.stdout);
    ensure!(output.status.success() && said.to_lowercase().contains("kirsa"), "{output:?}");
    ensure!(said.contains(if backend == "nft" {
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
fn a_killed_agent_leaves_its_rules_and_pods_are_refused_at_once(backend: &'static str) -> Result<()> {
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

fn rules_that_somebody_removed_come_back(backend: &'static str) -> Result<()> {
    let site = Site::new(backend)?;
    let agent = site.start()?;
    let rules = site.rules()?;
    site.remove_redirect()?;
    poll("the rules to come back", PATIENCE, || site.rules().is_ok_and(|now| now == rules).then_some(()))?;
    poll("a count of the repair", PATIENCE, || {
        agent.metric("kirsa_redirect_repaired_total", &[]).is_ok_and(|count| count >= 1.0).then_some(())
    })?;
    ensure!(site.pods[0].imds().role_list()?.status == 200);
    site.no_pod_got_outside()?;
    agent.stop()
}

/// The self-test passes through neither chain.
#[test]
fn emptied_prerouting_and_forward_come_back() -> Result<()> {
    let site = Site::new("nft")?;
    let agent = site.start()?;
    let rules = site.rules()?;
    site.node.netns().shell("nft 'flush chain inet kirsa prerouting; flush chain inet kirsa forward'")?;
    poll("the rules to come back", PATIENCE, || site.rules().is_ok_and(|now| now == rules).then_some(()))?;
    agent.stop()
}

#[test]
fn node_without_a_route_is_ready_and_quiet() -> Result<()> {
    let site = Site::new("nft")?;
    site.node.netns().shell("ip route del default; ip -6 route del default || true")?;
    let agent = site.start()?;
    ensure!(agent.metric("kirsa_redirect_repaired_total", &[])? == 0.0);
    ensure!(site.pods[0].imds().role_list()?.status == 200);
    agent.stop()
}

/// Another agent accepts before our chain is asked.
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
            ensure!(error_kind(pod.netns().connect(target, NEVER)).is_some(), "{:?} to {target}", pod.shape());
        }
    }
    site.no_pod_got_outside()
}

#[test]
fn with_auto_nft_is_chosen_and_iptables_where_there_is_none() -> Result<()> {
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
fn what_keeps_the_redirect_from_working_is_said_at_the_start() -> Result<()> {
    let site = Site::new("nft")?;
    for (options, wanted) in [
        (site.options.clone().env("PATH", "/nonexistent"), "nft: not found"),
        (site.options.clone().flag("--host-ip", "10.9.9.9"), "--host-ip 10.9.9.9"),
    ] {
        let output = Agent::run_to_end(&site.node, &options)?;
        let said = String::from_utf8_lossy(&output.stderr);
        ensure!(output.status.code() == Some(1) && said.contains(wanted), "{wanted}: {output:?}");
    }
    Ok(())
}

/// A redirect of somebody else's need not leave the original destination behind.
#[test]
fn without_a_redirect_of_our_own_no_rule_is_made() -> Result<()> {
    let site = Site::new("none")?;
    let agent = site.start()?;
    ensure!(site.node.netns().shell("nft list ruleset")?.is_empty());
    let pod = &site.pods[0];
    let mut direct = Client::new(pod.netns(), (IpAddr::V4(site.node.host_ip()), 338));
    ensure!(direct.role_list()?.status == 200);
    ensure!(agent.metric("kirsa_redirect_verified", &[])? == 1.0, "which alerts look at");
    agent.stop()
}

/// What answers on the agent's port gets pods' requests, so an ordinary process of the node must not be able to take it.
#[test]
fn the_port_takes_a_capability_while_the_agent_is_down() -> Result<()> {
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
    ensure!(bind(8181)?.is_none(), "the test would pass with any port");
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
        ensure!(field("NoNewPrivs:")? == "1", "a tool that root starts could regain it");
        agent.stop()?;
    }
    Ok(())
}

#[test]
fn a_port_in_use_is_named_with_its_process() -> Result<()> {
    let site = Site::new("nft")?;
    let _stranger = site.node.netns().listen((site.node.host_ip(), 338).into())?;
    let output = Agent::run_to_end(&site.node, &site.options)?;
    let said = String::from_utf8_lossy(&output.stderr);
    let process = format!("process {} (", std::process::id());
    ensure!(output.status.code() == Some(1) && said.contains("--port 338: in use"), "{output:?}");
    ensure!(said.contains(&process) && said.contains("uid 0"), "{said}");
    ensure!(!site.rules()?.contains("kirsa"), "rules lead to the stranger: {}", site.rules()?);
    Ok(())
}

#[test]
fn an_unprivileged_port_works_with_a_warning() -> Result<()> {
    let mut site = Site::new("nft")?;
    site.set_flag("--port", "8181");
    let agent = site.start()?;
    agent.wait_for_log(|entry| {
        entry["message"].as_str().is_some_and(|said| said.contains("any hostNetwork process can listen on port 8181"))
    })?;
    ensure!(site.pods[0].imds().role_list()?.status == 200);
    agent.stop()
}
