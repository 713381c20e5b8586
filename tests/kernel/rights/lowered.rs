//! `Lowered` and `CapabilityGuard`: the rights that the kernel records, and those that the thread has afterwards.

use std::ffi::OsStr;
use std::fs::{self, File, Permissions};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd};
use std::os::unix::fs::PermissionsExt;
use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::sync::Mutex;

use fuse_backing::error::{BackingCloseError, BackingError, RightsError};
use fuse_backing::rights::{CapabilityGuard, CapabilitySet, Lowered, RegistrarThread};
use fuse_backing::{Access, BackingId, Register, error::Errno, register::InCallingThread, uapi};
use libtest_mimic::Failed;
use macro_rules_attribute::apply;
use nix::unistd::setfsuid;
use rustix::fs::{XattrFlags, fgetxattr, fsetxattr};
use rustix::thread::{CapabilitySets, configure_capability_in_ambient_set, set_capabilities};

use super::{CONTENT, Device, Noting, Place, WRITTEN, as_stranger, assert_closed, sets};
use crate::fuse::{Connection, Init, mounted};
use crate::sandbox::{Sandbox, Tmpfs};
use crate::seccomp::{refuse, refuse_next};
use crate::thread::apart;
use crate::trace::{self, Call};

const NONE: CapabilitySet = CapabilitySet::empty();
const ADMIN: CapabilitySet = CapabilitySet::SYS_ADMIN;
const FSETID: CapabilitySet = CapabilitySet::FSETID;
const CHOWN: CapabilitySet = CapabilitySet::CHOWN;

const SUID: u32 = 0o4000;
const SGID: u32 = 0o2000;

/// A way to register the file that a stranger writes.
type Registering = fn(Device, &File) -> BackingId;

fn with_all_rights(device: Device, file: &File) -> BackingId {
    assert!(sets().effective.contains(FSETID));
    device.backing_open(file).expect("registered")
}

fn by(registrar: &impl Register, file: &File) -> BackingId {
    let registered = registrar.register(file.as_fd(), Access::ReadWrite);
    registered.expect("registered")
}

fn without_fsetid() -> [Registering; 3] {
    [
        |device, file| by(&Lowered::per_registration(device, NONE), file),
        |device, file| by(&Lowered::permanently(device, NONE), file),
        |device, file| {
            let lowered = Lowered::permanently(device, NONE);
            let thread = RegistrarThread::spawn(lowered, || Ok::<(), Errno>(()));
            by(&thread.expect("started"), file)
        },
    ]
}

/// A stranger writes through a mount whose server negotiated `FUSE_HANDLE_KILLPRIV_V2`: it says that it clears set-ID
/// bits and file capabilities itself.
fn written(sandbox: &Sandbox, file: &File, registering: Registering) -> Result<(), Failed> {
    let mut init = Init::passthrough(1);
    init.flags |= uapi::FUSE_HANDLE_KILLPRIV_V2;
    let place = Place::new(sandbox, init, file)?;
    let device = place.connection.device();
    place.answer_with(apart(|| registering(device, file)));
    assert_eq!(place.client("w")?, "written");
    let content = fs::read_to_string(format!("/proc/self/fd/{}", file.as_raw_fd()))?;
    assert_eq!(content, CONTENT.replacen("con", WRITTEN, 1));
    assert_eq!(place.asked(), (0, 0));
    Ok(())
}

fn mode(file: &File) -> Result<u32, Failed> {
    Ok(file.metadata()?.permissions().mode() & 0o7777)
}

fn executable(tmpfs: &Tmpfs, mode: u32) -> Result<File, Failed> {
    let file = tmpfs.file("file", CONTENT)?;
    file.set_permissions(Permissions::from_mode(mode))?;
    Ok(file)
}

