//! Safe bindings to the `/dev/fuse` ioctls behind FUSE passthrough.
//!
//! With *passthrough* (Linux 6.9) a FUSE server hands a file to the kernel: it registers a *backing
//! file* with its connection, gets a *backing id*, and answers OPEN with that id. From then on the
//! kernel reads and writes the backing file itself; the server sees OPEN, RELEASE and whatever is
//! not I/O.
//!
//! This crate serves no filesystem and depends on no FUSE library: whoever has the device fd can
//! use it.
//!
//! # The way of a file
//!
//! 1. **INIT.** [`negotiate`] works out the reply that turns passthrough on, or says why there is
//!    none. The kernel accepts a reply that cannot work without a word, and refuses every registration
//!    later.
//! 2. **A device.** [`FuseDevice`] takes the fd that was mounted, owned, shared or borrowed, and refuses
//!    what is not `/dev/fuse`.
//! 3. **OPEN and CREATE.** The server opens its backing file and hands it to a [`BackingTable`], which
//!    registers it or shares what is registered for this inode. The [`OpenFile`] that comes back has
//!    the reply, and is kept until RELEASE. CREATE opens too: if it is answered without the table, and
//!    without `DIRECT_IO`, opening the file through the table while that handle is open gives the client
//!    `EIO`.
//!
//! ```no_run
//! use fuse_backing::{BackingTable, FuseDevice, OpenFlags, ServerFile};
//! use std::fs::File;
//! # fn send(_: &[u8]) {}
//! # fn serve(mounted_device: std::os::fd::OwnedFd) -> Result<(), Box<dyn std::error::Error>> {
//!
//! let table = BackingTable::new(FuseDevice::new(mounted_device)?);
//!
//! // OPEN of inode 2, with the client's flags; here O_RDONLY.
//! let client_flags = 0;
//! let file = File::open("/srv/data/file")?;
//! let open = table.open(&2, client_flags, ServerFile::of(&file)?)?;
//! let fh = 1; // under which `open` is kept
//! send(&open.reply(OpenFlags::empty())?.to_fuse_open_out(fh).to_bytes());
//!
//! // RELEASE of that handle.
//! drop(open);
//! # Ok(()) }
//! ```
//!
//! The table asks a [`Register`] for ids. The device is one; a test of a server has one of its own, and
//! needs no root.
//!
//! A server with a bookkeeping of its own takes the parts: [`FuseDevice::backing_open`] gives a
//! [`BackingId`], a token to be closed once; [`BackingFile`] is the guard that closes it on drop;
//! [`OpenReply`] builds the two fields of the reply, and refuses what the kernel would answer with a
//! bare `EIO` to the client.
//!
//! The repository's `examples/mirror.rs` is a whole filesystem on [fuser].
//!
//! # What the kernel does not do for you
//!
//! - **It ignores the access mode of the fd that is registered.** A client that opens the FUSE file
//!   for writing writes to a backing file that was registered read-only. With an [`Access`] the table
//!   and [`OpenReply`] hold the client's flags against what the server grants.
//! - **It accepts one mode for an inode at a time**: every open of it is answered with passthrough
//!   and the same id, or none is, until the last open was released. Anything else gives `EIO`, at once
//!   or later. There is one exception, which the table does not use: a passthrough open after plain
//!   `DIRECT_IO` ones is accepted and all of them work, unless a client has mapped such a file
//!   `MAP_SHARED`, which the server cannot see.
//! - **It keeps open what was registered**: an fd that can write, and its locks and leases, until the id
//!   is closed. The table registers an `O_PATH` fd, which is none of that.
//! - **It does not keep to append-only**, before Linux 7.3.4: a client overwrites such a file that is passed
//!   through. The table serves it.
//! - **It needs the id after the reply was written.** An id that is closed right after the reply
//!   races with the client's open.
//! - **It keeps the file, and the mount that it is on, busy** until the id is closed, or the FUSE
//!   mount and every fd of its connection are gone, duplicates in other processes among them. A file or
//!   mapping that a client has open through the id keeps it busy too, even after the id is closed.
//! - **It does not account for ids**: neither `RLIMIT_NOFILE` nor lsof knows of them, unless the table
//!   [keeps the fds](BackingTable::set_keep_fds).
//! - **It asks for `CAP_SYS_ADMIN` again at closing.** A server that drops it closes nothing.
//!
//! # Errors
//!
//! Every operation has an error of its own, with a variant for each cause: `EPERM` alone has five.
//! `errno()` is what the kernel said, or what to answer the client. Those of ioctls have a `scope()`, a
//! [`Scope`]: what it means for the next attempt. What the crate is not certain of it calls unknown.
//!
//! All of them become a [`std::io::Error`] that keeps the message, for a log. Its `raw_os_error()` is
//! `None`: for a reply to a client take `errno()`.
//!
//! At each open the table makes a statx(2) of the server's fd. Where that is denied it makes an fstat(2), and
//! passes nothing through. At the first open of an inode it also makes an `open_tree(2)`, for an `O_PATH` fd,
//! unless it is given one, and a statx(2) of that.
//!
//! When an ioctl has failed, and only then, the crate makes further system calls to find out why. A
//! seccomp filter should let them through: write(2) of one byte to the device, which the kernel refuses;
//! capget(2); statfs(2) and stat(2) of `/proc/thread-self/ns/user`; fstat(2) of the backing fd; fcntl(2)
//! of both fds; and, after `EOPNOTSUPP`, `BACKING_CLOSE` of id 0, which never exists. If the filter
//! answers one of them with an errno, the cause is reported as unknown; but a write(2) answered with
//! `EPERM` looks like a device that is not mounted. [`negotiate`] looks at the thread in the same way.
//!
//! # ABI
//!
//! Layouts and ioctl numbers are asserted at compile time, for every target, against facts measured
//! on running kernels. With `FUSE_BACKING_UAPI_CHECK=require` in the environment the build also
//! compares them with `<linux/fuse.h>`; see the README. Left unset, as for dependents, no C compiler
//! is asked for.
//!
//! # Android
//!
//! Built for Android too. Its kernels before 6.9 have a passthrough of their own, with other
//! ioctls; there every registration fails with [`BackingOpenError::UnsupportedKernel`].
//!
//! Its kernels from 6.12 on do not ask for `CAP_SYS_ADMIN`, neither to register nor to close: `SELinux`
//! decides who may. Nor do they check at registration that passthrough was negotiated; where it was
//! not, every registration fails with [`StackedTooDeep`](BackingOpenError::StackedTooDeep). They also
//! accept `WRITEBACK_CACHE` beside passthrough, which [`negotiate`] refuses all the same. Read in their
//! source; nothing was run there.
//!
//! [fuser]: https://docs.rs/fuser

