//! [`BackingId`], the token for a registration, and [`BackingFile`], the guard that closes it.

use std::num::NonZeroI32;
use std::ops::Deref;
use std::os::fd::AsFd;

use static_assertions::{assert_eq_size, assert_impl_all, assert_not_impl_any};

use crate::device::{self, FuseDevice};
use crate::error::{BackingCloseCause, BackingCloseError, BackingOpenError};
use crate::ioctl;

/// What the kernel knows a backing file by: 1 ..= `i32::MAX`, one table of ids for each connection.
///
/// A token to be closed once: it cannot be copied, and [`FuseDevice::backing_close`] consumes it.
/// The kernel hands ids out cyclically, so that a closed one is not reused soon.
///
/// # What the type does not rule out
///
/// [`BackingFile`] rules out the first two.
///
/// - **Dropping it leaks the registration**: the file, and the mount it is on, stay pinned until the
///   FUSE mount and every fd of its connection are gone.
/// - **It is not tied to its connection.** Ids of all connections start at 1, so one that is closed
///   on the wrong device closes somebody else's file there.
/// - **[`from_raw`](Self::from_raw) can forge one**, or make a second one for the same registration.
/// - **After fork(2) there are two**, in two processes, for one registration; one alone may close.
///
/// `tests/kernel/backing_close.rs` shows each of them happen.
///
/// # Examples
///
/// ```
/// use fuse_backing::BackingId;
///
/// assert!(BackingId::from_raw(0).is_none());
/// assert!(BackingId::from_raw(-1).is_none());
/// let id = BackingId::from_raw(3).ok_or("positive")?;
/// assert_eq!(id.as_raw(), 3);
/// assert_eq!(id.into_raw(), 3);
/// # Ok::<(), &str>(())
/// ```
///
/// ```compile_fail,E0599
/// # fn f(id: fuse_backing::BackingId) {
/// let copy = id.clone();
/// # }
/// ```
#[derive(Debug, PartialEq, Eq)]
#[must_use = "dropping a BackingId leaves the file registered; close it, or use BackingFile"]
#[repr(transparent)]
pub struct BackingId(
    // Positive: `from_raw` is the only place that makes one.
    NonZeroI32,
);

assert_not_impl_any!(BackingId: Clone, Copy);
assert_impl_all!(BackingId: Send, Sync);
assert_eq_size!(Option<BackingId>, i32);

impl BackingId {
    /// Takes a raw id, as the kernel returned it or a predecessor of this process handed it over;
    /// `None` unless it is positive.
    ///
    /// Nothing else is checked. An id that is not registered is found out when it is used: closing
    /// it fails with [`UnknownId`](crate::BackingCloseCause::UnknownId), a reply with it gives
    /// the client `EIO`.
    #[inline]
    #[must_use]
    pub const fn from_raw(raw: i32) -> Option<Self> {
        match NonZeroI32::new(raw) {
            Some(id) if id.get() > 0 => Some(Self(id)),
            _ => None,
        }
    }

    /// The id as the `backing_id` of a reply has it.
    #[inline]
    #[must_use]
    pub const fn as_raw(&self) -> i32 {
        self.0.get()
    }

    /// The raw id; whoever has it is in charge of closing it.
    #[inline]
    #[must_use = "the raw id is all that can close the registration"]
    pub const fn into_raw(self) -> i32 {
        self.0.get()
    }

    /// A second token for the same registration.
    pub(crate) const fn alias(&self) -> Self {
        Self(self.0)
    }
}

/// A registered backing file, closed on drop.
///
/// `D` is how the guard holds the device: a `&FuseDevice`, or an `Arc<FuseDevice>` for one that is
/// kept in a server's table of open files.
///
/// Keep it from before the OPEN reply is written until the last RELEASE of the inode, and use one
/// for all opens of an inode: the kernel refuses a second id for an inode that is open, even one of
/// the same file.
///
/// Drop ignores a failing close, which happens to a thread without `CAP_SYS_ADMIN`; the file then
/// stays registered as long as the connection lives. [`close`](Self::close) reports it.
///
/// # Examples
///
/// ```no_run
/// # fn f(device: fuse_backing::FuseDevice<std::fs::File>) -> Result<(), Box<dyn std::error::Error>> {
/// use fuse_backing::{Access, BackingFile, OpenFlags, OpenReply};
/// use std::sync::Arc;
///
/// let device = Arc::new(device);
/// // The server opens the file itself, with the client's flags: the errno is the true one.
/// let client_flags = 0; // O_RDONLY
/// let file = std::fs::File::open("/srv/data/file")?;
/// let backing = BackingFile::open(Arc::clone(&device), &file)?;
///
/// let reply = OpenReply::passthrough(&backing, Access::of(&file)?, client_flags, OpenFlags::empty())?;
/// println!("open_flags {:#x}, backing_id {}", reply.open_flags(), reply.backing_id());
/// // ... and after the last RELEASE:
/// backing.close()?;
/// # Ok(()) }
/// ```
///
/// It cannot outlive the device it borrows:
///
/// ```compile_fail,E0505
/// # fn f(device: fuse_backing::FuseDevice<std::fs::File>, file: std::fs::File) -> Result<(), Box<dyn std::error::Error>> {
/// let backing = fuse_backing::BackingFile::open(&device, file)?;
/// drop(device);
/// backing.close()?;
/// # Ok(()) }
/// ```
///
/// and is closed once:
///
/// ```compile_fail,E0382
/// # fn f(backing: fuse_backing::BackingFile<std::sync::Arc<fuse_backing::FuseDevice<std::fs::File>>>) {
/// let first = backing.close();
/// let second = backing.close();
/// # }
/// ```
#[derive(Debug)]
#[must_use = "dropping a BackingFile closes it"]
pub struct BackingFile<D: Deref<Target: AsFd>> {
    device: D,
    id: BackingId,
    registered: bool,
}

