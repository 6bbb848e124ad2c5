//! What a process has used, by the kernel's account.

use std::fs;
use std::time::Duration;

use anyhow::{Context, Result};
use nix::unistd::{SysconfVar, sysconf};

/// Memory in KiB.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Memory {
    pub(crate) resident: u64,
    /// Of that, what is its own, and what is its binary as far as it was read.
    pub(crate) anonymous: u64,
    pub(crate) file: u64,
    pub(crate) peak: u64,
}

pub(crate) fn memory(pid: u32) -> Result<Memory> {
    let path = format!("/proc/{pid}/status");
    let status = fs::read_to_string(&path).with_context(|| path.clone())?;
    let value = |name: &str| {
        let line = status.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(':'));
        let number = line.and_then(|line| line.split_whitespace().next()?.parse().ok());
        number.with_context(|| format!("{name} in {path}"))
    };
    Ok(Memory {
        resident: value("VmRSS")?,
        anonymous: value("RssAnon")?,
        file: value("RssFile")?,
        peak: value("VmHWM")?,
    })
}

/// User and system time of all its threads, those that ended included.
pub(crate) fn cpu(pid: u32) -> Result<Duration> {
    let path = format!("/proc/{pid}/stat");
    let stat = fs::read_to_string(&path).with_context(|| path.clone())?;
    // The name, in parentheses, may hold spaces; utime and stime are the 12th and 13th field behind it.
    let fields = stat.rsplit_once(')').context("a name in parentheses")?.1.split_whitespace();
    let ticks: Vec<u32> = fields.skip(11).take(2).map(str::parse).collect::<Result<_, _>>()?;
    let per_second = sysconf(SysconfVar::CLK_TCK)?.context("ticks per second")?;
    Ok(Duration::from_secs_f64(f64::from(ticks.iter().sum::<u32>()) / per_second as f64))
}
