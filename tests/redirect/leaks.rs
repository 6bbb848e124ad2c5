//! Pods request the node's metadata in a loop while rules are flushed, agents are killed and nodes boot. The real
//! metadata service must never answer them. `ROUNDS` sets the number of repetitions.

use std::fs;
use std::io::{Read, Write};
use std::net::TcpStream;
use std::path::Path;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::thread;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use lab::agent::{Agent, Options};
use lab::http::Client;
use lab::imds::Instance;
use lab::poll::poll;

use super::site::Site;
use super::{CONNECT_TIMEOUT, TIMEOUT};

const REQUEST: &[u8] = b"GET /latest/meta-data/instance-id HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n";

fn rounds() -> usize {
    std::env::var("ROUNDS").ok().and_then(|count| count.parse().ok()).unwrap_or(10)
}

/// Responses to pods by their source.
#[derive(Debug, Default)]
struct Answers {
    agent: AtomicUsize,
    node: AtomicUsize,
    none: AtomicUsize,
}

impl Answers {
    fn count(&self, answer: std::io::Result<String>) {
        match answer {
            Ok(answer) if answer.contains("server: kirsa") => &self.agent,
            Ok(answer) if !answer.is_empty() => &self.node,
            Ok(_) | Err(_) => &self.none,
        }
        .fetch_add(1, Ordering::Relaxed);
    }

    fn check(&self, what: &str) -> Result<()> {
        eprintln!("{what}, {} rounds: {self:?}", rounds());
        ensure!(self.node.load(Ordering::Relaxed) == 0, "{what}: {self:?}");
        ensure!(self.agent.load(Ordering::Relaxed) > 0 && self.none.load(Ordering::Relaxed) > 0, "{what}: {self:?}");
        Ok(())
    }
}

fn request(mut stream: TcpStream) -> std::io::Result<String> {
    stream.set_read_timeout(Some(Duration::from_secs(1)))?;
    stream.write_all(REQUEST)?;
    let mut answer = String::new();
    stream.read_to_string(&mut answer)?;
    Ok(answer.to_lowercase())
}

/// Runs `work` while every pod sends requests over both address families.
fn while_pods_request(site: &Site, answers: &Answers, work: impl FnOnce() -> Result<()>) -> Result<()> {
    let done = AtomicBool::new(false);
    let outcome = thread::scope(|scope| {
        for pod in &site.pods {
            for target in site.targets(80) {
                let done = &done;
                scope.spawn(move || {
                    pod.netns().run(|| {
                        while !done.load(Ordering::Relaxed) {
                            answers.count(TcpStream::connect_timeout(&target, CONNECT_TIMEOUT).and_then(request));
                        }
                    });
                });
            }
        }
        let outcome = work();
        done.store(true, Ordering::Relaxed);
        outcome
    });
    outcome.and_then(|()| site.no_pod_got_outside())
}

fn flushes_leak_nothing(backend: &'static str) -> Result<()> {
    let (site, answers) = (Site::new(backend)?, Answers::default());
    let agent = site.start()?;
    let rules = site.rules()?;
    while_pods_request(&site, &answers, || {
        for _ in 0..rounds() {
            site.node.netns().shell("nft flush ruleset")?;
            poll("the rules to be restored", TIMEOUT, || site.rules().is_ok_and(|now| now == rules).then_some(()))?;
        }
        Ok(())
    })?;
    answers.check(&format!("flushes, {backend}"))?;
    agent.stop()
}

fn kills_leak_nothing(backend: &'static str) -> Result<()> {
    let (site, answers) = (Site::new(backend)?, Answers::default());
    site.start()?.kill()?;
    while_pods_request(&site, &answers, || {
        (0..rounds()).try_for_each(|_| {
            let (agent, before) = (site.start()?, answers.agent.load(Ordering::Relaxed));
            poll("an answer", TIMEOUT, || (answers.agent.load(Ordering::Relaxed) > before).then_some(()))?;
            agent.kill()
        })
    })?;
    answers.check(&format!("kills, {backend}"))
}

