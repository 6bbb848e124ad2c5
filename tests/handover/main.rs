//! Two agents on one node: the next one takes over from the one that runs, and no pod notices (IMDS-30); if it fails,
//! the former one serves again.

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

/// Enough for anything that the agent does on a busy machine.
const PATIENCE: Duration = Duration::from_secs(20);
const TAKEN: &str = "taken over from the agent that ran before";
const GIVEN: &str = "the other agent serves this node's pods from now on";
const ASKED: &str = "another agent starts on this node: it has the listening sockets, and learns";
const BACK: &str = "the agent that took over has ended: this one serves again";

fn site() -> Result<Site> {
    Site::new(env!("CARGO_BIN_EXE_kirsa"))
}

fn says(agent: &Agent, message: &str) -> Result<()> {
    agent.wait_for_log(|entry| field(entry, "message") == Some(message)).map(drop)
}

fn has_said(agent: &Agent, message: &str) -> bool {
    agent.log().iter().any(|entry| field(entry, "message") == Some(message))
}

/// A next agent on the same node, once it has taken over and is ready.
fn takes_over(site: &Site) -> Result<Agent> {
    let next = Agent::spawn(&site.node, &site.options)?;
    says(&next, TAKEN)?;
    next.wait_ready()?;
    Ok(next)
}

/// One request with one attempt, on a connection of its own.
fn ask(netns: &Arc<Netns>) -> Result<()> {
    let answer = Client::new(netns, (METADATA, 80)).get(&format!("{CREDENTIALS_PATH}reader-role")).send()?;
    ensure!(answer.status == 200, "{answer:?}");
    Ok(())
}

fn served(pod: &Pod) -> Result<()> {
    ask(pod.netns())
}

/// Asks again and again until told to stop; how often, or the first failure.
fn load(pod: &Pod, stop: &Arc<AtomicBool>) -> thread::JoinHandle<Result<usize>> {
    let (netns, stop) = (pod.netns().clone(), stop.clone());
    thread::spawn(move || {
        let mut asked = 0;
        while !stop.load(Ordering::SeqCst) {
            ask(&netns).with_context(|| format!("request {asked}"))?;
            asked += 1;
        }
        Ok(asked)
    })
}

/// IMDS-30, IMDS-7: not one of them is refused, and session tokens stay good.
#[test]
fn an_upgrade_under_load_costs_no_request() -> Result<()> {
    let mut site = site()?;
    // One pod makes all the load.
    site.options = site.options.flag("--max-requests-per-source", "100000");
    let reader = site.pod_with_role("reader")?;
    let mut agent = site.start()?;
    let token = reader.imds().put_token(21_600)?;
    served(&reader)?;
    let stop = Arc::new(AtomicBool::new(false));
    let loads: Vec<_> = (0..4).map(|_| load(&reader, &stop)).collect();
    for _ in 0..3 {
        let next = takes_over(&site)?;
        says(&agent, GIVEN)?;
        agent.stop()?;
        agent = next;
        served(&reader)?;
    }
    stop.store(true, Ordering::SeqCst);
    for load in loads {
        let asked = load.join().expect("the load does not panic")?;
        ensure!(asked > 20, "{asked} requests prove nothing");
    }
    let answer = reader.imds().get(CREDENTIALS_PATH).header(TOKEN, &token).send()?;
    ensure!(answer.status == 200, "{answer:?}");
    ensure!(agent.metric("kirsa_redirect_repaired_total", &[])? == 0.0, "the next agent found its redirect at once");
    site.no_pod_got_outside()
}

#[test]
fn an_agent_whose_successor_is_killed_serves_again() -> Result<()> {
    let site = site()?;
    let reader = site.pod_with_role("reader")?;
    let agent = site.start()?;
    let next = takes_over(&site)?;
    says(&agent, GIVEN)?;
    next.kill()?;
    says(&agent, BACK)?;
    served(&reader)?;
    ensure!(agent.admin("/readyz")?.status == 200);
    // And hands over to the next one.
    let next = takes_over(&site)?;
    agent.stop()?;
    served(&reader)?;
    next.stop()?;
    site.no_pod_got_outside()
}

