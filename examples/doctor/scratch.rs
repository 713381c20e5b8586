//! The scratch mounts. They are attached to no directory, visible to no other process, and disappear
//! with their last fd.

use std::fs::File;
use std::io::{self, Write};
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::sync::Arc;
use std::sync::mpsc::{Receiver, RecvTimeoutError, channel};
use std::thread;

use fuse_backing::FuseDevice;
use fuse_backing::init::MaxStackDepth;
use rustix::fs::{CWD, Mode, OFlags, openat};
use rustix::io::Errno;
use rustix::mount::{
    FsMountFlags, FsOpenFlags, MountAttrFlags, MountPropagationFlags, MoveMountFlags, UnmountFlags,
    fsconfig_create, fsconfig_set_string, fsmount, fsopen, mount_change, move_mount, unmount,
};
use rustix::thread::{UnshareFlags, unshare_unsafe};

use crate::advice::{CHECK_THE_LOG, Failure};
use crate::client::{PATIENCE, within};
use crate::server::{Offer, Server, Shared};

pub(crate) type Device = Arc<FuseDevice>;

/// The directory where `Tmpfs::unmount` attaches the tmpfs briefly. It exists wherever `/dev/fuse` does.
const ATTACH_POINT: &str = "/dev";

/// The name of the file on the tmpfs.
const BACKING: &str = "backing";

/// A separate filesystem for the backing file, so that nothing but the doctor can keep it busy.
pub(crate) struct Tmpfs(OwnedFd);

impl Tmpfs {
    pub(crate) fn new(content: &[u8]) -> Result<Self, Failure> {
        let options = [("size", "4m"), ("mode", "700")];
        let tmpfs = Self(mount("tmpfs", &options)?);
        let flags = OFlags::WRONLY | OFlags::CREATE | OFlags::EXCL;
        let made = tmpfs.open(flags).map_err(io::Error::from);
        made.and_then(|file| File::from(file).write_all(content))
            .map_err(|e| {
                let cause = format!("cannot create the backing file: {e}");
                Failure::new(cause, CHECK_THE_LOG)
            })?;
        Ok(tmpfs)
    }

    /// The backing file.
    pub(crate) fn open(&self, flags: OFlags) -> rustix::io::Result<OwnedFd> {
        openat(&self.0, BACKING, flags | OFlags::CLOEXEC, Mode::RUSR)
    }

    /// Fails with `EBUSY` if anything pins the tmpfs. Call it only in a private mount namespace.
    pub(crate) fn unmount(self) -> rustix::io::Result<()> {
        // Only an attached mount can be unmounted.
        let flags = MoveMountFlags::MOVE_MOUNT_F_EMPTY_PATH;
        move_mount(&self.0, "", CWD, ATTACH_POINT, flags)?;
        drop(self.0);
        let mut unmounted = Err(Errno::BUSY);
        // The kernel drops the last reference to a file some time after close(2).
        within(PATIENCE, || {
            unmounted = unmount(ATTACH_POINT, UnmountFlags::NOFOLLOW);
            unmounted != Err(Errno::BUSY)
        });
        unmounted.inspect_err(|_| {
            // Uncovers the real directory, which later steps need.
            let _ = unmount(ATTACH_POINT, UnmountFlags::DETACH | UnmountFlags::NOFOLLOW);
        })
    }
}

/// A FUSE mount, served by its own thread.
pub(crate) struct Connection {
    pub(crate) device: Device,
    pub(crate) shared: Arc<Shared>,
    mount: OwnedFd,
    offers: Receiver<Offer>,
}

