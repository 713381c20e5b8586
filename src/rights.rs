//! Whose rights passthrough I/O has.
//!
//! The kernel opens, reads and writes a backing file with the credentials and the Landlock domain of the *thread
//! that registered it*, as they were at that moment (`backing_file_open` in `fs/backing-file.c`). Usually that is a
//! thread with all of root's rights:
//!
//! | registered by | set-user-ID and set-group-ID bits, after a stranger's write | root's reserved blocks | quotas |
//! |---|---|---|---|
//! | nobody: the client itself, without passthrough | cleared | out of reach | hold |
//! | a thread with all of root's rights | **stay**, where the server has answered INIT with `FUSE_HANDLE_KILLPRIV` or `_V2` | **used** | **exceeded** |
//! | one without `CAP_FSETID` | cleared, by root's writes too | **used** | **exceeded** |
//! | one with `CAP_SYS_ADMIN` alone | cleared, by root's writes too | **used** | hold |
//! | the same, and with another fsuid than 0 | cleared, by root's writes too | out of reach, for root too | hold |
//!
//! ext4 opens reserved blocks to three: the reserving user, by fsuid (root, unless tune2fs(8) or the mount option
//! `resuid` names another), the reserving group, and `CAP_SYS_RESOURCE` (`ext4_has_free_clusters` in
//! `fs/ext4/balloc.c`). Quotas are the file owner's. `CAP_SYS_RESOURCE` ignores them (`ignore_hardlimit` in
//! `fs/quota/dquot.c`; from the source, not measured).
//!
//! - [`Lowered`] registers with a chosen set of capabilities, and never with `CAP_FSETID`.
//! - [`RegistrarThread`] registers in a thread of its own, which the server prepares: it sets an fsuid, or enters
//!   a Landlock domain.
//! - [`ByAccess`] has one registrar for each [`Access`]: with Landlock, the kernel itself then refuses a client
//!   that was granted more than the server meant to grant.
//! - [`CapabilityGuard`] changes the calling thread's capabilities for the server's own calls.
//!
//! They combine: the example of [`RegistrarThread`] has the first two.
//!
//! # Before there are other threads
//!
//! libc's setuid(2), seteuid(2), setgid(2), setgroups(2) and their kin change every thread of the process, also
//! these: a registrar's fsuid becomes the new user's. And if a lowered thread may not make the change that another one
//! makes, glibc ends the process. Call them before any thread is lowered or prepared. setfsuid(2), setfsgid(2),
//! capset(2) and Landlock change one thread.
//!
//! # `FUSE_HANDLE_KILLPRIV_V2`
//!
//! Before each write the kernel asks the server for `security.capability`, which is most of the cost of a small
//! write. A server that answers INIT with this flag is not asked. In return it must clear set-user-ID bits,
//! set-group-ID bits of group-executable files, and `security.capability`. In passthrough mode it sees no writes: the
//! backing filesystem clears them, if the file was registered without `CAP_FSETID`. So the registrar must be
//! [`WithoutFsetid`]. The server handles the rest:
//!
//! | request | what the server does |
//! |---|---|
//! | WRITE with `FUSE_WRITE_KILL_SUIDGID` | makes its write(2) [without](CapabilityGuard::without) `CAP_FSETID` |
//! | SETATTR of the size with `FATTR_KILL_SUIDGID` | its truncate(2) likewise |
//! | OPEN and CREATE with `O_TRUNC` and `FUSE_OPEN_KILL_SUIDGID` | its open(2) likewise |
//! | FALLOCATE, `COPY_FILE_RANGE` | likewise for a client without `CAP_FSETID`. The kernel does not say: the server asks capget(2) of the client's thread, if that is in the server's user namespace |
//! | SETATTR of the owner | nothing for programs: chown(2) clears their bits for every caller. (The set-group-ID bit of a file that its group may not execute stays if the server has `CAP_FSETID`.) |
//!
//! fuser 0.18 hides the second flag and the third: there too the server asks whether the client has the capability,
//! see `examples/mirror/on_behalf.rs`.

mod by_access;
mod thread;

use std::cell::Cell;
use std::fs;
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
use crate::register::{InCallingThread, Register, WithoutFsetid};

