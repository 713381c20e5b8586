//! Handles by number: slots, which are hot again at the next open, as the entries of a map are not.

use std::collections::BTreeMap;

use crate::sync::{Mutex, MutexGuard, lock};

const SHARD_BITS: u32 = 4;
const SHARDS: usize = 1 << SHARD_BITS;
/// What the next number of a slot has more. Below are 32 bits for the slot, from 1 on, and the shard.
const GENERATION: u64 = 1 << (32 + SHARD_BITS);

/// `H` is a reference to a handle.
pub(super) struct Slots<H>([Shard<H>; SHARDS]);

/// On cache lines of its own.
#[repr(align(64))]
struct Shard<H>(Mutex<Locked<H>>);

/// What a shard's lock protects.
struct Locked<H> {
    /// With the number of the handle that is there, or of the next one.
    slots: Vec<(u64, Option<H>)>,
    /// Slots that can be used again, the last one first.
    free: Vec<usize>,
    adopted: BTreeMap<u64, H>,
}

impl<H: Clone> Slots<H> {
    pub(super) fn new() -> Self {
        let locked = || Locked {
            slots: Vec::new(),
            free: Vec::new(),
            adopted: BTreeMap::new(),
        };
        Self(std::array::from_fn(|_| Shard(Mutex::new(locked()))))
    }

    #[allow(clippy::cast_possible_truncation, reason = "the low bits tell")]
    fn lock(&self, fh: u64) -> MutexGuard<'_, Locked<H>> {
        lock(&self.0[fh as usize % SHARDS].0)
    }

    /// In any shard: those that `near` tells apart meet seldom.
    pub(super) fn insert(&self, handle: H, near: u8) -> u64 {
        let shard = u64::from(near) % SHARDS as u64;
        let locked = &mut *self.lock(shard);
        let at = locked.free.pop().unwrap_or(locked.slots.len());
        if at == locked.slots.len() {
            let first = (at as u64 + 1) << SHARD_BITS | shard;
            locked.slots.push((first, None));
        }
        let (fh, slot) = &mut locked.slots[at];
        while locked.adopted.contains_key(fh) {
            *fh = fh.wrapping_add(GENERATION);
        }
        *slot = Some(handle);
        *fh
    }

    /// Under a number of a predecessor's. Gives it back if there is one.
    pub(super) fn adopt<T>(&self, fh: u64, handle: T, new: impl Fn(T) -> H) -> Result<(), T> {
        let mut locked = self.lock(fh);
        if locked.get(fh).is_some() {
            return Err(handle);
        }
        locked.adopted.insert(fh, new(handle));
        Ok(())
    }

    pub(super) fn get(&self, fh: u64) -> Option<H> {
        self.lock(fh).get(fh).cloned()
    }

    pub(super) fn remove(&self, fh: u64) -> Option<H> {
        let locked = &mut *self.lock(fh);
        let at = slot_of(fh);
        match locked.slots.get_mut(at) {
            Some((its, slot)) if *its == fh && slot.is_some() => {
                // A slot whose numbers are used up stays empty.
                if let Some(next) = fh.checked_add(GENERATION) {
                    *its = next;
                    locked.free.push(at);
                }
                slot.take()
            }
            _ => locked.adopted.remove(&fh),
        }
    }
}

impl<H> Locked<H> {
    fn get(&self, fh: u64) -> Option<&H> {
        match self.slots.get(slot_of(fh)) {
            Some((its, Some(handle))) if *its == fh => Some(handle),
            _ => self.adopted.get(&fh),
        }
    }
}

#[allow(clippy::cast_possible_truncation, reason = "of the 32 bits")]
fn slot_of(fh: u64) -> usize {
    ((fh % GENERATION) >> SHARD_BITS).wrapping_sub(1) as usize
}
