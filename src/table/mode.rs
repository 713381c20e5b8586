//! The two modes of an inode.

use std::os::fd::OwnedFd;

use crate::access::Access;
use crate::error::ServerReason;
use crate::file::FileId;
use crate::id::BackingId;
use crate::sync::{AtomicU8, Ordering};

#[derive(Debug)]
pub(super) enum Mode {
    Passthrough(Registered),
    Server(ServerReason),
}

impl Mode {
    /// Whether an open that looked at the file was granted this.
    pub(super) fn was_granted(&self, access: Access) -> bool {
        match self {
            Self::Passthrough(registered) => registered
                .granted(false)
                .is_some_and(|granted| granted.allows(access)),
            // The server reads and writes the file itself.
            Self::Server(_) => true,
        }
    }
}

/// A registration, until it is closed.
#[derive(Debug)]
pub(super) struct Registered {
    pub(super) id: BackingId,
    pub(super) file: FileId,
    /// The most that the registrar was asked to permit.
    pub(super) grant: Access,
    /// [`Access`] as bits: what opens have been granted so far. It grows only.
    granted: AtomicU8,
    /// What `keep_fds` keeps; closed with the last reference to the inode.
    _kept: Option<OwnedFd>,
}

impl Registered {
    pub(super) fn new(id: BackingId, file: FileId, grant: Access, kept: Option<OwnedFd>) -> Self {
        Self {
            id,
            file,
            grant,
            granted: AtomicU8::new(0),
            _kept: kept,
        }
    }

    /// What opens have been granted so far: no more than was registered, if that is `enforced`. `None` until
    /// the first open got it.
    pub(super) fn granted(&self, enforced: bool) -> Option<Access> {
        let at_most = if enforced {
            self.grant
        } else {
            Access::ReadWrite
        };
        Access::from_bits(self.granted.load(Ordering::Relaxed) & at_most.bits())
    }

    /// One open more was granted `access`.
    pub(super) fn add(&self, access: Access) {
        let bits = access.bits();
        if self.granted.load(Ordering::Relaxed) & bits != bits {
            self.granted.fetch_or(bits, Ordering::Relaxed);
        }
    }
}
