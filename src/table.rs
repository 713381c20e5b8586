//! [`BackingTable`]: one backing id for each open inode, and the only mode that the kernel accepts.
//!
//! # Locks
//!
//! The map is split into shards, each behind a lock of its own; an inode's state is behind another
//! one. Ioctls are made with the lock of one inode held and no shard's, so that whoever opens the
//! same inode waits, and nobody else. What keeps it free of deadlock:
//!
//! - Whoever holds the lock of a shard, of `idle`, of `strays` or of `refused` waits for no other.
//! - Whoever holds an inode's lock waits for another inode's in `make_room` alone. That one was taken
//!   out of `idle` a moment ago, and the own one had left `idle` before: so of several threads that
//!   wait like this, each took its inode out later than the one it waits for did, which is no circle.
//!
//! An inode leaves the map while its own lock is held, and is then not `attached`: who waited for the
//! lock looks it up again.

use std::collections::hash_map::RandomState;
use std::collections::{BTreeMap, HashMap};
use std::fmt;
use std::hash::{BuildHasher, Hash};
use std::io;
use std::ops::Deref;
use std::os::fd::{AsFd, BorrowedFd};
use std::time::{Duration, Instant};

use rustix::fs::fstat;
use rustix::io::Errno;
use rustix::process::{Resource, getrlimit};
use static_assertions::{assert_eq_size, assert_impl_all};
use thiserror::Error;

use crate::backing::BackingId;
#[cfg(not(test))]
use crate::device as kernel;
use crate::device::FuseDevice;
use crate::error::{BackingCloseCause, BackingOpenError, Scope};
#[cfg(test)]
use crate::model as kernel;
use crate::open::{Access, OpenFlags, OpenReply, OpenReplyError};
use crate::sync::{Arc, AtomicBool, AtomicU64, AtomicUsize, Mutex, Ordering, lock};

/// How each OPEN is answered: one backing id for each open inode, and one mode.
///
/// The kernel accepts one of two modes for an inode at a time, *passthrough*, with the same id for
/// every open, or *server*; a mixture gives the client a bare `EIO`, at this open or a later one, of
/// which the server hears nothing. The table keeps to it: the first open of an inode decides, all others follow until the
/// last one is released.
///
/// `D` is how the table holds the device, a reference or an [`Arc`]. `K` is what the
/// server knows an inode by, its node id most often.
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
/// its last release. What concerns the connection ([`Scope::Connection`]) is remembered, and no
/// further registration tried, until [`reset`](Self::reset). What is transient is tried again when
/// the inode is opened next.
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
/// The id is then kept: counted, listed, used again when the inode is opened next, and closed by
/// [`retry_closes`](Self::retry_closes).
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
/// With fuser; the table is filled in late, when the session exists, as the README shows for the
/// device:
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
///     fn open(&self, ino: u64, flags: fuser::OpenFlags, fh: u64, reply: fuser::ReplyOpen) -> std::io::Result<()> {
///         let file = File::open("/srv/data/file")?; // with `flags`, in earnest
///         let open = self.table.open(&ino, flags.0, &file, Access::of(&file)?)?;
///         let answer = open.reply(OpenFlags::empty())?;
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
///         Ok(())
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
    /// An alias of the inode's, which stays as it is while there are opens.
    id: Option<BackingId>,
}

assert_eq_size!(OpenFile<&FuseDevice<std::os::fd::OwnedFd>>, [usize; 2]);
assert_impl_all!(BackingTable<std::sync::Arc<FuseDevice<std::os::fd::OwnedFd>>>: Send, Sync);
assert_impl_all!(OpenFile<std::sync::Arc<FuseDevice<std::os::fd::OwnedFd>>>: Send, Sync);

/// Enough that threads seldom meet, in 4 KiB of empty maps.
const SHARDS: usize = 64;

