//! The life of one session, on a paused clock.

use tokio::time::{advance, pause, timeout};

use super::{
    state::{Held, LEAST_LEFT, MIN_LEFT},
    *,
};
use crate::{attribute::Workload, clock::UnixTime, exchange::script::Script, observe::Metrics};

const HOUR: Duration = Duration::from_secs(3_600);
const ROLE: &str = "arn:aws:iam::111122223333:role/reader";

fn grant(pod: &str) -> Grant {
    Grant::sample(Workload::sample(pod, &format!("uid-{pod}"), "reader"), ROLE)
}

fn slot(script: &Arc<Script>) -> Arc<Slot> {
    pause();
    another(script)
}

fn another(script: &Arc<Script>) -> Arc<Slot> {
    let slot =
        Slot::start(script.clone(), Budget::new(1_000, 1_000, Metrics::new("test").unwrap()), Arc::new(|_| true));
    slot.join(&grant("a"));
    slot
}

fn in_4s() -> Instant {
    Instant::now() + Duration::from_secs(4)
}

async fn id(slot: &Slot) -> Result<String, Reason> {
    slot.get(in_4s()).await.map(|credential| credential.access_key_id().to_owned()).map_err(|refusal| refusal.reason)
}

/// The clock's timers fire on whole milliseconds.
fn took(since: Instant) -> u64 {
    u64::try_from(since.elapsed().as_millis()).unwrap() / 10 * 10
}

/// Lets the keeper do what is due, in steps that are short beside every interval here.
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
async fn fifty_callers_are_one_exchange_also_when_all_of_them_hang_up() {
    let script = Script::new([(1_000, None)]);
    let slot = slot(&script);
    let callers: Vec<_> = (0..50)
        .map(|_| {
            let slot = slot.clone();
            tokio::spawn(async move { timeout(Duration::from_millis(100), slot.get(in_4s())).await })
        })
        .collect();
    for caller in callers {
        assert!(caller.await.unwrap().is_err(), "each of them hangs up after 100 ms");
    }
    assert_eq!(id(&slot).await, Ok("ASIA1".into()), "the next one finds it done");
    assert_eq!(script.calls(), 1);
}

#[tokio::test]
async fn a_definite_refusal_is_for_everyone_at_once_and_is_remembered() {
    let script = Script::new([(50, Some(Reason::AccessDenied))]);
    let slot = slot(&script);
    let waiting = (0..10).map(|_| id(&slot));
    for answer in futures::future::join_all(waiting).await {
        assert_eq!(answer, Err(Reason::AccessDenied));
    }
    assert_eq!(id(&slot).await, Err(Reason::AccessDenied));
    assert_eq!(script.calls(), 1, "remembered");
    pass(Duration::from_secs(11)).await;
    assert_eq!(script.calls(), 1, "not tried again until somebody asks");
    assert_eq!(id(&slot).await, Ok("ASIA2".into()));
}

/// IMDS-27
#[tokio::test]
async fn what_may_pass_is_tried_again_within_the_hold() {
    let script = Script::new([(10, Some(Reason::StsThrottled)), (10, Some(Reason::StsUnavailable))]);
    let slot = slot(&script);
    assert_eq!(id(&slot).await, Ok("ASIA3".into()));
}

#[tokio::test]
async fn an_outage_ends_the_hold_with_the_last_failure_and_the_tries_become_rare() {
    let script = Script::new((0..1_000).map(|_| (10, Some(Reason::StsUnavailable))));
    let slot = slot(&script);
    let began = Instant::now();
    assert_eq!(id(&slot).await, Err(Reason::StsUnavailable));
    assert_eq!(took(began), 4_000);
    pass(Duration::from_secs(60)).await;
    let before = script.calls();
    pass(Duration::from_secs(600)).await;
    // Full jitter over 30 s is 15 s on average.
    assert!((20..80).contains(&(script.calls() - before)), "{} tries in 10 minutes", script.calls() - before);
}

/// IMDS-20
#[tokio::test]
async fn a_used_session_is_refreshed_so_that_half_of_it_is_always_left() {
    let script = Script::new([]);
    let slot = slot(&script);
    assert_eq!(id(&slot).await, Ok("ASIA1".into()));
    for _ in 0..6 * 60 {
        pass(Duration::from_secs(60)).await;
        let credential = slot.in_hand().unwrap();
        assert!(credential.expires_at() - Instant::now() >= HOUR / 2);
    }
    let calls = script.calls();
    assert!((12..=16).contains(&calls), "{calls} exchanges in 6 hours, at 40 to 48 % of each");
}

