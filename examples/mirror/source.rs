//! Calls on the source tree that take some care: by fd, or by a path that leads to an fd's file.

use std::ffi::OsStr;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};

use rustix::fs::{Mode, OFlags};
use rustix::io::Errno;

use crate::inodes::Inode;

type Result<T> = std::result::Result<T, Errno>;

/// An `O_PATH` fd of the file of that name, be it a symbolic link. It takes no permission on it.
pub(crate) fn path_fd(parent: &Inode, name: &OsStr) -> Result<OwnedFd> {
    let flags = OFlags::PATH | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    rustix::fs::openat(parent, name, flags, Mode::empty())
}

/// An `O_PATH` fd of an open file.
pub(crate) fn path_fd_of(file: &OwnedFd) -> Result<OwnedFd> {
    rustix::fs::open(
        proc_path(file),
        OFlags::PATH | OFlags::CLOEXEC,
        Mode::empty(),
    )
}

/// A path for calls that do not take an `O_PATH` fd. It leads to the open file, wherever that was
/// moved, and ends there even if the file is a symbolic link.
pub(crate) fn proc_path(fd: impl AsFd) -> String {
    format!("/proc/self/fd/{}", fd.as_fd().as_raw_fd())
}

/// The flags for the server's own open: the kernel has dealt with creation, and the path under
/// /proc is a link to follow.
pub(crate) fn server_flags(client: OFlags) -> OFlags {
    let creation = OFlags::CREATE | OFlags::EXCL | OFlags::NOCTTY | OFlags::NOFOLLOW;
    (client - creation) | OFlags::CLOEXEC
}

pub(crate) fn has_default_acl(dir: &Inode) -> bool {
    rustix::fs::getxattr_query(proc_path(dir), "system.posix_acl_default").is_ok()
}

/// An fd to be written, of an inode that no client has open for that.
pub(crate) fn open_for_writing(inode: &Inode) -> Result<OwnedFd> {
    let flags = OFlags::WRONLY | OFlags::NONBLOCK | OFlags::CLOEXEC;
    rustix::fs::open(proc_path(inode), flags, Mode::empty())
}

pub(crate) fn sync(fd: impl AsFd, data_only: bool) -> Result<()> {
    if data_only {
        rustix::fs::fdatasync(fd)
    } else {
        rustix::fs::fsync(fd)
    }
}
