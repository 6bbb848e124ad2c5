//! Which paths there are, and in which spellings.

use anyhow::{Result, ensure};
use lab::http::{CREDENTIALS_PATH, TOKEN_TTL};
use lab::sts::{Effect, Fault};
use lab::workloads::Workload;

use super::{credentials, get, get_with, nobody_was_asked_but_sts_for, opens_the_session_of, role, site};

const EXTENDED_PATH: &str = "/latest/meta-data/iam/security-credentials-extended";

/// IMDS-8
#[test]
fn every_spelling_that_clients_use_is_answered_directly() -> Result<()> {
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
        let answer = get_with(&mut imds, path, &[])?;
        ensure!(answer.status == 200 && answer.body == "reader-role", "{path}: {answer:?}");
        ensure!(answer.header("location").is_none(), "{path}: {answer:?}");
    }
    for path in [
        "/latest/meta-data/iam/security-credentials/reader-role",
        "/latest/meta-data/iam/security-credentials/reader-role/",
        "/latest/meta-data/iam/security-credentials//reader-role",
        "/2021-07-15/meta-data/iam/security-credentials/reader-role",
        "/latest/meta-data/iam/security-credentials/reader%2Drole",
        "/latest/meta-data/iam/security-credentials/reader-role?role=writer-role",
    ] {
        opens_the_session_of(&site, "reader", &get_with(&mut imds, path, &[])?)?;
    }
    for path in ["/latest/api/token", "/latest/api/token/", "//latest//api//token", "/2021-07-15/api/token?x"] {
        let answer = imds.put(path).header(TOKEN_TTL, "60").send()?;
        ensure!(answer.status == 200, "{path}: {answer:?}");
    }
    agent.stop()
}

/// IMDS-9
#[test]
fn the_list_is_one_name_that_every_client_can_read() -> Result<()> {
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
            let answer = get(pod, list)?;
            ensure!(answer.status == 200 && answer.body == shown, "{list}: {answer:?}");
            ensure!(answer.header("content-type") == Some("text/plain"), "{answer:?}");
        }
        // As the C++ SDK and minio-js ask for it.
        let encoded: String = shown.bytes().map(|byte| format!("%{byte:02X}")).collect();
        for asked in [shown, &encoded] {
            let document = get(pod, &format!("{CREDENTIALS_PATH}{asked}"))?.ok()?;
            ensure!(site.session(&document)?.role_arn == *arn, "{asked}: {document}");
        }
    }
    let (equals, _) = &pods[2];
    ensure!(get(equals, &format!("{CREDENTIALS_PATH}a%3Db"))?.status == 200, "the role's own name is right too");
    agent.stop()
}

/// IMDS-10
#[test]
fn the_name_stays_and_no_other_name_is_found() -> Result<()> {
    let site = site()?;
    let (reader, writer) = (site.pod_with_role("reader")?, site.pod_with_role("writer")?);
    let denied = site.pod_with_role("denied")?;
    site.sts.inject(Fault::always(Effect::error("AccessDenied")).of_role(&site.arn("denied")));
    let agent = site.start()?;
    // PHP and GDAL ask for the list once in their life.
    opens_the_session_of(&site, "writer", &get(&writer, &credentials("writer"))?)?;
    ensure!(get(&writer, CREDENTIALS_PATH)?.body == role("writer"));
    // Whether there is such a role, whose it is, and whether this pod has one: the answer is the same.
    let no_such_role = get(&reader, &credentials("nobody"))?;
    ensure!(no_such_role.status == 404, "{no_such_role:?}");
    for path in [credentials("writer"), credentials("denied"), format!("{CREDENTIALS_PATH}node-role")] {
        let answer = get(&reader, &path)?;
        ensure!(answer.status == 404 && answer.body == no_such_role.body, "{path}: {answer:?}");
        ensure!(names(&answer.headers) == names(&no_such_role.headers), "{path}: {answer:?}");
    }
    ensure!(get(&denied, &credentials("writer"))?.body == no_such_role.body);
    agent.stop()?;
    let agent = site.start()?;
    ensure!(get(&reader, CREDENTIALS_PATH)?.body == role("reader"), "after a restart");
    nobody_was_asked_but_sts_for(&site, &["reader", "writer", "denied"])?;
    agent.stop()
}

fn names(headers: &[(String, String)]) -> Vec<&str> {
    headers.iter().map(|(name, _)| name.as_str()).collect()
}

/// IMDS-14, as decided: served, with the account, by the same rules.
#[test]
fn extended_credentials_are_the_same_with_the_account() -> Result<()> {
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
    nobody_was_asked_but_sts_for(&site, &["reader"])?;
    agent.stop()
}

/// IMDS-15
#[test]
fn the_way_down_to_the_credentials_can_be_listed() -> Result<()> {
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
            let answer = get_with(&mut reader.imds(), path, headers)?;
            ensure!(answer.status == 200 && answer.body.lines().any(|line| line == entry), "{path}: {answer:?}");
        }
        // fluent-bit tells IMDSv2 from IMDSv1 by this.
        let answer = get_with(&mut reader.imds(), path, &[(lab::http::TOKEN, "INVALID")])?;
        ensure!(answer.status == 401, "{path}: {answer:?}");
    }
    for (path, status) in [("/latest/meta-data/", 200), ("/latest/meta-data/iam/", 404)] {
        let answer = get(&idle, path)?;
        ensure!(answer.status == status && !answer.body.contains("iam/"), "a pod without a role: {answer:?}");
    }
    nobody_was_asked_but_sts_for(&site, &["reader"])?;
    agent.stop()
}

/// IMDS-33, and of IMDS-32 what is denied
#[test]
fn what_is_not_served_is_not_found_and_nobody_is_asked_for_it() -> Result<()> {
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
            let answer = imds.request(method, path).header("Content-Length", "0").send()?;
            ensure!(answer.status == 405, "{method} {path}: {answer:?}");
        }
    }
    for method in ["POST", "PUT", "DELETE"] {
        let answer = imds.request(method, &credentials("reader")).header("Content-Length", "0").send()?;
        ensure!(answer.status == 405, "{method}: {answer:?}");
    }
    for method in ["GET", "POST", "DELETE"] {
        let answer = imds.request(method, "/latest/api/token").header("Content-Length", "0").send()?;
        ensure!(answer.status == 405, "{method} token: {answer:?}");
    }
    let head = imds.request("HEAD", &credentials("reader")).send()?;
    ensure!(head.status == 200 && head.body.is_empty(), "{head:?}");
    ensure!(site.sts.calls().len() == 1);
    site.no_pod_got_outside()?;
    agent.stop()
}
