//! Whose rights passthrough I/O has.
//!
//! The kernel opens, reads and writes a backing file with the credentials and the Landlock domain of the *thread
//! that registered it*, as they were at that moment (`backing_file_open` in `fs/backing-file.c`). By default that is
//! all that root may do:
//!
//! | registered by | set-user-ID and set-group-ID bits, after a stranger's write | root's reserved blocks | quotas |
//! |---|---|---|---|
//! | nobody: the client itself, without passthrough | cleared | out of reach | hold |
//! | a thread with all of root's rights | **stay**, where the server has answered INIT with `FUSE_HANDLE_KILLPRIV` or `_V2` | **used** | **exceeded** |
//! | one without `CAP_FSETID` | cleared, by root's writes too | **used** | **exceeded** |
//! | one with `CAP_SYS_ADMIN` alone | cleared, by root's writes too | **used** | hold |
//! | the same, and with another fsuid than 0 | cleared, by root's writes too | out of reach, for root too | hold |
//!
//! Reserved blocks are open to the user that the filesystem names, who is root unless tune2fs(8) or the mount
//! option `resuid` says otherwise, by fsuid; to its group; and to `CAP_SYS_RESOURCE` (`ext4_has_free_clusters` in `fs/ext4/balloc.c`). Quotas are those of the
//! file's owner, and hold for everybody without `CAP_SYS_RESOURCE` (`ignore_hardlimit` in `fs/quota/dquot.c`; read,
//! not run).
//!
//! - [`Lowered`] registers with a chosen set of capabilities, and never with `CAP_FSETID`.
//! - [`RegistrarThread`] registers in a thread of its own, which the server prepares: it sets an fsuid, or enters
//!   a Landlock domain.
//! - [`ByAccess`] has one registrar for each [`Access`]: with Landlock, the kernel itself then refuses a client
//!   that was granted more than the server meant to grant.
//! - [`CapabilityGuard`] changes the calling thread's capabilities for the server's own calls.
//!
//! They use each other: see [`RegistrarThread`] for a registrar that has all of it.
//!
//! # `FUSE_HANDLE_KILLPRIV_V2`
//!
//! Before each write the kernel asks the server for the file's `security.capability`, unless the server has
//! answered INIT with this flag. It is most of what a small write costs. In return the server says that *it* clears
//! set-user-ID bits, set-group-ID bits of files that their group may execute, and `security.capability`.
//! In passthrough mode it sees no write, so the registrar must be one that is [`WithoutFsetid`]: then the
//! filesystem of the backing file clears them. What still reaches the server is the server's to do:
//!
//! | request | what the server does |
//! |---|---|
//! | WRITE with `FUSE_WRITE_KILL_SUIDGID` | makes its write(2) [without](CapabilityGuard::without) `CAP_FSETID` |
//! | SETATTR of the size with `FATTR_KILL_SUIDGID` | its truncate(2) likewise |
//! | OPEN and CREATE with `O_TRUNC` and `FUSE_OPEN_KILL_SUIDGID` | its open(2) likewise |
//! | FALLOCATE, `COPY_FILE_RANGE` | likewise for a client without `CAP_FSETID`. The kernel does not say, so that a server asks capget(2) of the client's thread |
//! | SETATTR of the owner | nothing: chown(2) clears them whoever calls it |
//!
//! fuser 0.18 hides the second flag and the third: there too the server asks whether the client has the capability,
//! see `examples/mirror/on_behalf.rs`.

mod by_access;
mod thread;

use std::cell::Cell;
use std::marker::PhantomData;
use std::os::fd::BorrowedFd;

use rustix::io::Errno;
use rustix::thread::{CapabilitySets, capabilities, set_capabilities};
use static_assertions::{assert_impl_all, assert_not_impl_any};

pub use by_access::ByAccess;
pub use rustix::thread::CapabilitySet;
pub use thread::RegistrarThread;

use crate::access::Access;
use crate::device::FuseDevice;
use crate::diagnose;
use crate::error::{BackingCloseError, BackingError, NotPermitted, RightsError};
use crate::id::BackingId;
use crate::register::{Register, WithoutFsetid};

/// Whether the calling thread has what the kernel asks of whoever registers: `CAP_SYS_ADMIN`, effective, in the
/// initial user namespace.
///
/// [`negotiate`](crate::init::negotiate) asks this itself. It is for servers whose library answers INIT without
/// telling what the kernel offers, to be asked before they ask for passthrough.
///
/// # Errors
///
/// [`NotPermitted`]: what is missing. What cannot be found out counts as there: the kernel will say. (On Android
/// nothing is missing, since its kernels do not ask.)
///
/// # Examples
///
/// ```
/// match fuse_backing::rights::may_register() {
///     Ok(()) => println!("asking for passthrough"),
///     Err(why) => println!("serving without passthrough: {why}"),
/// }
/// ```
pub fn may_register() -> Result<(), NotPermitted> {
    if cfg!(target_os = "android") {
        return Ok(());
    }
    diagnose::registering_permitted().map(|_certain| ())
}

