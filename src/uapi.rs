//! The constants and structs of `<linux/fuse.h>` that concern passthrough, under the kernel's names.
//!
//! They are for servers that write the protocol's bytes, and for filters of system calls by ioctl number. Most servers
//! need none of them.
//!
//! Sizes, offsets, signedness and numbers are asserted in this file at compile time, for every target, against the
//! values measured on Linux 6.12 and 6.18. With `FUSE_BACKING_UAPI_CHECK=require` the build also compares them with
//! `<linux/fuse.h>`, see CONTRIBUTING.md. Without it the build needs no C compiler.
//!
//! # References
//!
//! `include/uapi/linux/fuse.h` in the Linux source, 6.9 (protocol 7.40) and newer;
//! [FUSE passthrough](https://docs.kernel.org/filesystems/fuse/fuse-passthrough.html) in its documentation.

#![allow(
    non_camel_case_types,
    reason = "the names are those of the kernel's header"
)]

use std::os::fd::{AsRawFd, BorrowedFd};

use rustix::ioctl::opcode;
use static_assertions::{assert_eq_align, assert_eq_size, const_assert_eq};

/// The ioctl magic of `/dev/fuse`.
pub const FUSE_DEV_IOC_MAGIC: u8 = 229;

/// `_IOR(FUSE_DEV_IOC_MAGIC, 0, uint32_t)`: attach this device fd to the connection of another one. The argument points
/// to the other fd. Linux 4.2. [`FuseDevice::clone_connection`](crate::FuseDevice::clone_connection).
pub const FUSE_DEV_IOC_CLONE: u32 = opcode::read::<u32>(FUSE_DEV_IOC_MAGIC, 0) as u32;

/// `_IOW(FUSE_DEV_IOC_MAGIC, 1, struct fuse_backing_map)`: register a backing file. The call returns the backing id.
/// Linux 6.9. [`FuseDevice::backing_open`](crate::FuseDevice::backing_open).
pub const FUSE_DEV_IOC_BACKING_OPEN: u32 =
    opcode::write::<fuse_backing_map>(FUSE_DEV_IOC_MAGIC, 1) as u32;

/// `_IOW(FUSE_DEV_IOC_MAGIC, 2, uint32_t)`: close a backing id. The argument points to the id. Linux 6.9.
/// [`FuseDevice::backing_close`](crate::FuseDevice::backing_close).
pub const FUSE_DEV_IOC_BACKING_CLOSE: u32 = opcode::write::<u32>(FUSE_DEV_IOC_MAGIC, 2) as u32;

/// `_IO(FUSE_DEV_IOC_MAGIC, 3)`: make mount(2) wait for the INIT reply. Linux 6.18 (protocol 7.45).
/// [`FuseDevice::sync_init`](crate::FuseDevice::sync_init).
pub const FUSE_DEV_IOC_SYNC_INIT: u32 = opcode::none(FUSE_DEV_IOC_MAGIC, 3) as u32;

/// INIT: buffer writes in the page cache. Excludes [`FUSE_PASSTHROUGH`].
pub const FUSE_WRITEBACK_CACHE: u64 = 1 << 16;
/// INIT: the server clears set-user-ID and set-group-ID bits and `security.capability` on write, truncate and
/// chown. Linux 4.9. Of no use with passthrough, see [`rights`](crate::rights).
pub const FUSE_HANDLE_KILLPRIV: u64 = 1 << 19;
/// INIT: as [`FUSE_HANDLE_KILLPRIV`], and on write and truncate only where the kernel asks. Linux 5.11. See
/// [`rights`](crate::rights).
pub const FUSE_HANDLE_KILLPRIV_V2: u64 = 1 << 28;
/// INIT: `flags2` is valid. Without it the kernel ignores [`FUSE_PASSTHROUGH`] in a reply.
pub const FUSE_INIT_EXT: u64 = 1 << 30;
/// INIT: allow shared mmap of files opened with [`FOPEN_DIRECT_IO`]. Linux 6.6.
pub const FUSE_DIRECT_IO_ALLOW_MMAP: u64 = 1 << 36;
/// INIT: backing files may be registered. Linux 6.9.
pub const FUSE_PASSTHROUGH: u64 = 1 << 37;
/// INIT: requests may travel over `io_uring`. Linux 6.14.
pub const FUSE_OVER_IO_URING: u64 = 1 << 41;
/// INIT: the kernel has buffer pools for `io_uring`. Linux 7.3.
pub const FUSE_HAS_IO_URING_BUFPOOL: u64 = 1 << 43;

