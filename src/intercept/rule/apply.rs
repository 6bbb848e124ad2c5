//! Applying and removing the rules, through the node's own `nft` and `iptables`: they know the kernel's ABI, and what
//! they say about a failure is what an operator will find on the web.

use std::{
    io::{ErrorKind, Write},
    process::{Command, Stdio},
    sync::Arc,
};

use anyhow::{Context, bail, ensure};
use caps::{CapSet, Capability, CapsHashSet};
use tracing::{debug, info, warn};

use super::{Backend, BridgeGuard, CHAINS, RuleSet, TABLE, bridge::INGRESS, fence};

/// For the lock that all iptables tools share: one that hangs must not hang the agent, which says so and tries again.
const WAIT: &str = "--wait=10";
const IPTABLES: [(&str, &str); 2] = [("iptables", "iptables-restore"), ("ip6tables", "ip6tables-restore")];

/// The rules as they were applied, to apply them again.
#[derive(Debug, Clone)]
pub struct Installed {
    rules: RuleSet,
    backend: Backend,
    /// The tool's listing right after they were applied.
    listed: Option<Arc<str>>,
}

impl Installed {
    pub fn rules(&self) -> &RuleSet {
        &self.rules
    }

    pub fn listed(&self) -> Option<Arc<str>> {
        self.listed.clone()
    }

    /// The guard of bridge ports, which iptables cannot carry.
    pub fn bridge_guard(&self) -> Option<BridgeGuard> {
        (self.backend == Backend::Nft).then(|| self.rules.bridge_guard())
    }

    /// # Errors
    /// What the tool said.
    pub fn apply_again(&self) -> anyhow::Result<()> {
        match self.backend {
            Backend::Nft => nft(&self.rules),
            Backend::Iptables => iptables(&self.rules),
            Backend::Auto | Backend::None => Ok(()),
        }
    }

    /// Adds the policy routing that is missing, and returns how many rules that was.
    ///
    /// # Errors
    /// The kernel's.
    pub fn raise_fence(&self) -> std::io::Result<usize> {
        fence::raise()
    }

    /// Returns our rules as the tool lists them, without counters: the same for the same rules.
    ///
    /// # Errors
    /// What the tool said, also where a chain is missing.
    pub fn listing(&self) -> anyhow::Result<String> {
        if self.backend == Backend::Nft {
            return run("nft", &["--stateless", "list", "table", "inet", TABLE], "");
        }
        let mut listing = String::new();
        for ((iptables, _), v6) in IPTABLES.into_iter().zip([false, true]) {
            for (table, builtin, chain) in CHAINS {
                let listed = run(iptables, &[WAIT, "-t", table, "-C", builtin, "-j", chain], "")
                    .and_then(|_| run(iptables, &[WAIT, "-t", table, "-S", chain], ""));
                match listed {
                    Ok(rules) => listing.push_str(&rules),
                    // A kernel without IPv6 has no such rules: see `iptables`.
                    Err(_) if v6 && self.rules.host.v6.is_none() => {}
                    Err(error) => return Err(error),
                }
            }
        }
        Ok(listing)
    }
}

/// Applies the rules; `None` where somebody else maintains them.
///
/// # Errors
/// What is missing, and what would help.
pub fn install(rules: RuleSet, backend: Backend) -> anyhow::Result<Option<Installed>> {
    if backend == Backend::None {
        info!("no redirect of our own (--intercept none): one must lead from the metadata address to this agent");
        return Ok(None);
    }
    let capable = caps::has_cap(None, CapSet::Effective, Capability::CAP_NET_ADMIN).unwrap_or(false);
    ensure!(capable, "--intercept {backend:?}: needs CAP_NET_ADMIN in the node's network namespace");
    if let Err(error) = fence::raise() {
        warn!(%error, "policy routing rules cannot be added: pods can reach the node's role while all rules are flushed");
    }
    let backend = match backend {
        Backend::Auto => match nft(&rules) {
            Ok(()) => Backend::Nft,
            Err(error) => {
                warn!(error = format!("{error:#}"), "nft does not work here: trying iptables");
                iptables(&rules).context("neither nft nor iptables can apply the redirect")?;
                Backend::Iptables
            }
        },
        Backend::Nft => nft(&rules).map(|()| Backend::Nft)?,
        Backend::Iptables | Backend::None => iptables(&rules).map(|()| Backend::Iptables)?,
    };
    info!(backend = ?backend, host = ?rules.host, port = rules.port, "redirect applied");
    let mut installed = Installed { rules, backend, listed: None };
    match installed.listing() {
        Ok(listing) => installed.listed = Some(listing.into()),
        Err(error) => warn!(error = format!("{error:#}"), "the redirect's rules cannot be read back"),
    }
    Ok(Some(installed))
}

