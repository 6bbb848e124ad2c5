//! Faults of the node: its disk, and other processes that change its rules.

use std::fs;
use std::path::PathBuf;

use anyhow::{Context, Result, ensure};
use lab::agent::field;
use lab::http::{CREDENTIALS_PATH, TOKEN};
use lab::poll::poll;
use nix::mount::{MsFlags, mount, umount};

use super::{Credentials, TIMEOUT, list, site};

/// The fault of the state directory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Disk {
    Full,
    ReadOnly,
    /// A file is in the place of the directory.
    NotADirectory,
}

/// Returns the state directory that the lab gives the agent.
fn state(site: &lab::site::Site) -> PathBuf {
    site.node.state().join("kirsa")
}

fn break_disk(site: &lab::site::Site, disk: Disk) -> Result<()> {
    let folder = state(site);
    if disk == Disk::NotADirectory {
        return Ok(fs::write(folder, "")?);
    }
    fs::create_dir(&folder)?;
    let flags = MsFlags::MS_NOSUID | MsFlags::MS_NODEV;
    mount(Some("tmpfs"), &folder, Some("tmpfs"), flags, Some("size=4k,mode=0700"))?;
    match disk {
        Disk::Full => fs::write(folder.join("other-data"), [0; 4 << 10])?,
        _ => {
            let flags = flags | MsFlags::MS_REMOUNT | MsFlags::MS_RDONLY;
            mount(None::<&str>, &folder, None::<&str>, flags, Some("size=4k,mode=0700"))?;
        }
    }
    Ok(())
}

/// No response depends on the disk, so a broken disk only matters at a restart, which invalidates IMDS tokens.
fn broken_disk_costs_only_imds_tokens(disk: Disk) -> Result<()> {
    let site = site()?;
    let warm = site.pod_with_role("warm")?;
    let cold = site.pod("cold")?;
    break_disk(&site, disk)?;
    let agent = site.start()?;
    let warned = |entry: &serde_json::Value| {
        field(entry, "level") == Some("WARN") && field(entry, "dir") == state(&site).to_str()
    };
    agent.wait_for_log(|entry| warned(entry) && field(entry, "message").is_some_and(|m| m.contains("--state-dir")))?;
    let token = warm.imds().put_token(21_600)?;
    let with_token = || warm.imds().get(CREDENTIALS_PATH).header(TOKEN, &token).send();
    ensure!(with_token()?.status == 200);
    Credentials::of(&warm)?;
    site.give_role(&cold)?;
    Credentials::of(&cold)?;
    agent.kill()?;
    let agent = site.start()?;
    ensure!(with_token()?.status == 401, "the agent has a new key");
    ensure!(list(&warm)?.status == 200, "IMDSv1 needs no token");
    let renewed = warm.imds().put_token(21_600)?;
    ensure!(warm.imds().get(CREDENTIALS_PATH).header(TOKEN, &renewed).send()?.status == 200);
    agent.stop()
}

#[test]
fn full_disk_costs_only_imds_tokens() -> Result<()> {
    broken_disk_costs_only_imds_tokens(Disk::Full)
}

#[test]
fn read_only_disk_costs_only_imds_tokens() -> Result<()> {
    broken_disk_costs_only_imds_tokens(Disk::ReadOnly)
}

#[test]
fn state_dir_that_is_a_file_costs_only_tokens() -> Result<()> {
    broken_disk_costs_only_imds_tokens(Disk::NotADirectory)
}

/// The agent reads the key only at start: a disk that fills up later changes nothing while the agent runs, nor at its
/// next start if the key is readable.
#[test]
fn disk_that_fills_up_later_costs_nothing() -> Result<()> {
    let site = site()?;
    let warm = site.pod_with_role("warm")?;
    let folder = state(&site);
    fs::create_dir(&folder)?;
    mount(Some("tmpfs"), &folder, Some("tmpfs"), MsFlags::MS_NOSUID, Some("size=8k,mode=0700"))?;
    let agent = site.start()?;
    let token = warm.imds().put_token(21_600)?;
    let first = Credentials::of(&warm)?;
    fs::write(folder.join("other-data"), [0; 4 << 10])?;
    first.is_served_to(&warm)?;
    agent.kill()?;
    let agent = site.start()?;
    ensure!(warm.imds().get(CREDENTIALS_PATH).header(TOKEN, &token).send()?.status == 200, "the agent kept its key");
    agent.stop()?;
    umount(&folder)?;
    Ok(())
}

/// A firewall restart removes all tables. Until the redirect is repaired, policy routing blocks the node's own metadata
/// service.
#[test]
fn flushed_rules_are_repaired_and_counted() -> Result<()> {
    let site = site()?;
    let warm = site.pod_with_role("warm")?;
    let cold = site.pod("cold")?;
    let agent = site.start()?;
    let first = Credentials::of(&warm)?;
    site.give_role(&cold)?;
    for flushed in 1..=3 {
        site.node.netns().shell("nft flush ruleset")?;
        poll("the redirect to be back", TIMEOUT, || {
            site.node.netns().shell("nft list table inet kirsa").is_ok_and(|rules| rules.contains("dnat")).then_some(())
        })?;
        poll("a count of the repair", TIMEOUT, || {
            agent
                .metric("kirsa_redirect_repaired_total", &[])
                .is_ok_and(|count| count == f64::from(flushed))
                .then_some(())
        })?;
        first.is_served_to(&warm)?;
        poll("readiness", TIMEOUT, || agent.admin("/readyz").is_ok_and(|ready| ready.status == 200).then_some(()))?;
        agent.wait_for_log(|entry| {
            field(entry, "level") == Some("WARN") && field(entry, "message").is_some_and(|m| m.contains("redirect"))
        })?;
    }
    Credentials::of(&cold).context("a cold session after the repair")?;
    ensure!(site.calls("warm").len() == 1, "{:?}", site.calls("warm"));
    agent.stop()
}

/// Adds a firewall that drops packets to the agent's port.
#[test]
fn firewall_on_the_port_makes_the_agent_unready() -> Result<()> {
    let site = site()?;
    let warm = site.pod_with_role("warm")?;
    let agent = site.start()?;
    let first = Credentials::of(&warm)?;
    site.node.netns().shell(
        "nft 'table inet firewall { chain input { type filter hook input priority 0; tcp dport 338 drop; }; }'",
    )?;
    poll("the agent not to be ready", TIMEOUT, || {
        agent.admin("/readyz").ok().filter(|ready| ready.status == 503 && ready.body.contains("redirect"))
    })?;
    ensure!(agent.metric("kirsa_redirect_verified", &[])? == 0.0);
    site.node.netns().shell("nft delete table inet firewall")?;
    agent.wait_ready()?;
    first.is_served_to(&warm)?;
    site.no_pod_got_outside()?;
    agent.stop()
}