impl Connection {
    pub(crate) fn new(
        device: Device,
        max_stack_depth: MaxStackDepth,
        content: Arc<[u8]>,
    ) -> Result<Self, Failure> {
        let options = [
            ("fd", device.as_fd().as_raw_fd().to_string()),
            ("rootmode", "40000".to_owned()),
            ("user_id", rustix::process::getuid().as_raw().to_string()),
            ("group_id", rustix::process::getgid().as_raw().to_string()),
        ];
        let mount = mount("fuse", &options)?;
        let (sender, offers) = channel();
        let shared: Arc<Shared> = Arc::default();
        let server = Server {
            device: Arc::clone(&device),
            max_stack_depth,
            content,
            shared: Arc::clone(&shared),
            offers: sender,
        };
        // The thread ends with the mount, or else with the process. A client that waits for it then
        // gets an error.
        thread::Builder::new()
            .name("server".to_owned())
            .spawn(move || server.run())
            .map_err(|e| {
                let cause = format!("cannot start a server thread: {e}");
                Failure::new(cause, "check the limit on the number of processes")
            })?;
        Ok(Self {
            device,
            shared,
            mount,
            offers,
        })
    }

    /// What the kernel offered in INIT. Can be called once.
    pub(crate) fn offer(&self) -> Result<Offer, Failure> {
        self.offers.recv_timeout(PATIENCE).map_err(|error| {
            let cause = match error {
                RecvTimeoutError::Timeout => "no INIT request came",
                RecvTimeoutError::Disconnected => "the connection ended before INIT",
            };
            Failure::new(cause, CHECK_THE_LOG)
        })
    }

    /// The root directory, for a client process.
    pub(crate) fn root(&self) -> io::Result<OwnedFd> {
        self.mount.try_clone()
    }

    /// The device, for a client process.
    pub(crate) fn device(&self) -> io::Result<OwnedFd> {
        self.device.as_fd().try_clone_to_owned()
    }
}

/// Enters a new mount namespace, where the process may mount. Must run before other threads start,
/// since a namespace belongs to a thread.
///
/// The inner result says whether mounts stay private when they are attached to a directory.
pub(crate) fn enter_mount_namespace() -> Result<rustix::io::Result<()>, Failure> {
    unshare_mounts().map_err(|errno| refused("unshare(CLONE_NEWNS)", errno))?;
    // Downstream: an unmount outside also happens here, so that no outside mount is kept busy.
    let private = MountPropagationFlags::DOWNSTREAM | MountPropagationFlags::REC;
    Ok(mount_change("/", private))
}

#[allow(
    unsafe_code,
    reason = "unshare(2) can also take fds from other threads"
)]
fn unshare_mounts() -> rustix::io::Result<()> {
    // SAFETY: the flags do not contain CLONE_FILES, so the whole process keeps sharing one set of fds.
    // The call accesses no memory.
    unsafe { unshare_unsafe(UnshareFlags::NEWNS) }
}

fn mount(filesystem: &str, options: &[(&str, impl AsRef<str>)]) -> Result<OwnedFd, Failure> {
    let mount = || {
        let context = fsopen(filesystem, FsOpenFlags::FSOPEN_CLOEXEC)?;
        for (key, value) in options {
            fsconfig_set_string(&context, *key, value.as_ref())?;
        }
        fsconfig_create(&context)?;
        let attributes = MountAttrFlags::MOUNT_ATTR_NOSUID
            | MountAttrFlags::MOUNT_ATTR_NODEV
            | MountAttrFlags::MOUNT_ATTR_NOEXEC;
        fsmount(&context, FsMountFlags::FSMOUNT_CLOEXEC, attributes)
    };
    mount().map_err(|errno| refused(&format!("mounting {filesystem}"), errno))
}

fn refused(what: &str, errno: Errno) -> Failure {
    let advice = match errno {
        Errno::NOSYS => "boot Linux 5.2 or newer, or allow fsopen(2) in the seccomp profile",
        Errno::NODEV => "boot a kernel with this filesystem, or load its module",
        Errno::PERM | Errno::ACCESS => "find the security policy that denies it: seccomp, an LSM",
        _ => CHECK_THE_LOG,
    };
    Failure::new(format!("{what} failed: {errno}"), advice)
}
