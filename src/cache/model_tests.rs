//! The cache under everything that may happen to it, in random order on a clock that jumps from event to event: pods
//! come, ask, hang up and go, roles change, exchanges take their time and fail. The same seed is the same run.
//!
//! A model beside it says what must hold: at most one exchange of a session at a time, and none for a pod that is gone or
//! a role that its account has no more; no credentials but the caller's own, and none that are about to expire; every
//! caller answered by the end of its hold; refreshes when they are due and not before; refusals remembered.

use std::{
    collections::{BTreeMap, HashMap, HashSet},
    future::Future,
    pin::Pin,
    sync::MutexGuard,
    time::Duration,
};

use tokio::{task::JoinSet, time::sleep};

use super::*;
use crate::{attribute::Workload, refusal::Reason};

const LIFETIME: Duration = Duration::from_secs(3_600);
const HOLD: Duration = Duration::from_secs(4);
const LIST_HOLD: Duration = Duration::from_millis(350);
/// Longer than any pause between two tries.
const CALM: Duration = Duration::from_secs(65);
/// The same where credentials are in hand and were refused for good.
const DENIED: Duration = Duration::from_secs(305);
/// What has as much left is good for nearly every SDK, and given out where STS is slow.
const GOOD: Duration = Duration::from_secs(21 * 60);
/// Timers are as fine as this.
const TICK: Duration = Duration::from_millis(5);
const ACCOUNTS: usize = 3;
const SEATS: usize = 8;

/// What exchanges meet with.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Weather {
    Fine,
    Outage,
    Unsteady,
    Denied,
    /// Tokens are refused as if each pod were gone.
    Forbidden,
    Silent,
}

const WEATHERS: [Weather; 6] =
    [Weather::Fine, Weather::Outage, Weather::Unsteady, Weather::Denied, Weather::Forbidden, Weather::Silent];

/// What the model knows of one session.
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
struct World {
    rng: fastrand::Rng,
    weather: Weather,
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

impl World {
    fn holds(&self, grant: &Grant) -> bool {
        self.live.get(grant.workload().uid()).is_some_and(|account| role(*account, self.roles[*account]) == name(grant))
    }

    fn fine_for(&self) -> Duration {
        if self.weather == Weather::Fine { self.since.elapsed() } else { Duration::ZERO }
    }

    /// Nobody is left who could use it: what comes next is another session.
    fn forget_the_abandoned(&mut self) {
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
struct Model(Mutex<World>);

impl Model {
    fn world(&self) -> MutexGuard<'_, World> {
        self.0.lock().unwrap()
    }

    fn begin(&self, grant: &Grant) -> (Duration, Option<Reason>, usize) {
        let mut world = self.world();
        let World { rng, weather, wrong, sessions, .. } = &mut *world;
        let short = Duration::from_millis(rng.u64(0..3_000));
        let (delay, failed) = match weather {
            Weather::Fine => (short, None),
            Weather::Outage => (short, Some(Reason::StsUnavailable)),
            Weather::Unsteady => (short, rng.bool().then_some(Reason::StsThrottled)),
            Weather::Denied => (short, Some(Reason::AccessDenied)),
            Weather::Forbidden => (short, Some(Reason::TokenForbidden)),
            Weather::Silent => (HOLD, Some(Reason::ExchangeTimeout)),
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
        world.exchanges += 1;
        if !world.holds(grant) {
            world.wrong.push(format!("{name}: exchanged for {}, which it is not for", grant.workload().uid()));
        }
        answer
    }

    fn end(&self, grant: &Grant, failed: Option<Reason>, former: usize) -> Result<Credential, Refusal> {
        let mut world = self.world();
        let (id, name) = (format!("ASIA{}", world.issued.len()), name(grant));
        let session = world.sessions.entry(name.clone()).or_default();
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
                world.issued.insert(id.clone(), name);
                Ok(Credential::sample(&id, LIFETIME))
            }
        }
    }

    /// The pod is one of the session's from now on.
    fn joins(&self, grant: &Grant, used: bool) {
        let mut world = self.world();
        if !world.holds(grant) {
            return;
        }
        let session = world.sessions.entry(name(grant)).or_default();
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
        let mut world = self.world();
        let name = name(grant);
        if asked.elapsed() > HOLD + TICK {
            world.wrong.push(format!("{name}: held for {:?}", asked.elapsed()));
        }
        match answer {
            Ok(credential) => {
                let left = credential.expires_at().saturating_duration_since(Instant::now());
                let opens = world.issued.get(credential.access_key_id()).cloned();
                // Whoever is gone by now may have waited for an exchange that nobody needs any more.
                let well = world.fine_for() > LIFETIME && world.holds(grant);
                let enough = if well { GOOD } else { Duration::from_secs(60) };
                if opens.as_ref() != Some(&name) || left < enough {
                    world.wrong.push(format!("{name} was given {opens:?} with {left:?} left"));
                }
            }
            Err(refusal) => {
                if world.fine_for() > CALM + HOLD && world.holds(grant) {
                    world.wrong.push(format!("{name} was refused while all was well: {refusal}"));
                }
            }
        }
    }
}

impl Issue for Model {
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

/// A slot that is dropped takes its exchange along.
struct Cancelled<'a> {
    model: &'a Model,
    session: String,
    former: usize,
    armed: bool,
}

impl Drop for Cancelled<'_> {
    fn drop(&mut self) {
        if self.armed
            && let Some(session) = self.model.world().sessions.get_mut(&self.session)
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
    model: Arc<Model>,
    cache: Arc<Cache>,
    seats: Vec<Workload>,
    /// Pods that were there; their requests may still be under way.
    former: Vec<Grant>,
    came: usize,
    callers: JoinSet<()>,
}

impl Run {
    fn new(seed: u64) -> Self {
        let world = World {
            rng: fastrand::Rng::with_seed(seed),
            weather: Weather::Fine,
            since: Instant::now(),
            live: HashMap::new(),
            roles: [0; ACCOUNTS],
            sessions: BTreeMap::new(),
            issued: HashMap::new(),
            exchanges: 0,
            wrong: Vec::new(),
        };
        let model = Arc::new(Model(Mutex::new(world)));
        let metrics = Metrics::new("test").unwrap();
        let judge = model.clone();
        let cache = Cache::new(
            model.clone(),
            Budget::new(1_000, 1_000, metrics.clone()),
            move |grant| judge.world().holds(grant),
            metrics,
        );
        let mut run = Self {
            model,
            cache: Arc::new(cache),
            seats: Vec::new(),
            former: Vec::new(),
            came: 0,
            callers: JoinSet::new(),
        };
        run.seats = (0..SEATS).map(|seat| run.pod(seat)).collect();
        run
    }

