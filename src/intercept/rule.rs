//! The redirect as data, and its two renderings.
//!
//! What must hold, whichever rendering: a pod's connection to the metadata address reaches this agent or nobody. So it
//! is DNATed to the node's address (the host end of a pod's veth may have no address that `REDIRECT` could use, and
//! DNAT to loopback would need `route_localnet`, CVE-2020-8558), and what is forwarded to the metadata address all the
//! same is dropped. The rules stay when the agent ends: then a connection is refused, and never reaches the node's own
//! role.
//!
//! There is no interface to configure: `fib saddr type != local` in prerouting is pod traffic on every veth CNI, and
//! the node's own packets never pass prerouting.

mod apply;

use std::{
    fmt::Write,
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr},
};

use clap::ValueEnum;

use super::{METADATA_PORT, Service, probe::MARK};

pub use apply::{Installed, drop_privileges, install, uninstall};

/// How connections are brought here.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum Backend {
    /// nft where it works, iptables otherwise.
    Auto,
    /// One nftables table of our own.
    Nft,
    /// Chains of our own in the iptables nat and filter tables.
    Iptables,
    /// A redirect that somebody else maintains.
    None,
}

/// This node's addresses: where the agent listens and the redirect leads.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct HostAddresses {
    pub v4: Option<Ipv4Addr>,
    pub v6: Option<Ipv6Addr>,
}

impl HostAddresses {
    pub fn iter(self) -> impl Iterator<Item = IpAddr> {
        self.v4.map(IpAddr::V4).into_iter().chain(self.v6.map(IpAddr::V6))
    }
}

/// What the rules say.
#[derive(Debug, Clone, Copy)]
pub struct RuleSet {
    pub host: HostAddresses,
    pub port: u16,
    /// Whether connections for container credentials are brought here too.
    pub container: bool,
}

/// The name of our nftables table, family inet.
pub const TABLE: &str = "kirsa";
/// Our iptables chains: table, built-in chain that jumps, own chain.
pub const CHAINS: [(&str, &str, &str); 3] = [
    ("nat", "PREROUTING", "KIRSA-PREROUTING"),
    ("nat", "OUTPUT", "KIRSA-OUTPUT"),
    ("filter", "FORWARD", "KIRSA-FORWARD"),
];

impl RuleSet {
    /// Each of this node's addresses that connections are led to, with the service that they were meant for.
    pub fn ways(&self) -> impl Iterator<Item = (IpAddr, Service)> {
        self.services().flat_map(|service| self.host.iter().map(move |host| (host, service)))
    }

    fn services(&self) -> impl Iterator<Item = Service> {
        [Service::Metadata, Service::Container].into_iter().filter(|of| self.container || *of != Service::Container)
    }

    /// A script for `nft -f -`, which applies it as one transaction: there is no moment without the rules.
    fn nft(&self) -> String {
        let mut redirect = String::new();
        let mut probe = String::new();
        let mut drop = String::new();
        for (host, service) in self.ways() {
            let family = if host.is_ipv4() { "ip" } else { "ip6" };
            let (to, target) = (service.of_family(host), SocketAddr::new(host, self.port));
            // The address first: looking up where a packet comes from costs every new connection of the node.
            let (at, dnat) =
                (format!("{family} daddr {to} tcp dport {METADATA_PORT}"), format!("dnat {family} to {target}"));
            let _ = writeln!(redirect, "    {at} fib saddr type != local {dnat}");
            let _ = writeln!(probe, "    {at} meta mark {MARK:#x} {dnat}");
        }
        for service in self.services() {
            let _ = writeln!(drop, "    ip daddr {} drop\n    ip6 daddr {} drop", service.v4(), service.v6());
        }
        // 10 before the place of kube-proxy and of iptables' nat table, which a redirect of theirs must not overtake.
        format!(
            "table inet {TABLE}
delete table inet {TABLE}
table inet {TABLE} {{
  comment \"kirsa: pods' way to the instance metadata service\"
  chain prerouting {{
    type nat hook prerouting priority -110; policy accept;
{redirect}  }}
  chain output {{
    type nat hook output priority -110; policy accept;
{probe}  }}
  chain forward {{
    type filter hook forward priority -10; policy accept;
{drop}  }}
}}
"
        )
    }

