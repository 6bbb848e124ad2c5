//! What thousands of nodes ask of STS and the API server: the agent's own stages on a paused clock, between pods as
//! SDKs make them ask and an STS that only counts. docs/capacity.md has its table; `make simulate` prints it.
//!
//! Nodes do not know of each other, so each is simulated alone and its calls are added to those of the others.

mod report;
mod scenario;

use std::{
    cell::Cell,
    collections::BTreeMap,
    future::Future,
    ops::Range,
    pin::Pin,
    rc::Rc,
    sync::{Arc, Mutex},
    time::Duration,
};

use tokio::{
    task::LocalSet,
    time::{Instant, sleep, sleep_until},
};

use super::ahead::FetchAhead;
use crate::{
    attribute::{Attributor, Workload, file, pod::Pod},
    authorize::{Accounts, Authorizer, Defaults, Grant},
    cache::{Cache, ExchangeLimiter},
    clock,
    config::EXCHANGES,
    exchange::{Credential, EXCHANGE_TIMEOUT, Issuer},
    observe::{Metrics, Readiness},
    refusal::{Reason, Refusal},
};

/// botocore fetches anew when less is left; what it is given has at least twice as much.
const SDK_REFETCHES: Duration = Duration::from_secs(15 * 60);
/// And not on every call when it got no better.
const SDK_PAUSE: Duration = Duration::from_secs(60);
/// A TokenRequest on an API server that has time.
const TOKEN: Duration = Duration::from_millis(10);

/// What an agent asks the API server when it starts: two access reviews, the pods and the service accounts, each of
/// which is list and watch in one.
const STARTS: u64 = 4;

/// What is simulated.
#[derive(Debug, Clone)]
struct Site {
    pods: usize,
    /// With a role; each is one session on each node.
    accounts: usize,
    sts: Duration,
    session: Duration,
    /// `--start-window`.
    window: Duration,
    jitter: bool,
}

/// One node, in its own time: zero is its agent's start.
#[derive(Debug, Clone)]
struct Life {
    until: Duration,
    /// Within which its pods first ask.
    first_asked: Duration,
    sts_away: Option<Range<Duration>>,
}

/// What a node, or all of them, asked for, by the second.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
struct Calls {
    api: BTreeMap<u64, u64>,
    sts: BTreeMap<u64, u64>,
    /// Requests of pods: those that were refused, and the longest wait.
    refused: u64,
    longest: Duration,
}

/// An API server and an STS that count.
struct Upstream {
    began: Instant,
    sts: Duration,
    session: Duration,
    away: Option<Range<Duration>>,
    calls: Mutex<Calls>,
}

impl Upstream {
    fn count(&self, which: impl FnOnce(&mut Calls) -> &mut BTreeMap<u64, u64>) {
        let mut calls = self.calls.lock().unwrap();
        *which(&mut calls).entry(self.began.elapsed().as_secs()).or_default() += 1;
    }
}

impl Issuer for Upstream {
    fn issue<'a>(&'a self, _: &'a Grant) -> Pin<Box<dyn Future<Output = Result<Credential, Refusal>> + Send + 'a>> {
        Box::pin(async {
            self.count(|calls| &mut calls.api);
            sleep(TOKEN).await;
            self.count(|calls| &mut calls.sts);
            sleep(self.sts).await;
            match &self.away {
                Some(away) if away.contains(&self.began.elapsed()) => Err(Reason::StsUnavailable.into()),
                _ => Ok(Credential::sample("ASIA", self.session)),
            }
        })
    }
}

/// One node's life, on a clock that passes as fast as there is nothing to do.
fn node(site: &Site, life: &Life, seed: u64) -> Calls {
    fastrand::seed(seed);
    clock::tests::FIXED_JITTER.set((!site.jitter).then_some(0.5));
    let runtime = tokio::runtime::Builder::new_current_thread().enable_time().start_paused(true).build().unwrap();
    let calls = LocalSet::new().block_on(&runtime, live(site, life));
    clock::tests::FIXED_JITTER.set(None);
    calls
}

async fn live(site: &Site, life: &Life) -> Calls {
    let metrics = Metrics::new("simulated").unwrap();
    let upstream = Arc::new(Upstream {
        began: Instant::now(),
        sts: site.sts,
        session: site.session,
        away: life.sts_away.clone(),
        calls: Mutex::new(Calls { api: BTreeMap::from([(0, STARTS)]), ..Calls::default() }),
    });
    let workloads: Vec<file::FileWorkload> = (0..site.pods).map(|pod| workload(pod, site.accounts)).collect();
    let authorizer = Arc::new(Authorizer::new(Accounts::for_file(), Defaults::sample()));
    authorizer.accounts().replace(&workloads, "eks.amazonaws.com/role-arn");
    let (attributor, changes) = Attributor::new(metrics.clone());
    file::apply(&workloads, &attributor);
    let limiter = ExchangeLimiter::new(EXCHANGES.0, EXCHANGES.1, metrics.clone());
    let cache = Arc::new(Cache::new(upstream.clone(), limiter, |_| true, metrics));

    let readiness = Readiness::default();
    let known = (readiness.condition("pods"), readiness.condition("service accounts"));
    known.0.set(true);
    known.1.set(true);
    let ahead = FetchAhead { attributor, authorizer: authorizer.clone(), cache: cache.clone(), window: site.window };
    // No service account changes its role.
    let (_, accounts) = tokio::sync::mpsc::unbounded_channel();
    let ahead = tokio::spawn(ahead.run(changes, accounts, known));

    let outcome = Rc::new(Cell::new((0, Duration::ZERO)));
    for pod in 0..site.pods {
        let Some(grant) = authorizer.grant_if_cached(&sample(pod, site.accounts)) else { continue };
        // A program starts when it does: that is no jitter of the agent's.
        let first = life.first_asked.mul_f64(fastrand::f64());
        tokio::task::spawn_local(sdk(cache.clone(), grant, first, outcome.clone()));
    }
    sleep(life.until).await;
    ahead.abort();
    let mut calls = upstream.calls.lock().unwrap().clone();
    (calls.refused, calls.longest) = outcome.get();
    calls
}

/// A pod's program: asks, uses what it got until little is left, asks again.
async fn sdk(cache: Arc<Cache>, grant: Grant, first: Duration, outcome: Rc<Cell<(u64, Duration)>>) {
    sleep(first).await;
    loop {
        let asked = Instant::now();
        let answer = cache.get(&grant, asked + EXCHANGE_TIMEOUT).await;
        let (refused, longest) = outcome.get();
        outcome.set((refused + u64::from(answer.is_err()), longest.max(asked.elapsed())));
        let enough = answer.map_or(asked, |credential| credential.expires_at() - SDK_REFETCHES);
        sleep_until(enough.max(Instant::now() + SDK_PAUSE)).await;
    }
}

fn account(pod: usize, accounts: usize) -> String {
    format!("account-{}", pod % accounts)
}

fn sample(pod: usize, accounts: usize) -> Workload {
    Workload::sample(&format!("pod-{pod}"), &format!("uid-{pod}"), &account(pod, accounts))
}

fn workload(pod: usize, accounts: usize) -> file::FileWorkload {
    let account = account(pod, accounts);
    let role = Some(format!("arn:aws:iam::111122223333:role/{account}"));
    let pod = Pod::sample(&format!("pod-{pod}"), &format!("uid-{pod}"), &account, &[]);
    file::FileWorkload { pod, role, token_file: None, annotations: BTreeMap::new() }
}
