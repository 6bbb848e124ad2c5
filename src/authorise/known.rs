//! The service accounts that this node's pods use, as a state machine: watch events and live reads go in. No I/O.
//!
//! An account is kept while a live pod of this node uses it, so that the agent's memory does not depend on the accounts
//! of the cluster. The result of a read is kept only if nothing newer came while the read was in flight: the watch may
//! have shown a deletion or other annotations since.

use std::{
    collections::{HashMap, HashSet},
    sync::{
        Arc, PoisonError, RwLock, RwLockReadGuard, RwLockWriteGuard,
        atomic::{AtomicU64, Ordering},
    },
};

use super::Account;
use crate::attribute::ServiceAccountName;

/// Returns whether a live pod of this node uses the account.
pub(super) type InUse = Box<dyn Fn(&ServiceAccountName) -> bool + Send + Sync>;

pub(super) struct Known {
    state: RwLock<State>,
    /// Number of changes to `accounts`.
    edition: AtomicU64,
    in_use: InUse,
}

#[derive(Debug, Default)]
struct State {
    /// `None`: the account has no role, or does not exist.
    accounts: HashMap<ServiceAccountName, Option<Arc<Account>>>,
    /// Accounts in use that the current list has shown so far.
    listed: Option<HashSet<ServiceAccountName>>,
    /// Reads in flight that nothing newer has overtaken, by number.
    reads: HashMap<u64, ServiceAccountName>,
    next_read: u64,
    /// Accounts that are being read because a pod was bound.
    learning: HashSet<ServiceAccountName>,
}

impl State {
    fn overtake_reads(&mut self, name: &ServiceAccountName, before: u64) {
        self.reads.retain(|number, other| other != name || *number >= before);
    }
}

impl Known {
    pub(super) fn new(in_use: InUse) -> Self {
        Self { state: RwLock::default(), edition: AtomicU64::new(0), in_use }
    }

    pub(super) fn edition(&self) -> u64 {
        self.edition.load(Ordering::SeqCst)
    }

    /// Returns the account if it is known to have a role.
    pub(super) fn with_role(&self, name: &ServiceAccountName) -> Option<Arc<Account>> {
        self.read().accounts.get(name).cloned().flatten()
    }

    pub(super) fn replace(&self, accounts: impl Iterator<Item = (ServiceAccountName, Arc<Account>)>) {
        let accounts = accounts.map(|(name, account)| (name, Some(account))).collect();
        let mut state = self.write();
        *state = State { accounts, ..State::default() };
        self.changed();
    }

    pub(super) fn list_started(&self) {
        self.write().listed = Some(HashSet::new());
    }

    /// Drops the accounts that the list did not show, and returns those of them that pods use: they were deleted, or
    /// their first pod was bound after the list had passed them. A read that began before this may be older than the
    /// list.
    pub(super) fn list_done(&self) -> Vec<ServiceAccountName> {
        let mut state = self.write();
        let listed = state.listed.take().unwrap_or_default();
        let unlisted: Vec<_> =
            state.accounts.extract_if(|name, _| !listed.contains(name)).map(|(name, _)| name).collect();
        state.reads.clear();
        self.changed();
        unlisted.into_iter().filter(|name| (self.in_use)(name)).collect()
    }

    /// Applies a watch event. `None`: the account has no role, or was deleted. Returns whether a role, or another
    /// version of one, is new for a pod of this node.
    pub(super) fn put(&self, name: &ServiceAccountName, account: Option<Account>) -> bool {
        let mut state = self.write();
        state.overtake_reads(name, u64::MAX);
        if !(self.in_use)(name) {
            if state.accounts.remove(name).is_some() {
                self.changed();
            }
            return false;
        }
        if let Some(listed) = &mut state.listed {
            listed.insert(name.clone());
        }
        let before = state.accounts.get(name).and_then(Option::as_ref);
        if let (Some(before), Some(account)) = (before, &account)
            && before.says_the_same(account)
        {
            return false;
        }
        let new_role = account.is_some();
        state.accounts.insert(name.clone(), account.map(Arc::new));
        self.changed();
        new_role
    }

    pub(super) fn forget_unused(&self) {
        let mut state = self.write();
        let before = state.accounts.len();
        state.accounts.retain(|name, _| (self.in_use)(name));
        if state.accounts.len() < before {
            self.changed();
        }
    }

    /// Registers a read that is about to begin.
    pub(super) fn begin_read(self: &Arc<Self>, name: &ServiceAccountName) -> Read {
        let mut state = self.write();
        let number = state.next_read;
        state.next_read += 1;
        state.reads.insert(number, name.clone());
        Read { known: self.clone(), number }
    }

    /// Returns whether the account has to be read for a pod that was bound: it is not known, and nobody reads it yet.
    pub(super) fn begin_learning(&self, name: &ServiceAccountName) -> bool {
        let mut state = self.write();
        !state.accounts.contains_key(name) && state.learning.insert(name.clone())
    }

    /// Returns whether reading it has come to its end: it is known, or no pod uses it any more.
    pub(super) fn end_learning(&self, name: &ServiceAccountName) -> bool {
        let mut state = self.write();
        let ended = state.accounts.contains_key(name) || !(self.in_use)(name);
        if ended {
            state.learning.remove(name);
        }
        ended
    }

    /// Called with the lock held: a reader that sees the old edition afterwards has read the old accounts before.
    fn changed(&self) {
        self.edition.fetch_add(1, Ordering::SeqCst);
    }

    fn read(&self) -> RwLockReadGuard<'_, State> {
        self.state.read().unwrap_or_else(PoisonError::into_inner)
    }

    fn write(&self) -> RwLockWriteGuard<'_, State> {
        self.state.write().unwrap_or_else(PoisonError::into_inner)
    }
}

/// A read in flight, until dropped.
pub(super) struct Read {
    known: Arc<Known>,
    number: u64,
}

impl Read {
    /// Keeps what was read if a pod uses it. Returns false if the result is obsolete: an event of the account, a list or
    /// a later read came in between.
    pub(super) fn end(self, account: Option<Arc<Account>>) -> bool {
        let mut state = self.known.write();
        let Some(name) = state.reads.remove(&self.number) else { return false };
        state.overtake_reads(&name, self.number);
        if (self.known.in_use)(&name) {
            state.accounts.insert(name, account);
            self.known.changed();
        }
        true
    }
}

impl Drop for Read {
    fn drop(&mut self) {
        self.known.write().reads.remove(&self.number);
    }
}

#[cfg(test)]
#[path = "known_tests.rs"]
mod tests;
