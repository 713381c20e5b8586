//! Rights and registrar threads, with a registrar that stands for the kernel. These tests need no root and no
//! `/dev/fuse`. tests/kernel/rights.rs has those with a kernel.

#![allow(clippy::panic, clippy::unwrap_used)]

#[path = "support/registrar.rs"]
mod registrar;
#[allow(
    dead_code,
    unreachable_pub,
    clippy::expect_used,
    reason = "not all of it is of use here"
)]
#[path = "support/thread.rs"]
mod threads;

use std::collections::HashSet;
use std::fs::{self, File};
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd};
use std::panic::resume_unwind;
use std::sync::atomic::Ordering;
use std::sync::{Arc, Mutex};
use std::thread::{self, ThreadId};
use std::time::{Duration, Instant};

use fuse_backing::error::{
    BackingCloseError, BackingError, NotPermitted, RegistrarThreadError, RightsError, Scope,
    ServerReason,
};
use fuse_backing::rights::{
    ByAccess, CapabilityGuard, CapabilitySet, Lowered, RegistrarThread, may_register,
};
use fuse_backing::{
    Access, BackingId, BackingTable, Handles, Register, ServerFile,
    error::Errno,
    register::{InCallingThread, WithoutFsetid},
};
use registrar::{Fake, Registration};
use rustix::fs::{MemfdFlags, Mode, OFlags, fstat, memfd_create, open};
use rustix::thread::{CapabilitySets, capabilities, set_capabilities};
use static_assertions::{assert_impl_all, assert_not_impl_any};
use threads::apart;

type Thread = RegistrarThread<Lowered<Arc<Fake>>>;

assert_impl_all!(Thread: Send, Sync, WithoutFsetid);
assert_impl_all!(ByAccess<Thread>: Send, Sync, WithoutFsetid);
assert_impl_all!(Arc<Lowered<Fake>>: Send, Sync, WithoutFsetid);
assert_impl_all!(Handles<Lowered<Fake>>: WithoutFsetid);
assert_not_impl_any!(RegistrarThread<Fake>: WithoutFsetid);
assert_not_impl_any!(ByAccess<Fake>: WithoutFsetid);
assert_not_impl_any!(CapabilityGuard: Send, Sync);

const NONE: CapabilitySet = CapabilitySet::empty();
const ACCESSES: [Access; 3] = [Access::ReadOnly, Access::WriteOnly, Access::ReadWrite];
const DIED: BackingError = BackingError::Registrar {
    errno: Errno::OWNERDEAD,
    scope: Scope::Connection,
};

fn file() -> File {
    tempfile::tempfile().unwrap()
}

fn sets() -> CapabilitySets {
    capabilities(None).unwrap()
}

fn unprepared<R: Register + Send + 'static>(registrar: R) -> RegistrarThread<R> {
    RegistrarThread::spawn(registrar, || Ok::<(), Errno>(())).unwrap()
}

#[test]
fn registering_takes_a_capability_in_the_initial_user_namespace() {
    let namespace = fs::read_link("/proc/thread-self/ns/user").unwrap();
    let is_initial = namespace.as_os_str() == "user:[4026531837]";
    let missing = if is_initial {
        NotPermitted::MissingCapability
    } else {
        NotPermitted::NotInInitialUserNamespace
    };
    let has_it = sets().effective.contains(CapabilitySet::SYS_ADMIN);
    let expected = (is_initial && has_it).then_some(()).ok_or(missing);
    assert_eq!(may_register(), expected);
    apart(|| {
        let guard = CapabilityGuard::without(CapabilitySet::SYS_ADMIN).unwrap();
        assert_eq!(may_register(), Err(missing));
        guard.restore().unwrap();
        assert_eq!(may_register(), expected);
    });
}

