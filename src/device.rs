//! [`FuseDevice`]: a file descriptor known to be `/dev/fuse`.

use std::fs::File;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd, RawFd};
use std::rc::Rc;
use std::sync::Arc;

use rustix::fs::{FileType, Mode, OFlags, fcntl_getfl, fstat, major, minor, open};
use rustix::io::Errno;
use static_assertions::{assert_eq_size, assert_impl_all, assert_not_impl_any};

use crate::error::{BackingCloseError, BackingError, DeviceError, NotFuseDevice};
use crate::id::BackingId;
use crate::{diagnose, ioctl};

/// `MISC_MAJOR` and `FUSE_MINOR` of the kernel's `linux/major.h` and `linux/miscdevice.h`.
const DEVICE_NUMBER: (u32, u32) = (10, 229);

/// A file descriptor known to be `/dev/fuse`.
///
/// A FUSE *connection* is what a mount and its server share. mount(2) attaches a device fd to a new connection, for the
/// life of the fd. [`clone_connection`](Self::clone_connection) attaches further fds.
///
/// `Fd` holds the fd, see [`DeviceFd`], and is dropped with the `FuseDevice`. [`new`](Self::new) checks the fd once: a
/// `DeviceFd` always names the same file.
///
/// # Examples
///
/// ```no_run
/// # fn serve(server_device: std::os::fd::OwnedFd) -> std::io::Result<()> {
/// // The fd that the server handed to mount(2), or got from fusermount3.
/// let device = fuse_backing::FuseDevice::new(server_device)?;
/// let id = device.backing_open(std::fs::File::open("/srv/data/file")?)?;
/// // ... answer OPEN with FOPEN_PASSTHROUGH and id.as_raw(), and after the last RELEASE:
/// device.backing_close(id)?;
/// # Ok(()) }
/// ```
#[derive(Clone, Debug)]
pub struct FuseDevice<Fd: DeviceFd = OwnedFd> {
    // Has passed `check`.
    fd: Fd,
}

/// A holder of an fd that a [`FuseDevice`] can have: an [`OwnedFd`], a [`File`], a [`BorrowedFd`], or a reference,
/// [`Arc`], [`Rc`] or [`Box`] of one of these.
///
/// The trait is sealed: an arbitrary [`AsFd`] could name another fd at each call, and an ioctl meant for `/dev/fuse`
/// would reach another driver. ([`FuseDevice::new`] refuses fds 0 to 2 for the same reason.) Borrow the fd of any other
/// holder:
///
/// ```no_run
/// # fn f(session: impl std::os::fd::AsFd) -> std::io::Result<()> {
/// let device = fuse_backing::FuseDevice::new(session.as_fd())?;
/// # Ok(()) }
/// ```
pub trait DeviceFd: AsFd + sealed::Sealed {}

mod sealed {
    pub trait Sealed {}
}

/// Only for types whose `as_fd` names the same open file for as long as the value lives, by the rules of I/O safety.
macro_rules! device_fd {
    ($([$($generics:tt)*] $holder:ty,)*) => { $(
        impl<$($generics)*> sealed::Sealed for $holder {}
        impl<$($generics)*> DeviceFd for $holder {}
    )* };
}

device_fd! {
    [] OwnedFd,
    [] File,
    [] BorrowedFd<'_>,
    [Fd: DeviceFd] &Fd,
    [Fd: DeviceFd] Arc<Fd>,
    [Fd: DeviceFd] Rc<Fd>,
    [Fd: DeviceFd] Box<Fd>,
}

assert_not_impl_any!(std::io::Stdin: DeviceFd);

assert_impl_all!(FuseDevice<OwnedFd>: Send, Sync);
// The fd alone: no lock, no cache, no state that could disagree with the kernel's.
assert_eq_size!(FuseDevice<OwnedFd>, OwnedFd);

