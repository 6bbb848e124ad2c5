//! Hot restart: a new agent takes over the listening sockets of the running agent on the same node. The running agent
//! passes them through a Unix socket in the state directory. Meanwhile connections wait in the sockets' accept queues,
//! so none is refused.
//!
//! 1. The new agent connects and receives the sockets. It then serves the admin port. The running agent still accepts
//!    pods' connections and maintains the redirect, because the new agent's initial sync may never end.
//! 2. The new agent announces itself once it has synced this node's pods. It does so at once if it inherited no pod
//!    listener: its redirect leads elsewhere, and two agents must not fight over it. The running agent then stops
//!    accepting, and serves the connections that it has.
//! 3. The old agent is terminated. If instead the new agent exits, at any time, the old agent resumes all roles.
//!
//! Knows sockets and roles, not the protocols on the sockets.

use std::{
    fs,
    future::Future,
    io::{self, IoSlice, IoSliceMut, Read, Write},
    mem::MaybeUninit,
    net::{SocketAddr, TcpListener},
    os::{
        fd::{AsFd, BorrowedFd, OwnedFd},
        unix::net::UnixStream as StdUnixStream,
    },
    path::{Path, PathBuf},
    sync::Arc,
    time::Duration,
};

use nix::sys::socket::{getsockopt, sockopt};
use rustix::{
    cmsg_space,
    net::{
        RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, SendAncillaryBuffer, SendAncillaryMessage, SendFlags,
        recvmsg, sendmsg,
    },
};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt, Interest},
    net::{UnixListener, UnixStream},
    sync::{RwLock, watch},
    time::{sleep, timeout},
};
use tracing::{info, warn};

/// Name in the state directory, which only root can access.
const SOCKET: &str = "handover.sock";
/// An agent with another greeting is treated as no predecessor.
const GREETING: &[u8] = b"kirsa handover 1\n";
const ANNOUNCE: u8 = b'T';
const ACKNOWLEDGE: u8 = b'.';
/// Maximum time for one message between two processes of the node.
const MESSAGE_TIMEOUT: Duration = Duration::from_secs(2);
/// Pause before the next attempt to listen for a new agent.
const RETRY_DELAY: Duration = Duration::from_secs(5);
/// Maximum number of passed sockets: one for each address of the node, and the admin port's.
const MAX_SOCKETS: usize = 8;

/// A part of an agent's work that only one agent of the node does at a time.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Role {
    /// Accept pods' connections.
    Pods,
    /// Maintain the redirect.
    Redirect,
    /// Serve the admin port.
    Admin,
}

/// Roles of an agent without a counterpart.
const ALL: &[Role] = &[Role::Pods, Role::Redirect, Role::Admin];
/// Roles of the old agent while the new one syncs.
const ACTIVE: &[Role] = &[Role::Pods, Role::Redirect];
/// Roles of the new agent while it syncs.
const STANDBY: &[Role] = &[Role::Admin];
const NONE: &[Role] = &[];

/// The current roles of this process, which change during a hot restart.
#[derive(Debug)]
pub struct Roles {
    current: watch::Sender<&'static [Role]>,
    working: RwLock<()>,
}

impl Roles {
    pub fn new(predecessor: Option<&Predecessor>) -> Arc<Self> {
        // Without inherited pod listeners the old agent's sockets get no connections any more: start at once.
        let is_standby = predecessor.is_some_and(|predecessor| predecessor.inherited > 0);
        let roles = if is_standby { STANDBY } else { ALL };
        Arc::new(Self { current: watch::Sender::new(roles), working: RwLock::default() })
    }

    /// Runs `work` while this agent has `role`. `work` never returns; it is cancelled when the role is lost, and starts
    /// from the beginning when the role returns.
    pub async fn run_while<F: Future<Output = ()>>(self: Arc<Self>, role: Role, work: impl Fn() -> F) {
        let mut current = self.current.subscribe();
        // Waiting cannot fail, because `self` holds the sender.
        while current.wait_for(|roles| roles.contains(&role)).await.is_ok() {
            let _working = self.working.read().await;
            tokio::select! {
                biased;
                _ = current.wait_for(|roles| !roles.contains(&role)) => {}
                () = work() => return,
            }
        }
    }

    fn set(&self, roles: &'static [Role]) {
        self.current.send_replace(roles);
    }

    /// Gives up all roles, and returns when their work has stopped.
    async fn quiesce(&self) {
        self.set(NONE);
        drop(self.working.write().await);
    }
}

/// The agent that already runs on this node.
#[derive(Debug)]
pub struct Predecessor {
    stream: StdUnixStream,
    sockets: Vec<TcpListener>,
    /// Number of inherited pod listeners.
    inherited: usize,
    announced: bool,
}

