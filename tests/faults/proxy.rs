//! A TCP proxy between the agent and a server that can cut all connections.

use std::io;
use std::net::{Shutdown, SocketAddr, TcpListener, TcpStream};
use std::sync::Arc;
use std::thread;

use anyhow::Result;
use lab::namespace::BASE;
use parking_lot::Mutex;

pub(super) struct Proxy {
    address: SocketAddr,
    open: Arc<Mutex<Vec<TcpStream>>>,
}

impl Proxy {
    /// Starts a proxy in the base namespace that runs until the process ends.
    pub(super) fn start(server: SocketAddr) -> Result<Self> {
        let listener = TcpListener::bind((BASE, 0))?;
        let (address, open) = (listener.local_addr()?, Arc::<Mutex<Vec<TcpStream>>>::default());
        let kept = open.clone();
        thread::spawn(move || {
            while let Ok((agent, _)) = listener.accept() {
                // If the server is unreachable, the connection is dropped.
                let _ = forward(agent, server, &kept);
            }
        });
        Ok(Self { address, open })
    }

    pub(super) fn address(&self) -> SocketAddr {
        self.address
    }

    /// Cuts the open connections and returns their number.
    pub(super) fn cut(&self) -> usize {
        let open = std::mem::take(&mut *self.open.lock());
        open.iter().filter(|stream| stream.shutdown(Shutdown::Both).is_ok()).count()
    }
}

fn forward(agent: TcpStream, server: SocketAddr, open: &Mutex<Vec<TcpStream>>) -> io::Result<()> {
    let server = TcpStream::connect(server)?;
    open.lock().push(agent.try_clone()?);
    for (mut from, mut to) in [(agent.try_clone()?, server.try_clone()?), (server, agent)] {
        thread::spawn(move || {
            let _ = io::copy(&mut from, &mut to);
            let _ = to.shutdown(Shutdown::Both);
            let _ = from.shutdown(Shutdown::Both);
        });
    }
    Ok(())
}
