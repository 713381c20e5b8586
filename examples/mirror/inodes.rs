//! The inodes that the kernel knows, each held by an `O_PATH` fd.
//!
//! A file has three identifiers. The [`Key`] identifies it on this machine. The nodeid identifies it to the kernel,
//! from its first lookup to FORGET. The inode number is what stat(2) reports: it must stay the same when the kernel
//! forgets a file and looks it up again, or cp, rm, tar and git take it for another file.

use std::collections::HashMap;
use std::hash::{DefaultHasher, Hash, Hasher};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};

use fuser::{Generation, INodeNo};
use rustix::fs::{AtFlags, Statx, StatxAttributes, inotify, makedev};
use rustix::io::Errno;

use crate::source;

/// A file and the mount through which it is reached: mounts of one filesystem differ in what they permit.
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
struct Key {
    mount: u64,
    file: FileId,
}

impl Key {
    fn new(stat: &Statx, file: FileId) -> Self {
        let mount = stat.stx_mnt_id;
        Self { mount, file }
    }
}

/// Identifies a file as long as an fd of it is open.
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
enum FileId {
    /// The root of its mount. Needs no call to the filesystem, which may hang.
    Root,
    /// `st_dev` and `st_ino`, which identify files on local filesystems.
    Number(u64, u64),
    /// A watch descriptor of inotify(7), where `st_ino` does not identify files. On overlayfs, two names of a lower
    /// file share a number, but become two files when one is written; and a file's number changes when it is copied up.
    /// The kernel has one watch for each inode, independent of its number.
    Watch(i32),
    /// `st_dev` and `st_ino`, where a watch is refused because the server is not root and may not read the file.
    Unreadable(u64, u64),
}

/// The result of a lookup.
pub(crate) struct Found {
    pub(crate) nodeid: INodeNo,
    /// Tells this file from earlier files with the same nodeid.
    pub(crate) generation: Generation,
    pub(crate) stat: Statx,
    /// The nodeid equals the inode number, and `stat` is not older than the lookup.
    pub(crate) is_current: bool,
}

/// An inode of the source tree. All calls use its fd, never a path, which may lead elsewhere by then.
pub(crate) struct Inode {
    fd: OwnedFd,
    key: Key,
    identity: (u64, u64),
    /// The answer of [`source::is_local_filesystem`], once the filesystem is asked.
    local: OnceLock<bool>,
}

impl Inode {
    fn new(fd: OwnedFd, key: Key, stat: &Statx) -> Self {
        Self {
            fd,
            key,
            identity: identity(stat),
            local: match key.file {
                FileId::Root => OnceLock::new(),
                FileId::Number(..) => OnceLock::from(true),
                FileId::Watch(_) | FileId::Unreadable(..) => OnceLock::from(false),
            },
        }
    }

    /// `st_dev` and `st_ino`, as they were at the first lookup.
    pub(crate) fn identity(&self) -> (u64, u64) {
        self.identity
    }

    /// Whether this inode is known to be on a local filesystem. False until the filesystem is asked.
    pub(crate) fn is_local(&self) -> bool {
        self.local.get() == Some(&true)
    }

    fn has_filesystem_of(&self, stat: &Statx) -> bool {
        self.identity.0 == identity(stat).0
    }

    /// The key of a file in this directory, if it can be found without a system call.
    fn key_below(&self, stat: &Statx) -> Option<Key> {
        let file = if stat.stx_attributes.contains(StatxAttributes::MOUNT_ROOT) {
            FileId::Root
        } else if self.has_filesystem_of(stat) && self.is_local() {
            let (dev, ino) = identity(stat);
            FileId::Number(dev, ino)
        } else {
            return None;
        };
        Some(Key::new(stat, file))
    }
}

impl AsFd for Inode {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}

struct Known {
    inode: Arc<Inode>,
    /// Lookups that the kernel has not taken back with FORGET.
    lookups: u64,
    /// The value of `Table::now` at its insertion. Serves as the nodeid's generation.
    since: u64,
}

