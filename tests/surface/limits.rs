//! What one pod may take, and that it takes nothing from the others.

use std::io::Write;
use std::net::{Ipv4Addr, TcpStream};

use anyhow::{Result, ensure};
use lab::agent::{Agent, field};
use lab::http::{CREDENTIALS_PATH, Client, Wire};
use lab::net::Pod;
use lab::poll::poll;
use lab::sts::{Effect, Fault};

use super::{PATIENCE, credentials, get, opens_the_session_of, role, site};

fn request() -> String {
    format!("GET {CREDENTIALS_PATH} HTTP/1.1\r\nHost: 169.254.169.254\r\n\r\n")
}

/// While all connections of a pod are being answered, none of them is given up for one more.
#[test]
fn busy_connections_are_kept_and_more_get_503() -> Result<()> {
    let site = site()?;
    let (greedy, other) = (site.pod_with_role("greedy")?, site.pod_with_role("other")?);
    site.sts.inject(Fault::always(Effect::NoAnswer).of_role(&site.arn("greedy")));
    let agent = Agent::start(&site.node, &site.options.clone().flag("--max-connections-per-source", "3"))?;
    ensure!(get(&other, &credentials("other"))?.status == 200);
    let held = format!("GET {} HTTP/1.1\r\nHost: x\r\n\r\n", credentials("greedy"));
    let mut open = (0..3).map(|_| Wire::open(&greedy, &held)).collect::<Result<Vec<_>>>()?;
    poll("the requests to be held", PATIENCE, || {
        agent.metric("kirsa_cache_misses_total", &[]).is_ok_and(|misses| misses >= 3.0).then_some(())
    })?;
    for refused in 1..=2 {
        let mut wire = Wire::open(&greedy, request())?;
        let answer = wire.response()?;
        ensure!(answer.status == 503 && answer.body.contains("503 - Service Unavailable"), "{answer:?}");
        ensure!(answer.header("connection") == Some("close"), "{answer:?}");
        wire.closed()?;
        let counted = agent.metric("kirsa_connections_refused_total", &[("reason", "per_source")])?;
        ensure!(counted == f64::from(refused), "{counted}");
        opens_the_session_of(&site, "other", &get(&other, &credentials("other"))?)?;
    }
    let refused = agent.wait_for_log(|entry| field(entry, "reason") == Some("too_many_connections"))?;
    ensure!(field(&refused, "pod") == Some("greedy"), "{refused}");
    for wire in &mut open {
        let answer = wire.response()?;
        ensure!(answer.status == 503 && answer.header("connection").is_none(), "held to the end: {answer:?}");
    }
    // Now that they are idle, one of them makes room.
    site.sts.heal();
    poll("the role", PATIENCE, || get(&greedy, CREDENTIALS_PATH).is_ok_and(|list| list.status == 200).then_some(()))?;
    ensure!(agent.metric("kirsa_connections_closed_total", &[("reason", "per_source")])? >= 1.0);
    ensure!(open.iter().filter(|wire| wire.is_open()).count() >= 2);
    agent.stop()
}

/// IMDS-29
#[test]
fn a_tight_loop_is_delayed_or_told_to_come_back_and_no_other_pod_waits() -> Result<()> {
    let site = site()?;
    let (hot, quiet) = (site.pod_with_role("hot")?, site.pod_with_role("quiet")?);
    let agent = Agent::start(&site.node, &site.options.clone().flag("--max-requests-per-source", "20"))?;
    let mut statuses = Vec::new();
    // Pipelined, so that none of them waits for the answer to the one before; over several connections at once.
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

/// Where Prometheus is to reach the admin port, every pod can; it learns counts there, and cannot keep others out.
#[test]
fn what_pods_can_read_of_the_admin_port_names_nobody_and_they_cannot_keep_the_node_out() -> Result<()> {
    let site = site()?;
    let reader = site.pod_with_role("reader")?;
    let agent = Agent::start(&site.node, &site.options.clone().flag("--admin-address", "[::]:8182"))?;
    ensure!(get(&reader, &credentials("reader"))?.status == 200);
    let admin = (site.node.host_ip(), 8182);
    let ask = |path: &str| Client::new(reader.netns(), admin).get(path).send();
    let metrics = ask("/metrics")?;
    ensure!(metrics.status == 200 && !metrics.body.contains("reader"), "{metrics:?}");
    let slots = ask("/debug/sessions")?;
    ensure!(slots.status == 403 && !slots.body.contains("reader"), "{slots:?}");
    ensure!(agent.admin("/debug/sessions")?.body.contains("reader-role"), "the node's own processes may");

    let crowd = (0..8).map(|number| site.pod(&format!("crowd{number}"))).collect::<Result<Vec<_>>>()?;
    for sent in ["", "GET /metrics HTTP/1.1\r\nX-Slow: ", "GET /metrics HTTP/1.1\r\nHost: x\r\n\r\n"] {
        let held = crowd.iter().map(|pod| hold(pod, admin, sent)).collect::<Result<Vec<_>>>()?;
        let mut prometheus = Client::new(reader.netns(), admin);
        for _ in 0..3 {
            ensure!(prometheus.get("/metrics").send()?.status == 200, "places are given up by whoever holds most");
        }
        ensure!(agent.admin("/healthz")?.status == 200, "the kubelet has places of its own");
        drop(held);
    }
    agent.stop()
}

/// Opens as many connections as the admin port has in all, each having sent these bytes.
fn hold(pod: &Pod, admin: (Ipv4Addr, u16), sent: &str) -> Result<Vec<TcpStream>> {
    let connect = || {
        let mut stream = TcpStream::connect(admin)?;
        // What is above the limit is closed at once.
        let _ = stream.write_all(sent.as_bytes());
        Ok(stream)
    };
    pod.netns().run(|| (0..32).map(|_| connect()).collect())
}
