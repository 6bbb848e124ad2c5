//! Second line of defense: policy routing prohibits forwarded TCP to port 80 of the metadata addresses.
//!
//! `nft flush ruleset` does not remove these rules. They affect neither redirected connections, whose destination has
//! changed before they are routed, nor the node's own packets (`iif lo`). Packets with our mark skip the prohibition:
//! iptables rules set it if there is no address to redirect to, so that the forward chain can reset the connection.
//! `daemonset/boot/kirsa-boot.service` adds the same rules. They stay when the agent exits.

use std::{
    io,
    net::IpAddr,
    os::fd::{AsRawFd, OwnedFd},
};

use netlink_packet_core::{
    ErrorMessage, NLM_F_ACK, NLM_F_CREATE, NLM_F_DUMP, NLM_F_EXCL, NLM_F_REQUEST, NetlinkHeader, NetlinkMessage,
    NetlinkPayload,
};
use netlink_packet_route::{
    AddressFamily, IpProtocol, RouteNetlinkMessage,
    rule::{RuleAction, RuleAttribute, RuleMessage, RulePortRange},
};
use nix::{
    errno::Errno,
    sys::socket::{AddressFamily as Family, MsgFlags, SockFlag, SockProtocol, SockType, recv, send, socket},
};

use crate::intercept::{METADATA_PORT, METADATA_V4, METADATA_V6, self_test::MARK};

/// Rule priorities, before those of CNI plugins: Cilium 9, AWS VPC CNI from 10, Calico 99.
const MARKED: u32 = 4;
const LOCAL: u32 = 5;
const PROHIBIT: u32 = 6;
const END: u32 = 7;
/// Order of insertion: jump target, jumps, prohibition. The node's own packets pass at any time.
const ORDER: [u32; 4] = [END, MARKED, LOCAL, PROHIBIT];

/// Adds the missing rules and returns their number.
///
/// # Errors
/// Returns the kernel's error: no support for policy routing, or no CAP_NET_ADMIN.
pub(super) fn add_missing() -> io::Result<usize> {
    let socket = open()?;
    let mut added = 0;
    for address in addresses() {
        for priority in ORDER {
            match request(&socket, RouteNetlinkMessage::NewRule(rule(address, priority)), NLM_F_CREATE | NLM_F_EXCL) {
                Ok(()) => added += 1,
                Err(Errno::EEXIST) => {}
                // A kernel without IPv6 has no IPv6 path to the node's role.
                Err(Errno::EAFNOSUPPORT | Errno::EOPNOTSUPP) if address.is_ipv6() => break,
                Err(error) => return Err(error.into()),
            }
        }
    }
    Ok(added)
}

/// Returns each rule as an `ip rule` command, and whether the kernel has it.
///
/// # Errors
/// Returns the kernel's error.
pub fn listing() -> io::Result<Vec<(String, bool)>> {
    let socket = open()?;
    let mut listing = Vec::new();
    for address in addresses() {
        let present = match dump(&socket, address) {
            Err(Errno::EAFNOSUPPORT | Errno::EOPNOTSUPP) if address.is_ipv6() => break,
            present => present?,
        };
        listing.extend(ORDER.map(|priority| {
            let wanted = rule(address, priority);
            let is_present = present.iter().any(|rule| {
                rule.header.action == wanted.header.action
                    && wanted.attributes.iter().all(|attribute| rule.attributes.contains(attribute))
            });
            (text(address, priority), is_present)
        }));
    }
    Ok(listing)
}

/// Removes the rules and returns their number.
///
/// # Errors
/// Returns the kernel's error: no support for policy routing, or no CAP_NET_ADMIN.
pub(super) fn remove() -> io::Result<usize> {
    let socket = open()?;
    let mut removed = 0;
    for address in addresses() {
        for priority in ORDER.into_iter().rev() {
            match request(&socket, RouteNetlinkMessage::DelRule(rule(address, priority)), 0) {
                Ok(()) => removed += 1,
                Err(Errno::ENOENT | Errno::EAFNOSUPPORT | Errno::EOPNOTSUPP) => {}
                Err(error) => return Err(error.into()),
            }
        }
    }
    Ok(removed)
}

fn addresses() -> [IpAddr; 2] {
    [METADATA_V4.into(), METADATA_V6.into()]
}

fn family(address: IpAddr) -> AddressFamily {
    if address.is_ipv4() { AddressFamily::Inet } else { AddressFamily::Inet6 }
}

