//! One inode: its mode, and what the last release does.

use std::hash::Hash;
use std::ops::Deref;
use std::os::fd::{AsFd, BorrowedFd};
use std::sync::OnceLock;
use std::time::Duration;

use rustix::fs::fstat;
use rustix::io::Errno;

use super::shared::Shared;
use super::{Entry, ServerReason, kernel};
use crate::backing::BackingId;
use crate::error::BackingCloseCause;
use crate::open::Access;
use crate::sync::{Arc, AtomicU8, AtomicUsize, Mutex, Ordering, Weak, lock, write};

// In this order what an open looks at is on one or two cache lines, with the reference count.
#[repr(C)]
pub(super) struct Inode<D: Deref<Target: AsFd>, K: Hash + Eq + Clone> {
    /// Set once, with `deciding` locked.
    pub(super) mode: OnceLock<Mode>,
    /// Grows only. Empty in server mode, and for a moment after passthrough was decided.
    pub(super) granted: AtomicU8,
    /// Seconds after the table's start.
    pub(super) since: u32,
    /// Its number in `Parked`; 0 if somebody opened it since, or nobody parked it. Not 0 at the last
    /// drop: it was taken from there to be closed.
    pub(super) parked: AtomicUsize,
    /// 0 if the map has it; else its address, if `Shared::strays` has, or `NOWHERE`.
    pub(super) stray: AtomicUsize,
    pub(super) deciding: Mutex<()>,
    pub(super) key: K,
    pub(super) shared: Arc<Shared<D, K>>,
    /// To tell its own entry in the map from a later one, also when it was moved out of its `Arc`.
    pub(super) me: Weak<Self>,
}

/// No address: inodes are aligned.
pub(super) const NOWHERE: usize = usize::MAX;

#[derive(Debug)]
pub(super) enum Mode {
    Passthrough { id: BackingId, file: FileId },
    Server(ServerReason),
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct FileId {
    device: u64,
    inode: u64,
}

impl FileId {
    pub(super) fn of(fd: BorrowedFd<'_>) -> Result<Self, Errno> {
        let stat = fstat(fd)?;
        #[allow(clippy::unnecessary_cast, reason = "the types differ between targets")]
        Ok(Self {
            device: stat.st_dev as u64,
            inode: stat.st_ino as u64,
        })
    }
}

impl<D: Deref<Target: AsFd>, K: Hash + Eq + Clone> Inode<D, K> {
    /// The mode, decided now if it is not yet; waits for whoever is deciding.
    pub(super) fn decide(&self, mode: impl FnOnce() -> Mode) -> &Mode {
        self.mode.get().unwrap_or_else(|| {
            let _deciding = lock(&self.deciding);
            self.mode.get_or_init(mode)
        })
    }

    pub(super) fn grants(&self, wanted: Access) -> bool {
        self.granted().is_some_and(|granted| granted.allows(wanted))
    }

    fn granted(&self) -> Option<Access> {
        Access::from_bits(self.granted.load(Ordering::Relaxed))
    }

    pub(super) fn grant(&self, access: Access) {
        if !self.grants(access) {
            self.granted.fetch_or(access.bits(), Ordering::Relaxed);
        }
    }

    /// For whoever has the lock of the shard: whether nobody has opened it since it was parked.
    pub(super) fn is_parked(&self) -> bool {
        self.parked.load(Ordering::Relaxed) != 0
    }

    /// For whoever has the lock of the shard: it is open from now on. Its number in `Parked`, or 0.
    pub(super) fn unpark(&self) -> usize {
        // Seldom other than 0, and a swap costs.
        if self.is_parked() {
            self.parked.swap(0, Ordering::Relaxed)
        } else {
            0
        }
    }

    pub(super) fn is_stray(&self) -> bool {
        self.stray.load(Ordering::Relaxed) != 0
    }

    /// How many there are, for whoever has one reference that is none.
    pub(super) fn opens(self: &Arc<Self>) -> u64 {
        if self.is_parked() {
            0
        } else {
            Arc::strong_count(self).saturating_sub(1) as u64
        }
    }

    /// Of the last reference: closes the id. One that cannot be closed is parked, to be opened again
    /// or retried.
    pub(super) fn close(&mut self) -> Result<(), BackingCloseCause> {
        let Some(Mode::Passthrough { id, .. }) = self.mode.get() else {
            return Ok(());
        };
        let shared = &self.shared;
        if let Err(cause) = kernel::backing_close((*shared.device).as_fd(), id) {
            shared.close_failures.fetch_add(1, Ordering::Relaxed);
            // Somebody else closed it: nothing is left to be tried again.
            if cause != BackingCloseCause::UnknownId {
                self.park(Some(cause));
                self.mode.take();
                return Err(cause);
            }
        }
        shared.ids.fetch_sub(1, Ordering::Relaxed);
        self.mode.take();
        Ok(())
    }

