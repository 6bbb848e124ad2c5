//! The redirect, kept.

use std::time::Duration;

use tracing::{error, warn};

use crate::{
    intercept::{Probe, RuleChanges, rule::Installed},
    observe::{Condition, Metrics},
};

/// How often the redirect is tried, whether the kernel says that rules changed or not: iptables-legacy's are not
/// announced.
const VERIFY: Duration = Duration::from_secs(2);

/// Tries the redirect again and again, and applies it when it does not lead here any more.
pub(super) async fn keep_redirect(installed: Installed, probe: &Probe, verified: &Condition, metrics: &Metrics) {
    let mut warned = false;
    let changes = RuleChanges::subscribe();
    loop {
        let mut broken = None;
        for (host, service) in installed.rules().ways() {
            if let Err(error) = probe.run(host, service).await {
                broken = Some((service.of_family(host), host, error));
            }
        }
        verified.set(broken.is_none());
        metrics.rule_verified.set(broken.is_none().into());
        match broken {
            None => warned = false,
            Some((service, host, error)) => {
                if !std::mem::replace(&mut warned, true) {
                    warn!(%service, %host, %error, "the redirect does not lead here any more: applying it again");
                }
                // The tools are processes: waiting for them must not hold up requests.
                match tokio::task::spawn_blocking(move || installed.apply_again()).await {
                    Ok(Ok(())) => metrics.rule_repaired.inc(),
                    Ok(Err(error)) => error!(error = format!("{error:#}"), "the redirect cannot be applied"),
                    Err(error) => error!(%error, "the redirect cannot be applied"),
                }
            }
        }
        let _ = tokio::time::timeout(VERIFY, changes.next()).await;
    }
}