/// In the `open_flags` of an OPEN or CREATE request with `O_TRUNC`: clear set-user-ID and set-group-ID bits. Linux
/// 5.11, with [`FUSE_HANDLE_KILLPRIV_V2`].
pub const FUSE_OPEN_KILL_SUIDGID: u32 = 1 << 0;
/// In the `write_flags` of a WRITE request: the same.
pub const FUSE_WRITE_KILL_SUIDGID: u32 = 1 << 2;
/// In the `valid` of a SETATTR request that sets the size: the same.
pub const FATTR_KILL_SUIDGID: u32 = 1 << 11;

/// OPEN: bypass the page cache.
pub const FOPEN_DIRECT_IO: u32 = 1 << 0;
/// OPEN: keep the file's cached pages.
pub const FOPEN_KEEP_CACHE: u32 = 1 << 1;
/// OPEN: the file is not seekable.
pub const FOPEN_NONSEEKABLE: u32 = 1 << 2;
/// OPENDIR: cache this directory.
pub const FOPEN_CACHE_DIR: u32 = 1 << 3;
/// OPEN: the file is a stream without a position.
pub const FOPEN_STREAM: u32 = 1 << 4;
/// OPEN: send no FLUSH on close, unless the writeback cache is on.
pub const FOPEN_NOFLUSH: u32 = 1 << 5;
/// OPEN: allow concurrent direct writes.
pub const FOPEN_PARALLEL_DIRECT_WRITES: u32 = 1 << 6;
/// OPEN: read and write the backing file named by `backing_id`. Linux 6.9.
pub const FOPEN_PASSTHROUGH: u32 = 1 << 7;
/// OPEN: read and write through `io_uring` without a copy, if the server's queue permits. Linux 7.3. Refused with
/// [`FOPEN_PASSTHROUGH`].
pub const FOPEN_IO_URING_ZERO_COPY: u32 = 1 << 8;

/// The argument of [`FUSE_DEV_IOC_BACKING_OPEN`].
///
/// The kernel refuses non-zero `flags` and `padding` with `EINVAL`.
/// [`FuseDevice::backing_open`](crate::FuseDevice::backing_open) builds it.
#[repr(C)]
#[derive(Debug)]
pub struct fuse_backing_map {
    fd: i32,
    flags: u32,
    padding: u64,
}

impl fuse_backing_map {
    pub(crate) fn new(fd: BorrowedFd<'_>) -> Self {
        Self {
            fd: fd.as_raw_fd(),
            flags: 0,
            padding: 0,
        }
    }
}

/// The body of an OPEN reply, and the tail of a CREATE reply.
///
/// [`Opened::to_fuse_open_out`](crate::Opened::to_fuse_open_out) builds one.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct fuse_open_out {
    /// The server's handle for this open file.
    pub fh: u64,
    /// `FOPEN_*`.
    pub open_flags: u32,
    /// The backing id, with [`FOPEN_PASSTHROUGH`]; else 0.
    pub backing_id: i32,
}

impl fuse_open_out {
    pub(crate) fn new(fh: u64, open_flags: u32, backing_id: Option<i32>) -> Self {
        Self {
            fh,
            open_flags,
            backing_id: backing_id.unwrap_or(0),
        }
    }

