//! The ways to answer an OPEN.

use std::fs::{File, Metadata};
use std::os::fd::OwnedFd;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use fuse_backing::{
    Access, BackingFile, BackingTable, ClientFlags, FopenFlags, Handles, OpenFile, ServerFile,
};
use libtest_mimic::Failed;
use rustix::fs::{Mode, OFlags, open};

use crate::server::{Answer, Device, Opens};

const INODE: u64 = 2;

fn answer(fh: u64, open_flags: FopenFlags, backing_id: Option<i32>) -> Answer {
    Answer {
        fh,
        open_flags,
        backing_id,
    }
}

fn file(path: &Path) -> Result<File, Failed> {
    Ok(File::options().read(true).write(true).open(path)?)
}

/// Plain FUSE: the server answers all reads.
pub struct Plain {
    pub keep_cache: bool,
}

impl Opens for Plain {
    fn open(&mut self, _: u32) -> Answer {
        let keep = if self.keep_cache {
            FopenFlags::KEEP_CACHE
        } else {
            FopenFlags::empty()
        };
        answer(0, keep, None)
    }
    fn release(&mut self, _: u64) {}
}

/// One id, registered at the start and named in every reply. No server can be faster.
pub struct HardCoded {
    id: BackingFile<Device>,
    /// If set, the server opens the file itself at every OPEN, to return the true errno.
    own: Option<PathBuf>,
    opened: Slots<File>,
}

impl HardCoded {
    pub fn new(device: &Device, path: &Path, own_open: bool) -> Result<Self, Failed> {
        Ok(Self {
            id: BackingFile::open(Arc::clone(device), file(path)?, Access::ReadWrite)?,
            own: own_open.then(|| path.to_owned()),
            opened: Slots::default(),
        })
    }
}

impl Opens for HardCoded {
    fn open(&mut self, _: u32) -> Answer {
        let own = self.own.as_ref();
        let fh = own.map_or(0, |path| {
            self.opened.add(File::open(path).expect("it opens"))
        });
        answer(fh, FopenFlags::PASSTHROUGH, Some(self.id.id().as_raw()))
    }
    fn release(&mut self, fh: u64) {
        if self.own.is_some() {
            self.opened.take(fh);
        }
    }
}

/// Without bookkeeping: each OPEN registers the file and each RELEASE closes the id.
pub struct EveryOpen {
    device: Device,
    file: File,
    opened: Slots<BackingFile<Device>>,
}

impl EveryOpen {
    pub fn new(device: &Device, path: &Path) -> Result<Self, Failed> {
        Ok(Self {
            device: Arc::clone(device),
            file: file(path)?,
            opened: Slots::default(),
        })
    }
}

impl Opens for EveryOpen {
    fn open(&mut self, _: u32) -> Answer {
        let device = Arc::clone(&self.device);
        let backing = BackingFile::open(device, &self.file, Access::ReadWrite);
        let backing = backing.expect("registered");
        let id = backing.id().as_raw();
        answer(self.opened.add(backing), FopenFlags::PASSTHROUGH, Some(id))
    }
    fn release(&mut self, fh: u64) {
        self.opened.take(fh);
    }
}

/// How the table is used.
#[derive(Clone, Copy, PartialEq, Eq)]
pub enum Use {
    /// The file is not open already, so each OPEN registers it.
    Cold,
    /// The file is open already, and the server calls `share` first.
    Share,
    /// The file is open already, and the server opens it itself first.
    OwnOpen,
    /// The file is not open already, but the table keeps the idle id.
    Idle,
}

pub struct Table {
    table: BackingTable<Device>,
    usage: Use,
    path: PathBuf,
    file: File,
    /// Keeps the file hot.
    _held: Option<OpenFile<Device>>,
    opened: Slots<(OpenFile<Device>, Option<File>)>,
}

impl Table {
    pub fn new(device: &Device, path: &Path, usage: Use) -> Result<Self, Failed> {
        let table = BackingTable::new(Arc::clone(device));
        let file = file(path)?;
        if usage == Use::Idle {
            table.set_idle_limit(1);
        }
        let hot = matches!(usage, Use::Share | Use::OwnOpen);
        let known = ServerFile::new(&file).access(Access::ReadWrite);
        let held = hot.then(|| table.open(&INODE, libc::O_RDWR, known));
        Ok(Self {
            _held: held.transpose()?,
            table,
            usage,
            path: path.to_owned(),
            file,
            opened: Slots::default(),
        })
    }

