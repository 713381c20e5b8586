//! Calls on the source tree that take some care: by fd, or by a path that leads to an fd's file.

use std::ffi::OsStr;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};

use fuser::Request;
use rustix::fs::{AtFlags, FileType, Gid, Mode, OFlags, Stat, Uid};
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

/// Makes a new file the client's, as if the client had made it.
pub(crate) fn give_to_client(
    req: &Request,
    parent: &Inode,
    new: impl AsFd,
    made: &Stat,
) -> Result<()> {
    let dir = Mode::from_raw_mode(rustix::fs::fstat(parent)?.st_mode);
    // In a setgid directory it has inherited its group.
    let gid = if dir.contains(Mode::SGID) {
        made.st_gid
    } else {
        req.gid()
    };
    if (made.st_uid, made.st_gid) == (req.uid(), gid) {
        return Ok(());
    }
    let (uid, gid) = (Uid::from_raw(req.uid()), Gid::from_raw(gid));
    rustix::fs::chownat(&new, "", Some(uid), Some(gid), AtFlags::EMPTY_PATH)?;
    // chown(2) has cleared these, on everything but directories.
    let mode = Mode::from_raw_mode(made.st_mode);
    let is_dir = FileType::from_raw_mode(made.st_mode) == FileType::Directory;
    if mode.intersects(Mode::SUID | Mode::SGID) && !is_dir {
        rustix::fs::chmod(proc_path(new), mode)?;
    }
    Ok(())
}

pub(crate) fn has_default_acl(dir: &Inode) -> bool {
    rustix::fs::getxattr_query(proc_path(dir), "system.posix_acl_default").is_ok()
}

/// truncate(2), of an fd that cannot be written.
pub(crate) fn truncate(inode: &Inode, size: u64) -> Result<()> {
    let flags = OFlags::WRONLY | OFlags::NONBLOCK | OFlags::CLOEXEC;
    let file = rustix::fs::open(proc_path(inode), flags, Mode::empty())?;
    rustix::fs::ftruncate(&file, size)
}

pub(crate) fn sync(fd: impl AsFd, data_only: bool) -> Result<()> {
    if data_only {
        rustix::fs::fdatasync(fd)
    } else {
        rustix::fs::fsync(fd)
    }
}
