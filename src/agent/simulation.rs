//! Simulates the load of thousands of nodes on STS and the API server. The agent's own stages run on a paused clock,
//! between pods that behave like AWS SDKs and an STS that counts calls. `make simulate` prints the table in
//! docs/capacity.md.
//!
//! Nodes are independent, so each is simulated alone and the calls are added up.

mod report;
mod scenario;

use std::{cell::Cell, collections::BTreeMap, ops::Range, rc::Rc, sync::Arc, time::Duration};

use futures::future::BoxFuture;
use parking_lot::Mutex;
use tokio::{
    task::LocalSet,
    time::{Instant, sleep, sleep_until},
};

use super::{discovery::Synced, prefetcher::Prefetcher};
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

/// botocore refreshes credentials when less time is left. New credentials are valid for at least twice as long.
const SDK_REFRESH_BEFORE: Duration = Duration::from_secs(15 * 60);
/// Minimum time between refreshes of an SDK.
const SDK_PAUSE: Duration = Duration::from_secs(60);
/// Latency of a TokenRequest on an idle API server.
const TOKEN_LATENCY: Duration = Duration::from_millis(10);

/// API calls of an agent that starts: two access reviews, and the pods and the service accounts, each of which is a
/// list and watch in one call.
const CALLS_AT_START: u64 = 4;

/// The parameters of a simulated cluster.
#[derive(Debug, Clone)]
struct Site {
    pods: usize,
    /// Service accounts with a role on each node; each needs one session per node.
    accounts: usize,
    /// Latency of STS.
    sts: Duration,
    /// Lifetime of a session.
    session: Duration,
    /// `--start-window`.
    window: Duration,
    jitter: bool,
}

/// One run of a node, in time since the start of its agent.
#[derive(Debug, Clone)]
struct NodeRun {
    until: Duration,
    /// The window in which its pods send their first request.
    first_requests: Duration,
    sts_outage: Option<Range<Duration>>,
}

/// The calls of one node, or of all nodes, per second.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
struct Calls {
    api: BTreeMap<u64, u64>,
    sts: BTreeMap<u64, u64>,
    /// Number of refused requests from pods.
    refused: u64,
    /// Longest wait of a pod.
    longest: Duration,
}

/// An API server and an STS that count calls.
struct Upstream {
    start: Instant,
    sts: Duration,
    session: Duration,
    outage: Option<Range<Duration>>,
    calls: Mutex<Calls>,
}

impl Upstream {
    fn count(&self, counter: impl FnOnce(&mut Calls) -> &mut BTreeMap<u64, u64>) {
        let mut calls = self.calls.lock();
        *counter(&mut calls).entry(self.start.elapsed().as_secs()).or_default() += 1;
    }
}

impl Issuer for Upstream {
    fn issue<'a>(&'a self, _: &'a Grant) -> BoxFuture<'a, Result<Credential, Refusal>> {
        Box::pin(async {
            self.count(|calls| &mut calls.api);
            sleep(TOKEN_LATENCY).await;
            self.count(|calls| &mut calls.sts);
            sleep(self.sts).await;
            match &self.outage {
                Some(outage) if outage.contains(&self.start.elapsed()) => Err(Reason::StsUnavailable.into()),
                _ => Ok(Credential::sample("ASIA", self.session)),
            }
        })
    }
}

/// Simulates one node on a paused clock, which skips idle time.
fn simulate_node(site: &Site, run: &NodeRun, seed: u64) -> Calls {
    fastrand::seed(seed);
    clock::tests::FIXED_JITTER.set((!site.jitter).then_some(0.5));
    let runtime = tokio::runtime::Builder::new_current_thread().enable_time().start_paused(true).build().unwrap();
    let calls = LocalSet::new().block_on(&runtime, run_node(site, run));
    clock::tests::FIXED_JITTER.set(None);
    calls
}

async fn run_node(site: &Site, run: &NodeRun) -> Calls {
    let metrics = Metrics::new("simulated").unwrap();
    let upstream = Arc::new(Upstream {
        start: Instant::now(),
        sts: site.sts,
        session: site.session,
        outage: run.sts_outage.clone(),
        calls: Mutex::new(Calls { api: BTreeMap::from([(0, CALLS_AT_START)]), ..Calls::default() }),
    });
    let workloads: Vec<file::FileWorkload> = (0..site.pods).map(|pod| workload(pod, site.accounts)).collect();
    let authorizer = Arc::new(Authorizer::new(Accounts::for_file(), Defaults::sample()));
    authorizer.accounts().replace(&workloads, "eks.amazonaws.com/role-arn");
    let (attributor, changes) = Attributor::new(metrics.clone());
    file::apply(&workloads, &attributor);
    let limiter = ExchangeLimiter::new(EXCHANGES.0, EXCHANGES.1, metrics.clone());
    let cache = Arc::new(Cache::new(upstream.clone(), limiter, |_| true, metrics));

    let synced = Synced::new(&Readiness::default());
    synced.set_all();
    let window = site.window;
    let prefetcher = Prefetcher { attributor, authorizer: authorizer.clone(), cache: cache.clone(), window };
    // No service account changes its role.
    let (_, accounts) = tokio::sync::mpsc::unbounded_channel();
    let prefetcher = tokio::spawn(prefetcher.run(changes, accounts, synced));

    let outcome = Rc::new(Cell::new((0, Duration::ZERO)));
    for pod in 0..site.pods {
        let Some(grant) = authorizer.grant_if_cached(&sample(pod, site.accounts)) else { continue };
        // Programs start at random times even when the agent's jitter is off.
        let first = run.first_requests.mul_f64(fastrand::f64());
        tokio::task::spawn_local(sdk(cache.clone(), grant, first, outcome.clone()));
    }
    sleep(run.until).await;
    prefetcher.abort();
    let mut calls = upstream.calls.lock().clone();
    (calls.refused, calls.longest) = outcome.get();
    calls
}

/// Simulates an SDK in a pod: requests credentials, uses them until they are due for a refresh, requests new ones.
async fn sdk(cache: Arc<Cache>, grant: Grant, first: Duration, outcome: Rc<Cell<(u64, Duration)>>) {
    sleep(first).await;
    loop {
        let start = Instant::now();
        let result = cache.get(&grant, start + EXCHANGE_TIMEOUT).await;
        let (refused, longest) = outcome.get();
        outcome.set((refused + u64::from(result.is_err()), longest.max(start.elapsed())));
        let refresh = result.map_or(start, |credential| credential.expires_at() - SDK_REFRESH_BEFORE);
        sleep_until(refresh.max(Instant::now() + SDK_PAUSE)).await;
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
