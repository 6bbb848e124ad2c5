//! The life of one session, on a paused clock.

use tokio::time::{advance, pause, timeout};

use super::{
    state::{HeldCredential, MIN_LEFT, MIN_LEFT_SHORT_SESSION},
    *,
};
use crate::{attribute::Workload, clock::UnixTime, exchange::script::Script, observe::Metrics};

const HOUR: Duration = Duration::from_secs(3_600);
const ROLE: &str = "arn:aws:iam::111122223333:role/reader";

fn grant(pod: &str) -> Grant {
    Grant::sample(Workload::sample(pod, &format!("uid-{pod}"), "reader"), ROLE)
}

fn entry(script: &Arc<Script>) -> Arc<SessionEntry> {
    pause();
    another(script)
}

fn another(script: &Arc<Script>) -> Arc<SessionEntry> {
    let entry = SessionEntry::start(
        script.clone(),
        ExchangeLimiter::new(1_000, 1_000, Metrics::new("test").unwrap()),
        Arc::new(|_| true),
    );
    entry.join(&grant("a"));
    entry
}

fn in_4s() -> Instant {
    Instant::now() + Duration::from_secs(4)
}

async fn id(entry: &SessionEntry) -> Result<String, Reason> {
    entry.get(in_4s()).await.map(|credential| credential.access_key_id().to_owned()).map_err(|refusal| refusal.reason)
}

/// The clock's timers fire on whole milliseconds.
fn took(since: Instant) -> u64 {
    u64::try_from(since.elapsed().as_millis()).unwrap() / 10 * 10
}

/// Lets the refresher do what is due, in steps that are short beside every interval here.
async fn pass(duration: Duration) {
    let end = Instant::now() + duration;
    while Instant::now() < end {
        advance(Duration::from_secs(1).min(end - Instant::now())).await;
        for _ in 0..4 {
            tokio::task::yield_now().await;
        }
    }
}

/// IMDS-19
#[tokio::test]
async fn fifty_callers_share_one_exchange() {
    let script = Script::new([(1_000, None)]);
    let entry = entry(&script);
    let callers: Vec<_> = (0..50)
        .map(|_| {
            let entry = entry.clone();
            tokio::spawn(async move { timeout(Duration::from_millis(100), entry.get(in_4s())).await })
        })
        .collect();
    for caller in callers {
        assert!(caller.await.unwrap().is_err(), "each of them hangs up after 100 ms");
    }
    assert_eq!(id(&entry).await, Ok("ASIA1".into()), "the next one finds it done");
    assert_eq!(script.calls(), 1);
}

#[tokio::test]
async fn permanent_refusal_is_cached_for_all() {
    let script = Script::new([(50, Some(Reason::AccessDenied))]);
    let entry = entry(&script);
    let waiting = (0..10).map(|_| id(&entry));
    for answer in futures::future::join_all(waiting).await {
        assert_eq!(answer, Err(Reason::AccessDenied));
    }
    assert_eq!(id(&entry).await, Err(Reason::AccessDenied));
    assert_eq!(script.calls(), 1, "remembered");
    pass(Duration::from_secs(11)).await;
    assert_eq!(script.calls(), 1, "not tried again until somebody asks");
    assert_eq!(id(&entry).await, Ok("ASIA2".into()));
}

/// IMDS-27
#[tokio::test]
async fn transient_failure_is_retried_while_waiting() {
    let script = Script::new([(10, Some(Reason::StsThrottled)), (10, Some(Reason::StsUnavailable))]);
    let entry = entry(&script);
    assert_eq!(id(&entry).await, Ok("ASIA3".into()));
}

#[tokio::test]
async fn outage_answers_last_failure_and_backs_off() {
    let script = Script::new((0..1_000).map(|_| (10, Some(Reason::StsUnavailable))));
    let entry = entry(&script);
    let began = Instant::now();
    assert_eq!(id(&entry).await, Err(Reason::StsUnavailable));
    assert_eq!(took(began), 4_000);
    pass(Duration::from_secs(60)).await;
    let before = script.calls();
    pass(Duration::from_secs(600)).await;
    // Full jitter over 30 s is 15 s on average.
    assert!((20..80).contains(&(script.calls() - before)), "{} tries in 10 minutes", script.calls() - before);
}

