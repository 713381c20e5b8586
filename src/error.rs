//! Errors: which one answers a client, which one is for a log, and what to do about each.
//!
//! There is one enum for each kind of failure, and one variant for each cause. A cause that is uncertain is called
//! unknown. The enums are `non_exhaustive`; their variants are not.
//!
//! # Which error goes where
//!
//! | error | from | for |
//! |---|---|---|
//! | [`OpenError`] | [`Handles::open`], [`BackingTable::open`], [`OpenReply`], [`Access::of`] | the client: answer its OPEN with this errno |
//! | [`ServerReason`] | [`BackingTable::on_server_mode`], [`OpenFile::server_reason`] | a log: the open succeeded, without passthrough |
//! | [`BackingError`] | registering a file and closing its id | a log |
//! | [`NegotiateError`], [`NotPermitted`] | [`negotiate`], [`may_register`] | a log: serve without passthrough |
//! | [`DeviceError`] | [`FuseDevice`] | a log |
//! | [`RightsError`], [`RegistrarThreadError`] | [`rights`] | a log |
//!
//! `?` converts an [`OpenError`] into an [`io::Error`] whose `raw_os_error()` is the errno to answer with: FUSE
//! libraries send that. It converts the errors of other calls into an `io::Error` that holds them, for a log: that has
//! their message and the kind of their errno, but no raw errno. ([`RegistrarThreadError`] becomes the error of the
//! thread's start or of its preparation.) [`OpenError`], [`BackingError`], [`DeviceError`], [`NegotiateError`],
//! [`RightsError`] and [`Returned`] also convert into an [`Errno`].
//!
//! # Registering and closing
//!
//! The kernel answers the server with an errno. [`BackingError`] names the cause behind it. These are the errnos with
//! several causes, or with something to do:
//!
//! | errno | error | what to do |
//! |---|---|---|
//! | `EPERM` | [`NotPermitted(MissingCapability)`](NotPermitted::MissingCapability) | Run with `CAP_SYS_ADMIN`. Capabilities belong to threads: call from one that has it. |
//! | | [`NotPermitted(NotInInitialUserNamespace)`](NotPermitted::NotInInitialUserNamespace) | Passthrough is impossible in a rootless container. |
//! | | [`NotAttached`](BackingError::NotAttached) | Mount first. |
//! | | [`NotPermitted(NotNegotiatedOrDenied)`](NotPermitted::NotNegotiatedOrDenied) | Answer INIT with what [`negotiate`] returns; with fuser, call `add_capabilities` *and* `set_max_stack_depth`. If INIT is right, a security module or seccomp denies the call. |
//! | | [`NotPermitted(Undetermined)`](NotPermitted::Undetermined) | Mount `/proc`, and allow the [system calls](crate#system-calls) that tell the causes apart. |
//! | `ENOTTY` | [`UnsupportedKernel`](BackingError::UnsupportedKernel) | Use Linux 6.9 or newer. [`FuseDevice::new`] has ruled out that the fd is another file. |
//! | `EOPNOTSUPP` | [`DisabledInKernel`](BackingError::DisabledInKernel) | Use a kernel with `CONFIG_FUSE_PASSTHROUGH=y`. |
//! | `EBADF` | [`PathOnlyFd`](BackingError::PathOnlyFd) | Use Linux 6.12 or newer for `O_PATH` fds. |
//! | `ELOOP` | [`StackedTooDeep`](BackingError::StackedTooDeep) | Negotiate [depth 2](crate::init::MaxStackDepth::Two) for files on overlayfs. No depth permits files of `/proc`. |
//! | `EISDIR`, `EINVAL`, before 6.12 also `EOPNOTSUPP` | [`NotRegularFile`](BackingError::NotRegularFile) | Serve directories, pipes and devices without passthrough. Do not rely on this error: older kernels do not give it. |
//! | `ENOENT` at closing | [`UnknownId`](BackingError::UnknownId) | Nothing: the id was closed before, or belongs to another connection. |
//!
//! # What to do next
//!
//! [`BackingError::scope`] says what the error means for the next attempt. A [`BackingTable`] acts on it: after
//! [`Scope::Connection`] it registers nothing until [`BackingTable::retry_registrations`]; after any other scope it tries
//! again at the next open that follows the inode's last release.
//!
//! | scope | what to do |
//! |---|---|
//! | [`Scope::File`] | Serve this file without passthrough. |
//! | [`Scope::Thread`] | Let another thread try. |
//! | [`Scope::Connection`] | Stop trying, until the cause is removed. |
//! | [`Scope::Transient`] | Try again. |
//!
//! # A bare `EIO` at a client's open
//!
//! If the kernel does not accept an OPEN reply, the *client* gets a bare `EIO`, and the server gets no error. So look
//! first whether the server has sent the `EIO`: [`OpenError::DifferentFile`] has that errno. If not, the cause is one
//! of these:
//!
//! | cause | what rules it out |
//! |---|---|
//! | The reply has flags beside `FOPEN_PASSTHROUGH` other than `DIRECT_IO`, `NOFLUSH` and `PARALLEL_DIRECT_WRITES`. | [`OpenReply`] |
//! | The id was closed before the reply was written, or right after it. | [`BackingTable`] |
//! | The inode is open with another id, even if that is an id of the same file. | [`BackingTable`] |
//! | The inode has passthrough and plain opens at the same time. (A passthrough open after plain `DIRECT_IO` ones works, as long as no client has mapped such a file `MAP_SHARED`.) | [`BackingTable`], if OPEN and CREATE are both answered from it |
//! | The kernel cannot reopen the backing file as the client asks: it is a running executable, its filesystem does not know `O_DIRECT`, or its mount is read-only. | The server opens the file with the client's flags first, and gets the true errno. |
//! | The registrar's Landlock domain forbids what the client asks for. | Nothing: this is what [`ByAccess`](crate::rights::ByAccess) is for. |
//!
//! [`BackingTable`] cannot know that a number now names another file. Tell it with [`BackingTable::forget`] or
//! [`BackingTable::invalidate`].
//!
//! # When passthrough is unavailable
//!
//! Nothing fails: the table answers opens in server mode, and files are served, slowly. To see why:
//!
//! - [`BackingTable::on_server_mode`] calls the server once for each cause, except its own choice.
//! - [`BackingTable::stats`] counts the opens in server mode by cause, in [`TableStats::served`].
//! - [`BackingTable::list`] shows the cause for each inode.
//!
//! [`Handles::open`]: crate::Handles::open
//! [`BackingTable`]: crate::BackingTable
//! [`BackingTable::open`]: crate::BackingTable::open
//! [`BackingTable::on_server_mode`]: crate::BackingTable::on_server_mode
//! [`BackingTable::stats`]: crate::BackingTable::stats
//! [`BackingTable::list`]: crate::BackingTable::list
//! [`BackingTable::retry_registrations`]: crate::BackingTable::retry_registrations
//! [`BackingTable::forget`]: crate::BackingTable::forget
//! [`BackingTable::invalidate`]: crate::BackingTable::invalidate
//! [`TableStats::served`]: crate::table::TableStats::served
//! [`OpenFile::server_reason`]: crate::OpenFile::server_reason
//! [`OpenReply`]: crate::OpenReply
//! [`FuseDevice`]: crate::FuseDevice
//! [`FuseDevice::new`]: crate::FuseDevice::new
//! [`negotiate`]: crate::init::negotiate
//! [`may_register`]: crate::rights::may_register
//! [`rights`]: crate::rights

