//! What a mirror tells whoever serves it, while the filesystem itself belongs to its session.

use std::io;
use std::sync::atomic::AtomicU64;
use std::sync::{OnceLock, Weak};

use crate::opens::Files;

pub(crate) struct Status {
    /// What came of negotiating passthrough, if it was wanted.
    pub(crate) negotiated: OnceLock<io::Result<()>>,
    /// READ requests so far.
    pub(crate) reads: AtomicU64,
    /// WRITE requests so far.
    pub(crate) writes: AtomicU64,
    /// Upgrades while the mirror is served. Weak, because its table holds the device, which would keep the
    /// connection.
    pub(crate) files: Weak<Files>,
}

impl Status {
    pub(crate) fn of(files: Weak<Files>) -> Self {
        Self {
            negotiated: OnceLock::new(),
            reads: AtomicU64::new(0),
            writes: AtomicU64::new(0),
            files,
        }
    }

    /// Backing ids that are registered now.
    pub(crate) fn ids(&self) -> usize {
        let files = self.files.upgrade();
        files.map_or(0, |files| files.table().stats().ids)
    }
}
