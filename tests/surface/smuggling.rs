//! Request smuggling, pipelining, endless bodies, and requests that arrive byte by byte.

use std::io::ErrorKind;

use anyhow::{Context, Result, ensure};
use lab::http::{CREDENTIALS_PATH, Response, TOKEN_TTL, Wire};

use super::{credentials, get, has_credentials_of, no_upstream_calls_except_sts, role, site};

const HOST: &str = "Host: 169.254.169.254\r\n";

fn get_request(path: &str) -> String {
    format!("GET {path} HTTP/1.1\r\n{HOST}\r\n")
}

fn put_request(framing: &str) -> String {
    format!("PUT /latest/api/token HTTP/1.1\r\n{HOST}{TOKEN_TTL}: 60\r\n{framing}")
}

/// A connection belongs to one pod, so smuggling would gain nothing; hidden requests are not answered anyway.
#[test]
fn request_hidden_in_a_body_is_not_answered() -> Result<()> {
    let site = site()?;
    let reader = site.pod("reader")?;
    let agent = site.start()?;
    // Without prefetch, an answered hidden request would cause an exchange.
    site.give_role(&reader)?;
    let hidden = get_request(&credentials("reader"));
    let length = hidden.len();
    let chunked = format!("Transfer-Encoding: chunked\r\n\r\n{length:x}\r\n{hidden}\r\n0\r\n\r\n");
    let by_length = format!("Content-Length: {length}\r\n\r\n{hidden}");
    for (framing, rest) in [
        ("a length", by_length.clone()),
        ("chunks", chunked.clone()),
        ("chunks and no length", format!("Content-Length: 0\r\n{chunked}")),
        ("chunks and a length", format!("Content-Length: {length}\r\n{chunked}")),
        ("chunks, twice", format!("Transfer-Encoding: chunked\r\n{chunked}")),
        ("chunks in capitals", chunked.replace("chunked", "CHUNKED")),
    ] {
        for (head, status) in [
            (format!("GET /latest/api/ HTTP/1.1\r\n{HOST}"), 404),
            (format!("POST {CREDENTIALS_PATH} HTTP/1.1\r\n{HOST}"), 405),
            (put_request(""), 200),
        ] {
            let mut wire = Wire::open(&reader, format!("{head}{rest}"))?;
            let response = wire.response().with_context(|| format!("{framing}: {head}"))?;
            ensure!(response.status == status, "{framing}: {head}: {response:?}");
            // The next response is for this request, or the connection is closed.
            let next = wire.send(get_request("/")).map_err(Into::into).and_then(|()| wire.response());
            ensure!(!next.as_ref().is_ok_and(|next| next.body != "latest"), "{framing}: {head}: {next:?}");
        }
    }
    ensure!(agent.metric("kirsa_requests_total", &[("route", "credentials")])? == 0.0);
    no_upstream_calls_except_sts(&site, &[])?;
    has_credentials_of(&site, "reader", &get(&reader, &credentials("reader"))?)?;
    agent.stop()
}

#[test]
fn pipelined_requests_are_answered_in_order() -> Result<()> {
    let site = site()?;
    let reader = site.pod_with_role("reader")?;
    let agent = site.start()?;
    let path = credentials("reader");
    let requests =
        [get_request(CREDENTIALS_PATH), put_request("\r\n"), get_request("/latest/x"), get_request(&path)].concat();
    let mut wire = Wire::open(&reader, format!("{requests}GET\r\n\r\n{}", get_request(&path)))?;
    ensure!(wire.response()?.body == role("reader"));
    ensure!(wire.response()?.header(TOKEN_TTL) == Some("60"));
    ensure!(wire.response()?.status == 404);
    has_credentials_of(&site, "reader", &wire.response()?)?;
    ensure!(wire.response()?.status == 400);
    wire.closed()?;
    no_upstream_calls_except_sts(&site, &["reader"])?;
    agent.stop()
}

#[test]
fn request_may_arrive_byte_by_byte() -> Result<()> {
    let site = site()?;
    let reader = site.pod_with_role("reader")?;
    let agent = site.start()?;
    let mut wire = Wire::connect(&reader)?;
    for request in
        [get_request(CREDENTIALS_PATH), put_request("Content-Length: 2\r\n\r\nab"), get_request(&credentials("reader"))]
    {
        for byte in request.bytes() {
            wire.send([byte])?;
        }
        ensure!(wire.response()?.status == 200, "{request}");
    }
    no_upstream_calls_except_sts(&site, &["reader"])?;
    agent.stop()
}

/// The response comes while the client is still sending.
#[test]
fn endless_body_is_not_awaited() -> Result<()> {
    let site = site()?;
    let reader = site.pod_with_role("reader")?;
    let agent = site.start()?;
    let chunk = format!("400\r\n{}\r\n", "x".repeat(0x400));
    for (head, status) in [
        (put_request("Transfer-Encoding: chunked\r\n\r\n"), 400),
        (put_request("Content-Length: 99999999999\r\n\r\n"), 400),
        (get_request(CREDENTIALS_PATH).replace("\r\n\r\n", "\r\nTransfer-Encoding: chunked\r\n\r\n"), 200),
        (get_request("/latest/x").replace("\r\n\r\n", "\r\nContent-Length: 99999999999\r\n\r\n"), 404),
        (format!("POST {CREDENTIALS_PATH} HTTP/1.1\r\n{HOST}Transfer-Encoding: chunked\r\n\r\n"), 405),
    ] {
        let mut wire = Wire::open(&reader, &head)?;
        let (response, sent) = send_until_answered(&mut wire, &chunk)?;
        ensure!(response.status == status, "{head}: {response:?}");
        ensure!(sent < 16 << 20, "{head}: the server read {sent} bytes");
    }
    // A declared body that never arrives.
    let mut wire = Wire::open(&reader, put_request("Content-Length: 10\r\n\r\n"))?;
    ensure!(wire.response()?.status == 400);
    no_upstream_calls_except_sts(&site, &["reader"])?;
    agent.stop()
}

/// Sends until the server stops reading, and then reads the response.
fn send_until_answered(wire: &mut Wire, more: &str) -> Result<(Response, usize)> {
    let mut sent = 0;
    loop {
        match wire.send(more) {
            Ok(()) => sent += more.len(),
            Err(error) if matches!(error.kind(), ErrorKind::BrokenPipe | ErrorKind::ConnectionReset) => break,
            Err(error) => return Err(error.into()),
        }
        if sent > 64 << 20 {
            break;
        }
    }
    Ok((wire.response()?, sent))
}