/// Removes what [`install`] left, and says what that was.
///
/// # Errors
/// What could not be removed, and what the tool said.
pub fn uninstall(backend: Backend) -> anyhow::Result<Vec<String>> {
    let mut removed = Vec::new();
    if matches!(backend, Backend::Auto | Backend::Nft) && available("nft", backend)? {
        let tables = run("nft", &["list", "tables"], "")?;
        for (family, name) in [("inet", TABLE), ("bridge", TABLE), ("netdev", INGRESS)] {
            let table = format!("table {family} {name}");
            if tables.lines().any(|line| line.trim() == table) {
                run("nft", &["delete", "table", family, name], "")?;
                removed.push(format!("nftables {table}"));
            }
        }
    }
    if matches!(backend, Backend::Auto | Backend::Iptables) {
        for (iptables, _) in IPTABLES {
            if available(iptables, backend)? {
                removed.extend(remove_chains(iptables)?);
            }
        }
    }
    let fence = fence::remove().context("cannot remove the policy routing rules")?;
    if fence > 0 {
        removed.push(format!("{fence} policy routing rules (ip rule) for the metadata addresses"));
    }
    Ok(removed)
}

fn remove_chains(iptables: &str) -> anyhow::Result<Vec<String>> {
    let mut removed = Vec::new();
    for (table, builtin, chain) in CHAINS {
        while run(iptables, &[WAIT, "-t", table, "-D", builtin, "-j", chain], "").is_ok() {}
        // Emptying a chain fails only where there is none.
        if run(iptables, &[WAIT, "-t", table, "-F", chain], "").is_ok() {
            run(iptables, &[WAIT, "-t", table, "-X", chain], "")?;
            removed.push(format!("{iptables} chain {chain} of table {table}"));
        }
    }
    Ok(removed)
}

fn nft(rules: &RuleSet) -> anyhow::Result<()> {
    let apply = |reject_early| run("nft", &["-f", "-"], &rules.nft(reject_early)).map(drop);
    let Err(error) = apply(true) else { return Ok(()) };
    if apply(false).is_err() {
        return Err(error);
    }
    debug!(error = format!("{error:#}"), "kernel cannot reject packets before routing: the forward chain does");
    Ok(())
}

fn iptables(rules: &RuleSet) -> anyhow::Result<()> {
    for ((iptables, restore), v6) in IPTABLES.into_iter().zip([false, true]) {
        let jumps = CHAINS
            .map(|(table, builtin, chain)| run(iptables, &[WAIT, "-t", table, "-C", builtin, "-j", chain], "").is_ok());
        match run(restore, &["--noflush", WAIT], &rules.iptables(v6, jumps)) {
            Ok(_) => {}
            // A kernel without IPv6 has no IPv6 path to the node's role either.
            Err(error) if v6 && rules.host.v6.is_none() => {
                warn!(error = format!("{error:#}"), "no ip6tables rules: going on with IPv4");
            }
            Err(error) => return Err(error),
        }
    }
    Ok(())
}

fn available(tool: &str, asked: Backend) -> anyhow::Result<bool> {
    match run(tool, &["--version"], "") {
        Ok(_) => Ok(true),
        Err(_) if asked == Backend::Auto => Ok(false),
        Err(error) => Err(error),
    }
}

/// Runs a tool to its end.
pub(super) fn run(tool: &str, args: &[&str], input: &str) -> anyhow::Result<String> {
    let child =
        Command::new(tool).args(args).stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn();
    let mut child = match child {
        Err(error) if error.kind() == ErrorKind::NotFound => {
            bail!("{tool}: not found; install it, or choose another --intercept")
        }
        child => child.with_context(|| format!("cannot run {tool}"))?,
    };
    if let Some(mut stdin) = child.stdin.take() {
        // A tool that ends before it has read everything says why on stderr.
        let _ = stdin.write_all(input.as_bytes());
    }
    let output = child.wait_with_output().with_context(|| format!("cannot run {tool}"))?;
    ensure!(
        output.status.success(),
        "{tool} {}: {}: {}",
        args.join(" "),
        output.status,
        String::from_utf8_lossy(&output.stderr).trim()
    );
    Ok(String::from_utf8_lossy(&output.stdout).into_owned())
}

/// Keeps what applying the rules again and marking the probe need, and drops every other capability, for this thread
/// and all that it starts. Called before there are other threads.
///
/// # Errors
/// The kernel's.
pub fn drop_privileges(installed: Option<&Installed>) -> anyhow::Result<()> {
    let mut keep = CapsHashSet::new();
    match installed.map(|installed| installed.backend) {
        None => {}
        // The legacy iptables tools talk to the kernel through a raw socket.
        Some(Backend::Iptables) => keep.extend([Capability::CAP_NET_ADMIN, Capability::CAP_NET_RAW]),
        Some(_) => keep.extend([Capability::CAP_NET_ADMIN]),
    }
    let held = caps::read(None, CapSet::Permitted)?;
    let keep: CapsHashSet = held.intersection(&keep).copied().collect();
    // A tool that root starts gets what the bounding set allows, so that goes first, while it still may.
    for capability in caps::read(None, CapSet::Bounding)?.difference(&keep) {
        if held.contains(&Capability::CAP_SETPCAP) {
            caps::drop(None, CapSet::Bounding, *capability)?;
        }
    }
    caps::set(None, CapSet::Inheritable, &CapsHashSet::new())?;
    caps::set(None, CapSet::Effective, &keep)?;
    caps::set(None, CapSet::Permitted, &keep)?;
    // The bounding set takes CAP_SETPCAP to shrink; with this, no tool that root starts regains what is dropped.
    nix::sys::prctl::set_no_new_privs()?;
    Ok(())
}
