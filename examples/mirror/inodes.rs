//! The inodes that the kernel knows, each held by an `O_PATH` fd.

use std::collections::HashMap;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use fuser::INodeNo;
use rustix::fs::{Stat, fstat};
use rustix::io::Errno;

/// What a file is on this machine. It cannot be reused while an fd of the file is open.
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
struct Key {
    dev: u64,
    ino: u64,
}

impl Key {
    fn of(stat: &Stat) -> Self {
        Self {
            dev: stat.st_dev,
            ino: stat.st_ino,
        }
    }
}

/// An inode of the source tree. Everything done to it goes through its fd, never through a path
/// that somebody may have changed in the meantime.
pub(crate) struct Inode {
    fd: OwnedFd,
    key: Key,
}

impl Inode {
    /// `st_dev` and `st_ino`.
    pub(crate) fn identity(&self) -> (u64, u64) {
        (self.key.dev, self.key.ino)
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
}

struct Table {
    by_nodeid: HashMap<INodeNo, Known>,
    by_key: HashMap<Key, INodeNo>,
    next: u64,
}

/// The table of inodes. A nodeid is never used twice, so that its generation can stay 0.
pub(crate) struct Inodes {
    table: Mutex<Table>,
}

impl Inodes {
    pub(crate) fn new(root: OwnedFd) -> Result<Self, Errno> {
        let key = Key::of(&fstat(&root)?);
        let known = Known {
            inode: Arc::new(Inode { fd: root, key }),
            lookups: 1,
        };
        Ok(Self {
            table: Mutex::new(Table {
                by_nodeid: HashMap::from([(INodeNo::ROOT, known)]),
                by_key: HashMap::from([(key, INodeNo::ROOT)]),
                next: INodeNo::ROOT.0 + 1,
            }),
        })
    }

    /// The inode behind a nodeid in a request.
    pub(crate) fn get(&self, nodeid: INodeNo) -> Result<Arc<Inode>, Errno> {
        let table = self.lock();
        let known = table.by_nodeid.get(&nodeid).ok_or(Errno::STALE)?;
        Ok(Arc::clone(&known.inode))
    }

    /// Counts one lookup of the inode that `fd` is an `O_PATH` fd of. To be followed by a reply
    /// that has the nodeid: the kernel will take the lookup back with FORGET.
    pub(crate) fn remember(&self, fd: OwnedFd) -> Result<(INodeNo, Stat), Errno> {
        let stat = fstat(&fd)?;
        let key = Key::of(&stat);
        let mut guard = self.lock();
        let table = &mut *guard;
        if let Some(&nodeid) = table.by_key.get(&key) {
            if let Some(known) = table.by_nodeid.get_mut(&nodeid) {
                known.lookups += 1;
                return Ok((nodeid, stat));
            }
        }
        let nodeid = INodeNo(table.next);
        table.next += 1;
        let inode = Arc::new(Inode { fd, key });
        table.by_nodeid.insert(nodeid, Known { inode, lookups: 1 });
        table.by_key.insert(key, nodeid);
        Ok((nodeid, stat))
    }

    /// Takes lookups back. An inode without any is let go of, as soon as no request uses it.
    pub(crate) fn forget(&self, nodeid: INodeNo, lookups: u64) {
        if nodeid == INodeNo::ROOT {
            return;
        }
        let mut table = self.lock();
        let Some(known) = table.by_nodeid.get_mut(&nodeid) else {
            return;
        };
        known.lookups = known.lookups.saturating_sub(lookups);
        if known.lookups > 0 {
            return;
        }
        let key = known.inode.key;
        table.by_key.remove(&key);
        let gone = table.by_nodeid.remove(&nodeid);
        // The fd may be all that is left of a large file, which takes its time to go.
        drop(table);
        drop(gone);
    }

    /// The nodeid of a file, if the kernel knows it.
    pub(crate) fn nodeid(&self, dev: u64, ino: u64) -> Option<INodeNo> {
        self.lock().by_key.get(&Key { dev, ino }).copied()
    }

    /// A panic in one request is not to take the others down: no update can be half done.
    fn lock(&self) -> MutexGuard<'_, Table> {
        self.table.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
