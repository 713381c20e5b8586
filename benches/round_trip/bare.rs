//! The bare system call. Nothing can be faster.

#![allow(unsafe_code)]

use std::ffi::c_void;
use std::os::fd::{AsRawFd, BorrowedFd};

use fuse_backing::uapi;

#[repr(C)]
pub struct Map {
    fd: i32,
    flags: u32,
    padding: u64,
}

impl Map {
    pub fn new(file: BorrowedFd<'_>) -> Self {
        Self {
            fd: file.as_raw_fd(),
            flags: 0,
            padding: 0,
        }
    }
}

/// Returns what the kernel returns: the id, or a negated errno.
#[inline]
pub fn open(device: BorrowedFd<'_>, file: BorrowedFd<'_>) -> isize {
    let map = Map::new(file);
    let request = uapi::FUSE_DEV_IOC_BACKING_OPEN;
    // SAFETY: the kernel reads `map`, of the size that the request encodes, and writes nothing.
    unsafe { ioctl(device.as_raw_fd(), request, (&raw const map).cast()) }
}

#[inline]
pub fn close(device: BorrowedFd<'_>, id: i32) -> isize {
    let request = uapi::FUSE_DEV_IOC_BACKING_CLOSE;
    // SAFETY: the kernel reads `id`, of the size that the request encodes, and writes nothing.
    unsafe { ioctl(device.as_raw_fd(), request, (&raw const id).cast()) }
}

/// # Safety
///
/// `argument` is what the ioctl expects, for a driver that only reads it.
#[cfg(target_arch = "x86_64")]
#[inline(always)]
unsafe fn ioctl(fd: i32, request: u32, argument: *const c_void) -> isize {
    let result;
    // SAFETY: the system call takes its arguments in these registers, and overwrites rcx and r11
    // beside rax; memory is the caller's promise.
    unsafe {
        std::arch::asm!(
            "syscall",
            inlateout("rax") libc::SYS_ioctl as isize => result,
            in("rdi") fd as isize,
            in("rsi") request as usize,
            in("rdx") argument,
            lateout("rcx") _,
            lateout("r11") _,
            options(nostack, preserves_flags, readonly),
        );
    }
    result
}

/// # Safety
///
/// `argument` is what the ioctl expects, for a driver that only reads it.
#[cfg(target_arch = "aarch64")]
#[inline(always)]
unsafe fn ioctl(fd: i32, request: u32, argument: *const c_void) -> isize {
    let result;
    // SAFETY: the system call takes its arguments in these registers, and overwrites x0; memory is
    // the caller's promise.
    unsafe {
        std::arch::asm!(
            "svc 0",
            in("x8") libc::SYS_ioctl as usize,
            inlateout("x0") fd as isize => result,
            in("x1") request as usize,
            in("x2") argument,
            options(nostack, preserves_flags, readonly),
        );
    }
    result
}

/// # Safety
///
/// `argument` is what the ioctl expects, for a driver that only reads it.
#[cfg(not(any(target_arch = "x86_64", target_arch = "aarch64")))]
#[inline(always)]
unsafe fn ioctl(fd: i32, request: u32, argument: *const c_void) -> isize {
    // SAFETY: the caller's promise.
    let result = unsafe { libc::syscall(libc::SYS_ioctl, fd, request as usize, argument) };
    match result {
        -1 => {
            let errno = std::io::Error::last_os_error().raw_os_error();
            -(errno.unwrap_or(libc::EIO) as isize)
        }
        result => result as isize,
    }
}
