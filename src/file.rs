//! The file of an open: [`ServerFile`], and the fd that is registered for it.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use rustix::fs::{
    AtFlags, OFlags, StatxAttributes, StatxFlags, fcntl_getfl, fstat, makedev, statx,
};
use rustix::io::{Errno, fcntl_dupfd_cloexec};
use rustix::mount::{OpenTreeFlags, open_tree};

use crate::access::Access;
use crate::error::{OpenError, ServerReason};

impl Access {
    /// `fcntl(fd, F_GETFL)` — Returns what an fd permits.
    ///
    /// # Errors
    ///
    /// [`OpenError::NoAccess`] for an `O_PATH` fd, and for one that was opened with access mode 3, which permits only
    /// ioctls. [`OpenError::Unreadable`] if `fcntl` fails.
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

/// A backing file that the server has opened for one open of a client, and what the server knows of it. `F` holds the
/// fd: a reference for [`BackingTable::open`](crate::BackingTable::open), or the value that
/// [`Handles::open`](crate::Handles::open) keeps.
///
/// # Examples
///
/// ```
/// use fuse_backing::{Access, ServerFile};
/// use std::fs::File;
/// use std::os::linux::fs::MetadataExt;
///
/// let file = File::open("/dev/null")?;
/// // Grants what the fd permits:
/// let plain = ServerFile::new(&file);
/// // The server has an O_PATH fd of the file and its numbers, and will grant more to later opens:
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
    /// A file of which the server knows nothing else.
    pub fn new(fd: F) -> Self {
        Self {
            fd,
            access: None,
            identity: None,
            grant: None,
            path: None,
        }
    }

    /// What this open is granted. The default is what the fd permits, see [`Access::of`], which costs an `fcntl(2)`.
    pub fn access(mut self, access: Access) -> Self {
        self.access = Some(access);
        self
    }

    /// The file's `st_dev` and `st_ino`, from a stat(2) of an fd through which this one was opened. It spares the
    /// statx(2) for a further open of an open inode, unless this open is granted more than the others. A file that has
    /// become immutable since then is not noticed.
    pub fn identity(mut self, device: u64, inode: u64) -> Self {
        self.identity = Some(FileId { device, inode });
        self
    }

    /// The most that any open of this inode will be granted while it is registered, including later ones. It matters to
    /// a registrar that [enforces](crate::Register::enforces_grant) it. What this open is granted is always included.
    pub fn grant(mut self, grant: Access) -> Self {
        self.grant = Some(grant);
        self
    }

    /// An `O_PATH` fd of the same file, which the table registers. If there is none, or `path` is something else, the
    /// table makes one with `open_tree(2)`.
    pub fn path_fd(mut self, path: &'path impl AsFd) -> Self {
        self.path = Some(path.as_fd());
        self
    }

    /// The same with a borrowed fd.
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

/// The same as [`ServerFile::new`].
impl<F: AsFd> From<F> for ServerFile<'_, F> {
    fn from(fd: F) -> Self {
        Self::new(fd)
    }
}

impl<'fd> ServerFile<'fd, BorrowedFd<'fd>> {
    /// What this open is granted.
    pub(crate) fn granted(&self) -> Result<Access, OpenError> {
        self.access.map_or_else(|| Access::of(self.fd), Ok)
    }

    /// The access to register for: what this open is `granted`, and what [`grant`](Self::grant) allows later opens.
    pub(crate) fn at_most(&self, granted: Access) -> Access {
        self.grant.map_or(granted, |grant| grant.union(granted))
    }

    pub(crate) fn examine(&self) -> Result<Examined, OpenError> {
        examine(self.fd).map_err(OpenError::Unreadable)
    }

    /// The fd to register: if `by_path`, an `O_PATH` fd of the file `id` where possible; else the server's own.
    pub(crate) fn backing(&self, id: FileId, by_path: bool) -> Backing<'fd> {
        let is_same = |fd: BorrowedFd<'_>| examine(fd).is_ok_and(|found| found.id == id);
        let is_path = |fd| fcntl_getfl(fd).is_ok_and(|flags| flags.contains(OFlags::PATH));
        let backing = |lent, owned, is_path| Backing {
            lent,
            owned,
            is_path,
        };
        if !by_path {
            return backing(self.fd, None, false);
        }
        if let Some(path) = self.path.filter(|&fd| is_path(fd) && is_same(fd)) {
            return backing(path, None, true);
        }
        // On Android the seccomp filter of apps may kill the caller for `open_tree`.
        let may_reopen = !cfg!(target_os = "android");
        let owned = may_reopen.then(|| self.reopen().ok()).flatten();
        let owned = owned.filter(|fd| is_same(fd.as_fd()));
        let is_path = owned.is_some();
        backing(self.fd, owned, is_path)
    }

    /// `open_tree(fd, "", AT_EMPTY_PATH)` — Opens the same file with `O_PATH`. Without `OPEN_TREE_CLONE` this needs no
    /// capability and, unlike open(2), no `/proc`.
    fn reopen(&self) -> Result<OwnedFd, Errno> {
        let flags = OpenTreeFlags::AT_EMPTY_PATH | OpenTreeFlags::OPEN_TREE_CLOEXEC;
        open_tree(self.fd, "", flags)
    }
}

/// The fd to register for a file.
#[derive(Debug)]
pub(crate) struct Backing<'fd> {
    /// The server's fd, registered if there is no `owned`.
    lent: BorrowedFd<'fd>,
    /// An fd of our own, registered instead of `lent`.
    pub(crate) owned: Option<OwnedFd>,
    /// Whether the fd to register is an `O_PATH` fd, which is no writer and holds no lock or lease.
    pub(crate) is_path: bool,
}

impl Backing<'_> {
    /// Duplicates the fd, unless it is our own already.
    pub(crate) fn make_owned(&mut self) -> Result<(), Errno> {
        if self.owned.is_none() {
            self.owned = Some(fcntl_dupfd_cloexec(self.lent, 0)?);
        }
        Ok(())
    }
}

impl AsFd for Backing<'_> {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.owned.as_ref().map_or(self.lent, AsFd::as_fd)
    }
}

/// What identifies a file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct FileId {
    /// `st_dev`.
    pub(crate) device: u64,
    /// `st_ino`.
    pub(crate) inode: u64,
}

/// What statx(2) said about a file.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Examined {
    pub(crate) id: FileId,
    /// Why the file must be in server mode, even if the registrar would register it.
    pub(crate) refusal: Option<ServerReason>,
    /// False if `refusal` is `Unreadable`.
    pub(crate) is_immutable: bool,
}

impl Examined {
    /// What later opens may get of a grant without a new statx(2). For an immutable file this is reading alone.
    pub(crate) fn shareable(&self, granted: Access) -> Access {
        if self.is_immutable {
            Access::ReadOnly
        } else {
            granted
        }
    }
}

/// `statx(fd)`, or fstat(2) if statx is denied.
pub(crate) fn examine(fd: BorrowedFd<'_>) -> Result<Examined, Errno> {
    match statx(fd, "", AtFlags::EMPTY_PATH, StatxFlags::INO) {
        Ok(statx) => Ok(Examined {
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
            Ok(Examined {
                id,
                refusal: Some(ServerReason::Unreadable(errno)),
                is_immutable: false,
            })
        }
    }
}
