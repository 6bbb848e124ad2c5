//! IMDS tokens.

use std::fs;

use anyhow::{Context, Result, ensure};
use lab::agent::{Agent, field};
use lab::http::{CREDENTIALS_PATH, TOKEN, TOKEN_TTL, Wire};
use lab::poll::poll;
use lab::sts::{Effect, Fault};

use super::{TIMEOUT, credentials, get, get_with, has_credentials_of, no_upstream_calls_except_sts, site};

const TOKEN_PATH: &str = "/latest/api/token";

/// IMDS-1
#[test]
fn token_is_printable_and_has_requested_ttl() -> Result<()> {
    let site = site()?;
    let idle = site.pod("idle")?;
    let agent = site.start()?;
    let response = idle.imds().put(TOKEN_PATH).header(TOKEN_TTL, "21600").send()?;
    ensure!(response.status == 200 && response.header(TOKEN_TTL) == Some("21600"), "{response:?}");
    ensure!(response.header("content-type") == Some("text/plain"), "{response:?}");
    ensure!(!response.body.is_empty() && response.body.bytes().all(|byte| byte.is_ascii_graphic()), "{response:?}");
    ensure!(response.body.len() <= 64, "longer than the Common Runtime accepts: {response:?}");
    no_upstream_calls_except_sts(&site, &[])?;
    agent.stop()
}

/// IMDS-2
#[test]
fn put_in_any_framing_keeps_connection_usable() -> Result<()> {
    let site = site()?;
    let reader = site.pod_with_role("reader")?;
    let agent = site.start()?;
    let head = format!("PUT {TOKEN_PATH} HTTP/1.1\r\nHost: 169.254.169.254\r\n{TOKEN_TTL}: 60\r\n");
    let mut wire = Wire::connect(&reader)?;
    for rest in [
        "\r\n",
        "Content-Length: 0\r\n\r\n",
        "Content-Length: 5\r\n\r\nhello",
        "Transfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
        "Transfer-Encoding: chunked\r\n\r\n5\r\nhello\r\n0\r\n\r\n",
        "Content-Type: application/x-www-form-urlencoded\r\nContent-Length: 0\r\n\r\n",
    ] {
        wire.send(format!("{head}{rest}"))?;
        let response = wire.response().with_context(|| format!("{rest:?}"))?;
        ensure!(response.status == 200 && response.header("connection").is_none(), "{rest:?}: {response:?}");
    }
    // s3fs sends the body after 100 Continue.
    wire.send(format!("{head}Transfer-Encoding: chunked\r\nExpect: 100-continue\r\n\r\n"))?;
    ensure!(wire.line()? == "HTTP/1.1 100 Continue" && wire.line()?.is_empty());
    wire.send("0\r\n\r\n")?;
    ensure!(wire.response()?.status == 200);
    wire.send(format!("GET {} HTTP/1.1\r\nHost: 169.254.169.254\r\n\r\n", credentials("reader")))?;
    has_credentials_of(&site, "reader", &wire.response()?)?;
    no_upstream_calls_except_sts(&site, &["reader"])?;
    agent.stop()
}

/// IMDS-3
#[test]
fn ttl_is_from_one_second_to_six_hours() -> Result<()> {
    let site = site()?;
    let idle = site.pod("idle")?;
    let agent = site.start()?;
    let mut imds = idle.imds();
    for ttl in ["1", "10", "60", "300", "600", "900", "21600"] {
        let response = imds.put(TOKEN_PATH).header(TOKEN_TTL, ttl).send()?;
        ensure!(response.status == 200 && response.header(TOKEN_TTL) == Some(ttl), "{ttl}: {response:?}");
    }
    for ttl in ["0", "21601", "-1", "+60", "1.5", "1h", "six", "", "4294967297", "99999999999999999999"] {
        let response = imds.put(TOKEN_PATH).header(TOKEN_TTL, ttl).send()?;
        ensure!(response.status == 400, "{ttl:?}: {response:?}");
    }
    ensure!(imds.put(TOKEN_PATH).send()?.status == 400, "without a TTL");
    no_upstream_calls_except_sts(&site, &[])?;
    agent.stop()
}

