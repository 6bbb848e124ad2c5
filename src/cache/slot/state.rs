//! What a session's slot holds, and when that is enough, due, or the last resort. Knows the clock and nobody who asks.

use std::{sync::Arc, time::Duration};

use tokio::time::Instant;

use crate::{
    clock::{self, UnixTime},
    exchange::Credential,
    refusal::{Memory, Reason, Refusal},
};

/// In normal operation nothing with less left is served: botocore stretches what has less than 15 to 25 minutes left,
/// and then signs with dead keys (boto/botocore#2670).
pub(super) const MIN_LEFT: Duration = Duration::from_secs(30 * 60);
/// The same of sessions too short for that: s3fs fetches anew on every call what has less than 20 minutes left.
pub(super) const LEAST_LEFT: Duration = Duration::from_secs(21 * 60);
/// The shortest session that this can be had of; nobody is granted a shorter one but by stores of their own mind.
const SHORTEST: Duration = Duration::from_secs(29 * 60);
/// Refreshed when this much has passed of the time until too little is left, or half of the lifetime.
pub(crate) const REFRESH: (f64, f64) = (0.80, 0.96);
/// In an outage, what has more left than this: SDKs may use credentials to their last second.
const LAST_RESORT: Duration = Duration::from_secs(60);

#[derive(Debug, Clone, Default)]
pub(super) struct State {
    pub(super) held: Option<Held>,
    /// Of the last attempt, if that failed; and until when no other is made.
    pub(super) failure: Option<(Refusal, Instant)>,
}

#[derive(Debug, Clone)]
pub(super) struct Held {
    pub(super) credential: Arc<Credential>,
    pub(super) refresh_at: Instant,
    /// How long this node had slept when they were issued: the credentials age meanwhile, this clock does not.
    suspended: Duration,
}

impl Held {
    pub(super) fn lifetime(&self) -> Duration {
        self.credential.expires_at().duration_since(self.credential.issued_at())
    }

    pub(super) fn left(&self) -> Duration {
        self.left_at(Instant::now())
    }

    pub(super) fn left_at(&self, now: Instant) -> Duration {
        let slept = clock::suspended().saturating_sub(self.suspended);
        self.credential.expires_at().saturating_duration_since(now + slept)
    }

    pub(super) fn due(&self) -> bool {
        self.due_at(Instant::now())
    }

    pub(super) fn due_at(&self, now: Instant) -> bool {
        now >= self.refresh_at || self.left_at(now) < self.enough() || self.has_expired_on_the_wall()
    }

    /// Enough is left for any SDK.
    pub(super) fn fresh(&self) -> bool {
        self.left() >= self.enough() && !self.has_expired_on_the_wall()
    }

    /// A machine that a hypervisor stops and continues counts that time by no clock of its own; later its wall clock is
    /// set. A wall clock that is wrong costs an exchange at most: the last resort does not look at it.
    fn has_expired_on_the_wall(&self) -> bool {
        self.credential.expiration().since(UnixTime::now()) < LAST_RESORT
    }

    fn enough(&self) -> Duration {
        enough(self.lifetime())
    }
}

impl State {
    pub(super) fn fresh(&self) -> Option<&Arc<Credential>> {
        self.held.as_ref().filter(|held| held.fresh()).map(|held| &held.credential)
    }

    /// What most SDKs are content with, though it is time for others.
    pub(super) fn good(&self) -> Option<&Arc<Credential>> {
        let good = |held: &&Held| held.left() >= LEAST_LEFT && !held.has_expired_on_the_wall();
        self.held.as_ref().filter(good).map(|held| &held.credential)
    }

    pub(super) fn last_resort(&self) -> Option<&Arc<Credential>> {
        self.held.as_ref().filter(|held| held.left() > LAST_RESORT).map(|held| &held.credential)
    }

    /// What can be served without waiting: what is fresh, or what there is while refreshing fails.
    pub(super) fn in_hand(&self) -> Option<&Arc<Credential>> {
        self.fresh().or_else(|| self.failure.as_ref().and(self.last_resort()))
    }

    /// A failure that waiting does not mend.
    pub(super) fn definite(&self) -> Option<&Refusal> {
        let (refusal, until) = self.failure.as_ref()?;
        (matches!(refusal.reason.spec().memory, Memory::Fixed(_)) && *until > Instant::now()).then_some(refusal)
    }

    /// A failure that a wait up to `until` cannot mend: no other try is made before.
    pub(super) fn lasting(&self, until: Instant) -> Option<&Refusal> {
        let (_, next) = self.failure.as_ref()?;
        self.last_failure().filter(|_| self.definite().is_some() || *next >= until)
    }

    pub(super) fn last_failure(&self) -> Option<&Refusal> {
        let (refusal, until) = self.failure.as_ref()?;
        let still_trying = refusal.reason.spec().memory == Memory::Backoff;
        (still_trying || *until > Instant::now()).then_some(refusal)
    }
}

/// One pod that is gone says nothing about the others of its service account. Asked as the node, the API server forbids
/// what it would otherwise not find; of a pod whose name another service account's pod has by now, it says that the
/// request is bad, before it looks at the UID.
pub(super) fn is_about_its_pod(refusal: &Refusal) -> bool {
    matches!(refusal.reason, Reason::PodGone | Reason::TokenForbidden | Reason::TokenRefused)
}

pub(super) fn of_a_pod((refusal, _): &(Refusal, Instant)) -> bool {
    is_about_its_pod(refusal)
}

pub(super) fn enough(lifetime: Duration) -> Duration {
    let least = if lifetime >= SHORTEST { LEAST_LEFT } else { Duration::ZERO };
    MIN_LEFT.min((lifetime / 2).max(least))
}

pub(super) fn hold(credential: Credential) -> Held {
    let lifetime = credential.expires_at().duration_since(credential.issued_at());
    let share = REFRESH.0 + (REFRESH.1 - REFRESH.0) * clock::jitter();
    let refresh_at = credential.issued_at() + (lifetime / 2).min(lifetime - enough(lifetime)).mul_f64(share);
    Held { credential: Arc::new(credential), refresh_at, suspended: clock::suspended() }
}

#[cfg(test)]
impl Held {
    /// That lasts as long from now on by a clock that cannot be set, and expires then by the wall clock.
    pub(super) fn dated(lifetime: Duration, expiration: UnixTime) -> Self {
        hold(Credential::sample_dated("ASIA1", lifetime, expiration))
    }
}
