//! The errors: one enum for each kind of failure, one variant for each cause.
//!
//! [`OpenError`] answers a client: it converts to an [`io::Error`] that has the errno as `raw_os_error()`,
//! which is what FUSE libraries send. The errors of other calls convert to an `io::Error` that holds them, for
//! a log. All but [`RegistrarThreadError`] convert to an [`Errno`]. The enums are `non_exhaustive`; their
//! variants are not.

use std::convert::Infallible;
use std::fmt;
use std::io;

pub use rustix::fs::FileType;
pub use rustix::io::Errno;
use thiserror::Error;

use crate::access::Access;
use crate::fopen_flags::FopenFlags;

/// What an error means for the next attempt.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum Scope {
    /// This file cannot be a backing file of this connection; others may. Serve it without passthrough.
    File,
    /// Every attempt on this connection fails like this one until the cause is removed.
    Connection,
    /// Every attempt of the *calling thread* fails like this one. Another thread may succeed, since
    /// capabilities belong to threads.
    Thread,
    /// The same call may succeed when it is made again.
    Transient,
}

/// Why `EPERM`. The kernel has one errno for all of these; a look at the calling thread tells them apart.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Error)]
#[non_exhaustive]
pub enum NotPermitted {
    /// The calling thread is in a user namespace of its own. The kernel asks for `CAP_SYS_ADMIN` in
    /// the *initial* user namespace: rootless containers cannot have passthrough.
    #[error("the thread is not in the initial user namespace, where it needs CAP_SYS_ADMIN")]
    NotInInitialUserNamespace,
    /// The calling thread has no effective `CAP_SYS_ADMIN`. Another thread of the process may have it.
    #[error("the calling thread has no effective CAP_SYS_ADMIN")]
    MissingCapability,
    /// Neither of these, and the device is attached: a security module or seccomp denies it, or passthrough
    /// was not negotiated. That is: INIT is not answered yet, or its reply lacks `FUSE_INIT_EXT` or
    /// `FUSE_PASSTHROUGH`, or has a `max_stack_depth` other than 1 and 2, or has `FUSE_WRITEBACK_CACHE`.
    #[error(
        "passthrough was not negotiated (the INIT reply needs INIT_EXT, PASSTHROUGH, \
         max_stack_depth 1 or 2, and no WRITEBACK_CACHE), or a security policy denies it"
    )]
    NotNegotiatedOrDenied,
    /// Not known: `/proc` is unavailable, or a policy hides the thread's namespace or capabilities, or the
    /// state of the device.
    #[error("cannot determine why: /proc is unavailable or a policy hides it")]
    Undetermined,
}

impl NotPermitted {
    /// User namespaces belong to processes, capabilities to threads. Only a server's own seccomp filter would
    /// deny it to some of its threads.
    fn scope(self) -> Scope {
        match self {
            Self::NotInInitialUserNamespace | Self::NotNegotiatedOrDenied => Scope::Connection,
            Self::MissingCapability | Self::Undetermined => Scope::Thread,
        }
    }
}

/// Why passthrough is unavailable, from [`negotiate`](crate::init::negotiate).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Error)]
#[non_exhaustive]
pub enum NegotiateError {
    /// The kernel does not offer it: older than Linux 6.9, or built without `CONFIG_FUSE_PASSTHROUGH`.
    #[error("the kernel does not offer passthrough (needs Linux 6.9 with CONFIG_FUSE_PASSTHROUGH)")]
    NotOffered,
    /// The server wants `WRITEBACK_CACHE` as well, with which the kernel leaves
    /// passthrough off.
    #[error("passthrough and WRITEBACK_CACHE exclude each other")]
    WritebackCacheWanted,
    /// The server wants `HANDLE_KILLPRIV`, with which set-user-ID and set-group-ID bits survive writes in
    /// passthrough mode unless registrations are made without `CAP_FSETID`, and which spares no request.
    #[error("HANDLE_KILLPRIV is of no use with passthrough; HANDLE_KILLPRIV_V2 is")]
    HandleKillprivWanted,
    /// The server wants `HANDLE_KILLPRIV_V2`, for which it takes a witness, see
    /// [`Negotiated::handle_killpriv_v2`](crate::init::Negotiated::handle_killpriv_v2).
    #[error(
        "HANDLE_KILLPRIV_V2 needs a registrar without CAP_FSETID: use Negotiated::handle_killpriv_v2"
    )]
    HandleKillprivV2Wanted,
    /// This thread could register nothing.
    #[error("registering backing files is not permitted: {0}")]
    NotPermitted(NotPermitted),
}

