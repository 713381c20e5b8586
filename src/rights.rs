//! Whose rights passthrough I/O has, and how to lower them.
//!
//! The kernel opens, reads and writes a backing file with the credentials and the Landlock domain of the *thread
//! that registered it*, as they were at that moment (`backing_file_open` in `fs/backing-file.c`). Usually that thread
//! has all of root's rights:
//!
//! | registered by a thread | set-user-ID and set-group-ID bits, after a stranger's write | root's reserved blocks | quotas | a write after a reply that grants too much |
//! |---|---|---|---|---|
//! | with all of root's rights ([`FuseDevice`]) | **stay**, if the server has answered INIT with `FUSE_HANDLE_KILLPRIV` or `_V2`. If not, small writes take ten times as long, unless it answers GETXATTR with `ENOSYS` | **used** | **exceeded** | **succeeds** |
//! | without `CAP_FSETID` | cleared, by root's writes too | **used** | **exceeded** | **succeeds** |
//! | with `CAP_SYS_ADMIN` alone | cleared, by root's writes too | **used** | hold | **succeeds** |
//! | the same, and with another fsuid than 0 | cleared, by root's writes too | out of reach, for root too | hold | **succeeds** |
//! | the same, and in a Landlock domain that denies writing | cleared, by root's writes too | out of reach, for root too | hold | `EIO`; the file is unchanged |
//! | no registration: a client that writes the backing file itself, without FUSE | cleared | out of reach | hold | |
//!
//! ext4 lets three use reserved blocks: the reserving user, by fsuid (root, unless tune2fs(8) or the mount option
//! `resuid` names another), the reserving group, and `CAP_SYS_RESOURCE` (`ext4_has_free_clusters` in
//! `fs/ext4/balloc.c`). Quotas are those of the file's owner. `CAP_SYS_RESOURCE` ignores them (`ignore_hardlimit` in
//! `fs/quota/dquot.c`; from the source, not measured).
//!
//! # Registrars with lower rights
//!
//! | registrar | registers | cost of a registration and its close, as a multiple of [`FuseDevice`]'s |
//! |---|---|---|
//! | [`Lowered::per_registration`] | with a chosen set of capabilities, never with `CAP_FSETID` | 1.74; 1.61 in a run of 20 000 registrations |
//! | [`Lowered::permanently`] | the same; the thread stays lowered | 1.005; 1.14 if it keeps `CAP_SETUID` |
//! | [`RegistrarThread`] | in a thread of its own, which the server prepares: it sets an fsuid, or enters a Landlock domain | 5.8 with a [`Lowered`] inside, with or without a Landlock domain |
//! | [`ByAccess`] | through one of three registrars, by [`Access`] | one statx(2) more for each registration for less than reading and writing |
//!
//! They combine, see the examples of [`RegistrarThread`] and [`ByAccess`]. Costs are from Linux 6.18; `cargo bench
//! --bench round_trip` measures them on your machine.
//!
//! [`CapabilityGuard`] changes the calling thread's capabilities for the server's own calls.
//!
//! Use Landlock where not every reply can be trusted: no client can then write through an id that was registered for
//! reading, whatever a reply says. `examples/enforced.rs` is such a server. Once the domain exists, it costs
//! nothing, and it restricts files of other mount namespaces too. It does not restrict memfds, so [`ByAccess`]
//! refuses them ([`NotEnforceable`](BackingError::NotEnforceable)).
//!
//! A detached read-only clone of the file's mount (`open_tree(2)`, `mount_setattr(2)`) keeps clients from writing as
//! well. But for each file it takes as long as ten registrations, and it fails with `EINVAL` for files of other mount
//! namespaces and for memfds.
//!
//! # Before there are other threads
//!
//! libc's setuid(2), seteuid(2), setgid(2), setgroups(2) and similar functions change every thread of the process,
//! including lowered and registrar threads: a registrar's fsuid becomes that of the new user. If a lowered thread is
//! not permitted the change that another thread makes, glibc ends the process. So call these functions before any
//! thread is lowered or prepared. setfsuid(2), setfsgid(2), capset(2) and Landlock change one thread.
//!
//! # `FUSE_HANDLE_KILLPRIV_V2`
//!
//! Before each write the kernel asks the server for `security.capability`, which is most of the cost of a small write.
//! (A server that answers GETXATTR with `ENOSYS` is asked once; from the source, not measured.) A server that answers
//! INIT with this flag is not asked. In return it must clear set-user-ID bits, set-group-ID bits of group-executable
//! files, and `security.capability`. In passthrough mode the server sees no writes: only the filesystem of the backing
//! file can clear these bits, and does if the file was registered without `CAP_FSETID`. So
//! [`Negotiated::handle_killpriv_v2`](crate::init::Negotiated::handle_killpriv_v2) requires a registrar that is
//! [`WithoutFsetid`]. The price: root's own writes clear the bits too.
//!
//! The server must handle these requests differently:
//!
//! | request | what the server does |
//! |---|---|
//! | WRITE with `FUSE_WRITE_KILL_SUIDGID` | makes its write(2) [without](CapabilityGuard::without) `CAP_FSETID` |
//! | SETATTR of the size with `FATTR_KILL_SUIDGID` | makes its truncate(2) without it |
//! | OPEN and CREATE with `O_TRUNC` and `FUSE_OPEN_KILL_SUIDGID` | makes its open(2) without it |
//! | FALLOCATE, `COPY_FILE_RANGE` | makes its call without it for a client that lacks `CAP_FSETID`. The kernel does not say whether the client has it. The server calls capget(2) on the client's thread, if that thread is in the server's user namespace |
//! | SETATTR of the owner | nothing for executable files: chown(2) clears their bits for every caller. (The set-group-ID bit of a file that its group may not execute stays if the server has `CAP_FSETID`.) |
//!
//! fuser 0.18 hides `FATTR_KILL_SUIDGID` and `FUSE_OPEN_KILL_SUIDGID`. For these requests too the server asks whether
//! the client has the capability,
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
/// [`NotPermitted`] says what is missing. If that cannot be determined, the result is `Ok`, and the kernel decides
/// later. (On Android nothing is missing, since its kernels do not require it.)
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
/// let lowered = Lowered::per_registration(device, CapabilitySet::empty());
/// let table: BackingTable<_> = BackingTable::new(lowered);
/// // In INIT. The type of the table says that nothing is registered with CAP_FSETID:
/// let reply = negotiate(offered, InitFlags::empty(), MaxStackDepth::One)?.handle_killpriv_v2(&table);
/// # Ok(()) }
/// ```
///
/// `Lowered` goes inside a [`RegistrarThread`], not around it, since it lowers the calling thread:
///
/// ```compile_fail,E0277
/// use fuse_backing::rights::{CapabilitySet, Lowered, RegistrarThread};
/// # fn f(thread: RegistrarThread<fuse_backing::FuseDevice>) {
/// let lowered = Lowered::per_registration(thread, CapabilitySet::empty());
/// # }
/// ```
#[derive(Clone, Copy, Debug)]
pub struct Lowered<R> {
    registrar: R,
    keep: CapabilitySet,
    permanently: bool,
}