/// Registers through another registrar with fewer effective capabilities than the calling thread has.
///
/// Those that stay are the chosen ones that the thread has, and `CAP_SYS_ADMIN`, without which the kernel
/// registers nothing. `CAP_FSETID` never stays. Permitted, inheritable and ambient capabilities are not changed.
/// Closing an id records no rights and is done as the thread is.
///
/// The inner registrar must register in the calling thread, as [`FuseDevice`] does.
///
/// # Examples
///
/// ```no_run
/// use fuse_backing::init::{InitFlags, MaxStackDepth, negotiate};
/// use fuse_backing::rights::{CapabilitySet, Lowered};
/// use fuse_backing::{BackingTable, FuseDevice};
///
/// # fn f(device: FuseDevice, offered: InitFlags) -> std::io::Result<()> {
/// let lowered = Lowered::around_each(device, CapabilitySet::empty());
/// let table: BackingTable<_> = BackingTable::new(lowered);
/// // In INIT. The type of the table says that nothing is registered with CAP_FSETID:
/// let reply = negotiate(offered, InitFlags::empty(), MaxStackDepth::One)?.handle_killpriv_v2(&table);
/// # Ok(()) }
/// ```
#[derive(Clone, Copy, Debug)]
pub struct Lowered<R> {
    registrar: R,
    keep: CapabilitySet,
    for_good: bool,
}

assert_impl_all!(Lowered<FuseDevice>: Send, Sync);

impl<R: Register> Lowered<R> {
    /// Lowers the calling thread for the time of each registration: three system calls more, or one where the
    /// thread has nothing to lose.
    pub fn around_each(registrar: R, keep: CapabilitySet) -> Self {
        Self::new(registrar, keep, false)
    }

    /// Lowers each thread at its first registration, for good, and then costs nothing. What the server
    /// itself does in these threads has the lowered rights too. So `keep` what it needs, and raise the
    /// thread with a [`CapabilityGuard`] for what needs `CAP_FSETID`: chmod(2) with the set-group-ID bit, and
    /// setting ACLs. While such a guard lives, registrations are made as by [`around_each`](Self::around_each).
    ///
    /// The crate remembers that a thread is lowered. A thread that gets capabilities back by other
    /// means must not register so: by capset(2), or by seteuid(2) or setfsuid(2) to 0, at which the kernel makes
    /// permitted capabilities effective.
    pub fn for_good(registrar: R, keep: CapabilitySet) -> Self {
        Self::new(registrar, keep, true)
    }

    fn new(registrar: R, keep: CapabilitySet, for_good: bool) -> Self {
        let keep = (keep | CapabilitySet::SYS_ADMIN) - CapabilitySet::FSETID;
        Self {
            registrar,
            keep,
            for_good,
        }
    }

    fn register_lowered(
        &self,
        file: BorrowedFd<'_>,
        grant: Access,
    ) -> Result<BackingId, BackingError> {
        if self.for_good && GUARDS.get() == 0 {
            self.lower_for_good()?;
            return self.registrar.register(file, grant);
        }
        let mut lowered = CapabilityGuard::only(self.keep)?;
        let result = self.registrar.register(file, grant);
        if let Err(error) = lowered.change_back(Other::Unchanged) {
            if let Ok(id) = result {
                // The error to report is the thread's.
                let _ = self.registrar.unregister(id);
            }
            return Err(error.into());
        }
        result
    }

    fn lower_for_good(&self) -> Result<(), RightsError> {
        let sets = settled()?;
        let effective = sets.effective & self.keep;
        set_effective(sets, effective).map_err(RightsError::NotChanged)?;
        LOWERED_TO.set(Some(effective));
        Ok(())
    }
}

impl<R: Register> Register for Lowered<R> {
    #[inline]
    fn register(&self, file: BorrowedFd<'_>, grant: Access) -> Result<BackingId, BackingError> {
        let lowered_to = LOWERED_TO.get().filter(|_| self.for_good);
        if lowered_to.is_some_and(|effective| self.keep.contains(effective)) {
            return self.registrar.register(file, grant);
        }
        self.register_lowered(file, grant)
    }

    #[inline]
    fn unregister(&self, id: BackingId) -> Result<(), BackingCloseError<BackingId>> {
        self.registrar.unregister(id)
    }

    #[inline]
    fn takes_path_fd(&self) -> bool {
        self.registrar.takes_path_fd()
    }

    #[inline]
    fn enforces_grant(&self) -> bool {
        self.registrar.enforces_grant()
    }
}

impl<R: Register> WithoutFsetid for Lowered<R> {}

thread_local! {
    /// What [`Lowered::for_good`] has left the thread, until a guard changes that.
    static LOWERED_TO: Cell<Option<CapabilitySet>> = const { Cell::new(None) };
    /// Guards that live: what they promise must not be lowered for good.
    static GUARDS: Cell<usize> = const { Cell::new(0) };
    /// What a guard could not make effective again.
    static OWED: Cell<Option<CapabilitySet>> = const { Cell::new(None) };
}

