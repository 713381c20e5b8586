//! Safe bindings to the `/dev/fuse` ioctls behind FUSE passthrough.
//!
//! With *passthrough* (Linux 6.9) a FUSE server hands a file to the kernel: it registers a *backing
//! file* with its connection, gets a *backing id*, and answers OPEN with that id. From then on the
//! kernel reads and writes the backing file itself; the server sees OPEN, RELEASE and whatever is
//! not I/O.
//!
//! This crate serves no filesystem and depends on no FUSE library: all it needs is the device fd.
//!
//! # Life of a passthrough file
//!
//! 1. **INIT.** [`init::negotiate`] works out the reply that turns passthrough on, or says why it is
//!    unavailable. The kernel silently accepts an unusable reply, and refuses every registration later.
//! 2. **A device.** [`FuseDevice`] takes the fd that was mounted, owned, shared or borrowed, and refuses
//!    what is not `/dev/fuse`.
//! 3. **OPEN and CREATE.** The server opens its backing file and hands it to its [`Handles`], which
//!    register it or share what is registered for this inode, keep it under a new file handle, and return the
//!    reply.
//! 4. **RELEASE.** [`Handles::release`] gives it back. The last one of the inode closes the backing id.
//!
//! ```no_run
//! use fuse_backing::{BackingTable, FopenFlags, FuseDevice, Handles};
//! use std::{fs::File, io, os::fd::OwnedFd};
//! # fn send(_: &[u8]) {}
//!
//! fn serve(mounted_device: OwnedFd) -> io::Result<()> {
//!     let handles = Handles::new(BackingTable::new(FuseDevice::new(mounted_device)?));
//!     handles.table().on_server_mode(|why| eprintln!("serving without passthrough: {why}"));
//!
//!     // OPEN of inode 2, with the client's flags; here O_RDONLY.
//!     let opened = handles.open(&2, 0, File::open("/srv/data/file")?, FopenFlags::empty())?;
//!     send(&opened.to_fuse_open_out().to_bytes());
//!
//!     // RELEASE of that handle.
//!     drop(handles.release(opened.fh));
//!     Ok(())
//! }
//! ```
//!
//! A server that keeps its open files itself takes a [`BackingTable`]. It asks a [`Register`] for ids: the
//! device is one; a test of a server has one of its own, and needs no root. One that keeps its ids as well
//! takes the parts: [`FuseDevice::backing_open`] gives a
//! [`BackingId`], a token to be closed once; [`BackingFile`] is the guard that closes it on drop;
//! [`OpenReply`] builds the two fields of the reply, and refuses what the kernel would answer with a
//! bare `EIO` to the client.
//!
//! The repository's `examples/hello.rs` is a server in 100 lines, `examples/mirror.rs` a whole filesystem, both
//! on [fuser].
//!
//! # What the kernel does not do for you
//!
//! - **It ignores the access mode of the fd that is registered**: a client that opens the FUSE file
//!   for writing writes to a backing file that was registered read-only. With an [`Access`] the table
//!   and [`OpenReply`] compare the client's flags with what the server grants.
//! - **It reads and writes with the rights of the thread that registered**, root's most often: set-user-ID bits can
//!   survive a stranger's write, and root's reserved blocks are open. [`rights`] lowers them.
//! - **It accepts one mode for an inode at a time**: every open of it is answered with passthrough
//!   and the same id, or none is, until the last open was released. So CREATE goes through the table too.
//! - **It keeps open what was registered**: an fd that can write, and its locks and leases, until the id
//!   is closed. The table registers an `O_PATH` fd, which is none of that.
//! - **It does not enforce append-only and immutable** before Linux 7.3.4; some filesystems check immutable at each
//!   write. The table serves append-only files, and does not open immutable ones for writing.
//! - **It needs the id after the reply was written.** Closing it right then races with the client's open.
//! - **It keeps the file, and the mount that it is on, busy** until the id is closed, or the FUSE
//!   mount and every fd of its connection are gone; and while a client has it open or mapped through the id.
//! - **It does not account for ids**: neither `RLIMIT_NOFILE` nor lsof knows of them, unless the table
//!   [keeps the fds](BackingTable::set_keep_fds).
//! - **It asks for `CAP_SYS_ADMIN` again at closing.**
//!
//! # Errors
//!
//! [`OpenError`](error::OpenError) answers a client, and becomes a [`std::io::Error`] with that
//! `raw_os_error()`. All other errors become one that keeps the message, for a log. The module [`error`] has
//! a variant for each cause; a cause that is uncertain is called unknown. [`Errno`](error::Errno) and
//! [`FileType`](error::FileType) are rustix's.
//!
//! # System calls
//!
//! [`Handles::open`] and [`BackingTable::open`] make an fcntl(2) and a statx(2) of the server's fd. Where
//! [`ServerFile`] says what these would tell, further opens of an open inode make none. Where statx is denied
//! they make an fstat(2), and pass nothing through. At the first open of an inode they also make an
//! `open_tree(2)`, for an `O_PATH` fd, unless they are given one, and a statx(2) of that.
//!
//! When an ioctl has failed, and only then, the crate makes further system calls to find out why. A
//! seccomp filter should let them through: write(2) of one byte to the device, which the kernel refuses;
//! capget(2); statfs(2) and stat(2) of `/proc/thread-self/ns/user`; fstat(2) of the backing fd; fcntl(2)
//! of both fds; and, after `EOPNOTSUPP`, `BACKING_CLOSE` of id 0, which never exists. If the filter
//! answers one of them with an errno, the cause is reported as unknown; but a write(2) answered with
//! `EPERM` looks like a device that is not mounted. [`init::negotiate`] looks at the thread in the same way.
//!
//! # Android
//!
//! Built for Android too. Its kernels before 6.9 have a passthrough of their own, with other
//! ioctls; there every registration fails with [`UnsupportedKernel`](error::BackingError::UnsupportedKernel).
//! Those from 6.12 on do not ask for `CAP_SYS_ADMIN`: `SELinux` decides who may. Where passthrough was not
//! negotiated, every registration fails with [`StackedTooDeep`](error::BackingError::StackedTooDeep). They
//! accept `WRITEBACK_CACHE` beside passthrough, which [`init::negotiate`] refuses all the same. Read in their
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
mod client_flags;
mod device;
mod diagnose;
pub mod error;
mod file;
mod fopen_flags;
mod handles;
mod id;
pub mod init;
mod ioctl;
#[cfg(test)]
#[cfg(fuse_backing_modelled)]
mod model;
pub mod register;
mod reply;
pub mod rights;
mod sync;
pub mod table;
pub mod uapi;

pub use access::Access;
pub use backing::BackingFile;
pub use client_flags::ClientFlags;
pub use device::{DeviceFd, FuseDevice};
pub use file::ServerFile;
pub use fopen_flags::FopenFlags;
pub use handles::{Handle, Handles, Opened};
pub use id::BackingId;
#[doc(inline)]
pub use register::Register;
pub use reply::OpenReply;
#[doc(inline)]
pub use table::{BackingTable, OpenFile};

/// The README's examples are compiled with the documentation's.
#[cfg(doctest)]
#[doc = include_str!("../README.md")]
struct Readme;
