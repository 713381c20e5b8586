//! What an ambiguous errno means on this machine.
//!
//! Only ever called when an ioctl has failed: these look at the device, the backing fd and the
//! calling thread. Where they cannot be certain they say so.

use std::os::fd::BorrowedFd;

use rustix::fs::{FileType, OFlags, fcntl_getfl, fstat, statfs};
use rustix::io::{Errno, write};
use rustix::thread::{CapabilitySet, capabilities};

use crate::error::{BackingError, DeviceError, NotPermitted};
use crate::ioctl;

#[cold]
pub(crate) fn open(device: BorrowedFd<'_>, backing: BorrowedFd<'_>, errno: Errno) -> BackingError {
    let not_regular = |unless: BackingError| match file_type(backing) {
        Some(FileType::RegularFile) => unless,
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
        // Of the device, if that was closed behind its owner's back.
        Errno::BADF if fcntl_getfl(device).is_err() => BackingError::Other(errno),
        Errno::BADF => match fcntl_getfl(backing) {
            Ok(flags) if flags.contains(OFlags::PATH) => BackingError::PathOnlyFd,
            Ok(_) => BackingError::Other(errno),
            Err(_) => BackingError::BadFd,
        },
        Errno::NOMEM => BackingError::OutOfMemory,
        Errno::NOSPC => BackingError::OutOfIds,
        errno => either(device, errno),
    }
}

#[cold]
pub(crate) fn close(device: BorrowedFd<'_>, errno: Errno) -> BackingError {
    match errno {
        Errno::NOENT => BackingError::UnknownId,
        Errno::OPNOTSUPP => BackingError::DisabledInKernel,
        errno => either(device, errno),
    }
}

/// What means the same from both ioctls.
fn either(device: BorrowedFd<'_>, errno: Errno) -> BackingError {
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

/// A write that is too short for any reply is refused before it is looked at: `EINVAL` on a device
/// that is, or was, attached and `EPERM` on one that never was (`fuse_dev_write` in fs/fuse/dev.c).
/// A read would tell the same, but waits on a device that is in synchronous INIT.
fn is_attached(device: BorrowedFd<'_>) -> Option<bool> {
    match write(device, &[0_u8; 1]) {
        Err(Errno::INVAL) => Some(true),
        Err(Errno::PERM) => Some(false),
        _ => None,
    }
}

/// The kernel asks for the option in each of the two ioctls, and then refuses id 0, which no file
/// has, before it looks anything up. Between the two it asks for the capability, which whoever got
/// `EOPNOTSUPP` for a file has.
fn passthrough_is_compiled_in(device: BorrowedFd<'_>) -> Option<bool> {
    match ioctl::backing_close(device, 0) {
        Err(Errno::OPNOTSUPP) => Some(false),
        Err(Errno::INVAL) => Some(true),
        _ => None,
    }
}

fn not_permitted(device: BorrowedFd<'_>) -> NotPermitted {
    // Its kernels ask for no capability: whatever says so is a policy, or another kernel.
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

/// Whether everything could be looked at.
pub(crate) struct Certain(bool);

/// Whether the calling thread lacks what the kernel asks of whoever registers, as far as that can be
/// told; where it cannot, the kernel's own answer will come.
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

/// `None` where `/proc` is not there to ask.
fn in_initial_user_namespace() -> Option<bool> {
    /// `PROC_USER_INIT_INO` of the kernel's `include/linux/proc_ns.h`, the same on every machine.
    const INITIAL: u64 = 0xEFFF_FFFD;
    const NSFS_MAGIC: u64 = 0x6e73_6673;
    const PATH: &str = "/proc/thread-self/ns/user";

    // Whatever is mounted at /proc, only nsfs has these inode numbers.
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

/// `None` if it cannot be looked at. Some files have no type, such as an eventfd.
fn file_type(fd: BorrowedFd<'_>) -> Option<FileType> {
    let stat = fstat(fd).ok()?;
    Some(FileType::from_raw_mode(stat.st_mode))
}
