//! The metrics. Labels are bounded by enums and `&'static str`: no address, path or object name becomes one.

use std::{
    fmt,
    sync::{Arc, Mutex, OnceLock, PoisonError},
};

use prometheus::{
    Encoder, GaugeVec, Histogram, HistogramOpts, HistogramVec, IntCounter, IntCounterVec, IntGauge, IntGaugeVec, Opts,
    Registry, TextEncoder,
};
use tokio::time::{Duration, Instant};

use crate::refusal::Reason;

/// The route's label.
const CREDENTIALS: &str = "credentials";

/// The two calls of an exchange.
#[derive(Debug, Clone, Copy)]
pub enum Step {
    Token,
    Sts,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Outcome {
    Ok,
    Refused(Reason),
}

impl Outcome {
    pub fn of<T>(result: &Result<T, crate::refusal::Refusal>) -> Self {
        result.as_ref().map_or_else(|refusal| Self::Refused(refusal.reason), |_| Self::Ok)
    }

    fn label(self) -> &'static str {
        match self {
            Self::Ok => "ok",
            Self::Refused(reason) => reason.info().label,
        }
    }
}

#[derive(Debug, Clone)]
pub struct Metrics {
    registry: Registry,
    requests: IntCounterVec,
    request_seconds: HistogramVec,
    /// What nearly every request counts in, without a look-up of its labels.
    credentials_ok: (IntCounter, Histogram),
    refusals: IntCounterVec,
    exchange: HistogramVec,
    exchange_wait: HistogramVec,
    pub cache_hits: IntCounter,
    pub cache_misses: IntCounter,
    pub cache_entries: IntGauge,
    credentials_left: GaugeVec,
    left: Arc<OnceLock<Left>>,
    silence: GaugeVec,
    heard: Arc<Mutex<Vec<(&'static str, Heard)>>>,
    pub rule_applied: IntCounter,
    pub rule_repaired: IntCounter,
    rule_verified: IntGaugeVec,
    pub connections: IntGauge,
    connections_refused: IntCounterVec,
    connections_closed: IntCounterVec,
    cni_records: IntGaugeVec,
    cni_skipped: IntCounterVec,
    pub cni_followed: IntGauge,
    bridge_ports: IntGaugeVec,
    pub indexed_pods: IntGauge,
    pub clock_skew: IntGauge,
}

impl Metrics {
    /// # Errors
    /// Two metrics have one name: a mistake in this file.
    pub fn new(version: &str) -> anyhow::Result<Self> {
        let registry = Registry::new();
        macro_rules! register {
            ($metric:expr) => {{
                let metric = $metric?;
                registry.register(Box::new(metric.clone()))?;
                metric
            }};
        }
        let build =
            register!(IntGaugeVec::new(Opts::new("kirsa_build_info", "1, labelled with the version"), &["version"]));
        build.with_label_values(&[version]).set(1);
        let requests = register!(IntCounterVec::new(
            Opts::new("kirsa_requests_total", "Requests of pods, by route and outcome"),
            &["route", "outcome"]
        ));
        let request_seconds = register!(HistogramVec::new(
            HistogramOpts::new("kirsa_request_seconds", "How long pods waited for an answer, in seconds, by route")
                .buckets(vec![0.001, 0.01, 0.05, 0.1, 0.35, 0.5, 0.8, 1.0, 2.0, 4.0]),
            &["route"]
        ));
        Ok(Self {
            credentials_ok: (
                requests.with_label_values(&[CREDENTIALS, Outcome::Ok.label()]),
                request_seconds.with_label_values(&[CREDENTIALS]),
            ),
            requests,
            request_seconds,
            refusals: register!(IntCounterVec::new(
                Opts::new("kirsa_refusals_total", "Refused requests, by reason"),
                &["reason"]
            )),
            exchange: register!(HistogramVec::new(
                HistogramOpts::new("kirsa_exchange_seconds", "Calls to the API server (token) and to STS, in seconds")
                    .buckets(vec![0.005, 0.01, 0.025, 0.05, 0.1, 0.2, 0.4, 0.8, 1.2, 2.0, 4.0]),
                &["step", "outcome"]
            )),
            exchange_wait: register!(HistogramVec::new(
                HistogramOpts::new(
                    "kirsa_exchange_wait_seconds",
                    "Time that exchanges waited for the rate limiter, in seconds"
                )
                .buckets(vec![0.001, 0.01, 0.1, 0.5, 1.0, 4.0, 15.0, 60.0]),
                &["priority"]
            )),
            cache_hits: register!(IntCounter::new("kirsa_cache_hits_total", "Credentials that were in hand")),
            cache_misses: register!(IntCounter::new(
                "kirsa_cache_misses_total",
                "Credentials that had to be waited for"
            )),
            cache_entries: register!(IntGauge::new("kirsa_cache_entries", "Sessions that are held")),
            credentials_left: register!(GaugeVec::new(
                Opts::new(
                    "kirsa_credentials_left_seconds",
                    "Seconds until the first of the sessions in use expires; absent while none is in use"
                ),
                &[]
            )),
            left: Arc::default(),
            silence: register!(GaugeVec::new(
                Opts::new("kirsa_watch_silence_seconds", "Seconds since the API server was last heard on a watch"),
                &["watch"]
            )),
            heard: Arc::default(),
            rule_applied: register!(IntCounter::new(
                "kirsa_redirect_applied_total",
                "Times that the redirect was applied"
            )),
            rule_repaired: register!(IntCounter::new(
                "kirsa_redirect_repaired_total",
                "Times that the redirect or its policy routing was found broken or changed, and applied again"
            )),
            rule_verified: register!(IntGaugeVec::new(
                Opts::new(
                    "kirsa_redirect_verified",
                    "1 if the last connection through the redirect reached this agent, or no redirect is its own \
                     (--intercept none); absent while a former agent keeps it"
                ),
                &[]
            )),
            connections: register!(IntGauge::new("kirsa_connections", "Open connections of pods")),
            connections_refused: register!(IntCounterVec::new(
                Opts::new("kirsa_connections_refused_total", "Connections that were turned away, by reason"),
                &["reason"]
            )),
            connections_closed: register!(IntCounterVec::new(
                Opts::new(
                    "kirsa_connections_closed_total",
                    "Connections that the agent closed: evicted for another one (per_source, total), or timed out \
                     (silent, stalled, idle)"
                ),
                &["reason"]
            )),
            cni_records: register!(IntGaugeVec::new(
                Opts::new("kirsa_cni_records", "CNI records, by what they are good for"),
                &["state"]
            )),
            cni_skipped: register!(IntCounterVec::new(
                Opts::new("kirsa_cni_records_skipped_total", "CNI records that were not understood, by reason"),
                &["reason"]
            )),
            cni_followed: register!(IntGauge::new(
                "kirsa_cni_records_followed",
                "1 if the kernel tells of changes of CNI records; 0 while the folder is looked at again and again"
            )),
            bridge_ports: register!(IntGaugeVec::new(
                Opts::new(
                    "kirsa_bridge_ports",
                    "Ports of Linux bridges that belong to pods, by whether a pod there can pass for its neighbors"
                ),
                &["state"]
            )),
            indexed_pods: register!(IntGauge::new("kirsa_indexed_pods", "Live pods of this node")),
            clock_skew: register!(IntGauge::new(
                "kirsa_sts_clock_skew_seconds",
                "How far this node's clock is ahead of STS, in seconds, as of the last exchange"
            )),
            registry,
        })
    }

