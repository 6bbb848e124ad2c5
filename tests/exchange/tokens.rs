//! Web identity tokens that are sent to STS.

use std::fs;

use anyhow::{Result, ensure};
use lab::agent::field;
use lab::issuer::{self, AUDIENCE};
use lab::poll::poll;

use super::{TIMEOUT, credentials, detail, list, refusal, session, site};

/// STS verifies the token; its error decides the reason.
#[test]
fn invalid_token_is_rejected_by_sts() -> Result<()> {
    let site = site()?;
    let mut cases = Vec::new();
    for (name, reason, message) in [
        ("expired", "web_identity_refused", "ExpiredToken"),
        ("audience", "web_identity_refused", "audience"),
        ("tampered", "web_identity_refused", "signature"),
        ("issuer", "web_identity_refused", "provider"),
        ("subject", "access_denied", "AccessDenied"),
    ] {
        let pod = site.pod_with_role(name)?;
        let subject = issuer::subject("default", name);
        let token = match name {
            "expired" => site.issuer.expired(&subject)?,
            "audience" => site.issuer.for_another_audience(&subject)?,
            "tampered" => site.issuer.tampered(&subject)?,
            "issuer" => {
                site.issuer.mint(&subject, AUDIENCE, 600, serde_json::json!({ "iss": "https://evil.example" }))?
            }
            _ => site.issuer.pod_token("default", "somebody-else", name, name)?,
        };
        site.write_token(name, token)?;
        cases.push((pod, reason, message));
    }
    let agent = site.start()?;
    for (pod, reason, message) in &cases {
        ensure!(list(pod)?.status == 403 && credentials(pod)?.status == 403, "{}", pod.name());
        let entry = refusal(&agent, pod, reason)?;
        ensure!(detail(&entry).contains(message), "{message} in {entry}");
        ensure!(site.calls(pod.name()).len() == 1);
    }
    agent.stop()
}

/// The token file is read at each exchange, so that it can be renewed in place.
#[test]
fn unusable_token_file_is_named_and_reread() -> Result<()> {
    let site = site()?;
    let good = |name: &str| site.issuer.pod_token("default", name, name, name);
    let missing = site.pod_with_role("missing")?;
    fs::remove_file(site.write_token("missing", "")?)?;
    let cases = [
        ("empty", Vec::new()),
        ("garbage", b"no token at all".to_vec()),
        ("binary", vec![0, 159, 146, 150]),
        ("json", format!("{{\"token\": \"{}\"}}", good("json")?).into_bytes()),
        ("two", format!("{0}\n{0}", good("two")?).into_bytes()),
        ("huge", vec![b'x'; 1 << 20]),
    ];
    let mut pods = vec![missing];
    for (name, content) in cases {
        pods.push(site.pod_with_role(name)?);
        site.write_token(name, content)?;
    }
    let directory = site.pod_with_role("directory")?;
    fs::remove_file(site.node.state().join("directory.jwt"))?;
    fs::create_dir(site.node.state().join("directory.jwt"))?;
    pods.push(directory);
    let agent = site.start()?;
    for pod in &pods {
        ensure!(list(pod)?.status == 503 && credentials(pod)?.status == 503, "{}", pod.name());
        let entry = refusal(&agent, pod, "token_file")?;
        let file = site.node.state().join(format!("{}.jwt", pod.name()));
        ensure!(detail(&entry).contains(&file.display().to_string()), "{entry}");
        ensure!(field(&entry, "advice").is_some_and(|advice| advice.contains("tokenFile")), "{entry}");
        ensure!(site.calls(pod.name()).is_empty(), "STS was called without a token");
    }
    let outcome = [("step", "token"), ("outcome", "token_file")];
    ensure!(agent.metric("kirsa_exchange_seconds_count", &outcome)? >= pods.len() as f64);

    // With a trailing newline, as editors write it.
    site.write_token("missing", good("missing")? + "\n")?;
    let answer = poll("credentials", TIMEOUT, || credentials(&pods[0]).ok().filter(|answer| answer.status == 200))?;
    session(&site, &pods[0], &answer)?;
    agent.stop()
}
