//! What the opens of a table share: the map, what is parked, and the figures.

use std::collections::hash_map::Entry;
use std::collections::{BTreeMap, HashMap};
use std::hash::Hash;
use std::ops::Deref;
use std::os::fd::{AsFd, BorrowedFd};
use std::sync::OnceLock;
use std::time::Instant;

use rustix::process::{Resource, getrlimit};

use super::ServerReason;
use super::hash::Seeds;
use super::inode::{FileId, Inode, Mode, NOWHERE};
use super::kernel;
use crate::error::{BackingCloseCause, BackingOpenError, Scope};
use crate::sync::{
    Arc, AtomicBool, AtomicU8, AtomicUsize, Mutex, Ordering, RwLock, Weak, lock, read, write,
};

/// Enough that threads seldom meet, in 4 KiB of empty maps.
const SHARDS: usize = 64;

pub(super) struct Shared<D: Deref<Target: AsFd>, K: Hash + Eq + Clone> {
    pub(super) device: D,
    seeds: Seeds,
    pub(super) shards: Box<[Shard<D, K>]>,
    /// By address: open, and not in the map any more.
    pub(super) strays: Mutex<BTreeMap<usize, Weak<Inode<D, K>>>>,
    pub(super) parked: Mutex<Parked<D, K>>,
    /// Ids that are registered, parked ones among them.
    pub(super) ids: AtomicUsize,
    pub(super) limit: AtomicUsize,
    pub(super) idle_limit: AtomicUsize,
    /// Whether `refused` is worth a look.
    pub(super) is_refused: AtomicBool,
    pub(super) refused: Mutex<Option<BackingOpenError>>,
    /// How often it was forgotten.
    pub(super) resets: AtomicUsize,
    pub(super) over_limit: AtomicUsize,
    pub(super) close_failures: AtomicUsize,
    start: Instant,
}

type Inodes<D, K> = HashMap<K, Weak<Inode<D, K>>, Seeds>;

/// On a cache line of its own.
#[repr(align(64))]
pub(super) struct Shard<D: Deref<Target: AsFd>, K: Hash + Eq + Clone>(
    pub(super) RwLock<Inodes<D, K>>,
);

/// Registered inodes without opens, by when they came here.
pub(super) struct Parked<D: Deref<Target: AsFd>, K: Hash + Eq + Clone> {
    pub(super) idle: BTreeMap<usize, Arc<Inode<D, K>>>,
    /// Closing them failed, for this cause.
    pub(super) unclosed: BTreeMap<usize, (Arc<Inode<D, K>>, BackingCloseCause)>,
    /// The number that was given last.
    last: usize,
    /// The table is gone, and with it whoever could open them or retry.
    pub(super) orphaned: bool,
}

/// What is to be done about an inode that is found in the map.
pub(super) enum Verdict {
    Join,
    /// It is parked, and stands in the way.
    Replace,
    Refuse,
}

pub(super) enum Found<T> {
    /// One open more.
    Joined(T),
    Refused,
    Nothing,
}

impl<D: Deref<Target: AsFd>, K: Hash + Eq + Clone> Shared<D, K> {
    pub(super) fn new(device: D) -> Self {
        let limit = getrlimit(Resource::Nofile)
            .current
            .and_then(|limit| usize::try_from(limit).ok())
            .unwrap_or(usize::MAX);
        let seeds = Seeds::random();
        let shard = || Shard(RwLock::new(HashMap::with_hasher(seeds)));
        Self {
            device,
            seeds,
            shards: (0..SHARDS).map(|_| shard()).collect(),
            strays: Mutex::new(BTreeMap::new()),
            parked: Mutex::new(Parked {
                idle: BTreeMap::new(),
                unclosed: BTreeMap::new(),
                last: 0,
                orphaned: false,
            }),
            ids: AtomicUsize::new(0),
            limit: AtomicUsize::new(limit),
            idle_limit: AtomicUsize::new(0),
            is_refused: AtomicBool::new(false),
            refused: Mutex::new(None),
            resets: AtomicUsize::new(0),
            over_limit: AtomicUsize::new(0),
            close_failures: AtomicUsize::new(0),
            start: Instant::now(),
        }
    }

