//! [`BackingTable`]: one backing id for each open inode, and the only mode that the kernel accepts.
//!
//! # How it stays right
//!
//! An open is counted in the slot of its inode, under the lock of its shard. The last release parks the
//! inode there, or begins to close its id; from then on no open finds it. Nothing else counts, so that
//! whoever merely looks at an inode is in nobody's way.
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

use static_assertions::{assert_eq_size, assert_impl_all};

use crate::access::Access;
use crate::device::FuseDevice;
use crate::error::{BackingCloseCause, Busy, ServerReason, TableOpenError};
use crate::file::ServerFile;
use crate::register::Register;
use crate::reply::{OpenFlags, OpenReply, OpenReplyError};
use crate::sync::Arc;
pub use listing::{Entry, Listing, TableStats};
use mode::Mode;
use shared::{Open, Shared};

/// How each OPEN is answered: one backing id for each open inode, and one mode.
///
/// The kernel accepts one of two modes for an inode at a time, *passthrough*, with the same id for
/// every open, or *server*; a mixture gives the client a bare `EIO`, at this open or a later one, of
/// which the server hears nothing. The table keeps to it: the first open of an inode decides, all others
/// follow until the last one is released. The kernel's one exception is a passthrough open after plain
/// `DIRECT_IO` ones. It does not hold once a client has mapped such a file `MAP_SHARED`, which no server
/// sees; so the table does not use it.
///
/// `R` is who registers, see [`Register`]: a [`FuseDevice`], or a reference or [`Arc`] of one.
/// `K` is what the server knows an inode by, its node id most often; its `Hash` and `Eq` must not panic for a
/// key that is in the table.
///
/// # The life of an open
///
/// 1. OPEN or CREATE: the server opens its backing file itself, with the client's flags, as it would
///    without passthrough. So permissions are checked, and the errno is the true one where the
///    kernel's own opening of the file later would give `EIO`: `ETXTBSY`, `EROFS`, `EINVAL` for an
///    `O_DIRECT` that the filesystem does not know. It hands the fd to [`open`](Self::open).
/// 2. The [`OpenFile`] that comes back is stored under the open's file handle **before** the reply is
///    written: the RELEASE of one handle can overtake the reply of another, and its own follows as
///    soon as the kernel has the reply.
/// 3. [`OpenFile::reply`] is answered.
/// 4. RELEASE: the [`OpenFile`] is dropped. The last one closes the id.
///
/// If the reply fails, keep the [`OpenFile`] all the same: a RELEASE follows an OPEN that failed in
/// the kernel or was interrupted. There are two cases without: an OPEN that the server answers with
/// an errno, and a CREATE reply with invalid attributes.
///
/// [`share`](Self::share) answers a further open without a fd or a system call, for servers that
/// have no need of step 1.
///
/// Never answer OPEN with `ENOSYS`: it ends OPEN requests, and so passthrough, for the whole connection.
///
/// A mapping outlives its RELEASE: what a client has mapped in passthrough mode goes on to the backing
/// file, whatever mode the inode has by then.
///
/// # When passthrough is not to be had
///
/// [`open`](Self::open) succeeds all the same, in server mode, and
/// [`OpenFile::server_reason`] says why. What concerns the file puts this inode in server mode until
/// its last release. What concerns the connection ([`Scope::Connection`](crate::Scope::Connection)) is remembered, and no
/// further registration tried, until [`reset`](Self::reset). What concerns the calling thread, a missing
/// capability, is not: it leaves this inode in server mode until its last release, and other threads go on
/// registering. After a transient failure the next open after the last release tries again.
///
/// A file that is append-only when its inode is opened first is in server mode ([`ServerReason::AppendOnly`]).
///
/// # What is registered
///
/// The kernel keeps what was registered open until its id is closed. An fd that can write makes the file
/// busy for that time: running it gives `ETXTBSY`, a lease `EAGAIN`, remounting its filesystem read-only
/// `EBUSY`; and it keeps a flock(2). So the table registers an `O_PATH` fd of the file, which does none of
/// that: the one in [`ServerFile::path_fd`], if that is of the same file, or else one that it makes with
/// `open_tree(2)`. The kernel takes it from Linux 6.12 on. Before, or where a policy denies `open_tree(2)`, the
/// table registers the fd itself, which [`TableStats::by_open_fd`] counts.
///
/// With [`set_keep_fds`](Self::set_keep_fds) the process keeps that fd for as long as the id is registered:
/// lsof shows it, and `RLIMIT_NOFILE` accounts it.
///
/// # Bounded
///
/// The kernel does not account for ids. The table holds at most [`limit`](Self::set_limit) of them, by
/// default the soft `RLIMIT_NOFILE`. [`list`](Self::list) shows what is registered.
///
/// # Closing that fails
///
/// A close fails on a thread without `CAP_SYS_ADMIN`, say after the server dropped its privileges.
/// The id is then kept: counted, listed, used again when the inode is opened next with the same file,
/// unless it was forgotten or invalidated, and closed by [`retry_closes`](Self::retry_closes).
///
/// # After fork(2)
///
/// The child has a copy of the table and of every [`OpenFile`], on the same connection: what it drops is
/// closed for the parent as well. `_exit` and exec drop nothing.
///
/// # Restarting on a preserved device fd
///
/// A server that hands its device fd to a successor hands over open files and their ids with it. The
/// successor's table knows neither: an open that it answers with a new id gives `EIO` while the inode is open
/// with the old one. Hand over the ids as well, keep them as [`BackingFile::from_id`](crate::BackingFile::from_id),
/// and answer with them, or in server mode for what was in server mode, until these inodes have been released.
///
/// # Examples
///
/// In the [crate's documentation](crate#the-way-of-a-file), in the README on fuser, at [`Register`] without
/// a kernel.
pub struct BackingTable<R: Register, K: Hash + Eq + Clone = u64> {
    shared: Arc<Shared<R, K>>,
}

