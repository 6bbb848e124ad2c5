//! The fault matrix, through the real binary: everything around the agent fails, one thing at a time, while a session
//! is missing, in hand, and due for its refresh. What pods see, what the log and the metrics say, how often upstream is
//! asked, and that it heals by itself. `docs/failures.md` says the same in words.

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

/// Enough for anything that the agent does on a busy machine, the longest pause between two tries included, and the time
/// until a refresh is due.
const PATIENCE: Duration = Duration::from_secs(90);
/// In seconds. It is refreshed when 58 to 69 of them have passed, so that a refresh that fails after 4 s has failed well
/// before the last minute begins, at 84.
const LIFETIME: u32 = 144;
/// Between looks at what is served.
const LOOK: Duration = Duration::from_secs(1);
/// In seconds: what has less left is not served.
const LAST_RESORT: i64 = 60;

fn site() -> Result<Site> {
    Site::new(env!("CARGO_BIN_EXE_kirsa"))
}

/// The role list, without a session token.
fn list(pod: &Pod) -> Result<Response> {
    pod.imds().get(CREDENTIALS_PATH).send().with_context(|| format!("the list for {}", pod.name()))
}

/// The credentials of the role that [`Site::with_role`] gave the pod.
fn credentials(pod: &Pod) -> Result<Response> {
    let path = format!("{CREDENTIALS_PATH}{}-role", pod.name());
    pod.imds().get(&path).send().with_context(|| format!("the credentials of {}", pod.name()))
}

/// Credentials that a pod was given.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Held {
    access_key_id: String,
    /// In seconds since 1970.
    expires: i64,
}

impl Held {
    fn by(pod: &Pod) -> Result<Self> {
        Self::read(&credentials(pod)?).with_context(|| pod.name().to_owned())
    }

    fn read(answer: &Response) -> Result<Self> {
        ensure!(answer.status == 200, "{answer:?}");
        let document = answer.json()?;
        let access_key_id = document["AccessKeyId"].as_str().context("a key id")?.to_owned();
        Ok(Self { access_key_id, expires: answer.expires()? })
    }

    fn left(&self) -> i64 {
        self.expires - i64::try_from(UnixTime::now().0).unwrap_or(i64::MAX)
    }

    /// That the pod still gets these, and its role.
    fn is_served_to(&self, pod: &Pod) -> Result<()> {
        let now = Self::by(pod)?;
        ensure!(now == *self, "{}: {now:?}, not {self:?}", pod.name());
        let list = list(pod)?;
        ensure!(list.status == 200, "{}: {list:?}", pod.name());
        Ok(())
    }

    /// That the pod gets these, until the log says that fetching others failed.
    fn is_served_while_its_refresh_fails(&self, pod: &Pod, agent: &Agent, what: (&str, &str)) -> Result<()> {
        self.is_served_to(pod)?;
        let served = poll_every(LOOK, "the refresh", PATIENCE, || {
            let served = self.is_served_to(pod);
            (served.is_err() || agent.log().iter().any(|entry| is_refusal(entry, pod, what))).then_some(served)
        });
        served.and_then(|served| served).with_context(|| format!("{}: {what:?}", pod.name()))?;
        self.is_served_to(pod)
    }

    /// The refusals that come then, of the credentials and of the list.
    fn is_served_until_a_minute_before_its_end(&self, pod: &Pod) -> Result<(Response, Response)> {
        let (left, document) = poll_every(LOOK, "the end of what is honest", PATIENCE, || {
            let (left, document) = (self.left(), credentials(pod).ok()?);
            if document.status == 200 {
                return (Self::read(&document).ok()? != *self).then_some((left, document));
            }
            Some((left, document))
        })?;
        ensure!((LAST_RESORT - 20..=LAST_RESORT).contains(&left), "with {left} s left: {document:?}");
        Ok((document, list(pod)?))
    }
}

/// Whether this is the line about a refusal of the pod's with that reason, and with that text in its detail.
fn is_refusal(entry: &Value, pod: &Pod, (reason, said): (&str, &str)) -> bool {
    let is = |name: &str, value: &str| field(entry, name) == Some(value);
    let tells = |name: &str, part: &str| field(entry, name).is_some_and(|value| value.contains(part));
    is("message", "refused") && is("reason", reason) && is("pod", pod.name()) && tells("detail", said)
}

/// The line in the log about a refusal of the pod's: it says what failed, and what to do.
fn refusal(agent: &Agent, pod: &Pod, what: (&str, &str)) -> Result<()> {
    let entry = agent.wait_for_log(|entry| is_refusal(entry, pod, what));
    let entry = entry.with_context(|| format!("{} refused: {what:?}", pod.name()))?;
    ensure!(field(&entry, "advice").is_some_and(|advice| !advice.is_empty()), "{entry}");
    Ok(())
}

/// Failed calls of STS, as the agent counts them.
fn failed_calls(agent: &Agent, reason: &str) -> Result<f64> {
    agent.metric("kirsa_exchange_seconds_count", &[("step", "sts"), ("outcome", reason)])
}

/// Does `what` for all of them at the same time.
fn each<T: Sync>(all: &[T], what: impl Fn(&T) -> Result<()> + Sync) -> Result<()> {
    std::thread::scope(|scope| {
        let what = &what;
        let running: Vec<_> = all.iter().map(|one| scope.spawn(move || what(one))).collect();
        running.into_iter().try_for_each(|running| running.join().expect("no panic"))
    })
}
