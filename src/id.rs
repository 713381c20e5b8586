//! [`BackingId`]: the token for a registration.

use std::num::NonZeroI32;

use static_assertions::{assert_eq_size, assert_impl_all, assert_not_impl_any};

/// The kernel's number for a backing file, 1 ..= `i32::MAX`. Each connection numbers its files from 1.
///
/// It is a token that is closed once: it cannot be copied, and
/// [`FuseDevice::backing_close`](crate::FuseDevice::backing_close) consumes it.
///
/// What the type does not rule out (`tests/kernel/backing_close.rs` shows each):
///
/// - **Dropping it leaks the registration**: the file, and the mount it is on, stay pinned until the
///   FUSE mount and every fd of its connection are gone. [`BackingFile`](crate::BackingFile) closes it.
/// - **It is not tied to its connection.** The ids of every connection start at 1, so closing an id on the wrong device
///   closes another file there. A [`BackingFile`](crate::BackingFile) knows its device.
/// - **[`from_raw`](Self::from_raw) can forge one**, or make a second one for the same registration.
/// - **After fork(2) two processes have a token** for one registration, and only one of them may close it.
///
/// # Examples
///
/// ```
/// use fuse_backing::BackingId;
///
/// let id = BackingId::from_raw(3).ok_or("positive")?;
/// assert_eq!((id.as_raw(), id.into_raw()), (3, 3));
/// # Ok::<(), &str>(())
/// ```
///
/// ```compile_fail,E0599
/// # fn f(id: fuse_backing::BackingId) {
/// let copy = id.clone();
/// # }
/// ```
#[derive(Debug, PartialEq, Eq, Hash)]
#[must_use = "dropping a BackingId leaves the file registered; close it, or use BackingFile"]
#[repr(transparent)]
pub struct BackingId(
    // Positive: `from_raw` checks it, and `alias` copies it.
    NonZeroI32,
);

assert_not_impl_any!(BackingId: Clone, Copy);
assert_impl_all!(BackingId: Send, Sync);
assert_eq_size!(Option<BackingId>, i32);

impl BackingId {
    /// Takes a raw id that the kernel returned, or that a predecessor of this process handed over. `None` unless it is
    /// positive. Nothing else is checked.
    #[inline]
    #[must_use]
    pub const fn from_raw(raw: i32) -> Option<Self> {
        match NonZeroI32::new(raw) {
            Some(id) if id.get() > 0 => Some(Self(id)),
            _ => None,
        }
    }

    /// The id for the `backing_id` of a reply.
    #[inline]
    #[must_use]
    pub const fn as_raw(&self) -> i32 {
        self.0.get()
    }

    /// The raw id. The caller must close it.
    #[inline]
    #[must_use = "only the raw id can close the registration"]
    pub const fn into_raw(self) -> i32 {
        self.0.get()
    }

    /// A second token for the same registration. The caller must ensure that only one of them is closed.
    pub(crate) const fn alias(&self) -> Self {
        Self(self.0)
    }
}