    /// Input for `iptables-restore --noflush` (or `ip6tables-restore`). `jumps` tells which of [`CHAINS`] are jumped
    /// to already: those jumps move to the top in the same transaction.
    fn iptables(&self, v6: bool, jumps: [bool; CHAINS.len()]) -> String {
        let target = match v6 {
            true => self.host.v6.map(|v6| format!("[{v6}]:{}", self.port)),
            false => self.host.v4.map(|v4| format!("{v4}:{}", self.port)),
        };
        let addresses =
            || self.services().map(|of| if v6 { format!("{}/128", of.v6()) } else { format!("{}/32", of.v4()) });
        let mut script = String::new();
        for table in ["nat", "filter"] {
            let ours = || CHAINS.iter().zip(jumps).filter(|((of, ..), _)| *of == table);
            let _ = writeln!(script, "*{table}");
            for ((_, _, chain), _) in ours() {
                let _ = writeln!(script, ":{chain} - [0:0]");
            }
            for ((_, builtin, chain), jumps) in ours() {
                if jumps {
                    let _ = writeln!(script, "-D {builtin} -j {chain}");
                }
                let _ = writeln!(script, "-I {builtin} 1 -j {chain}");
            }
            for address in addresses() {
                match (table, &target) {
                    ("filter", _) => {
                        let _ = writeln!(script, "-A KIRSA-FORWARD -d {address} -j DROP");
                    }
                    (_, Some(target)) => {
                        let to = format!(
                            "-d {address} -p tcp -m tcp --dport {METADATA_PORT} -j DNAT --to-destination {target}"
                        );
                        let _ = writeln!(script, "-A KIRSA-PREROUTING -m addrtype ! --src-type LOCAL {to}");
                        let _ = writeln!(script, "-A KIRSA-OUTPUT -m mark --mark {MARK:#x} {to}");
                    }
                    (_, None) => {}
                }
            }
            script.push_str("COMMIT\n");
        }
        script
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const RULES: RuleSet =
        RuleSet { host: HostAddresses { v4: Some(Ipv4Addr::new(10, 0, 0, 1)), v6: None }, port: 338, container: false };

    #[test]
    fn nft_replaces_the_whole_table_at_once() {
        let script = RULES.nft();
        assert!(script.starts_with("table inet kirsa\ndelete table inet kirsa\ntable inet kirsa {"), "{script}");
        assert!(
            script.contains("ip daddr 169.254.169.254 tcp dport 80 fib saddr type != local dnat ip to 10.0.0.1:338")
        );
        assert!(script.contains("ip daddr 169.254.169.254 tcp dport 80 meta mark 0x6b dnat ip to 10.0.0.1:338"));
    }

    /// A node without an IPv6 address of its own must not leave the IPv6 metadata address open.
    #[test]
    fn the_family_that_is_not_redirected_is_dropped() {
        assert!(RULES.nft().contains("ip6 daddr fd00:ec2::254 drop"));
        let v6 = RULES.iptables(true, [false; 3]);
        assert!(v6.contains("-A KIRSA-FORWARD -d fd00:ec2::254/128 -j DROP") && !v6.contains("DNAT"), "{v6}");
    }

    #[test]
    fn iptables_jumps_move_to_the_top_and_never_double() {
        let first = RULES.iptables(false, [false; 3]);
        assert!(first.contains("-I PREROUTING 1 -j KIRSA-PREROUTING") && !first.contains("-D "), "{first}");
        let again = RULES.iptables(false, [true; 3]);
        assert!(again.contains("-D PREROUTING -j KIRSA-PREROUTING\n-I PREROUTING 1 -j KIRSA-PREROUTING"), "{again}");
    }

    /// Another agent's address stays that agent's, unless it was asked for.
    #[test]
    fn container_credentials_are_redirected_and_dropped_only_when_asked_for() {
        let with = RuleSet { container: true, ..RULES };
        for (with, without) in [
            (with.nft(), RULES.nft()),
            (with.iptables(false, [false; 3]) + &with.iptables(true, [false; 3]), RULES.iptables(false, [false; 3])),
        ] {
            assert!(!without.contains("169.254.170.23") && !without.contains("fd00:ec2::23"), "{without}");
            assert!(with.contains("169.254.169.254") && with.contains("fd00:ec2::23"), "{with}");
            let lines: Vec<&str> = with.lines().filter(|line| line.contains("169.254.170.23")).collect();
            assert_eq!(lines.len(), 3, "redirect, its twin for the probe, and the drop: {with}");
        }
    }
}
