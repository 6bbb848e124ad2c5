//! Passes bytes on between the agent and a server, and ends all connections when it is told to.

use std::io;
use std::net::{Shutdown, SocketAddr, TcpListener, TcpStream};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread;

use anyhow::Result;
use lab::namespace::BASE;

pub(super) struct Proxy {
    address: SocketAddr,
    open: Arc<Mutex<Vec<TcpStream>>>,
}

impl Proxy {
    /// In the base namespace; for as long as the program runs.
    pub(super) fn start(server: SocketAddr) -> Result<Self> {
        let listener = TcpListener::bind((BASE, 0))?;
        let (address, open) = (listener.local_addr()?, Arc::<Mutex<Vec<TcpStream>>>::default());
        let kept = open.clone();
        thread::spawn(move || {
            while let Ok((agent, _)) = listener.accept() {
                // Where the server is not there, neither is this one.
                let _ = pass_on(agent, server, &kept);
            }
        });
        Ok(Self { address, open })
    }

    pub(super) fn address(&self) -> SocketAddr {
        self.address
    }

    /// Ends what is open now; how many connections that were.
    pub(super) fn cut(&self) -> usize {
        let open = std::mem::take(&mut *self.open.lock().unwrap_or_else(PoisonError::into_inner));
        open.iter().filter(|stream| stream.shutdown(Shutdown::Both).is_ok()).count()
    }
}

fn pass_on(agent: TcpStream, server: SocketAddr, open: &Mutex<Vec<TcpStream>>) -> io::Result<()> {
    let server = TcpStream::connect(server)?;
    open.lock().unwrap_or_else(PoisonError::into_inner).push(agent.try_clone()?);
    for (mut from, mut to) in [(agent.try_clone()?, server.try_clone()?), (server, agent)] {
        thread::spawn(move || {
            let _ = io::copy(&mut from, &mut to);
            let _ = to.shutdown(Shutdown::Both);
            let _ = from.shutdown(Shutdown::Both);
        });
    }
    Ok(())
}
