//! Waiting for a condition with a deadline. Tests never sleep for a fixed time.

use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Result, bail};

/// Ask until there is an answer; an error that says what was waited for when `within` has passed.
pub fn poll<T>(what: &str, within: Duration, ask: impl FnMut() -> Option<T>) -> Result<T> {
    poll_every(Duration::from_millis(5), what, within, ask)
}

/// The same where asking costs something, or is itself what is tested.
pub fn poll_every<T>(pause: Duration, what: &str, within: Duration, mut ask: impl FnMut() -> Option<T>) -> Result<T> {
    let deadline = Instant::now() + within;
    loop {
        if let Some(answer) = ask() {
            return Ok(answer);
        }
        if Instant::now() >= deadline {
            bail!("not within {within:?}: {what}");
        }
        thread::sleep(pause);
    }
}

/// Do something and say how long it took.
pub fn timed<T>(work: impl FnOnce() -> T) -> (T, Duration) {
    let start = Instant::now();
    let answer = work();
    (answer, start.elapsed())
}
