//! The kernel's own word that somebody changed rules, so that a redirect that was flushed is back in milliseconds
//! rather than at the next probe. What changed is not read: the probe decides.

use std::{
    io,
    os::fd::{AsRawFd, OwnedFd},
    sync::Arc,
    time::Duration,
};

use nix::{
    errno::Errno,
    sys::socket::{AddressFamily, MsgFlags, NetlinkAddr, SockFlag, SockProtocol, SockType, bind, recv, socket},
};
use tokio::sync::Notify;
use tracing::info;

/// NFNLGRP_NFTABLES of linux/netfilter/nfnetlink.h, as a bit.
const NFTABLES: u32 = 1 << (7 - 1);
/// Changes come in bursts, a message for each rule; kube-proxy writes thousands at once.
const BURST: Duration = Duration::from_millis(10);

/// Changes of nftables rules in this network namespace.
#[derive(Debug)]
pub struct RuleChanges(Arc<Notify>);

impl RuleChanges {
    /// Where the kernel announces no changes, [`RuleChanges::next`] never returns.
    pub fn subscribe() -> Self {
        let changed = Arc::new(Notify::new());
        // A thread of its own, which sleeps in the kernel: netlink sockets are none of tokio's kinds.
        let listening = announcements().and_then(|socket| {
            let changed = changed.clone();
            std::thread::Builder::new().name("rule-changes".into()).spawn(move || listen(&socket, &changed))
        });
        if let Err(error) = listening {
            info!(%error, "changes of rules are not announced here: the redirect is tried from time to time only");
        }
        Self(changed)
    }

    /// Returns after a change, once for a burst of them.
    pub async fn next(&self) {
        self.0.notified().await;
        tokio::time::sleep(BURST).await;
    }
}

fn announcements() -> io::Result<OwnedFd> {
    let socket = socket(AddressFamily::Netlink, SockType::Raw, SockFlag::SOCK_CLOEXEC, SockProtocol::NetlinkNetFilter)?;
    bind(socket.as_raw_fd(), &NetlinkAddr::new(0, NFTABLES))?;
    Ok(socket)
}

fn listen(socket: &OwnedFd, changed: &Notify) {
    let mut buffer = [0; 8 << 10];
    loop {
        match recv(socket.as_raw_fd(), &mut buffer, MsgFlags::empty()) {
            // An overrun is a change as well.
            Ok(_) | Err(Errno::ENOBUFS) => changed.notify_one(),
            Err(Errno::EINTR) => {}
            Err(error) => return info!(%error, "changes of rules are not announced any more"),
        }
    }
}
