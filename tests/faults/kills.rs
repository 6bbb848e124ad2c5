//! Kills the agent at random moments while pods send requests.

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

use super::{TIMEOUT, site};

/// Number of kills; KIRSA_KILLS overrides it.
const KILLS: usize = 15;
const ACCOUNTS: usize = 4;
const PODS_OF_EACH: usize = 2;
/// Maximum time in milliseconds between the start and the kill of an agent, which is ready after about a fifth of it.
const MAX_RUNTIME: u64 = 800;

/// Reads an environment variable.
fn variable<T: std::str::FromStr>(name: &str) -> Option<T> {
    std::env::var(name).ok()?.parse().ok()
}

/// Waits. The kill happens at a random moment, so there is no event to wait for.
fn pause(time: Duration) {
    let _ = poll("nothing", time, || None::<()>);
}

/// Pods that send requests as fast as they can, each with its first IMDSv2 token.
struct Clients<'a> {
    site: &'a Site,
    ended: AtomicBool,
    answers: AtomicUsize,
    unanswered: AtomicUsize,
}

impl Clients<'_> {
    fn run(&self, pod: &Pod, account: &str, token: &str) -> Result<()> {
        let mut imds = pod.imds();
        while !self.ended.load(Ordering::Relaxed) {
            for path in [CREDENTIALS_PATH.to_owned(), format!("{CREDENTIALS_PATH}{account}-role")] {
                match imds.get(&path).header(TOKEN, token).send() {
                    Ok(response) => self.check_response(&response, account).with_context(|| pod.name().to_owned())?,
                    Err(error) => {
                        self.check_error(&error)?;
                        imds = pod.imds();
                        // Connections to a closed port fail quickly; this leaves CPU time for the agent's start.
                        pause(Duration::from_millis(10));
                    }
                }
            }
        }
        Ok(())
    }

    /// Accepts the pod's own credentials, or a status that SDKs retry.
    fn check_response(&self, response: &Response, account: &str) -> Result<()> {
        self.answers.fetch_add(1, Ordering::Relaxed);
        match response.status {
            503 => Ok(()),
            200 if response.body == format!("{account}-role") => Ok(()),
            200 => {
                let session = self.site.session(&response.body)?;
                ensure!(session.role_arn == self.site.arn(account), "{account} got {session:?}");
                Ok(())
            }
            _ => bail!("{response:?}"),
        }
    }

    /// Accepts a refused or reset connection, and rejects a timeout, which would mean dropped packets.
    fn check_error(&self, error: &anyhow::Error) -> Result<()> {
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
fn kills_mix_up_no_credentials() -> Result<()> {
    let kills = variable("KIRSA_KILLS").unwrap_or(KILLS);
    let seed = variable("KIRSA_KILLS_SEED").unwrap_or_else(|| fastrand::u64(..));
    println!("KIRSA_KILLS={kills} KIRSA_KILLS_SEED={seed}");
    let mut random = fastrand::Rng::with_seed(seed);
    let site = site()?;
    let pods = pods(&site)?;
    // Slow exchanges make some kills hit one.
    site.sts.inject(Fault::always(Effect::delay(Duration::from_millis(50))));
    let mut agent = Some(site.start()?);
    let tokens = pods.iter().map(|(pod, _)| pod.imds().put_token(21_600)).collect::<Result<Vec<_>>>()?;
    let clients =
        Clients { site: &site, ended: false.into(), answers: AtomicUsize::new(0), unanswered: AtomicUsize::new(0) };
    thread::scope(|scope| {
        let clients = &clients;
        let running: Vec<_> = pods
            .iter()
            .zip(&tokens)
            .map(|((pod, account), token)| scope.spawn(move || clients.run(pod, account, token)))
            .collect();
        let killing = (0..kills).try_for_each(|kill| {
            let before = site.sts.calls().len();
            pause(Duration::from_millis(random.u64(0..MAX_RUNTIME)));
            agent.take().context("an agent")?.kill()?;
            agent = Some(Agent::spawn(&site.node, &site.options)?);
            assert_one_exchange_each(&site, before).with_context(|| format!("run {kill}"))?;
            ensure!(running.iter().all(|client| !client.is_finished()), "a pod got an unexpected response");
            anyhow::Ok(())
        });
        let recovered = killing.and_then(|()| {
            agent.as_ref().context("an agent")?.wait_ready()?;
            let before = clients.answers.load(Ordering::Relaxed);
            poll("pods to be served again", TIMEOUT, || {
                (clients.answers.load(Ordering::Relaxed) > before + 20 * pods.len()).then_some(())
            })?;
            pods.iter().try_for_each(|(pod, account)| {
                let path = format!("{CREDENTIALS_PATH}{account}-role");
                let served = || Client::get(&mut pod.imds(), &path).send().ok().filter(|answer| answer.status == 200);
                poll("credentials after the last start", TIMEOUT, served).map(drop)
            })
        });
        clients.ended.store(true, Ordering::Relaxed);
        running.into_iter().try_for_each(|client| client.join().expect("no panic"))?;
        recovered
    })?;
    println!(
        "{kills} kills: {} answers, {} unanswered, {} exchanges",
        clients.answers.load(Ordering::Relaxed),
        clients.unanswered.load(Ordering::Relaxed),
        site.sts.calls().len()
    );
    site.no_pod_got_outside()?;
    agent.context("an agent")?.stop()
}

/// Checks that no session was exchanged more than once since then.
fn assert_one_exchange_each(site: &Site, before: usize) -> Result<()> {
    let calls = site.sts.calls().split_off(before);
    for account in (0..ACCOUNTS).map(|number| site.arn(&format!("account{number}"))) {
        let count = calls.iter().filter(|call| call.role_arn == account).count();
        ensure!(count <= 1, "{count} exchanges of {account}");
    }
    Ok(())
}
