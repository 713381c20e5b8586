//! One inode, and the inodes of a shard.

use std::collections::HashMap;
use std::hash::Hash;
use std::sync::OnceLock;

use super::hash::Seeds;
use super::mode::Mode;
use crate::sync::{Arc, AtomicUsize, Mutex, Ordering};

/// An inode of a table, whose shared part is `S`.
///
/// It is open; or parked, in the ledger, where it can be opened again; or, if it is neither, its id is
/// being closed and no open finds it.
pub(super) struct Inode<K, S> {
    /// Set once, under `deciding`.
    mode: OnceLock<Mode>,
    pub(super) deciding: Mutex<()>,
    /// Opens that have not been released.
    pub(super) opens: Guarded,
    /// LRU sequence number while parked, else 0.
    pub(super) parked: Guarded,
    /// 1 once no key leads here any more: it was forgotten, invalidated or replaced.
    pub(super) detached: Guarded,
    pub(super) shard: u8,
    /// Seconds after the table's start.
    pub(super) since: u32,
    pub(super) key: K,
    pub(super) table: Arc<S>,
}

/// A number that the lock of the inode's shard protects. It is atomic for the sake of safe code only.
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
    /// Opened once, and its mode still to be decided.
    pub(super) fn new(key: K, shard: u8, since: u32, table: Arc<S>) -> Self {
        Self {
            mode: OnceLock::new(),
            deciding: Mutex::new(()),
            opens: Guarded(AtomicUsize::new(1)),
            parked: Guarded(AtomicUsize::new(0)),
            detached: Guarded(AtomicUsize::new(0)),
            shard,
            since,
            key,
            table,
        }
    }

    /// `None` until it is decided.
    #[inline]
    pub(super) fn mode(&self) -> Option<&Mode> {
        self.mode.get()
    }

    /// Caller must hold `deciding`, since before the inode could be found.
    pub(super) fn decide(&self, mode: impl FnOnce() -> Mode) {
        self.mode.get_or_init(mode);
    }

    /// Whether it can be opened.
    #[inline]
    pub(super) fn is_live(&self) -> bool {
        self.opens.get() > 0 || self.parked.get() != 0
    }
}

/// The inodes of a shard: what its lock protects.
pub(super) struct Inodes<K, S> {
    by_key: HashMap<K, Arc<Inode<K, S>>, Seeds>,
    detached: Vec<Arc<Inode<K, S>>>,
}

impl<K: Hash + Eq + Clone, S> Inodes<K, S> {
    pub(super) fn new(seeds: Seeds) -> Self {
        Self {
            by_key: HashMap::with_hasher(seeds),
            detached: Vec::new(),
        }
    }

    /// The inode under this key, if it can be opened.
    #[inline]
    pub(super) fn find(&self, key: &K) -> Option<&Arc<Inode<K, S>>> {
        self.by_key.get(key).filter(|inode| inode.is_live())
    }

    pub(super) fn iter(&self) -> impl Iterator<Item = &Arc<Inode<K, S>>> {
        self.by_key.values().chain(&self.detached)
    }

    /// In place of the one under its key.
    pub(super) fn insert(&mut self, inode: Arc<Inode<K, S>>) {
        // If the key's own code panics here, nothing has changed.
        if let Some(replaced) = self.by_key.insert(inode.key.clone(), inode) {
            self.add_detached(replaced);
        }
    }

    /// Takes an inode from its key.
    pub(super) fn detach(&mut self, key: &K) -> Option<&Arc<Inode<K, S>>> {
        let inode = self.by_key.remove(key)?;
        Some(self.add_detached(inode))
    }

    fn add_detached(&mut self, inode: Arc<Inode<K, S>>) -> &Arc<Inode<K, S>> {
        inode.detached.set(1);
        self.detached.push(inode);
        &self.detached[self.detached.len() - 1]
    }

    /// Lets go of an inode that was closed.
    pub(super) fn remove(&mut self, inode: &Arc<Inode<K, S>>) {
        if inode.detached.get() == 0 {
            self.by_key.remove(&inode.key);
        } else if let Some(at) = self.detached.iter().position(|one| Arc::ptr_eq(one, inode)) {
            self.detached.swap_remove(at);
        }
    }

    /// Lets go of all that are not open: none can be opened any more. That includes those for which
    /// `remove` panicked in the key's own code.
    pub(super) fn retain_open(&mut self) {
        self.by_key.retain(|_, inode| inode.opens.get() > 0);
        self.detached.retain(|inode| inode.opens.get() > 0);
    }
}
