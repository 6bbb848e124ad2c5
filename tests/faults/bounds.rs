//! What one pod can make the agent hold, and that it takes nothing from the others: the bounds that SECURITY.md states.

use std::fs;
use std::net::TcpStream;

use anyhow::{Context, Result, ensure};
use lab::agent::Agent;
use lab::http::{CREDENTIALS_PATH, TOKEN_TTL, Wire};
use lab::net::{METADATA, Pod};
use lab::poll::poll;
use lab::workloads::{self, Workload};
use nix::sys::socket::{setsockopt, sockopt};

use super::{Held, PATIENCE, each, list, site};

/// Per source, by default.
const CONNECTIONS: usize = 64;
/// hyper's buffers and the task of a connection, at most, in KiB.
const OF_A_CONNECTION: u64 = 32;
/// Of all sources, by default; and what they may cost, in KiB.
const ALL_CONNECTIONS: u64 = 2_048;
const OF_ALL_CONNECTIONS: u64 = 64 << 10;
/// What the kernel queues for one connection at most, in bytes: 8 KiB each way, one write or packet more, whole pages.
const OF_A_SOCKET: u64 = 24 << 10;
/// Of one that is held, in KiB.
const OF_A_SESSION: u64 = 16;
/// What an allocator may keep of what was given back, in KiB.
const SLACK: u64 = 4 << 10;

/// In KiB, without the binary's own pages.
fn memory(agent: &Agent) -> Result<u64> {
    let status = fs::read_to_string(format!("/proc/{}/status", agent.process().id()))?;
    let line = status.lines().find_map(|line| line.strip_prefix("RssAnon:")).context("RssAnon")?;
    Ok(line.split_whitespace().next().context("a number")?.parse()?)
}

/// By how much the agent's memory is larger after that, in KiB.
fn grows_by(agent: &Agent, what: impl FnOnce() -> Result<()>) -> Result<u64> {
    let before = memory(agent)?;
    what()?;
    Ok(memory(agent)?.saturating_sub(before))
}

fn open_connections(agent: &Agent, count: usize) -> Result<()> {
    poll("connections to be counted", PATIENCE, || {
        agent.metric("kirsa_connections", &[]).is_ok_and(|open| open == count as f64).then_some(())
    })
}

/// IMDS-29: a pod that holds all its connections, each with a request that does not end, keeps no other pod from an
/// answer, and gets its own back when it lets go.
#[test]
fn a_slow_loris_holds_its_own_connections_and_nobody_elses() -> Result<()> {
    let site = site()?;
    let (loris, other) = (site.pod_with_role("loris")?, site.pod_with_role("other")?);
    let agent = site.start()?;
    let first = Held::by(&other)?;
    let mut held = Vec::new();
    for _ in 0..CONNECTIONS {
        held.push(Wire::open(&loris, format!("GET {CREDENTIALS_PATH} HTTP/1.1\r\nHost: x\r\nX-Slow: "))?);
    }
    open_connections(&agent, CONNECTIONS)?;
    for round in 0..20 {
        // A byte each, which gains them no time: those that are slow for too long are closed.
        for wire in &mut held {
            let _ = wire.send("x");
        }
        first.is_served_to(&other).with_context(|| format!("round {round}"))?;
    }
    let mut beyond = Wire::open(&loris, format!("GET {CREDENTIALS_PATH} HTTP/1.1\r\nHost: x\r\n\r\n"))?;
    ensure!(beyond.response()?.status == 200, "one that only holds its place makes room for one that asks");
    ensure!(agent.metric("kirsa_connections", &[])? <= CONNECTIONS as f64 + 1.0);
    drop(held);
    poll("its connections to be given back", PATIENCE, || list(&loris).ok().filter(|list| list.status == 200))?;
    agent.stop()
}

/// Heads as long as they may be, on as many connections as one pod may have, from several pods at once.
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
    pods.iter().try_for_each(|pod| Held::by(pod).map(drop))?;
    let count = pods.len() * CONNECTIONS;
    let mut open = Vec::new();
    let grown = grows_by(&agent, || {
        open = full_buffers(&pods)?;
        open_connections(&agent, count)
    })?;
    println!("{count} connections: {grown} KiB");
    ensure!(grown <= count as u64 * OF_A_CONNECTION + SLACK, "{count} connections: {grown} KiB");
    let all = grown * ALL_CONNECTIONS / count as u64;
    ensure!(all <= OF_ALL_CONNECTIONS + SLACK, "all connections together would be {all} KiB");
    open.clear();
    open_connections(&agent, 0)?;
    // The same again needs nothing that the first time did not.
    let again = grows_by(&agent, || {
        open = full_buffers(&pods)?;
        open_connections(&agent, count)
    })?;
    ensure!(again <= grown + SLACK, "{again} KiB more");
    agent.stop()
}

/// The kernel's memory of one of the agent's connections, in bytes, as `ss -m` shows it.
fn socket_memory(line: &str) -> Option<u64> {
    let fields = line.split_once("skmem:(")?.1.split_once(')')?.0.split(',');
    // Received and not read, sent and not acknowledged, reserved, and the backlog.
    let counted = fields.filter_map(|field| {
        let digits = field.find(|c: char| c.is_ascii_digit())?;
        let (name, value) = field.split_at(digits);
        ["r", "w", "f", "bl"].contains(&name).then(|| value.parse::<u64>().ok()).flatten()
    });
    Some(counted.sum())
}

