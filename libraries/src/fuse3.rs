// fuse3, and rfuse3, which is its fork: src/lib.rs includes this file for each, as `library`.

use std::ffi::OsStr;
use std::io;
use std::num::NonZeroU32;
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::fs::MetadataExt;
use std::path::Path;
use std::sync::Arc;
use std::thread;
use std::time::Duration;

use library::raw::reply::{
    FileAttr, ReplyAttr, ReplyCreated, ReplyData, ReplyEntry, ReplyInit, ReplyOpen, ReplyWrite,
};
use library::raw::{Filesystem, Request, Session};
use library::{Errno, FileType, Inode, MountOptions, Result, Timestamp};

use crate::Server;
use crate::files::{self, Files, Node, errno};
use crate::relay;
use crate::wire;

struct Filesystem3 {
    files: Arc<Files>,
    device: OwnedFd,
}

/// The library answers INIT without passthrough, and takes no fd but that of fusermount3. So it gets a socket from
/// `src/bin/fusermount3.rs`, which has to be in `PATH`, and the relay completes the INIT reply.
pub fn serve(files: Arc<Files>, mountpoint: &Path) -> io::Result<Server> {
    let device = files::mount(mountpoint)?;
    files.attach(&device)?;
    let filesystem = Filesystem3 {
        files,
        device: device.try_clone()?,
    };
    let (ours, its) = relay::sockets()?;
    let mut options = MountOptions::default();
    // The folder is the mount already, which nobody serves yet.
    options.nonempty(true);
    options.custom_options(format!("fd={}", its.as_raw_fd()));

    let runtime = tokio::runtime::Runtime::new()?;
    let (unmounted, end) = tokio::sync::oneshot::channel::<()>();
    relay::start(device, ours, move || drop(unmounted));
    let session = Session::new(options);
    let mounted = runtime.block_on(session.mount_with_unprivileged(filesystem, mountpoint))?;
    drop(its);
    Ok(thread::spawn(move || {
        runtime.block_on(async {
            let _ = end.await;
            mounted.unmount().await
        })
    }))
}

impl Filesystem3 {
    /// Writes the reply to the device. What the library writes after that, the kernel refuses with ENOENT, which the relay
    /// ignores.
    fn answer<T>(&self, request: Request, body: io::Result<Vec<u8>>) -> Result<T> {
        let sent = wire::reply(&self.device, request.unique, body);
        Err(sent.map_or_else(refused, |()| libc::EIO.into()))
    }
}

impl Filesystem for Filesystem3 {
    async fn init(&self, _: Request) -> Result<ReplyInit> {
        Ok(init_reply(const { NonZeroU32::new(128 << 10).unwrap() }))
    }

    async fn destroy(&self, _: Request) {}

    async fn open(&self, request: Request, inode: Inode, flags: u32) -> Result<ReplyOpen> {
        let opened = self.files.open(inode, flags);
        self.answer(request, opened.map(wire::open_out))
    }

    async fn create(
        &self,
        request: Request,
        _: Inode,
        name: &OsStr,
        mode: u32,
        flags: u32,
    ) -> Result<ReplyCreated> {
        let created = self.files.create(name, mode, flags);
        let body = created.map(|(node, opened)| wire::create_out(&node, opened));
        self.answer(request, body)
    }

    async fn release(&self, _: Request, _: Inode, fh: u64, _: u32, _: u64, _: bool) -> Result<()> {
        self.files.release(fh);
        Ok(())
    }

    async fn lookup(&self, _: Request, _: Inode, name: &OsStr) -> Result<ReplyEntry> {
        let node = self.files.lookup(name).map_err(refused)?;
        Ok(ReplyEntry {
            ttl: Duration::ZERO,
            attr: attr(&node),
            generation: 0,
        })
    }

    async fn getattr(&self, _: Request, inode: Inode, _: Option<u64>, _: u32) -> Result<ReplyAttr> {
        let node = self.files.look(inode).map_err(refused)?;
        let ttl = Duration::ZERO;
        Ok(ReplyAttr {
            ttl,
            attr: attr(&node),
        })
    }

    async fn read(
        &self,
        _: Request,
        _: Inode,
        fh: u64,
        offset: u64,
        size: u32,
    ) -> Result<ReplyData> {
        let data = self.files.read(fh, offset, size).map_err(refused)?;
        Ok(::bytes::Bytes::from(data).into())
    }

    async fn write(
        &self,
        _: Request,
        _: Inode,
        fh: u64,
        offset: u64,
        data: &[u8],
        _: u32,
        _: u32,
    ) -> Result<ReplyWrite> {
        let written = self.files.write(fh, offset, data).map_err(refused)?;
        Ok(ReplyWrite { written })
    }
}

fn refused(error: io::Error) -> Errno {
    errno(&error).into()
}

fn attr(node: &Node) -> FileAttr {
    let meta = &node.meta;
    FileAttr {
        ino: node.ino,
        size: meta.size(),
        blocks: meta.blocks(),
        atime: Timestamp::new(meta.atime(), meta.atime_nsec() as u32),
        mtime: Timestamp::new(meta.mtime(), meta.mtime_nsec() as u32),
        ctime: Timestamp::new(meta.ctime(), meta.ctime_nsec() as u32),
        kind: if meta.is_dir() {
            FileType::Directory
        } else {
            FileType::RegularFile
        },
        perm: (meta.mode() & 0o7777) as u16,
        nlink: 1,
        uid: meta.uid(),
        gid: meta.gid(),
        rdev: 0,
        blksize: 4096,
    }
}