impl FuseDevice<OwnedFd> {
    /// `open("/dev/fuse", O_RDWR | O_CLOEXEC)` — Opens a device that is not attached to a connection yet. Its fd goes
    /// into mount(2)'s data: `fd=N,rootmode=40000,user_id=0,group_id=0`.
    ///
    /// # Errors
    ///
    /// [`DeviceError`]: there is no such node, or no driver for it; it may not be opened; or it is another file.
    pub fn open() -> Result<Self, DeviceError> {
        let flags = OFlags::RDWR | OFlags::CLOEXEC;
        let fd = open("/dev/fuse", flags, Mode::empty()).map_err(|errno| match errno {
            Errno::NOENT => DeviceError::Missing,
            Errno::NODEV | Errno::NXIO => DeviceError::NoDriver(errno),
            Errno::ACCESS | Errno::PERM => DeviceError::Denied(errno),
            errno => DeviceError::Other(errno),
        })?;
        Self::new(fd).map_err(|refused| refused.cause())
    }
}

impl<Fd: DeviceFd> FuseDevice<Fd> {
    /// `fstat(fd)`, `fcntl(fd, F_GETFL)` — Takes an fd that must be the character device 10:229.
    ///
    /// The first [`backing_open`](Self::backing_open) shows whether the device is attached and passthrough was
    /// negotiated.
    ///
    /// # Errors
    ///
    /// [`NotFuseDevice`] gives the fd back and says what it is instead. `?` converts it into an [`std::io::Error`].
    ///
    /// # Examples
    ///
    /// ```
    /// use fuse_backing::{FuseDevice, error::DeviceError};
    ///
    /// let refused = FuseDevice::new(std::fs::File::open("/dev/null")?).unwrap_err();
    /// assert_eq!(refused.cause(), DeviceError::OtherDevice { major: 1, minor: 3 });
    /// let _still_open: std::fs::File = refused.into_inner();
    /// # Ok::<(), std::io::Error>(())
    /// ```
    pub fn new(fd: Fd) -> Result<Self, NotFuseDevice<Fd>> {
        match check(fd.as_fd()) {
            Ok(()) => Ok(Self { fd }),
            Err(reason) => Err(NotFuseDevice::new(fd, reason)),
        }
    }

    /// Gives the `Fd` back.
    #[must_use]
    pub fn into_inner(self) -> Fd {
        self.fd
    }

    /// `ioctl(device, FUSE_DEV_IOC_BACKING_OPEN, {fd})` — Registers a file with the connection, for the kernel to read
    /// and write.
    ///
    /// The id goes into OPEN and CREATE replies, see [`OpenReply`]. [`BackingFile::open`] returns a guard that closes
    /// the id.
    ///
    /// `fd` may be closed at once: the kernel takes its own reference, which neither `RLIMIT_NOFILE` nor lsof knows of.
    /// Until the id is closed, the file stays open as `fd` is: with its flock(2), and as a writer if it can write
    /// (`ETXTBSY`, no leases, no read-only remount). An `O_PATH` fd causes none of this, and can be registered too.
    ///
    /// # Requirements
    ///
    /// - Linux 6.9 with `CONFIG_FUSE_PASSTHROUGH`.
    /// - The connection's INIT reply had `FUSE_INIT_EXT` and `FUSE_PASSTHROUGH`, not
    ///   `FUSE_WRITEBACK_CACHE`, and a `max_stack_depth` of 1 or 2.
    /// - The calling *thread* has `CAP_SYS_ADMIN` in the initial user namespace.
    /// - `fd` is a regular file on a filesystem of a lower stack depth than `max_stack_depth`. From Linux 6.12 on it
    ///   may be an `O_PATH` fd.
    ///
    /// # Security
    ///
    /// **The access mode of `fd` restricts nothing.** At each open the kernel opens the file's path again, with the
    /// *client's* flags, the credentials of the thread that registered it, and no permission check: a client that opens
    /// the FUSE file for writing writes to a file that was registered through a read-only or `O_PATH` fd. Compare the
    /// client's flags with an [`Access`](crate::Access), as [`OpenReply::passthrough`] does. For lower credentials see
    /// [`rights`](crate::rights).
    ///
    /// # Errors
    ///
    /// [`BackingError`], one variant for each cause. Nothing stays registered.
    ///
    /// # Examples
    ///
    /// ```no_run
    /// # fn f(device: fuse_backing::FuseDevice) -> Result<(), Box<dyn std::error::Error>> {
    /// use fuse_backing::error::{BackingError, NotPermitted};
    ///
    /// match device.backing_open(std::fs::File::open("/srv/data/file")?) {
    ///     Ok(id) => println!("registered as {}", id.as_raw()),
    ///     Err(BackingError::NotPermitted(NotPermitted::MissingCapability)) => println!("run as root"),
    ///     Err(e) => println!("serving this file without passthrough: {e} ({:?})", e.scope()),
    /// }
    /// # Ok(()) }
    /// ```
    ///
    /// # References
    ///
    /// `fuse_backing_open` in `fs/fuse/backing.c` (6.9 to 6.17: `passthrough.c`); `tests/kernel/backing_open.rs`,
    /// `tests/kernel/passthrough.rs`.
    ///
    /// [`OpenReply`]: crate::OpenReply
    /// [`OpenReply::passthrough`]: crate::OpenReply::passthrough
    /// [`BackingFile::open`]: crate::BackingFile::open
    #[doc(alias = "FUSE_DEV_IOC_BACKING_OPEN")]
    #[inline]
    pub fn backing_open(&self, fd: impl AsFd) -> Result<BackingId, BackingError> {
        let (device, backing) = (self.fd.as_fd(), fd.as_fd());
        match ioctl::backing_open(device, backing) {
            Ok(raw) => BackingId::from_raw(raw).ok_or(BackingError::InvalidId(raw)),
            Err(errno) => Err(diagnose::open(device, backing, errno)),
        }
    }

