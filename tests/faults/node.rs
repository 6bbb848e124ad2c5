//! The node itself: its disk, and whoever else sets rules on it.

use std::fs;
use std::path::PathBuf;

use anyhow::{Context, Result, ensure};
use lab::agent::field;
use lab::http::{CREDENTIALS_PATH, TOKEN};
use lab::poll::poll;
use nix::mount::{MsFlags, mount, umount};

use super::{Held, PATIENCE, list, site};

/// What the state directory is on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Disk {
    Full,
    ReadOnly,
    /// Another program's file stands where the folder should be.
    NoFolder,
}

/// The folder that the lab gives an agent for its state.
fn state(site: &lab::site::Site) -> PathBuf {
    site.node.state().join("kirsa")
}

fn spoil(site: &lab::site::Site, disk: Disk) -> Result<()> {
    let folder = state(site);
    if disk == Disk::NoFolder {
        return Ok(fs::write(folder, "")?);
    }
    fs::create_dir(&folder)?;
    let flags = MsFlags::MS_NOSUID | MsFlags::MS_NODEV;
    mount(Some("tmpfs"), &folder, Some("tmpfs"), flags, Some("size=4k,mode=0700"))?;
    match disk {
        Disk::Full => fs::write(folder.join("somebody-elses"), [0; 4 << 10])?,
        _ => {
            let flags = flags | MsFlags::MS_REMOUNT | MsFlags::MS_RDONLY;
            mount(None::<&str>, &folder, None::<&str>, flags, Some("size=4k,mode=0700"))?;
        }
    }
    Ok(())
}

/// The disk holds nothing that an answer depends on: only a restart shows that it is broken.
fn a_broken_disk_costs_session_tokens_at_a_restart_and_nothing_else(disk: Disk) -> Result<()> {
    let site = site()?;
    let warm = site.pod_with_role("warm")?;
    let cold = site.pod("cold")?;
    spoil(&site, disk)?;
    let agent = site.start()?;
    let warned = |entry: &serde_json::Value| {
        field(entry, "level") == Some("WARN") && field(entry, "dir") == state(&site).to_str()
    };
    agent.wait_for_log(|entry| warned(entry) && field(entry, "message").is_some_and(|m| m.contains("--state-dir")))?;
    let token = warm.imds().put_token(21_600)?;
    let with_token = || warm.imds().get(CREDENTIALS_PATH).header(TOKEN, &token).send();
    ensure!(with_token()?.status == 200);
    Held::by(&warm)?;
    site.give_role(&cold)?;
    Held::by(&cold)?;
    agent.kill()?;
    let agent = site.start()?;
    ensure!(with_token()?.status == 401, "the key was made anew");
    ensure!(list(&warm)?.status == 200, "IMDSv1 knows no tokens");
    let renewed = warm.imds().put_token(21_600)?;
    ensure!(warm.imds().get(CREDENTIALS_PATH).header(TOKEN, &renewed).send()?.status == 200);
    agent.stop()
}

#[test]
fn a_full_disk_costs_session_tokens_at_a_restart_and_nothing_else() -> Result<()> {
    a_broken_disk_costs_session_tokens_at_a_restart_and_nothing_else(Disk::Full)
}

#[test]
fn a_read_only_disk_costs_session_tokens_at_a_restart_and_nothing_else() -> Result<()> {
    a_broken_disk_costs_session_tokens_at_a_restart_and_nothing_else(Disk::ReadOnly)
}

#[test]
fn a_state_directory_that_is_a_file_costs_session_tokens_at_a_restart_and_nothing_else() -> Result<()> {
    a_broken_disk_costs_session_tokens_at_a_restart_and_nothing_else(Disk::NoFolder)
}

/// The key is read at the start only: a disk that fills up or breaks later changes nothing while the agent runs, and
/// nothing at its next start, as long as the key can be read.
#[test]
fn a_disk_that_fills_up_later_costs_nothing() -> Result<()> {
    let site = site()?;
    let warm = site.pod_with_role("warm")?;
    let folder = state(&site);
    fs::create_dir(&folder)?;
    mount(Some("tmpfs"), &folder, Some("tmpfs"), MsFlags::MS_NOSUID, Some("size=8k,mode=0700"))?;
    let agent = site.start()?;
    let token = warm.imds().put_token(21_600)?;
    let first = Held::by(&warm)?;
    fs::write(folder.join("somebody-elses"), [0; 4 << 10])?;
    first.is_served_to(&warm)?;
    agent.kill()?;
    let agent = site.start()?;
    ensure!(warm.imds().get(CREDENTIALS_PATH).header(TOKEN, &token).send()?.status == 200, "it read its key");
    agent.stop()?;
    umount(&folder)?;
    Ok(())
}

/// What a firewall's restart does: every table goes, of everybody. Until the redirect is back, policy
/// routing keeps pods from the node's own metadata service.
#[test]
fn a_flush_of_all_rules_is_repaired_counted_and_no_session_is_lost() -> Result<()> {
    let site = site()?;
    let warm = site.pod_with_role("warm")?;
    let cold = site.pod("cold")?;
    let agent = site.start()?;
    let first = Held::by(&warm)?;
    site.give_role(&cold)?;
    for flushed in 1..=3 {
        site.node.netns().shell("nft flush ruleset")?;
        poll("the redirect to be back", PATIENCE, || {
            site.node.netns().shell("nft list table inet kirsa").is_ok_and(|rules| rules.contains("dnat")).then_some(())
        })?;
        poll("a count of the repair", PATIENCE, || {
            agent
                .metric("kirsa_redirect_repaired_total", &[])
                .is_ok_and(|count| count == f64::from(flushed))
                .then_some(())
        })?;
        first.is_served_to(&warm)?;
        poll("readiness", PATIENCE, || agent.admin("/readyz").is_ok_and(|ready| ready.status == 200).then_some(()))?;
        agent.wait_for_log(|entry| {
            field(entry, "level") == Some("WARN") && field(entry, "message").is_some_and(|m| m.contains("redirect"))
        })?;
    }
    Held::by(&cold).context("a cold session after the repair")?;
    ensure!(site.calls("warm").len() == 1, "{:?}", site.calls("warm"));
    agent.stop()
}

/// Rules of a firewall that drops what goes to the agent's port, as one that knows nothing of it would.
#[test]
fn a_firewall_that_drops_the_port_makes_the_agent_not_ready_and_says_so() -> Result<()> {
    let site = site()?;
    let warm = site.pod_with_role("warm")?;
    let agent = site.start()?;
    let first = Held::by(&warm)?;
    site.node.netns().shell(
        "nft 'table inet firewall { chain input { type filter hook input priority 0; tcp dport 338 drop; }; }'",
    )?;
    poll("the agent not to be ready", PATIENCE, || {
        agent.admin("/readyz").ok().filter(|ready| ready.status == 503 && ready.body.contains("redirect"))
    })?;
    ensure!(agent.metric("kirsa_redirect_verified", &[])? == 0.0);
    site.node.netns().shell("nft delete table inet firewall")?;
    agent.wait_ready()?;
    first.is_served_to(&warm)?;
    site.no_pod_got_outside()?;
    agent.stop()
}
