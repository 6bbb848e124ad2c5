//! How the demo looks: a sentence, the command, its output with secrets shortened, and a mark. In colour on a terminal,
//! plain elsewhere and where NO_COLOR says so. Knows nothing of what is shown.

use std::fmt;
use std::io::{self, IsTerminal, Stdout, Write, stdout};
use std::path::Path;
use std::process::Command;

use anyhow::{Error, Result};
use lab::net::Pod;

use crate::terminal::{Terminal, Typed};

/// Columns of text: room for the URLs.
const WIDTH: usize = 104;
/// Everything that belongs to a step stands below its sentence.
const MARGIN: &str = "    ";

pub(crate) struct Screen {
    out: Stdout,
    colour: bool,
    step: usize,
}

/// An expectation was not met, and the screen has said so.
#[derive(Debug)]
pub(crate) struct Unmet;

impl std::error::Error for Unmet {}

impl fmt::Display for Unmet {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("not as expected")
    }
}

/// The parameters of the escape sequences that terminals know.
#[derive(Clone, Copy)]
enum Style {
    Bold = 1,
    Dim = 2,
    Red = 31,
    Green = 32,
    Yellow = 33,
    Cyan = 36,
}

impl Screen {
    pub(crate) fn new() -> Self {
        let set = |name| std::env::var_os(name).filter(|value| !value.is_empty());
        let colour = stdout().is_terminal() && set("NO_COLOR").is_none() && set("TERM").is_none_or(|t| t != "dumb");
        Self { out: stdout(), colour, step: 0 }
    }

    fn paint(&self, style: Style, text: impl fmt::Display) -> String {
        if self.colour { format!("\x1b[{}m{text}\x1b[0m", style as u8) } else { text.to_string() }
    }

    pub(crate) fn title(&mut self, title: &str, text: &str) -> io::Result<()> {
        writeln!(self.out, "{}", self.paint(Style::Bold, title))?;
        for line in fold(text, WIDTH, " ") {
            writeln!(self.out, "{}", self.paint(Style::Dim, line))?;
        }
        self.out.flush()
    }

    pub(crate) fn step(&mut self, sentence: &str) -> io::Result<()> {
        self.step += 1;
        let number = format!("{:>2}.", self.step);
        writeln!(self.out)?;
        let sentence = fold(sentence, WIDTH - MARGIN.len(), " ").join("\n    ");
        let sentence = self.paint(Style::Bold, format_args!("{number} {sentence}"));
        writeln!(self.out, "{sentence}")
    }

    /// Type a line, and show what it says.
    pub(crate) fn run(&mut self, terminal: &mut Terminal, line: &str) -> Result<Typed> {
        self.command(terminal.prompt(), line)?;
        let typed = terminal.run(line)?;
        self.output(&typed.text)?;
        Ok(typed)
    }