/// One open of an inode, from before its reply until its RELEASE.
///
/// Dropping it is the release; the last one of an inode closes its id. It owns what it needs, and may
/// outlive the table. After fork(2) the child must not drop its copy: that closes the parent's id.
#[must_use = "dropping an OpenFile releases it: keep it under its file handle until RELEASE"]
pub struct OpenFile<R: Register, K: Hash + Eq + Clone = u64> {
    open: Open<R, K>,
}

assert_eq_size!(OpenFile<&FuseDevice<std::os::fd::OwnedFd>>, usize);
assert_impl_all!(BackingTable<FuseDevice<std::os::fd::OwnedFd>>: Send, Sync);
assert_impl_all!(OpenFile<FuseDevice<std::os::fd::OwnedFd>>: Send, Sync);

impl<R: Register, K: Hash + Eq + Clone> BackingTable<R, K> {
    /// An empty table for the connection of `registrar`.
    ///
    /// Its limit is the soft `RLIMIT_NOFILE`; it keeps no idle ids, and no fds.
    pub fn new(registrar: R) -> Self {
        Self {
            shared: Arc::new(Shared::new(registrar)),
        }
    }

    /// Opens an inode whose backing file the server has opened with the client's flags.
    ///
    /// The first open registers the file, later ones share its id; or it is in server mode, see
    /// [`OpenFile::server_reason`]. The fd is not kept.
    ///
    /// - `client_flags`: of the OPEN or CREATE request. `O_TRUNC` asks for nothing here: the server's
    ///   own open with these flags has truncated the file, or failed.
    /// - `file`: what the server has opened, most often [`ServerFile::of`] it. What its opens are granted
    ///   adds up while the inode is registered: one open that may read and one that may write are
    ///   answered with one id. Where the registrar [enforces](Register::enforces_grant) its grant, that of
    ///   the first open ([`ServerFile::grant`]) is the most that a later one can get. While the inode is
    ///   idle, one that wants more has it registered anew.
    ///
    /// # Errors
    ///
    /// [`TableOpenError`]; the open is then not counted, and nothing changed.
    pub fn open(
        &self,
        inode: &K,
        client_flags: i32,
        file: ServerFile<'_>,
    ) -> Result<OpenFile<R, K>, TableOpenError> {
        let wanted = Access::wanted_by_mode(client_flags);
        let granted = file.access();
        if !granted.allows(wanted) {
            return Err(TableOpenError::AccessExceeded { granted, wanted });
        }
        let looked = file.look().map_err(TableOpenError::Unreadable)?;
        let shared = &self.shared;
        let enforced = shared.registrar.enforces_grant();
        let admits = |mode: &Mode, is_open: bool| match mode {
            // Idle, it was not append-only when it was registered.
            Mode::Passthrough(registered)
                if registered.file != looked.id || !is_open && looked.refusal.is_some() =>
            {
                Err(TableOpenError::DifferentFile)
            }
            Mode::Passthrough(registered) if enforced && !registered.grant.allows(wanted) => {
                let registered = registered.grant;
                Err(TableOpenError::GrantExceeded { registered, wanted })
            }
            Mode::Passthrough(_) | Mode::Server(_) => Ok(()),
        };
        let open = shared.join_or_insert(inode, admits, || shared.register(&file, looked))?;
        if let Some(Mode::Passthrough(registered)) = open.mode() {
            registered.add(granted, enforced);
        }
        Ok(OpenFile { open })
    }