use std::convert::Infallible;
use std::fmt;
use std::io;

pub use rustix::fs::FileType;
pub use rustix::io::Errno;
use thiserror::Error;

use crate::access::Access;
use crate::fopen_flags::FopenFlags;

/// What an error means for the next attempt, see [the guide](self#what-to-do-next).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum Scope {
    /// This file cannot be a backing file of this connection; others may. Serve it without passthrough.
    File,
    /// Every attempt on this connection fails like this one until the cause is removed.
    Connection,
    /// Every attempt of the *calling thread* fails like this one. Another thread may succeed:
    /// capabilities belong to threads.
    Thread,
    /// The same call may succeed later.
    Transient,
}

/// Why the kernel answered `EPERM`. It has one errno for all of these causes; the crate looks at the calling thread
/// and the device to tell them apart.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Error)]
#[non_exhaustive]
pub enum NotPermitted {
    /// The calling thread is not in the *initial* user namespace, in which the kernel requires `CAP_SYS_ADMIN`.
    /// Rootless containers cannot have passthrough.
    #[error(
        "the registering thread needs CAP_SYS_ADMIN in the initial user namespace, \
         but is in another one (a rootless container cannot have passthrough)"
    )]
    NotInInitialUserNamespace,
    /// The calling thread has no effective `CAP_SYS_ADMIN`. Another thread of the process may have it.
    #[error(
        "the registering thread has no effective CAP_SYS_ADMIN: \
         run as root, or register and close from a thread that has it"
    )]
    MissingCapability,
    /// The thread has the capability and the device is attached, so one of two causes remains. Either passthrough was
    /// not [negotiated](crate::init): INIT is not answered yet, or its reply lacks `FUSE_INIT_EXT` or
    /// `FUSE_PASSTHROUGH`, has a `max_stack_depth` other than 1 and 2, or has `FUSE_WRITEBACK_CACHE`. Or a security
    /// module or seccomp denies the call.
    #[error(
        "the INIT reply did not turn passthrough on (it needs FUSE_INIT_EXT, FUSE_PASSTHROUGH, \
         max_stack_depth 1 or 2, and no FUSE_WRITEBACK_CACHE), or a security module or seccomp \
         denies the call"
    )]
    NotNegotiatedOrDenied,
    /// The cause is unknown: `/proc` is unavailable, or a policy hides the thread's namespace, its capabilities, or
    /// the state of the device. On Android, whose kernels require no capability, it is always unknown.
    #[error(
        "the cause is unknown: /proc is not mounted, or a security policy hides the state of the \
         thread or the device"
    )]
    Undetermined,
}

