//! Connection limits: a total, and a maximum per owner. At a limit, the limiter evicts the longest idle connection of
//! the owner with the most connections. Eviction never interrupts a request: one that has arrived, or is in the
//! socket's receive buffer, gets its response first. Also enforces the idle, read and write timeouts.
//!
//! Used for pods' connections and for the admin port. Knows neither pods nor HTTP.

mod activity;
mod buffers;
mod table;
mod tracked;

#[cfg(test)]
mod tests;

use std::{future::Future, net::IpAddr, pin::pin, sync::Arc, time::Duration};

use parking_lot::Mutex;
use tokio::time::Instant;

use activity::Connection;
use table::Table;

pub use activity::Timeout;
pub use buffers::Buffers;
pub use tracked::{Socket, Tracked};

/// The owner whose limit a connection counts against.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub enum Owner {
    /// A source address whose pod is unknown.
    Address(IpAddr),
    /// A pod with all its addresses, by its UID.
    Pod(Arc<str>),
}

#[derive(Debug, Clone, Copy)]
pub struct Bounds {
    /// Maximum number of open connections.
    pub total: usize,
    /// Maximum number of open connections of one owner.
    pub per_owner: usize,
    /// Minimum idle time before an eviction, so that a client between two requests keeps its connection.
    pub grace: Duration,
}

/// The limit that a new connection would exceed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Limit {
    PerOwner,
    Total,
}

#[derive(Debug)]
pub struct ConnectionLimiter {
    bounds: Bounds,
    /// Origin of all activity times, so that one fits into an atomic.
    epoch: Instant,
    table: Mutex<Table>,
}

impl ConnectionLimiter {
    pub fn new(bounds: Bounds) -> Arc<Self> {
        Arc::new(Self { bounds, epoch: Instant::now(), table: Mutex::default() })
    }

    /// Admits a connection of `owner`, evicting another one if necessary. Returns the limit that caused an eviction.
    ///
    /// # Errors
    /// Returns the limit if no connection can be evicted.
    pub fn try_admit(self: &Arc<Self>, owner: Owner) -> Result<(Arc<ConnectionPermit>, Option<Limit>), Limit> {
        let mut table = self.table.lock();
        let limit = table.limit(&owner, &self.bounds);
        if let Some(limit) = limit {
            table.evict(limit, &owner, self.now(), self.bounds.grace).ok_or(limit)?;
        }
        let connection = Arc::new(Connection::new(self.now()));
        table.insert(owner.clone(), connection.clone());
        drop(table);
        Ok((Arc::new(ConnectionPermit { limiter: self.clone(), owner: Mutex::new(owner), connection }), limit))
    }

    /// Yields to the tasks of evicted connections, if there are any, so that a burst of new connections cannot starve
    /// them.
    pub async fn yield_to_evicted(&self) {
        if self.table.lock().is_closing() {
            tokio::task::yield_now().await;
        }
    }

    fn now(&self) -> Duration {
        self.epoch.elapsed()
    }
}

/// Permission for one open connection, and the record of its activity. Returned to the limiter when dropped.
#[derive(Debug)]
pub struct ConnectionPermit {
    limiter: Arc<ConnectionLimiter>,
    owner: Mutex<Owner>,
    connection: Arc<Connection>,
}

impl ConnectionPermit {
    /// Returns a permit for tests of other modules.
    #[cfg(any(test, fuzzing))]
    pub(crate) fn sample() -> Arc<Self> {
        let bounds = Bounds { total: 1, per_owner: 1, grace: Duration::ZERO };
        let owner = Owner::Address(std::net::Ipv4Addr::LOCALHOST.into());
        ConnectionLimiter::new(bounds).try_admit(owner).unwrap().0
    }

    /// Counts this connection against another owner's limit, once the pod is known.
    pub fn set_owner(&self, owner: Owner) {
        let mut table = self.limiter.table.lock();
        let mut current = self.owner.lock();
        if *current != owner && table.remove(&current, &self.connection) {
            table.insert(owner.clone(), self.connection.clone());
            *current = owner;
        }
    }

    /// Records that a request has arrived.
    pub fn busy(&self) {
        self.connection.busy(self.limiter.now());
    }

    /// Records that the response is complete.
    pub fn idle(&self) {
        self.connection.idle(self.limiter.now());
    }

    /// Returns whether a request is being answered.
    pub fn is_busy(&self) -> bool {
        self.connection.is_busy()
    }

    /// Returns whether the connection must close after its next response.
    pub fn is_evicted(&self) -> bool {
        self.connection.is_evicted()
    }

    /// Returns once the connection is evicted.
    pub async fn evicted(&self) {
        self.connection.evicted().await;
    }

    /// Drives a connection over a [`Tracked`] stream until it ends.
    ///
    /// # Errors
    /// Returns [`Timeout`] if the client sent or read nothing for too long.
    pub async fn drive<T>(&self, connection: impl Future<Output = T>) -> Result<T, Timeout> {
        let (mut connection, mut timeout) = (pin!(connection), pin!(self.timeout()));
        loop {
            tokio::select! {
                ended = &mut connection => return Ok(ended),
                timeout = &mut timeout => return Err(timeout),
                // Poll the connection again: its stream checks for unread bytes and ends if there are none.
                () = self.evicted() => {}
            }
        }
    }

    async fn timeout(&self) -> Timeout {
        loop {
            match self.connection.timeout(self.limiter.now()) {
                Ok(left) => tokio::time::sleep(left).await,
                Err(timeout) => return timeout,
            }
        }
    }
}

impl Drop for ConnectionPermit {
    fn drop(&mut self) {
        let mut table = self.limiter.table.lock();
        table.release(&self.owner.lock(), &self.connection);
    }
}
