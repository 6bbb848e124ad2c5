//! What one pod notices of another that asks in a tight loop, and what pods notice of a restart. With the limits that an
//! agent has by default, and pods from a file: nothing here depends on an API server.

use std::io::{Read, Write};
use std::net::TcpStream;
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use lab::http::CREDENTIALS_PATH;
use lab::net::{METADATA, Pod};
use lab::site::Site;

const MEASURED: Duration = Duration::from_secs(4);
/// Between two requests of the quiet pod.
const PACE: Duration = Duration::from_millis(4);
/// Connections of the other one: a client that caches nothing, in as many processes.
const HOT: usize = 8;
/// Between two tries of a pod that waits for the agent to be back.
const IMPATIENCE: Duration = Duration::from_millis(1);

/// The quiet pod's p99, alone and beside the hot one.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Quiet {
    pub(crate) alone: Duration,
    pub(crate) beside: Duration,
}

fn get(pod: &str) -> String {
    format!("GET {CREDENTIALS_PATH}{pod}-role HTTP/1.1\r\nHost: {METADATA}\r\n\r\n")
}

fn connect(pod: &Pod) -> Result<TcpStream> {
    let stream = pod.connect((METADATA, 80))?;
    stream.set_nodelay(true)?;
    stream.set_read_timeout(Some(Duration::from_secs(6)))?;
    Ok(stream)
}

/// One request, and the status of its answer, which is small enough to come at once.
fn ask(stream: &mut TcpStream, request: &str) -> Result<u16> {
    stream.write_all(request.as_bytes())?;
    let mut answer = [0; 8 << 10];
    let length = stream.read(&mut answer)?;
    let status = answer.get(9..12).filter(|_| length > 12).context("an answer")?;
    Ok(std::str::from_utf8(status)?.parse()?)
}

pub(crate) fn quiet_beside_hot(binary: &Path) -> Result<Quiet> {
    let site = Site::new(binary)?;
    let (quiet, hot) = (site.pod_with_role("quiet")?, site.pod_with_role("hot")?);
    let agent = site.start()?;
    for pod in [&quiet, &hot] {
        ensure!(ask(&mut connect(pod)?, &get(pod.name()))? == 200);
    }
    let alone = p99_of(&quiet)?;
    let ended = AtomicBool::new(false);
    let beside = thread::scope(|scope| {
        for _ in 0..HOT {
            scope.spawn(|| {
                let Ok(mut stream) = connect(&hot) else { return };
                let request = get(hot.name());
                loop {
                    if ended.load(Ordering::Relaxed) || ask(&mut stream, &request).is_err() {
                        return;
                    }
                }
            });
        }
        let beside = p99_of(&quiet);
        ended.store(true, Ordering::Relaxed);
        beside
    })?;
    agent.stop()?;
    Ok(Quiet { alone, beside })
}

fn p99_of(pod: &Pod) -> Result<Duration> {
    let (mut stream, request) = (connect(pod)?, get(pod.name()));
    let began = Instant::now();
    let mut latencies = Vec::new();
    while began.elapsed() < MEASURED {
        let asked = Instant::now();
        ensure!(ask(&mut stream, &request)? == 200, "{} was refused", pod.name());
        latencies.push(asked.elapsed());
        wait_until(asked + PACE);
    }
    latencies.sort_unstable();
    Ok(latencies[latencies.len() * 99 / 100])
}

fn wait_until(when: Instant) {
    while let Some(left) = when.checked_duration_since(Instant::now()) {
        thread::park_timeout(left);
    }
}

/// For how long a pod that connects anew for each request has no answer, when an agent ends and the next one is
/// started after it.
pub(crate) fn restart_gaps(binary: &Path, restarts: usize) -> Result<Vec<Duration>> {
    let site = Site::new(binary)?;
    let pod = site.pod_with_role("reader")?;
    let mut agent = site.start()?;
    let mut gaps = Vec::new();
    for _ in 0..restarts {
        ensure!(answered(&pod), "no answer from an agent that is ready");
        let ended = AtomicBool::new(false);
        let (next, gap) = thread::scope(|scope| {
            let asking = scope.spawn(|| longest_silence(&pod, &ended));
            let next = agent.stop().and_then(|()| site.start());
            ended.store(true, Ordering::Relaxed);
            // It asks until it has an answer, unless nobody is going to give one.
            anyhow::Ok((next?, asking.join().expect("no panic")))
        })?;
        agent = next;
        gaps.push(gap);
    }
    agent.stop()?;
    Ok(gaps)
}

/// By a connection of its own.
fn answered(pod: &Pod) -> bool {
    let answer = connect(pod).and_then(|mut stream| ask(&mut stream, &get(pod.name())));
    answer.is_ok_and(|status| status == 200)
}

fn longest_silence(pod: &Pod, ended: &AtomicBool) -> Duration {
    let (mut last, mut longest) = (Instant::now(), Duration::ZERO);
    loop {
        let (asked, over) = (Instant::now(), ended.load(Ordering::Relaxed));
        if answered(pod) {
            longest = longest.max(last.elapsed());
            last = Instant::now();
            if over {
                return longest;
            }
        } else if over && last.elapsed() > MEASURED {
            return last.elapsed();
        }
        wait_until(asked + IMPATIENCE);
    }
}
