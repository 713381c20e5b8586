//! A registrar in place of the kernel: it needs no root and no `/dev/fuse`.

use std::collections::BTreeMap;
use std::os::fd::BorrowedFd;
use std::panic::resume_unwind;
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, Ordering};

use fuse_backing::error::{BackingCloseError, BackingError, Scope};
use fuse_backing::{Access, BackingId, Register, error::Errno};
use rustix::fs::{OFlags, fcntl_getfl, fstat};

/// A registrar in place of the kernel.
#[derive(Debug, Default)]
pub(crate) struct Fake {
    /// What is registered now, by id.
    pub(crate) registered: Mutex<BTreeMap<i32, Registration>>,
    /// All registrations so far, including the closed ones.
    pub(crate) past: Mutex<Vec<Registration>>,
    /// Refuses the next call with this.
    pub(crate) refusal: Mutex<Option<(Errno, Scope)>>,
    /// Makes the next call panic.
    pub(crate) panics: AtomicBool,
    pub(crate) enforces_grant: bool,
    pub(crate) takes_open_fd: bool,
    /// Refuses `O_PATH` fds, as the kernel does before Linux 6.12.
    pub(crate) refuses_path_fds: bool,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Registration {
    pub(crate) ino: u64,
    pub(crate) grant: Access,
    pub(crate) is_path: bool,
}

impl Fake {
    pub(crate) fn ids(&self) -> Vec<i32> {
        self.registered.lock().unwrap().keys().copied().collect()
    }

    pub(crate) fn past(&self) -> Vec<Registration> {
        self.past.lock().unwrap().clone()
    }

    pub(crate) fn refuse_next(&self, errno: Errno, scope: Scope) {
        *self.refusal.lock().unwrap() = Some((errno, scope));
    }

    fn panic_if_asked(&self) {
        if self.panics.swap(false, Ordering::SeqCst) {
            resume_unwind(Box::new("a registrar that panics"));
        }
    }
}

impl Register for Fake {
    fn register(&self, file: BorrowedFd<'_>, grant: Access) -> Result<BackingId, BackingError> {
        self.panic_if_asked();
        if let Some((errno, scope)) = self.refusal.lock().unwrap().take() {
            return Err(BackingError::Registrar { errno, scope });
        }
        let is_path = fcntl_getfl(file).unwrap().contains(OFlags::PATH);
        if is_path && self.refuses_path_fds {
            return Err(BackingError::PathOnlyFd);
        }
        let registration = Registration {
            ino: fstat(file).unwrap().st_ino,
            grant,
            is_path,
        };
        let mut past = self.past.lock().unwrap();
        past.push(registration);
        let id = i32::try_from(past.len()).unwrap();
        self.registered.lock().unwrap().insert(id, registration);
        Ok(BackingId::from_raw(id).unwrap())
    }

    fn unregister(&self, id: BackingId) -> Result<(), BackingCloseError<BackingId>> {
        self.panic_if_asked();
        if let Some((errno, scope)) = self.refusal.lock().unwrap().take() {
            let cause = BackingError::Registrar { errno, scope };
            return Err(BackingCloseError::new(id, cause));
        }
        match self.registered.lock().unwrap().remove(&id.as_raw()) {
            Some(_) => Ok(()),
            None => Err(BackingCloseError::new(id, BackingError::UnknownId)),
        }
    }

    fn takes_path_fd(&self) -> bool {
        !self.takes_open_fd
    }

    fn enforces_grant(&self) -> bool {
        self.enforces_grant
    }
}
