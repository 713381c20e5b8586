//! What the table synchronizes with: std's, and under test those of shuttle, which explores how
//! threads can interleave.

use std::sync::PoisonError;

#[cfg(not(all(test, fuse_backing_modelled)))]
pub(crate) use std::sync::{
    Arc, Mutex, MutexGuard, RwLock, RwLockReadGuard, RwLockWriteGuard, Weak,
    atomic::{AtomicBool, AtomicU8, AtomicUsize, Ordering},
};

#[cfg(all(test, fuse_backing_modelled))]
pub(crate) use shuttle::sync::{
    Arc, Mutex, MutexGuard, RwLock, RwLockReadGuard, RwLockWriteGuard, Weak,
    atomic::{AtomicBool, AtomicU8, AtomicUsize, Ordering},
};

// A panic while a lock is held, which only a key's own code could raise, is not to take down whoever
// comes next.

pub(crate) fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

pub(crate) fn read<T>(lock: &RwLock<T>) -> RwLockReadGuard<'_, T> {
    lock.read().unwrap_or_else(PoisonError::into_inner)
}

pub(crate) fn write<T>(lock: &RwLock<T>) -> RwLockWriteGuard<'_, T> {
    lock.write().unwrap_or_else(PoisonError::into_inner)
}
