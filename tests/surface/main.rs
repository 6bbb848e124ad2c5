//! Black-box tests of the surface that pods see, with the real binary: every numbered requirement of
//! docs/imds-requirements.md, hostile requests, and limits.

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

/// Longer than anything that the agent does on a busy machine.
const TIMEOUT: Duration = Duration::from_secs(20);

fn site() -> Result<Site> {
    Site::new(env!("CARGO_BIN_EXE_kirsa"))
}

/// Returns the name of a pod's role, as [`Site::with_role`] assigns it.
fn role(name: &str) -> String {
    format!("{name}-role")
}

/// Returns the path of the credentials of a pod's role.
fn credentials(name: &str) -> String {
    format!("{CREDENTIALS_PATH}{}", role(name))
}

/// Sends a request without an IMDS token.
fn get(pod: &Pod, path: &str) -> Result<Response> {
    get_with(&mut pod.imds(), path, &[])
}

fn get_with(imds: &mut Client, path: &str, headers: &[(&str, &str)]) -> Result<Response> {
    let request = headers.iter().fold(imds.get(path), |request, (name, value)| request.header(name, value));
    request.send().with_context(|| format!("GET {path}"))
}

/// Checks that the response has credentials for the role of the named pod, and that there was one exchange for it.
fn has_credentials_of(site: &Site, name: &str, response: &Response) -> Result<()> {
    ensure!(response.status == 200, "{response:?}");
    let session = site.session(&response.body)?;
    ensure!(session.role_arn == site.arn(name), "{name} got {session:?}");
    ensure!(site.calls(name).len() == 1, "{:?}", site.calls(name));
    Ok(())
}

/// Checks that no request caused other upstream traffic: the node's metadata service saw only the agent's own requests,
/// and STS only exchanges for the roles of these pods.
fn no_upstream_calls_except_sts(site: &Site, names: &[&str]) -> Result<()> {
    let calls = site.sts.calls();
    let expected = |call: &Call| names.iter().any(|name| call.role_arn == site.arn(name));
    ensure!(calls.iter().all(expected), "{calls:?}");
    site.no_pod_got_outside()
}
