//! A node with a pod of each shape, and what lies outside it.

use std::io::Write;
use std::net::{IpAddr, SocketAddr, TcpListener};
use std::path::PathBuf;
use std::sync::{Arc, Mutex};
use std::thread;

use anyhow::{Result, ensure};
use lab::agent::{Agent, Options};
use lab::http::Client;
use lab::issuer::Issuer;
use lab::namespace::BASE;
use lab::net::{METADATA, METADATA6, Node, Pod, Shape};
use lab::sts::{Config, Keys, Provider, Role, StandIn};
use lab::workloads::{self, Workload};

const ISSUER: &str = "https://issuer.example";

/// What the redirect must keep pods away from: notes who connects, and answers like any web server.
pub(crate) struct Outside(Arc<Mutex<Vec<IpAddr>>>);

impl Outside {
    fn on(listeners: impl IntoIterator<Item = TcpListener>) -> Self {
        let callers = Arc::<Mutex<Vec<IpAddr>>>::default();
        for listener in listeners {
            let callers = callers.clone();
            thread::spawn(move || {
                while let Ok((mut stream, peer)) = listener.accept() {
                    callers.lock().unwrap().push(peer.ip());
                    // The caller may be gone already.
                    let _ = stream.write_all(b"HTTP/1.1 200 OK\r\nContent-Length: 8\r\n\r\nthe node");
                }
            });
        }
        Self(callers)
    }

    pub(crate) fn callers(&self) -> Vec<IpAddr> {
        self.0.lock().unwrap().clone()
    }
}

/// A node with a pod of each shape, each of a service account with a role of its own.
pub(crate) struct Site {
    pub(crate) node: Node,
    pub(crate) pods: Vec<Pod>,
    pub(crate) outside: Outside,
    pub(crate) sts: StandIn,
    pub(crate) options: Options,
    entries: Vec<Workload>,
    workloads: PathBuf,
    backend: &'static str,
}

impl Site {
    pub(crate) fn new(backend: &'static str) -> Result<Self> {
        let node = Node::new()?;
        let elsewhere = node.vpc().listen((METADATA, 8080).into())?;
        let outside = Outside::on([node.listen_metadata()?, elsewhere].into_iter().chain(node.listen_metadata6()?));

        let issuer = Issuer::new(ISSUER)?;
        let sts = StandIn::start(
            TcpListener::bind((BASE, 0))?,
            Config { providers: vec![Provider::new(ISSUER, Keys::Given(issuer.jwks()?))], ..Config::default() },
        )?;
        let mut pods = Vec::new();
        let mut entries = Vec::new();
        for shape in Shape::ALL {
            let account = account(shape);
            let pod = node.pod(&account, shape)?;
            let token_file = node.state().join(format!("{account}.jwt"));
            std::fs::write(&token_file, issuer.pod_token("default", &account, &account, &account)?)?;
            let subject = lab::issuer::subject("default", &account);
            sts.set_role(Role::trusting(&role_arn(shape), ISSUER, &subject));
            entries.push(Workload::new(&pod, &account).role(&role_arn(shape), &token_file));
            pods.push(pod);
        }
        let workloads = node.state().join("workloads.yaml");
        let options = Options::new(env!("CARGO_BIN_EXE_kirsa"))
            .flag("--workloads", &workloads)
            .flag("--sts-endpoint-url", sts.url())
            .flag("--intercept", backend);
        let site = Self { node, pods, outside, sts, options, entries, workloads, backend };
        workloads::write(&site.workloads, &site.entries)?;
        Ok(site)
    }

    /// One more entry of the workloads file.
    pub(crate) fn add(&mut self, workload: Workload) -> Result<()> {
        self.entries.push(workload);
        workloads::write(&self.workloads, &self.entries)
    }

    pub(crate) fn start(&self) -> Result<Agent> {
        Agent::start(&self.node, &self.options)
    }

    /// Our rules as the tool lists them, without what changes by itself.
    pub(crate) fn rules(&self) -> Result<String> {
        self.node.netns().shell(match self.backend {
            "nft" => "nft list tables; ! nft list tables | grep -q kirsa || nft list table inet kirsa",
            _ => "{ iptables-save; ip6tables-save; } | grep KIRSA || true",
        })
    }

    /// Take away the redirect and leave the rest, as somebody who flushes rules does.
    pub(crate) fn remove_redirect(&self) -> Result<()> {
        self.node.netns().shell(match self.backend {
            "nft" => "nft flush chain inet kirsa prerouting; nft flush chain inet kirsa output",
            _ => "iptables -t nat -F; ip6tables -t nat -F",
        })?;
        Ok(())
    }

    /// The agent's own probe may have: it goes where the node goes while there is no redirect.
    pub(crate) fn no_pod_got_outside(&self) -> Result<()> {
        let mut pods = self.outside.callers();
        pods.retain(|caller| !self.node.host_ips().contains(caller));
        ensure!(pods.is_empty(), "pods reached the node's own metadata service: {pods:?}");
        Ok(())
    }

    /// The metadata service as the pod sees it, once for each family.
    pub(crate) fn clients(pod: &Pod) -> Vec<Client> {
        let v6 = pod.ip6().map(|_| pod.imds6());
        [pod.imds()].into_iter().chain(v6).collect()
    }

    /// The metadata address, once for each family.
    pub(crate) fn targets(&self, port: u16) -> Vec<SocketAddr> {
        let v6 = self.node.host_ip6().map(|_| (METADATA6, port).into());
        [(METADATA, port).into()].into_iter().chain(v6).collect()
    }
}

pub(crate) fn account(shape: Shape) -> String {
    format!("{shape:?}").to_lowercase()
}

pub(crate) fn role_arn(shape: Shape) -> String {
    format!("arn:aws:iam::111122223333:role/{}-role", account(shape))
}
