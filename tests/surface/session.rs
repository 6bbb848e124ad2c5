//! IMDSv2 session tokens.

use std::fs;

use anyhow::{Context, Result, ensure};
use lab::agent::{Agent, field};
use lab::http::{CREDENTIALS_PATH, TOKEN, TOKEN_TTL, Wire};
use lab::poll::poll;
use lab::sts::{Effect, Fault};

use super::{PATIENCE, credentials, get, get_with, nobody_was_asked_but_sts_for, opens_the_session_of, site};

const TOKEN_PATH: &str = "/latest/api/token";

/// IMDS-1
#[test]
fn a_token_is_printable_and_comes_with_the_ttl_that_was_asked_for() -> Result<()> {
    let site = site()?;
    let idle = site.pod("idle")?;
    let agent = site.start()?;
    let answer = idle.imds().put(TOKEN_PATH).header(TOKEN_TTL, "21600").send()?;
    ensure!(answer.status == 200 && answer.header(TOKEN_TTL) == Some("21600"), "{answer:?}");
    ensure!(answer.header("content-type") == Some("text/plain"), "{answer:?}");
    ensure!(!answer.body.is_empty() && answer.body.bytes().all(|byte| byte.is_ascii_graphic()), "{answer:?}");
    ensure!(answer.body.len() <= 64, "longer than the Common Runtime can take: {answer:?}");
    nobody_was_asked_but_sts_for(&site, &[])?;
    agent.stop()
}

/// IMDS-2
#[test]
fn a_put_may_be_framed_in_any_way_and_leaves_the_connection_usable() -> Result<()> {
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
        let answer = wire.response().with_context(|| format!("{rest:?}"))?;
        ensure!(answer.status == 200 && answer.header("connection").is_none(), "{rest:?}: {answer:?}");
    }
    // As s3fs does it: the body comes when the server says so.
    wire.send(format!("{head}Transfer-Encoding: chunked\r\nExpect: 100-continue\r\n\r\n"))?;
    ensure!(wire.line()? == "HTTP/1.1 100 Continue" && wire.line()?.is_empty());
    wire.send("0\r\n\r\n")?;
    ensure!(wire.response()?.status == 200);
    wire.send(format!("GET {} HTTP/1.1\r\nHost: 169.254.169.254\r\n\r\n", credentials("reader")))?;
    opens_the_session_of(&site, "reader", &wire.response()?)?;
    nobody_was_asked_but_sts_for(&site, &["reader"])?;
    agent.stop()
}

/// IMDS-3
#[test]
fn a_ttl_is_from_one_second_to_six_hours() -> Result<()> {
    let site = site()?;
    let idle = site.pod("idle")?;
    let agent = site.start()?;
    let mut imds = idle.imds();
    for ttl in ["1", "10", "60", "300", "600", "900", "21600"] {
        let answer = imds.put(TOKEN_PATH).header(TOKEN_TTL, ttl).send()?;
        ensure!(answer.status == 200 && answer.header(TOKEN_TTL) == Some(ttl), "{ttl}: {answer:?}");
    }
    for ttl in ["0", "21601", "-1", "+60", "1.5", "1h", "six", "", "4294967297", "99999999999999999999"] {
        let answer = imds.put(TOKEN_PATH).header(TOKEN_TTL, ttl).send()?;
        ensure!(answer.status == 400, "{ttl:?}: {answer:?}");
    }
    ensure!(imds.put(TOKEN_PATH).send()?.status == 400, "without a TTL");
    nobody_was_asked_but_sts_for(&site, &[])?;
    agent.stop()
}

/// IMDS-4, and IMDS-25 as far as tokens go. That it takes no time is tested on a paused clock, and measured by
/// `make bench`.
#[test]
fn there_is_a_token_whatever_is_wrong() -> Result<()> {
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
    nobody_was_asked_but_sts_for(&site, &["cold", "denied"])?;
    agent.stop()
}

