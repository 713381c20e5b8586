//! The two modes of an inode.

use std::os::fd::OwnedFd;

use crate::access::Access;
use crate::error::ServerReason;
use crate::file::FileId;
use crate::id::BackingId;
use crate::sync::{AtomicU8, Ordering};

/// The mode of an inode, decided by its first open.
#[derive(Debug)]
pub(super) enum Mode {
    /// The kernel reads and writes the registered file.
    Passthrough(Registered),
    /// The server reads and writes the file, for this reason.
    Server(ServerReason),
}

impl Mode {
    /// Whether earlier opens, which examined the file, were together granted `access`. True in server mode.
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
    /// The file that is registered.
    pub(super) file: FileId,
    /// The most access that the registrar was asked to permit.
    pub(super) grant: Access,
    /// What opens have been granted so far, as bits of [`Access`]. Bits are only added, and no other data is read on
    /// the strength of them: so the accesses are `Relaxed`, and need no lock.
    granted: AtomicU8,
    /// The fd that `keep_fds` keeps; closed with the last reference to the inode.
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

    /// What opens have been granted so far, but no more than `grant` if the registrar enforces it (`enforced`). `None`
    /// until the first open has added its grant.
    pub(super) fn granted(&self, enforced: bool) -> Option<Access> {
        let at_most = if enforced {
            self.grant
        } else {
            Access::ReadWrite
        };
        Access::from_bits(self.granted.load(Ordering::Relaxed) & at_most.bits())
    }

    /// Records that an open was granted `access`.
    pub(super) fn add(&self, access: Access) {
        let bits = access.bits();
        // Most opens add nothing: a load does not take the cache line from other threads.
        if self.granted.load(Ordering::Relaxed) & bits != bits {
            self.granted.fetch_or(bits, Ordering::Relaxed);
        }
    }
}
