//! The agent's own port. Redirected pods trust any process that listens there, so it should be privileged: then no
//! ordinary process can bind it while the agent is down.

use std::{fmt, fs, net::IpAddr, net::SocketAddr};

/// Below 512, so that neither glibc's `bindresvport` (600 to 1023) nor the kernel's NFS client (665 to 1023) uses it as
/// a source port. Not assigned by IANA.
pub const DEFAULT_PORT: u16 = 338;

const FIRST_UNPRIVILEGED: &str = "/proc/sys/net/ipv4/ip_unprivileged_port_start";
/// The kernel's default for [`FIRST_UNPRIVILEGED`].
const DEFAULT_FIRST_UNPRIVILEGED: u16 = 1_024;

/// Returns the first port of this network namespace that a process without capabilities can bind.
pub fn first_unprivileged() -> u16 {
    let sysctl = fs::read_to_string(FIRST_UNPRIVILEGED).unwrap_or_default();
    // The value 65536 makes all ports privileged.
    sysctl.trim().parse::<u32>().map_or(DEFAULT_FIRST_UNPRIVILEGED, |first| u16::try_from(first).unwrap_or(u16::MAX))
}

/// Describes the risk if an unprivileged hostNetwork process could bind `port`.
pub fn takeover_risk(port: u16, first: u16) -> Option<String> {
    (port >= first).then(|| {
        format!(
            "any hostNetwork process can listen on port {port} while the agent is down, and answer pods in its place: \
             ports from {first} on need no capability on this node"
        )
    })
}

/// A socket in state LISTEN, as `/proc/net/tcp` and `/proc/net/tcp6` list it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ListeningSocket {
    pub address: SocketAddr,
    pub uid: u32,
    pub inode: u64,
}

/// Lists the listening sockets of this network namespace.
pub fn listening_sockets() -> Vec<ListeningSocket> {
    let tables = ["/proc/net/tcp", "/proc/net/tcp6"].map(|table| fs::read_to_string(table).unwrap_or_default());
    tables.iter().flat_map(|table| table.lines().skip(1)).filter_map(parse).collect()
}

/// Parses one line of these tables: number, local address, remote address, state, queues, timer, retransmits, uid,
/// timeout, inode (<https://docs.kernel.org/networking/proc_net_tcp.html>).
fn parse(line: &str) -> Option<ListeningSocket> {
    const LISTEN: &str = "0A";
    let fields: Vec<&str> = line.split_whitespace().collect();
    let (address, port) = fields.get(1)?.split_once(':')?;
    if *fields.get(3)? != LISTEN {
        return None;
    }
    // The kernel prints each 32-bit word of the address in host byte order.
    let words = (0..address.len()).step_by(8).map(|at| u32::from_str_radix(address.get(at..at + 8)?, 16).ok());
    let bytes: Vec<u8> = words.collect::<Option<Vec<u32>>>()?.into_iter().flat_map(u32::to_ne_bytes).collect();
    let ip = match bytes.len() {
        4 => IpAddr::from(<[u8; 4]>::try_from(bytes).ok()?),
        _ => IpAddr::from(<[u8; 16]>::try_from(bytes).ok()?),
    };
    Some(ListeningSocket {
        address: SocketAddr::new(ip, u16::from_str_radix(port, 16).ok()?),
        uid: fields.get(7)?.parse().ok()?,
        inode: fields.get(9)?.parse().ok()?,
    })
}

/// The listening socket that conflicts with an address, and its process if that is visible.
#[derive(Debug)]
pub struct Occupant {
    socket: ListeningSocket,
    process: Option<(u32, String)>,
}

impl Occupant {
    /// Returns the first socket that prevents binding `address`.
    pub fn find(address: SocketAddr) -> Option<Self> {
        let conflicts = |socket: &ListeningSocket| {
            socket.address.port() == address.port()
                && (socket.address.ip() == address.ip() || socket.address.ip().is_unspecified())
        };
        let socket = listening_sockets().into_iter().find(conflicts)?;
        Some(Self { process: process_of(socket.inode), socket })
    }
}

impl fmt::Display for Occupant {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { socket, process } = self;
        match process {
            Some((pid, name)) => write!(f, "process {pid} ({name}), uid {}, listens on {}", socket.uid, socket.address),
            None => write!(
                f,
                "a process of uid {} listens on {} (to find it, run `ss -tlnp sport = :{}` on the node)",
                socket.uid,
                socket.address,
                socket.address.port()
            ),
        }
    }
}

/// Returns PID and name of a process that has this socket open. A container without hostPID sees only its own
/// processes.
fn process_of(inode: u64) -> Option<(u32, String)> {
    let link = format!("socket:[{inode}]");
    let has_socket = |pid: &u32| {
        let descriptors = fs::read_dir(format!("/proc/{pid}/fd")).into_iter().flatten().flatten();
        descriptors.into_iter().any(|entry| fs::read_link(entry.path()).is_ok_and(|to| to.as_os_str() == link.as_str()))
    };
    let processes = fs::read_dir("/proc").ok()?.flatten();
    let pid = processes.filter_map(|entry| entry.file_name().to_str()?.parse().ok()).find(has_socket)?;
    // A process can choose its own name: keep control characters out of the log.
    let name = fs::read_to_string(format!("/proc/{pid}/comm")).unwrap_or_default();
    Some((pid, name.trim().chars().filter(|c| !c.is_control()).collect()))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::intercept::MetadataService;

    #[test]
    fn proc_net_tcp_is_parsed() {
        let line = |address: &str, state: &str| {
            format!(
                "   0: {address} 00000000:0000 {state} 00000000:00000000 00:00000000 00000000 65534        0 4711 1"
            )
        };
        let v4 = parse(&line("17AAFEA9:0050", "0A")).unwrap();
        assert_eq!((v4.address, v4.uid, v4.inode), ((MetadataService::Container.v4(), 80).into(), 65_534, 4_711));
        assert_eq!(parse(&line("17AAFEA9:0050", "01")), None, "an established connection");
        let v6 = parse(&line("C20E00FD000000000000000023000000:0050", "0A")).unwrap();
        assert_eq!(v6.address, (MetadataService::Container.v6(), 80).into());
        assert_eq!(parse("0: 17AAFEA9:0050 00000000:0000 0A"), None, "cut short");
    }

    #[test]
    fn occupant_is_named() {
        let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
        let occupant = Occupant::find(listener.local_addr().unwrap()).unwrap().to_string();
        assert!(occupant.contains(&format!("process {} (", std::process::id())), "{occupant}");
        let wildcard = std::net::TcpListener::bind("0.0.0.0:0").unwrap();
        let port = wildcard.local_addr().unwrap().port();
        assert!(Occupant::find(([127, 0, 0, 1], port).into()).is_some());
    }

    #[test]
    fn sysctl_decides_which_ports_are_privileged() {
        assert_eq!(takeover_risk(DEFAULT_PORT, 1_024), None);
        assert!(takeover_risk(8_181, 1_024).is_some());
        assert!(takeover_risk(DEFAULT_PORT, 0).is_some());
    }
}
