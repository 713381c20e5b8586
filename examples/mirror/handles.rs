//! File handles: the number in an OPEN or OPENDIR reply, and what the server keeps under it.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use fuser::FileHandle;
use rustix::io::Errno;

/// What is open, by file handle. A handle is never used twice.
pub(crate) struct Handles<T> {
    table: Mutex<Table<T>>,
}

struct Table<T> {
    open: HashMap<FileHandle, Arc<T>>,
    next: u64,
}

impl<T> Handles<T> {
    pub(crate) fn new() -> Self {
        Self {
            table: Mutex::new(Table {
                open: HashMap::new(),
                next: 1,
            }),
        }
    }

    /// To be called before the reply is sent: RELEASE can overtake it.
    pub(crate) fn insert(&self, value: Arc<T>) -> FileHandle {
        let mut table = self.lock();
        let handle = FileHandle(table.next);
        table.next += 1;
        table.open.insert(handle, value);
        handle
    }

    pub(crate) fn get(&self, handle: FileHandle) -> Result<Arc<T>, Errno> {
        self.lock().open.get(&handle).cloned().ok_or(Errno::BADF)
    }

    pub(crate) fn remove(&self, handle: FileHandle) -> Option<Arc<T>> {
        self.lock().open.remove(&handle)
    }

    fn lock(&self) -> MutexGuard<'_, Table<T>> {
        self.table.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
