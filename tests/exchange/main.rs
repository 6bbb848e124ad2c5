//! From a pod's request to STS and back, through the real binary: one exchange whoever asks, what every failure looks
//! like to the pod and to the operator, and the life of a session.

mod age;
mod callers;
mod clock;
mod hold;
mod policies;
mod redaction;
mod stores;
mod tokens;
mod workloads;

use std::time::Duration;

use anyhow::{Context, Result, ensure};
use lab::agent::{Agent, field};
use lab::http::{CREDENTIALS_PATH, Response};
use lab::net::Pod;
use lab::site::Site;
use lab::sts::Session;
use serde_json::Value;

lab::enter!();

/// Enough for anything that the agent does on a busy machine.
const PATIENCE: Duration = Duration::from_secs(20);

fn site() -> Result<Site> {
    Site::new(env!("CARGO_BIN_EXE_kirsa"))
}

/// The role list, without a session token.
fn list(pod: &Pod) -> Result<Response> {
    pod.imds().get(CREDENTIALS_PATH).send().with_context(|| format!("the list for {}", pod.name()))
}

/// The credentials of the role that [`Site::with_role`] gave the pod.
fn credentials(pod: &Pod) -> Result<Response> {
    let request = credentials_path(pod);
    pod.imds().get(&request).send().with_context(|| format!("the credentials of {}", pod.name()))
}

fn credentials_path(pod: &Pod) -> String {
    format!("{CREDENTIALS_PATH}{}-role", pod.name())
}

/// The session that these credentials open, which must be one of the pod's own role.
fn session(site: &Site, pod: &Pod, answer: &Response) -> Result<Session> {
    ensure!(answer.status == 200, "{}: {answer:?}", pod.name());
    let session = site.session(&answer.body)?;
    ensure!(session.role_arn == site.arn(pod.name()), "{} got {session:?}", pod.name());
    Ok(session)
}

/// The line in the log about a refusal of the pod's: it says why, and what to do.
fn refusal(agent: &Agent, pod: &Pod, reason: &str) -> Result<Value> {
    let entry = agent
        .wait_for_log(|entry| {
            field(entry, "message") == Some("refused")
                && field(entry, "reason") == Some(reason)
                && field(entry, "pod") == Some(pod.name())
        })
        .with_context(|| format!("a refusal of {}: {reason}", pod.name()))?;
    for name in ["namespace", "service_account", "detail", "advice"] {
        ensure!(field(&entry, name).is_some_and(|value| !value.is_empty()), "no {name} in {entry}");
    }
    Ok(entry)
}

/// What a refusal's line says of its cause.
fn detail(entry: &Value) -> &str {
    field(entry, "detail").unwrap_or_default()
}
