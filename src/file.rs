//! The file that an open brings: [`ServerFile`], and the fd that is registered for it.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use rustix::fs::{
    AtFlags, OFlags, StatxAttributes, StatxFlags, fcntl_getfl, fstat, makedev, statx,
};
use rustix::io::{Errno, fcntl_dupfd_cloexec};
use rustix::mount::{OpenTreeFlags, open_tree};

use crate::access::Access;
use crate::error::{OpenError, ServerReason};

impl Access {
    /// `fcntl(fd, F_GETFL)` — What an fd can be used for.
    ///
    /// # Errors
    ///
    /// [`OpenError::NoAccess`] for an `O_PATH` fd and for one opened with access mode 3, which is for ioctls
    /// alone; [`OpenError::Unreadable`] where `fcntl` fails.
    pub fn of(fd: impl AsFd) -> Result<Self, OpenError> {
        let flags = fcntl_getfl(fd).map_err(OpenError::Unreadable)?;
        match flags & OFlags::ACCMODE {
            _ if flags.contains(OFlags::PATH) => Err(OpenError::NoAccess),
            OFlags::RDONLY => Ok(Self::ReadOnly),
            OFlags::WRONLY => Ok(Self::WriteOnly),
            OFlags::RDWR => Ok(Self::ReadWrite),
            _ => Err(OpenError::NoAccess),
        }
    }
}

/// A backing file as the server has opened it for one client, and what the server knows of it. `F` holds the
/// fd: a reference for [`BackingTable::open`](crate::BackingTable::open), what to keep for
/// [`Handles::open`](crate::Handles::open).
///
/// # Examples
///
/// ```
/// use fuse_backing::{Access, ServerFile};
/// use std::fs::File;
/// use std::os::linux::fs::MetadataExt;
///
/// let file = File::open("/dev/null")?;
/// // What is granted is what the fd permits:
/// let plain = ServerFile::new(&file);
/// // The server keeps an O_PATH fd of the file, and its numbers. Others will be granted more:
/// # let held = rustix::fs::open("/dev/null", rustix::fs::OFlags::PATH, rustix::fs::Mode::empty())?;
/// # let (dev, ino) = (file.metadata()?.st_dev(), file.metadata()?.st_ino());
/// let known = ServerFile::new(&file).access(Access::ReadOnly).identity(dev, ino);
/// let known = known.path_fd(&held).grant(Access::ReadWrite);
/// # Ok::<(), std::io::Error>(())
/// ```
#[derive(Clone, Copy, Debug)]
#[must_use]
pub struct ServerFile<'path, F> {
    pub(crate) fd: F,
    access: Option<Access>,
    pub(crate) identity: Option<FileId>,
    grant: Option<Access>,
    path: Option<BorrowedFd<'path>>,
}

impl<'path, F: AsFd> ServerFile<'path, F> {
    /// A file of which nothing else is known.
    pub fn new(fd: F) -> Self {
        Self {
            fd,
            access: None,
            identity: None,
            grant: None,
            path: None,
        }
    }

    /// What this open is granted. Without it: what the fd permits, see [`Access::of`], at the cost of an
    /// `fcntl(2)`.
    pub fn access(mut self, access: Access) -> Self {
        self.access = Some(access);
        self
    }

    /// The file's `st_dev` and `st_ino`, from a stat(2) of an fd through which this one was opened. It
    /// spares a further open of an open inode the statx(2), unless this one is granted more than the others. A
    /// file that has become immutable since then is not noticed.
    pub fn identity(mut self, device: u64, inode: u64) -> Self {
        self.identity = Some(FileId { device, inode });
        self
    }

    /// The most that this inode will be granted while it is registered, by later opens too. It matters
    /// to a registrar that [enforces](crate::Register::enforces_grant) it, and always has what is
    /// granted through this fd.
    pub fn grant(mut self, grant: Access) -> Self {
        self.grant = Some(grant);
        self
    }

    /// An `O_PATH` fd of the same file, to be registered. Without it, and in place of an fd that is not such,
    /// the table makes one, with `open_tree(2)`.
    pub fn path_fd(mut self, path: &'path impl AsFd) -> Self {
        self.path = Some(path.as_fd());
        self
    }