    /// `ioctl(device, FUSE_DEV_IOC_BACKING_CLOSE, &id)` — Closes a backing id.
    ///
    /// Files that are open through the id go on working. A later OPEN reply with the id gives the client `EIO`. So
    /// close it after the *last* RELEASE of the inode, not after the reply: the kernel looks the id up only when it has
    /// read the reply.
    ///
    /// This works after the connection was aborted or unmounted. It needs the same capability as registering: a server
    /// that has dropped `CAP_SYS_ADMIN` can close nothing.
    ///
    /// # Errors
    ///
    /// [`BackingCloseError`] has the [cause](BackingCloseError::cause), and gives the id back: another thread may have
    /// the capability.
    ///
    /// # Examples
    ///
    /// An id is closed once:
    ///
    /// ```compile_fail,E0382
    /// # fn f(device: fuse_backing::FuseDevice, id: fuse_backing::BackingId) {
    /// let first = device.backing_close(id);
    /// let second = device.backing_close(id);
    /// # }
    /// ```
    ///
    /// # References
    ///
    /// `fuse_backing_close` in `fs/fuse/backing.c` (6.9 to 6.17: `passthrough.c`); `tests/kernel/backing_close.rs`.
    #[doc(alias = "FUSE_DEV_IOC_BACKING_CLOSE")]
    #[inline]
    pub fn backing_close(&self, id: BackingId) -> Result<(), BackingCloseError<BackingId>> {
        let device = self.fd.as_fd();
        ioctl::backing_close(device, id.as_raw())
            .map_err(|errno| BackingCloseError::new(id, diagnose::close(device, errno)))
    }

    /// `ioctl(open("/dev/fuse"), FUSE_DEV_IOC_CLONE, &device)` — Opens a further device fd and attaches it to the same
    /// connection.
    ///
    /// Each clone has its own queue of requests in process, so threads that answer them contend less. Backing ids
    /// belong to the connection: any of its fds can register and close them. The connection, and with it every id,
    /// lives until the mount *and* all device fds of the connection are gone.
    ///
    /// # Errors
    ///
    /// [`DeviceError`]: this needs Linux 4.2, and a device that is attached to a connection, which mount(2) does.
    ///
    /// # Examples
    ///
    /// ```no_run
    /// # fn f(device: fuse_backing::FuseDevice, id: fuse_backing::BackingId) -> std::io::Result<()> {
    /// device.clone_connection()?.backing_close(id)?;
    /// # Ok(()) }
    /// ```
    ///
    /// # References
    ///
    /// `fuse_dev_ioctl_clone` in `fs/fuse/dev.c`; `tests/kernel/clone.rs`.
    #[doc(alias = "FUSE_DEV_IOC_CLONE")]
    pub fn clone_connection(&self) -> Result<FuseDevice<OwnedFd>, DeviceError> {
        let device = FuseDevice::open()?;
        ioctl::clone(device.as_fd(), self.fd.as_fd())
            .map_err(|errno| diagnose::clone(self.fd.as_fd(), errno))?;
        Ok(device)
    }

