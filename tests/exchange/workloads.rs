//! Changes of the workloads file while the agent runs.

use std::fs;

use anyhow::{Result, ensure};
use lab::agent::{Agent, field};
use lab::poll::poll;
use lab::sts::{Effect, Fault};

use super::{TIMEOUT, credentials, list, session, site};

#[test]
fn file_change_applies_to_the_next_request() -> Result<()> {
    let site = site()?;
    let pod = site.stranger("reader")?;
    let (without, with) = (lab::workloads::Workload::new(&pod, "reader"), site.with_role(&pod)?);
    site.put(without.clone())?;
    let agent = site.start()?;
    let until =
        |what: &str, status: u16| poll(what, TIMEOUT, || list(&pod).ok().filter(|answer| answer.status == status));
    ensure!(list(&pod)?.status == 404);
    site.put(with.clone())?;
    until("the role to be there", 200)?;
    let first = session(&site, &pod, &credentials(&pod)?)?;

    // Another role: the next response names it, and the first name is no longer found.
    let other = site.arn("other");
    site.trust(&other, "reader");
    let token = with.token_file.clone().unwrap_or_default();
    site.put(without.clone().role(&other, &token))?;
    poll("the other role", TIMEOUT, || list(&pod).ok().filter(|answer| answer.body == "other-role"))?;
    ensure!(site.session(&pod.imds().credentials("other-role")?.ok()?)?.role_arn == other);
    ensure!(credentials(&pod)?.status == 404);

    // Back to the first role: its cached session was dropped.
    site.put(with)?;
    poll("the first role", TIMEOUT, || list(&pod).ok().filter(|answer| answer.body == "reader-role"))?;
    ensure!(session(&site, &pod, &credentials(&pod)?)?.access_key_id != first.access_key_id);

    site.put(without)?;
    until("the role to be gone", 404)?;
    ensure!(credentials(&pod)?.status == 404);
    site.remove("reader")?;
    until("the pod to be gone", 503)?;
    poll("its sessions to be dropped", TIMEOUT, || {
        agent.metric("kirsa_cache_entries", &[]).is_ok_and(|entries| entries == 0.0).then_some(())
    })?;
    agent.stop()
}

#[test]
fn broken_file_is_ignored_and_its_line_logged() -> Result<()> {
    let site = site()?;
    let (reader, late) = (site.pod_with_role("reader")?, site.stranger("late")?);
    let agent = site.start()?;
    session(&site, &reader, &credentials(&reader)?)?;
    let entry = "- pod: reader\n  serviceAccount: reader\n  addresses: [10.0.0.2]\n";
    for (text, named) in [
        ("workloads:\n- pod: reader\n  addresses: [\n".to_owned(), "line"),
        (format!("workloads:\n{entry}{entry}"), "line 5"),
        (format!("workloads:\n{entry}  role: arn:aws:iam::111122223333:role/reader\n"), "line 2"),
        (format!("workloads:\n{entry}  tokenFiel: /x\n"), "tokenFiel"),
        ("workloads:\n- pod: reader\n  addresses: [10.0.0.300]\n".to_owned(), "line 3"),
        ("\u{0}\u{1}".to_owned(), "line 1"),
        (String::new(), "line 1"),
    ] {
        let mark = agent.process().mark();
        fs::write(site.workloads(), &text)?;
        let entry = agent.wait_for_log_after(mark, |entry| field(entry, "level") == Some("ERROR"))?;
        let (file, error) = (field(&entry, "file"), field(&entry, "error").unwrap_or_default());
        ensure!(file == Some(&site.workloads().display().to_string()) && error.contains(named), "{text:?}: {entry}");
        session(&site, &reader, &credentials(&reader)?)?;
    }
    let mark = agent.process().mark();
    fs::remove_file(site.workloads())?;
    agent.wait_for_log_after(mark, |entry| field(entry, "level") == Some("ERROR"))?;
    session(&site, &reader, &credentials(&reader)?)?;

    site.put(site.with_role(&late)?)?;
    poll("the next good file", TIMEOUT, || credentials(&late).is_ok_and(|a| a.status == 200).then_some(()))?;
    session(&site, &reader, &credentials(&reader)?)?;
    ensure!(site.calls("reader").len() == 1, "{:?}", site.calls("reader"));
    agent.stop()
}

#[test]
fn agent_does_not_start_with_a_broken_file() -> Result<()> {
    let site = site()?;
    fs::write(site.workloads(), "workloads:\n- pod: reader\n")?;
    let output = Agent::run_to_end(&site.node, &site.options)?;
    let said = String::from_utf8_lossy(&output.stderr);
    let file = site.workloads().display().to_string();
    ensure!(!output.status.success() && said.contains(&file) && said.contains("line 2"), "{output:?}");
    Ok(())
}

/// Prefetch: the credentials of a new pod are cached before its first request.
#[test]
fn new_entry_is_prefetched() -> Result<()> {
    let site = site()?;
    let agent = site.start()?;
    let late = site.pod_with_role("late")?;
    poll("the prefetched credentials", TIMEOUT, || {
        agent.admin("/debug/sessions").is_ok_and(|sessions| sessions.body.contains("ASIA")).then_some(())
    })?;
    site.sts.inject(Fault::always(Effect::NoAnswer));
    session(&site, &late, &credentials(&late)?)?;
    ensure!(agent.metric("kirsa_cache_misses_total", &[])? == 0.0);
    let left = agent.metric("kirsa_credentials_left_seconds", &[])?;
    ensure!((3_000.0..=3_600.0).contains(&left), "remaining lifetime of the session in use: {left} s");
    agent.stop()
}