/// IMDS-20: half of a short session would be too little for SDKs.
#[tokio::test]
async fn a_short_session_is_refreshed_while_there_is_enough_left_for_every_sdk() {
    for minutes in [30, 35, 40, 45, 720] {
        let session = Duration::from_secs(minutes * 60);
        let script = Script::of(session);
        let slot = slot(&script);
        assert_eq!(id(&slot).await, Ok("ASIA1".into()));
        let (began, mut least) = (Instant::now(), session);
        while began.elapsed() < session * 4 {
            pass(Duration::from_secs(20)).await;
            least = least.min(slot.in_hand().unwrap().expires_at() - Instant::now());
            slot.want(Urgency::Waiting);
        }
        assert!(least >= LEAST_LEFT.max((session / 2).min(MIN_LEFT)), "{minutes} minutes: {least:?}");
        // No more often than at 80 % of the time until then.
        let between = (session - LEAST_LEFT).min(session / 2).mul_f64(0.79);
        let most = (session * 4).as_secs_f64() / between.as_secs_f64() + 1.0;
        assert!(script.calls() as f64 <= most, "{minutes} minutes: {} exchanges, {most} at most", script.calls());
        tokio::time::resume();
    }
}

#[tokio::test]
async fn readers_do_not_wait_for_a_refresh() {
    let script = Script::new([(0, None), (3_000, None)]);
    let slot = slot(&script);
    id(&slot).await.unwrap();
    while script.calls() < 2 {
        pass(Duration::from_secs(1)).await;
    }
    let began = Instant::now();
    assert_eq!(id(&slot).await, Ok("ASIA1".into()));
    assert_eq!(took(began), 0);
    pass(Duration::from_secs(4)).await;
    assert_eq!(id(&slot).await, Ok("ASIA2".into()));
}

#[tokio::test]
async fn an_unused_session_is_not_refreshed_and_fetched_when_it_is_asked_for_again() {
    let script = Script::new([]);
    let slot = slot(&script);
    slot.want(Urgency::Ahead);
    pass(2 * HOUR).await;
    assert_eq!(script.calls(), 1);
    assert_eq!(id(&slot).await, Ok("ASIA2".into()), "never what has expired");
}

/// IMDS-22
#[tokio::test]
async fn in_an_outage_the_last_credentials_are_served_until_a_minute_before_they_expire() {
    let script = Script::new([(0, None)]);
    let slot = slot(&script);
    id(&slot).await.unwrap();
    (0..100_000).for_each(|_| script.then(10, Some(Reason::StsUnavailable)));
    pass(HOUR - Duration::from_secs(62)).await;
    assert_eq!(id(&slot).await, Ok("ASIA1".into()));
    pass(Duration::from_secs(2)).await;
    assert_eq!(id(&slot).await, Err(Reason::StsUnavailable));
    assert!(matches!(slot.standing(in_4s()).await, Standing::Failed(_)));
}

#[tokio::test]
async fn an_idle_session_with_little_left_is_fetched_anew_and_its_rest_is_the_last_resort() {
    let script = Script::new([(0, None), (10_000, None)]);
    let slot = slot(&script);
    slot.want(Urgency::Ahead);
    pass(HOUR.mul_f64(0.7)).await;
    let began = Instant::now();
    assert_eq!(id(&slot).await, Ok("ASIA1".into()), "STS did not answer in time");
    assert_eq!(took(began), 4_000);
    pass(Duration::from_secs(7)).await;
    assert_eq!(id(&slot).await, Ok("ASIA2".into()));
}

/// All SDKs but the most cautious take what has 21 minutes left, and few of them wait for 4 s.
#[tokio::test]
async fn what_is_good_yet_is_not_kept_back_while_sts_is_silent() {
    let script = Script::new([(0, None), (10_000, None)]);
    let slot = slot(&script);
    slot.want(Urgency::Ahead);
    pass(HOUR.mul_f64(0.6)).await;
    let began = Instant::now();
    assert_eq!(id(&slot).await, Ok("ASIA1".into()));
    assert_eq!(took(began), 350);
}

