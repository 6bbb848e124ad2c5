//! The task that fetches and refreshes one session. Single-flight: no other task makes exchanges for it.

use std::{
    sync::{Arc, atomic::Ordering},
    time::Duration,
};

use tokio::time::{Instant, sleep_until};

use super::{
    GrantCheck, Shared,
    state::{SessionState, is_pod_specific, schedule},
};
use crate::{
    attribute::PodUid,
    authorize::Grant,
    cache::limiter::{ExchangeLimiter, Permit, Priority},
    clock,
    exchange::Issuer,
    observe::log_refusal,
    refusal::{Reason, Refusal, RetryPolicy},
};

/// Delay before a retry: full jitter, the first ceiling and the last; it doubles with each failure.
const BACKOFF: (Duration, Duration) = (Duration::from_millis(100), Duration::from_secs(30));
/// Divides the delay while a pod waits.
const WAITING_SPEEDUP: u32 = 6;
/// Maximum delay between two attempts to refresh what is refused permanently, while no pod waits.
const MAX_DENIED_DELAY: Duration = Duration::from_secs(300);
/// After pod-specific refusals for this many pods in a row, the refusal applies to the session.
const MAX_POD_REFUSALS: usize = 3;
/// How long "no pod may use this session" is remembered.
const POD_GONE_TTL: Duration = Duration::from_secs(5);

impl Shared {
    pub(super) async fn refresh_loop(
        self: Arc<Self>,
        issuer: Arc<dyn Issuer>,
        limiter: Arc<ExchangeLimiter>,
        check: GrantCheck,
    ) {
        let mut failures = 0;
        let mut pod_refusals = 0;
        loop {
            self.wait_until_needed().await;
            let permit = self.acquire_permit(&limiter).await;
            let Some(grant) = self.pick_pod(&check) else { continue };
            let issued = issuer.issue(&grant).await;
            permit.finish(issued.as_ref().err());
            match issued {
                Ok(credential) => {
                    (failures, pod_refusals) = (0, 0);
                    self.clear_requests();
                    self.state.send_replace(SessionState { held: Some(schedule(credential)), failure: None });
                }
                Err(refusal) => {
                    if is_pod_specific(&refusal) {
                        pod_refusals += 1;
                        if pod_refusals < self.mark_refused(grant.workload().uid()).min(MAX_POD_REFUSALS) {
                            continue;
                        }
                        pod_refusals = 0;
                    }
                    let workload = grant.workload();
                    log_refusal(&refusal, workload.namespace(), workload.pod(), &workload.service_account().name);
                    let delays = self.retry_delays(&refusal, failures);
                    failures += 1;
                    let until = Instant::now() + delays.cache_for;
                    self.state.send_modify(|state| state.failure = Some((refusal, until)));
                    self.wait_before_retry(&delays).await;
                }
            }
        }
    }

    fn retry_delays(&self, refusal: &Refusal, failures: u32) -> RetryDelays {
        match refusal.reason.info().retry {
            RetryPolicy::Fixed(delay) => {
                // The next request after the delay causes the next attempt.
                self.clear_requests();
                let held = self.state.borrow().held.is_some();
                let idle = if held { denied_delay(delay, failures) } else { delay };
                RetryDelays { cache_for: delay, while_waiting: delay, idle }
            }
            RetryPolicy::Backoff | RetryPolicy::None => {
                self.pod_waiting.store(false, Ordering::SeqCst);
                let delay = retry_delay(failures);
                RetryDelays { cache_for: delay, while_waiting: delay / WAITING_SPEEDUP, idle: delay }
            }
        }
    }

    /// Waits until the delay has passed or the failure was cleared.
    async fn wait_before_retry(&self, delays: &RetryDelays) {
        let began = Instant::now();
        while self.state.borrow().failure.is_some() {
            let woken = self.wake.notified();
            let delay = if self.pod_waiting.load(Ordering::SeqCst) { delays.while_waiting } else { delays.idle };
            tokio::select! {
                () = sleep_until(began + delay) => return,
                () = woken => {}
            }
        }
    }

    /// Returns when the next exchange should begin. An unused session is not refreshed, and its credential is dropped
    /// when it expires.
    async fn wait_until_needed(&self) {
        loop {
            let woken = self.wake.notified();
            let held = self.state.borrow().held.clone();
            let requested = self.refresh_requested.load(Ordering::SeqCst);
            match held {
                Some(held) if !held.needs_refresh() => tokio::select! {
                    () = sleep_until(held.refresh_at) => {}
                    () = woken => {}
                },
                Some(held) if requested || self.was_used_within(held.lifetime()) => return,
                Some(held) => tokio::select! {
                    () = sleep_until(held.credential.expires_at()) => {
                        drop(self.state.send_replace(SessionState::default()));
                    }
                    () = woken => {}
                },
                None if requested => return,
                None => woken.await,
            }
        }
    }

    /// Waits for a permit. The priority may rise meanwhile: a pod may come to wait for a prefetch.
    async fn acquire_permit(&self, limiter: &Arc<ExchangeLimiter>) -> Permit {
        let session = std::ptr::from_ref(self).addr();
        loop {
            let woken = self.wake.notified();
            let priority = if self.pod_waiting.load(Ordering::SeqCst) {
                Priority::Waiting
            } else if self.state.borrow().fresh().is_some() {
                Priority::Refresh
            } else {
                Priority::Prefetch
            };
            tokio::select! {
                biased;
                permit = limiter.acquire(priority, session) => return permit,
                () = woken, if priority != Priority::Waiting => {}
            }
        }
    }

    /// Chooses the pod whose token is exchanged: the one whose last refusal is longest ago. Pods that may no longer use
    /// the session are removed.
    fn pick_pod(&self, check: &GrantCheck) -> Option<Grant> {
        let mut pods = self.pods();
        pods.retain(|_, member| check(&member.grant));
        let chosen = pods.values().min_by_key(|member| member.last_refused).map(|member| member.grant.clone());
        if chosen.is_none() {
            // A new pod joins after this, and wakes the task.
            self.clear_requests();
            let nobody = Refusal::new(Reason::PodGone, "no live pod's service account has this role any more");
            let until = Instant::now() + POD_GONE_TTL;
            self.state.send_replace(SessionState { held: None, failure: Some((nobody, until)) });
        }
        chosen
    }

    /// Records a refusal for this pod. Returns the number of pods of the session.
    fn mark_refused(&self, pod: &PodUid) -> usize {
        let mut pods = self.pods();
        if let Some(member) = pods.get_mut(pod) {
            member.last_refused = Some(Instant::now());
        }
        pods.len()
    }
}

struct RetryDelays {
    /// How long callers get the failure from the cache.
    cache_for: Duration,
    /// Time until the next attempt while a pod waits.
    while_waiting: Duration,
    /// Time until the next attempt while no pod waits.
    idle: Duration,
}

/// Returns the delay after a permanent refusal while a credential is still held. Thousands of nodes may share the role:
/// they must not all ask again every few seconds whether somebody has corrected it.
fn denied_delay(delay: Duration, failures: u32) -> Duration {
    let ceiling = delay.saturating_mul(1 << failures.min(16)).min(MAX_DENIED_DELAY);
    delay.max(ceiling.mul_f64(0.5 + clock::jitter() / 2.0))
}

fn retry_delay(failures: u32) -> Duration {
    let ceiling = BACKOFF.0.saturating_mul(1 << failures.min(16)).min(BACKOFF.1);
    ceiling.mul_f64(clock::jitter()).max(BACKOFF.0 / 10)
}
