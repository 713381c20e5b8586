//! A model of `BackingTable`: a second implementation, for one thread, without a kernel.

use std::collections::BTreeMap;

use fuse_backing::error::{BackingError, NotPermitted, OpenError, ServerReason};
use fuse_backing::table::Entry;
use fuse_backing::{Access, ClientFlags};

/// The kind of thread that calls the table.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Thread {
    Able,
    /// It lacks `CAP_SYS_ADMIN`: it can neither register nor close.
    Incapable,
    /// Its registrations fail with `ENOMEM`.
    OutOfMemory,
    /// A policy denies its registrations, which the table takes to concern the whole connection.
    Denied,
}

/// The file of an fd that is handed to the table.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct FileId {
    pub device: u64,
    pub inode: u64,
    /// Whether the kernel accepts it as a backing file.
    pub registrable: bool,
}

/// A registration, or an open inode in server mode. Of those with one key, at most one is attached.
#[derive(Clone, Copy, Debug)]
struct Inode {
    key: u64,
    attached: bool,
    mode: Mode,
    opens: u64,
    /// When it became idle, by the model's clock.
    idle: Option<u64>,
    close_failed: bool,
}

#[derive(Clone, Copy, Debug)]
enum Mode {
    Passthrough {
        /// `None` until the table has answered with it.
        id: Option<i32>,
        granted: Access,
        file: FileId,
    },
    Server(ServerReason),
}

/// Names an `Inode`.
pub type Uid = u64;

#[derive(Debug)]
pub struct Model {
    inodes: BTreeMap<Uid, Inode>,
    clock: u64,
    pub limit: usize,
    pub idle_limit: usize,
    /// Opens in server mode, by cause.
    pub served: Vec<(ServerReason, u64)>,
    pub close_failures: u64,
    pub refused: Option<BackingError>,
}

/// The error that `Thread::Incapable` gets.
const INCAPABLE: BackingError = BackingError::NotPermitted(NotPermitted::MissingCapability);
const DENIED: BackingError = BackingError::NotPermitted(NotPermitted::NotNegotiatedOrDenied);

impl Model {
    pub fn new(limit: usize) -> Self {
        Self {
            inodes: BTreeMap::new(),
            clock: 0,
            limit,
            idle_limit: 0,
            served: Vec::new(),
            close_failures: 0,
            refused: None,
        }
    }

    pub fn open(
        &mut self,
        key: u64,
        flags: i32,
        file: FileId,
        access: Access,
        thread: Thread,
    ) -> Result<Uid, OpenError> {
        let wanted = ClientFlags::from(flags).access();
        if !access.allows(wanted) {
            return Err(OpenError::AccessExceeded {
                granted: access,
                wanted,
            });
        }
        if let Some(uid) = self.attached(key) {
            let inode = self.inode(uid);
            match &mut inode.mode {
                Mode::Server(_) => return Ok(self.count_open(uid)),
                Mode::Passthrough {
                    granted,
                    file: registered,
                    ..
                } if *registered == file => {
                    *granted = union(*granted, access);
                    return Ok(self.count_open(uid));
                }
                Mode::Passthrough { .. } if inode.opens > 0 => {
                    return Err(OpenError::DifferentFile);
                }
                Mode::Passthrough { .. } => self.detach(uid, thread),
            }
        }
        let mode = match self.register(file, thread) {
            Ok(()) => Mode::Passthrough {
                id: None,
                granted: access,
                file,
            },
            Err(reason) => Mode::Server(reason),
        };
        let uid = self.add(key, mode);
        Ok(self.count_open(uid))
    }

    pub fn share(&mut self, key: u64, flags: i32) -> Option<Uid> {
        let uid = self.attached(key)?;
        match self.inode(uid).mode {
            Mode::Passthrough { granted, .. }
                if flags & libc::O_TRUNC == 0
                    && granted.allows(ClientFlags::from(flags).access()) =>
            {
                Some(self.count_open(uid))
            }
            Mode::Passthrough { .. } | Mode::Server(_) => None,
        }
    }

    pub fn serve(&mut self, key: u64, thread: Thread) -> Option<Uid> {
        if let Some(uid) = self.attached(key) {
            let inode = self.inode(uid);
            match inode.mode {
                Mode::Server(_) => return Some(self.count_open(uid)),
                Mode::Passthrough { .. } if inode.opens > 0 => return None,
                Mode::Passthrough { .. } => self.detach(uid, thread),
            }
        }
        let uid = self.add(key, Mode::Server(ServerReason::Chosen));
        Some(self.count_open(uid))
    }

