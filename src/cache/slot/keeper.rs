//! The task that fetches a session and refreshes it: the only one that asks, whoever waits.

use std::{
    sync::{Arc, atomic::Ordering},
    time::Duration,
};

use tokio::time::{Instant, sleep_until};

use super::{
    Holds, Shared,
    state::{State, hold, is_about_its_pod},
};
use crate::{
    attribute::PodUid,
    authorise::Grant,
    cache::budget::{Budget, Turn},
    clock,
    exchange::Issue,
    observe::{Urgency, log_refusal},
    refusal::{Memory, Reason, Refusal},
};

/// Full jitter over this range, doubled with each failure up to the end.
const BACKOFF: (Duration, Duration) = (Duration::from_millis(100), Duration::from_secs(30));
/// By how much the pauses are shorter while a pod waits.
const HURRY: u32 = 6;
/// The longest pause between two tries to refresh what is refused for good, when nobody waits for it.
const DENIED: Duration = Duration::from_secs(300);
/// When the API server has refused tokens for as many pods in a row, it is not about the pods.
const REFUSED_IN_A_ROW: usize = 3;
/// How long whoever asks for a session that nobody may use any more is told so.
const GONE: Duration = Duration::from_secs(5);

impl Shared {
    pub(super) async fn keep(self: Arc<Self>, issuer: Arc<dyn Issue>, budget: Arc<Budget>, holds: Holds) {
        let mut failures = 0;
        let mut refused_in_a_row = 0;
        loop {
            self.due().await;
            let turn = self.turn(&budget).await;
            let Some(grant) = self.stand_in(&holds) else { continue };
            let issued = issuer.issue(&grant).await;
            turn.ended(issued.as_ref().err());
            match issued {
                Ok(credential) => {
                    (failures, refused_in_a_row) = (0, 0);
                    self.satisfied();
                    self.state.send_replace(State { held: Some(hold(credential)), failure: None });
                }
                Err(refusal) => {
                    if is_about_its_pod(&refusal) {
                        refused_in_a_row += 1;
                        if refused_in_a_row < self.refused(grant.workload().uid()).min(REFUSED_IN_A_ROW) {
                            continue;
                        }
                        refused_in_a_row = 0;
                    }
                    let workload = grant.workload();
                    log_refusal(&refusal, workload.namespace(), workload.pod(), &workload.service_account().name);
                    let pauses = match refusal.reason.spec().memory {
                        Memory::Fixed(pause) => {
                            // Whoever asks after that makes it be tried again.
                            self.satisfied();
                            let held = self.state.borrow().held.is_some();
                            let unasked = if held { denied(pause, failures) } else { pause };
                            Pauses { holds: pause, asked: pause, unasked }
                        }
                        Memory::Backoff | Memory::None => {
                            self.waiting.store(false, Ordering::SeqCst);
                            let pause = backoff(failures);
                            Pauses { holds: pause, asked: pause / HURRY, unasked: pause }
                        }
                    };
                    failures += 1;
                    let until = Instant::now() + pauses.holds;
                    self.state.send_modify(|state| state.failure = Some((refusal, until)));
                    self.rest(&pauses).await;
                }
            }
        }
    }

    /// Lets a pause pass, or none if it does not apply any more.
    async fn rest(&self, pauses: &Pauses) {
        let began = Instant::now();
        while self.state.borrow().failure.is_some() {
            let woken = self.wake.notified();
            let pause = if self.waiting.load(Ordering::SeqCst) { pauses.asked } else { pauses.unasked };
            tokio::select! {
                () = sleep_until(began + pause) => return,
                () = woken => {}
            }
        }
    }

    /// Returns when the next exchange should begin.
    async fn due(&self) {
        loop {
            let woken = self.wake.notified();
            let held = self.state.borrow().held.clone();
            let wanted = self.wanted.load(Ordering::SeqCst);
            match held {
                Some(held) if !held.due() => tokio::select! {
                    () = sleep_until(held.refresh_at) => {}
                    () = woken => {}
                },
                Some(held) if wanted || self.used_within(held.lifetime()) => return,
                Some(held) => tokio::select! {
                    () = sleep_until(held.credential.expires_at()) => drop(self.state.send_replace(State::default())),
                    () = woken => {}
                },
                None if wanted => return,
                None => woken.await,
            }
        }
    }

    /// A turn under the budget, at the urgency that this exchange has by then: a pod may come to wait for a prefetch.
    async fn turn(&self, budget: &Arc<Budget>) -> Turn {
        let asking = std::ptr::from_ref(self).addr();
        loop {
            let woken = self.wake.notified();
            let urgency = if self.waiting.load(Ordering::SeqCst) {
                Urgency::Waiting
            } else if self.state.borrow().fresh().is_some() {
                Urgency::Refresh
            } else {
                Urgency::Ahead
            };
            tokio::select! {
                biased;
                turn = budget.turn(urgency, asking) => return turn,
                () = woken, if urgency != Urgency::Waiting => {}
            }
        }
    }

    /// A pod that the session is asked for in the name of: the one whose last refusal is the longest ago. Those that
    /// may not use it any more are forgotten.
    fn stand_in(&self, holds: &Holds) -> Option<Grant> {
        let mut pods = self.pods();
        pods.retain(|_, member| holds(&member.grant));
        let chosen = pods.values().min_by_key(|member| member.refused).map(|member| member.grant.clone());
        if chosen.is_none() {
            // Nobody may use it any more, so nobody shall; a new pod wakes it, and joins after this.
            self.satisfied();
            let nobody = Refusal::new(Reason::PodGone, "no live pod's service account has this role any more");
            let until = Instant::now() + GONE;
            self.state.send_replace(State { held: None, failure: Some((nobody, until)) });
        }
        chosen
    }

    /// Notes that this pod was refused; how many pods there are.
    fn refused(&self, pod: &PodUid) -> usize {
        let mut pods = self.pods();
        if let Some(member) = pods.get_mut(pod) {
            member.refused = Some(Instant::now());
        }
        pods.len()
    }
}

/// After a failure.
struct Pauses {
    /// How long it is told to whoever asks.
    holds: Duration,
    /// Until the next try, while a pod waits and while none does.
    asked: Duration,
    unasked: Duration,
}

/// Somebody has to change something, and what is held is good for a while yet: thousands of nodes that share a role must
/// not ask all the time whether somebody has.
fn denied(pause: Duration, failures: u32) -> Duration {
    pause.max(pause.saturating_mul(1 << failures.min(16)).min(DENIED).mul_f64(0.5 + clock::jitter() / 2.0))
}

fn backoff(failures: u32) -> Duration {
    let ceiling = BACKOFF.0.saturating_mul(1 << failures.min(16)).min(BACKOFF.1);
    ceiling.mul_f64(clock::jitter()).max(BACKOFF.0 / 10)
}
