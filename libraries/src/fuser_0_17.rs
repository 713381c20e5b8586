//! fuser 0.17: ids of another registrar have no place in its replies, so the server writes those replies itself.

use std::ffi::OsStr;
use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::fs::MetadataExt;
use std::path::Path;
use std::sync::Arc;
use std::thread;
use std::time::Duration;

use fuse_backing::init::{InitFlags, MaxStackDepth, negotiate};
use fuser_0_17 as fuser;

use fuser::{
    Config, Errno, FileAttr, FileHandle, FileType, Filesystem, Generation, INodeNo, KernelConfig,
    LockOwner, OpenFlags, ReplyAttr, ReplyCreate, ReplyData, ReplyEmpty, ReplyEntry, ReplyOpen,
    ReplyWrite, Request, Session, SessionACL, WriteFlags,
};

use crate::Server;
use crate::files::{self, Files, Node};
use crate::wire;

struct Server017 {
    files: Arc<Files>,
    device: OwnedFd,
}

/// The server mounts, or fusermount does: in OPEN the filesystem needs the device, which a session that has mounted
/// it gives away only when it has the filesystem. (A `OnceLock` in the filesystem does as well.)
pub fn serve(files: Arc<Files>, mountpoint: &Path) -> io::Result<Server> {
    let device = files::mount(mountpoint)?;
    files.attach(&device)?;
    let filesystem = Server017 {
        files,
        device: device.try_clone()?,
    };
    let session = Session::from_fd(filesystem, device, SessionACL::All, Config::default())?;
    Ok(thread::spawn(move || session.spawn()?.join()))
}

impl Filesystem for Server017 {
    fn init(&mut self, _: &Request, config: &mut KernelConfig) -> io::Result<()> {
        let offered = InitFlags::from_bits_retain(config.capabilities().bits());
        let reply = match negotiate(offered, InitFlags::empty(), MaxStackDepth::One) {
            Ok(reply) => reply,
            Err(why) => {
                eprintln!("no passthrough: {why}");
                return Ok(());
            }
        };
        let flags = fuser::InitFlags::from_bits_retain(reply.flags.bits());
        config
            .add_capabilities(flags)
            .or(Err(io::ErrorKind::Unsupported))?;
        config
            .set_max_stack_depth(reply.max_stack_depth)
            .or(Err(io::ErrorKind::Unsupported))?;
        Ok(())
    }

    fn open(&self, request: &Request, ino: INodeNo, flags: OpenFlags, reply: ReplyOpen) {
        let opened = self.files.open(ino.0, flags.0 as u32);
        let sent = wire::reply(&self.device, request.unique().0, opened.map(wire::open_out));
        already_answered(sent, |errno| reply.error(errno));
    }

    fn create(
        &self,
        request: &Request,
        _: INodeNo,
        name: &OsStr,
        mode: u32,
        umask: u32,
        flags: i32,
        reply: ReplyCreate,
    ) {
        let created = self.files.create(name, mode & !umask, flags as u32);
        let body = created.map(|(node, opened)| wire::create_out(&node, opened));
        let sent = wire::reply(&self.device, request.unique().0, body);
        already_answered(sent, |errno| reply.error(errno));
    }

    fn release(
        &self,
        _: &Request,
        _: INodeNo,
        fh: FileHandle,
        _: OpenFlags,
        _: Option<LockOwner>,
        _: bool,
        reply: ReplyEmpty,
    ) {
        self.files.release(fh.0);
        reply.ok();
    }

    fn lookup(&self, _: &Request, _: INodeNo, name: &OsStr, reply: ReplyEntry) {
        match self.files.lookup(name) {
            Ok(node) => reply.entry(&Duration::ZERO, &attr(&node), Generation(0)),
            Err(error) => reply.error(error.into()),
        }
    }

    fn getattr(&self, _: &Request, ino: INodeNo, _: Option<FileHandle>, reply: ReplyAttr) {
        match self.files.look(ino.0) {
            Ok(node) => reply.attr(&Duration::ZERO, &attr(&node)),
            Err(error) => reply.error(error.into()),
        }
    }

    fn read(
        &self,
        _: &Request,
        _: INodeNo,
        fh: FileHandle,
        offset: u64,
        size: u32,
        _: OpenFlags,
        _: Option<LockOwner>,
        reply: ReplyData,
    ) {
        match self.files.read(fh.0, offset, size) {
            Ok(data) => reply.data(&data),
            Err(error) => reply.error(error.into()),
        }
    }

    fn write(
        &self,
        _: &Request,
        _: INodeNo,
        fh: FileHandle,
        offset: u64,
        data: &[u8],
        _: WriteFlags,
        _: OpenFlags,
        _: Option<LockOwner>,
        reply: ReplyWrite,
    ) {
        match self.files.write(fh.0, offset, data) {
            Ok(length) => reply.written(length),
            Err(error) => reply.error(error.into()),
        }
    }
}

/// fuser's reply object has to be used up. The kernel no longer knows the request: it refuses this second reply with
/// ENOENT, which fuser logs. If the first one failed, this one is the answer.
fn already_answered(sent: io::Result<()>, error: impl FnOnce(Errno)) {
    error(sent.err().map_or(Errno::EIO, Errno::from));
}

fn attr(node: &Node) -> FileAttr {
    let meta = &node.meta;
    let mtime = meta.modified().unwrap_or(std::time::UNIX_EPOCH);
    FileAttr {
        ino: INodeNo(node.ino),
        size: meta.size(),
        blocks: meta.blocks(),
        atime: meta.accessed().unwrap_or(mtime),
        mtime,
        ctime: mtime,
        crtime: mtime,
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
        flags: 0,
    }
}
