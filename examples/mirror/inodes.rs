//! The inodes that the kernel knows, each held by an `O_PATH` fd.
//!
//! Three numbers are kept apart. The [`Key`] tells files from each other on this machine. The nodeid is what the kernel
//! calls a file, from its first lookup to FORGET. The inode number is what stat(2) reports: it has to stay the same
//! when the kernel forgets a file and looks it up again, or cp, rm, tar and git take it for another one.

use std::collections::HashMap;
use std::hash::{DefaultHasher, Hash, Hasher};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};

use fuser::{Generation, INodeNo};
use rustix::fs::{AtFlags, Statx, StatxAttributes, inotify, makedev};
use rustix::io::Errno;

use crate::source;

/// What a file is, and by which mount it is reached: mounts of one filesystem differ in what they permit.
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
struct Key {
    mount: u64,
    file: File,
}

impl Key {
    fn new(stat: &Statx, file: File) -> Self {
        let mount = stat.stx_mnt_id;
        Self { mount, file }
    }
}

/// What tells a file from others. It stays that of this file while an fd of it is open.
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
enum File {
    /// The root of its mount, so that the filesystem, which may hang, is not asked.
    Root,
    /// `st_dev` and `st_ino`, where they tell files apart.
    Number(u64, u64),
    /// A watch descriptor of inotify(7), where they do not: on overlayfs two names of a lower file have one number, and
    /// are two files as soon as one is written; and a file's number changes when it is copied up. The kernel has one
    /// watch for each inode, whatever its number.
    Watch(i32),
    /// Both again, where there can be no watch: the server may not read the file, and so is not root.
    Unreadable(u64, u64),
}

/// What a lookup has found.
pub(crate) struct Found {
    pub(crate) nodeid: INodeNo,
    /// The kernel may know a nodeid once more, for another file.
    pub(crate) generation: Generation,
    pub(crate) stat: Statx,
    /// The nodeid is the inode number as well, and what `stat` says is not older than the lookup.
    pub(crate) is_current: bool,
}

/// An inode of the source tree. Everything done to it goes through its fd, never through a path
/// that somebody may have changed in the meantime.
pub(crate) struct Inode {
    fd: OwnedFd,
    key: Key,
    identity: (u64, u64),
    /// Whether numbers tell files apart on this filesystem, as far as anybody asked.
    numbered: OnceLock<bool>,
}

impl Inode {
    fn new(fd: OwnedFd, key: Key, stat: &Statx) -> Self {
        Self {
            fd,
            key,
            identity: identity(stat),
            numbered: match key.file {
                File::Root => OnceLock::new(),
                File::Number(..) => OnceLock::from(true),
                File::Watch(_) | File::Unreadable(..) => OnceLock::from(false),
            },
        }
    }

    /// `st_dev` and `st_ino`, as they were at the first lookup.
    pub(crate) fn identity(&self) -> (u64, u64) {
        self.identity
    }

    /// True of the filesystems on this machine that are known not to hang.
    pub(crate) fn is_numbered(&self) -> bool {
        self.numbered.get() == Some(&true)
    }

    fn has_filesystem_of(&self, stat: &Statx) -> bool {
        self.identity.0 == identity(stat).0
    }

