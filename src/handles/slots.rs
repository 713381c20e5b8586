//! Handles by number, in slots. The slot that was released last in a shard is used first, while it is
//! likely still in the CPU's cache.

// Each of the `SHARDS` shards has a lock. A thread holds at most one, runs no code of the server under it, and holds no
// lock of the table at the same time.

use std::collections::BTreeMap;

use crate::sync::{Mutex, MutexGuard, lock};

const SHARD_BITS: u32 = 4;
const SHARDS: usize = 1 << SHARD_BITS;
/// The difference between successive handle numbers of one slot. Below it are, from the lowest bit, the
/// shard's number (`SHARD_BITS` bits) and the slot's index plus 1 (32 bits).
const GENERATION_STEP: u64 = 1 << (32 + SHARD_BITS);

/// `H` is a reference to a handle.
pub(super) struct Slots<H>([Shard<H>; SHARDS]);

/// Aligned so that no two locks share a cache line.
#[repr(align(64))]
struct Shard<H>(Mutex<ShardState<H>>);

/// What a shard's lock protects.
struct ShardState<H> {
    /// Each with the number of the handle in it, or of the next one if it is empty.
    slots: Vec<(u64, Option<H>)>,
    /// Indices of empty slots. The one that was released last is used first.
    free: Vec<usize>,
    /// Handles of a predecessor, by its numbers.
    adopted: BTreeMap<u64, H>,
}

impl<H: Clone> Slots<H> {
    pub(super) fn new() -> Self {
        let empty = || ShardState {
            slots: Vec::new(),
            free: Vec::new(),
            adopted: BTreeMap::new(),
        };
        Self(std::array::from_fn(|_| Shard(Mutex::new(empty()))))
    }

    /// Takes the lock of the shard that the low bits of `fh` name.
    #[allow(clippy::cast_possible_truncation, reason = "only the low bits count")]
    fn lock(&self, fh: u64) -> MutexGuard<'_, ShardState<H>> {
        lock(&self.0[fh as usize % SHARDS].0)
    }

    /// Stores a handle and returns its number. `shard_hint` selects the shard: threads that pass different values
    /// seldom wait for each other.
    pub(super) fn insert(&self, handle: H, shard_hint: u8) -> u64 {
        let shard = u64::from(shard_hint) % SHARDS as u64;
        let locked = &mut *self.lock(shard);
        let at = locked.free.pop().unwrap_or(locked.slots.len());
        if at == locked.slots.len() {
            let first = (at as u64 + 1) << SHARD_BITS | shard;
            locked.slots.push((first, None));
        }
        let (fh, slot) = &mut locked.slots[at];
        while locked.adopted.contains_key(fh) {
            *fh = fh.wrapping_add(GENERATION_STEP);
        }
        *slot = Some(handle);
        *fh
    }

    /// Stores `new(handle)` under a number that a predecessor gave. Returns the handle if the number is in use.
    pub(super) fn adopt<T>(&self, fh: u64, handle: T, new: impl Fn(T) -> H) -> Result<(), T> {
        let mut locked = self.lock(fh);
        if locked.get(fh).is_some() {
            return Err(handle);
        }
        locked.adopted.insert(fh, new(handle));
        Ok(())
    }

    /// The handle of this number.
    pub(super) fn get(&self, fh: u64) -> Option<H> {
        self.lock(fh).get(fh).cloned()
    }

    /// Takes the handle of this number out.
    pub(super) fn remove(&self, fh: u64) -> Option<H> {
        let locked = &mut *self.lock(fh);
        let at = slot_of(fh);
        match locked.slots.get_mut(at) {
            Some((number, slot)) if *number == fh && slot.is_some() => {
                // A slot whose numbers are used up stays empty.
                if let Some(next) = fh.checked_add(GENERATION_STEP) {
                    *number = next;
                    locked.free.push(at);
                }
                slot.take()
            }
            _ => locked.adopted.remove(&fh),
        }
    }
}

impl<H> ShardState<H> {
    fn get(&self, fh: u64) -> Option<&H> {
        match self.slots.get(slot_of(fh)) {
            Some((number, Some(handle))) if *number == fh => Some(handle),
            _ => self.adopted.get(&fh),
        }
    }
}

/// The index of the slot that gives numbers like `fh`. The slot need not exist: `fh` can be a predecessor's.
#[allow(clippy::cast_possible_truncation, reason = "at most 32 bits")]
fn slot_of(fh: u64) -> usize {
    ((fh % GENERATION_STEP) >> SHARD_BITS).wrapping_sub(1) as usize
}
