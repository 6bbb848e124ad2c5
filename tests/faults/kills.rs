//! The agent killed at any moment, while pods ask.

use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::thread;
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use lab::agent::Agent;
use lab::http::{CREDENTIALS_PATH, Client, Response, TOKEN};
use lab::net::Pod;
use lab::poll::poll;
use lab::site::Site;
use lab::sts::{Effect, Fault};
use lab::workloads::Workload;

use super::{PATIENCE, site};

/// The environment may ask for more.
const KILLS: usize = 15;
const ACCOUNTS: usize = 4;
const PODS_OF_EACH: usize = 2;
/// Between the start of an agent and its end; it is ready after about a fifth of that.
const LIFE: u64 = 800;

/// Where kills and seed are given.
fn given<T: std::str::FromStr>(name: &str) -> Option<T> {
    std::env::var(name).ok()?.parse().ok()
}

/// There is no event to wait for: any moment is meant.
fn let_pass(time: Duration) {
    let _ = poll("nothing", time, || None::<()>);
}

/// Pods that ask as hard as they can, each with the one IMDSv2 token that it got first.
struct Askers<'a> {
    site: &'a Site,
    ended: AtomicBool,
    answers: AtomicUsize,
    unanswered: AtomicUsize,
}

impl Askers<'_> {
    fn ask(&self, pod: &Pod, account: &str, token: &str) -> Result<()> {
        let mut imds = pod.imds();
        while !self.ended.load(Ordering::Relaxed) {
            for path in [CREDENTIALS_PATH.to_owned(), format!("{CREDENTIALS_PATH}{account}-role")] {
                match imds.get(&path).header(TOKEN, token).send() {
                    Ok(answer) => self.take(&answer, account).with_context(|| pod.name().to_owned())?,
                    Err(error) => {
                        self.is_as_by_a_dead_agent(&error)?;
                        imds = pod.imds();
                        // Asking a port where nobody listens is quick; this leaves something for the agent's start.
                        let_pass(Duration::from_millis(10));
                    }
                }
            }
        }
        Ok(())
    }

    /// The pod's own credentials, or a no that SDKs try again after.
    fn take(&self, answer: &Response, account: &str) -> Result<()> {
        self.answers.fetch_add(1, Ordering::Relaxed);
        match answer.status {
            503 => Ok(()),
            200 if answer.body == format!("{account}-role") => Ok(()),
            200 => {
                let session = self.site.session(&answer.body)?;
                ensure!(session.role_arn == self.site.arn(account), "{account} got {session:?}");
                Ok(())
            }
            _ => bail!("{answer:?}"),
        }
    }

    /// Refused or cut off, and at once: not left waiting, which is how packets to nowhere end.
    fn is_as_by_a_dead_agent(&self, error: &anyhow::Error) -> Result<()> {
        use std::io::ErrorKind::{TimedOut, WouldBlock};
        self.unanswered.fetch_add(1, Ordering::Relaxed);
        let kinds = error.chain().filter_map(|cause| cause.downcast_ref::<std::io::Error>()).map(std::io::Error::kind);
        ensure!(!kinds.into_iter().any(|kind| [TimedOut, WouldBlock].contains(&kind)), "{error:#}");
        Ok(())
    }
}

fn pods(site: &Site) -> Result<Vec<(Pod, String)>> {
    let mut pods = Vec::new();
    for account in (0..ACCOUNTS).map(|number| format!("account{number}")) {
        site.trust(&site.arn(&account), &account);
        let token = site.write_token(&account, site.issuer.pod_token("default", &account, &account, &account)?)?;
        for number in 0..PODS_OF_EACH {
            let pod = site.stranger(&format!("{account}-{number}"))?;
            site.put(Workload::new(&pod, &account).role(&site.arn(&account), &token))?;
            pods.push((pod, account.clone()));
        }
    }
    Ok(pods)
}

/// IMDS-7, IMDS-19, IMDS-30
#[test]
fn killed_at_any_moment_it_gives_nobody_anothers_credentials_and_fetches_each_once_a_life() -> Result<()> {
    let kills = given("KIRSA_KILLS").unwrap_or(KILLS);
    let seed = given("KIRSA_KILLS_SEED").unwrap_or_else(|| fastrand::u64(..));
    println!("KIRSA_KILLS={kills} KIRSA_KILLS_SEED={seed}");
    let mut random = fastrand::Rng::with_seed(seed);
    let site = site()?;
    let pods = pods(&site)?;
    // So that some of the kills come in the middle of exchanges.
    site.sts.inject(Fault::always(Effect::delay(Duration::from_millis(50))));
    let mut agent = Some(site.start()?);
    let tokens = pods.iter().map(|(pod, _)| pod.imds().put_token(21_600)).collect::<Result<Vec<_>>>()?;
    let askers =
        Askers { site: &site, ended: false.into(), answers: AtomicUsize::new(0), unanswered: AtomicUsize::new(0) };
    thread::scope(|scope| {
        let askers = &askers;
        let running: Vec<_> = pods
            .iter()
            .zip(&tokens)
            .map(|((pod, account), token)| scope.spawn(move || askers.ask(pod, account, token)))
            .collect();
        let killing = (0..kills).try_for_each(|kill| {
            let before = site.sts.calls().len();
            let_pass(Duration::from_millis(random.u64(0..LIFE)));
            agent.take().context("a life")?.kill()?;
            agent = Some(Agent::spawn(&site.node, &site.options)?);
            fetched_once_at_most(&site, before).with_context(|| format!("life {kill}"))?;
            ensure!(running.iter().all(|asker| !asker.is_finished()), "one of the pods has seen what it must not see");
            anyhow::Ok(())
        });
        let recovered = killing.and_then(|()| {
            agent.as_ref().context("a life")?.wait_ready()?;
            let before = askers.answers.load(Ordering::Relaxed);
            poll("pods to be served again", PATIENCE, || {
                (askers.answers.load(Ordering::Relaxed) > before + 20 * pods.len()).then_some(())
            })?;
            pods.iter().try_for_each(|(pod, account)| {
                let path = format!("{CREDENTIALS_PATH}{account}-role");
                let served = || Client::get(&mut pod.imds(), &path).send().ok().filter(|answer| answer.status == 200);
                poll("credentials after the last start", PATIENCE, served).map(drop)
            })
        });
        askers.ended.store(true, Ordering::Relaxed);
        running.into_iter().try_for_each(|asker| asker.join().expect("no panic"))?;
        recovered
    })?;
    println!(
        "{kills} kills: {} answers, {} unanswered, {} exchanges",
        askers.answers.load(Ordering::Relaxed),
        askers.unanswered.load(Ordering::Relaxed),
        site.sts.calls().len()
    );
    site.no_pod_got_outside()?;
    agent.context("a life")?.stop()
}

/// No key was exchanged more than once since then.
fn fetched_once_at_most(site: &Site, before: usize) -> Result<()> {
    let calls = site.sts.calls().split_off(before);
    for account in (0..ACCOUNTS).map(|number| site.arn(&format!("account{number}"))) {
        let count = calls.iter().filter(|call| call.role_arn == account).count();
        ensure!(count <= 1, "{count} exchanges of {account}");
    }
    Ok(())
}