impl NotPermitted {
    /// User namespaces belong to processes, capabilities to threads. `NotNegotiatedOrDenied` counts for the
    /// connection: only a server's own seccomp filter would deny the call to some of its threads.
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
    /// The kernel does not offer passthrough: it is older than Linux 6.9, or built without
    /// `CONFIG_FUSE_PASSTHROUGH`.
    #[error(
        "the kernel does not offer passthrough (needs Linux 6.9 or newer, with CONFIG_FUSE_PASSTHROUGH)"
    )]
    NotOffered,
    /// The server wants `FUSE_WRITEBACK_CACHE` as well, with which the kernel leaves passthrough off.
    #[error(
        "the server wants FUSE_WRITEBACK_CACHE, with which the kernel leaves passthrough off: leave it out"
    )]
    WritebackCacheWanted,
    /// The server wants `FUSE_HANDLE_KILLPRIV`. With it, set-user-ID and set-group-ID bits survive writes in
    /// passthrough mode unless files are registered without `CAP_FSETID`, and it spares no request.
    #[error(
        "the server wants FUSE_HANDLE_KILLPRIV, which is of no use with passthrough: \
         leave it out, and call Negotiated::handle_killpriv_v2"
    )]
    HandleKillprivWanted,
    /// The server wants `FUSE_HANDLE_KILLPRIV_V2` among its flags. It must call
    /// [`Negotiated::handle_killpriv_v2`](crate::init::Negotiated::handle_killpriv_v2) instead, which asks for a
    /// registrar without `CAP_FSETID`.
    #[error(
        "the server wants FUSE_HANDLE_KILLPRIV_V2, which needs a registrar without CAP_FSETID: \
         leave it out, and call Negotiated::handle_killpriv_v2"
    )]
    HandleKillprivV2Wanted,
    /// The calling thread may not register backing files.
    #[error("registering backing files is not permitted: {0}")]
    NotPermitted(NotPermitted),
}