struct Table {
    by_nodeid: HashMap<INodeNo, Known>,
    by_key: HashMap<Key, INodeNo>,
    /// How many keys use a watch: one for each mount through which its file is known.
    watches: HashMap<i32, usize>,
    /// The next nodeid for a file whose inode number is taken.
    next: u64,
    /// The number of inodes inserted so far.
    now: u64,
}

pub(crate) struct Inodes {
    table: Mutex<Table>,
    inotify: OwnedFd,
    /// The `st_dev` of the source's root.
    pub(crate) dev: u64,
    /// The `st_dev` of the mirror itself.
    own: u64,
}

impl Inodes {
    /// `own` is the `st_dev` of the mirror.
    pub(crate) fn new(root: OwnedFd, own: u64) -> Result<Self, Errno> {
        let stat = source::look(&root, "", AtFlags::EMPTY_PATH)?;
        let key = Key::new(&stat, FileId::Root);
        let inode = Arc::new(Inode::new(root, key, &stat));
        let ask = || source::is_local_filesystem(&inode.fd);
        inode.local.get_or_init(ask);
        let known = Known {
            inode,
            lookups: 1,
            since: 0,
        };
        Ok(Self {
            table: Mutex::new(Table {
                by_nodeid: HashMap::from([(INodeNo::ROOT, known)]),
                by_key: HashMap::from([(key, INodeNo::ROOT)]),
                watches: HashMap::new(),
                next: 1 << 63,
                now: 0,
            }),
            inotify: inotify::init(inotify::CreateFlags::CLOEXEC)?,
            dev: identity(&stat).0,
            own,
        })
    }

    /// The inode behind a nodeid in a request.
    pub(crate) fn get(&self, nodeid: INodeNo) -> Result<Arc<Inode>, Errno> {
        let table = self.lock();
        let known = table.by_nodeid.get(&nodeid).ok_or(Errno::STALE)?;
        Ok(Arc::clone(&known.inode))
    }

    pub(crate) fn now(&self) -> u64 {
        self.lock().now
    }

    /// Counts one lookup of a known file in `parent`, like [`remember`](Self::remember) but without an fd. The caller
    /// reads `now` from [`now`](Self::now) before it makes `stat`. `None` if the file is unknown or was inserted after
    /// `now`: `stat` may then be of an earlier file with the same inode number.
    pub(crate) fn find_known(&self, parent: &Inode, stat: &Statx, now: u64) -> Option<Found> {
        let key = parent.key_below(stat)?;
        let counted = self.lock().count(key, now)?;
        Some(self.found(counted, key, *stat))
    }

    /// Counts one lookup of the file in `parent` that the `O_PATH` fd refers to. The caller must reply with the nodeid:
    /// the kernel takes the lookup back with FORGET.
    pub(crate) fn remember(&self, parent: &Inode, fd: OwnedFd) -> Result<Found, Errno> {
        let stat = source::look(&fd, "", AtFlags::EMPTY_PATH)?;
        // The mirror would send itself requests, and wait for one of its own threads.
        if identity(&stat).0 == self.own {
            return Err(Errno::LOOP);
        }
        let key = match parent.key_below(&stat) {
            Some(key) => key,
            None => self.key(parent, &fd, &stat)?,
        };
        let mut table = self.lock();
        let counted = match table.count(key, u64::MAX) {
            Some(counted) => counted,
            None => table.insert(
                Inode::new(fd, key, &stat),
                number(self.dev, identity(&stat)),
            ),
        };
        Ok(self.found(counted, key, stat))
    }

    fn found(&self, (nodeid, since): (INodeNo, u64), key: Key, stat: Statx) -> Found {
        let is_current =
            matches!(key.file, FileId::Number(..)) && nodeid == number(self.dev, identity(&stat));
        Found {
            nodeid,
            generation: Generation(since),
            stat,
            is_current,
        }
    }