    pub fn release(&mut self, uid: Uid, thread: Thread) {
        let keep = self.idle_limit > 0 && self.ids() <= self.limit;
        self.clock += 1;
        let now = self.clock;
        let inode = self.inode(uid);
        inode.opens -= 1;
        if inode.opens > 0 {
            return;
        }
        match inode.mode {
            Mode::Server(_) => {
                self.inodes.remove(&uid);
            }
            Mode::Passthrough { .. } if keep && inode.attached => {
                inode.idle = Some(now);
                self.trim_idle(thread);
            }
            Mode::Passthrough { .. } => {
                let _ = self.close(uid, thread);
            }
        }
    }

    pub fn forget(&mut self, key: u64, thread: Thread) {
        if let Some(uid) = self.attached(key) {
            if self.inode(uid).opens > 0 {
                self.inode(uid).attached = false;
            } else {
                self.detach(uid, thread);
            }
        }
    }

    /// Forgets the inode unless it is open.
    pub fn invalidate(&mut self, key: u64, thread: Thread) -> bool {
        let is_open = self.opens(key) > 0;
        if !is_open {
            self.forget(key, thread);
        }
        !is_open
    }

    pub fn set_limit(&mut self, limit: usize, thread: Thread) {
        self.limit = limit;
        while self.ids() > limit && self.close_oldest(thread) {}
    }

    pub fn set_idle_limit(&mut self, limit: usize, thread: Thread) {
        self.idle_limit = limit;
        self.trim_idle(thread);
    }

    pub fn retry_closes(&mut self, thread: Thread) -> Result<(), BackingError> {
        let failed = self.inodes.iter().filter(|(_, inode)| inode.close_failed);
        let failed: Vec<_> = failed.map(|(uid, _)| *uid).collect();
        // Each is tried, even after one has failed.
        let mut result = Ok(());
        for uid in failed {
            result = result.and(self.close(uid, thread));
        }
        result
    }

    /// Compares the id that the table answered an open with to the inode's; `None` is server mode.
    pub fn check_id(&mut self, uid: Uid, answered: Option<i32>) -> Result<(), String> {
        let has_it =
            |inode: &Inode| matches!(inode.mode, Mode::Passthrough { id, .. } if id == answered);
        let taken = self.inodes.values().any(has_it);
        match (&mut self.inode(uid).mode, answered) {
            (
                Mode::Passthrough {
                    id: Some(known), ..
                },
                Some(answered),
            ) if *known == answered => Ok(()),
            (Mode::Passthrough { id: id @ None, .. }, Some(answered)) if !taken => {
                *id = Some(answered);
                Ok(())
            }
            (Mode::Server(_), None) => Ok(()),
            (mode, answered) => Err(format!("answered with id {answered:?}, expected {mode:?}")),
        }
    }

    pub fn reason(&self, uid: Uid) -> Option<ServerReason> {
        match self.inodes[&uid].mode {
            Mode::Passthrough { .. } => None,
            Mode::Server(reason) => Some(reason),
        }
    }

    /// How often the inode that has this number now is open.
    pub fn opens(&self, key: u64) -> u64 {
        self.attached(key).map_or(0, |uid| self.inodes[&uid].opens)
    }

    pub fn is_open_in_passthrough(&self, key: u64) -> bool {
        self.attached(key).is_some_and(|uid| {
            let inode = &self.inodes[&uid];
            inode.opens > 0 && matches!(inode.mode, Mode::Passthrough { .. })
        })
    }

    pub fn is_idle(&self, key: u64) -> bool {
        self.attached(key)
            .is_some_and(|uid| self.inodes[&uid].idle.is_some())
    }

    pub fn ids(&self) -> usize {
        self.count(|inode| matches!(inode.mode, Mode::Passthrough { .. }))
    }

    pub fn idle(&self) -> usize {
        self.count(|inode| inode.idle.is_some())
    }

    /// The model's state, in the form of the free function `rows`.
    pub fn rows(&self) -> Vec<String> {
        let row = |inode: &Inode| {
            let (id, granted, file, reason) = match inode.mode {
                Mode::Passthrough { id, granted, file } => (id, Some(granted), Some(file), None),
                Mode::Server(reason) => (None, None, None, Some(reason)),
            };
            row(
                inode.key,
                !inode.attached,
                inode.opens,
                id,
                granted,
                file.map(|file| (file.device, file.inode)),
                reason,
                inode.close_failed.then_some(INCAPABLE),
            )
        };
        sorted(self.inodes.values().map(row))
    }

