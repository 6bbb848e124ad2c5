//! Observability: logs, metrics and readiness. Every stage uses it; it depends on none of them.

mod admin;
mod metrics;

use std::{collections::HashMap, net::IpAddr};

use clap::ValueEnum;
use parking_lot::Mutex;
use tokio::sync::watch;
use tokio::time::{Duration, Instant};
use tracing::{Level, debug, error, info, warn};
use tracing_subscriber::EnvFilter;

pub use admin::{Admin, DebugPage};
pub use metrics::{LastActivity, Metrics, Outcome, Step};

use crate::refusal::{Reason, Refusal};

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum LogFormat {
    Text,
    Json,
}

/// Starts logging to stderr.
///
/// # Errors
/// Fails if the filter does not parse, or if a logger was installed before.
pub fn start_logging(format: LogFormat, filter: &str) -> anyhow::Result<()> {
    let filter = EnvFilter::try_new(silence_http_clients(filter))
        .map_err(|error| anyhow::anyhow!("--log-level {filter}: {error}; must be like info or warn,kirsa=debug"))?;
    let logs = tracing_subscriber::fmt().with_env_filter(filter).with_writer(std::io::stderr);
    match format {
        LogFormat::Text => logs.try_init(),
        LogFormat::Json => logs.json().flatten_event(true).with_current_span(false).with_span_list(false).try_init(),
    }
    .map_err(|error| anyhow::anyhow!("cannot start logging: {error}"))
}

/// Overrides the log levels of the HTTP client libraries, which log complete requests and responses at debug and trace,
/// tokens and keys included. No filter may enable that: secrets must never reach a log.
fn silence_http_clients(filter: &str) -> String {
    // Target prefixes, each with its maximum level.
    const HTTP_CLIENTS: &[(&str, &str)] = &[
        ("aws_", "warn"),
        ("h2", "warn"),
        ("hyper", "warn"),
        // Its warning about a response that does not parse includes the response, which may hold a token.
        ("kube_client", "error"),
        ("rustls", "warn"),
        ("tower", "warn"),
    ];
    let is_http_client =
        |directive: &str| HTTP_CLIENTS.iter().any(|(name, _)| directive.trim_start_matches('[').starts_with(name));
    let is_allowed = |directive: &&str| !is_http_client(directive.trim());
    let silenced = HTTP_CLIENTS.iter().map(|(name, level)| format!("{name}={level}"));
    filter.split(',').filter(is_allowed).map(str::to_owned).chain(silenced).collect::<Vec<_>>().join(",")
}

/// Minimum interval between log lines for one reason and source: a client in a tight loop must not fill the log.
const REPEAT: Duration = Duration::from_secs(10);
/// Maximum number of tracked pairs of reason and source.
const MAX_TRACKED: usize = 1_024;
/// Minimum interval between log lines for all untracked sources together.
const OVERFLOW_INTERVAL: Duration = Duration::from_secs(1);

/// Rate limit for the log of refusals, by reason and source and in total. The metrics count every refusal.
#[derive(Debug, Default)]
pub struct RefusalLog(Mutex<Logged>);

#[derive(Debug, Default)]
struct Logged {
    last: HashMap<(Reason, IpAddr), Instant>,
    /// Time of the last log line for an untracked source.
    overflowed: Option<Instant>,
    /// Number of log lines suppressed since then.
    suppressed: u64,
}

impl RefusalLog {
    /// Returns whether to log this refusal: not if the same reason and source were logged within [`REPEAT`].
    pub fn should_log(&self, reason: Reason, source: IpAddr) -> bool {
        let mut logged = self.0.lock();
        let (should_log, suppressed) = logged.record(reason, source);
        drop(logged);
        if suppressed > 0 {
            warn!(
                suppressed,
                "the refusal log overflowed: one line per second is logged, the metrics count every refusal"
            );
        }
        should_log
    }
}

impl Logged {
    /// Returns whether to log this refusal, and how many suppressed ones to report.
    fn record(&mut self, reason: Reason, source: IpAddr) -> (bool, u64) {
        if self.last.get(&(reason, source)).is_some_and(|at| at.elapsed() < REPEAT) {
            return (false, 0);
        }
        if self.last.len() >= MAX_TRACKED {
            self.last.retain(|_, at| at.elapsed() < REPEAT);
        }
        let paused = self.overflowed.is_some_and(|at| at.elapsed() < OVERFLOW_INTERVAL);
        if self.last.len() < MAX_TRACKED {
            self.last.insert((reason, source), Instant::now());
        } else if paused {
            self.suppressed += 1;
            return (false, 0);
        } else {
            self.overflowed = Some(Instant::now());
        }
        (true, if paused { 0 } else { std::mem::take(&mut self.suppressed) })
    }
}