/// IMDS-20
#[tokio::test]
async fn used_session_keeps_half_its_lifetime() {
    let script = Script::new([]);
    let entry = entry(&script);
    assert_eq!(id(&entry).await, Ok("ASIA1".into()));
    for _ in 0..6 * 60 {
        pass(Duration::from_secs(60)).await;
        let credential = entry.get_cached().unwrap();
        assert!(credential.expires_at() - Instant::now() >= HOUR / 2);
    }
    let calls = script.calls();
    assert!((12..=16).contains(&calls), "{calls} exchanges in 6 hours, at 40 to 48 % of each");
}

/// IMDS-20: half of a short session would be too little for SDKs.
#[tokio::test]
async fn short_session_is_refreshed_early_enough() {
    for minutes in [30, 35, 40, 45, 720] {
        let session = Duration::from_secs(minutes * 60);
        let script = Script::with_session(session);
        let entry = entry(&script);
        assert_eq!(id(&entry).await, Ok("ASIA1".into()));
        let (began, mut least) = (Instant::now(), session);
        while began.elapsed() < session * 4 {
            pass(Duration::from_secs(20)).await;
            least = least.min(entry.get_cached().unwrap().expires_at() - Instant::now());
            entry.request_refresh(Priority::Waiting);
        }
        assert!(least >= MIN_LEFT_SHORT_SESSION.max((session / 2).min(MIN_LEFT)), "{minutes} minutes: {least:?}");
        // No more often than at 80 % of the time until then.
        let between = (session - MIN_LEFT_SHORT_SESSION).min(session / 2).mul_f64(0.79);
        let most = (session * 4).as_secs_f64() / between.as_secs_f64() + 1.0;
        assert!(script.calls() as f64 <= most, "{minutes} minutes: {} exchanges, {most} at most", script.calls());
        tokio::time::resume();
    }
}

#[tokio::test]
async fn readers_do_not_wait_for_a_refresh() {
    let script = Script::new([(0, None), (3_000, None)]);
    let entry = entry(&script);
    id(&entry).await.unwrap();
    while script.calls() < 2 {
        pass(Duration::from_secs(1)).await;
    }
    let began = Instant::now();
    assert_eq!(id(&entry).await, Ok("ASIA1".into()));
    assert_eq!(took(began), 0);
    pass(Duration::from_secs(4)).await;
    assert_eq!(id(&entry).await, Ok("ASIA2".into()));
}

#[tokio::test]
async fn unused_session_is_not_refreshed() {
    let script = Script::new([]);
    let entry = entry(&script);
    entry.request_refresh(Priority::Prefetch);
    pass(2 * HOUR).await;
    assert_eq!(script.calls(), 1);
    assert_eq!(id(&entry).await, Ok("ASIA2".into()), "never what has expired");
}

/// IMDS-22
#[tokio::test]
async fn outage_serves_stale_until_a_minute_left() {
    let script = Script::new([(0, None)]);
    let entry = entry(&script);
    id(&entry).await.unwrap();
    (0..100_000).for_each(|_| script.then(10, Some(Reason::StsUnavailable)));
    pass(HOUR - Duration::from_secs(62)).await;
    assert_eq!(id(&entry).await, Ok("ASIA1".into()));
    pass(Duration::from_secs(2)).await;
    assert_eq!(id(&entry).await, Err(Reason::StsUnavailable));
    assert!(matches!(entry.status(in_4s()).await, SessionStatus::Failed(_)));
}

#[tokio::test]
async fn idle_session_is_fetched_or_served_stale() {
    let script = Script::new([(0, None), (10_000, None)]);
    let entry = entry(&script);
    entry.request_refresh(Priority::Prefetch);
    pass(HOUR.mul_f64(0.7)).await;
    let began = Instant::now();
    assert_eq!(id(&entry).await, Ok("ASIA1".into()), "STS did not answer in time");
    assert_eq!(took(began), 4_000);
    pass(Duration::from_secs(7)).await;
    assert_eq!(id(&entry).await, Ok("ASIA2".into()));
}

/// All SDKs but the most cautious take what has 21 minutes left, and few of them wait for 4 s.
#[tokio::test]
async fn sufficient_credential_covers_a_hanging_sts() {
    let script = Script::new([(0, None), (10_000, None)]);
    let entry = entry(&script);
    entry.request_refresh(Priority::Prefetch);
    pass(HOUR.mul_f64(0.6)).await;
    let began = Instant::now();
    assert_eq!(id(&entry).await, Ok("ASIA1".into()));
    assert_eq!(took(began), 350);
}

