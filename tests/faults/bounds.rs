//! Limits on the resources that one pod can use, without harm to others, as SECURITY.md states.

use std::fs;
use std::net::TcpStream;

use anyhow::{Context, Result, ensure};
use lab::agent::Agent;
use lab::http::{CREDENTIALS_PATH, TOKEN_TTL, Wire};
use lab::net::{METADATA, Pod};
use lab::poll::poll;
use lab::workloads::{self, Workload};
use nix::sys::socket::{setsockopt, sockopt};

use super::{Credentials, TIMEOUT, for_each, list, site};

/// Default connection limit per source.
const CONNECTIONS: usize = 64;
/// Maximum size of hyper's buffers and the task of a connection in KiB.
const KIB_PER_CONNECTION: u64 = 32;
/// Default connection limit for all sources.
const ALL_CONNECTIONS: u64 = 2_048;
/// Maximum memory of all connections in KiB.
const KIB_FOR_ALL_CONNECTIONS: u64 = 64 << 10;
/// Maximum size of the kernel's queues of a connection in bytes: 8 KiB each way plus one write or packet, in whole
/// pages.
const BYTES_PER_SOCKET: u64 = 24 << 10;
/// Maximum memory of a cached session in KiB.
const KIB_PER_SESSION: u64 = 16;
/// Freed memory that an allocator may keep, in KiB.
const SLACK: u64 = 4 << 10;

/// Returns the anonymous memory of the agent in KiB.
fn memory(agent: &Agent) -> Result<u64> {
    let status = fs::read_to_string(format!("/proc/{}/status", agent.process().id()))?;
    let line = status.lines().find_map(|line| line.strip_prefix("RssAnon:")).context("RssAnon")?;
    Ok(line.split_whitespace().next().context("a number")?.parse()?)
}

/// Returns the growth of the agent's memory during `work` in KiB.
fn grows_by(agent: &Agent, work: impl FnOnce() -> Result<()>) -> Result<u64> {
    let before = memory(agent)?;
    work()?;
    Ok(memory(agent)?.saturating_sub(before))
}

fn open_connections(agent: &Agent, count: usize) -> Result<()> {
    poll("connections to be counted", TIMEOUT, || {
        agent.metric("kirsa_connections", &[]).is_ok_and(|open| open == count as f64).then_some(())
    })
}

/// IMDS-29: a pod that fills its connection limit with endless requests (Slowloris) does not affect other pods, and is
/// served again once it closes them.
#[test]
fn slowloris_blocks_only_its_own_connections() -> Result<()> {
    let site = site()?;
    let (loris, other) = (site.pod_with_role("loris")?, site.pod_with_role("other")?);
    let agent = site.start()?;
    let first = Credentials::of(&other)?;
    let mut held = Vec::new();
    for _ in 0..CONNECTIONS {
        held.push(Wire::open(&loris, format!("GET {CREDENTIALS_PATH} HTTP/1.1\r\nHost: x\r\nX-Slow: "))?);
    }
    open_connections(&agent, CONNECTIONS)?;
    for round in 0..20 {
        // Sending a byte does not extend the deadline; slow connections are closed.
        for wire in &mut held {
            let _ = wire.send("x");
        }
        first.is_served_to(&other).with_context(|| format!("round {round}"))?;
    }
    let mut beyond = Wire::open(&loris, format!("GET {CREDENTIALS_PATH} HTTP/1.1\r\nHost: x\r\n\r\n"))?;
    ensure!(beyond.response()?.status == 200, "an idle connection is evicted for a new request");
    ensure!(agent.metric("kirsa_connections", &[])? <= CONNECTIONS as f64 + 1.0);
    drop(held);
    poll("its connections to be given back", TIMEOUT, || list(&loris).ok().filter(|list| list.status == 200))?;
    agent.stop()
}

/// Opens as many connections as allowed from each pod, each with a request head of nearly the maximum size.
fn full_buffers(pods: &[Pod]) -> Result<Vec<TcpStream>> {
    use std::io::Write;
    let head = format!("GET {CREDENTIALS_PATH} HTTP/1.1\r\nHost: x\r\nX-Long: {}", "x".repeat(14 << 10));
    let mut open = Vec::new();
    for pod in pods {
        for _ in 0..CONNECTIONS {
            let mut stream = pod.connect((METADATA, 80))?;
            stream.write_all(head.as_bytes())?;
            open.push(stream);
        }
    }
    Ok(open)
}

