//! Kernel socket buffers. The kernel charges them to the agent's container (memory cgroup), like the agent's own
//! memory.

use std::os::fd::AsFd;

use nix::sys::socket::{setsockopt, sockopt};

/// Sizes of a socket's buffers in bytes. The kernel doubles them for its bookkeeping
/// (<https://man7.org/linux/man-pages/man7/socket.7.html>), and one write or packet may exceed a buffer that has room.
#[derive(Debug, Clone, Copy)]
pub struct Buffers {
    pub receive: usize,
    pub send: usize,
}

impl Buffers {
    /// Limits the buffers of all connections that the listener accepts from now on.
    ///
    /// # Errors
    /// Returns the error of `setsockopt`.
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
        // A socket inherited from another version may have other sizes.
        Buffers { receive: 1 << 20, send: 1 << 20 }.apply(&listener).unwrap();
        Buffers { receive: 4 << 10, send: 16 << 10 }.apply(&listener).unwrap();
        let _client = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
        let (accepted, _) = listener.accept().unwrap();
        assert_eq!(getsockopt(&accepted, sockopt::RcvBuf), Ok(8 << 10));
        assert_eq!(getsockopt(&accepted, sockopt::SndBuf), Ok(32 << 10));
    }
}