/// A hypervisor stops the machine for two hours: no clock of its own counts them, and then the wall clock is set.
#[tokio::test]
async fn wall_clock_expiry_causes_a_refresh() {
    pause();
    let held = HeldCredential::dated(HOUR, UnixTime(UnixTime::now().0 - 3_600));
    assert!(held.needs_refresh() && !held.is_fresh());
    let state = SessionState { held: Some(held), failure: None };
    assert!(state.usable().is_none() && state.sufficient().is_none() && state.stale_but_usable().is_some());
    assert!(!HeldCredential::dated(HOUR, UnixTime(UnixTime::now().0 + 3_600)).needs_refresh());
}

/// The trust policy of a role was broken while thousands of nodes hold sessions of it.
#[tokio::test]
async fn denied_refresh_backs_off_unless_a_pod_waits() {
    let script = Script::new([(0, None)]);
    let entry = entry(&script);
    id(&entry).await.unwrap();
    (0..1_000).for_each(|_| script.then(10, Some(Reason::AccessDenied)));
    while script.calls() < 2 {
        pass(Duration::from_secs(1)).await;
    }
    for _ in 0..20 {
        pass(Duration::from_secs(60)).await;
        assert!(entry.get_cached().is_some(), "which is good yet");
    }
    assert!((5..=18).contains(&script.calls()), "{} tries in 20 minutes", script.calls());
    // Nobody has used it for that long: the last try is longer ago than its refusal is remembered.
    pass(HOUR + Duration::from_secs(60)).await;
    let before = script.calls();
    assert_eq!(id(&entry).await, Err(Reason::AccessDenied));
    assert_eq!(script.calls(), before + 1, "now a pod waits");
}

/// Of a pod whose name is another service account's by now the API server says 400, of others 404, 409 or 403.
#[tokio::test]
async fn deleted_pod_does_not_fail_others() {
    pause();
    for reason in [Reason::PodGone, Reason::TokenForbidden, Reason::TokenRefused] {
        let script = Script::new([(10, Some(reason))]);
        let entry = another(&script);
        entry.join(&grant("b"));
        assert_eq!(id(&entry).await, Ok("ASIA2".into()));
        let pods = script.pods.lock().clone();
        assert_ne!(pods[0], pods[1]);
    }
}

#[tokio::test]
async fn status_returns_permanent_failures() {
    let script = Script::new([(1_000, Some(Reason::AccessDenied))]);
    let entry = entry(&script);
    let began = Instant::now();
    let standing = entry.status(Instant::now() + Duration::from_millis(350)).await;
    assert!(matches!(standing, SessionStatus::Pending) && took(began) == 350);
    assert!(matches!(entry.status(in_4s()).await, SessionStatus::Failed(_)));
}

/// IMDS-27
#[tokio::test]
async fn status_waits_for_a_retry_in_time() {
    pause();
    for _ in 0..20 {
        let script = Script::new([(10, Some(Reason::StsThrottled)), (10, Some(Reason::StsThrottled))]);
        let entry = another(&script);
        let began = Instant::now();
        assert!(matches!(entry.status(began + Duration::from_millis(350)).await, SessionStatus::Ready));
        assert!(took(began) <= 100, "{} ms: the pauses are those of somebody who waits", took(began));
    }
}

/// IMDS-27
#[tokio::test]
async fn status_wait_is_bounded_in_an_outage() {
    let script = Script::new((0..1_000).map(|_| (10, Some(Reason::StsUnavailable))));
    let entry = entry(&script);
    for _ in 0..20 {
        let began = Instant::now();
        assert!(matches!(entry.status(began + Duration::from_millis(350)).await, SessionStatus::Failed(_)));
        assert!(took(began) <= 350);
        pass(Duration::from_secs(5)).await;
    }
}

#[tokio::test]
async fn refusal_of_a_deleted_pod_is_forgotten() {
    let script = Script::new([(10, Some(Reason::PodGone))]);
    let entry = entry(&script);
    assert_eq!(id(&entry).await, Err(Reason::PodGone));
    entry.join(&grant("b"));
    assert_eq!(id(&entry).await, Ok("ASIA2".into()));
}

