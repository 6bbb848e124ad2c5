//! What a pod can learn by trying names: nothing. Another pod's role, the node's and one that does not exist are the
//! same answer, by the same way through the agent, whatever the pod that asks is.

use anyhow::{Result, ensure};
use lab::agent::Agent;
use lab::http::{CREDENTIALS_PATH, Response};
use lab::net::Pod;
use lab::sts::{Effect, Fault};

use super::{get, get_with, nobody_was_asked_but_sts_for, site};

const FOLDERS: [&str; 2] = [CREDENTIALS_PATH, "/latest/meta-data/iam/security-credentials-extended/"];
/// Roles that there are, in whatever way: another pod's, one whose exchange was denied, the node's own.
const REAL: [&str; 3] = ["writer-role", "denied-role", "node-role"];
/// The same length, since that is no secret.
const NONE: [&str; 3] = ["writes-role", "demies-role", "mode-role"];

/// All of an answer but the time of day.
fn bytes(mut answer: Response) -> Response {
    answer.headers.retain(|(name, _)| name != "date");
    answer
}

/// What the agent counts of the ways that a request can take, and of nothing that it does by itself.
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

/// The answers to these names, and by how much each count grew.
fn ask(agent: &Agent, pod: &Pod, roles: [&str; 3]) -> Result<(Vec<Response>, Vec<f64>)> {
    let before = counts(agent)?;
    let mut answers = Vec::new();
    for folder in FOLDERS {
        for role in roles {
            let encoded: String = role.bytes().map(|byte| format!("%{byte:02x}")).collect();
            for name in [role, &encoded, &format!("{role}/")] {
                answers.push(bytes(get(pod, &format!("{folder}{name}"))?));
            }
        }
    }
    let grown = counts(agent)?.iter().zip(before).map(|(after, before)| after - before).collect();
    Ok((answers, grown))
}

/// IMDS-10
#[test]
fn a_role_that_there_is_and_one_that_there_is_not_are_the_same_bytes_by_the_same_way() -> Result<()> {
    let site = site()?;
    let (reader, writer) = (site.pod_with_role("reader")?, site.pod_with_role("writer")?);
    let (idle, denied) = (site.pod("idle")?, site.pod_with_role("denied")?);
    let cold = site.pod_with_role("cold")?;
    site.sts.inject(Fault::always(Effect::error("AccessDenied")).of_role(&site.arn("denied")));
    site.sts.inject(Fault::always(Effect::NoAnswer).of_role(&site.arn("cold")));
    let agent = site.start()?;
    // Warm, and in the others' hands.
    for pod in [&reader, &writer] {
        get(pod, &super::credentials(pod.name()))?.ok()?;
    }
    ensure!(get(&denied, CREDENTIALS_PATH)?.status == 403);
    let asked = site.calls("reader").len() + site.calls("writer").len();
    for pod in [&reader, &idle, &cold] {
        let (real, by_real) = ask(&agent, pod, REAL)?;
        let (none, by_none) = ask(&agent, pod, NONE)?;
        ensure!(real == none, "{}: {real:?}, {none:?}", pod.name());
        ensure!(real.iter().all(|answer| answer.status == 404 && *answer == real[0]), "{}: {real:?}", pod.name());
        ensure!(by_real == by_none, "{}: another way: {by_real:?}, {by_none:?}", pod.name());
        ensure!(by_real[..2] == [0.0; 2], "{}: no session was looked at: {by_real:?}", pod.name());
    }
    ensure!(site.calls("reader").len() + site.calls("writer").len() == asked, "nor was STS asked");
    nobody_was_asked_but_sts_for(&site, &["reader", "writer", "denied", "cold"])?;
    agent.stop()
}

/// Nor does a session token tell: what is wrong with it comes first.
#[test]
fn with_a_wrong_token_no_name_is_looked_at() -> Result<()> {
    let site = site()?;
    let reader = site.pod("reader")?;
    let agent = site.start()?;
    site.give_role(&reader)?;
    let mut seen = Vec::new();
    for name in ["reader-role", "writer-role", "node-role", "nobody", ""] {
        let token = [(lab::http::TOKEN, "INVALID")];
        seen.push(bytes(get_with(&mut reader.imds(), &format!("{CREDENTIALS_PATH}{name}"), &token)?));
    }
    ensure!(seen.iter().all(|answer| answer.status == 401 && *answer == seen[0]), "{seen:?}");
    nobody_was_asked_but_sts_for(&site, &[])?;
    agent.stop()
}
