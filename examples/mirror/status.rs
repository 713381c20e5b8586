//! A mirror's state for the code that started it; the filesystem itself belongs to the fuser session.

use std::io;
use std::sync::atomic::AtomicU64;
use std::sync::{Mutex, PoisonError, Weak};

use crate::opens::Files;

pub(crate) struct Status {
    /// Why passthrough is unavailable although it was requested.
    refused: Mutex<Option<io::Error>>,
    /// READ requests so far.
    pub(crate) reads: AtomicU64,
    /// WRITE requests so far.
    pub(crate) writes: AtomicU64,
    /// GETXATTR requests so far.
    pub(crate) getxattrs: AtomicU64,
    /// Weak, because the table of `Files` holds the device, which would keep the connection alive. Can be upgraded
    /// while the mirror is served.
    pub(crate) files: Weak<Files>,
}

impl Status {
    pub(crate) fn of(files: Weak<Files>) -> Self {
        Self {
            refused: Mutex::default(),
            reads: AtomicU64::new(0),
            writes: AtomicU64::new(0),
            getxattrs: AtomicU64::new(0),
            files,
        }
    }

    pub(crate) fn refuse(&self, why: io::Error) {
        *self.refused.lock().unwrap_or_else(PoisonError::into_inner) = Some(why);
    }

    pub(crate) fn refused(&self) -> Option<String> {
        let refused = self.refused.lock().unwrap_or_else(PoisonError::into_inner);
        refused.as_ref().map(ToString::to_string)
    }

    /// The number of backing ids that are registered now.
    pub(crate) fn ids(&self) -> usize {
        let files = self.files.upgrade();
        files.map_or(0, |files| files.table().stats().ids)
    }
}
