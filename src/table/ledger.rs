//! The table's books: how many ids there are, which are parked, and what is remembered.

use std::collections::BTreeMap;

use rustix::process::{Resource, getrlimit};

use super::listing::TableStats;
use crate::error::{BackingError, Scope, ServerReason};
use std::sync::Arc;

/// What the ledger's lock protects. `T` is a reference to an inode.
pub(super) struct Ledger<T> {
    /// `ids` includes those that are being registered; `idle` is not maintained.
    pub(super) stats: TableStats,
    /// How many of the ids are just being closed.
    pub(super) closing: usize,
    /// Opens that wait until one of these is closed.
    pub(super) waiting: usize,
    pub(super) idle_limit: usize,
    pub(super) keep_fds: bool,
    /// Registered without opens, by LRU sequence number.
    idle: BTreeMap<usize, T>,
    /// The same for those whose close failed, with the cause.
    unclosed: BTreeMap<usize, (T, BackingError)>,
    last: usize,
    /// The table is gone, and with it whoever could reopen what is parked, or retry.
    orphaned: bool,
    /// How often `stats.refused` was forgotten.
    resets: usize,
    /// Whom to tell of a cause that is new in `stats.served`.
    tell: Option<Arc<Tell>>,
}

/// What [`BackingTable::on_server_mode`](super::BackingTable::on_server_mode) was given.
pub(super) type Tell = dyn Fn(ServerReason) + Send + Sync;

/// Whether an id may be registered.
pub(super) enum Room<T> {
    /// It is counted.
    Reserved {
        /// How often `reset` was called before.
        resets: usize,
        keep_fds: bool,
    },
    /// The limit is reached: close this one, which is idle, and ask again.
    Evict(Claim<T>),
    /// The limit is reached, and another thread is closing one: wait, and ask again.
    Wait,
    None(ServerReason),
}

/// A parked inode that was taken from the ledger to be closed, and counts as being closed until then. An
/// open of it in the meantime makes the claim void: the inode has another `parked` then.
pub(super) struct Claim<T> {
    pub(super) inode: T,
    pub(super) parked: usize,
}

impl<T: Clone> Ledger<T> {
    pub(super) fn new() -> Self {
        let limit = getrlimit(Resource::Nofile).current;
        let limit = limit.and_then(|limit| usize::try_from(limit).ok());
        Self {
            stats: TableStats {
                limit: limit.unwrap_or(usize::MAX),
                ..TableStats::default()
            },
            closing: 0,
            waiting: 0,
            idle_limit: 0,
            keep_fds: false,
            idle: BTreeMap::new(),
            unclosed: BTreeMap::new(),
            last: 0,
            orphaned: false,
            resets: 0,
            tell: None,
        }
    }

    pub(super) fn reserve(&mut self) -> Room<T> {
        if let Some(error) = self.stats.refused {
            Room::None(ServerReason::Refused(error))
        } else if self.stats.ids < self.stats.limit {
            self.stats.ids += 1;
            Room::Reserved {
                resets: self.resets,
                keep_fds: self.keep_fds,
            }
        } else if let Some(claim) = self.claim_oldest() {
            Room::Evict(claim)
        } else if self.closing > 0 {
            Room::Wait
        } else {
            Room::None(ServerReason::LimitReached)
        }
    }

    /// Registering failed; `resets` is what it was reserved with. What holds for every thread is
    /// remembered, unless `reset` was called after the attempt began.
    pub(super) fn refused(&mut self, error: BackingError, resets: usize) {
        if error.scope() == Scope::Connection && resets == self.resets {
            self.stats.refused = Some(error);
        }
    }

    pub(super) fn reset(&mut self) {
        self.stats.refused = None;
        self.resets += 1;
    }

    /// At the last release: parks the inode, and says under which number, or counts it as being closed.
    pub(super) fn park_or_close(&mut self, inode: &T, may_park: bool) -> Option<usize> {
        if may_park
            && self.idle_limit > 0
            && self.stats.ids - self.closing <= self.stats.limit
            && !self.orphaned
        {
            let number = self.next();
            self.idle.insert(number, inode.clone());
            Some(number)
        } else {
            self.closing += 1;
            None
        }
    }