    fn pod(&mut self, seat: usize) -> Workload {
        self.came += 1;
        let (uid, account) = (format!("uid-{}", self.came), seat % ACCOUNTS);
        let workload = Workload::sample(&format!("seat-{seat}"), &uid, &format!("account-{account}"));
        self.model.world().live.insert(workload.uid().clone(), account);
        workload
    }

    /// As the authoriser makes it at this moment.
    fn grant(&self, seat: usize) -> Grant {
        let account = seat % ACCOUNTS;
        let role = role(account, self.model.world().roles[account]);
        Grant::sample(self.seats[seat].clone(), &role)
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
            let standing = cache.standing(&grant, asked + LIST_HOLD).await;
            let mut world = model.world();
            if asked.elapsed() > LIST_HOLD + TICK {
                world.wrong.push(format!("{}: the list was held for {:?}", name(&grant), asked.elapsed()));
            }
            if matches!(standing, Standing::Failed(_)) && world.fine_for() > CALM + HOLD && world.holds(&grant) {
                world.wrong.push(format!("{}: the list was refused while all was well", name(&grant)));
            }
        });
    }

    fn leaves(&mut self, seat: usize) {
        let former = self.grant(seat);
        {
            let mut world = self.model.world();
            world.live.remove(former.workload().uid());
            for session in world.sessions.values_mut() {
                session.pods.remove(former.workload().uid());
            }
            world.forget_the_abandoned();
        }
        self.cache.forget(former.workload().uid());
        self.former.push(former);
        self.seats[seat] = self.pod(seat);
    }

    fn rng<T>(&self, choose: impl FnOnce(&mut fastrand::Rng) -> T) -> T {
        choose(&mut self.model.world().rng)
    }

    async fn step(&mut self) {
        let (what, seat) = self.rng(|rng| (rng.u32(0..100), rng.usize(0..SEATS)));
        match what {
            0..35 => {
                let patience =
                    Duration::from_millis(self.rng(|rng| if rng.bool() { 10_000 } else { rng.u64(0..5_000) }));
                let grant = self.grant(seat);
                self.asks(grant, patience);
            }
            35..45 => {
                let grant = self.grant(seat);
                self.lists(grant);
            }
            45..50 => {
                let grant = self.grant(seat);
                self.model.joins(&grant, false);
                self.cache.prefetch(&grant);
            }
            50..54 => self.leaves(seat),
            // A request that was attributed before its pod was gone.
            54..56 => {
                if let Some(grant) = self.former.pop() {
                    self.asks(grant, HOLD * 2);
                }
            }
            56..58 => {
                let mut world = self.model.world();
                world.roles[seat % ACCOUNTS] = world.rng.usize(0..3);
                world.forget_the_abandoned();
            }
            58..62 => {
                let mut world = self.model.world();
                let weather =
                    if world.rng.bool() { Weather::Fine } else { WEATHERS[world.rng.usize(0..WEATHERS.len())] };
                (world.weather, world.since) = (weather, Instant::now());
            }
            62..68 => {
                // To where what is in hand is about to expire.
                let end = {
                    let mut world = self.model.world();
                    let ends = world.sessions.values().filter_map(|session| session.issued).max();
                    let before = Duration::from_secs(world.rng.u64(0..120));
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
        self.model.world().check();
    }
}

/// Steps in all; the environment may ask for more.
fn steps() -> usize {
    std::env::var("KIRSA_MODEL_STEPS").ok().and_then(|steps| steps.parse().ok()).unwrap_or(12_000)
}

/// IMDS-17, IMDS-19, IMDS-20, IMDS-22, IMDS-27
#[test]
fn whatever_happens_in_whatever_order_a_session_is_what_it_should_be() {
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
        let world = runtime.block_on(async {
            let mut run = Run::new(seed);
            for step in 0..STEPS {
                run.step().await;
                let wrong = std::mem::take(&mut run.model.world().wrong);
                assert!(wrong.is_empty(), "KIRSA_MODEL_SEED={seed}, step {step}: {wrong:#?}");
            }
            // In the end all is well, and everybody is served.
            {
                let mut world = run.model.world();
                (world.weather, world.since) = (Weather::Fine, Instant::now());
            }
            sleep(CALM + HOLD * 2).await;
            (0..SEATS).for_each(|seat| run.asks(run.grant(seat), HOLD * 2));
            while run.callers.join_next().await.is_some() {}
            let world = run.model.world();
            assert!(world.wrong.is_empty(), "KIRSA_MODEL_SEED={seed}, in the end: {:#?}", world.wrong);
            world.exchanges
        });
        exchanges += world;
    }
    println!("{} steps, {exchanges} exchanges", steps());
    assert!(exchanges > 100);
}
