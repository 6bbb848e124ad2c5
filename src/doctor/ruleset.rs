//! The rule sets of this node as the tools list them: to explain what is wrong and to find other agents, never to
//! decide whether the redirect works.
//!
//! nftables' own tables come as JSON from `nft`; what iptables wrote, of either kind, as text from `iptables-save`. None
//! of these commands loads a module or makes a table.
//!
//! A node of a large cluster has a hundred thousand rules, and this shares the memory of the agent's container: they are
//! read one by one, only those that may matter are kept, and the tools get half of that memory at most. One that needs
//! more fails, instead of ending the agent.

use std::{
    collections::HashSet,
    fs,
    io::{self, BufRead, BufReader, ErrorKind, Read},
    process::{Child, Command, Stdio},
    thread,
};

use nix::sys::resource::{Resource, getrlimit, setrlimit};
use serde_json::Value;

use super::{listing, others::names_metadata, rules::is_ours};

/// Many times as many as any node has that may matter.
const MOST: usize = 20_000;
const BUILT_IN: [&str; 5] = ["PREROUTING", "INPUT", "FORWARD", "OUTPUT", "POSTROUTING"];

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
                let tool = save.trim_end_matches("-save");
                let failure = read(&save, &[], |text| set.take_saved(family, tool, text));
                set.unread.extend(failure.map(|failure| (Tool::Iptables, failure)));
                let mut version = String::new();
                read(&save, &["--version"], |text| text.read_to_string(&mut version).map(drop));
                if version.contains("nf_tables") {
                    let taken = set.rules[before..].iter();
                    saved.extend(taken.map(|rule| (rule.family.clone(), rule.table.clone())));
                }
            }
        }
        // Without the elements of sets, of which there may be very many.
        let failure = read("nft", &["-j", "-t", "list", "ruleset"], |json| set.take_nft(json, &saved));
        set.unread.extend(failure.map(|failure| (Tool::Nft, failure)));
        set
    }

    /// Keeps what is ours, what names the metadata address, and what stands where packets come by first.
    fn keep(&mut self, rule: Rule, is_of_base_chain: bool) {
        if (is_of_base_chain || is_ours(&rule) || names_metadata(&rule.text)) && self.rules.len() < MOST {
            self.rules.push(rule);
        }
    }

    fn take_saved(&mut self, family: &str, tool: &str, text: &mut dyn BufRead) -> io::Result<()> {
        let mut table = String::new();
        for line in text.lines() {
            let line = line?;
            if let Some(name) = line.strip_prefix('*') {
                name.clone_into(&mut table);
            }
            let Some(rule) = line.strip_prefix("-A ") else { continue };
            let chain = rule.split(' ').next().unwrap_or_default();
            let kept = Rule {
                tool: Tool::Iptables,
                family: family.into(),
                table: table.clone(),
                chain: chain.into(),
                text: rule.into(),
                statements: Vec::new(),
                removal: format!("{tool} -t {table} -D {rule}"),
            };
            self.keep(kept, BUILT_IN.contains(&chain));
        }
        Ok(())
    }

    fn take_nft(&mut self, json: &mut dyn BufRead, saved: &HashSet<(String, String)>) -> io::Result<()> {
        listing::each(json, "nftables", |object| {
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
                // nft lists the chains of a table before its rules.
                let is_base = |base: &Chain| base.family == family && base.table == table && base.name == chain;
                let is_of_base_chain = self.chains.iter().any(is_base);
                let kept = Rule {
                    removal: format!("nft delete rule {family} {table} {chain} handle {}", rule["handle"]),
                    tool: Tool::Nft,
                    text: rule["expr"].to_string(),
                    statements: rule["expr"].as_array().cloned().unwrap_or_default(),
                    family,
                    table,
                    chain,
                };
                self.keep(kept, is_of_base_chain);
            }
        })
        .map_err(Into::into)
    }

    #[cfg(test)]
    pub(super) fn sample(saved: &str, nft: &str) -> Self {
        let mut set = Self::default();
        set.take_saved("ip", "iptables", &mut saved.as_bytes()).unwrap();
        if !nft.is_empty() {
            set.take_nft(&mut nft.as_bytes(), &HashSet::new()).unwrap();
        }
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

/// Reads what a tool says; why that is not all.
fn read(tool: &str, args: &[&str], take: impl FnOnce(&mut dyn BufRead) -> io::Result<()>) -> Option<String> {
    let mut child = match start(tool, args) {
        Ok(child) => child,
        Err(error) if error.kind() == ErrorKind::NotFound => return Some(format!("{tool}: not found")),
        Err(error) => return Some(format!("{tool}: {error}")),
    };
    let (said, mut errors) = (child.stdout.take(), child.stderr.take());
    let mut words = String::new();
    let taken = thread::scope(|scope| {
        scope.spawn(|| errors.as_mut().map(|errors| errors.read_to_string(&mut words)));
        said.map_or(Ok(()), |said| take(&mut BufReader::new(said)))
    });
    match (child.wait(), taken) {
        (Ok(status), _) if !status.success() => {
            let word = words.lines().next().unwrap_or("failed without a word");
            // iptables begins with its own name and version.
            let word = word.split_once("): ").map_or(word, |(_, word)| word);
            let bound = room().map_or(String::new(), |bytes| {
                format!(" (with {} MiB, half of this container's memory: on the node it may have more)", bytes >> 20)
            });
            Some(format!("{tool}: {word}{bound}"))
        }
        (Err(error), _) | (_, Err(error)) => Some(format!("{tool}: {error}")),
        (Ok(_), Ok(())) => None,
    }
}

/// With a bound on its memory, where this process has one.
fn start(tool: &str, args: &[&str]) -> io::Result<Child> {
    let start =
        || Command::new(tool).args(args).stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn();
    let Some(room) = room() else { return start() };
    let (soft, hard) = getrlimit(Resource::RLIMIT_AS)?;
    setrlimit(Resource::RLIMIT_AS, room.min(hard), hard)?;
    let started = start();
    setrlimit(Resource::RLIMIT_AS, soft, hard)?;
    started
}

/// Half of what this container may have, if that is bounded.
fn room() -> Option<u64> {
    let files = ["/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes"];
    let limit: u64 = files.iter().find_map(|file| fs::read_to_string(file).ok()?.trim().parse().ok())?;
    // What cgroup v1 calls no limit is a number near the largest.
    (limit < 1 << 40).then_some(limit / 2)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// kube-proxy's, of many services: they go by, and what matters is kept in its order.
    #[test]
    fn of_a_hundred_thousand_rules_only_those_that_may_matter_are_kept() {
        let services = |of: usize| {
            let rule = "-A KUBE-SVC-X -m comment --comment \"shop/web\" -j KUBE-SEP-Y\n";
            format!("*nat\n-A PREROUTING -j KUBE-SERVICES\n{}", rule.repeat(of))
        };
        let set = Ruleset::sample(
            &(services(100_000)
                + "-A KUBE-SVC-X -d 169.254.169.254/32 -p tcp -j DNAT --to-destination 10.0.0.1:8181\n"),
            "",
        );
        let chains: Vec<&str> = set.rules.iter().map(|rule| rule.chain.as_str()).collect();
        assert_eq!(chains, ["PREROUTING", "KUBE-SVC-X"]);

        let rule = |chain: &str| {
            format!(r#"{{"rule":{{"family":"ip","table":"kube-proxy","chain":"{chain}","handle":7,"expr":[]}}}}"#)
        };
        let base = r#"{"chain":{"family":"ip","table":"kube-proxy","name":"first","type":"nat","hook":"prerouting","prio":-100}}"#;
        let many = vec![rule("service-x"); 10_000].join(",");
        let set = Ruleset::sample("", &format!(r#"{{"nftables":[{base},{},{many}]}}"#, rule("first")));
        assert_eq!((set.chains.len(), set.rules.len()), (1, 1));
    }

    #[test]
    fn a_tool_that_is_not_there_or_fails_says_so() {
        let nothing = |_: &mut dyn BufRead| Ok(());
        assert_eq!(read("no-such-tool", &[], nothing), Some("no-such-tool: not found".into()));
        let failure = read("ls", &["/no/such/folder"], nothing).unwrap();
        assert!(failure.starts_with("ls: ") && failure.contains("/no/such/folder"), "{failure}");
    }
}
