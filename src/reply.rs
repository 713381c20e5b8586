//! The two fields of an OPEN or CREATE reply that decide about passthrough, checked.

use std::marker::PhantomData;

use bitflags::bitflags;

use crate::access::Access;
use crate::client_flags::ClientFlags;
use crate::error::OpenError;
use crate::id::BackingId;
use crate::uapi;

bitflags! {
    /// `FOPEN_*`: the `open_flags` of an OPEN or CREATE reply. Bits without a name are kept.
    #[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
    pub struct FopenFlags: u32 {
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

impl FopenFlags {
    /// `FOPEN_PASSTHROUGH_MASK` of the kernel's fs/fuse/iomode.c: all that may stand in a reply
    /// with `FOPEN_PASSTHROUGH`. Any other bit gives the client `EIO`.
    const WITH_PASSTHROUGH: Self = Self::DIRECT_IO
        .union(Self::NOFLUSH)
        .union(Self::PARALLEL_DIRECT_WRITES)
        .union(Self::PASSTHROUGH);

    /// Those of `self` that leave reading and writing to the kernel if `passthrough`, else to the server.
    pub(crate) fn permitted(self, passthrough: bool) -> Self {
        if passthrough {
            self & Self::WITH_PASSTHROUGH.difference(Self::DIRECT_IO)
        } else {
            self.difference(Self::PASSTHROUGH)
        }
    }
}

/// The `open_flags` and the `backing_id` of an OPEN or CREATE reply, in a combination that the
/// kernel accepts. With any other the client gets a bare `EIO`, and the server no error.
///
/// A single reply cannot know the mode of the inode: every open of it is answered with the same id, or none
/// is, until its last open was released. [`BackingTable`](crate::BackingTable) keeps to that.
///
/// # Examples
///
/// A server that writes the bytes itself. The reply borrows the id, so that it cannot be closed before the
/// reply is made:
///
/// ```no_run
/// # use fuse_backing::{Access, BackingFile, FopenFlags, FuseDevice, OpenReply};
/// # fn send(_: &[u8]) {}
/// # fn f(client_flags: i32, fh: u64,
/// #      file: std::fs::File, backing: BackingFile<&FuseDevice>) -> std::io::Result<()> {
/// let granted = Access::of(&file)?;
/// let reply = OpenReply::passthrough(backing.id(), granted, client_flags, FopenFlags::NOFLUSH)?;
/// send(&reply.to_fuse_open_out(fh).to_bytes());
/// # Ok(()) }
/// ```
///
/// ```compile_fail,E0505
/// # use fuse_backing::{Access, BackingFile, FopenFlags, FuseDevice, OpenReply};
/// # fn f(backing: BackingFile<&FuseDevice>) -> Result<(), Box<dyn std::error::Error>> {
/// let reply = OpenReply::passthrough(backing.id(), Access::ReadOnly, 0, FopenFlags::empty())?;
/// drop(backing);
/// println!("{:?}", reply.backing_id());
/// # Ok(()) }
/// ```
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[must_use = "a request that is not answered hangs its client"]
pub struct OpenReply<'id> {
    open_flags: FopenFlags,
    backing_id: Option<i32>,
    id: PhantomData<&'id BackingId>,
}

impl<'id> OpenReply<'id> {
    /// A reply with passthrough: the kernel reads and writes the backing file.
    ///
    /// - `id`: registered with the connection that the reply goes to, until the last RELEASE of the inode.
    ///   That is the server's to ensure; otherwise the client gets `EIO`, or another file.
    /// - `granted`: what the server grants through this registration, most often
    ///   [`Access::of`] the fd that was registered.
    /// - `client_flags`: of the OPEN or CREATE request. `O_TRUNC` counts as asking to write, since the
    ///   kernel's own open never truncates. Clear it if the server's open has truncated the file.
    /// - `flags`: what to set beside `FOPEN_PASSTHROUGH`.
    ///
    /// # Errors
    ///
    /// [`OpenError::AccessExceeded`]; [`OpenError::FlagsNotAllowed`] for flags other than `DIRECT_IO`, `NOFLUSH`,
    /// `PARALLEL_DIRECT_WRITES` and `PASSTHROUGH`.
    pub fn passthrough(
        id: &'id BackingId,
        granted: Access,
        client_flags: impl Into<ClientFlags>,
        flags: FopenFlags,
    ) -> Result<Self, OpenError> {
        let client_flags = client_flags.into();
        let mut wanted = client_flags.access();
        if client_flags.truncates() {
            wanted = wanted.union(Access::WriteOnly);
        }
        if !granted.allows(wanted) {
            return Err(OpenError::AccessExceeded { granted, wanted });
        }
        let refused = flags.difference(FopenFlags::WITH_PASSTHROUGH);
        if !refused.is_empty() {
            return Err(OpenError::FlagsNotAllowed(refused));
        }
        Ok(Self::unchecked(Some(id), flags))
    }

    /// Without an id: a reply without passthrough. `flags` are permitted with it.
    pub(crate) fn unchecked(id: Option<&'id BackingId>, flags: FopenFlags) -> Self {
        let mode = id.map_or(FopenFlags::empty(), |_| FopenFlags::PASSTHROUGH);
        Self {
            open_flags: flags | mode,
            backing_id: id.map(BackingId::as_raw),
            id: PhantomData,
        }
    }

    /// The reply's `open_flags`.
    #[must_use]
    pub fn open_flags(&self) -> FopenFlags {
        self.open_flags
    }

    /// The reply's `backing_id`; `None` without passthrough, as which the kernel has 0.
    #[must_use]
    pub fn backing_id(&self) -> Option<i32> {
        self.backing_id
    }

    /// The body of the OPEN reply; in a CREATE reply it follows `fuse_entry_out`.
    #[must_use]
    pub fn to_fuse_open_out(&self, fh: u64) -> uapi::fuse_open_out {
        uapi::fuse_open_out {
            fh,
            open_flags: self.open_flags.bits(),
            backing_id: self.backing_id.unwrap_or(0),
        }
    }
}

impl OpenReply<'static> {
    /// A reply without passthrough: reads and writes come to the server.
    ///
    /// # Errors
    ///
    /// [`OpenError::FlagsNotAllowed`] if `flags` has `PASSTHROUGH`, which needs an id.
    pub fn server(flags: FopenFlags) -> Result<Self, OpenError> {
        if flags.contains(FopenFlags::PASSTHROUGH) {
            return Err(OpenError::FlagsNotAllowed(FopenFlags::PASSTHROUGH));
        }
        Ok(Self::unchecked(None, flags))
    }
}