#[apply(needs_passthrough)]
fn setid_bits_after_a_strangers_write(sandbox: &Sandbox) -> Result<(), Failed> {
    const SETID: u32 = SUID | SGID | 0o777;
    let fresh = || -> Result<_, Failed> {
        let tmpfs = sandbox.tmpfs()?;
        let file = executable(&tmpfs, SETID)?;
        assert_eq!(mode(&file)?, SETID);
        Ok((tmpfs, file))
    };

    // The controls: without FUSE, and with all rights.
    let (tmpfs, file) = fresh()?;
    assert_eq!(as_stranger(&tmpfs.path().join("file"), "w")?, "written");
    assert_eq!(mode(&file)?, 0o777);
    let (_tmpfs, file) = fresh()?;
    written(sandbox, &file, with_all_rights)?;
    assert_eq!(mode(&file)?, SETID);

    for registering in without_fsetid() {
        let (_tmpfs, file) = fresh()?;
        written(sandbox, &file, registering)?;
        assert_eq!(mode(&file)?, 0o777);
    }
    Ok(())
}

/// The kernel removes file capabilities whatever the registrar's rights.
#[apply(needs_passthrough)]
fn file_capabilities_after_a_strangers_write(sandbox: &Sandbox) -> Result<(), Failed> {
    const NAME: &str = "security.capability";
    // A `vfs_cap_data` of VFS_CAP_REVISION_2 with the effective flag and CAP_NET_RAW permitted.
    let data = [0x0200_0001, 1 << 13, 0, 0, 0].map(u32::to_le_bytes);
    let has_some = |file: &File| fgetxattr(file, NAME, &mut [0; 64][..]).is_ok();
    for registering in without_fsetid().into_iter().chain([with_all_rights as _]) {
        let tmpfs = sandbox.tmpfs()?;
        let file = executable(&tmpfs, 0o777)?;
        match fsetxattr(&file, NAME, &data.concat(), XattrFlags::empty()) {
            Ok(()) => assert!(has_some(&file)),
            // Without CONFIG_TMPFS_XATTR tmpfs has no such attribute. The write is all that can be tested.
            Err(errno) => assert_eq!(errno, Errno::OPNOTSUPP),
        }
        written(sandbox, &file, registering)?;
        assert!(!has_some(&file));
    }
    Ok(())
}

/// The ambient set of this thread, which capget(2) does not return.
fn ambient() -> u64 {
    let status = fs::read_to_string("/proc/thread-self/status").expect("/proc");
    let ambient = status.lines().find_map(|line| line.strip_prefix("CapAmb:"));
    u64::from_str_radix(ambient.expect("a line").trim(), 16).expect("hexadecimal")
}

/// Changes this thread's capability sets.
fn set(change: impl FnOnce(&mut CapabilitySets)) {
    let mut changed = sets();
    change(&mut changed);
    set_capabilities(None, changed).expect("capset");
}

fn noting(sandbox: &Sandbox) -> Result<(Connection, Noting, File), Failed> {
    let connection = Connection::mount(sandbox, Init::passthrough(1))?;
    let noting = Noting::new(connection.device());
    Ok((connection, noting, tempfile::tempfile()?))
}

#[apply(needs_passthrough)]
fn around_each_leaves_the_thread_as_it_was(sandbox: &Sandbox) -> Result<(), Failed> {
    let (_connection, noting, file) = noting(sandbox)?;
    // The thread has no CAP_SYS_TIME to keep.
    let keep = CapabilitySet::DAC_OVERRIDE | CapabilitySet::SYS_TIME;
    let lowered = Lowered::per_registration(&noting, keep);
    apart(|| {
        set(|sets| sets.inheritable |= CHOWN);
        configure_capability_in_ambient_set(CHOWN, true).expect("prctl");
        set(|sets| sets.effective -= CapabilitySet::SYS_TIME);
        let before = sets();
        assert_eq!(ambient(), CHOWN.bits());
        assert!(before.effective.contains(FSETID | CHOWN));

        for _ in 0..2 {
            let id = by(&lowered, &file);
            assert_eq!((sets(), ambient()), (before, CHOWN.bits()));
            let expected = CapabilitySets {
                effective: ADMIN | CapabilitySet::DAC_OVERRIDE,
                ..before
            };
            assert_eq!(noting.noted().last(), Some(&(expected, Some(id.as_raw()))));
            lowered.unregister(id).expect("closed");
            assert_eq!((sets(), ambient()), (before, CHOWN.bits()));
        }
    });
    Ok(())
}

