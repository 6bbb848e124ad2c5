//! Retries of clients after a transient failure has passed.

use anyhow::{Context, Result, ensure};
use lab::agent::field;
use lab::http::{CREDENTIALS_PATH, Wire};
use lab::poll::poll;
use lab::process::Process;
use lab::sdk;
use lab::sts::{Effect, Fault};

use super::{TIMEOUT, credentials, get, has_credentials_of, role, site};

/// IMDS-28: for the list, and for the credentials if the client already knows the role's name.
#[test]
fn retry_after_two_503s_succeeds() -> Result<()> {
    let site = site()?;
    let agent = site.start()?;
    for (name, path) in [("list", CREDENTIALS_PATH), ("document", &credentials("document"))] {
        let pod = site.stranger(name)?;
        let entry = site.with_role(&pod)?;
        let get = |path: &str| format!("GET {path} HTTP/1.1\r\nHost: 169.254.169.254\r\n\r\n");
        let mut wire = Wire::connect(&pod)?;
        for _ in 0..2 {
            wire.send(get(path))?;
            let response = wire.response()?;
            ensure!(response.status == 503 && response.header("connection").is_none(), "{path}: {response:?}");
        }
        let mark = agent.process().mark();
        site.put(entry)?;
        agent.wait_for_log_after(mark, |entry| field(entry, "message") == Some("workloads file was read"))?;
        wire.send(get(path))?;
        let mut response = wire.response()?;
        if path == CREDENTIALS_PATH {
            ensure!(response.status == 200 && response.body == role(name), "{response:?}");
            wire.send(get(&credentials(name)))?;
            response = wire.response()?;
        }
        has_credentials_of(&site, name, &response)?;
    }
    agent.stop()
}

/// IMDS-28
#[test]
fn sdk_call_survives_two_503s() -> Result<()> {
    let site = site()?;
    let cold = site.pod("cold")?;
    let agent = site.start()?;
    site.sts.inject(Fault::always(Effect::Status(503)));
    site.give_role(&cold)?;
    // From here on the list reports the failure, however slow this machine is.
    poll("the failure to be known", TIMEOUT, || {
        get(&cold, CREDENTIALS_PATH).is_ok_and(|response| response.status == 503).then_some(())
    })?;
    let refused = || agent.metric("kirsa_requests_total", &[("route", "role_list"), ("outcome", "sts_unavailable")]);
    let before = refused()?;
    let mut sdk = Process::spawn(Some(cold.netns()), "sdk", sdk::rust(&site.sts.url())?)?;
    poll("two refusals", TIMEOUT, || refused().is_ok_and(|now| now - before >= 2.0).then_some(()))?;
    site.sts.heal();
    // A waiting request shortens the retry delay, so that the SDK's retries succeed deterministically.
    ensure!(get(&cold, &credentials("cold"))?.status == 200);
    ensure!(sdk.wait(TIMEOUT)?.success(), "{:?}", sdk.lines());
    // The process has ended, but its output may still be in the pipe.
    let line = poll("the SDK's output", TIMEOUT, || sdk.lines().last().cloned())?;
    let output: serde_json::Value = serde_json::from_str(&line)?;
    let session = site.sts.session(output["access_key_id"].as_str().context("a key")?).context("a session")?;
    ensure!(session.role_arn == site.arn("cold") && output["arn"] == session.arn, "{output} {session:?}");
    agent.stop()
}
