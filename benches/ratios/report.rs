//! The results as a table for people and as a file for machines, the aims beside them.

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;
use std::time::Duration;

use anyhow::{Context, Result};
use serde_json::json;

use crate::cold::{CALLERS, Calls};
use crate::cost::Memory;
use crate::fair::Quiet;
use crate::load::Warm;

#[derive(Debug, Default)]
pub(crate) struct Report {
    pub(crate) start_to_ready: Vec<Duration>,
    pub(crate) idle: Memory,
    pub(crate) loaded: Memory,
    pub(crate) bare_idle: Memory,
    /// By the number of connections.
    pub(crate) warm: BTreeMap<usize, Rounds>,
    pub(crate) cold_overhead: Vec<Duration>,
    pub(crate) cold_calls: Calls,
    pub(crate) quiet: Vec<Quiet>,
    pub(crate) restart_gaps: Vec<Duration>,
}

#[derive(Debug, Default)]
pub(crate) struct Rounds {
    pub(crate) kirsa: Vec<Warm>,
    pub(crate) bare: Vec<Warm>,
}

/// A number and what it should be.
struct Row {
    what: String,
    kirsa: f64,
    bare: Option<f64>,
    /// What the aim is for: the number itself, or its ratio to bare hyper's.
    aim: Option<Aim>,
}

enum Aim {
    AtLeast(f64),
    AtMost(f64),
    Exactly(f64),
}

impl Report {
    pub(crate) fn publish(&self) -> Result<()> {
        println!("\n{:<44}{:>12}{:>12}{:>9}   aim", "", "kirsa", "bare hyper", "ratio");
        self.rows().iter().for_each(Row::print);
        println!(
            "\nMedians. Resident memory is that of a static binary with {} pods of {} KB on its node; of the idle {:.1} \
             MiB {:.1} are read from the binary, and the peak was {:.1} MiB.",
            crate::site::PODS,
            crate::site::POD_SIZE / 1_000,
            mib(self.idle.resident),
            mib(self.idle.file),
            mib(self.loaded.peak),
        );

        let folder = Path::new(env!("CARGO_TARGET_TMPDIR")).with_file_name("bench");
        fs::create_dir_all(&folder).with_context(|| folder.display().to_string())?;
        let file = folder.join("summary.json");
        fs::write(&file, format!("{:#}\n", self.summary())).with_context(|| file.display().to_string())?;
        println!("{}", file.display());
        Ok(())
    }

    fn summary(&self) -> serde_json::Value {
        let (c1, c32) = (&self.warm[&1], &self.warm[&32]);
        json!({
            "c32_rps_ratio": round(c32.ratio(rate)),
            "c1_p99_ratio": round(c1.ratio(p99)),
            "c32_cpu_ratio": round(c32.ratio(cpu)),
            "rss_idle_mib": round(mib(self.idle.resident)),
            "rss_loaded_mib": round(mib(self.loaded.resident)),
            "start_to_ready_ms": round(median(self.start_to_ready.iter().map(milliseconds))),
            "cold_overhead_ms": round(median(self.cold_overhead.iter().map(milliseconds))),
            "cold_callers": CALLERS,
            "cold_callers_token_requests": self.cold_calls.token_requests,
            "cold_callers_sts_calls": self.cold_calls.sts,
            "quiet_p99_beside_hot_ratio": round(self.quiet_beside() / self.quiet_alone()),
            "restart_gap_ms": round(median(self.restart_gaps.iter().map(milliseconds))),
        })
    }

