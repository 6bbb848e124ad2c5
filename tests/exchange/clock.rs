//! Clock skew between the node and STS.

use std::time::Duration;

use anyhow::{Context, Result, ensure};
use lab::agent::{Agent, field};
use lab::poll::poll;

use super::{TIMEOUT, credentials, detail, list, refusal, session, site};

fn warning(agent: &Agent, text: &str) -> Result<()> {
    let warned = |entry: &serde_json::Value| {
        field(entry, "level") == Some("WARN") && field(entry, "message").is_some_and(|message| message.contains(text))
    };
    agent.wait_for_log(warned).map(drop)
}

/// SDKs would treat the session as expired.
#[test]
fn node_clock_ahead_of_sts_is_refused() -> Result<()> {
    let site = site()?;
    site.sts.configure(|settings| settings.clock_skew_seconds = -3_600);
    let reader = site.pod_with_role("reader")?;
    let agent = site.start()?;
    ensure!(credentials(&reader)?.status == 503 && list(&reader)?.status == 503);
    let entry = refusal(&agent, &reader, "clock_skew")?;
    ensure!(
        detail(&entry).contains("clock") && field(&entry, "advice").is_some_and(|a| a.contains("clock")),
        "{entry}"
    );
    ensure!(agent.metric("kirsa_exchange_seconds_count", &[("step", "sts"), ("outcome", "clock_skew")])? >= 1.0);
    ensure!(agent.metric("kirsa_sts_clock_skew_seconds", &[])? >= 3_590.0);

    site.sts.configure(|settings| settings.clock_skew_seconds = 0);
    let answer = poll("credentials", TIMEOUT + Duration::from_secs(30), || {
        credentials(&reader).ok().filter(|answer| answer.status == 200)
    })?;
    session(&site, &reader, &answer)?;
    agent.stop()
}

#[test]
fn node_clock_behind_sts_is_served_and_logged() -> Result<()> {
    let site = site()?;
    site.sts.configure(|settings| settings.clock_skew_seconds = 3_600);
    let reader = site.pod_with_role("reader")?;
    let agent = site.start()?;
    let answer = credentials(&reader)?;
    let dated = session(&site, &reader, &answer)?.expiration.to_string();
    ensure!(answer.json()?["Expiration"].as_str().context("a time")? == dated, "{answer:?}");
    warning(&agent, "behind")?;
    ensure!(agent.metric("kirsa_sts_clock_skew_seconds", &[])? <= -3_590.0);
    agent.stop()
}

/// A store may issue short sessions even if the clocks agree.
#[test]
fn sessions_below_two_minutes_are_refused() -> Result<()> {
    let site = site()?;
    site.sts.configure(|settings| settings.session_seconds = Some(100));
    let (brief, short) = (site.pod_with_role("brief")?, site.pod_with_role("short")?);
    let agent = site.start()?;
    ensure!(credentials(&brief)?.status == 503);
    refusal(&agent, &brief, "clock_skew")?;
    site.sts.configure(|settings| settings.session_seconds = Some(600));
    session(
        &site,
        &short,
        &poll("credentials", TIMEOUT, || credentials(&short).ok().filter(|answer| answer.status == 200))?,
    )?;
    warning(&agent, "shorter")?;
    agent.stop()
}
