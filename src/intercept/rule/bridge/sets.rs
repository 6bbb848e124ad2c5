//! nftables sets of the guard: the addresses of all ports, and the (port, address) pairs.

use std::{
    collections::BTreeSet,
    fmt::{self, Display, Write},
    net::{IpAddr, Ipv4Addr, Ipv6Addr},
};

use super::PodPort;

/// Elements of the sets, in nft's syntax.
#[derive(Debug, Default)]
pub(super) struct Sets {
    pub(super) ports: BTreeSet<String>,
    pub(super) macs: Pairs,
    addresses: Pairs,
    addresses6: Pairs,
    /// IPv6 addresses as integers: nft can match targets of neighbor discovery only as raw payload.
    targets6: Pairs,
}

/// Addresses of one kind, alone and in pairs with their port.
#[derive(Debug, Default)]
pub(super) struct Pairs {
    values: BTreeSet<String>,
    with_port: BTreeSet<String>,
}

impl Pairs {
    fn insert(&mut self, port: &str, value: impl Display) {
        self.values.insert(value.to_string());
        self.with_port.insert(format!("{port} . {value}"));
    }

    /// Writes both sets. The pairs have the port's type in place of `%` in `kind`.
    pub(super) fn write(&self, f: &mut dyn Write, name: &str, kind: &str) -> fmt::Result {
        let port = if kind.starts_with("typeof") { "iifname . " } else { "ifname . " };
        set(f, name, &kind.replace('%', ""), &self.values)?;
        set(f, &format!("port_{name}"), &kind.replace('%', port), &self.with_port)
    }
}

fn set(f: &mut dyn Write, name: &str, kind: &str, elements: &BTreeSet<String>) -> fmt::Result {
    write!(f, "  set {name} {{ {kind}; ")?;
    for (index, element) in elements.iter().enumerate() {
        f.write_str(if index == 0 { "elements = { " } else { ", " })?;
        f.write_str(element)?;
    }
    f.write_str(if elements.is_empty() { "}\n" } else { " } }\n" })
}

impl Sets {
    pub(super) fn of(ports: &BTreeSet<PodPort>) -> Self {
        let mut sets = Self::default();
        for port in ports.iter().filter(|port| port.is_plain()) {
            let name = format!("\"{}\"", port.interface);
            if let Some(mac) = port.mac {
                sets.macs.insert(&name, mac.map(|byte| format!("{byte:02x}")).join(":"));
            }
            for address in &port.addresses {
                match address.to_canonical() {
                    IpAddr::V4(v4) => sets.addresses.insert(&name, Ipv4Addr::from(v4.octets())),
                    IpAddr::V6(v6) => {
                        sets.addresses6.insert(&name, Ipv6Addr::from(v6.octets()));
                        sets.targets6.insert(&name, format!("{:#034x}", u128::from(v6)));
                    }
                }
            }
            sets.ports.insert(name);
        }
        sets
    }
}

impl Display for Sets {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        set(f, "ports", "type ifname", &self.ports)?;
        self.macs.write(f, "macs", "type %ether_addr")?;
        self.addresses.write(f, "addresses", "type %ipv4_addr")?;
        self.addresses6.write(f, "addresses6", "type %ipv6_addr")?;
        self.targets6.write(f, "targets6", "typeof %@th,64,128")
    }
}
