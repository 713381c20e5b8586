//! Negotiation: turning passthrough on in INIT.
//!
//! # What the kernel offers
//!
//! INIT is the first request of a connection. The kernel sets `FUSE_PASSTHROUGH` in it (Linux 6.9 with
//! `CONFIG_FUSE_PASSTHROUGH`), together with `FUSE_INIT_EXT`, which says that the upper 32 flags in `flags2` are valid.
//! It offers passthrough to every server, also to one that may not use it: registering needs `CAP_SYS_ADMIN` in the
//! initial user namespace.
//!
//! # What the reply must have
//!
//! | in the INIT reply | needed |
//! |---|---|
//! | `FUSE_INIT_EXT` | yes: without it the kernel ignores `flags2` |
//! | `FUSE_PASSTHROUGH` | yes |
//! | `max_stack_depth` | 1 or 2 |
//! | `FUSE_WRITEBACK_CACHE` | no: it excludes passthrough |
//!
//! **The kernel silently accepts an unusable reply**, and refuses every registration later with `EPERM`, which is
//! [`NotNegotiatedOrDenied`](crate::error::NotPermitted::NotNegotiatedOrDenied). [`negotiate`] works out a reply that
//! has all of this, or says why passthrough is unavailable: the kernel does not offer it, the server wants flags that
//! exclude it, or this thread may not register. A server whose files are registered by another thread or process calls
//! [`negotiate_for_registrar`], which does not look at the calling thread.
//!
//! # `max_stack_depth`
//!
//! | [`MaxStackDepth`] | backing files can be on | what can be stacked on this mount |
//! |---|---|---|
//! | [`One`](MaxStackDepth::One) | filesystems that are not stacked | an overlayfs, or another passthrough mount |
//! | [`Two`](MaxStackDepth::Two) | also overlayfs, and a passthrough mount of depth 1 | nothing |
//!
//! Other files get [`StackedTooDeep`](crate::error::BackingError::StackedTooDeep). libfuse's
//! `max_backing_stack_depth` counts one less than the kernel's `max_stack_depth`.
//!
//! # `FUSE_HANDLE_KILLPRIV_V2`
//!
//! Without this flag the kernel asks the server for `security.capability` before each write, and small writes take ten
//! times as long. (It stops asking once the server has answered a GETXATTR with `ENOSYS`; from the source, not
//! measured.) With the flag, the server promises to clear set-user-ID and set-group-ID bits. In passthrough mode only
//! the filesystem of the backing file can clear them, and it does so only if the file was registered without
//! `CAP_FSETID`. So [`Negotiated::handle_killpriv_v2`] takes a value whose type shows this: a registrar, table or
//! handles that are [`WithoutFsetid`]. The guide in [`rights`](crate::rights) lists the requests that the server must
//! then handle differently.
//!
//! # With fuser
//!
//! Call `add_capabilities` *and* `set_max_stack_depth`: if either is missing, passthrough stays off. [`negotiate`]
//! takes fuser's flags as a `u64`.
//!
//! ```
//! use fuse_backing::init::{MaxStackDepth, negotiate};
//! use std::io::{Error, Result};
//!
//! /// Called by `Filesystem::init`.
//! fn init(config: &mut fuser::KernelConfig) -> Result<()> {
//!     let reply = match negotiate(config.capabilities().bits(), 0, MaxStackDepth::One) {
//!         Ok(reply) => reply,
//!         Err(why) => {
//!             eprintln!("serving without passthrough: {why}");
//!             return Ok(());
//!         }
//!     };
//!     let flags = fuser::InitFlags::from_bits_retain(reply.flags.bits());
//!     config.add_capabilities(flags).map_err(|flags| Error::other(format!("{flags:?}")))?;
//!     config.set_max_stack_depth(reply.max_stack_depth).map_err(|_| Error::other("max_stack_depth"))?;
//!     Ok(())
//! }
//! ```

use bitflags::bitflags;

use crate::error::NegotiateError;
use crate::register::WithoutFsetid;
use crate::rights::may_register;
use crate::uapi;

