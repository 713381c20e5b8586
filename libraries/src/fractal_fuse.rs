//! fractal-fuse.

use std::ffi::OsStr;
use std::io;
use std::os::unix::fs::MetadataExt;
use std::path::Path;
use std::sync::Arc;
use std::thread;
use std::time::Duration;

use fractal_fuse::{
    Errno, FileAttr, FileHandleId, Filesystem, FsResult, InodeId, MountOptions, ReplyAttr,
    ReplyCreate, ReplyEntry, ReplyOpen, Request, Session, Timestamp,
};
use fuse_backing::rights::may_register;

use crate::Server;
use crate::files::{Files, Node, errno};

struct Fractal(Arc<Files>);

pub fn serve(files: Arc<Files>, mountpoint: &Path) -> io::Result<Server> {
    // fractal-fuse answers INIT itself, with a depth of 1, and does not tell what the kernel offers. What is left to
    // ask is whether this thread may register.
    let permitted = may_register().inspect_err(|why| eprintln!("no passthrough: {why}"));
    let options = MountOptions::new().passthrough(permitted.is_ok());
    let session = Session::new(mountpoint.to_owned(), options)?.with_queue_depth(8);
    files.attach(&*session.fuse_fd())?;
    Ok(thread::spawn(move || session.run(Fractal(files))))
}

impl Filesystem for Fractal {
    async fn open(&self, _: Request, inode: InodeId, flags: u32) -> FsResult<ReplyOpen> {
        let opened = self.0.open(inode.0, flags).map_err(refused)?;
        Ok(ReplyOpen {
            fh: FileHandleId(opened.fh),
            flags: opened.open_flags.bits(),
            backing_id: opened.backing_id.unwrap_or(0),
        })
    }

    /// Its reply has no backing id. After ENOSYS the kernel sends MKNOD and OPEN, here and from then on.
    async fn create(
        &self,
        _: Request,
        _: InodeId,
        _: &OsStr,
        _: u32,
        _: u32,
    ) -> FsResult<ReplyCreate> {
        Err(libc::ENOSYS)
    }

    async fn mknod(
        &self,
        _: Request,
        _: InodeId,
        name: &OsStr,
        mode: u32,
        _: u32,
    ) -> FsResult<ReplyEntry> {
        self.0.mknod(name, mode).map(entry).map_err(refused)
    }

    async fn release(
        &self,
        _: Request,
        _: InodeId,
        fh: FileHandleId,
        _: u32,
        _: u64,
        _: bool,
        _: bool,
    ) -> FsResult<()> {
        self.0.release(fh.0);
        Ok(())
    }

    async fn lookup(&self, _: Request, _: InodeId, name: &OsStr) -> FsResult<ReplyEntry> {
        self.0.lookup(name).map(entry).map_err(refused)
    }

    async fn getattr(
        &self,
        _: Request,
        inode: InodeId,
        _: Option<FileHandleId>,
        _: u32,
    ) -> FsResult<ReplyAttr> {
        let node = self.0.look(inode.0).map_err(refused)?;
        let ttl = Duration::ZERO;
        Ok(ReplyAttr {
            ttl,
            attr: attr(&node),
        })
    }

    async fn read(
        &self,
        _: Request,
        _: InodeId,
        fh: FileHandleId,
        offset: u64,
        buf: &mut [u8],
    ) -> FsResult<usize> {
        let data = self
            .0
            .read(fh.0, offset, buf.len() as u32)
            .map_err(refused)?;
        buf[..data.len()].copy_from_slice(&data);
        Ok(data.len())
    }

    async fn write(
        &self,
        _: Request,
        _: InodeId,
        fh: FileHandleId,
        offset: u64,
        data: &[u8],
        _: u32,
        _: u32,
    ) -> FsResult<usize> {
        let written = self.0.write(fh.0, offset, data).map_err(refused)?;
        Ok(written as usize)
    }
}

fn refused(error: io::Error) -> Errno {
    errno(&error)
}

fn entry(node: Node) -> ReplyEntry {
    ReplyEntry {
        ttl: Duration::ZERO,
        attr: attr(&node),
        generation: 0,
    }
}

fn attr(node: &Node) -> FileAttr {
    let meta = &node.meta;
    FileAttr {
        ino: node.ino,
        size: meta.size(),
        blocks: meta.blocks(),
        atime: Timestamp::new(meta.atime() as u64, meta.atime_nsec() as u32),
        mtime: Timestamp::new(meta.mtime() as u64, meta.mtime_nsec() as u32),
        ctime: Timestamp::new(meta.ctime() as u64, meta.ctime_nsec() as u32),
        mode: meta.mode(),
        nlink: 1,
        uid: meta.uid(),
        gid: meta.gid(),
        rdev: 0,
        blksize: 4096,
    }
}
