//! How each open inode is served: by the kernel, from a registered backing file, or by the server.

use std::os::fd::OwnedFd;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Once};

use fuse_backing::{
    Access, AccessError, BackingTable, FuseDevice, InitFlags, MaxStackDepth, NegotiateError,
    OpenFlags, Scope, ServerFile, ServerReason, negotiate,
};
use fuser::{INodeNo, KernelConfig};
use rustix::fs::OFlags;
use rustix::io::Errno;

use crate::inodes::Inode;
use crate::status::Status;

pub(crate) type Device = Arc<FuseDevice<OwnedFd>>;
pub(crate) type Table = BackingTable<Device, INodeNo>;
pub(crate) type TableOpen = fuse_backing::OpenFile<Device, INodeNo>;

/// How an OPEN or CREATE is to be answered.
pub(crate) enum Answer {
    /// The kernel reads and writes the backing file.
    Passthrough {
        flags: fuser::FopenFlags,
        /// Stays registered until the RELEASE of the open that it answers, at least.
        id: u32,
    },
    /// The server does.
    Server(fuser::FopenFlags),
}

/// The open inodes of a mount.
pub(crate) struct Opens {
    /// None where passthrough is not wanted, and after the end.
    table: Option<Arc<Table>>,
    /// Negotiated in INIT.
    enabled: AtomicBool,
    /// Direct files can be mapped, as files that were opened with `O_DIRECT` can elsewhere.
    direct: AtomicBool,
    told: Once,
}

impl Opens {
    /// Without a device everything is served by the server.
    pub(crate) fn new(device: Option<Device>, status: &Status) -> Self {
        let table = device.map(|device| Arc::new(BackingTable::new(device)));
        if let Some(table) = &table {
            status.set_table(table);
        }
        Self {
            table,
            enabled: AtomicBool::new(false),
            direct: AtomicBool::new(false),
            told: Once::new(),
        }
    }

    /// In INIT: turns passthrough on, if it is wanted, or finds out why it is not to be had.
    pub(crate) fn negotiate(
        &self,
        config: &mut KernelConfig,
    ) -> Option<Result<(), NegotiateError>> {
        let mmap = fuser::InitFlags::FUSE_DIRECT_IO_ALLOW_MMAP;
        let direct = config.capabilities().contains(mmap) && config.add_capabilities(mmap).is_ok();
        self.direct.store(direct, Ordering::Relaxed);
        self.table.as_ref()?;
        let offered = InitFlags::from_bits_retain(config.capabilities().bits());
        // Two, so that the source may be on overlayfs. In return nothing can be stacked on the mirror.
        let reply = match negotiate(offered, InitFlags::empty(), MaxStackDepth::Two) {
            Ok(reply) => reply,
            Err(why) => return Some(Err(why)),
        };
        let flags = fuser::InitFlags::from_bits_retain(reply.init_flags().bits());
        let taken = config.add_capabilities(flags).is_ok()
            && config.set_max_stack_depth(reply.max_stack_depth()).is_ok();
        self.enabled.store(taken, Ordering::Relaxed);
        Some(taken.then_some(()).ok_or(NegotiateError::NotOffered))
    }

    /// One more open of the inode, and how to answer it. `file` was opened with the client's flags.
    pub(crate) fn open(
        &self,
        nodeid: INodeNo,
        inode: &Inode,
        file: &OwnedFd,
        client_flags: OFlags,
    ) -> Result<(Answer, Option<TableOpen>), Errno> {
        let enabled = self.enabled.load(Ordering::Relaxed);
        let Some(table) = self.table.as_ref().filter(|_| enabled) else {
            return Ok((self.by_server(client_flags), None));
        };
        let flags = client_flags.bits() as i32;
        // The inode's own fd is registered, so that the table has none to open.
        let opened = ServerFile::with_access(file, granted(file)?).path_fd(inode);
        let open = table
            .open(&nodeid, flags, opened)
            .map_err(|error| error.errno())?;
        if !open.is_passthrough() {
            self.tell(&open);
            return Ok((self.by_server(client_flags), Some(open)));
        }
        let reply = open.reply(OpenFlags::empty()).map_err(|_| Errno::IO)?;
        let answer = Answer::Passthrough {
            flags: fuser::FopenFlags::from_bits_retain(reply.open_flags()),
            id: reply.backing_id() as u32,
        };
        Ok((answer, Some(open)))
    }

    /// Through the page cache, but for a client that opens with `O_DIRECT`.
    fn by_server(&self, client_flags: OFlags) -> Answer {
        let direct = client_flags.contains(OFlags::DIRECT) && self.direct.load(Ordering::Relaxed);
        Answer::Server(if direct {
            fuser::FopenFlags::FOPEN_DIRECT_IO
        } else {
            fuser::FopenFlags::empty()
        })
    }

    /// What goes for more than this file is worth a line, once.
    fn tell(&self, open: &TableOpen) {
        if let Some(ServerReason::Refused(error)) = open.server_reason() {
            if matches!(error.scope(), Scope::Connection | Scope::Thread) {
                self.told
                    .call_once(|| eprintln!("mirror: serving without passthrough: {error}"));
            }
        }
    }

    /// Lets go of the connection, which lives as long as anybody holds its device.
    pub(crate) fn shut_down(&mut self) {
        self.table = None;
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