struct Shared<D: Deref<Target: AsFd>, K: Hash + Eq + Clone> {
    device: D,
    hasher: RandomState,
    shards: Box<[Shard<D, K>]>,
    /// By address: open and not in the map any more, or not closed because closing failed.
    strays: Mutex<BTreeMap<usize, Arc<Inode<D, K>>>>,
    idle: Mutex<Idle<D, K>>,
    /// Ids that are registered, idle ones and those that failed to close among them.
    ids: AtomicUsize,
    limit: AtomicUsize,
    idle_limit: AtomicUsize,
    /// Whether `refused` is worth a look.
    is_refused: AtomicBool,
    refused: Mutex<Option<BackingOpenError>>,
    over_limit: AtomicU64,
    close_failures: AtomicU64,
    /// The table is gone, and with it whoever could retry.
    orphaned: AtomicBool,
    start: Instant,
}

/// On a cache line of its own.
#[repr(align(64))]
struct Shard<D: Deref<Target: AsFd>, K: Hash + Eq + Clone>(Mutex<HashMap<K, Arc<Inode<D, K>>>>);

/// Registered inodes without opens, by when they became idle.
struct Idle<D: Deref<Target: AsFd>, K: Hash + Eq + Clone> {
    inodes: BTreeMap<u64, Arc<Inode<D, K>>>,
    last: u64,
}

struct Inode<D: Deref<Target: AsFd>, K: Hash + Eq + Clone> {
    shared: Arc<Shared<D, K>>,
    key: K,
    state: Mutex<State>,
}

struct State {
    mode: Mode,
    opens: u64,
    /// Seconds after the table's start.
    since: u32,
    /// In the map.
    attached: bool,
    /// In `Shared::strays`.
    stray: bool,
    /// Its key in `Idle::inodes`, or 0.
    idle: u64,
    close_failed: Option<BackingCloseCause>,
}

enum Mode {
    /// Not decided: without opens, and without an id.
    Undecided,
    Passthrough {
        id: BackingId,
        granted: Access,
        file: FileId,
    },
    Server(ServerReason),
}

#[derive(Clone, Copy, PartialEq, Eq)]
struct FileId {
    device: u64,
    inode: u64,
}

impl FileId {
    fn of(fd: BorrowedFd<'_>) -> Result<Self, Errno> {
        let stat = fstat(fd)?;
        #[allow(clippy::unnecessary_cast, reason = "the types differ between targets")]
        Ok(Self {
            device: stat.st_dev as u64,
            inode: stat.st_ino as u64,
        })
    }
}

impl<D: Deref<Target: AsFd>, K: Hash + Eq + Clone> BackingTable<D, K> {
    /// An empty table for the connection of `device`.
    ///
    /// Its limit is the soft `RLIMIT_NOFILE`; it keeps no idle ids.
    pub fn new<Fd: AsFd>(device: D) -> Self
    where
        D: Deref<Target = FuseDevice<Fd>>,
    {
        Self::with_device(device)
    }