    /// Run a program in a pod, and show what it says. Folders are left out of the command that is shown.
    pub(crate) fn program(&mut self, prompt: &str, pod: &Pod, command: &mut Command) -> Result<Typed> {
        let words = [command.get_program()].into_iter().chain(command.get_args());
        let names = words.map(|word| match Path::new(word).file_name() {
            Some(name) if Path::new(word).is_absolute() => name.to_string_lossy(),
            _ => word.to_string_lossy(),
        });
        self.command(prompt, &names.collect::<Vec<_>>().join(" "))?;
        let output = pod.run(command)?;
        let text = format!("{}{}", String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
        self.output(text.trim_end())?;
        Ok(Typed { status: output.status.code().unwrap_or(-1), text })
    }

    /// A command as one would type it.
    pub(crate) fn command(&mut self, prompt: &str, line: &str) -> io::Result<()> {
        let mut head = self.paint(Style::Cyan, prompt);
        for line in line.lines() {
            writeln!(self.out, "{MARGIN}{head} {line}")?;
            head = " ".repeat(prompt.chars().count());
        }
        // Seen while it runs.
        self.out.flush()
    }

    pub(crate) fn output(&mut self, text: &str) -> io::Result<()> {
        for line in text.lines().map(|line| shorten_secrets(&line.replace('\t', "  "))) {
            for line in fold(&line, WIDTH - MARGIN.len() - 2, ", ") {
                let line = if line.is_empty() {
                    line.into()
                } else {
                    self.paint(Style::Dim, format_args!("{MARGIN}  {line}"))
                };
                writeln!(self.out, "{line}")?;
            }
        }
        Ok(())
    }

    /// A check mark, or a cross with what was seen instead, which ends the demo.
    pub(crate) fn expect(&mut self, met: bool, claim: &str, seen: impl fmt::Debug) -> Result<()> {
        if met {
            let mark = self.paint(Style::Green, "✓");
            writeln!(self.out, "{MARGIN}{mark} {claim}")?;
            return Ok(());
        }
        self.cross(&format!("not so: {claim}"))?;
        self.details("seen instead", &format!("{seen:#?}"))?;
        Err(Unmet.into())
    }

    pub(crate) fn skip(&mut self, reason: &str) -> io::Result<()> {
        let mark = self.paint(Style::Yellow, "– skipped:");
        // What pip has to say about it can be a page.
        let mut lines = fold(reason, WIDTH - MARGIN.len() - 12, " ");
        if lines.len() > 3 {
            lines.truncate(3);
            lines.push("…");
        }
        let reason = lines.join(&format!("\n{MARGIN}  "));
        writeln!(self.out, "{MARGIN}{mark} {reason}")
    }

    /// Say what went wrong, unless [`Screen::expect`] has.
    pub(crate) fn failed(&mut self, error: &Error) -> io::Result<()> {
        if error.is::<Unmet>() { Ok(()) } else { self.cross(&format!("{error:#}")) }
    }

    fn cross(&mut self, text: &str) -> io::Result<()> {
        let cross = self.paint(Style::Red, "✗");
        writeln!(self.out, "{MARGIN}{cross} {}", text.replace('\n', "\n      "))
    }

    pub(crate) fn details(&mut self, heading: &str, text: &str) -> io::Result<()> {
        if text.is_empty() {
            return Ok(());
        }
        writeln!(self.out, "{MARGIN}  {heading}:")?;
        self.output(text)
    }

    pub(crate) fn note(&mut self, text: &str) -> io::Result<()> {
        let text = self.paint(Style::Dim, text);
        writeln!(self.out, "\n{text}")?;
        self.out.flush()
    }

    pub(crate) fn end(&mut self, text: &str) -> io::Result<()> {
        let text = self.paint(Style::Green, format_args!(" ✓  {text}"));
        writeln!(self.out, "\n{text}")
    }
}

/// The text in lines of at most `width` characters, broken behind the first of `separators` that they have.
fn fold<'a>(text: &'a str, width: usize, separators: &str) -> Vec<&'a str> {
    let mut lines = Vec::new();
    let mut rest = text.trim_end();
    while let Some((full, _)) = rest.char_indices().nth(width) {
        let end = separators.chars().find_map(|separator| rest[..full].rfind(separator)).map_or(full, |at| at + 1);
        lines.push(rest[..end].trim_end());
        rest = rest[end..].trim_start();
    }
    lines.push(rest);
    lines
}

/// Of a secret in a JSON document only its beginning and its length are shown.
fn shorten_secrets(line: &str) -> String {
    let mut shown = line.to_owned();
    for name in ["SecretAccessKey", "Token"] {
        let Some(value) = shown.find(&format!("\"{name}\"")).and_then(|at| {
            let value = at + name.len() + 2;
            let begin = value + shown[value..].find('"')? + 1;
            Some(begin..begin + shown[begin..].find('"')?)
        }) else {
            continue;
        };
        let secret = &shown[value.clone()];
        let short = format!("{}… ({} characters)", secret.chars().take(6).collect::<String>(), secret.len());
        shown.replace_range(value, &short);
    }
    shown
}