/// While a pod waits, the longest delay is 30 s / 6, however long the outage was. An exchange takes 10 ms here.
#[tokio::test]
async fn recovery_is_quick_while_a_pod_waits() {
    let script = Script::new((0..40).map(|_| (10, Some(Reason::StsUnavailable))));
    let entry = entry(&script);
    entry.request_refresh(Priority::Prefetch);
    while script.calls() < 40 {
        pass(Duration::from_secs(1)).await;
    }
    let began = Instant::now();
    while id(&entry).await.is_err() {}
    assert!(took(began) <= 5_010, "{} ms", took(began));
}

/// An API server that forbids tokens altogether is not asked in the name of every pod, again with every request.
#[tokio::test]
async fn refusals_of_three_pods_apply_to_all() {
    let script = Script::new((0..1_000).map(|_| (10, Some(Reason::TokenForbidden))));
    let entry = entry(&script);
    let pods: Vec<_> = (0..20).map(|number| grant(&format!("p{number}"))).collect();
    pods.iter().for_each(|pod| entry.join(pod));
    for round in 1..=3 {
        let began = Instant::now();
        while began.elapsed() < Duration::from_secs(9) {
            for pod in &pods {
                entry.join(pod);
                assert_eq!(id(&entry).await, Err(Reason::TokenForbidden));
            }
            pass(Duration::from_millis(500)).await;
        }
        assert_eq!(script.calls(), round * 3, "three within ten seconds, however often it is asked for");
        pass(Duration::from_secs(3)).await;
    }
    let asked = script.pods.lock().clone();
    let different: std::collections::HashSet<_> = asked.iter().collect();
    assert_eq!(different.len(), asked.len(), "each time in the name of others: {asked:?}");
}

/// What nobody uses is not kept beyond its end.
#[tokio::test]
async fn expired_credential_is_dropped() {
    let script = Script::new([]);
    let entry = entry(&script);
    entry.request_refresh(Priority::Prefetch);
    pass(HOUR - Duration::from_secs(5)).await;
    assert!(entry.describe()["access_key_id"].is_string());
    pass(Duration::from_secs(10)).await;
    assert!(entry.describe()["access_key_id"].is_null());
    assert_eq!(script.calls(), 1);
}

/// The service account's role was changed, or taken away: the pods are there still.
#[tokio::test]
async fn removed_role_is_dropped() {
    pause();
    let script = Script::new([]);
    let holds = Arc::new(AtomicBool::new(true));
    let still = holds.clone();
    let budget = ExchangeLimiter::new(1_000, 1_000, Metrics::new("test").unwrap());
    let entry = SessionEntry::start(script.clone(), budget, Arc::new(move |_| still.load(Ordering::SeqCst)));
    entry.join(&grant("a"));
    assert_eq!(id(&entry).await, Ok("ASIA1".into()));
    holds.store(false, Ordering::SeqCst);
    pass(HOUR / 2).await;
    assert!(entry.describe()["access_key_id"].is_null() && entry.is_abandoned());
    let began = Instant::now();
    assert_eq!(id(&entry).await, Err(Reason::PodGone));
    assert_eq!(script.calls(), 1);
    holds.store(true, Ordering::SeqCst);
    entry.join(&grant("a"));
    assert_eq!(id(&entry).await, Ok("ASIA2".into()), "it has the role again");
    assert_eq!(took(began), 0);
}

/// What `kirsa_credentials_left_seconds` says, and its alert relies on.
#[tokio::test]
async fn time_left_counts_sessions_in_use() {
    let script = Script::new([(10, None)]);
    let entry = entry(&script);
    assert_eq!(entry.time_left_if_used(), None, "nothing is held");
    entry.request_refresh(Priority::Prefetch);
    pass(Duration::from_secs(1)).await;
    assert_eq!(entry.time_left_if_used(), None, "prefetched, and asked for by nobody");
    assert_eq!(id(&entry).await, Ok("ASIA1".into()));
    for _ in 0..120 {
        pass(Duration::from_secs(60)).await;
        assert!(entry.time_left_if_used().unwrap() > MIN_LEFT, "{:?}", entry.time_left_if_used());
        entry.request_refresh(Priority::Waiting);
    }
    (0..10_000).for_each(|_| script.then(10, Some(Reason::StsUnavailable)));
    pass(Duration::from_secs(50 * 60)).await;
    let left = entry.time_left_if_used().unwrap();
    assert!(left < Duration::from_secs(15 * 60), "{left:?}");
    entry.request_refresh(Priority::Waiting);
    pass(Duration::from_secs(20 * 60)).await;
    assert_eq!(entry.time_left_if_used(), Some(Duration::ZERO), "and the pod still asks");
}
