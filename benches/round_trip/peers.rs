//! The same two calls through libc, nix and fuser.

#![allow(unsafe_code)]

use std::os::fd::{AsFd, AsRawFd, BorrowedFd};
use std::sync::mpsc::{Receiver, Sender, channel};
use std::thread::JoinHandle;
use std::time::{Duration, SystemTime};

use fuse_backing::{FuseDevice, uapi};
use libtest_mimic::Failed;

use crate::bare::Map;
use crate::client::Client;
use crate::fuse::{attach, watched};
use crate::sandbox::Sandbox;

pub mod libc_ioctl {
    use super::*;

    #[inline]
    pub fn open(device: BorrowedFd<'_>, file: BorrowedFd<'_>) -> i32 {
        let map = Map::new(file);
        let request = uapi::FUSE_DEV_IOC_BACKING_OPEN;
        // SAFETY: the kernel reads `map`, of the size that the request encodes.
        unsafe { libc::ioctl(device.as_raw_fd(), request as _, &raw const map) }
    }

    #[inline]
    pub fn close(device: BorrowedFd<'_>, id: i32) -> i32 {
        let request = uapi::FUSE_DEV_IOC_BACKING_CLOSE;
        // SAFETY: the kernel reads `id`, of the size that the request encodes.
        unsafe { libc::ioctl(device.as_raw_fd(), request as _, &raw const id) }
    }
}

pub mod nix_macros {
    use super::*;

    #[allow(
        clippy::multiple_unsafe_ops_per_block,
        reason = "nix's macros generate it"
    )]
    mod generated {
        nix::ioctl_write_ptr!(backing_open, 229, 1, super::Map);
        nix::ioctl_write_ptr!(backing_close, 229, 2, u32);
    }

    #[inline]
    pub fn open(device: BorrowedFd<'_>, file: BorrowedFd<'_>) -> nix::Result<i32> {
        let map = Map::new(file);
        // SAFETY: `map` lives as long as the call.
        unsafe { generated::backing_open(device.as_raw_fd(), &raw const map) }
    }

    #[inline]
    pub fn close(device: BorrowedFd<'_>, id: u32) -> nix::Result<i32> {
        // SAFETY: `id` lives as long as the call.
        unsafe { generated::backing_close(device.as_raw_fd(), &raw const id) }
    }
}

/// A mount that fuser serves, with an unanswered OPEN. Its `ReplyOpen` is the only public way to make
/// fuser's `BackingId`, and can make any number of them.
pub struct FuserSession {
    pub reply: Option<fuser::ReplyOpen>,
    pub device: FuseDevice,
    mountpoint: std::path::PathBuf,
    abort: std::sync::Arc<std::fs::File>,
    session: Option<JoinHandle<()>>,
    client: Option<Client>,
}

/// The role of the client process.
pub fn open_and_wait(args: &[String]) -> Result<String, Box<dyn std::error::Error>> {
    // The open returns when the measurement is over.
    Ok(format!("{:?}", std::fs::File::open(&args[0])))
}

impl FuserSession {
    pub fn start(sandbox: &Sandbox) -> Result<Self, Failed> {
        let device = FuseDevice::open()?.into_inner();
        let mountpoint = sandbox.folder("fuser")?;
        attach(&device, &mountpoint)?;
        let abort = watched(sandbox, &mountpoint)?;

        let (sender, replies): (Sender<_>, Receiver<_>) = channel();
        let fd = device.try_clone()?;
        let acl = fuser::SessionACL::All;
        let session = fuser::Session::from_fd(OneFile(sender), fd, acl, fuser::Config::default())?;
        let session = std::thread::spawn(move || drop(session.run()));
        let file = mountpoint.join("file");
        let client = Client::start("open-and-wait", &[file.as_os_str()])?;
        let reply = replies.recv_timeout(Duration::from_secs(10))?;
        Ok(Self {
            reply: Some(reply),
            device: FuseDevice::new(device)?,
            mountpoint,
            abort,
            session: Some(session),
            client: Some(client),
        })
    }

    pub fn reply(&self) -> &fuser::ReplyOpen {
        self.reply.as_ref().expect("it is answered at the end")
    }
}

impl Drop for FuserSession {
    fn drop(&mut self) {
        if let Some(reply) = self.reply.take() {
            reply.error(fuser::Errno::EIO);
        }
        drop(self.client.take().map(Client::finish));
        let _ = std::io::Write::write_all(&mut self.abort.as_ref(), b"1");
        let _ = rustix::mount::unmount(&self.mountpoint, rustix::mount::UnmountFlags::DETACH);
        if let Some(session) = self.session.take() {
            let _ = session.join();
        }
    }
}

/// Sends the `ReplyOpen` of an OPEN to the bench.
struct OneFile(Sender<fuser::ReplyOpen>);

impl fuser::Filesystem for OneFile {
    fn init(
        &mut self,
        _: &fuser::Request,
        config: &mut fuser::KernelConfig,
    ) -> std::io::Result<()> {
        let _ = config.add_capabilities(fuser::InitFlags::FUSE_PASSTHROUGH);
        let _ = config.set_max_stack_depth(1);
        Ok(())
    }

    fn lookup(
        &self,
        _: &fuser::Request,
        _: fuser::INodeNo,
        _: &std::ffi::OsStr,
        reply: fuser::ReplyEntry,
    ) {
        let attr = fuser::FileAttr {
            ino: fuser::INodeNo(2),
            size: 0,
            blocks: 0,
            atime: SystemTime::UNIX_EPOCH,
            mtime: SystemTime::UNIX_EPOCH,
            ctime: SystemTime::UNIX_EPOCH,
            crtime: SystemTime::UNIX_EPOCH,
            kind: fuser::FileType::RegularFile,
            perm: 0o666,
            nlink: 1,
            uid: 0,
            gid: 0,
            rdev: 0,
            blksize: 4096,
            flags: 0,
        };
        reply.entry(&Duration::from_secs(60), &attr, fuser::Generation(0));
    }

    fn open(
        &self,
        _: &fuser::Request,
        _: fuser::INodeNo,
        _: fuser::OpenFlags,
        reply: fuser::ReplyOpen,
    ) {
        let _ = self.0.send(reply);
    }
}

/// fuser's calls, as its users make them.
impl FuserSession {
    #[inline]
    pub fn open(&self, file: BorrowedFd<'_>) -> fuser::BackingId {
        self.reply().open_backing(file).expect("registered")
    }

    pub fn create_raw(device: impl AsFd, file: BorrowedFd<'_>) -> std::io::Result<u32> {
        fuser::BackingId::create_raw(device, file)
    }
}
