//! The redirect as data, rendered for nftables or iptables.
//!
//! Both fail closed: a pod's connection to the metadata address reaches this agent or is refused. Connections are
//! DNATed to the node's address: the host end of a pod's veth may have no address that `REDIRECT` could use, and DNAT
//! to loopback would need `route_localnet` (<https://nvd.nist.gov/vuln/detail/CVE-2020-8558>). Packets that are
//! forwarded to the metadata address nevertheless are rejected. The rules stay when the agent exits: connections are
//! then refused, and never reach the node's own role.
//!
//! There is no interface to configure: `fib saddr type != local` in prerouting matches pod traffic on every veth CNI,
//! and the node's own packets never pass prerouting.

mod apply;
mod bridge;
mod policy_routing;

use std::{
    fmt::Write,
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr},
};

use clap::ValueEnum;

use super::{METADATA_PORT, MetadataService, self_test::MARK};

pub use apply::{Installed, drop_privileges, install, uninstall};
pub use bridge::{BridgeGuard, PodPort};
pub use policy_routing::listing as policy_routing_listing;

/// Tool that redirects connections to the agent.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum Backend {
    /// nft if it works, iptables otherwise.
    Auto,
    /// Our own nftables table.
    Nft,
    /// Our own chains in the iptables nat, filter and mangle tables.
    Iptables,
    /// No rules: another component maintains the redirect.
    None,
}

/// This node's addresses: the agent listens on them, and the redirect leads to them.
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

/// Parameters of the redirect's rules.
#[derive(Debug, Clone, Copy)]
pub struct RedirectRules {
    pub host: HostAddresses,
    pub port: u16,
    /// Redirects connections for container credentials too.
    pub container: bool,
}

/// Name of our nftables table of family inet.
pub const TABLE: &str = "kirsa";
/// Our iptables chains: table, built-in chain with the jump, own chain.
pub const CHAINS: [(&str, &str, &str); 5] = [
    ("nat", "PREROUTING", "KIRSA-PREROUTING"),
    ("nat", "OUTPUT", "KIRSA-OUTPUT"),
    ("filter", "FORWARD", "KIRSA-FORWARD"),
    // Runs after `filter`, so an ACCEPT that another program inserts there does not bypass it.
    ("mangle", "POSTROUTING", "KIRSA-POSTROUTING"),
    ("mangle", "PREROUTING", "KIRSA-MARK"),
];

impl RedirectRules {
    /// Returns each DNAT target address, with the service whose connections it receives.
    pub fn dnat_targets(&self) -> impl Iterator<Item = (IpAddr, MetadataService)> {
        self.services().flat_map(|service| self.host.iter().map(move |host| (host, service)))
    }

    fn services(&self) -> impl Iterator<Item = MetadataService> {
        [MetadataService::Metadata, MetadataService::Container]
            .into_iter()
            .filter(|service| self.container || *service != MetadataService::Container)
    }

    /// Renders a script for `nft -f -`, which applies it as one transaction, so the rules are never missing.
    ///
    /// `reject_early` resets unredirected connections in prerouting. Otherwise policy routing would answer with an ICMP
    /// error, which a client on this node ignores until it repeats the SYN after a second, because it still holds its
    /// socket. Kernels before 5.9 cannot reject in prerouting: the SYN gets a mark that routes it to the forward chain.
    fn nft(&self, reject_early: bool) -> String {
        let mut redirect = String::new();
        let mut self_test = String::new();
        let (mut refuse, mut forward, mut postrouting) = (String::new(), String::new(), String::new());
        for (host, service) in self.dnat_targets() {
            let family = if host.is_ipv4() { "ip" } else { "ip6" };
            let (to, target) = (service.address_for(host), SocketAddr::new(host, self.port));
            // Match the address first: the fib lookup would otherwise slow down every new connection of the node.
            let (at, dnat) =
                (format!("{family} daddr {to} tcp dport {METADATA_PORT}"), format!("dnat {family} to {target}"));
            let _ = writeln!(redirect, "    {at} fib saddr type != local {dnat}");
            let _ = writeln!(self_test, "    {at} meta mark {MARK:#x} {dnat}");
        }
        let verdict = match reject_early {
            true => "reject with tcp reset".to_owned(),
            false => format!("tcp flags & (fin | syn | rst | ack) == syn meta mark set {MARK:#x}"),
        };
        for service in self.services() {
            // Match only the port with credentials: other clouds serve DNS at the same address.
            for (family, to) in [("ip", service.v4()), ("ip6", service.v6())] {
                let at = format!("{family} daddr {to} tcp dport {METADATA_PORT}");
                let _ = writeln!(refuse, "    {at} fib saddr type != local {verdict}");
                let _ = writeln!(forward, "    {at} reject with tcp reset");
                let _ = writeln!(postrouting, "    {at} fib saddr type != local drop");
            }
        }
        // prerouting and output: 10 before kube-proxy and iptables' nat table, so that no other redirect comes first.
        // refuse: after -100, where the kernel does DNAT regardless of the priority of a nat chain.
        // postrouting: IPVS sends a Service's connections without forwarding them. Packets cannot be rejected here.
        format!(
            "table inet {TABLE}
delete table inet {TABLE}
table inet {TABLE} {{
  comment \"kirsa: redirect of pods' connections to the metadata service\"
  chain prerouting {{
    type nat hook prerouting priority -110; policy accept;
{redirect}  }}
  chain refuse {{
    type filter hook prerouting priority -90; policy accept;
{refuse}  }}
  chain output {{
    type nat hook output priority -110; policy accept;
{self_test}  }}
  chain forward {{
    type filter hook forward priority -10; policy accept;
{forward}  }}
  chain postrouting {{
    type filter hook postrouting priority -150; policy accept;
{postrouting}  }}
}}
"
        )
    }