assert_impl_all!(Lowered<FuseDevice>: Send, Sync);

impl<R: InCallingThread> Lowered<R> {
    /// Lowers the calling thread during each registration. This adds three system calls, or one if the thread has
    /// nothing to lower.
    pub fn per_registration(registrar: R, keep: CapabilitySet) -> Self {
        Self::new(registrar, keep, false)
    }

    /// Lowers each thread at its first registration, and leaves it lowered. The server's own calls in these threads
    /// have the lowered rights too. So `keep` what they need, and raise the thread with a [`CapabilityGuard`] for calls
    /// that need `CAP_FSETID`: chmod(2) with the set-group-ID bit, and setting ACLs. While a guard lives,
    /// registrations are made as by [`per_registration`](Self::per_registration).
    ///
    /// Further registrations make no further system call in a thread that cannot get capabilities back by changing its
    /// user ids: one that keeps no `CAP_SETUID` and whose user ids are all the same. Other threads are examined each
    /// time, by one capget(2), and lowered again, since seteuid(2) and setfsuid(2) to 0 make permitted capabilities
    /// effective. Do not raise a lowered thread by capset(2): that is not noticed.
    pub fn permanently(registrar: R, keep: CapabilitySet) -> Self {
        Self::new(registrar, keep, true)
    }

    fn new(registrar: R, keep: CapabilitySet, permanently: bool) -> Self {
        let keep = (keep | CapabilitySet::SYS_ADMIN) - CapabilitySet::FSETID;
        Self {
            registrar,
            keep,
            permanently,
        }
    }

    fn register_lowered(
        &self,
        file: BorrowedFd<'_>,
        grant: Access,
    ) -> Result<BackingId, BackingError> {
        if self.permanently && GUARDS.get() == 0 {
            self.lower_permanently()?;
            return self.registrar.register(file, grant);
        }
        let mut lowered = CapabilityGuard::only(self.keep)?;
        let result = self.registrar.register(file, grant);
        if let Err(error) = lowered.change_back(OtherSets::Unchanged) {
            if let Ok(id) = result {
                // Reports the error of `change_back`, not that of closing.
                let _ = self.registrar.unregister(id);
            }
            return Err(error.into());
        }
        result
    }