    /// Of the last reference: leaves it idle, if that is wanted; else it is still to be closed.
    fn idle(&mut self) {
        let shared = &self.shared;
        let wanted = !self.is_parked()
            && matches!(self.mode.get(), Some(Mode::Passthrough { .. }))
            && shared.idle_limit.load(Ordering::Relaxed) > 0
            && shared.ids.load(Ordering::Relaxed) <= shared.limit.load(Ordering::Relaxed);
        if wanted && self.park(None) {
            self.shared.trim();
        }
    }

    /// Of the last reference: moves what is registered to an inode in `Parked`, and back into the map
    /// with it. Where the number was forgotten, or names another inode by now, it is kept only if
    /// closing failed. False if it is not kept.
    fn park(&mut self, failed: Option<BackingCloseCause>) -> bool {
        let shared = Arc::clone(&self.shared);
        let key = self.key.clone();
        let mut map = write(shared.shard(&key));
        let entry = map.get_mut(&key);
        let entry = entry.filter(|inode| Weak::ptr_eq(inode, &self.me));
        let mut parked = lock(&shared.parked);
        if parked.orphaned || (entry.is_none() && failed.is_none()) {
            return false;
        }
        // From here on no code of the key's is run, which could panic.
        let number = parked.number();
        let inode = Arc::new_cyclic(|me| Self {
            mode: self.mode.take().map_or_else(OnceLock::new, OnceLock::from),
            granted: AtomicU8::new(self.granted.load(Ordering::Relaxed)),
            since: self.since,
            parked: AtomicUsize::new(number),
            stray: AtomicUsize::new(if entry.is_some() { 0 } else { NOWHERE }),
            deciding: Mutex::new(()),
            key,
            shared: Arc::clone(&shared),
            me: Weak::clone(me),
        });
        if let Some(entry) = entry {
            *entry = Arc::downgrade(&inode);
            *self.stray.get_mut() = NOWHERE;
        }
        match failed {
            None => drop(parked.idle.insert(number, inode)),
            Some(cause) => drop(parked.unclosed.insert(number, (inode, cause))),
        }
        true
    }

    /// Out of the map, or wherever else the table finds it.
    fn leave(&mut self) {
        match *self.stray.get_mut() {
            NOWHERE => {}
            0 => {
                let mut map = write(self.shared.shard(&self.key));
                let found = map.get(&self.key);
                if found.is_some_and(|inode| Weak::ptr_eq(inode, &self.me)) {
                    map.remove(&self.key);
                }
            }
            address => drop(lock(&self.shared.strays).remove(&address)),
        }
    }

    /// With its number in `Parked`, or 0. None for one whose mode is not decided.
    pub(super) fn row(self: &Arc<Self>, now: u32) -> Option<(usize, Entry<K>)> {
        let (id, file, reason) = match self.mode.get()? {
            Mode::Passthrough { id, file } => (Some(id.as_raw()), Some(*file), None),
            Mode::Server(reason) => (None, None, Some(*reason)),
        };
        let entry = Entry {
            inode: self.key.clone(),
            id,
            backing_device: file.map(|file| file.device),
            backing_inode: file.map(|file| file.inode),
            access: self.granted(),
            opens: self.opens(),
            forgotten: self.is_stray(),
            server_reason: reason,
            close_failed: None,
            age: Duration::from_secs(u64::from(now.saturating_sub(self.since))),
        };
        Some((self.parked.load(Ordering::Relaxed), entry))
    }
}

/// Closes an inode, also when a key's own code panics in between.
struct Closing<'a, D: Deref<Target: AsFd>, K: Hash + Eq + Clone>(&'a mut Inode<D, K>);

impl<D: Deref<Target: AsFd>, K: Hash + Eq + Clone> Drop for Closing<'_, D, K> {
    fn drop(&mut self) {
        // A failure is counted, and kept in `Parked`.
        let _ = self.0.close();
    }
}

/// The last release, or that of what was parked.
impl<D: Deref<Target: AsFd>, K: Hash + Eq + Clone> Drop for Inode<D, K> {
    fn drop(&mut self) {
        let closing = Closing(self);
        closing.0.idle();
        drop(closing);
        self.leave();
    }
}
