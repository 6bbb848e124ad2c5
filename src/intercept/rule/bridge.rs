//! Guard of bridge ports: a pod on a shared Linux bridge can reach the metadata addresses only with its own address.
//!
//! On a routed veth the reply to a spoofed source address goes to the owner of the address. On a bridge the sender can
//! answer ARP for the address, or move the owner's MAC address to its own port, and so read a neighbor's credentials. A
//! table of family `bridge` has the (port, address) pairs of the node's CNI records. Where a frame enters a pod's port,
//! the table drops:
//!
//! - requests to the metadata addresses from a source address of another port, and responses with a metadata address as
//!   source;
//! - ARP, neighbor discovery and source MAC addresses that claim an address of another port, because the agent's
//!   responses would follow them.
//!
//! A second table, of family `netdev`, does the latter for LLDP: bridges learn MAC addresses from it before any hook of
//! family `bridge`.
//!
//! Other traffic, addresses without a record, and ports without a record pass.

mod sets;

use std::{collections::BTreeSet, fmt::Write, net::IpAddr, sync::Arc};

use super::{RedirectRules, TABLE, apply::run};
use crate::intercept::METADATA_PORT;
use sets::Sets;

/// Before NAT in other bridge tables (-300), and before br_netfilter (0), which calls our redirect.
const PRIORITY: i32 = -310;
/// Name of the table of family netdev. It differs from [`TABLE`], because the kernel removes deleted ports from this
/// table, and that must not count as a change of the redirect.
pub(super) const INGRESS: &str = "kirsa_ingress";
/// Maximum number of ports in one chain; the kernel allows 256.
const MAX_DEVICES: usize = 200;

/// A bridge port of a pod, with the addresses that may send there.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub struct PodPort {
    pub interface: Arc<str>,
    pub mac: Option<[u8; 6]>,
    pub addresses: Vec<IpAddr>,
}

impl PodPort {
    /// Returns whether nft reads the quoted name literally: an interface name may contain quotes or end with `*`.
    fn is_plain(&self) -> bool {
        let plain = |byte: u8| byte.is_ascii_alphanumeric() || b"._-@".contains(&byte);
        !self.interface.is_empty() && self.interface.bytes().all(plain)
    }
}

/// Applies and lists the guard. Only nftables can carry it.
#[derive(Debug, Clone, Copy)]
pub struct BridgeGuard {
    rules: RedirectRules,
}

impl RedirectRules {
    /// Returns the guard for the same metadata addresses.
    pub fn bridge_guard(self) -> BridgeGuard {
        BridgeGuard { rules: self }
    }
}

impl BridgeGuard {
    /// Replaces the whole table in one transaction, so it is never missing.
    ///
    /// # Errors
    /// Returns nft's error message.
    pub fn apply(self, ports: &BTreeSet<PodPort>) -> anyhow::Result<()> {
        run("nft", &["-f", "-"], &self.script(ports)).map(drop)
    }

    /// Prevents that a bridge learns another pod's MAC address from LLDP, which passes no hook of family `bridge`.
    ///
    /// # Errors
    /// Returns nft's error message: kernels before 5.5 do not support a chain for many ports, and a port may be gone.
    pub fn apply_ingress(self, ports: &BTreeSet<PodPort>) -> anyhow::Result<()> {
        run("nft", &["-f", "-"], &ingress_script(ports)).map(drop)
    }

    /// Lists the table. Equal ports give equal listings.
    ///
    /// # Errors
    /// Returns nft's error message, also if the table does not exist.
    pub fn listing(self) -> anyhow::Result<String> {
        run("nft", &["--stateless", "list", "table", "bridge", TABLE], "")
    }

    /// Returns whether the table from [`Self::apply_ingress`] exists.
    pub fn has_ingress(self) -> bool {
        run("nft", &["--stateless", "list", "table", "netdev", INGRESS], "").is_ok()
    }