/// IMDS-4, and IMDS-25 for tokens. `hold_tests.rs` tests the timing, and `make bench` measures it.
#[test]
fn token_is_issued_whatever_is_wrong() -> Result<()> {
    let site = site()?;
    site.sts.inject(Fault::always(Effect::NoAnswer));
    let (cold, idle) = (site.pod_with_role("cold")?, site.pod("idle")?);
    let (denied, stranger) = (site.pod_with_role("denied")?, site.stranger("stranger")?);
    site.sts.inject(Fault::always(Effect::error("AccessDenied")).of_role(&site.arn("denied")));
    let agent = site.start()?;
    for pod in [cold, idle, denied, stranger] {
        let mut imds = pod.imds();
        for _ in 0..100 {
            imds.put_token(60).with_context(|| pod.name().to_owned())?;
        }
    }
    no_upstream_calls_except_sts(&site, &["cold", "denied"])?;
    agent.stop()
}

/// IMDS-5
#[test]
fn imdsv1_works_until_imdsv2_is_required() -> Result<()> {
    let site = site()?;
    let (reader, idle) = (site.pod_with_role("reader")?, site.pod("idle")?);
    let agent = site.start()?;
    ensure!(get(&reader, CREDENTIALS_PATH)?.body == "reader-role");
    has_credentials_of(&site, "reader", &get(&reader, &credentials("reader"))?)?;
    agent.stop()?;

    let agent = Agent::start(&site.node, &site.options.clone().switch("--require-imdsv2"))?;
    let mut imds = reader.imds();
    let token = imds.put_token(60)?;
    for path in ["/", "/latest/meta-data/", CREDENTIALS_PATH, &credentials("reader")] {
        ensure!(get(&reader, path)?.status == 401, "{path} without a token");
        ensure!(get_with(&mut imds, path, &[(TOKEN, &token)])?.status == 200, "{path} with a token");
    }
    ensure!(get(&idle, CREDENTIALS_PATH)?.status == 401, "the token is checked before the role");
    let refusal = agent.wait_for_refusal("imds_token_required")?;
    ensure!(field(&refusal, "advice").is_some_and(|advice| advice.contains("--require-imdsv2")), "{refusal}");
    no_upstream_calls_except_sts(&site, &["reader"])?;
    agent.stop()
}

/// IMDS-5
#[test]
fn service_account_can_require_imdsv2() -> Result<()> {
    let site = site()?;
    let (reader, strict) = (site.pod_with_role("reader")?, site.stranger("strict")?);
    site.put(site.with_role(&strict)?.annotation("kirsa.dev/require-imdsv2", "true"))?;
    let agent = site.start()?;
    agent.wait_for_log(|entry| field(entry, "message") == Some("node metadata read"))?;
    for path in [
        "/",
        "/latest/meta-data/",
        "/latest/meta-data/placement/region",
        "/latest/meta-data/iam/info",
        "/latest/dynamic/instance-identity/document",
        CREDENTIALS_PATH,
        &credentials("strict"),
    ] {
        ensure!(get(&strict, path)?.status == 401, "{path} without a token");
        let token = strict.imds().put_token(60)?;
        ensure!(get_with(&mut strict.imds(), path, &[(TOKEN, &token)])?.status == 200, "{path} with a token");
        ensure!(
            get(&reader, path.replace("strict", "reader").as_str())?.status == 200,
            "{path} with another service account"
        );
    }
    no_upstream_calls_except_sts(&site, &["reader", "strict"])?;
    agent.stop()
}

