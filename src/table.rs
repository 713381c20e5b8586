//! [`BackingTable`]: one backing id for each open inode, and the only mode that the kernel accepts.
//!
//! # How it stays right
//!
//! An open is a reference to its inode: [`OpenFile`] is an `Arc`, the map has a `Weak`, and the drop of
//! the last reference is the last release, which closes the id. What is kept without opens, idle or
//! not closed because closing failed, is a reference in `Parked`. So nothing that is open can be
//! closed, whatever the order in which threads get there.
//!
//! The map is split into shards, each behind a lock of its own. Whoever opens an inode gets its
//! reference under the lock of its shard, and says there that it is parked no more; whoever wants an
//! inode that is *not* open, to forget it or to put another in its place, looks there for the opposite.
//!
//! No lock is held over an ioctl but `Inode::deciding`, which those wait for who open the same inode
//! while it is being registered, and nobody else. Locks are taken in the order `deciding`, shard, then
//! one of `parked`, `strays` and `refused`; the ioctl of a close is made under none, or `deciding` of
//! another inode. A last reference is never dropped under the lock of a shard.

mod hash;
mod inode;
mod listing;
mod shared;

use std::collections::HashMap;
use std::collections::hash_map::Entry as MapEntry;
use std::fmt;
use std::hash::Hash;
use std::io;
use std::ops::Deref;
use std::os::fd::AsFd;

use rustix::io::Errno;
use static_assertions::{assert_eq_size, assert_impl_all};
use thiserror::Error;

#[cfg(not(all(test, fuse_backing_modelled)))]
use crate::device as kernel;
use crate::device::FuseDevice;
use crate::error::{BackingCloseCause, BackingOpenError};
#[cfg(all(test, fuse_backing_modelled))]
use crate::model as kernel;
use crate::open::{Access, OpenFlags, OpenReply, OpenReplyError};
use crate::sync::{Arc, Ordering, Weak, lock, read, write};
use inode::{FileId, Inode, Mode};
pub use listing::{Entry, Listing, TableStats};
use shared::{Found, Shared, Verdict};