    #[inline]
    pub(super) fn shard(&self, key: &K) -> &RwLock<Inodes<D, K>> {
        let index = self.seeds.part(key, SHARDS);
        &self.shards[index].0
    }

    /// The inode under this number, if there is one that `judge` lets in.
    #[inline]
    pub(super) fn find(
        &self,
        key: &K,
        judge: impl FnOnce(&Inode<D, K>) -> Verdict,
    ) -> Found<Arc<Inode<D, K>>> {
        let map = read(self.shard(key));
        let Some(inode) = map.get(key).and_then(Weak::upgrade) else {
            return Found::Nothing;
        };
        let found = match judge(&inode) {
            Verdict::Join => {
                let parked = inode.unpark();
                drop(map);
                self.take_parked(parked);
                return Found::Joined(inode);
            }
            Verdict::Replace => Found::Nothing,
            Verdict::Refuse => Found::Refused,
        };
        let last = Arc::into_inner(inode);
        drop(map);
        drop(last);
        found
    }

    /// The same, or a new one, whose mode is still to be decided; `None` if it is refused.
    pub(super) fn find_or_insert(
        self: &Arc<Self>,
        key: &K,
        judge: impl Fn(&Inode<D, K>) -> Verdict,
    ) -> Option<Arc<Inode<D, K>>> {
        match self.find(key, &judge) {
            Found::Joined(inode) => return Some(inode),
            Found::Refused => return None,
            Found::Nothing => {}
        }
        let fresh = Arc::new_cyclic(|me| Inode {
            mode: OnceLock::new(),
            granted: AtomicU8::new(0),
            since: self.seconds(),
            parked: AtomicUsize::new(0),
            stray: AtomicUsize::new(NOWHERE),
            deciding: Mutex::new(()),
            key: key.clone(),
            shared: Arc::clone(self),
            me: Weak::clone(me),
        });
        let mut map = write(self.shard(key));
        // From here on no code of the key's is run, which could panic with a reference under the lock.
        let (found, entry) = match map.entry(fresh.key.clone()) {
            Entry::Occupied(entry) => (entry.get().upgrade(), entry.into_mut()),
            Entry::Vacant(entry) => (None, entry.insert(Weak::new())),
        };
        match found.as_deref().map(judge) {
            // It came, or was parked, in between.
            Some(Verdict::Join) => {
                let found = found?;
                let parked = found.unpark();
                drop(map);
                self.take_parked(parked);
                Some(found)
            }
            Some(Verdict::Refuse) => {
                let last = found.and_then(Arc::into_inner);
                drop(map);
                drop(last);
                None
            }
            Some(Verdict::Replace) | None => {
                *entry = Arc::downgrade(&fresh);
                fresh.stray.store(0, Ordering::Relaxed);
                drop(map);
                if let Some(found) = found {
                    self.evict(found);
                }
                Some(fresh)
            }
        }
    }

    pub(super) fn register(&self, fd: BorrowedFd<'_>, file: FileId) -> Mode {
        if let Some(error) = self.refused() {
            return Mode::Server(ServerReason::Remembered(error));
        }
        if !self.make_room() {
            self.over_limit.fetch_add(1, Ordering::Relaxed);
            return Mode::Server(ServerReason::LimitReached);
        }
        let resets = self.resets.load(Ordering::Acquire);
        match kernel::backing_open((*self.device).as_fd(), fd) {
            Ok(id) => Mode::Passthrough { id, file },
            Err(error) => {
                self.ids.fetch_sub(1, Ordering::Relaxed);
                if error.scope() == Scope::Connection {
                    let mut refused = lock(&self.refused);
                    if self.resets.load(Ordering::Relaxed) == resets {
                        *refused = Some(error);
                        self.is_refused.store(true, Ordering::Release);
                    }
                }
                Mode::Server(ServerReason::Refused(error))
            }
        }
    }

    pub(super) fn refused(&self) -> Option<BackingOpenError> {
        if self.is_refused.load(Ordering::Acquire) {
            *lock(&self.refused)
        } else {
            None
        }
    }

