//! From one agent to the next on the same node, without a gap: the one that runs passes its listening sockets to the one
//! that starts, by a Unix socket in the state directory. Connections wait in the sockets' own queues meanwhile, and
//! none is refused.
//!
//! 1. The next agent connects and gets the sockets. From then on it answers on the admin port; pods' connections are
//!    still accepted by the former one, which keeps the redirect too: learning may take for ever.
//! 2. When it knows this node's pods it says so; at once where its redirect is about to lead past those sockets, or the
//!    two would fight over it. The former one accepts no more, and serves what it has.
//! 3. The former one is told to end. If the next one ends instead, at whatever moment, the former one does everything
//!    again.
//!
//! Knows sockets and duties, not what is served on them.

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

/// In the state directory, which is root's alone.
const SOCKET: &str = "handover.sock";
/// Versions that do not know each other's do as if there were no other.
const GREETING: &[u8] = b"kirsa handover 1\n";
const TAKE: u8 = b'T';
const TAKEN: u8 = b'.';
/// Between two processes of one node.
const WAIT: Duration = Duration::from_secs(2);
/// How soon it is tried again to listen for the next agent.
const RETRY: Duration = Duration::from_secs(5);
/// One for each of the node's addresses, and the admin port's.
const MAX_SOCKETS: usize = 8;

/// What an agent does beside serving the connections that it has.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Duty {
    /// Accept pods' connections.
    Pods,
    /// Keep the redirect.
    Redirect,
    /// Answer on the admin port.
    Admin,
}

const ALL: &[Duty] = &[Duty::Pods, Duty::Redirect, Duty::Admin];
/// Of the former agent, while the next one learns.
const FORMER: &[Duty] = &[Duty::Pods, Duty::Redirect];
/// Of the next agent, while it learns.
const NEXT: &[Duty] = &[Duty::Admin];
const NONE: &[Duty] = &[];

/// The duties of this process, which change as agents come and go.
#[derive(Debug)]
pub struct Duties {
    now: watch::Sender<&'static [Duty]>,
    busy: RwLock<()>,
}

impl Duties {
    pub fn new(predecessor: Option<&Predecessor>) -> Arc<Self> {
        // What did not come from there leads to nobody else.
        let learns = predecessor.is_some_and(|predecessor| predecessor.gave > 0);
        Arc::new(Self { now: watch::Sender::new(if learns { NEXT } else { ALL }), busy: RwLock::default() })
    }

    /// Does `work`, which never ends by itself, whenever `duty` is this agent's; from its start each time.
    pub async fn during<F: Future<Output = ()>>(self: Arc<Self>, duty: Duty, work: impl Fn() -> F) {
        let mut now = self.now.subscribe();
        // The sender is held here: waiting cannot fail.
        while now.wait_for(|duties| duties.contains(&duty)).await.is_ok() {
            let _busy = self.busy.read().await;
            tokio::select! {
                biased;
                _ = now.wait_for(|duties| !duties.contains(&duty)) => {}
                () = work() => return,
            }
        }
    }

    fn set(&self, duties: &'static [Duty]) {
        self.now.send_replace(duties);
    }

    /// Returns when nothing is being done any more.
    async fn put_down(&self) {
        self.set(NONE);
        drop(self.busy.write().await);
    }
}

/// An agent that runs on this node already.
#[derive(Debug)]
pub struct Predecessor {
    stream: StdUnixStream,
    sockets: Vec<TcpListener>,
    gave: usize,
    told: bool,
}

impl Predecessor {
    /// `None` where there is none, or none that answers as it should.
    pub fn find(state_dir: &Path) -> Option<Self> {
        let stream = StdUnixStream::connect(state_dir.join(SOCKET)).ok()?;
        match Self::ask(stream) {
            Ok(predecessor) => Some(predecessor),
            Err(error) => {
                warn!(%error, "another agent runs on this node and does not hand over");
                None
            }
        }
    }

    fn ask(mut stream: StdUnixStream) -> io::Result<Self> {
        stream.set_read_timeout(Some(WAIT))?;
        stream.set_write_timeout(Some(WAIT))?;
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
            return Err(io::Error::new(io::ErrorKind::InvalidData, "it greets differently"));
        }
        let listens = |socket: &OwnedFd| getsockopt(socket, sockopt::AcceptConn).is_ok_and(|listens| listens);
        let sockets = sockets.into_iter().filter(listens).map(TcpListener::from).collect();
        Ok(Self { stream, sockets, gave: 0, told: false })
    }

    /// Its listener on that very address, of a pods' port.
    pub fn pods(&mut self, address: SocketAddr) -> Option<TcpListener> {
        let listener = self.listener(address);
        self.gave += usize::from(listener.is_some());
        listener
    }

    /// Its listener on that very address.
    pub fn listener(&mut self, address: SocketAddr) -> Option<TcpListener> {
        let is = |listener: &TcpListener| listener.local_addr().is_ok_and(|local| local == address);
        self.sockets.iter().position(is).map(|place| self.sockets.swap_remove(place))
    }

    /// To be called once the pods' listeners are there, and before the redirect leads to them.
    pub fn part(&mut self) {
        if self.gave == 0 {
            // One that does not answer in time has ended, or is about to.
            let told = self.stream.write_all(&[TAKE]).and_then(|()| self.stream.read(&mut [0]));
            info!(answered = told.is_ok_and(|read| read > 0), "the agent that ran before listens elsewhere");
            self.told = true;
        }
    }

    /// Waits until this agent has `learnt`, or the other has ended; then all duties are this one's. What is returned is
    /// to be kept: its end tells the other that this agent has ended.
    ///
    /// # Errors
    /// The connection cannot be used at all.
    pub async fn take(self, duties: &Duties, learnt: impl Future<Output = ()>) -> io::Result<impl Send> {
        self.stream.set_nonblocking(true)?;
        let mut stream = UnixStream::from_std(self.stream)?;
        let mut answer = [0];
        let asked = !self.told
            && tokio::select! {
                () = learnt => stream.write_all(&[TAKE]).await.is_ok(),
                // It says nothing unasked: it has ended.
                _ = stream.read(&mut answer) => false,
            };
        if asked {
            // One that does not answer in time has ended, or is about to.
            let _ = timeout(WAIT, stream.read(&mut answer)).await;
        }
        duties.set(ALL);
        info!(answered = self.told || answer[0] == TAKEN, "taken over from the agent that ran before");
        Ok(stream)
    }
}

