//! Where the demo happens: a node with three pods, the node's own metadata service, an STS, and kirsa.
//! Knows nothing of what is shown.

use std::net::TcpListener;
use std::path::PathBuf;
use std::process::Command;
use std::time::{Duration, Instant};
use std::{env, fs};

use anyhow::{Context, Result, ensure};
use lab::agent::{Agent, Options};
use lab::imds::{Canary, Hit, Instance};
use lab::issuer::{Issuer, subject};
use lab::namespace::{BASE, way_in};
use lab::net::{Node, Pod, Shape};
use lab::sdk;
use lab::sts::{Config, Keys, Provider, Role, StandIn};

use crate::screen::Screen;
use crate::terminal::Terminal;

pub(crate) const ACCOUNT: &str = "111122223333";
const ISSUER: &str = "https://issuer.example";
/// A token lives for ten minutes; whoever provides it replaces it in time, as the kubelet does.
const ROTATION: Duration = Duration::from_secs(300);

/// A pod and somebody who types in it.
pub(crate) struct Guest {
    pub(crate) pod: Pod,
    pub(crate) terminal: Terminal,
}

pub(crate) struct Site {
    agent: Option<Agent>,
    pub(crate) reader: Guest,
    pub(crate) writer: Guest,
    pub(crate) idle: Guest,
    pub(crate) shell: Terminal,
    pub(crate) node: Node,
    pub(crate) sts: StandIn,
    canaries: Vec<Canary>,
    issuer: Issuer,
    /// What pods were given and nobody else may see.
    pub(crate) secrets: Vec<String>,
}

impl Site {
    pub(crate) fn new() -> Result<Self> {
        let node = Node::new()?;
        let listeners = [node.listen_metadata()?].into_iter().chain(node.listen_metadata6()?);
        let canaries = listeners.map(|listener| Canary::start(listener, Instance::default())).collect::<Result<_>>()?;
        let issuer = Issuer::new(ISSUER)?;
        let config = Config {
            providers: vec![Provider::new(ISSUER, Keys::Given(issuer.jwks()?))],
            roles: ["reader", "writer"]
                .map(|account| Role::trusting(&role_arn(account), ISSUER, &subject("default", account)))
                .into(),
            ..Config::default()
        };
        let sts = StandIn::start(TcpListener::bind((BASE, 8080)).context("the STS")?, config)?;
        let guest = |name, prompt, shape| -> Result<Guest> {
            let pod = node.pod(name, shape)?;
            Ok(Guest { terminal: Terminal::open(prompt, pod.netns(), node.state())?, pod })
        };
        let site = Self {
            agent: None,
            reader: guest("reader", "reader$", Shape::Bridge)?,
            writer: guest("writer", "writer$", Shape::Routed)?,
            idle: guest("idle", "idle$", Shape::RoutedBare)?,
            shell: Terminal::open("node#", node.netns(), node.state())?,
            node,
            sts,
            canaries,
            issuer,
            secrets: Vec::new(),
        };
        site.write_tokens()?;
        fs::write(site.node.state().join("workloads.yaml"), site.workloads())?;
        Ok(site)
    }

    /// The file as a person writes it.
    fn workloads(&self) -> String {
        let mut file = String::from("workloads:\n");
        for Guest { pod, .. } in [&self.reader, &self.writer, &self.idle] {
            let addresses: Vec<String> = pod.address().ips().iter().map(|ip| format!("\"{ip}\"")).collect();
            let name = pod.name();
            file += &format!("- pod: {name}\n  serviceAccount: {name}\n  addresses: [{}]\n", addresses.join(", "));
            if name != self.idle.pod.name() {
                let token = self.token_file(pod);
                file += &format!("  role: {}\n  tokenFile: {}\n", role_arn(name), token.display());
            }
        }
        file
    }

    fn token_file(&self, pod: &Pod) -> PathBuf {
        self.node.state().join(format!("{}.jwt", pod.name()))
    }

    fn write_tokens(&self) -> Result<()> {
        for Guest { pod, .. } in [&self.reader, &self.writer] {
            let (file, name) = (self.token_file(pod), pod.name());
            let new = file.with_extension("new");
            fs::write(&new, self.issuer.pod_token("default", name, name, &format!("{name}-uid"))?)?;
            fs::rename(new, file)?;
        }
        Ok(())
    }

