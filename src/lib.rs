//! placeholder

#![warn(clippy::pedantic)]

#[cfg(not(any(target_os = "linux", target_os = "android")))]
compile_error!(
    "fuse-backing binds ioctls of Linux: depend on it for \
     cfg(any(target_os = \"linux\", target_os = \"android\")) only"
);

mod backing;
mod device;
mod diagnose;
mod error;
mod ioctl;
mod open;
pub mod uapi;

pub use backing::{BackingFile, BackingId};
pub use device::{FuseDevice, NotFuseDevice, NotFuseDeviceReason};
pub use error::{
    BackingCloseCause, BackingCloseError, BackingOpenError, CloneConnectionError, DeviceOpenError,
    NotPermitted, Scope, SyncInitError,
};
pub use open::{Access, AccessError, OpenFlags, OpenReply, OpenReplyError};
pub use rustix::{fs::FileType, io::Errno};