impl NegotiateError {
    /// `EOPNOTSUPP` for `NotOffered`, `EPERM` for `NotPermitted`, otherwise `EINVAL`. None of them is from a system
    /// call.
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
    /// capget(2) or capset(2) failed, and the thread's capabilities are unchanged. `EPERM`: the capability is not among
    /// the thread's permitted ones, or a policy denies the call.
    #[error("changing the thread's capabilities failed (are they in its permitted set?): {0}")]
    NotChanged(Errno),
    /// capget(2) or capset(2) failed at restoring: the thread keeps the changed capabilities.
    #[error("restoring the thread's capabilities failed, so it keeps the changed ones: {0}")]
    NotRestored(Errno),
}

impl RightsError {
    /// The errno that the kernel returned.
    #[must_use]
    pub fn errno(&self) -> Errno {
        match *self {
            Self::NotChanged(errno) | Self::NotRestored(errno) => errno,
        }
    }
}

/// Starting a [`RegistrarThread`](crate::rights::RegistrarThread) failed. `E` is the error of the server's own
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
    /// The preparation panicked, or the thread was killed during it.
    #[error("the registrar thread panicked or was killed while it was being prepared")]
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
    /// `ENOTTY`: the kernel is older than 6.9. [`FuseDevice`](crate::FuseDevice) has ruled out an fd that is not a FUSE
    /// device.
    #[error("the kernel does not support FUSE passthrough (needs Linux 6.9 or newer)")]
    UnsupportedKernel,
    /// `ENOSYS`: an emulator, such as qemu-user, or a seccomp profile refuses the ioctl.
    #[error("the ioctl is not implemented here: an emulator or a seccomp profile refuses it")]
    Unimplemented,
    /// `EOPNOTSUPP`: the kernel was built without `CONFIG_FUSE_PASSTHROUGH`.
    #[error("the kernel was built without CONFIG_FUSE_PASSTHROUGH")]
    DisabledInKernel,
    /// `EOPNOTSUPP` at registering, Linux 6.9 to 6.11: the file has no `read_iter` or `write_iter`, which passthrough
    /// uses.
    #[error(
        "passthrough cannot read and write files of this filesystem (no read_iter or write_iter)"
    )]
    FileNotSupported,
    /// The device is not attached to a connection: it was not mounted yet. `EPERM`, in the first releases with
    /// passthrough `EINVAL`.
    #[error("the device is not attached to a FUSE connection: pass it to mount(2) first")]
    NotAttached(Errno),
    /// `EPERM`, and why. If the call was a close, the id is still registered; a thread that has the capability can
    /// close it.
    #[error("registering or closing a backing file is not permitted: {0}")]
    NotPermitted(NotPermitted),
    /// `EISDIR` or `EINVAL`: only regular files can be backing files. Linux 6.12.48, 6.16.8, 6.17 and later refuse all
    /// others; before 6.12 some are refused, with `EOPNOTSUPP`.
    #[error("only a regular file can be a backing file (this is {})", kind_of_file(*.file_type))]
    NotRegularFile {
        /// The type of the file.
        file_type: FileType,
        /// The raw errno.
        errno: Errno,
    },
    /// `ELOOP`: the file's filesystem is stacked as deep as the connection's
    /// [`max_stack_depth`](crate::init::MaxStackDepth), or deeper. Depth 1 excludes files on overlayfs and on another
    /// passthrough mount, depth 2 those on stacks of these. Files of `/proc` are excluded at any depth. Android answers
    /// `ELOOP` also if passthrough was not negotiated.
    #[error(
        "the file's filesystem is stacked too deep for the negotiated max_stack_depth \
         (overlayfs needs 2; files of /proc cannot be passed through)"
    )]
    StackedTooDeep,
    /// `EBADF`, Linux 6.9 to 6.11: the backing fd was opened with `O_PATH`.
    #[error("the backing fd was opened with O_PATH, which needs Linux 6.12 or newer")]
    PathOnlyFd,
    /// `EBADF`: the backing fd was closed behind its owner's back.
    #[error("the backing fd is not open: something else has closed it")]
    BadFd,
    /// `ENOENT` at closing: the connection has no such id. It was closed before, belongs to another connection, or was
    /// made up. Do not try again.
    #[error("the connection has no such backing id (closed before, or of another connection)")]
    UnknownId,
    /// `ENOMEM`: the kernel could not allocate memory.
    #[error("the kernel could not allocate memory: try again")]
    OutOfMemory,
    /// `ENOSPC`: all ids of the connection are in use.
    #[error("all backing ids of the connection are in use: close some first")]
    OutOfIds,
    /// `EINTR`: a signal arrived while the call waited for the mount to complete, see
    /// [`FuseDevice::sync_init`](crate::FuseDevice::sync_init).
    #[error("a signal interrupted the call while it waited for the mount: try again")]
    Interrupted,
    /// The kernel, or a seccomp supervisor that answers for it, reported success with an id that is not positive.
    /// Nothing was registered under that id.
    #[error(
        "the kernel, or a seccomp supervisor, reported success with {0}, which is not a backing id"
    )]
    InvalidId(i32),
    /// [Lowering](crate::rights::Lowered) or restoring the calling thread's capabilities failed. Nothing stays
    /// registered, unless closing fails as well.
    #[error(transparent)]
    Rights(#[from] RightsError),
    /// [`ByAccess`](crate::rights::ByAccess) was asked to register a memfd or System V shared memory for less than
    /// reading and writing. Landlock does not restrict these.
    #[error(
        "the kernel cannot enforce read-only or write-only access to this file \
         (Landlock ignores memfds and System V shared memory)"
    )]
    NotEnforceable,
    /// The [registrar](crate::Register) refused, not the kernel: because of its policy or its limit, or because it has
    /// ended. If the call was a close, the id may still be registered.
    #[error("the registrar, not the kernel, refused or failed: {errno}")]
    Registrar {
        /// The registrar's reason.
        errno: Errno,
        /// What it means for the next attempt.
        scope: Scope,
    },
    /// The kernel returned an errno whose cause is unknown.
    #[error("the kernel returned an error of unknown cause: {0}")]
    Other(Errno),
}

