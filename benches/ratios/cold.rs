//! Cold callers: a service account whose role was changed a moment ago. The agent fetches for it at once, from an STS
//! that takes so long that all have asked before it answers.

use std::io::{Read, Write};
use std::net::TcpStream;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use jiff::Timestamp;
use lab::agent::Agent;
use lab::http::CREDENTIALS_PATH;
use lab::net::METADATA;
use lab::poll::poll;
use lab::sts::{Effect, Fault};

use crate::site::Site;

const SAMPLES: usize = 15;
pub(crate) const CALLERS: usize = 50;
/// So long that the last of them has asked before the first is answered.
const STS_DELAY: Duration = Duration::from_millis(200);
const PATIENCE: Duration = Duration::from_secs(10);

/// What [`CALLERS`] cold callers at once cost.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Calls {
    pub(crate) token_requests: u64,
    pub(crate) sts: usize,
}

/// From the answer of STS to the answer to the pod that waits for it.
pub(crate) fn overhead(site: &Site, agent: &Agent) -> Result<Vec<Duration>> {
    let waited = || -> Result<f64> { agent.metric("kirsa_cache_misses_total", &[]) };
    let mut samples = Vec::new();
    for number in 0..SAMPLES {
        let role = format!("cold-{number}");
        site.sts.inject(Fault::always(Effect::delay(STS_DELAY)).of_role(&site.arn(&role)));
        give(site, &role)?;
        let mut client = site.cold_pod.imds();
        // On an open connection: its making is not what is measured.
        ensure!(client.get("/").send()?.status == 200);
        let before = waited()?;
        let answer = client.get(&format!("{CREDENTIALS_PATH}{role}")).send();
        let answered = Timestamp::now();
        answer?.ok().context(role.clone())?;
        ensure!(waited()? == before + 1.0, "it was not cold");
        let call = site.sts.calls_for(&site.arn(&role)).pop().context("a call of STS")?;
        let since = answered.duration_since(call.decided.context("no answer of STS")?);
        samples.push(since.try_into().context("answered before STS had")?);
    }
    Ok(samples)
}

/// Callers that all ask before the first is answered.
pub(crate) fn herd(site: &Site) -> Result<Calls> {
    let role = "herd";
    site.sts.inject(Fault::always(Effect::delay(STS_DELAY)).of_role(&site.arn(role)));
    let before = site.token_requests()?;
    give(site, role)?;
    let mut callers: Vec<TcpStream> =
        (0..CALLERS).map(|_| site.cold_pod.connect((METADATA, 80))).collect::<std::io::Result<_>>()?;
    let request = format!("GET {CREDENTIALS_PATH}{role} HTTP/1.1\r\nHost: {METADATA}\r\nConnection: close\r\n\r\n");
    for caller in &mut callers {
        caller.set_nodelay(true)?;
        caller.write_all(request.as_bytes())?;
    }
    let mut keys = Vec::new();
    for caller in &mut callers {
        let mut answer = String::new();
        caller.read_to_string(&mut answer)?;
        let document = answer.split_once("\r\n\r\n").with_context(|| answer.clone())?.1;
        let document: serde_json::Value = serde_json::from_str(document).with_context(|| answer.clone())?;
        keys.push(document["AccessKeyId"].as_str().context("a key id")?.to_owned());
    }
    keys.dedup();
    ensure!(keys.len() == 1, "not all got the same credentials: {keys:?}");
    Ok(Calls { token_requests: site.token_requests()? - before, sts: site.sts.calls_for(&site.arn(role)).len() })
}

/// Annotates the cold pod's service account with a role that nobody has asked for, and waits until the agent knows.
fn give(site: &Site, role: &str) -> Result<()> {
    site.set_cold_role(role)?;
    poll("the agent to see the annotation", PATIENCE, || {
        // This asks for nobody's credentials.
        let info = site.cold_pod.imds().get("/latest/meta-data/iam/info").send().ok()?;
        info.body.contains(&format!("instance-profile/{role}\"")).then_some(())
    })
}