impl NegotiateError {
    /// `EOPNOTSUPP` for `NotOffered`, `EPERM` for `NotPermitted`, else `EINVAL`. No system call gave them.
    #[must_use]
    pub fn errno(&self) -> Errno {
        match self {
            Self::NotOffered => Errno::OPNOTSUPP,
            Self::WritebackCacheWanted
            | Self::HandleKillprivWanted
            | Self::HandleKillprivV2Wanted => Errno::INVAL,
            Self::NotPermitted(_) => Errno::PERM,
        }
    }
}

/// Changing the capabilities of the calling thread failed, see [`rights`](crate::rights).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Error)]
#[non_exhaustive]
pub enum RightsError {
    /// `capget` or `capset` failed; the thread has what it had. `EPERM`: it is not permitted such a capability,
    /// or a policy denies the call.
    #[error("the thread's capabilities were not changed: {0}")]
    NotChanged(Errno),
    /// `capset` failed when restoring: the thread keeps the changed capabilities.
    #[error("the thread's capabilities could not be restored: {0}")]
    NotRestored(Errno),
}

impl RightsError {
    /// The errno that the kernel gave.
    #[must_use]
    pub fn errno(&self) -> Errno {
        match *self {
            Self::NotChanged(errno) | Self::NotRestored(errno) => errno,
        }
    }
}

/// A [`RegistrarThread`](crate::rights::RegistrarThread) could not be started. `E` is the error of the server's own
/// preparation.
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum RegistrarThreadError<E> {
    /// The thread could not be created.
    #[error("starting the registrar thread failed: {0}")]
    Spawn(io::Error),
    /// The preparation failed.
    #[error("preparing the registrar thread failed: {0}")]
    Prepare(E),
    /// The preparation panicked, or the thread was killed in it.
    #[error("the registrar thread died while it was prepared")]
    Died,
}

impl<E: Into<Box<dyn std::error::Error + Send + Sync>>> From<RegistrarThreadError<E>>
    for io::Error
{
    fn from(error: RegistrarThreadError<E>) -> Self {
        match error {
            RegistrarThreadError::Spawn(error) => error,
            RegistrarThreadError::Prepare(error) => match error.into().downcast() {
                Ok(error) => *error,
                Err(error) => Self::other(error),
            },
            RegistrarThreadError::Died => Self::other(RegistrarThreadError::<Infallible>::Died),
        }
    }
}

