//! HTTP as clients of all ages speak it.

use std::time::Duration;

use anyhow::{Result, ensure};
use lab::http::{CREDENTIALS_PATH, TOKEN, TOKEN_TTL, Wire};

use super::{credentials, opens_the_session_of, site};

/// Between requests, SDKs keep a connection for a minute.
const MINUTE: Duration = Duration::from_secs(60);

/// IMDS-13
#[test]
fn every_version_of_http_1_and_every_way_to_write_headers_is_understood() -> Result<()> {
    let site = site()?;
    let reader = site.pod_with_role("reader")?;
    let agent = site.start()?;
    let path = credentials("reader");

    // One connection, one request after the other.
    let mut wire = Wire::connect(&reader)?;
    wire.send(format!("PUT /latest/api/token HTTP/1.1\r\nHost: 169.254.169.254\r\n{TOKEN_TTL}: 60\r\n\r\n"))?;
    let token = wire.response()?.ok()?;
    for token_header in [TOKEN, "X-aws-ec2-metadata-token", "X-AWS-EC2-METADATA-TOKEN"] {
        for path in [CREDENTIALS_PATH, &path] {
            wire.send(format!("GET {path} HTTP/1.1\r\nHost: 169.254.169.254\r\n{token_header}: {token}\r\n\r\n"))?;
            let answer = wire.response()?;
            ensure!(answer.status == 200 && answer.header("connection") != Some("close"), "{answer:?}");
        }
    }
    for spelling in ["x-aws-ec2-metadata-token-ttl-seconds", "X-AWS-EC2-METADATA-TOKEN-TTL-SECONDS"] {
        wire.send(format!("PUT /latest/api/token HTTP/1.1\r\nhost:169.254.169.254\r\n{spelling}:  60  \r\n\r\n"))?;
        ensure!(wire.response()?.status == 200, "{spelling}");
    }

    // The server closes when it was asked to, and with HTTP/1.0.
    for head in ["HTTP/1.1\r\nHost: 169.254.169.254\r\nConnection: close", "HTTP/1.0", "HTTP/1.0\r\nHost: x"] {
        let mut wire = Wire::open(&reader, format!("GET {path} {head}\r\n\r\n"))?;
        opens_the_session_of(&site, "reader", &wire.response()?)?;
        wire.closed()?;
    }
    let mut wire = Wire::connect(&reader)?;
    for _ in 0..2 {
        wire.send(format!("GET {path} HTTP/1.0\r\nConnection: keep-alive\r\n\r\n"))?;
        opens_the_session_of(&site, "reader", &wire.response()?)?;
    }
    agent.stop()
}

/// IMDS-13
#[test]
fn a_client_that_sends_no_more_is_answered_and_then_let_go() -> Result<()> {
    let site = site()?;
    let late = site.stranger("late")?;
    let entry = site.with_role(&late)?;
    let agent = site.start()?;
    let request = format!("GET {CREDENTIALS_PATH} HTTP/1.1\r\nHost: 169.254.169.254\r\n\r\n");
    // Unknown as yet, so that the agent notices the end of what it sends before there is an answer. That may mean that
    // it has gone: it is not kept for as long as a pod that waits.
    let mut wire = Wire::open(&late, &request)?;
    wire.shutdown()?;
    wire.closed()?;
    let mut wire = Wire::open(&late, &request)?;
    wire.shutdown()?;
    wire.quiet(Duration::from_millis(50))?;
    site.put(entry)?;
    let answer = wire.response()?;
    ensure!(answer.status == 200 && answer.body == "late-role", "{answer:?}");
    wire.closed()?;
    agent.stop()
}

/// IMDS-13
#[test]
fn an_idle_connection_stays_usable_for_a_minute() -> Result<()> {
    let site = site()?;
    let reader = site.pod_with_role("reader")?;
    let agent = site.start()?;
    let request = format!("GET {CREDENTIALS_PATH} HTTP/1.1\r\nHost: 169.254.169.254\r\n\r\n");
    let mut wire = Wire::open(&reader, &request)?;
    ensure!(wire.response()?.status == 200);
    wire.quiet(MINUTE)?;
    wire.send(&request)?;
    ensure!(wire.response()?.status == 200);
    agent.stop()
}