bitflags! {
    /// The 64 flags of INIT, `flags | flags2 << 32`: what the kernel offers, and what the server answers.
    ///
    /// Only flags that concern passthrough have a name here. All others are kept.
    #[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
    pub struct InitFlags: u64 {
        /// `FUSE_WRITEBACK_CACHE`: excludes passthrough.
        const WRITEBACK_CACHE = uapi::FUSE_WRITEBACK_CACHE;
        /// `FUSE_HANDLE_KILLPRIV`: of no use with passthrough.
        const HANDLE_KILLPRIV = uapi::FUSE_HANDLE_KILLPRIV;
        /// `FUSE_HANDLE_KILLPRIV_V2`: see [`Negotiated::handle_killpriv_v2`].
        const HANDLE_KILLPRIV_V2 = uapi::FUSE_HANDLE_KILLPRIV_V2;
        /// `FUSE_INIT_EXT`: `flags2` is valid.
        const INIT_EXT = uapi::FUSE_INIT_EXT;
        /// `FUSE_DIRECT_IO_ALLOW_MMAP`: allows shared mmap of files opened with `FOPEN_DIRECT_IO`.
        const DIRECT_IO_ALLOW_MMAP = uapi::FUSE_DIRECT_IO_ALLOW_MMAP;
        /// `FUSE_PASSTHROUGH`: backing files may be registered.
        const PASSTHROUGH = uapi::FUSE_PASSTHROUGH;

        const _ = !0;
    }
}

/// The flags as FUSE libraries have them.
impl From<u64> for InitFlags {
    #[inline]
    fn from(flags: u64) -> Self {
        Self::from_bits_retain(flags)
    }
}

impl InitFlags {
    /// The two fields of an INIT reply: `flags` and `flags2`.
    #[must_use]
    #[allow(clippy::cast_possible_truncation, reason = "splits into two halves")]
    pub fn to_fields(self) -> (u32, u32) {
        (self.bits() as u32, (self.bits() >> 32) as u32)
    }

    /// From the two fields of an INIT request: `flags` and `flags2`. `flags2` is ignored unless `flags` has
    /// [`INIT_EXT`](Self::INIT_EXT): the kernel has sent none then.
    #[must_use]
    pub fn from_fields(flags: u32, flags2: u32) -> Self {
        let low = Self::from_bits_retain(flags.into());
        if low.contains(Self::INIT_EXT) {
            low | Self::from_bits_retain(u64::from(flags2) << 32)
        } else {
            low
        }
    }
}

/// The `max_stack_depth` of the INIT reply: how deeply the filesystems of backing files may be stacked, see
/// [the guide](self#max_stack_depth).
///
/// With other depths than these two the kernel silently leaves passthrough off.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub enum MaxStackDepth {
    /// 1: backing files are on filesystems that are not stacked. This mount can be a layer of an overlayfs, or hold the
    /// backing files of another passthrough mount.
    #[default]
    One = 1,
    /// 2: backing files can also be on overlayfs, and on a passthrough mount of depth 1. Nothing can be stacked on this
    /// mount.
    Two = 2,
}

/// The INIT reply that turns passthrough on, from [`negotiate`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[must_use = "passthrough is off unless the INIT reply has these"]
#[non_exhaustive]
pub struct Negotiated {
    /// All 64 flags of the reply.
    pub flags: InitFlags,
    /// The reply's `max_stack_depth`.
    pub max_stack_depth: u32,
    offered: InitFlags,
}

impl Negotiated {
    /// Adds `HANDLE_KILLPRIV_V2` to the reply, if the kernel offers it. If the server has extended attributes,
    /// small writes then take a tenth of the time: the kernel no longer asks for `security.capability` before each.
    ///
    /// The flag promises that the server clears set-user-ID and set-group-ID bits, so files must be registered without
    /// `CAP_FSETID`. Pass the registrar, table or handles that register them. The server must also handle some requests
    /// differently, see [`rights`](crate::rights).
    ///
    /// # Examples
    ///
    /// INIT of a server that attaches its registrar later:
    ///
    /// ```
    /// use fuse_backing::error::NegotiateError;
    /// use fuse_backing::init::{InitFlags, MaxStackDepth, Negotiated, negotiate};
    /// use fuse_backing::{FuseDevice, Handles, rights::Lowered};
    ///
    /// fn reply(offered: InitFlags, handles: &Handles<Lowered<FuseDevice>>) -> Result<Negotiated, NegotiateError> {
    ///     let plain = negotiate(offered, InitFlags::empty(), MaxStackDepth::One)?;
    ///     Ok(plain.handle_killpriv_v2(handles))
    /// }
    /// # assert!(reply(InitFlags::empty(), &Handles::default()).is_err());
    /// ```
    pub fn handle_killpriv_v2(self, _registering: &impl WithoutFsetid) -> Self {
        self.handle_killpriv_v2_with_fsetid()
    }