#[apply(needs_passthrough)]
fn fsetid_cannot_be_kept(sandbox: &Sandbox) -> Result<(), Failed> {
    let (_connection, noting, file) = noting(sandbox)?;
    for make in [Lowered::per_registration, Lowered::permanently] {
        let lowered = make(&noting, CapabilitySet::all());
        let kept = apart(|| {
            let all = sets().effective;
            assert!(all.contains(FSETID));
            lowered.unregister(by(&lowered, &file)).expect("closed");
            all - FSETID
        });
        assert_eq!(noting.effective(), kept);
    }
    Ok(())
}

#[apply(needs_passthrough)]
fn permanently_lowers_the_thread(sandbox: &Sandbox) -> Result<(), Failed> {
    let (_connection, noting, file) = noting(sandbox)?;
    // The thread has no CAP_SYS_TIME to keep.
    let wide = Lowered::permanently(&noting, CHOWN | FSETID | CapabilitySet::SYS_TIME);
    let narrow = Lowered::permanently(&noting, NONE);
    apart(|| {
        set(|sets| sets.effective -= CapabilitySet::SYS_TIME);
        let before = sets();
        for (lowered, effective) in [(&wide, ADMIN | CHOWN), (&narrow, ADMIN), (&wide, ADMIN)] {
            lowered.unregister(by(lowered, &file)).expect("closed");
            assert_eq!(noting.effective(), effective);
            let expected = CapabilitySets {
                effective,
                ..before
            };
            assert_eq!(sets(), expected);
        }
    });
    Ok(())
}

const ROUNDS: usize = 3;

/// Registers with `Lowered` as `args[1]` names it, after a first registration as `args[2]` names it.
pub(super) fn register(args: &[String]) -> Result<String, Box<dyn std::error::Error>> {
    let device = mounted(args[0].as_ref(), Init::passthrough(1)).map_err(|e| format!("{e:?}"))?;
    let file = tempfile::tempfile()?;
    let made = |how: &str| match how {
        "for-good" => Lowered::permanently(&device, NONE),
        _ => Lowered::per_registration(&device, NONE),
    };
    let lowered = made(&args[1]);
    let mut registered = vec![by(&made(&args[2]), &file)];
    trace::traced(|| registered.extend((0..ROUNDS).map(|_| by(&lowered, &file))))?;
    for id in registered {
        device.backing_close(id)?;
    }
    Ok("done".into())
}

#[apply(needs_passthrough)]
fn system_calls(sandbox: &Sandbox) -> Result<(), Failed> {
    use libc::{SYS_capget, SYS_capset, SYS_ioctl};
    let each = [SYS_capget, SYS_capset, SYS_ioctl, SYS_capset];
    for (how, first, expected) in [
        ("around-each", "around-each", &each[..]),
        // The thread has nothing left to lower.
        ("around-each", "for-good", &[SYS_capget, SYS_ioctl]),
        ("for-good", "for-good", &[SYS_ioctl]),
    ] {
        let mountpoint = sandbox.folder("mnt")?;
        let args = [mountpoint.as_os_str(), OsStr::new(how), OsStr::new(first)];
        let made = trace::calls_of("register-lowered", &args)?;
        let made: Vec<_> = made.iter().map(|call: &Call| call.number).collect();
        assert_eq!(made, expected.repeat(ROUNDS), "{how} after {first}");
    }
    Ok(())
}

