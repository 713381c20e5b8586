//! Calls on the source tree that need care: by fd, or by a path to the file of an fd.

use std::ffi::OsStr;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};

use rustix::fs::{AtFlags, Mode, OFlags, StatVfsMountFlags, Statx, StatxFlags, fstatvfs, statx};
use rustix::io::Errno;
use rustix::path::Arg;

use crate::inodes::Inode;

type Result<T> = std::result::Result<T, Errno>;

/// An `O_PATH` fd of the file `name`, even if it is a symbolic link. Needs no permission on the file.
pub(crate) fn path_fd(parent: &Inode, name: &OsStr) -> Result<OwnedFd> {
    let flags = OFlags::PATH | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    rustix::fs::openat(parent, name, flags, Mode::empty())
}

/// Attributes as the kernel has them, without asking the filesystem's server, which may hang or be this mirror. For a
/// filesystem on this machine they are complete.
pub(crate) fn look(dir: impl AsFd, name: impl Arg, flags: AtFlags) -> Result<Statx> {
    let flags = flags | AtFlags::STATX_DONT_SYNC | AtFlags::NO_AUTOMOUNT;
    statx(
        dir,
        name,
        flags,
        StatxFlags::BASIC_STATS | StatxFlags::MNT_ID,
    )
}

/// Current attributes. May ask the filesystem's server.
pub(crate) fn attributes(inode: &Inode) -> Result<Statx> {
    statx(inode, "", AtFlags::EMPTY_PATH, StatxFlags::BASIC_STATS)
}

/// Whether this is a filesystem of this machine that does not hang, and where no two files that exist at the same time
/// share an inode number.
pub(crate) fn is_local_filesystem(fd: &OwnedFd) -> bool {
    const BTRFS: u32 = 0x9123_683e;
    const EXT4: u32 = 0xef53;
    const F2FS: u32 = 0xf2f5_2010;
    const TMPFS: u32 = 0x0102_1994;
    const XFS: u32 = 0x5846_5342;
    let magic = rustix::fs::fstatfs(fd).map(|stat| stat.f_type as u32);
    magic.is_ok_and(|magic| [BTRFS, EXT4, F2FS, TMPFS, XFS].contains(&magic))
}

/// The flags of the file's mount.
pub(crate) fn mount_flags(fd: impl AsFd) -> Result<StatVfsMountFlags> {
    Ok(fstatvfs(fd)?.f_flag)
}

/// An `O_PATH` fd of an open file.
pub(crate) fn path_fd_of(file: &OwnedFd) -> Result<OwnedFd> {
    rustix::fs::open(
        proc_path(file),
        OFlags::PATH | OFlags::CLOEXEC,
        Mode::empty(),
    )
}

/// A path for calls that do not accept an `O_PATH` fd. It leads to the open file even after a rename,
/// and does not go further if the file is a symbolic link.
pub(crate) fn proc_path(fd: impl AsFd) -> String {
    format!("/proc/self/fd/{}", fd.as_fd().as_raw_fd())
}

/// The flags for the server's own open. Without creation flags, because the kernel has handled
/// creation; without `O_NOFOLLOW`, because the path under /proc is a link to follow.
pub(crate) fn server_flags(inode: &Inode, client: OFlags) -> OFlags {
    let creation = OFlags::CREATE | OFlags::EXCL | OFlags::NOCTTY | OFlags::NOFOLLOW;
    (client - creation) | OFlags::CLOEXEC | nonblock(inode)
}

/// While a lease is being broken, the open fails with EAGAIN and `Threads::answer` retries it. Where even a try can
/// hang, the open waits instead.
fn nonblock(inode: &Inode) -> OFlags {
    if inode.is_local() {
        OFlags::NONBLOCK
    } else {
        OFlags::empty()
    }
}

pub(crate) fn has_default_acl(dir: &Inode) -> bool {
    rustix::fs::getxattr_query(proc_path(dir), "system.posix_acl_default").is_ok()
}

/// An fd for writing, for a request that names no open file.
pub(crate) fn open_for_writing(inode: &Inode) -> Result<OwnedFd> {
    let flags = OFlags::WRONLY | OFlags::CLOEXEC | nonblock(inode);
    rustix::fs::open(proc_path(inode), flags, Mode::empty())
}

pub(crate) fn sync(fd: impl AsFd, data_only: bool) -> Result<()> {
    if data_only {
        rustix::fs::fdatasync(fd)
    } else {
        rustix::fs::fsync(fd)
    }
}
