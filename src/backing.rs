//! [`BackingFile`]: the guard that closes a registration.

use std::os::fd::AsFd;

use static_assertions::assert_eq_size;

use crate::access::Access;
use crate::device::FuseDevice;
use crate::error::{BackingCloseError, BackingError};
use crate::id::BackingId;
use crate::register::Register;

/// A registered backing file, closed on drop.
///
/// `R` is the [registrar](Register): a `&FuseDevice`, an `Arc<FuseDevice>`, or another one.
///
/// Keep the guard from before the OPEN reply is written until the last RELEASE of the inode, and use one guard for all
/// opens of an inode: the kernel refuses a second id for an inode that is open, even an id of the same file.
/// [`BackingTable`](crate::BackingTable) does that.
///
/// Drop ignores a close that fails, as it does in a thread without `CAP_SYS_ADMIN`. The file then stays registered for
/// the life of the connection. [`close`](Self::close) reports the error. After fork(2) the process that drops its copy
/// first closes the id for both.
///
/// # Examples
///
/// ```no_run
/// # fn f(device: fuse_backing::FuseDevice) -> std::io::Result<()> {
/// use fuse_backing::{Access, BackingFile, FopenFlags, OpenReply};
///
/// // The server opens the file itself, with the client's flags, and so gets the true errno.
/// let client_flags = 0; // O_RDONLY
/// let file = std::fs::File::open("/srv/data/file")?;
/// let granted = Access::of(&file)?;
/// let backing = BackingFile::open(&device, &file, granted)?;
///
/// let reply = OpenReply::passthrough(backing.id(), granted, client_flags, FopenFlags::empty())?;
/// println!("{:?}, backing id {:?}", reply.open_flags(), reply.backing_id());
/// // ... and after the last RELEASE:
/// backing.close()?;
/// # Ok(()) }
/// ```
///
/// A guard cannot outlive the device that it borrows:
///
/// ```compile_fail,E0505
/// # fn f(device: fuse_backing::FuseDevice, id: fuse_backing::BackingId) {
/// let backing = fuse_backing::BackingFile::from_id(&device, id);
/// drop(device);
/// let closed = backing.close();
/// # }
/// ```
///
/// It is closed once:
///
/// ```compile_fail,E0382
/// # fn f(backing: fuse_backing::BackingFile<std::sync::Arc<fuse_backing::FuseDevice>>) {
/// let first = backing.close();
/// let second = backing.close();
/// # }
/// ```
#[derive(Debug)]
#[must_use = "dropping a BackingFile closes it"]
pub struct BackingFile<R: Register> {
    registrar: R,
    id: BackingId,
    registered: bool,
}

assert_eq_size!(BackingFile<&FuseDevice>, (usize, i32, bool));

impl<R: Register> BackingFile<R> {
    /// `ioctl(device, FUSE_DEV_IOC_BACKING_OPEN, {fd})` — Registers a file. [`FuseDevice::backing_open`] has the
    /// requirements and the security note.
    ///
    /// `grant` is the most that will ever be granted through this id. It matters to a registrar that
    /// [enforces](Register::enforces_grant) it.
    ///
    /// # Errors
    ///
    /// [`BackingError`]. Nothing stays registered.
    #[inline]
    pub fn open(registrar: R, fd: impl AsFd, grant: Access) -> Result<Self, BackingError> {
        let id = registrar.register(fd.as_fd(), grant)?;
        Ok(Self::from_id(registrar, id))
    }

    /// Guards an id that is already registered with the connection of *this* registrar: one that
    /// [`into_id`](Self::into_id) returned, or that a predecessor on the same device fd handed over.
    #[inline]
    pub fn from_id(registrar: R, id: BackingId) -> Self {
        Self {
            registrar,
            id,
            registered: true,
        }
    }

    /// The id, for replies.
    #[inline]
    pub fn id(&self) -> &BackingId {
        &self.id
    }

    /// Gives up the guard. The file stays registered, and the caller must close the id.
    ///
    /// # Examples
    ///
    /// ```no_run
    /// # use fuse_backing::{BackingFile, BackingId, FuseDevice};
    /// # fn f(backing: BackingFile<&FuseDevice>, successor: &FuseDevice) -> Option<()> {
    /// let hand_over: i32 = backing.into_id().into_raw();
    /// let backing = BackingFile::from_id(successor, BackingId::from_raw(hand_over)?);
    /// # Some(()) }
    /// ```
    #[inline]
    pub fn into_id(mut self) -> BackingId {
        self.registered = false;
        self.id.alias()
    }

    /// `ioctl(device, FUSE_DEV_IOC_BACKING_CLOSE, &id)` — Closes the id as drop does, and reports the error.
    ///
    /// # Errors
    ///
    /// [`BackingCloseError`] gives the guard back. The file is still registered, and dropping the guard tries once
    /// more. After [`UnknownId`](BackingError::UnknownId) nothing is left to close: neither dropping the guard nor
    /// closing it again makes a call, because the number may be another file's by then.
    #[inline]
    pub fn close(mut self) -> Result<(), BackingCloseError<Self>> {
        self.unregister()
            .map_err(|cause| BackingCloseError::new(self, cause))
    }

    #[inline]
    fn unregister(&mut self) -> Result<(), BackingError> {
        if !self.registered {
            return Err(BackingError::UnknownId);
        }
        // First, so that the drop after a panic of the registrar does not close the id twice.
        self.registered = false;
        self.registrar
            .unregister(self.id.alias())
            .map_err(|failed| {
                self.registered = failed.cause() != BackingError::UnknownId;
                failed.cause()
            })
    }
}

impl<R: Register> Drop for BackingFile<R> {
    #[inline]
    fn drop(&mut self) {
        // Drop cannot report an error; `close` does.
        let _ = self.unregister();
    }
}
