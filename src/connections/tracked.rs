//! A stream that records its connection's activity, and fails once the connection is evicted and no request is unread.

use std::{
    io,
    pin::Pin,
    sync::Arc,
    task::{Context, Poll, ready},
};

use rustix::{
    io::ioctl_fionread,
    net::{SendFlags, send},
};
use tokio::{
    io::{AsyncRead, AsyncWrite, Interest, ReadBuf},
    net::{TcpStream, UnixStream},
};

use super::ConnectionPermit;

/// Maximum size of one write in bytes. The kernel accepts a whole write if the send buffer has any room, so this bounds
/// the excess. Responses are smaller, except metrics.
const MAX_WRITE: usize = 4 << 10;

/// A stream with access to its kernel buffers.
pub trait Socket: AsyncRead + AsyncWrite + Unpin {
    /// Returns whether the receive buffer has unread bytes.
    fn has_unread(&self) -> bool;

    /// Writes no more than fits into the send buffer.
    fn poll_send(&mut self, cx: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        Pin::new(self).poll_write(cx, bytes)
    }
}

impl Socket for TcpStream {
    fn has_unread(&self) -> bool {
        ioctl_fionread(self).is_ok_and(|unread| unread > 0)
    }

    /// Sets MSG_EOR on each write. Otherwise the kernel appends writes to the last packet in the queue, and ignores the
    /// limit of the send buffer until that packet reaches the maximum for segmentation offload (64 KiB).
    fn poll_send(&mut self, cx: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        let write = || Ok(send(&*self, bytes, SendFlags::EOR | SendFlags::NOSIGNAL)?);
        loop {
            ready!(self.poll_write_ready(cx))?;
            match self.try_io(Interest::WRITABLE, write) {
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
                written => return Poll::Ready(written),
            }
        }
    }
}

impl Socket for UnixStream {
    fn has_unread(&self) -> bool {
        ioctl_fionread(self).is_ok_and(|unread| unread > 0)
    }
}

#[cfg(any(test, fuzzing))]
impl Socket for tokio::io::DuplexStream {
    /// A duplex stream has no kernel buffer.
    fn has_unread(&self) -> bool {
        false
    }
}

/// Records activity in the connection's permit.
#[derive(Debug)]
pub struct Tracked<S> {
    stream: S,
    permit: Arc<ConnectionPermit>,
}

impl<S: Socket> Tracked<S> {
    pub fn new(stream: S, permit: Arc<ConnectionPermit>) -> Self {
        Self { stream, permit }
    }

    fn wrote<T>(&self, written: Poll<io::Result<T>>) -> Poll<io::Result<T>> {
        let permit = &self.permit;
        if written.is_ready() {
            if permit.connection.is_stalled() {
                permit.connection.wrote(permit.limiter.now());
            }
        } else if permit.is_evicted() {
            return Poll::Ready(Err(evicted()));
        } else {
            permit.connection.stalled(permit.limiter.now());
        }
        written
    }
}

impl<S: Socket> AsyncRead for Tracked<S> {
    fn poll_read(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buffer: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        let before = buffer.filled().len();
        let read = Pin::new(&mut self.stream).poll_read(cx, buffer);
        let permit = &self.permit;
        if buffer.filled().len() > before {
            permit.connection.received(permit.limiter.now());
        } else if read.is_pending()
            && permit.is_evicted()
            && permit.connection.waits_for_client()
            && !self.stream.has_unread()
        {
            return Poll::Ready(Err(evicted()));
        }
        read
    }
}

impl<S: Socket> AsyncWrite for Tracked<S> {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        let written = self.stream.poll_send(cx, &bytes[..bytes.len().min(MAX_WRITE)]);
        self.wrote(written)
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_shutdown(cx)
    }
}

fn evicted() -> io::Error {
    io::Error::new(io::ErrorKind::ConnectionAborted, "connection evicted in favor of another one")
}
