//! Open directories, by the number in the OPENDIR reply.

use std::collections::HashMap;
use std::os::fd::OwnedFd;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use fuser::FileHandle;
use rustix::io::Errno;

/// Locked while the directory is read, which moves the position of the fd.
pub(crate) type Dir = Arc<Mutex<OwnedFd>>;

/// A number is never used twice.
#[derive(Default)]
pub(crate) struct Dirs {
    open: Mutex<HashMap<FileHandle, Dir>>,
    last: AtomicU64,
}

impl Dirs {
    pub(crate) fn insert(&self, dir: OwnedFd) -> FileHandle {
        let handle = FileHandle(self.last.fetch_add(1, Ordering::Relaxed) + 1);
        self.lock().insert(handle, Arc::new(Mutex::new(dir)));
        handle
    }

    pub(crate) fn get(&self, handle: FileHandle) -> Result<Dir, Errno> {
        self.lock().get(&handle).cloned().ok_or(Errno::BADF)
    }

    pub(crate) fn remove(&self, handle: FileHandle) -> Option<Dir> {
        self.lock().remove(&handle)
    }

    fn lock(&self) -> MutexGuard<'_, HashMap<FileHandle, Dir>> {
        self.open.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
