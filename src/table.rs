//! The table and handles: how a server answers each OPEN.
//!
//! # One id and one mode for each inode
//!
//! The kernel accepts one of two modes for an inode at a time: *passthrough*, with the same id in every reply, or
//! *server*, without an id. If a reply does not match the inode's mode, the client gets a bare `EIO`, at this open or
//! a later one, and the server gets no error. (The kernel accepts a passthrough open after plain `DIRECT_IO` ones only
//! until a client maps the file `MAP_SHARED`, which the server does not see.)
//!
//! So the first open of an inode decides its mode, and all others follow until the last one is released.
//! [`BackingTable`] keeps to this rule. [`OpenFile`] is one open: dropping it is the release, and dropping the last
//! one of an inode closes the id.
//!
//! # Which type to use
//!
//! - [`Handles`](crate::Handles) keeps the open files by file handle, on a table. Most servers need no more.
//! - [`BackingTable`] is for a server that keeps its open files itself. It asks a [`Register`] for ids: a
//!   [`FuseDevice`], one that [lowers rights](crate::rights), or one that a test
//!   [provides](crate::register), without root.
//! - The parts are for a server that keeps its ids itself. [`FuseDevice::backing_open`] returns a [`BackingId`], a
//!   token that is closed once. [`BackingFile`](crate::BackingFile) is a guard that closes it on drop. [`OpenReply`]
//!   builds the two fields of the reply, and refuses flags for which the kernel would give the client `EIO`.
//!
//! # OPEN, CREATE and RELEASE
//!
//! [`Handles::open`](crate::Handles::open) takes the fd of step 1, does step 2 and returns the reply for the server to
//! send. [`Handles::release`](crate::Handles::release) does step 4.
//!
//! 1. **Open the backing file**, with the client's flags. This checks permissions, and gives the true errno where the
//!    kernel's own open of the file would later give `EIO`: `ETXTBSY`, `EROFS`, or `EINVAL` for an `O_DIRECT` that
//!    the filesystem does not support. Pass the fd to [`BackingTable::open`].
//! 2. **Store the [`OpenFile`]** under a file handle before the reply is written: RELEASE can follow as soon as the
//!    kernel has the reply.
//! 3. **Send [`OpenFile::reply`].** If that fails, keep the [`OpenFile`] all the same: RELEASE follows an OPEN that
//!    failed in the kernel or was interrupted. It does not follow an OPEN that was answered with an errno, nor a
//!    CREATE reply with invalid attributes.
//! 4. **At RELEASE, drop the [`OpenFile`].**
//!
//! CREATE opens the file too, so answer it in the same way. A CREATE reply that does not come from the table puts the
//! inode in server mode, which the table does not know: until that handle is released, a passthrough open of the inode
//! gets `EIO`.
//!
//! Never answer OPEN with `ENOSYS`: it ends OPEN requests, and so passthrough, for the whole connection.
//!
//! [`BackingTable::share`] opens an inode that is registered already, without an fd and without a system call.
//!
//! # Server mode
//!
//! If passthrough is unavailable, [`BackingTable::open`] succeeds all the same, in server mode: the server reads and
//! writes the file. [`OpenFile::server_reason`] says why, [`TableStats::served`] counts such opens by cause, and
//! [`BackingTable::on_server_mode`] calls back once for each cause. [`BackingTable::serve`] chooses this mode.
//!
//! After a failure of [`Scope::Connection`](crate::error::Scope::Connection) the table tries no further registration
//! until [`BackingTable::retry_registrations`]. After any other failure it tries again at the next open after this
//! inode's last release.
//!
//! # What is registered
//!
//! The kernel keeps a registered file open until its id is closed. If it was registered by an fd that can write, the
//! file is busy for that time: executing it fails with `ETXTBSY`, taking a lease with `EAGAIN`, and remounting its
//! filesystem read-only with `EBUSY`. The fd's flock(2) stays too. So the table registers an `O_PATH` fd of the file,
//! which does none of this: the one in [`ServerFile::path_fd`], or one that the table makes with `open_tree(2)`.
//! Before Linux 6.12, or where a policy denies `open_tree(2)`, the table registers the server's own fd, and counts it
//! in [`TableStats::by_open_fd`].
//!
//! # Limits, idle ids and kept fds
//!
//! The kernel does not account for ids. The table holds at most [`limit`](BackingTable::set_limit) ids, by default as
//! many as the soft `RLIMIT_NOFILE`. It can keep [idle ids](BackingTable::set_idle_limit) for reopening.
//! [`BackingTable::list`] shows what is registered. With [`BackingTable::set_keep_fds`] the process keeps an fd for
//! as long as its id is registered: lsof shows the file, and `RLIMIT_NOFILE` counts the fd.
//!
//! Closing an id fails on a thread without `CAP_SYS_ADMIN`, for example after the server has dropped its privileges.
//! The table then keeps the id, counts it and lists it. The next open of the inode with the same file uses it again,
//! unless the inode was forgotten or invalidated. [`BackingTable::retry_closes`] tries to close it again.
//!
//! # When an inode number gets another file
//!
//! The table cannot know which number names which file. A server that gives the number of an inode to another file
//! calls [`BackingTable::forget`]. [`BackingTable::invalidate`] closes the id of an inode that is not open, so that
//! the next open registers the file anew.
//!
//! # Fork and hand-over
//!
//! After fork(2) the child has a copy of the table and of every [`OpenFile`]. An id that the child closes by dropping
//! them is closed for the parent as well. `_exit` and exec drop nothing.
//!
//! A server that hands its device fd to a successor also hands over, for each open, the number of its id
//! ([`OpenFile::id`]) and its fd. Before the successor reads requests, it calls [`BackingTable::adopt`] for each open
//! in passthrough mode and [`BackingTable::serve`] for each in server mode, and keeps them under their file handles
//! ([`Handles::adopt`](crate::Handles::adopt)).

