//! What one connection is doing, in one atomic: its own task writes it, the limiter reads it.

use std::{
    sync::atomic::{AtomicBool, AtomicU64, Ordering},
    time::Duration,
};

use tokio::sync::Notify;

/// Maximum time until a connection has sent its first request, and a request its head.
const HEAD_TIMEOUT: Duration = Duration::from_secs(5);
/// Maximum time that a client reads nothing of a response.
const WRITE_TIMEOUT: Duration = Duration::from_secs(5);
/// SDKs keep a connection for a minute between requests.
const IDLE_TIMEOUT: Duration = Duration::from_secs(75);
/// Interval of the checks: a deadline can become an earlier one meanwhile.
const CHECK: Duration = Duration::from_secs(5);

const PHASE: u64 = 0b11;
/// The client has not sent a request yet.
const SILENT: u64 = 0;
/// Part of a request's head has arrived.
const RECEIVING: u64 = 1;
const BUSY: u64 = 2;
const IDLE: u64 = 3;
/// The client does not read: the send buffer is full.
const STALLED: u64 = 0b100;
const MILLIS_SHIFT: u32 = 3;

/// Why a connection is closed without anybody needing its place.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Timeout {
    /// No complete request head.
    Silent,
    /// The client does not read its response.
    Stalled,
    /// No further request.
    Idle,
}

impl Timeout {
    pub fn label(self) -> &'static str {
        match self {
            Self::Silent => "silent",
            Self::Stalled => "stalled",
            Self::Idle => "idle",
        }
    }
}

/// Only the connection's task changes the state, so that loads and stores suffice.
#[derive(Debug)]
pub(super) struct Connection {
    /// The phase, and since when.
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

    /// Bytes of a request have arrived. Its time runs from the first of them.
    pub(super) fn received(&self, now: Duration) {
        if matches!(self.state() & PHASE, SILENT | IDLE) {
            self.enter(RECEIVING, now);
        }
    }

    /// A write had to wait. What the phase is otherwise stays known.
    pub(super) fn stalled(&self, now: Duration) {
        let state = self.state();
        if state & STALLED == 0 {
            self.store(at(now, state & PHASE | STALLED));
        }
    }

    /// A write that was stalled got on.
    pub(super) fn wrote(&self, now: Duration) {
        self.store(at(now, self.state() & PHASE));
    }

    pub(super) fn is_busy(&self) -> bool {
        self.state() & PHASE == BUSY
    }

    pub(super) fn is_stalled(&self) -> bool {
        self.state() & STALLED != 0
    }

    /// Whether the client, and not the agent, keeps the connection waiting.
    pub(super) fn waits_for_client(&self) -> bool {
        self.is_stalled() || !self.is_busy()
    }

    /// Time since the phase began.
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

    /// When to ask again, or what is over.
    pub(super) fn timeout(&self, now: Duration) -> Result<Duration, Timeout> {
        let state = self.state();
        let (most, timeout) = match state & PHASE {
            _ if state & STALLED != 0 => (WRITE_TIMEOUT, Timeout::Stalled),
            SILENT | RECEIVING => (HEAD_TIMEOUT, Timeout::Silent),
            IDLE => (IDLE_TIMEOUT, Timeout::Idle),
            // Answers have deadlines of their own.
            _ => return Ok(CHECK),
        };
        let left = (since(state) + most).saturating_sub(now);
        if left.is_zero() { Err(timeout) } else { Ok(left.min(CHECK)) }
    }

    fn enter(&self, phase: u64, now: Duration) {
        let state = self.state();
        // A client that does not read gets no more time by sending.
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
