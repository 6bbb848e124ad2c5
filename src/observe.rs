//! What an operator sees: logs, metrics, readiness. Named by every stage; knows none of them.

mod admin;
mod metrics;

use std::{
    collections::HashMap,
    net::IpAddr,
    sync::{Mutex, PoisonError},
};

use clap::ValueEnum;
use tokio::sync::watch;
use tokio::time::{Duration, Instant};
use tracing::{Level, debug, error, info, warn};
use tracing_subscriber::EnvFilter;

pub use admin::{Admin, Page};
pub use metrics::{Heard, Metrics, Outcome, Step};

use crate::refusal::{Reason, Refusal};

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum LogFormat {
    Text,
    Json,
}

/// Starts logging to stderr.
///
/// # Errors
/// The filter cannot be read.
pub fn start_logging(format: LogFormat, filter: &str) -> anyhow::Result<()> {
    let filter = EnvFilter::try_new(silence_wire(filter))
        .map_err(|error| anyhow::anyhow!("--log-level {filter}: {error}; must be like info or warn,kirsa=debug"))?;
    let logs = tracing_subscriber::fmt().with_env_filter(filter).with_writer(std::io::stderr);
    match format {
        LogFormat::Text => logs.try_init(),
        LogFormat::Json => logs.json().flatten_event(true).with_current_span(false).with_span_list(false).try_init(),
    }
    .map_err(|error| anyhow::anyhow!("cannot start logging: {error}"))
}

/// The HTTP clients below log requests and answers whole at debug and trace, tokens and keys included. No filter may
/// turn that on: an operator who asks for `trace` wants to see kirsa, and secrets must never reach a log.
fn silence_wire(filter: &str) -> String {
    // Prefixes of targets.
    const WIRE: &[(&str, &str)] = &[
        ("aws_", "warn"),
        ("h2", "warn"),
        ("hyper", "warn"),
        // It warns of an answer that it cannot parse by printing that, which may be a token.
        ("kube_client", "error"),
        ("rustls", "warn"),
        ("tower", "warn"),
    ];
    let is_wire = |directive: &str| WIRE.iter().any(|(name, _)| directive.trim_start_matches('[').starts_with(name));
    let kept = |directive: &&str| !is_wire(directive.trim());
    let silenced = WIRE.iter().map(|(name, level)| format!("{name}={level}"));
    filter.split(',').filter(kept).map(str::to_owned).chain(silenced).collect::<Vec<_>>().join(",")
}

/// How often the same refusal to the same source is logged: a client in a tight loop must not fill the log.
const REPEAT: Duration = Duration::from_secs(10);
/// Sources and reasons that are remembered for that.
const REMEMBERED: usize = 1_024;
/// Minimum interval between lines about sources that cannot be remembered, all of them together.
const OVERFLOW_INTERVAL: Duration = Duration::from_secs(1);

/// Rate-limits the log of refusals by reason and source, and as a whole; the metrics count every one.
#[derive(Debug, Default)]
pub struct RefusalLog(Mutex<Logged>);

#[derive(Debug, Default)]
struct Logged {
    last: HashMap<(Reason, IpAddr), Instant>,
    /// Time of the last line about a source that could not be remembered.
    overflowed: Option<Instant>,
    /// Lines suppressed since then.
    suppressed: u64,
}

impl RefusalLog {
    /// Whether this kind of refusal was not logged of this source a moment ago. If so, it counts as logged.
    pub fn should_log(&self, reason: Reason, source: IpAddr) -> bool {
        let mut logged = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let (should_log, suppressed) = logged.record(reason, source);
        drop(logged);
        if suppressed > 0 {
            warn!(suppressed, "refusal log overflowed: one line a second is logged, the metrics count every refusal");
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
        if self.last.len() >= REMEMBERED {
            self.last.retain(|_, at| at.elapsed() < REPEAT);
        }
        let paused = self.overflowed.is_some_and(|at| at.elapsed() < OVERFLOW_INTERVAL);
        if self.last.len() < REMEMBERED {
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

/// One line for a refusal, at the level that its row in the table gives.
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

/// What must be true before this node's pods can be served, by name, so that `/readyz` can say what is pending.
#[derive(Debug, Clone, Default)]
pub struct Readiness(watch::Sender<Vec<(&'static str, bool)>>);

impl Readiness {
    /// A condition that does not hold yet.
    pub fn condition(&self, name: &'static str) -> Condition {
        self.0.send_modify(|conditions| conditions.push((name, false)));
        Condition { all: self.clone(), name }
    }

    pub fn pending(&self) -> Vec<&'static str> {
        self.0.borrow().iter().filter(|(_, met)| !met).map(|(name, _)| *name).collect()
    }

    /// Returns once nothing is pending.
    pub async fn ready(&self) {
        // The sender is held here: waiting cannot fail.
        let _ = self.0.subscribe().wait_for(|conditions| conditions.iter().all(|(_, met)| *met)).await;
    }
}

#[derive(Debug, Clone)]
pub struct Condition {
    all: Readiness,
    name: &'static str,
}

impl Condition {
    /// Returns once it holds.
    pub async fn met(&self) {
        // The sender is held here: waiting cannot fail.
        let holds = |conditions: &Vec<(&str, bool)>| conditions.contains(&(self.name, true));
        let _ = self.all.0.subscribe().wait_for(holds).await;
    }

    /// Says whether it holds now; logs when that was news.
    pub fn set(&self, met: bool) {
        let changed = self.all.0.send_if_modified(|conditions| {
            let condition = conditions.iter_mut().find(|(name, _)| *name == self.name);
            condition.is_some_and(|(_, was)| std::mem::replace(was, met) != met)
        });
        if changed {
            info!(condition = self.name, met, "readiness");
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test(start_paused = true)]
    async fn refusal_log_overflow_is_one_line_a_second() {
        let mut logged = Logged::default();
        let ip = |n: u32| IpAddr::from(std::net::Ipv4Addr::from(n));
        for n in 0..REMEMBERED as u32 {
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
    fn no_filter_turns_on_the_logs_of_the_wire() {
        for asked in ["trace", "aws_smithy_runtime=trace,hyper::proto=trace", "kirsa=debug, hyper=trace"] {
            let filter = EnvFilter::try_new(silence_wire(asked)).unwrap().to_string();
            assert!(filter.contains("hyper=warn") && filter.contains("kube_client=error"), "{filter}");
            assert!(!filter.contains("hyper=trace") && !filter.contains("hyper::proto"), "{filter}");
        }
    }

    #[test]
    fn readiness_names_what_is_pending() {
        let readiness = Readiness::default();
        let (rule, directory) = (readiness.condition("redirect"), readiness.condition("directory"));
        rule.set(true);
        assert_eq!(readiness.pending(), ["directory"]);
        directory.set(true);
        rule.set(false);
        assert_eq!(readiness.pending(), ["redirect"]);
    }
}
