//! A stream that records what its connection is doing, and ends once the connection is evicted and no request is on
//! its way.

use std::{
    io::{self, IoSlice},
    pin::Pin,
    sync::Arc,
    task::{Context, Poll},
};

use tokio::{
    io::{AsyncRead, AsyncWrite, ReadBuf},
    net::{TcpStream, UnixStream},
};

use super::Permit;

/// A stream that can tell whether bytes have arrived that were not read.
pub trait Socket: AsyncRead + AsyncWrite + Unpin {
    fn has_unread(&self) -> bool;
}

impl Socket for TcpStream {
    fn has_unread(&self) -> bool {
        rustix::io::ioctl_fionread(self).is_ok_and(|unread| unread > 0)
    }
}

impl Socket for UnixStream {
    fn has_unread(&self) -> bool {
        rustix::io::ioctl_fionread(self).is_ok_and(|unread| unread > 0)
    }
}

#[cfg(any(test, fuzzing))]
impl Socket for tokio::io::DuplexStream {
    /// What was sent can be read at once.
    fn has_unread(&self) -> bool {
        false
    }
}

#[derive(Debug)]
pub struct Tracked<S> {
    stream: S,
    permit: Arc<Permit>,
}

impl<S: Socket> Tracked<S> {
    pub fn new(stream: S, permit: Arc<Permit>) -> Self {
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
        let written = Pin::new(&mut self.stream).poll_write(cx, bytes);
        self.wrote(written)
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bytes: &[IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        let written = Pin::new(&mut self.stream).poll_write_vectored(cx, bytes);
        self.wrote(written)
    }

    fn is_write_vectored(&self) -> bool {
        self.stream.is_write_vectored()
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_shutdown(cx)
    }
}

fn evicted() -> io::Error {
    io::Error::new(io::ErrorKind::ConnectionAborted, "another connection needs the place")
}