// How the table stays correct, and in which order it takes its locks: see the head of table/shared.rs.

mod hash;
mod inode;
mod ledger;
mod listing;
mod mode;
mod shared;

use std::fmt;
use std::hash::Hash;
use std::os::fd::{AsFd, BorrowedFd};

use static_assertions::{assert_eq_size, assert_impl_all};

use crate::access::Access;
use crate::client_flags::ClientFlags;
use crate::device::FuseDevice;
use crate::error::{BackingError, OpenError, ServerReason};
use crate::file::{FileId, ServerFile};
use crate::fopen_flags::FopenFlags;
use crate::id::BackingId;
use crate::register::{Register, WithoutFsetid};
use crate::reply::OpenReply;
use crate::sync::Arc;
use ledger::OnServerMode;
pub use listing::{Entry, Listing, TableStats};
use mode::{Mode, Registered};
use shared::{Open, Shared};

/// Answers each OPEN: one backing id for each open inode, and the one mode that the kernel accepts.
///
/// The [guide](self) has the rules, and says what to call when. Most servers need no more than
/// [`Handles`](crate::Handles), which keeps open files on a table.
///
/// `R` registers the files, see [`Register`]. `K` identifies an inode to the server, usually its node id; its `Hash`
/// and `Eq` must not panic for a key that is in the table.
pub struct BackingTable<R: Register = FuseDevice, K: Hash + Eq + Clone = u64> {
    shared: Arc<Shared<R, K>>,
}

/// One open of an inode, from before its reply until its RELEASE.
///
/// Dropping it is the release; dropping the last one of an inode closes the id. It may outlive the table. After
/// fork(2) the child must not drop its copy: that closes the parent's id.
#[must_use = "dropping an OpenFile releases it: keep it under its file handle until RELEASE"]
pub struct OpenFile<R: Register = FuseDevice, K: Hash + Eq + Clone = u64> {
    open: Open<R, K>,
}

assert_eq_size!(OpenFile<&FuseDevice>, usize);
assert_impl_all!(BackingTable: Send, Sync);
assert_impl_all!(OpenFile: Send, Sync);

/// A table without a registrar. Every open is in server mode until [`BackingTable::attach`].
impl<R: Register, K: Hash + Eq + Clone> Default for BackingTable<R, K> {
    fn default() -> Self {
        Self {
            shared: Arc::new(Shared::new()),
        }
    }
}

impl<R: Register + WithoutFsetid, K: Hash + Eq + Clone> WithoutFsetid for BackingTable<R, K> {}

impl<R: Register, K: Hash + Eq + Clone> BackingTable<R, K> {
    /// An empty table for the connection of `registrar`.
    pub fn new(registrar: R) -> Self {
        let table = Self::default();
        // Cannot fail: a new table has no registrar.
        let _ = table.attach(registrar);
        table
    }

    /// Gives the registrar to a table that was made without one. Some FUSE libraries provide the device only after
    /// they have taken the filesystem. An inode that is open stays in server mode until its last release.
    ///
    /// # Errors
    ///
    /// Returns the registrar if the table has one already.
    pub fn attach(&self, registrar: R) -> Result<(), R> {
        self.shared.attach(registrar)
    }