    /// Starts kirsa and waits until it is ready. It is the binary beside this program's, or `KIRSA_BIN`.
    pub(crate) fn start_kirsa(&mut self) -> Result<()> {
        let binary = match env::var_os("KIRSA_BIN") {
            Some(named) => named.into(),
            None => env::current_exe()?.with_file_name("kirsa"),
        };
        ensure!(
            binary.exists(),
            "there is no {}: `make demo` builds it, and KIRSA_BIN names another one",
            binary.display()
        );
        let options = Options::new(binary)
            .flag("--workloads", self.node.state().join("workloads.yaml"))
            .flag("--sts-endpoint-url", self.sts.url());
        self.agent = Some(Agent::start(&self.node, &options).context("kirsa does not start")?);
        Ok(())
    }

    pub(crate) fn kirsa(&self) -> Result<&Agent> {
        self.agent.as_ref().context("kirsa does not run")
    }

    /// Reaps a kirsa that was killed; an error if it ended in any other way.
    pub(crate) fn bury_kirsa(&mut self) -> Result<()> {
        self.agent.take().context("kirsa does not run")?.kill()
    }

    /// Everything that was started ends.
    pub(crate) fn end(mut self) -> Result<()> {
        self.agent.take().context("kirsa does not run")?.stop()
    }

    /// An error that says why not, such as a Python that is another user's.
    pub(crate) fn boto3_runs(&self) -> Result<()> {
        let command = sdk::boto3(&self.sts.url())?;
        self.reader.pod.run(Command::new(command.get_program()).arg("--version")).map(|_| ())
    }

    /// Everything that kirsa has said, where the shells find it.
    pub(crate) fn write_log(&self) -> Result<()> {
        Ok(fs::write(self.node.state().join("kirsa.log"), self.kirsa()?.process().lines().join("\n") + "\n")?)
    }

    /// How many of the secrets so far stand in kirsa's log.
    pub(crate) fn secrets_in_log(&self) -> Result<usize> {
        let log = self.kirsa()?.process().lines().join("\n");
        let mut secrets = self.secrets.clone();
        for guest in [&self.reader, &self.writer] {
            secrets.push(fs::read_to_string(self.token_file(&guest.pod))?);
        }
        ensure!(secrets.len() == 6, "two pods have a key, a session token and a web identity token each");
        Ok(secrets.iter().filter(|secret| log.contains(secret.as_str())).count())
    }

    pub(crate) fn log_tail(&self) -> String {
        let lines = self.agent.as_ref().map(|agent| agent.process().lines()).unwrap_or_default();
        lines[lines.len().saturating_sub(12)..].join("\n")
    }

    /// Who asked the node's own metadata service: the node's requests, and everybody else's.
    pub(crate) fn canary_hits(&self) -> (Vec<Hit>, Vec<Hit>) {
        let node = self.node.host_ips();
        let by_node = |hit: &Hit| node.contains(&hit.from.ip());
        self.canaries.iter().flat_map(Canary::hits).partition(by_node)
    }

    /// Stays, and shows kirsa's log, until the program is interrupted.
    pub(crate) fn keep(&self, screen: &mut Screen) -> Result<()> {
        screen.note("Left running until Ctrl-C. In another terminal, these lines lead inside:")?;
        let guests = [&self.reader, &self.writer, &self.idle].map(|guest| (guest.pod.name(), guest.pod.netns()));
        for (name, netns) in guests.into_iter().chain([("the node", self.node.netns())]) {
            screen.command(&format!("{name:<8}"), &way_in(netns))?;
        }
        screen.note("There, for a start:")?;
        screen.command("$", "curl http://169.254.169.254/latest/meta-data/iam/security-credentials/")?;
        screen.note("kirsa's log from here on:")?;
        let kirsa = self.kirsa()?.process();
        let (mut mark, mut rotated) = (kirsa.mark(), Instant::now());
        loop {
            let line = kirsa.wait_for_line_after(mark, ROTATION, |_| true);
            ensure!(line.is_ok() || !kirsa.ended(), "kirsa ended:\n{}", self.log_tail());
            if let Ok(line) = line {
                screen.output(&line)?;
                mark += 1;
            }
            if rotated.elapsed() >= ROTATION {
                self.write_tokens()?;
                rotated = Instant::now();
            }
        }
    }
}

pub(crate) fn role_arn(account: &str) -> String {
    format!("arn:aws:iam::{ACCOUNT}:role/{account}-role")
}

/// Who STS says that a workload of this service account is.
pub(crate) fn assumed_role_arn(account: &str) -> String {
    format!("arn:aws:sts::{ACCOUNT}:assumed-role/{account}-role/default.{account}")
}