    /// The key of a file in this directory, if it takes no system call.
    fn key_below(&self, stat: &Statx) -> Option<Key> {
        let file = if stat.stx_attributes.contains(StatxAttributes::MOUNT_ROOT) {
            File::Root
        } else if self.has_filesystem_of(stat) && self.is_numbered() {
            let (dev, ino) = identity(stat);
            File::Number(dev, ino)
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
    /// How often the kernel was told of it, less what it has forgotten.
    lookups: u64,
    /// How many inodes had been inserted then. For the kernel it is the generation of the nodeid.
    since: u64,
}

struct Table {
    by_nodeid: HashMap<INodeNo, Known>,
    by_key: HashMap<Key, INodeNo>,
    /// How many keys have a watch: as many as there are mounts by which its file is known.
    watches: HashMap<i32, usize>,
    /// For files whose inode number is taken.
    next: u64,
    /// Inodes inserted so far.
    now: u64,
}

pub(crate) struct Inodes {
    table: Mutex<Table>,
    inotify: OwnedFd,
    /// The filesystem of the root.
    pub(crate) dev: u64,
    /// The filesystem that the mirror itself is.
    own: u64,
}

impl Inodes {
    /// `own` is the `st_dev` of the mirror.
    pub(crate) fn new(root: OwnedFd, own: u64) -> Result<Self, Errno> {
        let stat = source::look(&root, "", AtFlags::EMPTY_PATH)?;
        let key = Key::new(&stat, File::Root);
        let inode = Arc::new(Inode::new(root, key, &stat));
        let ask = || source::numbers_tell_files_apart(&inode.fd);
        inode.numbered.get_or_init(ask);
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

    /// Counts one lookup of a file in `parent` that the kernel has known since before [`now`](Self::now), when `stat`
    /// was not made yet, if it can be told by that: like [`remember`](Self::remember). Meanwhile its number was not
    /// free for another file.
    pub(crate) fn again(&self, parent: &Inode, stat: &Statx, now: u64) -> Option<Found> {
        let key = parent.key_below(stat)?;
        let counted = self.lock().count(key, now)?;
        Some(self.found(counted, key, *stat))
    }

    /// Counts one lookup of the file in `parent` that `fd` is an `O_PATH` fd of. To be followed by a reply
    /// that has the nodeid: the kernel will take the lookup back with FORGET.
    pub(crate) fn remember(&self, parent: &Inode, fd: OwnedFd) -> Result<Found, Errno> {
        let stat = source::look(&fd, "", AtFlags::EMPTY_PATH)?;
        // The mirror would ask itself, and wait for a thread of its own.
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
            matches!(key.file, File::Number(..)) && nodeid == number(self.dev, identity(&stat));
        Found {
            nodeid,
            generation: Generation(since),
            stat,
            is_current,
        }
    }

    /// Without the lock: a filesystem that hangs can be asked here.
    fn key(&self, parent: &Inode, fd: &OwnedFd, stat: &Statx) -> Result<Key, Errno> {
        let ask = || source::numbers_tell_files_apart(fd);
        let numbered = if parent.has_filesystem_of(stat) {
            *parent.numbered.get_or_init(ask)
        } else {
            ask()
        };
        let (dev, ino) = identity(stat);
        let file = if numbered {
            File::Number(dev, ino)
        } else {
            // The watch is for no event: it is the descriptor that counts.
            let event = inotify::WatchFlags::EXCL_UNLINK;
            let path = source::proc_path(fd);
            match inotify::add_watch(&self.inotify, path, event) {
                Err(Errno::ACCESS) => File::Unreadable(dev, ino),
                watch => File::Watch(watch?),
            }
        };
        Ok(Key::new(stat, file))
    }

    /// Takes lookups back. An inode without any is let go of, as soon as no request uses it. Then `gone` is called,
    /// before its nodeid can become that of another file.
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
        if let File::Watch(watch) = key.file {
            let keys = table.watches.entry(watch).or_default();
            *keys = keys.saturating_sub(1);
            if *keys == 0 {
                table.watches.remove(&watch);
                // Another thread may have just been given it for this file. Then the kernel knows that by two nodeids for
                // a while, and locks on one do not hold on the other.
                let _ = inotify::remove_watch(&self.inotify, watch);
            }
        }
        gone();
        // The fd may be all that is left of a large file, which takes its time to go.
        drop(guard);
        drop(forgotten);
    }

    /// A panic in one request is not to take the others down: no update can be half done.
    fn lock(&self) -> MutexGuard<'_, Table> {
        self.table.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Table {
    /// The nodeid, and since when it is that of this file: not after `now`.
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
        // fuser 0.18 replies to a lookup with one number for both. Then the kernel may keep the attributes that came with
        // it, or else asks for those with the right number.
        let mut nodeid = number;
        while nodeid <= INodeNo::ROOT || self.by_nodeid.contains_key(&nodeid) {
            nodeid = INodeNo(self.next);
            self.next += 1;
        }
        let key = inode.key;
        if let File::Watch(watch) = key.file {
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

/// The inode number to report. Files of the root's filesystem keep theirs, and others get numbers that are far from those.
pub(crate) fn number(root_dev: u64, (dev, ino): (u64, u64)) -> INodeNo {
    if dev == root_dev {
        return INodeNo(ino);
    }
    let mut hasher = DefaultHasher::new();
    dev.hash(&mut hasher);
    INodeNo(ino ^ hasher.finish() << 32)
}
