//! fuser 0.18.

use std::ffi::OsStr;
use std::io;
use std::os::unix::fs::MetadataExt;
use std::path::Path;
use std::sync::Arc;
use std::thread;
use std::time::Duration;

use fuse_backing::Opened;
use fuse_backing::init::{InitFlags, MaxStackDepth, negotiate};
use fuser_0_18 as fuser;

use fuser::{
    BackingId, Config, FileAttr, FileHandle, FileType, Filesystem, FopenFlags, Generation, INodeNo,
    KernelConfig, LockOwner, OpenFlags, ReplyAttr, ReplyCreate, ReplyData, ReplyEmpty, ReplyEntry,
    ReplyOpen, ReplyWrite, Request, Session, SessionACL, WriteFlags,
};

use crate::Server;
use crate::files::{self, Files, Node};

struct Server018(Arc<Files>);

/// `Session::new` mounts.
pub fn serve(files: Arc<Files>, mountpoint: &Path) -> io::Result<Server> {
    let filesystem = Server018(Arc::clone(&files));
    let session = Session::new(filesystem, mountpoint, &Config::default())?;
    files.attach(&session)?;
    Ok(thread::spawn(move || session.run()))
}

/// The device was mounted before, by this process or by fusermount.
pub fn serve_from_fd(files: Arc<Files>, mountpoint: &Path) -> io::Result<Server> {
    let device = files::mount(mountpoint)?;
    files.attach(&device)?;
    let session = Session::from_fd(Server018(files), device, SessionACL::All, Config::default())?;
    Ok(thread::spawn(move || session.run()))
}

impl Filesystem for Server018 {
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

    fn open(&self, _: &Request, ino: INodeNo, flags: OpenFlags, reply: ReplyOpen) {
        let opened = match self.0.open(ino.0, flags.0 as u32) {
            Ok(opened) => opened,
            Err(error) => return reply.error(error.into()),
        };
        let (fh, flags) = fields(&opened);
        let Some(id) = opened.backing_id else {
            return reply.opened(fh, flags);
        };
        // SAFETY: `Handles` has registered it with this session, and closes it after the RELEASE of `fh`.
        #[allow(unsafe_code)]
        let lent = unsafe { reply.wrap_backing(id as u32) };
        reply.opened_passthrough(fh, flags, &lent);
        keep_registered(lent);
    }

    fn create(
        &self,
        _: &Request,
        _: INodeNo,
        name: &OsStr,
        mode: u32,
        umask: u32,
        flags: i32,
        reply: ReplyCreate,
    ) {
        let (node, opened) = match self.0.create(name, mode & !umask, flags as u32) {
            Ok(created) => created,
            Err(error) => return reply.error(error.into()),
        };
        let (fh, flags) = fields(&opened);
        let (ttl, attr, generation) = (Duration::ZERO, attr(&node), Generation(0));
        let Some(id) = opened.backing_id else {
            return reply.created(&ttl, &attr, generation, fh, flags);
        };
        // SAFETY: As for OPEN.
        #[allow(unsafe_code)]
        let lent = unsafe { reply.wrap_backing(id as u32) };
        reply.created_passthrough(&ttl, &attr, generation, fh, flags, &lent);
        keep_registered(lent);
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
        self.0.release(fh.0);
        reply.ok();
    }

    fn lookup(&self, _: &Request, _: INodeNo, name: &OsStr, reply: ReplyEntry) {
        match self.0.lookup(name) {
            Ok(node) => reply.entry(&Duration::ZERO, &attr(&node), Generation(0)),
            Err(error) => reply.error(error.into()),
        }
    }

    fn getattr(&self, _: &Request, ino: INodeNo, _: Option<FileHandle>, reply: ReplyAttr) {
        match self.0.look(ino.0) {
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
        match self.0.read(fh.0, offset, size) {
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
        match self.0.write(fh.0, offset, data) {
            Ok(length) => reply.written(length),
            Err(error) => reply.error(error.into()),
        }
    }
}

fn fields(opened: &Opened) -> (FileHandle, FopenFlags) {
    let flags = FopenFlags::from_bits_retain(opened.open_flags.bits());
    (FileHandle(opened.fh), flags)
}

/// Dropped, it would close the id.
fn keep_registered(lent: BackingId) {
    let _ = lent.into_raw();
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
