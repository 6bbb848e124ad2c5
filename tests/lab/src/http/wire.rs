//! One connection to the metadata address, byte by byte: for requests that stay open, and for those that no client
//! sends.

use std::io::{self, BufReader, ErrorKind, Read, Write};
use std::net::{Shutdown, SocketAddr, TcpStream};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};

use super::{Response, TIMEOUT, read_response};
use crate::net::{METADATA, Pod};

#[derive(Debug)]
pub struct Wire(BufReader<TcpStream>);

impl Wire {
    pub fn connect(pod: &Pod) -> Result<Self> {
        Self::connect_to(pod, (METADATA, 80))
    }

    /// To another address than that of IPv4.
    pub fn connect_to(pod: &Pod, address: impl Into<SocketAddr>) -> Result<Self> {
        let stream = pod.connect(address).with_context(|| format!("connecting from {}", pod.name()))?;
        stream.set_nodelay(true)?;
        stream.set_read_timeout(Some(TIMEOUT))?;
        Ok(Self(BufReader::new(stream)))
    }

    /// Connect and send.
    pub fn open(pod: &Pod, bytes: impl AsRef<[u8]>) -> Result<Self> {
        let mut wire = Self::connect(pod)?;
        wire.send(bytes)?;
        Ok(wire)
    }

    pub fn send(&mut self, bytes: impl AsRef<[u8]>) -> io::Result<()> {
        self.0.get_mut().write_all(bytes.as_ref())
    }

    /// Says that no more is going to be sent.
    pub fn shutdown(&self) -> io::Result<()> {
        self.0.get_ref().shutdown(Shutdown::Write)
    }

    /// The next response to a request other than HEAD, interim ones apart.
    pub fn response(&mut self) -> Result<Response> {
        read_response(&mut self.0, false)
    }

    /// The next line, such as that of an interim response.
    pub fn line(&mut self) -> Result<String> {
        super::read_line(&mut self.0)
    }

    /// Waits for the other side to close; an error if it sends anything before, or leaves the connection open.
    pub fn closed(&mut self) -> Result<()> {
        let mut rest = Vec::new();
        match self.0.read_to_end(&mut rest) {
            Err(error) if error.kind() == ErrorKind::ConnectionReset => {}
            end => drop(end.context("waiting for the other side to close")?),
        }
        if !rest.is_empty() {
            bail!("more came: {:?}", String::from_utf8_lossy(&rest));
        }
        Ok(())
    }

    /// Whether nothing came that was not read, and the other side has not closed.
    pub fn is_open(&self) -> bool {
        let stream = self.0.get_ref();
        let peeked = stream.set_nonblocking(true).and_then(|()| stream.peek(&mut [0]));
        stream.set_nonblocking(false).is_ok() && peeked.is_err_and(|error| error.kind() == ErrorKind::WouldBlock)
    }

    /// Waits so long; an error if anything comes, or the other side closes.
    pub fn quiet(&mut self, duration: Duration) -> Result<()> {
        let until = Instant::now() + duration;
        let mut came = [0; 1_024];
        let end = loop {
            let left = until.saturating_duration_since(Instant::now()).max(Duration::from_millis(1));
            self.0.get_ref().set_read_timeout(Some(left))?;
            match self.0.get_mut().peek(&mut came) {
                // By the end of some child of this program.
                Err(error) if error.kind() == ErrorKind::Interrupted => {}
                end => break end,
            }
        };
        self.0.get_ref().set_read_timeout(Some(TIMEOUT))?;
        match end {
            Err(error) if matches!(error.kind(), ErrorKind::WouldBlock | ErrorKind::TimedOut) => Ok(()),
            Err(error) => Err(error.into()),
            Ok(count) => bail!("this came: {:?}", String::from_utf8_lossy(&came[..count])),
        }
    }
}
