//! A pod as a network namespace, joined to its node in one of the ways that CNI plugins do it.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, TcpStream};
use std::process::{Command, Output};
use std::sync::Arc;
use std::sync::atomic::{AtomicU16, Ordering};
use std::time::Duration;

use anyhow::{Context, Result};

use super::hextet;
use crate::namespace::has_ipv6;
use crate::netns::Netns;

/// How a pod's veth is joined to the node.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Shape {
    /// A port of a Linux bridge that has the gateway's address (bridge, flannel).
    Bridge,
    /// Routed; the host end has the gateway's address (ptp, GKE).
    Routed,
    /// Routed; the host end has no address at all (AWS VPC CNI, Calico).
    RoutedBare,
}

impl Shape {
    pub const ALL: [Self; 3] = [Self::Bridge, Self::Routed, Self::RoutedBare];
}

/// A pod's addresses.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Address {
    pub v4: Ipv4Addr,
    /// None where the kernel has no IPv6.
    pub v6: Option<Ipv6Addr>,
}

impl Address {
    pub(super) fn new(node: u8, host: u8) -> Self {
        let v6 = Ipv6Addr::new(0xfd00, 0x244, hextet(node), 0, 0, 0, 0, hextet(host));
        Self { v4: Ipv4Addr::new(10, 244, node, host), v6: has_ipv6().then_some(v6) }
    }

    /// As `status.podIPs` lists them.
    pub fn ips(&self) -> Vec<IpAddr> {
        [IpAddr::V4(self.v4)].into_iter().chain(self.v6.map(IpAddr::V6)).collect()
    }
}

/// Its links and routes go when it is dropped.
#[derive(Debug)]
pub struct Pod {
    name: String,
    address: Address,
    shape: Shape,
    netns: Arc<Netns>,
    node: Arc<Netns>,
    host_interface: String,
    number: u16,
}

impl Pod {
    pub(super) fn create(node: &Arc<Netns>, index: u8, name: &str, shape: Shape, address: Address) -> Result<Self> {
        // Names of links have 15 bytes at most, so they are numbered.
        static NEXT: AtomicU16 = AtomicU16::new(1);
        let number = NEXT.fetch_add(1, Ordering::Relaxed);
        let pod = Self {
            netns: Arc::new(Netns::create(&format!("{}-{name}-{number}", node.name()))?),
            host_interface: format!("veth{number}"),
            name: name.into(),
            node: node.clone(),
            address,
            shape,
            number,
        };
        pod.join()?;
        match shape {
            Shape::Bridge => pod.bridge(index),
            Shape::Routed => pod.routed(index),
            Shape::RoutedBare => pod.routed_bare(),
        }?;
        Ok(pod)
    }

    fn join(&self) -> Result<()> {
        let (host, pod) = (&self.host_interface, self.netns.name());
        self.node.ip([
            format!(
                "link add {host} address {} type veth peer name eth0 address {} netns {pod}",
                self.host_mac(),
                self.mac()
            ),
            format!("link set {host} up"),
        ])?;
        self.netns.ip(["link set eth0 up"])
    }

    fn bridge(&self, index: u8) -> Result<()> {
        let gateway = Address::new(index, 1);
        if self.node.ip(["link add cni0 type bridge"]).is_ok() {
            self.node.ip([format!("addr add {}/24 dev cni0", gateway.v4), "link set cni0 up".into()])?;
            if let Some(v6) = gateway.v6 {
                self.node.ip([format!("addr add {v6}/64 dev cni0 nodad")])?;
            }
        }
        self.node.ip([format!("link set {} master cni0", self.host_interface)])?;
        self.netns.ip([
            format!("addr add {}/24 dev eth0", self.address.v4),
            format!("route add default via {}", gateway.v4),
        ])?;
        if let (Some(v6), Some(gateway)) = (self.address.v6, gateway.v6) {
            self.netns.ip([format!("addr add {v6}/64 dev eth0 nodad"), format!("route add default via {gateway}")])?;
        }
        Ok(())
    }