impl BackingError {
    /// The errno that the kernel returned, or that the [`Registrar`](Self::Registrar) gave. The kernel returns none for
    /// [`InvalidId`](Self::InvalidId), which is `EPROTO` here, and [`NotEnforceable`](Self::NotEnforceable), which is
    /// `EOPNOTSUPP`.
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

    /// What the error means for the next attempt. An unknown cause is taken for the file's.
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

/// The error of a call that gives back what it was given.
///
/// `?` turns it into an [`io::Error`] that holds the cause. If `T` borrows and `?` must make another error, such as
/// `Box<dyn Error>`, keep the cause alone: `map_err(|failed| failed.cause())`.
#[derive(Error)]
#[error("{cause}")]
pub struct Returned<T, E> {
    inner: T,
    cause: E,
}

/// Closing a backing id failed. `T` is a [`BackingId`](crate::BackingId) or a [`BackingFile`](crate::BackingFile).
pub type BackingCloseError<T> = Returned<T, BackingError>;

/// [`FuseDevice::new`](crate::FuseDevice::new) refused an fd.
pub type NotFuseDevice<Fd> = Returned<Fd, DeviceError>;

impl<T, E: Copy> Returned<T, E> {
    /// For an implementation of [`Register`](crate::Register), which gives back the id that it could not close.
    pub fn new(inner: T, cause: E) -> Self {
        Self { inner, cause }
    }

    /// Why the call failed.
    pub fn cause(&self) -> E {
        self.cause
    }