/// How each OPEN is answered: one backing id for each open inode, and one mode.
///
/// The kernel accepts one of two modes for an inode at a time, *passthrough*, with the same id for
/// every open, or *server*; a mixture gives the client a bare `EIO`, at this open or a later one, of
/// which the server hears nothing. The table keeps to it: the first open of an inode decides, all others follow until the
/// last one is released.
///
/// `D` is how the table holds the device, a reference or an [`Arc`]. `K` is what the
/// server knows an inode by, its node id most often; its `Hash` and `Eq` must not panic for a key that is
/// in the table.
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
/// Never answer OPEN with `ENOSYS`: the kernel then sends no OPEN any more on the whole connection,
/// and nothing can be passed through.
///
/// A mapping outlives its RELEASE: what a client has mapped in passthrough mode goes on reading and
/// writing the backing file after it closed the file, whatever mode the inode has by then.
///
/// # When passthrough is not to be had
///
/// [`open`](Self::open) succeeds all the same, in server mode, and
/// [`OpenFile::server_reason`] says why. What concerns the file puts this inode in server mode until
/// its last release. What concerns the connection ([`Scope::Connection`](crate::Scope::Connection)) is remembered, and no
/// further registration tried, until [`reset`](Self::reset): a single thread without the capability
/// turns passthrough off for all. After a transient failure the inode stays in server mode until its last
/// release, and the next open tries again.
///
/// # Bounded
///
/// The kernel does not account for ids. The table holds at most [`limit`](Self::set_limit) of them,
/// by default the soft `RLIMIT_NOFILE`; at the limit, inodes are opened in server mode.
/// [`list`](Self::list) shows what is registered, which lsof cannot.
///
/// # Closing that fails
///
/// A close fails on a thread without `CAP_SYS_ADMIN`, say after the server dropped its privileges.
/// The id is then kept: counted, listed, used again when the inode is opened next with the same file,
/// unless it was forgotten or invalidated, and closed by [`retry_closes`](Self::retry_closes).
///
/// # Restarting on a preserved device fd
///
/// A server that hands its device fd to a successor hands over open files and their ids with it. The
/// successor's table knows neither: inodes that are open stay in their mode with the *old* id, and an
/// open that it answers with a new one gives `EIO`. Hand over the ids as well, keep them as
/// [`BackingFile::from_id`](crate::BackingFile::from_id), and answer with them, or in server mode
/// for what was in server mode, until these inodes have been released.
///
/// # Examples
///
/// With fuser, whose handler has to answer in any case; the README has a whole server:
///
/// ```no_run
/// use fuse_backing::{Access, BackingTable, FuseDevice, OpenFile, OpenFlags};
/// use std::{collections::HashMap, fs::File, os::fd::OwnedFd, sync::{Arc, Mutex, PoisonError}};
///
/// type Device = Arc<FuseDevice<OwnedFd>>;
///
/// struct Server {
///     table: BackingTable<Device>,
///     /// By file handle. The file is for server mode.
///     handles: Mutex<HashMap<u64, (OpenFile<Device>, File)>>,
/// }
///
/// impl Server {
///     /// `Err` is the errno to answer.
///     fn opened(&self, ino: u64, flags: i32) -> Result<(OpenFile<Device>, File), i32> {
///         let file = File::open("/srv/data/file") // with `flags`, in earnest
///             .map_err(|e| e.raw_os_error().unwrap_or(libc::EIO))?;
///         let access = Access::of(&file).map_err(|e| e.errno().raw_os_error())?;
///         let open = self.table.open(&ino, flags, &file, access);
///         Ok((open.map_err(|e| e.errno().raw_os_error())?, file))
///     }
///
///     fn open(&self, ino: u64, flags: fuser::OpenFlags, fh: u64, reply: fuser::ReplyOpen) {
///         let (open, file) = match self.opened(ino, flags.0) {
///             Ok(opened) => opened,
///             Err(errno) => return reply.error(fuser::Errno::from_i32(errno)),
///         };
///         let Ok(answer) = open.reply(OpenFlags::empty()) else {
///             return reply.error(fuser::Errno::EIO);
///         };
///         let (open_flags, id) = (answer.open_flags(), answer.backing_id());
///         let open_flags = fuser::FopenFlags::from_bits_retain(open_flags);
///         let mut handles = self.handles.lock().unwrap_or_else(PoisonError::into_inner);
///         handles.insert(fh, (open, file));
///         drop(handles);
///         if id == 0 {
///             reply.opened(fuser::FileHandle(fh), open_flags);
///         } else {
///             // SAFETY: registered with this session, and kept in `handles` until RELEASE.
///             let lent = unsafe { reply.wrap_backing(id as u32) };
///             reply.opened_passthrough(fuser::FileHandle(fh), open_flags, &lent);
///             let _ = lent.into_raw(); // not fuser's to close
///         }
///     }
///
///     fn release(&self, fh: u64) {
///         let mut handles = self.handles.lock().unwrap_or_else(PoisonError::into_inner);
///         let closed = handles.remove(&fh);
///         drop(handles); // not under the lock: the last release makes an ioctl
///         drop(closed);
///     }
/// }
/// ```
///
/// A server that writes the bytes itself:
///
/// ```no_run
/// # use fuse_backing::{Access, BackingTable, FuseDevice, OpenFlags};
/// # use std::fs::File;
/// # fn send(_: &[u8]) {}
/// # fn f(table: BackingTable<&FuseDevice<File>>, nodeid: u64, flags: u32, fh: u64) -> std::io::Result<()> {
/// let file = File::open("/srv/data/file")?;
/// match table.open(&nodeid, flags as i32, &file, Access::of(&file)?) {
///     Ok(open) => {
///         let out = open.reply(OpenFlags::empty())?.to_fuse_open_out(fh);
///         // ... keep `open` and `file` under `fh`, then:
///         send(&out.to_bytes());
///     }
///     Err(why) => {
///         let errno = why.errno(); // to be answered
///         eprintln!("{why}");
///     }
/// }
/// # Ok(()) }
/// ```
pub struct BackingTable<D: Deref<Target: AsFd>, K: Hash + Eq + Clone = u64> {
    shared: Arc<Shared<D, K>>,
}