/// IMDS-6: also on paths that are open to unknown callers.
#[test]
fn tampered_token_is_401_for_any_caller() -> Result<()> {
    let site = site()?;
    let (reader, stranger) = (site.pod_with_role("reader")?, site.stranger("stranger")?);
    let agent = site.start()?;
    let own = stranger.imds().put_token(60)?;
    ensure!(get_with(&mut stranger.imds(), "/", &[(TOKEN, &own)])?.status == 200, "bound to its address");
    ensure!(get_with(&mut reader.imds(), "/", &[(TOKEN, &own)])?.status == 401, "at another address");
    let changed = if own.ends_with('A') { 'B' } else { 'A' };
    let forged = format!("{}{changed}", &own[..own.len() - 1]);
    let middle = own.len() / 2;
    let forged_too =
        format!("{}{}{}", &own[..middle], if own[middle..].starts_with('x') { 'y' } else { 'x' }, &own[middle + 1..]);
    for token in [&forged, &forged_too] {
        ensure!(get_with(&mut stranger.imds(), "/", &[(TOKEN, token)])?.status == 401, "{token}");
    }
    let readers = reader.imds().put_token(60)?;
    let response = get_with(&mut stranger.imds(), "/", &[(TOKEN, &readers)])?;
    ensure!(response.status == 503, "a pod-bound token cannot be verified before the pod is known: {response:?}");
    agent.stop()
}

/// IMDS-6
#[test]
fn invalid_tokens_are_401() -> Result<()> {
    let site = site()?;
    let (reader, writer) = (site.pod_with_role("reader")?, site.pod_with_role("writer")?);
    let agent = site.start()?;
    let (mut imds, path) = (reader.imds(), credentials("reader"));
    let foreign = writer.imds().put_token(21_600)?;
    for wrong in ["", "INVALID", "AQAEexpired==", "é", &foreign, &"x".repeat(4_096)] {
        for path in ["/", "/latest/meta-data/", CREDENTIALS_PATH, &path, "/latest/no-such-thing"] {
            let response = get_with(&mut imds, path, &[(TOKEN, wrong)])?;
            ensure!(response.status == 401, "{path} with {wrong:?}: {response:?}");
        }
    }
    let brief = imds.put_token(1)?;
    poll("the token to expire", TIMEOUT, || {
        let response = get_with(&mut imds, &path, &[(TOKEN, &brief)]);
        response.is_ok_and(|response| response.status == 401).then_some(())
    })?;
    let fresh = imds.put_token(60)?;
    has_credentials_of(&site, "reader", &get_with(&mut imds, &path, &[(TOKEN, &fresh)])?)?;
    no_upstream_calls_except_sts(&site, &["reader", "writer"])?;
    agent.stop()
}

/// IMDS-7
#[test]
fn token_survives_agent_restarts() -> Result<()> {
    let site = site()?;
    let reader = site.pod_with_role("reader")?;
    let agent = site.start()?;
    let token = reader.imds().put_token(21_600)?;
    let holds = || -> Result<bool> {
        let response = get_with(&mut reader.imds(), &credentials("reader"), &[(TOKEN, &token)])?;
        ensure!(response.status == 200 || response.status == 401, "{response:?}");
        Ok(response.status == 200)
    };
    ensure!(holds()?);
    agent.stop()?;
    let agent = site.start()?;
    ensure!(holds()?, "after SIGTERM");
    agent.kill()?;
    let agent = site.start()?;
    ensure!(holds()?, "after SIGKILL");
    agent.stop()?;

    // A truncated key, for example after a full disk, is replaced.
    let key = site.node.state().join("kirsa/session-token.key");
    fs::write(&key, &fs::read(&key)?[..7])?;
    let agent = site.start()?;
    ensure!(!holds()?, "under another key");
    agent.wait_for_log(|entry| {
        field(entry, "level") == Some("WARN")
            && field(entry, "message").is_some_and(|message| message.contains("key for IMDS tokens"))
    })?;
    let again = reader.imds().put_token(21_600)?;
    agent.stop()?;
    let agent = site.start()?;
    ensure!(
        get_with(&mut reader.imds(), CREDENTIALS_PATH, &[(TOKEN, &again)])?.status == 200,
        "the new key was not saved"
    );
    no_upstream_calls_except_sts(&site, &["reader"])?;
    agent.stop()
}
