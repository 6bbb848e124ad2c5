//! Finds other agents for the metadata address, by their rules and their listening sockets.
//!
//! kube2iam and kiam each append one rule to the iptables nat table. kube2iam never removes its rule; kiam leaves it
//! behind when it is killed or runs with `--iptables-remove=false`.

use super::{
    finding::Finding,
    listeners,
    rules::{IPTABLES_NAT, is_ours},
    ruleset::{Chain, Rule, Ruleset, Tool},
};
use crate::{
    config::Config,
    intercept::{
        Backend, METADATA_V4, METADATA_V6,
        rule::{CHAINS, TABLE},
    },
};

pub(super) const CHECK: &str = "other-agents";

pub(super) fn check(config: &Config, set: &Ruleset) -> Vec<Finding> {
    let mut findings = by_rules(config, set);
    findings.extend(listeners::check(config.container_audience.is_some()));
    // A tool that is not installed probably wrote no rules, but one that fails may hide some.
    let unread = set.unread.iter().map(|(_, why)| why.as_str()).filter(|why| !why.ends_with("not found"));
    let unread = unread.collect::<Vec<_>>().join("; ");
    if !unread.is_empty() {
        let detail = format!("some rules could not be read: {unread}");
        findings.push(Finding::skipped(CHECK, detail).with_fix("run this command on the node itself, as root"));
    } else if findings.is_empty() {
        findings.push(Finding::ok(CHECK, "no other agent has rules for the metadata address or listens on it"));
    }
    findings
}

fn by_rules(config: &Config, set: &Ruleset) -> Vec<Finding> {
    let mut findings = Vec::new();
    for (index, rule) in set.rules.iter().enumerate() {
        // Filters behind the redirect, as in AWS's hardening guides, only match packets that kirsa drops too.
        if is_ours(rule) || !names_metadata(&rule.text) || matches!(hook(set, rule), "output" | "postrouting") {
            continue;
        }
        let what = format!("{} {} chain {}: {}", rule.family, rule.table, rule.chain, shown(rule));
        if translates(rule) && config.intercept == Backend::None {
            findings.push(Finding::ok(CHECK, format!("--intercept none, and another redirect exists: {what}")));
        } else if translates(rule) {
            let fix = format!("remove that agent (kube2iam, kiam, …), then delete its rule: {}", rule.removal);
            findings.push(if takes_precedence(set, rule, index) {
                Finding::failed(CHECK, format!("another redirect comes before kirsa's: {what}"), fix)
            } else {
                let detail = format!("another redirect takes over when kirsa's is missing: {what}");
                Finding::warning(CHECK, detail, fix)
            });
        } else if hook(set, rule) == "prerouting" && drops(rule) {
            let detail = format!("a rule may drop pods' connections before the redirect: {what}");
            findings.push(Finding::warning(CHECK, detail, format!("remove the rule: {}", rule.removal)));
        }
    }
    findings
}

pub(super) fn names_metadata(text: &str) -> bool {
    let contains = |address: String| {
        // A match may be the prefix of a longer address.
        let is_prefix = |at: usize| text[at + address.len()..].starts_with(|c: char| c.is_ascii_hexdigit() || c == '.');
        text.match_indices(&address).any(|(at, _)| !is_prefix(at))
    };
    contains(METADATA_V4.to_string()) || contains(METADATA_V6.to_string())
}

/// Whether the rule rewrites the destination of a connection.
fn translates(rule: &Rule) -> bool {
    match rule.tool {
        Tool::Iptables => ["-j DNAT", "-j REDIRECT", "-j TPROXY"].iter().any(|target| rule.text.contains(target)),
        Tool::Nft => rule.statements.iter().any(|statement| {
            ["dnat", "redirect", "tproxy"].iter().any(|kind| statement.get(kind).is_some())
                || matches!(statement["xt"]["name"].as_str(), Some("DNAT" | "REDIRECT" | "TPROXY"))
        }),
    }
}

