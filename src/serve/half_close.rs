//! Half-close handling. A client that shuts down its sending side, as `nc` does at the end of its input, still wants
//! the response, but TCP signals the same when a client is gone, and hyper then drops the request. [`HalfCloseGrace`]
//! delays the end of input that hyper sees for a grace period while a request is in flight; a client that is really
//! gone keeps its connection permit for that long. Knows connections, not requests.

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

/// Enough for a cached response or a quick exchange. No SDK half-closes and waits, but SDKs that time out retry: with a
/// longer grace period their abandoned requests would use up the connections of the pod.
const GRACE_PERIOD: Duration = Duration::from_millis(500);

pub(super) struct HalfCloseGrace<S> {
    stream: S,
    permit: Arc<ConnectionPermit>,
    /// Starts when the client half-closes.
    grace: Option<Pin<Box<Sleep>>>,
}

impl<S> HalfCloseGrace<S> {
    pub(super) fn new(stream: S, permit: Arc<ConnectionPermit>) -> Self {
        Self { stream, permit, grace: None }
    }
}

impl<S: AsyncRead + Unpin> AsyncRead for HalfCloseGrace<S> {
    fn poll_read(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buffer: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        if self.grace.is_none() {
            let before = buffer.filled().len();
            ready!(Pin::new(&mut self.stream).poll_read(cx, buffer))?;
            if buffer.filled().len() > before || buffer.remaining() == 0 {
                return Poll::Ready(Ok(()));
            }
        }
        if !self.permit.is_busy() {
            return Poll::Ready(Ok(()));
        }
        self.grace.get_or_insert_with(|| Box::pin(sleep(GRACE_PERIOD))).as_mut().poll(cx).map(Ok)
    }
}

impl<S: AsyncWrite + Unpin> AsyncWrite for HalfCloseGrace<S> {
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
