//! The surface that pods see, through the real binary: every requirement on it that docs/imds-requirements.md numbers,
//! what hostile pods send, and the limits.

mod crowd;
mod denied;
mod documents;
mod drain;
mod framing;
mod groups;
mod hostile;
mod imdsv2;
mod limits;
mod metadata;
mod oracle;
mod smuggling;
mod paths;
mod retry;
mod session;
mod tokens;

use std::time::Duration;

use anyhow::{Context, Result, ensure};
use lab::http::{CREDENTIALS_PATH, Client, Response};
use lab::net::Pod;
use lab::site::Site;
use lab::sts::Call;

lab::enter!();

/// Enough for anything that the agent does on a busy machine.
const PATIENCE: Duration = Duration::from_secs(20);

fn site() -> Result<Site> {
    Site::new(env!("CARGO_BIN_EXE_kirsa"))
}

/// The role of the pod of that name, as [`Site::with_role`] names it.
fn role(name: &str) -> String {
    format!("{name}-role")
}

/// The path of the credentials of that pod's role.
fn credentials(name: &str) -> String {
    format!("{CREDENTIALS_PATH}{}", role(name))
}

/// Without a session token.
fn get(pod: &Pod, path: &str) -> Result<Response> {
    get_with(&mut pod.imds(), path, &[])
}

fn get_with(imds: &mut Client, path: &str, headers: &[(&str, &str)]) -> Result<Response> {
    let request = headers.iter().fold(imds.get(path), |request, (name, value)| request.header(name, value));
    request.send().with_context(|| format!("GET {path}"))
}

/// That the answer opens a session of the role of the pod of that name, and that STS was asked for it once.
fn opens_the_session_of(site: &Site, name: &str, answer: &Response) -> Result<()> {
    ensure!(answer.status == 200, "{answer:?}");
    let session = site.session(&answer.body)?;
    ensure!(session.role_arn == site.arn(name), "{name} got {session:?}");
    ensure!(site.calls(name).len() == 1, "{:?}", site.calls(name));
    Ok(())
}

/// That nothing went upstream on a request's account: the node's own metadata service saw what the agent reads there by
/// itself, and STS was asked for the roles of these pods only.
fn nobody_was_asked_but_sts_for(site: &Site, names: &[&str]) -> Result<()> {
    let calls = site.sts.calls();
    let expected = |call: &Call| names.iter().any(|name| call.role_arn == site.arn(name));
    ensure!(calls.iter().all(expected), "{calls:?}");
    site.no_pod_got_outside()
}
