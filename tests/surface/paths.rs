//! Paths and their spellings.

use anyhow::{Result, ensure};
use lab::http::{CREDENTIALS_PATH, TOKEN_TTL};
use lab::sts::{Effect, Fault};
use lab::workloads::Workload;

use super::{credentials, get, get_with, has_credentials_of, no_upstream_calls_except_sts, role, site};

const EXTENDED_PATH: &str = "/latest/meta-data/iam/security-credentials-extended";

/// IMDS-8
#[test]
fn client_spellings_are_served_without_redirect() -> Result<()> {
    let site = site()?;
    let reader = site.pod_with_role("reader")?;
    let agent = site.start()?;
    let mut imds = reader.imds();
    for path in [
        "/latest/meta-data/iam/security-credentials",
        "/latest/meta-data/iam/security-credentials/",
        "/2009-04-04/meta-data/iam/security-credentials/",
        "/1.0/meta-data/iam/security-credentials/",
        "/latest/meta-data/iam/security-credentials//",
        "//latest///meta-data//iam/security-credentials",
        "/latest/meta-data/iam/security-credentials/?version=1",
        "/latest/meta-data/iam/security-credentials?",
        "/latest/meta%2Ddata/iam/security-credentials/",
        "/%6catest/meta-data/iam/security-credentials/",
    ] {
        let response = get_with(&mut imds, path, &[])?;
        ensure!(response.status == 200 && response.body == "reader-role", "{path}: {response:?}");
        ensure!(response.header("location").is_none(), "{path}: {response:?}");
    }
    for path in [
        "/latest/meta-data/iam/security-credentials/reader-role",
        "/latest/meta-data/iam/security-credentials/reader-role/",
        "/latest/meta-data/iam/security-credentials//reader-role",
        "/2021-07-15/meta-data/iam/security-credentials/reader-role",
        "/latest/meta-data/iam/security-credentials/reader%2Drole",
        "/latest/meta-data/iam/security-credentials/reader-role?role=writer-role",
    ] {
        has_credentials_of(&site, "reader", &get_with(&mut imds, path, &[])?)?;
    }
    for path in ["/latest/api/token", "/latest/api/token/", "//latest//api//token", "/2021-07-15/api/token?x"] {
        let response = imds.put(path).header(TOKEN_TTL, "60").send()?;
        ensure!(response.status == 200, "{path}: {response:?}");
    }
    agent.stop()
}

/// IMDS-9
#[test]
fn role_list_is_one_name_without_newline() -> Result<()> {
    let site = site()?;
    let long = "r".repeat(64);
    let cases = [
        ("plain", "reader", "reader"),
        ("deep", "teams/data/reader", "reader"),
        // boto 2 takes a name with `=` for an SSH key.
        ("equals", "a=b", "a-b"),
        ("odd", "a+b,c.d@e_f-g", "a+b,c.d@e_f-g"),
        ("long", &long, &long),
    ];
    let mut pods = Vec::new();
    for (name, role, _) in cases {
        let (pod, arn) = (site.stranger(name)?, format!("arn:aws:iam::111122223333:role/{role}"));
        site.trust(&arn, name);
        let token = site.write_token(name, site.issuer.pod_token("default", name, name, name)?)?;
        site.put(Workload::new(&pod, name).role(&arn, &token))?;
        pods.push((pod, arn));
    }
    let agent = site.start()?;
    for ((pod, arn), (_, _, shown)) in pods.iter().zip(cases) {
        for list in [CREDENTIALS_PATH.trim_end_matches('/'), CREDENTIALS_PATH, EXTENDED_PATH] {
            let response = get(pod, list)?;
            ensure!(response.status == 200 && response.body == shown, "{list}: {response:?}");
            ensure!(response.header("content-type") == Some("text/plain"), "{response:?}");
        }
        // The C++ SDK and minio-js percent-encode the name.
        let encoded: String = shown.bytes().map(|byte| format!("%{byte:02X}")).collect();
        for name in [shown, &encoded] {
            let document = get(pod, &format!("{CREDENTIALS_PATH}{name}"))?.ok()?;
            ensure!(site.session(&document)?.role_arn == *arn, "{name}: {document}");
        }
    }
    let (equals, _) = &pods[2];
    ensure!(get(equals, &format!("{CREDENTIALS_PATH}a%3Db"))?.status == 200, "the role's own name is also valid");
    agent.stop()
}

/// IMDS-10
#[test]
fn role_name_is_stable_and_no_other_is_found() -> Result<()> {
    let site = site()?;
    let (reader, writer) = (site.pod_with_role("reader")?, site.pod_with_role("writer")?);
    let denied = site.pod_with_role("denied")?;
    site.sts.inject(Fault::always(Effect::error("AccessDenied")).of_role(&site.arn("denied")));
    let agent = site.start()?;
    // PHP and GDAL request the list only once.
    has_credentials_of(&site, "writer", &get(&writer, &credentials("writer"))?)?;
    ensure!(get(&writer, CREDENTIALS_PATH)?.body == role("writer"));
    // The response must not reveal whether a role exists, or whose it is.
    let no_such_role = get(&reader, &credentials("nobody"))?;
    ensure!(no_such_role.status == 404, "{no_such_role:?}");
    for path in [credentials("writer"), credentials("denied"), format!("{CREDENTIALS_PATH}node-role")] {
        let response = get(&reader, &path)?;
        ensure!(response.status == 404 && response.body == no_such_role.body, "{path}: {response:?}");
        ensure!(names(&response.headers) == names(&no_such_role.headers), "{path}: {response:?}");
    }
    ensure!(get(&denied, &credentials("writer"))?.body == no_such_role.body);
    agent.stop()?;
    let agent = site.start()?;
    ensure!(get(&reader, CREDENTIALS_PATH)?.body == role("reader"), "after a restart");
    no_upstream_calls_except_sts(&site, &["reader", "writer", "denied"])?;
    agent.stop()
}

