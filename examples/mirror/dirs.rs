//! Open directories, by the file handle in the OPENDIR reply.

use std::collections::HashMap;
use std::os::fd::OwnedFd;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use fuser::FileHandle;
use rustix::io::Errno;

/// Locked during a read, because reading moves the fd's position.
pub(crate) type Dir = Arc<Mutex<OwnedFd>>;

/// File handles are never reused.
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