    /// Adds `HANDLE_KILLPRIV_V2` without that proof, for a server whose files never have a set-user-ID or set-group-ID
    /// bit. If files are registered with `CAP_FSETID`, **those bits stay when a stranger writes**.
    pub fn handle_killpriv_v2_with_fsetid(mut self) -> Self {
        self.flags |= self.offered & InitFlags::HANDLE_KILLPRIV_V2;
        self
    }
}

/// Works out the INIT reply that turns passthrough on, or says why passthrough is unavailable.
///
/// - `offered`: the flags of the INIT request.
/// - `wanted`: the other flags that the server wants. Those that the kernel does not offer are left out of the reply.
///   For `HANDLE_KILLPRIV_V2` call [`Negotiated::handle_killpriv_v2`] instead.
///
/// This checks whether the *calling thread* may register ([`may_register`]): the kernel offers passthrough to servers
/// that may not.
///
/// # Errors
///
/// [`NegotiateError`]. The server can go on without passthrough.
///
/// # Examples
///
/// A server that writes the protocol's bytes itself, from the request's `flags` and `flags2`. (With fuser: see
/// [the guide](self#with-fuser).)
///
/// ```
/// use fuse_backing::error::NegotiateError;
/// use fuse_backing::init::{InitFlags, MaxStackDepth, negotiate};
///
/// fn answer(flags: u32, flags2: u32, init_out: &mut [u8; 64]) -> Result<(), NegotiateError> {
///     let offered = InitFlags::from_fields(flags, flags2);
///     let reply = negotiate(offered, InitFlags::empty(), MaxStackDepth::Two)?;
///     let (flags, flags2) = reply.flags.to_fields();
///     init_out[12..16].copy_from_slice(&flags.to_ne_bytes());
///     init_out[32..36].copy_from_slice(&flags2.to_ne_bytes());
///     init_out[36..40].copy_from_slice(&reply.max_stack_depth.to_ne_bytes());
///     Ok(())
/// }
/// # assert_eq!(answer(0, 0, &mut [0; 64]), Err(NegotiateError::NotOffered));
/// ```
///
/// # References
///
/// `process_init_reply` in `fs/fuse/inode.c`; `tests/kernel/backing_open.rs` shows which replies are accepted.
pub fn negotiate(
    offered: impl Into<InitFlags>,
    wanted: impl Into<InitFlags>,
    max_stack_depth: MaxStackDepth,
) -> Result<Negotiated, NegotiateError> {
    let reply = negotiate_for_registrar(offered, wanted, max_stack_depth)?;
    may_register().map_err(NegotiateError::NotPermitted)?;
    Ok(reply)
}

/// [`negotiate`] without the check of the calling thread, for a registrar in another thread or process.
///
/// # Errors
///
/// [`NegotiateError`], except [`NotPermitted`](NegotiateError::NotPermitted).
///
/// # Examples
///
/// ```
/// use fuse_backing::init::{InitFlags, MaxStackDepth, negotiate_for_registrar};
///
/// let reply = negotiate_for_registrar(InitFlags::PASSTHROUGH, InitFlags::empty(), MaxStackDepth::One)?;
/// assert!(reply.flags.contains(InitFlags::PASSTHROUGH));
/// # Ok::<(), fuse_backing::error::NegotiateError>(())
/// ```
pub fn negotiate_for_registrar(
    offered: impl Into<InitFlags>,
    wanted: impl Into<InitFlags>,
    max_stack_depth: MaxStackDepth,
) -> Result<Negotiated, NegotiateError> {
    let (offered, wanted) = (offered.into(), wanted.into());
    // Does not look for INIT_EXT in `offered`: fuser strips it, and a kernel that sends bit 37 has it.
    if !offered.contains(InitFlags::PASSTHROUGH) {
        return Err(NegotiateError::NotOffered);
    }
    if wanted.contains(InitFlags::WRITEBACK_CACHE) {
        return Err(NegotiateError::WritebackCacheWanted);
    }
    if wanted.contains(InitFlags::HANDLE_KILLPRIV) {
        return Err(NegotiateError::HandleKillprivWanted);
    }
    if wanted.contains(InitFlags::HANDLE_KILLPRIV_V2) {
        return Err(NegotiateError::HandleKillprivV2Wanted);
    }
    Ok(Negotiated {
        flags: wanted & offered | InitFlags::PASSTHROUGH | InitFlags::INIT_EXT,
        max_stack_depth: max_stack_depth as u32,
        offered,
    })
}