#[apply(needs_passthrough)]
fn raised_in_a_thread_that_is_lowered_for_good(sandbox: &Sandbox) -> Result<(), Failed> {
    let (_connection, noting, file) = noting(sandbox)?;
    let lowered = Lowered::permanently(&noting, NONE);
    let registered = || {
        lowered.unregister(by(&lowered, &file)).expect("closed");
        noting.effective()
    };
    apart(|| {
        assert_eq!(registered(), ADMIN);
        let raised = CapabilityGuard::with(FSETID).expect("permitted");
        assert_eq!(sets().effective, ADMIN | FSETID);
        assert_eq!(registered(), ADMIN);
        assert_eq!(sets().effective, ADMIN | FSETID, "restored afterwards");
        raised.restore().expect("capset");
        assert_eq!(sets().effective, ADMIN);
        assert_eq!(registered(), ADMIN);

        drop(CapabilityGuard::with(FSETID | CHOWN).expect("permitted"));
        assert_eq!(sets().effective, ADMIN);
        assert_eq!(registered(), ADMIN);
    });
    Ok(())
}

/// What a guard promises holds while it exists, even if it had nothing to change.
#[apply(needs_passthrough)]
fn raised_before_the_thread_is_lowered_for_good(sandbox: &Sandbox) -> Result<(), Failed> {
    let (_connection, noting, file) = noting(sandbox)?;
    let lowered = Lowered::permanently(&noting, NONE);
    apart(|| {
        let raised = CapabilityGuard::with(FSETID).expect("permitted");
        lowered.unregister(by(&lowered, &file)).expect("closed");
        assert_eq!(noting.effective(), ADMIN);
        assert!(sets().effective.contains(FSETID), "the guard exists");
        raised.restore().expect("nothing to restore");
        lowered.unregister(by(&lowered, &file)).expect("closed");
        assert_eq!(sets().effective, ADMIN);
    });
    Ok(())
}

#[apply(needs_nothing)]
fn nested_guards(_: &Sandbox) -> Result<(), Failed> {
    apart(|| {
        let before = sets();
        let only = CapabilityGuard::only(ADMIN | CHOWN).expect("capset");
        assert_eq!(sets().effective, ADMIN | CHOWN);
        let with = CapabilityGuard::with(FSETID).expect("capset");
        assert_eq!(sets().effective, ADMIN | CHOWN | FSETID);
        let without = CapabilityGuard::without(CHOWN | CapabilitySet::KILL).expect("capset");
        assert_eq!(sets().effective, ADMIN | FSETID);
        drop(without);
        with.restore().expect("capset");
        assert_eq!(sets().effective, ADMIN | CHOWN);
        drop(only);
        assert_eq!(sets(), before);
    });
    Ok(())
}

/// A guard restores all but what the thread itself gave up meanwhile. If capset(2) is refused, the next guard restores
/// it.
#[apply(needs_nothing)]
fn given_up_under_a_guard(_: &Sandbox) -> Result<(), Failed> {
    for is_refused in [false, true] {
        apart(|| {
            let before = sets();
            let guard = CapabilityGuard::only(ADMIN).expect("capset");
            set(|sets| {
                sets.permitted -= CHOWN;
                sets.inheritable |= FSETID;
            });
            if is_refused {
                refuse_next(libc::SYS_capset, Errno::PERM).expect("seccomp");
                assert_eq!(guard.restore(), Err(NOT_RESTORED));
                drop(CapabilityGuard::without(NONE).expect("capset"));
            } else {
                guard.restore().expect("capset");
            }
            let expected = CapabilitySets {
                effective: before.effective - CHOWN,
                permitted: before.permitted - CHOWN,
                inheritable: before.inheritable | FSETID,
            };
            assert_eq!(sets(), expected);
        });
    }
    Ok(())
}

#[apply(needs_nothing)]
fn raised_to_what_is_not_permitted(_: &Sandbox) -> Result<(), Failed> {
    apart(|| {
        set(|sets| {
            sets.effective -= CapabilitySet::SYS_TIME;
            sets.permitted -= CapabilitySet::SYS_TIME;
        });
        let before = sets();
        let refused = CapabilityGuard::with(CapabilitySet::SYS_TIME).map(drop);
        assert_eq!(refused, Err(RightsError::NotChanged(Errno::PERM)));
        assert_eq!(sets(), before);
    });
    Ok(())
}

