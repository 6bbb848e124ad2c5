//! A Kubernetes node as a network namespace, and the network around it.
//!
//! ```text
//! base namespace (the program)             node                        vpc
//!   10.251.0.1 on lo                         eth0 10.250.n.10 ────────── 10.250.n.1, default route
//!   10.251.n.1 ─────────────── mgmt 10.251.n.2                            169.254.169.254 on lo
//!                                            │
//!                                            └── pods 10.244.n.0/24
//! ```
//! The same in IPv6 under fd00:. Whatever leaves the node for the metadata address is seen in `vpc`.
//! Knows nothing about kirsa or Kubernetes' objects.

use std::fs;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, TcpListener};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicU8, Ordering};

use anyhow::{Context, Result};

use crate::namespace::{self, BASE, BASE6, has_ipv6};
use crate::netns::Netns;

mod pod;

pub use pod::{Address, Pod, Shape};

pub const METADATA: Ipv4Addr = Ipv4Addr::new(169, 254, 169, 254);
pub const METADATA6: Ipv6Addr = Ipv6Addr::new(0xfd00, 0xec2, 0, 0, 0, 0, 0, 0x254);

/// Where container credentials are asked for.
pub const CONTAINER: Ipv4Addr = Ipv4Addr::new(169, 254, 170, 23);
pub const CONTAINER6: Ipv6Addr = Ipv6Addr::new(0xfd00, 0xec2, 0, 0, 0, 0, 0, 0x23);

#[derive(Debug)]
pub struct Node {
    name: String,
    /// The third byte of every address of this node.
    index: u8,
    netns: Arc<Netns>,
    vpc: Netns,
    state: PathBuf,
    next_host: AtomicU8,
}

impl Node {
    /// A node with a name and addresses that no other node of this program has.
    pub fn new() -> Result<Self> {
        static NEXT: AtomicU8 = AtomicU8::new(1);
        let index = NEXT.fetch_add(1, Ordering::Relaxed);
        let name = format!("node{index}");
        let state = Path::new(namespace::STATE).join(&name);
        fs::create_dir(&state).with_context(|| state.display().to_string())?;
        let node = Self {
            netns: Arc::new(Netns::create(&name)?),
            vpc: Netns::create(&format!("vpc{index}"))?,
            next_host: AtomicU8::new(2),
            name,
            index,
            state,
        };
        node.join_base().context("joining the node to the base namespace")?;
        node.join_vpc().context("joining the node to the network outside")?;
        Ok(node)
    }

    fn join_base(&self) -> Result<()> {
        let Self { name, index: n, netns, .. } = self;
        namespace::ip(&format!("link add mgmt{n} type veth peer name mgmt netns {name}"))?;
        namespace::ip(&format!("addr add 10.251.{n}.1/24 dev mgmt{n}"))?;
        namespace::ip(&format!("link set mgmt{n} up"))?;
        netns.ip([
            format!("addr add 10.251.{n}.2/24 dev mgmt"),
            "link set mgmt up".into(),
            format!("route add {BASE} via 10.251.{n}.1"),
        ])?;
        namespace::ip(&format!("route add 10.244.{n}.0/24 via 10.251.{n}.2"))?;
        namespace::ip(&format!("route add {} via 10.251.{n}.2", self.host_ip()))?;
        let Some(host_ip6) = self.host_ip6() else {
            return Ok(());
        };
        namespace::ip(&format!("addr add fd00:251:{n}::1/64 dev mgmt{n} nodad"))?;
        netns.ip([
            format!("addr add fd00:251:{n}::2/64 dev mgmt nodad"),
            format!("route add {BASE6} via fd00:251:{n}::1"),
        ])?;
        namespace::ip(&format!("route add fd00:244:{n}::/64 via fd00:251:{n}::2"))?;
        namespace::ip(&format!("route add {host_ip6} via fd00:251:{n}::2"))
    }

