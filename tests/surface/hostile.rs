//! Requests that nobody sends in good faith. Each has its exact answer; none of them reaches STS, the node's own
//! metadata service or another pod's credentials, and the agent serves the next one as if nothing had been.

use std::net::SocketAddr;

use anyhow::{Result, ensure};
use lab::agent::field;
use lab::http::{CREDENTIALS_PATH, TOKEN, TOKEN_TTL, Wire};
use lab::net::{METADATA, METADATA6};

use super::{credentials, get, get_with, opens_the_session_of, role, site};

/// What comes back: a status, or the end of the connection without a word.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Answer {
    Status(u16),
    Closed,
}
use Answer::{Closed, Status};

const L: &str = CREDENTIALS_PATH;
const HOST: &str = "Host: 169.254.169.254\r\n";

fn get_of(target: &str) -> String {
    format!("GET {target} HTTP/1.1\r\n{HOST}\r\n")
}

/// Spellings of paths that one parser takes for another path than the next does.
fn paths() -> Vec<(String, Answer)> {
    let not_found = [
        "/LATEST/meta-data/iam/security-credentials/",
        "/latest/Meta-Data/iam/security-credentials/",
        "/latest/meta-data/iam/security-credentials/Reader-Role",
        "/latest%2fmeta-data/iam/security-credentials/",
        "/latest/meta-data%2Fiam%2Fsecurity-credentials%2Fwriter-role",
        "/latest/meta-data/iam/security-credentials%2f",
        "/latest/meta-data/placement%2fregion",
        "/latest/meta-data%2Fplacement/region",
        "/latest/meta-data/placement/x/../region",
        "/latest/meta-data/iam/security-credentials/%252f",
        "/latest/meta-data/iam/security-credentials/reader%252drole",
        "/latest/meta-data/iam/security-credentials/reader-role%00",
        "/latest/meta-data/iam/security-credentials/%00reader-role",
        "/latest/meta-data/iam/security-credentials/reader-role%0a",
        "/latest/meta-data/iam/security-credentials/reader-role%0d%0aX:%20y",
        "/latest/meta-data/iam/security-credentials/reader-role%20",
        "/latest/meta-data/iam/security-credentials/reader-role;writer-role",
        "/latest/meta-data/iam/security-credentials;x/reader-role",
        "/latest/meta-data/iam/security-credentials/reader-role%3b",
        "/latest\\meta-data\\iam\\security-credentials\\",
        "/latest/meta-data/iam/security-credentials/..\\writer-role",
        "/latest/meta-data/iam/security-credentials/%5cwriter-role",
        "/latest/./meta-data/iam/security-credentials/",
        "/latest/meta-data/iam/security-credentials/.",
        "/latest/meta-data/iam/security-credentials/x/../reader-role",
        "/latest/meta-data/../meta-data/iam/security-credentials/",
        "/latest/%2e/meta-data/iam/security-credentials/",
        "/latest/%2e%2e/latest/meta-data/iam/security-credentials/",
        "/latest/.%2e/latest/meta-data/iam/security-credentials/",
        "/../latest/meta-data/iam/security-credentials/",
        "/latest/meta-data/iam/security-credentials/%",
        "/latest/meta-data/iam/security-credentials/reader-role%2",
        "/latest/meta-data/iam/security-credentials/%zz",
        "/latest/meta-data/iam/security-credentials/%u002f",
        "/latest/meta-data/iam/security-credentials/%c0%af",
        "/latest/meta-data/iam/security-credentials/%ff",
        "/latest/meta-data/iam/security-credentials/reader-role/writer-role",
        "/latest/meta-data/iam/security-credentials/writer-role",
        "/latest/meta-data/iam/security-credentials/node-role",
        "/latest/meta-data/iam/security-credentials/*",
        "/latest/meta-data/iam/security-credentials/reader-role,writer-role",
        "/latest/meta-data/iam/security-credentials/arn:aws:iam::111122223333:role",
        "/latestx/meta-data/iam/security-credentials/",
        "/999999999999999999999/meta-data/iam/security-credentials/",
        // The forms of a request target that are for proxies.
        "http://169.254.169.254/latest/meta-data/iam/security-credentials/",
        "http://writer/latest/meta-data/iam/security-credentials/writer-role",
        "http://user:password@169.254.169.254/latest/meta-data/",
        "https://169.254.169.254/latest/meta-data/",
        "169.254.169.254:80",
        "*",
    ];
    let malformed = [
        "/latest/meta-data/\x00iam/",
        "/latest/meta-data/\niam/security-credentials/",
        "/latest/meta-data/ iam/security-credentials/",
        "/latest/meta-data/\tiam/",
        "/latest/meta-data/\x7fiam/",
        "latest/meta-data/",
        "file:///latest/meta-data/",
        "",
    ];
    let good =
        ["/latest/meta-data/iam/security-credentials/#writer-role", "/latest/meta-data/iam/security-credentials/?/../"];
    let with = |answer| move |path: &str| (get_of(path), answer);
    let not_found = not_found.into_iter().map(with(Status(404)));
    let malformed = malformed.into_iter().map(with(Status(400)));
    not_found.chain(malformed).chain(good.into_iter().map(with(Status(200)))).collect()
}