/// The sets of the calling thread, once what an earlier guard owes it is restored.
fn settled() -> Result<CapabilitySets, RightsError> {
    let sets = capabilities(None).map_err(RightsError::NotChanged)?;
    let Some(owed) = OWED.get() else {
        return Ok(sets);
    };
    let effective = owed & sets.permitted;
    set_effective(sets, effective).map_err(RightsError::NotRestored)?;
    OWED.set(None);
    Ok(CapabilitySets { effective, ..sets })
}

/// True if there was something to change.
fn set_effective(sets: CapabilitySets, effective: CapabilitySet) -> Result<bool, Errno> {
    let differs = sets.effective != effective;
    if differs {
        set_capabilities(None, CapabilitySets { effective, ..sets })?;
    }
    Ok(differs)
}

/// Other effective capabilities for the calling thread, until this is dropped.
///
/// Permitted, inheritable and ambient ones stay as they are, and what is no longer permitted does not become
/// effective again. Guards nest: the one that was made last is to be dropped first. Making one and dropping it takes
/// four system calls, or one if there is nothing to change.
///
/// If changing the thread back fails, for want of memory or by a seccomp filter, [`restore`](Self::restore) says
/// so. Dropping cannot say so. In both cases the next guard and the next registration by a [`Lowered`] in this
/// thread begin with another attempt, and fail if it fails.
///
/// # Examples
///
/// A server whose threads are [lowered for good](Lowered::for_good) gives a file the set-group-ID bit:
///
/// ```
/// use fuse_backing::rights::{CapabilityGuard, CapabilitySet};
/// # fn chmod() -> std::io::Result<()> { Ok(()) }
///
/// # fn f() -> std::io::Result<()> {
/// let raised = CapabilityGuard::with(CapabilitySet::FSETID)?;
/// chmod()?;
/// raised.restore()?;
/// # Ok(()) }
/// ```
///
/// It belongs to its thread:
///
/// ```compile_fail,E0277
/// # fn f(guard: fuse_backing::rights::CapabilityGuard) {
/// std::thread::spawn(move || drop(guard));
/// # }
/// ```
#[derive(Debug)]
#[must_use = "the capabilities are changed back when this is dropped"]
pub struct CapabilityGuard {
    /// What the thread had, and whether that was changed. `None`: it is changed back.
    before: Option<(CapabilitySets, bool)>,
    _of_this_thread: PhantomData<*const ()>,
}

assert_not_impl_any!(CapabilityGuard: Send, Sync);

impl CapabilityGuard {
    /// Makes further capabilities effective, which the thread must have among its permitted ones.
    ///
    /// # Errors
    ///
    /// [`RightsError`]: `EPERM` for those that are not permitted. Nothing is changed then.
    pub fn with(more: CapabilitySet) -> Result<Self, RightsError> {
        Self::change(|effective| effective | more)
    }

    /// Makes capabilities ineffective.
    ///
    /// # Errors
    ///
    /// [`RightsError`]; nothing is changed then.
    pub fn without(fewer: CapabilitySet) -> Result<Self, RightsError> {
        Self::change(|effective| effective - fewer)
    }

    /// Makes all other capabilities ineffective.
    ///
    /// # Errors
    ///
    /// [`RightsError`]; nothing is changed then.
    pub fn only(these: CapabilitySet) -> Result<Self, RightsError> {
        Self::change(|effective| effective & these)
    }

    fn change(change: impl FnOnce(CapabilitySet) -> CapabilitySet) -> Result<Self, RightsError> {
        let sets = settled()?;
        let changed = set_effective(sets, change(sets.effective));
        let changed = changed.map_err(RightsError::NotChanged)?;
        if changed {
            LOWERED_TO.set(None);
        }
        GUARDS.set(GUARDS.get() + 1);
        Ok(Self {
            before: Some((sets, changed)),
            _of_this_thread: PhantomData,
        })
    }

    /// Changes the thread back as dropping does, and reports the error.
    ///
    /// # Errors
    ///
    /// [`RightsError::NotRestored`].
    pub fn restore(mut self) -> Result<(), RightsError> {
        self.change_back(Other::Unknown)
    }

    fn change_back(&mut self, other: Other) -> Result<(), RightsError> {
        let Some((before, changed)) = self.before.take() else {
            return Ok(());
        };
        GUARDS.set(GUARDS.get() - 1);
        if !changed {
            return Ok(());
        }
        LOWERED_TO.set(None);
        let sets = match other {
            Other::Unchanged => Ok(before),
            Other::Unknown => capabilities(None),
        };
        let restored = sets.and_then(|sets| {
            let effective = before.effective & sets.permitted;
            set_capabilities(None, CapabilitySets { effective, ..sets })
        });
        OWED.set(restored.is_err().then_some(before.effective));
        restored.map_err(RightsError::NotRestored)
    }
}

impl Drop for CapabilityGuard {
    fn drop(&mut self) {
        // A destructor has nobody to tell; `restore` reports.
        let _ = self.change_back(Other::Unknown);
    }
}

/// What has become of the permitted and inheritable sets since a guard was made.
#[derive(Clone, Copy)]
enum Other {
    /// Nothing but a registrar has run. Spares the system call.
    Unchanged,
    Unknown,
}
