//! Model-based test: random events on a paused clock (pods come, ask, hang up and go; roles change; exchanges are slow or
//! fail), compared with a model. A seed reproduces a run.
//!
//! The model checks: single-flight per session; no exchange for a deleted pod or a removed role; only the caller's own
//! credentials, and none about to expire; an answer to every caller before its deadline; refreshes on schedule; cached
//! refusals.

use std::{
    collections::{BTreeMap, HashMap, HashSet},
    future::Future,
    pin::Pin,
    time::Duration,
};

use tokio::{task::JoinSet, time::sleep};

use super::*;
use crate::{attribute::Workload, refusal::Reason};

const LIFETIME: Duration = Duration::from_secs(3_600);
const HOLD: Duration = Duration::from_secs(4);
const LIST_HOLD: Duration = Duration::from_millis(350);
/// Longer than any retry delay.
const CALM: Duration = Duration::from_secs(65);
/// The same while a credential is held and its refresh is denied.
const DENIED: Duration = Duration::from_secs(305);
/// Minimum time left while all is well: 21 minutes suffice for nearly every SDK, and a caller may have waited for fresher
/// credentials for 350 ms.
const GOOD: Duration = Duration::from_millis(21 * 60 * 1_000 - 350);
/// Resolution of timers.
const TICK: Duration = Duration::from_millis(5);
const ACCOUNTS: usize = 3;
const PODS: usize = 8;

/// Outcome of exchanges.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum UpstreamState {
    Fine,
    Outage,
    Unsteady,
    Denied,
    /// Tokens are refused as for deleted pods.
    Forbidden,
    Silent,
}

const UPSTREAM_STATES: [UpstreamState; 6] = [
    UpstreamState::Fine,
    UpstreamState::Outage,
    UpstreamState::Unsteady,
    UpstreamState::Denied,
    UpstreamState::Forbidden,
    UpstreamState::Silent,
];

/// Expected state of one session.
#[derive(Debug, Default)]
struct Session {
    /// How often it was abandoned. What was under way then may still be waited for, and is in nobody's hand after that.
    former: usize,
    in_flight: usize,
    /// Pods that have asked since they, or their role, were new.
    pods: HashSet<PodUid>,
    issued: Option<Instant>,
    used: Option<Instant>,
    /// Since when it has been used at least once in a lifetime.
    in_use: Option<Instant>,
    /// No exchange before this, unless a new pod comes.
    denied_until: Option<Instant>,
}

#[derive(Debug)]
struct Model {
    rng: fastrand::Rng,
    upstream: UpstreamState,
    since: Instant,
    live: HashMap<PodUid, usize>,
    /// Of each account.
    roles: [usize; ACCOUNTS],
    sessions: BTreeMap<String, Session>,
    /// Access key ids, and what they open.
    issued: HashMap<String, String>,
    exchanges: usize,
    wrong: Vec<String>,
}

impl Model {
    fn holds(&self, grant: &Grant) -> bool {
        self.live.get(grant.workload().uid()).is_some_and(|account| role(*account, self.roles[*account]) == name(grant))
    }

    fn fine_for(&self) -> Duration {
        if self.upstream == UpstreamState::Fine { self.since.elapsed() } else { Duration::ZERO }
    }

    /// Nobody is left who could use it: what comes next is another session.
    fn drop_abandoned(&mut self) {
        for (name, session) in &mut self.sessions {
            let may =
                |uid: &PodUid| self.live.get(uid).is_some_and(|account| role(*account, self.roles[*account]) == *name);
            if !session.pods.iter().any(may) {
                *session = Session { former: session.former + 1, ..Session::default() };
            }
        }
    }

    fn check(&mut self) {
        let calm = self.fine_for();
        for (name, session) in &self.sessions {
            let Some(issued) = session.issued.filter(|issued| issued.elapsed() < LIFETIME) else { continue };
            let late = issued.elapsed().saturating_sub(LIFETIME.mul_f64(0.48) + CALM);
            let in_use = session.used.is_some_and(|used| used.elapsed() < LIFETIME)
                && session.in_use.is_some_and(|since| since.elapsed() > CALM);
            if in_use && session.in_flight == 0 && !late.is_zero() && calm > late + DENIED {
                self.wrong.push(format!("{name} was not refreshed, which was due {late:?} ago"));
            }
        }
    }
}

#[derive(Debug)]
struct SharedModel(Mutex<Model>);