#![warn(clippy::pedantic)]

#[cfg(not(any(target_os = "linux", target_os = "android")))]
compile_error!(
    "fuse-backing binds ioctls of Linux: depend on it for \
     cfg(any(target_os = \"linux\", target_os = \"android\")) only"
);

mod access;
mod backing;
mod device;
mod diagnose;
mod error;
mod file;
mod id;
mod init;
mod ioctl;
#[cfg(test)]
#[cfg(fuse_backing_modelled)]
mod model;
mod register;
mod reply;
mod sync;
mod table;
pub mod uapi;

pub use access::{Access, AccessError};
pub use backing::BackingFile;
pub use device::{DeviceFd, FuseDevice};
pub use error::{
    BackingCloseCause, BackingCloseError, BackingOpenError, Busy, CloneConnectionError,
    DeviceOpenError, NotFuseDevice, NotFuseDeviceReason, NotPermitted, Scope, ServerReason,
    SyncInitError, TableOpenError,
};
pub use file::ServerFile;
pub use id::BackingId;
pub use init::{InitFlags, MaxStackDepth, NegotiateError, Negotiated, negotiate};
pub use register::Register;
pub use reply::{OpenFlags, OpenReply, OpenReplyError};
pub use rustix::{fs::FileType, io::Errno};
pub use table::{BackingTable, Entry, Listing, OpenFile, TableStats};

/// The README's examples are compiled with the documentation's.
#[cfg(doctest)]
#[doc = include_str!("../README.md")]
struct Readme;
