//! fuse-backend-rs.

use std::ffi::{CStr, OsStr};
use std::io::{self, Read};
use std::mem;
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::MetadataExt;
use std::path::Path;
use std::sync::Arc;
use std::thread;
use std::time::Duration;

use fuse_backend_rs::abi::fuse_abi::{CreateIn, stat64};
use fuse_backend_rs::api::filesystem::{
    Context, Entry, FileSystem, FsOptions, OpenOptions, ZeroCopyReader, ZeroCopyWriter,
};
use fuse_backend_rs::api::server::Server as Dispatcher;
use fuse_backend_rs::transport::{FuseDevWriter, FuseSession, Reader};
use fuse_backing::Opened;
use fuse_backing::init::InitFlags;

use crate::Server;
use crate::files::{Files, Node};
use crate::relay;
use crate::wire::{add_passthrough, init_offer};

struct Backend(Arc<Files>);

pub fn serve(files: Arc<Files>, mountpoint: &Path) -> io::Result<Server> {
    let mut session =
        FuseSession::new(mountpoint, "libraries", "", false).map_err(io::Error::other)?;
    session.mount().map_err(io::Error::other)?;
    let device = session
        .get_fuse_file()
        .ok_or(io::ErrorKind::NotFound)?
        .try_clone()?;
    files.attach(&device)?;
    let device = OwnedFd::from(device);
    let mut channel = session.new_channel().map_err(io::Error::other)?;

    Ok(thread::spawn(move || {
        let _mounted = session;
        let dispatcher = Dispatcher::new(Backend(files));
        // It is an error when the filesystem is unmounted.
        while let Ok(Some((reader, writer))) = channel.get_request() {
            let mut head = [0; 60];
            let offered = reader
                .clone()
                .read(&mut head)
                .ok()
                .and_then(|_| init_offer(&head));
            match offered {
                Some(offered) => init(&dispatcher, reader, &device, offered)?,
                None => {
                    // It fails with ENOENT if the client was killed.
                    let _ = dispatcher.handle_message(reader, writer.into(), None, None);
                }
            }
        }
        Ok(())
    }))
}

/// fuse-backend-rs answers INIT without passthrough. Its reply goes to a socket, and completed to the device.
fn init(
    dispatcher: &Dispatcher<Backend>,
    reader: Reader<'_>,
    device: &OwnedFd,
    offered: InitFlags,
) -> io::Result<()> {
    let (ours, its) = relay::sockets()?;
    let mut buffer = [0; 4096];
    let writer = FuseDevWriter::new(its.as_raw_fd(), &mut buffer).map_err(io::Error::other)?;
    let answered = dispatcher.handle_message(reader, writer.into(), None, None);
    answered.map_err(io::Error::other)?;

    let mut reply = vec![0; 4096];
    let length = rustix::io::read(&ours, &mut reply[..])?;
    reply.truncate(length);
    add_passthrough(&mut reply, offered);
    rustix::io::write(device, &reply)?;
    Ok(())
}

impl FileSystem for Backend {
    type Inode = u64;
    type Handle = u64;

    fn init(&self, _: FsOptions) -> io::Result<FsOptions> {
        Ok(FsOptions::ASYNC_READ | FsOptions::BIG_WRITES | FsOptions::ATOMIC_O_TRUNC)
    }

    fn open(
        &self,
        _: &Context,
        inode: u64,
        flags: u32,
        _: u32,
    ) -> io::Result<(Option<u64>, OpenOptions, Option<u32>)> {
        let opened = self.0.open(inode, flags)?;
        Ok((Some(opened.fh), open_options(&opened), backing_id(&opened)))
    }

    fn create(
        &self,
        _: &Context,
        _: u64,
        name: &CStr,
        args: CreateIn,
    ) -> io::Result<(Entry, Option<u64>, OpenOptions, Option<u32>)> {
        let mode = args.mode & !args.umask;
        let (node, opened) = self.0.create(as_os_str(name), mode, args.flags)?;
        let (flags, id) = (open_options(&opened), backing_id(&opened));
        Ok((entry(&node), Some(opened.fh), flags, id))
    }

    fn release(
        &self,
        _: &Context,
        _: u64,
        _: u32,
        handle: u64,
        _: bool,
        _: bool,
        _: Option<u64>,
    ) -> io::Result<()> {
        self.0.release(handle);
        Ok(())
    }

    fn lookup(&self, _: &Context, _: u64, name: &CStr) -> io::Result<Entry> {
        Ok(entry(&self.0.lookup(as_os_str(name))?))
    }

    fn getattr(&self, _: &Context, inode: u64, _: Option<u64>) -> io::Result<(stat64, Duration)> {
        Ok((attr(&self.0.look(inode)?), Duration::ZERO))
    }

    fn read(
        &self,
        _: &Context,
        _: u64,
        handle: u64,
        w: &mut dyn ZeroCopyWriter,
        size: u32,
        offset: u64,
        _: Option<u64>,
        _: u32,
    ) -> io::Result<usize> {
        let data = self.0.read(handle, offset, size)?;
        w.write_all(&data)?;
        Ok(data.len())
    }

    fn write(
        &self,
        _: &Context,
        _: u64,
        handle: u64,
        r: &mut dyn ZeroCopyReader,
        size: u32,
        offset: u64,
        _: Option<u64>,
        _: bool,
        _: u32,
        _: u32,
    ) -> io::Result<usize> {
        let mut data = vec![0; size as usize];
        r.read_exact(&mut data)?;
        Ok(self.0.write(handle, offset, &data)? as usize)
    }
}

fn open_options(opened: &Opened) -> OpenOptions {
    // SAFETY: The bits go into the reply as they are. fuse-backend-rs has no name for FOPEN_PASSTHROUGH.
    #[allow(unsafe_code)]
    unsafe {
        OpenOptions::from_bits_unchecked(opened.open_flags.bits())
    }
}

/// fuse-backend-rs calls the field `passthrough`. It is where the kernel's `backing_id` is.
fn backing_id(opened: &Opened) -> Option<u32> {
    opened.backing_id.map(|id| id as u32)
}

fn as_os_str(name: &CStr) -> &OsStr {
    OsStr::from_bytes(name.to_bytes())
}

fn entry(node: &Node) -> Entry {
    Entry {
        inode: node.ino,
        generation: 0,
        attr: attr(node),
        attr_flags: 0,
        attr_timeout: Duration::ZERO,
        entry_timeout: Duration::ZERO,
    }
}

fn attr(node: &Node) -> stat64 {
    let meta = &node.meta;
    // SAFETY: It consists of integers.
    #[allow(unsafe_code)]
    let mut attr: stat64 = unsafe { mem::zeroed() };
    attr.st_ino = node.ino;
    attr.st_size = meta.size() as i64;
    attr.st_blocks = meta.blocks() as i64;
    attr.st_mode = meta.mode();
    attr.st_nlink = 1;
    attr.st_uid = meta.uid();
    attr.st_gid = meta.gid();
    attr.st_blksize = 4096;
    attr.st_mtime = meta.mtime();
    attr.st_mtime_nsec = meta.mtime_nsec();
    attr
}