    /// The errno of the cause.
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

// Has no bound on `T`, so that `unwrap` and `?` work for every `T`.
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

/// The fd is not a FUSE device, or [`FuseDevice::open`](crate::FuseDevice::open),
/// [`clone_connection`](crate::FuseDevice::clone_connection) or [`sync_init`](crate::FuseDevice::sync_init) failed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Error)]
#[non_exhaustive]
pub enum DeviceError {
    /// `ENOENT` at opening: there is no `/dev/fuse`.
    #[error("there is no /dev/fuse: load the fuse module, or give the container the device")]
    Missing,
    /// `ENODEV` or `ENXIO` at opening: the node exists, but the kernel has no driver for it.
    #[error("the kernel has no driver behind /dev/fuse: load the fuse module")]
    NoDriver(Errno),
    /// The node's permissions (`EACCES`) or a device cgroup (`EPERM`) deny opening it.
    #[error(
        "opening /dev/fuse is denied, by its permissions, a nodev mount or a device cgroup: {0}"
    )]
    Denied(Errno),
    /// The fd is not a character device.
    #[error("the fd is not a FUSE device: it is {}", kind_of_file(*.0))]
    NotCharacterDevice(FileType),
    /// The fd is another character device than 10:229.
    #[error("the fd is not a FUSE device: it is the character device {major}:{minor}, not 10:229")]
    OtherDevice {
        /// The device's major number.
        major: u32,
        /// The device's minor number.
        minor: u32,
    },
    /// The fd is `/dev/fuse`, opened with `O_PATH`.
    #[error("the FUSE device was opened with O_PATH, which permits no ioctl: use O_RDWR")]
    PathOnly,
    /// The fd is 0, 1 or 2, which safe code can redirect to another file.
    #[error(
        "the fd is 0, 1 or 2 (standard input, output or error), which safe code can redirect: pass a duplicate"
    )]
    StandardStream,
    /// `ENOTTY`: the kernel is older than the ioctl.
    #[error("the kernel does not support this ioctl of /dev/fuse (needs Linux {needs} or newer)")]
    UnsupportedKernel {
        /// The first release that has it: 4.2 to clone, 6.18 for synchronous INIT.
        needs: &'static str,
    },
    /// `ENOSYS`: an emulator or a seccomp profile refuses the ioctl.
    #[error("the ioctl is not implemented here: an emulator or a seccomp profile refuses it")]
    Unimplemented,
    /// The device to be cloned is not attached to a connection: it was not mounted yet. `EPERM`, in older releases
    /// `EINVAL`.
    #[error("the device is not attached to a FUSE connection: pass it to mount(2) first")]
    NotAttached(Errno),
    /// `EINVAL` from `sync_init`: the device is attached to a connection already.
    #[error("the device is attached to a FUSE connection already: call sync_init before mount(2)")]
    AlreadyAttached,
    /// Any other errno.
    #[error("opening or setting up the FUSE device failed: {0}")]
    Other(Errno),
}

impl DeviceError {
    /// The errno that the kernel returned, or would have returned for an ioctl on the fd; `EINVAL` for fds 0 to 2.
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

    /// What the error means for the next attempt.
    #[must_use]
    pub fn scope(&self) -> Scope {
        match self.errno() {
            Errno::INTR | Errno::MFILE | Errno::NFILE | Errno::NOMEM => Scope::Transient,
            _ => Scope::Connection,
        }
    }
}