    /// Called without the table lock, because this can ask a filesystem that hangs.
    fn key(&self, parent: &Inode, fd: &OwnedFd, stat: &Statx) -> Result<Key, Errno> {
        let ask = || source::is_local_filesystem(fd);
        let local = if parent.has_filesystem_of(stat) {
            *parent.local.get_or_init(ask)
        } else {
            ask()
        };
        let (dev, ino) = identity(stat);
        let file = if local {
            FileId::Number(dev, ino)
        } else {
            // Only the descriptor matters: this mask selects no event.
            let event = inotify::WatchFlags::EXCL_UNLINK;
            let path = source::proc_path(fd);
            match inotify::add_watch(&self.inotify, path, event) {
                Err(Errno::ACCESS) => FileId::Unreadable(dev, ino),
                watch => FileId::Watch(watch?),
            }
        };
        Ok(Key::new(stat, file))
    }

    /// Takes lookups back. Without any left, the inode is removed, and freed once no request uses it. `gone` is called
    /// under the table lock, before the nodeid can be given to another file.
    pub(crate) fn forget(&self, nodeid: INodeNo, lookups: u64, gone: impl FnOnce()) {
        if nodeid == INodeNo::ROOT {
            return;
        }
        let mut guard = self.lock();
        let table = &mut *guard;
        let Some(known) = table.by_nodeid.get_mut(&nodeid) else {
            return;
        };
        known.lookups = known.lookups.saturating_sub(lookups);
        if known.lookups > 0 {
            return;
        }
        let key = known.inode.key;
        table.by_key.remove(&key);
        let forgotten = table.by_nodeid.remove(&nodeid);
        if let FileId::Watch(watch) = key.file {
            let keys = table.watches.entry(watch).or_default();
            *keys = keys.saturating_sub(1);
            if *keys == 0 {
                table.watches.remove(&watch);
                // Another thread may have just got this watch for the file. Then the kernel knows the file by two
                // nodeids for a while, and locks on one do not hold on the other.
                let _ = inotify::remove_watch(&self.inotify, watch);
            }
        }
        gone();
        // Closed after the lock is released: the fd may be the last reference to a large file, which takes long to
        // delete.
        drop(guard);
        drop(forgotten);
    }

    /// Ignores poisoning, so that a panic in one request does not fail others: no update can be half done.
    fn lock(&self) -> MutexGuard<'_, Table> {
        self.table.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Table {
    /// Counts a lookup and returns the nodeid and its `since`, if the key was inserted not after `now`.
    fn count(&mut self, key: Key, now: u64) -> Option<(INodeNo, u64)> {
        let nodeid = *self.by_key.get(&key)?;
        let known = self.by_nodeid.get_mut(&nodeid)?;
        if known.since > now {
            return None;
        }
        known.lookups += 1;
        Some((nodeid, known.since))
    }

    fn insert(&mut self, inode: Inode, number: INodeNo) -> (INodeNo, u64) {
        // fuser 0.18 replies to a lookup with one number as both nodeid and inode number. If they are equal, the
        // kernel may keep the attributes of the reply; else it asks again and gets the right number.
        let mut nodeid = number;
        while nodeid <= INodeNo::ROOT || self.by_nodeid.contains_key(&nodeid) {
            nodeid = INodeNo(self.next);
            self.next += 1;
        }
        let key = inode.key;
        if let FileId::Watch(watch) = key.file {
            *self.watches.entry(watch).or_default() += 1;
        }
        let inode = Arc::new(inode);
        self.now += 1;
        let since = self.now;
        self.by_nodeid.insert(
            nodeid,
            Known {
                inode,
                lookups: 1,
                since,
            },
        );
        self.by_key.insert(key, nodeid);
        (nodeid, since)
    }
}

pub(crate) fn identity(stat: &Statx) -> (u64, u64) {
    let dev = makedev(stat.stx_dev_major, stat.stx_dev_minor);
    (dev, stat.stx_ino)
}

/// The inode number to report. Files on the root's filesystem keep theirs; others get numbers far from those.
pub(crate) fn number(root_dev: u64, (dev, ino): (u64, u64)) -> INodeNo {
    if dev == root_dev {
        return INodeNo(ino);
    }
    let mut hasher = DefaultHasher::new();
    dev.hash(&mut hasher);
    INodeNo(ino ^ hasher.finish() << 32)
}