    /// One that was answered `took` after it had arrived.
    pub fn request(&self, route: &'static str, outcome: Outcome, took: Duration) {
        if outcome == Outcome::Ok && route == CREDENTIALS {
            self.credentials_ok.0.inc();
            self.credentials_ok.1.observe(took.as_secs_f64());
            return;
        }
        self.request_seconds.with_label_values(&[route]).observe(took.as_secs_f64());
        self.requests.with_label_values(&[route, outcome.label()]).inc();
        if let Outcome::Refused(reason) = outcome {
            self.refusals.with_label_values(&[reason.info().label]).inc();
        }
    }

    pub fn exchange(&self, step: Step, outcome: Outcome, took: Duration) {
        let step = match step {
            Step::Token => "token",
            Step::Sts => "sts",
        };
        self.exchange.with_label_values(&[step, outcome.label()]).observe(took.as_secs_f64());
    }

    pub fn exchange_waited(&self, priority: &'static str, waited: Duration) {
        self.exchange_wait.with_label_values(&[priority]).observe(waited.as_secs_f64());
    }

    /// Of the redirect that this agent keeps: an agent that only learns yet says nothing of it.
    pub fn redirect_verified(&self, verified: bool) {
        self.rule_verified.with_label_values::<&str>(&[]).set(verified.into());
    }