    fn with_device(device: D) -> Self {
        let limit = getrlimit(Resource::Nofile)
            .current
            .and_then(|limit| usize::try_from(limit).ok())
            .unwrap_or(usize::MAX);
        Self {
            shared: Arc::new(Shared {
                device,
                hasher: RandomState::new(),
                shards: (0..SHARDS)
                    .map(|_| Shard(Mutex::new(HashMap::new())))
                    .collect(),
                strays: Mutex::new(BTreeMap::new()),
                idle: Mutex::new(Idle {
                    inodes: BTreeMap::new(),
                    last: 0,
                }),
                ids: AtomicUsize::new(0),
                limit: AtomicUsize::new(limit),
                idle_limit: AtomicUsize::new(0),
                is_refused: AtomicBool::new(false),
                refused: Mutex::new(None),
                over_limit: AtomicU64::new(0),
                close_failures: AtomicU64::new(0),
                orphaned: AtomicBool::new(false),
                start: Instant::now(),
            }),
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
        self.shared.open(inode, |inode, state| {
            if let Mode::Passthrough {
                file: registered,
                granted,
                ..
            } = &mut state.mode
            {
                if *registered == file {
                    *granted = granted.union(access);
                } else if state.opens > 0 {
                    return Err(TableOpenError::DifferentFile);
                } else {
                    // Idle, under a number that names another file by now.
                    inode.abandon(state);
                }
            }
            if let Mode::Undecided = state.mode {
                state.mode = inode.shared.register(fd, file, access);
            }
            Ok(())
        })
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
        loop {
            let inode = self.shared.find(inode)?;
            let mut state = lock(&inode.state);
            if !state.attached {
                inode.leave_map();
                continue;
            }
            match &state.mode {
                Mode::Passthrough { granted, .. } if granted.allows(wanted) => {}
                _ => return None,
            }
            let id = inode.count_open(&mut state);
            drop(state);
            return Some(OpenFile { inode, id });
        }
    }

    /// Opens an inode in server mode because the server wants to read and write it itself.
    ///
    /// `None` while the inode is open in passthrough mode: then [`open`](Self::open) it, or
    /// [`share`](Self::share). An idle registration is closed.
    pub fn serve(&self, inode: &K) -> Option<OpenFile<D, K>> {
        let decide = |inode: &Arc<Inode<D, K>>, state: &mut State| {
            match state.mode {
                Mode::Passthrough { .. } if state.opens > 0 => return Err(()),
                Mode::Passthrough { .. } => inode.abandon(state),
                Mode::Undecided | Mode::Server(_) => {}
            }
            if let Mode::Undecided = state.mode {
                state.mode = Mode::Server(ServerReason::Chosen);
            }
            Ok(())
        };
        self.shared.open(inode, decide).ok()
    }

    /// Detaches an inode from its number, which the server is about to give to another one: after
    /// FORGET, or where the file behind it was replaced.
    ///
    /// The next open under this number starts fresh. Those that are open keep their registration.
    pub fn forget(&self, inode: &K) {
        let found = lock(self.shared.shard(inode)).remove(inode);
        if let Some(inode) = found {
            let mut state = lock(&inode.state);
            if state.attached {
                state.attached = false;
                if state.opens > 0 {
                    inode.stray(&mut state);
                } else {
                    inode.abandon(&mut state);
                }
            }
        }
    }

    /// Closes what is registered for an inode that is not open, so that the next open starts fresh.
    ///
    /// # Errors
    ///
    /// [`Busy`] while the inode is open: all of its opens have one mode and one id. See
    /// [`forget`](Self::forget) for an inode that is not the same any more.
    pub fn invalidate(&self, inode: &K) -> Result<(), Busy> {
        let Some(inode) = self.shared.find(inode) else {
            return Ok(());
        };
        let mut state = lock(&inode.state);
        if state.attached {
            if state.opens > 0 {
                return Err(Busy { opens: state.opens });
            }
            inode.abandon(&mut state);
            inode.leave(&mut state);
        }
        Ok(())
    }

    /// Forgets what was remembered of the connection, so that the next open tries to register again:
    /// after the server got the capability back, or the mount was completed.
    pub fn reset(&self) {
        self.shared.is_refused.store(false, Ordering::Release);
        *lock(&self.shared.refused) = None;
    }

    /// How many ids may be registered at a time. Below what there are now it takes effect as inodes
    /// are released; idle ids are closed at once.
    pub fn set_limit(&self, limit: usize) {
        self.shared.limit.store(limit, Ordering::Relaxed);
        while self.shared.ids.load(Ordering::Relaxed) > limit && self.shared.close_oldest() {}
    }

    /// How many ids are kept after the last release, for reopening: none, unless this is called. The
    /// one that was released longest ago goes first. They pin their files, and the mounts that these
    /// are on.
    pub fn set_idle_limit(&self, limit: usize) {
        self.shared.idle_limit.store(limit, Ordering::Relaxed);
        self.shared.trim_idle();
    }

    /// Tries again to close what could not be closed, from a thread that is permitted to.
    ///
    /// # Errors
    ///
    /// The cause of the first that failed again; all are tried.
    pub fn retry_closes(&self) -> Result<(), BackingCloseCause> {
        let strays: Vec<_> = lock(&self.shared.strays).values().cloned().collect();
        let mut result = Ok(());
        for inode in strays {
            let mut state = lock(&inode.state);
            if state.opens == 0 {
                result = result.and(inode.close(&mut state));
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
            idle: lock(&shared.idle).inodes.len(),
            over_limit: shared.over_limit.load(Ordering::Relaxed),
            close_failures: shared.close_failures.load(Ordering::Relaxed),
            refused: shared.refused(),
        }
    }

    /// All inodes that are open or registered, in no particular order; waits for registrations that
    /// are being made. [`Listing`] is also a table to print.
    #[must_use]
    pub fn list(&self) -> Listing<K> {
        let mut inodes: Vec<_> = Vec::new();
        for shard in &self.shared.shards {
            inodes.extend(lock(&shard.0).values().cloned());
        }
        let strays: Vec<_> = lock(&self.shared.strays).values().cloned().collect();
        let now = self.shared.seconds();
        let row = |inode: &Arc<Inode<D, K>>, attached: bool| {
            let state = lock(&inode.state);
            // A stray that is attached was found in the map.
            (state.attached == attached).then(|| state.row(&inode.key, now))?
        };
        let mut rows: Vec<_> = inodes.iter().filter_map(|inode| row(inode, true)).collect();
        rows.extend(strays.iter().filter_map(|inode| row(inode, false)));
        Listing(rows)
    }
}

/// Idle ids are closed; open files stay as they are until they are released. An id that cannot be
/// closed then, or now, stays registered until the connection ends.
impl<D: Deref<Target: AsFd>, K: Hash + Eq + Clone> Drop for BackingTable<D, K> {
    fn drop(&mut self) {
        self.shared.orphaned.store(true, Ordering::Relaxed);
        self.set_idle_limit(0);
        // Whoever wants to know calls it before: a destructor has nobody to tell. What still cannot be
        // closed is let go of, being `orphaned`: it would keep the device, and so the connection.
        let _ = self.retry_closes();
    }
}

impl<D: Deref<Target: AsFd>, K: Hash + Eq + Clone> Shared<D, K> {
    #[allow(clippy::cast_possible_truncation, reason = "the remainder fits")]
    fn shard(&self, key: &K) -> &Mutex<HashMap<K, Arc<Inode<D, K>>>> {
        let index = self.hasher.hash_one(key) % SHARDS as u64;
        &self.shards[index as usize].0
    }

    fn find(&self, key: &K) -> Option<Arc<Inode<D, K>>> {
        lock(self.shard(key)).get(key).cloned()
    }

    /// Counts an open of the inode, if `decide` agrees; it is to leave the mode decided.
    fn open<E>(
        self: &Arc<Self>,
        key: &K,
        mut decide: impl FnMut(&Arc<Inode<D, K>>, &mut State) -> Result<(), E>,
    ) -> Result<OpenFile<D, K>, E> {
        loop {
            let inode = Arc::clone(lock(self.shard(key)).entry(key.clone()).or_insert_with(|| {
                Arc::new(Inode {
                    shared: Arc::clone(self),
                    key: key.clone(),
                    state: Mutex::new(State {
                        mode: Mode::Undecided,
                        opens: 0,
                        since: self.seconds(),
                        attached: true,
                        stray: false,
                        idle: 0,
                        close_failed: None,
                    }),
                })
            }));
            let mut state = lock(&inode.state);
            if !state.attached {
                // It was on its way out. A key's own code that panics can have left it in the map.
                inode.leave_map();
                continue;
            }
            decide(&inode, &mut state)?;
            let id = inode.count_open(&mut state);
            drop(state);
            return Ok(OpenFile { inode, id });
        }
    }

    fn register(&self, fd: BorrowedFd<'_>, file: FileId, granted: Access) -> Mode {
        if let Some(error) = self.refused() {
            return Mode::Server(ServerReason::Remembered(error));
        }
        if !self.make_room() {
            self.over_limit.fetch_add(1, Ordering::Relaxed);
            return Mode::Server(ServerReason::LimitReached);
        }
        match kernel::backing_open((*self.device).as_fd(), fd) {
            Ok(id) => Mode::Passthrough { id, granted, file },
            Err(error) => {
                self.ids.fetch_sub(1, Ordering::Relaxed);
                if error.scope() == Scope::Connection {
                    *lock(&self.refused) = Some(error);
                    self.is_refused.store(true, Ordering::Release);
                }
                Mode::Server(ServerReason::Refused(error))
            }
        }
    }

    fn refused(&self) -> Option<BackingOpenError> {
        if self.is_refused.load(Ordering::Acquire) {
            *lock(&self.refused)
        } else {
            None
        }
    }

    /// Counts one id more, if the limit permits, or does once idle ones are closed.
    fn make_room(&self) -> bool {
        loop {
            let limit = self.limit.load(Ordering::Relaxed);
            let counted = self
                .ids
                .fetch_update(Ordering::Relaxed, Ordering::Relaxed, |ids| {
                    (ids < limit).then_some(ids + 1)
                });
            if counted.is_ok() {
                return true;
            }
            if !self.close_oldest() {
                return false;
            }
        }
    }

    /// Closes the inode that has been idle for longest; false if none is.
    fn close_oldest(&self) -> bool {
        let oldest = lock(&self.idle).inodes.pop_first();
        let Some((place, inode)) = oldest else {
            return false;
        };
        let mut state = lock(&inode.state);
        // Unless it was opened in between.
        if state.idle == place {
            state.idle = 0;
            // A failure is counted, and kept in `strays`.
            let _ = inode.close(&mut state);
        }
        true
    }

    fn trim_idle(&self) {
        let limit = || self.idle_limit.load(Ordering::Relaxed);
        while lock(&self.idle).inodes.len() > limit() && self.close_oldest() {}
    }

    fn seconds(&self) -> u32 {
        u32::try_from(self.start.elapsed().as_secs()).unwrap_or(u32::MAX)
    }
}

impl<D: Deref<Target: AsFd>, K: Hash + Eq + Clone> Inode<D, K> {
    /// One more open; the id to answer it with.
    fn count_open(self: &Arc<Self>, state: &mut State) -> Option<BackingId> {
        state.opens += 1;
        self.unidle(state);
        state.close_failed = None;
        if state.attached {
            self.unstray(state);
        }
        match &state.mode {
            Mode::Passthrough { id, .. } => Some(id.alias()),
            Mode::Undecided | Mode::Server(_) => None,
        }
    }

    /// One open less.
    fn release(self: &Arc<Self>) {
        let mut state = lock(&self.state);
        state.opens -= 1;
        if state.opens > 0 {
            return;
        }
        match state.mode {
            Mode::Passthrough { .. } => {
                let shared = &self.shared;
                let keep = shared.idle_limit.load(Ordering::Relaxed) > 0
                    && shared.ids.load(Ordering::Relaxed) <= shared.limit.load(Ordering::Relaxed);
                if keep && state.attached {
                    let mut idle = lock(&self.shared.idle);
                    idle.last += 1;
                    state.idle = idle.last;
                    idle.inodes.insert(state.idle, Arc::clone(self));
                    drop(idle);
                    drop(state);
                    self.shared.trim_idle();
                } else {
                    // A failure is counted, and kept in `strays`.
                    let _ = self.close(&mut state);
                }
            }
            Mode::Undecided | Mode::Server(_) => self.leave(&mut state),
        }
    }

    /// Closes the id of an inode without opens, and lets go of the inode. One that cannot be closed
    /// stays, to be opened again or retried.
    fn close(self: &Arc<Self>, state: &mut State) -> Result<(), BackingCloseCause> {
        if let Mode::Passthrough { id, .. } = &state.mode {
            let closed = kernel::backing_close((*self.shared.device).as_fd(), id);
            if let Err(cause) = closed {
                self.shared.close_failures.fetch_add(1, Ordering::Relaxed);
                // Somebody else closed it: nothing is left to be tried again.
                if cause != BackingCloseCause::UnknownId {
                    state.close_failed = Some(cause);
                    if self.shared.orphaned.load(Ordering::Relaxed) {
                        self.leave(state);
                    } else {
                        self.stray(state);
                    }
                    return Err(cause);
                }
            }
            self.shared.ids.fetch_sub(1, Ordering::Relaxed);
        }
        state.close_failed = None;
        state.mode = Mode::Undecided;
        self.leave(state);
        Ok(())
    }

    /// Frees the inode of its id, which nobody has open, while the inode stays where it is. An id
    /// that cannot be closed moves to an inode of its own.
    fn abandon(self: &Arc<Self>, state: &mut State) {
        self.unidle(state);
        let mode = std::mem::replace(&mut state.mode, Mode::Undecided);
        let close_failed = state.close_failed.take();
        self.unstray(state);
        if let Mode::Passthrough { .. } = mode {
            let apart = Arc::new(Self {
                shared: Arc::clone(&self.shared),
                key: self.key.clone(),
                state: Mutex::new(State {
                    mode,
                    opens: 0,
                    since: state.since,
                    attached: false,
                    stray: false,
                    idle: 0,
                    close_failed,
                }),
            });
            let mut apart_state = lock(&apart.state);
            let _ = apart.close(&mut apart_state);
        }
    }

    fn unidle(&self, state: &mut State) {
        if state.idle != 0 {
            lock(&self.shared.idle).inodes.remove(&state.idle);
            state.idle = 0;
        }
    }

    /// Keeps an inode that the map does not, or that is to be retried.
    fn stray(self: &Arc<Self>, state: &mut State) {
        state.stray = true;
        lock(&self.shared.strays).insert(self.address(), Arc::clone(self));
    }

    fn unstray(self: &Arc<Self>, state: &mut State) {
        if state.stray {
            state.stray = false;
            lock(&self.shared.strays).remove(&self.address());
        }
    }

    /// Out of the map, and whatever else the table finds it by.
    fn leave(self: &Arc<Self>, state: &mut State) {
        self.unstray(state);
        if state.attached {
            state.attached = false;
            self.leave_map();
        }
    }

    fn leave_map(self: &Arc<Self>) {
        let mut shard = lock(self.shared.shard(&self.key));
        // `forget` may have taken it out, and another be there by now.
        let found = shard.get(&self.key);
        if found.is_some_and(|inode| Arc::ptr_eq(inode, self)) {
            shard.remove(&self.key);
        }
    }

    fn address(self: &Arc<Self>) -> usize {
        Arc::as_ptr(self).addr()
    }
}

impl State {
    /// None for one that nobody has opened yet.
    fn row<K: Clone>(&self, key: &K, now: u32) -> Option<Entry<K>> {
        let (id, access, file, reason) = match &self.mode {
            Mode::Undecided => return None,
            Mode::Passthrough { id, granted, file } => {
                (Some(id.as_raw()), Some(*granted), Some(*file), None)
            }
            Mode::Server(reason) => (None, None, None, Some(*reason)),
        };
        Some(Entry {
            inode: key.clone(),
            id,
            backing_device: file.map(|file| file.device),
            backing_inode: file.map(|file| file.inode),
            access,
            opens: self.opens,
            forgotten: !self.attached,
            server_reason: reason,
            close_failed: self.close_failed,
            age: Duration::from_secs(u64::from(now.saturating_sub(self.since))),
        })
    }
}

impl<D: Deref<Target: AsFd>, K: Hash + Eq + Clone> OpenFile<D, K> {
    /// Whether the kernel reads and writes the backing file; else the server does.
    #[must_use]
    pub fn is_passthrough(&self) -> bool {
        self.id.is_some()
    }

    /// Why the inode is in server mode; `None` in passthrough mode.
    #[must_use]
    pub fn server_reason(&self) -> Option<ServerReason> {
        match lock(&self.inode.state).mode {
            Mode::Server(reason) => Some(reason),
            Mode::Undecided | Mode::Passthrough { .. } => None,
        }
    }

    /// The reply to this OPEN or CREATE, with `flags` besides what the mode demands.
    ///
    /// # Errors
    ///
    /// [`OpenReplyError::FlagsNotAllowed`]: in passthrough mode all but `DIRECT_IO`, `NOFLUSH` and
    /// `PARALLEL_DIRECT_WRITES` are refused, in server mode `PASSTHROUGH` is.
    pub fn reply(&self, flags: OpenFlags) -> Result<OpenReply<'_>, OpenReplyError> {
        match &self.id {
            Some(id) => OpenReply::with_id(id, flags),
            None => OpenReply::server(flags),
        }
    }
}

impl<D: Deref<Target: AsFd>, K: Hash + Eq + Clone> Drop for OpenFile<D, K> {
    fn drop(&mut self) {
        self.inode.release();
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
            .field("id", &self.id)
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
    /// All opens of an inode have one id, and so one file. Answer `EIO`, and
    /// [`forget`](BackingTable::forget) the inode where a number was given to another file too early.
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

/// Figures of a [`BackingTable`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct TableStats {
    /// Registered ids: open, idle, and those that could not be closed.
    pub ids: usize,
    /// How many there may be.
    pub limit: usize,
    /// Those without opens, kept for reopening.
    pub idle: usize,
    /// Inodes that were opened in server mode because of the limit, so far.
    pub over_limit: u64,
    /// Closes that failed, so far, retries among them.
    pub close_failures: u64,
    /// What is remembered of the connection: nothing is registered any more.
    pub refused: Option<BackingOpenError>,
}

/// An inode in a [`Listing`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct Entry<K> {
    /// What the server knows it by.
    pub inode: K,
    /// The backing id; `None` in server mode.
    pub id: Option<i32>,
    /// `st_dev` of the backing file.
    pub backing_device: Option<u64>,
    /// `st_ino` of the backing file.
    pub backing_inode: Option<u64>,
    /// What has been granted so far.
    pub access: Option<Access>,
    /// Opens that have not been released. 0: idle, or not closed because closing failed.
    pub opens: u64,
    /// Whether its number names another inode by now, or none.
    pub forgotten: bool,
    /// Why it is in server mode.
    pub server_reason: Option<ServerReason>,
    /// Why it could not be closed.
    pub close_failed: Option<BackingCloseCause>,
    /// Since its first open, in whole seconds.
    pub age: Duration,
}

/// What [`BackingTable::list`] found: dereferences to the entries, and prints as a table.
#[derive(Clone, Debug)]
pub struct Listing<K>(Vec<Entry<K>>);

impl<K> Deref for Listing<K> {
    type Target = [Entry<K>];

