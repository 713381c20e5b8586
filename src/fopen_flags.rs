//! [`FopenFlags`]: the flags of an OPEN or CREATE reply.

use bitflags::bitflags;

use crate::uapi;

bitflags! {
    /// `FOPEN_*`: the `open_flags` of an OPEN or CREATE reply. Bits without a name here are kept.
    #[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
    pub struct FopenFlags: u32 {
        /// `FOPEN_DIRECT_IO`: bypass the page cache. With passthrough, reads and writes go to the server, and mmap to
        /// the backing file.
        const DIRECT_IO = uapi::FOPEN_DIRECT_IO;
        /// `FOPEN_KEEP_CACHE`: keep the file's cached pages.
        const KEEP_CACHE = uapi::FOPEN_KEEP_CACHE;
        /// `FOPEN_NONSEEKABLE`: the file is not seekable.
        const NONSEEKABLE = uapi::FOPEN_NONSEEKABLE;
        /// `FOPEN_CACHE_DIR`: cache this directory.
        const CACHE_DIR = uapi::FOPEN_CACHE_DIR;
        /// `FOPEN_STREAM`: the file is a stream without a position.
        const STREAM = uapi::FOPEN_STREAM;
        /// `FOPEN_NOFLUSH`: send no FLUSH on close.
        const NOFLUSH = uapi::FOPEN_NOFLUSH;
        /// `FOPEN_PARALLEL_DIRECT_WRITES`: allow concurrent direct writes.
        const PARALLEL_DIRECT_WRITES = uapi::FOPEN_PARALLEL_DIRECT_WRITES;
        /// `FOPEN_PASSTHROUGH`: read and write the backing file. This crate sets it.
        const PASSTHROUGH = uapi::FOPEN_PASSTHROUGH;
        /// `FOPEN_IO_URING_ZERO_COPY`: read and write through `io_uring` without a copy. The kernel refuses it with
        /// passthrough.
        const IO_URING_ZERO_COPY = uapi::FOPEN_IO_URING_ZERO_COPY;

        const _ = !0;
    }
}

/// The flags as FUSE libraries have them.
impl From<u32> for FopenFlags {
    #[inline]
    fn from(flags: u32) -> Self {
        Self::from_bits_retain(flags)
    }
}

impl FopenFlags {
    /// `FOPEN_PASSTHROUGH_MASK` of the kernel's `fs/fuse/iomode.c`: the flags that a reply with `FOPEN_PASSTHROUGH` may
    /// have. Any other bit gives the client `EIO`.
    pub(crate) const WITH_PASSTHROUGH: Self = Self::DIRECT_IO
        .union(Self::NOFLUSH)
        .union(Self::PARALLEL_DIRECT_WRITES)
        .union(Self::PASSTHROUGH);

    /// The flags of `self` that the mode permits. In passthrough mode `DIRECT_IO` is left out as well: with it the
    /// server would read and write.
    pub(crate) fn permitted(self, passthrough: bool) -> Self {
        if passthrough {
            self & Self::WITH_PASSTHROUGH.difference(Self::DIRECT_IO)
        } else {
            self.difference(Self::PASSTHROUGH)
        }
    }
}
