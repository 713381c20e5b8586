//! How each open inode is served: by the kernel, from a registered backing file, or by the server.

use std::collections::HashMap;
use std::collections::hash_map::Entry;
use std::os::fd::OwnedFd;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use fuse_backing::{Access, AccessError, BackingFile, FuseDevice, OpenFlags, OpenReply, Scope};
use fuser::INodeNo;
use rustix::fs::OFlags;
use rustix::io::Errno;

use crate::status::Status;

pub(crate) type Device = Arc<FuseDevice<OwnedFd>>;

/// How an OPEN or CREATE is to be answered.
pub(crate) enum Answer {
    /// The kernel reads and writes the backing file.
    Passthrough {
        flags: fuser::FopenFlags,
        /// Stays registered until the RELEASE of the open that it answers, at least.
        id: u32,
    },
    /// The server does.
    Server,
}

/// All opens of an inode at a time are served alike, with passthrough by one id. That is the
/// kernel's rule: an open that differs from the first one fails with `EIO` in the client.
enum Mode {
    Passthrough(BackingFile<Device>),
    Server,
}

struct OpenInode {
    mode: Mode,
    opens: u64,
}

/// The open inodes of a mount.
pub(crate) struct Opens {
    /// Whether registering is worth an attempt: negotiated, and not known to be futile.
    passthrough: AtomicBool,
    device: Option<Device>,
    inodes: Mutex<HashMap<INodeNo, OpenInode>>,
    status: Arc<Status>,
}

impl Opens {
    /// Without a device everything is served by the server.
    pub(crate) fn new(device: Option<Device>, status: Arc<Status>) -> Self {
        Self {
            passthrough: AtomicBool::new(false),
            device,
            inodes: Mutex::default(),
            status,
        }
    }

    pub(crate) fn wants_passthrough(&self) -> bool {
        self.device.is_some()
    }

    /// Passthrough was negotiated.
    pub(crate) fn enable_passthrough(&self) {
        self.passthrough.store(true, Ordering::Relaxed);
    }

    /// Counts one more open of the inode, and says how to answer it. `file` was opened with the
    /// client's flags. After an error nothing is counted.
    pub(crate) fn open(
        &self,
        nodeid: INodeNo,
        file: &OwnedFd,
        client_flags: OFlags,
    ) -> Result<Answer, Errno> {
        // Before anything is counted, since it can fail.
        let granted = granted(file)?;
        let mut inodes = self.lock();
        let inode = match inodes.entry(nodeid) {
            Entry::Occupied(entry) => entry.into_mut(),
            Entry::Vacant(entry) => entry.insert(OpenInode {
                mode: self.choose(file),
                opens: 0,
            }),
        };
        inode.opens += 1;
        let Mode::Passthrough(backing) = &inode.mode else {
            return Ok(Answer::Server);
        };
        // The server's own open has truncated the file: that asks nothing of the registration.
        let asked = (client_flags - OFlags::TRUNC).bits() as i32;
        match OpenReply::passthrough(backing, granted, asked, OpenFlags::empty()) {
            // The id outlives the lock: what closes it is the last RELEASE, and the one that
            // belongs to this open comes after its reply.
            Ok(reply) => Ok(Answer::Passthrough {
                flags: fuser::FopenFlags::from_bits_retain(reply.open_flags()),
                id: reply.backing_id() as u32,
            }),
            Err(_) => {
                drop(inodes);
                self.release(nodeid);
                Err(Errno::ACCESS)
            }
        }
    }

    /// Counts one open less. The last one closes the backing file.
    pub(crate) fn release(&self, nodeid: INodeNo) {
        let mut inodes = self.lock();
        let Entry::Occupied(mut entry) = inodes.entry(nodeid) else {
            return;
        };
        entry.get_mut().opens -= 1;
        if entry.get().opens > 0 {
            return;
        }
        let last = entry.remove();
        drop(inodes);
        if let Mode::Passthrough(backing) = last.mode {
            match backing.close() {
                Ok(()) => {
                    self.status.ids.fetch_sub(1, Ordering::Relaxed);
                }
                Err(error) => eprintln!("mirror: {error}"),
            }
        }
    }

    /// Lets go of the connection, which lives as long as anybody holds its device.
    pub(crate) fn shut_down(&mut self) {
        self.inodes = Mutex::default();
        self.device = None;
    }

    /// Registers the file of an inode that nobody has open, or leaves the inode to the server.
    fn choose(&self, file: &OwnedFd) -> Mode {
        let enabled = self.passthrough.load(Ordering::Relaxed);
        let Some(device) = self.device.as_ref().filter(|_| enabled) else {
            return Mode::Server;
        };
        match BackingFile::open(Arc::clone(device), file) {
            Ok(backing) => {
                self.status.ids.fetch_add(1, Ordering::Relaxed);
                Mode::Passthrough(backing)
            }
            Err(error) => {
                // Of this file or of this moment: the next inode may have better luck.
                if error.scope() == Scope::Connection
                    && self.passthrough.swap(false, Ordering::Relaxed)
                {
                    eprintln!("mirror: serving without passthrough: {error}");
                }
                Mode::Server
            }
        }
    }

    /// A panic in one request is not to take the others down: no update can be half done.
    fn lock(&self) -> MutexGuard<'_, HashMap<INodeNo, OpenInode>> {
        self.inodes.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// What the server may do with a file that it opened with the client's flags, and so the client.
fn granted(file: &OwnedFd) -> Result<Access, Errno> {
    match Access::of(file) {
        Ok(access) => Ok(access),
        // Access mode 3 was checked for both by open(2), and then permits ioctls alone: the kernel
        // lets the client neither read nor write.
        Err(AccessError::Neither) => Ok(Access::ReadWrite),
        Err(AccessError::Unreadable(errno)) => Err(errno),
        Err(_) => Err(Errno::BADF),
    }
}
