//! [`Handles`]: file handles, from OPEN to RELEASE.

mod slots;

use std::fmt;
use std::fs::File;
use std::hash::Hash;
use std::os::fd::AsFd;

use crate::client_flags::ClientFlags;
use crate::device::FuseDevice;
use crate::error::OpenError;
use crate::file::ServerFile;
use crate::fopen_flags::FopenFlags;
use crate::register::{Register, WithoutFsetid};
use crate::sync::Arc;
use crate::table::{BackingTable, OpenFile};
use crate::uapi;
use slots::Slots;

/// The open files of a server, by file handle, on a [`BackingTable`].
///
/// [`open`](Self::open) stores an open before its reply exists. `T` is what the server keeps for each open, usually the
/// fd that it has opened. `R` and `K` are those of the table. No handle number is given twice. See the
/// [guide](crate::table).
///
/// # Examples
///
/// A server whose FUSE library provides the device later. (For OPEN, see the
/// [crate's example](crate#life-of-a-passthrough-file).)
///
/// ```no_run
/// use fuse_backing::{FuseDevice, Handles};
/// use std::{io, os::unix::fs::FileExt};
///
/// # fn f(mounted: std::os::fd::OwnedFd) -> io::Result<()> {
/// let handles: Handles = Handles::default(); // Share this with the filesystem, in an Arc. After the mount:
/// handles.table().attach(FuseDevice::new(mounted)?).map_err(|_| io::ErrorKind::AlreadyExists)?;
///
/// // READ, in server mode:
/// # let (fh, offset, mut buffer) = (1, 0, [0]);
/// handles.get(fh).ok_or(io::ErrorKind::InvalidInput)?.file.read_at(&mut buffer, offset)?;
/// # Ok(()) }
/// ```
pub struct Handles<R: Register = FuseDevice, T = File, K: Hash + Eq + Clone = u64> {
    table: BackingTable<R, K>,
    slots: Slots<Arc<Handle<R, T, K>>>,
}

/// One open file. Dropping the last reference to it, after [`Handles::release`], releases the open and drops the file.
pub struct Handle<R: Register = FuseDevice, T = File, K: Hash + Eq + Clone = u64> {
    /// Its open in the table.
    pub open: OpenFile<R, K>,
    /// What the server keeps.
    pub file: T,
}

/// How to answer an OPEN or CREATE. Only [`Handles`] makes one, after it has stored the open:
///
/// ```compile_fail,E0639
/// let flags = fuse_backing::FopenFlags::empty();
/// let opened = fuse_backing::Opened { fh: 1, open_flags: flags, backing_id: None };
/// ```
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[must_use = "a request that is not answered hangs its client"]
#[non_exhaustive]
pub struct Opened {
    /// The file handle.
    pub fh: u64,
    /// The reply's `open_flags`.
    pub open_flags: FopenFlags,
    /// The reply's `backing_id`. `None` in server mode, when the kernel's field is 0.
    pub backing_id: Option<i32>,
}

impl Opened {
    /// The body of the OPEN reply; in a CREATE reply it follows `fuse_entry_out`.
    #[must_use]
    pub fn to_fuse_open_out(self) -> uapi::fuse_open_out {
        uapi::fuse_open_out::new(self.fh, self.open_flags.bits(), self.backing_id)
    }
}

/// Handles on a table without a registrar.
impl<R: Register, T, K: Hash + Eq + Clone> Default for Handles<R, T, K> {
    fn default() -> Self {
        Self::new(BackingTable::default())
    }
}

impl<R: Register + WithoutFsetid, T, K: Hash + Eq + Clone> WithoutFsetid for Handles<R, T, K> {}

impl<R: Register, T, K: Hash + Eq + Clone> Handles<R, T, K> {
    /// Handles on `table`, without open files.
    #[must_use]
    pub fn new(table: BackingTable<R, K>) -> Self {
        Self {
            table,
            slots: Slots::new(),
        }
    }

    /// The table: to attach, configure and list it, and for opens that [`insert`](Self::insert) stores.
    pub fn table(&self) -> &BackingTable<R, K> {
        &self.table
    }

    /// Opens an inode as [`BackingTable::open`] does, and keeps the file.
    ///
    /// `file` is what the server has opened with the client's flags: a `T`, or a [`ServerFile`] of a `T`, with what the
    /// server knows of it. The reply has those of `reply_flags` that the mode permits, see [`OpenFile::reply`].
    ///
    /// # Errors
    ///
    /// As for [`BackingTable::open`]. The file is dropped.
    pub fn open<'path>(
        &self,
        inode: &K,
        client_flags: impl Into<ClientFlags>,
        file: impl Into<ServerFile<'path, T>>,
        reply_flags: impl Into<FopenFlags>,
    ) -> Result<Opened, OpenError>
    where
        T: AsFd,
    {
        let (wanted, file) = (client_flags.into().access(), file.into());
        let open = self.table.open_lent(inode, wanted, &file.lend())?;
        Ok(self.insert(open, file.fd, reply_flags))
    }

    /// Stores an open that the server got from the [`table`](Self::table) and has not answered yet: one that the table
    /// [shared](BackingTable::share) or [serves](BackingTable::serve).
    pub fn insert(
        &self,
        open: OpenFile<R, K>,
        file: T,
        reply_flags: impl Into<FopenFlags>,
    ) -> Opened {
        let reply = open.reply(reply_flags);
        let (open_flags, backing_id) = (reply.open_flags(), reply.backing_id());
        let near = open.shard();
        let fh = self.slots.insert(Arc::new(Handle { open, file }), near);
        Opened {
            fh,
            open_flags,
            backing_id,
        }
    }

    /// Keeps an open that a predecessor on the same connection answered with the handle `fh`, see
    /// [`BackingTable::adopt`].
    ///
    /// # Errors
    ///
    /// Returns the handle if this number is in use.
    pub fn adopt(&self, fh: u64, handle: Handle<R, T, K>) -> Result<(), Handle<R, T, K>> {
        self.slots.adopt(fh, handle, Arc::new)
    }

    /// The open file of this handle, for reading and writing it in server mode.
    pub fn get(&self, fh: u64) -> Option<Arc<Handle<R, T, K>>> {
        self.slots.get(fh)
    }

    /// Removes the handle, at RELEASE. Other threads may still use the file through what [`get`](Self::get) gave
    /// them. Dropping the last reference releases the open, with no lock held.
    pub fn release(&self, fh: u64) -> Option<Arc<Handle<R, T, K>>> {
        self.slots.remove(fh)
    }
}

impl<R: Register, T, K: Hash + Eq + Clone> fmt::Debug for Handles<R, T, K> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("Handles").field(&self.table).finish()
    }
}

impl<R: Register, T, K: Hash + Eq + Clone> fmt::Debug for Handle<R, T, K> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("Handle").field(&self.open).finish()
    }
}
