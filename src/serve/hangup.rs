//! Tells a client that has gone from one that only sends no more, as `nc` does at the end of its input. TCP says the
//! same of both, and hyper takes it for the former: so hyper is told a while later if a request is being answered then.
//! Whoever is really gone keeps its place for that long. Knows connections, not what is asked on them.

use std::{
    io,
    pin::Pin,
    sync::Arc,
    task::{Context, Poll, ready},
    time::Duration,
};

use tokio::{
    io::{AsyncRead, AsyncWrite, ReadBuf},
    time::{Sleep, sleep},
};

use crate::connections::ConnectionPermit;

/// Enough for what is in hand and for a quick exchange. No SDK closes its side and waits, but SDKs that time out try
/// again: with more, their former tries would use up the connections of their pod.
const PATIENCE: Duration = Duration::from_millis(500);

pub(super) struct Patient<S> {
    stream: S,
    permit: Arc<ConnectionPermit>,
    /// Since the client sends no more.
    patience: Option<Pin<Box<Sleep>>>,
}

impl<S> Patient<S> {
    pub(super) fn new(stream: S, permit: Arc<ConnectionPermit>) -> Self {
        Self { stream, permit, patience: None }
    }
}

impl<S: AsyncRead + Unpin> AsyncRead for Patient<S> {
    fn poll_read(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buffer: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        if self.patience.is_none() {
            let before = buffer.filled().len();
            ready!(Pin::new(&mut self.stream).poll_read(cx, buffer))?;
            if buffer.filled().len() > before || buffer.remaining() == 0 {
                return Poll::Ready(Ok(()));
            }
        }
        if !self.permit.is_busy() {
            return Poll::Ready(Ok(()));
        }
        self.patience.get_or_insert_with(|| Box::pin(sleep(PATIENCE))).as_mut().poll(cx).map(Ok)
    }
}

impl<S: AsyncWrite + Unpin> AsyncWrite for Patient<S> {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.stream).poll_write(cx, bytes)
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_shutdown(cx)
    }
}