    /// Sets the callback for opens in server mode, in place of an earlier one. The table calls `tell` once for each
    /// cause, except [`ServerReason::Chosen`]. The opening thread makes the call, without holding a lock. For causes
    /// that have occurred already, `tell` is called now. The table and its open files keep `tell` until all of them are
    /// dropped: a closure that needs the table should hold a [`Weak`](std::sync::Weak) reference to it.
    pub fn on_server_mode(&self, tell: impl Fn(ServerReason) + Send + Sync + 'static) {
        let tell: std::sync::Arc<OnServerMode> = std::sync::Arc::new(tell);
        let (causes, _replaced) = self
            .shared
            .ledger()
            .set_on_server_mode(std::sync::Arc::clone(&tell));
        for cause in causes {
            tell(cause);
        }
    }

    /// Opens an inode whose backing file the server has opened with the client's flags.
    ///
    /// The first open registers the file, and later ones share its id. If the open is in server mode,
    /// [`OpenFile::server_reason`] says why. The table does not keep this fd. (With
    /// [`set_keep_fds`](Self::set_keep_fds) it keeps one of its own.)
    ///
    /// The grants of all opens add up while the inode is registered: one that may read and one that may write
    /// get the same id. If the registrar [enforces](Register::enforces_grant) its grant, a later open can get no
    /// more than the grant of the first one ([`ServerFile::grant`]). An idle inode is registered anew for more.
    ///
    /// # Errors
    ///
    /// [`OpenError`]; then the open does not count, and nothing has changed.
    pub fn open(
        &self,
        inode: &K,
        client_flags: impl Into<ClientFlags>,
        file: ServerFile<'_, impl AsFd + Copy>,
    ) -> Result<OpenFile<R, K>, OpenError> {
        self.open_lent(inode, client_flags.into().access(), &file.lend())
    }

    pub(crate) fn open_lent(
        &self,
        inode: &K,
        wanted: Access,
        file: &ServerFile<'_, BorrowedFd<'_>>,
    ) -> Result<OpenFile<R, K>, OpenError> {
        let mut granted = file.granted()?;
        if !granted.allows(wanted) {
            return Err(OpenError::AccessExceeded { granted, wanted });
        }
        let shared = &self.shared;
        let admits = |mode: &Mode, file: FileId| match mode {
            Mode::Passthrough(registered) if registered.file != file => {
                Err(OpenError::DifferentFile)
            }
            Mode::Passthrough(Registered { grant, .. })
                if !grant.allows(wanted) && shared.enforces_grant() =>
            {
                let registered = *grant;
                Err(OpenError::GrantExceeded { registered, wanted })
            }
            Mode::Passthrough(_) | Mode::Server(_) => Ok(()),
        };
        let joined = file.identity.and_then(|known| {
            shared.join(inode, |mode, is_open| {
                is_open && admits(mode, known).is_ok() && mode.was_granted(granted)
            })
        });
        let open = if let Some(open) = joined {
            open
        } else {
            let examined = file.examine()?;
            if examined.is_immutable && wanted != Access::ReadOnly {
                return Err(OpenError::Immutable);
            }
            granted = examined.shareable(granted);
            let admits = |mode: &Mode, is_open: bool| {
                // An idle inode was registered before its file became append-only, or unreadable for statx(2).
                // This error makes `join_or_insert` replace it.
                if !is_open && examined.refusal.is_some() {
                    return Err(OpenError::DifferentFile);
                }
                // overlayfs changes the numbers of an open file when it copies the file up. So while the inode is
                // open, the identity that the server gives suffices.
                match file.identity {
                    Some(known) if is_open && admits(mode, known).is_ok() => Ok(()),
                    _ => admits(mode, examined.id),
                }
            };
            let decide = || shared.register(file, examined, file.at_most(granted));
            shared.join_or_insert(inode, admits, decide)?
        };
        if let Some(Mode::Passthrough(registered)) = open.mode() {
            registered.add(granted);
        }
        Ok(self.opened(open))
    }

