//! Keeps the redirect: tests it, applies it again, and compares the rules with what was applied.

mod pace;

use std::{
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};

use tokio::time::{Instant, timeout};
use tracing::{debug, error, warn};

use crate::{
    intercept::{RuleChanges, SelfTest, has_route, rule::Installed},
    observe::{Condition, Metrics},
};
use pace::Pace;

/// Interval of the self-test, whether the kernel announces changes or not: those of iptables-legacy are not announced.
const VERIFY: Duration = Duration::from_secs(2);

#[derive(Debug)]
pub(super) struct Redirect {
    installed: Installed,
    changes: RuleChanges,
    self_test: Arc<SelfTest>,
    verified: Condition,
    metrics: Metrics,
    /// Whether another agent may have kept it since these rules were applied, with rules of its own.
    others: AtomicBool,
    /// A repair that is cancelled goes on in its thread; the next one waits for it.
    applying: Arc<Mutex<()>>,
}

impl Redirect {
    pub(super) fn new(
        installed: Installed,
        others: bool,
        changes: RuleChanges,
        self_test: Arc<SelfTest>,
        verified: Condition,
        metrics: Metrics,
    ) -> Self {
        metrics.rule_applied.inc();
        let others = AtomicBool::new(others);
        let applying = Arc::default();
        Self { installed, changes, self_test, verified, metrics, others, applying }
    }

    /// Keeps the redirect: applies it at once when another process changed our rules, and when the self-test fails.
    pub(super) async fn keep(&self) {
        if self.others.swap(true, Ordering::Relaxed) {
            self.apply().await;
        }
        let mut pace = Pace::new(self.installed.listed());
        loop {
            let step = async {
                self.test(&mut pace).await;
                self.raise_fence(&mut pace).await;
                self.read_back(&mut pace).await;
                let _ = timeout(VERIFY, self.changes.next()).await;
            };
            let removed = tokio::select! {
                biased;
                () = self.changes.removed() => true,
                () = step => false,
            };
            if removed {
                // Apply first and test afterwards: a test takes time in which pods could reach the node's role.
                pace.spaced().await;
                warn!("another process changed the redirect's rules: applying them again");
                self.repair(&mut pace).await;
            }
        }
    }

    /// Connects through the redirect, and repairs it where that fails.
    async fn test(&self, pace: &mut Pace) {
        let mut broken = self.broken().await;
        if let Some(way) = &broken
            && pace.is_due()
        {
            warn!(way, "the redirect does not lead here any more: applying it again");
            self.repair(pace).await;
            broken = self.broken().await;
            pace.helped(broken.is_none());
        }
        self.verified.set(broken.is_none());
        self.metrics.redirect_verified(broken.is_none());
    }

    /// Returns the first way that leads elsewhere. A family without a route is no way: no packet leaves by it.
    async fn broken(&self) -> Option<String> {
        for (host, service) in
            self.installed.rules().dnat_targets().filter(|(host, service)| has_route(*host, *service))
        {
            if let Err(error) = self.self_test.run(host, service).await {
                return Some(format!("{} to {host}: {error}", service.address_for(host)));
            }
        }
        None
    }

    /// Adds policy routing rules that another process removed, such as systemd-networkd when it starts.
    async fn raise_fence(&self, pace: &mut Pace) {
        if pace.fenced.is_some_and(|fenced| fenced.elapsed() < VERIFY) {
            return;
        }
        pace.fenced = Some(Instant::now());
        let installed = self.installed.clone();
        match tokio::task::spawn_blocking(move || installed.restore_policy_routing()).await {
            Ok(Ok(0)) => pace.fence_failed = false,
            Ok(Ok(rules)) => {
                warn!(rules, "policy routing rules of the redirect were missing: added again");
                self.metrics.rule_repaired.inc();
            }
            Ok(Err(error)) if !std::mem::replace(&mut pace.fence_failed, true) => {
                warn!(%error, "policy routing rules of the redirect cannot be added");
            }
            Ok(Err(_)) | Err(_) => {}
        }
    }