/// The test works with any capabilities: each user can give some up.
#[test]
fn guards_change_and_restore_capabilities() {
    apart(|| {
        let before = sets();
        let lost = CapabilitySet::FSETID | CapabilitySet::KILL;
        let without = CapabilityGuard::without(lost).unwrap();
        assert_eq!(sets().effective, before.effective - lost);
        let none = CapabilityGuard::only(NONE).unwrap();
        assert_eq!(sets().effective, NONE);
        let all = CapabilityGuard::with(before.permitted).unwrap();
        assert_eq!(sets().effective, before.permitted);
        drop((all, none));
        assert_eq!(sets().effective, before.effective - lost);
        without.restore().unwrap();
        assert_eq!(sets(), before);

        let mut fewer = before;
        fewer.permitted -= CapabilitySet::SYS_TIME;
        fewer.effective -= CapabilitySet::SYS_TIME;
        set_capabilities(None, fewer).unwrap();
        let refused = CapabilityGuard::with(CapabilitySet::SYS_TIME).map(drop);
        assert_eq!(refused, Err(RightsError::NotChanged(Errno::PERM)));
        assert_eq!(sets(), fewer);
    });
}

/// A registrar that notes the calling thread and its capabilities.
#[derive(Default)]
struct Noting(Mutex<Vec<(ThreadId, CapabilitySet)>>);

impl InCallingThread for Noting {}
impl InCallingThread for Fake {}

impl Register for Noting {
    fn register(&self, _: BorrowedFd<'_>, _: Access) -> Result<BackingId, BackingError> {
        let noted = (thread::current().id(), sets().effective);
        self.0.lock().unwrap().push(noted);
        Ok(BackingId::from_raw(1).unwrap())
    }

    fn unregister(&self, _: BackingId) -> Result<(), BackingCloseError<BackingId>> {
        let noted = (thread::current().id(), sets().effective);
        self.0.lock().unwrap().push(noted);
        Ok(())
    }
}

#[test]
fn lowered_to_what_the_thread_has_of_the_chosen() {
    let keep = CapabilitySet::CHOWN | CapabilitySet::FSETID;
    let noting = Noting::default();
    for make in [Lowered::per_registration, Lowered::permanently] {
        let lowered = make(&noting, keep);
        apart(|| {
            let all = sets().effective;
            let kept = all & (CapabilitySet::SYS_ADMIN | CapabilitySet::CHOWN);
            let id = lowered.register(file().as_fd(), Access::ReadOnly).unwrap();
            let after = sets().effective;
            lowered.unregister(id).unwrap();
            let me = thread::current().id();
            let noted = std::mem::take(&mut *noting.0.lock().unwrap());
            assert_eq!(noted, [(me, kept), (me, after)]);
            assert!([all, kept].contains(&after));
        });
    }
}

#[test]
fn lowered_gives_the_registrars_errors() {
    let fake = Fake::default();
    let file = file();
    let (errno, scope) = (Errno::DQUOT, Scope::File);
    let error = BackingError::Registrar { errno, scope };
    for make in [Lowered::per_registration, Lowered::permanently] {
        let lowered = make(&fake, NONE);
        apart(|| {
            fake.refuse_next(errno, scope);
            let refused = lowered.register(file.as_fd(), Access::ReadOnly);
            assert_eq!(refused, Err(error));
            let id = lowered.register(file.as_fd(), Access::ReadOnly).unwrap();
            fake.refuse_next(errno, scope);
            let refused = lowered.unregister(id).unwrap_err();
            assert_eq!(refused.cause(), error);
            lowered.unregister(refused.into_inner()).unwrap();
        });
    }
    assert!(fake.ids().is_empty());
}

#[test]
fn thread_registers_and_closes() {
    let fake = Arc::new(Fake::default());
    let thread = unprepared(Arc::clone(&fake));
    let file = file();
    let registration = |grant| Registration {
        ino: fstat(&file).unwrap().st_ino,
        grant,
        is_path: false,
    };
    let ids = ACCESSES.map(|grant| thread.register(file.as_fd(), grant).unwrap());
    assert_eq!(fake.past(), ACCESSES.map(registration));
    assert_eq!(fake.ids(), [1, 2, 3]);
    for id in ids {
        thread.unregister(id).unwrap();
    }
    assert!(fake.ids().is_empty());

    let unknown = thread.unregister(BackingId::from_raw(2).unwrap());
    let unknown = unknown.unwrap_err();
    assert_eq!(unknown.cause(), BackingError::UnknownId);
    assert_eq!(unknown.into_inner().as_raw(), 2);
    let (errno, scope) = (Errno::DQUOT, Scope::Thread);
    fake.refuse_next(errno, scope);
    let refused = thread.register(file.as_fd(), Access::ReadOnly);
    assert_eq!(refused, Err(BackingError::Registrar { errno, scope }));

    drop(thread);
    assert_eq!(Arc::strong_count(&fake), 1);
}

