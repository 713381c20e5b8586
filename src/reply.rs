//! The two fields of an OPEN or CREATE reply that decide about passthrough, checked.

use std::io;
use std::marker::PhantomData;

use bitflags::bitflags;
use rustix::io::Errno;
use thiserror::Error;

use crate::access::Access;
use crate::backing::BackingFile;
use crate::id::BackingId;
use crate::register::Register;
use crate::uapi;

bitflags! {
    /// `FOPEN_*`: the `open_flags` of an OPEN or CREATE reply.
    ///
    /// Bits that this crate has no name for are kept.
    #[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
    pub struct OpenFlags: u32 {
        /// `FOPEN_DIRECT_IO`: bypass the page cache. Beside passthrough: reads and writes come to
        /// the server, mmap goes to the backing file.
        const DIRECT_IO = uapi::FOPEN_DIRECT_IO;
        /// `FOPEN_KEEP_CACHE`: keep what the page cache has.
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
        /// `FOPEN_PASSTHROUGH`: read and write the backing file. Set by [`OpenReply::passthrough`].
        const PASSTHROUGH = uapi::FOPEN_PASSTHROUGH;

        const _ = !0;
    }
}

impl OpenFlags {
    /// `FOPEN_PASSTHROUGH_MASK` of the kernel's fs/fuse/iomode.c: all that may stand in a reply
    /// with `FOPEN_PASSTHROUGH`. Any other bit gives the client `EIO`.
    const WITH_PASSTHROUGH: Self = Self::DIRECT_IO
        .union(Self::NOFLUSH)
        .union(Self::PARALLEL_DIRECT_WRITES)
        .union(Self::PASSTHROUGH);
}

/// The `open_flags` and the `backing_id` of an OPEN or CREATE reply, in a combination that the
/// kernel accepts.
///
/// A reply that it does not accept is not reported to the server: the client gets a bare `EIO`.
///
/// What one reply alone cannot know is left to the server: an inode is either *passthrough*, and
/// then every open of it is answered with the same id, or not, and then none is, until its last open
/// was released.
///
/// # Examples
///
/// A server that writes the bytes itself; with fuser `open_flags` and `backing_id` go out as
/// [`BackingTable`](crate::BackingTable)'s example shows:
///
/// ```no_run
/// # use fuse_backing::{Access, BackingFile, FuseDevice, OpenFlags, OpenReply};
/// # fn send(_: &[u8]) {}
/// # fn f(client_flags: i32, fh: u64,
/// #      file: std::fs::File, backing: BackingFile<&FuseDevice<std::fs::File>>)
/// # -> Result<(), Box<dyn std::error::Error>> {
/// let reply = OpenReply::passthrough(&backing, Access::of(&file)?, client_flags, OpenFlags::NOFLUSH)?;
/// send(&reply.to_fuse_open_out(fh).to_bytes());
/// # Ok(()) }
/// ```
///
/// The reply borrows the registration, so that it cannot be closed before the reply is made:
///
/// ```compile_fail,E0505
/// # use fuse_backing::{Access, BackingFile, FuseDevice, OpenFlags, OpenReply};
/// # fn f(backing: BackingFile<&FuseDevice<std::fs::File>>) -> Result<(), Box<dyn std::error::Error>> {
/// let reply = OpenReply::passthrough(&backing, Access::ReadOnly, 0, OpenFlags::empty())?;
/// drop(backing);
/// println!("{}", reply.backing_id());
/// # Ok(()) }
/// ```
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[must_use = "a request that is not answered hangs its client"]
pub struct OpenReply<'id> {
    open_flags: OpenFlags,
    backing_id: i32,
    id: PhantomData<&'id BackingId>,
}

impl<'id> OpenReply<'id> {
    /// A reply with passthrough: the kernel reads and writes the backing file.
    ///
    /// - `granted`: what the server grants through this registration, most often
    ///   [`Access::of`] the fd that was registered.
    /// - `client_flags`: the flags of the OPEN or CREATE request. `O_TRUNC` counts as asking to write. If
    ///   the server's own open has truncated the file already, clear it from these flags: the kernel's
    ///   own open of the backing file never truncates.
    /// - `flags`: what to set beside `FOPEN_PASSTHROUGH`.
    ///
    /// # Errors
    ///
    /// - [`OpenReplyError::AccessExceeded`]: the client asks for more than is granted. Answer
    ///   `EACCES` or `EROFS`.
    /// - [`OpenReplyError::FlagsNotAllowed`]: the kernel accepts only `DIRECT_IO`, `NOFLUSH` and
    ///   `PARALLEL_DIRECT_WRITES` beside `PASSTHROUGH`.
    pub fn passthrough<R: Register>(
        backing: &'id BackingFile<R>,
        granted: Access,
        client_flags: i32,
        flags: OpenFlags,
    ) -> Result<Self, OpenReplyError> {
        Self::passthrough_with_id(backing.id(), granted, client_flags, flags)
    }

