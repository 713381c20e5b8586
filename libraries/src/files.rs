//! The filesystem that every module serves: the files of one directory, in which files can be created.

use std::ffi::{OsStr, OsString};
use std::fs::{File, Metadata};
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use fuse_backing::{FopenFlags, FuseDevice, Handles, Opened};
use rustix::fs::{Mode, OFlags};
use rustix::io::Errno;
use rustix::mount::MountFlags;

/// The inode of the directory.
pub const ROOT: u64 = 1;

pub struct Files {
    dir: PathBuf,
    /// The name of inode n is at n - 2.
    names: Mutex<Vec<OsString>>,
    pub handles: Handles,
    pass_through: bool,
    /// Requests that came to the server.
    pub reads: AtomicU64,
    pub writes: AtomicU64,
    pub mknods: AtomicU64,
}

pub struct Node {
    pub ino: u64,
    pub meta: Metadata,
}

impl Files {
    /// Without `pass_through`, the server reads and writes every file itself.
    pub fn new(dir: &Path, pass_through: bool) -> Arc<Self> {
        Arc::new(Self {
            dir: dir.to_owned(),
            names: Mutex::default(),
            handles: Handles::default(),
            pass_through,
            reads: AtomicU64::new(0),
            writes: AtomicU64::new(0),
            mknods: AtomicU64::new(0),
        })
    }

    /// Gives the table the device to register files with.
    pub fn attach(&self, device: impl AsFd) -> io::Result<()> {
        if !self.pass_through {
            return Ok(());
        }
        let device = FuseDevice::new(device.as_fd().try_clone_to_owned()?)?;
        let attached = self.handles.table().attach(device);
        attached.map_err(|_| io::Error::other("a device is attached already"))
    }

    pub fn lookup(&self, name: &OsStr) -> io::Result<Node> {
        let meta = self.dir.join(name).symlink_metadata()?;
        let mut names = self.names.lock().unwrap_or_else(PoisonError::into_inner);
        let known = names.iter().position(|known| known == name);
        let index = known.unwrap_or_else(|| {
            names.push(name.to_owned());
            names.len() - 1
        });
        let ino = index as u64 + 2;
        Ok(Node { ino, meta })
    }

    pub fn look(&self, ino: u64) -> io::Result<Node> {
        let meta = self.path(ino)?.symlink_metadata()?;
        Ok(Node { ino, meta })
    }

    /// OPEN.
    pub fn open(&self, ino: u64, client_flags: u32) -> io::Result<Opened> {
        let wanted = OFlags::from_bits_retain(client_flags) & (OFlags::ACCMODE | OFlags::TRUNC);
        let flags = wanted | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        let file = File::from(rustix::fs::open(self.path(ino)?, flags, Mode::empty())?);
        Ok(self
            .handles
            .open(&ino, client_flags, file, FopenFlags::empty())?)
    }

    /// CREATE.
    pub fn create(&self, name: &OsStr, mode: u32, client_flags: u32) -> io::Result<(Node, Opened)> {
        let node = self.make(name, mode)?;
        let opened = self.open(node.ino, client_flags)?;
        Ok((node, opened))
    }

    /// MKNOD of a regular file.
    pub fn mknod(&self, name: &OsStr, mode: u32) -> io::Result<Node> {
        self.mknods.fetch_add(1, Ordering::SeqCst);
        self.make(name, mode)
    }

    /// READ, in server mode.
    pub fn read(&self, fh: u64, offset: u64, size: u32) -> io::Result<Vec<u8>> {
        self.reads.fetch_add(1, Ordering::SeqCst);
        let handle = self.handles.get(fh).ok_or(Errno::BADF)?;
        let mut data = vec![0; size as usize];
        let length = handle.file.read_at(&mut data, offset)?;
        data.truncate(length);
        Ok(data)
    }

    /// WRITE, in server mode.
    pub fn write(&self, fh: u64, offset: u64, data: &[u8]) -> io::Result<u32> {
        self.writes.fetch_add(1, Ordering::SeqCst);
        let handle = self.handles.get(fh).ok_or(Errno::BADF)?;
        Ok(handle.file.write_at(data, offset)? as u32)
    }

    /// RELEASE.
    pub fn release(&self, fh: u64) {
        drop(self.handles.release(fh));
    }

    fn make(&self, name: &OsStr, mode: u32) -> io::Result<Node> {
        let flags = OFlags::CREATE | OFlags::EXCL | OFlags::RDONLY | OFlags::CLOEXEC;
        let mode = Mode::from_raw_mode(mode & 0o7777);
        rustix::fs::open(self.dir.join(name), flags, mode)?;
        self.lookup(name)
    }

    fn path(&self, ino: u64) -> io::Result<PathBuf> {
        if ino == ROOT {
            return Ok(self.dir.clone());
        }
        let names = self.names.lock().unwrap_or_else(PoisonError::into_inner);
        let name = usize::try_from(ino)
            .ok()
            .and_then(|ino| names.get(ino.checked_sub(2)?));
        Ok(self.dir.join(name.ok_or(Errno::NOENT)?))
    }
}

/// The errno to answer the client.
pub fn errno(error: &io::Error) -> i32 {
    error.raw_os_error().unwrap_or(libc::EIO)
}

/// Opens `/dev/fuse` and mounts it, for libraries that take a mounted device, and for none.
pub fn mount(mountpoint: &Path) -> io::Result<OwnedFd> {
    use std::os::fd::AsRawFd;

    let device = FuseDevice::open()?;
    let data = format!(
        "fd={},rootmode=40000,user_id=0,group_id=0",
        device.as_raw_fd()
    );
    let data = std::ffi::CString::new(data)?;
    let flags = MountFlags::NOSUID | MountFlags::NODEV;
    rustix::mount::mount("libraries", mountpoint, "fuse", flags, &*data)?;
    Ok(device.into_inner())
}
