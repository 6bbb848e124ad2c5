//! Reads links and policy routing rules from the kernel by rtnetlink: bridge ports, and pods with interface routes.
//! Takes no capability.

use std::{
    collections::{BTreeMap, BTreeSet, HashMap},
    fmt, io,
    os::fd::AsRawFd,
};

use netlink_packet_core::{NLM_F_DUMP, NLM_F_REQUEST, NetlinkHeader, NetlinkMessage, NetlinkPayload};
use netlink_packet_route::{
    AddressFamily, RouteNetlinkMessage,
    link::{LinkAttribute, LinkMessage},
    rule::{RuleAction, RuleAttribute, RuleMessage},
};
use nix::{
    errno::Errno,
    sys::{
        socket::{
            AddressFamily as Family, MsgFlags, SockFlag, SockProtocol, SockType, recv, send, setsockopt, socket,
            sockopt,
        },
        time::{TimeVal, TimeValLike},
    },
};

/// Flag of the kernel: the dump is inconsistent because of a concurrent change.
const NLM_F_DUMP_INTR: u16 = 0x10;
/// Maximum number of attempts to get a consistent dump.
const MAX_ATTEMPTS: usize = 4;
/// First routing table of the AWS VPC CNI for branch interfaces: 100 plus the VLAN ID.
const FIRST_BRANCH_TABLE: u32 = 101;
/// Prefix of its interface names: `vlan.eth.<id>`, and `vlan<hash>` for the host end of a pod's veth.
const BRANCH_PREFIX: &str = "vlan";

/// Returns the names of all bridge ports of this node, each with the name of its bridge.
///
/// # Errors
/// Returns the kernel's error, or `Other` if links change too often for a consistent dump.
pub fn bridge_ports() -> io::Result<BTreeMap<String, String>> {
    let mut request = LinkMessage::default();
    // This family limits the dump to bridges and their ports, with few attributes.
    request.header.interface_family = AddressFamily::Bridge;
    let mut ports = Vec::new();
    for message in dump(&RouteNetlinkMessage::GetLink(request))? {
        let RouteNetlinkMessage::NewLink(link) = message else { continue };
        let name = link.attributes.iter().find_map(|attribute| match attribute {
            LinkAttribute::IfName(name) => Some(name.clone()),
            _ => None,
        });
        let bridge = link.attributes.iter().find_map(|attribute| match attribute {
            LinkAttribute::Controller(index) => Some(*index),
            _ => None,
        });
        ports.extend(name.zip(bridge));
    }
    if ports.is_empty() {
        return Ok(BTreeMap::new());
    }
    let names: HashMap<u32, String> = nix::net::if_::if_nameindex()?
        .iter()
        .map(|interface| (interface.index(), interface.name().to_string_lossy().into_owned()))
        .collect();
    Ok(ports.into_iter().filter_map(|(port, bridge)| Some((port, names.get(&bridge)?.clone()))).collect())
}

/// A policy routing rule of the AWS VPC CNI (security groups for pods in strict mode). Packets from this interface
/// leave the node, so the redirect does not lead them to the agent.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub struct InterfaceRoute {
    pub interface: String,
    pub table: u32,
}

impl fmt::Display for InterfaceRoute {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "iif {} lookup {}", self.interface, self.table)
    }
}

/// Returns the rules that route pods by interface and so bypass the redirect.
///
/// # Errors
/// Returns the kernel's error, or `Other` if rules change too often for a consistent dump.
pub fn interface_routes() -> io::Result<BTreeSet<InterfaceRoute>> {
    let mut routes = BTreeSet::new();
    for family in [AddressFamily::Inet, AddressFamily::Inet6] {
        let mut request = RuleMessage::default();
        request.header.family = family;
        for message in dump(&RouteNetlinkMessage::GetRule(request))? {
            if let RouteNetlinkMessage::NewRule(rule) = message {
                routes.extend(interface_route(&rule));
            }
        }
    }
    Ok(routes)
}

