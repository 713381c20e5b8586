//! Turns passthrough on, and answers opens.

use std::io;
use std::os::fd::{BorrowedFd, OwnedFd};
use std::sync::Arc;

use fuse_backing::error::{BackingCloseError, BackingError, Scope};
use fuse_backing::init::{InitFlags, negotiate};
use fuse_backing::rights::{CapabilitySet, Lowered};
use fuse_backing::{
    Access, BackingId, ClientFlags, FopenFlags, FuseDevice, Handle, Handles, Opened, Register,
    ServerFile, register::WithoutFsetid,
};
use fuser::{INodeNo, KernelConfig};
use rustix::fs::{Mode, OFlags, StatVfsMountFlags};
use rustix::io::Errno;

use crate::inodes::Inode;
use crate::on_behalf::{Identity, NOBODY};
use crate::session::Options;
use crate::source::{self, proc_path};

type Result<T, E = Errno> = std::result::Result<T, E>;

/// `__FMODE_EXEC`, which the kernel adds to the flags of execve(2)'s open.
const EXEC: OFlags = OFlags::from_bits_retain(0o40);
const NOEXEC: StatVfsMountFlags = StatVfsMountFlags::NOEXEC;

pub(crate) type Device = Arc<FuseDevice>;
pub(crate) type Files = Handles<AsNobody, OwnedFd, INodeNo>;
pub(crate) type OpenFile = Handle<AsNobody, OwnedFd, INodeNo>;

/// Turns passthrough on in the INIT reply, or returns why it is unavailable.
pub(crate) fn attach(
    files: &Files,
    device: Device,
    options: Options,
    config: &mut KernelConfig,
) -> io::Result<()> {
    let offered = InitFlags::from_bits_retain(config.capabilities().bits());
    let mut reply = negotiate(offered, InitFlags::empty(), options.depth)?;
    if options.killpriv {
        reply = reply.handle_killpriv_v2(files);
    }
    let flags = fuser::InitFlags::from_bits_retain(reply.flags.bits());
    let refused = |what| io::Error::other(format!("fuser refuses {what}"));
    let added = config.add_capabilities(flags);
    added.map_err(|flags| refused(format!("{flags:?}")))?;
    let set = config.set_max_stack_depth(reply.max_stack_depth);
    set.map_err(|_| refused("max_stack_depth".to_owned()))?;
    let table = files.table();
    table.on_server_mode(|why| eprintln!("mirror: serving without passthrough: {why}"));
    let lowered = Lowered::per_registration(device, CapabilitySet::empty());
    let attached = table.attach(AsNobody(lowered));
    attached.map_err(|_| io::Error::other("a device is already attached"))
}

/// Registers files with the rights of nobody, which passthrough I/O then has: writes clear set-user-ID and set-group-ID
/// bits, and can use neither root's reserved blocks nor root's exemption from quotas.
pub(crate) struct AsNobody(Lowered<Device>);

impl Register for AsNobody {
    fn register(&self, file: BorrowedFd<'_>, grant: Access) -> Result<BackingId, BackingError> {
        let refused = |errno| BackingError::Registrar {
            errno,
            scope: Scope::Thread,
        };
        let _nobody = Identity::assume(NOBODY, NOBODY).map_err(refused)?;
        self.0.register(file, grant)
    }

    fn unregister(&self, id: BackingId) -> Result<(), BackingCloseError<BackingId>> {
        self.0.unregister(id)
    }
}

impl WithoutFsetid for AsNobody {}

/// Opens a file that the kernel knows. The server's own open with the client's flags returns the
/// true errno (ETXTBSY, EROFS, EINVAL), where the kernel's own open of the backing file would return
/// EIO. Returns EAGAIN while a lease is being broken.
pub(crate) fn open(
    files: &Files,
    nodeid: INodeNo,
    inode: &Inode,
    flags: OFlags,
    can_map_direct: bool,
) -> Result<Opened> {
    if flags.contains(EXEC) && source::mount_flags(inode)?.contains(NOEXEC) {
        return Err(Errno::ACCESS);
    }
    let (path, flags_here) = (proc_path(inode), source::server_flags(inode, flags));
    let file = rustix::fs::open(path, flags_here, Mode::empty())?;
    opened(files, nodeid, inode, file, flags, can_map_direct)
}

/// Answers an open. `file` is open with the client's flags, and is the file of `inode`. The table registers the inode's
/// own `O_PATH` fd, and so need not open one.
pub(crate) fn opened(
    files: &Files,
    nodeid: INodeNo,
    inode: &Inode,
    file: OwnedFd,
    flags: OFlags,
    can_map_direct: bool,
) -> Result<Opened> {
    // The server reads and writes for the page cache, at any alignment and offset. (Clearing O_APPEND
    // fails on an append-only file, which is only ever written at its end.)
    if flags.intersects(OFlags::DIRECT | OFlags::APPEND) {
        if let Ok(set) = rustix::fs::fcntl_getfl(&file) {
            let _ = rustix::fs::fcntl_setfl(&file, set - OFlags::DIRECT - OFlags::APPEND);
        }
    }
    let (device, number) = inode.identity();
    // For access mode 3, open(2) has checked both reading and writing. The kernel then permits only
    // ioctls: the client can neither read nor write.
    let file = ServerFile::new(file)
        .access(ClientFlags::from(flags).access())
        .identity(device, number)
        .path_fd(inode);
    Ok(files.open(&nodeid, flags, file, reply_flags(flags, can_map_direct))?)
}

/// Extra flags for the reply. In server mode, a client's `O_DIRECT` bypasses the page cache only if such files can
/// still be mapped, as on other filesystems.
fn reply_flags(flags: OFlags, can_map_direct: bool) -> FopenFlags {
    if can_map_direct && flags.contains(OFlags::DIRECT) {
        FopenFlags::DIRECT_IO
    } else {
        FopenFlags::empty()
    }
}