/// Registering a backing file, or closing its id, failed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Error)]
#[non_exhaustive]
pub enum BackingError {
    /// `ENOTTY`: the kernel is older than 6.9. ([`FuseDevice`](crate::FuseDevice) has ruled out an
    /// fd that is not a FUSE device.)
    #[error("the kernel does not support FUSE passthrough (needs Linux 6.9)")]
    UnsupportedKernel,
    /// `ENOSYS`: an emulator, such as qemu-user, or a seccomp profile refuses the ioctl.
    #[error("the ioctl is not implemented here: an emulator or a seccomp profile refuses it")]
    Unimplemented,
    /// `EOPNOTSUPP`: the kernel was built without `CONFIG_FUSE_PASSTHROUGH`.
    #[error("the kernel was built without CONFIG_FUSE_PASSTHROUGH")]
    DisabledInKernel,
    /// `EOPNOTSUPP` at registering, 6.9 to 6.11: the file has no `read_iter` or `write_iter`, which
    /// passthrough uses.
    #[error("the file's filesystem does not support passthrough reads and writes")]
    FileNotSupported,
    /// The device is not attached to a connection: it was not mounted yet. `EPERM`, in the first
    /// releases with passthrough `EINVAL`.
    #[error("the device is not attached to a FUSE mount")]
    NotAttached(Errno),
    /// `EPERM`, and why. An id that was to be closed is still registered; a thread that has the capability
    /// can close it.
    #[error("not permitted: {0}")]
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
    /// stacks of these; at any depth, files of `/proc`. On Android also where passthrough was not negotiated.
    #[error("the file's filesystem is stacked too deep for the negotiated max_stack_depth")]
    StackedTooDeep,
    /// `EBADF`, 6.9 to 6.11: an `O_PATH` fd.
    #[error("the backing fd was opened with O_PATH, which needs Linux 6.12")]
    PathOnlyFd,
    /// `EBADF`: the backing fd was closed behind its owner's back.
    #[error("the backing fd is not open")]
    BadFd,
    /// `ENOENT` at closing: the connection has no such id. It was closed before, is another connection's, or
    /// was made up. Trying again is of no use.
    #[error("the connection has no such id")]
    UnknownId,
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
    /// The kernel, or a seccomp supervisor in its place, reported success with an id that is not positive.
    /// Nothing was registered under it.
    #[error("the ioctl returned {0}, which is not a backing id")]
    InvalidId(i32),
    /// The calling thread's capabilities could not be [lowered](crate::rights::Lowered), or restored. Nothing stays
    /// registered, unless closing fails as well.
    #[error(transparent)]
    Rights(#[from] RightsError),
    /// For less than reading and writing, by [`ByAccess`](crate::rights::ByAccess): Landlock does not restrict memfds
    /// and System V shared memory.
    #[error(
        "the kernel cannot enforce read-only or write-only access to this file (Landlock ignores memfds)"
    )]
    NotEnforceable,
    /// The [`Register`](crate::Register) refuses, not the kernel: its policy, its limit, or its end. An id
    /// that was to be closed may still be registered.
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

impl BackingError {
    /// The errno that the kernel gave. Where it gave none: `EPROTO` for [`InvalidId`](Self::InvalidId),
    /// `EOPNOTSUPP` for [`NotEnforceable`](Self::NotEnforceable).
    #[must_use]
    pub fn errno(&self) -> Errno {
        match *self {
            Self::UnsupportedKernel => Errno::NOTTY,
            Self::Unimplemented => Errno::NOSYS,
            Self::DisabledInKernel | Self::FileNotSupported | Self::NotEnforceable => {
                Errno::OPNOTSUPP
            }
            Self::Rights(error) => error.errno(),
            Self::NotAttached(errno)
            | Self::NotRegularFile { errno, .. }
            | Self::Registrar { errno, .. }
            | Self::Other(errno) => errno,
            Self::NotPermitted(_) => Errno::PERM,
            Self::StackedTooDeep => Errno::LOOP,
            Self::PathOnlyFd | Self::BadFd => Errno::BADF,
            Self::UnknownId => Errno::NOENT,
            Self::OutOfMemory => Errno::NOMEM,
            Self::OutOfIds => Errno::NOSPC,
            Self::Interrupted => Errno::INTR,
            Self::InvalidId(_) => Errno::PROTO,
        }
    }