/// setfsuid(2) to 0 makes permitted capabilities effective, so that the thread must be lowered again.
#[apply(needs_passthrough)]
fn thread_that_changes_its_ids_is_lowered_again(sandbox: &Sandbox) -> Result<(), Failed> {
    let (_connection, noting, file) = noting(sandbox)?;
    let registered = |lowered: &Lowered<&Noting>| {
        lowered.unregister(by(lowered, &file)).expect("closed");
        noting.effective()
    };
    for (keep, make) in [
        (CapabilitySet::SETUID, Lowered::permanently as fn(_, _) -> _),
        (CapabilitySet::SETUID, Lowered::per_registration),
        // Without CAP_SETUID a thread can still return to its former ids.
        (NONE, Lowered::permanently),
        (NONE, Lowered::per_registration),
    ] {
        let lowered = make(&noting, keep);
        apart(|| {
            setfsuid(1000.into());
            assert_eq!(registered(&lowered), ADMIN | keep);
            setfsuid(0.into());
            assert!(sets().effective.contains(FSETID));
            assert_eq!(registered(&lowered), ADMIN | keep);
            if keep.contains(CapabilitySet::SETUID) {
                setfsuid(1000.into());
                setfsuid(0.into());
                assert!(sets().effective.contains(FSETID));
                assert_eq!(registered(&lowered), ADMIN | keep);
            }
        });
        // This thread starts with root's ids.
        apart(|| {
            assert_eq!(registered(&lowered), ADMIN | keep);
            setfsuid(1000.into());
            setfsuid(0.into());
            assert_eq!(registered(&lowered), ADMIN | keep);
        });
    }
    Ok(())
}

#[apply(needs_passthrough)]
fn lowering_that_is_refused(sandbox: &Sandbox) -> Result<(), Failed> {
    let tmpfs = sandbox.tmpfs()?;
    let file = tmpfs.file("file", CONTENT)?;
    let connection = Connection::mount(sandbox, Init::passthrough(1))?;
    let noting = Noting::new(connection.device());
    for (call, errno) in [
        (libc::SYS_capset, Errno::PERM),
        (libc::SYS_capget, Errno::NOSYS),
    ] {
        for make in [Lowered::per_registration, Lowered::permanently] {
            let lowered = make(&noting, NONE);
            apart(|| {
                let before = fs::read_to_string("/proc/thread-self/status").expect("/proc");
                refuse(call, errno).expect("seccomp");
                let expected = BackingError::Rights(RightsError::NotChanged(errno));
                for _ in 0..2 {
                    let refused = lowered.register(file.as_fd(), Access::ReadWrite);
                    assert_eq!(refused, Err(expected));
                }
                let after = fs::read_to_string("/proc/thread-self/status").expect("/proc");
                let capabilities = |status: &str| -> Vec<_> {
                    let lines = status.lines().filter(|line| line.starts_with("Cap"));
                    lines.map(str::to_owned).collect()
                };
                assert_eq!(capabilities(&after), capabilities(&before));
            });
        }
    }
    assert_eq!(noting.noted(), []);
    drop(file);
    tmpfs.unmount_when_idle()
}

const NOT_RESTORED: RightsError = RightsError::NotRestored(Errno::PERM);

