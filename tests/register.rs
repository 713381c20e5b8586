//! The table with other registrars than the kernel. These tests need no root and no `/dev/fuse`.

#![allow(clippy::panic, clippy::unwrap_used)]

#[path = "support/registrar.rs"]
mod registrar;

use std::cell::Cell;
use std::fs::File;
use std::os::fd::AsFd;
use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::path::Path;
use std::rc::Rc;
use std::sync::Arc;
use std::sync::atomic::Ordering;

use fuse_backing::error::{BackingError, OpenError, Scope, ServerReason};
use fuse_backing::{
    Access, BackingFile, BackingTable, FopenFlags, Handles, OpenFile, Register, ServerFile,
    error::Errno,
};
use registrar::{Fake, Registration};
use rustix::fs::{Mode, OFlags, fstat, open};

const RDONLY: i32 = 0;
const RDWR: i32 = 2;

fn file() -> File {
    tempfile::tempfile().unwrap()
}

fn both(file: &File) -> ServerFile<'_, &File> {
    ServerFile::new(file).access(Access::ReadWrite)
}

fn id<R: Register>(open: &OpenFile<R>) -> Option<i32> {
    open.reply(FopenFlags::empty()).backing_id()
}

/// What a server's author writes: the server, and a test of it.
mod server {
    use std::io;
    use std::os::fd::OwnedFd;

    use super::*;

    struct Server<R: Register> {
        handles: Handles<R, OwnedFd>,
        root: tempfile::TempDir,
    }

    type Fields = (u64, FopenFlags, Option<i32>);

    impl<R: Register> Server<R> {
        fn open(&self, name: &str, ino: u64, flags: OFlags) -> io::Result<Fields> {
            let file = open(self.root.path().join(name), flags, Mode::empty())?;
            let opened = self.handles.open(&ino, flags, file, FopenFlags::empty())?;
            Ok((opened.fh, opened.open_flags, opened.backing_id))
        }

        fn release(&self, fh: u64) {
            drop(self.handles.release(fh));
        }
    }

    #[test]
    fn is_tested_without_root() -> io::Result<()> {
        let kernel = Arc::new(Fake::default());
        // As `Box<dyn Register>`, so that the server need not be generic.
        let registrar: Box<dyn Register + Send + Sync> = Box::new(Arc::clone(&kernel));
        let server = Server {
            handles: Handles::new(BackingTable::new(registrar)),
            root: tempfile::tempdir()?,
        };
        std::fs::write(server.root.path().join("a"), "content")?;
        let passthrough = FopenFlags::PASSTHROUGH;
        let (reader, flags, id) = server.open("a", 2, OFlags::RDONLY)?;
        assert_eq!((flags, id), (passthrough, Some(1)));
        let (writer, flags, id) = server.open("a", 2, OFlags::RDWR)?;
        assert_eq!((flags, id), (passthrough, Some(1)));
        let absent = server.open("b", 3, OFlags::RDWR).unwrap_err();
        assert_eq!(absent.raw_os_error(), Some(Errno::NOENT.raw_os_error()));
        server.release(reader);
        assert_eq!(kernel.ids(), [1]);
        server.release(writer);
        assert_eq!(kernel.ids(), [] as [i32; 0]);
        kernel.refuse_next(Errno::DQUOT, Scope::Transient);
        let (_, flags, id) = server.open("a", 2, OFlags::RDONLY)?;
        assert_eq!((flags, id), (FopenFlags::empty(), None));
        Ok(())
    }
}

#[test]
fn every_holder_of_a_registrar_is_one() {
    fn register(registrar: impl Register) {
        let guard = BackingFile::open(&registrar, file(), Access::ReadOnly).unwrap();
        assert!(registrar.takes_path_fd() && registrar.enforces_grant());
        guard.close().unwrap();
    }
    let fake = || Fake {
        enforces_grant: true,
        ..Fake::default()
    };
    register(fake());
    register(&fake() as &dyn Register);
    register(Arc::new(fake()));
    register(Rc::new(fake()));
    register(Box::new(fake()) as Box<dyn Register>);
    register(Arc::new(fake()) as Arc<dyn Register + Send + Sync>);
}

