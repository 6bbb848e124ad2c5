//! The file of workloads, while the agent runs.

use std::fs;

use anyhow::{Result, ensure};
use lab::agent::{Agent, field};
use lab::poll::poll;
use lab::sts::{Effect, Fault};

use super::{PATIENCE, credentials, list, session, site};

#[test]
fn a_change_of_the_file_is_followed_by_the_next_answer() -> Result<()> {
    let site = site()?;
    let pod = site.stranger("reader")?;
    let (without, with) = (lab::workloads::Workload::new(&pod, "reader"), site.with_role(&pod)?);
    site.put(without.clone())?;
    let agent = site.start()?;
    let until =
        |what: &str, status: u16| poll(what, PATIENCE, || list(&pod).ok().filter(|answer| answer.status == status));
    ensure!(list(&pod)?.status == 404);
    site.put(with.clone())?;
    until("the role to be there", 200)?;
    let first = session(&site, &pod, &credentials(&pod)?)?;

    // Another role: the next answer is of that one, and the name of the first is not found any more.
    let other = site.arn("other");
    site.trust(&other, "reader");
    let token = with.token_file.clone().unwrap_or_default();
    site.put(without.clone().role(&other, &token))?;
    poll("the other role", PATIENCE, || list(&pod).ok().filter(|answer| answer.body == "other-role"))?;
    ensure!(site.session(&pod.imds().credentials("other-role")?.ok()?)?.role_arn == other);
    ensure!(credentials(&pod)?.status == 404);

    // Back again: what was held of the role that it had no more is dropped.
    site.put(with)?;
    poll("the first role", PATIENCE, || list(&pod).ok().filter(|answer| answer.body == "reader-role"))?;
    ensure!(session(&site, &pod, &credentials(&pod)?)?.access_key_id != first.access_key_id);

    site.put(without)?;
    until("the role to be gone", 404)?;
    ensure!(credentials(&pod)?.status == 404);
    site.remove("reader")?;
    until("the pod to be gone", 503)?;
    poll("its sessions to be dropped", PATIENCE, || {
        agent.metric("kirsa_cache_entries", &[]).is_ok_and(|entries| entries == 0.0).then_some(())
    })?;
    agent.stop()
}

#[test]
fn a_broken_file_changes_nothing_and_the_log_names_the_line() -> Result<()> {
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
    poll("the next good file", PATIENCE, || credentials(&late).is_ok_and(|a| a.status == 200).then_some(()))?;
    session(&site, &reader, &credentials(&reader)?)?;
    ensure!(site.calls("reader").len() == 1, "{:?}", site.calls("reader"));
    agent.stop()
}

#[test]
fn a_file_that_is_broken_from_the_start_ends_the_start() -> Result<()> {
    let site = site()?;
    fs::write(site.workloads(), "workloads:\n- pod: reader\n")?;
    let output = Agent::run_to_end(&site.node, &site.options)?;
    let said = String::from_utf8_lossy(&output.stderr);
    let file = site.workloads().display().to_string();
    ensure!(!output.status.success() && said.contains(&file) && said.contains("line 2"), "{output:?}");
    Ok(())
}

/// A pod that is bound is going to ask: its credentials are there before.
#[test]
fn a_new_entry_has_its_credentials_before_its_first_request() -> Result<()> {
    let site = site()?;
    let agent = site.start()?;
    let late = site.pod_with_role("late")?;
    poll("the credentials to be in hand", PATIENCE, || {
        agent.admin("/debug/sessions").is_ok_and(|slots| slots.body.contains("ASIA")).then_some(())
    })?;
    site.sts.inject(Fault::always(Effect::NoAnswer));
    session(&site, &late, &credentials(&late)?)?;
    ensure!(agent.metric("kirsa_cache_misses_total", &[])? == 0.0);
    let left = agent.metric("kirsa_credentials_left_seconds", &[])?;
    ensure!((3_000.0..=3_600.0).contains(&left), "of the session that is in use now: {left} s");
    agent.stop()
}
