//! One inode, and the inodes of a shard.

use std::collections::HashMap;
use std::hash::Hash;
use std::sync::OnceLock;

use super::hash::Seeds;
use super::mode::Mode;
use crate::sync::{Arc, AtomicUsize, Mutex, Ordering};

/// An inode of a table whose shared part is `S`.
///
/// It is open (`opens` > 0); or parked (`parked` != 0), when the ledger or a `Claim` has it and an open can take it
/// back; or neither, when its id is being closed and no open finds it.
pub(super) struct Inode<K, S> {
    /// Set once, by the first open, under `deciding`. Readers need no lock.
    mode: OnceLock<Mode>,
    /// Held by the first open until `mode` is set. Other opens wait for it.
    pub(super) deciding: Mutex<()>,
    /// Opens that have not been released.
    pub(super) opens: Guarded,
    /// LRU sequence number while parked, else 0.
    pub(super) parked: Guarded,
    /// 1 once no key leads here any more: it was forgotten, invalidated or replaced.
    pub(super) detached: Guarded,
    /// Index of its shard in `Shared::shards`.
    pub(super) shard: u8,
    /// When the inode was first opened, in whole seconds after `Shared::start`.
    pub(super) first_opened: u32,
    pub(super) key: K,
    pub(super) table: Arc<S>,
}

/// A number that the shard lock protects. It is atomic only to be written through a shared reference in safe code; the
/// lock orders the accesses, so they are `Relaxed`.
pub(super) struct Guarded(AtomicUsize);

impl Guarded {
    /// Caller must hold the shard lock.
    #[inline]
    pub(super) fn get(&self) -> usize {
        self.0.load(Ordering::Relaxed)
    }

    /// Caller must hold the shard lock.
    #[inline]
    pub(super) fn set(&self, value: usize) {
        self.0.store(value, Ordering::Relaxed);
    }
}

impl<K, S> Inode<K, S> {
    /// An inode with one open, and without a mode yet.
    pub(super) fn new(key: K, shard: u8, first_opened: u32, table: Arc<S>) -> Self {
        Self {
            mode: OnceLock::new(),
            deciding: Mutex::new(()),
            opens: Guarded(AtomicUsize::new(1)),
            parked: Guarded(AtomicUsize::new(0)),
            detached: Guarded(AtomicUsize::new(0)),
            shard,
            first_opened,
            key,
            table,
        }
    }

    /// `None` if the mode is not decided yet. Needs no lock.
    #[inline]
    pub(super) fn mode(&self) -> Option<&Mode> {
        self.mode.get()
    }

    /// Sets the mode. Caller must hold `deciding`, and have locked it before other threads could find the inode.
    pub(super) fn decide(&self, mode: impl FnOnce() -> Mode) {
        self.mode.get_or_init(mode);
    }

    /// Whether an open can join it: it is open or parked. Caller must hold the shard lock.
    #[inline]
    pub(super) fn is_live(&self) -> bool {
        self.opens.get() > 0 || self.parked.get() != 0
    }
}

/// The inodes of a shard: what the shard lock protects. All methods need that lock.
pub(super) struct Inodes<K, S> {
    /// By key: the inodes that opens find, and inodes whose id is being closed and that no newer inode has replaced.
    by_key: HashMap<K, Arc<Inode<K, S>>, Seeds>,
    /// Inodes that no key leads to any more, until their id is closed.
    detached: Vec<Arc<Inode<K, S>>>,
}

impl<K: Hash + Eq + Clone, S> Inodes<K, S> {
    pub(super) fn new(seeds: Seeds) -> Self {
        Self {
            by_key: HashMap::with_hasher(seeds),
            detached: Vec::new(),
        }
    }

    /// The inode under this key, if it is open or parked.
    #[inline]
    pub(super) fn find(&self, key: &K) -> Option<&Arc<Inode<K, S>>> {
        self.by_key.get(key).filter(|inode| inode.is_live())
    }

    /// All inodes, including those that are being closed.
    pub(super) fn iter(&self) -> impl Iterator<Item = &Arc<Inode<K, S>>> {
        self.by_key.values().chain(&self.detached)
    }

    /// Inserts an inode under its key, and detaches the inode that was there.
    pub(super) fn insert(&mut self, inode: Arc<Inode<K, S>>) {
        // The key's own code may panic here. Nothing has changed then.
        if let Some(replaced) = self.by_key.insert(inode.key.clone(), inode) {
            self.add_detached(replaced);
        }
    }

    /// Detaches the inode from this key: no open finds it any more.
    pub(super) fn detach(&mut self, key: &K) -> Option<&Arc<Inode<K, S>>> {
        let inode = self.by_key.remove(key)?;
        Some(self.add_detached(inode))
    }

    fn add_detached(&mut self, inode: Arc<Inode<K, S>>) -> &Arc<Inode<K, S>> {
        inode.detached.set(1);
        self.detached.push(inode);
        &self.detached[self.detached.len() - 1]
    }

    /// Drops the reference to an inode whose id was closed, or that had none.
    pub(super) fn remove(&mut self, inode: &Arc<Inode<K, S>>) {
        if inode.detached.get() == 0 {
            self.by_key.remove(&inode.key);
        } else if let Some(at) = self.detached.iter().position(|one| Arc::ptr_eq(one, inode)) {
            self.detached.swap_remove(at);
        }
    }

    /// Drops the references to all inodes that are not open, when the table is dropped and no open can come any more.
    /// This also drops an inode that `remove` has left behind because the key's own code panicked.
    pub(super) fn retain_open(&mut self) {
        self.by_key.retain(|_, inode| inode.opens.get() > 0);
        self.detached.retain(|inode| inode.opens.get() > 0);
    }
}