    /// Counts one id more, if the limit permits, or does once idle ones are closed.
    fn make_room(&self) -> bool {
        loop {
            let limit = self.limit.load(Ordering::Relaxed);
            let counted = self
                .ids
                .fetch_update(Ordering::Relaxed, Ordering::Relaxed, |ids| {
                    (ids < limit).then_some(ids + 1)
                });
            if counted.is_ok() {
                return true;
            }
            if !self.close_oldest() {
                return false;
            }
        }
    }

    /// Closes the inode that has been idle for longest; false if none is.
    fn close_oldest(&self) -> bool {
        let oldest = lock(&self.parked).idle.pop_first();
        oldest.is_some_and(|(_, inode)| {
            drop(self.unless_opened(inode));
            true
        })
    }

    /// Of what was parked: the last reference, unless somebody has opened it. Whoever merely looks at
    /// it has a reference too, but only under the lock of the shard.
    pub(super) fn unless_opened(&self, inode: Arc<Inode<D, K>>) -> Option<Inode<D, K>> {
        let map = write(self.shard(&inode.key));
        let last = Arc::into_inner(inode);
        drop(map);
        last
    }

    /// Closes idle ones that are too many for either limit.
    pub(super) fn trim(&self) {
        let too_many = || {
            // Locked first: whoever parks one after this sees the limits that are seen here.
            let idle = lock(&self.parked).idle.len();
            idle > self.idle_limit.load(Ordering::Relaxed)
                || self.ids.load(Ordering::Relaxed) > self.limit.load(Ordering::Relaxed)
        };
        while too_many() && self.close_oldest() {}
    }

    /// Closes an inode that is parked, and that nobody finds any more.
    pub(super) fn evict(&self, inode: Arc<Inode<D, K>>) {
        self.take_parked(inode.parked.load(Ordering::Relaxed));
        // Now, unless another thread has taken it from there, which then does.
        drop(inode);
    }

    /// Lets go of what is parked under this number, of which the caller has another reference.
    #[inline]
    pub(super) fn take_parked(&self, number: usize) {
        // Seldom: apart, so that this is inlined.
        if number != 0 {
            self.remove_parked(number);
        }
    }

    #[cold]
    fn remove_parked(&self, number: usize) {
        let mut parked = lock(&self.parked);
        let idle = parked.idle.remove(&number);
        let unclosed = parked.unclosed.remove(&number);
        drop(parked);
        drop((idle, unclosed));
    }

    pub(super) fn seconds(&self) -> u32 {
        u32::try_from(self.start.elapsed().as_secs()).unwrap_or(u32::MAX)
    }
}

impl<D: Deref<Target: AsFd>, K: Hash + Eq + Clone> Parked<D, K> {
    /// One that is not in use: where a word has 32 bits they come round again.
    pub(super) fn number(&mut self) -> usize {
        loop {
            self.last = self.last.wrapping_add(1);
            let taken =
                self.idle.contains_key(&self.last) || self.unclosed.contains_key(&self.last);
            if self.last != 0 && !taken {
                return self.last;
            }
        }
    }
}

#[cfg(test)]
#[cfg(fuse_backing_modelled)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use std::fs::File;

    use super::*;
    use crate::FuseDevice;

    #[test]
    fn numbers_come_round() {
        shuttle::check_random(
            || {
                let device = FuseDevice::unchecked(File::open("/dev/null").unwrap());
                let shared = Arc::new(Shared::<_, u64>::new(std::sync::Arc::new(device)));
                let inode = |key| shared.find_or_insert(&key, |_| Verdict::Join).unwrap();
                let (idle, unclosed) = (inode(1), inode(2));
                let mut parked = lock(&shared.parked);
                assert_eq!((parked.number(), parked.number()), (1, 2));
                parked.last = usize::MAX - 1;
                parked.idle.insert(usize::MAX, Arc::clone(&idle));
                let cause = BackingCloseCause::UnknownId;
                parked.unclosed.insert(1, (Arc::clone(&unclosed), cause));
                // 0 is none.
                assert_eq!(parked.number(), 2);
                // They hold the table, which holds them.
                parked.idle.clear();
                parked.unclosed.clear();
            },
            1,
        );
    }
}