/// A hypervisor stops the machine for two hours: no clock of its own counts them, and then the wall clock is set.
#[tokio::test]
async fn what_has_expired_by_the_wall_clock_is_fetched_anew_and_served_only_where_that_fails() {
    pause();
    let held = Held::dated(HOUR, UnixTime(UnixTime::now().0 - 3_600));
    assert!(held.due() && !held.fresh());
    let state = State { held: Some(held), failure: None };
    assert!(state.in_hand().is_none() && state.good().is_none() && state.last_resort().is_some());
    assert!(!Held::dated(HOUR, UnixTime(UnixTime::now().0 + 3_600)).due());
}

/// The trust policy of a role was broken while thousands of nodes hold sessions of it.
#[tokio::test]
async fn a_refresh_that_is_refused_for_good_is_tried_ever_more_rarely_unless_a_pod_waits() {
    let script = Script::new([(0, None)]);
    let slot = slot(&script);
    id(&slot).await.unwrap();
    (0..1_000).for_each(|_| script.then(10, Some(Reason::AccessDenied)));
    while script.calls() < 2 {
        pass(Duration::from_secs(1)).await;
    }
    for _ in 0..20 {
        pass(Duration::from_secs(60)).await;
        assert!(slot.in_hand().is_some(), "which is good yet");
    }
    assert!((5..=18).contains(&script.calls()), "{} tries in 20 minutes", script.calls());
    // Nobody has used it for that long: the last try is longer ago than its refusal is remembered.
    pass(HOUR + Duration::from_secs(60)).await;
    let before = script.calls();
    assert_eq!(id(&slot).await, Err(Reason::AccessDenied));
    assert_eq!(script.calls(), before + 1, "now a pod waits");
}

/// Of a pod whose name is another service account's by now the API server says 400, of others 404, 409 or 403.
#[tokio::test]
async fn a_pod_that_is_gone_does_not_fail_the_others_of_its_service_account() {
    pause();
    for reason in [Reason::PodGone, Reason::TokenForbidden, Reason::TokenRefused] {
        let script = Script::new([(10, Some(reason))]);
        let slot = another(&script);
        slot.join(&grant("b"));
        assert_eq!(id(&slot).await, Ok("ASIA2".into()));
        let pods = script.pods.lock().unwrap().clone();
        assert_ne!(pods[0], pods[1]);
    }
}

#[tokio::test]
async fn the_list_knows_what_is_definite_and_waits_no_longer_than_it_may() {
    let script = Script::new([(1_000, Some(Reason::AccessDenied))]);
    let slot = slot(&script);
    let began = Instant::now();
    let standing = slot.standing(Instant::now() + Duration::from_millis(350)).await;
    assert!(matches!(standing, Standing::Pending) && took(began) == 350);
    assert!(matches!(slot.standing(in_4s()).await, Standing::Failed(_)));
}

/// IMDS-27
#[tokio::test]
async fn the_list_waits_out_a_failure_that_is_tried_again_in_time() {
    pause();
    for _ in 0..20 {
        let script = Script::new([(10, Some(Reason::StsThrottled)), (10, Some(Reason::StsThrottled))]);
        let slot = another(&script);
        let began = Instant::now();
        assert!(matches!(slot.standing(began + Duration::from_millis(350)).await, Standing::Ready));
        assert!(took(began) <= 100, "{} ms: the pauses are those of somebody who waits", took(began));
    }
}

/// IMDS-27
#[tokio::test]
async fn in_an_outage_the_list_is_refused_and_holds_nobody_longer_than_it_may() {
    let script = Script::new((0..1_000).map(|_| (10, Some(Reason::StsUnavailable))));
    let slot = slot(&script);
    for _ in 0..20 {
        let began = Instant::now();
        assert!(matches!(slot.standing(began + Duration::from_millis(350)).await, Standing::Failed(_)));
        assert!(took(began) <= 350);
        pass(Duration::from_secs(5)).await;
    }
}

#[tokio::test]
async fn what_was_refused_to_a_pod_that_is_gone_does_not_hit_the_next_one() {
    let script = Script::new([(10, Some(Reason::PodGone))]);
    let slot = slot(&script);
    assert_eq!(id(&slot).await, Err(Reason::PodGone));
    slot.join(&grant("b"));
    assert_eq!(id(&slot).await, Ok("ASIA2".into()));
}

/// However long an outage was, a pod that waits is not kept waiting for the whole of a long pause after it.
#[tokio::test]
async fn recovery_is_noticed_within_seconds_while_a_pod_waits() {
    let script = Script::new((0..40).map(|_| (10, Some(Reason::StsUnavailable))));
    let slot = slot(&script);
    slot.want(Urgency::Ahead);
    while script.calls() < 40 {
        pass(Duration::from_secs(1)).await;
    }
    let began = Instant::now();
    while id(&slot).await.is_err() {}
    assert!(took(began) <= 5_000, "{} ms", took(began));
}

