//! One error for each operation, one variant for each cause.
//!
//! What an errno means is worked out in diagnose.rs, on the error path.

use std::fmt;
use std::io;

use rustix::fs::FileType;
use rustix::io::Errno;
use thiserror::Error;

use crate::access::Access;

/// What an error means for the next attempt.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Scope {
    /// This file cannot be a backing file of this connection; others may. Serve it without
    /// passthrough.
    File,
    /// Every attempt on this connection will fail like this one until its cause is removed.
    ///
    /// After such a failure [`BackingTable`](crate::BackingTable) registers nothing, on any thread, until
    /// [`reset`](crate::BackingTable::reset).
    Connection,
    /// Every attempt of the *calling thread* will fail like this one; another thread may succeed, since
    /// capabilities belong to threads.
    Thread,
    /// The same call may succeed when it is made again.
    Transient,
}

/// Why `EPERM`: the kernel has one errno for all of these.
///
/// Told apart on the error path, by looking at the calling thread.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Error)]
#[non_exhaustive]
pub enum NotPermitted {
    /// The calling thread is in a user namespace of its own. The kernel asks for `CAP_SYS_ADMIN` in
    /// the *initial* user namespace, whatever the thread may do in its own: rootless containers
    /// cannot have passthrough.
    #[error(
        "the calling thread is not in the initial user namespace, where it needs CAP_SYS_ADMIN"
    )]
    NotInInitialUserNamespace,
    /// The calling thread has no effective `CAP_SYS_ADMIN`. Capabilities belong to threads: another
    /// thread of the process may have it.
    #[error("the calling thread has no effective CAP_SYS_ADMIN")]
    MissingCapability,
    /// Neither of these, and the device is attached: passthrough was not negotiated, or a security
    /// module or seccomp denies it. The kernel does not tell these apart.
    ///
    /// Not negotiated means: INIT is not answered yet, or its reply lacks `FUSE_INIT_EXT` or
    /// `FUSE_PASSTHROUGH`, or has a `max_stack_depth` other than 1 and 2, or has
    /// `FUSE_WRITEBACK_CACHE`. The kernel accepts such a reply without a word.
    #[error(
        "passthrough was not negotiated (the INIT reply needs INIT_EXT, PASSTHROUGH, \
         max_stack_depth 1 or 2, and no WRITEBACK_CACHE), or a security policy denies it"
    )]
    NotNegotiatedOrDenied,
    /// Not known: the thread's namespace or capabilities, or the state of the device, cannot be looked
    /// at, for want of `/proc` or because a policy denies it.
    #[error("the cause cannot be told here, where /proc or something else is out of sight")]
    Undetermined,
}

impl NotPermitted {
    /// User namespaces belong to processes, capabilities to threads. Where the cause is not known it
    /// counts for the thread. [`NotNegotiatedOrDenied`](Self::NotNegotiatedOrDenied) counts for the
    /// connection: a policy for some threads of a server alone is a seccomp filter of its own making.
    fn scope(self) -> Scope {
        match self {
            Self::NotInInitialUserNamespace | Self::NotNegotiatedOrDenied => Scope::Connection,
            Self::MissingCapability | Self::Undetermined => Scope::Thread,
        }
    }
}