assert_eq_size!(
    BackingFile<&FuseDevice<std::os::fd::OwnedFd>>,
    (usize, i32, bool)
);

impl<D: Deref<Target: AsFd>> BackingFile<D> {
    /// `ioctl(device, FUSE_DEV_IOC_BACKING_OPEN, {fd})` — Registers a file as
    /// [`FuseDevice::backing_open`] does, which has the requirements and the security note.
    ///
    /// # Errors
    ///
    /// [`BackingOpenError`]; nothing stays registered.
    #[inline]
    pub fn open<Fd: AsFd>(device: D, fd: impl AsFd) -> Result<Self, BackingOpenError>
    where
        D: Deref<Target = FuseDevice<Fd>>,
    {
        let id = device.backing_open(fd)?;
        Ok(Self::from_id(device, id))
    }

    /// Guards an id that is registered already, with the connection of *this* device.
    ///
    /// # Examples
    ///
    /// A server that was restarted on a device fd which survived adopts its predecessor's ids:
    ///
    /// ```no_run
    /// # fn f(device: fuse_backing::FuseDevice<std::fs::File>, handed_over: i32) -> Option<()> {
    /// use fuse_backing::{BackingFile, BackingId};
    ///
    /// let backing = BackingFile::from_id(&device, BackingId::from_raw(handed_over)?);
    /// # Some(()) }
    /// ```
    #[inline]
    pub fn from_id<Fd: AsFd>(device: D, id: BackingId) -> Self
    where
        D: Deref<Target = FuseDevice<Fd>>,
    {
        Self {
            device,
            id,
            registered: true,
        }
    }

    /// The id, to be named in replies.
    #[inline]
    pub fn id(&self) -> &BackingId {
        &self.id
    }

    /// Gives up the guard: the file stays registered, and closing the id is the caller's.
    ///
    /// # Examples
    ///
    /// ```no_run
    /// # fn f(backing: fuse_backing::BackingFile<&fuse_backing::FuseDevice<std::fs::File>>) {
    /// let hand_over: i32 = backing.into_id().into_raw();
    /// # }
    /// ```
    #[inline]
    pub fn into_id(mut self) -> BackingId {
        self.registered = false;
        self.id.alias()
    }

    /// `ioctl(device, FUSE_DEV_IOC_BACKING_CLOSE, &id)` — Closes as drop does, and reports the error.
    ///
    /// # Errors
    ///
    /// [`BackingCloseError`] gives the guard back. It is still registered, and dropping it tries once
    /// more. After [`UnknownId`](crate::BackingCloseCause::UnknownId) nothing is left to close: neither
    /// dropping it nor closing it again makes a call, because the number may be another file's by then.
    #[inline]
    pub fn close(mut self) -> Result<(), BackingCloseError<Self>> {
        if !self.registered {
            return Err(BackingCloseError::new(self, BackingCloseCause::UnknownId));
        }
        match device::backing_close((*self.device).as_fd(), &self.id) {
            Ok(()) => {
                self.registered = false;
                Ok(())
            }
            Err(cause) => {
                self.registered = cause != BackingCloseCause::UnknownId;
                Err(BackingCloseError::new(self, cause))
            }
        }
    }
}

impl<D: Deref<Target: AsFd>> Drop for BackingFile<D> {
    #[inline]
    fn drop(&mut self) {
        if self.registered {
            // Whoever wants to know calls `close`: a destructor has nobody to tell.
            let _ = ioctl::backing_close((*self.device).as_fd(), self.id.as_raw());
        }
    }
}