/// Whether the rule at this index is evaluated before kirsa's redirect.
fn takes_precedence(set: &Ruleset, rule: &Rule, index: usize) -> bool {
    // The bridge guard also has a prerouting chain, of kind filter.
    let is_redirect = |chain: &&Chain| chain.table == TABLE && chain.hook == "prerouting" && chain.kind == "nat";
    let own = set.chains.iter().find(is_redirect);
    let base = base_chain(set, rule).map(|chain| chain.priority);
    if let Some(own) = own {
        return base.is_some_and(|priority| priority < own.priority);
    }
    let (table, builtin, chain) = CHAINS[0];
    let jump = |other: &Rule| other.family == rule.family && other.text == format!("{builtin} -j {chain}");
    match set.rules.iter().position(jump) {
        Some(ours) if rule.table == table && rule.chain == builtin => index < ours,
        Some(_) => base.is_some_and(|priority| priority < IPTABLES_NAT),
        None => true,
    }
}

fn base_chain<'a>(set: &'a Ruleset, rule: &Rule) -> Option<&'a Chain> {
    let chain_of_rule = (&rule.family, &rule.table, &rule.chain);
    set.chains.iter().find(|chain| (&chain.family, &chain.table, &chain.name) == chain_of_rule)
}

/// Returns the netfilter hook of the rule's chain, or an empty string if it is not a base chain.
fn hook<'a>(set: &'a Ruleset, rule: &Rule) -> &'a str {
    match (base_chain(set, rule), rule.chain.as_str()) {
        (Some(chain), _) => &chain.hook,
        (None, "PREROUTING") => "prerouting",
        (None, "OUTPUT") => "output",
        (None, "POSTROUTING") => "postrouting",
        _ => "",
    }
}

fn drops(rule: &Rule) -> bool {
    let statement = |kind: &str| rule.statements.iter().any(|statement| statement.get(kind).is_some());
    statement("drop") || statement("reject") || rule.text.contains("-j DROP") || rule.text.contains("-j REJECT")
}

/// Returns the text of an iptables rule, or the handle of an nft rule, whose text is JSON.
fn shown(rule: &Rule) -> &str {
    match rule.tool {
        Tool::Iptables => &rule.text,
        Tool::Nft => rule.removal.find("handle").map_or("", |at| &rule.removal[at..]),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const KUBE2IAM: &str =
        "PREROUTING -d 169.254.169.254/32 -i eth0 -p tcp -m tcp --dport 80 -j DNAT --to-destination 10.0.0.1:8181";
    const OURS: &str = "PREROUTING -j KIRSA-PREROUTING";
    const EMPTY: &str = r#"{"nftables": []}"#;

    fn is_first(order: [&str; 2]) -> bool {
        let set = Ruleset::sample(&format!("*nat\n-A {}\n-A {}\n", order[0], order[1]), EMPTY);
        let index = set.rules.iter().position(translates).unwrap();
        takes_precedence(&set, &set.rules[index], index)
    }

    #[test]
    fn first_iptables_rule_takes_precedence() {
        assert!(is_first([KUBE2IAM, OURS]) && !is_first([OURS, KUBE2IAM]));
        assert!(is_first([KUBE2IAM, "OUTPUT -j ACCEPT"]), "kirsa has no rule");
    }

    #[test]
    fn lower_nft_priority_takes_precedence() {
        let chain = |table: &str, priority: i32| {
            format!(
                r#"{{"chain": {{"family": "inet", "table": "{table}", "name": "prerouting", "type": "nat",
                    "hook": "prerouting", "prio": {priority}}}}}"#
            )
        };
        let rule = r#"{"rule": {"family": "inet", "table": "other", "chain": "prerouting", "handle": 7, "expr": [
            {"match": {"right": "169.254.169.254"}}, {"dnat": {"addr": "10.0.0.1", "port": 80}}]}}"#;
        for (priority, expected) in [(-120, true), (-100, false)] {
            let (ours, theirs) = (chain("kirsa", -110), chain("other", priority));
            let guard = chain("kirsa", -310).replace("inet", "bridge").replace("\"nat\"", "\"filter\"");
            let set = Ruleset::sample("", &format!(r#"{{"nftables": [{guard}, {ours}, {theirs}, {rule}]}}"#));
            assert!(names_metadata(&set.rules[0].text) && translates(&set.rules[0]));
            assert_eq!(takes_precedence(&set, &set.rules[0], 0), expected);
            assert_eq!(set.rules[0].removal, "nft delete rule inet other prerouting handle 7");
        }
    }

    #[test]
    fn longer_address_does_not_match() {
        assert!(names_metadata("-d 169.254.169.254/32") && names_metadata("\"fd00:ec2::254\""));
        assert!(!names_metadata("-d fd00:ec2::2541/128"));
    }
}