impl SharedModel {
    fn model(&self) -> MutexGuard<'_, Model> {
        self.0.lock()
    }

    fn begin(&self, grant: &Grant) -> (Duration, Option<Reason>, usize) {
        let mut model = self.model();
        let Model { rng, upstream, wrong, sessions, .. } = &mut *model;
        let short = Duration::from_millis(rng.u64(0..3_000));
        let (delay, failed) = match upstream {
            UpstreamState::Fine => (short, None),
            UpstreamState::Outage => (short, Some(Reason::StsUnavailable)),
            UpstreamState::Unsteady => (short, rng.bool().then_some(Reason::StsThrottled)),
            UpstreamState::Denied => (short, Some(Reason::AccessDenied)),
            UpstreamState::Forbidden => (short, Some(Reason::TokenForbidden)),
            UpstreamState::Silent => (HOLD, Some(Reason::ExchangeTimeout)),
        };
        let name = name(grant);
        let session = sessions.entry(name.clone()).or_default();
        if session.in_flight > 0 {
            wrong.push(format!("{name}: two exchanges at a time"));
        }
        if let Some(age) = session.issued.map(|issued| issued.elapsed())
            && age < LIFETIME.mul_f64(0.40)
        {
            wrong.push(format!("{name}: exchanged anew at an age of {age:?}"));
        }
        if session.denied_until.is_some_and(|until| Instant::now() + TICK < until) {
            wrong.push(format!("{name}: tried again while the refusal was remembered"));
        }
        session.in_flight += 1;
        let answer = (delay, failed, session.former);
        model.exchanges += 1;
        if !model.holds(grant) {
            model.wrong.push(format!("{name}: exchanged for {}, which it is not for", grant.workload().uid()));
        }
        answer
    }

    fn end(&self, grant: &Grant, failed: Option<Reason>, former: usize) -> Result<Credential, Refusal> {
        let mut model = self.model();
        let (id, name) = (format!("ASIA{}", model.issued.len()), name(grant));
        let session = model.sessions.entry(name.clone()).or_default();
        let current = session.former == former;
        if current {
            session.in_flight -= 1;
        }
        match failed {
            Some(reason) if !current => Err(reason.into()),
            Some(reason) => {
                let remembered = Duration::from_secs(10);
                session.denied_until = (reason == Reason::AccessDenied).then(|| Instant::now() + remembered);
                Err(reason.into())
            }
            None => {
                if current {
                    session.issued = Some(Instant::now());
                }
                model.issued.insert(id.clone(), name);
                Ok(Credential::sample(&id, LIFETIME))
            }
        }
    }

    /// The pod is one of the session's from now on.
    fn joins(&self, grant: &Grant, used: bool) {
        let mut model = self.model();
        if !model.holds(grant) {
            return;
        }
        let session = model.sessions.entry(name(grant)).or_default();
        if session.pods.insert(grant.workload().uid().clone()) {
            session.denied_until = session.denied_until.filter(|_| session.pods.len() > 1);
        }
        if used {
            if session.used.is_none_or(|used| used.elapsed() >= LIFETIME) {
                session.in_use = Some(Instant::now());
            }
            session.used = Some(Instant::now());
        }
    }

    /// What a caller was given.
    fn answered(&self, grant: &Grant, asked: Instant, answer: Result<Arc<Credential>, Refusal>) {
        let mut model = self.model();
        let name = name(grant);
        if asked.elapsed() > HOLD + TICK {
            model.wrong.push(format!("{name}: held for {:?}", asked.elapsed()));
        }
        match answer {
            Ok(credential) => {
                let left = credential.expires_at().saturating_duration_since(Instant::now());
                let opens = model.issued.get(credential.access_key_id()).cloned();
                // Whoever is gone by now may have waited for an exchange that nobody needs any more.
                let well = model.fine_for() > LIFETIME && model.holds(grant);
                let enough = if well { GOOD } else { Duration::from_secs(60) };
                if opens.as_ref() != Some(&name) || left < enough {
                    model.wrong.push(format!("{name} was given {opens:?} with {left:?} left"));
                }
            }
            Err(refusal) => {
                if model.fine_for() > CALM + HOLD && model.holds(grant) {
                    model.wrong.push(format!("{name} was refused while all was well: {refusal}"));
                }
            }
        }
    }
}

