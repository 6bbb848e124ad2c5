//! Prints the findings, as text for people or as one JSON object for programs.

use std::io::{self, IsTerminal, Write};

use serde::Serialize;

use super::finding::{Finding, Verdict};
use crate::config::Output;

/// Version of the JSON object, incremented when a member changes its meaning or is removed.
const FORMAT: u32 = 1;

#[derive(Serialize)]
struct Report<'a> {
    format: u32,
    version: &'static str,
    /// The worst verdict of the findings; skipped checks do not count.
    verdict: Verdict,
    findings: &'a [Finding],
}

/// Prints the findings and returns the worst verdict.
pub(super) fn print(findings: &[Finding], output: Output) -> Verdict {
    let has = |verdict| findings.iter().any(|finding| finding.verdict == verdict);
    let verdict = match (has(Verdict::Failed), has(Verdict::Warning)) {
        (true, _) => Verdict::Failed,
        (false, true) => Verdict::Warning,
        (false, false) => Verdict::Ok,
    };
    let mut out = io::stdout().lock();
    // A write fails when the reader closed the pipe; the exit code still carries the verdict.
    let _ = match output {
        Output::Json => {
            let report = Report { format: FORMAT, version: env!("CARGO_PKG_VERSION"), verdict, findings };
            serde_json::to_writer_pretty(&mut out, &report).map_err(io::Error::from).and_then(|()| writeln!(out))
        }
        Output::Text => {
            // https://no-color.org
            let color = out.is_terminal() && std::env::var_os("NO_COLOR").is_none_or(|value| value.is_empty());
            out.write_all(text(findings, color).as_bytes())
        }
    };
    verdict
}

fn text(findings: &[Finding], color: bool) -> String {
    let width = findings.iter().map(|finding| finding.check.len()).max().unwrap_or(0);
    let mut text = String::new();
    for finding in findings {
        let label = paint(finding.verdict, &format!("{:7}", finding.verdict.label()), color);
        text += &format!("{label}  {:width$}  {}\n", finding.check, finding.detail);
        if let Some(fix) = &finding.fix {
            text += &format!("{:7}  {:width$}  → {fix}\n", "", "");
        }
    }
    let count = |verdict| findings.iter().filter(|finding| finding.verdict == verdict).count();
    let counts = [Verdict::Failed, Verdict::Warning, Verdict::Ok, Verdict::Skipped];
    let counts = counts.map(|verdict| format!("{} {}", count(verdict), verdict.label()));
    text + &format!("\n{}\n", counts.join(", "))
}

fn paint(verdict: Verdict, text: &str, color: bool) -> String {
    let code = match verdict {
        _ if !color => return text.to_owned(),
        Verdict::Ok => 32,
        Verdict::Warning => 33,
        Verdict::Failed => 31,
        Verdict::Skipped => 2,
    };
    format!("\x1b[{code}m{text}\x1b[0m")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn text_is_aligned_and_ends_with_counts() {
        let findings = [Finding::ok("sts", "answers"), Finding::failed("redirect-ipv4", "nobody", "start it")];
        assert_eq!(
            text(&findings, false),
            "ok       sts            answers\n\
             failed   redirect-ipv4  nobody\n                        → start it\n\
             \n1 failed, 0 warning, 1 ok, 0 skipped\n"
        );
        assert!(text(&findings, true).starts_with("\x1b[32mok     \x1b[0m  sts"));
    }
}
