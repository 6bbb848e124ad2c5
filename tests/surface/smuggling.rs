//! Requests inside and between others, bodies that never end, and bytes that come one by one.

use std::io::ErrorKind;

use anyhow::{Context, Result, ensure};
use lab::http::{CREDENTIALS_PATH, Response, TOKEN_TTL, Wire};

use super::{credentials, get, nobody_was_asked_but_sts_for, opens_the_session_of, role, site};

const HOST: &str = "Host: 169.254.169.254\r\n";

fn get_of(path: &str) -> String {
    format!("GET {path} HTTP/1.1\r\n{HOST}\r\n")
}

fn put_with(framing: &str) -> String {
    format!("PUT /latest/api/token HTTP/1.1\r\n{HOST}{TOKEN_TTL}: 60\r\n{framing}")
}

/// One connection is one pod's, so a hidden request could gain nothing; it is not answered all the same.
#[test]
fn a_request_that_is_hidden_in_a_body_is_not_answered() -> Result<()> {
    let site = site()?;
    let reader = site.pod("reader")?;
    let agent = site.start()?;
    // Nothing is fetched ahead, so STS would hear of a hidden request that is answered.
    site.give_role(&reader)?;
    let hidden = get_of(&credentials("reader"));
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
            (put_with(""), 200),
        ] {
            let mut wire = Wire::open(&reader, format!("{head}{rest}"))?;
            let answer = wire.response().with_context(|| format!("{framing}: {head}"))?;
            ensure!(answer.status == status, "{framing}: {head}: {answer:?}");
            // What comes next answers this, or the connection is over.
            let next = wire.send(get_of("/")).map_err(Into::into).and_then(|()| wire.response());
            ensure!(!next.as_ref().is_ok_and(|next| next.body != "latest"), "{framing}: {head}: {next:?}");
        }
    }
    ensure!(agent.metric("kirsa_requests_total", &[("route", "credentials")])? == 0.0);
    nobody_was_asked_but_sts_for(&site, &[])?;
    opens_the_session_of(&site, "reader", &get(&reader, &credentials("reader"))?)?;
    agent.stop()
}

#[test]
fn pipelined_requests_are_answered_one_by_one_and_a_wrong_one_ends_it() -> Result<()> {
    let site = site()?;
    let reader = site.pod_with_role("reader")?;
    let agent = site.start()?;
    let path = credentials("reader");
    let requests = [get_of(CREDENTIALS_PATH), put_with("\r\n"), get_of("/latest/x"), get_of(&path)].concat();
    let mut wire = Wire::open(&reader, format!("{requests}GET\r\n\r\n{}", get_of(&path)))?;
    ensure!(wire.response()?.body == role("reader"));
    ensure!(wire.response()?.header(TOKEN_TTL) == Some("60"));
    ensure!(wire.response()?.status == 404);
    opens_the_session_of(&site, "reader", &wire.response()?)?;
    ensure!(wire.response()?.status == 400);
    wire.closed()?;
    nobody_was_asked_but_sts_for(&site, &["reader"])?;
    agent.stop()
}

#[test]
fn a_request_may_come_byte_by_byte() -> Result<()> {
    let site = site()?;
    let reader = site.pod_with_role("reader")?;
    let agent = site.start()?;
    let mut wire = Wire::connect(&reader)?;
    for request in [get_of(CREDENTIALS_PATH), put_with("Content-Length: 2\r\n\r\nab"), get_of(&credentials("reader"))] {
        for byte in request.bytes() {
            wire.send([byte])?;
        }
        ensure!(wire.response()?.status == 200, "{request}");
    }
    nobody_was_asked_but_sts_for(&site, &["reader"])?;
    agent.stop()
}

/// The answer comes while the client still sends.
#[test]
fn a_body_that_never_ends_is_not_waited_for() -> Result<()> {
    let site = site()?;
    let reader = site.pod_with_role("reader")?;
    let agent = site.start()?;
    let chunk = format!("400\r\n{}\r\n", "x".repeat(0x400));
    for (head, status) in [
        (put_with("Transfer-Encoding: chunked\r\n\r\n"), 400),
        (put_with("Content-Length: 99999999999\r\n\r\n"), 400),
        (get_of(CREDENTIALS_PATH).replace("\r\n\r\n", "\r\nTransfer-Encoding: chunked\r\n\r\n"), 200),
        (get_of("/latest/x").replace("\r\n\r\n", "\r\nContent-Length: 99999999999\r\n\r\n"), 404),
        (format!("POST {CREDENTIALS_PATH} HTTP/1.1\r\n{HOST}Transfer-Encoding: chunked\r\n\r\n"), 405),
    ] {
        let mut wire = Wire::open(&reader, &head)?;
        let (answer, sent) = send_until_answered(&mut wire, &chunk)?;
        ensure!(answer.status == status, "{head}: {answer:?}");
        ensure!(sent < 16 << 20, "{head}: {sent} bytes were taken");
    }
    // A body that is announced and does not come.
    let mut wire = Wire::open(&reader, put_with("Content-Length: 10\r\n\r\n"))?;
    ensure!(wire.response()?.status == 400);
    nobody_was_asked_but_sts_for(&site, &["reader"])?;
    agent.stop()
}

/// Sends more and more until the server takes no more, then reads the answer.
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
