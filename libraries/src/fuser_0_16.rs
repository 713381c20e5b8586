//! fuser 0.16 with its feature `abi-7-40`. As with 0.17, the server writes the replies that have a backing id.

use std::ffi::OsStr;
use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::fs::MetadataExt;
use std::path::Path;
use std::sync::Arc;
use std::thread;
use std::time::Duration;

use fuse_backing::init::{InitFlags, MaxStackDepth, negotiate};
use fuser_0_16 as fuser;

use fuser::{
    FileAttr, FileType, Filesystem, KernelConfig, ReplyAttr, ReplyCreate, ReplyData, ReplyEmpty,
    ReplyEntry, ReplyOpen, ReplyWrite, Request, Session, SessionACL,
};

use crate::Server;
use crate::files::{self, Files, Node, errno};
use crate::wire;

struct Server016 {
    files: Arc<Files>,
    device: OwnedFd,
}

pub fn serve(files: Arc<Files>, mountpoint: &Path) -> io::Result<Server> {
    let device = files::mount(mountpoint)?;
    files.attach(&device)?;
    let filesystem = Server016 {
        files,
        device: device.try_clone()?,
    };
    let mut session = Session::from_fd(filesystem, device, SessionACL::All);
    Ok(thread::spawn(move || session.run()))
}

impl Filesystem for Server016 {
    fn init(&mut self, _: &Request<'_>, config: &mut KernelConfig) -> Result<(), i32> {
        // fuser does not tell what the kernel offers. `add_capabilities` refuses what it does not offer.
        let offered = InitFlags::PASSTHROUGH;
        let reply = match negotiate(offered, InitFlags::empty(), MaxStackDepth::One) {
            Ok(reply) => reply,
            Err(why) => {
                eprintln!("no passthrough: {why}");
                return Ok(());
            }
        };
        if config.add_capabilities(reply.flags.bits()).is_err() {
            eprintln!("no passthrough: the kernel does not offer it");
            return Ok(());
        }
        config
            .set_max_stack_depth(reply.max_stack_depth)
            .or(Err(libc::EINVAL))?;
        Ok(())
    }

    fn open(&mut self, request: &Request<'_>, ino: u64, flags: i32, reply: ReplyOpen) {
        let opened = self.files.open(ino, flags as u32);
        let sent = wire::reply(&self.device, request.unique(), opened.map(wire::open_out));
        already_answered(sent, |errno| reply.error(errno));
    }

    fn create(
        &mut self,
        request: &Request<'_>,
        _: u64,
        name: &OsStr,
        mode: u32,
        umask: u32,
        flags: i32,
        reply: ReplyCreate,
    ) {
        let created = self.files.create(name, mode & !umask, flags as u32);
        let body = created.map(|(node, opened)| wire::create_out(&node, opened));
        let sent = wire::reply(&self.device, request.unique(), body);
        already_answered(sent, |errno| reply.error(errno));
    }

    fn release(
        &mut self,
        _: &Request<'_>,
        _: u64,
        fh: u64,
        _: i32,
        _: Option<u64>,
        _: bool,
        reply: ReplyEmpty,
    ) {
        self.files.release(fh);
        reply.ok();
    }

    fn lookup(&mut self, _: &Request<'_>, _: u64, name: &OsStr, reply: ReplyEntry) {
        match self.files.lookup(name) {
            Ok(node) => reply.entry(&Duration::ZERO, &attr(&node), 0),
            Err(error) => reply.error(errno(&error)),
        }
    }

    fn getattr(&mut self, _: &Request<'_>, ino: u64, _: Option<u64>, reply: ReplyAttr) {
        match self.files.look(ino) {
            Ok(node) => reply.attr(&Duration::ZERO, &attr(&node)),
            Err(error) => reply.error(errno(&error)),
        }
    }

    fn read(
        &mut self,
        _: &Request<'_>,
        _: u64,
        fh: u64,
        offset: i64,
        size: u32,
        _: i32,
        _: Option<u64>,
        reply: ReplyData,
    ) {
        match self.files.read(fh, offset as u64, size) {
            Ok(data) => reply.data(&data),
            Err(error) => reply.error(errno(&error)),
        }
    }

    fn write(
        &mut self,
        _: &Request<'_>,
        _: u64,
        fh: u64,
        offset: i64,
        data: &[u8],
        _: u32,
        _: i32,
        _: Option<u64>,
        reply: ReplyWrite,
    ) {
        match self.files.write(fh, offset as u64, data) {
            Ok(length) => reply.written(length),
            Err(error) => reply.error(errno(&error)),
        }
    }
}

/// fuser's reply object has to be used up. The kernel no longer knows the request: it refuses this second reply with
/// ENOENT, which fuser logs. If the first one failed, this one is the answer.
fn already_answered(sent: io::Result<()>, error: impl FnOnce(i32)) {
    error(sent.err().as_ref().map_or(libc::EIO, errno));
}

fn attr(node: &Node) -> FileAttr {
    let meta = &node.meta;
    let mtime = meta.modified().unwrap_or(std::time::UNIX_EPOCH);
    FileAttr {
        ino: node.ino,
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
