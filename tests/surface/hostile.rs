//! Malicious requests. Each gets an exact response; none reaches STS, the node's own metadata service or another pod's
//! credentials, and the agent still serves the next request.

use std::net::SocketAddr;

use anyhow::{Context, Result, ensure};
use lab::agent::{Agent, field};
use lab::http::{CREDENTIALS_PATH, TOKEN, TOKEN_TTL, Wire};
use lab::imds::Hit;
use lab::net::{METADATA, METADATA6};
use lab::site::Site;

use super::{credentials, get, get_with, has_credentials_of, no_upstream_calls_except_sts, role, site};

/// The expected response, and what happens to the connection.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Expected {
    /// A response; the connection stays usable.
    Status(u16, Body),
    /// A response; the server closes the connection.
    Last(u16, Body),
    /// The server closes the connection without a response.
    Closed,
}
use Expected::{Closed, Last, Status};

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Body {
    /// The body of kirsa's response.
    Kirsa(&'static str),
    /// An IMDS token with a TTL of 60 s.
    Token,
    /// Empty: hyper's response to a malformed request.
    Hyper,
}

const LIST: Expected = Status(200, Body::Kirsa("reader-role"));
const TOKEN_ISSUED: Expected = Status(200, Body::Token);
const UNAUTHORIZED: Expected = Status(401, Body::Kirsa("<html>\n<title>401 - Unauthorized</title>\n</html>\n"));
const FORBIDDEN: Expected = Status(403, Body::Kirsa("<html>\n<title>403 - Forbidden</title>\n</html>\n"));
const NOT_FOUND: Expected = Status(404, Body::Kirsa("<html>\n<title>404 - Not Found</title>\n</html>\n"));
const NOT_ALLOWED: Expected = Status(405, Body::Kirsa("<html>\n<title>405 - Method Not Allowed</title>\n</html>\n"));
/// The end of the body is unknown, and with it the start of the next request.
const BAD_BODY: Expected = Last(400, Body::Kirsa("<html>\n<title>400 - Bad Request</title>\n</html>\n"));
const MALFORMED: Expected = Last(400, Body::Hyper);
const TOO_LARGE: Expected = Last(431, Body::Hyper);

const L: &str = CREDENTIALS_PATH;
const HOST: &str = "Host: 169.254.169.254\r\n";

fn get_request(target: &str) -> String {
    format!("GET {target} HTTP/1.1\r\n{HOST}\r\n")
}

/// Paths that parsers interpret differently.
fn paths() -> Vec<(String, Expected)> {
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
    let with = |response| move |path: &str| (get_request(path), response);
    let not_found = not_found.into_iter().map(with(NOT_FOUND));
    let malformed = malformed.into_iter().map(with(MALFORMED));
    not_found.chain(malformed).chain(good.into_iter().map(with(LIST))).collect()
}

/// Requests that are malicious or malformed in other ways.
fn requests() -> Vec<(String, Expected)> {
    let long = "x".repeat(64 << 10);
    let headers = |count| (0..count).map(|n| format!("X-{n}: y\r\n")).collect::<String>();
    let many = headers(10_000);
    let put = format!("PUT /latest/api/token HTTP/1.1\r\n{HOST}{TOKEN_TTL}: 60\r\n");
    vec![
        (format!("CONNECT 169.254.169.254:80 HTTP/1.1\r\n{HOST}\r\n"), NOT_ALLOWED),
        (format!("CONNECT sts.amazonaws.com:443 HTTP/1.1\r\n{HOST}\r\n"), NOT_ALLOWED),
        (format!("OPTIONS * HTTP/1.1\r\n{HOST}\r\n"), NOT_ALLOWED),
        (format!("OPTIONS {L} HTTP/1.1\r\n{HOST}Access-Control-Request-Method: GET\r\n\r\n"), NOT_ALLOWED),
        (format!("TRACE {L} HTTP/1.1\r\n{HOST}\r\n"), NOT_ALLOWED),
        (format!("GETS {L} HTTP/1.1\r\n{HOST}\r\n"), NOT_ALLOWED),
        (format!("G\x00T {L} HTTP/1.1\r\n{HOST}\r\n"), MALFORMED),
        (format!("GET {L} HTTP/1.1\r\n{HOST}Connection: Upgrade\r\nUpgrade: websocket\r\n\r\n"), LIST),
        (format!("GET {L} HTTP/1.1\r\n{HOST}Connection: Upgrade, HTTP2-Settings\r\nUpgrade: h2c\r\n\r\n"), LIST),
        (format!("GET {L}\r\n"), MALFORMED),
        (format!("GET {L} HTTP/0.9\r\n\r\n"), MALFORMED),
        (format!("GET {L} HTTP/2.0\r\n{HOST}\r\n"), MALFORMED),
        (format!("GET {L} http/1.1\r\n{HOST}\r\n"), MALFORMED),
        ("PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n".into(), Closed),
        ("\x16\x03\x01\x02\x00\x01\x00\x01\x7c\x03\x03".into(), MALFORMED),
        ("\x00\x00\x00\x00".into(), MALFORMED),
        (format!("GET {L} HTTP/1.1\r\nHost: {long}\r\n\r\n"), TOO_LARGE),
        (format!("GET /{long} HTTP/1.1\r\n{HOST}\r\n"), TOO_LARGE),
        (format!("GET {L} HTTP/1.1\r\n{HOST}{many}\r\n"), TOO_LARGE),
        // The maximum is 100 headers.
        (format!("GET /latest/user-data HTTP/1.1\r\n{HOST}{}\r\n", headers(99)), NOT_FOUND),
        (format!("GET /latest/user-data HTTP/1.1\r\n{HOST}{}\r\n", headers(100)), TOO_LARGE),
        (format!("GET {L} HTTP/1.1\r\n{HOST}X Y: z\r\n\r\n"), MALFORMED),
        (format!("GET {L} HTTP/1.1\r\n{HOST}X : z\r\n\r\n"), MALFORMED),
        (format!("GET {L} HTTP/1.1\r\n{HOST}X: a\r\n b\r\n\r\n"), MALFORMED),
        (format!("GET {L} HTTP/1.1\r\n{HOST}X: \x00\r\n\r\n"), MALFORMED),
        (format!("{put}Content-Length: -1\r\n\r\n"), MALFORMED),
        (format!("{put}Content-Length: +1\r\n\r\n"), MALFORMED),
        (format!("{put}Content-Length: 99999999999999999999999\r\n\r\n"), MALFORMED),
        (format!("{put}Content-Length: 1\r\nContent-Length: 2\r\n\r\nab"), MALFORMED),
        (format!("{put}Transfer-Encoding: gzip\r\n\r\n"), MALFORMED),
        (format!("{put}Transfer-Encoding: chunked, identity\r\n\r\n"), MALFORMED),
        (format!("{put}Transfer-Encoding: chunked\r\n\r\nzz\r\n"), BAD_BODY),
        (format!("{put}Transfer-Encoding: chunked\r\n\r\nffffffffffffffffff\r\n"), BAD_BODY),
        (put.replace("1.1", "1.0") + "Transfer-Encoding: chunked\r\n\r\n0\r\n\r\n", MALFORMED),
        (format!("{put}Content-Length: 1000000000000\r\n\r\n"), BAD_BODY),
        (format!("{put}X-Forwarded-For: 10.0.0.1\r\n\r\n"), FORBIDDEN),
        (format!("{put}X-Forwarded-For: \r\n\r\n"), FORBIDDEN),
        // A prior-knowledge HTTP/2 client, with its first frame.
        ("PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n\0\0\0\x04\0\0\0\0\0".into(), Closed),
        (format!("GET {L} HTTP/3.0\r\n{HOST}\r\n"), MALFORMED),
        (format!("GET {L} HTTP/1.10\r\n{HOST}\r\n"), MALFORMED),
        (format!("GET  {L} HTTP/1.1\r\n{HOST}\r\n"), MALFORMED),
        (format!("\r\n\r\nGET {L} HTTP/1.1\r\n{HOST}\r\n"), LIST),
        (format!("GET {L} HTTP/1.1\nHost: 169.254.169.254\n\n"), LIST),
        (format!("GET {L} HTTP/1.1\r\n{HOST}: x\r\n\r\n"), MALFORMED),
        (format!("GET {L} HTTP/1.1\r\n{HOST}no-colon\r\n\r\n"), MALFORMED),
        (format!("GET {L} HTTP/1.1\r\n{HOST}X: a\rb\r\n\r\n"), MALFORMED),
        (format!("{put}Content-Length: 0x1\r\n\r\na"), MALFORMED),
        (format!("{put}Content-Length: 1 1\r\n\r\na"), MALFORMED),
        (format!("{put}Transfer-Encoding : chunked\r\n\r\n0\r\n\r\n"), MALFORMED),
        (format!("{put}Transfer-Encoding: xchunked\r\n\r\n0\r\n\r\n"), MALFORMED),
        (format!("{put}Transfer-Encoding: chunked\r\nTransfer-Encoding: identity\r\n\r\n0\r\n\r\n"), MALFORMED),
        (format!("{put}Transfer-Encoding: chunked\r\n\r\n-1\r\n"), BAD_BODY),
        (format!("{put}Transfer-Encoding: chunked\r\n\r\n1\nx\r\n0\r\n\r\n"), BAD_BODY),
        (format!("{put}Expect: 200-ok\r\n\r\n"), TOKEN_ISSUED),
        (format!("GET {L} HTTP/1.1\r\n{HOST}{TOKEN}: INVALID\r\n\r\n"), UNAUTHORIZED),
        // A trailer must not count as a header.
        (format!("GET {L} HTTP/1.1\r\n{HOST}Transfer-Encoding: chunked\r\n\r\n0\r\n{TOKEN}: INVALID\r\n\r\n"), LIST),
        // The path of the container credentials service, which has another address.
        (format!("GET /v1/credentials HTTP/1.1\r\n{HOST}Authorization: e30.e30.c2ln\r\n\r\n"), NOT_FOUND),
    ]
}

/// Returns the agent's own requests to the node's metadata service, once it has fetched everything.
fn agent_hits(site: &Site, agent: &Agent) -> Result<Vec<Hit>> {
    agent.wait_for_log(|entry| field(entry, "message") == Some("node metadata read"))?;
    site.no_pod_got_outside()?;
    Ok(site.hits())
}

/// Checks the response. A timeout is always an error, so that a hanging agent passes for none.
fn check_response(mut wire: Wire, bytes: &str, expected: Expected) -> Result<()> {
    // The server may close the connection before it has read everything.
    let _ = wire.send(bytes);
    let (Status(status, body) | Last(status, body)) = expected else { return wire.closed() };
    let response = wire.response()?;
    let (server, length) = (response.header("server"), response.header("content-length"));
    let mut next = get_request("/");
    let correct = match body {
        Body::Kirsa(text) => response.body == text && server == Some("kirsa"),
        Body::Token => {
            next = next.replace(HOST, &format!("{HOST}{TOKEN}: {}\r\n", response.body));
            response.header(TOKEN_TTL) == Some("60")
        }
        Body::Hyper => length == Some("0") && server.is_none(),
    };
    ensure!(response.status == status && correct, "{response:?}");
    if matches!(expected, Last(..)) {
        return wire.closed();
    }
    wire.send(next)?;
    let next = wire.response()?;
    ensure!(next.status == 200 && next.body == "latest", "the next response: {next:?}");
    Ok(())
}

/// IMDS-12
#[test]
fn hostile_requests_get_exact_responses() -> Result<()> {
    let site = site()?;
    let (reader, writer) = (site.pod_with_role("reader")?, site.pod_with_role("writer")?);
    let agent = site.start()?;
    for (pod, name) in [(&reader, "reader"), (&writer, "writer")] {
        has_credentials_of(&site, name, &get(pod, &credentials(name))?)?;
    }
    let hits = agent_hits(&site, &agent)?;
    let families = [(METADATA, 80).into()].into_iter().chain(reader.ip6().map(|_| (METADATA6, 80).into()));
    let families: Vec<SocketAddr> = families.collect();
    let rows = paths().into_iter().chain(requests());
    for ((bytes, expected), address) in rows.flat_map(|row| families.iter().map(move |to| (row.clone(), *to))) {
        let shown: String = bytes.chars().take(200).collect();
        let wire = Wire::connect_to(&reader, address)?;
        check_response(wire, &bytes, expected).with_context(|| format!("{shown:?}: not {expected:?}"))?;
    }
    has_credentials_of(&site, "reader", &get(&reader, &credentials("reader"))?)?;
    ensure!(site.sts.calls().len() == 2, "{:?}", site.sts.calls());
    ensure!(site.hits() == hits, "{:?}", site.hits());
    agent.stop()
}

/// Headers must not change the caller's identity or the response.
#[test]
fn headers_do_not_identify_the_caller() -> Result<()> {
    let site = site()?;
    let (reader, writer) = (site.pod_with_role("reader")?, site.pod_with_role("writer")?);
    let agent = site.start()?;
    let hits = agent_hits(&site, &agent)?;
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
        let response = get_with(&mut reader.imds(), L, &[(name, value)])?;
        ensure!(response.status == 200 && response.body == role("reader"), "{name}: {value}: {response:?}");
    }
    let mut without_host = Wire::open(&reader, format!("GET {L} HTTP/1.1\r\n\r\n"))?;
    ensure!(without_host.response()?.body == role("reader"));
    no_upstream_calls_except_sts(&site, &["reader", "writer"])?;
    ensure!(site.hits() == hits, "{:?}", site.hits());
    agent.stop()
}
