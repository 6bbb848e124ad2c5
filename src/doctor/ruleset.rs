//! Reads this node's rule sets, to explain problems and to find other agents, never to decide whether the redirect
//! works.
//!
//! nftables' own tables come as JSON from `nft`; iptables rules, nft and legacy, as text from `iptables-save`. None of
//! these commands loads a module or creates a table.
//!
//! A node of a large cluster has a hundred thousand rules, and the doctor shares the memory limit of the agent's
//! container. Therefore rules are streamed, only relevant ones are kept, and the tools may use at most half of that
//! limit: a tool that needs more fails instead of getting the agent OOM-killed.

use std::{
    collections::HashSet,
    fs,
    io::{self, BufRead, BufReader, ErrorKind, Read},
    process::{Child, Command, Stdio},
    thread,
};

use nix::sys::resource::{Resource, getrlimit, setrlimit};
use serde_json::Value;

use super::{conflicts::names_metadata, json_stream, rules::is_ours};

/// Maximum number of kept rules, many times the number of relevant rules on any node.
const MAX_RULES: usize = 20_000;
const BUILT_IN: [&str; 5] = ["PREROUTING", "INPUT", "FORWARD", "OUTPUT", "POSTROUTING"];

/// The rules and chains that could be read.
#[derive(Debug, Default)]
pub(super) struct Ruleset {
    pub rules: Vec<Rule>,
    pub chains: Vec<Chain>,
    /// Tools that failed, each with the error.
    pub unread: Vec<(Tool, String)>,
}

/// A base chain of nftables, with its hook.
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
    /// The rule itself: JSON from nft, or the arguments for iptables.
    pub text: String,
    /// Statements of an nft rule.
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
        // For tables that iptables keeps in nftables, prefer its own text: nft cannot show the target of its DNAT.
        let mut saved = HashSet::new();
        for (family, prefix) in [("ip", "iptables"), ("ip6", "ip6tables")] {
            for save in save_commands(prefix) {
                let before = set.rules.len();
                // A tool that lacks an extension prints the rules that it knows, then fails.
                let tool = save.trim_end_matches("-save");
                let failure = read(&save, &[], |text| set.add_saved(family, tool, text));
                set.unread.extend(failure.map(|failure| (Tool::Iptables, failure)));
                let mut version = String::new();
                read(&save, &["--version"], |text| text.read_to_string(&mut version).map(drop));
                if version.contains("nf_tables") {
                    let added = set.rules[before..].iter();
                    saved.extend(added.map(|rule| (rule.family.clone(), rule.table.clone())));
                }
            }
        }
        // -t omits the elements of sets, of which there may be very many.
        let failure = read("nft", &["-j", "-t", "list", "ruleset"], |json| set.add_nft(json, &saved));
        set.unread.extend(failure.map(|failure| (Tool::Nft, failure)));
        set
    }

    /// Keeps the rule if it is kirsa's, names the metadata address, or is in a base chain.
    fn keep_if_relevant(&mut self, rule: Rule, is_in_base_chain: bool) {
        if (is_in_base_chain || is_ours(&rule) || names_metadata(&rule.text)) && self.rules.len() < MAX_RULES {
            self.rules.push(rule);
        }
    }

    fn add_saved(&mut self, family: &str, tool: &str, text: &mut dyn BufRead) -> io::Result<()> {
        let mut table = String::new();
        for line in text.lines() {
            let line = line?;
            if let Some(name) = line.strip_prefix('*') {
                name.clone_into(&mut table);
            }
            let Some(rule) = line.strip_prefix("-A ") else { continue };
            let chain = rule.split(' ').next().unwrap_or_default();
            let rule = Rule {
                tool: Tool::Iptables,
                family: family.into(),
                table: table.clone(),
                chain: chain.into(),
                text: rule.into(),
                statements: Vec::new(),
                removal: format!("{tool} -t {table} -D {rule}"),
            };
            self.keep_if_relevant(rule, BUILT_IN.contains(&chain));
        }
        Ok(())
    }

    fn add_nft(&mut self, json: &mut dyn BufRead, saved: &HashSet<(String, String)>) -> io::Result<()> {
        json_stream::for_each(json, "nftables", |object| {
            let text = |object: &Value, member: &str| object[member].as_str().unwrap_or_default().to_owned();
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
                let is_in_base_chain = self.chains.iter().any(is_base);
                let rule = Rule {
                    removal: format!("nft delete rule {family} {table} {chain} handle {}", rule["handle"]),
                    tool: Tool::Nft,
                    text: rule["expr"].to_string(),
                    statements: rule["expr"].as_array().cloned().unwrap_or_default(),
                    family,
                    table,
                    chain,
                };
                self.keep_if_relevant(rule, is_in_base_chain);
            }
        })
        .map_err(Into::into)
    }

    #[cfg(test)]
    pub(super) fn sample(saved: &str, nft: &str) -> Self {
        let mut set = Self::default();
        set.add_saved("ip", "iptables", &mut saved.as_bytes()).unwrap();
        if !nft.is_empty() {
            set.add_nft(&mut nft.as_bytes(), &HashSet::new()).unwrap();
        }
        set
    }
}

