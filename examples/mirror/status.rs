//! What a mirror tells whoever serves it, while the filesystem itself belongs to its session.

use std::sync::atomic::{AtomicBool, AtomicU64};

#[derive(Default)]
pub(crate) struct Status {
    /// Passthrough was asked for, offered by the kernel, and negotiated.
    pub(crate) negotiated: AtomicBool,
    /// Backing ids that are registered now.
    pub(crate) ids: AtomicU64,
    /// READ requests so far.
    pub(crate) reads: AtomicU64,
    /// WRITE requests so far.
    pub(crate) writes: AtomicU64,
}
