//! [`Access`]: what a server grants.

use std::fmt;
use std::os::fd::AsFd;

use rustix::fs::{OFlags, fcntl_getfl};

use crate::error::OpenError;

/// Reading, writing, or both: what a server grants through a registration, and what a client's open
/// asks for.
///
/// The kernel does not hold the one against the other: it ignores the access mode of the fd that was
/// registered, see [`FuseDevice::backing_open`](crate::FuseDevice::backing_open).
///
/// # Examples
///
/// ```
/// use fuse_backing::{Access, ClientFlags};
///
/// let granted = Access::of(std::fs::File::open("/dev/null")?)?;
/// assert_eq!(granted, Access::ReadOnly);
/// assert!(granted.allows(ClientFlags::from(0).access())); // O_RDONLY
/// assert!(!granted.allows(ClientFlags::from(2).access())); // O_RDWR
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
    /// [`OpenError::NoAccess`] for an `O_PATH` fd and for one opened with access mode 3, which is for ioctls
    /// alone; [`OpenError::Unreadable`] where `fcntl` fails.
    pub fn of(fd: impl AsFd) -> Result<Self, OpenError> {
        let flags = fcntl_getfl(fd).map_err(OpenError::Unreadable)?;
        match flags & OFlags::ACCMODE {
            _ if flags.contains(OFlags::PATH) => Err(OpenError::NoAccess),
            OFlags::RDONLY => Ok(Self::ReadOnly),
            OFlags::WRONLY => Ok(Self::WriteOnly),
            OFlags::RDWR => Ok(Self::ReadWrite),
            _ => Err(OpenError::NoAccess),
        }
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

impl fmt::Display for Access {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::ReadOnly => "read-only",
            Self::WriteOnly => "write-only",
            Self::ReadWrite => "read-write",
        })
    }
}