/// [`FuseDevice::backing_open`](crate::FuseDevice::backing_open) failed.
///
/// # Examples
///
/// ```no_run
/// # fn f(device: fuse_backing::FuseDevice<std::fs::File>, file: std::fs::File) {
/// use fuse_backing::{BackingOpenError, NotPermitted};
///
/// match device.backing_open(&file) {
///     Ok(id) => drop(device.backing_close(id)),
///     Err(BackingOpenError::NotPermitted(NotPermitted::MissingCapability)) => eprintln!("run as root"),
///     Err(e) => eprintln!("no passthrough: {e} (errno {})", e.errno().raw_os_error()),
/// }
/// # }
/// ```
#[derive(Clone, Copy, Debug, PartialEq, Eq, Error)]
#[non_exhaustive]
pub enum BackingOpenError {
    /// `ENOTTY`: the kernel is older than 6.9. ([`FuseDevice`](crate::FuseDevice) has ruled out an
    /// fd that is no FUSE device.)
    #[error("the kernel does not know FUSE passthrough, which is of Linux 6.9")]
    UnsupportedKernel,
    /// `ENOSYS`: something between here and the kernel does not know the ioctl; qemu-user and some
    /// seccomp profiles answer so.
    #[error("the ioctl is not implemented here: an emulator or a seccomp profile refuses it")]
    Unimplemented,
    /// `EOPNOTSUPP`: the kernel was built without `CONFIG_FUSE_PASSTHROUGH`.
    #[error("the kernel was built without CONFIG_FUSE_PASSTHROUGH")]
    DisabledInKernel,
    /// `EOPNOTSUPP`, 6.9 to 6.11: the file can neither be read nor written in the way passthrough
    /// does it (no `read_iter` or `write_iter`).
    #[error("the file's filesystem does not support passthrough reads and writes")]
    FileNotSupported,
    /// The device is not attached to a connection: it was not mounted yet. `EPERM`, in the first
    /// releases with passthrough `EINVAL`.
    #[error("the device is not attached to a FUSE mount")]
    NotAttached {
        /// The raw errno.
        errno: Errno,
    },
    /// `EPERM`, and why.
    #[error("registering a backing file is not permitted: {0}")]
    NotPermitted(NotPermitted),
    /// `EISDIR` or `EINVAL`: only regular files can be backing files. Linux 6.12.48, 6.16.8 and 6.17 on
    /// refuse all others; before 6.12 some are refused, with `EOPNOTSUPP`.
    #[error("a backing file must be a regular file, this is {}", kind_of_file(*.file_type))]
    NotRegularFile {
        /// What the backing fd is.
        file_type: FileType,
        /// The raw errno.
        errno: Errno,
    },
    /// `ELOOP`: the file's filesystem is stacked as deep as the connection's `max_stack_depth`, or
    /// deeper. With depth 1, files on overlayfs and on another passthrough mount; with depth 2, on
    /// stacks of these; at any depth, files of `/proc`. On Android, whose kernels do not check that it
    /// was negotiated, also each file of a connection where it was not.
    #[error("the file's filesystem is stacked too deep for the negotiated max_stack_depth")]
    StackedTooDeep,
    /// `EBADF`, 6.9 to 6.11: an `O_PATH` fd. Linux 6.12 takes them.
    #[error("the backing fd was opened with O_PATH, which needs Linux 6.12")]
    PathOnlyFd,
    /// `EBADF`: the backing fd is not open. Its [`AsFd`](std::os::fd::AsFd) named an fd that was
    /// closed behind its owner's back.
    #[error("the backing fd is not open")]
    BadFd,
    /// `ENOMEM`.
    #[error("the kernel is out of memory")]
    OutOfMemory,
    /// `ENOSPC`: all ids of the connection are in use.
    #[error("the connection has no backing ids left")]
    OutOfIds,
    /// `EINTR`: a signal arrived while the call waited for the mount to complete, see
    /// [`FuseDevice::sync_init`](crate::FuseDevice::sync_init).
    #[error("interrupted by a signal while waiting for the mount")]
    Interrupted,
    /// The kernel, or whoever answered in its place, reported success with an id that is not
    /// positive. No such id exists; nothing was registered under it.
    #[error("the ioctl returned {0}, which is no backing id")]
    InvalidId(i32),
    /// Not the kernel but the [`Register`](crate::Register) refuses: its policy, its limit, or its end.
    #[error("the registrar refuses: {errno}")]
    Registrar {
        /// What it gives as the reason.
        errno: Errno,
        /// What it means for the next attempt.
        scope: Scope,
    },
    /// An errno whose cause is not known.
    #[error("unknown cause: {0}")]
    Other(Errno),
}