    pub fn connection_refused(&self, reason: &'static str) {
        self.connections_refused.with_label_values(&[reason]).inc();
    }

    pub fn connection_closed(&self, reason: &'static str) {
        self.connections_closed.with_label_values(&[reason]).inc();
    }

    pub fn cni_skipped(&self, reason: &'static str) {
        self.cni_skipped.with_label_values(&[reason]).inc();
    }

    pub fn cni_records(&self, in_use: usize, pending: usize, stale: usize) {
        for (state, count) in [("in_use", in_use), ("pending", pending), ("stale", stale)] {
            self.cni_records.with_label_values(&[state]).set(i64::try_from(count).unwrap_or(i64::MAX));
        }
    }

    pub fn bridge_ports(&self, ports: usize, guarded: bool) {
        let ports = i64::try_from(ports).unwrap_or(i64::MAX);
        for (state, count) in [("guarded", if guarded { ports } else { 0 }), ("open", if guarded { 0 } else { ports })]
        {
            self.bridge_ports.with_label_values(&[state]).set(count);
        }
    }

    /// What to ask, whenever metrics are read, for the time until the first of the sessions in use expires.
    pub fn ask_credentials_left(&self, left: impl Fn() -> Option<Duration> + Send + Sync + 'static) {
        // Of two caches the first one would be asked; there is one.
        let _ = self.left.set(Left(Box::new(left)));
    }

    /// A watch whose silence is measured from now on.
    pub fn watch(&self, name: &'static str) -> Heard {
        let heard = Heard(Arc::new(Mutex::new(Instant::now())));
        self.heard.lock().unwrap_or_else(PoisonError::into_inner).push((name, heard.clone()));
        heard
    }

    /// # Errors
    /// The encoder's.
    pub fn render(&self) -> anyhow::Result<Vec<u8>> {
        for (name, heard) in &*self.heard.lock().unwrap_or_else(PoisonError::into_inner) {
            self.silence.with_label_values(&[name]).set(heard.silence().as_secs_f64());
        }
        self.credentials_left.reset();
        if let Some(left) = self.left.get().and_then(|left| left.0()) {
            self.credentials_left.with_label_values::<&str>(&[]).set(left.as_secs_f64());
        }
        let mut text = Vec::new();
        TextEncoder::new().encode(&self.registry.gather(), &mut text)?;
        Ok(text)
    }
}

struct Left(Box<dyn Fn() -> Option<Duration> + Send + Sync>);

impl fmt::Debug for Left {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Left")
    }
}

/// When something was last heard on a watch, bookmarks included.
#[derive(Debug, Clone)]
pub struct Heard(Arc<Mutex<Instant>>);

impl Heard {
    pub fn now(&self) {
        *self.0.lock().unwrap_or_else(PoisonError::into_inner) = Instant::now();
    }

    pub fn silence(&self) -> Duration {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).elapsed()
    }
}
