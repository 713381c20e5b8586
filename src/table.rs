//! [`BackingTable`]: one backing id for each open inode, and the only mode that the kernel accepts.
//!
//! # How it stays right
//!
//! An open is counted in the slot of its inode, under the lock of its shard. The last release parks the
//! inode there, or begins to close its id; from then on no open finds it. Nothing else counts: looking at an
//! inode is in nobody's way.
//!
//! Inodes without opens whose id is kept, idle or because closing it failed, are in the ledger, which also
//! counts the ids. Whoever takes one from there to close it looks at the inode once more: it may be open.
//!
//! No lock is held over a call of the registrar but `deciding` of an inode, for which those wait who open
//! this inode while it is being registered. Locks are taken in the order `deciding`, shard, ledger, and
//! never two shards; that of a new inode, which nobody can find yet, under its shard's.

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
pub use listing::{Entry, Listing, TableStats};
use mode::{Mode, Registered};
use shared::{Open, Shared};

/// How each OPEN is answered: one backing id for each open inode, and one mode.
///
/// The kernel accepts one of two modes for an inode at a time, *passthrough*, with the same id for
/// every open, or *server*; a mixture gives the client a bare `EIO`, at this open or a later one, and the
/// server no error. So the first open decides, and all others follow until the last one is released. (A
/// passthrough open after plain `DIRECT_IO` ones works only until a client maps the file `MAP_SHARED`, which no
/// server sees.)
///
/// `R` is who registers, see [`Register`]. `K` is what the server knows an inode by, its node id most often; its
/// `Hash` and `Eq` must not panic for a key that is in the table. Most servers need no more than
/// [`Handles`](crate::Handles), which keeps open files on a table.
///
/// # The life of an open
///
/// 1. OPEN or CREATE: the server opens its backing file itself, with the client's flags. So permissions are
///    checked, and the errno is the true one where the kernel's own open of the file later would give `EIO`:
///    `ETXTBSY`, `EROFS`, `EINVAL` for an `O_DIRECT` that the filesystem does not know. It hands the fd to
///    [`open`](Self::open).
/// 2. It stores the [`OpenFile`] under a file handle **before** it writes the reply:
///    RELEASE can follow as soon as the kernel has the reply.
/// 3. It answers [`OpenFile::reply`]. If that fails, it keeps the [`OpenFile`] all the same: RELEASE follows an
///    OPEN that failed in the kernel or was interrupted, but for one that was answered with an errno and for
///    a CREATE reply with invalid attributes.
/// 4. RELEASE: it drops the [`OpenFile`]. The last one closes the id.
///
/// Never answer OPEN with `ENOSYS`: it ends OPEN requests, and so passthrough, for the whole connection.
/// What a client has mapped in passthrough mode stays on the backing file after the RELEASE.
///
/// # When passthrough is unavailable
///
/// [`open`](Self::open) succeeds all the same, in server mode. [`OpenFile::server_reason`] says why,
/// [`TableStats::served`] counts, and [`on_server_mode`](Self::on_server_mode) is told.
/// After a failure of [`Scope::Connection`](crate::error::Scope::Connection) no further registration is tried
/// until [`reset`](Self::reset); after any other the next open after this inode's last release tries again.
///
/// # What is registered
///
/// The kernel keeps what was registered open until its id is closed. An fd that can write makes the file
/// busy for that time: running it gives `ETXTBSY`, a lease `EAGAIN`, remounting its filesystem read-only
/// `EBUSY`; and it keeps a flock(2). So the table registers an `O_PATH` fd of the file, which does none of
/// that: the one in [`ServerFile::path_fd`], or else one that it makes with
/// `open_tree(2)`. Before Linux 6.12, or where a policy denies `open_tree(2)`, the
/// table registers the server's fd, which [`TableStats::by_open_fd`] counts.
///
/// The kernel does not account for ids. The table holds at most [`limit`](Self::set_limit) of them, by
/// default the soft `RLIMIT_NOFILE`; [`list`](Self::list) shows what is registered. With
/// [`set_keep_fds`](Self::set_keep_fds) the process keeps an fd for as long as its id is registered:
/// lsof shows it, and `RLIMIT_NOFILE` accounts it.
///
/// A close fails on a thread without `CAP_SYS_ADMIN`, say after the server dropped its privileges.
/// The id is then kept: counted, listed, used again when the inode is opened next with the same file,
/// unless it was forgotten or invalidated, and closed by [`retry_closes`](Self::retry_closes).
///
/// # Fork and restart
///
/// After fork(2) the child has a copy of the table and of every [`OpenFile`]: what it drops is closed for the
/// parent as well. `_exit` and exec drop nothing. A server that hands its device fd to a successor hands over
/// the number of each open's id ([`OpenFile::id`]) and its fd. The successor [`adopt`](Self::adopt)s each open
/// before it reads requests, and [`serve`](Self::serve)s those that are in server mode.
pub struct BackingTable<R: Register = FuseDevice, K: Hash + Eq + Clone = u64> {
    shared: Arc<Shared<R, K>>,
}

