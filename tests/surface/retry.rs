//! What a client that tries again gets, once what was in its way has passed.

use anyhow::{Context, Result, ensure};
use lab::agent::field;
use lab::http::{CREDENTIALS_PATH, Wire};
use lab::poll::poll;
use lab::process::Process;
use lab::sdk;
use lab::sts::{Effect, Fault};

use super::{PATIENCE, credentials, get, opens_the_session_of, role, site};

/// IMDS-28: at the list, and at the credentials for those that know the role's name from before.
#[test]
fn two_503s_are_forgotten_with_the_next_try_on_the_same_connection() -> Result<()> {
    let site = site()?;
    let agent = site.start()?;
    for (name, path) in [("list", CREDENTIALS_PATH), ("document", &credentials("document"))] {
        let pod = site.stranger(name)?;
        let entry = site.with_role(&pod)?;
        let get = |path: &str| format!("GET {path} HTTP/1.1\r\nHost: 169.254.169.254\r\n\r\n");
        let mut wire = Wire::connect(&pod)?;
        for _ in 0..2 {
            wire.send(get(path))?;
            let answer = wire.response()?;
            ensure!(answer.status == 503 && answer.header("connection").is_none(), "{path}: {answer:?}");
        }
        let mark = agent.process().mark();
        site.put(entry)?;
        agent.wait_for_log_after(mark, |entry| field(entry, "message") == Some("workloads file was read"))?;
        wire.send(get(path))?;
        let mut answer = wire.response()?;
        if path == CREDENTIALS_PATH {
            ensure!(answer.status == 200 && answer.body == role(name), "{answer:?}");
            wire.send(get(&credentials(name)))?;
            answer = wire.response()?;
        }
        opens_the_session_of(&site, name, &answer)?;
    }
    agent.stop()
}

/// IMDS-28
#[test]
fn an_sdk_that_is_told_503_twice_succeeds_in_the_same_call() -> Result<()> {
    let site = site()?;
    let cold = site.pod("cold")?;
    let agent = site.start()?;
    site.sts.inject(Fault::always(Effect::Status(503)));
    site.give_role(&cold)?;
    // From here on the list knows of the failure, however slow this machine is.
    poll("the failure to be known", PATIENCE, || {
        get(&cold, CREDENTIALS_PATH).is_ok_and(|answer| answer.status == 503).then_some(())
    })?;
    let refused = || agent.metric("kirsa_requests_total", &[("route", "role_list"), ("outcome", "sts_unavailable")]);
    let before = refused()?;
    let mut sdk = Process::spawn(Some(cold.netns()), "sdk", sdk::rust(&site.sts.url())?)?;
    poll("two refusals", PATIENCE, || refused().is_ok_and(|now| now - before >= 2.0).then_some(()))?;
    site.sts.heal();
    // Whoever waits hurries the next exchange on, so that the SDK's tries need not be lucky.
    ensure!(get(&cold, &credentials("cold"))?.status == 200);
    ensure!(sdk.wait(PATIENCE)?.success(), "{:?}", sdk.lines());
    let said: serde_json::Value = serde_json::from_str(sdk.lines().last().context("a line")?)?;
    let session = site.sts.session(said["access_key_id"].as_str().context("a key")?).context("a session")?;
    ensure!(session.role_arn == site.arn("cold") && said["arn"] == session.arn, "{said} {session:?}");
    agent.stop()
}