fn interface_route(rule: &RuleMessage) -> Option<InterfaceRoute> {
    let (mut interface, mut table) = (None, u32::from(rule.header.table));
    for attribute in &rule.attributes {
        match attribute {
            RuleAttribute::Iifname(name) => interface = Some(name.clone()),
            RuleAttribute::Table(number) => table = *number,
            _ => {}
        }
    }
    let interface = interface.filter(|name| name.starts_with(BRANCH_PREFIX))?;
    let is_branch = rule.header.action == RuleAction::ToTable && table >= FIRST_BRANCH_TABLE;
    // Tables 253 to 255 are the kernel's own.
    (is_branch && !(253..=255).contains(&table)).then_some(InterfaceRoute { interface, table })
}

/// Repeats the dump after a concurrent change, because objects may be missing from it.
fn dump(request: &RouteNetlinkMessage) -> io::Result<Vec<RouteNetlinkMessage>> {
    for _ in 0..MAX_ATTEMPTS {
        match dump_once(request.clone()) {
            Err(error) if error.raw_os_error() == Some(Errno::EINTR as i32) => {}
            done => return done,
        }
    }
    Err(io::Error::other("links or rules change too often to be listed"))
}

fn dump_once(request: RouteNetlinkMessage) -> io::Result<Vec<RouteNetlinkMessage>> {
    let socket = socket(Family::Netlink, SockType::Raw, SockFlag::SOCK_CLOEXEC, SockProtocol::NetlinkRoute)?;
    setsockopt(&socket, sockopt::ReceiveTimeout, &TimeVal::seconds(1))?;
    let mut header = NetlinkHeader::default();
    header.flags = NLM_F_REQUEST | NLM_F_DUMP;
    let mut message = NetlinkMessage::new(header, NetlinkPayload::from(request));
    message.finalize();
    let mut bytes = vec![0; message.buffer_len()];
    message.serialize(&mut bytes);
    send(socket.as_raw_fd(), &bytes, MsgFlags::empty())?;
    let (mut messages, mut buffer) = (Vec::new(), vec![0; 64 << 10]);
    loop {
        let length = recv(socket.as_raw_fd(), &mut buffer, MsgFlags::empty())?;
        let mut rest = &buffer[..length];
        while let Some(size) = rest.get(..4).and_then(|size| size.try_into().ok()).map(u32::from_ne_bytes) {
            let size = size as usize;
            let Some(bytes) = rest.get(..size).filter(|bytes| !bytes.is_empty()) else { break };
            rest = rest.get(size.next_multiple_of(4)..).unwrap_or_default();
            // Skip a message that the library cannot parse.
            let Ok(message) = NetlinkMessage::<RouteNetlinkMessage>::deserialize(bytes) else { continue };
            if message.header.flags & NLM_F_DUMP_INTR != 0 {
                return Err(Errno::EINTR.into());
            }
            match message.payload {
                NetlinkPayload::InnerMessage(message) => messages.push(message),
                NetlinkPayload::Done(_) => return Ok(messages),
                // A kernel without IPv6 has no IPv6 rules.
                NetlinkPayload::Error(error) if error.raw_code() == -(Errno::EOPNOTSUPP as i32) => return Ok(messages),
                NetlinkPayload::Error(error) => return Err(error.to_io()),
                _ => {}
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn rule(interface: &str, table: u32) -> RuleMessage {
        let mut rule = RuleMessage::default();
        rule.header.action = RuleAction::ToTable;
        rule.attributes = vec![RuleAttribute::Iifname(interface.into()), RuleAttribute::Table(table)];
        rule
    }

    #[test]
    fn only_branch_interfaces_are_reported() {
        let text = |interface, table| interface_route(&rule(interface, table)).map(|route| route.to_string());
        assert_eq!(text("vlan.eth.1", 101).as_deref(), Some("iif vlan.eth.1 lookup 101"));
        assert_eq!(text("vlan0a1b2c3d4e5", 4_196).as_deref(), Some("iif vlan0a1b2c3d4e5 lookup 4196"));
        for (interface, table) in [("lo", 101), ("eth1", 101), ("vlan.eth.1", 100), ("vlan10", 254)] {
            assert_eq!(text(interface, table), None, "{interface} {table}");
        }
    }

    #[test]
    fn links_and_rules_can_be_listed() {
        bridge_ports().unwrap();
        interface_routes().unwrap();
    }
}
