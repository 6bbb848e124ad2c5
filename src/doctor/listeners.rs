//! Other agents for the metadata address, by what listens. The EKS Pod Identity agent answers at an address of its own
//! and is no rival, unless container credentials are served.

use std::net::{IpAddr, SocketAddr};

use super::{finding::Finding, others::CHECK};
use crate::intercept::{METADATA_PORT, Service};

/// Where an EKS Pod Identity agent listens, if one does.
pub fn pod_identity_agent() -> Option<SocketAddr> {
    on(Service::Container)
}

/// Says nothing where there are none.
pub(super) fn check(container: bool) -> Vec<Finding> {
    let mut findings = Vec::new();
    match on(Service::Container) {
        Some(at) if container => findings.push(Finding::warning(
            CHECK,
            format!("the EKS Pod Identity agent listens on {at}, and --container-credentials takes its requests"),
            "pods get the role of their service account's annotation instead of that of their association: leave \
             --container-credentials out, or remove that agent",
        )),
        Some(at) => findings.push(Finding::warning(
            CHECK,
            format!("the EKS Pod Identity agent listens on {at}: another address, which pods learn from variables"),
            "it may stay; a pod whose SDK knows Pod Identity and that has an association uses that one",
        )),
        None => {}
    }
    if let Some(at) = on(Service::Metadata) {
        findings.push(Finding::warning(
            CHECK,
            format!("a process of this node listens on {at}: another metadata service"),
            "pods do not reach it while our redirect is there; remove it if the node does not need it",
        ));
    }
    findings
}

fn on(service: Service) -> Option<SocketAddr> {
    let of = [service.v4(), service.v6()];
    listening().into_iter().find(|at| at.port() == METADATA_PORT && of.contains(&at.ip()))
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
        assert_eq!(listener(&line("17AAFEA9:0050", "0A")), Some((Service::Container.v4(), 80).into()));
        assert_eq!(listener(&line("17AAFEA9:0050", "01")), None, "a connection");
        let v6 = line("C20E00FD000000000000000023000000:0050", "0A");
        assert_eq!(listener(&v6), Some((Service::Container.v6(), 80).into()));
    }
}
