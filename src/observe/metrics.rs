//! Prometheus metrics. Label values are enums or `&'static str`, which bounds the number of series: no address, path or
//! object name becomes a label.

use std::{
    fmt,
    sync::{Arc, OnceLock},
};

use parking_lot::Mutex;
use prometheus::{
    Encoder, GaugeVec, Histogram, HistogramOpts, HistogramVec, IntCounter, IntCounterVec, IntGauge, IntGaugeVec, Opts,
    Registry, TextEncoder,
};
use tokio::time::{Duration, Instant};

use crate::refusal::Reason;

/// Label of the credentials route.
const CREDENTIALS: &str = "credentials";

/// The two calls of an exchange: TokenRequest to the API server and AssumeRoleWithWebIdentity to STS.
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
    /// Series of successful credential requests, resolved once to keep label lookups off the hot path.
    credentials_ok: (IntCounter, Histogram),
    refusals: IntCounterVec,
    exchange: HistogramVec,
    exchange_wait: HistogramVec,
    pub cache_hits: IntCounter,
    pub cache_misses: IntCounter,
    pub cache_entries: IntGauge,
    credentials_left: GaugeVec,
    first_expiry: Arc<OnceLock<ExpiryGauge>>,
    watch_silence: GaugeVec,
    watches: Arc<Mutex<Vec<(&'static str, LastActivity)>>>,
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
    /// Fails if two metrics share a name, which is a bug in this file.
    pub fn new(version: &str) -> anyhow::Result<Self> {
        let registry = Registry::new();
        macro_rules! register {
            ($metric:expr) => {{
                let metric = $metric?;
                registry.register(Box::new(metric.clone()))?;
                metric
            }};
        }
        let build = register!(IntGaugeVec::new(
            Opts::new("kirsa_build_info", "Always 1, labeled with the version"),
            &["version"]
        ));
        build.with_label_values(&[version]).set(1);
        let requests = register!(IntCounterVec::new(
            Opts::new("kirsa_requests_total", "Requests from pods, by route and outcome"),
            &["route", "outcome"]
        ));
        let request_seconds = register!(HistogramVec::new(
            HistogramOpts::new("kirsa_request_seconds", "Time until pods got a response, in seconds, by route")
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
                HistogramOpts::new(
                    "kirsa_exchange_seconds",
                    "Duration of calls to the API server (token) and to STS, in seconds"
                )
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
            cache_hits: register!(IntCounter::new(
                "kirsa_cache_hits_total",
                "Credential lookups served from the cache"
            )),
            cache_misses: register!(IntCounter::new(
                "kirsa_cache_misses_total",
                "Credential lookups that waited for an exchange"
            )),
            cache_entries: register!(IntGauge::new("kirsa_cache_entries", "Cached STS sessions")),
            credentials_left: register!(GaugeVec::new(
                Opts::new(
                    "kirsa_credentials_left_seconds",
                    "Seconds until the first session in use expires; absent while no session is in use"
                ),
                &[]
            )),
            first_expiry: Arc::default(),
            watch_silence: register!(GaugeVec::new(
                Opts::new("kirsa_watch_silence_seconds", "Seconds since the API server last sent data on a watch"),
                &["watch"]
            )),
            watches: Arc::default(),
            rule_applied: register!(IntCounter::new(
                "kirsa_redirect_applied_total",
                "Number of times that the redirect was applied"
            )),
            rule_repaired: register!(IntCounter::new(
                "kirsa_redirect_repaired_total",
                "Number of times that the redirect or its policy routing was broken or changed and applied again"
            )),
            rule_verified: register!(IntGaugeVec::new(
                Opts::new(
                    "kirsa_redirect_verified",
                    "1 if the last self-test through the redirect reached this agent, or if the agent has no redirect \
                     (--intercept none); absent while a previous agent still owns the redirect"
                ),
                &[]
            )),
            connections: register!(IntGauge::new("kirsa_connections", "Open connections from pods")),
            connections_refused: register!(IntCounterVec::new(
                Opts::new("kirsa_connections_refused_total", "Rejected connections, by reason"),
                &["reason"]
            )),
            connections_closed: register!(IntCounterVec::new(
                Opts::new(
                    "kirsa_connections_closed_total",
                    "Connections that the agent closed: evicted by a limit (per_source, total) or timed out (silent, \
                     stalled, idle)"
                ),
                &["reason"]
            )),
            cni_records: register!(IntGaugeVec::new(
                Opts::new("kirsa_cni_records", "CNI records, by state"),
                &["state"]
            )),
            cni_skipped: register!(IntCounterVec::new(
                Opts::new("kirsa_cni_records_skipped_total", "CNI records that were skipped, by reason"),
                &["reason"]
            )),
            cni_followed: register!(IntGauge::new(
                "kirsa_cni_records_followed",
                "1 if inotify reports changes of CNI records; 0 while the folder is polled"
            )),
            bridge_ports: register!(IntGaugeVec::new(
                Opts::new(
                    "kirsa_bridge_ports",
                    "Linux bridge ports of pods, by whether a pod there can impersonate its neighbors"
                ),
                &["state"]
            )),
            indexed_pods: register!(IntGauge::new("kirsa_indexed_pods", "Live pods on this node")),
            clock_skew: register!(IntGauge::new(
                "kirsa_sts_clock_skew_seconds",
                "Seconds by which this node's clock was ahead of STS at the last exchange"
            )),
            registry,
        })
    }

    /// Records a request that was answered `took` after it arrived.
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

    /// Records one call of an exchange.
    pub fn exchange(&self, step: Step, outcome: Outcome, took: Duration) {
        let step = match step {
            Step::Token => "token",
            Step::Sts => "sts",
        };
        self.exchange.with_label_values(&[step, outcome.label()]).observe(took.as_secs_f64());
    }

    /// Records how long an exchange waited for the rate limiter.
    pub fn exchange_waited(&self, priority: &'static str, waited: Duration) {
        self.exchange_wait.with_label_values(&[priority]).observe(waited.as_secs_f64());
    }

    /// Records the result of a self-test. An agent that does not own the redirect yet leaves the metric absent.
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

    /// Sets the function that each scrape calls for the time until the first session in use expires.
    pub fn track_first_expiry(&self, time_left: impl Fn() -> Option<Duration> + Send + Sync + 'static) {
        // The agent has one cache, so a second call never happens.
        let _ = self.first_expiry.set(ExpiryGauge(Box::new(time_left)));
    }

    /// Starts measuring the silence of a watch.
    pub fn watch(&self, name: &'static str) -> LastActivity {
        let activity = LastActivity(Arc::new(Mutex::new(Instant::now())));
        self.watches.lock().push((name, activity.clone()));
        activity
    }

    /// Returns all metrics in the Prometheus text format.
    ///
    /// # Errors
    /// Fails if a metric cannot be encoded.
    pub fn render(&self) -> anyhow::Result<Vec<u8>> {
        for (name, activity) in &*self.watches.lock() {
            self.watch_silence.with_label_values(&[name]).set(activity.elapsed().as_secs_f64());
        }
        self.credentials_left.reset();
        if let Some(time_left) = self.first_expiry.get().and_then(|gauge| gauge.0()) {
            self.credentials_left.with_label_values::<&str>(&[]).set(time_left.as_secs_f64());
        }
        let mut text = Vec::new();
        TextEncoder::new().encode(&self.registry.gather(), &mut text)?;
        Ok(text)
    }
}

/// Returns the time until the first session in use expires, or `None` while no session is in use.
struct ExpiryGauge(Box<dyn Fn() -> Option<Duration> + Send + Sync>);

impl fmt::Debug for ExpiryGauge {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("ExpiryGauge")
    }
}

/// The time of the last data on a watch, bookmarks included.
#[derive(Debug, Clone)]
pub struct LastActivity(Arc<Mutex<Instant>>);

impl LastActivity {
    /// Records activity now.
    pub fn touch(&self) {
        *self.0.lock() = Instant::now();
    }

    /// Returns the time since the last activity.
    pub fn elapsed(&self) -> Duration {
        self.0.lock().elapsed()
    }
}
