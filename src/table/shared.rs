//! What the opens of a table share: the inodes in their shards, and the ledger.

use std::cell::Cell;
use std::hash::Hash;
use std::os::fd::{AsFd, BorrowedFd};
use std::sync::OnceLock;
use std::time::{Duration, Instant};

use rustix::io::Errno;

use super::hash::Seeds;
use super::inode::{self, Inodes};
use super::ledger::{Claim, Ledger, Room};
use super::listing::Entry;
use super::mode::{Mode, Registered};
use crate::access::Access;
use crate::error::{BackingError, Scope, ServerReason};
use crate::file::{Looked, ServerFile};
use crate::register::Register;
use crate::sync::{Arc, AtomicBool, Condvar, Mutex, MutexGuard, Ordering, lock, wait};

/// Enough that threads seldom meet, in 8 KiB of empty maps.
const SHARDS: u8 = 64;

pub(super) struct Shared<R: Register, K: Hash + Eq + Clone> {
    /// Set once, by `attach`, with its `enforces_grant`.
    registrar: OnceLock<(R, bool)>,
    /// The registrar takes no `O_PATH` fd: its kernel is older than 6.12.
    refuses_path_fd: AtomicBool,
    seeds: Seeds,
    shards: Box<[Shard<R, K>]>,
    ledger: Mutex<Ledger<Arc<Inode<R, K>>>>,
    /// With the lock of the ledger: an id is being closed no more.
    closed: Condvar,
    start: Instant,
}

type Inode<R, K> = inode::Inode<K, Shared<R, K>>;

/// On a cache line of its own.
#[repr(align(64))]
struct Shard<R: Register, K: Hash + Eq + Clone>(Mutex<Inodes<K, Shared<R, K>>>);

/// A shard, while its lock is held.
type Locked<'a, R, K> = MutexGuard<'a, Inodes<K, Shared<R, K>>>;

/// An open that is counted; dropping it is the release.
pub(super) struct Open<R: Register, K: Hash + Eq + Clone>(Arc<Inode<R, K>>);

impl<R: Register, K: Hash + Eq + Clone> Shared<R, K> {
    pub(super) fn new() -> Self {
        let seeds = Seeds::random();
        let shard = |_| Shard(Mutex::new(Inodes::new(seeds)));
        Self {
            registrar: OnceLock::new(),
            refuses_path_fd: AtomicBool::new(false),
            seeds,
            shards: (0..SHARDS).map(shard).collect(),
            ledger: Mutex::new(Ledger::new()),
            closed: Condvar::new(),
            start: Instant::now(),
        }
    }

    pub(super) fn attach(&self, registrar: R) -> Result<(), R> {
        let enforces = registrar.enforces_grant();
        let set = self.registrar.set((registrar, enforces));
        set.map_err(|(registrar, _)| registrar)
    }

    /// To be asked at each use: `attach` may come in between.
    #[inline]
    pub(super) fn enforces_grant(&self) -> bool {
        self.registrar.get().is_some_and(|(_, enforces)| *enforces)
    }

