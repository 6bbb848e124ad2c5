//! Hot restart with two agents on one node: the new agent takes over and no request fails (IMDS-30). If the new agent
//! fails, the old one serves again.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use lab::agent::{Agent, field};
use lab::http::{CREDENTIALS_PATH, Client, TOKEN};
use lab::net::{METADATA, Pod};
use lab::netns::Netns;
use lab::poll::poll;
use lab::site::Site;

lab::enter!();

/// Maximum time for anything that the agent does on a busy machine.
const TIMEOUT: Duration = Duration::from_secs(20);
const TOOK_OVER: &str = "hot restart: took over from the old agent";
const QUIESCED: &str = "hot restart: the new agent serves this node's pods now";
const PASSED: &str = "hot restart: listening sockets passed to the new agent, which syncs";
const RESUMED: &str = "hot restart: the new agent exited; this agent serves again";

fn site() -> Result<Site> {
    Site::new(env!("CARGO_BIN_EXE_kirsa"))
}

fn wait_for_message(agent: &Agent, message: &str) -> Result<()> {
    agent.wait_for_log(|entry| field(entry, "message") == Some(message)).map(drop)
}

fn has_logged(agent: &Agent, message: &str) -> bool {
    agent.log().iter().any(|entry| field(entry, "message") == Some(message))
}

/// Starts another agent on the same node, and waits until it has taken over and is ready.
fn start_successor(site: &Site) -> Result<Agent> {
    let next = Agent::spawn(&site.node, &site.options)?;
    wait_for_message(&next, TOOK_OVER)?;
    next.wait_ready()?;
    Ok(next)
}

/// Sends one request without retries on a new connection.
fn request(netns: &Arc<Netns>) -> Result<()> {
    let answer = Client::new(netns, (METADATA, 80)).get(&format!("{CREDENTIALS_PATH}reader-role")).send()?;
    ensure!(answer.status == 200, "{answer:?}");
    Ok(())
}

fn check_served(pod: &Pod) -> Result<()> {
    request(pod.netns())
}

/// Sends requests until `stop` is set. Returns their number, or the first failure.
fn send_load(pod: &Pod, stop: &Arc<AtomicBool>) -> thread::JoinHandle<Result<usize>> {
    let (netns, stop) = (pod.netns().clone(), stop.clone());
    thread::spawn(move || {
        let mut sent = 0;
        while !stop.load(Ordering::SeqCst) {
            request(&netns).with_context(|| format!("request {sent}"))?;
            sent += 1;
        }
        Ok(sent)
    })
}

/// IMDS-30, IMDS-7: no request fails, and IMDS tokens stay valid.
#[test]
fn upgrade_under_load_fails_no_request() -> Result<()> {
    let mut site = site()?;
    // One pod sends all requests.
    site.options = site.options.flag("--max-requests-per-source", "100000");
    let reader = site.pod_with_role("reader")?;
    let mut agent = site.start()?;
    let token = reader.imds().put_token(21_600)?;
    check_served(&reader)?;
    let stop = Arc::new(AtomicBool::new(false));
    let loads: Vec<_> = (0..4).map(|_| send_load(&reader, &stop)).collect();
    for _ in 0..3 {
        let next = start_successor(&site)?;
        wait_for_message(&agent, QUIESCED)?;
        agent.stop()?;
        agent = next;
        check_served(&reader)?;
    }
    stop.store(true, Ordering::SeqCst);
    for load in loads {
        let sent = load.join().expect("the load does not panic")?;
        ensure!(sent > 20, "{sent} requests prove nothing");
    }
    let answer = reader.imds().get(CREDENTIALS_PATH).header(TOKEN, &token).send()?;
    ensure!(answer.status == 200, "{answer:?}");
    ensure!(agent.metric("kirsa_redirect_repaired_total", &[])? == 0.0, "the new agent found its redirect intact");
    site.no_pod_got_outside()
}

