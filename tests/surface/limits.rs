//! Limits per pod: a pod that exceeds them does not affect other pods.

use std::io::Write;
use std::net::{Ipv4Addr, TcpStream};

use anyhow::{Result, ensure};
use lab::agent::{Agent, field};
use lab::http::{CREDENTIALS_PATH, Client, Wire};
use lab::net::Pod;
use lab::poll::poll;
use lab::sts::{Effect, Fault};

use super::{TIMEOUT, credentials, get, has_credentials_of, role, site};

fn request() -> String {
    format!("GET {CREDENTIALS_PATH} HTTP/1.1\r\nHost: 169.254.169.254\r\n\r\n")
}

/// A connection with a request in flight is never evicted for a new one.
#[test]
fn busy_connections_are_kept_and_more_get_503() -> Result<()> {
    let site = site()?;
    let (greedy, other) = (site.pod_with_role("greedy")?, site.pod_with_role("other")?);
    site.sts.inject(Fault::always(Effect::NoAnswer).of_role(&site.arn("greedy")));
    let agent = Agent::start(&site.node, &site.options.clone().flag("--max-connections-per-source", "3"))?;
    ensure!(get(&other, &credentials("other"))?.status == 200);
    let held = format!("GET {} HTTP/1.1\r\nHost: x\r\n\r\n", credentials("greedy"));
    let mut open = (0..3).map(|_| Wire::open(&greedy, &held)).collect::<Result<Vec<_>>>()?;
    poll("the requests to be held", TIMEOUT, || {
        agent.metric("kirsa_cache_misses_total", &[]).is_ok_and(|misses| misses >= 3.0).then_some(())
    })?;
    for refused in 1..=2 {
        let mut wire = Wire::open(&greedy, request())?;
        let response = wire.response()?;
        ensure!(response.status == 503 && response.body.contains("503 - Service Unavailable"), "{response:?}");
        ensure!(response.header("connection") == Some("close"), "{response:?}");
        wire.closed()?;
        let counted = agent.metric("kirsa_connections_refused_total", &[("reason", "per_source")])?;
        ensure!(counted == f64::from(refused), "{counted}");
        has_credentials_of(&site, "other", &get(&other, &credentials("other"))?)?;
    }
    let refused = agent.wait_for_log(|entry| field(entry, "reason") == Some("too_many_connections"))?;
    ensure!(field(&refused, "pod") == Some("greedy"), "{refused}");
    for wire in &mut open {
        let response = wire.response()?;
        ensure!(
            response.status == 503 && response.header("connection").is_none(),
            "a busy connection was closed: {response:?}"
        );
    }
    // Now the connections are idle, and one can be evicted.
    site.sts.heal();
    poll("the session", TIMEOUT, || {
        agent.admin("/debug/sessions").is_ok_and(|page| page.body.matches("\"ASIA").count() == 2).then_some(())
    })?;
    ensure!(get(&greedy, CREDENTIALS_PATH)?.status == 200);
    ensure!(agent.metric("kirsa_connections_closed_total", &[("reason", "per_source")])? >= 1.0);
    ensure!(open.iter().filter(|wire| wire.is_open()).count() >= 2);
    agent.stop()
}

/// IMDS-29
#[test]
fn tight_loop_is_rate_limited_per_source() -> Result<()> {
    let site = site()?;
    let (hot, quiet) = (site.pod_with_role("hot")?, site.pod_with_role("quiet")?);
    let agent = Agent::start(&site.node, &site.options.clone().flag("--max-requests-per-source", "20"))?;
    let mut statuses = Vec::new();
    // Pipelined over several connections, so that no request waits for the previous response.
    let mut wires = (0..10).map(|_| Wire::open(&hot, request().repeat(10))).collect::<Result<Vec<_>>>()?;
    ensure!(get(&quiet, CREDENTIALS_PATH)?.body == role("quiet"));
    for wire in &mut wires {
        for _ in 0..10 {
            statuses.push(wire.response()?.status);
        }
    }
    ensure!(statuses.iter().all(|status| [200, 503].contains(status)), "{statuses:?}");
    ensure!(statuses.contains(&200) && statuses.contains(&503), "{statuses:?}");
    let refused = agent.metric("kirsa_refusals_total", &[("reason", "too_many_requests")])?;
    ensure!(refused as usize == statuses.iter().filter(|status| **status == 503).count());
    agent.stop()
}

/// If Prometheus can reach the admin port, so can every pod: it must see only counts, and must not block others.
#[test]
fn pods_cannot_block_or_inspect_admin_port() -> Result<()> {
    let site = site()?;
    let reader = site.pod_with_role("reader")?;
    let agent = Agent::start(&site.node, &site.options.clone().flag("--admin-address", "[::]:8182"))?;
    ensure!(get(&reader, &credentials("reader"))?.status == 200);
    let admin = (site.node.host_ip(), 8182);
    let request = |path: &str| Client::new(reader.netns(), admin).get(path).send();
    let metrics = request("/metrics")?;
    ensure!(metrics.status == 200 && !metrics.body.contains("reader"), "{metrics:?}");
    let sessions = request("/debug/sessions")?;
    ensure!(sessions.status == 403 && !sessions.body.contains("reader"), "{sessions:?}");
    ensure!(agent.admin("/debug/sessions")?.body.contains("reader-role"), "processes of the node have access");

    let crowd = (0..8).map(|number| site.pod(&format!("crowd{number}"))).collect::<Result<Vec<_>>>()?;
    for sent in ["", "GET /metrics HTTP/1.1\r\nX-Slow: ", "GET /metrics HTTP/1.1\r\nHost: x\r\n\r\n"] {
        let held = crowd.iter().map(|pod| hold(pod, admin, sent)).collect::<Result<Vec<_>>>()?;
        let mut prometheus = Client::new(reader.netns(), admin);
        for _ in 0..3 {
            ensure!(
                prometheus.get("/metrics").send()?.status == 200,
                "the source with most connections is evicted first"
            );
        }
        ensure!(agent.admin("/healthz")?.status == 200, "connections of the node have their own limit");
        drop(held);
    }
    agent.stop()
}

/// Opens as many connections as the admin port allows in total, and sends these bytes on each.
fn hold(pod: &Pod, admin: (Ipv4Addr, u16), sent: &str) -> Result<Vec<TcpStream>> {
    let connect = || {
        let mut stream = TcpStream::connect(admin)?;
        // Connections above the limit are closed at once.
        let _ = stream.write_all(sent.as_bytes());
        Ok(stream)
    };
    pod.netns().run(|| (0..32).map(|_| connect()).collect())
}
