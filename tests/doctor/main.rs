//! `kirsa doctor` on real nodes: healthy parts pass, and each broken part is reported with a fix.

mod kubernetes;
mod report;

use anyhow::{Result, ensure};
use lab::agent::{Agent, Options};
use lab::imds::Hit;
use lab::namespace::BASE;
use lab::site::Site;
use lab::sts::{Effect, Fault};

use report::{Report, doctor, doctor_text};

lab::enter!();

/// Starts an agent on a node with a pod `reader` that has a role, and has credentials if there is a redirect.
fn site(backend: &str) -> Result<(Site, Agent)> {
    let mut site = Site::new(env!("CARGO_BIN_EXE_kirsa"))?;
    site.options = site.options.clone().flag("--intercept", backend);
    let pod = site.pod_with_role("reader")?;
    let agent = site.start()?;
    ensure!(backend == "none" || pod.imds().credentials("reader-role")?.status == 200);
    Ok((site, agent))
}

fn families(site: &Site) -> &'static [&'static str] {
    if site.node.host_ip6().is_some() { &["redirect-ipv4", "redirect-ipv6"] } else { &["redirect-ipv4"] }
}

fn healthy_node_passes(backend: &str) -> Result<()> {
    let (site, agent) = site(backend)?;
    let report = doctor(&site.node, &site.options)?;
    let passing =
        ["agent", "agent-repairs", "rules", "rules-first", "forwarding-drop", "port", "other-agents", "state-dir"];
    let routes = ["policy-routing", "interface-routes", "egress-ipv4", "bridge-ports"];
    let passing = passing.iter().chain(&routes).chain(families(&site));
    let passing = passing.chain(&["sts", "clock-sts", "pods", "token", "issuer", "exchange"]);
    for check in passing {
        ensure!(report.verdicts(check) == ["ok"], "{check}: {report:#?}");
    }
    ensure!(report.one("exchange")?.detail.contains("default/reader"), "{report:#?}");
    for check in ["hop-limit", "api-server"] {
        ensure!(report.verdicts(check) == ["skipped"], "{check}: {report:#?}");
    }
    // Root in this namespace has every capability; the agent needs two.
    ensure!(report.one("capabilities")?.verdict == "warning");
    ensure!(report.code == 0 && report.verdict == "warning", "{report:#?}");
    ensure!(agent.metric("kirsa_redirect_repaired_total", &[])? == 0.0, "the doctor changes nothing");
    site.no_pod_got_outside()?;
    agent.stop()
}

#[test]
fn healthy_node_passes_with_nft() -> Result<()> {
    healthy_node_passes("nft")
}

#[test]
fn healthy_node_passes_with_iptables() -> Result<()> {
    healthy_node_passes("iptables")
}

#[test]
fn text_output_is_aligned_and_shows_no_secret() -> Result<()> {
    let (site, agent) = site("nft")?;
    let (code, text) = doctor_text(&site.node, &site.options)?;
    ensure!(code == 0 && text.contains("\nok       redirect-ipv4    "), "{text}");
    ensure!(
        text.contains("\nskipped  hop-limit        ") && text.contains("→ set HttpPutResponseHopLimit=1"),
        "{text}"
    );
    ensure!(text.lines().last().is_some_and(|line| line.starts_with("0 failed, 1 warning, ")), "{text}");
    ensure!(!text.contains('\x1b'), "color without a terminal");
    let token = std::fs::read_to_string(site.node.state().join("reader.jwt"))?;
    ensure!(!text.contains(&token) && !text.contains("ASIA") && !text.contains("eyJ"), "{text}");
    agent.stop()
}

#[test]
fn stopped_agent_and_missing_redirect_differ() -> Result<()> {
    let (site, agent) = site("nft")?;
    agent.kill()?;
    let report = doctor(&site.node, &site.options)?;
    site.no_pod_got_outside()?;
    let before = site.hits();
    ensure!(report.code == 1 && report.verdicts("agent") == ["failed"], "{report:#?}");
    ensure!(report.verdicts("rules") == ["ok"], "{report:#?}");
    for check in families(&site) {
        let finding = report.failed(check)?;
        ensure!(finding.detail.contains("does not listen on port 338"), "{finding:?}");
    }

    site.node.netns().shell("nft flush ruleset")?;
    let report = doctor(&site.node, &site.options)?;
    ensure!(report.code == 1, "{report:#?}");
    for check in families(&site) {
        let finding = report.failed(check)?;
        ensure!(finding.detail.contains("EC2ws") && finding.fix.contains("applies the redirect"), "{finding:?}");
    }
    ensure!(report.failed("rules")?.fix.contains("flushes"), "{report:#?}");
    ensure!(report.failed("forwarding-drop")?.detail.contains("169.254.169.254"), "{report:#?}");
    ensure!(report.verdicts("policy-routing") == ["ok"], "a flush of rule sets keeps it: {report:#?}");
    // Without the redirect, the doctor's own requests reach the real metadata service.
    let (by_doctor, others): (Vec<_>, Vec<_>) = site.hits().into_iter().partition(|hit| hit.path == "/");
    let is_from_node = |hit: &Hit| hit.method == "GET" && site.node.host_ips().contains(&hit.from.ip());
    ensure!(by_doctor.iter().all(is_from_node) && others == before, "{by_doctor:?} {others:?}");
    Ok(())
}

