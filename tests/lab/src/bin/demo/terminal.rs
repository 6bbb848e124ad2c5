//! A shell on the node or in a pod. Runs the lines that the demo shows, word for word, and remembers variables between
//! them. Knows nothing of what they are for.

use std::fmt;
use std::io::{BufRead, BufReader, Write, pipe};
use std::path::Path;
use std::process::{Child, ChildStdin, Command, Stdio};
use std::sync::mpsc::{Receiver, channel};
use std::time::Duration;
use std::{env, thread};

use anyhow::{Context, Result, anyhow};
use lab::netns::Netns;

/// Longer than anything shown may take; what does not answer at all is a failure, not a hang.
const PATIENCE: Duration = Duration::from_secs(15);
/// Ends the output of a line; what follows is its exit status.
const MARK: &str = "-- end of output, status ";

pub(crate) struct Terminal {
    prompt: &'static str,
    shell: Child,
    keyboard: ChildStdin,
    lines: Receiver<String>,
}

/// What a line printed, standard error included, and how it ended.
pub(crate) struct Typed {
    pub(crate) status: i32,
    pub(crate) text: String,
}

/// As it looked on the screen.
impl fmt::Debug for Typed {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "exit status {}\n{}", self.status, self.text)
    }
}

impl Terminal {
    pub(crate) fn open(prompt: &'static str, netns: &Netns, folder: &Path) -> Result<Self> {
        let (reader, writer) = pipe()?;
        let mut command = Command::new("sh");
        // A proxy or a ~/.curlrc of the caller's would change what is shown.
        command.env_clear().env("PATH", env::var_os("PATH").unwrap_or_default()).env("HOME", "/nonexistent");
        command.current_dir(folder).stdin(Stdio::piped()).stdout(writer.try_clone()?).stderr(writer);
        let mut shell = netns.run(|| command.spawn()).context("sh")?;
        drop(command);
        let keyboard = shell.stdin.take().context("stdin is piped")?;
        let (sender, lines) = channel();
        thread::spawn(move || {
            let lines = BufReader::new(reader).split(b'\n').map_while(Result::ok);
            lines.map(|line| String::from_utf8_lossy(&line).into_owned()).try_for_each(|line| sender.send(line))
        });
        Ok(Self { prompt, shell, keyboard, lines })
    }

    pub(crate) fn prompt(&self) -> &'static str {
        self.prompt
    }

    pub(crate) fn run(&mut self, line: &str) -> Result<Typed> {
        // The newline before the mark is not part of the output: the last line may lack its own.
        let script = format!("{{ {line}\n}} </dev/null; printf '\\n{MARK}%s\\n' $?\n");
        self.keyboard.write_all(script.as_bytes())?;
        let mut text = String::new();
        loop {
            let line =
                self.lines.recv_timeout(PATIENCE).map_err(|_| anyhow!("no end within {PATIENCE:?}: {line}\n{text}"))?;
            if let Some(status) = line.strip_prefix(MARK) {
                text.truncate(text.trim_end_matches('\n').len());
                return Ok(Typed { status: status.parse()?, text });
            }
            text += &line;
            text.push('\n');
        }
    }
}

impl Drop for Terminal {
    fn drop(&mut self) {
        let _ = self.shell.kill();
        let _ = self.shell.wait();
    }
}
