//! Serves FILE as MNT/file, read-only: `enforced FILE MNT`, as root. The server does not check what a client asks for,
//! and grants everything. Still no client can write (memfds excepted), because of the thread that `registrar` starts.
#![cfg_attr(rustfmt, rustfmt_skip)]
use std::{env, error::Error, ffi::OsStr, fs::File, io, os::fd::AsFd, sync::Arc, time::Duration, time::UNIX_EPOCH};
use fuse_backing::{FopenFlags, FuseDevice, Handles, Opened, init::{MaxStackDepth, negotiate}};
use fuse_backing::rights::{CapabilitySet, Lowered, RegistrarThread};
use fuser::{Errno, FileAttr, FileHandle, FileType, INodeNo, KernelConfig, OpenFlags, Request};
use landlock::{AccessFs, CompatLevel, Compatible, Ruleset, RulesetAttr, RulesetError};

/// A thread that cannot open files for writing. The kernel opens what this thread registers with the thread's rights.
fn registrar(device: FuseDevice) -> io::Result<RegistrarThread<Lowered<FuseDevice>>> {
    let lowered = Lowered::permanently(device, CapabilitySet::empty());
    Ok(RegistrarThread::spawn(lowered, || -> Result<(), RulesetError> {
        let rules = Ruleset::default().set_compatibility(CompatLevel::HardRequirement); // Landlock, or an error
        rules.handle_access(AccessFs::WriteFile | AccessFs::Truncate)?.create()?.restrict_self().map(drop)
    })?)
}
struct Server(File, Arc<Handles<RegistrarThread<Lowered<FuseDevice>>>>);

fn attr(file: &File, ino: INodeNo) -> FileAttr {
    let (kind, perm) = if ino.0 == 1 { (FileType::Directory, 0o755) } else { (FileType::RegularFile, 0o666) };
    FileAttr { ino, kind, perm, atime: UNIX_EPOCH, mtime: UNIX_EPOCH, ctime: UNIX_EPOCH, crtime: UNIX_EPOCH, nlink: 1,
               size: file.metadata().map_or(0, |file| file.len()), blocks: 0, uid: 0, gid: 0, rdev: 0, blksize: 4096, flags: 0 }
}

impl fuser::Filesystem for Server {
    fn init(&mut self, _: &Request, config: &mut KernelConfig) -> io::Result<()> {
        let reply = negotiate(config.capabilities().bits(), 0, MaxStackDepth::One)?;
        config.add_capabilities(fuser::InitFlags::from_bits_retain(reply.flags.bits())).or(Err(io::ErrorKind::Other))?;
        config.set_max_stack_depth(reply.max_stack_depth).map(drop).or(Err(io::ErrorKind::Other.into()))
    }
    fn lookup(&self, _: &Request, _: INodeNo, _: &OsStr, reply: fuser::ReplyEntry) {
        reply.entry(&Duration::ZERO, &attr(&self.0, INodeNo(2)), fuser::Generation(0));
    }
    fn getattr(&self, _: &Request, ino: INodeNo, _: Option<FileHandle>, reply: fuser::ReplyAttr) {
        reply.attr(&Duration::ZERO, &attr(&self.0, ino));
    }
    fn open(&self, _: &Request, ino: INodeNo, _client_flags: OpenFlags, reply: fuser::ReplyOpen) {
        let opened = self.0.try_clone().and_then(|file| Ok(self.1.open(&ino.0, 0, file, FopenFlags::empty())?));
        let Ok(Opened { fh, backing_id: Some(id), .. }) = opened else { return reply.error(Errno::EIO) };
        // SAFETY: the handles registered it with this session, and keep it until RELEASE.
        #[allow(unsafe_code)] let lent = unsafe { reply.wrap_backing(id as u32) };
        reply.opened_passthrough(FileHandle(fh), fuser::FopenFlags::empty(), &lent);
        let _ = lent.into_raw();
    }
    fn release(&self, _: &Request, _: INodeNo, fh: FileHandle, _: OpenFlags, _: Option<fuser::LockOwner>, _: bool,
               reply: fuser::ReplyEmpty) {
        drop(self.1.release(fh.0)); reply.ok();
    }
}

fn main() -> Result<(), Box<dyn Error>> {
    let args: Vec<_> = env::args_os().skip(1).collect();
    let [file, mountpoint] = &args[..] else { return Err("usage: enforced FILE MNT".into()) };
    let handles = Arc::new(Handles::default());
    let session = fuser::Session::new(Server(File::open(file)?, handles.clone()), mountpoint, &fuser::Config::default())?;
    handles.table().attach(registrar(FuseDevice::new(session.as_fd().try_clone_to_owned()?)?)?).or(Err("attached already"))?;
    Ok(session.spawn()?.join()?)
}