/// Whether the calling thread may register: it needs effective `CAP_SYS_ADMIN` in the initial user namespace.
///
/// [`negotiate`](crate::init::negotiate) checks this. Call it yourself if your FUSE library does not show what the
/// kernel offers in INIT.
///
/// # Errors
///
/// [`NotPermitted`]: what is missing. What cannot be determined counts as present; the kernel then decides. (On Android
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
/// Keeps the chosen capabilities that the thread has, and `CAP_SYS_ADMIN`, which registering needs. Never keeps
/// `CAP_FSETID`. Permitted, inheritable and ambient sets are unchanged. Closing an id uses the thread's own
/// capabilities.
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
///
/// A thread of its own is lowered from within, not from without:
///
/// ```compile_fail,E0277
/// use fuse_backing::rights::{CapabilitySet, Lowered, RegistrarThread};
/// # fn f(thread: RegistrarThread<fuse_backing::FuseDevice>) {
/// let lowered = Lowered::around_each(thread, CapabilitySet::empty());
/// # }
/// ```
#[derive(Clone, Copy, Debug)]
pub struct Lowered<R> {
    registrar: R,
    keep: CapabilitySet,
    for_good: bool,
}

assert_impl_all!(Lowered<FuseDevice>: Send, Sync);

impl<R: InCallingThread> Lowered<R> {
    /// Lowers the calling thread for the time of each registration: three system calls more, or one where the
    /// thread has nothing to lose.
    pub fn around_each(registrar: R, keep: CapabilitySet) -> Self {
        Self::new(registrar, keep, false)
    }

    /// Lowers each thread at its first registration, and leaves it lowered. What the server itself does in these
    /// threads has the lowered rights too. So `keep` what it needs, and raise the thread with a
    /// [`CapabilityGuard`] for what needs `CAP_FSETID`: chmod(2) with the set-group-ID bit, and setting ACLs. While
    /// a guard lives, registrations are made as by [`around_each`](Self::around_each).
    ///
    /// Further registrations cost nothing in a thread that cannot get capabilities back by changing its user ids: one
    /// that keeps no `CAP_SETUID` and whose ids are all the same. Others are looked at each time, by one capget(2),
    /// and lowered again, since seteuid(2) and setfsuid(2) to 0 make permitted capabilities effective. Do not
    /// raise a lowered thread by capset(2): that is not noticed.
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
        LOWERED.set(match LOWERED.get() {
            Lowering::Unknown if effective.contains(CapabilitySet::SETUID) || !has_one_uid() => {
                Lowering::Revocable
            }
            Lowering::Unknown | Lowering::Final(_) => Lowering::Final(effective),
            Lowering::Revocable => Lowering::Revocable,
        });
        Ok(())
    }
}

impl<R: InCallingThread> Register for Lowered<R> {
    #[inline]
    fn register(&self, file: BorrowedFd<'_>, grant: Access) -> Result<BackingId, BackingError> {
        match LOWERED.get() {
            Lowering::Final(effective) if self.for_good && self.keep.contains(effective) => {
                self.registrar.register(file, grant)
            }
            _ => self.register_lowered(file, grant),
        }
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

impl<R: InCallingThread> InCallingThread for Lowered<R> {}
impl<R: InCallingThread> WithoutFsetid for Lowered<R> {}

/// What [`Lowered::for_good`] has made of a thread.
#[derive(Clone, Copy)]
enum Lowering {
    /// Nothing yet, or a guard has changed it since.
    Unknown,
    /// These, and the thread can get back no others by itself.
    Final(CapabilitySet),
    /// It can change its user ids, and get others back that way: it is looked at each time.
    Revocable,
}

thread_local! {
    static LOWERED: Cell<Lowering> = const { Cell::new(Lowering::Unknown) };
    /// Live guards: while there are any, nothing is lowered for good.
    static GUARDS: Cell<usize> = const { Cell::new(0) };
    /// Effective set that a guard failed to restore.
    static OWED: Cell<Option<CapabilitySet>> = const { Cell::new(None) };
}

/// Real, effective, saved and filesystem user id of the calling thread are the same: it can change none of them without
/// `CAP_SETUID`. Where `/proc` does not tell, they may differ.
fn has_one_uid() -> bool {
    let status = fs::read_to_string("/proc/thread-self/status").unwrap_or_default();
    let uids = status.lines().find_map(|line| line.strip_prefix("Uid:"));
    let mut uids = uids.unwrap_or_default().split_whitespace();
    let first = uids.next();
    first.is_some() && uids.all(|uid| Some(uid) == first)
}

/// The calling thread's sets, after restoring what an earlier guard could not.
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

/// Changes the calling thread's effective capabilities until dropped.
///
/// Permitted, inheritable and ambient sets are unchanged. A capability that is no longer permitted is not restored.
/// Drop nested guards in reverse order. Making one and dropping it takes four system calls, or one if there is nothing
/// to change.
///
/// Restoring fails if memory runs out or seccomp denies it. [`restore`](Self::restore) reports that; dropping cannot.
/// The thread's next guard, or next registration by a [`Lowered`], then tries again first, and fails if that fails.
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
            LOWERED.set(Lowering::Unknown);
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
        LOWERED.set(Lowering::Unknown);
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