    pub(super) fn ledger(&self) -> MutexGuard<'_, Ledger<Arc<Inode<R, K>>>> {
        lock(&self.ledger)
    }

    #[inline]
    fn lock_of(&self, key: &K) -> (u8, Locked<'_, R, K>) {
        let shard = self.seeds.part(key, SHARDS);
        (shard, self.lock(shard))
    }

    #[inline]
    fn lock(&self, shard: u8) -> Locked<'_, R, K> {
        lock(&self.shards[usize::from(shard)].0)
    }

    /// One open more of an inode that is open or parked, if `admits` its mode; it is told whether the inode
    /// is open.
    #[inline]
    pub(super) fn join(
        &self,
        key: &K,
        admits: impl FnOnce(&Mode, bool) -> bool,
    ) -> Option<Open<R, K>> {
        let (_, inodes) = self.lock_of(key);
        let inode = inodes.find(key)?;
        let mode = inode.mode()?;
        admits(mode, inode.opens.get() > 0).then(|| self.count(inode))
    }

    /// The same, or the first open of a new one, whose mode is decided now. What `admits` refuses is replaced
    /// if it is merely parked. Waits for another open that is deciding, without counting as one.
    pub(super) fn join_or_insert<E>(
        self: &Arc<Self>,
        key: &K,
        admits: impl Fn(&Mode, bool) -> Result<(), E>,
        decide: impl FnOnce() -> Mode,
    ) -> Result<Open<R, K>, E> {
        let (shard, mut inodes, replaced) = loop {
            let (shard, inodes) = self.lock_of(key);
            let Some(inode) = inodes.find(key) else {
                break (shard, inodes, None);
            };
            let inode = match inode.mode() {
                Some(mode) => match admits(mode, inode.opens.get() > 0) {
                    Ok(()) => return Ok(self.count(inode)),
                    Err(error) if inode.opens.get() > 0 => return Err(error),
                    Err(_) => {
                        let inode = Arc::clone(inode);
                        break (shard, inodes, Some(inode));
                    }
                },
                None => Arc::clone(inode),
            };
            drop(inodes);
            drop(lock(&inode.deciding));
        };
        let inode = Inode::new(key.clone(), shard, self.seconds(), Arc::clone(self));
        let inode = Arc::new(inode);
        // Before anybody finds it. If this thread unwinds, the inode is released first, then this.
        let deciding = lock(&inode.deciding);
        inodes.insert(Arc::clone(&inode));
        let open = Open(Arc::clone(&inode));
        if let Some(replaced) = &replaced {
            self.claim(replaced);
        }
        drop(inodes);
        if let Some(replaced) = &replaced {
            let _counted = self.close(replaced);
        }
        inode.decide(decide);
        drop(deciding);
        Ok(open)
    }

    /// One open more. Caller must hold the shard lock.
    #[inline]
    fn count(&self, inode: &Arc<Inode<R, K>>) -> Open<R, K> {
        inode.opens.set(inode.opens.get() + 1);
        if inode.parked.get() != 0 {
            self.unpark(inode);
        }
        Open(Arc::clone(inode))
    }

    /// Caller must hold the shard lock.
    #[cold]
    fn unpark(&self, inode: &Inode<R, K>) {
        self.settle(|ledger| ledger.unpark(inode.parked.get()));
        inode.parked.set(0);
    }

    /// Takes a parked inode from the ledger, to be closed. Caller must hold the shard lock.
    fn claim(&self, inode: &Inode<R, K>) {
        self.settle(|ledger| ledger.claim(inode.parked.get()));
        inode.parked.set(0);
    }

    /// Detaches an inode from its key, and closes it if it is parked. False for one that is open, unless
    /// `also_open`.
    pub(super) fn detach(&self, key: &K, also_open: bool) -> bool {
        let (_, mut inodes) = self.lock_of(key);
        if !also_open && inodes.find(key).is_some_and(|inode| inode.opens.get() > 0) {
            return false;
        }
        let parked = inodes.detach(key).filter(|inode| inode.parked.get() != 0);
        if let Some(inode) = parked.cloned() {
            self.claim(&inode);
            drop(inodes);
            let _counted = self.close(&inode);
        }
        true
    }

    #[inline]
    fn release(&self, inode: &Arc<Inode<R, K>>) {
        let inodes = self.lock(inode.shard);
        let opens = inode.opens.get() - 1;
        inode.opens.set(opens);
        if opens == 0 {
            self.last_release(inodes, inode);
        }
    }

    // Apart, so that what is before it is inlined.
    #[cold]
    fn last_release(&self, mut inodes: Locked<'_, R, K>, inode: &Arc<Inode<R, K>>) {
        if !matches!(inode.mode(), Some(Mode::Passthrough(_))) {
            return inodes.remove(inode);
        }
        let parked = self
            .ledger()
            .park_or_close(inode, inode.detached.get() == 0);
        inode.parked.set(parked.unwrap_or(0));
        drop(inodes);
        if parked.is_some() {
            self.trim();
        } else {
            let _counted = self.close(inode);
        }
    }

    /// Closes the id of an inode that the ledger counts as being closed, and that nobody can open.
    /// Caller must hold no lock but the `deciding` of another inode.
    fn close(&self, inode: &Arc<Inode<R, K>>) -> Result<(), BackingError> {
        let Some(Mode::Passthrough(registered)) = inode.mode() else {
            return Ok(());
        };
        // That is what it comes to if the registrar panics.
        let (errno, scope) = (Errno::IO, Scope::File);
        let result = Cell::new(Err(BackingError::Registrar { errno, scope }));
        let tell = OnDrop(|| self.closed(inode, result.get()));
        let id = registered.id.alias();
        // An adopted one may be closed before `attach`.
        let unattached = Err(BackingError::NotAttached(Errno::PERM));
        result.set(self.registrar.get().map_or(unattached, |(registrar, _)| {
            registrar.unregister(id).map_err(|failed| failed.cause())
        }));
        drop(tell);
        result.get()
    }

    /// An id is being closed no more.
    fn settle<T>(&self, end: impl FnOnce(&mut Ledger<Arc<Inode<R, K>>>) -> T) -> T {
        let mut ledger = self.ledger();
        let ended = end(&mut ledger);
        // Each notification is a system call.
        if ledger.waiting > 0 {
            self.closed.notify_all();
        }
        ended
    }

    /// What a close has come to.
    fn closed(&self, inode: &Arc<Inode<R, K>>, result: Result<(), BackingError>) {
        let mut inodes = self.lock(inode.shard);
        let parked = self.settle(|ledger| ledger.closed(inode, result));
        match parked {
            Some(parked) => inode.parked.set(parked),
            None => return inodes.remove(inode),
        }
        if matches!(result, Err(BackingError::Registrar { .. })) && inode.detached.get() == 0 {
            // It may be closed all the same: not to be answered again.
            inodes.detach(&inode.key);
        }
    }

    /// Closes what was claimed, unless it was opened since.
    pub(super) fn close_claimed(&self, claim: Claim<Arc<Inode<R, K>>>) -> Result<(), BackingError> {
        let Claim { inode, parked } = claim;
        let inodes = self.lock(inode.shard);
        if inode.parked.get() != parked {
            return Ok(());
        }
        inode.parked.set(0);
        drop(inodes);
        self.close(&inode)
    }

    /// Parks nothing any more, and closes what is parked.
    pub(super) fn shut_down(&self) {
        let claims = self.ledger().orphan();
        // First, so that the registrar is let go of even if it panics in a close.
        (0..SHARDS).for_each(|shard| self.lock(shard).retain_open());
        for claim in claims {
            // Whoever wants to know retries before: a destructor has nobody to tell.
            let _ = self.close_claimed(claim);
        }
    }

    /// Closes idle ones that are too many for either limit.
    pub(super) fn trim(&self) {
        loop {
            let Some(claim) = self.ledger().claim_surplus() else {
                return;
            };
            let _counted = self.close_claimed(claim);
        }
    }

    /// The mode of an inode whose first open brings this file.
    pub(super) fn register(
        &self,
        file: &ServerFile<'_, BorrowedFd<'_>>,
        looked: Looked,
        grant: Access,
    ) -> Mode {
        self.try_register(file, looked, grant)
            .map_or_else(Mode::Server, Mode::Passthrough)
    }

    fn try_register(
        &self,
        file: &ServerFile<'_, BorrowedFd<'_>>,
        looked: Looked,
        grant: Access,
    ) -> Result<Registered, ServerReason> {
        let (registrar, _) = self.registrar.get().ok_or(ServerReason::NoRegistrar)?;
        if let Some(reason) = looked.refusal {
            return Err(reason);
        }
        let (resets, keep_fds) = self.reserve()?;
        let reserved = OnDrop(|| self.ledger().stats.ids -= 1);
        let wants_path = registrar.takes_path_fd();
        let by_path = wants_path && !self.refuses_path_fd.load(Ordering::Relaxed);
        let mut backing = file.backing(looked.id, by_path);
        let result = loop {
            if keep_fds {
                backing.keep().map_err(ServerReason::NoFd)?;
            }
            match registrar.register(backing.as_fd(), grant) {
                Err(BackingError::PathOnlyFd) if backing.is_path => {
                    self.refuses_path_fd.store(true, Ordering::Relaxed);
                    backing = file.backing(looked.id, false);
                }
                result => break result,
            }
        };
        let id = result.map_err(|error| {
            self.ledger().refused(error, resets);
            ServerReason::Refused(error)
        })?;
        std::mem::forget(reserved);
        if wants_path && !backing.is_path {
            self.ledger().stats.by_open_fd += 1;
        }
        let kept = backing.opened.filter(|_| keep_fds);
        Ok(Registered::new(id, looked.id, grant, kept))
    }

    /// Counts one id more, once idle ones are closed if need be. What the ledger's `Room::Reserved` has.
    fn reserve(&self) -> Result<(usize, bool), ServerReason> {
        let mut ledger = self.ledger();
        loop {
            match ledger.reserve() {
                Room::Reserved { resets, keep_fds } => return Ok((resets, keep_fds)),
                Room::None(reason) => return Err(reason),
                Room::Wait => {
                    ledger.waiting += 1;
                    ledger = wait(&self.closed, ledger);
                    ledger.waiting -= 1;
                }
                Room::Evict(claim) => {
                    drop(ledger);
                    let _counted = self.close_claimed(claim);
                    ledger = self.ledger();
                }
            }
        }
    }

    fn seconds(&self) -> u32 {
        u32::try_from(self.start.elapsed().as_secs()).unwrap_or(u32::MAX)
    }

    /// All inodes that are open or parked, but for those whose mode is being decided.
    pub(super) fn entries(&self) -> Vec<Entry<K>> {
        let now = self.seconds();
        let mut entries = Vec::new();
        for shard in 0..SHARDS {
            let inodes = self.lock(shard);
            entries.extend(inodes.iter().filter_map(|inode| self.entry(inode, now)));
        }
        entries
    }

    /// Caller must hold the shard lock.
    fn entry(&self, inode: &Inode<R, K>, now: u32) -> Option<Entry<K>> {
        let (registered, server_reason) = match inode.mode()? {
            _ if !inode.is_live() => return None,
            Mode::Passthrough(registered) => (Some(registered), None),
            Mode::Server(reason) => (None, Some(*reason)),
        };
        let close_failed = match inode.parked.get() {
            0 => None,
            parked => self.ledger().close_failed(parked),
        };
        Some(Entry {
            inode: inode.key.clone(),
            id: registered.map(|registered| registered.id.as_raw()),
            backing_device: registered.map(|registered| registered.file.device),
            backing_inode: registered.map(|registered| registered.file.inode),
            access: registered.and_then(|registered| registered.granted(self.enforces_grant())),
            opens: inode.opens.get() as u64,
            detached: inode.detached.get() != 0,
            server_reason,
            close_failed,
            age: Duration::from_secs(u64::from(now.saturating_sub(inode.since))),
        })
    }
}

/// What is done on drop, also where a registrar panics.
struct OnDrop<F: Fn()>(F);

impl<F: Fn()> Drop for OnDrop<F> {
    fn drop(&mut self) {
        self.0();
    }
}

impl<R: Register, K: Hash + Eq + Clone> Open<R, K> {
    pub(super) fn key(&self) -> &K {
        &self.0.key
    }

    pub(super) fn shard(&self) -> u8 {
        self.0.shard
    }

    /// `None` until it is decided.
    pub(super) fn mode(&self) -> Option<&Mode> {
        self.0.mode()
    }
}

impl<R: Register, K: Hash + Eq + Clone> Drop for Open<R, K> {
    #[inline]
    fn drop(&mut self) {
        self.0.table.release(&self.0);
    }
}