    /// Opens an inode that is registered already, without a fd and without a system call.
    ///
    /// `None` when the server must open the file itself and call [`open`](Self::open): the inode is
    /// not registered, or the client asks for more than was granted so far, or for `O_TRUNC`.
    ///
    /// What this skips: the permission check and the errno that the server's own open would have
    /// given. It is for servers that check permissions elsewhere, such as those mounted with
    /// `default_permissions`.
    #[inline]
    pub fn share(&self, inode: &K, client_flags: i32) -> Option<OpenFile<R, K>> {
        if Access::truncates(client_flags) {
            return None;
        }
        let wanted = Access::wanted_by_mode(client_flags);
        let admits = |mode: &Mode| match mode {
            Mode::Passthrough(registered) => registered.has_granted(wanted),
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
        Some(OpenFile { open })
    }

    /// Detaches an inode from its number, which the server is about to give to another one: after
    /// FORGET, or together with another generation.
    ///
    /// The next open under this number starts fresh. Those that are open keep their registration.
    ///
    /// For the kernel it must be another inode as well. While it has the old one open under this node
    /// id, a reply with the new id gives the client `EIO`. A file that was replaced under an open inode
    /// is opened afresh once the inode has been released; until then it is
    /// [`DifferentFile`](TableOpenError::DifferentFile).
    pub fn forget(&self, inode: &K) {
        let _open_or_not = self.shared.detach(inode, true);
    }

    /// Closes what is registered for an inode that is not open, so that the next open starts fresh. Where
    /// closing fails the id is kept for [`retry_closes`](Self::retry_closes), and not found again. One that
    /// another thread is closing may still be registered for a moment.
    ///
    /// # Errors
    ///
    /// [`Busy`] while the inode is open: all of its opens have one mode and one id. See
    /// [`forget`](Self::forget) for an inode that is not the same any more.
    pub fn invalidate(&self, inode: &K) -> Result<(), Busy> {
        self.shared.detach(inode, false).map_err(|opens| Busy {
            opens: opens as u64,
        })
    }

    /// Forgets what was remembered of the connection, so that registering is tried again: after the
    /// server got the capability back, or the mount was completed. An inode that is open in server mode
    /// stays in it until its last release.
    pub fn reset(&self) {
        self.shared.ledger().reset();
    }

    /// How many ids may be registered at a time. At the limit an open closes an idle one, or waits for a
    /// close that another thread is making, before it settles for server mode. Below what there are now the
    /// limit takes effect as inodes are released; idle ids are closed at once.
    pub fn set_limit(&self, limit: usize) {
        self.shared.ledger().stats.limit = limit;
        self.shared.trim();
    }

    /// How many ids are kept after the last release, for reopening: none, unless this is called. The
    /// one that was released longest ago goes first. They pin their files, and the mounts that these
    /// are on.
    pub fn set_idle_limit(&self, limit: usize) {
        self.shared.ledger().idle_limit = limit;
        self.shared.trim();
    }

    /// Whether the process keeps the fd that it registers for as long as the id is registered: no, unless
    /// this is called. Then lsof and `/proc/PID/fd` show every backing file, and `RLIMIT_NOFILE` accounts it.
    /// An inode for which no fd can be kept is in server mode ([`ServerReason::NoFd`]). Applies to what is
    /// registered from now on.
    pub fn set_keep_fds(&self, keep: bool) {
        self.shared.ledger().keep_fds = keep;
    }

    /// Tries again to close what could not be closed, from a thread that is permitted to.
    ///
    /// # Errors
    ///
    /// The cause of the first that failed again; all are tried.
    pub fn retry_closes(&self) -> Result<(), BackingCloseCause> {
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

    /// All inodes that are open or registered, in no particular order, without those that are just
    /// being registered or closed. [`Listing`] is also a table to print.
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
    /// Whether the kernel reads and writes the backing file; else the server does.
    #[must_use]
    pub fn is_passthrough(&self) -> bool {
        matches!(self.open.mode(), Some(Mode::Passthrough(_)))
    }

    /// Why the inode is in server mode; `None` in passthrough mode.
    #[must_use]
    pub fn server_reason(&self) -> Option<ServerReason> {
        match self.open.mode() {
            Some(Mode::Server(reason)) => Some(*reason),
            Some(Mode::Passthrough(_)) | None => None,
        }
    }

    /// The reply to this OPEN or CREATE, with `flags` besides what the mode demands.
    ///
    /// # Errors
    ///
    /// [`OpenReplyError::FlagsNotAllowed`]: in passthrough mode all but `DIRECT_IO`, `NOFLUSH` and
    /// `PARALLEL_DIRECT_WRITES` are refused, in server mode `PASSTHROUGH` is.
    pub fn reply(&self, flags: OpenFlags) -> Result<OpenReply<'_>, OpenReplyError> {
        match self.open.mode() {
            Some(Mode::Passthrough(registered)) => OpenReply::with_id(&registered.id, flags),
            Some(Mode::Server(_)) | None => OpenReply::server(flags),
        }
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
