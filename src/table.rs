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

use std::collections::{BTreeMap, HashMap};
use std::fmt;
use std::hash::Hash;
use std::io;
use std::ops::Deref;
use std::os::fd::{AsFd, BorrowedFd};
use std::sync::OnceLock;
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
use crate::sync::{
    Arc, AtomicBool, AtomicU8, AtomicU64, AtomicUsize, Mutex, Ordering, RwLock, Weak, lock, read,
    write,
};
use hash::Seeds;

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
}

assert_eq_size!(OpenFile<&FuseDevice<std::os::fd::OwnedFd>>, usize);
assert_impl_all!(BackingTable<std::sync::Arc<FuseDevice<std::os::fd::OwnedFd>>>: Send, Sync);
assert_impl_all!(OpenFile<std::sync::Arc<FuseDevice<std::os::fd::OwnedFd>>>: Send, Sync);

/// Enough that threads seldom meet, in 4 KiB of empty maps.
const SHARDS: usize = 64;

struct Shared<D: Deref<Target: AsFd>, K: Hash + Eq + Clone> {
    device: D,
    seeds: Seeds,
    shards: Box<[Shard<D, K>]>,
    /// Open, and not in the map any more.
    strays: Mutex<BTreeMap<u64, Weak<Inode<D, K>>>>,
    parked: Mutex<Parked<D, K>>,
    /// The last of the numbers by which `strays` and `parked` know an inode.
    numbers: AtomicU64,
    /// Ids that are registered, parked ones among them.
    ids: AtomicUsize,
    limit: AtomicUsize,
    idle_limit: AtomicUsize,
    /// Whether `refused` is worth a look.
    is_refused: AtomicBool,
    refused: Mutex<Option<BackingOpenError>>,
    over_limit: AtomicU64,
    close_failures: AtomicU64,
    start: Instant,
}

type Inodes<D, K> = HashMap<K, Weak<Inode<D, K>>, Seeds>;

/// On a cache line of its own.
#[repr(align(64))]
struct Shard<D: Deref<Target: AsFd>, K: Hash + Eq + Clone>(RwLock<Inodes<D, K>>);

/// Registered inodes without opens, by when they came here.
struct Parked<D: Deref<Target: AsFd>, K: Hash + Eq + Clone> {
    idle: BTreeMap<u64, Arc<Inode<D, K>>>,
    /// Closing them failed, for this cause.
    unclosed: BTreeMap<u64, (Arc<Inode<D, K>>, BackingCloseCause)>,
    /// The table is gone, and with it whoever could open them or retry.
    orphaned: bool,
}

// In this order what an open looks at is on one or two cache lines, with the reference count.
#[repr(C)]
struct Inode<D: Deref<Target: AsFd>, K: Hash + Eq + Clone> {
    /// Set once, with `deciding` locked.
    mode: OnceLock<Mode>,
    /// Grows only, and is not empty in passthrough mode.
    granted: AtomicU8,
    /// Whether the last drop may leave it idle.
    may_idle: bool,
    /// Seconds after the table's start.
    since: u32,
    /// Its number in `Parked`; 0 if somebody opened it since, or nobody parked it.
    parked: AtomicU64,
    /// 0 if the map has it; else its number in `Shared::strays`, or `NOWHERE`.
    stray: AtomicU64,
    deciding: Mutex<()>,
    key: K,
    shared: Arc<Shared<D, K>>,
    /// To tell its own entry in the map from a later one, also when it was moved out of its `Arc`.
    me: Weak<Self>,
}

const NOWHERE: u64 = u64::MAX;

