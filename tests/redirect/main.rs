//! Interception, through the real binary and real rules: a pod's connection to the metadata address reaches the agent
//! or nobody, in every shape of pod network, with nft and with iptables, over IPv4 and IPv6.

mod addresses;
mod site;

use std::io::ErrorKind;
use std::net::{IpAddr, TcpStream};
use std::thread;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use lab::agent::{Agent, Options};
use lab::http::Client;
use lab::imds::Instance;
use lab::net::{Pod, Shape};
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

with_nft_and_iptables! {
    pods_of_every_shape_are_redirected_attributed_and_answered,
    the_nodes_own_traffic_is_left_alone,
    what_leads_around_the_redirect_is_dropped,
    a_direct_connection_is_not_attributed,
    the_rules_are_the_same_after_a_restart_and_gone_after_uninstall,
    a_killed_agent_leaves_its_rules_and_pods_are_refused_at_once,
    rules_that_somebody_removed_come_back,
}

/// What is dropped never answers, so this is spent in full.
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

fn what_leads_around_the_redirect_is_dropped(backend: &'static str) -> Result<()> {
    let site = Site::new(backend)?;
    let agent = site.start()?;
    let dropped = |port| {
        thread::scope(|scope| {
            let attempt = |pod: &Pod, target| {
                let kind = error_kind(pod.netns().connect(target, NEVER));
                ensure!(kind == Some(ErrorKind::TimedOut), "{:?} to {target}: {kind:?}", pod.shape());
                Ok(())
            };
            let pairs =
                site.pods.iter().flat_map(|pod| site.targets(port).into_iter().map(move |target| (pod, target)));
            let attempts: Vec<_> = pairs.map(|(pod, target)| scope.spawn(move || attempt(pod, target))).collect();
            attempts.into_iter().try_for_each(|attempt| attempt.join().unwrap())
        })
    };
    dropped(8080)?;
    // Nobody is left to put it back.
    agent.kill()?;
    site.remove_redirect()?;
    dropped(80)?;
    site.no_pod_got_outside()?;
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
        agent.metric("kirsa_redirect_repaired_total", &[]).is_ok_and(|count| count == 1.0).then_some(())
    })?;
    ensure!(site.pods[0].imds().role_list()?.status == 200);
    site.no_pod_got_outside()?;
    agent.stop()
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
