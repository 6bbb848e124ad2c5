//! No secret is logged at trace level: no secret access key, session token, web identity token, IMDS token or the key
//! that signs IMDS tokens.

use std::collections::HashSet;
use std::fs;

use anyhow::{Context, Result, ensure};
use base64::Engine;
use base64::engine::general_purpose::{STANDARD_NO_PAD, URL_SAFE_NO_PAD};
use lab::agent::{Agent, field};
use lab::http::{CREDENTIALS_PATH, TOKEN};
use lab::site::Site;
use lab::sts::{Effect, Fault};

use super::{credentials, list, refusal, session, site};

/// Number of consecutive characters of a secret that count as a leak.
const LEAK_LENGTH: usize = 16;

/// Returns the secrets that STS issued, the pods' tokens, and the key of IMDS tokens in each printable encoding.
pub(crate) fn secrets_of(site: &Site) -> Result<Vec<String>> {
    let mut secrets = site.sts.secrets();
    for entry in fs::read_dir(site.node.state())? {
        let path = entry?.path();
        if path.extension().is_some_and(|extension| extension == "jwt") {
            let text = fs::read_to_string(path)?;
            secrets.extend(text.split(['.', '"', ' ', '\n']).map(str::to_owned));
        }
    }
    let key = fs::read(site.node.state().join("kirsa/session-token.key"))?;
    let hex: String = key.iter().map(|byte| format!("{byte:02x}")).collect();
    secrets.extend([STANDARD_NO_PAD.encode(&key), URL_SAFE_NO_PAD.encode(&key), hex.to_uppercase(), hex]);
    secrets.push(format!("{key:?}"));
    Ok(secrets)
}

/// Checks that none of these is in the agent's output or on its admin port.
pub(crate) fn nothing_leaked(agent: &Agent, secrets: &[String]) -> Result<()> {
    let mut text = agent.process().lines().join("\n");
    for page in ["/metrics", "/readyz", "/healthz", "/debug/sessions"] {
        text += &agent.admin(page)?.body;
    }
    ensure!(!text.contains("panicked"), "{text}");
    // Proves that a leak would have been found: trace is enabled, and access key IDs, which may be logged, are there.
    ensure!(text.contains("\"level\":\"DEBUG\""), "nothing below info is logged");
    let key = agent.log().iter().find_map(|entry| field(entry, "access_key_id").map(str::to_owned));
    ensure!(!leaks(&text, &[key.context("an audit line")?]).is_empty());
    let leaks = leaks(&text, secrets);
    ensure!(leaks.is_empty(), "{leaks:?} in:\n{text}");
    Ok(())
}

/// Returns each run of characters that occurs in both the text and a secret.
fn leaks(text: &str, secrets: &[String]) -> Vec<String> {
    let runs: HashSet<&[u8]> = secrets.iter().flat_map(|secret| secret.as_bytes().windows(LEAK_LENGTH)).collect();
    let found = text.as_bytes().windows(LEAK_LENGTH).filter(|run| runs.contains(run));
    found.map(|run| String::from_utf8_lossy(run).into_owned()).collect()
}

#[test]
fn no_secret_is_logged() -> Result<()> {
    let site = site()?;
    let reader = site.pod_with_role("reader")?;
    let (idle, stranger) = (site.pod("idle")?, site.stranger("stranger")?);
    let mut refused = Vec::new();
    let faults = [
        ("denied", Effect::error("AccessDenied"), "access_denied"),
        ("policy", Effect::error("MalformedPolicyDocument"), "bad_session_policy"),
        ("reset", Effect::Reset, "sts_unavailable"),
        ("half", Effect::HalfAnswer, "bad_sts_response"),
        ("truncated", Effect::TruncatedXml, "bad_sts_response"),
        ("malformed", Effect::MalformedXml, "bad_sts_response"),
        ("incomplete", Effect::NoCredentials, "bad_sts_response"),
        ("throttled", Effect::error("Throttling"), "sts_throttled"),
    ];
    for (name, effect, reason) in faults {
        refused.push((site.pod_with_role(name)?, reason));
        site.sts.inject(Fault::always(effect).of_role(&site.arn(name)));
    }
    // A store that quotes the rejected token, whole and in part.
    let quoted = site.issuer.pod_token("default", "quoted", "quoted", "quoted")?;
    let claims = quoted.split('.').nth(1).context("three parts")?;
    refused.push((site.pod_with_role("quoted")?, "web_identity_refused"));
    site.write_token("quoted", &quoted)?;
    let message = format!("cannot verify {quoted}, whose claims are {claims}");
    let effect = Effect::Error { code: "InvalidIdentityToken".into(), message: Some(message) };
    site.sts.inject(Fault::always(effect).of_role(&site.arn("quoted")));
    // Files that hold a token and more.
    for (name, content) in [("json", format!("{{\"token\": \"{quoted}\"}}")), ("twice", format!("{quoted}\n{quoted}"))]
    {
        refused.push((site.pod_with_role(name)?, "token_file"));
        site.write_token(name, content)?;
    }
    let agent = Agent::start(&site.node, &site.options.clone().trace())?;

    let mut secrets = Vec::new();
    for pod in refused.iter().map(|(pod, _)| pod).chain([&reader, &idle, &stranger]) {
        let mut imds = pod.imds();
        let token = imds.put_token(21_600)?;
        for (path, token) in [("/", "INVALID"), (CREDENTIALS_PATH, "INVALID"), (CREDENTIALS_PATH, &token)] {
            imds.get(path).header(TOKEN, token).send()?;
        }
        // Presented by another pod.
        reader.imds().get(CREDENTIALS_PATH).header(TOKEN, &token).send()?;
        secrets.push(token);
    }
    for (pod, reason) in &refused {
        let answer = list(pod)?;
        ensure!([403, 503].contains(&answer.status), "{}: {answer:?}", pod.name());
        refusal(&agent, pod, reason)?;
    }
    session(&site, &reader, &credentials(&reader)?)?;
    let extended = "/latest/meta-data/iam/security-credentials-extended/reader-role";
    session(&site, &reader, &reader.imds().get(extended).send()?)?;
    // A token in the wrong place of the workloads file.
    for text in [
        format!("workloads: {quoted}\n"),
        format!("workloads:\n- pod: x\n  addresses: [{quoted}]\n"),
        format!(
            "workloads:\n- pod: x\n  addresses: [10.0.0.2]\n  role: arn:aws:iam::1:role/x\n  tokenFile: {quoted}\n"
        ),
    ] {
        let mark = agent.process().mark();
        fs::write(site.workloads(), text)?;
        agent.wait_for_log_after(mark, |entry| field(entry, "file").is_some())?;
    }

    ensure!(site.sts.secrets().len() > 2, "malformed responses held secrets too");
    secrets.extend(secrets_of(&site)?);
    nothing_leaked(&agent, &secrets)?;
    agent.stop()
}
