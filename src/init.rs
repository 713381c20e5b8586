//! Negotiating passthrough in INIT.

use bitflags::bitflags;

use crate::error::NegotiateError;
use crate::register::WithoutFsetid;
use crate::rights::may_register;
use crate::uapi;

bitflags! {
    /// The 64 flags of INIT, `flags | flags2 << 32`: what the kernel offers, and what the server
    /// answers.
    ///
    /// Only those are named that have to do with passthrough; all others are kept as they come.
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
        /// `FUSE_DIRECT_IO_ALLOW_MMAP`: shared mmap of direct files.
        const DIRECT_IO_ALLOW_MMAP = uapi::FUSE_DIRECT_IO_ALLOW_MMAP;
        /// `FUSE_PASSTHROUGH`: backing files may be registered.
        const PASSTHROUGH = uapi::FUSE_PASSTHROUGH;
        /// `FUSE_OVER_IO_URING`: requests may travel over `io_uring`.
        const OVER_IO_URING = uapi::FUSE_OVER_IO_URING;
        /// `FUSE_HAS_IO_URING_BUFPOOL`: the kernel has buffer pools for `io_uring`.
        const HAS_IO_URING_BUFPOOL = uapi::FUSE_HAS_IO_URING_BUFPOOL;

        const _ = !0;
    }
}

/// As FUSE libraries have them.
impl From<u64> for InitFlags {
    #[inline]
    fn from(flags: u64) -> Self {
        Self::from_bits_retain(flags)
    }
}

impl InitFlags {
    /// The two fields of an INIT reply: `flags` and `flags2`.
    #[must_use]
    #[allow(clippy::cast_possible_truncation, reason = "the halves")]
    pub fn to_fields(self) -> (u32, u32) {
        (self.bits() as u32, (self.bits() >> 32) as u32)
    }

    /// From the two fields of an INIT request: `flags`, and `flags2`, which counts only if the kernel
    /// says [`INIT_EXT`](Self::INIT_EXT). Else it has sent none.
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

/// How deeply stacked the filesystems may be that backing files are on: the `max_stack_depth` of the
/// INIT reply.
///
/// With other depths the kernel silently leaves passthrough off. libfuse's option of a similar name counts
/// one less.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub enum MaxStackDepth {
    /// 1: files on filesystems that are not stacked. This mount may then be a layer of an overlayfs,
    /// or have the backing files of another passthrough mount.
    #[default]
    One = 1,
    /// 2: also files on overlayfs, and on a passthrough mount of depth 1. Nothing can be stacked on
    /// this mount.
    Two = 2,
}

/// What to answer to INIT, so that passthrough is on. See [`negotiate`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[must_use = "passthrough is on if the INIT reply has these"]
#[non_exhaustive]
pub struct Negotiated {
    /// All 64 flags of the reply.
    pub flags: InitFlags,
    /// The reply's `max_stack_depth`.
    pub max_stack_depth: u32,
    offered: InitFlags,
}

impl Negotiated {
    /// Answers `HANDLE_KILLPRIV_V2` as well, if the kernel offers it: small writes then cost a tenth, since the kernel
    /// no longer asks for `security.capability` before each.
    ///
    /// It promises that the server clears set-user-ID and set-group-ID bits, so files must be registered without
    /// `CAP_FSETID`. Pass the registrar, table or handles that register them. The server must also handle some
    /// requests differently: see [`rights`](crate::rights).
    ///
    /// # Examples
    ///
    /// In the INIT of a server that attaches its registrar later:
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

    /// The same without a witness: for a server none of whose files ever has a set-user-ID or set-group-ID bit. If
    /// files are registered with `CAP_FSETID`, **those bits stay when a stranger writes**.
    pub fn handle_killpriv_v2_with_fsetid(mut self) -> Self {
        self.flags |= self.offered & InitFlags::HANDLE_KILLPRIV_V2;
        self
    }
}

/// Works out the INIT reply that turns passthrough on, or says why there is none.
///
/// - `offered`: the kernel's flags.
/// - `wanted`: all that the server wants besides; what was not offered of it is left out of the
///   reply. `HANDLE_KILLPRIV_V2` takes a witness, see [`Negotiated::handle_killpriv_v2`].
///
/// The kernel silently accepts an unusable INIT reply, and refuses every registration
/// later with `EPERM`. It offers passthrough to servers that will never be permitted to use it:
/// whether *this thread* is, is checked here ([`may_register`]).
///
/// # Errors
///
/// [`NegotiateError`]. The server can go on without passthrough.
///
/// # Examples
///
/// A server that writes the bytes itself, with the request's `flags` and `flags2`. With fuser: see
/// `examples/hello.rs`.
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
/// `process_init_reply` in `fs/fuse/inode.c`; `tests/kernel/backing_open.rs`: which replies are accepted.
pub fn negotiate(
    offered: impl Into<InitFlags>,
    wanted: impl Into<InitFlags>,
    max_stack_depth: MaxStackDepth,
) -> Result<Negotiated, NegotiateError> {
    let reply = reply(offered, wanted, max_stack_depth)?;
    may_register().map_err(NegotiateError::NotPermitted)?;
    Ok(reply)
}

/// [`negotiate`] without asking whether this thread may register: for a registrar in another thread or process.
///
/// # Errors
///
/// [`NegotiateError`], but not [`NotPermitted`](NegotiateError::NotPermitted).
///
/// # Examples
///
/// ```
/// use fuse_backing::init::{InitFlags, MaxStackDepth, reply};
///
/// let reply = reply(InitFlags::PASSTHROUGH, InitFlags::empty(), MaxStackDepth::One)?;
/// assert!(reply.flags.contains(InitFlags::PASSTHROUGH));
/// # Ok::<(), fuse_backing::error::NegotiateError>(())
/// ```
pub fn reply(
    offered: impl Into<InitFlags>,
    wanted: impl Into<InitFlags>,
    max_stack_depth: MaxStackDepth,
) -> Result<Negotiated, NegotiateError> {
    let (offered, wanted) = (offered.into(), wanted.into());
    // INIT_EXT is not asked for: fuser strips it, and a kernel that sends bit 37 has it.
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