/// One open of an inode, from before its reply until its RELEASE.
///
/// Dropping it is the release; the last one of an inode closes its id. It owns what it needs, and may
/// outlive the table.
#[must_use = "dropping an OpenFile releases it: keep it under its file handle until RELEASE"]
pub struct OpenFile<D: Deref<Target: AsFd>, K: Hash + Eq + Clone = u64> {
    inode: Arc<Inode<D, K>>,
}

assert_eq_size!(OpenFile<&FuseDevice<std::os::fd::OwnedFd>>, usize);
assert_impl_all!(BackingTable<std::sync::Arc<FuseDevice<std::os::fd::OwnedFd>>>: Send, Sync);
assert_impl_all!(OpenFile<std::sync::Arc<FuseDevice<std::os::fd::OwnedFd>>>: Send, Sync);

impl<D: Deref<Target: AsFd>, K: Hash + Eq + Clone> BackingTable<D, K> {
    /// An empty table for the connection of `device`.
    ///
    /// Its limit is the soft `RLIMIT_NOFILE`; it keeps no idle ids.
    pub fn new<Fd: AsFd>(device: D) -> Self
    where
        D: Deref<Target = FuseDevice<Fd>>,
    {
        Self {
            shared: Arc::new(Shared::new(device)),
        }
    }

    /// Opens an inode whose backing file the server has opened with the client's flags.
    ///
    /// The first open registers `fd`, later ones share its id; or it is in server mode, see
    /// [`OpenFile::server_reason`]. `fd` is not kept.
    ///
    /// - `client_flags`: of the OPEN or CREATE request. `O_TRUNC` asks for nothing here: the server's
    ///   own open with these flags has truncated the file, or failed.
    /// - `access`: what the server grants through `fd`, most often [`Access::of`] it. Grants add up
    ///   while the inode is registered: one open that may read and one that may write are answered
    ///   with one id.
    ///
    /// # Errors
    ///
    /// [`TableOpenError`]; the open is then not counted, and nothing changed.
    pub fn open(
        &self,
        inode: &K,
        client_flags: i32,
        fd: impl AsFd,
        access: Access,
    ) -> Result<OpenFile<D, K>, TableOpenError> {
        let wanted = Access::wanted_by_mode(client_flags);
        if !access.allows(wanted) {
            return Err(TableOpenError::AccessExceeded {
                granted: access,
                wanted,
            });
        }
        let fd = fd.as_fd();
        let file = FileId::of(fd).map_err(TableOpenError::Unreadable)?;
        let judge = |inode: &Inode<D, K>| match inode.mode.get() {
            Some(Mode::Passthrough {
                file: registered, ..
            }) if *registered != file => {
                // Parked, its number names another file by now.
                if inode.is_parked() {
                    Verdict::Replace
                } else {
                    Verdict::Refuse
                }
            }
            _ => Verdict::Join,
        };
        let found = self.shared.find_or_insert(inode, judge);
        let inode = found.ok_or(TableOpenError::DifferentFile)?;
        let mode = inode.decide(|| inode.shared.register(fd, file));
        if let Mode::Passthrough {
            file: registered, ..
        } = mode
        {
            // Somebody who was here at the same time may have decided.
            if *registered != file {
                return Err(TableOpenError::DifferentFile);
            }
            inode.grant(access);
        }
        Ok(OpenFile { inode })
    }

