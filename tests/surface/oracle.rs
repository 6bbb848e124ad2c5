//! The surface is no oracle for role names. Another pod's role, the node's role and a nonexistent one get the same
//! response by the same code path, whichever pod sends the request.

use anyhow::{Result, ensure};
use lab::agent::Agent;
use lab::http::{CREDENTIALS_PATH, Response};
use lab::net::Pod;
use lab::sts::{Effect, Fault};

use super::{get, get_with, no_upstream_calls_except_sts, site};

const FOLDERS: [&str; 2] = [CREDENTIALS_PATH, "/latest/meta-data/iam/security-credentials-extended/"];
/// Existing roles: another pod's, one whose exchange was denied, and the node's.
const EXISTING: [&str; 3] = ["writer-role", "denied-role", "node-role"];
/// Nonexistent roles with names of the same length, which is no secret.
const MISSING: [&str; 3] = ["writes-role", "demies-role", "mode-role"];

/// Removes the date from a response.
fn without_date(mut response: Response) -> Response {
    response.headers.retain(|(name, _)| name != "date");
    response
}

/// Returns the counters that depend on the code path of a request, and not on background work.
fn counts(agent: &Agent) -> Result<[f64; 5]> {
    let metric = |name: &str, labels: &[(&str, &str)]| agent.metric(name, labels);
    Ok([
        metric("kirsa_cache_hits_total", &[])?,
        metric("kirsa_cache_misses_total", &[])?,
        metric("kirsa_requests_total", &[("route", "credentials"), ("outcome", "not_found")])?,
        metric("kirsa_requests_total", &[("route", "credentials")])?,
        metric("kirsa_requests_total", &[])?,
    ])
}

/// Requests these names. Returns the responses, and by how much each counter grew.
fn probe(agent: &Agent, pod: &Pod, roles: [&str; 3]) -> Result<(Vec<Response>, Vec<f64>)> {
    let before = counts(agent)?;
    let mut responses = Vec::new();
    for folder in FOLDERS {
        for role in roles {
            let encoded: String = role.bytes().map(|byte| format!("%{byte:02x}")).collect();
            for name in [role, &encoded, &format!("{role}/")] {
                responses.push(without_date(get(pod, &format!("{folder}{name}"))?));
            }
        }
    }
    let grown = counts(agent)?.iter().zip(before).map(|(after, before)| after - before).collect();
    Ok((responses, grown))
}

/// IMDS-10
#[test]
fn existing_and_missing_roles_look_the_same() -> Result<()> {
    let site = site()?;
    let (reader, writer) = (site.pod_with_role("reader")?, site.pod_with_role("writer")?);
    let (idle, denied) = (site.pod("idle")?, site.pod_with_role("denied")?);
    let cold = site.pod_with_role("cold")?;
    site.sts.inject(Fault::always(Effect::error("AccessDenied")).of_role(&site.arn("denied")));
    site.sts.inject(Fault::always(Effect::NoAnswer).of_role(&site.arn("cold")));
    let agent = site.start()?;
    // Cache the sessions of these pods.
    for pod in [&reader, &writer] {
        get(pod, &super::credentials(pod.name()))?.ok()?;
    }
    ensure!(get(&denied, CREDENTIALS_PATH)?.status == 403);
    let calls = site.calls("reader").len() + site.calls("writer").len();
    for pod in [&reader, &idle, &cold] {
        let (existing, by_existing) = probe(&agent, pod, EXISTING)?;
        let (missing, by_missing) = probe(&agent, pod, MISSING)?;
        ensure!(existing == missing, "{}: {existing:?}, {missing:?}", pod.name());
        ensure!(
            existing.iter().all(|response| response.status == 404 && *response == existing[0]),
            "{}: {existing:?}",
            pod.name()
        );
        ensure!(by_existing == by_missing, "{}: different code paths: {by_existing:?}, {by_missing:?}", pod.name());
        ensure!(by_existing[..2] == [0.0; 2], "{}: a session was looked up: {by_existing:?}", pod.name());
    }
    ensure!(site.calls("reader").len() + site.calls("writer").len() == calls, "STS was called");
    no_upstream_calls_except_sts(&site, &["reader", "writer", "denied", "cold"])?;
    agent.stop()
}

/// The IMDS token is checked before the name.
#[test]
fn wrong_token_hides_role_names() -> Result<()> {
    let site = site()?;
    let reader = site.pod("reader")?;
    let agent = site.start()?;
    site.give_role(&reader)?;
    let mut seen = Vec::new();
    for name in ["reader-role", "writer-role", "node-role", "nobody", ""] {
        let token = [(lab::http::TOKEN, "INVALID")];
        seen.push(without_date(get_with(&mut reader.imds(), &format!("{CREDENTIALS_PATH}{name}"), &token)?));
    }
    ensure!(seen.iter().all(|response| response.status == 401 && *response == seen[0]), "{seen:?}");
    no_upstream_calls_except_sts(&site, &[])?;
    agent.stop()
}