/// The commands of the boot unit, as systemd runs them.
struct BootUnit(Vec<(bool, String)>);

impl BootUnit {
    fn read() -> Result<Self> {
        let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("daemonset/boot");
        let unit = fs::read_to_string(folder.join("kirsa-boot.service"))?;
        let rules = folder.join("kirsa-boot.nft").display().to_string();
        let commands: Vec<_> = unit
            .lines()
            .filter_map(|line| line.strip_prefix("ExecStart="))
            .map(|line| {
                (line.starts_with('-'), line.trim_start_matches('-').replace("/etc/kirsa/kirsa-boot.nft", &rules))
            })
            .collect();
        ensure!(commands.len() == 9, "{commands:?}");
        Ok(Self(commands))
    }

    /// Runs the commands as at boot. Repeating them is no error.
    fn start(&self, site: &Site) -> Result<()> {
        for (may_fail, command) in &self.0 {
            let outcome = site.node.netns().shell(command);
            ensure!(*may_fail || outcome.is_ok(), "{outcome:?}");
        }
        Ok(())
    }
}

fn policy_routing(site: &Site) -> Result<Vec<String>> {
    let rules = site.node.netns().shell("ip rule; ip -6 rule")?;
    Ok(rules.lines().filter(|rule| rule.contains(".254") || rule.contains("::254")).map(str::to_owned).collect())
}

#[test]
fn boots_leak_nothing() -> Result<()> {
    let (site, answers, boot) = (Site::new("nft")?, Answers::default(), BootUnit::read()?);
    for _ in 0..rounds() {
        boot.start(&site)?;
        while_pods_request(&site, &answers, || {
            let agent = site.start()?;
            boot.start(&site).context("starting the unit again")?;
            agent.kill()
        })?;
        Agent::uninstall(&site.node, &Options::new(env!("CARGO_BIN_EXE_kirsa")))?;
        ensure!(
            policy_routing(&site)?.is_empty() && !site.rules()?.contains("kirsa"),
            "rules are left from the last boot"
        );
    }
    answers.check("boots, nft")
}

#[test]
fn boot_unit_refuses_only_pods() -> Result<()> {
    let (site, boot) = (Site::new("nft")?, BootUnit::read()?);
    boot.start(&site)?;
    boot.start(&site)?;
    for target in site.targets(80) {
        for pod in &site.pods {
            let kind = super::error_kind(pod.netns().connect(target, CONNECT_TIMEOUT));
            ensure!(kind == Some(std::io::ErrorKind::ConnectionRefused), "{:?} to {target}: {kind:?}", pod.shape());
        }
        let body = Client::new(site.node.netns(), target).get("/latest/meta-data/instance-id").send()?.ok()?;
        ensure!(body == Instance::default().instance_id, "{body}");
    }
    let by_unit = policy_routing(&site)?;
    ensure!(by_unit.len() == 4 * site.targets(80).len(), "{by_unit:?}");
    site.start()?.stop()?;
    ensure!(policy_routing(&site)? == by_unit, "the agent's rules differ: {:?}", policy_routing(&site)?);
    Ok(())
}

#[test]
fn removed_policy_routing_is_restored() -> Result<()> {
    let site = Site::new("nft")?;
    let agent = site.start()?;
    let before = policy_routing(&site)?;
    site.node.netns().shell("for n in 4 5 6 7; do ip rule del pref $n; ip -6 rule del pref $n || true; done")?;
    ensure!(policy_routing(&site)?.is_empty());
    poll("the rules to be restored", Duration::from_secs(20), || {
        policy_routing(&site).is_ok_and(|now| now == before).then_some(())
    })?;
    agent.wait_for_log(|entry| {
        entry["message"].as_str().is_some_and(|message| message.contains("policy routing rules"))
    })?;
    ensure!(agent.metric("kirsa_redirect_repaired_total", &[])? == 1.0);
    agent.stop()
}

with_nft_and_iptables! {
    flushes_leak_nothing,
    kills_leak_nothing,
}
