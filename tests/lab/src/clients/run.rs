//! A client at work in a pod: call by call, each with a deadline.

use std::os::unix::process::ExitStatusExt;
use std::time::{Duration, Instant};

use anyhow::Result;
use nix::sys::signal::Signal;
use serde::Deserialize;

use super::client::Client;
use crate::{net::Pod, process::Process};

/// Longer than any of them may take, or does on a busy machine.
const DEADLINE: Duration = Duration::from_secs(60);

/// What a client made of one call.
#[derive(Debug)]
pub(super) struct Call {
    /// By its own clock where it has one, so that the start of an interpreter does not count.
    pub(super) took: Duration,
    pub(super) end: End,
}

#[derive(Debug)]
pub(super) enum End {
    Succeeded,
    /// It said that it could not.
    Failed(String),
    /// It was killed by a signal, ended without a word, or never did.
    Broke(String),
}

/// The line that a program prints for each call.
#[derive(Deserialize)]
struct Said {
    seconds: f64,
    #[serde(default)]
    error: Option<String>,
}

pub(super) struct Running<'a> {
    client: &'a Client,
    pod: &'a Pod,
    sts: &'a str,
    store: &'a str,
    process: Process,
    started: Instant,
    mark: usize,
}

impl<'a> Running<'a> {
    /// Starts the client, which makes its first call at once.
    pub(super) fn start(client: &'a Client, pod: &'a Pod, sts: &'a str, store: &'a str) -> Result<Self> {
        let process = spawn(client, pod, sts, store)?;
        Ok(Self { client, pod, sts, store, process, started: Instant::now(), mark: 0 })
    }

    /// Has it call again: with the same client object where it keeps one, and in any case for new credentials.
    pub(super) fn again(&mut self) -> Result<Call> {
        if !self.client.talks() {
            *self = Self::start(self.client, self.pod, self.sts, self.store)?;
            return self.call();
        }
        self.told("again")
    }

    /// Has it call again, with what it has.
    pub(super) fn go_on(&mut self) -> Result<Call> {
        self.told("go on")
    }

    fn told(&mut self, what: &str) -> Result<Call> {
        self.mark = self.process.mark();
        self.started = Instant::now();
        if self.process.tell(what).is_err() {
            return self.ended();
        }
        self.call()
    }

    /// Waits for the end of the call that it is at.
    pub(super) fn call(&mut self) -> Result<Call> {
        if !self.client.talks() {
            return self.ended();
        }
        match self.process.wait_for_line_after(self.mark, DEADLINE, |line| said(line).is_some()) {
            Ok(line) => {
                let said = said(&line).expect("the line that was waited for");
                let end = said.error.map_or(End::Succeeded, End::Failed);
                Ok(Call { took: Duration::from_secs_f64(said.seconds), end })
            }
            Err(_) => self.ended(),
        }
    }

    fn ended(&mut self) -> Result<Call> {
        let left = DEADLINE.saturating_sub(self.started.elapsed()).max(Duration::from_secs(1));
        let status = self.process.wait(left).ok();
        let took = self.started.elapsed();
        let lines = self.process.lines();
        let last = lines[self.mark.min(lines.len())..].iter().rev().find(|line| !line.trim().is_empty());
        let last = last.cloned().unwrap_or_default();
        let end = match status {
            None => End::Broke(format!("still at it after {DEADLINE:?}")),
            Some(status) => match status.signal().and_then(|signal| Signal::try_from(signal).ok()) {
                Some(signal) => End::Broke(format!("{signal}: {last}")),
                None if self.client.talks() => End::Broke(format!("{status} without a word: {last}")),
                None if status.success() => End::Succeeded,
                // A shell that was not replaced by the program tells its signal so.
                None if status.code().is_some_and(|code| (129..160).contains(&code)) => {
                    End::Broke(format!("{status}: {last}"))
                }
                None => End::Failed(last),
            },
        };
        Ok(Call { took, end })
    }
}

fn spawn(client: &Client, pod: &Pod, sts: &str, store: &str) -> Result<Process> {
    Process::spawn_listening(Some(pod.netns()), client.name, client.command(sts, store)?)
}

fn said(line: &str) -> Option<Said> {
    line.starts_with('{').then(|| serde_json::from_str(line).ok())?
}