/// Clients that send request upon request, as fast as they can, and read nothing.
fn pipeline(pod: &Pod) -> Result<Vec<TcpStream>> {
    use std::io::Write;
    let requests = format!("GET {CREDENTIALS_PATH} HTTP/1.1\r\nHost: x\r\n\r\n").repeat(1_000);
    pod.netns().run(|| {
        let connect = || {
            let mut stream = TcpStream::connect((METADATA, 80))?;
            // What the client's own kernel takes is not the agent's.
            setsockopt(&stream, sockopt::RcvBuf, &1)?;
            stream.set_nonblocking(true)?;
            let _ = stream.write(requests.as_bytes());
            anyhow::Ok(stream)
        };
        (0..CONNECTIONS).map(|_| connect()).collect()
    })
}

/// The kernel charges what it queues for the agent's sockets to the agent's container.
#[test]
fn sockets_cost_no_more_than_their_buffers() -> Result<()> {
    use std::io::Write;
    let site = site()?;
    let pods = (0..8).map(|n| site.pod_with_role(&format!("pod{n}"))).collect::<Result<Vec<_>>>()?;
    let agent = Agent::start(&site.node, &site.options.clone().flag("--max-requests-per-source", "100000"))?;
    pods.iter().try_for_each(|pod| Held::by(pod).map(drop))?;
    let mut open = pods.iter().map(pipeline).collect::<Result<Vec<_>>>()?.into_iter().flatten().collect::<Vec<_>>();
    let (mut largest, mut most, mut stalled) = (0, 0, 0);
    let long = "x".repeat(64 << 10);
    poll("clients to be closed that do not read", PATIENCE, || {
        for stream in &mut open {
            let _ = stream.write(long.as_bytes());
        }
        let sockets = site.node.netns().shell("ss -tmnOH state established 'sport = :338'").ok()?;
        let each: Vec<u64> = sockets.lines().filter_map(socket_memory).collect();
        largest = largest.max(each.iter().copied().max().unwrap_or(0));
        most = most.max(each.iter().sum());
        stalled = stalled.max(each.len());
        agent.metric("kirsa_connections_closed_total", &[("reason", "stalled")]).is_ok_and(|n| n > 0.0).then_some(())
    })?;
    println!("{stalled} connections: {} KiB, {largest} bytes at most for one", most >> 10);
    ensure!(stalled >= pods.len() * CONNECTIONS, "{stalled} connections");
    ensure!(most <= stalled as u64 * OF_A_SOCKET, "{most} bytes for {stalled} connections");
    agent.stop()
}

/// The sum in SECURITY.md, in KiB: the manifests' limit must hold all of it at once.
#[test]
fn memory_limit_holds_everything_at_once() -> Result<()> {
    const REFUSED_OR_CLOSING: u64 = 64 + 64 + 16;
    const KERNEL_OBJECTS: u64 = 4;
    const ADMIN: u64 = 96 * 128;
    const SESSIONS: u64 = 250 * OF_A_SESSION;
    const AGENT: u64 = 24 << 10;
    let manifest = fs::read_to_string(concat!(env!("CARGO_MANIFEST_DIR"), "/daemonset/base/daemonset.yaml"))?;
    let limits = manifest.split_once("limits:").context("limits")?.1;
    let limit = limits.split_once(" memory: ").and_then(|(_, rest)| rest.split_once("Mi")).context("memory")?.0;
    let of_a_connection = OF_A_CONNECTION + (OF_A_SOCKET >> 10) + KERNEL_OBJECTS;
    let sum = (ALL_CONNECTIONS + REFUSED_OR_CLOSING) * of_a_connection + ADMIN + SESSIONS + AGENT;
    println!("{} MiB", sum >> 10);
    ensure!(sum <= limit.parse::<u64>()? << 10, "{sum} KiB of {limit} MiB");
    Ok(())
}

/// One request of each kind, all different: paths, roles, lifetimes of tokens, headers.
fn request(kind: usize, round: usize) -> String {
    match kind {
        0 => format!("GET /latest/path{round} HTTP/1.1\r\nHost: x\r\n\r\n"),
        1 => format!("GET {CREDENTIALS_PATH}role{round} HTTP/1.1\r\nHost: x\r\n\r\n"),
        2 => format!("PUT /latest/api/token HTTP/1.1\r\nHost: x\r\n{TOKEN_TTL}: {}\r\n\r\n", round % 21_600 + 1),
        _ => format!("GET {CREDENTIALS_PATH} HTTP/1.1\r\nHost: x\r\nX-{round}: y\r\n\r\n"),
    }
}

/// Whatever pods ask for, and however often: no answer, refusal or metric keeps anything of it.
#[test]
fn requests_leave_nothing_behind() -> Result<()> {
    let site = site()?;
    let pod = site.pod_with_role("pod")?;
    let agent = Agent::start(&site.node, &site.options.clone().flag("--max-requests-per-source", "100000"))?;
    Held::by(&pod)?;
    let flood = |rounds: usize| {
        each(&[0, 1, 2, 3], |kind| {
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

/// A session is a document, its twin, and what keeps it.
#[test]
fn sessions_cost_what_is_said_of_them_and_go_with_their_pods() -> Result<()> {
    const SESSIONS: usize = 400;
    let site = site()?;
    let anybody = site.pod_with_role("anybody")?;
    let options = site.options.clone().flag("--exchange-rate", "1000").flag("--exchange-burst", "1000");
    let agent = Agent::start(&site.node, &options)?;
    Held::by(&anybody)?;
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
        poll("sessions", PATIENCE, || {
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
    ensure!(grown <= SESSIONS as u64 * OF_A_SESSION + SLACK, "{grown} KiB");
    // Others in their place take no more.
    workloads::write(&site.workloads(), &[])?;
    sessions(0)?;
    let again = grows_by(&agent, fetch)?;
    ensure!(again <= SLACK + SESSIONS as u64 * OF_A_SESSION / 2, "{again} KiB more");
    agent.stop()
}