    pub(crate) fn lend(&self) -> ServerFile<'_, BorrowedFd<'_>> {
        ServerFile {
            fd: self.fd.as_fd(),
            access: self.access,
            identity: self.identity,
            grant: self.grant,
            path: self.path,
        }
    }
}

/// [`ServerFile::new`].
impl<F: AsFd> From<F> for ServerFile<'_, F> {
    fn from(fd: F) -> Self {
        Self::new(fd)
    }
}

impl<'fd> ServerFile<'fd, BorrowedFd<'fd>> {
    pub(crate) fn granted(&self) -> Result<Access, OpenError> {
        self.access.map_or_else(|| Access::of(self.fd), Ok)
    }

    pub(crate) fn at_most(&self, granted: Access) -> Access {
        self.grant.map_or(granted, |grant| grant.union(granted))
    }

    pub(crate) fn look(&self) -> Result<Looked, OpenError> {
        look_at(self.fd).map_err(OpenError::Unreadable)
    }

    /// What to register: an `O_PATH` fd of this very file if it is wanted and there can be one, else the
    /// server's own.
    pub(crate) fn backing(&self, id: FileId, by_path: bool) -> Backing<'fd> {
        let is_same = |fd: BorrowedFd<'_>| look_at(fd).is_ok_and(|found| found.id == id);
        let is_path = |fd| fcntl_getfl(fd).is_ok_and(|flags| flags.contains(OFlags::PATH));
        let backing = |lent, opened, is_path| Backing {
            lent,
            opened,
            is_path,
        };
        if !by_path {
            return backing(self.fd, None, false);
        }
        if let Some(path) = self.path.filter(|&fd| is_path(fd) && is_same(fd)) {
            return backing(path, None, true);
        }
        // Android's filter of apps may kill the caller.
        let may_reopen = !cfg!(target_os = "android");
        let opened = may_reopen.then(|| self.reopen().ok()).flatten();
        let opened = opened.filter(|fd| is_same(fd.as_fd()));
        let is_path = opened.is_some();
        backing(self.fd, opened, is_path)
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
    lent: BorrowedFd<'fd>,
    /// In its place.
    pub(crate) opened: Option<OwnedFd>,
    /// It is an `O_PATH` fd: no writer, and without a lock or a lease.
    pub(crate) is_path: bool,
}

impl Backing<'_> {
    /// Makes the fd one of its own.
    pub(crate) fn keep(&mut self) -> Result<(), Errno> {
        if self.opened.is_none() {
            self.opened = Some(fcntl_dupfd_cloexec(self.lent, 0)?);
        }
        Ok(())
    }
}

impl AsFd for Backing<'_> {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.opened.as_ref().map_or(self.lent, AsFd::as_fd)
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct FileId {
    pub(crate) device: u64,
    pub(crate) inode: u64,
}

/// What an open sees of its file.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Looked {
    pub(crate) id: FileId,
    /// Why it must not be passed through, whatever the registrar says.
    pub(crate) refusal: Option<ServerReason>,
    /// Not known where the refusal is `Unreadable`.
    pub(crate) is_immutable: bool,
}

impl Looked {
    /// What later opens may get of a grant without another look.
    pub(crate) fn without_writing(&self, granted: Access) -> Access {
        if self.is_immutable {
            Access::ReadOnly
        } else {
            granted
        }
    }
}

/// `statx(fd)`; or fstat(2), where that is denied.
pub(crate) fn look_at(fd: BorrowedFd<'_>) -> Result<Looked, Errno> {
    match statx(fd, "", AtFlags::EMPTY_PATH, StatxFlags::INO) {
        Ok(statx) => Ok(Looked {
            id: FileId {
                device: makedev(statx.stx_dev_major, statx.stx_dev_minor),
                inode: statx.stx_ino,
            },
            refusal: statx
                .stx_attributes
                .contains(StatxAttributes::APPEND)
                .then_some(ServerReason::AppendOnly),
            is_immutable: statx.stx_attributes.contains(StatxAttributes::IMMUTABLE),
        }),
        Err(errno) => {
            let stat = fstat(fd)?;
            #[allow(clippy::unnecessary_cast, reason = "the types differ between targets")]
            let id = FileId {
                device: stat.st_dev as u64,
                inode: stat.st_ino as u64,
            };
            Ok(Looked {
                id,
                refusal: Some(ServerReason::Unreadable(errno)),
                is_immutable: false,
            })
        }
    }
}
