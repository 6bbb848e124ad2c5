//! Notifications of changed nftables rules from the kernel, so that a flushed redirect is restored within milliseconds.
//!
//! A transaction that removes or changes our rules without rebuilding them comes from another process: the agent then
//! applies the rules first and tests afterwards. Every other transaction, including its own, triggers only a test.

use std::{
    io,
    os::fd::{AsRawFd, OwnedFd},
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};

use nix::{
    errno::Errno,
    sys::socket::{
        AddressFamily, MsgFlags, NetlinkAddr, SockFlag, SockProtocol, SockType, bind, recv, setsockopt, socket, sockopt,
    },
};
use tokio::sync::Notify;
use tracing::info;

use super::rule::{CHAINS, TABLE};

/// NFNLGRP_NFTABLES of linux/netfilter/nfnetlink.h, as a group mask.
const NFTABLES: u32 = 1 << (7 - 1);
/// NFNL_SUBSYS_NFTABLES, the high byte of message types.
const SUBSYSTEM: u16 = 10;
/// NFPROTO_INET and NFPROTO_BRIDGE, the families of our tables.
const INET: u8 = 1;
const BRIDGE: u8 = 7;
/// Message types of linux/netfilter/nf_tables.h.
const NEW_TABLE: u16 = 0;
const DELETE_TABLE: u16 = 2;
const NEW_CHAIN: u16 = 3;
const DELETE_CHAIN: u16 = 5;
const NEW_RULE: u16 = 6;
const DELETE_RULE: u16 = 8;
const NEW_GENERATION: u16 = 15;
/// Debounce time. Changes come in bursts with a message for each rule; kube-proxy writes thousands at once.
const DEBOUNCE: Duration = Duration::from_millis(10);
/// Size of the kernel's receive buffer in bytes, for such bursts.
const RECEIVE_BUFFER: usize = 1 << 20;

/// Changes of nftables rules in this network namespace.
#[derive(Debug, Clone)]
pub struct RuleChanges(Arc<Signals>);

#[derive(Debug, Default)]
struct Signals {
    changed: Notify,
    removed: Notify,
    bridge_removed: Notify,
    overran: AtomicBool,
}

impl RuleChanges {
    /// Subscribes to notifications. If the kernel sends none, [`RuleChanges::next`] never returns.
    pub fn subscribe() -> Self {
        let signals = Arc::<Signals>::default();
        // A separate thread blocks on the socket: tokio has no netlink sockets.
        let listening = open().and_then(|socket| {
            let signals = signals.clone();
            std::thread::Builder::new().name("rule-changes".into()).spawn(move || listen(&socket, &signals))
        });
        if let Err(error) = listening {
            info!(%error, "cannot subscribe to rule changes: only the periodic self-test checks the redirect");
        }
        Self(signals)
    }

    /// Returns after a change, once for each burst of changes.
    pub async fn next(&self) {
        self.0.changed.notified().await;
        tokio::time::sleep(DEBOUNCE).await;
    }

    /// Returns at once after another process removed or changed our rules.
    pub async fn removed(&self) {
        self.0.removed.notified().await;
    }

    /// Returns at once after another process changed the guard of bridge ports.
    pub async fn bridge_removed(&self) {
        self.0.bridge_removed.notified().await;
    }

    /// Returns whether notifications were lost since the last call. A removal may be among them.
    pub fn overran(&self) -> bool {
        self.0.overran.swap(false, Ordering::Relaxed)
    }
}

fn open() -> io::Result<OwnedFd> {
    let socket = socket(AddressFamily::Netlink, SockType::Raw, SockFlag::SOCK_CLOEXEC, SockProtocol::NetlinkNetFilter)?;
    // Takes CAP_NET_ADMIN. With the default size, large transactions overflow the buffer.
    let _ = setsockopt(&socket, sockopt::RcvBufForce, &RECEIVE_BUFFER);
    bind(socket.as_raw_fd(), &NetlinkAddr::new(0, NFTABLES))?;
    Ok(socket)
}

