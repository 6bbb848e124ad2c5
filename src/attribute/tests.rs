use std::sync::atomic::AtomicUsize;

use super::*;
use pod_index::Record;

fn attributor() -> Arc<Attributor> {
    let (attributor, _) = Attributor::new(Metrics::new("test").unwrap());
    attributor.apply(Event::ListStarted);
    attributor.apply(Event::ListDone);
    attributor
}

fn peer(address: &str) -> ClientConn {
    ClientConn::from_pod(address.parse().unwrap())
}

/// IMDS-25: an event ends the wait, not the timeout.
#[tokio::test(start_paused = true)]
async fn event_ends_wait_for_unknown_pod() {
    let attributor = attributor();
    let began = Instant::now();
    let event = async {
        tokio::time::sleep(Duration::from_millis(300)).await;
        attributor.apply(Event::Pod(Pod::sample("a", "uid-a", "sa", &["10.0.0.1"])));
    };
    let peer = peer("10.0.0.1");
    let (answer, ()) = tokio::join!(attributor.attribute(&peer, began + ATTRIBUTION_TIMEOUT), event);
    assert_eq!(answer.unwrap().pod(), "a");
    assert!(began.elapsed() < Duration::from_millis(310));
}

#[tokio::test(start_paused = true)]
async fn unknown_pod_costs_one_live_lookup() {
    let attributor = attributor();
    let lookups = Arc::new(AtomicUsize::new(0));
    let counted = lookups.clone();
    attributor.set_live_lookup(Box::new(move |_| {
        counted.fetch_add(1, Ordering::SeqCst);
        Box::pin(async {})
    }));
    let began = Instant::now();
    let refusal = attributor.attribute(&peer("10.0.0.1"), began + ATTRIBUTION_TIMEOUT).await.unwrap_err();
    assert_eq!(refusal.reason, Reason::UnknownPod);
    let elapsed = began.elapsed();
    assert!(elapsed >= ATTRIBUTION_TIMEOUT && elapsed < ATTRIBUTION_TIMEOUT + Duration::from_millis(10));
    assert_eq!(lookups.load(Ordering::SeqCst), 1);

    // Concurrent and repeated requests share one lookup; another address has its own.
    for (address, expected) in [("10.0.0.1", 1), ("10.0.0.2", 2), ("10.0.0.1", 3)] {
        let (peer, until) = (peer(address), Instant::now() + ATTRIBUTION_TIMEOUT);
        let all = (0..50).map(|_| attributor.attribute(&peer, until));
        for answer in futures::future::join_all(all).await {
            assert_eq!(answer.unwrap_err().reason, Reason::UnknownPod);
        }
        assert_eq!(lookups.load(Ordering::SeqCst), expected, "{address}");
    }
}

#[tokio::test(start_paused = true)]
async fn unreported_pod_requests_resync() {
    let attributor = attributor();
    let refuses = |address: &str| {
        let (attributor, peer) = (attributor.clone(), peer(address));
        async move { attributor.attribute(&peer, Instant::now() + ATTRIBUTION_TIMEOUT).await.unwrap_err() }
    };
    let resync_requested = || timeout_at(Instant::now(), attributor.resync_requested());
    refuses("10.0.0.1").await;
    assert!(resync_requested().await.is_err(), "an address without a record is no reason");
    attributor.apply(Event::Record(Record::sample("r", "uid-a", "10.0.0.1")));
    refuses("10.0.0.1").await;
    assert!(resync_requested().await.is_ok());

    attributor.apply(Event::Pod(Pod::sample("b", "uid-b", "sa", &[])));
    attributor.apply_live(attributor.removals(), vec![Pod::sample("b", "uid-b", "sa", &["10.0.0.2"])]);
    assert!(resync_requested().await.is_err(), "the watch may report the address later");
    attributor.apply_live(attributor.removals(), vec![Pod::sample("c", "uid-c", "sa", &["10.0.0.3"])]);
    assert!(resync_requested().await.is_ok());

    let removals = attributor.removals();
    attributor.apply(Event::PodDeleted(PodUid("uid-d".into())));
    assert!(!attributor.apply_live(removals, vec![Pod::sample("d", "uid-d", "sa", &["10.0.0.4"])]), "stale");
    assert!(attributor.lookup(&peer("10.0.0.4")).is_err());
}

#[test]
fn egress_addresses_are_refused_with_their_fix() {
    let attributor = attributor();
    for (address, is_egress) in
        [("169.254.172.0", true), ("169.254.175.255", true), ("169.254.171.255", false), ("169.254.176.0", false)]
    {
        let refusal = attributor.lookup(&peer(address)).unwrap_err();
        assert_eq!(refusal.reason, Reason::UnknownPod);
        assert_eq!(refusal.detail.contains("ENDPOINT_MODE=IPv6"), is_egress, "{}", refusal.detail);
    }
}

#[tokio::test(start_paused = true)]
async fn ambiguous_address_is_refused() {
    let attributor = attributor();
    for uid in ["a", "b"] {
        attributor.apply(Event::Pod(Pod::sample(uid, uid, "sa", &["10.0.0.1"])));
    }
    let refusal = attributor.attribute(&peer("10.0.0.1"), Instant::now() + ATTRIBUTION_TIMEOUT).await.unwrap_err();
    assert_eq!(refusal.reason, Reason::AmbiguousAddress);
    assert!(refusal.detail.contains("default/a and default/b"), "{}", refusal.detail);
}