    /// Opens an inode that is registered already, without a fd and without a system call.
    ///
    /// `None` when the server must open the file itself and call [`open`](Self::open): the inode is
    /// not registered, or the client asks for more than was granted so far, or for `O_TRUNC`.
    ///
    /// What this skips: the permission check and the errno that the server's own open would have
    /// given. It is for servers that check permissions elsewhere, such as those mounted with
    /// `default_permissions`.
    pub fn share(&self, inode: &K, client_flags: i32) -> Option<OpenFile<D, K>> {
        if Access::truncates(client_flags) {
            return None;
        }
        let wanted = Access::wanted_by_mode(client_flags);
        let judge = |inode: &Inode<D, K>| match inode.mode.get() {
            Some(Mode::Passthrough { .. }) if inode.grants(wanted) => Verdict::Join,
            _ => Verdict::Refuse,
        };
        match self.shared.find(inode, judge) {
            Found::Joined(inode) => Some(OpenFile { inode }),
            Found::Refused | Found::Nothing => None,
        }
    }

    /// Opens an inode in server mode because the server wants to read and write it itself.
    ///
    /// `None` while the inode is open in passthrough mode: then [`open`](Self::open) it, or
    /// [`share`](Self::share). An idle registration is closed.
    pub fn serve(&self, inode: &K) -> Option<OpenFile<D, K>> {
        let judge = |inode: &Inode<D, K>| match inode.mode.get() {
            Some(Mode::Passthrough { .. }) if inode.is_parked() => Verdict::Replace,
            Some(Mode::Passthrough { .. }) => Verdict::Refuse,
            Some(Mode::Server(_)) | None => Verdict::Join,
        };
        let inode = self.shared.find_or_insert(inode, judge)?;
        match inode.decide(|| Mode::Server(ServerReason::Chosen)) {
            Mode::Server(_) => Some(OpenFile { inode }),
            Mode::Passthrough { .. } => None,
        }
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
        let shared = &self.shared;
        let mut map = write(shared.shard(inode));
        let Some(inode) = map.remove(inode).and_then(|inode| inode.upgrade()) else {
            return;
        };
        if inode.is_parked() {
            drop(map);
            shared.evict(inode);
        } else {
            // Under the lock of the shard, so that `list` finds it there or here.
            let address = Arc::as_ptr(&inode).addr();
            inode.stray.store(address, Ordering::Relaxed);
            lock(&shared.strays).insert(address, Arc::downgrade(&inode));
            // Before `inode`, which is the last reference if it was released by now.
            drop(map);
        }
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
        let shared = &self.shared;
        let mut map = write(shared.shard(inode));
        // From here on no code of the key's is run, which could panic with a reference under the lock.
        let MapEntry::Occupied(entry) = map.entry(inode.clone()) else {
            return Ok(());
        };
        if let Some(found) = entry.get().upgrade() {
            if found.is_parked() {
                entry.remove();
                drop(map);
                shared.evict(found);
                return Ok(());
            }
            let opens = found.opens();
            let Some(last) = Arc::into_inner(found) else {
                return Err(Busy { opens });
            };
            // Released a moment ago.
            entry.remove();
            drop(map);
            drop(last);
        } else {
            // It is just being released, and not to become idle.
            entry.remove();
        }
        Ok(())
    }

    /// Forgets what was remembered of the connection, so that registering is tried again: after the
    /// server got the capability back, or the mount was completed. An inode that is open in server mode
    /// stays in it until its last release.
    pub fn reset(&self) {
        let mut refused = lock(&self.shared.refused);
        // What an ioctl says that began before this is not remembered any more.
        self.shared.resets.fetch_add(1, Ordering::Release);
        self.shared.is_refused.store(false, Ordering::Release);
        *refused = None;
    }

    /// How many ids may be registered at a time. Below what there are now it takes effect as inodes
    /// are released; idle ids are closed at once.
    pub fn set_limit(&self, limit: usize) {
        self.shared.limit.store(limit, Ordering::Relaxed);
        self.shared.trim();
    }