    /// One that is not in use: where a word has 32 bits they come round again.
    fn next(&mut self) -> usize {
        loop {
            self.last = self.last.wrapping_add(1).max(1);
            if !self.idle.contains_key(&self.last) && !self.unclosed.contains_key(&self.last) {
                return self.last;
            }
        }
    }

    /// An inode that was parked is open again.
    pub(super) fn unpark(&mut self, parked: usize) {
        let idle = self.idle.remove(&parked).is_some();
        if !idle && self.unclosed.remove(&parked).is_none() {
            // Another thread has claimed it, in vain: it will see that when it looks at the inode.
            self.closing -= 1;
        }
    }

    /// An inode that was parked is to be closed.
    pub(super) fn claim(&mut self, parked: usize) {
        self.unpark(parked);
        self.closing += 1;
    }

    fn claim_oldest(&mut self) -> Option<Claim<T>> {
        let (parked, inode) = self.idle.pop_first()?;
        self.closing += 1;
        Some(Claim { inode, parked })
    }

    /// An idle one too many for either limit.
    pub(super) fn claim_surplus(&mut self) -> Option<Claim<T>> {
        if self.idle.len() > self.idle_limit || self.stats.ids - self.closing > self.stats.limit {
            self.claim_oldest()
        } else {
            None
        }
    }

    pub(super) fn unclosed(&self) -> usize {
        self.unclosed.len()
    }

    /// The one whose close failed longest ago.
    pub(super) fn claim_unclosed(&mut self) -> Option<Claim<T>> {
        let (parked, (inode, _)) = self.unclosed.pop_first()?;
        self.closing += 1;
        Some(Claim { inode, parked })
    }

    /// All that are parked. From now on nothing is: it would keep the registrar, and so the connection.
    pub(super) fn orphan(&mut self) -> Vec<Claim<T>> {
        self.orphaned = true;
        let next = || self.claim_unclosed().or_else(|| self.claim_oldest());
        std::iter::from_fn(next).collect()
    }

    /// What was counted as being closed is closed, or failed to be. In the latter case it is parked again,
    /// under the number returned, unless nobody could retry.
    pub(super) fn closed(&mut self, inode: &T, result: Result<(), BackingError>) -> Option<usize> {
        self.closing -= 1;
        self.stats.close_failures += u64::from(result.is_err());
        match result {
            Err(cause) if cause != BackingError::UnknownId => {
                if self.orphaned {
                    return None;
                }
                let number = self.next();
                self.unclosed.insert(number, (inode.clone(), cause));
                Some(number)
            }
            // After `UnknownId` nothing is left to be tried again: somebody else has closed it.
            _ => {
                self.stats.ids -= 1;
                None
            }
        }
    }

    pub(super) fn close_failed(&self, parked: usize) -> Option<BackingError> {
        self.unclosed.get(&parked).map(|(_, cause)| *cause)
    }

    /// Counts an open in server mode; returns whom to tell of its cause.
    pub(super) fn served(&mut self, reason: ServerReason) -> Option<Arc<Tell>> {
        let served = &mut self.stats.served;
        if let Some((_, opens)) = served.iter_mut().find(|(counted, _)| *counted == reason) {
            *opens += 1;
            return None;
        }
        served.push((reason, 1));
        self.tell.clone().filter(|_| reason != ServerReason::Chosen)
    }

    /// Returns the causes so far, to be told, and what was set before, to be dropped without the lock.
    pub(super) fn set_tell(&mut self, tell: Arc<Tell>) -> (Vec<ServerReason>, Option<Arc<Tell>>) {
        let causes = self.stats.served.iter().map(|(reason, _)| *reason);
        let causes = causes.filter(|reason| *reason != ServerReason::Chosen);
        (causes.collect(), self.tell.replace(tell))
    }

    pub(super) fn stats(&self) -> TableStats {
        TableStats {
            idle: self.idle.len(),
            ..self.stats.clone()
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_come_round() {
        let mut ledger = Ledger::new();
        let cause = BackingError::UnknownId;
        assert_eq!((ledger.next(), ledger.next()), (1, 2));
        ledger.last = usize::MAX - 1;
        ledger.idle.insert(usize::MAX, ());
        ledger.unclosed.insert(1, ((), cause));
        // 0 is none.
        assert_eq!(ledger.next(), 2);
    }
}