impl BackingOpenError {
    /// The errno that the kernel gave; `EPROTO` for [`InvalidId`](Self::InvalidId), where it gave
    /// none.
    #[must_use]
    pub fn errno(&self) -> Errno {
        match *self {
            Self::UnsupportedKernel => Errno::NOTTY,
            Self::Unimplemented => Errno::NOSYS,
            Self::DisabledInKernel | Self::FileNotSupported => Errno::OPNOTSUPP,
            Self::NotAttached { errno }
            | Self::NotRegularFile { errno, .. }
            | Self::Registrar { errno, .. }
            | Self::Other(errno) => errno,
            Self::NotPermitted(_) => Errno::PERM,
            Self::StackedTooDeep => Errno::LOOP,
            Self::PathOnlyFd | Self::BadFd => Errno::BADF,
            Self::OutOfMemory => Errno::NOMEM,
            Self::OutOfIds => Errno::NOSPC,
            Self::Interrupted => Errno::INTR,
            Self::InvalidId(_) => Errno::PROTO,
        }
    }

    /// What it means for the next attempt. A cause that is not known counts for the file.
    #[must_use]
    pub fn scope(&self) -> Scope {
        match self {
            Self::NotPermitted(why) => why.scope(),
            Self::Registrar { scope, .. } => *scope,
            Self::UnsupportedKernel
            | Self::Unimplemented
            | Self::DisabledInKernel
            | Self::NotAttached { .. }
            | Self::InvalidId(_) => Scope::Connection,
            Self::FileNotSupported
            | Self::NotRegularFile { .. }
            | Self::StackedTooDeep
            | Self::PathOnlyFd
            | Self::BadFd
            | Self::Other(_) => Scope::File,
            Self::OutOfMemory | Self::OutOfIds | Self::Interrupted => Scope::Transient,
        }
    }
}

/// Closing a backing id failed. What was to be closed is inside: `T` is a
/// [`BackingId`](crate::BackingId) or a [`BackingFile`](crate::BackingFile).
///
/// Where `?` asks for an error that borrows nothing, and `T` is a guard that borrows its device,
/// `map_err(|failed| failed.cause())` has one.
#[derive(Error)]
#[error("closing a backing id failed: {cause}")]
pub struct BackingCloseError<T> {
    inner: T,
    cause: BackingCloseCause,
}

impl<T> BackingCloseError<T> {
    /// For a [`Register`](crate::Register) of one's own, which gives back what it could not close.
    pub fn new(inner: T, cause: BackingCloseCause) -> Self {
        Self { inner, cause }
    }

    /// Why it failed.
    #[must_use]
    pub fn cause(&self) -> BackingCloseCause {
        self.cause
    }

    /// The errno that the kernel gave.
    #[must_use]
    pub fn errno(&self) -> Errno {
        self.cause.errno()
    }

    /// What it means for the next attempt.
    #[must_use]
    pub fn scope(&self) -> Scope {
        self.cause.scope()
    }

    /// What was to be closed.
    pub fn into_inner(self) -> T {
        self.inner
    }
}

// Without a bound, so that `unwrap` and `?` work for every holder of a device.
impl<T> fmt::Debug for BackingCloseError<T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("BackingCloseError")
            .field("cause", &self.cause)
            .finish_non_exhaustive()
    }
}