impl Predecessor {
    /// Connects to the running agent and receives its sockets. Returns `None` if there is none, or if it does not
    /// follow the protocol.
    pub fn find(state_dir: &Path) -> Option<Self> {
        let stream = StdUnixStream::connect(state_dir.join(SOCKET)).ok()?;
        match Self::receive_sockets(stream) {
            Ok(predecessor) => Some(predecessor),
            Err(error) => {
                warn!(%error, "hot restart: another agent runs on this node and did not pass its sockets");
                None
            }
        }
    }

    fn receive_sockets(mut stream: StdUnixStream) -> io::Result<Self> {
        stream.set_read_timeout(Some(MESSAGE_TIMEOUT))?;
        stream.set_write_timeout(Some(MESSAGE_TIMEOUT))?;
        stream.write_all(GREETING)?;
        let mut greeting = [0; GREETING.len()];
        let mut space = [MaybeUninit::uninit(); cmsg_space!(ScmRights(MAX_SOCKETS))];
        let mut control = RecvAncillaryBuffer::new(&mut space);
        let read = recvmsg(&stream, &mut [IoSliceMut::new(&mut greeting)], &mut control, RecvFlags::CMSG_CLOEXEC)?;
        let mut sockets = Vec::new();
        for message in control.drain() {
            if let RecvAncillaryMessage::ScmRights(passed) = message {
                sockets.extend(passed);
            }
        }
        stream.read_exact(&mut greeting[read.bytes..])?;
        if greeting != GREETING {
            return Err(io::Error::new(io::ErrorKind::InvalidData, "unknown greeting"));
        }
        let is_listening = |socket: &OwnedFd| getsockopt(socket, sockopt::AcceptConn).is_ok_and(|listens| listens);
        let sockets = sockets.into_iter().filter(is_listening).map(TcpListener::from).collect();
        Ok(Self { stream, sockets, inherited: 0, announced: false })
    }

    /// Takes its pod listener on exactly this address.
    pub fn pod_listener(&mut self, address: SocketAddr) -> Option<TcpListener> {
        let listener = self.listener(address);
        self.inherited += usize::from(listener.is_some());
        listener
    }

    /// Takes its listener on exactly this address.
    pub fn listener(&mut self, address: SocketAddr) -> Option<TcpListener> {
        let matches = |listener: &TcpListener| listener.local_addr().is_ok_and(|local| local == address);
        self.sockets.iter().position(matches).map(|index| self.sockets.swap_remove(index))
    }

    /// Makes the predecessor stop accepting if it passed no pod listener. Call this once all pod listeners exist, and
    /// before the redirect leads to them.
    pub fn release(&mut self) {
        if self.inherited == 0 {
            // A predecessor that does not reply in time has exited, or is about to.
            let reply = self.stream.write_all(&[ANNOUNCE]).and_then(|()| self.stream.read(&mut [0]));
            let acknowledged = reply.is_ok_and(|read| read > 0);
            info!(acknowledged, "hot restart: the old agent listens on other addresses, and was asked to stop");
            self.announced = true;
        }
    }

    /// Waits until `synced` resolves or the predecessor exits; then this agent has all roles. Keep the returned
    /// connection: when it closes, the predecessor resumes.
    ///
    /// # Errors
    /// Fails if the connection cannot be registered with the runtime.
    pub async fn take_over(self, roles: &Roles, synced: impl Future<Output = ()>) -> io::Result<impl Send> {
        self.stream.set_nonblocking(true)?;
        let mut stream = UnixStream::from_std(self.stream)?;
        let mut reply = [0];
        let announced = !self.announced
            && tokio::select! {
                () = synced => stream.write_all(&[ANNOUNCE]).await.is_ok(),
                // The predecessor sends nothing before the announcement: it has exited.
                _ = stream.read(&mut reply) => false,
            };
        if announced {
            // A predecessor that does not reply in time has exited, or is about to.
            let _ = timeout(MESSAGE_TIMEOUT, stream.read(&mut reply)).await;
        }
        roles.set(ALL);
        let acknowledged = self.announced || reply[0] == ACKNOWLEDGE;
        info!(acknowledged, "hot restart: took over from the old agent");
        Ok(stream)
    }
}

/// Passes this agent's listening sockets to a new agent.
#[derive(Debug)]
pub struct HotRestart {
    path: PathBuf,
    sockets: Vec<OwnedFd>,
    roles: Arc<Roles>,
}

