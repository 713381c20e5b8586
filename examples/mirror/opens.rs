//! Passthrough: whether it is on, and what the mirror knows of a file that a client opens.

use std::io;
use std::os::fd::OwnedFd;
use std::sync::Arc;

use fuse_backing::init::{InitFlags, MaxStackDepth, negotiate};
use fuse_backing::rights::{CapabilitySet, Lowered, RegistrarThread};
use fuse_backing::{ClientFlags, FopenFlags, FuseDevice, Handle, Handles, ServerFile};
use fuser::{INodeNo, KernelConfig};
use rustix::fs::OFlags;

use crate::inodes::Inode;
use crate::on_behalf::{Identity, NOBODY};

pub(crate) type Device = Arc<FuseDevice>;
pub(crate) type Registrar = RegistrarThread<Lowered<Device>>;
pub(crate) type Files = Handles<Registrar, OwnedFd, INodeNo>;
pub(crate) type OpenFile = Handle<Registrar, OwnedFd, INodeNo>;

/// In INIT: turns passthrough on, or finds out why it is unavailable.
pub(crate) fn attach(
    files: &Files,
    device: Device,
    killpriv: bool,
    config: &mut KernelConfig,
) -> io::Result<()> {
    let offered = InitFlags::from_bits_retain(config.capabilities().bits());
    // Two, so that the source may be on overlayfs. In return nothing can be stacked on the mirror.
    let mut reply = negotiate(offered, InitFlags::empty(), MaxStackDepth::Two)?;
    if killpriv {
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
    let attached = table.attach(registrar(device)?);
    attached.map_err(|_| io::Error::other("a device is attached already"))
}

/// What clients do through passthrough is done with the rights of this thread: set-user-ID and set-group-ID bits go
/// when a file is written, and neither root's reserved blocks nor quotas are open.
fn registrar(device: Device) -> io::Result<Registrar> {
    let lowered = Lowered::for_good(device, CapabilitySet::empty());
    // For the thread's life.
    let prepare = || Identity::assume(NOBODY, NOBODY).map(std::mem::forget);
    Ok(RegistrarThread::spawn(lowered, prepare)?)
}

/// A file that the mirror has opened with the client's flags by way of `inode`. The inode's own fd is
/// registered, so that the table has none to open.
pub(crate) fn opened(inode: &Inode, file: OwnedFd, flags: OFlags) -> ServerFile<'_, OwnedFd> {
    let (device, number) = inode.identity();
    // Access mode 3 was checked for both by open(2), and then permits ioctls alone: the kernel
    // lets the client neither read nor write.
    ServerFile::new(file)
        .access(ClientFlags::from(flags).access())
        .identity(device, number)
        .path_fd(inode)
}

/// What to ask for beside the mode. In server mode a client that opens with `O_DIRECT` bypasses the page
/// cache, if such files can be mapped, as they can elsewhere.
pub(crate) fn reply_flags(flags: OFlags, can_map_direct: bool) -> FopenFlags {
    if can_map_direct && flags.contains(OFlags::DIRECT) {
        FopenFlags::DIRECT_IO
    } else {
        FopenFlags::empty()
    }
}