    /// [`passthrough`](Self::passthrough) for a server that keeps its ids itself. That `id` is
    /// registered with the connection that the reply goes to, and stays so until the last RELEASE
    /// of the inode, is the server's to ensure; otherwise the client gets `EIO`, or another file.
    ///
    /// # Errors
    ///
    /// As for [`passthrough`](Self::passthrough).
    pub fn passthrough_with_id(
        id: &'id BackingId,
        granted: Access,
        client_flags: i32,
        flags: OpenFlags,
    ) -> Result<Self, OpenReplyError> {
        let wanted = Access::wanted_by(client_flags);
        if !granted.allows(wanted) {
            return Err(OpenReplyError::AccessExceeded { granted, wanted });
        }
        Self::with_id(id, flags)
    }

    /// For an id whose access was checked.
    pub(crate) fn with_id(id: &'id BackingId, flags: OpenFlags) -> Result<Self, OpenReplyError> {
        let refused = flags.difference(OpenFlags::WITH_PASSTHROUGH);
        if !refused.is_empty() {
            return Err(OpenReplyError::FlagsNotAllowed { refused });
        }
        Ok(Self {
            open_flags: flags | OpenFlags::PASSTHROUGH,
            backing_id: id.as_raw(),
            id: PhantomData,
        })
    }

    /// `FOPEN_*`, for the reply's `open_flags`.
    #[must_use]
    pub fn open_flags(&self) -> u32 {
        self.open_flags.bits()
    }

    /// For the reply's `backing_id`; 0 without passthrough.
    #[must_use]
    pub fn backing_id(&self) -> i32 {
        self.backing_id
    }

    /// The body of the OPEN reply; in a CREATE reply it follows `fuse_entry_out`.
    #[must_use]
    pub fn to_fuse_open_out(&self, fh: u64) -> uapi::fuse_open_out {
        uapi::fuse_open_out {
            fh,
            open_flags: self.open_flags(),
            backing_id: self.backing_id,
        }
    }
}

impl OpenReply<'static> {
    /// A reply without passthrough: reads and writes come to the server, through the page cache or
    /// with `DIRECT_IO` past it.
    ///
    /// # Errors
    ///
    /// [`OpenReplyError::FlagsNotAllowed`] if `flags` has `PASSTHROUGH`, which needs an id.
    pub fn server(flags: OpenFlags) -> Result<Self, OpenReplyError> {
        if flags.contains(OpenFlags::PASSTHROUGH) {
            return Err(OpenReplyError::FlagsNotAllowed {
                refused: OpenFlags::PASSTHROUGH,
            });
        }
        Ok(Self {
            open_flags: flags,
            backing_id: 0,
            id: PhantomData,
        })
    }
}

/// A reply that the kernel, or the server's own grant, would not stand.
///
/// # Examples
///
/// ```
/// use fuse_backing::{Access, BackingId, OpenFlags, OpenReply, OpenReplyError};
///
/// let id = BackingId::from_raw(1).ok_or("positive")?;
/// let o_rdwr = 2;
/// assert_eq!(
///     OpenReply::passthrough_with_id(&id, Access::ReadOnly, o_rdwr, OpenFlags::empty()),
///     Err(OpenReplyError::AccessExceeded { granted: Access::ReadOnly, wanted: Access::ReadWrite }),
/// );
/// assert_eq!(
///     OpenReply::passthrough_with_id(&id, Access::ReadOnly, 0, OpenFlags::KEEP_CACHE),
///     Err(OpenReplyError::FlagsNotAllowed { refused: OpenFlags::KEEP_CACHE }),
/// );
/// # Ok::<(), &str>(())
/// ```
#[derive(Clone, Copy, Debug, PartialEq, Eq, Error)]
#[non_exhaustive]
pub enum OpenReplyError {
    /// The client's open asks for more than the server grants through the registration.
    #[error("the client asks for {wanted} access, {granted} is granted")]
    AccessExceeded {
        /// What the server grants.
        granted: Access,
        /// What the client's open flags ask for.
        wanted: Access,
    },
    /// These flags cannot stand in this reply.
    #[error("the kernel refuses these flags in such a reply: {refused:?}")]
    FlagsNotAllowed {
        /// The flags to leave out.
        refused: OpenFlags,
    },
}

impl OpenReplyError {
    /// The errno to answer the client with.
    #[must_use]
    pub fn errno(&self) -> Errno {
        match self {
            Self::AccessExceeded { .. } => Errno::ACCESS,
            Self::FlagsNotAllowed { .. } => Errno::INVAL,
        }
    }
}

impl From<OpenReplyError> for io::Error {
    fn from(error: OpenReplyError) -> Self {
        Self::new(Self::from(error.errno()).kind(), error)
    }
}