/// Requests that are wrong in another way.
fn requests() -> Vec<(String, Answer)> {
    let long = "x".repeat(64 << 10);
    let many: String = (0..10_000).map(|n| format!("X-{n}: y\r\n")).collect();
    let put = format!("PUT /latest/api/token HTTP/1.1\r\n{HOST}{TOKEN_TTL}: 60\r\n");
    vec![
        (format!("CONNECT 169.254.169.254:80 HTTP/1.1\r\n{HOST}\r\n"), Status(405)),
        (format!("CONNECT sts.amazonaws.com:443 HTTP/1.1\r\n{HOST}\r\n"), Status(405)),
        (format!("OPTIONS * HTTP/1.1\r\n{HOST}\r\n"), Status(405)),
        (format!("OPTIONS {L} HTTP/1.1\r\n{HOST}Access-Control-Request-Method: GET\r\n\r\n"), Status(405)),
        (format!("TRACE {L} HTTP/1.1\r\n{HOST}\r\n"), Status(405)),
        (format!("GETS {L} HTTP/1.1\r\n{HOST}\r\n"), Status(405)),
        (format!("G\x00T {L} HTTP/1.1\r\n{HOST}\r\n"), Status(400)),
        (format!("GET {L} HTTP/1.1\r\n{HOST}Connection: Upgrade\r\nUpgrade: websocket\r\n\r\n"), Status(200)),
        (format!("GET {L} HTTP/1.1\r\n{HOST}Connection: Upgrade, HTTP2-Settings\r\nUpgrade: h2c\r\n\r\n"), Status(200)),
        (format!("GET {L}\r\n"), Status(400)),
        (format!("GET {L} HTTP/0.9\r\n\r\n"), Status(400)),
        (format!("GET {L} HTTP/2.0\r\n{HOST}\r\n"), Status(400)),
        (format!("GET {L} http/1.1\r\n{HOST}\r\n"), Status(400)),
        ("PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n".into(), Closed),
        ("\x16\x03\x01\x02\x00\x01\x00\x01\x7c\x03\x03".into(), Status(400)),
        ("\x00\x00\x00\x00".into(), Status(400)),
        (format!("GET {L} HTTP/1.1\r\nHost: {long}\r\n\r\n"), Status(431)),
        (format!("GET /{long} HTTP/1.1\r\n{HOST}\r\n"), Status(431)),
        (format!("GET {L} HTTP/1.1\r\n{HOST}{many}\r\n"), Status(431)),
        (format!("GET {L} HTTP/1.1\r\n{HOST}X Y: z\r\n\r\n"), Status(400)),
        (format!("GET {L} HTTP/1.1\r\n{HOST}X : z\r\n\r\n"), Status(400)),
        (format!("GET {L} HTTP/1.1\r\n{HOST}X: a\r\n b\r\n\r\n"), Status(400)),
        (format!("GET {L} HTTP/1.1\r\n{HOST}X: \x00\r\n\r\n"), Status(400)),
        (format!("{put}Content-Length: -1\r\n\r\n"), Status(400)),
        (format!("{put}Content-Length: +1\r\n\r\n"), Status(400)),
        (format!("{put}Content-Length: 99999999999999999999999\r\n\r\n"), Status(400)),
        (format!("{put}Content-Length: 1\r\nContent-Length: 2\r\n\r\nab"), Status(400)),
        (format!("{put}Transfer-Encoding: gzip\r\n\r\n"), Status(400)),
        (format!("{put}Transfer-Encoding: chunked, identity\r\n\r\n"), Status(400)),
        (format!("{put}Transfer-Encoding: chunked\r\n\r\nzz\r\n"), Status(400)),
        (format!("{put}Transfer-Encoding: chunked\r\n\r\nffffffffffffffffff\r\n"), Status(400)),
        (put.replace("1.1", "1.0") + "Transfer-Encoding: chunked\r\n\r\n0\r\n\r\n", Status(400)),
        (format!("{put}Content-Length: 1000000000000\r\n\r\n"), Status(400)),
        (format!("{put}X-Forwarded-For: 10.0.0.1\r\n\r\n"), Status(403)),
        (format!("{put}X-Forwarded-For: \r\n\r\n"), Status(403)),
        // A prior-knowledge HTTP/2 client, with its first frame.
        ("PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n\0\0\0\x04\0\0\0\0\0".into(), Closed),
        (format!("GET {L} HTTP/3.0\r\n{HOST}\r\n"), Status(400)),
        (format!("GET {L} HTTP/1.10\r\n{HOST}\r\n"), Status(400)),
        (format!("GET  {L} HTTP/1.1\r\n{HOST}\r\n"), Status(400)),
        (format!("\r\n\r\nGET {L} HTTP/1.1\r\n{HOST}\r\n"), Status(200)),
        (format!("GET {L} HTTP/1.1\nHost: 169.254.169.254\n\n"), Status(200)),
        (format!("GET {L} HTTP/1.1\r\n{HOST}: x\r\n\r\n"), Status(400)),
        (format!("GET {L} HTTP/1.1\r\n{HOST}no-colon\r\n\r\n"), Status(400)),
        (format!("GET {L} HTTP/1.1\r\n{HOST}X: a\rb\r\n\r\n"), Status(400)),
        (format!("{put}Content-Length: 0x1\r\n\r\na"), Status(400)),
        (format!("{put}Content-Length: 1 1\r\n\r\na"), Status(400)),
        (format!("{put}Transfer-Encoding : chunked\r\n\r\n0\r\n\r\n"), Status(400)),
        (format!("{put}Transfer-Encoding: xchunked\r\n\r\n0\r\n\r\n"), Status(400)),
        (format!("{put}Transfer-Encoding: chunked\r\nTransfer-Encoding: identity\r\n\r\n0\r\n\r\n"), Status(400)),
        (format!("{put}Transfer-Encoding: chunked\r\n\r\n-1\r\n"), Status(400)),
        (format!("{put}Transfer-Encoding: chunked\r\n\r\n1\nx\r\n0\r\n\r\n"), Status(400)),
        (format!("{put}Expect: 200-ok\r\n\r\n"), Status(200)),
        (format!("GET {L} HTTP/1.1\r\n{HOST}{TOKEN}: INVALID\r\n\r\n"), Status(401)),
        // A trailer is no header.
        (
            format!("GET {L} HTTP/1.1\r\n{HOST}Transfer-Encoding: chunked\r\n\r\n0\r\n{TOKEN}: INVALID\r\n\r\n"),
            Status(200),
        ),
        // Of the other service, which is another address.
        (format!("GET /v1/credentials HTTP/1.1\r\n{HOST}Authorization: e30.e30.c2ln\r\n\r\n"), Status(404)),
    ]
}

