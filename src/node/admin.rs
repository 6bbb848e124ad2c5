//! Where the admin pages are served: at an address that the agents of a node have one after the other, and at a socket
//! that is this one's alone.

use std::{fs, future::Future, io, net::SocketAddr, path::Path, sync::Arc, time::Duration};

use anyhow::Context;
use tokio::{
    net::{TcpListener, UnixListener},
    time::sleep,
};
use tracing::{info, warn};

use crate::{
    connections::Buffers,
    intercept::{Predecessor, Role, Roles},
    observe::Admin,
};

/// The metrics have some 20 KiB.
const BUFFERS: Buffers = Buffers { receive: 4 << 10, send: 16 << 10 };
/// How soon it is tried again to have an address that another agent has.
const RETRY: Duration = Duration::from_secs(1);

/// The listener of the agent that ran before, or one of our own. Neither where somebody else listens: the agent before,
/// at an address that overlaps this one (`[::]:8182` with `127.0.0.1:8182`), or one that drains and hands over no more.
/// That is no reason to keep pods from their credentials.
///
/// # Errors
/// The node has no such address.
pub(super) fn listen(
    address: SocketAddr,
    predecessor: Option<&mut Predecessor>,
) -> anyhow::Result<Option<std::net::TcpListener>> {
    if let Some(passed) = predecessor.and_then(|predecessor| predecessor.listener(address)) {
        return Ok(Some(passed));
    }
    match std::net::TcpListener::bind(address) {
        Ok(listener) => Ok(Some(listener)),
        Err(error) if error.kind() == io::ErrorKind::AddrInUse => {
            warn!(%address, "--admin-address: somebody else listens there, metrics and health are served when it is free");
            Ok(None)
        }
        Err(error) => Err(error).with_context(|| format!("--admin-address {address}: cannot listen there")),
    }
}

/// Serves whenever that is this agent's duty.
///
/// # Errors
/// The listener cannot be used.
pub(super) async fn serve(
    admin: Admin,
    address: SocketAddr,
    listener: Option<std::net::TcpListener>,
    roles: Arc<Roles>,
) -> anyhow::Result<()> {
    let listener = match listener {
        Some(listener) => {
            listener.set_nonblocking(true)?;
            TcpListener::from_std(listener)?
        }
        None => freed(address).await,
    };
    BUFFERS.apply(&listener).context("cannot limit the socket buffers of the admin port")?;
    roles.run_while(Role::Admin, || admin.serve(&listener)).await;
    Ok(())
}

/// Returns when nobody else listens there any more.
async fn freed(address: SocketAddr) -> TcpListener {
    loop {
        match TcpListener::bind(address).await {
            Ok(listener) => {
                info!(%address, "the admin port is free");
                return listener;
            }
            Err(_) => sleep(RETRY).await,
        }
    }
}

/// Serves in every role, since the requests there are meant for this process.
///
/// # Errors
/// There can be no such socket.
pub(super) fn serve_local(
    admin: Admin,
    path: &Path,
) -> anyhow::Result<impl Future<Output = anyhow::Result<()>> + use<>> {
    let listen = || {
        // Of a process that was killed.
        match fs::remove_file(path) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
            _ => {}
        }
        UnixListener::bind(path)
    };
    let listener = listen().with_context(|| format!("--admin-socket {}: cannot listen there", path.display()))?;
    Ok(async move {
        admin.serve_local(&listener).await;
        Ok(())
    })
}