    /// Lowers the calling thread, and records in `LOWERED` whether it can get capabilities back.
    fn lower_permanently(&self) -> Result<(), RightsError> {
        let sets = current_sets()?;
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
            Lowering::Final(effective) if self.permanently && self.keep.contains(effective) => {
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

/// The state of a thread that [`Lowered::permanently`] has lowered.
#[derive(Clone, Copy)]
enum Lowering {
    /// The thread was not lowered yet, or a guard has changed it since.
    Unknown,
    /// The thread has these effective capabilities, and cannot get others back by changing its user ids.
    Final(CapabilitySet),
    /// The thread can get capabilities back by changing its user ids, so it is examined at each registration.
    Revocable,
}

thread_local! {
    static LOWERED: Cell<Lowering> = const { Cell::new(Lowering::Unknown) };
    /// How many guards of this thread are alive. While there is one, the thread is not lowered for good.
    static GUARDS: Cell<usize> = const { Cell::new(0) };
    /// The effective set that a guard failed to restore.
    static OWED: Cell<Option<CapabilitySet>> = const { Cell::new(None) };
}

/// Whether the real, effective, saved and filesystem user ids of the calling thread are the same: if so, it can change
/// none of them without `CAP_SETUID`. False if `/proc` does not tell.
fn has_one_uid() -> bool {
    let status = fs::read_to_string("/proc/thread-self/status").unwrap_or_default();
    let uids = status.lines().find_map(|line| line.strip_prefix("Uid:"));
    let mut uids = uids.unwrap_or_default().split_whitespace();
    let first = uids.next();
    first.is_some() && uids.all(|uid| Some(uid) == first)
}

/// The calling thread's sets, after restoring what an earlier guard failed to restore.
fn current_sets() -> Result<CapabilitySets, RightsError> {
    let sets = capabilities(None).map_err(RightsError::NotChanged)?;
    let Some(owed) = OWED.get() else {
        return Ok(sets);
    };
    let effective = owed & sets.permitted;
    set_effective(sets, effective).map_err(RightsError::NotRestored)?;
    OWED.set(None);
    Ok(CapabilitySets { effective, ..sets })
}

/// Sets the calling thread's effective set. Returns whether that changed it.
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
/// Drop nested guards in reverse order. Making and dropping a guard takes four system calls, or one if there is nothing
/// to change.
///
/// Restoring fails if memory runs out or seccomp denies it. [`restore`](Self::restore) reports that; dropping cannot.
/// The thread's next guard, or next registration by a [`Lowered`], then tries again first, and fails if that fails.
///
/// # Examples
///
/// A server whose threads are [lowered for good](Lowered::permanently) gives a file the set-group-ID bit:
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
/// A guard belongs to its thread:
///
/// ```compile_fail,E0277
/// # fn f(guard: fuse_backing::rights::CapabilityGuard) {
/// std::thread::spawn(move || drop(guard));
/// # }
/// ```
#[derive(Debug)]
#[must_use = "the capabilities are changed back when this is dropped"]
pub struct CapabilityGuard {
    /// The thread's sets when the guard was made, and whether the guard has changed them. `None` once restored.
    before: Option<(CapabilitySets, bool)>,
    _of_this_thread: PhantomData<*const ()>,
}

assert_not_impl_any!(CapabilityGuard: Send, Sync);

impl CapabilityGuard {
    /// Makes further capabilities effective, which must be in the thread's permitted set. The kernel ignores
    /// capabilities that it does not know.
    ///
    /// # Errors
    ///
    /// [`RightsError`]: `EPERM` if one of them is not permitted. Nothing is changed then.
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
        let sets = current_sets()?;
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

    /// Restores the thread's capabilities, as dropping does, and reports an error.
    ///
    /// # Errors
    ///
    /// [`RightsError::NotRestored`].
    pub fn restore(mut self) -> Result<(), RightsError> {
        self.change_back(OtherSets::Unknown)
    }

    /// Restores the effective set. If that fails, `OWED` keeps it for [`current_sets`] to restore.
    fn change_back(&mut self, other: OtherSets) -> Result<(), RightsError> {
        let Some((before, changed)) = self.before.take() else {
            return Ok(());
        };
        GUARDS.set(GUARDS.get() - 1);
        if !changed {
            return Ok(());
        }
        LOWERED.set(Lowering::Unknown);
        let sets = match other {
            OtherSets::Unchanged => Ok(before),
            OtherSets::Unknown => capabilities(None),
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
        // A destructor cannot report an error; `restore` does.
        let _ = self.change_back(OtherSets::Unknown);
    }
}

/// Whether the permitted and inheritable sets may have changed since a guard was made.
#[derive(Clone, Copy)]
enum OtherSets {
    /// They are unchanged, because only the inner registrar has run. This saves a capget(2).
    Unchanged,
    /// They may have changed.
    Unknown,
}