/// Why a backing id could not be closed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Error)]
#[non_exhaustive]
pub enum BackingCloseCause {
    /// `ENOENT`: the connection has no such id. It was closed before, is another connection's, or
    /// was made up.
    #[error("the connection has no such id")]
    UnknownId,
    /// The device is not attached to a connection. `EPERM`, in the first releases with passthrough
    /// `EINVAL`.
    #[error("the device is not attached to a FUSE mount")]
    NotAttached {
        /// The raw errno.
        errno: Errno,
    },
    /// `EPERM`, and why. The id is still registered; a thread that has the capability can close it.
    #[error("not permitted: {0}")]
    NotPermitted(NotPermitted),
    /// `ENOTTY`: the kernel is older than 6.9.
    #[error("the kernel does not know FUSE passthrough, which is of Linux 6.9")]
    UnsupportedKernel,
    /// `ENOSYS`: an emulator or a seccomp profile does not let the ioctl through.
    #[error("the ioctl is not implemented here: an emulator or a seccomp profile refuses it")]
    Unimplemented,
    /// `EOPNOTSUPP`: the kernel was built without `CONFIG_FUSE_PASSTHROUGH`.
    #[error("the kernel was built without CONFIG_FUSE_PASSTHROUGH")]
    DisabledInKernel,
    /// `EINTR`: a signal arrived while the call waited for the mount to complete.
    #[error("interrupted by a signal while waiting for the mount")]
    Interrupted,
    /// Not the kernel but the [`Register`](crate::Register) refuses, or failed; the id may still be
    /// registered.
    #[error("the registrar refuses: {errno}")]
    Registrar {
        /// What it gives as the reason.
        errno: Errno,
        /// What it means for the next attempt.
        scope: Scope,
    },
    /// An errno whose cause is not known.
    #[error("unknown cause: {0}")]
    Other(Errno),
}

impl BackingCloseCause {
    /// The errno that the kernel gave.
    #[must_use]
    pub fn errno(&self) -> Errno {
        match *self {
            Self::UnknownId => Errno::NOENT,
            Self::NotAttached { errno } | Self::Registrar { errno, .. } | Self::Other(errno) => {
                errno
            }
            Self::NotPermitted(_) => Errno::PERM,
            Self::UnsupportedKernel => Errno::NOTTY,
            Self::Unimplemented => Errno::NOSYS,
            Self::DisabledInKernel => Errno::OPNOTSUPP,
            Self::Interrupted => Errno::INTR,
        }
    }

    /// What it means for the next attempt. A cause that is not known counts for the id's file.
    #[must_use]
    pub fn scope(&self) -> Scope {
        match self {
            Self::NotPermitted(why) => why.scope(),
            Self::Registrar { scope, .. } => *scope,
            Self::UnknownId | Self::Other(_) => Scope::File,
            Self::NotAttached { .. }
            | Self::UnsupportedKernel
            | Self::Unimplemented
            | Self::DisabledInKernel => Scope::Connection,
            Self::Interrupted => Scope::Transient,
        }
    }
}

/// [`FuseDevice::open`](crate::FuseDevice::open) failed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Error)]
#[non_exhaustive]
pub enum DeviceOpenError {
    /// `ENOENT`: there is no `/dev/fuse`.
    #[error(
        "there is no /dev/fuse: the fuse module is not loaded, or this container was not given the device"
    )]
    Missing,
    /// `ENODEV` or `ENXIO`: the node is there, the kernel has no driver for it.
    #[error("the kernel has no driver behind /dev/fuse")]
    #[non_exhaustive]
    NoDriver {
        /// The raw errno.
        errno: Errno,
    },
    /// `EACCES`, by the node's permissions, or `EPERM`, by a device cgroup.
    #[error("access to /dev/fuse is denied: {errno}")]
    #[non_exhaustive]
    Denied {
        /// The raw errno.
        errno: Errno,
    },
    /// Something else stands at that path.
    #[error("/dev/fuse is not the FUSE device: {0}")]
    NotFuse(NotFuseDeviceReason),
    /// An errno whose cause is not known.
    #[error("/dev/fuse cannot be opened: {0}")]
    Other(Errno),
}

impl DeviceOpenError {
    pub(crate) fn from_open_errno(errno: Errno) -> Self {
        match errno {
            Errno::NOENT => Self::Missing,
            Errno::NODEV | Errno::NXIO => Self::NoDriver { errno },
            Errno::ACCESS | Errno::PERM => Self::Denied { errno },
            errno => Self::Other(errno),
        }
    }

    /// The errno that the kernel gave; for [`NotFuse`](Self::NotFuse), where opening succeeded, that of
    /// the reason.
    #[must_use]
    pub fn errno(&self) -> Errno {
        match *self {
            Self::Missing => Errno::NOENT,
            Self::NotFuse(ref reason) => reason.errno(),
            Self::NoDriver { errno } | Self::Denied { errno } | Self::Other(errno) => errno,
        }
    }