#[test]
fn agent_resumes_if_successor_is_killed() -> Result<()> {
    let site = site()?;
    let reader = site.pod_with_role("reader")?;
    let agent = site.start()?;
    let next = start_successor(&site)?;
    wait_for_message(&agent, QUIESCED)?;
    next.kill()?;
    wait_for_message(&agent, RESUMED)?;
    check_served(&reader)?;
    ensure!(agent.admin("/readyz")?.status == 200);
    // The next successor can take over too.
    let next = start_successor(&site)?;
    agent.stop()?;
    check_served(&reader)?;
    next.stop()?;
    site.no_pod_got_outside()
}

/// A new version that cannot sync this node's pods gets no connections. Its own pod is not ready and the old one is, so
/// the rollout waits.
#[test]
fn unsynced_successor_gets_no_connections() -> Result<()> {
    let mut site = site()?;
    let sockets = ["old.sock", "new.sock"].map(|name| site.node.state().join(name));
    // A killed process leaves its socket file.
    drop(std::os::unix::net::UnixListener::bind(&sockets[0])?);
    site.options = site.options.flag("--admin-socket", &sockets[0]);
    let reader = site.pod_with_role("reader")?;
    let agent = site.start()?;
    // No API server listens there.
    let kubeconfig = site.node.state().join("kubeconfig");
    let text = r#"{"apiVersion": "v1", "kind": "Config", "current-context": "x",
        "clusters": [{"name": "x", "cluster": {"server": "http://127.0.0.1:1"}}],
        "contexts": [{"name": "x", "context": {"cluster": "x", "user": "x"}}],
        "users": [{"name": "x", "user": {"token": "x"}}]}"#;
    std::fs::write(&kubeconfig, text)?;
    let options = lab::agent::Options::new(env!("CARGO_BIN_EXE_kirsa")).flag("--kubeconfig", &kubeconfig);
    let options = options.flag("--admin-socket", &sockets[1]);
    let next = Agent::spawn(&site.node, &options)?;
    wait_for_message(&agent, PASSED)?;
    poll("the new agent's pending conditions", TIMEOUT, || {
        agent.admin("/readyz").is_ok_and(|answer| answer.body.contains("pods")).then_some(())
    })?;
    for (socket, check, expected) in
        [(0, "ready", "ready\n"), (0, "live", "ok\n"), (1, "ready", "pods\nservice accounts\n"), (1, "live", "ok\n")]
    {
        let output = Agent::probe(&site.node, &site.options, &sockets[socket], check)?;
        let healthy = (socket, check) != (1, "ready");
        ensure!(output.status.code() == Some(i32::from(!healthy)), "{check} at {socket}: {output:?}");
        let text = String::from_utf8_lossy(&output.stdout);
        let matches = if healthy { text == expected } else { expected.lines().all(|line| text.contains(line)) };
        ensure!(matches, "{check}: {text}");
    }
    for _ in 0..10 {
        check_served(&reader)?;
    }
    // It does not maintain the redirect yet, so the metric is absent: 0 would raise a false alert.
    ensure!(!next.admin("/metrics")?.body.contains("kirsa_redirect_verified "));
    // The old agent still maintains the redirect: without it, the real metadata service would get the request.
    site.node.netns().shell("nft delete table inet kirsa")?;
    poll("the redirect to come back", TIMEOUT, || {
        site.node
            .netns()
            .shell("nft list chain inet kirsa prerouting")
            .is_ok_and(|rules| rules.contains("dnat"))
            .then_some(())
    })?;
    check_served(&reader)?;
    site.no_pod_got_outside()?;
    ensure!(!has_logged(&next, TOOK_OVER) && !has_logged(&agent, QUIESCED));
    // If the old agent is stopped anyway, the unsynced one takes over: it refuses requests as "starting".
    agent.stop()?;
    wait_for_message(&next, TOOK_OVER)?;
    let answer = Client::new(reader.netns(), (METADATA, 80)).get(CREDENTIALS_PATH).send()?;
    ensure!(answer.status == 503, "{answer:?}");
    next.stop()
}