#[test]
fn every_hostile_request_has_its_answer_and_asks_nobody() -> Result<()> {
    let site = site()?;
    let (reader, writer) = (site.pod_with_role("reader")?, site.pod_with_role("writer")?);
    let agent = site.start()?;
    for (pod, name) in [(&reader, "reader"), (&writer, "writer")] {
        opens_the_session_of(&site, name, &get(pod, &credentials(name))?)?;
    }
    // The agent's own reading, which no request causes.
    agent.wait_for_log(|entry| field(entry, "message") == Some("node metadata read"))?;
    let hits = site.hits();
    let families = [(METADATA, 80).into()].into_iter().chain(reader.ip6().map(|_| (METADATA6, 80).into()));
    let families: Vec<SocketAddr> = families.collect();
    let rows = paths().into_iter().chain(requests());
    for ((bytes, expected), address) in rows.flat_map(|row| families.iter().map(move |to| (row.clone(), *to))) {
        let mut wire = Wire::connect_to(&reader, address)?;
        // A server that has seen enough may close before all is sent.
        let _ = wire.send(&bytes);
        let response = wire.response();
        let answer = response.as_ref().map_or(Closed, |response| Status(response.status));
        let shown: String = bytes.chars().take(200).collect();
        ensure!(answer == expected, "{shown:?}: {response:?}, not {expected:?}");
        ensure!(!response.is_ok_and(|response| response.body.contains("writer")), "{shown:?}");
    }
    opens_the_session_of(&site, "reader", &get(&reader, &credentials("reader"))?)?;
    ensure!(site.sts.calls().len() == 2, "{:?}", site.sts.calls());
    ensure!(site.hits() == hits, "{:?}", site.hits());
    agent.stop()
}

/// A header is no evidence of who is calling, and the answer is the same whatever they say.
#[test]
fn no_header_changes_who_is_calling() -> Result<()> {
    let site = site()?;
    let (reader, writer) = (site.pod_with_role("reader")?, site.pod_with_role("writer")?);
    let agent = site.start()?;
    let other = writer.ip().to_string();
    let forwarded = format!("for={other};proto=http");
    for (name, value) in [
        ("X-Forwarded-For", other.as_str()),
        ("X-Real-IP", &other),
        ("Forwarded", &forwarded),
        ("X-Client-IP", &other),
        ("Via", "1.1 writer"),
        ("Host", "writer"),
        ("Host", "sts.amazonaws.com:443"),
        ("Host", ""),
        ("Authorization", "Bearer x"),
        ("X-HTTP-Method-Override", "DELETE"),
        ("X-Original-URL", "/latest/meta-data/iam/security-credentials/writer-role"),
        ("X-aws-ec2-metadata-role", "writer-role"),
    ] {
        let answer = get_with(&mut reader.imds(), L, &[(name, value)])?;
        ensure!(answer.status == 200 && answer.body == role("reader"), "{name}: {value}: {answer:?}");
    }
    let mut without_host = Wire::open(&reader, format!("GET {L} HTTP/1.1\r\n\r\n"))?;
    ensure!(without_host.response()?.body == role("reader"));
    agent.stop()
}
