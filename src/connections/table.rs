//! The open connections by owner, and which of them has to go.

use std::{collections::HashMap, sync::Arc, time::Duration};

use super::{Bounds, Limit, Owner, activity::Connection};

/// Maximum number of evicted connections that have not ended yet, which come on top of the limits. An idle one ends at
/// once.
pub(super) const MAX_CLOSING: usize = 64;
/// The same for evicting one that is being answered: it ends after its response, and must not block idle ones.
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

    /// Returns whether the connection was there: not if it has been evicted.
    pub(super) fn remove(&mut self, owner: &Owner, connection: &Arc<Connection>) -> bool {
        let Some(open) = self.owners.get_mut(owner) else { return false };
        let Some(place) = open.iter().position(|other| Arc::ptr_eq(other, connection)) else { return false };
        open.swap_remove(place);
        if open.is_empty() {
            self.owners.remove(owner);
        }
        self.open -= 1;
        true
    }

    /// Forgets a connection that has ended.
    pub(super) fn release(&mut self, owner: &Owner, connection: &Arc<Connection>) {
        if !self.remove(owner, connection) {
            self.closing -= 1;
        }
    }

    /// Makes room for a connection of `owner`. `None` if nothing may be evicted for it.
    pub(super) fn evict(&mut self, limit: Limit, owner: &Owner, now: Duration, grace: Duration) -> Option<()> {
        if self.closing >= MAX_CLOSING {
            return None;
        }
        let idle = |connection: &Connection| connection.waits_for_client() && connection.age(now) >= grace;
        let held = self.held(owner);
        let (from, connection) = match limit {
            Limit::PerOwner => self.choose(now, |other, _| other == owner, idle)?,
            // Where all are busy, the place goes to whoever has fewer, and the other one gets its response first.
            Limit::Total => self.choose(now, |other, count| other == owner || count > held, idle).or_else(|| {
                let may = self.closing < MAX_CLOSING_BUSY;
                self.choose(now, |_, count| may && count > held + 1, |_| true)
            })?,
        };
        self.remove(&from, &connection);
        self.closing += 1;
        connection.evict();
        Some(())
    }

    /// Returns the connection that has been in its phase longest, of the owner that holds most.
    fn choose(
        &self,
        now: Duration,
        may_lose: impl Fn(&Owner, usize) -> bool,
        may_go: impl Fn(&Connection) -> bool,
    ) -> Option<(Owner, Arc<Connection>)> {
        let owners = self.owners.iter().filter(|(owner, open)| may_lose(owner, open.len()));
        let connections = owners.flat_map(|(owner, open)| open.iter().map(move |one| (open.len(), owner, one)));
        let candidates = connections.filter(|(_, _, connection)| may_go(connection));
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