/// Returns the installed save commands: the nft and legacy variants, or else the unqualified one.
fn save_commands(prefix: &str) -> Vec<String> {
    let variants = ["nft", "legacy"].map(|variant| format!("{prefix}-{variant}-save"));
    let variants: Vec<String> = variants.into_iter().filter(|tool| exists(tool)).collect();
    let plain = format!("{prefix}-save");
    if variants.is_empty() && exists(&plain) { vec![plain] } else { variants }
}

fn exists(tool: &str) -> bool {
    let path = std::env::var_os("PATH").unwrap_or_default();
    std::env::split_paths(&path).any(|directory| directory.join(tool).is_file())
}

/// Runs a tool and passes its output to `parse`. Returns the error if the output may be incomplete.
fn read(tool: &str, args: &[&str], parse: impl FnOnce(&mut dyn BufRead) -> io::Result<()>) -> Option<String> {
    let mut child = match spawn_limited(tool, args) {
        Ok(child) => child,
        Err(error) if error.kind() == ErrorKind::NotFound => return Some(format!("{tool}: not found")),
        Err(error) => return Some(format!("{tool}: {error}")),
    };
    let (stdout, mut stderr) = (child.stdout.take(), child.stderr.take());
    let mut errors = String::new();
    let parsed = thread::scope(|scope| {
        scope.spawn(|| stderr.as_mut().map(|stderr| stderr.read_to_string(&mut errors)));
        stdout.map_or(Ok(()), |stdout| parse(&mut BufReader::new(stdout)))
    });
    match (child.wait(), parsed) {
        (Ok(status), _) if !status.success() => {
            let error = errors.lines().next().unwrap_or("failed without an error message");
            // iptables prefixes its errors with its own name and version.
            let error = error.split_once("): ").map_or(error, |(_, error)| error);
            let limit = memory_limit().map_or(String::new(), |bytes| {
                format!(
                    " (limited to {} MiB, half of this container's memory; run it on the node instead)",
                    bytes >> 20
                )
            });
            Some(format!("{tool}: {error}{limit}"))
        }
        (Err(error), _) | (_, Err(error)) => Some(format!("{tool}: {error}")),
        (Ok(_), Ok(())) => None,
    }
}

/// Spawns a tool with the limit of [`memory_limit`].
fn spawn_limited(tool: &str, args: &[&str]) -> io::Result<Child> {
    let spawn =
        || Command::new(tool).args(args).stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn();
    let Some(limit) = memory_limit() else { return spawn() };
    let (soft, hard) = getrlimit(Resource::RLIMIT_AS)?;
    setrlimit(Resource::RLIMIT_AS, limit.min(hard), hard)?;
    let child = spawn();
    setrlimit(Resource::RLIMIT_AS, soft, hard)?;
    child
}

/// Returns half of this container's memory limit in bytes, or `None` without a limit.
fn memory_limit() -> Option<u64> {
    let files = ["/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes"];
    let limit: u64 = files.iter().find_map(|file| fs::read_to_string(file).ok()?.trim().parse().ok())?;
    // cgroup v1 expresses "no limit" as a huge number.
    (limit < 1 << 40).then_some(limit / 2)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// kube-proxy writes that many rules for thousands of services.
    #[test]
    fn only_relevant_rules_of_100_000_are_kept() {
        let services = |count: usize| {
            let rule = "-A KUBE-SVC-X -m comment --comment \"shop/web\" -j KUBE-SEP-Y\n";
            format!("*nat\n-A PREROUTING -j KUBE-SERVICES\n{}", rule.repeat(count))
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
    fn missing_or_failing_tool_is_reported() {
        let ignore = |_: &mut dyn BufRead| Ok(());
        assert_eq!(read("no-such-tool", &[], ignore), Some("no-such-tool: not found".into()));
        let failure = read("ls", &["/no/such/folder"], ignore).unwrap();
        assert!(failure.starts_with("ls: ") && failure.contains("/no/such/folder"), "{failure}");
    }
}
