//! Finds the cause behind an ambiguous errno.
//!
//! After a failed ioctl, these functions look at the device, the backing fd and the calling thread. If they cannot be
//! certain, they report an unknown cause. [`registering_permitted`] is also called before there is an ioctl.

use std::os::fd::BorrowedFd;

use rustix::fs::{FileType, OFlags, fcntl_getfl, fstat, statfs};
use rustix::io::{Errno, write};
use rustix::thread::{CapabilitySet, capabilities};

use crate::error::{BackingError, DeviceError, NotPermitted};
use crate::ioctl;

#[cold]
pub(crate) fn open(device: BorrowedFd<'_>, backing: BorrowedFd<'_>, errno: Errno) -> BackingError {
    let not_regular = |if_regular: BackingError| match file_type(backing) {
        Some(FileType::RegularFile) => if_regular,
        Some(file_type) => BackingError::NotRegularFile { file_type, errno },
        None => BackingError::Other(errno),
    };
    match errno {
        Errno::OPNOTSUPP => match passthrough_is_compiled_in(device) {
            Some(true) => not_regular(BackingError::FileNotSupported),
            Some(false) => BackingError::DisabledInKernel,
            None => BackingError::Other(errno),
        },
        Errno::INVAL if is_attached(device) != Some(false) => {
            not_regular(BackingError::Other(errno))
        }
        Errno::ISDIR => BackingError::NotRegularFile {
            file_type: file_type(backing).unwrap_or(FileType::Directory),
            errno,
        },
        Errno::LOOP => BackingError::StackedTooDeep,
        // The device itself was closed behind its owner's back.
        Errno::BADF if fcntl_getfl(device).is_err() => BackingError::Other(errno),
        Errno::BADF => match fcntl_getfl(backing) {
            Ok(flags) if flags.contains(OFlags::PATH) => BackingError::PathOnlyFd,
            Ok(_) => BackingError::Other(errno),
            Err(_) => BackingError::BadFd,
        },
        Errno::NOMEM => BackingError::OutOfMemory,
        Errno::NOSPC => BackingError::OutOfIds,
        errno => open_or_close(device, errno),
    }
}

#[cold]
pub(crate) fn close(device: BorrowedFd<'_>, errno: Errno) -> BackingError {
    match errno {
        Errno::NOENT => BackingError::UnknownId,
        Errno::OPNOTSUPP => BackingError::DisabledInKernel,
        errno => open_or_close(device, errno),
    }
}

/// Errnos that have the same causes at registering and closing.
fn open_or_close(device: BorrowedFd<'_>, errno: Errno) -> BackingError {
    match errno {
        Errno::NOTTY => BackingError::UnsupportedKernel,
        Errno::NOSYS => BackingError::Unimplemented,
        Errno::PERM | Errno::INVAL if is_attached(device) == Some(false) => {
            BackingError::NotAttached(errno)
        }
        Errno::PERM => BackingError::NotPermitted(not_permitted(device)),
        Errno::INTR => BackingError::Interrupted,
        errno => BackingError::Other(errno),
    }
}

#[cold]
pub(crate) fn clone(source: BorrowedFd<'_>, errno: Errno) -> DeviceError {
    match errno {
        Errno::PERM | Errno::INVAL if is_attached(source) == Some(false) => {
            DeviceError::NotAttached(errno)
        }
        Errno::NOTTY => DeviceError::UnsupportedKernel { needs: "4.2" },
        Errno::NOSYS => DeviceError::Unimplemented,
        errno => DeviceError::Other(errno),
    }
}

/// Whether the device is, or was, attached to a connection. `None` if that is unknown.
///
/// It writes one byte, which is too short for any reply. The kernel refuses that without looking at it: with `EINVAL`
/// on a device that is or was attached, with `EPERM` on one that never was (`fuse_dev_write` in fs/fuse/dev.c). A read
/// would show the same, but blocks on a device that is in synchronous INIT.
fn is_attached(device: BorrowedFd<'_>) -> Option<bool> {
    match write(device, &[0_u8; 1]) {
        Err(Errno::INVAL) => Some(true),
        Err(Errno::PERM) => Some(false),
        _ => None,
    }
}

/// Whether the kernel has `CONFIG_FUSE_PASSTHROUGH`. `None` if that is unknown. To be called after registering failed
/// with `EOPNOTSUPP`.
///
/// It closes id 0, which no file has. The kernel first checks the option (`EOPNOTSUPP`), then the capability, and then
/// refuses id 0 (`EINVAL`) before it looks anything up. The capability check cannot fail here: if the option is set,
/// registering has passed the same check before it returned `EOPNOTSUPP`.
fn passthrough_is_compiled_in(device: BorrowedFd<'_>) -> Option<bool> {
    match ioctl::backing_close(device, 0) {
        Err(Errno::OPNOTSUPP) => Some(false),
        Err(Errno::INVAL) => Some(true),
        _ => None,
    }
}

fn not_permitted(device: BorrowedFd<'_>) -> NotPermitted {
    // Android's kernels require no capability, so a policy or another kernel has answered EPERM.
    if cfg!(target_os = "android") {
        return NotPermitted::Undetermined;
    }
    match registering_permitted() {
        Err(why) => why,
        Ok(Certain(true)) if is_attached(device) == Some(true) => {
            NotPermitted::NotNegotiatedOrDenied
        }
        Ok(_) => NotPermitted::Undetermined,
    }
}

/// Whether both the user namespace and the capabilities of the thread are known.
pub(crate) struct Certain(bool);

/// Whether the calling thread may register: it needs `CAP_SYS_ADMIN` in the initial user namespace. What cannot be
/// determined counts as present, because the kernel checks it anyway.
pub(crate) fn registering_permitted() -> Result<Certain, NotPermitted> {
    let initial = in_initial_user_namespace();
    if initial == Some(false) {
        return Err(NotPermitted::NotInInitialUserNamespace);
    }
    match capabilities(None) {
        Ok(sets) if !sets.effective.contains(CapabilitySet::SYS_ADMIN) => {
            Err(NotPermitted::MissingCapability)
        }
        Ok(_) => Ok(Certain(initial.is_some())),
        Err(_) => Ok(Certain(false)),
    }
}

/// `None` if `/proc` is unavailable.
fn in_initial_user_namespace() -> Option<bool> {
    /// `PROC_USER_INIT_INO` of the kernel's `include/linux/proc_ns.h`, the same on every machine.
    const INITIAL: u64 = 0xEFFF_FFFD;
    const NSFS_MAGIC: u64 = 0x6e73_6673;
    const PATH: &str = "/proc/thread-self/ns/user";

    // Something else may be mounted at /proc: the inode number means this only on nsfs.
    #[allow(
        clippy::cast_sign_loss,
        reason = "the type differs between targets, the magic fits all"
    )]
    let magic = statfs(PATH).ok()?.f_type as u64;
    if magic != NSFS_MAGIC {
        return None;
    }
    let stat = rustix::fs::stat(PATH).ok()?;
    #[allow(
        clippy::useless_conversion,
        reason = "the type differs between targets"
    )]
    Some(u64::from(stat.st_ino) == INITIAL)
}

/// `None` if fstat(2) fails. Some files, such as an eventfd, have the type `Unknown`.
fn file_type(fd: BorrowedFd<'_>) -> Option<FileType> {
    let stat = fstat(fd).ok()?;
    Some(FileType::from_raw_mode(stat.st_mode))
}
