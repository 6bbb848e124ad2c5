//! Applies and removes the rules with the tools `nft` and `iptables`. They know the kernel's ABI, and operators can
//! search for their error messages.

use std::{
    io::{ErrorKind, Write},
    process::{Command, Stdio},
    sync::Arc,
};

use anyhow::{Context, bail, ensure};
use caps::{CapSet, Capability, CapsHashSet};
use tracing::{debug, info, warn};

use super::{Backend, BridgeGuard, CHAINS, RedirectRules, TABLE, bridge::INGRESS, policy_routing};

/// Timeout in seconds for the lock that all iptables tools share, so that a hanging tool cannot hang the agent.
const WAIT: &str = "--wait=10";
const IPTABLES: [(&str, &str); 2] = [("iptables", "iptables-restore"), ("ip6tables", "ip6tables-restore")];

/// The applied rules, kept to apply them again.
#[derive(Debug, Clone)]
pub struct Installed {
    rules: RedirectRules,
    backend: Backend,
    /// The tool's listing right after the rules were applied.
    listed: Option<Arc<str>>,
}

impl Installed {
    pub fn rules(&self) -> &RedirectRules {
        &self.rules
    }

    /// Returns the listing from right after the rules were applied.
    pub fn listed(&self) -> Option<Arc<str>> {
        self.listed.clone()
    }

    /// Returns the guard of bridge ports. It needs nftables.
    pub fn bridge_guard(&self) -> Option<BridgeGuard> {
        (self.backend == Backend::Nft).then(|| self.rules.bridge_guard())
    }

    /// Applies the rules again.
    ///
    /// # Errors
    /// Returns the tool's error message.
    pub fn apply_again(&self) -> anyhow::Result<()> {
        match self.backend {
            Backend::Nft => nft(&self.rules),
            Backend::Iptables => iptables(&self.rules),
            Backend::Auto | Backend::None => Ok(()),
        }
    }

    /// Adds missing policy routing rules and returns their number.
    ///
    /// # Errors
    /// Returns the kernel's error: no support for policy routing, or no CAP_NET_ADMIN.
    pub fn restore_policy_routing(&self) -> std::io::Result<usize> {
        policy_routing::add_missing()
    }

    /// Lists our rules without counters. Equal rules give equal listings.
    ///
    /// # Errors
    /// Returns the tool's error message, also if a chain is missing.
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
                    // A kernel without IPv6 has no ip6tables rules: see `iptables`.
                    Err(_) if v6 && self.rules.host.v6.is_none() => {}
                    Err(error) => return Err(error),
                }
            }
        }
        Ok(listing)
    }
}

/// Applies the rules. Returns `None` for [`Backend::None`].
///
/// # Errors
/// Fails without CAP_NET_ADMIN, or if no tool can apply the rules. The error names the fix.
pub fn install(rules: RedirectRules, backend: Backend) -> anyhow::Result<Option<Installed>> {
    if backend == Backend::None {
        info!("--intercept none: no redirect installed; another component must redirect the metadata address here");
        return Ok(None);
    }
    let capable = caps::has_cap(None, CapSet::Effective, Capability::CAP_NET_ADMIN).unwrap_or(false);
    ensure!(capable, "--intercept {backend:?}: requires CAP_NET_ADMIN in the node's network namespace");
    if let Err(error) = policy_routing::add_missing() {
        warn!(%error, "cannot add policy routing rules: a flush of firewall rules exposes the node's role to pods");
    }
    let backend = match backend {
        Backend::Auto => match nft(&rules) {
            Ok(()) => Backend::Nft,
            Err(error) => {
                warn!(error = format!("{error:#}"), "nft cannot apply the redirect: trying iptables");
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
        Err(error) => warn!(error = format!("{error:#}"), "cannot list the redirect's rules"),
    }
    Ok(Some(installed))
}

/// Removes everything that [`install`] created, and returns its names.
///
/// # Errors
/// Returns the error message of the tool or the kernel for what could not be removed.
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
    let rules = policy_routing::remove().context("cannot remove the policy routing rules")?;
    if rules > 0 {
        removed.push(format!("{rules} policy routing rules (ip rule) for the metadata addresses"));
    }
    Ok(removed)
}

fn remove_chains(iptables: &str) -> anyhow::Result<Vec<String>> {
    let mut removed = Vec::new();
    for (table, builtin, chain) in CHAINS {
        while run(iptables, &[WAIT, "-t", table, "-D", builtin, "-j", chain], "").is_ok() {}
        // Flushing a chain fails only if it does not exist.
        if run(iptables, &[WAIT, "-t", table, "-F", chain], "").is_ok() {
            run(iptables, &[WAIT, "-t", table, "-X", chain], "")?;
            removed.push(format!("{iptables} chain {chain} of table {table}"));
        }
    }
    Ok(removed)
}

fn nft(rules: &RedirectRules) -> anyhow::Result<()> {
    let apply = |reject_early| run("nft", &["-f", "-"], &rules.nft(reject_early)).map(drop);
    let Err(error) = apply(true) else { return Ok(()) };
    if apply(false).is_err() {
        return Err(error);
    }
    debug!(error = format!("{error:#}"), "kernel cannot reject packets in prerouting: the forward chain does");
    Ok(())
}

fn iptables(rules: &RedirectRules) -> anyhow::Result<()> {
    for ((iptables, restore), v6) in IPTABLES.into_iter().zip([false, true]) {
        let jumps = CHAINS
            .map(|(table, builtin, chain)| run(iptables, &[WAIT, "-t", table, "-C", builtin, "-j", chain], "").is_ok());
        match run(restore, &["--noflush", WAIT], &rules.iptables(v6, jumps)) {
            Ok(_) => {}
            // A kernel without IPv6 has no IPv6 path to the node's role either.
            Err(error) if v6 && rules.host.v6.is_none() => {
                warn!(error = format!("{error:#}"), "cannot apply ip6tables rules: continuing with IPv4 only");
            }
            Err(error) => return Err(error),
        }
    }
    Ok(())
}

fn available(tool: &str, backend: Backend) -> anyhow::Result<bool> {
    match run(tool, &["--version"], "") {
        Ok(_) => Ok(true),
        Err(_) if backend == Backend::Auto => Ok(false),
        Err(error) => Err(error),
    }
}

/// Runs a tool and returns its output.
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
        // A tool that exits before it has read its input explains that on stderr.
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

/// Drops all capabilities except those for applying the rules and marking the self-test's packets (least privilege).
/// Applies to this thread and its children: call it before there are other threads.
///
/// # Errors
/// Returns the error of `capset` or `prctl`.
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
    // A program that root executes regains capabilities from the bounding set. Shrink it first: that takes CAP_SETPCAP.
    for capability in caps::read(None, CapSet::Bounding)?.difference(&keep) {
        if held.contains(&Capability::CAP_SETPCAP) {
            caps::drop(None, CapSet::Bounding, *capability)?;
        }
    }
    caps::set(None, CapSet::Inheritable, &CapsHashSet::new())?;
    caps::set(None, CapSet::Effective, &keep)?;
    caps::set(None, CapSet::Permitted, &keep)?;
    // Without CAP_SETPCAP the bounding set stays; no_new_privs then prevents that a tool regains capabilities.
    nix::sys::prctl::set_no_new_privs()?;
    Ok(())
}
