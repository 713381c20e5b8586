//! [`ByAccess`]: one registrar for each grant.

use std::os::fd::{AsFd, BorrowedFd};
use std::sync::OnceLock;

use rustix::fs::{MemfdFlags, memfd_create};
use rustix::io::Errno;

use crate::access::Access;
use crate::error::{BackingCloseError, BackingError};
use crate::file::examine;
use crate::id::BackingId;
use crate::register::{Register, WithoutFsetid};

/// Uses one registrar for each grant: read-only, write-only and both.
///
/// Made for [`RegistrarThread`](super::RegistrarThread)s in Landlock domains. If a thread may not write a file, no
/// client can write through an id that this thread registers: a client that opens the file for writing gets `EIO`,
/// whatever the reply says. This holds for unlinked files, files on overlayfs and files of other mount namespaces too.
/// It requires nothing of the files' mounts. A registration for less than reading and writing costs one statx(2) more.
///
/// So it [enforces grants](Register::enforces_grant), and the table respects that: the
/// [`grant`](crate::ServerFile::grant) of the first open counts for all. A file that Landlock does not restrict, such
/// as a memfd, is [`NotEnforceable`](BackingError::NotEnforceable) for less than reading and writing.
///
/// Ids are closed through the registrar for reading and writing.
///
/// # Examples
///
/// ```no_run
/// use fuse_backing::rights::{ByAccess, CapabilitySet, Lowered, RegistrarThread};
/// use fuse_backing::{Access, BackingTable, FuseDevice};
/// use landlock::{AccessFs, CompatLevel, Compatible, Ruleset, RulesetAttr, RulesetError};
/// use std::{io, sync::Arc};
///
/// /// Keeps the calling thread from opening files for more than this. Fails where there is no Landlock.
/// fn restrict(to: Access) -> Result<(), RulesetError> {
///     let denied = match to {
///         Access::ReadOnly => AccessFs::WriteFile | AccessFs::Truncate,
///         Access::WriteOnly => AccessFs::ReadFile.into(),
///         Access::ReadWrite => return Ok(()),
///     };
///     let rules = Ruleset::default().set_compatibility(CompatLevel::HardRequirement);
///     rules.handle_access(denied)?.create()?.restrict_self().map(drop)
/// }
///
/// # fn f(device: Arc<FuseDevice>) -> io::Result<()> {
/// let registrars = ByAccess::new(|access| {
///     let lowered = Lowered::permanently(Arc::clone(&device), CapabilitySet::empty());
///     RegistrarThread::spawn(lowered, move || restrict(access))
/// })?;
/// let table: BackingTable<_> = BackingTable::new(registrars);
/// # Ok(()) }
/// ```
///
/// `examples/enforced.rs` is a server with one of the three.
#[derive(Clone, Debug)]
pub struct ByAccess<R> {
    read_only: R,
    write_only: R,
    read_write: R,
}

impl<R: Register> ByAccess<R> {
    /// Calls `make` for each access. The registrar that it makes must be unable to register for more.
    ///
    /// # Errors
    ///
    /// The first error that `make` returns.
    pub fn new<E>(mut make: impl FnMut(Access) -> Result<R, E>) -> Result<Self, E> {
        Ok(Self {
            read_only: make(Access::ReadOnly)?,
            write_only: make(Access::WriteOnly)?,
            read_write: make(Access::ReadWrite)?,
        })
    }
}

impl<R: Register> Register for ByAccess<R> {
    fn register(&self, file: BorrowedFd<'_>, grant: Access) -> Result<BackingId, BackingError> {
        let registrar = match grant {
            Access::ReadOnly => &self.read_only,
            Access::WriteOnly => &self.write_only,
            Access::ReadWrite => return self.read_write.register(file, grant),
        };
        if is_beyond_landlock(file).map_err(BackingError::Other)? {
            return Err(BackingError::NotEnforceable);
        }
        registrar.register(file, grant)
    }

    fn unregister(&self, id: BackingId) -> Result<(), BackingCloseError<BackingId>> {
        self.read_write.unregister(id)
    }

    fn takes_path_fd(&self) -> bool {
        let registrars = [&self.read_only, &self.write_only, &self.read_write];
        registrars.into_iter().all(R::takes_path_fd)
    }

    fn enforces_grant(&self) -> bool {
        true
    }
}

impl<R: WithoutFsetid> WithoutFsetid for ByAccess<R> {}

/// Whether the file is on the kernel's own mount of tmpfs, which has the memfds and System V shared memory. Landlock
/// ignores files on mounts that the kernel keeps for itself (`security/landlock/fs.c`). Of these mounts, this one alone
/// has files that can be registered: hugetlbfs, with the same in huge pages, gets `ELOOP`
/// (`tests/kernel/rights/by_access.rs`). All files on it have the device number of a memfd.
fn is_beyond_landlock(file: BorrowedFd<'_>) -> Result<bool, Errno> {
    /// Constant for as long as the machine runs.
    static DEVICE_OF_MEMFDS: OnceLock<u64> = OnceLock::new();

    let memfds = if let Some(device) = DEVICE_OF_MEMFDS.get() {
        *device
    } else {
        let memfd = memfd_create("fuse-backing", MemfdFlags::CLOEXEC)?;
        let device = examine(memfd.as_fd())?.id.device;
        *DEVICE_OF_MEMFDS.get_or_init(|| device)
    };
    Ok(examine(file)?.id.device == memfds)
}