    /// What it means for the next attempt. An unknown cause counts for the file.
    #[must_use]
    pub fn scope(&self) -> Scope {
        match self {
            Self::NotPermitted(why) => why.scope(),
            Self::Registrar { scope, .. } => *scope,
            Self::Rights(error) if error.errno() == Errno::NOMEM => Scope::Transient,
            Self::Rights(_) => Scope::Thread,
            Self::UnsupportedKernel
            | Self::Unimplemented
            | Self::DisabledInKernel
            | Self::NotAttached(_)
            | Self::InvalidId(_) => Scope::Connection,
            Self::FileNotSupported
            | Self::NotRegularFile { .. }
            | Self::StackedTooDeep
            | Self::PathOnlyFd
            | Self::BadFd
            | Self::NotEnforceable
            | Self::UnknownId
            | Self::Other(_) => Scope::File,
            Self::OutOfMemory | Self::OutOfIds | Self::Interrupted => Scope::Transient,
        }
    }
}

/// A call failed, and returns what it was given.
///
/// `?` turns it into an [`io::Error`] that holds the cause. Where `?` is to make another error, say a
/// `Box<dyn Error>`, of one that holds something borrowed, take the cause alone:
/// `map_err(|failed| failed.cause())`.
#[derive(Error)]
#[error("{cause}")]
pub struct Returned<T, E> {
    inner: T,
    cause: E,
}

/// Closing a backing id failed: `T` is a [`BackingId`](crate::BackingId) or a
/// [`BackingFile`](crate::BackingFile).
pub type BackingCloseError<T> = Returned<T, BackingError>;

/// [`FuseDevice::new`](crate::FuseDevice::new) refused an fd.
pub type NotFuseDevice<Fd> = Returned<Fd, DeviceError>;

impl<T, E: Copy> Returned<T, E> {
    /// A [`Register`](crate::Register) gives back with it what it could not close.
    pub fn new(inner: T, cause: E) -> Self {
        Self { inner, cause }
    }

    /// Why it failed.
    pub fn cause(&self) -> E {
        self.cause
    }

    /// That of the cause.
    pub fn errno(&self) -> Errno
    where
        Errno: From<E>,
    {
        self.cause.into()
    }

    /// What the call was given.
    pub fn into_inner(self) -> T {
        self.inner
    }
}

// Without a bound on `T`, so that `unwrap` and `?` work whatever it is.
impl<T, E: fmt::Debug> fmt::Debug for Returned<T, E> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.cause.fmt(f)
    }
}

impl<T, E: Into<Self>> From<Returned<T, E>> for io::Error {
    fn from(error: Returned<T, E>) -> Self {
        error.cause.into()
    }
}

impl<T, E: Into<Self>> From<Returned<T, E>> for Errno {
    fn from(error: Returned<T, E>) -> Self {
        error.cause.into()
    }
}

/// An fd is not a FUSE device, or [`FuseDevice::open`](crate::FuseDevice::open),
/// [`clone_connection`](crate::FuseDevice::clone_connection) or [`sync_init`](crate::FuseDevice::sync_init)
/// failed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Error)]
#[non_exhaustive]
pub enum DeviceError {
    /// `ENOENT` at opening: there is no `/dev/fuse`.
    #[error("there is no /dev/fuse: load the fuse module, or give the container the device")]
    Missing,
    /// `ENODEV` or `ENXIO` at opening: the node is there, the kernel has no driver for it.
    #[error("the kernel has no driver behind /dev/fuse")]
    NoDriver(Errno),
    /// At opening: `EACCES`, by the node's permissions, or `EPERM`, by a device cgroup.
    #[error("access to /dev/fuse is denied: {0}")]
    Denied(Errno),
    /// It is not a character device.
    #[error("not a FUSE device: not a character device (it is {})", kind_of_file(*.0))]
    NotCharacterDevice(FileType),
    /// It is another character device than 10:229.
    #[error("not a FUSE device: it is the character device {major}:{minor}, not 10:229")]
    OtherDevice {
        /// Its major number.
        major: u32,
        /// Its minor number.
        minor: u32,
    },
    /// It is `/dev/fuse`, opened with `O_PATH`.
    #[error("the fd was opened with O_PATH, which permits no ioctl")]
    PathOnly,
    /// It is fd 0, 1 or 2, which safe code can make name another file.
    #[error("the fd is standard input, output or error: duplicate it")]
    StandardStream,
    /// `ENOTTY`: the kernel is older than the ioctl.
    #[error("the kernel does not support this ioctl (needs Linux {needs})")]
    UnsupportedKernel {
        /// The first release that has it: 4.2 to clone, 6.18 for synchronous INIT.
        needs: &'static str,
    },
    /// `ENOSYS`: an emulator or a seccomp profile refuses the ioctl.
    #[error("the ioctl is not implemented here: an emulator or a seccomp profile refuses it")]
    Unimplemented,
    /// The device to be cloned is not attached to a connection. `EPERM`, in older releases `EINVAL`.
    #[error("the device is not attached to a FUSE mount")]
    NotAttached(Errno),
    /// `EINVAL` from `sync_init`: the device is attached to a connection already.
    #[error("the device is attached to a FUSE mount already")]
    AlreadyAttached,
    /// Any other errno.
    #[error("opening or setting up the FUSE device failed: {0}")]
    Other(Errno),
}

