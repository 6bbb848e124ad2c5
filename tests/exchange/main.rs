//! End-to-end tests of the exchange, with the real binary: single-flight, how each failure looks to the pod and to the
//! operator, and the lifetime of a session.

mod callers;
mod clock;
mod expiry;
mod policies;
mod redaction;
mod stores;
mod tokens;
mod waiting;
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

/// Timeout for anything that the agent does on a busy machine.
const TIMEOUT: Duration = Duration::from_secs(20);

fn site() -> Result<Site> {
    Site::new(env!("CARGO_BIN_EXE_kirsa"))
}

/// Requests the role list without an IMDS token.
fn list(pod: &Pod) -> Result<Response> {
    pod.imds().get(CREDENTIALS_PATH).send().with_context(|| format!("the list for {}", pod.name()))
}

/// Requests the credentials of the role that [`Site::with_role`] gave the pod.
fn credentials(pod: &Pod) -> Result<Response> {
    let request = credentials_path(pod);
    pod.imds().get(&request).send().with_context(|| format!("the credentials of {}", pod.name()))
}

fn credentials_path(pod: &Pod) -> String {
    format!("{CREDENTIALS_PATH}{}-role", pod.name())
}

/// Returns the session of these credentials, which must be of the pod's own role.
fn session(site: &Site, pod: &Pod, answer: &Response) -> Result<Session> {
    ensure!(answer.status == 200, "{}: {answer:?}", pod.name());
    let session = site.session(&answer.body)?;
    ensure!(session.role_arn == site.arn(pod.name()), "{} got {session:?}", pod.name());
    Ok(session)
}

/// Waits for the log line of a refusal of the pod, which has detail and advice.
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

/// Returns the detail of a refusal's log line.
fn detail(entry: &Value) -> &str {
    field(entry, "detail").unwrap_or_default()
}