/// Why an open is in server mode. The open itself succeeded; the reason is for a log, see
/// [the guide](self#when-passthrough-is-unavailable).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Error)]
#[non_exhaustive]
pub enum ServerReason {
    /// The table has no registrar: call [`BackingTable::attach`](crate::BackingTable::attach).
    #[error("the table has no registrar yet: call BackingTable::attach")]
    NoRegistrar,
    /// Registering the file failed. Or it was not tried, because registering another file failed with
    /// [`Scope::Connection`]: [`BackingTable::retry_registrations`](crate::BackingTable::retry_registrations) makes the
    /// table try again.
    #[error("passthrough failed: {0}")]
    Refused(BackingError),
    /// The table's [limit](crate::BackingTable::set_limit) on ids was reached, and none was idle.
    #[error("the table's limit on backing ids is reached: raise it with BackingTable::set_limit")]
    LimitReached,
    /// The server called [`BackingTable::serve`](crate::BackingTable::serve).
    #[error("the server chose to read and write the file itself")]
    Chosen,
    /// The file is append-only (`chattr +a`, `STATX_ATTR_APPEND`). In passthrough mode a client could overwrite it, by
    /// a mapping or after clearing `O_APPEND`: Linux before 7.3.4 does not check.
    #[error(
        "the file is append-only, which not every kernel enforces in passthrough mode (Linux does from 7.3.4 on)"
    )]
    AppendOnly,
    /// statx(2) failed, so it is unknown whether the file is append-only.
    #[error("cannot tell whether the file is append-only, because statx failed: {0}")]
    Unreadable(Errno),
    /// [`BackingTable::set_keep_fds`](crate::BackingTable::set_keep_fds) asks for an fd, and there is none: `EMFILE` in
    /// most cases.
    #[error("cannot keep an fd with the backing id (BackingTable::set_keep_fds): {0}")]
    NoFd(Errno),
}

/// An open was refused. Answer the client with its [`errno`](Self::errno).
///
/// # Examples
///
/// `?` in a function that returns an [`io::Result`] keeps the errno for the client:
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
    #[error("the client asks for {wanted} access, but the server grants {granted} access")]
    AccessExceeded {
        /// What the server grants.
        granted: Access,
        /// What the client's open flags ask for.
        wanted: Access,
    },
    /// `EBUSY`: the inode is open, and was registered for less than the client asks for by a registrar that
    /// [enforces](crate::Register::enforces_grant) its grant. Give the first open a
    /// [`grant`](crate::ServerFile::grant) that covers all later ones.
    #[error(
        "the client asks for {wanted} access, but the open inode is registered for {registered} access \
         (set ServerFile::grant at its first open)"
    )]
    GrantExceeded {
        /// What the inode is registered for.
        registered: Access,
        /// What the client's open flags ask for.
        wanted: Access,
    },
    /// `EIO`: the inode is open, and registered with another file, by `st_dev` and `st_ino`. All opens of an inode have
    /// one id, and so one file. Call [`BackingTable::forget`](crate::BackingTable::forget) before giving the number of
    /// an inode to another file. [`adopt`](crate::BackingTable::adopt) also returns this for an inode that is open with
    /// another id or in server mode.
    #[error(
        "the inode is open with another backing file or id, or cannot be adopted in server mode \
         (call BackingTable::forget before its number gets a new file)"
    )]
    DifferentFile,
    /// `EPERM`, in either mode: the client asks to write to an immutable file (`chattr +i`, `STATX_ATTR_IMMUTABLE`). No
    /// filesystem opens such a file for writing. Passthrough does, before Linux 7.3.4.
    #[error("the client asks to write to an immutable file")]
    Immutable,
    /// `EBADF`: the server's fd was opened with `O_PATH`, or with access mode 3, which permits ioctls alone.
    #[error("the server's fd permits neither reading nor writing (O_PATH, or access mode 3)")]
    NoAccess,
    /// `EINVAL`: the kernel refuses these flags in a reply of this mode, see
    /// [`OpenReply::passthrough`](crate::OpenReply::passthrough) and [`OpenReply::server`](crate::OpenReply::server).
    #[error(
        "the kernel refuses these flags in such an OPEN or CREATE reply (see OpenReply): {0:?}"
    )]
    FlagsNotAllowed(FopenFlags),
    /// fcntl(2) of the server's fd failed, or both statx(2) and fstat(2) did.
    #[error("cannot examine the server's fd, because fcntl or fstat failed: {0}")]
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

/// Makes an [`io::Error`] of the errno's kind that holds the error. Such an `io::Error` has no raw errno.
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
