//! Serves the files of a directory, read-only. The kernel reads them itself: the lines marked `//+` are what a
//! server that keeps its open files in a map has more for that. As root: `hello DIR MNT`, until MNT is unmounted.
#![cfg_attr(rustfmt, rustfmt_skip)]

use std::os::{fd::AsFd, unix::fs::FileExt, unix::fs::MetadataExt};
use std::{env, error::Error, ffi::OsStr, ffi::OsString, fs, fs::File, io, io::ErrorKind, sync::Arc, time::Duration};

use fuse_backing::{FopenFlags, FuseDevice, Handles, init::{InitFlags, MaxStackDepth, negotiate}}; //+
use fuser::{Errno, FileAttr, FileHandle, FileType, INodeNo, KernelConfig, LockOwner, OpenFlags};
use fuser::{ReplyAttr, ReplyData, ReplyDirectory, ReplyEmpty, ReplyEntry, ReplyOpen, Request};

struct Hello {
    files: Vec<(OsString, File)>, // the directory, which is inode 1, and the files in it
    handles: Arc<Handles>, //+
}

fn attr(ino: u64, file: &File) -> io::Result<FileAttr> {
    let file = file.metadata()?;
    let (atime, mtime) = (file.accessed()?, file.modified()?);
    Ok(FileAttr {
        ino: INodeNo(ino), kind: if file.is_dir() { FileType::Directory } else { FileType::RegularFile },
        perm: (file.mode() & 0o7777) as u16, nlink: 1, uid: file.uid(), gid: file.gid(), rdev: 0, flags: 0,
        size: file.size(), blocks: file.blocks(), blksize: 4096, atime, mtime, ctime: mtime, crtime: mtime,
    })
}

impl fuser::Filesystem for Hello {
    fn init(&mut self, _: &Request, config: &mut KernelConfig) -> io::Result<()> {
        let offered = InitFlags::from_bits_retain(config.capabilities().bits()); //+
        let reply = negotiate(offered, InitFlags::empty(), MaxStackDepth::One); //+
        let Ok(reply) = reply.inspect_err(|why| eprintln!("no passthrough: {why}")) else { return Ok(()) }; //+
        config.add_capabilities(fuser::InitFlags::from_bits_retain(reply.flags.bits())).or(Err(ErrorKind::Other))?; //+
        config.set_max_stack_depth(reply.max_stack_depth).or(Err(ErrorKind::Other))?; //+
        Ok(())
    }

    fn lookup(&self, _: &Request, _: INodeNo, name: &OsStr, reply: ReplyEntry) {
        let found = self.files.iter().zip(1..).skip(1).find(|((known, _), _)| known == name);
        let Some(((_, file), ino)) = found else { return reply.error(Errno::ENOENT) };
        let Ok(attr) = attr(ino, file) else { return reply.error(Errno::EIO) };
        reply.entry(&Duration::ZERO, &attr, fuser::Generation(0));
    }

    fn getattr(&self, _: &Request, ino: INodeNo, _: Option<FileHandle>, reply: ReplyAttr) {
        let Ok(attr) = attr(ino.0, &self.files[ino.0 as usize - 1].1) else { return reply.error(Errno::EIO) };
        reply.attr(&Duration::ZERO, &attr);
    }

    fn readdir(&self, _: &Request, _: INodeNo, _: FileHandle, offset: u64, mut reply: ReplyDirectory) {
        for ((name, _), ino) in self.files.iter().zip(1..).skip(1.max(offset as usize)) {
            if reply.add(INodeNo(ino), ino, FileType::RegularFile, name) { break }
        }
        reply.ok();
    }

    fn open(&self, _: &Request, ino: INodeNo, flags: OpenFlags, reply: ReplyOpen) {
        let open = |file| Ok(self.handles.open(&ino.0, flags.0, file, FopenFlags::empty())?); //+
        let opened = self.files[ino.0 as usize - 1].1.try_clone().and_then(open);
        let opened = match opened { Ok(opened) => opened, Err(error) => return reply.error(error.into()) };
        let (fh, flags) = (FileHandle(opened.fh), fuser::FopenFlags::from_bits_retain(opened.open_flags.bits())); //+
        let Some(id) = opened.backing_id else { return reply.opened(fh, flags) }; //+
        // SAFETY: `handles` registered it with this session, and closes it after the RELEASE of `fh`.
        #[allow(unsafe_code)] let lent = unsafe { reply.wrap_backing(id as u32) }; //+
        reply.opened_passthrough(fh, flags, &lent); //+
        let _ = lent.into_raw(); //+ dropped, it would close the id
    }

    fn read(&self, _: &Request, _: INodeNo, fh: FileHandle, offset: u64, size: u32, _: OpenFlags,
            _: Option<LockOwner>, reply: ReplyData) {
        let mut data = vec![0; size as usize];
        let read = self.handles.get(fh.0).map(|handle| handle.file.read_at(&mut data, offset));
        let Some(Ok(length)) = read else { return reply.error(Errno::EIO) };
        reply.data(&data[..length]);
    }

    fn release(&self, _: &Request, _: INodeNo, fh: FileHandle, _: OpenFlags, _: Option<LockOwner>,
               _: bool, reply: ReplyEmpty) {
        drop(self.handles.release(fh.0));
        reply.ok();
    }
}

fn main() -> Result<(), Box<dyn Error>> {
    let args: Vec<_> = env::args_os().skip(1).collect();
    let [dir, mountpoint] = &args[..] else { return Err("usage: hello DIR MNT".into()) };
    let mut files = vec![(".".into(), File::open(dir)?)];
    for entry in fs::read_dir(dir)?.flatten().filter(|entry| entry.path().is_file()) {
        files.push((entry.file_name(), File::open(entry.path())?));
    }
    let handles = Arc::new(Handles::default()); // passes nothing through before `attach`
    handles.table().on_server_mode(|why| eprintln!("no passthrough: {why}")); //+
    let hello = Hello { files, handles: handles.clone() };
    let session = fuser::Session::new(hello, mountpoint, &fuser::Config::default())?;
    handles.table().attach(FuseDevice::new(session.as_fd().try_clone_to_owned()?)?).or(Err("attached already"))?; //+
    Ok(session.spawn()?.join()?)
}
