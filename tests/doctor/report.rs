//! The JSON output of `kirsa doctor`.

use std::process::Output;

use anyhow::{Context, Result, bail, ensure};
use lab::agent::{Agent, Options};
use lab::net::Node;
use serde_json::Value;

#[derive(Debug)]
pub(crate) struct Report {
    pub(crate) code: i32,
    pub(crate) verdict: String,
    pub(crate) findings: Vec<Finding>,
}

#[derive(Debug)]
pub(crate) struct Finding {
    check: String,
    pub(crate) verdict: String,
    pub(crate) detail: String,
    /// Empty if the finding has no fix.
    pub(crate) fix: String,
}

pub(crate) fn doctor(node: &Node, options: &Options) -> Result<Report> {
    Report::of(Agent::doctor(node, options, &["--output", "json"])?)
}

pub(crate) fn doctor_text(node: &Node, options: &Options) -> Result<(i32, String)> {
    let output = Agent::doctor(node, options, &[])?;
    ensure!(output.stderr.is_empty(), "{output:?}");
    Ok((output.status.code().context("an exit code")?, String::from_utf8(output.stdout)?))
}

impl Report {
    pub(crate) fn of(output: Output) -> Result<Self> {
        ensure!(output.stderr.is_empty(), "{output:?}");
        let json: Value = serde_json::from_slice(&output.stdout)?;
        let text = |object: &Value, name: &str| object[name].as_str().unwrap_or_default().to_owned();
        let findings = json["findings"].as_array().context("findings")?;
        let findings = findings.iter().map(|finding| Finding {
            check: text(finding, "check"),
            verdict: text(finding, "verdict"),
            detail: text(finding, "detail"),
            fix: text(finding, "fix"),
        });
        let findings: Vec<Finding> = findings.collect();
        let bad = |finding: &&Finding| matches!(finding.verdict.as_str(), "warning" | "failed");
        ensure!(findings.iter().filter(bad).all(|finding| !finding.fix.is_empty()), "without a fix: {findings:#?}");
        Ok(Self { code: output.status.code().context("an exit code")?, verdict: text(&json, "verdict"), findings })
    }

    pub(crate) fn verdicts(&self, check: &str) -> Vec<&str> {
        self.all(check).into_iter().map(|finding| finding.verdict.as_str()).collect()
    }

    pub(crate) fn all(&self, check: &str) -> Vec<&Finding> {
        self.findings.iter().filter(|finding| finding.check == check).collect()
    }

    /// Returns the only finding of a check.
    pub(crate) fn one(&self, check: &str) -> Result<&Finding> {
        match self.all(check)[..] {
            [finding] => Ok(finding),
            _ => bail!("{check}: {self:#?}"),
        }
    }

    pub(crate) fn failed(&self, check: &str) -> Result<&Finding> {
        let finding = self.one(check)?;
        ensure!(finding.verdict == "failed", "{finding:?}");
        Ok(finding)
    }
}