/// A version that cannot learn this node's pods never gets a connection of theirs; its own pod is not ready, and the
/// former one is: the roll-out waits.
#[test]
fn a_successor_that_does_not_learn_the_pods_gets_none_of_them() -> Result<()> {
    let mut site = site()?;
    let sockets = ["former.sock", "next.sock"].map(|name| site.node.state().join(name));
    // What a process that was killed leaves.
    drop(std::os::unix::net::UnixListener::bind(&sockets[0])?);
    site.options = site.options.flag("--admin-socket", &sockets[0]);
    let reader = site.pod_with_role("reader")?;
    let agent = site.start()?;
    // Nobody listens there.
    let kubeconfig = site.node.state().join("kubeconfig");
    let text = r#"{"apiVersion": "v1", "kind": "Config", "current-context": "x",
        "clusters": [{"name": "x", "cluster": {"server": "http://127.0.0.1:1"}}],
        "contexts": [{"name": "x", "context": {"cluster": "x", "user": "x"}}],
        "users": [{"name": "x", "user": {"token": "x"}}]}"#;
    std::fs::write(&kubeconfig, text)?;
    let options = lab::agent::Options::new(env!("CARGO_BIN_EXE_kirsa")).flag("--kubeconfig", &kubeconfig);
    let options = options.flag("--admin-socket", &sockets[1]);
    let next = Agent::spawn(&site.node, &options)?;
    says(&agent, ASKED)?;
    poll("the next agent's pending conditions", PATIENCE, || {
        agent.admin("/readyz").is_ok_and(|answer| answer.body.contains("pods")).then_some(())
    })?;
    for (socket, health, is) in
        [(0, "ready", "ready\n"), (0, "live", "ok\n"), (1, "ready", "pods\nservice accounts\n"), (1, "live", "ok\n")]
    {
        let said = Agent::probe(&site.node, &site.options, &sockets[socket], health)?;
        let well = (socket, health) != (1, "ready");
        ensure!(said.status.code() == Some(i32::from(!well)), "{health} at {socket}: {said:?}");
        let text = String::from_utf8_lossy(&said.stdout);
        ensure!(if well { text == is } else { is.lines().all(|line| text.contains(line)) }, "{health}: {text}");
    }
    for _ in 0..10 {
        served(&reader)?;
    }
    // It keeps no redirect yet, so it says nothing of one: 0 would raise an alert that is none.
    ensure!(!next.admin("/metrics")?.body.contains("kirsa_redirect_verified "));
    // However long that lasts, the redirect is kept: without it this request would be the node's own service's.
    site.node.netns().shell("nft delete table inet kirsa")?;
    poll("the redirect to come back", PATIENCE, || {
        site.node
            .netns()
            .shell("nft list chain inet kirsa prerouting")
            .is_ok_and(|rules| rules.contains("dnat"))
            .then_some(())
    })?;
    served(&reader)?;
    site.no_pod_got_outside()?;
    ensure!(!has_said(&next, TAKEN) && !has_said(&agent, GIVEN));
    // When the former one is told to end all the same, the next one is all there is: it says "starting".
    agent.stop()?;
    says(&next, TAKEN)?;
    let answer = Client::new(reader.netns(), (METADATA, 80)).get(CREDENTIALS_PATH).send()?;
    ensure!(answer.status == 503, "{answer:?}");
    next.stop()
}

/// The two do not fight over the redirect: it leads to the next one from its start.
#[test]
fn a_successor_on_another_port_has_the_redirect_for_itself() -> Result<()> {
    let site = site()?;
    let reader = site.pod_with_role("reader")?;
    let agent = site.start()?;
    let options = site.options.clone().flag("--port", "8281");
    let next = Agent::spawn(&site.node, &options)?;
    says(&next, TAKEN)?;
    next.wait_ready()?;
    served(&reader)?;
    ensure!(next.metric("kirsa_redirect_repaired_total", &[])? == 0.0);
    agent.stop()?;
    served(&reader)?;
    ensure!(next.metric("kirsa_redirect_repaired_total", &[])? == 0.0);
    next.stop()
}

/// As when metrics are turned on: two addresses, and one process at a time can listen there.
#[test]
fn a_successor_whose_admin_address_overlaps_takes_over_and_has_it_in_the_end() -> Result<()> {
    let site = site()?;
    let reader = site.pod_with_role("reader")?;
    let agent = site.start()?;
    let next = Agent::spawn(&site.node, &site.options.clone().flag("--admin-address", "[::]:8182"))?;
    says(&next, TAKEN)?;
    served(&reader)?;
    agent.stop()?;
    says(&next, "the admin port is free")?;
    next.wait_ready()?;
    served(&reader)?;
    next.stop()
}

/// As where a former agent drains and hands over no more: metrics can wait, pods cannot.
#[test]
fn an_admin_address_that_somebody_has_keeps_no_pod_from_its_credentials() -> Result<()> {
    let mut site = site()?;
    let reader = site.pod_with_role("reader")?;
    let socket = site.node.state().join("admin.sock");
    site.options = site.options.flag("--admin-socket", &socket);
    let somebody = site.node.netns().listen(([127, 0, 0, 1], 8182).into())?;
    let agent = Agent::spawn(&site.node, &site.options)?;
    poll("the agent to be ready", PATIENCE, || {
        Agent::probe(&site.node, &site.options, &socket, "ready").is_ok_and(|said| said.status.success()).then_some(())
    })?;
    served(&reader)?;
    drop(somebody);
    says(&agent, "the admin port is free")?;
    agent.wait_ready()?;
    agent.stop()
}

#[test]
fn a_probe_of_nobody_fails_and_says_where_it_asked() -> Result<()> {
    let site = site()?;
    let nowhere = site.node.state().join("nobody.sock");
    let said = Agent::probe(&site.node, &site.options, &nowhere, "ready")?;
    let text = String::from_utf8_lossy(&said.stderr);
    ensure!(said.status.code() == Some(1) && text.contains("nobody.sock: no agent answers there"), "{said:?}");
    Ok(())
}

/// Whoever may write to the socket gets the sockets: nobody but root may.
#[test]
fn the_socket_is_roots_alone() -> Result<()> {
    use std::os::unix::fs::{FileTypeExt, PermissionsExt};
    let site = site()?;
    let agent = site.start()?;
    let folder = site.node.state().join("kirsa");
    let socket = folder.join("handover.sock");
    poll("the socket", PATIENCE, || {
        socket.symlink_metadata().is_ok_and(|file| file.file_type().is_socket()).then_some(())
    })?;
    ensure!(folder.metadata()?.permissions().mode() & 0o777 == 0o700);
    // Words that are not ours change nothing.
    let mut stream = std::os::unix::net::UnixStream::connect(&socket)?;
    std::io::Write::write_all(&mut stream, b"GET / HTTP/1.1\r\n\r\n")?;
    agent.wait_for_log(|entry| field(entry, "message").is_some_and(|said| said.contains("hand-over that failed")))?;
    drop(stream);
    ensure!(agent.admin("/readyz")?.status == 200);
    agent.stop()
}
