//! Open connections by owner, and the choice of the one to evict.

use std::{collections::HashMap, sync::Arc, time::Duration};

use super::{Bounds, Limit, Owner, activity::Connection};

/// Maximum number of evicted connections that have not closed yet, in addition to the limits. Idle ones close at once.
pub(super) const MAX_CLOSING: usize = 64;
/// Maximum for evicting a busy connection, which closes only after its response. Lower, to leave room for idle ones.
pub(super) const MAX_CLOSING_BUSY: usize = MAX_CLOSING / 2;

#[derive(Debug, Default)]
pub(super) struct Table {
    owners: HashMap<Owner, Vec<Arc<Connection>>>,
    open: usize,
    closing: usize,
}

impl Table {
    /// Returns the limit that one more connection of this owner would exceed.
    pub(super) fn limit(&self, owner: &Owner, bounds: &Bounds) -> Option<Limit> {
        if self.held(owner) >= bounds.per_owner {
            return Some(Limit::PerOwner);
        }
        (self.open >= bounds.total).then_some(Limit::Total)
    }

    pub(super) fn insert(&mut self, owner: Owner, connection: Arc<Connection>) {
        self.owners.entry(owner).or_default().push(connection);
        self.open += 1;
    }

    /// Removes a connection. Returns false if it was evicted before.
    pub(super) fn remove(&mut self, owner: &Owner, connection: &Arc<Connection>) -> bool {
        let Some(open) = self.owners.get_mut(owner) else { return false };
        let Some(index) = open.iter().position(|other| Arc::ptr_eq(other, connection)) else { return false };
        open.swap_remove(index);
        if open.is_empty() {
            self.owners.remove(owner);
        }
        self.open -= 1;
        true
    }

    /// Removes a connection that has closed.
    pub(super) fn release(&mut self, owner: &Owner, connection: &Arc<Connection>) {
        if !self.remove(owner, connection) {
            self.closing -= 1;
        }
    }

    /// Evicts a connection to make room for one of `owner`. Returns `None` if none may be evicted.
    pub(super) fn evict(&mut self, limit: Limit, owner: &Owner, now: Duration, grace: Duration) -> Option<()> {
        if self.closing >= MAX_CLOSING {
            return None;
        }
        let idle = |connection: &Connection| connection.waits_for_client() && connection.age(now) >= grace;
        let held = self.held(owner);
        let (from, connection) = match limit {
            Limit::PerOwner => self.choose(now, |other, _| other == owner, idle)?,
            // If all are busy, evict from an owner with more connections. The evicted one gets its response first.
            Limit::Total => self.choose(now, |other, count| other == owner || count > held, idle).or_else(|| {
                let allowed = self.closing < MAX_CLOSING_BUSY;
                self.choose(now, |_, count| allowed && count > held + 1, |_| true)
            })?,
        };
        self.remove(&from, &connection);
        self.closing += 1;
        connection.evict();
        Some(())
    }

    /// Returns the connection longest in its phase, of the owner with the most connections.
    fn choose(
        &self,
        now: Duration,
        is_eligible: impl Fn(&Owner, usize) -> bool,
        is_evictable: impl Fn(&Connection) -> bool,
    ) -> Option<(Owner, Arc<Connection>)> {
        let owners = self.owners.iter().filter(|(owner, open)| is_eligible(owner, open.len()));
        let connections = owners.flat_map(|(owner, open)| open.iter().map(move |one| (open.len(), owner, one)));
        let candidates = connections.filter(|(_, _, connection)| is_evictable(connection));
        let (_, owner, connection) = candidates.max_by_key(|(count, _, one)| (*count, one.age(now)))?;
        Some((owner.clone(), connection.clone()))
    }

    pub(super) fn is_closing(&self) -> bool {
        self.closing > 0
    }

    fn held(&self, owner: &Owner) -> usize {
        self.owners.get(owner).map_or(0, Vec::len)
    }

    #[cfg(test)]
    pub(super) fn counts(&self) -> (usize, usize) {
        (self.open, self.closing)
    }
}