/// Logs a refusal at the level that [`crate::refusal`] sets for its reason.
pub fn log_refusal(refusal: &Refusal, namespace: &str, pod: &str, service_account: &str) {
    let spec = refusal.reason.info();
    macro_rules! line {
        ($level:ident) => {
            $level!(
                reason = spec.label,
                namespace,
                pod,
                service_account,
                detail = &*refusal.detail,
                advice = spec.advice,
                "refused"
            )
        };
    }
    match spec.level {
        Level::ERROR => line!(error),
        Level::WARN => line!(warn),
        Level::INFO => line!(info),
        _ => line!(debug),
    }
}

/// Named conditions that must hold before this node's pods can be served. `/readyz` lists those that are pending.
#[derive(Debug, Clone, Default)]
pub struct Readiness(watch::Sender<Vec<(&'static str, bool)>>);

impl Readiness {
    /// Adds a condition, which is pending at first.
    pub fn condition(&self, name: &'static str) -> Condition {
        self.0.send_modify(|conditions| conditions.push((name, false)));
        Condition { all: self.clone(), name }
    }

    /// Returns the names of the conditions that do not hold.
    pub fn pending(&self) -> Vec<&'static str> {
        self.0.borrow().iter().filter(|(_, met)| !met).map(|(name, _)| *name).collect()
    }

    /// Waits until no condition is pending.
    pub async fn ready(&self) {
        // Waiting fails only when the sender is dropped, and `self` holds it.
        let _ = self.0.subscribe().wait_for(|conditions| conditions.iter().all(|(_, met)| *met)).await;
    }
}

/// One condition of [`Readiness`].
#[derive(Debug, Clone)]
pub struct Condition {
    all: Readiness,
    name: &'static str,
}

impl Condition {
    /// Waits until the condition holds.
    pub async fn met(&self) {
        // Waiting fails only when the sender is dropped, and `self` holds it.
        let holds = |conditions: &Vec<(&str, bool)>| conditions.contains(&(self.name, true));
        let _ = self.all.0.subscribe().wait_for(holds).await;
    }

    /// Sets whether the condition holds, and logs a change.
    pub fn set(&self, met: bool) {
        let changed = self.all.0.send_if_modified(|conditions| {
            let condition = conditions.iter_mut().find(|(name, _)| *name == self.name);
            condition.is_some_and(|(_, was)| std::mem::replace(was, met) != met)
        });
        if changed {
            info!(condition = self.name, met, "readiness condition changed");
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test(start_paused = true)]
    async fn refusal_log_overflow_logs_once_a_second() {
        let mut logged = Logged::default();
        let ip = |n: u32| IpAddr::from(std::net::Ipv4Addr::from(n));
        for n in 0..MAX_TRACKED as u32 {
            assert_eq!(logged.record(Reason::NotFound, ip(n)), (true, 0));
        }
        assert_eq!(logged.record(Reason::NotFound, ip(5_000)), (true, 0));
        for n in 5_001..5_101 {
            assert_eq!(logged.record(Reason::NotFound, ip(n)), (false, 0));
        }
        tokio::time::advance(OVERFLOW_INTERVAL).await;
        assert_eq!(logged.record(Reason::NotFound, ip(6_000)), (true, 100));
        assert_eq!(logged.record(Reason::NotFound, ip(6_001)), (false, 0));
    }

    #[test]
    fn no_filter_enables_http_client_logs() {
        for filter in ["trace", "aws_smithy_runtime=trace,hyper::proto=trace", "kirsa=debug, hyper=trace"] {
            let filter = EnvFilter::try_new(silence_http_clients(filter)).unwrap().to_string();
            assert!(filter.contains("hyper=warn") && filter.contains("kube_client=error"), "{filter}");
            assert!(!filter.contains("hyper=trace") && !filter.contains("hyper::proto"), "{filter}");
        }
    }

    #[test]
    fn readiness_lists_pending_conditions() {
        let readiness = Readiness::default();
        let (redirect, pods) = (readiness.condition("redirect"), readiness.condition("pods"));
        redirect.set(true);
        assert_eq!(readiness.pending(), ["pods"]);
        pods.set(true);
        redirect.set(false);
        assert_eq!(readiness.pending(), ["redirect"]);
    }
}
