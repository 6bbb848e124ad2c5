//! Activity of one connection in one atomic, written by the connection's task and read by the limiter.

use std::{
    sync::atomic::{AtomicBool, AtomicU64, Ordering},
    time::Duration,
};

use tokio::sync::Notify;

/// Maximum time until a client has sent a complete request head.
const HEAD_TIMEOUT: Duration = Duration::from_secs(5);
/// Maximum time that a client reads nothing while a response waits to be sent.
const WRITE_TIMEOUT: Duration = Duration::from_secs(5);
/// Maximum idle time between requests. SDKs keep connections for up to a minute.
const IDLE_TIMEOUT: Duration = Duration::from_secs(75);
/// Maximum interval between checks, because a change of phase can make the deadline earlier.
const CHECK_INTERVAL: Duration = Duration::from_secs(5);

const PHASE: u64 = 0b11;
/// The client has sent nothing yet.
const SILENT: u64 = 0;
/// Part of a request's head has arrived.
const RECEIVING: u64 = 1;
/// A request is being answered.
const BUSY: u64 = 2;
/// The last response is complete.
const IDLE: u64 = 3;
/// Flag: the client does not read, and the send buffer is full.
const STALLED: u64 = 0b100;
const MILLIS_SHIFT: u32 = 3;

/// The timeout that closes a connection.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Timeout {
    /// The client sent no complete request head.
    Silent,
    /// The client does not read its response.
    Stalled,
    /// The client sent no further request.
    Idle,
}

impl Timeout {
    /// Returns the value of the metric label.
    pub fn label(self) -> &'static str {
        match self {
            Self::Silent => "silent",
            Self::Stalled => "stalled",
            Self::Idle => "idle",
        }
    }
}

/// Phase of a connection. Only its task changes the phase, so relaxed loads and stores suffice.
#[derive(Debug)]
pub(super) struct Connection {
    /// Phase and flags in the low bits, and the time of the last change in milliseconds above.
    state: AtomicU64,
    is_evicted: AtomicBool,
    eviction: Notify,
}

impl Connection {
    pub(super) fn new(now: Duration) -> Self {
        Self { state: AtomicU64::new(at(now, SILENT)), is_evicted: AtomicBool::new(false), eviction: Notify::new() }
    }

    pub(super) fn busy(&self, now: Duration) {
        self.enter(BUSY, now);
    }

    pub(super) fn idle(&self, now: Duration) {
        self.enter(IDLE, now);
    }

    /// Records that bytes of a request have arrived. The deadline counts from the first one.
    pub(super) fn received(&self, now: Duration) {
        if matches!(self.state() & PHASE, SILENT | IDLE) {
            self.enter(RECEIVING, now);
        }
    }

    /// Records that a write has to wait. Keeps the phase.
    pub(super) fn stalled(&self, now: Duration) {
        let state = self.state();
        if state & STALLED == 0 {
            self.store(at(now, state & PHASE | STALLED));
        }
    }

    /// Records that a stalled write made progress.
    pub(super) fn wrote(&self, now: Duration) {
        self.store(at(now, self.state() & PHASE));
    }

    pub(super) fn is_busy(&self) -> bool {
        self.state() & PHASE == BUSY
    }

    pub(super) fn is_stalled(&self) -> bool {
        self.state() & STALLED != 0
    }

    /// Returns whether the connection waits for the client and not for the agent.
    pub(super) fn waits_for_client(&self) -> bool {
        self.is_stalled() || !self.is_busy()
    }

    /// Returns the time since the last change of phase.
    pub(super) fn age(&self, now: Duration) -> Duration {
        now.saturating_sub(since(self.state()))
    }

    pub(super) fn evict(&self) {
        self.is_evicted.store(true, Ordering::Release);
        self.eviction.notify_one();
    }

    pub(super) fn is_evicted(&self) -> bool {
        self.is_evicted.load(Ordering::Acquire)
    }

    pub(super) async fn evicted(&self) {
        self.eviction.notified().await;
    }

    /// Returns when to check again.
    ///
    /// # Errors
    /// Returns the [`Timeout`] that has expired.
    pub(super) fn timeout(&self, now: Duration) -> Result<Duration, Timeout> {
        let state = self.state();
        let (limit, timeout) = match state & PHASE {
            _ if state & STALLED != 0 => (WRITE_TIMEOUT, Timeout::Stalled),
            SILENT | RECEIVING => (HEAD_TIMEOUT, Timeout::Silent),
            IDLE => (IDLE_TIMEOUT, Timeout::Idle),
            // Responses have their own deadlines.
            _ => return Ok(CHECK_INTERVAL),
        };
        let left = (since(state) + limit).saturating_sub(now);
        if left.is_zero() { Err(timeout) } else { Ok(left.min(CHECK_INTERVAL)) }
    }

    fn enter(&self, phase: u64, now: Duration) {
        let state = self.state();
        // A client that does not read cannot extend its deadline by sending.
        self.store(if state & STALLED != 0 { state & !PHASE | phase } else { at(now, phase) });
    }

    fn state(&self) -> u64 {
        self.state.load(Ordering::Relaxed)
    }

    fn store(&self, state: u64) {
        self.state.store(state, Ordering::Relaxed);
    }
}

fn at(now: Duration, state: u64) -> u64 {
    (u64::try_from(now.as_millis()).unwrap_or(u64::MAX) << MILLIS_SHIFT) | state
}

fn since(state: u64) -> Duration {
    Duration::from_millis(state >> MILLIS_SHIFT)
}