impl Issuer for SharedModel {
    fn issue<'a>(&'a self, grant: &'a Grant) -> Pin<Box<dyn Future<Output = Result<Credential, Refusal>> + Send + 'a>> {
        let (delay, failed, former) = self.begin(grant);
        let guard = Cancelled { model: self, session: name(grant), former, armed: true };
        Box::pin(async move {
            let mut guard = guard;
            sleep(delay).await;
            guard.armed = false;
            self.end(grant, failed, former)
        })
    }
}

/// A entry that is dropped takes its exchange along.
struct Cancelled<'a> {
    model: &'a SharedModel,
    session: String,
    former: usize,
    armed: bool,
}

impl Drop for Cancelled<'_> {
    fn drop(&mut self) {
        if self.armed
            && let Some(session) = self.model.model().sessions.get_mut(&self.session)
            && session.former == self.former
        {
            session.in_flight -= 1;
        }
    }
}

fn role(account: usize, number: usize) -> String {
    format!("arn:aws:iam::111122223333:role/account{account}-{number}")
}

fn name(grant: &Grant) -> String {
    grant.role().to_string()
}

struct Run {
    model: Arc<SharedModel>,
    cache: Arc<Cache>,
    pod_slots: Vec<Workload>,
    /// Pods that were there; their requests may still be under way.
    former: Vec<Grant>,
    came: usize,
    callers: JoinSet<()>,
}

impl Run {
    fn new(seed: u64) -> Self {
        let model = Model {
            rng: fastrand::Rng::with_seed(seed),
            upstream: UpstreamState::Fine,
            since: Instant::now(),
            live: HashMap::new(),
            roles: [0; ACCOUNTS],
            sessions: BTreeMap::new(),
            issued: HashMap::new(),
            exchanges: 0,
            wrong: Vec::new(),
        };
        let model = Arc::new(SharedModel(Mutex::new(model)));
        let metrics = Metrics::new("test").unwrap();
        let judge = model.clone();
        let cache = Cache::new(
            model.clone(),
            ExchangeLimiter::new(1_000, 1_000, metrics.clone()),
            move |grant| judge.model().holds(grant),
            metrics,
        );
        let mut run = Self {
            model,
            cache: Arc::new(cache),
            pod_slots: Vec::new(),
            former: Vec::new(),
            came: 0,
            callers: JoinSet::new(),
        };
        run.pod_slots = (0..PODS).map(|slot| run.pod(slot)).collect();
        run
    }

    fn pod(&mut self, slot: usize) -> Workload {
        self.came += 1;
        let (uid, account) = (format!("uid-{}", self.came), slot % ACCOUNTS);
        let workload = Workload::sample(&format!("slot-{slot}"), &uid, &format!("account-{account}"));
        self.model.model().live.insert(workload.uid().clone(), account);
        workload
    }

    /// Returns the grant that the authorizer would make now.
    fn grant(&self, slot: usize) -> Grant {
        let account = slot % ACCOUNTS;
        let role = role(account, self.model.model().roles[account]);
        Grant::sample(self.pod_slots[slot].clone(), &role)
    }

    fn asks(&mut self, grant: Grant, patience: Duration) {
        let (model, cache) = (self.model.clone(), self.cache.clone());
        self.callers.spawn(async move {
            model.joins(&grant, true);
            let asked = Instant::now();
            if let Ok(answer) = tokio::time::timeout(patience, cache.get(&grant, asked + HOLD)).await {
                model.answered(&grant, asked, answer);
            }
        });
    }

    fn lists(&mut self, grant: Grant) {
        let (model, cache) = (self.model.clone(), self.cache.clone());
        self.callers.spawn(async move {
            model.joins(&grant, true);
            let asked = Instant::now();
            let standing = cache.status(&grant, asked + LIST_HOLD).await;
            let mut model = model.model();
            if asked.elapsed() > LIST_HOLD + TICK {
                model.wrong.push(format!("{}: the list was held for {:?}", name(&grant), asked.elapsed()));
            }
            if matches!(standing, SessionStatus::Failed(_)) && model.fine_for() > CALM + HOLD && model.holds(&grant) {
                model.wrong.push(format!("{}: the list was refused while all was well", name(&grant)));
            }
        });
    }

    fn leaves(&mut self, slot: usize) {
        let former = self.grant(slot);
        {
            let mut model = self.model.model();
            model.live.remove(former.workload().uid());
            for session in model.sessions.values_mut() {
                session.pods.remove(former.workload().uid());
            }
            model.drop_abandoned();
        }
        self.cache.forget(former.workload().uid());
        self.former.push(former);
        self.pod_slots[slot] = self.pod(slot);
    }