/// IMDS-5
#[test]
fn requests_without_a_token_are_answered_until_imdsv2_is_required() -> Result<()> {
    let site = site()?;
    let (reader, idle) = (site.pod_with_role("reader")?, site.pod("idle")?);
    let agent = site.start()?;
    ensure!(get(&reader, CREDENTIALS_PATH)?.body == "reader-role");
    opens_the_session_of(&site, "reader", &get(&reader, &credentials("reader"))?)?;
    agent.stop()?;

    let agent = Agent::start(&site.node, &site.options.clone().switch("--require-imdsv2"))?;
    let mut imds = reader.imds();
    let token = imds.put_token(60)?;
    for path in ["/", "/latest/meta-data/", CREDENTIALS_PATH, &credentials("reader")] {
        ensure!(get(&reader, path)?.status == 401, "{path} without a token");
        ensure!(get_with(&mut imds, path, &[(TOKEN, &token)])?.status == 200, "{path} with a token");
    }
    ensure!(get(&idle, CREDENTIALS_PATH)?.status == 401, "who has no role learns of the token first");
    let refusal = agent.wait_for_refusal("imds_token_required")?;
    ensure!(field(&refusal, "advice").is_some_and(|advice| advice.contains("--require-imdsv2")), "{refusal}");
    nobody_was_asked_but_sts_for(&site, &["reader"])?;
    agent.stop()
}

/// IMDS-5
#[test]
fn a_service_account_can_require_imdsv2_of_its_pods_alone() -> Result<()> {
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
        ensure!(get(&reader, path.replace("strict", "reader").as_str())?.status == 200, "{path} of another account");
    }
    nobody_was_asked_but_sts_for(&site, &["reader", "strict"])?;
    agent.stop()
}

/// IMDS-6: also where it does not matter who is calling, and nobody knows.
#[test]
fn a_token_that_was_tampered_with_is_unauthorized_from_whoever_it_comes() -> Result<()> {
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
    let answer = get_with(&mut stranger.imds(), "/", &[(TOKEN, &readers)])?;
    ensure!(answer.status == 503, "whose it is cannot be known before the pod is: {answer:?}");
    agent.stop()
}

/// IMDS-6
#[test]
fn a_token_that_is_malformed_expired_or_another_pods_is_unauthorized() -> Result<()> {
    let site = site()?;
    let (reader, writer) = (site.pod_with_role("reader")?, site.pod_with_role("writer")?);
    let agent = site.start()?;
    let (mut imds, path) = (reader.imds(), credentials("reader"));
    let foreign = writer.imds().put_token(21_600)?;
    for wrong in ["", "INVALID", "AQAEexpired==", "é", &foreign, &"x".repeat(4_096)] {
        for path in ["/", "/latest/meta-data/", CREDENTIALS_PATH, &path, "/latest/no-such-thing"] {
            let answer = get_with(&mut imds, path, &[(TOKEN, wrong)])?;
            ensure!(answer.status == 401, "{path} with {wrong:?}: {answer:?}");
        }
    }
    let brief = imds.put_token(1)?;
    poll("the token to expire", PATIENCE, || {
        let answer = get_with(&mut imds, &path, &[(TOKEN, &brief)]);
        answer.is_ok_and(|answer| answer.status == 401).then_some(())
    })?;
    let fresh = imds.put_token(60)?;
    opens_the_session_of(&site, "reader", &get_with(&mut imds, &path, &[(TOKEN, &fresh)])?)?;
    nobody_was_asked_but_sts_for(&site, &["reader", "writer"])?;
    agent.stop()
}

/// IMDS-7
#[test]
fn a_token_outlives_the_agent_in_whatever_way_that_ends() -> Result<()> {
    let site = site()?;
    let reader = site.pod_with_role("reader")?;
    let agent = site.start()?;
    let token = reader.imds().put_token(21_600)?;
    let holds = || -> Result<bool> {
        let answer = get_with(&mut reader.imds(), &credentials("reader"), &[(TOKEN, &token)])?;
        ensure!(answer.status == 200 || answer.status == 401, "{answer:?}");
        Ok(answer.status == 200)
    };
    ensure!(holds()?);
    agent.stop()?;
    let agent = site.start()?;
    ensure!(holds()?, "after SIGTERM");
    agent.kill()?;
    let agent = site.start()?;
    ensure!(holds()?, "after SIGKILL");
    agent.stop()?;

    // A key that was cut short, by a full disk for instance, is no key.
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
    ensure!(get_with(&mut reader.imds(), CREDENTIALS_PATH, &[(TOKEN, &again)])?.status == 200, "the new key is kept");
    nobody_was_asked_but_sts_for(&site, &["reader"])?;
    agent.stop()
}
