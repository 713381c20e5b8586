//! The table's accounts: how many ids there are, which inodes are parked, and which refusal holds for all.

use std::collections::BTreeMap;

use rustix::process::{Resource, getrlimit};

use super::listing::TableStats;
use crate::error::{BackingError, Scope, ServerReason};
use std::sync::Arc;

/// What the ledger lock protects. All methods need that lock. `T` is a reference to an inode.
pub(super) struct Ledger<T> {
    /// `ids` includes those that are being registered or closed. `idle` stays 0: [`stats`](Self::stats) fills it in.
    pub(super) stats: TableStats,
    /// How many of `stats.ids` are being closed, or claimed to be closed.
    pub(super) closing: usize,
    /// How many opens wait in `Shared::reserve` for `closing` to be lowered.
    pub(super) waiting: usize,
    /// How many ids may be idle.
    pub(super) idle_limit: usize,
    /// Whether new registrations keep an fd.
    pub(super) keep_fds: bool,
    /// Parked inodes whose id is kept for reopening, by LRU sequence number.
    idle: BTreeMap<usize, T>,
    /// Parked inodes whose id could not be closed, by LRU sequence number, with the cause.
    unclosed: BTreeMap<usize, (T, BackingError)>,
    /// The LRU sequence number that was given last.
    last: usize,
    /// The table was dropped: nothing can be reopened, and no close retried.
    orphaned: bool,
    /// How often [`retry_registrations`](Self::retry_registrations) was called.
    resets: usize,
    /// Called for each cause that is new in `stats.served`.
    on_server_mode: Option<Arc<OnServerMode>>,
}

/// The callback of [`BackingTable::on_server_mode`](super::BackingTable::on_server_mode).
pub(super) type OnServerMode = dyn Fn(ServerReason) + Send + Sync;

/// Whether another id may be registered.
pub(super) enum Room<T> {
    /// Yes. The id is counted in `stats.ids`.
    Reserved {
        /// How often `retry_registrations` was called before, for [`Ledger::refused`].
        resets: usize,
        keep_fds: bool,
    },
    /// The limit is reached. Close the id of this idle inode, then ask again.
    Evict(Claim<T>),
    /// The limit is reached, and another thread is closing an id. Wait, then ask again.
    Wait,
    /// No.
    None(ServerReason),
}