    /// How many ids are kept after the last release, for reopening: none, unless this is called. The
    /// one that was released longest ago goes first. They pin their files, and the mounts that these
    /// are on.
    pub fn set_idle_limit(&self, limit: usize) {
        self.shared.idle_limit.store(limit, Ordering::Relaxed);
        self.shared.trim();
    }

    /// Tries again to close what could not be closed, from a thread that is permitted to.
    ///
    /// # Errors
    ///
    /// The cause of the first that failed again; all are tried.
    pub fn retry_closes(&self) -> Result<(), BackingCloseCause> {
        let unclosed = std::mem::take(&mut lock(&self.shared.parked).unclosed);
        let mut result = Ok(());
        for (inode, _) in unclosed.into_values() {
            // Unless it was opened in between.
            if let Some(mut inode) = self.shared.unless_opened(inode) {
                result = result.and(inode.close());
            }
        }
        result
    }

    /// Figures of the table.
    #[must_use]
    pub fn stats(&self) -> TableStats {
        let shared = &self.shared;
        TableStats {
            ids: shared.ids.load(Ordering::Relaxed),
            limit: shared.limit.load(Ordering::Relaxed),
            idle: lock(&shared.parked).idle.len(),
            over_limit: shared.over_limit.load(Ordering::Relaxed) as u64,
            close_failures: shared.close_failures.load(Ordering::Relaxed) as u64,
            refused: shared.refused(),
        }
    }

    /// All inodes that are open or registered, in no particular order, without those that are just
    /// being registered or closed. [`Listing`] is also a table to print.
    ///
    /// One that is forgotten, or fails to be closed, in the meantime can be listed twice. A release
    /// that it meets can become its own to complete: call it from a thread that may close.
    #[must_use]
    pub fn list(&self) -> Listing<K> {
        let shared = &self.shared;
        let now = shared.seconds();
        let mut causes = HashMap::new();
        let (mut rows, mut last) = (Vec::new(), Vec::new());
        // Here, so that a key whose clone panics does not drop it under a lock.
        let mut held = None;
        // Not kept longer than it takes: a reference of ours looks like an open.
        let mut add = |inode: Arc<Inode<D, K>>| {
            let row = held.insert(inode).row(now);
            match held.take().and_then(Arc::into_inner) {
                None => rows.extend(row),
                released => last.extend(released),
            }
        };
        for shard in &shared.shards {
            read(&shard.0)
                .values()
                .filter_map(Weak::upgrade)
                .for_each(&mut add);
        }
        lock(&shared.strays)
            .values()
            .filter_map(Weak::upgrade)
            .for_each(&mut add);
        for (number, (inode, cause)) in &lock(&shared.parked).unclosed {
            causes.insert(*number, *cause);
            if inode.is_stray() {
                add(Arc::clone(inode));
            }
        }
        drop(last);
        let entry = |(number, mut entry): (usize, Entry<K>)| {
            entry.close_failed = causes.get(&number).copied();
            entry
        };
        Listing(rows.into_iter().map(entry).collect())
    }
}

/// Idle ids are closed; open files stay as they are until they are released. An id that cannot be
/// closed then, or now, stays registered until the connection ends.
impl<D: Deref<Target: AsFd>, K: Hash + Eq + Clone> Drop for BackingTable<D, K> {
    fn drop(&mut self) {
        let mut parked = lock(&self.shared.parked);
        // From here on nothing is parked: it would keep the device, and so the connection.
        parked.orphaned = true;
        let idle = std::mem::take(&mut parked.idle);
        let unclosed = std::mem::take(&mut parked.unclosed);
        drop(parked);
        // Which closes them. Whoever wants to know retries before: a destructor has nobody to tell.
        drop((idle, unclosed));
    }
}

impl<D: Deref<Target: AsFd>, K: Hash + Eq + Clone> OpenFile<D, K> {
    /// Whether the kernel reads and writes the backing file; else the server does.
    #[must_use]
    pub fn is_passthrough(&self) -> bool {
        matches!(self.inode.mode.get(), Some(Mode::Passthrough { .. }))
    }