#[derive(Debug)]
enum Mode {
    Passthrough { id: BackingId, file: FileId },
    Server(ServerReason),
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
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

/// What is to be done about an inode that is found in the map.
enum Verdict {
    Join,
    /// It is parked, and stands in the way.
    Replace,
    Refuse,
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
        let seeds = Seeds::random();
        let shard = || Shard(RwLock::new(HashMap::with_hasher(seeds)));
        Self {
            shared: Arc::new(Shared {
                device,
                seeds,
                shards: (0..SHARDS).map(|_| shard()).collect(),
                strays: Mutex::new(BTreeMap::new()),
                parked: Mutex::new(Parked {
                    idle: BTreeMap::new(),
                    unclosed: BTreeMap::new(),
                    orphaned: false,
                }),
                numbers: AtomicU64::new(0),
                ids: AtomicUsize::new(0),
                limit: AtomicUsize::new(limit),
                idle_limit: AtomicUsize::new(0),
                is_refused: AtomicBool::new(false),
                refused: Mutex::new(None),
                over_limit: AtomicU64::new(0),
                close_failures: AtomicU64::new(0),
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
    /// FORGET, or where the file behind it was replaced.
    ///
    /// The next open under this number starts fresh. Those that are open keep their registration.
    pub fn forget(&self, inode: &K) {
        let shared = &self.shared;
        let mut map = write(shared.shard(inode));
        let found = map.remove(inode).and_then(|inode| inode.upgrade());
        drop(map);
        if let Some(inode) = found {
            // Nobody finds it any more, so that what it is it stays.
            if inode.is_parked() {
                shared.evict(inode);
            } else {
                let number = shared.number();
                inode.stray.store(number, Ordering::Relaxed);
                lock(&shared.strays).insert(number, Arc::downgrade(&inode));
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
        let shared = &self.shared;
        let mut map = write(shared.shard(inode));
        let Some(found) = map.get(inode).and_then(Weak::upgrade) else {
            // If it is just being released, it is not to become idle.
            map.remove(inode);
            return Ok(());
        };
        if found.is_parked() {
            map.remove(inode);
            drop(map);
            shared.evict(found);
            return Ok(());
        }
        let opens = found.opens();
        match Arc::into_inner(found) {
            None => Err(Busy { opens }),
            // Released a moment ago.
            Some(last) => {
                map.remove(inode);
                drop(map);
                last.close_for_good();
                Ok(())
            }
        }
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
        let unclosed = std::mem::take(&mut lock(&self.shared.parked).unclosed);
        let mut result = Ok(());
        for (inode, _) in unclosed.into_values() {
            // Unless it was opened in between.
            if let Some(mut inode) = Arc::into_inner(inode) {
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
            over_limit: shared.over_limit.load(Ordering::Relaxed),
            close_failures: shared.close_failures.load(Ordering::Relaxed),
            refused: shared.refused(),
        }
    }

    /// All inodes that are open or registered, in no particular order, without those that are just
    /// being registered or closed. [`Listing`] is also a table to print.
    ///
    /// A release that it meets can become its own to complete: call it from a thread that may close.
    #[must_use]
    pub fn list(&self) -> Listing<K> {
        let shared = &self.shared;
        let now = shared.seconds();
        let mut causes = HashMap::new();
        let (mut rows, mut last) = (Vec::new(), Vec::new());
        // Not kept longer than it takes: a reference of ours looks like an open.
        let mut add = |inode: Arc<Inode<D, K>>| {
            rows.extend(inode.row(now));
            last.extend(Arc::into_inner(inode));
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
        let entry = |(number, mut entry): (u64, Entry<K>)| {
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
        // From here on nothing is parked: it would keep the device, and so the connection.
        lock(&self.shared.parked).orphaned = true;
        self.set_idle_limit(0);
        // Whoever wants to know calls it before: a destructor has nobody to tell.
        let _ = self.retry_closes();
    }
}

enum Found<T> {
    /// One open more.
    Joined(T),
    Refused,
    Nothing,
}

impl<D: Deref<Target: AsFd>, K: Hash + Eq + Clone> Shared<D, K> {
    #[inline]
    fn shard(&self, key: &K) -> &RwLock<Inodes<D, K>> {
        let index = self.seeds.part(key, SHARDS);
        &self.shards[index].0
    }

    /// The inode under this number, if there is one that `judge` lets in.
    #[inline]
    fn find(
        &self,
        key: &K,
        judge: impl FnOnce(&Inode<D, K>) -> Verdict,
    ) -> Found<Arc<Inode<D, K>>> {
        let map = read(self.shard(key));
        let Some(inode) = map.get(key).and_then(Weak::upgrade) else {
            return Found::Nothing;
        };
        match judge(&inode) {
            Verdict::Join => {
                let parked = inode.unpark();
                drop(map);
                self.take_parked(parked);
                Found::Joined(inode)
            }
            verdict => {
                let last = Arc::into_inner(inode);
                drop(map);
                drop(last);
                match verdict {
                    Verdict::Refuse => Found::Refused,
                    Verdict::Join | Verdict::Replace => Found::Nothing,
                }
            }
        }
    }

    /// The same, or a new one, whose mode is still to be decided; `None` if it is refused.
    fn find_or_insert(
        self: &Arc<Self>,
        key: &K,
        judge: impl Fn(&Inode<D, K>) -> Verdict,
    ) -> Option<Arc<Inode<D, K>>> {
        match self.find(key, &judge) {
            Found::Joined(inode) => return Some(inode),
            Found::Refused => return None,
            Found::Nothing => {}
        }
        let fresh = Arc::new_cyclic(|me| Inode {
            mode: OnceLock::new(),
            granted: AtomicU8::new(0),
            may_idle: true,
            since: self.seconds(),
            parked: AtomicU64::new(0),
            stray: AtomicU64::new(NOWHERE),
            deciding: Mutex::new(()),
            key: key.clone(),
            shared: Arc::clone(self),
            me: Weak::clone(me),
        });
        let mut map = write(self.shard(key));
        let Some(found) = map.get(key).and_then(Weak::upgrade) else {
            fresh.enter(&mut map);
            return Some(fresh);
        };
        // It came, or was parked, in between.
        match judge(&found) {
            Verdict::Join => {
                let parked = found.unpark();
                drop(map);
                self.take_parked(parked);
                Some(found)
            }
            Verdict::Replace => {
                fresh.enter(&mut map);
                drop(map);
                self.evict(found);
                Some(fresh)
            }
            Verdict::Refuse => {
                let last = Arc::into_inner(found);
                drop(map);
                drop(last);
                None
            }
        }
    }

    fn register(&self, fd: BorrowedFd<'_>, file: FileId) -> Mode {
        if let Some(error) = self.refused() {
            return Mode::Server(ServerReason::Remembered(error));
        }
        if !self.make_room() {
            self.over_limit.fetch_add(1, Ordering::Relaxed);
            return Mode::Server(ServerReason::LimitReached);
        }
        match kernel::backing_open((*self.device).as_fd(), fd) {
            Ok(id) => Mode::Passthrough { id, file },
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
        let oldest = lock(&self.parked).idle.pop_first();
        let Some((_, inode)) = oldest else {
            return false;
        };
        // Unless it was opened in between.
        if let Some(inode) = Arc::into_inner(inode) {
            inode.close_for_good();
        }
        true
    }

    fn trim_idle(&self) {
        let limit = || self.idle_limit.load(Ordering::Relaxed);
        while lock(&self.parked).idle.len() > limit() && self.close_oldest() {}
    }

    /// Closes an inode that is parked, and that nobody finds any more.
    fn evict(&self, inode: Arc<Inode<D, K>>) {
        self.take_parked(inode.unpark());
        // Unless another thread has taken it from there, which then does.
        if let Some(inode) = Arc::into_inner(inode) {
            inode.close_for_good();
        }
    }

    /// Lets go of what is parked under this number, of which the caller has another reference.
    #[inline]
    fn take_parked(&self, number: u64) {
        if number != 0 {
            let mut parked = lock(&self.parked);
            let idle = parked.idle.remove(&number);
            let unclosed = parked.unclosed.remove(&number);
            drop(parked);
            drop((idle, unclosed));
        }
    }

    fn number(&self) -> u64 {
        1 + self.numbers.fetch_add(1, Ordering::Relaxed)
    }

    fn seconds(&self) -> u32 {
        u32::try_from(self.start.elapsed().as_secs()).unwrap_or(u32::MAX)
    }
}

impl<D: Deref<Target: AsFd>, K: Hash + Eq + Clone> Inode<D, K> {
    /// The mode, decided now if it is not yet; waits for whoever is deciding.
    fn decide(&self, mode: impl FnOnce() -> Mode) -> &Mode {
        self.mode.get().unwrap_or_else(|| {
            let _deciding = lock(&self.deciding);
            self.mode.get_or_init(mode)
        })
    }

    fn grants(&self, wanted: Access) -> bool {
        self.granted().is_some_and(|granted| granted.allows(wanted))
    }

    fn granted(&self) -> Option<Access> {
        Access::from_bits(self.granted.load(Ordering::Relaxed))
    }

    fn grant(&self, access: Access) {
        if !self.grants(access) {
            self.granted.fetch_or(access.bits(), Ordering::Relaxed);
        }
    }

    /// For whoever has the lock of the shard: whether nobody has opened it since it was parked.
    fn is_parked(&self) -> bool {
        self.parked.load(Ordering::Relaxed) != 0
    }

    /// For whoever has the lock of the shard: it is open from now on. Its number in `Parked`, or 0.
    fn unpark(&self) -> u64 {
        // Seldom other than 0, and a swap costs.
        if self.is_parked() {
            self.parked.swap(0, Ordering::Relaxed)
        } else {
            0
        }
    }

    fn is_stray(&self) -> bool {
        self.stray.load(Ordering::Relaxed) != 0
    }

    /// How many there are, for whoever has one reference that is none.
    fn opens(self: &Arc<Self>) -> u64 {
        if self.is_parked() {
            0
        } else {
            Arc::strong_count(self).saturating_sub(1) as u64
        }
    }

    /// Of the last reference: closes it, also if it could be kept idle.
    fn close_for_good(mut self) {
        self.may_idle = false;
    }

    /// Of the last reference: closes the id. One that cannot be closed is parked, to be opened again
    /// or retried.
    fn close(&mut self) -> Result<(), BackingCloseCause> {
        let Some(Mode::Passthrough { id, .. }) = self.mode.get() else {
            return Ok(());
        };
        let shared = &self.shared;
        if let Err(cause) = kernel::backing_close((*shared.device).as_fd(), id) {
            shared.close_failures.fetch_add(1, Ordering::Relaxed);
            // Somebody else closed it: nothing is left to be tried again.
            if cause != BackingCloseCause::UnknownId {
                self.park(Some(cause));
                self.mode.take();
                return Err(cause);
            }
        }
        shared.ids.fetch_sub(1, Ordering::Relaxed);
        self.mode.take();
        Ok(())
    }

    /// Of the last reference: leaves it idle, if that is wanted; else it is still to be closed.
    fn idle(&mut self) {
        let shared = Arc::clone(&self.shared);
        let wanted = self.may_idle
            && matches!(self.mode.get(), Some(Mode::Passthrough { .. }))
            && shared.idle_limit.load(Ordering::Relaxed) > 0
            && shared.ids.load(Ordering::Relaxed) <= shared.limit.load(Ordering::Relaxed);
        if wanted && self.park(None) {
            shared.trim_idle();
        }
    }

    /// Of the last reference: moves what is registered to an inode in `Parked`, and back into the map
    /// with it. Where the number was forgotten, or names another inode by now, it is kept only if
    /// closing failed. False if it is not kept.
    fn park(&mut self, failed: Option<BackingCloseCause>) -> bool {
        let shared = Arc::clone(&self.shared);
        let key = self.key.clone();
        let mut map = write(shared.shard(&key));
        let entry = map.get_mut(&key);
        let entry = entry.filter(|inode| Weak::ptr_eq(inode, &self.me));
        let mut parked = lock(&shared.parked);
        if parked.orphaned || (entry.is_none() && failed.is_none()) {
            return false;
        }
        // From here on no code of the key's is run, which could panic.
        let number = shared.number();
        let inode = Arc::new_cyclic(|me| Self {
            mode: self.mode.take().map_or_else(OnceLock::new, OnceLock::from),
            granted: AtomicU8::new(self.granted.load(Ordering::Relaxed)),
            may_idle: true,
            since: self.since,
            parked: AtomicU64::new(number),
            stray: AtomicU64::new(if entry.is_some() { 0 } else { NOWHERE }),
            deciding: Mutex::new(()),
            key,
            shared: Arc::clone(&shared),
            me: Weak::clone(me),
        });
        if let Some(entry) = entry {
            *entry = Arc::downgrade(&inode);
        }
        match failed {
            None => drop(parked.idle.insert(number, inode)),
            Some(cause) => drop(parked.unclosed.insert(number, (inode, cause))),
        }
        true
    }

    /// Into the map, in the place of whatever was there.
    fn enter(self: &Arc<Self>, map: &mut Inodes<D, K>) {
        map.insert(self.key.clone(), Arc::downgrade(self));
        self.stray.store(0, Ordering::Relaxed);
    }

    /// Out of the map, or wherever else the table finds it.
    fn leave(&mut self) {
        let stray = *self.stray.get_mut();
        if stray == 0 {
            let mut map = write(self.shared.shard(&self.key));
            let found = map.get(&self.key);
            if found.is_some_and(|inode| Weak::ptr_eq(inode, &self.me)) {
                map.remove(&self.key);
            }
        } else {
            lock(&self.shared.strays).remove(&stray);
        }
    }

    /// With its number in `Parked`, or 0. None for one whose mode is not decided.
    fn row(self: &Arc<Self>, now: u32) -> Option<(u64, Entry<K>)> {
        let (id, file, reason) = match self.mode.get()? {
            Mode::Passthrough { id, file } => (Some(id.as_raw()), Some(*file), None),
            Mode::Server(reason) => (None, None, Some(*reason)),
        };
        let entry = Entry {
            inode: self.key.clone(),
            id,
            backing_device: file.map(|file| file.device),
            backing_inode: file.map(|file| file.inode),
            access: self.granted(),
            opens: self.opens(),
            forgotten: self.is_stray(),
            server_reason: reason,
            close_failed: None,
            age: Duration::from_secs(u64::from(now.saturating_sub(self.since))),
        };
        Some((self.parked.load(Ordering::Relaxed), entry))
    }
}

/// Closes an inode, also when a key's own code panics in between.
struct Closing<'a, D: Deref<Target: AsFd>, K: Hash + Eq + Clone>(&'a mut Inode<D, K>);

impl<D: Deref<Target: AsFd>, K: Hash + Eq + Clone> Drop for Closing<'_, D, K> {
    fn drop(&mut self) {
        // A failure is counted, and kept in `Parked`.
        let _ = self.0.close();
    }
}

/// The last release, or that of what was parked.
impl<D: Deref<Target: AsFd>, K: Hash + Eq + Clone> Drop for Inode<D, K> {
    fn drop(&mut self) {
        let closing = Closing(self);
        closing.0.idle();
        drop(closing);
        self.leave();
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