    /// Opens an inode that is registered already, without an fd and without a system call.
    ///
    /// Returns `None` if the server must open the file itself and call [`open`](Self::open): the inode is not
    /// registered, or the client asks for more than was granted so far, or for `O_TRUNC`.
    ///
    /// This skips the permission check and the errno of the server's own open, so use it where the kernel checks
    /// permissions (`default_permissions`). It does not notice a file that has become immutable since it was opened
    /// for writing.
    #[inline]
    pub fn share(&self, inode: &K, client_flags: impl Into<ClientFlags>) -> Option<OpenFile<R, K>> {
        let client_flags = client_flags.into();
        if client_flags.truncates() {
            return None;
        }
        let admits = |mode: &Mode, _| match mode {
            Mode::Passthrough(registered) => registered
                .granted(self.shared.enforces_grant())
                .is_some_and(|granted| granted.allows(client_flags.access())),
            Mode::Server(_) => false,
        };
        let open = self.shared.join(inode, admits)?;
        Some(OpenFile { open })
    }

    /// Opens an inode in server mode because the server wants to read and write it itself.
    ///
    /// Returns `None` while the inode is open in passthrough mode: call [`open`](Self::open) or
    /// [`share`](Self::share) then. An idle registration is closed.
    pub fn serve(&self, inode: &K) -> Option<OpenFile<R, K>> {
        let admits = |mode: &Mode, _| match mode {
            Mode::Server(_) => Ok(()),
            Mode::Passthrough(_) => Err(()),
        };
        let chosen = || Mode::Server(ServerReason::Chosen);
        let open = self.shared.join_or_insert(inode, admits, chosen).ok()?;
        Some(self.opened(open))
    }

    /// Takes over an open that a predecessor on the same connection answered with `id`, until its RELEASE. Call it
    /// for each of the inode's opens, with the fd of that open as `file`.
    ///
    /// From the first call on, the table closes the id. The id counts, even if this exceeds the limit.
    ///
    /// # Errors
    ///
    /// [`OpenError::DifferentFile`] while the inode is open with another id or file, or in server mode;
    /// [`OpenError::NoAccess`] or [`OpenError::Unreadable`] for the fd.
    pub fn adopt(
        &self,
        inode: &K,
        id: &BackingId,
        file: ServerFile<'_, impl AsFd + Copy>,
    ) -> Result<OpenFile<R, K>, OpenError> {
        let file = file.lend();
        let examined = file.examine()?;
        let granted = examined.shareable(file.granted()?);
        // Compares the id alone, so that this open joins an idle inode with the id. `join_or_insert` would replace it
        // if this refused, and so close the very id that is adopted. The file is compared below.
        let admits = |mode: &Mode, _| match mode {
            Mode::Passthrough(known) if known.id == *id => Ok(()),
            Mode::Passthrough(_) | Mode::Server(_) => Err(OpenError::DifferentFile),
        };
        let decide = || {
            self.shared.ledger().stats.ids += 1;
            let at_most = file.at_most(granted);
            Mode::Passthrough(Registered::new(id.alias(), examined.id, at_most, None))
        };
        let open = self.shared.join_or_insert(inode, admits, decide)?;
        match open.mode() {
            Some(Mode::Passthrough(registered)) if registered.file == examined.id => {
                registered.add(granted);
                Ok(OpenFile { open })
            }
            _ => Err(OpenError::DifferentFile),
        }
    }

    fn opened(&self, open: Open<R, K>) -> OpenFile<R, K> {
        if let Some(Mode::Server(reason)) = open.mode() {
            let tell = self.shared.ledger().served(*reason);
            if let Some(tell) = tell {
                tell(*reason);
            }
        }
        OpenFile { open }
    }

    /// Detaches an inode from its number, which the server is about to give to another file: after FORGET, or with
    /// another generation. The next open under this number registers its file anew. Opens of the old inode keep
    /// their registration.
    ///
    /// It must be another inode for the kernel as well. While the kernel has the old one open under this node id, a
    /// reply with the new id gives the client `EIO`. If a file is replaced under an open inode without this call,
    /// opens of the new file fail with [`DifferentFile`](OpenError::DifferentFile) until the inode is released.
    pub fn forget(&self, inode: &K) {
        let _ = self.shared.detach(inode, true);
    }

    /// Closes the id of an inode that is not open, so that the next open registers the file anew. Returns false while
    /// the inode is open. If closing fails, the table keeps the id for [`retry_closes`](Self::retry_closes), and
    /// answers no open with it. An id that another thread is closing may stay registered for a moment.
    #[must_use]
    pub fn invalidate(&self, inode: &K) -> bool {
        self.shared.detach(inode, false)
    }