    fn script(self, ports: &BTreeSet<PodPort>) -> String {
        let sets = Sets::of(ports);
        let services = |v6: bool| {
            let addresses = self.rules.services().map(|to| if v6 { to.v6() } else { to.v4() }.to_string());
            format!("{{ {} }}", addresses.collect::<Vec<_>>().join(", "))
        };
        let (v4, v6) = (services(false), services(true));
        // Each rule matches its protocol with `meta`. nft would otherwise read the Ethernet header, which has VLAN as
        // protocol for a frame with a priority tag. The kernel strips nested priority tags one by one.
        format!(
            "table bridge {TABLE}
delete table bridge {TABLE}
table bridge {TABLE} {{
  comment \"kirsa: pods on a bridge reach the metadata addresses only with their own address\"
{sets}  chain prerouting_ports {{
    type filter hook prerouting priority {PRIORITY}; policy accept;
    iifname @ports jump port
  }}
  chain port {{
    ether saddr @macs iifname . ether saddr != @port_macs counter drop
    meta protocol {{ 8021q, 8021ad }} @nh,0,16 & 0x0fff == 0 counter drop
    meta protocol arp arp saddr ip @addresses iifname . arp saddr ip != @port_addresses counter drop
    meta protocol ip6 icmpv6 type {{ 133, 134, 135, 136, 137 }} ip6 saddr @addresses6 iifname . ip6 saddr != @port_addresses6 counter drop
    meta protocol ip6 icmpv6 type nd-neighbor-advert @th,64,128 @targets6 iifname . @th,64,128 != @port_targets6 counter drop
    meta protocol ip ip saddr {v4} counter drop
    meta protocol ip6 ip6 saddr {v6} counter drop
    meta protocol ip ip daddr {v4} iifname . ip saddr != @port_addresses goto foreign
    meta protocol ip6 ip6 daddr {v6} iifname . ip6 saddr != @port_addresses6 goto foreign
  }}
  chain foreign {{
    meta l4proto tcp tcp dport {METADATA_PORT} counter drop
    meta protocol ip ip frag-off & 0x3fff != 0 counter drop
    meta protocol ip6 exthdr frag exists counter drop
  }}
}}
"
        )
    }
}

fn ingress_script(ports: &BTreeSet<PodPort>) -> String {
    let sets = Sets::of(ports);
    let (mut macs, mut chains) = (String::new(), String::new());
    // Writing to a string cannot fail.
    let _ = sets.macs.write(&mut macs, "macs", "type %ether_addr");
    for (number, devices) in sets.ports.iter().collect::<Vec<_>>().chunks(MAX_DEVICES).enumerate() {
        let devices = devices.iter().map(|device| device.as_str()).collect::<Vec<_>>().join(", ");
        let _ = write!(
            chains,
            "  chain ports{number} {{
    type filter hook ingress devices = {{ {devices} }} priority {PRIORITY}; policy accept;
    @ll,0,40 0x0180c20000 ether saddr @macs iifname . ether saddr != @port_macs counter drop
  }}
"
        );
    }
    format!("table netdev {INGRESS}\ndelete table netdev {INGRESS}\ntable netdev {INGRESS} {{\n{macs}{chains}}}\n")
}

#[cfg(test)]
mod tests {
    use super::{super::HostAddresses, *};

    fn port(interface: &str, address: &str) -> PodPort {
        PodPort { interface: interface.into(), mac: None, addresses: vec![address.parse().unwrap()] }
    }

    fn script(ports: &[PodPort], container: bool) -> String {
        let host = HostAddresses { v4: None, v6: None };
        RedirectRules { host, port: 338, container }.bridge_guard().script(&ports.iter().cloned().collect())
    }

    #[test]
    fn sets_hold_addresses_and_port_pairs() {
        let mac = PodPort { mac: Some([10, 0, 0, 0, 0, 0xff]), ..port("veth1", "10.0.0.1") };
        let script = script(&[mac, port("veth2", "fd00::2")], false);
        for wanted in [
            "set ports { type ifname; elements = { \"veth1\", \"veth2\" } }",
            "set macs { type ether_addr; elements = { 0a:00:00:00:00:ff } }",
            "set port_addresses { type ifname . ipv4_addr; elements = { \"veth1\" . 10.0.0.1 } }",
            "set addresses6 { type ipv6_addr; elements = { fd00::2 } }",
            "set port_targets6 { typeof iifname . @th,64,128; elements = { \"veth2\" . \
             0xfd000000000000000000000000000002 } }",
        ] {
            assert!(script.contains(wanted), "{wanted}: {script}");
        }
        assert!(script.contains("ip daddr { 169.254.169.254 } iifname . ip saddr != @port_addresses goto foreign"));
    }

    #[test]
    fn container_addresses_are_guarded_if_enabled() {
        let without = script(&[port("veth1", "10.0.0.1")], false);
        assert!(!without.contains("169.254.170.23") && !without.contains("fd00:ec2::23"), "{without}");
        let with = script(&[port("veth1", "10.0.0.1")], true);
        assert!(with.contains("{ 169.254.169.254, 169.254.170.23 }") && with.contains("fd00:ec2::23"), "{with}");
    }

    #[test]
    fn ingress_chains_have_at_most_200_ports() {
        let ports = (0..401).map(|number| port(&format!("veth{number}"), "10.0.0.1")).collect();
        assert_eq!(ingress_script(&ports).matches("hook ingress").count(), 3);
    }

    /// Interface names come from CNI records, which are untrusted text.
    #[test]
    fn names_with_nft_syntax_are_skipped() {
        let odd = ["veth*", "a\" }; flush ruleset; {", "", "a b"].map(|name| port(name, "10.0.0.1"));
        assert_eq!(script(&odd, false), script(&[], false));
        assert!(script(&[], false).contains("set ports { type ifname; }"));
        assert!(!ingress_script(&odd.iter().cloned().collect()).contains("chain"));
    }
}