    fn answer(&mut self, client_flags: u32) -> (OpenFile<Device>, Option<File>) {
        if self.usage == Use::OwnOpen {
            let own = File::open(&self.path).expect("it opens");
            let open = self.by_open(client_flags, ServerFile::new(&own));
            return (open, Some(own));
        }
        let shared = self.table.share(&INODE, client_flags);
        let open = shared.unwrap_or_else(|| {
            let known = ServerFile::new(&self.file).access(Access::ReadWrite);
            self.by_open(client_flags, known)
        });
        (open, None)
    }

    fn by_open(&self, client_flags: u32, file: ServerFile<'_, &File>) -> OpenFile<Device> {
        let open = self.table.open(&INODE, client_flags, file);
        open.expect("the table answers")
    }
}

impl Opens for Table {
    fn open(&mut self, client_flags: u32) -> Answer {
        let open = self.answer(client_flags);
        let reply = open.0.reply(FopenFlags::empty());
        assert!(reply.backing_id().is_some(), "it is passed through");
        let (open_flags, backing_id) = (reply.open_flags(), reply.backing_id());
        answer(self.opened.add(open), open_flags, backing_id)
    }
    fn release(&mut self, fh: u64) {
        self.opened.take(fh);
    }
}

/// The crate's `Handles`: the server opens the file itself first. The file is open already.
pub struct ByHandles {
    handles: Handles<Device>,
    path: PathBuf,
    known: Option<Known>,
}

/// What a server that keeps an `O_PATH` fd of each inode knows of it.
struct Known {
    path_fd: OwnedFd,
    metadata: Metadata,
}

impl ByHandles {
    pub fn new(device: &Device, path: &Path, known: bool) -> Result<Self, Failed> {
        let handles = Handles::new(BackingTable::new(Arc::clone(device)));
        // Keeps the file hot: it is never released.
        let held = handles.open(&INODE, libc::O_RDWR, file(path)?, FopenFlags::empty())?;
        assert!(held.backing_id.is_some(), "it is passed through");
        let look = || {
            let path_fd = open(path, OFlags::PATH | OFlags::CLOEXEC, Mode::empty())?;
            let metadata = File::from(path_fd.try_clone()?).metadata()?;
            Ok::<_, Failed>(Known { path_fd, metadata })
        };
        Ok(Self {
            handles,
            path: path.to_owned(),
            known: known.then(look).transpose()?,
        })
    }
}

impl Opens for ByHandles {
    fn open(&mut self, client_flags: u32) -> Answer {
        let mut own = ServerFile::new(File::open(&self.path).expect("it opens"));
        if let Some(Known { path_fd, metadata }) = &self.known {
            own = own
                .access(ClientFlags::from(client_flags).access())
                .identity(metadata.dev(), metadata.ino())
                .path_fd(path_fd);
        }
        let flags = FopenFlags::empty();
        let opened = self.handles.open(&INODE, client_flags, own, flags);
        let opened = opened.expect("the table answers");
        assert!(opened.backing_id.is_some(), "it is passed through");
        answer(opened.fh, opened.open_flags, opened.backing_id)
    }
    fn release(&mut self, fh: u64) {
        drop(self.handles.release(fh).expect("it is open"));
    }
}

/// Values by file handle.
struct Slots<T> {
    slots: Vec<Option<T>>,
    free: Vec<usize>,
}

impl<T> Default for Slots<T> {
    fn default() -> Self {
        Self {
            slots: Vec::new(),
            free: Vec::new(),
        }
    }
}

impl<T> Slots<T> {
    fn add(&mut self, value: T) -> u64 {
        let slot = self.free.pop().unwrap_or_else(|| {
            self.slots.push(None);
            self.slots.len() - 1
        });
        self.slots[slot] = Some(value);
        slot as u64
    }

    fn take(&mut self, fh: u64) {
        let slot = fh as usize;
        drop(self.slots[slot].take());
        self.free.push(slot);
    }
}