/// One open of an inode, from before its reply until its RELEASE.
///
/// Dropping it is the release; the last one of an inode closes its id. It owns what it needs, and may
/// outlive the table. After fork(2) the child must not drop its copy: that closes the parent's id.
#[must_use = "dropping an OpenFile releases it: keep it under its file handle until RELEASE"]
pub struct OpenFile<R: Register = FuseDevice, K: Hash + Eq + Clone = u64> {
    open: Open<R, K>,
}

assert_eq_size!(OpenFile<&FuseDevice>, usize);
assert_impl_all!(BackingTable: Send, Sync);
assert_impl_all!(OpenFile: Send, Sync);

/// A table without a registrar: every open is in server mode until [`BackingTable::attach`].
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
        // The table is new: it has none.
        let _ = table.attach(registrar);
        table
    }

    /// Gives the registrar to a table that began without one: libraries hand out the device only when they
    /// have the filesystem. An inode that is open stays in server mode until its last release.
    ///
    /// # Errors
    ///
    /// The registrar, if the table has one already.
    pub fn attach(&self, registrar: R) -> Result<(), R> {
        self.shared.attach(registrar)
    }

    /// Calls `tell` once in the table's life for each cause of opens in server mode but
    /// [`ServerReason::Chosen`]: from the thread that opens, without a lock; now, for causes so far. What it
    /// holds lives as long as the table: of that, a [`Weak`](std::sync::Weak) reference alone.
    pub fn on_server_mode(&self, tell: impl Fn(ServerReason) + Send + Sync + 'static) {
        let tell: std::sync::Arc<ledger::Tell> = std::sync::Arc::new(tell);
        let (causes, _before) = self.shared.ledger().set_tell(std::sync::Arc::clone(&tell));
        for cause in causes {
            tell(cause);
        }
    }

    /// Opens an inode whose backing file the server has opened with the client's flags.
    ///
    /// The first open registers the file, later ones share its id; or it is in server mode, see
    /// [`OpenFile::server_reason`]. The fd is not kept.
    ///
    /// What the opens are granted adds up while the inode is registered: one that may read and one that may
    /// write are answered with one id. Where the registrar [enforces](Register::enforces_grant) its grant,
    /// that of the first open ([`ServerFile::grant`]) is the most that a later one can get; an idle inode is
    /// registered anew for more.
    ///
    /// # Errors
    ///
    /// [`OpenError`]; the open is then not counted, and nothing changed.
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
            let looked = file.look()?;
            if looked.is_immutable && wanted != Access::ReadOnly {
                return Err(OpenError::Immutable);
            }
            granted = looked.without_writing(granted);
            let admits = |mode: &Mode, is_open: bool| {
                // Idle, it was not append-only when it was registered.
                if !is_open && looked.refusal.is_some() {
                    return Err(OpenError::DifferentFile);
                }
                // The numbers of an open file change when overlayfs copies it up. The server knows.
                match file.identity {
                    Some(known) if is_open && admits(mode, known).is_ok() => Ok(()),
                    _ => admits(mode, looked.id),
                }
            };
            let decide = || shared.register(file, looked, file.at_most(granted));
            shared.join_or_insert(inode, admits, decide)?
        };
        if let Some(Mode::Passthrough(registered)) = open.mode() {
            registered.add(granted);
        }
        Ok(self.opened(open))
    }

    /// Opens an inode that is registered already, without a fd and without a system call.
    ///
    /// `None` when the server must open the file itself and call [`open`](Self::open): the inode is
    /// not registered, or the client asks for more than was granted so far, or for `O_TRUNC`.
    ///
    /// This skips the permission check and the errno of the server's own open: for `default_permissions`, say. A
    /// file that has become immutable since it was opened for writing is not noticed.
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
    /// `None` while the inode is open in passthrough mode: then [`open`](Self::open) it, or
    /// [`share`](Self::share). An idle registration is closed.
    pub fn serve(&self, inode: &K) -> Option<OpenFile<R, K>> {
        let admits = |mode: &Mode, _| match mode {
            Mode::Server(_) => Ok(()),
            Mode::Passthrough(_) => Err(()),
        };
        let chosen = || Mode::Server(ServerReason::Chosen);
        let open = self.shared.join_or_insert(inode, admits, chosen).ok()?;
        Some(self.opened(open))
    }

    /// An open that a predecessor on the same connection answered with `id`, until its RELEASE. To be called
    /// for each of the inode's opens; `file` is the fd of this one.
    ///
    /// From the first one on the id is the table's to close. It counts whatever the limit.
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
        let looked = file.look()?;
        let granted = looked.without_writing(file.granted()?);
        // What has this id is not closed to make room for it.
        let admits = |mode: &Mode, _| match mode {
            Mode::Passthrough(known) if known.id == *id => Ok(()),
            Mode::Passthrough(_) | Mode::Server(_) => Err(OpenError::DifferentFile),
        };
        let decide = || {
            self.shared.ledger().stats.ids += 1;
            let at_most = file.at_most(granted);
            Mode::Passthrough(Registered::new(id.alias(), looked.id, at_most, None))
        };
        let open = self.shared.join_or_insert(inode, admits, decide)?;
        match open.mode() {
            Some(Mode::Passthrough(registered)) if registered.file == looked.id => {
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

    /// Detaches an inode from its number, which the server is about to give to another one: after
    /// FORGET, or together with another generation. The next open under this number starts fresh. Those that
    /// are open keep their registration.
    ///
    /// For the kernel it must be another inode as well. While it has the old one open under this node
    /// id, a reply with the new id gives the client `EIO`. A file that was replaced under an open inode
    /// is [`DifferentFile`](OpenError::DifferentFile) until the inode was released.
    pub fn forget(&self, inode: &K) {
        let _done = self.shared.detach(inode, true);
    }

    /// Closes what is registered for an inode that is not open, so that the next open starts fresh; false
    /// while it is open. Where closing fails the id is kept for [`retry_closes`](Self::retry_closes), and not
    /// found again. One that another thread is closing may still be registered for a moment.
    #[must_use]
    pub fn invalidate(&self, inode: &K) -> bool {
        self.shared.detach(inode, false)
    }

    /// Tries again to register after a failure that concerned the connection, when its cause was removed. An
    /// inode that is open in server mode stays in it until its last release.
    pub fn reset(&self) {
        self.shared.ledger().reset();
    }

    /// How many ids may be registered at a time. At the limit an open closes an idle one, or waits for a
    /// close that another thread is making, before it settles for server mode. A limit below what there are
    /// closes idle ids at once, others as inodes are released.
    pub fn set_limit(&self, limit: usize) {
        self.shared.ledger().stats.limit = limit;
        self.shared.trim();
    }

    /// How many ids are kept after the last release, for reopening: none, unless this is called. The
    /// one that was released longest ago goes first. They pin their files and mounts.
    pub fn set_idle_limit(&self, limit: usize) {
        self.shared.ledger().idle_limit = limit;
        self.shared.trim();
    }

    /// Whether the process keeps an fd for as long as its id is registered, from now on: no, unless this is
    /// called. An inode for which no fd can be kept is in server mode ([`ServerReason::NoFd`]).
    pub fn set_keep_fds(&self, keep: bool) {
        self.shared.ledger().keep_fds = keep;
    }

    /// Tries again to close what could not be closed, from a thread that is permitted to.
    ///
    /// # Errors
    ///
    /// The cause of the first that failed again; all are tried.
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

    /// All inodes that are open or registered, without those that are just being registered or closed.
    #[must_use]
    pub fn list(&self) -> Listing<K> {
        Listing(self.shared.entries())
    }
}

/// Idle ids are closed; open files stay as they are until they are released. An id that cannot be
/// closed then, or now, stays registered until the connection ends.
impl<R: Register, K: Hash + Eq + Clone> Drop for BackingTable<R, K> {
    fn drop(&mut self) {
        self.shared.shut_down();
    }
}

impl<R: Register, K: Hash + Eq + Clone> OpenFile<R, K> {
    /// What the server knows the inode by.
    #[must_use]
    pub fn inode(&self) -> &K {
        self.open.key()
    }

    /// Which of the table's locks its inode is under.
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

    /// Whether the kernel reads and writes the backing file; else the server does.
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
    /// Passthrough mode keeps `NOFLUSH` and `PARALLEL_DIRECT_WRITES` alone: the kernel refuses others, and
    /// with `DIRECT_IO` it would ask the server to read and write ([`OpenReply::passthrough`] permits
    /// that). Server mode keeps all but `PASSTHROUGH`.
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