/// If the rights cannot be restored, nothing stays registered, and later calls fail too.
#[apply(needs_passthrough)]
fn restoring_that_is_refused(sandbox: &Sandbox) -> Result<(), Failed> {
    let tmpfs = sandbox.tmpfs()?;
    let file = tmpfs.file("file", CONTENT)?;
    let connection = Connection::mount(sandbox, Init::passthrough(1))?;
    let noting = Noting::then(connection.device(), || {
        refuse(libc::SYS_capset, Errno::PERM).expect("seccomp");
    });
    let (per_registration, permanently) = (
        Lowered::per_registration(&noting, NONE),
        Lowered::permanently(&noting, NONE),
    );
    apart(|| {
        let refused = Err(BackingError::Rights(NOT_RESTORED));
        for _ in 0..2 {
            let registered = per_registration.register(file.as_fd(), Access::ReadWrite);
            assert_eq!(registered, refused);
            assert_eq!(sets().effective, ADMIN);
        }
        let registered = permanently.register(file.as_fd(), Access::ReadWrite);
        assert_eq!(registered, refused);
        let guard = CapabilityGuard::without(CHOWN).map(drop);
        assert_eq!(guard, Err(NOT_RESTORED));
    });
    assert_eq!(noting.noted().len(), 1, "the others were not tried");
    assert_closed(&connection, noting.id());

    // Other threads are unaffected.
    let id = apart(|| by(&Lowered::per_registration(connection.device(), NONE), &file));
    drop(file);
    assert_eq!(tmpfs.unmount(), Err(Errno::BUSY), "registered");
    connection.device().backing_close(id)?;
    tmpfs.unmount_when_idle()
}

/// If the rights could not be restored once, the thread's next registration restores them.
#[apply(needs_passthrough)]
fn restoring_that_is_refused_once(sandbox: &Sandbox) -> Result<(), Failed> {
    let tmpfs = sandbox.tmpfs()?;
    let file = tmpfs.file("file", CONTENT)?;
    let connection = Connection::mount(sandbox, Init::passthrough(1))?;
    let noting = Noting::then(connection.device(), || {
        refuse_next(libc::SYS_capset, Errno::PERM).expect("seccomp");
    });
    let lowered = Lowered::per_registration(&noting, NONE);
    let plain = Lowered::per_registration(connection.device(), NONE);
    apart(|| {
        let before = sets();
        let refused = lowered.register(file.as_fd(), Access::ReadWrite);
        assert_eq!(refused, Err(BackingError::Rights(NOT_RESTORED)));
        assert_eq!(sets().effective, ADMIN);
        plain.unregister(by(&plain, &file)).expect("closed");
        assert_eq!(sets(), before);
    });
    assert_closed(&connection, noting.id());
    Ok(())
}

#[apply(needs_nothing)]
fn dropped_guard_that_cannot_restore(_: &Sandbox) -> Result<(), Failed> {
    apart(|| {
        let before = sets();
        let guard = CapabilityGuard::only(ADMIN).expect("capset");
        refuse_next(libc::SYS_capset, Errno::PERM).expect("seccomp");
        drop(guard);
        assert_eq!(sets().effective, ADMIN);
        let guard = CapabilityGuard::without(CHOWN).expect("capset");
        assert_eq!(sets().effective, before.effective - CHOWN);
        drop(guard);
        assert_eq!(sets(), before);
    });
    Ok(())
}

/// A registrar that notes the thread's effective capabilities, and panics.
struct Panicking<'a>(&'a Mutex<CapabilitySet>);

impl InCallingThread for Panicking<'_> {}

impl Register for Panicking<'_> {
    fn register(&self, _: BorrowedFd<'_>, _: Access) -> Result<BackingId, BackingError> {
        *self.0.lock().unwrap() = sets().effective;
        resume_unwind(Box::new("a registrar that panics"));
    }

    fn unregister(&self, _: BackingId) -> Result<(), BackingCloseError<BackingId>> {
        unreachable!("nothing is registered");
    }
}

#[apply(needs_nothing)]
fn registrar_that_panics(_: &Sandbox) -> Result<(), Failed> {
    let file = tempfile::tempfile()?;
    let seen = Mutex::new(NONE);
    let lowered = Lowered::per_registration(Panicking(&seen), NONE);
    apart(|| {
        let before = sets();
        let register = || lowered.register(file.as_fd(), Access::ReadWrite);
        assert!(catch_unwind(AssertUnwindSafe(register)).is_err());
        assert_eq!(*seen.lock().unwrap(), ADMIN);
        assert_eq!(sets(), before);
    });
    Ok(())
}