#[test]
fn missing_policy_routing_is_listed() -> Result<()> {
    let (site, agent) = site("nft")?;
    agent.stop()?;
    site.node.netns().shell("ip rule del pref 6")?;
    let report = doctor(&site.node, &site.options)?;
    let rule = "missing rules: ip -4 rule add pref 6 to 169.254.169.254 ipproto tcp dport 80 prohibit";
    ensure!(report.failed("policy-routing")?.detail == rule, "{report:#?}");
    site.node.netns().shell(rule.trim_start_matches("missing rules: "))?;
    ensure!(doctor(&site.node, &site.options)?.verdicts("policy-routing") == ["ok"]);
    Ok(())
}

#[test]
fn emptied_iptables_mangle_chain_is_found() -> Result<()> {
    let (site, agent) = site("iptables")?;
    agent.kill()?;
    site.node.netns().shell("iptables -t mangle -F KIRSA-POSTROUTING")?;
    let report = doctor(&site.node, &site.options)?;
    let detail = &report.failed("forwarding-drop")?.detail;
    ensure!(detail == "no rule drops packets leaving the node to 169.254.169.254 port 80", "{report:#?}");
    Ok(())
}

const KUBE2IAM: &str = "-i eth0 -d 169.254.169.254/32 -p tcp --dport 80 -j DNAT --to-destination 10.0.0.1:8181";

#[test]
fn leftover_kube2iam_rule_is_found_and_removable() -> Result<()> {
    let (site, agent) = site("nft")?;
    site.node.netns().shell(&format!("iptables -t nat -A PREROUTING {KUBE2IAM}"))?;
    let report = doctor(&site.node, &site.options)?;
    let finding = report.one("other-agents")?;
    ensure!(finding.verdict == "warning" && finding.detail.contains("10.0.0.1:8181"), "{finding:?}");
    ensure!(report.code == 0, "kirsa's redirect takes precedence: {report:#?}");
    let (_, command) = finding.fix.split_once("delete its rule: ").unwrap_or_default();
    site.node.netns().shell(command)?;
    ensure!(doctor(&site.node, &site.options)?.verdicts("other-agents") == ["ok"], "{command}");
    agent.stop()
}

#[test]
fn foreign_redirect_with_precedence_fails() -> Result<()> {
    let (in_chain, agent) = site("iptables")?;
    in_chain.node.netns().shell(&format!("iptables -t nat -I PREROUTING 1 {KUBE2IAM}"))?;
    let report = doctor(&in_chain.node, &in_chain.options)?;
    ensure!(report.code == 1 && report.failed("other-agents")?.fix.contains("iptables"), "{report:#?}");
    agent.stop()?;

    let (in_hook, agent) = site("nft")?;
    in_hook.node.netns().shell(
        "nft 'table ip other { chain early { type nat hook prerouting priority -150; \
         ip daddr 169.254.169.254 tcp dport 80 dnat to 10.0.0.1:8181; }; }'",
    )?;
    let report = doctor(&in_hook.node, &in_hook.options)?;
    let finding = report.failed("other-agents")?;
    ensure!(finding.fix.contains("nft delete rule ip other early handle"), "{finding:?}");
    ensure!(report.one("rules-first")?.detail.contains("ip other chain early (priority -150)"), "{report:#?}");
    ensure!(report.verdicts("redirect-ipv4") == ["ok"], "connections of the node do not pass that chain");
    agent.stop()
}

#[test]
fn bridges_without_records_are_named() -> Result<()> {
    let (site, agent) = site("nft")?;
    let _pod = site.node.pod("neighbor", lab::net::Shape::Bridge)?;
    let finding = doctor(&site.node, &site.options)?;
    let finding = finding.one("bridge-ports")?;
    ensure!(finding.verdict == "skipped" && finding.detail.contains("no port of cni0 is guarded"), "{finding:?}");
    ensure!(finding.fix.contains("NET_RAW"), "{finding:?}");
    agent.stop()
}

/// Sets up what EKS has with security groups for pods in strict mode, and in IPv6 clusters.
#[test]
fn pods_that_bypass_the_redirect_warn() -> Result<()> {
    let (site, agent) = site("nft")?;
    site.node.netns().shell(
        "ip rule add pref 10 iif vlan.eth.1 lookup 101; ip -6 rule add pref 10 iif vlan0123456789a lookup 101; \
         ip rule add pref 20 iif mgmt lookup 101; ip addr add 169.254.172.1/32 dev mgmt",
    )?;
    let report = doctor(&site.node, &site.options)?;
    let routes = report.one("interface-routes")?;
    ensure!(routes.verdict == "warning" && routes.fix.contains("ENFORCING_MODE=standard"), "{routes:?}");
    ensure!(
        routes.detail.contains("iif vlan.eth.1 lookup 101") && routes.detail.contains("iif vlan0123456789a lookup 101"),
        "{routes:?}"
    );
    ensure!(!routes.detail.contains("iif mgmt"), "{routes:?}");
    let egress = report.one("egress-ipv4")?;
    ensure!(egress.detail.contains("169.254.172.1 on mgmt") && egress.fix.contains("ENDPOINT_MODE=IPv6"), "{egress:?}");
    ensure!(report.code == 0, "{report:#?}");
    agent.stop()
}