    fn rng<T>(&self, choose: impl FnOnce(&mut fastrand::Rng) -> T) -> T {
        choose(&mut self.model.model().rng)
    }

    async fn step(&mut self) {
        let (what, slot) = self.rng(|rng| (rng.u32(0..100), rng.usize(0..PODS)));
        match what {
            0..35 => {
                let patience =
                    Duration::from_millis(self.rng(|rng| if rng.bool() { 10_000 } else { rng.u64(0..5_000) }));
                let grant = self.grant(slot);
                self.asks(grant, patience);
            }
            35..45 => {
                let grant = self.grant(slot);
                self.lists(grant);
            }
            45..50 => {
                let grant = self.grant(slot);
                self.model.joins(&grant, false);
                self.cache.prefetch(&grant);
            }
            50..54 => self.leaves(slot),
            // A request that was attributed before its pod was gone.
            54..56 => {
                if let Some(grant) = self.former.pop() {
                    self.asks(grant, HOLD * 2);
                }
            }
            56..58 => {
                let mut model = self.model.model();
                model.roles[slot % ACCOUNTS] = model.rng.usize(0..3);
                model.drop_abandoned();
            }
            58..62 => {
                let mut model = self.model.model();
                let upstream = if model.rng.bool() {
                    UpstreamState::Fine
                } else {
                    UPSTREAM_STATES[model.rng.usize(0..UPSTREAM_STATES.len())]
                };
                (model.upstream, model.since) = (upstream, Instant::now());
            }
            62..68 => {
                // To where what is in hand is about to expire.
                let end = {
                    let mut model = self.model.model();
                    let ends = model.sessions.values().filter_map(|session| session.issued).max();
                    let before = Duration::from_secs(model.rng.u64(0..120));
                    ends.map(|issued| issued + LIFETIME - before)
                };
                if let Some(end) = end.filter(|end| *end > Instant::now()) {
                    tokio::time::sleep_until(end).await;
                }
            }
            _ => {
                let most = [10, 1_000, 10_000, 120_000, 2_400_000][self.rng(|rng| rng.usize(0..5))];
                sleep(Duration::from_millis(self.rng(|rng| rng.u64(0..=most)))).await;
            }
        }
        // Whoever was woken may run, or not yet.
        for _ in 0..self.rng(|rng| rng.u32(0..4)) {
            tokio::task::yield_now().await;
        }
        self.model.model().check();
    }
}

/// Steps in all; the environment may ask for more.
fn steps() -> usize {
    std::env::var("KIRSA_MODEL_STEPS").ok().and_then(|steps| steps.parse().ok()).unwrap_or(12_000)
}

/// IMDS-17, IMDS-19, IMDS-20, IMDS-22, IMDS-27
#[test]
fn random_histories_match_the_model() {
    const STEPS: usize = 3_000;
    let given = std::env::var("KIRSA_MODEL_SEED").ok().and_then(|seed| seed.parse().ok());
    let seeds = match given {
        Some(seed) => seed..seed + 1,
        None => {
            let first = fastrand::u64(0..1 << 32);
            first..first + (steps() / STEPS) as u64
        }
    };
    let mut exchanges = 0;
    for seed in seeds {
        fastrand::seed(seed);
        let runtime = tokio::runtime::Builder::new_current_thread().enable_time().start_paused(true).build().unwrap();
        let model = runtime.block_on(async {
            let mut run = Run::new(seed);
            for step in 0..STEPS {
                run.step().await;
                let wrong = std::mem::take(&mut run.model.model().wrong);
                assert!(wrong.is_empty(), "KIRSA_MODEL_SEED={seed}, step {step}: {wrong:#?}");
            }
            // In the end all is well, and everybody is served.
            {
                let mut model = run.model.model();
                (model.upstream, model.since) = (UpstreamState::Fine, Instant::now());
            }
            sleep(CALM + HOLD * 2).await;
            (0..PODS).for_each(|slot| run.asks(run.grant(slot), HOLD * 2));
            while run.callers.join_next().await.is_some() {}
            let model = run.model.model();
            assert!(model.wrong.is_empty(), "KIRSA_MODEL_SEED={seed}, in the end: {:#?}", model.wrong);
            model.exchanges
        });
        exchanges += model;
    }
    println!("{} steps, {exchanges} exchanges", steps());
    assert!(exchanges > 100);
}