    fn deref(&self) -> &[Entry<K>] {
        &self.0
    }
}

impl<K> IntoIterator for Listing<K> {
    type Item = Entry<K>;
    type IntoIter = std::vec::IntoIter<Entry<K>>;

    fn into_iter(self) -> Self::IntoIter {
        self.0.into_iter()
    }
}

impl<K: fmt::Display> fmt::Display for Listing<K> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(
            f,
            "{:>10} {:>10} {:>8} {:>12} {:<10} {:>6} {:>7} MODE",
            "INODE", "ID", "DEVICE", "BACKING", "ACCESS", "OPENS", "AGE"
        )?;
        let dash = || "-".to_owned();
        for entry in &self.0 {
            let device = entry.backing_device.map_or_else(dash, |device| {
                format!(
                    "{}:{}",
                    rustix::fs::major(device),
                    rustix::fs::minor(device)
                )
            });
            write!(
                f,
                "{:>10} {:>10} {:>8} {:>12} {:<10} {:>6} {:>6}s ",
                entry.inode,
                entry.id.map_or_else(dash, |id| id.to_string()),
                device,
                entry
                    .backing_inode
                    .map_or_else(dash, |inode| inode.to_string()),
                entry.access.map_or_else(dash, |access| access.to_string()),
                entry.opens,
                entry.age.as_secs(),
            )?;
            match (entry.server_reason, entry.close_failed) {
                (Some(reason), _) => write!(f, "server: {reason}")?,
                (None, Some(cause)) => write!(f, "passthrough, not closed: {cause}")?,
                (None, None) if entry.opens == 0 => write!(f, "passthrough, idle")?,
                (None, None) => write!(f, "passthrough")?,
            }
            writeln!(f, "{}", if entry.forgotten { ", forgotten" } else { "" })?;
        }
        Ok(())
    }
}
