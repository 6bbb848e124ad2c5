//! Listeners for the admin pages: a TCP port that passes from agent to agent in a hot restart, and a Unix socket that
//! belongs to this process alone.

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

/// Socket buffers. The metrics page has about 20 KiB.
const BUFFERS: Buffers = Buffers { receive: 4 << 10, send: 16 << 10 };
/// Interval of attempts to listen on an address that is in use.
const RETRY: Duration = Duration::from_secs(1);

/// Returns the listener of the previous agent, or a new one. Returns `None` if the address is in use: by a previous
/// agent with an overlapping address (`[::]:8182` and `127.0.0.1:8182`), or by one that drains and passes no more
/// sockets. The agent then serves pods without the admin port until the address is free.
///
/// # Errors
/// Fails if the address cannot be bound for any other reason, such as an address that the node does not have.
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
            warn!(%address, "--admin-address is in use: the agent serves metrics and health once it is free");
            Ok(None)
        }
        Err(error) => Err(error).with_context(|| format!("--admin-address {address}: cannot listen on it")),
    }
}

/// Serves the admin port while this agent has that role.
///
/// # Errors
/// Fails if the listener cannot be configured.
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
        None => bind_when_free(address).await,
    };
    BUFFERS.apply(&listener).context("cannot limit the socket buffers of the admin port")?;
    roles.run_while(Role::Admin, || admin.serve(&listener)).await;
    Ok(())
}

/// Retries until no other process listens on the address.
async fn bind_when_free(address: SocketAddr) -> TcpListener {
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

/// Serves the admin socket, independent of this agent's role: requests on it are about this process.
///
/// # Errors
/// Fails if the socket cannot be created at this path.
pub(super) fn serve_local(
    admin: Admin,
    path: &Path,
) -> anyhow::Result<impl Future<Output = anyhow::Result<()>> + use<>> {
    let listen = || {
        // A process that was killed leaves its socket behind.
        match fs::remove_file(path) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
            _ => {}
        }
        UnixListener::bind(path)
    };
    let listener = listen().with_context(|| format!("--admin-socket {}: cannot listen on it", path.display()))?;
    Ok(async move {
        admin.serve_local(&listener).await;
        Ok(())
    })
}