impl HotRestart {
    /// `sockets` are this agent's listeners.
    ///
    /// # Errors
    /// Fails if a socket cannot be duplicated.
    pub fn new<'a>(
        state_dir: &Path,
        sockets: impl IntoIterator<Item = BorrowedFd<'a>>,
        roles: Arc<Roles>,
    ) -> io::Result<Self> {
        let sockets = sockets.into_iter().map(|socket| socket.try_clone_to_owned()).collect::<io::Result<_>>()?;
        Ok(Self { path: state_dir.join(SOCKET), sockets, roles })
    }

    /// Waits for new agents, one after the other. Never returns.
    pub async fn serve(self) {
        let mut is_logged = false;
        loop {
            match self.accept().await {
                Ok(stream) => {
                    is_logged = false;
                    match self.hand_over(stream).await {
                        Ok(()) => warn!("hot restart: the new agent exited; this agent serves again"),
                        Err(error) => warn!(%error, "hot restart failed; this agent keeps serving"),
                    }
                }
                Err(error) => {
                    // A full disk or a lack of file descriptors is usually temporary.
                    if !std::mem::replace(&mut is_logged, true) {
                        warn!(
                            path = %self.path.display(), %error,
                            "hot restart: cannot listen for a new agent; retrying every 5 s"
                        );
                    }
                    sleep(RETRY_DELAY).await;
                    continue;
                }
            }
            self.roles.set(ALL);
        }
    }

    /// Accepts a connection from a new agent. Binds the socket anew each time: the agent that had taken over has
    /// replaced it with its own.
    async fn accept(&self) -> io::Result<UnixStream> {
        match fs::remove_file(&self.path) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
            _ => {}
        }
        let listener = UnixListener::bind(&self.path)?;
        loop {
            let (stream, _) = listener.accept().await?;
            // A process that has these sockets answers pods: check its user, although only root can enter the folder.
            if stream.peer_cred()?.uid() == nix::unistd::geteuid().as_raw() {
                return Ok(stream);
            }
        }
    }

    /// Returns when the new agent has exited.
    ///
    /// # Errors
    /// Fails if the new agent does not follow the protocol or the connection breaks.
    async fn hand_over(&self, mut stream: UnixStream) -> io::Result<()> {
        let mut greeting = [0; GREETING.len()];
        timeout(MESSAGE_TIMEOUT, stream.read_exact(&mut greeting)).await??;
        if greeting != GREETING {
            return Err(io::Error::new(io::ErrorKind::InvalidData, "unknown greeting"));
        }
        stream.async_io(Interest::WRITABLE, || self.send_sockets(stream.as_fd())).await?;
        info!("hot restart: listening sockets passed to the new agent, which syncs");
        self.roles.set(ACTIVE);
        let mut message = [0];
        if stream.read(&mut message).await? == 0 {
            return Ok(());
        }
        self.roles.quiesce().await;
        stream.write_all(&[ACKNOWLEDGE]).await?;
        info!("hot restart: the new agent serves this node's pods now");
        // The new agent sends nothing more: the loop ends when it exits.
        while stream.read(&mut message).await? > 0 {}
        Ok(())
    }

    fn send_sockets(&self, to: BorrowedFd<'_>) -> io::Result<()> {
        let sockets: Vec<BorrowedFd<'_>> = self.sockets.iter().map(AsFd::as_fd).collect();
        let mut space = [MaybeUninit::uninit(); cmsg_space!(ScmRights(MAX_SOCKETS))];
        let mut control = SendAncillaryBuffer::new(&mut space);
        if !control.push(SendAncillaryMessage::ScmRights(&sockets)) {
            return Err(io::Error::other("too many sockets to pass"));
        }
        sendmsg(to, &[IoSlice::new(GREETING)], &mut control, SendFlags::NOSIGNAL)?;
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A full disk or a missing folder may be temporary, and is no reason to restart the agent.
    #[tokio::test(start_paused = true)]
    async fn failure_to_listen_is_retried() {
        let folder = std::env::temp_dir().join(format!("kirsa-hot-restart-{}", std::process::id()));
        let roles = Roles::new(None);
        let serving = tokio::spawn(HotRestart::new(&folder, [], roles).unwrap().serve());
        sleep(RETRY_DELAY * 3).await;
        assert!(!serving.is_finished());
        fs::create_dir(&folder).unwrap();
        let reached = async {
            while UnixStream::connect(folder.join(SOCKET)).await.is_err() {
                sleep(RETRY_DELAY).await;
            }
        };
        timeout(RETRY_DELAY * 10, reached).await.expect("it listens");
        serving.abort();
        fs::remove_dir_all(&folder).unwrap();
    }
}
