//! Other agents for the metadata address: by the rules that they left, and by what listens.
//!
//! kube2iam and kiam each append one rule to iptables' nat table. kube2iam leaves it behind when it is removed, and kiam
//! when it is killed or was told to (`--iptables-remove=false`).

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
    // A tool that is not here wrote no rules here, most likely; one that fails hides some.
    let unread = set.unread.iter().map(|(_, why)| why.as_str()).filter(|why| !why.ends_with("not found"));
    let unread = unread.collect::<Vec<_>>().join("; ");
    if !unread.is_empty() {
        let detail = format!("rules that could not be read: {unread}");
        findings.push(Finding::skipped(CHECK, detail).with_fix("run this command on the node itself, as root"));
    } else if findings.is_empty() {
        findings.push(Finding::ok(CHECK, "nobody else has rules for, or listens on, the metadata address"));
    }
    findings
}

fn by_rules(config: &Config, set: &Ruleset) -> Vec<Finding> {
    let mut findings = Vec::new();
    for (place, rule) in set.rules.iter().enumerate() {
        // What filters after the redirect, as AWS's hardening guides have it, only sees what we drop as well.
        if is_ours(rule) || !names_metadata(&rule.text) || matches!(hook(set, rule), "output" | "postrouting") {
            continue;
        }
        let what = format!("{} {} chain {}: {}", rule.family, rule.table, rule.chain, shown(rule));
        if translates(rule) && config.intercept == Backend::None {
            findings.push(Finding::ok(CHECK, format!("--intercept none, and a redirect of somebody else's: {what}")));
        } else if translates(rule) {
            let fix = format!("remove that agent (kube2iam, kiam, …), and then what it left: {}", rule.removal);
            findings.push(if comes_first(set, rule, place) {
                Finding::failed(CHECK, format!("somebody else's redirect comes before ours: {what}"), fix)
            } else {
                let detail = format!("somebody else's redirect, which takes over where ours is missing: {what}");
                Finding::warning(CHECK, detail, fix)
            });
        } else if hook(set, rule) == "prerouting" && drops(rule) {
            let fix = format!("it may drop pods' connections before the redirect sees them: {}", rule.removal);
            findings.push(Finding::warning(CHECK, what, fix));
        }
    }
    findings
}

pub(super) fn names_metadata(text: &str) -> bool {
    let names = |address: String| {
        // Not as the beginning of a longer address.
        let longer = |at: usize| text[at + address.len()..].starts_with(|c: char| c.is_ascii_hexdigit() || c == '.');
        text.match_indices(&address).any(|(at, _)| !longer(at))
    };
    names(METADATA_V4.to_string()) || names(METADATA_V6.to_string())
}

fn translates(rule: &Rule) -> bool {
    match rule.tool {
        Tool::Iptables => ["-j DNAT", "-j REDIRECT", "-j TPROXY"].iter().any(|target| rule.text.contains(target)),
        Tool::Nft => rule.statements.iter().any(|statement| {
            ["dnat", "redirect", "tproxy"].iter().any(|kind| statement.get(kind).is_some())
                || matches!(statement["xt"]["name"].as_str(), Some("DNAT" | "REDIRECT" | "TPROXY"))
        }),
    }
}

/// Whether it decides before our rules do.
fn comes_first(set: &Ruleset, rule: &Rule, place: usize) -> bool {
    // Not the guard of bridge ports, which has a chain there too.
    let is_redirect = |chain: &&Chain| chain.table == TABLE && chain.hook == "prerouting" && chain.kind == "nat";
    let own = set.chains.iter().find(is_redirect);
    let base = base(set, rule).map(|chain| chain.priority);
    if let Some(own) = own {
        return base.is_some_and(|priority| priority < own.priority);
    }
    let (table, builtin, chain) = CHAINS[0];
    let jump = |other: &Rule| other.family == rule.family && other.text == format!("{builtin} -j {chain}");
    match set.rules.iter().position(jump) {
        Some(ours) if rule.table == table && rule.chain == builtin => place < ours,
        Some(_) => base.is_some_and(|priority| priority < IPTABLES_NAT),
        None => true,
    }
}

fn base<'a>(set: &'a Ruleset, rule: &Rule) -> Option<&'a Chain> {
    let place = (&rule.family, &rule.table, &rule.chain);
    set.chains.iter().find(|chain| (&chain.family, &chain.table, &chain.name) == place)
}

/// Where its chain is hooked in; empty for a chain that others jump to.
fn hook<'a>(set: &'a Ruleset, rule: &Rule) -> &'a str {
    match (base(set, rule), rule.chain.as_str()) {
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

/// A rule of nft is JSON, for programs; its handle is what a person finds it by.
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
    const NOTHING: &str = r#"{"nftables": []}"#;

    fn first(order: [&str; 2]) -> bool {
        let set = Ruleset::sample(&format!("*nat\n-A {}\n-A {}\n", order[0], order[1]), NOTHING);
        let place = set.rules.iter().position(translates).unwrap();
        comes_first(&set, &set.rules[place], place)
    }

    #[test]
    fn of_two_iptables_rules_the_first_decides() {
        assert!(first([KUBE2IAM, OURS]) && !first([OURS, KUBE2IAM]));
        assert!(first([KUBE2IAM, "OUTPUT -j ACCEPT"]), "without ours, theirs");
    }

    #[test]
    fn of_two_nft_chains_the_smaller_priority_decides() {
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
            assert_eq!(comes_first(&set, &set.rules[0], 0), expected);
            assert_eq!(set.rules[0].removal, "nft delete rule inet other prerouting handle 7");
        }
    }

    #[test]
    fn a_longer_address_is_another_one() {
        assert!(names_metadata("-d 169.254.169.254/32") && names_metadata("\"fd00:ec2::254\""));
        assert!(!names_metadata("-d fd00:ec2::2541/128"));
    }
}