#[test]
fn eks_pod_identity_agent_may_stay() -> Result<()> {
    let (site, agent) = site("nft")?;
    site.node.netns().ip(["addr add 169.254.170.23/32 dev lo"])?;
    let _listener = site.node.listen(([169, 254, 170, 23], 80).into())?;
    let report = doctor(&site.node, &site.options)?;
    let finding = report.one("other-agents")?;
    ensure!(finding.verdict == "warning" && finding.fix.contains("may stay"), "{finding:?}");
    ensure!(report.code == 0, "{report:#?}");
    agent.stop()
}

#[test]
fn unreachable_sts_fails() -> Result<()> {
    let (site, agent) = site("nft")?;
    let unreachable = Options::new(env!("CARGO_BIN_EXE_kirsa"))
        .flag("--workloads", site.workloads())
        .flag("--sts-endpoint-url", format!("http://{BASE}:1"));
    let report = doctor(&site.node, &unreachable)?;
    let finding = report.failed("sts")?;
    ensure!(report.code == 1 && finding.detail.contains("refused") && finding.fix.contains("resolver"), "{finding:?}");
    ensure!(report.verdicts("exchange").is_empty() && report.verdicts("token") == ["ok"], "{report:#?}");

    site.sts.inject(Fault::always(Effect::Status(503)));
    ensure!(doctor(&site.node, &site.options)?.failed("sts")?.detail.contains("503"));
    agent.stop()
}

#[test]
fn sts_error_for_a_real_token_has_a_fix() -> Result<()> {
    let (site, agent) = site("nft")?;
    site.sts.remove_role(&site.arn("reader"));
    let report = doctor(&site.node, &site.options)?;
    let finding = report.failed("exchange")?;
    ensure!(finding.detail.contains("AccessDenied") && finding.fix.contains("trust policy"), "{finding:?}");
    let no_exchange = Report::of(Agent::doctor(&site.node, &site.options, &["--no-exchange", "--output", "json"])?)?;
    ensure!(no_exchange.code == 0 && no_exchange.verdicts("exchange").is_empty(), "{no_exchange:#?}");

    let expired = site.issuer.expired(&lab::issuer::subject("default", "reader"))?;
    site.write_token("reader", expired)?;
    ensure!(doctor(&site.node, &site.options)?.failed("token")?.detail.contains("expired"));
    agent.stop()
}

#[test]
fn custom_redirect_is_skipped() -> Result<()> {
    let (site, agent) = site("none")?;
    site.node.netns().shell(&format!("iptables -t nat -A PREROUTING {KUBE2IAM}"))?;
    let report = doctor(&site.node, &site.options)?;
    ensure!(report.verdicts("redirect") == ["skipped"] && report.verdicts("rules") == ["skipped"], "{report:#?}");
    ensure!(report.one("other-agents")?.verdict == "ok", "{report:#?}");
    ensure!(
        report.one("capabilities")?.detail.contains("CAP_NET_BIND_SERVICE is granted") && report.code == 0,
        "{report:#?}"
    );
    agent.stop()
}

#[test]
fn repaired_redirect_warns() -> Result<()> {
    let (site, agent) = site("nft")?;
    site.node.netns().shell("nft delete table inet kirsa")?;
    lab::poll::poll("the repair", std::time::Duration::from_secs(20), || {
        agent.metric("kirsa_redirect_repaired_total", &[]).is_ok_and(|count| count == 1.0).then_some(())
    })?;
    agent.wait_ready()?;
    let report = doctor(&site.node, &site.options)?;
    ensure!(report.one("agent-repairs")?.verdict == "warning" && report.code == 0, "{report:#?}");
    agent.stop()
}

#[test]
fn invalid_workloads_file_fails() -> Result<()> {
    let (site, agent) = site("nft")?;
    std::fs::write(site.workloads(), "workloads: [{pod: reader, addresses: []}]")?;
    let report = doctor(&site.node, &site.options)?;
    ensure!(report.code == 1 && report.failed("pods")?.detail.contains("has no address"), "{report:#?}");
    agent.stop()
}

#[test]
fn invalid_flag_exits_with_code_2() -> Result<()> {
    let (site, agent) = site("nft")?;
    let output = Agent::doctor(&site.node, &site.options, &["--session-duration", "900"])?;
    ensure!(output.status.code() == Some(2) && output.stdout.is_empty(), "{output:?}");
    agent.stop()
}
