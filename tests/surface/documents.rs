//! The format of credentials and of refusals.

use std::thread;

use anyhow::{Context, Result, ensure};
use lab::agent::Agent;
use lab::http::{CREDENTIALS_PATH, Response, TOKEN, TOKEN_TTL};
use lab::sts::{Effect, Fault};

use super::{credentials, get, get_with, site};

/// IMDS-11; and IMDS-23: the expiration is that of STS, unchanged.
#[test]
fn document_has_members_that_sdks_parse() -> Result<()> {
    let site = site()?;
    let reader = site.pod_with_role("reader")?;
    let agent = site.start()?;
    let response = get(&reader, &credentials("reader"))?;
    let length: usize = response.header("content-length").context("a length")?.parse()?;
    ensure!(response.status == 200 && length == response.body.len(), "{response:?}");
    let document = response.json()?;
    let members = document.as_object().context("an object")?;
    let string = |name: &str| members.get(name).and_then(|value| value.as_str()).with_context(|| name.to_owned());
    ensure!(members.len() == 7 && string("Code")? == "Success" && string("Type")? == "AWS-HMAC", "{document}");
    for name in ["AccessKeyId", "SecretAccessKey", "Token"] {
        ensure!(!string(name)?.is_empty(), "{document}");
    }
    for name in ["LastUpdated", "Expiration"] {
        let shape: String = string(name)?.chars().map(|c| if c.is_ascii_digit() { '0' } else { c }).collect();
        ensure!(shape == "0000-00-00T00:00:00Z", "{name}: {document}");
    }
    // Times in this format sort as text.
    let now = site.node.netns().shell("date -u +%Y-%m-%dT%H:%M:%SZ")?;
    ensure!(string("LastUpdated")? <= now.trim() && string("Expiration")? > now.trim(), "{now}: {document}");
    ensure!(
        string("Expiration")? == site.session(&response.body)?.expiration.to_string(),
        "not the expiration of STS: {document}"
    );
    agent.stop()
}

/// IMDS-12: some clients ignore the status and take the body for a role's name.
#[test]
fn refusals_are_short_and_fixed() -> Result<()> {
    let site = site()?;
    let (reader, idle) = (site.pod_with_role("reader")?, site.pod("idle")?);
    let (denied, stranger) = (site.pod_with_role("denied")?, site.stranger("stranger")?);
    site.sts.inject(Fault::always(Effect::error("AccessDenied")).of_role(&site.arn("denied")));
    let late = site.pod_with_role("late")?;
    site.sts.inject(Fault::always(Effect::Reset).of_role(&site.arn("late")));
    let agent = site.start()?;
    let bad_ttl = reader.imds().put("/latest/api/token").header(TOKEN_TTL, "soon").send()?;
    let mut imds = reader.imds();
    let forwarded =
        imds.put("/latest/api/token").header(TOKEN_TTL, "60").header("X-Forwarded-For", "1.2.3.4").send()?;
    let mut seen: Vec<(u16, Response)> = vec![
        (400, bad_ttl),
        (401, get_with(&mut reader.imds(), CREDENTIALS_PATH, &[(TOKEN, "INVALID")])?),
        (403, get(&denied, CREDENTIALS_PATH)?),
        (403, forwarded),
        (404, get(&idle, CREDENTIALS_PATH)?),
        (404, get(&reader, &credentials("writer"))?),
        (404, get(&reader, "/latest/user-data")?),
        (405, reader.imds().request("DELETE", CREDENTIALS_PATH).send()?),
        (503, get(&stranger, CREDENTIALS_PATH)?),
        (503, get(&late, CREDENTIALS_PATH)?),
    ];
    for (status, response) in &seen {
        ensure!(response.status == *status, "{status}: {response:?}");
        ensure!(
            response.body.len() <= 100 && response.body.contains('<') && response.body.contains('\n'),
            "{response:?}"
        );
        for word in ["role", "arn:", "reader", "denied", "AccessDenied", "STS", "default"] {
            ensure!(!format!("{response:?}").contains(word), "{word} in {response:?}");
        }
    }
    // One body for each status, whatever the reason.
    seen.sort_by(|(_, a), (_, b)| a.body.cmp(&b.body));
    seen.dedup_by(|(_, a), (_, b)| a.body == b.body);
    ensure!(seen.len() == 6, "{seen:?}");
    agent.stop()
}

/// IMDS-16. `make bench` measures their latency.
#[test]
fn warm_responses_need_no_upstream() -> Result<()> {
    let site = site()?;
    let names = ["a", "b", "c", "d"];
    let pods = names.iter().map(|name| site.pod_with_role(name)).collect::<Result<Vec<_>>>()?;
    let agent = site.start()?;
    for (pod, name) in pods.iter().zip(names) {
        get(pod, &credentials(name))?.ok()?;
    }
    site.sts.inject(Fault::always(Effect::NoAnswer));
    let rounds = |(pod, name): (&lab::net::Pod, &str)| -> Result<()> {
        let mut imds = pod.imds();
        for _ in 0..100 {
            let token = imds.put_token(60)?;
            for path in [CREDENTIALS_PATH, &credentials(name)] {
                get_with(&mut imds, path, &[(TOKEN, &token)])?.ok()?;
            }
        }
        Ok(())
    };
    thread::scope(|scope| {
        let workers: Vec<_> = pods.iter().zip(names).map(|pair| scope.spawn(move || rounds(pair))).collect();
        workers.into_iter().try_for_each(|worker| worker.join().unwrap())
    })?;
    check_warm(&agent, names.len())
}

/// Checks that each session had one exchange, and that all later responses were cache hits.
fn check_warm(agent: &Agent, sessions: usize) -> Result<()> {
    let ok = agent.metric("kirsa_exchange_seconds_count", &[("step", "sts"), ("outcome", "ok")])?;
    let answered = agent.metric("kirsa_requests_total", &[("route", "credentials"), ("outcome", "ok")])?;
    let hits = agent.metric("kirsa_cache_hits_total", &[])?;
    ensure!(ok as usize == sessions && hits >= answered - sessions as f64, "{ok} exchanges, {hits} hits of {answered}");
    Ok(())
}
