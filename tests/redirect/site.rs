//! A node with one pod of each network shape, each with its own service account and role, and the network outside.

use std::net::{IpAddr, SocketAddr, TcpListener};
use std::ops::Deref;
use std::sync::{Arc, Mutex};
use std::thread;

use anyhow::{Result, ensure};
use lab::http::Client;
use lab::net::{METADATA, METADATA6, Pod, Shape};

/// Listener outside the node on another port of the metadata address. Records its clients.
struct Outside(Arc<Mutex<Vec<IpAddr>>>);

impl Outside {
    fn start(listener: TcpListener) -> Self {
        let callers = Arc::<Mutex<Vec<IpAddr>>>::default();
        let recorded = callers.clone();
        thread::spawn(move || {
            while let Ok((_, peer)) = listener.accept() {
                recorded.lock().unwrap().push(peer.ip());
            }
        });
        Self(callers)
    }
}

pub(crate) struct Site {
    base: lab::site::Site,
    pub(crate) pods: Vec<Pod>,
    outside: Outside,
    backend: &'static str,
}

impl Deref for Site {
    type Target = lab::site::Site;

    fn deref(&self) -> &Self::Target {
        &self.base
    }
}

impl Site {
    pub(crate) fn new(backend: &'static str) -> Result<Self> {
        let mut base = lab::site::Site::new(env!("CARGO_BIN_EXE_kirsa"))?;
        base.options = base.options.flag("--intercept", backend);
        let outside = Outside::start(base.node.vpc().listen((METADATA, 8080).into())?);
        let mut pods = Vec::new();
        for shape in Shape::ALL {
            let pod = base.node.pod(&account(shape), shape)?;
            base.put(base.with_role(&pod)?)?;
            pods.push(pod);
        }
        Ok(Self { base, pods, outside, backend })
    }

    pub(crate) fn set_flag(&mut self, name: &str, value: &str) {
        self.base.options = self.base.options.clone().flag(name, value);
    }

    /// Lists our rules without counters.
    pub(crate) fn rules(&self) -> Result<String> {
        self.node.netns().shell(match self.backend {
            "nft" => "nft list tables; ! nft list tables | grep -q kirsa || nft list table inet kirsa",
            _ => "{ iptables-save; ip6tables-save; } | grep KIRSA || true",
        })
    }

    /// Removes the redirect and leaves the other rules, like a program that flushes nat rules.
    pub(crate) fn remove_redirect(&self) -> Result<()> {
        self.node.netns().shell(match self.backend {
            "nft" => "nft 'flush chain inet kirsa prerouting; flush chain inet kirsa output'",
            _ => "iptables -t nat -F; ip6tables -t nat -F",
        })?;
        Ok(())
    }

    pub(crate) fn no_pod_got_outside(&self) -> Result<()> {
        let callers = self.outside.0.lock().unwrap();
        ensure!(callers.is_empty(), "{callers:?} bypassed the redirect");
        self.base.no_pod_got_outside()
    }

    /// Returns a client in the pod for each address family.
    pub(crate) fn clients(pod: &Pod) -> Vec<Client> {
        let v6 = pod.ip6().map(|_| pod.imds6());
        [pod.imds()].into_iter().chain(v6).collect()
    }

    /// Returns the metadata address of each address family.
    pub(crate) fn targets(&self, port: u16) -> Vec<SocketAddr> {
        let v6 = self.node.host_ip6().map(|_| (METADATA6, port).into());
        [(METADATA, port).into()].into_iter().chain(v6).collect()
    }
}

pub(crate) fn account(shape: Shape) -> String {
    format!("{shape:?}").to_lowercase()
}