    /// What it means for the next attempt.
    #[must_use]
    pub fn scope(&self) -> Scope {
        match self.errno() {
            Errno::INTR | Errno::MFILE | Errno::NFILE | Errno::NOMEM => Scope::Transient,
            _ => Scope::Connection,
        }
    }
}

/// An fd that [`FuseDevice::new`](crate::FuseDevice::new) refused, with the reason.
#[derive(Error)]
#[error("not a FUSE device: {reason}")]
pub struct NotFuseDevice<Fd> {
    fd: Fd,
    reason: NotFuseDeviceReason,
}

impl<Fd> NotFuseDevice<Fd> {
    pub(crate) fn new(fd: Fd, reason: NotFuseDeviceReason) -> Self {
        Self { fd, reason }
    }

    /// What the fd is instead.
    #[must_use]
    pub fn reason(&self) -> NotFuseDeviceReason {
        self.reason
    }

    /// That of the [reason](NotFuseDeviceReason::errno).
    #[must_use]
    pub fn errno(&self) -> Errno {
        self.reason.errno()
    }

    /// Gives the fd back, as it was.
    #[must_use]
    pub fn into_fd(self) -> Fd {
        self.fd
    }
}

// Without a bound, so that `unwrap` and `?` work for every holder of an fd.
impl<Fd> fmt::Debug for NotFuseDevice<Fd> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("NotFuseDevice")
            .field("reason", &self.reason)
            .finish_non_exhaustive()
    }
}

/// Why an fd is not usable as a FUSE device.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Error)]
#[non_exhaustive]
pub enum NotFuseDeviceReason {
    /// It is not a character device.
    #[error("it is no character device but {}", kind_of_file(*.file_type))]
    #[non_exhaustive]
    NotCharacterDevice {
        /// What it is.
        file_type: FileType,
    },
    /// It is another character device than 10:229.
    #[error("it is the character device {major}:{minor}, not 10:229")]
    #[non_exhaustive]
    OtherDevice {
        /// Its major number.
        major: u32,
        /// Its minor number.
        minor: u32,
    },
    /// It is `/dev/fuse`, opened with `O_PATH`: no ioctl works on it.
    #[error("it was opened with O_PATH, which permits no ioctl")]
    PathOnly,
    /// It is fd 0, 1 or 2, which may come to lead somewhere else; duplicate it.
    #[error("it is standard input, output or error: duplicate it")]
    StandardStream,
    /// `fstat` or `fcntl` failed.
    #[error("it cannot be looked at: {0}")]
    Unreadable(Errno),
}

impl NotFuseDeviceReason {
    /// What an ioctl on the fd would have given: `EBADF` for an `O_PATH` fd, else `ENOTTY`; or what
    /// the kernel gave when the fd was looked at; `EINVAL` for fds 0 to 2.
    #[must_use]
    pub fn errno(&self) -> Errno {
        match *self {
            Self::NotCharacterDevice { .. } | Self::OtherDevice { .. } => Errno::NOTTY,
            Self::PathOnly => Errno::BADF,
            Self::StandardStream => Errno::INVAL,
            Self::Unreadable(errno) => errno,
        }
    }
}

/// [`FuseDevice::clone_connection`](crate::FuseDevice::clone_connection) failed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Error)]
#[non_exhaustive]
pub enum CloneConnectionError {
    /// A further `/dev/fuse` could not be opened.
    #[error("{0}")]
    Open(DeviceOpenError),
    /// The device to be cloned is not attached to a connection. `EPERM`, in older releases `EINVAL`.
    #[error("the device is not attached to a FUSE mount")]
    #[non_exhaustive]
    NotAttached {
        /// The raw errno.
        errno: Errno,
    },
    /// `ENOTTY`: the kernel is older than 4.2.
    #[error("the kernel cannot clone a FUSE device, which is of Linux 4.2")]
    UnsupportedKernel,
    /// `ENOSYS`: an emulator or a seccomp profile does not let the ioctl through.
    #[error("the ioctl is not implemented here: an emulator or a seccomp profile refuses it")]
    Unimplemented,
    /// `ENOMEM`.
    #[error("the kernel is out of memory")]
    OutOfMemory,
    /// `EINTR`: a signal arrived while the call waited for the mount to complete.
    #[error("interrupted by a signal while waiting for the mount")]
    Interrupted,
    /// An errno whose cause is not known.
    #[error("unknown cause: {0}")]
    Other(Errno),
}