    /// Forgets a failure that concerned the connection, so that the next open tries to register again. Call it when
    /// the cause was removed. An inode that is open in server mode stays in it until its last release.
    pub fn retry_registrations(&self) {
        self.shared.ledger().retry_registrations();
    }

    /// Sets how many ids may be registered at a time. At the limit, an open closes an idle id, or waits for a close
    /// that another thread is making. If there is neither, it is in server mode. A limit below the present number of
    /// ids closes idle ids at once, and others as their inodes are released.
    pub fn set_limit(&self, limit: usize) {
        self.shared.ledger().stats.limit = limit;
        self.shared.trim();
    }

    /// Sets how many idle ids are kept after the last release, for reopening. The default is none. The id that was
    /// released longest ago is closed first. Idle ids pin their files and mounts.
    pub fn set_idle_limit(&self, limit: usize) {
        self.shared.ledger().idle_limit = limit;
        self.shared.trim();
    }

    /// Sets whether the process keeps an fd for as long as its id is registered, for registrations from now on. The
    /// default is no. An inode for which no fd can be kept is in server mode ([`ServerReason::NoFd`]).
    pub fn set_keep_fds(&self, keep: bool) {
        self.shared.ledger().keep_fds = keep;
    }

    /// Tries again to close the ids that could not be closed. Call it from a thread that has the capability.
    ///
    /// # Errors
    ///
    /// The cause of the first close that failed again; all are tried.
    pub fn retry_closes(&self) -> Result<(), BackingError> {
        let mut result = Ok(());
        let unclosed = self.shared.ledger().unclosed();
        for _ in 0..unclosed {
            let claim = self.shared.ledger().claim_unclosed();
            let closed = claim.map_or(Ok(()), |claim| self.shared.close_claimed(claim));
            result = result.and(closed);
        }
        result
    }

    /// Figures of the table.
    #[must_use]
    pub fn stats(&self) -> TableStats {
        self.shared.ledger().stats()
    }

    /// Lists the inodes that are open or registered, except those whose id is being registered or closed.
    #[must_use]
    pub fn list(&self) -> Listing<K> {
        Listing(self.shared.entries())
    }
}

/// Closes the idle ids. Open files are unaffected until they are released. An id that cannot be closed, now or at its
/// last release, stays registered until the connection ends.
impl<R: Register, K: Hash + Eq + Clone> Drop for BackingTable<R, K> {
    fn drop(&mut self) {
        self.shared.shut_down();
    }
}

impl<R: Register, K: Hash + Eq + Clone> OpenFile<R, K> {
    /// The key by which the server identifies the inode.
    #[must_use]
    pub fn inode(&self) -> &K {
        self.open.key()
    }

    /// The number of the shard that the inode is in.
    pub(crate) fn shard(&self) -> u8 {
        self.open.shard()
    }

    /// The backing id; `None` in server mode.
    #[must_use]
    pub fn id(&self) -> Option<&BackingId> {
        match self.open.mode() {
            Some(Mode::Passthrough(registered)) => Some(&registered.id),
            Some(Mode::Server(_)) | None => None,
        }
    }

    /// Whether the kernel reads and writes the backing file. If not, the server does.
    #[must_use]
    pub fn is_passthrough(&self) -> bool {
        self.id().is_some()
    }

    /// Why the inode is in server mode; `None` in passthrough mode.
    #[must_use]
    pub fn server_reason(&self) -> Option<ServerReason> {
        match self.open.mode() {
            Some(Mode::Server(reason)) => Some(*reason),
            Some(Mode::Passthrough(_)) | None => None,
        }
    }

    /// The reply to this OPEN or CREATE, with those of `flags` that the mode permits.
    ///
    /// Passthrough mode keeps only `NOFLUSH` and `PARALLEL_DIRECT_WRITES`. The kernel refuses others, and with
    /// `DIRECT_IO` it would ask the server to read and write ([`OpenReply::passthrough`] permits that). Server mode
    /// keeps all but `PASSTHROUGH`.
    pub fn reply(&self, flags: impl Into<FopenFlags>) -> OpenReply<'_> {
        OpenReply::unchecked(self.id(), flags.into().permitted(self.is_passthrough()))
    }
}

impl<R: Register, K: Hash + Eq + Clone> fmt::Debug for BackingTable<R, K> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("BackingTable").field(&self.stats()).finish()
    }
}

impl<R: Register, K: Hash + Eq + Clone> fmt::Debug for OpenFile<R, K> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("OpenFile")
            .field("mode", &self.open.mode())
            .finish_non_exhaustive()
    }
}