/// The table relies on the scope that the registrar gives.
#[test]
fn refusals_have_the_scope_that_the_registrar_gives() {
    let fake = Fake::default();
    let table = BackingTable::<_, u64>::new(&fake);
    let file = file();
    let refused = |scope| {
        let errno = Errno::DQUOT;
        fake.refuse_next(errno, scope);
        let open = table.open(&1, RDONLY, both(&file)).unwrap();
        let error = BackingError::Registrar { errno, scope };
        assert_eq!((error.errno(), error.scope()), (errno, scope));
        assert_eq!(open.server_reason(), Some(ServerReason::Refused(error)));
        error
    };
    for scope in [Scope::File, Scope::Thread, Scope::Transient] {
        refused(scope);
        assert_eq!(table.stats().refused, None);
        assert!(
            table
                .open(&1, RDONLY, both(&file))
                .unwrap()
                .is_passthrough()
        );
    }
    let error = refused(Scope::Connection);
    assert_eq!(table.stats().refused, Some(error));
    // The registrar is not asked again. It would not refuse now.
    let open = table.open(&1, RDONLY, both(&file)).unwrap();
    assert_eq!(open.server_reason(), Some(ServerReason::Refused(error)));
    drop(open);

    table.retry_registrations();
    let open = table.open(&1, RDONLY, both(&file)).unwrap();
    fake.refuse_next(Errno::PIPE, Scope::Connection);
    drop(open);
    let cause = table.list()[0].close_failed.unwrap();
    assert_eq!(
        (cause.errno(), cause.scope()),
        (Errno::PIPE, Scope::Connection)
    );
    table.retry_closes().unwrap();
    assert_eq!((table.stats().ids, fake.ids().len()), (0, 0));
}

/// A grant is not widened while the file is open. An idle file is registered anew.
#[test]
fn enforced_grants() {
    let fake = Fake {
        enforces_grant: true,
        ..Fake::default()
    };
    let table = BackingTable::<_, u64>::new(&fake);
    table.set_idle_limit(2);
    let file = file();
    let (read, both) = (ServerFile::new(&file).access(Access::ReadOnly), both(&file));
    let reader = table.open(&1, RDONLY, read).unwrap();
    let exceeded = OpenError::GrantExceeded {
        registered: Access::ReadOnly,
        wanted: Access::ReadWrite,
    };
    assert_eq!(exceeded.errno(), Errno::BUSY);
    assert_eq!(table.open(&1, RDWR, both).err(), Some(exceeded));
    // An open that only reads is within the grant, even if its fd can write.
    drop(table.open(&1, RDONLY, both).unwrap());
    assert!(table.share(&1, RDWR).is_none());
    assert_eq!(id(&reader), Some(1));
    drop(reader);
    assert_eq!((table.stats().idle, fake.ids()), (1, vec![1]));
    let writer = table.open(&1, RDWR, both).unwrap();
    assert_eq!((id(&writer), fake.ids()), (Some(2), vec![2]));

    // The first open can state the grant that later ones need.
    let reader = table
        .open(&2, RDONLY, read.grant(Access::WriteOnly))
        .unwrap();
    assert!(
        table.share(&2, RDWR).is_none(),
        "no open has shown write access yet"
    );
    drop(table.open(&2, RDWR, both).unwrap());
    assert!(table.share(&2, RDWR).is_some());
    drop((reader, writer));
    let grants: Vec<_> = fake.past().iter().map(|past| past.grant).collect();
    assert_eq!(
        grants,
        [Access::ReadOnly, Access::ReadWrite, Access::ReadWrite]
    );
}

/// The control: if grants are not enforced, the same opens share one id.
#[test]
fn grants_that_are_not_enforced() {
    let fake = Fake::default();
    let table = BackingTable::<_, u64>::new(&fake);
    let file = file();
    let reader = table
        .open(&1, RDONLY, ServerFile::new(&file).access(Access::ReadOnly))
        .unwrap();
    let writer = table.open(&1, RDWR, both(&file)).unwrap();
    assert_eq!((id(&reader), id(&writer)), (Some(1), Some(1)));
    drop((reader, writer));
    assert_eq!(fake.past().len(), 1);
}