impl CloneConnectionError {
    /// The errno that the kernel gave.
    #[must_use]
    pub fn errno(&self) -> Errno {
        match *self {
            Self::Open(ref open) => open.errno(),
            Self::NotAttached { errno } | Self::Other(errno) => errno,
            Self::UnsupportedKernel => Errno::NOTTY,
            Self::Unimplemented => Errno::NOSYS,
            Self::OutOfMemory => Errno::NOMEM,
            Self::Interrupted => Errno::INTR,
        }
    }

    /// What it means for the next attempt.
    #[must_use]
    pub fn scope(&self) -> Scope {
        match self {
            Self::Open(open) => open.scope(),
            Self::OutOfMemory | Self::Interrupted => Scope::Transient,
            Self::NotAttached { .. }
            | Self::UnsupportedKernel
            | Self::Unimplemented
            | Self::Other(_) => Scope::Connection,
        }
    }
}

/// [`FuseDevice::sync_init`](crate::FuseDevice::sync_init) failed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Error)]
#[non_exhaustive]
pub enum SyncInitError {
    /// `ENOTTY`: the kernel is older than 6.18.
    #[error("the kernel does not know FUSE_DEV_IOC_SYNC_INIT, which is of Linux 6.18")]
    UnsupportedKernel,
    /// `ENOSYS`: an emulator or a seccomp profile does not let the ioctl through.
    #[error("the ioctl is not implemented here: an emulator or a seccomp profile refuses it")]
    Unimplemented,
    /// `EINVAL`: the device is attached to a connection already.
    #[error("the device is attached to a FUSE mount already")]
    AlreadyAttached,
    /// An errno whose cause is not known.
    #[error("unknown cause: {0}")]
    Other(Errno),
}

impl SyncInitError {
    pub(crate) fn from_errno(errno: Errno) -> Self {
        match errno {
            Errno::NOTTY => Self::UnsupportedKernel,
            Errno::NOSYS => Self::Unimplemented,
            Errno::INVAL => Self::AlreadyAttached,
            errno => Self::Other(errno),
        }
    }

    /// The errno that the kernel gave.
    #[must_use]
    pub fn errno(&self) -> Errno {
        match *self {
            Self::UnsupportedKernel => Errno::NOTTY,
            Self::Unimplemented => Errno::NOSYS,
            Self::AlreadyAttached => Errno::INVAL,
            Self::Other(errno) => errno,
        }
    }

    /// What it means for the next attempt: always [`Scope::Connection`].
    #[must_use]
    pub fn scope(&self) -> Scope {
        Scope::Connection
    }
}

/// Why an inode is in server mode.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Error)]
#[non_exhaustive]
pub enum ServerReason {
    /// Registering its file failed.
    #[error("{0}")]
    Refused(BackingOpenError),
    /// Registering another file failed, for a cause that concerns the connection. See
    /// [`BackingTable::reset`](crate::BackingTable::reset).
    #[error("not tried again: {0}")]
    Remembered(BackingOpenError),
    /// The table's limit on ids was reached, and none was idle.
    #[error("the limit on backing ids is reached")]
    LimitReached,
    /// [`BackingTable::serve`](crate::BackingTable::serve).
    #[error("the server's choice")]
    Chosen,
    /// The file is append-only (`chattr +a`, `STATX_ATTR_APPEND`). Passed through, a client could clear
    /// `O_APPEND` and overwrite it: Linux before 7.3.4 does not check.
    #[error("the file is append-only, which the kernel does not enforce in passthrough mode")]
    AppendOnly,
    /// `statx` failed, so that it is not known whether the file is append-only.
    #[error("the file's attributes cannot be read: {0}")]
    Unreadable(Errno),
    /// There is no fd to be kept with the id, see
    /// [`BackingTable::set_keep_fds`](crate::BackingTable::set_keep_fds); `EMFILE` most likely.
    #[error("no fd can be kept with the backing id: {0}")]
    NoFd(Errno),
}

