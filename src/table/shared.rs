//! What the opens of a table share: the inodes in their shards, and the ledger.

// # What each lock protects
//
// | lock | protects |
// |---|---|
// | shard lock: `Shared::shards[n]` | the maps of its inodes (`Inodes`); `opens`, `parked` and `detached` of each |
// | ledger lock: `Shared::ledger` | counts and limits, the parked inodes, the remembered refusal (`Ledger`) |
// | `Inode::deciding` | the decision: other opens of the inode wait for it while its first open sets `mode` |
//
// Without a lock: `Inode::mode`, `Shared::registrar` (both set once), `Registered::granted` (atomic, only grows),
// `Shared::refuses_path_fd` (atomic, a hint).
//
// # Lock order
//
// `deciding`, then a shard lock, then the ledger lock. A thread holds at most one of each kind.
//
// - `join_or_insert` locks the `deciding` of a new inode while it holds the shard lock. This is not a wait: no other
//   thread can find the inode yet.
// - A thread that waits for another inode's `deciding` holds no lock.
// - `reserve` waits for `close_finished` while it holds `deciding`. A thread that finishes a close waits for no
//   `deciding`, so it gets there.
// - The registrar, and the callback of `on_server_mode`, are called without a shard or ledger lock. The first open of
//   an inode calls the registrar while it holds that inode's `deciding`: to register, and to close ids in its way.
// - `Hash`, `Eq`, `Clone` and `Drop` of the key can run under the shard lock.
//
// # How an open and the last release meet
//
// Both hold the shard lock while they change `opens`. The release that makes it 0 either parks the inode (sets
// `parked`, keeps the id) or lets `parked` be 0 and closes the id afterwards, without the lock. An open that comes
// later either takes the parked inode back (`add_open`), or does not find the inode (`is_live`) and registers its
// file anew. So an id is never closed while an open counts on it.
//
// # How an open and the close of a parked id meet
//
// `Ledger::claim_*` takes a parked inode out of the ledger under the ledger lock alone, as a `Claim`, and counts its
// id in `closing`. Then `close_claimed` locks the shard. If `parked` is still the claim's number, it sets it to 0,
// and no open finds the inode any more. If not, the claim is void: an open has taken the inode back, or another thread
// has taken it to close it (`Shared::claim`). Either has corrected `closing` (`Ledger::unpark`).

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
use crate::file::{Examined, ServerFile};
use crate::register::Register;
use crate::sync::{Arc, AtomicBool, Condvar, Mutex, MutexGuard, Ordering, lock, wait};

/// Enough that two threads seldom want the same shard. The empty maps take 8 KiB.
const SHARDS: u8 = 64;

pub(super) struct Shared<R: Register, K: Hash + Eq + Clone> {
    /// Set once, by `attach`: the registrar and what its `enforces_grant` returned.
    registrar: OnceLock<(R, bool)>,
    /// The registrar refused an `O_PATH` fd: its kernel is older than 6.12. `Relaxed`, since it is a hint: a thread
    /// that does not see it yet is refused once more.
    refuses_path_fd: AtomicBool,
    seeds: Seeds,
    shards: Box<[Shard<R, K>]>,
    ledger: Mutex<Ledger<Arc<Inode<R, K>>>>,
    /// Used with the ledger lock. `reserve` waits for it; `update_and_wake` notifies it when `Ledger::closing` may have
    /// been lowered.
    close_finished: Condvar,
    /// When the table was made: `Inode::first_opened` counts from here.
    start: Instant,
}

type Inode<R, K> = inode::Inode<K, Shared<R, K>>;

/// On a cache line of its own.
#[repr(align(64))]
struct Shard<R: Register, K: Hash + Eq + Clone>(Mutex<Inodes<K, Shared<R, K>>>);

/// Holds a shard lock.
type ShardGuard<'a, R, K> = MutexGuard<'a, Inodes<K, Shared<R, K>>>;