    /// The bytes to write to the device, in the byte order of the machine.
    #[must_use]
    pub fn to_bytes(self) -> [u8; 16] {
        let mut bytes = [0; 16];
        let (fh, rest) = bytes.split_at_mut(8);
        let (open_flags, backing_id) = rest.split_at_mut(4);
        fh.copy_from_slice(&self.fh.to_ne_bytes());
        open_flags.copy_from_slice(&self.open_flags.to_ne_bytes());
        backing_id.copy_from_slice(&self.backing_id.to_ne_bytes());
        bytes
    }
}

/// The body of an INIT reply. Only its layout is used, for the assertions: servers have an INIT reply of their own.
#[repr(C)]
#[allow(dead_code, reason = "only its layout is used")]
struct fuse_init_out {
    major: u32,
    minor: u32,
    max_readahead: u32,
    flags: u32,
    max_background: u16,
    congestion_threshold: u16,
    max_write: u32,
    time_gran: u32,
    max_pages: u16,
    map_alignment: u16,
    flags2: u32,
    max_stack_depth: u32,
    // Starts with `request_timeout` since protocol 7.43. The rest is unused.
    tail: [u16; 12],
}

/// Asserts size, alignment, and each field's offset, size and signedness.
macro_rules! assert_layout {
    ($s:ident: $size:literal, align $align:ty { $($field:ident: $t:ty = $offset:literal,)* }) => {
        const_assert_eq!(size_of::<$s>(), $size);
        assert_eq_align!($s, $align);
        $(
            const_assert_eq!(std::mem::offset_of!($s, $field), $offset);
            const _: fn(&$s) -> &$t = |s| &s.$field;
        )*
    };
}

assert_layout!(fuse_backing_map: 16, align u64 { fd: i32 = 0, flags: u32 = 4, padding: u64 = 8, });
assert_layout!(fuse_open_out: 16, align u64 {
    fh: u64 = 0, open_flags: u32 = 8, backing_id: i32 = 12,
});
assert_layout!(fuse_init_out: 64, align u32 {
    flags: u32 = 12, flags2: u32 = 32, max_stack_depth: u32 = 36,
});
// No implicit padding, which would carry uninitialized bytes to the kernel.
assert_eq_size!(fuse_backing_map, (i32, u32, u64));
assert_eq_size!(fuse_open_out, (u64, u32, i32));

/// An encoding of ioctl numbers: that of `asm-generic/ioctl.h`, or the older one with three direction bits.
struct Encoding {
    none: u32,
    read: u32,
    write: u32,
    size_bits: u32,
}

const GENERIC: Encoding = Encoding {
    none: 0,
    read: 2,
    write: 1,
    size_bits: 14,
};
const MIPS_POWERPC_SPARC: Encoding = Encoding {
    none: 1,
    read: 2,
    write: 4,
    size_bits: 13,
};

impl Encoding {
    const fn number(&self, direction: u32, nr: u32, size: u32) -> u32 {
        direction << (16 + self.size_bits) | size << 16 | (FUSE_DEV_IOC_MAGIC as u32) << 8 | nr
    }
}

/// The measured numbers of CLONE, `BACKING_OPEN`, `BACKING_CLOSE` and `SYNC_INIT`.
const GENERIC_NUMBERS: [u32; 4] = [0x8004_e500, 0x4010_e501, 0x4004_e502, 0x0000_e503];
const MIPS_POWERPC_SPARC_NUMBERS: [u32; 4] = [0x4004_e500, 0x8010_e501, 0x8004_e502, 0x2000_e503];