    /// `ioctl(device, FUSE_DEV_IOC_SYNC_INIT)` — Makes the mount(2) of this device wait until INIT was answered.
    ///
    /// Without it mount(2) returns at once, and a registration made before the INIT reply was written fails with
    /// `EPERM`. With it the server must answer INIT from another thread than the one that mounts. **Reads of the device
    /// and its other ioctls block until it is mounted**: [`backing_open`](Self::backing_open) does, interruptibly.
    ///
    /// The thread that answers INIT must go on serving. Requests can arrive before mount(2) returns: `SELinux` causes a
    /// GETATTR.
    ///
    /// **A process that waits for INIT in mount(2) cannot be killed on early releases** (CVE-2026-31713, seen on Linux
    /// 6.18.5, 6.18.15 and 6.19.14, not on 6.18.44 nor from 7.0.4 on). If INIT is never answered, the process stays in
    /// state `D`, even after `SIGKILL`. Writing to `/sys/fs/fuse/connections/N/abort` frees it. Until the mount is
    /// visible, the `fuse_connection:` line in `/proc/PID/fdinfo/FD` of the device has N.
    ///
    /// # Errors
    ///
    /// [`DeviceError`]: this needs Linux 6.18, and a device that is not attached yet.
    ///
    /// # Examples
    ///
    /// ```no_run
    /// use fuse_backing::{FuseDevice, error::DeviceError};
    ///
    /// match FuseDevice::open()?.sync_init() {
    ///     // Before Linux 6.18, mount(2) returns before INIT was answered.
    ///     Ok(()) | Err(DeviceError::UnsupportedKernel { .. }) => {}
    ///     Err(e) => return Err(e),
    /// }
    /// # Ok::<(), DeviceError>(())
    /// ```
    ///
    /// # References
    ///
    /// `fuse_dev_ioctl_sync_init` in `fs/fuse/dev.c`; `tests/kernel/sync_init.rs`.
    #[doc(alias = "FUSE_DEV_IOC_SYNC_INIT")]
    pub fn sync_init(&self) -> Result<(), DeviceError> {
        ioctl::sync_init(self.fd.as_fd()).map_err(|errno| match errno {
            Errno::NOTTY => DeviceError::UnsupportedKernel { needs: "6.18" },
            Errno::NOSYS => DeviceError::Unimplemented,
            Errno::INVAL => DeviceError::AlreadyAttached,
            errno => DeviceError::Other(errno),
        })
    }
}

impl<Fd: DeviceFd> AsFd for FuseDevice<Fd> {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}

impl<Fd: DeviceFd> AsRawFd for FuseDevice<Fd> {
    fn as_raw_fd(&self) -> RawFd {
        self.fd.as_fd().as_raw_fd()
    }
}

/// The same as [`FuseDevice::new`].
impl TryFrom<OwnedFd> for FuseDevice<OwnedFd> {
    type Error = NotFuseDevice<OwnedFd>;

    fn try_from(fd: OwnedFd) -> Result<Self, Self::Error> {
        Self::new(fd)
    }
}

/// The same as [`FuseDevice::into_inner`].
impl From<FuseDevice<OwnedFd>> for OwnedFd {
    fn from(device: FuseDevice<OwnedFd>) -> Self {
        device.fd
    }
}

fn check(fd: BorrowedFd<'_>) -> Result<(), DeviceError> {
    // Safe functions can redirect fds 0 to 2 to another file, even if this fd is owned.
    if fd.as_raw_fd() <= 2 {
        return Err(DeviceError::StandardStream);
    }
    let stat = fstat(fd).map_err(DeviceError::Other)?;
    let file_type = FileType::from_raw_mode(stat.st_mode);
    if file_type != FileType::CharacterDevice {
        return Err(DeviceError::NotCharacterDevice(file_type));
    }
    let (major, minor) = (major(stat.st_rdev), minor(stat.st_rdev));
    if (major, minor) != DEVICE_NUMBER {
        return Err(DeviceError::OtherDevice { major, minor });
    }
    let flags = fcntl_getfl(fd).map_err(DeviceError::Other)?;
    if flags.contains(OFlags::PATH) {
        return Err(DeviceError::PathOnly);
    }
    Ok(())
}
