//! One raw call per `/dev/fuse` ioctl. All unsafe code of the crate is in this file.

#![allow(unsafe_code)]

use std::ffi::c_void;
use std::os::fd::{AsRawFd, BorrowedFd};
use std::ptr::from_mut;

use rustix::io::{Errno, Result};
use rustix::ioctl::{Ioctl, IoctlOutput, NoArg, Opcode, Setter, ioctl};

use crate::uapi;

const CLONE: Opcode = uapi::FUSE_DEV_IOC_CLONE as Opcode;
const BACKING_OPEN: Opcode = uapi::FUSE_DEV_IOC_BACKING_OPEN as Opcode;
const BACKING_CLOSE: Opcode = uapi::FUSE_DEV_IOC_BACKING_CLOSE as Opcode;
const SYNC_INIT: Opcode = uapi::FUSE_DEV_IOC_SYNC_INIT as Opcode;

/// rustix has no pattern for an ioctl whose result is its return value.
struct BackingOpen(uapi::fuse_backing_map);

// SAFETY: `as_ptr` gives the address of a `fuse_backing_map`, whose layout uapi.rs asserts and whose
// size the opcode encodes; the kernel copies that many bytes in and writes none (fs/fuse/dev.c:
// `copy_from_user` alone), hence not mutating. `output_from_ptr` does not use the pointer.
unsafe impl Ioctl for BackingOpen {
    type Output = IoctlOutput;

    const IS_MUTATING: bool = false;

    fn opcode(&self) -> Opcode {
        BACKING_OPEN
    }

    fn as_ptr(&mut self) -> *mut c_void {
        from_mut(&mut self.0).cast()
    }

    unsafe fn output_from_ptr(out: IoctlOutput, _: *mut c_void) -> Result<IoctlOutput> {
        Ok(out)
    }
}

/// `FUSE_DEV_IOC_BACKING_OPEN`. The result is what the kernel returned, not yet known to be a
/// backing id.
#[inline]
pub(crate) fn backing_open(device: BorrowedFd<'_>, backing: BorrowedFd<'_>) -> Result<i32> {
    let map = BackingOpen(uapi::fuse_backing_map::new(backing));
    // SAFETY: the opcode encodes the size of the operand, which rustix keeps alive on its stack
    // for the call; the kernel reads it and keeps no pointer. `device` is the fd of a `FuseDevice`, whose
    // methods are the callers, through diagnose.rs some of them: `FuseDevice::new` has seen that it leads
    // to the FUSE driver, which gives the opcode this meaning, and a `DeviceFd`, which is sealed, owns or
    // borrows its fd, so that by the rules of I/O safety it leads nowhere else while it can be named. Of
    // fds 0 to 2, which safe functions redirect, that is not true: `FuseDevice::new` refuses them.
    unsafe { ioctl(device, map) }
}

/// `FUSE_DEV_IOC_BACKING_CLOSE`.
#[inline]
pub(crate) fn backing_close(device: BorrowedFd<'_>, id: i32) -> Result<()> {
    // SAFETY: the opcode encodes the size of its operand, a u32 to the kernel, which reads the id
    // as a bit pattern of that size.
    let close = unsafe { Setter::<BACKING_CLOSE, i32>::new(id) };
    // SAFETY: as in `backing_open`.
    unsafe { ioctl(device, close) }
}

/// `FUSE_DEV_IOC_CLONE`: attaches `device` to the connection of `source`.
pub(crate) fn clone(device: BorrowedFd<'_>, source: BorrowedFd<'_>) -> Result<()> {
    // A borrowed fd is never negative.
    let source = u32::try_from(source.as_raw_fd()).map_err(|_| Errno::BADF)?;
    // SAFETY: `_IOR` notwithstanding, the kernel reads the operand (`get_user`) and writes nothing;
    // the opcode encodes its size.
    let clone = unsafe { Setter::<CLONE, u32>::new(source) };
    // SAFETY: as in `backing_open`.
    unsafe { ioctl(device, clone) }
}

/// `FUSE_DEV_IOC_SYNC_INIT`.
pub(crate) fn sync_init(device: BorrowedFd<'_>) -> Result<()> {
    // SAFETY: the opcode has no operand, and the kernel looks at none.
    let sync_init = unsafe { NoArg::<SYNC_INIT>::new() };
    // SAFETY: as in `backing_open`, without an operand.
    unsafe { ioctl(device, sync_init) }
}
