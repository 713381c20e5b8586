//! A mounted mirror, from mount(2) until its filesystem has ended.

use std::ffi::CString;
use std::io;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::mpsc::{Receiver, Sender, channel};
use std::thread;
use std::time::Duration;

use fuse_backing::FuseDevice;
use fuse_backing::init::MaxStackDepth;
use fuser::{Config, Session, SessionACL};
use rustix::fs::{AtFlags, CWD, Mode, OFlags, StatVfsMountFlags};
use rustix::io::Errno;
use rustix::mount::{MountFlags, UnmountFlags};

use crate::Result;
use crate::fs::Mirror;
use crate::inodes::{Inodes, identity};
use crate::opens::{Device, Files};
use crate::source;
use crate::status::Status;
use crate::threads;

/// What the code that started a mirror waits for.
pub(crate) enum Event {
    /// Ctrl-C or a termination signal.
    Interrupted,
    /// The mirror was unmounted, by this process or another, and its filesystem has ended.
    Ended(io::Result<()>),
}

/// A channel for a mirror's events. Created before the mirror, so that no event is missed.
pub(crate) struct Events {
    pub(crate) sender: Sender<Event>,
    inbox: Receiver<Event>,
}

impl Events {
    pub(crate) fn new() -> Self {
        let (sender, inbox) = channel();
        Self { sender, inbox }
    }
}

/// A flag in `statvfs` that libc does not define.
const ST_NOSYMFOLLOW: u64 = 0x2000;

/// How to serve.
#[derive(Clone, Copy)]
pub(crate) struct Options {
    pub(crate) passthrough: bool,
    /// Whether to use `HANDLE_KILLPRIV_V2`. Without it, the kernel asks for a file's capabilities before each write.
    pub(crate) killpriv: bool,
    /// With two, the source may be on overlayfs, but nothing can be stacked on the mirror.
    pub(crate) depth: MaxStackDepth,
    /// How long the kernel may keep entries and attributes.
    pub(crate) ttl: Duration,
}

impl Default for Options {
    fn default() -> Self {
        Self {
            passthrough: true,
            killpriv: true,
            depth: MaxStackDepth::Two,
            ttl: Duration::ZERO,
        }
    }
}

/// Unmounted when dropped.
pub(crate) struct Mounted {
    mountpoint: PathBuf,
    /// The `st_dev` of the mirror.
    own: u64,
    attached: bool,
    status: Arc<Status>,
    inbox: Receiver<Event>,
}

impl Mounted {
    /// Mounts a mirror of `source`, and serves it in its own threads. The returned device keeps the
    /// connection alive, and with it the registered files.
    pub(crate) fn new(
        source: &Path,
        mountpoint: &Path,
        options: Options,
        events: Events,
    ) -> Result<(Self, Device)> {
        let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
        let root = rustix::fs::open(source, flags, Mode::empty())
            .map_err(|errno| format!("{}: {errno}", source.display()))?;
        let mountpoint = mountpoint
            .canonicalize()
            .map_err(|e| format!("{}: {e}", mountpoint.display()))?;

        // The device is opened and mounted here, not by `Session::new` of fuser 0.18: at the end of the session
        // that unmounts its mountpoint even if somebody else has unmounted it before, and so removes another
        // mount.
        let device = Arc::new(FuseDevice::open()?);
        let passthrough = options.passthrough.then(|| Arc::clone(&device));
        let files = Arc::new(Files::default());
        let status = Arc::new(Status::of(Arc::downgrade(&files)));
        mount(&device, &root, source, &mountpoint)
            .map_err(|errno| format!("cannot mount at {}: {errno}", mountpoint.display()))?;
        // Needs no reply of the server, which does not run yet.
        let own = device_at(&mountpoint)
            .inspect_err(|_| _ = rustix::mount::unmount(&mountpoint, UnmountFlags::DETACH))?;
        let mounted = Self {
            mountpoint,
            own,
            attached: true,
            status: Arc::clone(&status),
            inbox: events.inbox,
        };
        let inodes = Inodes::new(root, own)?;
        let mirror = Mirror::new(inodes, files, passthrough, options, status)?;

        let mut config = Config::default();
        config.n_threads = Some(threads::MAX);
        config.clone_fd = true;
        let fd = device.as_fd().try_clone_to_owned()?;
        let session = Session::from_fd(mirror, fd, SessionACL::All, config)?;
        thread::Builder::new()
            .name("session".to_owned())
            .spawn(move || {
                // The kernel returns this if the mount goes away while a request is being read.
                let aborted = |error: &io::Error| error.raw_os_error() == Some(libc::ECONNABORTED);
                let ended = match session.run() {
                    Err(error) if aborted(&error) => Ok(()),
                    ended => ended,
                };
                drop(events.sender.send(Event::Ended(ended)));
            })?;
        Ok((mounted, device))
    }

