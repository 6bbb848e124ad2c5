//! HTTP/1 variants of real clients.

use std::time::Duration;

use anyhow::{Result, ensure};
use lab::http::{CREDENTIALS_PATH, TOKEN, TOKEN_TTL, Wire};

use super::{credentials, has_credentials_of, site};

/// SDKs keep an idle connection for up to a minute.
const MINUTE: Duration = Duration::from_secs(60);

/// IMDS-13
#[test]
fn http_1_0_and_1_1_are_understood() -> Result<()> {
    let site = site()?;
    let reader = site.pod_with_role("reader")?;
    let agent = site.start()?;
    let path = credentials("reader");

    // Sequential requests on one connection.
    let mut wire = Wire::connect(&reader)?;
    wire.send(format!("PUT /latest/api/token HTTP/1.1\r\nHost: 169.254.169.254\r\n{TOKEN_TTL}: 60\r\n\r\n"))?;
    let token = wire.response()?.ok()?;
    for token_header in [TOKEN, "X-aws-ec2-metadata-token", "X-AWS-EC2-METADATA-TOKEN"] {
        for path in [CREDENTIALS_PATH, &path] {
            wire.send(format!("GET {path} HTTP/1.1\r\nHost: 169.254.169.254\r\n{token_header}: {token}\r\n\r\n"))?;
            let response = wire.response()?;
            ensure!(response.status == 200 && response.header("connection") != Some("close"), "{response:?}");
        }
    }
    for spelling in ["x-aws-ec2-metadata-token-ttl-seconds", "X-AWS-EC2-METADATA-TOKEN-TTL-SECONDS"] {
        wire.send(format!("PUT /latest/api/token HTTP/1.1\r\nhost:169.254.169.254\r\n{spelling}:  60  \r\n\r\n"))?;
        ensure!(wire.response()?.status == 200, "{spelling}");
    }

    // The server closes on request, and with HTTP/1.0.
    for head in ["HTTP/1.1\r\nHost: 169.254.169.254\r\nConnection: close", "HTTP/1.0", "HTTP/1.0\r\nHost: x"] {
        let mut wire = Wire::open(&reader, format!("GET {path} {head}\r\n\r\n"))?;
        has_credentials_of(&site, "reader", &wire.response()?)?;
        wire.closed()?;
    }
    let mut wire = Wire::connect(&reader)?;
    for _ in 0..2 {
        wire.send(format!("GET {path} HTTP/1.0\r\nConnection: keep-alive\r\n\r\n"))?;
        has_credentials_of(&site, "reader", &wire.response()?)?;
    }
    agent.stop()
}

/// IMDS-13
#[test]
fn half_closed_client_is_answered() -> Result<()> {
    let site = site()?;
    let late = site.stranger("late")?;
    let entry = site.with_role(&late)?;
    let agent = site.start()?;
    let request = format!("GET {CREDENTIALS_PATH} HTTP/1.1\r\nHost: 169.254.169.254\r\n\r\n");
    // The pod is unknown, so that the agent sees the half-close before it has a response. Since the client may be gone,
    // the agent waits only for the grace period.
    let mut wire = Wire::open(&late, &request)?;
    wire.shutdown()?;
    wire.closed()?;
    let mut wire = Wire::open(&late, &request)?;
    wire.shutdown()?;
    wire.quiet(Duration::from_millis(50))?;
    site.put(entry)?;
    let response = wire.response()?;
    ensure!(response.status == 200 && response.body == "late-role", "{response:?}");
    wire.closed()?;
    agent.stop()
}

/// IMDS-13
#[test]
fn idle_connection_is_kept_for_a_minute() -> Result<()> {
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
