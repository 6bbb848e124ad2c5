//! The fault matrix, with the real binary: each dependency of the agent fails, one at a time, while a session is
//! missing, cached, and due for a refresh. The tests check what pods get, the log and the metrics, the number of
//! upstream calls, and the recovery. `docs/failures.md` describes the same in words.

mod apiserver;
mod bounds;
mod cluster;
mod kills;
mod network;
mod node;
mod proxy;
mod soak;
mod sts;

use std::time::Duration;

use anyhow::{Context, Result, ensure};
use kirsa::clock::UnixTime;
use lab::agent::{Agent, field};
use lab::http::{CREDENTIALS_PATH, Response};
use lab::net::Pod;
use lab::poll::poll_every;
use lab::site::Site;
use serde_json::Value;

lab::enter!();

/// Timeout for anything that the agent does on a busy machine, including the longest delay between retries and the time
/// until a refresh is due.
const TIMEOUT: Duration = Duration::from_secs(90);
/// Lifetime of sessions in seconds. A refresh is due after 58 to 69 s, so that a refresh that fails after 4 s has
/// failed well before the last minute, which begins after 84 s.
const LIFETIME: u32 = 144;
/// Polling interval.
const INTERVAL: Duration = Duration::from_secs(1);
/// Minimum remaining lifetime of served credentials in seconds.
const MIN_REMAINING: i64 = 60;

fn site() -> Result<Site> {
    Site::new(env!("CARGO_BIN_EXE_kirsa"))
}

/// Requests the role list with IMDSv1.
fn list(pod: &Pod) -> Result<Response> {
    pod.imds().get(CREDENTIALS_PATH).send().with_context(|| format!("the list for {}", pod.name()))
}

/// Requests the credentials of the pod's role.
fn credentials(pod: &Pod) -> Result<Response> {
    let path = format!("{CREDENTIALS_PATH}{}-role", pod.name());
    pod.imds().get(&path).send().with_context(|| format!("the credentials of {}", pod.name()))
}

/// Credentials that a pod got.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Credentials {
    access_key_id: String,
    /// Seconds since the Unix epoch.
    expires: i64,
}

impl Credentials {
    fn of(pod: &Pod) -> Result<Self> {
        Self::parse(&credentials(pod)?).with_context(|| pod.name().to_owned())
    }

    fn parse(response: &Response) -> Result<Self> {
        ensure!(response.status == 200, "{response:?}");
        let document = response.json()?;
        let access_key_id = document["AccessKeyId"].as_str().context("a key id")?.to_owned();
        Ok(Self { access_key_id, expires: response.expires()? })
    }

    fn seconds_left(&self) -> i64 {
        self.expires - i64::try_from(UnixTime::now().0).unwrap_or(i64::MAX)
    }

    /// Checks that the pod still gets these credentials and its role list.
    fn is_served_to(&self, pod: &Pod) -> Result<()> {
        let now = Self::of(pod)?;
        ensure!(now == *self, "{}: {now:?}, not {self:?}", pod.name());
        let list = list(pod)?;
        ensure!(list.status == 200, "{}: {list:?}", pod.name());
        Ok(())
    }

    /// Checks that the pod gets these credentials until the log shows that the refresh failed, and afterwards.
    fn survives_failed_refresh(&self, pod: &Pod, agent: &Agent, expected: (&str, &str)) -> Result<()> {
        self.is_served_to(pod)?;
        let served = poll_every(INTERVAL, "the refresh", TIMEOUT, || {
            let served = self.is_served_to(pod);
            (served.is_err() || agent.log().iter().any(|entry| is_refusal(entry, pod, expected))).then_some(served)
        });
        served.and_then(|served| served).with_context(|| format!("{}: {expected:?}", pod.name()))?;
        self.is_served_to(pod)
    }

    /// Checks that these credentials are served until their last minute (stale-while-error). Returns the refusals that
    /// follow, of the credentials and of the list.
    fn is_served_until_last_minute(&self, pod: &Pod) -> Result<(Response, Response)> {
        let (left, document) = poll_every(INTERVAL, "the last minute", TIMEOUT, || {
            let (left, document) = (self.seconds_left(), credentials(pod).ok()?);
            if document.status == 200 {
                return (Self::parse(&document).ok()? != *self).then_some((left, document));
            }
            Some((left, document))
        })?;
        ensure!((MIN_REMAINING - 20..=MIN_REMAINING).contains(&left), "with {left} s left: {document:?}");
        Ok((document, list(pod)?))
    }
}

/// Whether this log entry is a refusal of the pod with this reason and with this text in its detail.
fn is_refusal(entry: &Value, pod: &Pod, (reason, detail): (&str, &str)) -> bool {
    let is = |name: &str, value: &str| field(entry, name) == Some(value);
    let contains = |name: &str, part: &str| field(entry, name).is_some_and(|value| value.contains(part));
    is("message", "refused") && is("reason", reason) && is("pod", pod.name()) && contains("detail", detail)
}

/// Waits for the log entry of a refusal, and checks that it has advice.
fn wait_for_refusal(agent: &Agent, pod: &Pod, expected: (&str, &str)) -> Result<()> {
    let entry = agent.wait_for_log(|entry| is_refusal(entry, pod, expected));
    let entry = entry.with_context(|| format!("{} refused: {expected:?}", pod.name()))?;
    ensure!(field(&entry, "advice").is_some_and(|advice| !advice.is_empty()), "{entry}");
    Ok(())
}

/// Returns the agent's count of failed STS calls.
fn failed_calls(agent: &Agent, reason: &str) -> Result<f64> {
    agent.metric("kirsa_exchange_seconds_count", &[("step", "sts"), ("outcome", reason)])
}

/// Runs `check` for all items concurrently.
fn for_each<T: Sync>(all: &[T], check: impl Fn(&T) -> Result<()> + Sync) -> Result<()> {
    std::thread::scope(|scope| {
        let check = &check;
        let running: Vec<_> = all.iter().map(|one| scope.spawn(move || check(one))).collect();
        running.into_iter().try_for_each(|running| running.join().expect("no panic"))
    })
}