    /// Second opinion on what the self-test does not pass through: prerouting and forwarding. It repairs and warns; the
    /// self-test alone decides on readiness.
    async fn read_back(&self, pace: &mut Pace) {
        if !pace.read_is_due(|| self.changes.overran()) {
            return;
        }
        let Some(listing) = self.listing(pace).await else { return };
        match second_opinion(pace.expected.as_deref(), &listing) {
            Opinion::AsApplied => {}
            Opinion::Unknown => pace.expected = listing.ok().map(Into::into),
            Opinion::Unreadable => warn!(
                error = listing.err().map(|error| format!("{error:#}")),
                "the redirect's rules cannot be read back"
            ),
            Opinion::Changed => {
                let error = listing.err().map(|error| format!("{error:#}"));
                warn!(error, "the redirect's rules are not as they were applied: applying them again");
                // Another version of the tool may list the same rules differently; that costs one repair.
                if self.repair(pace).await
                    && let Some(Ok(listing)) = self.listing(pace).await
                {
                    pace.expected = Some(listing.into());
                }
            }
        }
    }

    /// Runs the tools off the threads that serve requests.
    async fn listing(&self, pace: &mut Pace) -> Option<anyhow::Result<String>> {
        let (installed, start) = (self.installed.clone(), Instant::now());
        let listing = tokio::task::spawn_blocking(move || installed.listing()).await;
        pace.read(start.elapsed());
        listing.ok()
    }

    /// Applies the rules and returns whether that succeeded.
    async fn repair(&self, pace: &mut Pace) -> bool {
        pace.applied = Some(Instant::now());
        let applied = self.apply().await;
        if applied {
            self.metrics.rule_repaired.inc();
        }
        applied
    }

    async fn apply(&self) -> bool {
        let (installed, applying) = (self.installed.clone(), self.applying.clone());
        // The tools are processes: waiting for them must not hold up requests.
        let apply = move || {
            let _one = applying.lock().unwrap_or_else(PoisonError::into_inner);
            if let Err(error) = installed.restore_policy_routing() {
                debug!(%error, "policy routing rules of the redirect cannot be added");
            }
            installed.apply_again()
        };
        match tokio::task::spawn_blocking(apply).await {
            Ok(Ok(())) => {
                self.metrics.rule_applied.inc();
                return true;
            }
            Ok(Err(error)) => error!(error = format!("{error:#}"), "the redirect cannot be applied"),
            Err(error) => error!(%error, "the redirect cannot be applied"),
        }
        false
    }
}

#[derive(Debug, PartialEq, Eq)]
enum Opinion {
    AsApplied,
    Changed,
    /// The rules were never read before, so there is nothing to compare them with.
    Unknown,
    Unreadable,
}

/// Rules that were listed once and cannot be listed now count as removed.
fn second_opinion(expected: Option<&str>, listing: &anyhow::Result<String>) -> Opinion {
    match (expected, listing) {
        (None, Ok(_)) => Opinion::Unknown,
        (None, Err(_)) => Opinion::Unreadable,
        (Some(expected), Ok(listing)) if expected == listing => Opinion::AsApplied,
        (Some(_), _) => Opinion::Changed,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn emptied_or_unreadable_rules_are_changed() {
        let listing = |text: &str| Ok(text.to_owned());
        let unreadable = || Err(anyhow::anyhow!("no such table"));
        let applied = "chain prerouting { dnat }";
        assert_eq!(second_opinion(Some(applied), &listing(applied)), Opinion::AsApplied);
        assert_eq!(second_opinion(Some(applied), &listing("chain prerouting { }")), Opinion::Changed);
        assert_eq!(second_opinion(Some(applied), &unreadable()), Opinion::Changed);
        assert_eq!(second_opinion(None, &listing(applied)), Opinion::Unknown);
        assert_eq!(second_opinion(None, &unreadable()), Opinion::Unreadable);
    }
}
