//! [`ClientFlags`]: what a client's open asks for.

use rustix::fs::OFlags;

use crate::access::Access;

/// The flags of an OPEN or CREATE request: the `flags` of `fuse_open_in`.
///
/// Converts from the `i32` or `u32` that FUSE libraries have (in fuser, inside `OpenFlags`), and from rustix's
/// [`OFlags`].
///
/// # Examples
///
/// ```
/// use fuse_backing::{Access, ClientFlags};
/// use rustix::fs::OFlags;
///
/// assert_eq!(ClientFlags::from(2).access(), Access::ReadWrite); // O_RDWR
/// assert_eq!(ClientFlags::from(1_u32).access(), Access::WriteOnly); // O_WRONLY
/// assert_eq!(ClientFlags::from(OFlags::RDONLY | OFlags::TRUNC).access(), Access::ReadOnly);
/// ```
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct ClientFlags(OFlags);

impl ClientFlags {
    /// What a client can do with an open of these flags. Access mode 3 counts as reading and writing. `O_TRUNC` adds
    /// nothing: the server's own open with these flags has truncated the file, or failed.
    #[must_use]
    pub fn access(self) -> Access {
        match self.0 & OFlags::ACCMODE {
            OFlags::RDONLY => Access::ReadOnly,
            OFlags::WRONLY => Access::WriteOnly,
            _ => Access::ReadWrite,
        }
    }

    pub(crate) fn truncates(self) -> bool {
        self.0.contains(OFlags::TRUNC)
    }
}

impl From<u32> for ClientFlags {
    #[inline]
    fn from(flags: u32) -> Self {
        Self(OFlags::from_bits_retain(flags))
    }
}

impl From<i32> for ClientFlags {
    #[inline]
    #[allow(clippy::cast_sign_loss, reason = "a bit pattern")]
    fn from(flags: i32) -> Self {
        Self::from(flags as u32)
    }
}

impl From<OFlags> for ClientFlags {
    #[inline]
    fn from(flags: OFlags) -> Self {
        Self(flags)
    }
}