/// The redirect leads to the new agent from its start: the two do not fight over it.
#[test]
fn successor_on_another_port_owns_the_redirect() -> Result<()> {
    let site = site()?;
    let reader = site.pod_with_role("reader")?;
    let agent = site.start()?;
    let options = site.options.clone().flag("--port", "8281");
    let next = Agent::spawn(&site.node, &options)?;
    wait_for_message(&next, TOOK_OVER)?;
    next.wait_ready()?;
    check_served(&reader)?;
    ensure!(next.metric("kirsa_redirect_repaired_total", &[])? == 0.0);
    agent.stop()?;
    check_served(&reader)?;
    ensure!(next.metric("kirsa_redirect_repaired_total", &[])? == 0.0);
    next.stop()
}

/// Turning on metrics changes the admin address to one that overlaps the old one.
#[test]
fn successor_gets_overlapping_admin_address() -> Result<()> {
    let site = site()?;
    let reader = site.pod_with_role("reader")?;
    let agent = site.start()?;
    let next = Agent::spawn(&site.node, &site.options.clone().flag("--admin-address", "[::]:8182"))?;
    wait_for_message(&next, TOOK_OVER)?;
    check_served(&reader)?;
    agent.stop()?;
    wait_for_message(&next, "the admin port is free")?;
    next.wait_ready()?;
    check_served(&reader)?;
    next.stop()
}

/// A draining agent may still hold the admin port: metrics can wait, pods cannot.
#[test]
fn occupied_admin_address_does_not_block_pods() -> Result<()> {
    let mut site = site()?;
    let reader = site.pod_with_role("reader")?;
    let socket = site.node.state().join("admin.sock");
    site.options = site.options.flag("--admin-socket", &socket);
    let occupant = site.node.netns().listen(([127, 0, 0, 1], 8182).into())?;
    let agent = Agent::spawn(&site.node, &site.options)?;
    poll("the agent to be ready", TIMEOUT, || {
        Agent::probe(&site.node, &site.options, &socket, "ready")
            .is_ok_and(|output| output.status.success())
            .then_some(())
    })?;
    check_served(&reader)?;
    drop(occupant);
    wait_for_message(&agent, "the admin port is free")?;
    agent.wait_ready()?;
    agent.stop()
}

#[test]
fn probe_without_agent_names_the_socket() -> Result<()> {
    let site = site()?;
    let nowhere = site.node.state().join("missing.sock");
    let output = Agent::probe(&site.node, &site.options, &nowhere, "ready")?;
    let text = String::from_utf8_lossy(&output.stderr);
    ensure!(output.status.code() == Some(1) && text.contains("missing.sock: no agent answers there"), "{output:?}");
    Ok(())
}

/// A process that can connect to the socket gets the listening sockets, so only root may.
#[test]
fn only_root_can_reach_the_socket() -> Result<()> {
    use std::os::unix::fs::{FileTypeExt, PermissionsExt};
    let site = site()?;
    let agent = site.start()?;
    let folder = site.node.state().join("kirsa");
    let socket = folder.join("handover.sock");
    poll("the socket", TIMEOUT, || {
        socket.symlink_metadata().is_ok_and(|file| file.file_type().is_socket()).then_some(())
    })?;
    ensure!(folder.metadata()?.permissions().mode() & 0o777 == 0o700);
    // An unknown greeting changes nothing.
    let mut stream = std::os::unix::net::UnixStream::connect(&socket)?;
    std::io::Write::write_all(&mut stream, b"GET / HTTP/1.1\r\n\r\n")?;
    agent
        .wait_for_log(|entry| field(entry, "message").is_some_and(|message| message.contains("hot restart failed")))?;
    drop(stream);
    ensure!(agent.admin("/readyz")?.status == 200);
    agent.stop()
}