#[test]
fn thread_prepares_registers_and_closes() {
    let noting = Arc::new(Noting::default());
    let prepared = Arc::<Mutex<Option<ThreadId>>>::default();
    let thread = RegistrarThread::spawn(Arc::clone(&noting), {
        let prepared = Arc::clone(&prepared);
        move || {
            *prepared.lock().unwrap() = Some(thread::current().id());
            Ok::<(), Errno>(())
        }
    });
    let thread = thread.unwrap();
    let there = prepared.lock().unwrap().unwrap();
    assert_ne!(there, thread::current().id());
    let id = thread.register(file().as_fd(), Access::ReadOnly).unwrap();
    thread.unregister(id).unwrap();
    let noted = noting.0.lock().unwrap();
    assert_eq!(
        noted.iter().map(|noted| noted.0).collect::<Vec<_>>(),
        [there; 2]
    );
}

#[test]
fn thread_serves_many() {
    const EACH: usize = 50;
    let fake = Arc::new(Fake::default());
    let thread = unprepared(Arc::clone(&fake));
    let file = file();
    let ids = Mutex::new(HashSet::new());
    thread::scope(|scope| {
        for _ in 0..4 {
            scope.spawn(|| {
                for _ in 0..EACH {
                    let id = thread.register(file.as_fd(), Access::ReadOnly).unwrap();
                    assert!(ids.lock().unwrap().insert(id.as_raw()));
                    thread.unregister(id).unwrap();
                }
            });
        }
    });
    assert_eq!(ids.lock().unwrap().len(), 4 * EACH);
    assert_eq!(fake.past().len(), 4 * EACH);
    assert!(fake.ids().is_empty());
}

#[test]
fn thread_that_cannot_be_prepared() {
    let fake = Arc::new(Fake::default());
    let failing = || Err(io::Error::from(Errno::NOSYS));
    let refused = RegistrarThread::spawn(Arc::clone(&fake), failing).unwrap_err();
    let RegistrarThreadError::Prepare(error) = refused else {
        panic!("{refused}");
    };
    assert_eq!(Errno::from_io_error(&error), Some(Errno::NOSYS));
    assert_eq!(Arc::strong_count(&fake), 1);

    let panics = || -> io::Result<()> { resume_unwind(Box::new("a preparation that panics")) };
    let died = RegistrarThread::spawn(Arc::clone(&fake), panics).unwrap_err();
    assert!(matches!(died, RegistrarThreadError::Died));
    until(|| Arc::strong_count(&fake) == 1);
}

fn until(holds: impl Fn() -> bool) {
    let deadline = Instant::now() + Duration::from_secs(10);
    while !holds() {
        assert!(Instant::now() < deadline);
        thread::sleep(Duration::from_millis(1));
    }
}

#[test]
fn thread_that_has_died() {
    let fake = Arc::new(Fake::default());
    let thread = unprepared(Arc::clone(&fake));
    let file = file();
    let id = thread.register(file.as_fd(), Access::ReadOnly).unwrap();
    fake.panics.store(true, Ordering::SeqCst);
    for _ in 0..2 {
        let refused = thread.register(file.as_fd(), Access::ReadOnly);
        assert_eq!(refused, Err(DIED));
    }
    let failed = thread.unregister(id).unwrap_err();
    assert_eq!((failed.cause(), failed.into_inner().as_raw()), (DIED, 1));
    assert_eq!(fake.ids(), [1], "the id stays registered");
    until(|| Arc::strong_count(&fake) == 1);

    let table: BackingTable<_> = BackingTable::new(thread);
    let open = table.open(&1, OFlags::RDONLY, ServerFile::new(&file));
    let reason = open.unwrap().server_reason();
    assert_eq!(reason, Some(ServerReason::Refused(DIED)));
    assert_eq!(table.stats().refused, Some(DIED));
}