    fn count(&self, f: impl Fn(&Inode) -> bool) -> usize {
        self.inodes.values().filter(|inode| f(inode)).count()
    }

    fn attached(&self, key: u64) -> Option<Uid> {
        let mut inodes = self.inodes.iter();
        let found = inodes.find(|(_, inode)| inode.key == key && inode.attached)?;
        Some(*found.0)
    }

    fn inode(&mut self, uid: Uid) -> &mut Inode {
        self.inodes.get_mut(&uid).expect("it has this inode")
    }

    fn add(&mut self, key: u64, mode: Mode) -> Uid {
        self.clock += 1;
        let inode = Inode {
            key,
            attached: true,
            mode,
            opens: 0,
            idle: None,
            close_failed: false,
        };
        self.inodes.insert(self.clock, inode);
        self.clock
    }

    fn count_open(&mut self, uid: Uid) -> Uid {
        let inode = self.inode(uid);
        inode.opens += 1;
        inode.idle = None;
        inode.close_failed = false;
        if let Mode::Server(reason) = inode.mode {
            match self.served.iter_mut().find(|(cause, _)| *cause == reason) {
                Some((_, opens)) => *opens += 1,
                None => self.served.push((reason, 1)),
            }
        }
        uid
    }

    fn register(&mut self, file: FileId, thread: Thread) -> Result<(), ServerReason> {
        if let Some(error) = self.refused {
            return Err(ServerReason::Refused(error));
        }
        while self.ids() >= self.limit {
            if !self.close_oldest(thread) {
                return Err(ServerReason::LimitReached);
            }
        }
        match thread {
            Thread::Incapable => Err(ServerReason::Refused(INCAPABLE)),
            Thread::Denied => {
                self.refused = Some(DENIED);
                Err(ServerReason::Refused(DENIED))
            }
            Thread::OutOfMemory => Err(ServerReason::Refused(BackingError::OutOfMemory)),
            Thread::Able if !file.registrable => {
                Err(ServerReason::Refused(BackingError::StackedTooDeep))
            }
            Thread::Able => Ok(()),
        }
    }

    /// Closes an id. The inode of an id that cannot be closed stays.
    fn close(&mut self, uid: Uid, thread: Thread) -> Result<(), BackingError> {
        if thread == Thread::Incapable {
            self.close_failures += 1;
            self.inode(uid).idle = None;
            self.inode(uid).close_failed = true;
            return Err(INCAPABLE);
        }
        self.inodes.remove(&uid);
        Ok(())
    }

    /// Closes the id of an inode that is not open. The inode loses its number even if the close fails.
    fn detach(&mut self, uid: Uid, thread: Thread) {
        self.inode(uid).attached = false;
        let _ = self.close(uid, thread);
    }

    fn close_oldest(&mut self, thread: Thread) -> bool {
        let idle = self.inodes.iter();
        let idle = idle.filter_map(|(uid, inode)| Some((inode.idle?, *uid)));
        let Some((_, uid)) = idle.min() else {
            return false;
        };
        let _ = self.close(uid, thread);
        true
    }

    fn trim_idle(&mut self, thread: Thread) {
        while self.idle() > self.idle_limit && self.close_oldest(thread) {}
    }
}

/// The table's list, in a form to be compared and printed.
pub fn rows(entries: &[Entry<u64>]) -> Vec<String> {
    sorted(entries.iter().map(|entry| {
        row(
            entry.inode,
            entry.detached,
            entry.opens,
            entry.id,
            entry.access,
            entry.backing_device.zip(entry.backing_inode),
            entry.server_reason,
            entry.close_failed,
        )
    }))
}

#[allow(clippy::too_many_arguments)]
fn row(
    key: u64,
    forgotten: bool,
    opens: u64,
    id: Option<i32>,
    access: Option<Access>,
    file: Option<(u64, u64)>,
    reason: Option<ServerReason>,
    close_failed: Option<BackingError>,
) -> String {
    format!(
        "inode {key}, forgotten {forgotten}, {opens} opens, id {id:?}, access {access:?}, \
         file {file:?}, reason {reason:?}, close failed {close_failed:?}"
    )
}

fn sorted(rows: impl Iterator<Item = String>) -> Vec<String> {
    let mut rows: Vec<_> = rows.collect();
    rows.sort();
    rows
}

fn union(a: Access, b: Access) -> Access {
    if a == b { a } else { Access::ReadWrite }
}