    fn rows(&self) -> Vec<Row> {
        let mut rows = Vec::new();
        for (connections, rounds) in &self.warm {
            let mut row = |what: &str, of: fn(&Warm) -> f64, aim| {
                let (kirsa, bare) = (rounds.kirsa(of), Some(rounds.bare(of)));
                rows.push(Row { what: format!("warm, {connections} at once: {what}"), kirsa, bare, aim });
            };
            let many = *connections > 1;
            row("requests/s", rate, many.then_some(Aim::AtLeast(0.90)));
            row("p50, us", |warm| microseconds(&warm.p50), None);
            row("p99, us", p99, (!many).then_some(Aim::AtMost(1.2)));
            row("CPU s per 100,000", cpu, many.then_some(Aim::AtMost(1.15)));
        }
        let mut row = |what: &str, kirsa, bare, aim| rows.push(Row { what: what.into(), kirsa, bare, aim });
        row("resident idle, MiB", mib(self.idle.resident), None, Some(Aim::AtMost(12.0)));
        row("  of that its own", mib(self.idle.anonymous), Some(mib(self.bare_idle.anonymous)), None);
        row("resident after all this, MiB", mib(self.loaded.resident), None, Some(Aim::AtMost(12.0)));
        row("  of that its own", mib(self.loaded.anonymous), None, None);
        let start = median(self.start_to_ready.iter().map(milliseconds));
        row("start to ready, ms", start, None, Some(Aim::AtMost(300.0)));
        let cold = median(self.cold_overhead.iter().map(milliseconds));
        row("cold: what is neither token nor STS, ms", cold, None, Some(Aim::AtMost(2.0)));
        let calls = self.cold_calls;
        row(
            &format!("{CALLERS} cold callers: TokenRequests"),
            calls.token_requests as f64,
            None,
            Some(Aim::Exactly(1.0)),
        );
        row(&format!("{CALLERS} cold callers: STS calls"), calls.sts as f64, None, Some(Aim::Exactly(1.0)));
        let beside = self.quiet_beside();
        row("quiet pod's p99, us: beside a hot one, alone", beside, Some(self.quiet_alone()), Some(Aim::AtMost(2.0)));
        let gap = median(self.restart_gaps.iter().map(milliseconds));
        row("restart: longest silence, ms", gap, None, None);
        rows
    }

    fn quiet_alone(&self) -> f64 {
        median(self.quiet.iter().map(|quiet| microseconds(&quiet.alone)))
    }

    fn quiet_beside(&self) -> f64 {
        median(self.quiet.iter().map(|quiet| microseconds(&quiet.beside)))
    }
}

impl Rounds {
    fn kirsa(&self, of: fn(&Warm) -> f64) -> f64 {
        median(self.kirsa.iter().map(of))
    }

    fn bare(&self, of: fn(&Warm) -> f64) -> f64 {
        median(self.bare.iter().map(of))
    }

    fn ratio(&self, of: fn(&Warm) -> f64) -> f64 {
        self.kirsa(of) / self.bare(of)
    }
}

impl Row {
    fn print(&self) {
        let ratio = self.bare.map(|bare| self.kirsa / bare);
        let column = |value: Option<f64>| value.map_or_else(String::new, number);
        let text = |ratio: f64| format!("{ratio:.2}");
        print!(
            "{:<44}{:>12}{:>12}{:>9}",
            self.what,
            number(self.kirsa),
            column(self.bare),
            ratio.map_or(String::new(), text)
        );
        if let Some(aim) = &self.aim {
            let measured = ratio.unwrap_or(self.kirsa);
            let (said, met) = match aim {
                Aim::AtLeast(least) => (format!(">= {least}"), measured >= *least),
                Aim::AtMost(most) => (format!("<= {most}"), measured <= *most),
                Aim::Exactly(wanted) => (format!("{wanted}"), measured == *wanted),
            };
            print!("   {said}{}", if met { "" } else { "  MISSED" });
        }
        println!();
    }
}

fn rate(warm: &Warm) -> f64 {
    warm.requests
}

fn p99(warm: &Warm) -> f64 {
    microseconds(&warm.p99)
}

fn cpu(warm: &Warm) -> f64 {
    warm.cpu.as_secs_f64()
}

fn median(values: impl Iterator<Item = f64>) -> f64 {
    let mut values: Vec<f64> = values.collect();
    values.sort_unstable_by(f64::total_cmp);
    values.get(values.len() / 2).copied().unwrap_or(f64::NAN)
}

fn microseconds(duration: &Duration) -> f64 {
    duration.as_secs_f64() * 1e6
}

fn milliseconds(duration: &Duration) -> f64 {
    duration.as_secs_f64() * 1e3
}

fn mib(kib: u64) -> f64 {
    kib as f64 / 1_024.0
}

fn round(value: f64) -> f64 {
    (value * 1e3).round() / 1e3
}

/// As many digits as mean something.
fn number(value: f64) -> String {
    let digits = if value >= 100.0 || value.fract() == 0.0 { 0 } else { 2 };
    format!("{value:.digits$}")
}
