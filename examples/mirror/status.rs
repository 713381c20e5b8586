//! What a mirror tells whoever serves it, while the filesystem itself belongs to its session.

use std::sync::atomic::AtomicU64;
use std::sync::{Arc, OnceLock, Weak};

use fuse_backing::NegotiateError;

use crate::opens::Table;

#[derive(Default)]
pub(crate) struct Status {
    /// What came of negotiating passthrough, if it was wanted.
    pub(crate) negotiated: OnceLock<Result<(), NegotiateError>>,
    /// READ requests so far.
    pub(crate) reads: AtomicU64,
    /// WRITE requests so far.
    pub(crate) writes: AtomicU64,
    /// Weak, because the table holds the device, which would keep the connection.
    table: OnceLock<Weak<Table>>,
}

impl Status {
    pub(crate) fn set_table(&self, table: &Arc<Table>) {
        // Once for each mirror, which makes its status itself.
        let _ = self.table.set(Arc::downgrade(table));
    }

    /// While the mirror is served, and has passthrough.
    pub(crate) fn table(&self) -> Option<Arc<Table>> {
        self.table.get()?.upgrade()
    }

    /// Backing ids that are registered now.
    pub(crate) fn ids(&self) -> usize {
        self.table().map_or(0, |table| table.stats().ids)
    }
}
