//! The scratch mounts. They are attached to no directory, seen by nobody else, and gone with the
//! last fd of theirs.

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

/// Where the tmpfs is attached for a moment: a directory that is there wherever `/dev/fuse` is.
const FOR_A_MOMENT: &str = "/dev";

/// The name of the file on the tmpfs.
const BACKING: &str = "backing";

/// A filesystem of its own for the backing file, so that nothing but the doctor can keep it busy.
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

    /// Fails with `EBUSY` if anything pins it. In a private mount namespace only.
    pub(crate) fn unmount(self) -> rustix::io::Result<()> {
        // To be unmounted it has to be attached.
        let flags = MoveMountFlags::MOVE_MOUNT_F_EMPTY_PATH;
        move_mount(&self.0, "", CWD, FOR_A_MOMENT, flags)?;
        drop(self.0);
        let mut unmounted = Err(Errno::BUSY);
        // The last reference to a file is dropped some time after close(2).
        within(PATIENCE, || {
            unmounted = unmount(FOR_A_MOMENT, UnmountFlags::NOFOLLOW);
            unmounted != Err(Errno::BUSY)
        });
        unmounted.inspect_err(|_| {
            // What was there before is needed again.
            let _ = unmount(FOR_A_MOMENT, UnmountFlags::DETACH | UnmountFlags::NOFOLLOW);
        })
    }
}

/// A FUSE mount, served by a thread of its own.
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
        // It ends with the mount, or else with the process: whoever waits for it then gets an
        // error.
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

    /// What the kernel offered. To be asked once.
    pub(crate) fn offer(&self) -> Result<Offer, Failure> {
        self.offers.recv_timeout(PATIENCE).map_err(|error| {
            let cause = match error {
                RecvTimeoutError::Timeout => "no INIT request came",
                RecvTimeoutError::Disconnected => "the connection ended before INIT",
            };
            Failure::new(cause, CHECK_THE_LOG)
        })
    }

    /// For a client: the root directory.
    pub(crate) fn root(&self) -> io::Result<OwnedFd> {
        self.mount.try_clone()
    }

    /// For a client: the device.
    pub(crate) fn device(&self) -> io::Result<OwnedFd> {
        self.device.as_fd().try_clone_to_owned()
    }
}

/// Leaves the machine's mount namespace for one of its own, where it may mount. Before any thread
/// is started, since a namespace belongs to a thread.
///
/// What it returns then is whether a mount stays private there when it is attached to a directory.
pub(crate) fn enter_mount_namespace() -> Result<rustix::io::Result<()>, Failure> {
    unshare_mounts().map_err(|errno| refused("unshare(CLONE_NEWNS)", errno))?;
    // What is unmounted outside is unmounted here too: nothing is kept busy.
    let private = MountPropagationFlags::DOWNSTREAM | MountPropagationFlags::REC;
    Ok(mount_change("/", private))
}

#[allow(
    unsafe_code,
    reason = "unshare(2) can also take fds from other threads"
)]
fn unshare_mounts() -> rustix::io::Result<()> {
    // SAFETY: the flags have no CLONE_FILES, so that the fds stay those of the whole process; no
    // memory is concerned.
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