/// One open, counted in `Inode::opens`. Dropping it is the release; no shard or ledger lock may be held then.
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
            close_finished: Condvar::new(),
            start: Instant::now(),
        }
    }

    /// Sets the registrar. Returns it if there is one already.
    pub(super) fn attach(&self, registrar: R) -> Result<(), R> {
        let enforces = registrar.enforces_grant();
        let set = self.registrar.set((registrar, enforces));
        set.map_err(|(registrar, _)| registrar)
    }

    /// Whether the registrar enforces grants. Ask at each use, since `attach` may come in between.
    #[inline]
    pub(super) fn enforces_grant(&self) -> bool {
        self.registrar.get().is_some_and(|(_, enforces)| *enforces)
    }

    /// Takes the ledger lock. Caller must not hold it; it may hold `deciding` and a shard lock.
    pub(super) fn ledger(&self) -> MutexGuard<'_, Ledger<Arc<Inode<R, K>>>> {
        lock(&self.ledger)
    }

    /// Takes the shard lock of this key. Caller must hold neither a shard lock nor the ledger lock.
    #[inline]
    fn lock_of(&self, key: &K) -> (u8, ShardGuard<'_, R, K>) {
        let shard = self.seeds.shard_of(key, SHARDS);
        (shard, self.lock(shard))
    }

    /// Takes a shard lock. Caller must hold neither a shard lock nor the ledger lock.
    #[inline]
    fn lock(&self, shard: u8) -> ShardGuard<'_, R, K> {
        lock(&self.shards[usize::from(shard)].0)
    }

    /// Adds an open to an inode that is open or parked, if its mode is decided and `admits` returns true for it. The
    /// second argument of `admits`: whether the inode is open. Takes the shard lock, under which `admits` runs.
    #[inline]
    pub(super) fn join(
        &self,
        key: &K,
        admits: impl FnOnce(&Mode, bool) -> bool,
    ) -> Option<Open<R, K>> {
        let (_, inodes) = self.lock_of(key);
        let inode = inodes.find(key)?;
        let mode = inode.mode()?;
        admits(mode, inode.opens.get() > 0).then(|| self.add_open(inode))
    }

    /// Adds an open as [`join`](Self::join) does, or inserts a new inode and decides its mode by `decide`.
    ///
    /// - An inode whose mode another open is deciding: waits for it, without counting as an open in the meantime.
    /// - An open inode that `admits` refuses: returns the error.
    /// - A parked inode that `admits` refuses: replaces it, and closes its id before `decide` runs.
    ///
    /// Caller must hold no lock. `admits` runs under the shard lock, `decide` under the new inode's `deciding` alone.
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
                    Ok(()) => return Ok(self.add_open(inode)),
                    Err(error) if inode.opens.get() > 0 => return Err(error),
                    Err(_) => {
                        let inode = Arc::clone(inode);
                        break (shard, inodes, Some(inode));
                    }
                },
                None => Arc::clone(inode),
            };
            drop(inodes);
            // Waits for the other open to decide, then looks again.
            drop(lock(&inode.deciding));
        };
        let inode = Inode::new(key.clone(), shard, self.seconds(), Arc::clone(self));
        let inode = Arc::new(inode);
        // Locks `deciding` before another thread can find the inode. It is declared before `open`, so a panic of
        // `decide` drops `open`, which removes the inode, before the opens that wait for `deciding` look again.
        let deciding = lock(&inode.deciding);
        inodes.insert(Arc::clone(&inode));
        let open = Open(Arc::clone(&inode));
        if let Some(replaced) = &replaced {
            self.claim(replaced);
        }
        drop(inodes);
        if let Some(replaced) = &replaced {
            let _ = self.close(replaced);
        }
        inode.decide(decide);
        drop(deciding);
        Ok(open)
    }

    /// Counts another open, and takes the inode out of the ledger if it is parked. Caller must hold the shard lock.
    #[inline]
    fn add_open(&self, inode: &Arc<Inode<R, K>>) -> Open<R, K> {
        inode.opens.set(inode.opens.get() + 1);
        if inode.parked.get() != 0 {
            self.unpark(inode);
        }
        Open(Arc::clone(inode))
    }

    /// Takes a parked inode out of the ledger, because it is open again. Caller must hold the shard lock.
    #[cold]
    fn unpark(&self, inode: &Inode<R, K>) {
        self.update_and_wake(|ledger| ledger.unpark(inode.parked.get()));
        inode.parked.set(0);
    }

    /// Takes a parked inode out of the ledger and counts its id as being closed: no open finds it from now on. Caller
    /// must hold the shard lock, and call [`close`](Self::close) after releasing it.
    fn claim(&self, inode: &Inode<R, K>) {
        self.update_and_wake(|ledger| ledger.claim(inode.parked.get()));
        inode.parked.set(0);
    }

    /// Detaches an inode from its key, and closes its id if it is parked. Leaves an open inode alone and returns false,
    /// unless `also_open`. Takes the shard lock; caller must hold no lock.
    pub(super) fn detach(&self, key: &K, also_open: bool) -> bool {
        let (_, mut inodes) = self.lock_of(key);
        if !also_open && inodes.find(key).is_some_and(|inode| inode.opens.get() > 0) {
            return false;
        }
        let parked = inodes.detach(key).filter(|inode| inode.parked.get() != 0);
        if let Some(inode) = parked.cloned() {
            self.claim(&inode);
            drop(inodes);
            let _ = self.close(&inode);
        }
        true
    }

    /// Takes one open away. The last one parks the inode or closes its id. Takes the shard lock.
    #[inline]
    fn release(&self, inode: &Arc<Inode<R, K>>) {
        let inodes = self.lock(inode.shard);
        let opens = inode.opens.get() - 1;
        inode.opens.set(opens);
        if opens == 0 {
            self.last_release(inodes, inode);
        }
    }

    /// Removes an inode in server mode, or one whose first open panicked before it had a mode. Otherwise parks the
    /// inode under the shard lock that `inodes` holds, or closes its id after releasing that lock.
    // A function of its own, so that `release` is inlined.
    #[cold]
    fn last_release(&self, mut inodes: ShardGuard<'_, R, K>, inode: &Arc<Inode<R, K>>) {
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
            let _ = self.close(inode);
        }
    }

    /// Closes an id that the ledger counts in `closing`, of an inode that is neither open nor parked. Always ends in
    /// [`finish_close`](Self::finish_close), even if the registrar panics. Caller may hold the `deciding` of another
    /// inode, and no other lock. Caller may ignore the result: `stats.close_failures` counts a failure, and the ledger
    /// keeps the inode for `retry_closes`.
    fn close(&self, inode: &Arc<Inode<R, K>>) -> Result<(), BackingError> {
        let Some(Mode::Passthrough(registered)) = inode.mode() else {
            return Ok(());
        };
        // `finish_close` records this result if the registrar panics.
        let (errno, scope) = (Errno::IO, Scope::File);
        let result = Cell::new(Err(BackingError::Registrar { errno, scope }));
        let finish = OnDrop(|| self.finish_close(inode, result.get()));
        let id = registered.id.alias();
        // The table can close an adopted id before `attach`.
        let unattached = Err(BackingError::NotAttached(Errno::PERM));
        result.set(self.registrar.get().map_or(unattached, |(registrar, _)| {
            registrar.unregister(id).map_err(|failed| failed.cause())
        }));
        drop(finish);
        result.get()
    }

    /// Runs `update`, which may lower `closing`, under the ledger lock; then wakes the opens that wait in `reserve`.
    /// Takes the ledger lock; caller may hold a shard lock.
    fn update_and_wake<T>(&self, update: impl FnOnce(&mut Ledger<Arc<Inode<R, K>>>) -> T) -> T {
        let mut ledger = self.ledger();
        let updated = update(&mut ledger);
        // Notifying is a system call, so this skips it if no open waits.
        if ledger.waiting > 0 {
            self.close_finished.notify_all();
        }
        updated
    }

    /// Records the result of a close: removes the inode, or parks it again as unclosed if closing its id failed. Takes
    /// the shard lock, then the ledger lock; caller must hold neither.
    fn finish_close(&self, inode: &Arc<Inode<R, K>>, result: Result<(), BackingError>) {
        let mut inodes = self.lock(inode.shard);
        let parked = self.update_and_wake(|ledger| ledger.finish_close(inode, result));
        match parked {
            Some(parked) => inode.parked.set(parked),
            None => return inodes.remove(inode),
        }
        if matches!(result, Err(BackingError::Registrar { .. })) && inode.detached.get() == 0 {
            // The id may be closed all the same, so no open may get it again.
            inodes.detach(&inode.key);
        }
    }

    /// Closes the id of a claimed inode, unless the inode was opened since. Takes the shard lock; caller may hold the
    /// `deciding` of another inode, and no other lock.
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

    /// Called once, when the table is dropped: closes every parked id, and makes later releases close theirs instead of
    /// parking. Open inodes stay.
    pub(super) fn shut_down(&self) {
        let claims = self.ledger().orphan();
        // Before the closes, so that the registrar is dropped even if it panics in one: parked inodes and `Shared`,
        // which owns the registrar, hold references to each other.
        (0..SHARDS).for_each(|shard| self.lock(shard).retain_open());
        for claim in claims {
            // A destructor cannot report errors. A server that wants them calls `retry_closes` before.
            let _ = self.close_claimed(claim);
        }
    }

    /// Closes idle ids that exceed the limit of ids or of idle ids. Caller must hold no lock.
    pub(super) fn trim(&self) {
        loop {
            let Some(claim) = self.ledger().claim_surplus() else {
                return;
            };
            let _ = self.close_claimed(claim);
        }
    }

    /// Registers the file of an inode's first open, and returns the inode's mode. Caller holds the inode's `deciding`,
    /// and no other lock.
    pub(super) fn register(
        &self,
        file: &ServerFile<'_, BorrowedFd<'_>>,
        examined: Examined,
        grant: Access,
    ) -> Mode {
        self.try_register(file, examined, grant)
            .map_or_else(Mode::Server, Mode::Passthrough)
    }

    fn try_register(
        &self,
        file: &ServerFile<'_, BorrowedFd<'_>>,
        examined: Examined,
        grant: Access,
    ) -> Result<Registered, ServerReason> {
        let (registrar, _) = self.registrar.get().ok_or(ServerReason::NoRegistrar)?;
        if let Some(reason) = examined.refusal {
            return Err(reason);
        }
        let (resets, keep_fds) = self.reserve()?;
        // Gives the reserved id back unless registering succeeds, also if the registrar panics.
        let reserved = OnDrop(|| self.ledger().stats.ids -= 1);
        let wants_path = registrar.takes_path_fd();
        let by_path = wants_path && !self.refuses_path_fd.load(Ordering::Relaxed);
        let mut backing = file.backing(examined.id, by_path);
        let result = loop {
            if keep_fds {
                backing.make_owned().map_err(ServerReason::NoFd)?;
            }
            match registrar.register(backing.as_fd(), grant) {
                Err(BackingError::PathOnlyFd) if backing.is_path => {
                    self.refuses_path_fd.store(true, Ordering::Relaxed);
                    backing = file.backing(examined.id, false);
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
        let kept = backing.owned.filter(|_| keep_fds);
        Ok(Registered::new(id, examined.id, grant, kept))
    }

    /// Counts an id that is about to be registered. At the limit, closes an idle id, or waits until another thread has
    /// closed one. Returns what `Room::Reserved` has. Caller may hold `deciding`, and no other lock.
    fn reserve(&self) -> Result<(usize, bool), ServerReason> {
        let mut ledger = self.ledger();
        loop {
            match ledger.reserve() {
                Room::Reserved { resets, keep_fds } => return Ok((resets, keep_fds)),
                Room::None(reason) => return Err(reason),
                Room::Wait => {
                    ledger.waiting += 1;
                    ledger = wait(&self.close_finished, ledger);
                    ledger.waiting -= 1;
                }
                Room::Evict(claim) => {
                    drop(ledger);
                    let _ = self.close_claimed(claim);
                    ledger = self.ledger();
                }
            }
        }
    }

    /// Whole seconds since the table was made.
    fn seconds(&self) -> u32 {
        u32::try_from(self.start.elapsed().as_secs()).unwrap_or(u32::MAX)
    }

    /// All inodes that are open or parked, except those whose mode is being decided. Takes one shard lock after the
    /// other, so the list is no snapshot of the whole table.
    pub(super) fn entries(&self) -> Vec<Entry<K>> {
        let now = self.seconds();
        let mut entries = Vec::new();
        for shard in 0..SHARDS {
            let inodes = self.lock(shard);
            entries.extend(inodes.iter().filter_map(|inode| self.entry(inode, now)));
        }
        entries
    }

    /// Caller must hold the shard lock. Takes the ledger lock.
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
            age: Duration::from_secs(u64::from(now.saturating_sub(inode.first_opened))),
        })
    }
}

/// Calls a closure when dropped, so that it also runs if a registrar panics.
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

    /// `None` if the mode is not decided yet.
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
