//! The ioctl numbers and the struct, tested on the running kernel without the crate's code: with libc's ioctl, and a
//! struct that is declared here.

#![allow(unsafe_code)]

use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd};
use std::ptr::null;

use fuse_backing::{FuseDevice, uapi};
use libtest_mimic::Failed;
use macro_rules_attribute::apply;

use crate::fuse::{Connection, Init};
use crate::sandbox::Sandbox;

#[repr(C)]
struct Map {
    fd: i32,
    flags: u32,
    padding: u64,
}

fn ioctl<T>(device: BorrowedFd<'_>, request: u32, argument: *const T) -> Result<i32, i32> {
    // SAFETY: the kernel only reads at `argument`, for the requests of this file, and fails if it cannot.
    match unsafe { libc::ioctl(device.as_raw_fd(), request as _, argument) } {
        -1 => Err(io::Error::last_os_error().raw_os_error().unwrap_or(0)),
        value => Ok(value),
    }
}

#[apply(needs_passthrough)]
fn backing_open_arguments(sandbox: &Sandbox) -> Result<(), Failed> {
    let connection = Connection::mount(sandbox, Init::passthrough(1))?;
    let device = connection.device();
    let file = tempfile::tempfile()?;
    let open = |flags, padding| {
        let map = Map {
            fd: file.as_raw_fd(),
            flags,
            padding,
        };
        ioctl(
            device.as_fd(),
            uapi::FUSE_DEV_IOC_BACKING_OPEN,
            &raw const map,
        )
    };
    assert_eq!(open(0, 0), Ok(1), "the id is the return value");
    assert_eq!(open(1, 0), Err(libc::EINVAL));
    assert_eq!(open(0, 1), Err(libc::EINVAL));
    assert_eq!(open(0, 1 << 63), Err(libc::EINVAL));
    assert_eq!(open(0, 0), Ok(2), "a refused call takes no id");

    let refused = ioctl(
        device.as_fd(),
        uapi::FUSE_DEV_IOC_BACKING_OPEN,
        null::<Map>(),
    );
    assert_eq!(refused, Err(libc::EFAULT));
    let closed = Map {
        fd: -1,
        flags: 0,
        padding: 0,
    };
    let refused = ioctl(
        device.as_fd(),
        uapi::FUSE_DEV_IOC_BACKING_OPEN,
        &raw const closed,
    );
    assert_eq!(refused, Err(libc::EBADF));
    Ok(())
}

#[apply(needs_passthrough)]
fn backing_close_arguments(sandbox: &Sandbox) -> Result<(), Failed> {
    let connection = Connection::mount(sandbox, Init::passthrough(1))?;
    let device = connection.device();
    let close = |id: i32| {
        ioctl(
            device.as_fd(),
            uapi::FUSE_DEV_IOC_BACKING_CLOSE,
            &raw const id,
        )
    };
    assert_eq!(close(0), Err(libc::EINVAL));
    assert_eq!(close(-1), Err(libc::EINVAL));
    assert_eq!(close(i32::MIN), Err(libc::EINVAL));
    assert_eq!(close(1), Err(libc::ENOENT));
    let raw = device.backing_open(tempfile::tempfile()?)?.into_raw();
    assert_eq!(close(raw), Ok(0));
    Ok(())
}

/// Errors that `clone_connection` cannot get, since it attaches a device that it has just opened.
#[apply(needs_nothing)]
fn clone_arguments(sandbox: &Sandbox) -> Result<(), Failed> {
    let connection = Connection::mount(sandbox, Init::PLAIN)?;
    let device = connection.device();
    let clone = device.clone_connection()?;
    let source = |fd: BorrowedFd<'_>| fd.as_raw_fd() as u32;

    let fd = source(device.as_fd());
    let again = ioctl(clone.as_fd(), uapi::FUSE_DEV_IOC_CLONE, &raw const fd);
    assert_eq!(again, Err(libc::EINVAL), "attached already");

    let null = std::fs::File::open("/dev/null")?;
    let fd = source(null.as_fd());
    let other = ioctl(
        FuseDevice::open()?.as_fd(),
        uapi::FUSE_DEV_IOC_CLONE,
        &raw const fd,
    );
    assert_eq!(other, Err(libc::EINVAL), "not a FUSE device");
    Ok(())
}

/// An ioctl on another device fails as on an old kernel; `FuseDevice::new` refuses such a device.
#[apply(needs_nothing)]
fn not_a_fuse_device(_: &Sandbox) -> Result<(), Failed> {
    let null = std::fs::File::open("/dev/null")?;
    let map = Map {
        fd: null.as_raw_fd(),
        flags: 0,
        padding: 0,
    };
    let refused = ioctl(
        null.as_fd(),
        uapi::FUSE_DEV_IOC_BACKING_OPEN,
        &raw const map,
    );
    assert_eq!(refused, Err(libc::ENOTTY));
    Ok(())
}
