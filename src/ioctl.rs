//! One raw call for each `/dev/fuse` ioctl. All unsafe code of the crate is in this file.

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

/// The ioctl and its operand. rustix has no pattern for an ioctl whose result is its return value.
struct BackingOpen(uapi::fuse_backing_map);

// SAFETY: `as_ptr` returns the address of a `fuse_backing_map`. uapi.rs asserts its layout, and the opcode encodes its
// size. The kernel copies that many bytes in and writes none (fs/fuse/dev.c: only `copy_from_user`), so `IS_MUTATING`
// is false. `output_from_ptr` does not use the pointer.
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

/// `FUSE_DEV_IOC_BACKING_OPEN`. Returns what the kernel returned: the caller must check that it is a backing id.
#[inline]
pub(crate) fn backing_open(device: BorrowedFd<'_>, backing: BorrowedFd<'_>) -> Result<i32> {
    let map = BackingOpen(uapi::fuse_backing_map::new(backing));
    // SAFETY:
    // - The operand: the opcode encodes its size, rustix keeps it alive on its stack for the call, and the kernel reads
    //   it and keeps no pointer.
    // - The driver: `device` is the fd of a `FuseDevice`, because only its methods call into this file, directly or
    //   through diagnose.rs. `FuseDevice::new` has checked that the fd leads to the FUSE driver, which gives the opcode
    //   this meaning. The fd leads there for as long as it can be named: the sealed `DeviceFd` owns or borrows it, and
    //   by the rules of I/O safety nothing else redirects it. Safe functions can redirect fds 0 to 2, so
    //   `FuseDevice::new` refuses these.
    unsafe { ioctl(device, map) }
}

/// `FUSE_DEV_IOC_BACKING_CLOSE`.
#[inline]
pub(crate) fn backing_close(device: BorrowedFd<'_>, id: i32) -> Result<()> {
    // SAFETY: the opcode encodes the size of its operand. The kernel reads the operand as a u32, which has the size of
    // the i32 and no invalid bit pattern.
    let close = unsafe { Setter::<BACKING_CLOSE, i32>::new(id) };
    // SAFETY: as in `backing_open`.
    unsafe { ioctl(device, close) }
}

/// `FUSE_DEV_IOC_CLONE`: attaches `device` to the connection of `source`.
pub(crate) fn clone(device: BorrowedFd<'_>, source: BorrowedFd<'_>) -> Result<()> {
    // A borrowed fd is never negative.
    let source = u32::try_from(source.as_raw_fd()).map_err(|_| Errno::BADF)?;
    // SAFETY: the opcode encodes the size of its operand. Although the opcode is an `_IOR`, the kernel reads the
    // operand (`get_user`) and writes nothing.
    let clone = unsafe { Setter::<CLONE, u32>::new(source) };
    // SAFETY: as in `backing_open`.
    unsafe { ioctl(device, clone) }
}

/// `FUSE_DEV_IOC_SYNC_INIT`.
pub(crate) fn sync_init(device: BorrowedFd<'_>) -> Result<()> {
    // SAFETY: the opcode has no operand, and the kernel does not look at one.
    let sync_init = unsafe { NoArg::<SYNC_INIT>::new() };
    // SAFETY: as in `backing_open`, without an operand.
    unsafe { ioctl(device, sync_init) }
}
