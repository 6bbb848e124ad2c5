//! Checks that kirsa's own rules are complete and that no other address translation comes before them.

use std::{net::IpAddr, path::Path};

use super::{
    finding::Finding,
    ruleset::{Rule, Ruleset, Tool},
};
use crate::{
    config::Config,
    intercept::{
        Backend, METADATA_V4, METADATA_V6,
        rule::{CHAINS, TABLE},
    },
};

const RULES: &str = "rules";
const DROP: &str = "forwarding-drop";
/// Indices into [`CHAINS`].
const FORWARD: usize = 2;
const POSTROUTING: usize = 3;
const FIRST: &str = "rules-first";
/// Priority of the iptables nat table, in its nft and legacy variants.
pub(super) const IPTABLES_NAT: i64 = -100;

pub(super) fn check(config: &Config, set: &Ruleset) -> Vec<Finding> {
    let ours: Vec<&Rule> = set.rules.iter().filter(|rule| is_ours(rule)).collect();
    if config.intercept == Backend::None {
        return vec![match ours.first() {
            None => Finding::skipped(RULES, "--intercept none: kirsa does not own the redirect"),
            Some(rule) => Finding::warning(
                RULES,
                format!("--intercept none, but kirsa's rules exist, such as in chain {}", rule.chain),
                "run kirsa uninstall --intercept auto: an agent with another --intercept left them behind",
            ),
        }];
    }
    let addresses: Vec<IpAddr> = config.host.iter().collect();
    let missing: Vec<String> = addresses
        .iter()
        .filter(|host| !ours.iter().any(|rule| redirects(rule, **host, config.port)) || !jumped_to(&ours, 0, **host))
        .map(|host| format!("no rule redirects to {host} port {}", config.port))
        .collect();
    let metadata: &[IpAddr] = &[METADATA_V4.into(), METADATA_V6.into()];
    let families = if Path::new("/proc/sys/net/ipv6").exists() { 2 } else { 1 };
    let mut unblocked = Vec::new();
    for address in &metadata[..families] {
        for (chain, verb) in [(FORWARD, "rejects packets forwarded"), (POSTROUTING, "drops packets leaving the node")] {
            if !ours.iter().any(|rule| blocks(rule, chain, *address)) || !jumped_to(&ours, chain, *address) {
                unblocked.push(format!("no rule {verb} to {address} port 80"));
            }
        }
    }
    let kind = if ours.iter().any(|rule| rule.tool == Tool::Nft) { "nftables" } else { "iptables" };
    let mut findings = vec![
        judge(
            config,
            set,
            RULES,
            &missing,
            format!("{kind}: pods' connections are redirected to {}", join(&addresses)),
        ),
        judge(config, set, DROP, &unblocked, format!("{kind}: packets that bypass the redirect are blocked")),
    ];
    if missing.is_empty() {
        findings.push(check_precedence(set, kind));
    }
    findings
}

fn judge(config: &Config, set: &Ruleset, check: &'static str, missing: &[String], complete: String) -> Finding {
    let mut unread = set.unread.iter().filter(|(tool, _)| match config.intercept {
        Backend::Nft => *tool == Tool::Nft,
        Backend::Iptables => *tool == Tool::Iptables,
        Backend::Auto | Backend::None => true,
    });
    match (missing, unread.next()) {
        ([], _) => Finding::ok(check, complete),
        (_, Some((_, why))) => {
            Finding::skipped(check, format!("rules seem to be missing, but not all were read: {why}"))
        }
        (missing, None) => Finding::failed(
            check,
            missing.join("; "),
            "start the agent, which restores its rules within 2 s; if they stay missing, check its log; if they \
             disappear repeatedly, find what flushes rule sets (a firewall service, a reloading CNI plugin)",
        ),
    }
}

/// Checks that no other nat chain comes before kirsa's. The first one that matches a connection translates it.
fn check_precedence(set: &Ruleset, kind: &str) -> Finding {
    let nat = || set.chains.iter().filter(|chain| chain.kind == "nat" && chain.hook == "prerouting");
    let own = nat().find(|chain| chain.table == TABLE).map(|chain| chain.priority);
    let own = own.filter(|_| kind == "nftables").unwrap_or(IPTABLES_NAT);
    let has_rules = |family: &str, table: &str, name: &str| {
        set.rules.iter().any(|rule| rule.family == family && rule.table == table && rule.chain == name)
    };
    let earlier: Vec<String> = nat()
        .filter(|chain| chain.priority < own && has_rules(&chain.family, &chain.table, &chain.name))
        .map(|chain| format!("{} {} chain {} (priority {})", chain.family, chain.table, chain.name, chain.priority))
        .collect();
    if earlier.is_empty() {
        return Finding::ok(FIRST, format!("no address translation comes before kirsa's (priority {own})"));
    }
    Finding::warning(
        FIRST,
        format!("address translation before kirsa's (priority {own}): {}", earlier.join(", ")),
        "check that none of its rules matches connections to the metadata address: the first match wins",
    )
}

pub(super) fn is_ours(rule: &Rule) -> bool {
    match rule.tool {
        Tool::Nft => rule.table == TABLE,
        Tool::Iptables => {
            CHAINS.iter().any(|(.., own)| rule.chain == *own || rule.text.ends_with(&format!("-j {own}")))
        }
    }
}

fn redirects(rule: &Rule, host: IpAddr, port: u16) -> bool {
    match rule.tool {
        Tool::Nft => {
            let leads_here = |statement: &serde_json::Value| {
                let (address, to) = (statement["dnat"]["addr"].as_str(), statement["dnat"]["port"].as_u64());
                address.and_then(|address| address.parse().ok()) == Some(host) && to == Some(port.into())
            };
            rule.chain == "prerouting" && rule.statements.iter().any(leads_here)
        }
        Tool::Iptables => {
            let target = std::net::SocketAddr::new(host, port).to_string();
            rule.chain == CHAINS[0].2 && rule.text.split(' ').any(|word| word == target)
        }
    }
}

/// Whether the rule belongs to this chain of [`CHAINS`] and blocks packets to the metadata address.
fn blocks(rule: &Rule, chain: usize, metadata: IpAddr) -> bool {
    let (_, builtin, own) = CHAINS[chain];
    let (name, blocks) = match rule.tool {
        Tool::Nft => {
            let has = |verdict: &str| rule.statements.iter().any(|statement| statement.get(verdict).is_some());
            (builtin.to_lowercase(), has("reject") || has("drop"))
        }
        Tool::Iptables => (own.to_owned(), rule.text.contains("-j REJECT") || rule.text.ends_with("-j DROP")),
    };
    rule.chain == name && blocks && rule.text.contains(&metadata.to_string())
}

/// Whether packets reach this chain of [`CHAINS`]: an nftables chain has its own hook, an iptables chain needs a jump.
fn jumped_to(ours: &[&Rule], chain: usize, address: IpAddr) -> bool {
    let (table, builtin, own) = CHAINS[chain];
    let family = if address.is_ipv4() { "ip" } else { "ip6" };
    let jump =
        |rule: &&Rule| rule.family == family && rule.table == table && rule.text == format!("{builtin} -j {own}");
    ours.iter().any(|rule| rule.tool == Tool::Nft || jump(rule))
}

fn join(addresses: &[IpAddr]) -> String {
    addresses.iter().map(IpAddr::to_string).collect::<Vec<_>>().join(" and ")
}