/// The thread dies in the middle of a close.
#[test]
fn thread_that_dies_in_a_close() {
    let fake = Arc::new(Fake::default());
    let thread = unprepared(Arc::clone(&fake));
    let id = thread.register(file().as_fd(), Access::ReadOnly).unwrap();
    fake.panics.store(true, Ordering::SeqCst);
    let failed = thread.unregister(id).unwrap_err();
    assert_eq!((failed.cause(), failed.into_inner().as_raw()), (DIED, 1));
}

#[test]
fn what_the_registrar_wants_is_passed_on() {
    for (takes_path_fd, enforces_grant) in [(false, false), (false, true), (true, false)] {
        let fake = || Fake {
            takes_open_fd: !takes_path_fd,
            enforces_grant,
            ..Fake::default()
        };
        let wants = |registrar: &dyn Register| {
            let wants = (registrar.takes_path_fd(), registrar.enforces_grant());
            assert_eq!(wants, (takes_path_fd, enforces_grant));
        };
        wants(&Lowered::per_registration(fake(), NONE));
        wants(&Lowered::permanently(fake(), NONE));
        wants(&unprepared(fake()));
    }
}

#[test]
fn by_access_wants_what_suits_all() {
    for refusing in [None, Some(0), Some(1), Some(2)] {
        let mut made = 0..;
        let by_access = ByAccess::new(|_| {
            Ok::<_, Errno>(Fake {
                takes_open_fd: made.next() == refusing,
                ..Fake::default()
            })
        });
        let by_access = by_access.unwrap();
        assert_eq!(by_access.takes_path_fd(), refusing.is_none());
        assert!(by_access.enforces_grant());
    }
}

#[test]
fn by_access_is_made_of_all_or_not_at_all() {
    for failing in ACCESSES {
        let mut asked = Vec::new();
        let made = ByAccess::new(|access| {
            asked.push(access);
            if access == failing {
                return Err(access);
            }
            Ok(Fake::default())
        });
        assert_eq!(made.map(drop), Err(failing));
        let until = ACCESSES.iter().position(|&access| access == failing);
        assert_eq!(asked, ACCESSES[..=until.unwrap()]);
    }
}

/// Uses one registrar for each access, in the order of `ACCESSES`.
fn by_access(fakes: &[Fake; 3]) -> ByAccess<&Fake> {
    let mut fakes = fakes.iter();
    ByAccess::new(|_| fakes.next().ok_or(())).unwrap()
}

#[test]
fn by_access_registers_through_the_one_for_the_grant() {
    let fakes: [Fake; 3] = Default::default();
    let registrar = by_access(&fakes);
    let file = file();
    for (at, grant) in ACCESSES.into_iter().enumerate() {
        let registered = registrar.register(file.as_fd(), grant).unwrap();
        assert_eq!(registered.as_raw(), 1);
        let past = fakes[at].past();
        assert_eq!(
            past.iter().map(|past| past.grant).collect::<Vec<_>>(),
            [grant]
        );
    }
    assert_eq!(fakes.each_ref().map(Fake::ids), [[1]; 3]);
    // The registrars share a connection, so one of them can close every id.
    registrar
        .unregister(BackingId::from_raw(1).unwrap())
        .unwrap();
    assert_eq!(fakes.each_ref().map(|fake| fake.ids().len()), [1, 1, 0]);
}

#[test]
fn by_access_refuses_what_landlock_does_not_see() {
    let fakes: [Fake; 3] = Default::default();
    let registrar = by_access(&fakes);
    let memfd = memfd_create("memfd", MemfdFlags::CLOEXEC).unwrap();
    let path = format!("/proc/self/fd/{}", memfd.as_raw_fd());
    let path_only = open(path, OFlags::PATH | OFlags::CLOEXEC, Mode::empty()).unwrap();
    for fd in [memfd, path_only] {
        for grant in [Access::ReadOnly, Access::WriteOnly] {
            let refused = registrar.register(fd.as_fd(), grant);
            assert_eq!(refused, Err(BackingError::NotEnforceable));
        }
        assert!(registrar.register(fd.as_fd(), Access::ReadWrite).is_ok());
    }
    // The control: a file that has no name either, and one on another filesystem.
    for file in [file(), File::open("/proc/version").unwrap()] {
        assert!(registrar.register(file.as_fd(), Access::ReadOnly).is_ok());
    }
    assert_eq!(fakes[0].past().len(), 2);
}
