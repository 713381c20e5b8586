//! The ways in which a client writes at the start of a file.

use std::ffi::{c_long, c_ulong, c_void};
use std::fs;
use std::io;
use std::mem::MaybeUninit;
use std::os::fd::{AsRawFd, BorrowedFd};
use std::ptr;
use std::sync::atomic::{AtomicU32, Ordering};

use fuse_backing::error::Errno;
use rustix::io::pwrite;
use rustix::io_uring::{
    IORING_OFF_CQ_RING, IORING_OFF_SQ_RING, IORING_OFF_SQES, IoringEnterFlags, IoringOp,
    addr_or_splice_off_in_union, io_uring_cqe, io_uring_enter, io_uring_params, io_uring_ptr,
    io_uring_setup, io_uring_sqe, len_union,
};
use rustix::mm::{Advice, MapFlags, MsyncFlags, ProtFlags, madvise, mmap, msync};

/// How many bytes were written, or the errno.
pub type Written = Result<usize, Errno>;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Way {
    /// pwrite(2).
    Pwrite,
    /// io_submit(2) of `IOCB_CMD_PWRITE`.
    Aio,
    /// `IORING_OP_WRITE`.
    IoUring,
    /// mmap(2) with `MAP_SHARED` and msync(2).
    Mmap,
}

impl Way {
    pub const ALL: [Self; 4] = [Self::Pwrite, Self::Aio, Self::IoUring, Self::Mmap];

    pub fn name(self) -> &'static str {
        match self {
            Self::Pwrite => "pwrite",
            Self::Aio => "aio",
            Self::IoUring => "io_uring",
            Self::Mmap => "mmap",
        }
    }

    /// The outer `Err` means that the kernel does not have this call, or has it turned off.
    pub fn write(self, fd: BorrowedFd<'_>, data: &[u8]) -> Result<Written, Errno> {
        match self {
            Self::Pwrite => Ok(pwrite(fd, data, 0)),
            Self::Aio => aio(fd, data),
            Self::IoUring => io_uring(fd, data),
            Self::Mmap => Ok(map(fd, data)),
        }
    }

    /// Asserts that the kernel's settings agree: a client that makes the call wrongly could get the same errno.
    pub fn assert_unavailable(self, errno: Errno) {
        let (setting, disabled) = match self {
            Self::Pwrite | Self::Mmap => panic!("{self:?}: {errno}"),
            Self::Aio => ("/proc/sys/fs/aio-max-nr", None),
            Self::IoUring => ("/proc/sys/kernel/io_uring_disabled", Some("2")),
        };
        let value = fs::read_to_string(setting).ok();
        let value = value.as_deref().map(str::trim);
        match errno {
            Errno::NOSYS => assert_eq!(value, None, "{setting}"),
            Errno::PERM if disabled.is_some() => assert_eq!(value, disabled, "{setting}"),
            errno => panic!("{self:?}: {errno}"),
        }
    }
}

/// `io_submit(context, 1, {IOCB_CMD_PWRITE at offset 0})`. The context ends with the process.
#[allow(unsafe_code)]
fn aio(fd: BorrowedFd<'_>, data: &[u8]) -> Result<Written, Errno> {
    const IOCB_CMD_PWRITE: u16 = 1;
    // `struct io_event`: data, obj, res, res2.
    let mut event = [0_i64; 4];
    let last = || Errno::from_io_error(&io::Error::last_os_error()).expect("an errno");

    let one: c_long = 1;
    let mut context: c_ulong = 0;
    // SAFETY: the kernel writes an `aio_context_t`, which is an `unsigned long`.
    if unsafe { libc::syscall(libc::SYS_io_setup, one, &raw mut context) } != 0 {
        return Err(last());
    }
    // SAFETY: all fields are integers.
    let mut block: libc::iocb = unsafe { MaybeUninit::zeroed().assume_init() };
    block.aio_lio_opcode = IOCB_CMD_PWRITE;
    block.aio_fildes = fd.as_raw_fd() as u32;
    block.aio_buf = data.as_ptr().addr() as u64;
    block.aio_nbytes = data.len() as u64;
    let mut blocks = [&raw mut block];
    // SAFETY: an array of one pointer to an `iocb`, whose buffer is live until the event below.
    let result = unsafe { libc::syscall(libc::SYS_io_submit, context, one, blocks.as_mut_ptr()) };
    if result != 1 {
        return Ok(Err(last()));
    }
    let forever = ptr::null_mut::<c_void>();
    // SAFETY: the kernel writes one `io_event`.
    let result = unsafe {
        libc::syscall(
            libc::SYS_io_getevents,
            context,
            one,
            one,
            event.as_mut_ptr(),
            forever,
        )
    };
    assert_eq!(result, 1, "{}", last());
    Ok(written(event[2]))
}

