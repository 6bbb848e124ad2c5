//! Our own rules: are they there, and does anything stand before them?

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
/// Places in [`CHAINS`].
const FORWARD: usize = 2;
const POSTROUTING: usize = 3;
const FIRST: &str = "rules-first";
/// Where iptables' nat table is hooked in, of either kind.
pub(super) const IPTABLES_NAT: i64 = -100;

pub(super) fn check(config: &Config, set: &Ruleset) -> Vec<Finding> {
    let ours: Vec<&Rule> = set.rules.iter().filter(|rule| is_ours(rule)).collect();
    if config.intercept == Backend::None {
        return vec![match ours.first() {
            None => Finding::skipped(RULES, "--intercept none: the redirect is somebody else's"),
            Some(rule) => Finding::warning(
                RULES,
                format!("--intercept none, and yet there are rules of ours, such as in chain {}", rule.chain),
                "they were left by an agent with another --intercept: kirsa uninstall --intercept auto",
            ),
        }];
    }
    let addresses: Vec<IpAddr> = config.host.iter().collect();
    let lost: Vec<String> = addresses
        .iter()
        .filter(|host| !ours.iter().any(|rule| redirects(rule, **host, config.port)) || !jumped_to(&ours, 0, **host))
        .map(|host| format!("none leads to {host} port {}", config.port))
        .collect();
    let metadata: &[IpAddr] = &[METADATA_V4.into(), METADATA_V6.into()];
    let families = if Path::new("/proc/sys/net/ipv6").exists() { 2 } else { 1 };
    let mut open = Vec::new();
    for address in &metadata[..families] {
        for (chain, verb) in [(FORWARD, "refuses what is forwarded"), (POSTROUTING, "drops what leaves the node")] {
            if !ours.iter().any(|rule| stops(rule, chain, *address)) || !jumped_to(&ours, chain, *address) {
                open.push(format!("nothing {verb} to {address} port 80"));
            }
        }
    }
    let kind = if ours.iter().any(|rule| rule.tool == Tool::Nft) { "nftables" } else { "iptables" };
    let mut findings = vec![
        verdict(config, set, RULES, &lost, format!("{kind}: pods' connections are led to {}", join(&addresses))),
        verdict(config, set, DROP, &open, format!("{kind}: what leads around the redirect is refused")),
    ];
    if lost.is_empty() {
        findings.push(first(set, kind));
    }
    findings
}

fn verdict(config: &Config, set: &Ruleset, check: &'static str, missing: &[String], fine: String) -> Finding {
    let mut unread = set.unread.iter().filter(|(tool, _)| match config.intercept {
        Backend::Nft => *tool == Tool::Nft,
        Backend::Iptables => *tool == Tool::Iptables,
        Backend::Auto | Backend::None => true,
    });
    match (missing, unread.next()) {
        ([], _) => Finding::ok(check, fine),
        (_, Some((_, why))) => {
            Finding::skipped(check, format!("no rules of ours are seen, but not all could be: {why}"))
        }
        (missing, None) => Finding::failed(
            check,
            missing.join("; "),
            "a running agent puts its rules back within 2 s: if they stay away, its log says why; if they go again and \
             again, find who flushes rule sets (a firewall service, a reloading CNI)",
        ),
    }
}

/// Whichever chain of a nat kind comes first decides.
fn first(set: &Ruleset, kind: &str) -> Finding {
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
        return Finding::ok(FIRST, format!("no address translation comes before ours (priority {own})"));
    }
    Finding::warning(
        FIRST,
        format!("address translation before ours (priority {own}): {}", earlier.join(", ")),
        "make sure that none of its rules takes connections to the metadata address: the first that matches decides",
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

/// Whether a rule of this place in [`CHAINS`] keeps packets from the metadata address.
fn stops(rule: &Rule, chain: usize, metadata: IpAddr) -> bool {
    let (_, builtin, own) = CHAINS[chain];
    let (name, stops) = match rule.tool {
        Tool::Nft => {
            let has = |verdict: &str| rule.statements.iter().any(|statement| statement.get(verdict).is_some());
            (builtin.to_lowercase(), has("reject") || has("drop"))
        }
        Tool::Iptables => (own.to_owned(), rule.text.contains("-j REJECT") || rule.text.ends_with("-j DROP")),
    };
    rule.chain == name && stops && rule.text.contains(&metadata.to_string())
}

/// nftables chains are hooked in by themselves; those of iptables need a jump.
fn jumped_to(ours: &[&Rule], chain: usize, of_family: IpAddr) -> bool {
    let (table, builtin, own) = CHAINS[chain];
    let family = if of_family.is_ipv4() { "ip" } else { "ip6" };
    let jump =
        |rule: &&Rule| rule.family == family && rule.table == table && rule.text == format!("{builtin} -j {own}");
    ours.iter().any(|rule| rule.tool == Tool::Nft || jump(rule))
}

fn join(addresses: &[IpAddr]) -> String {
    addresses.iter().map(IpAddr::to_string).collect::<Vec<_>>().join(" and ")
}