const fn assert_numbers(encoding: &Encoding, expected: &[u32; 4]) {
    assert!(encoding.number(encoding.read, 0, 4) == expected[0]);
    assert!(encoding.number(encoding.write, 1, 16) == expected[1]);
    assert!(encoding.number(encoding.write, 2, 4) == expected[2]);
    assert!(encoding.number(encoding.none, 3, 0) == expected[3]);
}
const _: () = assert_numbers(&GENERIC, &GENERIC_NUMBERS);
const _: () = assert_numbers(&MIPS_POWERPC_SPARC, &MIPS_POWERPC_SPARC_NUMBERS);

const TARGET_NUMBERS: [u32; 4] = if cfg!(any(
    target_arch = "mips",
    target_arch = "mips32r6",
    target_arch = "mips64",
    target_arch = "mips64r6",
    target_arch = "powerpc",
    target_arch = "powerpc64",
    target_arch = "sparc",
    target_arch = "sparc64",
)) {
    MIPS_POWERPC_SPARC_NUMBERS
} else {
    GENERIC_NUMBERS
};
const_assert_eq!(FUSE_DEV_IOC_CLONE, TARGET_NUMBERS[0]);
const_assert_eq!(FUSE_DEV_IOC_BACKING_OPEN, TARGET_NUMBERS[1]);
const_assert_eq!(FUSE_DEV_IOC_BACKING_CLOSE, TARGET_NUMBERS[2]);
const_assert_eq!(FUSE_DEV_IOC_SYNC_INIT, TARGET_NUMBERS[3]);

const_assert_eq!(FUSE_WRITEBACK_CACHE, 0x0001_0000);
const_assert_eq!(FUSE_HANDLE_KILLPRIV, 0x0008_0000);
const_assert_eq!(FUSE_HANDLE_KILLPRIV_V2, 0x1000_0000);
const_assert_eq!(FUSE_OPEN_KILL_SUIDGID, 0x01);
const_assert_eq!(FUSE_WRITE_KILL_SUIDGID, 0x04);
const_assert_eq!(FATTR_KILL_SUIDGID, 0x0800);
const_assert_eq!(FUSE_INIT_EXT, 0x4000_0000);
const_assert_eq!(FUSE_DIRECT_IO_ALLOW_MMAP, 0x0010_0000_0000);
const_assert_eq!(FUSE_PASSTHROUGH, 0x0020_0000_0000);
const_assert_eq!(FUSE_OVER_IO_URING, 0x0200_0000_0000);
const_assert_eq!(FUSE_HAS_IO_URING_BUFPOOL, 0x0800_0000_0000);
const_assert_eq!(FOPEN_DIRECT_IO, 0x01);
const_assert_eq!(FOPEN_KEEP_CACHE, 0x02);
const_assert_eq!(FOPEN_NONSEEKABLE, 0x04);
const_assert_eq!(FOPEN_CACHE_DIR, 0x08);
const_assert_eq!(FOPEN_STREAM, 0x10);
const_assert_eq!(FOPEN_NOFLUSH, 0x20);
const_assert_eq!(FOPEN_PARALLEL_DIRECT_WRITES, 0x40);
const_assert_eq!(FOPEN_PASSTHROUGH, 0x80);
const_assert_eq!(FOPEN_IO_URING_ZERO_COPY, 0x0100);

/// The comparison with the machine's header, written by the build script.
#[cfg(fuse_backing_uapi_header)]
#[allow(clippy::all, clippy::pedantic, reason = "written by a program")]
mod header {
    use super::*;

    /// The signedness of a field's type, which `offset_of!` does not show.
    trait Int {
        const SIGNED: bool;
    }
    macro_rules! int {
        ($($t:ty)*) => { $(impl Int for $t { const SIGNED: bool = <$t>::MIN != 0; })* };
    }
    int!(u16 i32 u32 u64);

    const fn size<S, F>(_: fn(&S) -> &F) -> usize {
        size_of::<F>()
    }
    const fn signed<S, F: Int>(_: fn(&S) -> &F) -> bool {
        F::SIGNED
    }

    include!(concat!(env!("OUT_DIR"), "/uapi_header.rs"));
}
