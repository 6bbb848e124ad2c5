//! The rule sets of this node as the tools list them: to explain what is wrong and to find other agents, never to
//! decide whether the redirect works.
//!
//! nftables' own tables come as JSON from `nft`; what iptables wrote, of either kind, as text from `iptables-save`. None
//! of these commands loads a module or makes a table.

use std::{
    collections::HashSet,
    io::ErrorKind,
    process::{Command, Stdio},
};

use serde_json::Value;

/// Everything that could be read.
#[derive(Debug, Default)]
pub(super) struct Ruleset {
    pub rules: Vec<Rule>,
    pub chains: Vec<Chain>,
    /// What could not be, and why.
    pub unread: Vec<(Tool, String)>,
}

/// A base chain of nftables: where it is hooked in.
#[derive(Debug, Clone)]
pub(super) struct Chain {
    pub family: String,
    pub table: String,
    pub name: String,
    pub kind: String,
    pub hook: String,
    pub priority: i64,
}

#[derive(Debug, Clone)]
pub(super) struct Rule {
    pub tool: Tool,
    pub family: String,
    pub table: String,
    pub chain: String,
    /// The rule itself: JSON of nft, or the arguments of iptables.
    pub text: String,
    /// nft's statements.
    pub statements: Vec<Value>,
    /// The command that removes it.
    pub removal: String,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Tool {
    Nft,
    Iptables,
}

impl Ruleset {
    pub(super) fn read() -> Self {
        let mut set = Self::default();
        // Of tables that iptables keeps in nftables, its own text says more: nft cannot show what DNAT leads to.
        let mut saved = HashSet::new();
        for (family, prefix) in [("ip", "iptables"), ("ip6", "ip6tables")] {
            for save in saves(prefix) {
                let before = set.rules.len();
                // One that lacks an extension says what it can, and then fails.
                let (text, failure) = run(&save, &[]);
                set.take_saved(family, save.trim_end_matches("-save"), &text);
                set.unread.extend(failure.map(|failure| (Tool::Iptables, failure)));
                if run(&save, &["--version"]).0.contains("nf_tables") {
                    let taken = set.rules[before..].iter();
                    saved.extend(taken.map(|rule| (rule.family.clone(), rule.table.clone())));
                }
            }
        }
        // Without the elements of sets, of which there may be very many.
        match run("nft", &["-j", "-t", "list", "ruleset"]) {
            (json, None) => set.take_nft(&json, &saved),
            (_, Some(failure)) => set.unread.push((Tool::Nft, failure)),
        }
        set
    }

    fn take_saved(&mut self, family: &str, tool: &str, text: &str) {
        let mut table = "";
        for line in text.lines() {
            if let Some(name) = line.strip_prefix('*') {
                table = name;
            }
            let Some(rule) = line.strip_prefix("-A ") else { continue };
            self.rules.push(Rule {
                tool: Tool::Iptables,
                family: family.into(),
                table: table.into(),
                chain: rule.split(' ').next().unwrap_or_default().into(),
                text: rule.into(),
                statements: Vec::new(),
                removal: format!("{tool} -t {table} -D {rule}"),
            });
        }
    }

    fn take_nft(&mut self, json: &str, saved: &HashSet<(String, String)>) {
        let listed: Value = match serde_json::from_str(json) {
            Ok(listed) => listed,
            Err(error) => return self.unread.push((Tool::Nft, format!("nft -j list ruleset: {error}"))),
        };
        for object in listed["nftables"].as_array().into_iter().flatten() {
            let text = |of: &Value, member: &str| of[member].as_str().unwrap_or_default().to_owned();
            let (chain, rule) = (&object["chain"], &object["rule"]);
            if let Some(priority) = chain["prio"].as_i64() {
                self.chains.push(Chain {
                    family: text(chain, "family"),
                    table: text(chain, "table"),
                    name: text(chain, "name"),
                    kind: text(chain, "type"),
                    hook: text(chain, "hook"),
                    priority,
                });
            }
            let (family, table) = (text(rule, "family"), text(rule, "table"));
            if rule.is_object() && !saved.contains(&(family.clone(), table.clone())) {
                let chain = text(rule, "chain");
                self.rules.push(Rule {
                    removal: format!("nft delete rule {family} {table} {chain} handle {}", rule["handle"]),
                    tool: Tool::Nft,
                    text: rule["expr"].to_string(),
                    statements: rule["expr"].as_array().cloned().unwrap_or_default(),
                    family,
                    table,
                    chain,
                });
            }
        }
    }

    #[cfg(test)]
    pub(super) fn sample(saved: &str, nft: &str) -> Self {
        let mut set = Self::default();
        set.take_saved("ip", "iptables", saved);
        set.take_nft(nft, &HashSet::new());
        set
    }
}

/// Both kinds where they are told apart; otherwise the one that there is.
fn saves(prefix: &str) -> Vec<String> {
    let kinds = ["nft", "legacy"].map(|kind| format!("{prefix}-{kind}-save"));
    let kinds: Vec<String> = kinds.into_iter().filter(|tool| exists(tool)).collect();
    let plain = format!("{prefix}-save");
    if kinds.is_empty() && exists(&plain) { vec![plain] } else { kinds }
}

fn exists(tool: &str) -> bool {
    let path = std::env::var_os("PATH").unwrap_or_default();
    std::env::split_paths(&path).any(|folder| folder.join(tool).is_file())
}

/// What a tool said, and why that is not all.
fn run(tool: &str, args: &[&str]) -> (String, Option<String>) {
    let output = match Command::new(tool).args(args).stdin(Stdio::null()).output() {
        Ok(output) => output,
        Err(error) if error.kind() == ErrorKind::NotFound => {
            return (String::new(), Some(format!("{tool}: not found")));
        }
        Err(error) => return (String::new(), Some(format!("{tool}: {error}"))),
    };
    let failure = (!output.status.success()).then(|| {
        let said = String::from_utf8_lossy(&output.stderr);
        let said = said.lines().next().unwrap_or("failed without a word");
        // iptables begins with its own name and version.
        format!("{tool}: {}", said.split_once("): ").map_or(said, |(_, said)| said))
    });
    (String::from_utf8_lossy(&output.stdout).into_owned(), failure)
}
