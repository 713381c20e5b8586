//! The synchronization primitives of the table and the handles: std's, or in the model's tests those of shuttle, which
//! explores how threads can interleave.

use std::sync::PoisonError;

#[cfg(not(all(test, fuse_backing_modelled)))]
pub(crate) use std::sync::{
    Arc, Condvar, Mutex, MutexGuard,
    atomic::{AtomicBool, AtomicU8, AtomicUsize, Ordering},
};

#[cfg(all(test, fuse_backing_modelled))]
pub(crate) use shuttle::sync::{
    Arc, Condvar, Mutex, MutexGuard,
    atomic::{AtomicBool, AtomicU8, AtomicUsize, Ordering},
};

// Both functions ignore poisoning. Only a key's or a registrar's code can panic under a lock, and the guarded data is
// consistent whenever that code runs.

/// Takes a lock, poisoned or not.
pub(crate) fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Waits on a condition variable. It can return spuriously.
pub(crate) fn wait<'a, T>(condvar: &Condvar, guard: MutexGuard<'a, T>) -> MutexGuard<'a, T> {
    condvar.wait(guard).unwrap_or_else(PoisonError::into_inner)
}
