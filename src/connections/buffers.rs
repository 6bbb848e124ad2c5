//! What the kernel may queue for a connection. It charges that to the agent's container like the agent's own memory.

use std::os::fd::AsFd;

use nix::sys::socket::{setsockopt, sockopt};

/// Sizes of a socket's buffers in bytes. The kernel allows twice as much, for its own bookkeeping (socket(7)), and what
/// one write or packet adds to a buffer that still had room.
#[derive(Debug, Clone, Copy)]
pub struct Buffers {
    pub receive: usize,
    pub send: usize,
}

impl Buffers {
    /// Limits the buffers of all connections that this listener is going to accept.
    ///
    /// # Errors
    /// The kernel's.
    pub fn apply(self, listener: &impl AsFd) -> nix::Result<()> {
        setsockopt(listener, sockopt::RcvBuf, &self.receive)?;
        setsockopt(listener, sockopt::SndBuf, &self.send)
    }
}

#[cfg(test)]
mod tests {
    use std::net::{TcpListener, TcpStream};

    use nix::sys::socket::getsockopt;

    use super::*;

    #[test]
    fn accepted_sockets_inherit_the_limits() {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        // As an agent of another version may have left it.
        Buffers { receive: 1 << 20, send: 1 << 20 }.apply(&listener).unwrap();
        Buffers { receive: 4 << 10, send: 16 << 10 }.apply(&listener).unwrap();
        let _client = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
        let (accepted, _) = listener.accept().unwrap();
        assert_eq!(getsockopt(&accepted, sockopt::RcvBuf), Ok(8 << 10));
        assert_eq!(getsockopt(&accepted, sockopt::SndBuf), Ok(32 << 10));
    }
}
