//! Safe bindings to the `/dev/fuse` ioctls behind FUSE passthrough.
//!
//! With *passthrough* (Linux 6.9) the kernel reads and writes a file in place of a FUSE server. The server
//! registers a *backing file* with its connection, gets a *backing id*, and answers OPEN with that id. From then
//! on the kernel reads and writes the backing file itself. The server still sees OPEN, RELEASE and every request
//! that is not I/O.
//!
//! This crate serves no filesystem and depends on no FUSE library. All it needs is the device fd.
//!
//! | guide | about |
//! |---|---|
//! | this page | [the life of a passthrough file](#life-of-a-passthrough-file), from INIT to unmount |
//! | [`init`] | negotiation: the INIT reply that turns passthrough on |
//! | [`table`] | the table and handles: what to call in OPEN, CREATE and RELEASE; limits; hand-over |
//! | [`rights`] | whose rights passthrough I/O has, and how to lower them |
//! | [`error`] | errors: one variant for each cause, and what follows from it |
//! | [`register`] | testing a server without root, and other registrars |
//!
//! In the repository, `examples/hello.rs` is a server in fewer than 90 lines and `examples/mirror.rs` a whole
//! filesystem, both on [fuser].
//!
//! # Life of a passthrough file
//!
//! 1. **INIT.** [`init::negotiate`] works out the reply that turns passthrough on, or says why passthrough is
//!    unavailable. The kernel silently accepts an unusable reply, and refuses every registration later.
//! 2. **The device.** [`FuseDevice`] takes the device fd that was given to mount(2), which it owns, shares or borrows.
//!    It refuses any file that is not `/dev/fuse`.
//! 3. **OPEN and CREATE.** The server opens its backing file and passes it to its [`Handles`]. They register the
//!    file, or share the id that is registered for this inode; keep the file under a new file handle; and return
//!    the reply. The kernel looks the id up only when it handles the reply.
//! 4. **RELEASE.** [`Handles::release`] takes the handle back. The last release of an inode closes its backing id.
//!    A client's mappings still reach the backing file after that.
//! 5. **Unmount.** Drop the [`Handles`] and the device. An id that was not closed stays registered until the mount
//!    *and* every fd of its connection are gone, including a duplicate in a helper process.
//!
//! A server that forks or hands its device over to a successor must see to it that each id is closed once: see
//! [fork and hand-over](table#fork-and-hand-over).
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
//! # What to know about the kernel
//!
//! - **It ignores the access mode of the registered fd.** A client that opens the FUSE file for writing writes to a
//!   backing file that was registered read-only. The table and [`OpenReply`] compare the client's flags with the
//!   [`Access`] that the server grants.
//! - **It reads and writes with the rights of the registering thread**, usually root's. Set-user-ID bits can survive a
//!   stranger's write, and clients can fill root's reserved blocks. [`rights`] lowers these rights.
//! - **It accepts one mode for an inode at a time.** It answers a mixture of replies with a bare `EIO` to the client.
//!   So CREATE must go through the table too. See [one id and one mode](table#one-id-and-one-mode-for-each-inode).
//! - **It keeps registered files open as they are**, with their write access, locks and leases, until the id is
//!   closed. The table registers [an `O_PATH` fd](table#what-is-registered), which holds none of these.
//! - **It does not enforce append-only and immutable** before Linux 7.3.4; some filesystems check immutable at each
//!   write. The table answers opens of append-only files in server mode, and refuses to open immutable ones for
//!   writing.
//! - **It needs the id after the reply was written.** Closing the id right after the reply races with the client's
//!   open.
//! - **It pins the file and the mount that the file is on** until the id is closed or the connection ends, and while a
//!   client has the file open or mapped through the id.
//! - **It does not account for ids.** Neither `RLIMIT_NOFILE` nor lsof knows of them, unless the table
//!   [keeps the fds](BackingTable::set_keep_fds).
//! - **It requires `CAP_SYS_ADMIN` for closing too**, not only for registering.
//!
//! # Errors
//!
//! [`OpenError`](error::OpenError) answers a client, and becomes a [`std::io::Error`] with the errno as its
//! `raw_os_error()`. All other errors become one that keeps the message, for a log. A cause that is uncertain is
//! reported as unknown. [`Errno`](error::Errno) and [`FileType`](error::FileType) are rustix's.
//!
//! # System calls
//!
//! [`Handles::open`] and [`BackingTable::open`] make one fcntl(2) and one statx(2) of the server's fd. If the
//! [`ServerFile`] already says what these calls would tell, further opens of an open inode make neither. If statx
//! is denied, they make an fstat(2) and pass nothing through. The first open of an inode also makes an
//! `open_tree(2)`, for an `O_PATH` fd, unless the server provides one, and a statx(2) of that fd.
//!
//! Other calls make these. [`FuseDevice::new`] makes an fstat(2) and an fcntl(2), and a new table a getrlimit(2).
//! [`ServerFile::path_fd`] and [`BackingTable::set_keep_fds`] make an fcntl(2) of an fd.
//! [`Lowered`](rights::Lowered) makes capget(2) and capset(2), and reads `/proc/thread-self/status`.
//! [`RegistrarThread`](rights::RegistrarThread) makes an fcntl(2), and a kill(2) with signal 0.
//! [`ByAccess`](rights::ByAccess) makes one `memfd_create(2)`, and a statx(2) for each registration for less than
//! reading and writing.
//!
//! After an ioctl has failed, the crate makes further system calls to find the cause. A seccomp filter should allow
//! them:
//!
//! - write(2) of one byte to the device, which the kernel refuses;
//! - capget(2);
//! - statfs(2) and stat(2) of `/proc/thread-self/ns/user`;
//! - fstat(2) of the backing fd, and fcntl(2) of both fds;
//! - after `EOPNOTSUPP`, `BACKING_CLOSE` of id 0, which never exists.
//!
//! If the filter answers one of them with an errno, the cause is reported as unknown. There is one exception: if it
//! answers the write(2) with `EPERM`, the device looks as if it were not mounted. [`init::negotiate`] examines the
//! thread in the same way.
//!
//! # Android
//!
//! The crate builds for Android too. What follows is from the source of Android's kernels; nothing was run there.
//!
//! - Kernels before 6.9 have a passthrough of their own, with other ioctls. Every registration fails with
//!   [`UnsupportedKernel`](error::BackingError::UnsupportedKernel).
//! - Kernels from 6.12 on do not require `CAP_SYS_ADMIN`: `SELinux` decides who may register. If passthrough was not
//!   negotiated, every registration fails with [`StackedTooDeep`](error::BackingError::StackedTooDeep). These kernels
//!   accept `WRITEBACK_CACHE` beside passthrough; [`init::negotiate`] refuses it all the same.
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

/// Compiles the README's examples as doctests.
#[cfg(doctest)]
#[doc = include_str!("../README.md")]
struct Readme;