#[test]
fn connections_cost_no_more_than_their_buffers() -> Result<()> {
    let site = site()?;
    let pods = (0..8).map(|n| site.pod_with_role(&format!("pod{n}"))).collect::<Result<Vec<_>>>()?;
    let agent = site.start()?;
    pods.iter().try_for_each(|pod| Credentials::of(pod).map(drop))?;
    let count = pods.len() * CONNECTIONS;
    let mut open = Vec::new();
    let grown = grows_by(&agent, || {
        open = full_buffers(&pods)?;
        open_connections(&agent, count)
    })?;
    println!("{count} connections: {grown} KiB");
    ensure!(grown <= count as u64 * KIB_PER_CONNECTION + SLACK, "{count} connections: {grown} KiB");
    let all = grown * ALL_CONNECTIONS / count as u64;
    ensure!(all <= KIB_FOR_ALL_CONNECTIONS + SLACK, "all connections together would be {all} KiB");
    open.clear();
    open_connections(&agent, 0)?;
    // A second round reuses the memory of the first.
    let again = grows_by(&agent, || {
        open = full_buffers(&pods)?;
        open_connections(&agent, count)
    })?;
    ensure!(again <= grown + SLACK, "{again} KiB more");
    agent.stop()
}

/// Returns the kernel memory of a connection in bytes, parsed from `ss -m`.
fn socket_memory(line: &str) -> Option<u64> {
    let fields = line.split_once("skmem:(")?.1.split_once(')')?.0.split(',');
    // The receive queue, the send queue, reserved memory, and the backlog.
    let counted = fields.filter_map(|field| {
        let digits = field.find(|c: char| c.is_ascii_digit())?;
        let (name, value) = field.split_at(digits);
        ["r", "w", "f", "bl"].contains(&name).then(|| value.parse::<u64>().ok()).flatten()
    });
    Some(counted.sum())
}

/// Opens connections that pipeline requests as fast as possible and read nothing.
fn pipeline(pod: &Pod) -> Result<Vec<TcpStream>> {
    use std::io::Write;
    let requests = format!("GET {CREDENTIALS_PATH} HTTP/1.1\r\nHost: x\r\n\r\n").repeat(1_000);
    pod.netns().run(|| {
        let connect = || {
            let mut stream = TcpStream::connect((METADATA, 80))?;
            // A small receive buffer keeps responses in the agent's send queue.
            setsockopt(&stream, sockopt::RcvBuf, &1)?;
            stream.set_nonblocking(true)?;
            let _ = stream.write(requests.as_bytes());
            anyhow::Ok(stream)
        };
        (0..CONNECTIONS).map(|_| connect()).collect()
    })
}

/// The kernel charges socket queues to the agent's container.
#[test]
fn sockets_cost_no_more_than_their_buffers() -> Result<()> {
    use std::io::Write;
    let site = site()?;
    let pods = (0..8).map(|n| site.pod_with_role(&format!("pod{n}"))).collect::<Result<Vec<_>>>()?;
    let agent = Agent::start(&site.node, &site.options.clone().flag("--max-requests-per-source", "100000"))?;
    pods.iter().try_for_each(|pod| Credentials::of(pod).map(drop))?;
    let mut open = pods.iter().map(pipeline).collect::<Result<Vec<_>>>()?.into_iter().flatten().collect::<Vec<_>>();
    let (mut largest, mut most, mut stalled) = (0, 0, 0);
    let long = "x".repeat(64 << 10);
    poll("stalled clients to be closed", TIMEOUT, || {
        for stream in &mut open {
            let _ = stream.write(long.as_bytes());
        }
        let sockets = site.node.netns().shell("ss -tmnOH state established 'sport = :338'").ok()?;
        let sizes: Vec<u64> = sockets.lines().filter_map(socket_memory).collect();
        largest = largest.max(sizes.iter().copied().max().unwrap_or(0));
        most = most.max(sizes.iter().sum());
        stalled = stalled.max(sizes.len());
        agent.metric("kirsa_connections_closed_total", &[("reason", "stalled")]).is_ok_and(|n| n > 0.0).then_some(())
    })?;
    println!("{stalled} connections: {} KiB, {largest} bytes at most for one", most >> 10);
    ensure!(stalled >= pods.len() * CONNECTIONS, "{stalled} connections");
    ensure!(most <= stalled as u64 * BYTES_PER_SOCKET, "{most} bytes for {stalled} connections");
    agent.stop()
}