    fn join_vpc(&self) -> Result<()> {
        let Self { index: n, netns, vpc, .. } = self;
        let host_ip = self.host_ip();
        netns.ip([format!("link add eth0 type veth peer name node netns {}", vpc.name())])?;
        vpc.ip([
            format!("addr add 10.250.{n}.1/24 dev node"),
            format!("addr add {METADATA}/32 dev lo"),
            "link set node up".into(),
            format!("route add 10.244.{n}.0/24 via {host_ip}"),
        ])?;
        netns.ip([
            format!("addr add {host_ip}/24 dev eth0"),
            "link set eth0 up".into(),
            format!("route add default via 10.250.{n}.1"),
        ])?;
        let Some(host_ip6) = self.host_ip6() else {
            return Ok(());
        };
        vpc.ip([
            format!("addr add fd00:250:{n}::1/64 dev node nodad"),
            format!("addr add {METADATA6}/128 dev lo nodad"),
            format!("route add fd00:244:{n}::/64 via {host_ip6}"),
        ])?;
        netns.ip([format!("addr add {host_ip6}/64 dev eth0 nodad"), format!("route add default via fd00:250:{n}::1")])
    }

    pub fn name(&self) -> &str {
        &self.name
    }

    /// The address of `eth0`, which Kubernetes calls the host IP.
    pub fn host_ip(&self) -> Ipv4Addr {
        Ipv4Addr::new(10, 250, self.index, 10)
    }

    /// None where the kernel has no IPv6.
    pub fn host_ip6(&self) -> Option<Ipv6Addr> {
        has_ipv6().then(|| Ipv6Addr::new(0xfd00, 0x250, hextet(self.index), 0, 0, 0, 0, 0x10))
    }

    /// All of the node's host IPs, as the downward API's `status.hostIPs` gives them.
    pub fn host_ips(&self) -> Vec<IpAddr> {
        let v6 = self.host_ip6().map(IpAddr::V6);
        [IpAddr::V4(self.host_ip())].into_iter().chain(v6).collect()
    }

    pub fn netns(&self) -> &Arc<Netns> {
        &self.netns
    }

    /// The network outside the node: the canary lives there.
    pub fn vpc(&self) -> &Netns {
        &self.vpc
    }

    /// A folder for what the node's disk would hold.
    pub fn state(&self) -> &Path {
        &self.state
    }

    /// A listener in the node's namespace.
    pub fn listen(&self, address: SocketAddr) -> Result<TcpListener> {
        self.netns.listen(address).with_context(|| format!("{address} on {}", self.name))
    }

    /// A listener outside the node on the metadata address itself: what a leak, and the node, would reach.
    pub fn listen_metadata(&self) -> Result<TcpListener> {
        self.vpc.listen((METADATA, 80).into()).with_context(|| format!("{METADATA}:80"))
    }

    /// The same for IPv6; none where the kernel has none.
    pub fn listen_metadata6(&self) -> Result<Option<TcpListener>> {
        has_ipv6()
            .then(|| self.vpc.listen((METADATA6, 80).into()))
            .transpose()
            .with_context(|| format!("[{METADATA6}]:80"))
    }

    /// An address of this node's range that no pod has had yet.
    pub fn allocate(&self) -> Address {
        Address::new(self.index, self.next_host.fetch_add(1, Ordering::Relaxed))
    }

    /// A pod with an address of its own.
    pub fn pod(&self, name: &str, shape: Shape) -> Result<Pod> {
        self.pod_at(name, shape, self.allocate())
    }

    /// A pod with a given address, such as that of a pod that was deleted.
    pub fn pod_at(&self, name: &str, shape: Shape, address: Address) -> Result<Pod> {
        Pod::create(&self.netns, self.index, name, shape, address)
            .with_context(|| format!("pod {name} on {}", self.name))
    }
}

/// `n` as the address text shows it: `fd00:250:12::` for node 12.
fn hextet(n: u8) -> u16 {
    u16::from_str_radix(&n.to_string(), 16).expect("decimal digits are hexadecimal digits")
}