fn listen(socket: &OwnedFd, signals: &Signals) {
    let mut buffer = vec![0; 64 << 10];
    let mut transaction = Transaction::default();
    loop {
        match recv(socket.as_raw_fd(), &mut buffer, MsgFlags::empty()) {
            Ok(length) => transaction.read(&buffer[..length], |change| change.signal(signals)),
            Err(Errno::ENOBUFS) => {
                transaction = Transaction::default();
                signals.overran.store(true, Ordering::Relaxed);
                Change::Other.signal(signals);
            }
            Err(Errno::EINTR) => {}
            Err(error) => {
                return info!(%error, "rule-change notifications ended: only the self-test checks the redirect");
            }
        }
    }
}

/// Effect of one transaction.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Change {
    /// Removed or changed rules of the redirect.
    Removed,
    /// Removed or changed rules of the bridge guard.
    BridgeRemoved,
    /// Left our rules intact.
    Other,
}

impl Change {
    fn signal(self, signals: &Signals) {
        match self {
            Self::Removed => signals.removed.notify_one(),
            Self::BridgeRemoved => signals.bridge_removed.notify_one(),
            Self::Other => signals.changed.notify_one(),
        }
    }
}

/// Effects of the current transaction on our rules so far.
#[derive(Debug, Default)]
struct Transaction {
    redirect: Effect,
    bridge: Effect,
}

#[derive(Debug, Default)]
struct Effect {
    rebuilt: bool,
    removed: bool,
}

impl Transaction {
    fn read(&mut self, mut messages: &[u8], mut changed: impl FnMut(Change)) {
        while let Some((kind, body, rest)) = message(messages) {
            messages = rest;
            if kind >> 8 != SUBSYSTEM {
                continue;
            }
            if kind & 0xff != NEW_GENERATION {
                self.record(kind & 0xff, body);
                continue;
            }
            let Self { redirect, bridge } = std::mem::take(self);
            if bridge.removed {
                changed(Change::BridgeRemoved);
            }
            changed(if redirect.removed { Change::Removed } else { Change::Other });
        }
    }

    fn record(&mut self, kind: u16, body: &[u8]) {
        // The header nfgenmsg has family, version and resource. Attribute 1 of each object is the name of its table.
        let (family, attributes) = (body.first(), body.get(4..).unwrap_or_default());
        let is_ours = name(attributes, 1) == Some(TABLE.as_bytes());
        if is_ours && family == Some(&INET) {
            self.redirect.record(kind);
        } else if is_ours && family == Some(&BRIDGE) {
            self.bridge.record(kind);
        } else if CHAINS.iter().any(|(.., own)| contains(body, own.as_bytes())) {
            // A rule in one of our chains, or a jump to one. iptables-restore deletes and adds them in one transaction.
            match kind {
                DELETE_RULE | DELETE_CHAIN => self.redirect.removed = true,
                NEW_RULE => self.redirect.removed = false,
                _ => {}
            }
        }
    }
}

impl Effect {
    fn record(&mut self, kind: u16) {
        match kind {
            NEW_TABLE => *self = Self { rebuilt: true, removed: false },
            DELETE_TABLE | DELETE_CHAIN | DELETE_RULE => self.removed = true,
            NEW_RULE | NEW_CHAIN if !self.rebuilt => self.removed = true,
            _ => {}
        }
    }
}

/// Splits off the first message; returns its type, its body, and the remaining messages.
fn message(bytes: &[u8]) -> Option<(u16, &[u8], &[u8])> {
    let length = u32::from_ne_bytes(bytes.get(..4)?.try_into().ok()?) as usize;
    let kind = u16::from_ne_bytes(bytes.get(4..6)?.try_into().ok()?);
    let body = bytes.get(16..length)?;
    Some((kind, body, bytes.get(length.next_multiple_of(4)..).unwrap_or_default()))
}