/// A reply leaves out the flags that its mode does not permit, and no others.
#[test]
fn replies_of_either_mode() {
    let fake = Fake::default();
    let table = BackingTable::<_, u64>::new(&fake);
    let passed = table.open(&1, RDWR, both(&file())).unwrap();
    let served = table.serve(&2).unwrap();
    for bit in 0..32 {
        let flag = FopenFlags::from_bits_retain(1 << bit);
        // NOFLUSH and PARALLEL_DIRECT_WRITES.
        let kept = if [5, 6].contains(&bit) { 1 << bit } else { 0 };
        let out = passed.reply(flag).to_fuse_open_out(1);
        assert_eq!(
            (out.open_flags, out.backing_id),
            (1 << 7 | kept, 1),
            "{flag:?}"
        );
        let kept = if bit == 7 { 0 } else { 1 << bit };
        let out = served.reply(flag).to_fuse_open_out(1);
        assert_eq!((out.open_flags, out.backing_id), (kept, 0), "{flag:?}");
    }
}

mod registered_fd {
    use super::*;

    fn registered(fake: &Fake, file: ServerFile<'_, &File>) -> (Registration, u64) {
        let table = BackingTable::<_, u64>::new(fake);
        let open = table.open(&1, RDONLY, file).unwrap();
        assert!(open.is_passthrough(), "{open:?}");
        let last = *fake.past().last().unwrap();
        (last, table.stats().by_open_fd)
    }

    fn ino(file: impl AsFd) -> u64 {
        fstat(file).unwrap().st_ino
    }

    #[test]
    fn is_a_path_fd() {
        let file = file();
        let (registration, by_open_fd) = registered(&Fake::default(), both(&file));
        assert_eq!((registration.is_path, by_open_fd), (true, 0));
        assert_eq!(registration.ino, ino(&file));
    }

    #[test]
    fn is_the_path_fd_that_is_handed_over() {
        let named = tempfile::NamedTempFile::new().unwrap();
        let path = open(named.path(), OFlags::PATH, Mode::empty()).unwrap();
        // The server's own fd is not an O_PATH fd.
        let (registration, by_open_fd) =
            registered(&Fake::default(), both(named.as_file()).path_fd(&path));
        assert_eq!((registration.is_path, by_open_fd), (true, 0));
        assert_eq!(registration.ino, ino(&named));
    }

    /// It is never of another file than the server has opened, and never open for writing.
    #[test]
    fn is_made_anew_if_the_given_fd_is_no_path_fd_of_the_file() {
        let (file, other) = (
            tempfile::NamedTempFile::new().unwrap(),
            tempfile::NamedTempFile::new().unwrap(),
        );
        let path = open(other.path(), OFlags::PATH, Mode::empty()).unwrap();
        let writer = file.reopen().unwrap();
        for given in [path.as_fd(), writer.as_fd()] {
            let (registration, by_open_fd) =
                registered(&Fake::default(), both(file.as_file()).path_fd(&given));
            assert_eq!((registration.is_path, by_open_fd), (true, 0));
            assert_eq!(registration.ino, ino(&file));
        }
    }

    #[test]
    fn is_the_servers_where_the_registrar_checks_it() {
        let file = file();
        let fake = Fake {
            takes_open_fd: true,
            ..Fake::default()
        };
        let (registration, by_open_fd) = registered(&fake, both(&file));
        assert_eq!((registration.is_path, by_open_fd), (false, 0));
    }

    #[test]
    fn is_the_servers_before_6_12() {
        let file = file();
        let fake = Fake {
            refuses_path_fds: true,
            ..Fake::default()
        };
        let (registration, by_open_fd) = registered(&fake, both(&file));
        assert_eq!((registration.is_path, by_open_fd), (false, 1));
        assert_eq!(registration.ino, ino(&file));
        // If the server's own fd is an O_PATH fd, the open is refused, but not for good.
        let named = tempfile::NamedTempFile::new().unwrap();
        let path = open(named.path(), OFlags::PATH, Mode::empty()).unwrap();
        let table = BackingTable::<_, u64>::new(&fake);
        let file = ServerFile::new(&path).access(Access::ReadOnly);
        let reason = table.open(&1, RDONLY, file).unwrap().server_reason();
        let expected = ServerReason::Refused(BackingError::PathOnlyFd);
        assert_eq!(reason, Some(expected));
        assert_eq!(table.stats().ids, 0);
    }