fn names(headers: &[(String, String)]) -> Vec<&str> {
    headers.iter().map(|(name, _)| name.as_str()).collect()
}

/// IMDS-14: extended credentials are served by the same rules.
#[test]
fn extended_credentials_add_the_account() -> Result<()> {
    let site = site()?;
    let (reader, idle) = (site.pod_with_role("reader")?, site.pod("idle")?);
    let agent = site.start()?;
    for slash in ["", "/"] {
        ensure!(get(&reader, &format!("{EXTENDED_PATH}{slash}"))?.body == "reader-role");
        ensure!(get(&idle, &format!("{EXTENDED_PATH}{slash}"))?.status == 404);
    }
    let plain = get(&reader, &credentials("reader"))?.json()?;
    let mut extended = get(&reader, &format!("{EXTENDED_PATH}/reader-role"))?.json()?;
    ensure!(plain.get("AccountId").is_none(), "{plain}");
    let account = extended.as_object_mut().and_then(|members| members.remove("AccountId"));
    ensure!(account.is_some_and(|account| account == lab::site::ACCOUNT) && extended == plain);
    ensure!(get(&reader, &format!("{EXTENDED_PATH}/writer-role"))?.status == 404);
    ensure!(get(&reader, "/latest/meta-data/iam/security-credentials-extende/reader-role")?.status == 404);
    ensure!(get(&reader, "/latest/meta-data/iam/security-credentials-extendedx/reader-role")?.status == 404);
    ensure!(site.calls("reader").len() == 1, "one session for both documents");
    no_upstream_calls_except_sts(&site, &["reader"])?;
    agent.stop()
}

/// IMDS-15
#[test]
fn folders_above_credentials_are_listed() -> Result<()> {
    let site = site()?;
    let (reader, idle) = (site.pod_with_role("reader")?, site.pod("idle")?);
    let agent = site.start()?;
    for (path, entry) in [
        ("/", "latest"),
        ("/latest", "meta-data"),
        ("/latest/", "meta-data"),
        ("/latest/meta-data", "iam/"),
        ("/latest/meta-data/", "iam/"),
        ("/latest/meta-data/iam", "security-credentials/"),
        ("/latest/meta-data/iam/", "security-credentials/"),
    ] {
        let token = reader.imds().put_token(60)?;
        for headers in [&[][..], &[(lab::http::TOKEN, token.as_str())]] {
            let response = get_with(&mut reader.imds(), path, headers)?;
            ensure!(response.status == 200 && response.body.lines().any(|line| line == entry), "{path}: {response:?}");
        }
        // fluent-bit detects IMDSv2 by this response.
        let response = get_with(&mut reader.imds(), path, &[(lab::http::TOKEN, "INVALID")])?;
        ensure!(response.status == 401, "{path}: {response:?}");
    }
    for (path, status) in [("/latest/meta-data/", 200), ("/latest/meta-data/iam/", 404)] {
        let response = get(&idle, path)?;
        ensure!(response.status == status && !response.body.contains("iam/"), "a pod without a role: {response:?}");
    }
    no_upstream_calls_except_sts(&site, &["reader"])?;
    agent.stop()
}

/// IMDS-33, and the forbidden paths of IMDS-32
#[test]
fn other_paths_and_methods_are_refused() -> Result<()> {
    let site = site()?;
    let reader = site.pod_with_role("reader")?;
    let agent = site.start()?;
    let mut imds = reader.imds();
    for path in [
        "/latest/meta-data/identity-credentials/ec2/security-credentials/ec2-instance",
        "/latest/meta-data/local-ipv4",
        "/latest/meta-data/public-keys/0/openssh-key",
        "/latest/user-data",
        "/latest/dynamic/instance-identity/signature",
        "/latest/dynamic/instance-identity/pkcs7",
        "/latest/dynamic/instance-identity/rsa2048",
        "/latest/meta-data/iam/security-credentials/node-role",
        "/latest/meta-data/iam/security-credentials/reader-role/more",
        "/latest/api",
        "/latest/api/token/more",
        "/metrics",
        "/healthz",
        "/next/meta-data/",
        "/favicon.ico",
    ] {
        ensure!(get_with(&mut imds, path, &[])?.status == 404, "{path}");
        for method in ["PUT", "POST", "DELETE", "PATCH", "OPTIONS", "TRACE", "get"] {
            let response = imds.request(method, path).header("Content-Length", "0").send()?;
            ensure!(response.status == 405, "{method} {path}: {response:?}");
        }
    }
    for method in ["POST", "PUT", "DELETE"] {
        let response = imds.request(method, &credentials("reader")).header("Content-Length", "0").send()?;
        ensure!(response.status == 405, "{method}: {response:?}");
    }
    for method in ["GET", "POST", "DELETE"] {
        let response = imds.request(method, "/latest/api/token").header("Content-Length", "0").send()?;
        ensure!(response.status == 405, "{method} token: {response:?}");
    }
    let head = imds.request("HEAD", &credentials("reader")).send()?;
    ensure!(head.status == 200 && head.body.is_empty(), "{head:?}");
    ensure!(site.sts.calls().len() == 1);
    site.no_pod_got_outside()?;
    agent.stop()
}