/// Hands over to whichever agent comes next.
#[derive(Debug)]
pub struct Handover {
    path: PathBuf,
    sockets: Vec<OwnedFd>,
    duties: Arc<Duties>,
}

impl Handover {
    /// `sockets` are this agent's listeners.
    ///
    /// # Errors
    /// A socket cannot be duplicated.
    pub fn new<'a>(
        state_dir: &Path,
        sockets: impl IntoIterator<Item = BorrowedFd<'a>>,
        duties: Arc<Duties>,
    ) -> io::Result<Self> {
        let sockets = sockets.into_iter().map(|socket| socket.try_clone_to_owned()).collect::<io::Result<_>>()?;
        Ok(Self { path: state_dir.join(SOCKET), sockets, duties })
    }

    /// Waits for the next agent, again and again, until dropped.
    pub async fn offer(self) {
        let mut told = false;
        loop {
            match self.next().await {
                Ok(stream) => {
                    told = false;
                    match self.hand_over(stream).await {
                        Ok(()) => warn!("the agent that took over has ended: this one serves again"),
                        Err(error) => {
                            warn!(%error, "another agent asked for a hand-over that failed: this one serves on");
                        }
                    }
                }
                Err(error) => {
                    // A full disk, or want of file descriptors: for a while.
                    if !std::mem::replace(&mut told, true) {
                        warn!(
                            path = %self.path.display(), %error,
                            "the next agent cannot take over from this one; trying again every 5 s"
                        );
                    }
                    sleep(RETRY).await;
                    continue;
                }
            }
            self.duties.set(ALL);
        }
    }

    /// Listens anew each time: the agent that had taken over has put its own socket in this place.
    async fn next(&self) -> io::Result<UnixStream> {
        match fs::remove_file(&self.path) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
            _ => {}
        }
        let listener = UnixListener::bind(&self.path)?;
        loop {
            let (stream, _) = listener.accept().await?;
            // Whoever gets these sockets answers pods. The folder is root's alone, and so is this.
            if stream.peer_cred()?.uid() == nix::unistd::geteuid().as_raw() {
                return Ok(stream);
            }
        }
    }

    /// Returns when the other agent has ended.
    async fn hand_over(&self, mut stream: UnixStream) -> io::Result<()> {
        let mut greeting = [0; GREETING.len()];
        timeout(WAIT, stream.read_exact(&mut greeting)).await??;
        if greeting != GREETING {
            return Err(io::Error::new(io::ErrorKind::InvalidData, "it greets differently"));
        }
        stream.async_io(Interest::WRITABLE, || self.pass(stream.as_fd())).await?;
        info!("another agent starts on this node: it has the listening sockets, and learns");
        self.duties.set(FORMER);
        let mut said = [0];
        if stream.read(&mut said).await? == 0 {
            return Ok(());
        }
        self.duties.put_down().await;
        stream.write_all(&[TAKEN]).await?;
        info!("the other agent serves this node's pods from now on");
        // It says no more: this ends when it does.
        while stream.read(&mut said).await? > 0 {}
        Ok(())
    }

    fn pass(&self, to: BorrowedFd<'_>) -> io::Result<()> {
        let sockets: Vec<BorrowedFd<'_>> = self.sockets.iter().map(AsFd::as_fd).collect();
        let mut space = [MaybeUninit::uninit(); cmsg_space!(ScmRights(MAX_SOCKETS))];
        let mut control = SendAncillaryBuffer::new(&mut space);
        if !control.push(SendAncillaryMessage::ScmRights(&sockets)) {
            return Err(io::Error::other("too many sockets"));
        }
        sendmsg(to, &[IoSlice::new(GREETING)], &mut control, SendFlags::NOSIGNAL)?;
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A disk that is full, or a folder that is not there: for a while, and no reason to restart the agent.
    #[tokio::test(start_paused = true)]
    async fn what_keeps_an_agent_from_offering_is_tried_again() {
        let folder = std::env::temp_dir().join(format!("kirsa-handover-{}", std::process::id()));
        let duties = Duties::new(None);
        let offer = tokio::spawn(Handover::new(&folder, [], duties).unwrap().offer());
        sleep(RETRY * 3).await;
        assert!(!offer.is_finished());
        fs::create_dir(&folder).unwrap();
        let reached = async {
            while UnixStream::connect(folder.join(SOCKET)).await.is_err() {
                sleep(RETRY).await;
            }
        };
        timeout(RETRY * 10, reached).await.expect("it listens");
        offer.abort();
        fs::remove_dir_all(&folder).unwrap();
    }
}
