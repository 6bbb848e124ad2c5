//! Limits on open connections: a number in all, and a number per owner. When places run short, the connection that has
//! been idle longest is evicted, of the owner that holds most. A request is never cut off: one that is being answered,
//! or on its way, is answered first.
//!
//! Used for pods' connections and for those of the admin port. Knows neither pods nor HTTP.

mod activity;
mod buffers;
mod table;
mod tracked;

#[cfg(test)]
mod tests;

use std::{
    future::Future,
    net::IpAddr,
    pin::pin,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use tokio::time::Instant;

use activity::Connection;
use table::Table;

pub use activity::Timeout;
pub use buffers::Buffers;
pub use tracked::{Socket, Tracked};

/// Whom a connection counts for.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub enum Owner {
    /// A source address, while it is not known which pod has it.
    Address(IpAddr),
    /// A pod by its UID, with all its addresses.
    Pod(Arc<str>),
}

#[derive(Debug, Clone, Copy)]
pub struct Bounds {
    pub total: usize,
    pub per_owner: usize,
    /// Minimum idle time before an eviction, so that a client between two requests keeps its connection.
    pub grace: Duration,
}

/// The limit that a connection ran into.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Limit {
    PerOwner,
    Total,
}

#[derive(Debug)]
pub struct ConnectionLimiter {
    bounds: Bounds,
    /// Times of activity count from here, to fit into an atomic.
    epoch: Instant,
    table: Mutex<Table>,
}

impl ConnectionLimiter {
    pub fn new(bounds: Bounds) -> Arc<Self> {
        Arc::new(Self { bounds, epoch: Instant::now(), table: Mutex::default() })
    }

    /// Admits a connection of `owner`, in the place of another one if it must. Returns the limit that cost that one
    /// its place.
    ///
    /// # Errors
    /// The limit, where no connection can be evicted.
    pub fn try_admit(self: &Arc<Self>, owner: Owner) -> Result<(Arc<Permit>, Option<Limit>), Limit> {
        let mut table = self.table();
        let limit = table.limit(&owner, &self.bounds);
        if let Some(limit) = limit {
            table.evict(limit, &owner, self.now(), self.bounds.grace).ok_or(limit)?;
        }
        let connection = Arc::new(Connection::new(self.now()));
        table.insert(owner.clone(), connection.clone());
        drop(table);
        Ok((Arc::new(Permit { limiter: self.clone(), owner: Mutex::new(owner), connection }), limit))
    }

    /// Lets the tasks of evicted connections run, if there are any: a burst of new connections must not outrun them.
    pub async fn let_evicted_end(&self) {
        if self.table().is_closing() {
            tokio::task::yield_now().await;
        }
    }

    fn now(&self) -> Duration {
        self.epoch.elapsed()
    }

    fn table(&self) -> MutexGuard<'_, Table> {
        lock(&self.table)
    }
}

/// One open connection: its place, and what it is doing. The place is free when this is dropped.
#[derive(Debug)]
pub struct Permit {
    limiter: Arc<ConnectionLimiter>,
    owner: Mutex<Owner>,
    connection: Arc<Connection>,
}

impl Permit {
    /// For tests of what holds one.
    #[cfg(any(test, fuzzing))]
    pub(crate) fn sample() -> Arc<Self> {
        let bounds = Bounds { total: 1, per_owner: 1, grace: Duration::ZERO };
        let owner = Owner::Address(std::net::Ipv4Addr::LOCALHOST.into());
        ConnectionLimiter::new(bounds).try_admit(owner).unwrap().0
    }

    /// Counts this connection for another owner from now on.
    pub fn identify(&self, owner: Owner) {
        let mut table = self.limiter.table();
        let mut known = lock(&self.owner);
        if *known != owner && table.remove(&known, &self.connection) {
            table.insert(owner.clone(), self.connection.clone());
            *known = owner;
        }
    }

    /// A request has arrived and is being answered.
    pub fn busy(&self) {
        self.connection.busy(self.limiter.now());
    }

    /// The answer is complete.
    pub fn idle(&self) {
        self.connection.idle(self.limiter.now());
    }

    pub fn is_busy(&self) -> bool {
        self.connection.is_busy()
    }

    /// Whether the connection must close after the response that is next.
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
    /// The client sent or read nothing for too long.
    pub async fn drive<T>(&self, connection: impl Future<Output = T>) -> Result<T, Timeout> {
        let (mut connection, mut timeout) = (pin!(connection), pin!(self.timeout()));
        loop {
            tokio::select! {
                ended = &mut connection => return Ok(ended),
                timeout = &mut timeout => return Err(timeout),
                // Polls the connection again, whose stream looks whether a request is on its way.
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

impl Drop for Permit {
    fn drop(&mut self) {
        let mut table = self.limiter.table();
        table.release(&lock(&self.owner), &self.connection);
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