/// An API server that forbids tokens altogether is not asked in the name of every pod, again with every request.
#[tokio::test]
async fn what_is_forbidden_for_three_pods_is_forbidden_for_all_and_remembered() {
    let script = Script::new((0..1_000).map(|_| (10, Some(Reason::TokenForbidden))));
    let slot = slot(&script);
    let pods: Vec<_> = (0..20).map(|number| grant(&format!("p{number}"))).collect();
    pods.iter().for_each(|pod| slot.join(pod));
    for round in 1..=3 {
        let began = Instant::now();
        while began.elapsed() < Duration::from_secs(9) {
            for pod in &pods {
                slot.join(pod);
                assert_eq!(id(&slot).await, Err(Reason::TokenForbidden));
            }
            pass(Duration::from_millis(500)).await;
        }
        assert_eq!(script.calls(), round * 3, "three within ten seconds, however often it is asked for");
        pass(Duration::from_secs(3)).await;
    }
    let asked = script.pods.lock().unwrap().clone();
    let different: std::collections::HashSet<_> = asked.iter().collect();
    assert_eq!(different.len(), asked.len(), "each time in the name of others: {asked:?}");
}

/// What nobody uses is not kept beyond its end.
#[tokio::test]
async fn what_has_expired_is_dropped_from_memory() {
    let script = Script::new([]);
    let slot = slot(&script);
    slot.want(Urgency::Ahead);
    pass(HOUR - Duration::from_secs(5)).await;
    assert!(slot.describe()["access_key_id"].is_string());
    pass(Duration::from_secs(10)).await;
    assert!(slot.describe()["access_key_id"].is_null());
    assert_eq!(script.calls(), 1);
}

/// The service account's role was changed, or taken away: the pods are there still.
#[tokio::test]
async fn a_role_that_no_account_has_any_more_is_not_refreshed_but_dropped() {
    pause();
    let script = Script::new([]);
    let holds = Arc::new(AtomicBool::new(true));
    let still = holds.clone();
    let budget = Budget::new(1_000, 1_000, Metrics::new("test").unwrap());
    let slot = Slot::start(script.clone(), budget, Arc::new(move |_| still.load(Ordering::SeqCst)));
    slot.join(&grant("a"));
    assert_eq!(id(&slot).await, Ok("ASIA1".into()));
    holds.store(false, Ordering::SeqCst);
    pass(HOUR / 2).await;
    assert!(slot.describe()["access_key_id"].is_null() && slot.abandoned());
    let began = Instant::now();
    assert_eq!(id(&slot).await, Err(Reason::PodGone));
    assert_eq!(script.calls(), 1);
    holds.store(true, Ordering::SeqCst);
    slot.join(&grant("a"));
    assert_eq!(id(&slot).await, Ok("ASIA2".into()), "it has the role again");
    assert_eq!(took(began), 0);
}

/// What `kirsa_credentials_left_seconds` says, and its alert relies on.
#[tokio::test]
async fn what_is_in_use_has_half_its_life_left_unless_refreshing_fails_and_what_is_unused_does_not_count() {
    let script = Script::new([(10, None)]);
    let slot = slot(&script);
    assert_eq!(slot.left_in_use(), None, "nothing is held");
    slot.want(Urgency::Ahead);
    pass(Duration::from_secs(1)).await;
    assert_eq!(slot.left_in_use(), None, "prefetched, and asked for by nobody");
    assert_eq!(id(&slot).await, Ok("ASIA1".into()));
    for _ in 0..120 {
        pass(Duration::from_secs(60)).await;
        assert!(slot.left_in_use().unwrap() > MIN_LEFT, "{:?}", slot.left_in_use());
        slot.want(Urgency::Waiting);
    }
    (0..10_000).for_each(|_| script.then(10, Some(Reason::StsUnavailable)));
    pass(Duration::from_secs(50 * 60)).await;
    let left = slot.left_in_use().unwrap();
    assert!(left < Duration::from_secs(15 * 60), "{left:?}");
    slot.want(Urgency::Waiting);
    pass(Duration::from_secs(20 * 60)).await;
    assert_eq!(slot.left_in_use(), Some(Duration::ZERO), "and the pod still asks");
}