/// A parked inode that was taken out of the ledger to close its id, which counts in `closing`. The claim is void if
/// `Inode::parked` is no longer the number in it: another thread has opened the inode, or taken it to close it.
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
            on_server_mode: None,
        }
    }

    /// Counts an id that is about to be registered, or says what must happen first.
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

    /// Remembers an error of registering that holds for the whole connection, so that nothing more is registered.
    /// `resets` is from [`Room::Reserved`]: an error is not remembered if `retry_registrations` was called after the
    /// attempt began.
    pub(super) fn refused(&mut self, error: BackingError, resets: usize) {
        if error.scope() == Scope::Connection && resets == self.resets {
            self.stats.refused = Some(error);
        }
    }

    /// Forgets the remembered error, also that of an attempt that is being made.
    pub(super) fn retry_registrations(&mut self) {
        self.stats.refused = None;
        self.resets += 1;
    }

    /// Called at the last release. Parks the inode and returns its number; or counts its id in `closing` and returns
    /// `None`: the caller must close the id.
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

    /// A sequence number that is not in use, and not 0. With 32-bit words the numbers can wrap around.
    fn next(&mut self) -> usize {
        loop {
            self.last = self.last.wrapping_add(1).max(1);
            if !self.idle.contains_key(&self.last) && !self.unclosed.contains_key(&self.last) {
                return self.last;
            }
        }
    }

    /// Takes a parked inode out, because it is open again. If another thread has claimed it, lowers `closing`, since
    /// that claim is void now: caller must wake the opens that wait, and set `Inode::parked`.
    pub(super) fn unpark(&mut self, parked: usize) {
        let idle = self.idle.remove(&parked).is_some();
        if !idle && self.unclosed.remove(&parked).is_none() {
            // Claimed by another thread, which will find another number in `Inode::parked`.
            self.closing -= 1;
        }
    }

    /// Takes a parked inode out, to close its id, which counts in `closing` from now on.
    pub(super) fn claim(&mut self, parked: usize) {
        self.unpark(parked);
        self.closing += 1;
    }

    /// Claims the idle inode that was released longest ago.
    fn claim_oldest(&mut self) -> Option<Claim<T>> {
        let (parked, inode) = self.idle.pop_first()?;
        self.closing += 1;
        Some(Claim { inode, parked })
    }

    /// Claims an idle inode if there are too many idle ids, or too many ids that are not being closed.
    pub(super) fn claim_surplus(&mut self) -> Option<Claim<T>> {
        if self.idle.len() > self.idle_limit || self.stats.ids - self.closing > self.stats.limit {
            self.claim_oldest()
        } else {
            None
        }
    }

    /// How many ids could not be closed.
    pub(super) fn unclosed(&self) -> usize {
        self.unclosed.len()
    }

    /// Claims the inode whose close failed longest ago.
    pub(super) fn claim_unclosed(&mut self) -> Option<Claim<T>> {
        let (parked, (inode, _)) = self.unclosed.pop_first()?;
        self.closing += 1;
        Some(Claim { inode, parked })
    }

    /// Claims all parked inodes. From now on nothing is parked, since a parked inode keeps the registrar, and so the
    /// device fd and the connection.
    pub(super) fn orphan(&mut self) -> Vec<Claim<T>> {
        self.orphaned = true;
        let next = || self.claim_unclosed().or_else(|| self.claim_oldest());
        std::iter::from_fn(next).collect()
    }

    /// Books the result of a close that was counted in `closing`. If it failed and can be retried, parks the inode as
    /// unclosed and returns its number.
    pub(super) fn finish_close(
        &mut self,
        inode: &T,
        result: Result<(), BackingError>,
    ) -> Option<usize> {
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
            // `UnknownId`: the id was closed already, so there is nothing to retry.
            _ => {
                self.stats.ids -= 1;
                None
            }
        }
    }

    /// Why the id of an inode that is parked under this number could not be closed.
    pub(super) fn close_failed(&self, parked: usize) -> Option<BackingError> {
        self.unclosed.get(&parked).map(|(_, cause)| *cause)
    }

    /// Counts an open in server mode. Returns the callback if the cause is new; the caller calls it without a lock.
    pub(super) fn served(&mut self, reason: ServerReason) -> Option<Arc<OnServerMode>> {
        let served = &mut self.stats.served;
        if let Some((_, opens)) = served.iter_mut().find(|(counted, _)| *counted == reason) {
            *opens += 1;
            return None;
        }
        served.push((reason, 1));
        let callback = self.on_server_mode.clone();
        callback.filter(|_| reason != ServerReason::Chosen)
    }

    /// Sets the callback. Returns the causes so far, for which the caller calls it, and the callback that was replaced,
    /// which the caller drops: both without the ledger lock.
    pub(super) fn set_on_server_mode(
        &mut self,
        callback: Arc<OnServerMode>,
    ) -> (Vec<ServerReason>, Option<Arc<OnServerMode>>) {
        let causes = self.stats.served.iter().map(|(reason, _)| *reason);
        let causes = causes.filter(|reason| *reason != ServerReason::Chosen);
        (causes.collect(), self.on_server_mode.replace(callback))
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
    fn sequence_numbers_wrap_around() {
        let mut ledger = Ledger::new();
        let cause = BackingError::UnknownId;
        assert_eq!((ledger.next(), ledger.next()), (1, 2));
        ledger.last = usize::MAX - 1;
        ledger.idle.insert(usize::MAX, ());
        ledger.unclosed.insert(1, ((), cause));
        // Not 0, which stands for an inode that is not parked.
        assert_eq!(ledger.next(), 2);
    }
}