/// Adds up the maximums of SECURITY.md in KiB: all of them together must fit into the manifests' memory limit.
#[test]
fn memory_limit_covers_all_maximums() -> Result<()> {
    const REFUSED_OR_CLOSING: u64 = 64 + 64 + 16;
    const KERNEL_OBJECTS: u64 = 4;
    const ADMIN: u64 = 96 * 128;
    const SESSIONS: u64 = 250 * KIB_PER_SESSION;
    const AGENT: u64 = 24 << 10;
    let manifest = fs::read_to_string(concat!(env!("CARGO_MANIFEST_DIR"), "/daemonset/base/daemonset.yaml"))?;
    let limits = manifest.split_once("limits:").context("limits")?.1;
    let limit = limits.split_once(" memory: ").and_then(|(_, rest)| rest.split_once("Mi")).context("memory")?.0;
    let per_connection = KIB_PER_CONNECTION + (BYTES_PER_SOCKET >> 10) + KERNEL_OBJECTS;
    let sum = (ALL_CONNECTIONS + REFUSED_OR_CLOSING) * per_connection + ADMIN + SESSIONS + AGENT;
    println!("{} MiB", sum >> 10);
    ensure!(sum <= limit.parse::<u64>()? << 10, "{sum} KiB of {limit} MiB");
    Ok(())
}

/// Returns a request that differs in each round: by path, role, token lifetime or header.
fn request(kind: usize, round: usize) -> String {
    match kind {
        0 => format!("GET /latest/path{round} HTTP/1.1\r\nHost: x\r\n\r\n"),
        1 => format!("GET {CREDENTIALS_PATH}role{round} HTTP/1.1\r\nHost: x\r\n\r\n"),
        2 => format!("PUT /latest/api/token HTTP/1.1\r\nHost: x\r\n{TOKEN_TTL}: {}\r\n\r\n", round % 21_600 + 1),
        _ => format!("GET {CREDENTIALS_PATH} HTTP/1.1\r\nHost: x\r\nX-{round}: y\r\n\r\n"),
    }
}

/// Distinct requests must not accumulate memory, whether in responses, refusals or metrics.
#[test]
fn requests_leave_nothing_behind() -> Result<()> {
    let site = site()?;
    let pod = site.pod_with_role("pod")?;
    let agent = Agent::start(&site.node, &site.options.clone().flag("--max-requests-per-source", "100000"))?;
    Credentials::of(&pod)?;
    let flood = |rounds: usize| {
        for_each(&[0, 1, 2, 3], |kind| {
            let mut wire = Wire::connect(&pod)?;
            (0..rounds).try_for_each(|round| {
                wire.send(request(*kind, round))?;
                wire.response().map(drop)
            })
        })
    };
    flood(1_000)?;
    let grown = grows_by(&agent, || flood(4_000))?;
    println!("16,000 requests: {grown} KiB");
    ensure!(grown <= SLACK, "{grown} KiB");
    agent.stop()
}

/// A session consists of its document, a second form of it, and the refresh task.
#[test]
fn sessions_use_bounded_memory_and_end_with_pods() -> Result<()> {
    const SESSIONS: usize = 400;
    let site = site()?;
    let anybody = site.pod_with_role("anybody")?;
    let options = site.options.clone().flag("--exchange-rate", "1000").flag("--exchange-burst", "1000");
    let agent = Agent::start(&site.node, &options)?;
    Credentials::of(&anybody)?;
    let entry = |number: usize| {
        let name = format!("session{number}");
        site.trust(&site.arn(&name), &name);
        let token = site.write_token(&name, site.issuer.pod_token("default", &name, &name, &name)?)?;
        let mut entry = Workload::new(&anybody, &name).role(&site.arn(&name), &token);
        (entry.pod, entry.addresses) = (name, vec![[10, 99, (number / 250) as u8, (number % 250) as u8].into()]);
        anyhow::Ok(entry)
    };
    let entries = (0..SESSIONS).map(entry).collect::<Result<Vec<_>>>()?;
    let sessions = |count: usize| {
        poll("sessions", TIMEOUT, || {
            let held = agent.admin("/debug/sessions").ok()?.body.matches("\"ASIA").count();
            (held == count).then_some(())
        })
    };
    let fetch = || {
        workloads::write(&site.workloads(), &entries)?;
        sessions(SESSIONS)
    };
    let grown = grows_by(&agent, fetch)?;
    println!("{SESSIONS} sessions: {grown} KiB");
    ensure!(grown <= SESSIONS as u64 * KIB_PER_SESSION + SLACK, "{grown} KiB");
    // New sessions reuse the memory of the former ones.
    workloads::write(&site.workloads(), &[])?;
    sessions(0)?;
    let again = grows_by(&agent, fetch)?;
    ensure!(again <= SLACK + SESSIONS as u64 * KIB_PER_SESSION / 2, "{again} KiB more");
    agent.stop()
}
