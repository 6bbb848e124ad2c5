//! Maintains the redirect: tests it, repairs it, and compares the rules in the kernel with those that were applied.

mod pace;

use std::{
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};

use parking_lot::Mutex;
use tokio::time::{Instant, timeout};
use tracing::{debug, error, warn};

use crate::{
    intercept::{RuleChanges, SelfTest, has_route, rule::Installed},
    observe::{Condition, Metrics},
};
use pace::Pace;

/// Interval of the self-test. It also runs without netlink notifications, which iptables-legacy does not send.
const VERIFY: Duration = Duration::from_secs(2);

#[derive(Debug)]
pub(super) struct Redirect {
    installed: Installed,
    changes: RuleChanges,
    self_test: Arc<SelfTest>,
    verified: Condition,
    metrics: Metrics,
    /// Whether another agent may have applied its own rules since these rules were applied.
    is_stale: AtomicBool,
    /// Serializes repairs: a canceled repair continues on its thread, and the next one waits for it.
    applying: Arc<Mutex<()>>,
}

impl Redirect {
    pub(super) fn new(
        installed: Installed,
        has_predecessor: bool,
        changes: RuleChanges,
        self_test: Arc<SelfTest>,
        verified: Condition,
        metrics: Metrics,
    ) -> Self {
        metrics.rule_applied.inc();
        let is_stale = AtomicBool::new(has_predecessor);
        let applying = Arc::default();
        Self { installed, changes, self_test, verified, metrics, is_stale, applying }
    }

    /// Maintains the redirect: applies it at once when another process changed kirsa's rules or the self-test fails.
    pub(super) async fn maintain(&self) {
        if self.is_stale.swap(true, Ordering::Relaxed) {
            self.apply().await;
        }
        let mut pace = Pace::new(self.installed.listed());
        loop {
            let check = async {
                self.test(&mut pace).await;
                self.restore_policy_routing(&mut pace).await;
                self.read_back(&mut pace).await;
                let _ = timeout(VERIFY, self.changes.next()).await;
            };
            let removed = tokio::select! {
                biased;
                () = self.changes.removed() => true,
                () = check => false,
            };
            if removed {
                // Repair first and test afterwards: during a test, pods could reach the node's metadata service.
                pace.wait_spacing().await;
                warn!("another process changed the redirect's rules: applying them again");
                self.repair(&mut pace).await;
            }
        }
    }

    /// Runs the self-test, and repairs the redirect if it fails.
    async fn test(&self, pace: &mut Pace) {
        let mut failure = self.self_test().await;
        if let Some(failed) = &failure
            && pace.is_due()
        {
            warn!(error = failed, "the redirect does not lead to this agent: applying it again");
            self.repair(pace).await;
            failure = self.self_test().await;
            pace.repaired(failure.is_none());
        }
        self.verified.set(failure.is_none());
        self.metrics.redirect_verified(failure.is_none());
    }

    /// Connects through the redirect from each address and returns the first failure. Skips families without a route,
    /// which no packet can use.
    async fn self_test(&self) -> Option<String> {
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
    async fn restore_policy_routing(&self, pace: &mut Pace) {
        if pace.fenced.is_some_and(|fenced| fenced.elapsed() < VERIFY) {
            return;
        }
        pace.fenced = Some(Instant::now());
        let installed = self.installed.clone();
        match tokio::task::spawn_blocking(move || installed.restore_policy_routing()).await {
            Ok(Ok(0)) => pace.fence_failed = false,
            Ok(Ok(rules)) => {
                warn!(rules, "the redirect's policy routing rules were missing and were added again");
                self.metrics.rule_repaired.inc();
            }
            Ok(Err(error)) if !std::mem::replace(&mut pace.fence_failed, true) => {
                warn!(%error, "the redirect's policy routing rules cannot be added");
            }
            Ok(Err(_)) | Err(_) => {}
        }
    }

    /// Reads the rules back, to cover the chains that the self-test does not pass: prerouting and forwarding. A
    /// difference causes a repair and a warning; readiness depends on the self-test alone.
    async fn read_back(&self, pace: &mut Pace) {
        if !pace.read_is_due(|| self.changes.overran()) {
            return;
        }
        let Some(listing) = self.listing(pace).await else { return };
        match compare(pace.expected.as_deref(), &listing) {
            Comparison::Unchanged => {}
            Comparison::First => pace.expected = listing.ok().map(Into::into),
            Comparison::Unreadable => warn!(
                error = listing.err().map(|error| format!("{error:#}")),
                "the redirect's rules cannot be read back"
            ),
            Comparison::Changed => {
                let error = listing.err().map(|error| format!("{error:#}"));
                warn!(error, "the redirect's rules differ from those that were applied: applying them again");
                // Another version of the tool may list the same rules differently, which costs one repair.
                if self.repair(pace).await
                    && let Some(Ok(listing)) = self.listing(pace).await
                {
                    pace.expected = Some(listing.into());
                }
            }
        }
    }

    /// Lists the rules on a blocking thread, since the tools are processes.
    async fn listing(&self, pace: &mut Pace) -> Option<anyhow::Result<String>> {
        let (installed, start) = (self.installed.clone(), Instant::now());
        let listing = tokio::task::spawn_blocking(move || installed.listing()).await;
        pace.record_read(start.elapsed());
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
        // Use a blocking thread: waiting for the tools, which are processes, must not delay requests.
        let apply = move || {
            let _serialized = applying.lock();
            if let Err(error) = installed.restore_policy_routing() {
                debug!(%error, "the redirect's policy routing rules cannot be added");
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
enum Comparison {
    Unchanged,
    Changed,
    /// The rules are read for the first time, so there is nothing to compare them with.
    First,
    Unreadable,
}

/// Compares the rules with the expected listing. Rules that could be listed before and cannot be listed now count as
/// changed.
fn compare(expected: Option<&str>, listing: &anyhow::Result<String>) -> Comparison {
    match (expected, listing) {
        (None, Ok(_)) => Comparison::First,
        (None, Err(_)) => Comparison::Unreadable,
        (Some(expected), Ok(listing)) if expected == listing => Comparison::Unchanged,
        (Some(_), _) => Comparison::Changed,
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
        assert_eq!(compare(Some(applied), &listing(applied)), Comparison::Unchanged);
        assert_eq!(compare(Some(applied), &listing("chain prerouting { }")), Comparison::Changed);
        assert_eq!(compare(Some(applied), &unreadable()), Comparison::Changed);
        assert_eq!(compare(None, &listing(applied)), Comparison::First);
        assert_eq!(compare(None, &unreadable()), Comparison::Unreadable);
    }
}
