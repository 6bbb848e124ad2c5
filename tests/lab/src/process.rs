//! A child process, in a given network namespace, whose output can be waited for line by line.

use std::io::{BufRead, BufReader, PipeReader, Write, pipe};
use std::os::unix::process::ExitStatusExt;
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::{Arc, Condvar, Mutex};
use std::time::{Duration, Instant};
use std::{env, thread};

use anyhow::{Context, Result, bail};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

use crate::netns::Netns;
use crate::poll::poll;

/// Killed when dropped.
#[derive(Debug)]
pub struct Process {
    name: String,
    child: Child,
    output: Arc<Output>,
}

#[derive(Debug, Default)]
struct Output {
    state: Mutex<State>,
    changed: Condvar,
}

#[derive(Debug, Default)]
struct State {
    lines: Vec<String>,
    ended: bool,
}

impl Process {
    /// Start `command`, in `netns` or else in the base namespace. Standard output and error become one
    /// stream of lines; `LAB_ECHO=1` copies it to the test's own standard error.
    pub fn spawn(netns: Option<&Netns>, name: &str, command: Command) -> Result<Self> {
        Self::spawn_with(Stdio::null(), netns, name, command)
    }

    /// The same with a standard input that [`Process::tell`] writes to.
    pub fn spawn_listening(netns: Option<&Netns>, name: &str, command: Command) -> Result<Self> {
        Self::spawn_with(Stdio::piped(), netns, name, command)
    }

    fn spawn_with(stdin: Stdio, netns: Option<&Netns>, name: &str, mut command: Command) -> Result<Self> {
        let (reader, writer) = pipe()?;
        command.stdin(stdin).stdout(writer.try_clone()?).stderr(writer);
        let spawned = match netns {
            Some(netns) => netns.run(|| command.spawn()),
            None => command.spawn(),
        };
        let child = spawned.with_context(|| format!("starting {}", command.get_program().display()))?;
        // It holds the write end of the pipe, which has to close with the child.
        drop(command);
        let output = Arc::new(Output::default());
        thread::spawn({
            let (name, output) = (name.to_owned(), output.clone());
            move || output.fill(&name, reader)
        });
        Ok(Self { name: name.into(), child, output })
    }

    pub fn id(&self) -> u32 {
        self.child.id()
    }

    /// Whether it has closed its output, which it does by ending.
    pub fn ended(&self) -> bool {
        self.output.state.lock().expect("no panic while held").ended
    }

    /// Whether it is there yet; its output may be open for a moment after it.
    pub fn is_running(&mut self) -> bool {
        matches!(self.child.try_wait(), Ok(None))
    }

    /// Every line so far.
    pub fn lines(&self) -> Vec<String> {
        self.output.state.lock().expect("no panic while held").lines.clone()
    }

    /// How many lines there are: a mark for [`Process::wait_for_line_after`].
    pub fn mark(&self) -> usize {
        self.output.state.lock().expect("no panic while held").lines.len()
    }

    pub fn wait_for_line(&self, within: Duration, wanted: impl Fn(&str) -> bool) -> Result<String> {
        self.wait_for_line_after(0, within, wanted)
    }

    /// Wait for a line behind `mark`; an error with the last lines if it does not come or the process ends.
    pub fn wait_for_line_after(&self, mark: usize, within: Duration, wanted: impl Fn(&str) -> bool) -> Result<String> {
        let deadline = Instant::now() + within;
        let mut state = self.output.state.lock().expect("no panic while held");
        let mut seen = mark;
        loop {
            if let Some(line) = state.lines[seen..].iter().find(|line| wanted(line)) {
                return Ok(line.clone());
            }
            seen = state.lines.len();
            let left = deadline.saturating_duration_since(Instant::now());
            if state.ended || left.is_zero() {
                let why = if state.ended { "its output ended" } else { "time is up" };
                let tail = state.lines[seen.saturating_sub(20)..].join("\n  ");
                bail!("{}: no such line within {within:?} ({why}); last lines:\n  {tail}", self.name);
            }
            state = self.output.changed.wait_timeout(state, left).expect("no panic while held").0;
        }
    }

    /// A line for its standard input.
    pub fn tell(&mut self, line: &str) -> Result<()> {
        let stdin = self.child.stdin.as_mut().with_context(|| format!("{} does not listen", self.name))?;
        writeln!(stdin, "{line}").with_context(|| format!("telling {} {line}", self.name))
    }

    pub fn signal(&self, signal: Signal) -> Result<()> {
        let pid = Pid::from_raw(self.child.id().try_into()?);
        kill(pid, signal).with_context(|| format!("{signal} to {}", self.name))
    }

    pub fn wait(&mut self, within: Duration) -> Result<ExitStatus> {
        let what = format!("the end of {}", self.name);
        poll(&what, within, || self.child.try_wait().transpose())?.context(what)
    }

    /// SIGTERM, then the exit status.
    pub fn terminate(&mut self, within: Duration) -> Result<ExitStatus> {
        self.signal(Signal::SIGTERM)?;
        self.wait(within)
    }

    /// SIGKILL: no chance to tidy up.
    pub fn kill(&mut self) -> Result<()> {
        self.child.kill()?;
        let status = self.child.wait()?;
        if status.signal() != Some(Signal::SIGKILL as i32) {
            bail!("{} had ended before it was killed: {status}", self.name);
        }
        Ok(())
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

impl Output {
    fn fill(&self, name: &str, reader: PipeReader) {
        let echo = env::var_os("LAB_ECHO").is_some();
        for line in BufReader::new(reader).split(b'\n').map_while(Result::ok) {
            let line = String::from_utf8_lossy(&line).into_owned();
            if echo {
                eprintln!("{name}: {line}");
            }
            self.change(|state| state.lines.push(line));
        }
        self.change(|state| state.ended = true);
    }

    fn change(&self, change: impl FnOnce(&mut State)) {
        change(&mut self.state.lock().expect("no panic while held"));
        self.changed.notify_all();
    }
}
