//! Serves the files of a directory read-only, and lets the kernel read them itself. The lines marked `//+` are what
//! passthrough adds to a server that keeps its open files in a map. As root: `hello DIR MNT`, until MNT is unmounted.
#![cfg_attr(rustfmt, rustfmt_skip)]

use std::{env, ffi::OsStr, ffi::OsString, fs, fs::File, io, os::unix::prelude::*, sync::Arc, time::Duration};
use fuse_backing::{FuseDevice, Handles, init::MaxStackDepth, init::negotiate}; //+
use fuser::*;

struct Hello {
    files: Vec<OsString>, // in the working directory: inode 1 is ".", inode 2 the first file in it
    handles: Arc<Handles>, //+
}

fn attr(ino: INodeNo, file: &OsStr) -> io::Result<FileAttr> {
    let file = fs::metadata(file)?;
    let kind = if file.is_dir() { FileType::Directory } else { FileType::RegularFile };
    let (atime, mtime) = (file.accessed()?, file.modified()?);
    Ok(FileAttr {
        ino, kind, perm: (file.mode() & 0o7777) as u16, nlink: 1, uid: file.uid(), gid: file.gid(), rdev: 0, flags: 0,
        size: file.size(), blocks: file.blocks(), blksize: 4096, atime, mtime, ctime: mtime, crtime: mtime,
    })
}

impl Filesystem for Hello {
    fn init(&mut self, _: &Request, config: &mut KernelConfig) -> io::Result<()> {
        let reply = negotiate(config.capabilities().bits(), 0, MaxStackDepth::One); //+
        let Ok(reply) = reply.inspect_err(|why| eprintln!("no passthrough: {why}")) else { return Ok(()) }; //+
        config.add_capabilities(InitFlags::from_bits_retain(reply.flags.bits())).or(Err(io::ErrorKind::Other))?; //+
        config.set_max_stack_depth(reply.max_stack_depth).map(drop).or(Err(io::ErrorKind::Other.into())) //+
    }

    fn lookup(&self, _: &Request, _: INodeNo, name: &OsStr, reply: ReplyEntry) {
        let ino = self.files.iter().zip(1..).find_map(|(file, ino)| (file == name).then_some(INodeNo(ino)));
        let Some(Ok(attr)) = ino.map(|ino| attr(ino, name)) else { return reply.error(Errno::ENOENT) };
        reply.entry(&Duration::ZERO, &attr, Generation(0));
    }
    fn getattr(&self, _: &Request, ino: INodeNo, _: Option<FileHandle>, reply: ReplyAttr) {
        let Ok(attr) = attr(ino, &self.files[ino.0 as usize - 1]) else { return reply.error(Errno::ENOENT) };
        reply.attr(&Duration::ZERO, &attr);
    }
    fn readdir(&self, _: &Request, _: INodeNo, _: FileHandle, offset: u64, mut reply: ReplyDirectory) {
        for (file, ino) in self.files.iter().zip(1..).skip(1.max(offset as usize)) {
            if reply.add(INodeNo(ino), ino, FileType::RegularFile, file) { break }
        }
        reply.ok();
    }

    fn open(&self, _: &Request, ino: INodeNo, flags: OpenFlags, reply: ReplyOpen) {
        let open = |file| Ok(self.handles.open(&ino.0, flags.0, file, 0)?); //+
        let opened = File::open(&self.files[ino.0 as usize - 1]).and_then(open);
        let opened = match opened { Ok(opened) => opened, Err(error) => return reply.error(error.into()) };
        let (fh, flags) = (FileHandle(opened.fh), FopenFlags::from_bits_retain(opened.open_flags.bits())); //+
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

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let [_, dir, mount] = &env::args_os().collect::<Vec<_>>()[..] else { return Err("usage: hello DIR MNT".into()) };
    let mount = fs::canonicalize(mount)?;
    env::set_current_dir(dir)?; // it can be MNT too: what is opened here is not on the mount
    let files = fs::read_dir(".")?.flatten().filter(|entry| entry.path().is_file()).map(|entry| entry.file_name());
    let files = [".".into()].into_iter().chain(files).collect();
    let handles = Arc::new(Handles::default()); // passes nothing through before `attach`
    handles.table().on_server_mode(|why| eprintln!("no passthrough: {why}")); //+
    let session = Session::new(Hello { files, handles: handles.clone() }, mount, &Config::default())?;
    handles.table().attach(FuseDevice::new(session.as_fd().try_clone_to_owned()?)?).or(Err("attached already"))?; //+
    Ok(session.spawn()?.join()?)
}