    pub(crate) fn status(&self) -> &Status {
        &self.status
    }

    /// The next event, or `None` if none comes within `patience`.
    pub(crate) fn wait(&mut self, patience: Duration) -> Option<Event> {
        let event = self.inbox.recv_timeout(patience).ok()?;
        if matches!(event, Event::Ended(Ok(()))) {
            self.attached = false;
        }
        Some(event)
    }

    /// Unmounts the mirror. If it is in use, detaches it instead and returns true: it is then served
    /// until the last user is gone.
    pub(crate) fn unmount(&mut self) -> rustix::io::Result<bool> {
        // If the server has failed, somebody may have unmounted it and mounted something else there.
        if !self.attached || device_at(&self.mountpoint)? != self.own {
            return Ok(false);
        }
        let busy = match rustix::mount::unmount(&self.mountpoint, UnmountFlags::empty()) {
            Err(Errno::BUSY) => {
                rustix::mount::unmount(&self.mountpoint, UnmountFlags::DETACH)?;
                true
            }
            // EINVAL: somebody else has unmounted it.
            Ok(()) | Err(Errno::INVAL) => false,
            Err(errno) => return Err(errno),
        };
        self.attached = false;
        Ok(busy)
    }
}

impl Drop for Mounted {
    fn drop(&mut self) {
        if let Err(errno) = self.unmount() {
            eprintln!(
                "mirror: cannot unmount {}: {errno}",
                self.mountpoint.display()
            );
        }
    }
}

/// The `st_dev` of what is mounted there, without asking its server.
fn device_at(mountpoint: &Path) -> rustix::io::Result<u64> {
    let stat = source::look(CWD, mountpoint, AtFlags::empty())?;
    Ok(identity(&stat).0)
}

fn mount(
    device: &Device,
    root: &OwnedFd,
    source: &Path,
    mountpoint: &Path,
) -> rustix::io::Result<()> {
    // The kernel checks permissions by the attributes that the mirror reports, for all users.
    let data = format!(
        "fd={},rootmode=40000,user_id={},group_id={},default_permissions,allow_other",
        device.as_fd().as_raw_fd(),
        rustix::process::getuid().as_raw(),
        rustix::process::getgid().as_raw(),
    );
    let data = CString::new(data).map_err(|_| Errno::INVAL)?;
    // Not more permissive than the source. A FUSE source may fail to report its flags.
    let source_flags = source::mount_flags(root).map_or(0, |flags| flags.bits());
    let mut flags = MountFlags::NOSUID | MountFlags::NODEV;
    flags.set(
        MountFlags::NOEXEC,
        source_flags & StatVfsMountFlags::NOEXEC.bits() != 0,
    );
    flags.set(MountFlags::NOSYMFOLLOW, source_flags & ST_NOSYMFOLLOW != 0);
    rustix::mount::mount(source, mountpoint, "fuse.mirror", flags, &*data)
}
