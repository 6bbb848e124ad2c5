//! State of one session: the credential that it holds and its last failure, and which of them to serve. Pure; knows the
//! clock only.

use std::{sync::Arc, time::Duration};

use tokio::time::Instant;

use crate::{
    clock::{self, UnixTime},
    exchange::Credential,
    refusal::{Reason, Refusal, RetryPolicy},
};

/// Minimum time left of a fresh credential. botocore extends what has less than 15 to 25 minutes left, and then signs
/// with expired keys (https://github.com/boto/botocore/issues/2670).
pub(super) const MIN_LEFT: Duration = Duration::from_secs(30 * 60);
/// The same for sessions too short for that: s3fs fetches again on every call when less than 20 minutes are left.
pub(super) const MIN_LEFT_SHORT_SESSION: Duration = Duration::from_secs(21 * 60);
/// Shorter sessions cannot keep 21 minutes in reserve. kirsa never requests one; an S3-compatible store may still return
/// one.
const MIN_LIFETIME_FOR_RESERVE: Duration = Duration::from_secs(29 * 60);
/// Refresh-ahead starts at a random point in this fraction of the time until the credential is no longer fresh, or of
/// half its lifetime if that is shorter.
pub(crate) const REFRESH_FRACTION: (f64, f64) = (0.80, 0.96);
/// Minimum time left of a stale credential served in an outage: SDKs may use credentials to their last second.
const STALE_MIN_LEFT: Duration = Duration::from_secs(60);

#[derive(Debug, Clone, Default)]
pub(super) struct SessionState {
    pub(super) held: Option<HeldCredential>,
    /// Refusal of the last exchange, if it failed, and the time of the next attempt.
    pub(super) failure: Option<(Refusal, Instant)>,
}

#[derive(Debug, Clone)]
pub(super) struct HeldCredential {
    pub(super) credential: Arc<Credential>,
    pub(super) refresh_at: Instant,
    /// Total time that the machine had been suspended when the credential was issued: it ages while suspended, the
    /// monotonic clock does not.
    suspended: Duration,
}

impl HeldCredential {
    pub(super) fn lifetime(&self) -> Duration {
        self.credential.expires_at().duration_since(self.credential.issued_at())
    }

    pub(super) fn time_left(&self) -> Duration {
        self.time_left_at(Instant::now())
    }

    pub(super) fn time_left_at(&self, now: Instant) -> Duration {
        let slept = clock::suspended().saturating_sub(self.suspended);
        self.credential.expires_at().saturating_duration_since(now + slept)
    }

    pub(super) fn needs_refresh(&self) -> bool {
        self.needs_refresh_at(Instant::now())
    }

    pub(super) fn needs_refresh_at(&self, now: Instant) -> bool {
        now >= self.refresh_at || self.time_left_at(now) < self.fresh_threshold() || self.is_expired_by_wall_clock()
    }

    /// Returns whether enough time is left for every SDK.
    pub(super) fn is_fresh(&self) -> bool {
        self.time_left() >= self.fresh_threshold() && !self.is_expired_by_wall_clock()
    }

    /// Detects a machine that a hypervisor stopped: none of its clocks counts that time, until the wall clock is set. A
    /// wrong wall clock costs one exchange at most, since `stale_but_usable` ignores it.
    fn is_expired_by_wall_clock(&self) -> bool {
        self.credential.expiration().since(UnixTime::now()) < STALE_MIN_LEFT
    }

    fn fresh_threshold(&self) -> Duration {
        fresh_threshold(self.lifetime())
    }
}

impl SessionState {
    pub(super) fn fresh(&self) -> Option<&Arc<Credential>> {
        self.held.as_ref().filter(|held| held.is_fresh()).map(|held| &held.credential)
    }

    /// Returns a credential that is not fresh but good enough for most SDKs.
    pub(super) fn sufficient(&self) -> Option<&Arc<Credential>> {
        let sufficient =
            |held: &&HeldCredential| held.time_left() >= MIN_LEFT_SHORT_SESSION && !held.is_expired_by_wall_clock();
        self.held.as_ref().filter(sufficient).map(|held| &held.credential)
    }

    pub(super) fn stale_but_usable(&self) -> Option<&Arc<Credential>> {
        self.held.as_ref().filter(|held| held.time_left() > STALE_MIN_LEFT).map(|held| &held.credential)
    }

    /// Returns what can be served at once: a fresh credential, or a stale one while refreshing fails (stale-while-error).
    pub(super) fn usable(&self) -> Option<&Arc<Credential>> {
        self.fresh().or_else(|| self.failure.as_ref().and(self.stale_but_usable()))
    }

    /// Returns a failure that waiting does not change.
    pub(super) fn permanent_failure(&self) -> Option<&Refusal> {
        let (refusal, until) = self.failure.as_ref()?;
        (matches!(refusal.reason.info().retry, RetryPolicy::Fixed(_)) && *until > Instant::now()).then_some(refusal)
    }

    /// Returns a failure that lasts until then: no attempt is made before.
    pub(super) fn failure_until(&self, until: Instant) -> Option<&Refusal> {
        let (_, next) = self.failure.as_ref()?;
        self.last_failure().filter(|_| self.permanent_failure().is_some() || *next >= until)
    }

    pub(super) fn last_failure(&self) -> Option<&Refusal> {
        let (refusal, until) = self.failure.as_ref()?;
        let is_retried = refusal.reason.info().retry == RetryPolicy::Backoff;
        (is_retried || *until > Instant::now()).then_some(refusal)
    }
}

/// Returns whether the refusal concerns one pod, and says nothing about others of its service account. As an
/// impersonated node, the API server answers 403 for a pod that it would otherwise not find; for a pod whose name belongs
/// to another service account's pod by now, it answers 400 or 422 before it compares the UID.
pub(super) fn is_pod_specific(refusal: &Refusal) -> bool {
    matches!(refusal.reason, Reason::PodGone | Reason::TokenForbidden | Reason::TokenRefused)
}

pub(super) fn is_pod_specific_failure((refusal, _): &(Refusal, Instant)) -> bool {
    is_pod_specific(refusal)
}

/// Returns the minimum time left of a fresh credential.
pub(super) fn fresh_threshold(lifetime: Duration) -> Duration {
    let reserve = if lifetime >= MIN_LIFETIME_FOR_RESERVE { MIN_LEFT_SHORT_SESSION } else { Duration::ZERO };
    MIN_LEFT.min((lifetime / 2).max(reserve))
}

/// Chooses the time of the refresh, with jitter.
pub(super) fn schedule(credential: Credential) -> HeldCredential {
    let lifetime = credential.expires_at().duration_since(credential.issued_at());
    let fraction = REFRESH_FRACTION.0 + (REFRESH_FRACTION.1 - REFRESH_FRACTION.0) * clock::jitter();
    let fresh_for = (lifetime / 2).min(lifetime - fresh_threshold(lifetime));
    let refresh_at = credential.issued_at() + fresh_for.mul_f64(fraction);
    HeldCredential { credential: Arc::new(credential), refresh_at, suspended: clock::suspended() }
}

#[cfg(test)]
impl HeldCredential {
    /// Expires after `lifetime` by the monotonic clock, and at `expiration` by the wall clock.
    pub(super) fn dated(lifetime: Duration, expiration: UnixTime) -> Self {
        schedule(Credential::sample_dated("ASIA1", lifetime, expiration))
    }
}