    /// Why the inode is in server mode; `None` in passthrough mode.
    #[must_use]
    pub fn server_reason(&self) -> Option<ServerReason> {
        match self.inode.mode.get() {
            Some(Mode::Server(reason)) => Some(*reason),
            Some(Mode::Passthrough { .. }) | None => None,
        }
    }

    /// The reply to this OPEN or CREATE, with `flags` besides what the mode demands.
    ///
    /// # Errors
    ///
    /// [`OpenReplyError::FlagsNotAllowed`]: in passthrough mode all but `DIRECT_IO`, `NOFLUSH` and
    /// `PARALLEL_DIRECT_WRITES` are refused, in server mode `PASSTHROUGH` is.
    pub fn reply(&self, flags: OpenFlags) -> Result<OpenReply<'_>, OpenReplyError> {
        match self.inode.mode.get() {
            Some(Mode::Passthrough { id, .. }) => OpenReply::with_id(id, flags),
            Some(Mode::Server(_)) | None => OpenReply::server(flags),
        }
    }
}

impl<D: Deref<Target: AsFd>, K: Hash + Eq + Clone> fmt::Debug for BackingTable<D, K> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("BackingTable").field(&self.stats()).finish()
    }
}

impl<D: Deref<Target: AsFd>, K: Hash + Eq + Clone> fmt::Debug for OpenFile<D, K> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("OpenFile")
            .field("mode", &self.inode.mode.get())
            .finish_non_exhaustive()
    }
}

/// Why an inode is in server mode.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Error)]
#[non_exhaustive]
pub enum ServerReason {
    /// Registering its file failed.
    #[error("{0}")]
    Refused(BackingOpenError),
    /// Registering another file failed, for a cause that concerns the connection. See
    /// [`BackingTable::reset`].
    #[error("not tried again: {0}")]
    Remembered(BackingOpenError),
    /// The table's limit on ids was reached, and none was idle.
    #[error("the limit on backing ids is reached")]
    LimitReached,
    /// [`BackingTable::serve`].
    #[error("the server's choice")]
    Chosen,
}

/// [`BackingTable::open`] failed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Error)]
#[non_exhaustive]
pub enum TableOpenError {
    /// The client's open asks for more than the server grants through the fd. Answer `EACCES`, or
    /// `EROFS`.
    #[error("the client asks for {wanted} access, {granted} is granted")]
    AccessExceeded {
        /// What the server grants.
        granted: Access,
        /// What the client's open flags ask for.
        wanted: Access,
    },
    /// The inode is open and registered with another file than this one, by `st_dev` and `st_ino`.
    /// All opens of an inode have one id, and so one file. Answer `EIO`. Where the kernel had forgotten
    /// the inode before its number was given to another file, the server has not said so with
    /// [`forget`](BackingTable::forget).
    #[error("the inode is open with another backing file")]
    DifferentFile,
    /// `fstat` of the fd failed.
    #[error("the backing file cannot be looked at: {0}")]
    Unreadable(Errno),
}

impl TableOpenError {
    /// The errno to answer the client with.
    #[must_use]
    pub fn errno(&self) -> Errno {
        match *self {
            Self::AccessExceeded { .. } => Errno::ACCESS,
            Self::DifferentFile => Errno::IO,
            Self::Unreadable(errno) => errno,
        }
    }
}

impl From<TableOpenError> for io::Error {
    fn from(error: TableOpenError) -> Self {
        Self::new(Self::from(error.errno()).kind(), error)
    }
}

/// [`BackingTable::invalidate`] of an inode that is open.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Error)]
#[error("the inode is open {opens} times")]
#[non_exhaustive]
pub struct Busy {
    /// How many opens there are.
    pub opens: u64,
}

impl From<Busy> for io::Error {
    fn from(busy: Busy) -> Self {
        Self::new(io::ErrorKind::ResourceBusy, busy)
    }
}