    /// Renders input for `iptables-restore --noflush` or `ip6tables-restore`. `jumps` holds which of [`CHAINS`] have a
    /// jump already: those jumps move to the top in the same transaction.
    fn iptables(&self, v6: bool, jumps: [bool; CHAINS.len()]) -> String {
        let target = match v6 {
            true => self.host.v6.map(|v6| format!("[{v6}]:{}", self.port)),
            false => self.host.v4.map(|v4| format!("{v4}:{}", self.port)),
        };
        let addresses =
            || self.services().map(|to| if v6 { format!("{}/128", to.v6()) } else { format!("{}/32", to.v4()) });
        let mut script = String::new();
        for table in ["nat", "filter", "mangle"] {
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
                let to = format!("-d {address} -p tcp -m tcp --dport {METADATA_PORT}");
                let pods = "-m addrtype ! --src-type LOCAL";
                let _ = match (table, &target) {
                    ("filter", _) => writeln!(script, "-A KIRSA-FORWARD {to} -j REJECT --reject-with tcp-reset"),
                    ("nat", Some(target)) => {
                        let to = format!("{to} -j DNAT --to-destination {target}");
                        let _ = writeln!(script, "-A KIRSA-PREROUTING {pods} {to}");
                        writeln!(script, "-A KIRSA-OUTPUT -m mark --mark {MARK:#x} {to}")
                    }
                    ("nat", None) => Ok(()),
                    (_, target) => {
                        // iptables has no REJECT in prerouting, so the SYN gets a mark that routes it to the forward
                        // chain (see `nft`). Only the SYN is marked, so the mark lets no connection through.
                        let mark = format!("-A KIRSA-MARK {to} --syn {pods} -j MARK --set-xmark {MARK:#x}\n");
                        script.push_str(if target.is_none() { &mark } else { "" });
                        writeln!(script, "-A KIRSA-POSTROUTING {to} {pods} -j DROP")
                    }
                };
            }
            script.push_str("COMMIT\n");
        }
        script
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const RULES: RedirectRules = RedirectRules {
        host: HostAddresses { v4: Some(Ipv4Addr::new(10, 0, 0, 1)), v6: None },
        port: 338,
        container: false,
    };

    #[test]
    fn nft_replaces_the_table_in_one_transaction() {
        let script = RULES.nft(true);
        assert!(script.starts_with("table inet kirsa\ndelete table inet kirsa\ntable inet kirsa {"), "{script}");
        assert!(
            script.contains("ip daddr 169.254.169.254 tcp dport 80 fib saddr type != local dnat ip to 10.0.0.1:338")
        );
        assert!(script.contains("ip daddr 169.254.169.254 tcp dport 80 meta mark 0x6b dnat ip to 10.0.0.1:338"));
    }

    /// On a node without an IPv6 address, the IPv6 metadata address must not stay reachable.
    #[test]
    fn family_without_host_address_is_refused() {
        let at = "ip6 daddr fd00:ec2::254 tcp dport 80";
        assert!(RULES.nft(true).contains(&format!("{at} fib saddr type != local reject with tcp reset")));
        assert!(RULES.nft(false).contains("fib saddr type != local tcp flags & (fin | syn | rst | ack) == syn"));
        assert!(RULES.nft(false).contains(&format!("{at} reject with tcp reset")));
        let v6 = RULES.iptables(true, [false; CHAINS.len()]);
        assert!(
            v6.contains("-A KIRSA-FORWARD -d fd00:ec2::254/128 -p tcp -m tcp --dport 80 -j REJECT")
                && v6.contains("--dport 80 --syn -m addrtype ! --src-type LOCAL -j MARK --set-xmark 0x6b\n")
                && !v6.contains("DNAT"),
            "{v6}"
        );
        assert!(!RULES.iptables(false, [false; CHAINS.len()]).contains("-j MARK"));
    }

    #[test]
    fn iptables_jumps_move_to_the_top() {
        let first = RULES.iptables(false, [false; CHAINS.len()]);
        assert!(first.contains("-I PREROUTING 1 -j KIRSA-PREROUTING") && !first.contains("-D "), "{first}");
        let again = RULES.iptables(false, [true; CHAINS.len()]);
        assert!(again.contains("-D PREROUTING -j KIRSA-PREROUTING\n-I PREROUTING 1 -j KIRSA-PREROUTING"), "{again}");
    }

    /// The EKS Pod Identity agent keeps its address unless container credentials are enabled.
    #[test]
    fn container_rules_are_opt_in() {
        let with = RedirectRules { container: true, ..RULES };
        let iptables = |rules: RedirectRules, v6| rules.iptables(v6, [false; CHAINS.len()]);
        for (with, without, count) in [
            (with.nft(false), RULES.nft(false), 5),
            (iptables(with, false) + &iptables(with, true), iptables(RULES, false) + &iptables(RULES, true), 4),
        ] {
            assert!(!without.contains("169.254.170.23") && !without.contains("fd00:ec2::23"), "{without}");
            assert!(with.contains("169.254.169.254") && with.contains("fd00:ec2::23"), "{with}");
            let lines = with.lines().filter(|line| line.contains("169.254.170.23")).count();
            assert_eq!(lines, count, "redirect, its copy for the self-test, and one in each other chain: {with}");
        }
    }
}
