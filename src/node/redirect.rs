//! The redirect, kept.

use std::{
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};

use tracing::{error, warn};

use crate::{
    intercept::{Probe, RuleChanges, rule::Installed},
    observe::{Condition, Metrics},
};

/// How often the redirect is tried, whether the kernel says that rules changed or not: iptables-legacy's are not
/// announced.
const VERIFY: Duration = Duration::from_secs(2);

#[derive(Debug)]
pub(super) struct Redirect {
    installed: Installed,
    changes: RuleChanges,
    probe: Arc<Probe>,
    verified: Condition,
    metrics: Metrics,
    /// Whether another agent may have kept it since these rules were applied, with rules of its own.
    others: AtomicBool,
}

impl Redirect {
    pub(super) fn new(
        installed: Installed,
        others: bool,
        probe: Arc<Probe>,
        verified: Condition,
        metrics: Metrics,
    ) -> Self {
        metrics.rule_applied.inc();
        let others = AtomicBool::new(others);
        Self { installed, changes: RuleChanges::subscribe(), probe, verified, metrics, others }
    }

    /// Tries the redirect again and again, and applies it when it does not lead here any more.
    pub(super) async fn keep(&self) {
        if self.others.swap(true, Ordering::Relaxed) {
            self.apply().await;
        }
        let mut warned = false;
        loop {
            let broken = self.broken().await;
            self.verified.set(broken.is_none());
            self.metrics.redirect_verified(broken.is_none());
            match broken {
                None => warned = false,
                Some(way) => {
                    if !std::mem::replace(&mut warned, true) {
                        warn!(way, "the redirect does not lead here any more: applying it again");
                    }
                    if self.apply().await {
                        self.metrics.rule_repaired.inc();
                    }
                }
            }
            let _ = tokio::time::timeout(VERIFY, self.changes.next()).await;
        }
    }

    /// Which way leads elsewhere.
    async fn broken(&self) -> Option<String> {
        for (host, service) in self.installed.rules().ways() {
            if let Err(error) = self.probe.run(host, service).await {
                return Some(format!("{} to {host}: {error}", service.of_family(host)));
            }
        }
        None
    }

    async fn apply(&self) -> bool {
        let installed = self.installed;
        // The tools are processes: waiting for them must not hold up requests.
        match tokio::task::spawn_blocking(move || installed.apply_again()).await {
            Ok(Ok(())) => return true,
            Ok(Err(error)) => error!(error = format!("{error:#}"), "the redirect cannot be applied"),
            Err(error) => error!(%error, "the redirect cannot be applied"),
        }
        false
    }
}
