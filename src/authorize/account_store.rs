//! Store of the service accounts that this node's pods use: a pure state machine, updated by watch events and live reads.
//!
//! An account is kept while a live pod of this node uses it, so that the agent's memory does not depend on the number of
//! accounts in the cluster. The result of a live read is kept only if nothing newer arrived while it was in flight: the
//! watch may have shown a deletion or other annotations since.

use std::{
    collections::{HashMap, HashSet},
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
};

use parking_lot::{RwLock, RwLockReadGuard, RwLockWriteGuard};

use super::Account;
use crate::attribute::ServiceAccountName;

/// Returns whether a live pod of this node uses the account.
pub(super) type InUse = Box<dyn Fn(&ServiceAccountName) -> bool + Send + Sync>;

pub(super) struct AccountStore {
    state: RwLock<State>,
    /// Number of changes to `accounts`.
    generation: AtomicU64,
    in_use: InUse,
}

#[derive(Debug, Default)]
struct State {
    /// `None`: the account has no role, or does not exist.
    accounts: HashMap<ServiceAccountName, Option<Arc<Account>>>,
    /// Accounts in use that the list in progress has shown so far.
    listed: Option<HashSet<ServiceAccountName>>,
    /// Reads in flight that nothing newer has superseded, by number.
    reads: HashMap<u64, ServiceAccountName>,
    next_read: u64,
    /// Accounts that are being fetched for a newly bound pod.
    fetching: HashSet<ServiceAccountName>,
}

impl State {
    fn supersede_reads(&mut self, name: &ServiceAccountName, before: u64) {
        self.reads.retain(|number, other| other != name || *number >= before);
    }
}

impl AccountStore {
    pub(super) fn new(in_use: InUse) -> Self {
        Self { state: RwLock::default(), generation: AtomicU64::new(0), in_use }
    }

    pub(super) fn generation(&self) -> u64 {
        self.generation.load(Ordering::SeqCst)
    }

    /// Returns the account if it is known to have a role.
    pub(super) fn get(&self, name: &ServiceAccountName) -> Option<Arc<Account>> {
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

    /// Completes a list: drops the accounts that it did not show, and returns those of them that pods use. They were
    /// deleted, or their first pod was bound after the list had passed them. Supersedes the reads in flight, which may be
    /// older than the list.
    pub(super) fn list_done(&self) -> Vec<ServiceAccountName> {
        let mut state = self.write();
        let listed = state.listed.take().unwrap_or_default();
        let unlisted: Vec<_> =
            state.accounts.extract_if(|name, _| !listed.contains(name)).map(|(name, _)| name).collect();
        state.reads.clear();
        self.changed();
        unlisted.into_iter().filter(|name| (self.in_use)(name)).collect()
    }

    /// Applies a watch event. `None`: the account has no role, or was deleted. Returns whether an account in use has a new
    /// role, or other annotations.
    pub(super) fn apply(&self, name: &ServiceAccountName, account: Option<Account>) -> bool {
        let mut state = self.write();
        state.supersede_reads(name, u64::MAX);
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
            && before.same_spec(account)
        {
            return false;
        }
        let has_role = account.is_some();
        state.accounts.insert(name.clone(), account.map(Arc::new));
        self.changed();
        has_role
    }

    /// Drops the accounts that no pod uses any more.
    pub(super) fn forget_unused(&self) {
        let mut state = self.write();
        let before = state.accounts.len();
        state.accounts.retain(|name, _| (self.in_use)(name));
        if state.accounts.len() < before {
            self.changed();
        }
    }

    /// Registers a live read that is about to start.
    pub(super) fn begin_read(self: &Arc<Self>, name: &ServiceAccountName) -> PendingRead {
        let mut state = self.write();
        let number = state.next_read;
        state.next_read += 1;
        state.reads.insert(number, name.clone());
        PendingRead { store: self.clone(), number }
    }

    /// Returns whether the caller must fetch the account for a newly bound pod: it is unknown, and nobody fetches it yet.
    pub(super) fn begin_fetch(&self, name: &ServiceAccountName) -> bool {
        let mut state = self.write();
        !state.accounts.contains_key(name) && state.fetching.insert(name.clone())
    }

    /// Returns whether the fetch is complete: the account is known, or no pod uses it any more.
    pub(super) fn finish_fetch(&self, name: &ServiceAccountName) -> bool {
        let mut state = self.write();
        let done = state.accounts.contains_key(name) || !(self.in_use)(name);
        if done {
            state.fetching.remove(name);
        }
        done
    }

    /// Must be called with the lock held, so that nobody can combine the new generation with the old accounts.
    fn changed(&self) {
        self.generation.fetch_add(1, Ordering::SeqCst);
    }

    fn read(&self) -> RwLockReadGuard<'_, State> {
        self.state.read()
    }

    fn write(&self) -> RwLockWriteGuard<'_, State> {
        self.state.write()
    }
}

/// A live read in flight, until dropped.
pub(super) struct PendingRead {
    store: Arc<AccountStore>,
    number: u64,
}

impl PendingRead {
    /// Stores the result if a pod uses the account. Returns false if it is obsolete: an event of the account, a list or a
    /// later read came in between.
    pub(super) fn commit(self, account: Option<Arc<Account>>) -> bool {
        let mut state = self.store.write();
        let Some(name) = state.reads.remove(&self.number) else { return false };
        state.supersede_reads(&name, self.number);
        if (self.store.in_use)(&name) {
            state.accounts.insert(name, account);
            self.store.changed();
        }
        true
    }
}

impl Drop for PendingRead {
    fn drop(&mut self) {
        self.store.write().reads.remove(&self.number);
    }
}

#[cfg(test)]
#[path = "account_store_tests.rs"]
mod tests;
