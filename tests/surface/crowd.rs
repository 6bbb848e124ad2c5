//! Many connections at once: clients that hold idle connections lose them; other pods are not affected.

use std::net::TcpStream;
use std::sync::Barrier;
use std::thread;

use anyhow::{Context, Result, ensure};
use lab::agent::Agent;
use lab::http::{CREDENTIALS_PATH, TOKEN, TOKEN_TTL, Wire};
use lab::net::{METADATA, METADATA6, Pod};
use lab::poll::poll;
use lab::site::Site;

use super::{TIMEOUT, credentials, get, has_credentials_of, role, site};

/// The default of --max-connections.
const MAX_CONNECTIONS: f64 = 2_048.0;
/// The default of --max-connections-per-source.
const MAX_PER_SOURCE: usize = 64;
/// One more than needed to use all connections.
const SOURCES: usize = 33;

fn crowd(site: &Site) -> Result<Vec<Pod>> {
    (0..SOURCES).map(|number| site.pod(&format!("crowd{number}"))).collect()
}

/// Opens as many connections as one source may have, and sends these bytes on each.
fn open(pod: &Pod, sent: &str) -> Result<Vec<TcpStream>> {
    use std::io::Write;
    let connect = || {
        let mut stream = TcpStream::connect((METADATA, 80))?;
        stream.write_all(sent.as_bytes())?;
        Ok(stream)
    };
    let open: std::io::Result<Vec<TcpStream>> = pod.netns().run(|| (0..MAX_PER_SOURCE).map(|_| connect()).collect());
    open.with_context(|| format!("connections of {}", pod.name()))
}

fn closed(agent: &Agent, reason: &str) -> Result<f64> {
    agent.metric("kirsa_connections_closed_total", &[("reason", reason)])
}

/// Uses all connections from other pods, and checks that the victim still gets credentials.
fn assert_others_served(sent: &str) -> Result<(Agent, Vec<TcpStream>)> {
    let site = site()?;
    let victim = site.pod_with_role("victim")?;
    let crowd = crowd(&site)?;
    let agent = site.start()?;
    ensure!(get(&victim, &credentials("victim"))?.status == 200);
    let mut held = Vec::new();
    for pod in &crowd {
        held.extend(open(pod, sent)?);
    }
    poll("all connections to be used", TIMEOUT, || {
        let used = agent.metric("kirsa_connections", &[]).is_ok_and(|open| open >= MAX_CONNECTIONS);
        // On a slow machine the first ones may time out before the last one is open.
        (used || closed(&agent, "silent").is_ok_and(|count| count > 0.0)).then_some(())
    })?;
    for _ in 0..10 {
        has_credentials_of(&site, "victim", &get(&victim, &credentials("victim"))?)?;
    }
    ensure!(agent.metric("kirsa_refusals_total", &[("reason", "too_many_connections")]).unwrap_or(0.0) == 0.0);
    Ok((agent, held))
}

#[test]
fn silent_connections_do_not_block_others() -> Result<()> {
    let (agent, held) = assert_others_served("")?;
    poll("silent connections to be closed", TIMEOUT, || {
        agent.metric("kirsa_connections", &[]).is_ok_and(|open| open <= 1.0).then_some(())
    })?;
    ensure!(closed(&agent, "silent")? > 0.0);
    drop(held);
    agent.stop()
}

#[test]
fn partial_requests_do_not_block_others() -> Result<()> {
    let (agent, held) = assert_others_served("GET /latest/ HTTP/1.1\r\nX-Slow: ")?;
    drop(held);
    agent.stop()
}

#[test]
fn idle_connections_do_not_block_others() -> Result<()> {
    let (agent, held) = assert_others_served("GET /latest/none HTTP/1.1\r\nHost: x\r\n\r\n")?;
    ensure!(closed(&agent, "total")? > 0.0, "no idle connection was evicted");
    drop(held);
    agent.stop()
}

/// A dual-stack pod has one quota for both addresses.
#[test]
fn both_addresses_of_a_pod_count_as_one() -> Result<()> {
    let site = site()?;
    let pod = site.pod_with_role("dual")?;
    let agent = Agent::start(&site.node, &site.options.clone().flag("--max-connections-per-source", "2"))?;
    ensure!(get(&pod, &credentials("dual"))?.status == 200);
    poll("that connection to end", TIMEOUT, || {
        agent.metric("kirsa_connections", &[]).is_ok_and(|open| open == 0.0).then_some(())
    })?;
    let mut addresses = vec![METADATA.into()];
    addresses.extend(pod.ip6().map(|_| std::net::IpAddr::from(METADATA6)));
    let mut open = Vec::new();
    for address in addresses.iter().cycle().take(4) {
        let mut wire = Wire::connect_to(&pod, (*address, 80))?;
        wire.send(format!("GET {CREDENTIALS_PATH} HTTP/1.1\r\nHost: x\r\n\r\n"))?;
        ensure!(wire.response()?.body == role("dual"));
        open.push(wire);
    }
    ensure!(closed(&agent, "per_source")? == 2.0);
    open[0].closed()?;
    open[1].closed()?;
    ensure!(open[2].is_open() && open[3].is_open());
    agent.stop()
}

/// botocore in a forked process: one persistent connection.
struct Worker<'a> {
    pod: &'a Pod,
    kept: Option<Wire>,
}

impl Worker<'_> {
    /// Sends a request once, on the persistent connection unless the server has closed it (urllib3 checks that).
    fn request(&mut self, head: &str) -> Result<String> {
        let kept = self.kept.take().filter(|wire| wire.is_open());
        let mut wire = kept.map_or_else(|| Wire::connect(self.pod), Ok)?;
        wire.send(format!("{head}\r\nHost: 169.254.169.254\r\n\r\n"))?;
        let response = wire.response()?;
        self.kept = (response.header("connection") != Some("close")).then_some(wire);
        response.ok().with_context(|| head.to_owned())
    }

    fn credentials(&mut self) -> Result<()> {
        let token = self.request(&format!("PUT /latest/api/token HTTP/1.1\r\n{TOKEN_TTL}: 21600"))?;
        let get = |path: &str| format!("GET {CREDENTIALS_PATH}{path} HTTP/1.1\r\n{TOKEN}: {token}");
        ensure!(self.request(&get(""))? == role("forks"));
        ensure!(self.request(&get(&role("forks")))?.contains("\"Success\""));
        Ok(())
    }
}

#[test]
fn forked_workers_of_one_pod_all_get_credentials() -> Result<()> {
    const WORKERS: usize = 96;
    let site = site()?;
    let pod = site.pod_with_role("forks")?;
    let agent = site.start()?;
    ensure!(get(&pod, &credentials("forks"))?.status == 200);
    let done = Barrier::new(WORKERS);
    let work = |number: usize| {
        let mut worker = Worker { pod: &pod, kept: None };
        let first = worker.credentials().with_context(|| format!("worker {number}"));
        // Every worker keeps its connection until all have their credentials.
        done.wait();
        let second = worker.credentials().with_context(|| format!("worker {number}, later"));
        done.wait();
        first.and(second)
    };
    thread::scope(|scope| {
        let workers: Vec<_> = (0..WORKERS).map(|number| scope.spawn(move || work(number))).collect();
        workers.into_iter().try_for_each(|worker| worker.join().expect("a worker's own failures are errors"))
    })?;
    ensure!(closed(&agent, "per_source")? > 0.0);
    agent.stop()
}