    fn routed(&self, index: u8) -> Result<()> {
        let (host, gateway) = (&self.host_interface, Address::new(index, 1));
        self.node.ip([
            format!("addr add {}/32 dev {host}", gateway.v4),
            format!("route add {} dev {host}", self.address.v4),
        ])?;
        self.netns.ip([
            format!("addr add {}/32 dev eth0", self.address.v4),
            format!("route add {} dev eth0", gateway.v4),
            format!("route add default via {}", gateway.v4),
        ])?;
        if let (Some(v6), Some(gateway)) = (self.address.v6, gateway.v6) {
            self.node.ip([format!("addr add {gateway}/128 dev {host} nodad"), format!("route add {v6} dev {host}")])?;
            self.netns.ip([
                format!("addr add {v6}/128 dev eth0 nodad"),
                format!("route add {gateway} dev eth0"),
                format!("route add default via {gateway}"),
            ])?;
        }
        Ok(())
    }

    /// The gateway is nobody's address: a permanent neighbour entry leads to the host end.
    fn routed_bare(&self) -> Result<()> {
        let host = &self.host_interface;
        self.node.ip([format!("route add {} dev {host}", self.address.v4)])?;
        let mac = self.host_mac();
        self.netns.ip([
            format!("addr add {}/32 dev eth0", self.address.v4),
            format!("neigh add 169.254.1.1 lladdr {mac} dev eth0 nud permanent"),
            "route add 169.254.1.1 dev eth0 scope link".into(),
            "route add default via 169.254.1.1".into(),
        ])?;
        if let Some(v6) = self.address.v6 {
            self.node.ip([format!("route add {v6} dev {host}")])?;
            self.netns.ip([
                format!("addr add {v6}/128 dev eth0 nodad"),
                format!("neigh add fe80::1 lladdr {mac} dev eth0 nud permanent"),
                "route add default via fe80::1 dev eth0".into(),
            ])?;
        }
        Ok(())
    }

    pub fn name(&self) -> &str {
        &self.name
    }

    pub fn address(&self) -> Address {
        self.address
    }

    pub fn ip(&self) -> Ipv4Addr {
        self.address.v4
    }

    /// None where the kernel has no IPv6.
    pub fn ip6(&self) -> Option<Ipv6Addr> {
        self.address.v6
    }

    pub fn shape(&self) -> Shape {
        self.shape
    }

    pub fn netns(&self) -> &Arc<Netns> {
        &self.netns
    }

    /// The node's end of the pod's veth.
    pub fn host_interface(&self) -> &str {
        &self.host_interface
    }

    pub fn host_mac(&self) -> String {
        let [high, low] = self.number.to_be_bytes();
        format!("ee:ee:ee:ee:{high:02x}:{low:02x}")
    }

    pub fn mac(&self) -> String {
        let [high, low] = self.number.to_be_bytes();
        format!("0a:00:00:00:{high:02x}:{low:02x}")
    }

    /// Run a program in the pod to its end.
    pub fn run(&self, command: &mut Command) -> Result<Output> {
        self.netns.output(command).with_context(|| format!("{} in pod {}", command.get_program().display(), self.name))
    }

    /// A TCP connection from the pod; it stays the pod's wherever it is used.
    pub fn connect(&self, address: impl Into<SocketAddr>) -> std::io::Result<TcpStream> {
        self.netns.connect(address.into(), Duration::from_secs(2))
    }

    /// Take the pod off the node, as CNI DEL does: its address is free when this returns.
    pub fn delete(self) {}
}

impl Drop for Pod {
    fn drop(&mut self) {
        // Without this an open socket would keep the namespace, and with it the route to its address.
        let _ = self.node.ip([format!("link del {}", self.host_interface)]);
    }
}
