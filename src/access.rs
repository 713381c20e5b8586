//! [`Access`]: what a server grants, and what a client's open asks for.

use std::fmt;
use std::io;
use std::os::fd::AsFd;

use rustix::fs::{OFlags, fcntl_getfl};
use rustix::io::Errno;
use thiserror::Error;

/// Reading, writing, or both: what a server grants through a registration, and what a client's open
/// asks for.
///
/// The kernel does not hold the one against the other: it ignores the access mode of the fd that was
/// registered, see [`FuseDevice::backing_open`](crate::FuseDevice::backing_open).
///
/// # Examples
///
/// ```
/// use fuse_backing::Access;
///
/// let granted = Access::of(std::fs::File::open("/dev/null")?)?;
/// assert_eq!(granted, Access::ReadOnly);
/// assert!(granted.allows(Access::wanted_by(0))); // O_RDONLY
/// assert!(!granted.allows(Access::wanted_by(2))); // O_RDWR
/// # Ok::<(), std::io::Error>(())
/// ```
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Access {
    /// Reading.
    ReadOnly,
    /// Writing.
    WriteOnly,
    /// Reading and writing.
    ReadWrite,
}

impl Access {
    /// `fcntl(fd, F_GETFL)` — What an fd can be used for.
    ///
    /// # Errors
    ///
    /// [`AccessError`]: the fd grants nothing, being an `O_PATH` fd or one opened with access mode 3
    /// (which is for ioctls alone), or cannot be asked.
    pub fn of(fd: impl AsFd) -> Result<Self, AccessError> {
        let flags = fcntl_getfl(fd).map_err(AccessError::Unreadable)?;
        if flags.contains(OFlags::PATH) {
            return Err(AccessError::PathOnly);
        }
        match flags & OFlags::ACCMODE {
            OFlags::RDONLY => Ok(Self::ReadOnly),
            OFlags::WRONLY => Ok(Self::WriteOnly),
            OFlags::RDWR => Ok(Self::ReadWrite),
            _ => Err(AccessError::Neither),
        }
    }

    /// What the flags of an OPEN or CREATE request ask for: the `flags` of `fuse_open_in`, in fuser
    /// the number inside `OpenFlags`.
    ///
    /// `O_TRUNC` writes, also with `O_RDONLY`; access mode 3 asks for both. Other bits do not matter.
    ///
    /// # Examples
    ///
    /// ```
    /// use fuse_backing::Access;
    /// use rustix::fs::OFlags;
    ///
    /// let wanted = |flags: OFlags| Access::wanted_by(flags.bits() as i32);
    /// assert_eq!(wanted(OFlags::WRONLY | OFlags::APPEND), Access::WriteOnly);
    /// assert_eq!(wanted(OFlags::RDONLY | OFlags::TRUNC), Access::ReadWrite);
    /// assert_eq!(wanted(OFlags::WRONLY | OFlags::RDWR), Access::ReadWrite);
    /// ```
    #[must_use]
    pub fn wanted_by(client_flags: i32) -> Self {
        let by_mode = Self::wanted_by_mode(client_flags);
        if Self::truncates(client_flags) {
            match by_mode {
                Self::WriteOnly => Self::WriteOnly,
                Self::ReadOnly | Self::ReadWrite => Self::ReadWrite,
            }
        } else {
            by_mode
        }
    }

    /// [`wanted_by`](Self::wanted_by), but for `O_TRUNC`.
    pub(crate) fn wanted_by_mode(client_flags: i32) -> Self {
        match client_oflags(client_flags) & OFlags::ACCMODE {
            OFlags::RDONLY => Self::ReadOnly,
            OFlags::WRONLY => Self::WriteOnly,
            _ => Self::ReadWrite,
        }
    }

    pub(crate) fn truncates(client_flags: i32) -> bool {
        client_oflags(client_flags).contains(OFlags::TRUNC)
    }

    /// Grants as bits that add up, for [`from_bits`](Self::from_bits).
    pub(crate) const fn bits(self) -> u8 {
        match self {
            Self::ReadOnly => 1,
            Self::WriteOnly => 2,
            Self::ReadWrite => 3,
        }
    }

    pub(crate) const fn from_bits(bits: u8) -> Option<Self> {
        match bits {
            1 => Some(Self::ReadOnly),
            2 => Some(Self::WriteOnly),
            3 => Some(Self::ReadWrite),
            _ => None,
        }
    }

    /// Both grants together.
    pub(crate) const fn union(self, other: Self) -> Self {
        match Self::from_bits(self.bits() | other.bits()) {
            Some(both) => both,
            None => Self::ReadWrite,
        }
    }

    /// Whether granting this is granting all that is `wanted`.
    #[must_use]
    pub fn allows(self, wanted: Self) -> bool {
        self == Self::ReadWrite || self == wanted
    }
}

#[allow(clippy::cast_sign_loss, reason = "a bit pattern")]
fn client_oflags(client_flags: i32) -> OFlags {
    OFlags::from_bits_retain(client_flags as u32)
}

impl fmt::Display for Access {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::ReadOnly => "read-only",
            Self::WriteOnly => "write-only",
            Self::ReadWrite => "read-write",
        })
    }
}

/// [`Access::of`] found nothing that the fd grants.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Error)]
#[non_exhaustive]
pub enum AccessError {
    /// The fd was opened with `O_PATH`.
    #[error("the fd was opened with O_PATH, which grants neither reading nor writing")]
    PathOnly,
    /// The fd was opened with access mode 3.
    #[error("the fd was opened with access mode 3, which grants neither reading nor writing")]
    Neither,
    /// `fcntl` failed.
    #[error("the fd's flags cannot be read: {0}")]
    Unreadable(Errno),
}

impl AccessError {
    /// `EBADF` for an fd that grants nothing, as for a read of it; else what the kernel gave.
    #[must_use]
    pub fn errno(&self) -> Errno {
        match *self {
            Self::PathOnly | Self::Neither => Errno::BADF,
            Self::Unreadable(errno) => errno,
        }
    }
}

impl From<AccessError> for io::Error {
    fn from(error: AccessError) -> Self {
        Self::new(Self::from(error.errno()).kind(), error)
    }
}
