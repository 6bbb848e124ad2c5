//! Other agents for the metadata address, by what listens. The EKS Pod Identity agent answers at an address of its own
//! and is no rival.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};

use super::{finding::Finding, others::CHECK};
use crate::intercept::{METADATA_PORT, METADATA_V4, METADATA_V6};

/// Amazon EKS User Guide, "How EKS Pod Identity works".
const POD_IDENTITY: [IpAddr; 2] =
    [IpAddr::V4(Ipv4Addr::new(169, 254, 170, 23)), IpAddr::V6(Ipv6Addr::new(0xfd00, 0xec2, 0, 0, 0, 0, 0, 0x23))];

/// Says nothing where there are none.
pub(super) fn check() -> Vec<Finding> {
    let listening = listening();
    let metadata: [IpAddr; 2] = [METADATA_V4.into(), METADATA_V6.into()];
    let found =
        |of: &[IpAddr]| listening.iter().find(|at| at.port() == METADATA_PORT && of.contains(&at.ip())).copied();
    let mut findings = Vec::new();
    if let Some(at) = found(&POD_IDENTITY) {
        findings.push(Finding::warning(
            CHECK,
            format!("the EKS Pod Identity agent listens on {at}: another address, which pods learn from variables"),
            "it may stay; a pod whose SDK knows Pod Identity and that has an association uses that one",
        ));
    }
    if let Some(at) = found(&metadata) {
        findings.push(Finding::warning(
            CHECK,
            format!("a process of this node listens on {at}: another metadata service"),
            "pods do not reach it while our redirect is there; remove it if the node does not need it",
        ));
    }
    findings
}

/// What listens in this network namespace, as the kernel lists it.
fn listening() -> Vec<SocketAddr> {
    let tables = ["/proc/net/tcp", "/proc/net/tcp6"].map(|table| std::fs::read_to_string(table).unwrap_or_default());
    tables.iter().flat_map(|table| table.lines().skip(1)).filter_map(listener).collect()
}

/// A line of these tables: number, local address, remote address, state, … (Documentation/networking/proc_net_tcp.rst).
fn listener(line: &str) -> Option<SocketAddr> {
    const LISTEN: &str = "0A";
    let mut fields = line.split_whitespace().skip(1);
    let (address, port) = fields.next()?.split_once(':')?;
    if fields.nth(1)? != LISTEN {
        return None;
    }
    // Words of the network's order, printed as numbers of this machine's.
    let words = (0..address.len()).step_by(8).map(|at| u32::from_str_radix(address.get(at..at + 8)?, 16).ok());
    let bytes: Vec<u8> = words.collect::<Option<Vec<u32>>>()?.into_iter().flat_map(u32::to_ne_bytes).collect();
    let ip = match bytes.len() {
        4 => IpAddr::from(<[u8; 4]>::try_from(bytes).ok()?),
        _ => IpAddr::from(<[u8; 16]>::try_from(bytes).ok()?),
    };
    Some(SocketAddr::new(ip, u16::from_str_radix(port, 16).ok()?))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_kernels_list_of_sockets_is_read() {
        let line = |address: &str, state: &str| format!("   0: {address} 00000000:0000 {state} 00000000:00000000 00:0");
        assert_eq!(listener(&line("17AAFEA9:0050", "0A")), Some((POD_IDENTITY[0], 80).into()));
        assert_eq!(listener(&line("17AAFEA9:0050", "01")), None, "a connection");
        assert_eq!(listener(&line("C20E00FD000000000000000023000000:0050", "0A")), Some((POD_IDENTITY[1], 80).into()));
    }
}