/// Makes a ring for one `IORING_OP_WRITE` at offset 0. The ring ends with the process.
#[allow(unsafe_code)]
fn io_uring(fd: BorrowedFd<'_>, data: &[u8]) -> Result<Written, Errno> {
    let mut params = io_uring_params::default();
    // SAFETY: no flags, so no `wq_fd`.
    let ring = unsafe { io_uring_setup(1, &mut params) }?;
    let map = |offset, length| {
        let (prot, flags) = (ProtFlags::READ | ProtFlags::WRITE, MapFlags::SHARED);
        // SAFETY: a new mapping, which is never removed.
        unsafe { mmap(ptr::null_mut(), length, prot, flags, &ring, offset) }
    };
    let (submission, completion) = (params.sq_off, params.cq_off);
    // The rings end with the indexes of requests, of which the first is 0, and with the completions.
    let array = submission.array as usize + params.sq_entries as usize * size_of::<u32>();
    let queue = map(IORING_OFF_SQ_RING, array)?;
    let entries = params.cq_entries as usize * size_of::<io_uring_cqe>();
    let done = map(IORING_OFF_CQ_RING, completion.cqes as usize + entries)?;
    let request = map(IORING_OFF_SQES, size_of::<io_uring_sqe>())?;

    let write = io_uring_sqe {
        opcode: IoringOp::Write,
        fd: fd.as_raw_fd(),
        addr_or_splice_off_in: addr_or_splice_off_in_union {
            addr: io_uring_ptr::new(data.as_ptr().cast_mut().cast()),
        },
        len: len_union {
            len: data.len() as u32,
        },
        // The default has offset 0.
        ..io_uring_sqe::default()
    };
    // SAFETY: the mapping has at least the first entry, and the kernel does not read it yet.
    unsafe { request.cast::<io_uring_sqe>().write(write) };
    // SAFETY: the kernel gave the tail's offset, and reads it atomically, as it is written here.
    let tail = unsafe { AtomicU32::from_ptr(queue.byte_add(submission.tail as usize).cast()) };
    tail.store(1, Ordering::Release);
    // SAFETY: `data` is live until the completion, which is waited for.
    let submitted = unsafe { io_uring_enter(&ring, 1, 1, IoringEnterFlags::GETEVENTS) };
    assert_eq!(submitted, Ok(1));
    // SAFETY: the kernel gave the tail's offset, and writes it atomically.
    let tail = unsafe { AtomicU32::from_ptr(done.byte_add(completion.tail as usize).cast()) };
    assert_eq!(tail.load(Ordering::Acquire), 1);
    // SAFETY: the kernel gave the offset of the first entry, which is complete.
    let result = unsafe {
        (*done
            .byte_add(completion.cqes as usize)
            .cast::<io_uring_cqe>())
        .res
    };
    Ok(written(i64::from(result)))
}

#[allow(unsafe_code)]
fn map(fd: BorrowedFd<'_>, data: &[u8]) -> Written {
    let (prot, flags) = (ProtFlags::READ | ProtFlags::WRITE, MapFlags::SHARED);
    // SAFETY: a new mapping, which ends with the process.
    let memory = unsafe { mmap(ptr::null_mut(), data.len(), prot, flags, fd, 0) }?;
    // If a write would raise SIGBUS, this fails with EFAULT.
    // SAFETY: the range is the mapping.
    unsafe { madvise(memory, data.len(), Advice::LinuxPopulateWrite) }?;
    // SAFETY: `data` is as long as the mapping, and the file is at least as long.
    unsafe { ptr::copy_nonoverlapping(data.as_ptr(), memory.cast(), data.len()) };
    // SAFETY: the range is the mapping.
    unsafe { msync(memory, data.len(), MsyncFlags::SYNC) }?;
    Ok(data.len())
}

/// Converts a result of the kernel: a count, or a negative errno.
fn written(result: i64) -> Written {
    usize::try_from(result).map_err(|_| Errno::from_raw_os_error(-result as i32))
}