/// [`BackingTable::open`](crate::BackingTable::open) failed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Error)]
#[non_exhaustive]
pub enum TableOpenError {
    /// The client's open asks for more than the server grants through the fd. Answer `EACCES`, or
    /// `EROFS`.
    #[error("the client asks for {wanted} access, {granted} is granted")]
    AccessExceeded {
        /// What the server grants.
        granted: Access,
        /// What the client's open flags ask for.
        wanted: Access,
    },
    /// The inode is open and registered for less than the client asks for, by a registrar that
    /// [enforces](crate::Register::enforces_grant) it. Once it has been released, it is registered for more.
    /// Answer `EBUSY`; or say what it will be granted at the first open already, by
    /// [`ServerFile::grant`](crate::ServerFile::grant).
    #[error(
        "the client asks for {wanted} access, the inode is open and registered for {registered}"
    )]
    GrantExceeded {
        /// What it is registered for.
        registered: Access,
        /// What the client's open flags ask for.
        wanted: Access,
    },
    /// The inode is open and registered with another file than this one, by `st_dev` and `st_ino`.
    /// All opens of an inode have one id, and so one file. Answer `EIO`. Where the kernel had forgotten
    /// the inode before its number was given to another file, the server has not said so with
    /// [`forget`](crate::BackingTable::forget).
    #[error("the inode is open with another backing file")]
    DifferentFile,
    /// `fstat` of the fd failed.
    #[error("the backing file cannot be looked at: {0}")]
    Unreadable(Errno),
}

impl TableOpenError {
    /// The errno to answer the client with.
    #[must_use]
    pub fn errno(&self) -> Errno {
        match *self {
            Self::AccessExceeded { .. } => Errno::ACCESS,
            Self::GrantExceeded { .. } => Errno::BUSY,
            Self::DifferentFile => Errno::IO,
            Self::Unreadable(errno) => errno,
        }
    }
}

/// [`BackingTable::invalidate`](crate::BackingTable::invalidate) of an inode that is open.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Error)]
#[error("the inode is open {opens} times")]
#[non_exhaustive]
pub struct Busy {
    /// How many opens there are.
    pub opens: u64,
}

impl From<Busy> for io::Error {
    fn from(busy: Busy) -> Self {
        Self::new(io::ErrorKind::ResourceBusy, busy)
    }
}

/// The error becomes the payload of an [`io::Error`] of the errno's kind: its message is kept, and
/// it can be had back with [`io::Error::get_ref`] and `downcast_ref`. A raw errno beside it is not
/// possible in an `io::Error`.
macro_rules! into_io_error {
    ($([$($generics:tt)*] $error:ty,)*) => { $(
        impl $($generics)* From<$error> for io::Error {
            fn from(error: $error) -> Self {
                Self::new(Self::from(error.errno()).kind(), error)
            }
        }
    )* };
}

into_io_error! {
    [] BackingOpenError,
    [<T: Send + Sync + 'static>] BackingCloseError<T>,
    [] BackingCloseCause,
    [<Fd: Send + Sync + 'static>] NotFuseDevice<Fd>,
    [] NotFuseDeviceReason,
    [] DeviceOpenError,
    [] CloneConnectionError,
    [] SyncInitError,
    [] TableOpenError,
}

pub(crate) fn kind_of_file(file_type: FileType) -> &'static str {
    match file_type {
        FileType::RegularFile => "a regular file",
        FileType::Directory => "a directory",
        FileType::Symlink => "a symbolic link",
        FileType::Fifo => "a pipe",
        FileType::Socket => "a socket",
        FileType::CharacterDevice => "a character device",
        FileType::BlockDevice => "a block device",
        FileType::Unknown => "a file of no known type",
    }
}