fn rule(to: IpAddr, priority: u32) -> RuleMessage {
    let mut rule = RuleMessage::default();
    (rule.header.family, rule.header.dst_len) = (family(to), if to.is_ipv4() { 32 } else { 128 });
    rule.attributes = vec![
        RuleAttribute::Priority(priority),
        RuleAttribute::Destination(to),
        RuleAttribute::IpProtocol(IpProtocol::Tcp),
        RuleAttribute::DestinationPortRange(RulePortRange { start: METADATA_PORT, end: METADATA_PORT }),
    ];
    rule.header.action = match priority {
        MARKED => {
            let mark = [RuleAttribute::FwMark(MARK), RuleAttribute::FwMask(u32::MAX), RuleAttribute::Goto(END)];
            rule.attributes.extend(mark);
            RuleAction::Goto
        }
        LOCAL => {
            rule.attributes.extend([RuleAttribute::Iifname("lo".into()), RuleAttribute::Goto(END)]);
            RuleAction::Goto
        }
        PROHIBIT => RuleAction::Prohibit,
        _ => RuleAction::Nop,
    };
    rule
}

fn text(to: IpAddr, priority: u32) -> String {
    let (selector, action) = match priority {
        MARKED => (format!("fwmark {MARK:#x} "), format!("goto {END}")),
        LOCAL => ("iif lo ".into(), format!("goto {END}")),
        PROHIBIT => (String::new(), "prohibit".into()),
        _ => (String::new(), "nop".into()),
    };
    let family = if to.is_ipv4() { "-4" } else { "-6" };
    format!("ip {family} rule add pref {priority} {selector}to {to} ipproto tcp dport {METADATA_PORT} {action}")
}

fn open() -> io::Result<OwnedFd> {
    Ok(socket(Family::Netlink, SockType::Raw, SockFlag::SOCK_CLOEXEC, SockProtocol::NetlinkRoute)?)
}

/// Sends one request and waits for the kernel's acknowledgement, which comes at once.
fn request(socket: &OwnedFd, message: RouteNetlinkMessage, flags: u16) -> Result<(), Errno> {
    send_request(socket, message, NLM_F_ACK | flags)?;
    let mut response = [0; 4096];
    let length = recv(socket.as_raw_fd(), &mut response, MsgFlags::empty())?;
    match NetlinkMessage::<RouteNetlinkMessage>::deserialize(&response[..length]).map(|message| message.payload) {
        Ok(NetlinkPayload::Error(ErrorMessage { code: None, .. })) => Ok(()),
        Ok(NetlinkPayload::Error(ErrorMessage { code: Some(code), .. })) => {
            Err(Errno::from_raw(code.get().wrapping_neg()))
        }
        _ => Err(Errno::EBADMSG),
    }
}

/// Returns all rules of the address's family.
fn dump(socket: &OwnedFd, address: IpAddr) -> Result<Vec<RuleMessage>, Errno> {
    let mut all = RuleMessage::default();
    all.header.family = family(address);
    send_request(socket, RouteNetlinkMessage::GetRule(all), NLM_F_DUMP)?;
    let (mut rules, mut buffer) = (Vec::new(), vec![0; 64 << 10]);
    loop {
        let length = recv(socket.as_raw_fd(), &mut buffer, MsgFlags::empty())?;
        let mut messages = &buffer[..length];
        while let Some(size) = messages.get(..4).and_then(|size| size.try_into().ok()).map(u32::from_ne_bytes) {
            let Some(message) = messages.get(..size as usize).filter(|message| !message.is_empty()) else { break };
            match NetlinkMessage::deserialize(message).map(|message| message.payload) {
                Ok(NetlinkPayload::InnerMessage(RouteNetlinkMessage::NewRule(rule))) => rules.push(rule),
                Ok(NetlinkPayload::Done(done)) if done.code < 0 => {
                    return Err(Errno::from_raw(done.code.wrapping_neg()));
                }
                Ok(NetlinkPayload::Done(_)) => return Ok(rules),
                Ok(NetlinkPayload::Error(ErrorMessage { code: Some(code), .. })) => {
                    return Err(Errno::from_raw(code.get().wrapping_neg()));
                }
                // A rule that the library cannot parse is not ours.
                Ok(_) | Err(_) => {}
            }
            messages = messages.get((size as usize).next_multiple_of(4)..).unwrap_or_default();
        }
    }
}

fn send_request(socket: &OwnedFd, message: RouteNetlinkMessage, flags: u16) -> Result<(), Errno> {
    let mut header = NetlinkHeader::default();
    header.flags = NLM_F_REQUEST | flags;
    let mut message = NetlinkMessage::new(header, NetlinkPayload::from(message));
    message.finalize();
    let mut bytes = vec![0; message.buffer_len()];
    message.serialize(&mut bytes);
    send(socket.as_raw_fd(), &bytes, MsgFlags::empty()).map(drop)
}
