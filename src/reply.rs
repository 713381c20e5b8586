//! [`OpenReply`]: the fields of an OPEN or CREATE reply that decide about passthrough, checked.

use std::marker::PhantomData;

use crate::access::Access;
use crate::client_flags::ClientFlags;
use crate::error::OpenError;
use crate::fopen_flags::FopenFlags;
use crate::id::BackingId;
use crate::uapi;

/// The `open_flags` and the `backing_id` of an OPEN or CREATE reply, in a combination that the kernel accepts. Any
/// other gives the client a bare `EIO`, and the server no error.
///
/// A single reply cannot know the mode of the inode: until the last open of an inode is released, either all of its
/// opens are answered with the same id, or none is. [`BackingTable`](crate::BackingTable) ensures that.
///
/// # Examples
///
/// A server that writes the protocol's bytes itself:
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
/// The reply borrows the id, so that the id cannot be closed before the reply is made:
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
    /// - `id`: must be registered with the connection that the reply goes to, until the last RELEASE of the inode. The
    ///   server must ensure that; otherwise the client gets `EIO`, or another file.
    /// - `granted`: what the server grants through this registration, usually [`Access::of`] the fd that was
    ///   registered.
    /// - `client_flags`: those of the OPEN or CREATE request. `O_TRUNC` counts as asking to write, because the kernel's
    ///   own open never truncates. Clear it if the server's open has truncated the file.
    /// - `flags`: the flags to set beside `FOPEN_PASSTHROUGH`.
    ///
    /// # Errors
    ///
    /// [`OpenError::AccessExceeded`] if the client asks for more than `granted`. [`OpenError::FlagsNotAllowed`] for
    /// flags other than `DIRECT_IO`, `NOFLUSH`, `PARALLEL_DIRECT_WRITES` and `PASSTHROUGH`.
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

    /// A reply with passthrough if there is an id, otherwise without. The caller must pass only `flags` that this mode
    /// permits.
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

    /// The reply's `backing_id`. `None` without passthrough: the field must be 0 then.
    #[must_use]
    pub fn backing_id(&self) -> Option<i32> {
        self.backing_id
    }

    /// The body of the OPEN reply; in a CREATE reply it follows `fuse_entry_out`.
    #[must_use]
    pub fn to_fuse_open_out(&self, fh: u64) -> uapi::fuse_open_out {
        uapi::fuse_open_out::new(fh, self.open_flags.bits(), self.backing_id)
    }
}

impl OpenReply<'static> {
    /// A reply without passthrough: reads and writes go to the server.
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