impl DeviceError {
    /// The errno that the kernel gave, or would have given for an ioctl on the fd; `EINVAL` for fds 0 to 2.
    #[must_use]
    pub fn errno(&self) -> Errno {
        match *self {
            Self::Missing => Errno::NOENT,
            Self::NotCharacterDevice(_)
            | Self::OtherDevice { .. }
            | Self::UnsupportedKernel { .. } => Errno::NOTTY,
            Self::PathOnly => Errno::BADF,
            Self::Unimplemented => Errno::NOSYS,
            Self::StandardStream | Self::AlreadyAttached => Errno::INVAL,
            Self::NoDriver(errno)
            | Self::Denied(errno)
            | Self::NotAttached(errno)
            | Self::Other(errno) => errno,
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

/// Why an open is in server mode.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Error)]
#[non_exhaustive]
pub enum ServerReason {
    /// The table has no registrar yet: [`BackingTable::attach`](crate::BackingTable::attach).
    #[error("the device is not attached to the table yet")]
    NoRegistrar,
    /// Registering the file failed; or was not tried, since it failed for another one with
    /// [`Scope::Connection`]. See [`BackingTable::reset`](crate::BackingTable::reset).
    #[error("registering a backing file failed: {0}")]
    Refused(BackingError),
    /// The table's limit on ids was reached, and none was idle.
    #[error("the limit on backing ids is reached")]
    LimitReached,
    /// [`BackingTable::serve`](crate::BackingTable::serve).
    #[error("the server's choice")]
    Chosen,
    /// The file is append-only (`chattr +a`, `STATX_ATTR_APPEND`). Passed through, a client could overwrite
    /// it, by a mapping or after clearing `O_APPEND`: Linux before 7.3.4 does not check.
    #[error("the file is append-only, which the kernel does not enforce in passthrough mode")]
    AppendOnly,
    /// `statx` failed, so that it is not known whether the file is append-only.
    #[error("cannot read the file's attributes: {0}")]
    Unreadable(Errno),
    /// There is no fd for [`BackingTable::set_keep_fds`](crate::BackingTable::set_keep_fds), by `EMFILE` mostly.
    #[error("cannot keep an fd with the backing id: {0}")]
    NoFd(Errno),
}

/// An open is refused; answer the client with its [`errno`](Self::errno).
///
/// # Examples
///
/// `?` in a function that returns an [`io::Result`] gives the client the errno:
///
/// ```
/// use fuse_backing::{FopenFlags, Handles, Opened};
///
/// fn open(handles: &Handles, client_flags: i32) -> std::io::Result<Opened> {
///     let file = std::fs::File::open("/dev/null")?; // cannot be written
///     Ok(handles.open(&2, client_flags, file, FopenFlags::empty())?)
/// }
/// let refused = open(&Handles::default(), 2); // O_RDWR
/// assert_eq!(refused.unwrap_err().raw_os_error(), Some(13)); // EACCES
/// ```
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Error)]
#[non_exhaustive]
pub enum OpenError {
    /// `EACCES`: the client asks for more than the server grants.
    #[error("the client asks for {wanted} access, {granted} is granted")]
    AccessExceeded {
        /// What the server grants.
        granted: Access,
        /// What the client's open flags ask for.
        wanted: Access,
    },
    /// `EBUSY`: the inode is open and registered for less than the client asks for, by a registrar that
    /// [enforces](crate::Register::enforces_grant) it. Give the first open the
    /// [`grant`](crate::ServerFile::grant) of all.
    #[error("the client asks for {wanted} access, the open inode is registered for {registered}")]
    GrantExceeded {
        /// What it is registered for.
        registered: Access,
        /// What the client's open flags ask for.
        wanted: Access,
    },
    /// `EIO`: the inode is open and registered with another file than this one, by `st_dev` and `st_ino`.
    /// All opens of an inode have one id, and so one file. A server that gives the number of an inode to
    /// another file says so with [`forget`](crate::BackingTable::forget).
    #[error("the inode is open with another backing file")]
    DifferentFile,
    /// `EPERM`: the server grants writing to an immutable file (`chattr +i`, `STATX_ATTR_IMMUTABLE`), in either
    /// mode. No filesystem opens such a file for writing. Passthrough does, before Linux 7.3.4.
    #[error("the client asks to write to an immutable file")]
    Immutable,
    /// `EBADF`: the server's fd was opened with `O_PATH`, or with access mode 3, which is for ioctls alone.
    #[error("the fd permits neither reading nor writing (O_PATH, or access mode 3)")]
    NoAccess,
    /// `EINVAL`: the kernel refuses these flags in such a reply.
    #[error("the kernel refuses these flags in such a reply: {0:?}")]
    FlagsNotAllowed(FopenFlags),
    /// `fcntl`, `statx` or `fstat` of the server's fd failed.
    #[error("cannot examine the backing file: {0}")]
    Unreadable(Errno),
}

impl OpenError {
    /// The errno to answer the client with.
    #[must_use]
    pub fn errno(&self) -> Errno {
        match *self {
            Self::AccessExceeded { .. } => Errno::ACCESS,
            Self::GrantExceeded { .. } => Errno::BUSY,
            Self::DifferentFile => Errno::IO,
            Self::Immutable => Errno::PERM,
            Self::NoAccess => Errno::BADF,
            Self::FlagsNotAllowed(_) => Errno::INVAL,
            Self::Unreadable(errno) => errno,
        }
    }
}

impl From<OpenError> for io::Error {
    fn from(error: OpenError) -> Self {
        error.errno().into()
    }
}

macro_rules! into_errno {
    ($($error:ty)*) => { $(
        impl From<$error> for Errno {
            fn from(error: $error) -> Self {
                error.errno()
            }
        }
    )* };
}

/// An [`io::Error`] of the errno's kind that holds the error. It cannot have a raw errno as well.
macro_rules! into_io_error {
    ($($error:ty)*) => { $(
        impl From<$error> for io::Error {
            fn from(error: $error) -> Self {
                Self::new(Self::from(error.errno()).kind(), error)
            }
        }
    )* };
}

into_errno! { OpenError BackingError DeviceError NegotiateError RightsError }
into_io_error! { BackingError DeviceError NegotiateError RightsError }

fn kind_of_file(file_type: FileType) -> &'static str {
    match file_type {
        FileType::RegularFile => "a regular file",
        FileType::Directory => "a directory",
        FileType::Symlink => "a symbolic link",
        FileType::Fifo => "a pipe",
        FileType::Socket => "a socket",
        FileType::CharacterDevice => "a character device",
        FileType::BlockDevice => "a block device",
        FileType::Unknown => "a file of unknown type",
    }
}
