//! The file that an open brings: [`ServerFile`], and the fd that is registered for it.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use rustix::fs::{AtFlags, StatxAttributes, StatxFlags, fstat, makedev, statx};
use rustix::io::{Errno, fcntl_dupfd_cloexec};
use rustix::mount::{OpenTreeFlags, open_tree};

use crate::access::{Access, AccessError};

/// A backing file as the server has opened it for one client, for
/// [`BackingTable::open`](crate::BackingTable::open).
///
/// # Examples
///
/// ```
/// use fuse_backing::{Access, ServerFile};
/// use std::fs::File;
///
/// let file = File::open("/dev/null")?;
/// // Granted is what the fd permits:
/// let plain = ServerFile::of(&file)?;
/// // The server knows what the fd permits, holds an O_PATH fd of the file, and may let others write to it:
/// # let held = rustix::fs::open("/dev/null", rustix::fs::OFlags::PATH, rustix::fs::Mode::empty())?;
/// let known = ServerFile::with_access(&file, Access::ReadOnly)
///     .path_fd(&held)
///     .grant(Access::ReadWrite);
/// # Ok::<(), std::io::Error>(())
/// ```
#[derive(Clone, Copy, Debug)]
pub struct ServerFile<'fd> {
    fd: BorrowedFd<'fd>,
    access: Access,
    grant: Access,
    path: Option<BorrowedFd<'fd>>,
}

impl<'fd> ServerFile<'fd> {
    /// `fcntl(fd, F_GETFL)` — A file through which the server grants what its fd permits, see
    /// [`Access::of`].
    ///
    /// # Errors
    ///
    /// [`AccessError`].
    pub fn of<Fd: AsFd>(fd: &'fd Fd) -> Result<Self, AccessError> {
        Ok(Self::with_access(fd, Access::of(fd)?))
    }

    /// The same, with what the server grants through it.
    pub fn with_access<Fd: AsFd>(fd: &'fd Fd, access: Access) -> Self {
        Self {
            fd: fd.as_fd(),
            access,
            grant: access,
            path: None,
        }
    }

    /// The most that this inode will be granted while it is registered, by later opens too. It matters
    /// to a registrar that [enforces](crate::Register::enforces_grant) it, and always has what is
    /// granted through this fd.
    #[must_use]
    pub fn grant(mut self, grant: Access) -> Self {
        self.grant = grant.union(self.access);
        self
    }

    /// An `O_PATH` fd of the same file, to be registered. Without it the table makes one, with
    /// `open_tree(2)`.
    #[must_use]
    pub fn path_fd<Fd: AsFd>(mut self, path: &'fd Fd) -> Self {
        self.path = Some(path.as_fd());
        self
    }

    pub(crate) fn access(&self) -> Access {
        self.access
    }

    pub(crate) fn at_most(&self) -> Access {
        self.grant
    }

    pub(crate) fn id(&self) -> Result<FileId, Errno> {
        let stat = fstat(self.fd)?;
        #[allow(clippy::unnecessary_cast, reason = "the types differ between targets")]
        Ok(FileId {
            device: stat.st_dev as u64,
            inode: stat.st_ino as u64,
        })
    }

    /// What to register: an `O_PATH` fd of this very file if it is wanted and there can be one, else the
    /// server's own.
    pub(crate) fn backing(&self, id: FileId, by_path: bool) -> Result<Backing<'fd>, Errno> {
        let path = match self.path {
            _ if !by_path => None,
            Some(path) => Some(Fd::Lent(path)),
            None => self.reopen().ok().map(Fd::Opened),
        };
        let same_file = |fd: Fd<'fd>| {
            let (found, append_only) = look_at(fd.as_fd()).ok()?;
            (found == id).then_some(Backing {
                fd,
                is_path: true,
                append_only,
            })
        };
        if let Some(backing) = path.and_then(same_file) {
            return Ok(backing);
        }
        let (_, append_only) = look_at(self.fd)?;
        Ok(Backing {
            append_only,
            ..Backing::lent(self)
        })
    }

    /// `open_tree(fd, "", AT_EMPTY_PATH)`: without `OPEN_TREE_CLONE` it opens the same file with `O_PATH`,
    /// which takes no capability and, unlike open(2), no `/proc`.
    fn reopen(&self) -> Result<OwnedFd, Errno> {
        let flags = OpenTreeFlags::AT_EMPTY_PATH | OpenTreeFlags::OPEN_TREE_CLOEXEC;
        open_tree(self.fd, "", flags)
    }
}

/// What is registered for a file.
#[derive(Debug)]
pub(crate) struct Backing<'fd> {
    fd: Fd<'fd>,
    /// It is an `O_PATH` fd: no writer, and without a lock or a lease.
    is_path: bool,
    /// `STATX_ATTR_APPEND`.
    append_only: bool,
}

#[derive(Debug)]
enum Fd<'fd> {
    Lent(BorrowedFd<'fd>),
    Opened(OwnedFd),
}

impl AsFd for Fd<'_> {
    fn as_fd(&self) -> BorrowedFd<'_> {
        match self {
            Self::Lent(fd) => *fd,
            Self::Opened(fd) => fd.as_fd(),
        }
    }
}

impl<'fd> Backing<'fd> {
    /// The server's own fd, of a file that is not append-only.
    pub(crate) fn lent(file: &ServerFile<'fd>) -> Self {
        Self {
            fd: Fd::Lent(file.fd),
            is_path: false,
            append_only: false,
        }
    }

    pub(crate) fn is_path(&self) -> bool {
        self.is_path
    }

    pub(crate) fn append_only(&self) -> bool {
        self.append_only
    }

    pub(crate) fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }

    /// Makes the fd one of its own.
    pub(crate) fn keep(&mut self) -> Result<(), Errno> {
        if let Fd::Lent(fd) = self.fd {
            self.fd = Fd::Opened(fcntl_dupfd_cloexec(fd, 0)?);
        }
        Ok(())
    }

    /// What `keep` has made its own.
    pub(crate) fn into_kept(self) -> Option<OwnedFd> {
        match self.fd {
            Fd::Lent(_) => None,
            Fd::Opened(fd) => Some(fd),
        }
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct FileId {
    pub(crate) device: u64,
    pub(crate) inode: u64,
}

/// `statx(fd)`: which file it is, and whether it is append-only.
fn look_at(fd: BorrowedFd<'_>) -> Result<(FileId, bool), Errno> {
    let statx = statx(fd, "", AtFlags::EMPTY_PATH, StatxFlags::INO)?;
    let id = FileId {
        device: makedev(statx.stx_dev_major, statx.stx_dev_minor),
        inode: statx.stx_ino,
    };
    Ok((id, statx.stx_attributes.contains(StatxAttributes::APPEND)))
}