    /// The number of fds that this process has of `path`.
    fn fds_of(path: &Path) -> usize {
        let fds = std::fs::read_dir("/proc/self/fd").unwrap();
        fds.filter(|fd| {
            let link = std::fs::read_link(fd.as_ref().unwrap().path());
            link.is_ok_and(|link| link == path)
        })
        .count()
    }

    #[test]
    fn is_kept_until_the_id_is_closed() {
        for refuses_path_fds in [false, true] {
            let fake = Fake {
                refuses_path_fds,
                ..Fake::default()
            };
            let table = BackingTable::<_, u64>::new(&fake);
            let named = tempfile::NamedTempFile::new().unwrap();
            let path = named.path().canonicalize().unwrap();
            let open = |ino| {
                let file = File::open(&path).unwrap();
                table.open(&ino, RDONLY, ServerFile::new(&file)).unwrap()
            };
            let before = fds_of(&path);
            let unkept = open(1);
            assert_eq!(fds_of(&path), before, "the control");
            table.set_keep_fds(true);
            table.set_idle_limit(1);
            let kept = open(2);
            assert!(kept.is_passthrough());
            assert_eq!(fds_of(&path), before + 1);
            drop((unkept, kept));
            // Inode 2 is idle.
            assert_eq!((table.stats().ids, fds_of(&path)), (1, before + 1));
            table.set_idle_limit(0);
            assert_eq!((table.stats().ids, fds_of(&path)), (0, before));
        }
    }
}

mod panics {
    use super::*;

    fn panics(f: impl FnOnce()) {
        assert!(catch_unwind(AssertUnwindSafe(f)).is_err());
    }

    /// An id that may still be registered is kept, not used for another reply, and closed at last.
    #[test]
    fn of_a_registrar() {
        let fake = Fake::default();
        let table = BackingTable::<_, u64>::new(&fake);
        // A lost id would leave no room.
        table.set_limit(1);
        let file = file();
        let arm = || fake.panics.store(true, Ordering::SeqCst);
        arm();
        panics(|| drop(table.open(&1, RDONLY, both(&file))));
        assert_eq!((table.stats().ids, table.list().len()), (0, 0));
        let open = table.open(&1, RDONLY, both(&file)).unwrap();
        assert!(open.is_passthrough());
        arm();
        panics(|| drop(open));
        assert_eq!((table.stats().ids, table.list().len()), (1, 1));
        assert!(table.share(&1, RDONLY).is_none());
        table.retry_closes().unwrap();
        assert_eq!((table.stats().ids, table.list().len()), (0, 0));
        assert_eq!(fake.ids(), [] as [i32; 0]);

        let guard = BackingFile::open(&fake, &file, Access::ReadOnly).unwrap();
        arm();
        panics(|| drop(guard));
        assert_eq!(fake.ids().len(), 1);
    }

    /// All closes can still be retried, and an open at the limit waits for none of them.
    #[test]
    fn of_a_registrar_while_closes_are_retried() {
        let fake = Fake::default();
        let table = BackingTable::<_, u64>::new(&fake);
        table.set_limit(3);
        let file = file();
        for inode in 1..=3 {
            let open = table.open(&inode, RDONLY, both(&file)).unwrap();
            fake.refuse_next(Errno::PERM, Scope::Thread);
            drop(open);
        }
        fake.panics.store(true, Ordering::SeqCst);
        panics(|| table.retry_closes().unwrap());
        assert_eq!((table.stats().ids, table.list().len()), (3, 3));
        let reason = table.open(&4, RDONLY, both(&file)).unwrap().server_reason();
        assert_eq!(reason, Some(ServerReason::LimitReached));
        table.retry_closes().unwrap();
        assert_eq!((table.stats().ids, fake.ids().len()), (0, 0));
    }

    /// The table drops the registrar all the same, since it holds the connection.
    #[test]
    fn of_a_registrar_while_the_table_is_dropped() {
        let fake = Arc::new(Fake::default());
        let table = BackingTable::<_, u64>::new(Arc::clone(&fake));
        table.set_idle_limit(3);
        let file = file();
        for inode in 1..=3 {
            drop(table.open(&inode, RDONLY, both(&file)).unwrap());
        }
        fake.panics.store(true, Ordering::SeqCst);
        panics(|| drop(table));
        assert_eq!(Arc::strong_count(&fake), 1);
    }