fn contains(bytes: &[u8], part: &[u8]) -> bool {
    bytes.windows(part.len()).any(|window| window == part)
}

fn name(mut attributes: &[u8], wanted: u16) -> Option<&[u8]> {
    loop {
        let length = usize::from(u16::from_ne_bytes(attributes.get(..2)?.try_into().ok()?));
        let kind = u16::from_ne_bytes(attributes.get(2..4)?.try_into().ok()?);
        let value = attributes.get(4..length)?;
        if kind == wanted {
            return Some(value.strip_suffix(&[0]).unwrap_or(value));
        }
        attributes = attributes.get(length.next_multiple_of(4)..)?;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Returns a message with attributes for a table and, after a slash, a chain.
    fn notification(kind: u16, path: &str) -> Vec<u8> {
        let mut attributes = Vec::new();
        for (number, part) in (1u16..).zip(path.split('/')) {
            let name = [part.as_bytes(), &[0]].concat();
            attributes.extend(((name.len() + 4) as u16).to_ne_bytes());
            attributes.extend(number.to_ne_bytes());
            attributes.extend(name);
            attributes.resize(attributes.len().next_multiple_of(4), 0);
        }
        let mut message = ((20 + attributes.len()) as u32).to_ne_bytes().to_vec();
        message.extend((SUBSYSTEM << 8 | kind).to_ne_bytes());
        message.resize(16, 0);
        message.extend([INET, 0, 0, 0]);
        message.extend(attributes);
        message
    }

    fn changes(messages: &[(u16, &str)]) -> Vec<Change> {
        let (mut transaction, mut seen) = (Transaction::default(), Vec::new());
        let bytes: Vec<u8> = messages.iter().flat_map(|(kind, table)| notification(*kind, table)).collect();
        transaction.read(&bytes, |change| seen.push(change));
        seen
    }

    #[test]
    fn own_transaction_is_not_a_removal() {
        let ours = [(DELETE_RULE, TABLE), (DELETE_TABLE, TABLE), (NEW_TABLE, TABLE), (NEW_RULE, TABLE)];
        assert_eq!(changes(&[&ours[..], &[(NEW_GENERATION, "")]].concat()), [Change::Other]);
    }

    #[test]
    fn foreign_change_of_our_table_is_a_removal() {
        for kind in [DELETE_TABLE, DELETE_CHAIN, DELETE_RULE, NEW_RULE] {
            assert_eq!(changes(&[(kind, TABLE), (NEW_GENERATION, "")]), [Change::Removed]);
        }
        assert_eq!(changes(&[(NEW_RULE, "kube-proxy"), (NEW_GENERATION, "")]), [Change::Other]);
        let mut bridge = notification(DELETE_RULE, TABLE);
        bridge[16] = BRIDGE;
        bridge.extend(notification(NEW_GENERATION, ""));
        let mut seen = Vec::new();
        Transaction::default().read(&bridge, |change| seen.push(change));
        assert_eq!(seen, [Change::BridgeRemoved, Change::Other], "the bridge guard");
    }

    #[test]
    fn other_iptables_chains_are_ignored() {
        let (ours, theirs) = ("nat/KIRSA-PREROUTING", "nat/PREROUTING");
        let end = (NEW_GENERATION, "");
        assert_eq!(changes(&[(DELETE_RULE, ours), end]), [Change::Removed]);
        assert_eq!(changes(&[(DELETE_CHAIN, ours), end]), [Change::Removed]);
        assert_eq!(changes(&[(DELETE_RULE, ours), (NEW_RULE, ours), end]), [Change::Other]);
        assert_eq!(changes(&[(DELETE_RULE, theirs), end]), [Change::Other], "kube-proxy replaces its own rules often");
    }

    #[test]
    fn malformed_notifications_are_ignored() {
        let message = notification(DELETE_RULE, TABLE);
        for length in 0..message.len() {
            Transaction::default().read(&message[..length], |_| panic!("no transaction ended"));
        }
    }
}