    /// A key whose clone panics when it is told to.
    #[derive(PartialEq, Eq, Hash)]
    struct Key;

    thread_local! {
        static ARMED: Cell<bool> = const { Cell::new(false) };
    }

    impl Clone for Key {
        fn clone(&self) -> Self {
            if ARMED.get() {
                resume_unwind(Box::new("a key that cannot be cloned"))
            }
            Self
        }
    }

    /// A release whose close fails clones no key, and an open whose key cannot be cloned replaces no inode.
    #[test]
    fn of_a_clone() {
        let fake = Fake::default();
        let table = BackingTable::new(&fake);
        let (one, other) = (file(), file());
        let open = table.open(&Key, RDONLY, both(&one)).unwrap();
        fake.refuse_next(Errno::PERM, Scope::Thread);
        ARMED.set(true);
        drop(open);
        panics(|| drop(table.list()));
        panics(|| drop(table.open(&Key, RDONLY, both(&other))));
        ARMED.set(false);
        assert_eq!((table.stats().ids, table.list().len()), (1, 1));
        table.retry_closes().unwrap();
        assert_eq!((table.stats().ids, table.list().len()), (0, 0));
        assert_eq!(fake.ids(), [] as [i32; 0]);
        assert!(
            table
                .open(&Key, RDONLY, both(&other))
                .unwrap()
                .is_passthrough()
        );
    }
}

/// Threads do with a table all that a server may. `.ci/tsan` runs this under ThreadSanitizer.
mod stress {
    use std::thread;

    use super::*;

    const THREADS: usize = 4;
    const OPERATIONS: u32 = 20_000;
    const INODES: u64 = 6;

    /// Xorshift.
    struct Random(u64);

    impl Random {
        fn below(&mut self, n: u64) -> u64 {
            self.0 ^= self.0 << 13;
            self.0 ^= self.0 >> 7;
            self.0 ^= self.0 << 17;
            self.0 % n
        }
    }

    /// While an inode is open, all of its opens have its id, and that is registered.
    #[test]
    fn ids_outlive_their_opens() {
        let fake = Fake::default();
        let table = BackingTable::<_, u64>::new(&fake);
        let files: Vec<_> = (0..INODES).map(|_| file()).collect();
        thread::scope(|scope| {
            for seed in 0..THREADS as u64 {
                let (table, fake, files) = (&table, &fake, &files);
                scope.spawn(move || operate(table, fake, files, Random(seed + 1)));
            }
        });
        *fake.refusal.lock().unwrap() = None;
        table.set_idle_limit(0);
        table.retry_closes().unwrap();
        assert_eq!((table.stats().ids, fake.ids().len()), (0, 0));
        assert!(table.list().is_empty());
        assert!(fake.past().len() > 1_000, "hardly anything was registered");
    }

    fn operate(table: &BackingTable<&Fake>, fake: &Fake, files: &[File], mut random: Random) {
        let mut held: Vec<OpenFile<&Fake>> = Vec::new();
        for _ in 0..OPERATIONS {
            let inode = random.below(INODES);
            let file = &files[usize::try_from(inode).unwrap()];
            match random.below(32) {
                0..=6 => held.push(table.open(&inode, RDWR, both(file)).unwrap()),
                7..=9 => held.extend(table.share(&inode, RDONLY)),
                10 => held.extend(table.serve(&inode)),
                11 => {
                    let _done = table.invalidate(&inode);
                }
                12 => table.set_idle_limit(usize::try_from(random.below(4)).unwrap()),
                13 => table.set_limit(3 + usize::try_from(random.below(8)).unwrap()),
                14 => fake.refuse_next(Errno::PERM, Scope::Thread),
                15 => drop(table.retry_closes()),
                16 => assert!(table.list().iter().all(|entry| entry.opens <= 100)),
                _ => {
                    let random = usize::try_from(random.below(held.len().max(1) as u64)).unwrap();
                    if random < held.len() {
                        let open = held.swap_remove(random);
                        let ids = fake.registered.lock().unwrap();
                        assert!(id(&open).is_none_or(|id| ids.contains_key(&id)), "{open:?}");
                    }
                }
            }
        }
    }
}
