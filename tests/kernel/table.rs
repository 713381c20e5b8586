//! `BackingTable` on real connections: modes, access, identity, limits, and costs. tests/kernel/property.rs adds
//! clients, src/model.rs adds threads.

use std::cell::Cell;
use std::collections::BTreeMap;
use std::ffi::OsStr;
use std::fs::File;
use std::hash::{Hash, Hasher};
use std::hint::black_box;
use std::os::fd::OwnedFd;
use std::os::unix::fs::MetadataExt;
use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use fuse_backing::error::{
    BackingError, NegotiateError, NotPermitted, OpenError, Scope, ServerReason,
};
use fuse_backing::init::{InitFlags, MaxStackDepth, negotiate};
use fuse_backing::{
    Access, BackingId, BackingTable, FopenFlags, FuseDevice, Handles, OpenFile, ServerFile,
    error::Errno, uapi,
};
use libtest_mimic::Failed;
use macro_rules_attribute::apply;
use rustix::fs::OFlags;
use rustix::process::{Resource, getrlimit};

use crate::alloc;
use crate::client::{self, Role};
use crate::expect::{fail_nth, offer, path_only_files};
use crate::fuse::{Connection, Init, Node, handshake, mounted};
use crate::sandbox::{Sandbox, Tmpfs, patience_times};
use crate::thread::{apart, without_cap_sys_admin};
use crate::trace;

pub const ROLES: &[(&str, Role)] = &[
    ("share-and-release", share_and_release),
    ("truncate", truncate),
];

type Device = Arc<FuseDevice<Arc<OwnedFd>>>;
type Table = BackingTable<Device>;

const RDONLY: OFlags = OFlags::RDONLY;
const WRONLY: OFlags = OFlags::WRONLY;
const RDWR: OFlags = OFlags::RDWR;
const TRUNC: OFlags = OFlags::TRUNC;

struct Setup {
    table: Table,
    tmpfs: Tmpfs,
    connection: Connection,
}

impl Setup {
    fn new(sandbox: &Sandbox) -> Result<Self, Failed> {
        Self::on(sandbox, Connection::mount(sandbox, Init::passthrough(1))?)
    }

    fn on(sandbox: &Sandbox, connection: Connection) -> Result<Self, Failed> {
        Ok(Self {
            table: BackingTable::new(Arc::new(connection.device())),
            tmpfs: sandbox.tmpfs()?,
            connection,
        })
    }

    fn file(&self, name: &str) -> File {
        self.tmpfs.file(name, "content").unwrap()
    }

    /// Opens the file that is named after the inode number.
    fn open(&self, inode: u64) -> OpenFile<Device> {
        let file = self.file(&inode.to_string());
        self.table.open(&inode, RDWR, for_both(&file)).unwrap()
    }

    /// Whether the tmpfs is busy: once the test has closed its files, only registered ids keep it busy.
    fn pinned(&self) -> bool {
        self.tmpfs.unmount() == Err(Errno::BUSY)
    }
}

fn for_reading(file: &File) -> ServerFile<'_, &File> {
    ServerFile::new(file).access(Access::ReadOnly)
}

fn for_both(file: &File) -> ServerFile<'_, &File> {
    ServerFile::new(file).access(Access::ReadWrite)
}

fn id(open: &OpenFile<Device>) -> Option<i32> {
    open.reply(FopenFlags::empty()).backing_id()
}

/// The reply that `negotiate` works out turns passthrough on.
#[apply(needs_passthrough)]
fn negotiated_flags_work(sandbox: &Sandbox) -> Result<(), Failed> {
    let offered = InitFlags::from_bits_retain(offer().flags);
    assert!(offered.contains(InitFlags::PASSTHROUGH | InitFlags::INIT_EXT));
    // fuser hides INIT_EXT from the server: `negotiate` replies it all the same.
    for offered in [offered, offered - InitFlags::INIT_EXT] {
        for depth in [MaxStackDepth::One, MaxStackDepth::Two] {
            let wanted = InitFlags::DIRECT_IO_ALLOW_MMAP | InitFlags::from_bits_retain(1 << 63);
            let reply = negotiate(offered, wanted, depth)?;
            let kept = InitFlags::PASSTHROUGH | InitFlags::INIT_EXT | wanted & offered;
            assert_eq!(reply.flags, kept);
            let (flags, flags2) = reply.flags.to_fields();
            assert_eq!(InitFlags::from_fields(flags, flags2), kept);
            let init = Init {
                flags: u64::from(flags) | u64::from(flags2) << 32,
                max_stack_depth: reply.max_stack_depth,
            };
            let connection = Connection::mount(sandbox, init)?;
            let id = connection.device().backing_open(tempfile::tempfile()?)?;
            connection.device().backing_close(id)?;
        }
    }
    let depth = MaxStackDepth::One;
    assert_eq!(
        negotiate(offered - InitFlags::PASSTHROUGH, InitFlags::empty(), depth),
        Err(NegotiateError::NotOffered)
    );
    // What the kernel does with such replies: `backing_open::negotiations_ignored_silently`.
    assert_eq!(
        negotiate(offered, InitFlags::WRITEBACK_CACHE, depth),
        Err(NegotiateError::WritebackCacheWanted)
    );
    assert_eq!(
        negotiate(offered, InitFlags::HANDLE_KILLPRIV, depth),
        Err(NegotiateError::HandleKillprivWanted)
    );
    assert_eq!(
        negotiate(offered, InitFlags::HANDLE_KILLPRIV_V2, depth),
        Err(NegotiateError::HandleKillprivV2Wanted)
    );
    Ok(())
}

/// The kernel offers passthrough also to servers that lack the capability to register.
#[apply(needs_passthrough)]
fn negotiate_needs_the_capability(_: &Sandbox) -> Result<(), Failed> {
    let reply = without_cap_sys_admin(|| {
        negotiate(InitFlags::all(), InitFlags::empty(), MaxStackDepth::One)
    });
    assert_eq!(
        reply,
        Err(NegotiateError::NotPermitted(
            NotPermitted::MissingCapability
        ))
    );
    assert_ne!(offer().flags & uapi::FUSE_PASSTHROUGH, 0);
    Ok(())
}

#[apply(needs_passthrough)]
fn one_id_for_all_opens(sandbox: &Sandbox) -> Result<(), Failed> {
    let setup = Setup::new(sandbox)?;
    let first = setup.open(7);
    assert!(first.is_passthrough());
    assert_eq!(first.server_reason(), None);
    let reply = first.reply(FopenFlags::NOFLUSH | FopenFlags::KEEP_CACHE);
    assert_eq!(reply.open_flags().bits(), 0x80 | 0x20);
    assert_eq!(reply.backing_id(), Some(1));

    let second = setup.open(7);
    let third = setup.table.share(&7, RDONLY).ok_or("not registered")?;
    let other = setup.open(8);
    assert_eq!(
        [id(&first), id(&second), id(&third), id(&other)],
        [Some(1), Some(1), Some(1), Some(2)]
    );
    assert_eq!(setup.table.stats().ids, 2);
    // Both are registered by an O_PATH fd, if the kernel accepts those.
    let by_path = path_only_files();
    assert_eq!(setup.table.stats().by_open_fd, if by_path { 0 } else { 2 });

    drop((first, third, other));
    assert!(setup.pinned());
    assert_eq!(id(&second), Some(1));
    drop(second);
    assert_eq!(setup.table.stats().ids, 0);
    setup.tmpfs.unmount_when_idle()
}

/// A refused file puts its inode alone in server mode, until the inode's last release.
#[apply(needs_passthrough)]
fn a_refused_file_affects_only_its_inode(sandbox: &Sandbox) -> Result<(), Failed> {
    let setup = Setup::new(sandbox)?;
    let good = setup.file("1");
    let refused = setup
        .table
        .open(&1, RDONLY, for_reading(&File::open("/proc/version")?))?;
    let reason = ServerReason::Refused(BackingError::StackedTooDeep);
    assert_eq!(refused.server_reason(), Some(reason));
    let keeps = FopenFlags::KEEP_CACHE;
    assert_eq!(refused.reply(keeps).open_flags(), keeps);
    assert_eq!(id(&refused), None);

    // A good file does not change the mode of this inode; other inodes are unaffected.
    let again = setup.table.open(&1, RDONLY, for_reading(&good))?;
    assert_eq!(again.server_reason(), Some(reason));
    assert!(setup.table.share(&1, RDONLY).is_none());
    assert!(setup.open(2).is_passthrough());

    drop(refused);
    assert!(
        !setup
            .table
            .open(&1, RDONLY, for_reading(&good))?
            .is_passthrough()
    );
    drop(again);
    assert!(
        setup
            .table
            .open(&1, RDONLY, for_reading(&good))?
            .is_passthrough()
    );
    assert_eq!(setup.table.stats().refused, None);
    Ok(())
}

/// The table remembers a refusal that concerns the connection, for every thread, until `reset`.
#[apply(needs_passthrough)]
fn a_refusal_of_the_connection_is_remembered(sandbox: &Sandbox) -> Result<(), Failed> {
    let connection = Connection::unanswered(sandbox, FuseDevice::open()?.into_inner())?;
    let setup = Setup::on(sandbox, connection)?;
    let error = BackingError::NotPermitted(NotPermitted::NotNegotiatedOrDenied);
    assert_eq!(error.scope(), Scope::Connection);
    let refused = apart(|| setup.open(1));
    assert_eq!(refused.server_reason(), Some(ServerReason::Refused(error)));
    assert_eq!(setup.table.stats().refused, Some(error));
    // From here on the kernel would register files.
    let device: Arc<OwnedFd> = setup.connection.device().into_inner();
    handshake(&device, Init::passthrough(1))?;
    // The table does not try: inode 2 would be in passthrough mode.
    assert_eq!(
        setup.open(2).server_reason(),
        Some(ServerReason::Refused(error))
    );
    setup.table.retry_registrations();
    assert!(setup.open(2).is_passthrough());
    // An inode that is open keeps its mode.
    assert_eq!(
        setup.open(1).server_reason(),
        Some(ServerReason::Refused(error))
    );
    Ok(())
}

/// Inodes that another thread opens are passed through.
#[apply(needs_passthrough)]
fn a_missing_capability_affects_only_its_thread(sandbox: &Sandbox) -> Result<(), Failed> {
    let setup = Setup::new(sandbox)?;
    let error = BackingError::NotPermitted(NotPermitted::MissingCapability);
    assert_eq!(error.scope(), Scope::Thread);
    let reason = Some(ServerReason::Refused(error));
    let refused = without_cap_sys_admin(|| setup.open(1));
    assert_eq!(refused.server_reason(), reason);
    assert_eq!(
        (setup.table.stats().ids, setup.table.stats().refused),
        (0, None)
    );
    let other = setup.open(2);
    assert!(other.is_passthrough());
    // The table does not remember the thread: each of its opens tries to register.
    let again = without_cap_sys_admin(|| setup.open(3));
    assert_eq!(again.server_reason(), reason);

    // The refused inode stays in server mode for every thread, until its last release.
    let further = setup.open(1);
    assert_eq!(further.server_reason(), reason);
    drop(refused);
    assert_eq!(setup.open(1).server_reason(), reason);
    drop(further);
    assert!(setup.open(1).is_passthrough());
    Ok(())
}

#[apply(needs_passthrough)]
fn access_widens_with_proof(sandbox: &Sandbox) -> Result<(), Failed> {
    let setup = Setup::new(sandbox)?;
    let both = setup.file("1");
    let read = File::open(setup.tmpfs.path().join("1"))?;
    let exceeded = |granted, wanted| OpenError::AccessExceeded { granted, wanted };

    // An open that asks for too much is neither counted nor registered.
    let refused = setup.table.open(&1, RDWR, ServerFile::new(&read));
    assert_eq!(
        refused.err(),
        Some(exceeded(Access::ReadOnly, Access::ReadWrite))
    );
    assert_eq!(setup.table.list().len(), 0);
    assert_eq!(setup.table.stats().ids, 0);

    let reader = setup.table.open(&1, RDONLY, ServerFile::new(&read))?;
    assert!(setup.table.share(&1, RDONLY).is_some());
    assert!(setup.table.share(&1, WRONLY).is_none());
    assert!(setup.table.share(&1, RDWR).is_none());
    // The open registration does not widen what this fd grants.
    let refused = setup.table.open(&1, WRONLY, ServerFile::new(&read));
    assert_eq!(
        refused.err(),
        Some(exceeded(Access::ReadOnly, Access::WriteOnly))
    );

    let writer = setup.table.open(&1, RDWR, ServerFile::new(&both))?;
    assert_eq!(id(&reader), id(&writer));
    assert!(setup.table.share(&1, RDWR).is_some());
    assert_eq!(setup.table.list()[0].access, Some(Access::ReadWrite));

    // The grant ends with the registration.
    drop((reader, writer));
    let write = ServerFile::new(&both).access(Access::WriteOnly);
    let writer = setup.table.open(&1, WRONLY, write)?;
    assert!(setup.table.share(&1, WRONLY).is_some());
    assert!(setup.table.share(&1, RDONLY).is_none());
    drop(writer);
    let reader = setup.table.open(&1, RDONLY, ServerFile::new(&read))?;
    assert!(setup.table.share(&1, RDWR).is_none());

    // An id that is kept, idle or because its close failed, grants no more than before.
    setup.table.set_idle_limit(1);
    drop(reader);
    assert!(setup.table.share(&1, RDWR).is_none());
    assert!(setup.table.share(&1, RDONLY).is_some());
    setup.table.set_idle_limit(0);
    let reader = setup.table.open(&1, RDONLY, ServerFile::new(&read))?;
    without_cap_sys_admin(|| drop(reader));
    assert!(setup.table.share(&1, RDWR).is_none());
    assert!(setup.table.share(&1, RDONLY).is_some());
    Ok(())
}

/// Serves one file. The server opens the backing file for reading; `access` is what it claims to grant, if set.
fn serve(
    sandbox: &Sandbox,
    init: Init,
    path: &Path,
    access: Option<Access>,
) -> Result<Connection, Failed> {
    let handles: Arc<Handles<Device>> = Arc::default();
    let path = path.to_owned();
    let node = Node {
        name: "file".into(),
        backing: File::open(&path)?,
    };
    let on_open = {
        let handles = Arc::clone(&handles);
        move |nodeid, flags: i32| {
            let mut file = ServerFile::new(File::open(&path).map_err(|_| Errno::IO)?);
            if let Some(access) = access {
                file = file.access(access);
            }
            let opened = handles.open(&nodeid, flags, file, FopenFlags::empty())?;
            Ok(opened.to_fuse_open_out())
        }
    };
    let connection = Connection::serve(sandbox, init, vec![node], Arc::new(on_open))?;
    let attached = handles.table().attach(Arc::new(connection.device()));
    attached.map_err(|_| "attached twice")?;
    Ok(connection)
}

/// A client cannot write if the server's fd is read-only. The controls are `passthrough::access_mode_is_ignored`, and
/// below a server that grants too much.
#[apply(needs_passthrough)]
fn access_reaches_the_client(sandbox: &Sandbox) -> Result<(), Failed> {
    let tmpfs = sandbox.tmpfs()?;
    let path = tmpfs.path().join("file");
    std::fs::write(&path, "content")?;
    let client = |connection: &Connection, role, text| {
        client::run(
            role,
            &[connection.path("file").as_os_str(), OsStr::new(text)],
        )
    };
    let connection = serve(sandbox, Init::passthrough(1), &path, None)?;
    let errno = client::errno(Errno::ACCESS);
    assert_eq!(client(&connection, "overwrite", "CHANGED")?, errno);
    assert_eq!(client(&connection, "read", "")?, "content");
    assert_eq!(std::fs::read_to_string(&path)?, "content");
    assert_eq!(connection.seen.reads.load(Ordering::SeqCst), 0);

    // The table believes a server that grants more than its fd does, and the kernel lets the client write.
    let connection = serve(
        sandbox,
        Init::passthrough(1),
        &path,
        Some(Access::ReadWrite),
    )?;
    assert_eq!(client(&connection, "overwrite", "CHANGED")?, "written");
    assert_eq!(std::fs::read_to_string(&path)?, "CHANGED");
    Ok(())
}

/// Opens with `O_RDONLY | O_TRUNC`.
fn truncate(args: &[String]) -> Result<String, Box<dyn std::error::Error>> {
    let flags = OFlags::RDONLY | OFlags::TRUNC;
    Ok(
        match rustix::fs::open(args[0].as_str(), flags, rustix::fs::Mode::empty()) {
            Ok(_) => "opened".into(),
            Err(errno) => client::errno(errno),
        },
    )
}

/// Why `O_TRUNC` needs no access of a registration: with `FUSE_ATOMIC_O_TRUNC` the server is to truncate, and the
/// kernel does not truncate when it opens the backing file again.
#[apply(needs_passthrough)]
fn truncation_is_not_passed_through(sandbox: &Sandbox) -> Result<(), Failed> {
    const FUSE_ATOMIC_O_TRUNC: u64 = 1 << 3;
    let tmpfs = sandbox.tmpfs()?;
    let path = tmpfs.path().join("file");
    std::fs::write(&path, "content")?;
    let mut init = Init::passthrough(1);
    init.flags |= FUSE_ATOMIC_O_TRUNC;
    // This server does not truncate, although it should.
    let connection = serve(sandbox, init, &path, None)?;
    let result = client::run("truncate", &[connection.path("file").as_os_str()])?;
    assert_eq!(result, "opened");
    assert_eq!(std::fs::read_to_string(&path)?, "content");
    Ok(())
}

#[apply(needs_passthrough)]
fn a_different_file_is_refused_while_open(sandbox: &Sandbox) -> Result<(), Failed> {
    let setup = Setup::new(sandbox)?;
    let other = setup.file("other");
    let open = setup.open(1);
    let refused = setup.table.open(&1, RDONLY, for_reading(&other));
    assert_eq!(refused.err(), Some(OpenError::DifferentFile));
    // A second name of the same file is the same file.
    std::fs::hard_link(setup.tmpfs.path().join("1"), setup.tmpfs.path().join("1b"))?;
    let link = File::open(setup.tmpfs.path().join("1b"))?;
    assert_eq!(
        id(&setup.table.open(&1, RDONLY, ServerFile::new(&link))?),
        id(&open)
    );

    // A different file replaces a registration that is idle.
    setup.table.set_idle_limit(1);
    drop(open);
    assert_eq!(setup.table.stats().idle, 1);
    let open = setup.table.open(&1, RDONLY, for_reading(&other))?;
    assert_eq!(id(&open), Some(2));
    assert_eq!((setup.table.stats().ids, setup.table.stats().idle), (1, 0));
    Ok(())
}

#[apply(needs_passthrough)]
fn share_says_none(sandbox: &Sandbox) -> Result<(), Failed> {
    let setup = Setup::new(sandbox)?;
    assert!(setup.table.share(&1, RDONLY).is_none(), "not registered");
    let open = setup.open(1);
    assert!(setup.table.share(&1, RDWR).is_some());
    assert!(
        setup.table.share(&1, RDWR | TRUNC).is_none(),
        "the server has to truncate it"
    );
    assert!(
        setup.table.share(&1, RDONLY | TRUNC).is_none(),
        "the server has to truncate it"
    );
    drop(open);
    assert!(
        setup.table.share(&1, RDONLY).is_none(),
        "no longer registered"
    );
    Ok(())
}

#[apply(needs_passthrough)]
fn serve_keeps_to_the_mode(sandbox: &Sandbox) -> Result<(), Failed> {
    let setup = Setup::new(sandbox)?;
    let served = setup.table.serve(&1).ok_or("open elsewhere")?;
    assert_eq!(served.server_reason(), Some(ServerReason::Chosen));
    assert_eq!(setup.open(1).server_reason(), Some(ServerReason::Chosen));
    assert!(setup.table.serve(&1).is_some());
    drop(served);

    let open = setup.open(1);
    assert!(open.is_passthrough());
    assert!(setup.table.serve(&1).is_none());
    setup.table.set_idle_limit(1);
    drop(open);
    assert!(setup.pinned());
    let _served = setup.table.serve(&1).ok_or("not idle")?;
    assert_eq!(setup.table.stats().ids, 0);
    setup.tmpfs.unmount_when_idle()
}

#[apply(needs_passthrough)]
fn limit(sandbox: &Sandbox) -> Result<(), Failed> {
    let setup = Setup::new(sandbox)?;
    let soft = getrlimit(Resource::Nofile).current.ok_or("no soft limit")?;
    assert_eq!(setup.table.stats().limit as u64, soft);

    setup.table.set_limit(2);
    let (one, two) = (setup.open(1), setup.open(2));
    let three = setup.open(3);
    assert_eq!(three.server_reason(), Some(ServerReason::LimitReached));
    assert!(setup.open(1).is_passthrough(), "shares");
    let stats = setup.table.stats();
    assert_eq!(stats.ids, 2);
    assert_eq!(stats.served, [(ServerReason::LimitReached, 1)]);

    // Idle ids are closed first.
    drop(three);
    setup.table.set_idle_limit(2);
    drop(one);
    assert_eq!(setup.table.stats().idle, 1);
    let three = setup.open(3);
    assert!(three.is_passthrough());
    assert_eq!((setup.table.stats().ids, setup.table.stats().idle), (2, 0));

    // A limit below the number of open ids closes none of them; those released beyond it are not kept idle.
    setup.table.set_limit(1);
    assert_eq!(setup.table.stats().ids, 2);
    drop(two);
    assert_eq!((setup.table.stats().ids, setup.table.stats().idle), (1, 0));
    drop(three);
    assert_eq!((setup.table.stats().ids, setup.table.stats().idle), (1, 1));
    setup.table.set_limit(0);
    assert_eq!(setup.table.stats().ids, 0);
    assert_eq!(
        setup.open(4).server_reason(),
        Some(ServerReason::LimitReached)
    );
    setup.table.set_limit(1);
    assert!(setup.open(4).is_passthrough());
    Ok(())
}

#[apply(needs_passthrough)]
fn opens_beside_share(sandbox: &Sandbox) -> Result<(), Failed> {
    // It asks to write, which none of the opens grants.
    sequential_opens(sandbox, |table| {
        assert!(table.share(&1, WRONLY).is_none());
    })
}

#[apply(needs_passthrough)]
fn opens_beside_list(sandbox: &Sandbox) -> Result<(), Failed> {
    sequential_opens(sandbox, |table| {
        for entry in &table.list() {
            assert!(entry.opens <= 1, "{entry:?}");
        }
    })
}

#[apply(needs_passthrough)]
fn opens_beside_trimming(sandbox: &Sandbox) -> Result<(), Failed> {
    sequential_opens(sandbox, |table| {
        table.set_idle_limit(0);
        table.set_idle_limit(1);
    })
}

#[apply(needs_passthrough)]
fn opens_beside_invalidate(sandbox: &Sandbox) -> Result<(), Failed> {
    sequential_opens(sandbox, |table| {
        // The answer depends on whether it meets an open.
        let _done = table.invalidate(&1);
    })
}

struct Done<'a>(&'a AtomicBool);

impl Drop for Done<'_> {
    fn drop(&mut self) {
        self.0.store(true, Ordering::Relaxed);
    }
}

/// One thread opens and releases, while another looks at or closes what is registered. Each open finds nothing open,
/// so its outcome is that of a first open.
fn sequential_opens(sandbox: &Sandbox, meanwhile: impl Fn(&Table) + Sync) -> Result<(), Failed> {
    const OPENS: u32 = 200_000;
    /// Opens in a round, the one of `serve` among them.
    const IN_A_ROUND: u32 = 9;

    // A kernel that records each allocation would take minutes for all of them.
    let opens = OPENS / if fail_nth() { 20 } else { patience_times() };
    let setup = Setup::new(sandbox)?;
    let table = &setup.table;
    let (one, other) = (setup.file("1"), setup.file("2"));
    let never = File::open("/proc/version")?;
    let open = |inode, file| {
        let file = ServerFile::new(file).access(Access::ReadOnly);
        table.open(&inode, RDONLY, file)
    };
    // There is room for one id: one that stays open, or is still being closed, would show.
    table.set_limit(1);
    table.set_idle_limit(1);
    let (done, others) = (AtomicBool::new(false), AtomicU64::new(0));
    let mut wrong: BTreeMap<String, u32> = BTreeMap::new();
    let mut expect = |what: &str, right: bool, found: &dyn std::fmt::Debug| {
        if !right {
            *wrong.entry(format!("{what}: {found:?}")).or_default() += 1;
        }
    };
    thread::scope(|scope| {
        scope.spawn(|| {
            while !done.load(Ordering::Relaxed) {
                meanwhile(table);
                others.fetch_add(1, Ordering::Relaxed);
            }
        });
        // Stops the other thread even if this one panics.
        let _done = Done(&done);
        for _ in 0..opens.div_ceil(IN_A_ROUND) {
            // Each open differs in its file or mode from the one before.
            for (what, file) in [("one file", &one), ("another file", &other), ("one", &one)] {
                let opened = open(1, file);
                let passed = matches!(&opened, Ok(open) if open.is_passthrough());
                expect(what, passed, &opened);
            }
            let opened = open(2, &other);
            let passed = matches!(&opened, Ok(open) if open.is_passthrough());
            expect("another inode within the limit", passed, &opened);
            drop(opened);
            expect("serve", table.serve(&2).is_some(), &());
            drop(open(1, &one));
            expect("invalidate", table.invalidate(&1), &());
            let opened = open(1, &never);
            let reason = opened.as_ref().ok().and_then(OpenFile::server_reason);
            let refused = ServerReason::Refused(BackingError::StackedTooDeep);
            expect("refused", reason == Some(refused), &reason);
            drop(opened);
            for what in ["after a refusal", "again"] {
                let opened = open(1, &one);
                let passed = matches!(&opened, Ok(open) if open.is_passthrough());
                expect(what, passed, &opened);
            }
        }
    });
    assert!(wrong.is_empty(), "{wrong:#?}");
    assert!(others.into_inner() > 100, "the other thread hardly ran");
    table.set_idle_limit(0);
    assert_eq!(table.stats().ids, 0);
    drop((one, other));
    setup.tmpfs.unmount_when_idle()
}

#[apply(needs_passthrough)]
fn idle_ids(sandbox: &Sandbox) -> Result<(), Failed> {
    let setup = Setup::new(sandbox)?;
    setup.table.set_idle_limit(2);
    for inode in 1..=3 {
        drop(setup.open(inode));
    }
    // The oldest was closed; the others are reopened with their ids.
    assert_eq!(setup.table.stats().idle, 2);
    assert!(setup.table.share(&1, RDONLY).is_none());
    let two = setup.table.share(&2, RDWR).ok_or("not idle")?;
    assert_eq!((id(&two), id(&setup.open(3))), (Some(2), Some(3)));
    assert!(setup.pinned());
    drop(two);
    // 3 was released before 2, and is the oldest now.
    drop(setup.open(4));
    assert!(setup.table.share(&3, RDONLY).is_none());
    assert!(setup.table.share(&2, RDONLY).is_some());

    setup.table.set_idle_limit(0);
    assert_eq!(setup.table.stats().ids, 0);
    setup.tmpfs.unmount_when_idle()
}

#[apply(needs_passthrough)]
fn forget_detaches(sandbox: &Sandbox) -> Result<(), Failed> {
    let setup = Setup::new(sandbox)?;
    let old = setup.open(1);
    setup.table.forget(&1);
    assert!(setup.table.share(&1, RDONLY).is_none());
    let other = setup.file("other");
    let new = setup.table.open(&1, RDONLY, for_reading(&other))?;
    assert_eq!((id(&old), id(&new)), (Some(1), Some(2)));
    let mut listed: Vec<_> = setup
        .table
        .list()
        .iter()
        .map(|e| (e.id, e.detached))
        .collect();
    listed.sort();
    assert_eq!(listed, [(Some(1), true), (Some(2), false)]);

    // Each open closes its own id.
    drop(old);
    assert_eq!(setup.table.stats().ids, 1);
    assert_eq!(
        id(&setup.table.share(&1, RDONLY).ok_or("not open")?),
        Some(2)
    );
    drop(new);
    assert_eq!(setup.table.stats().ids, 0);

    // The id of a forgotten inode does not become idle, and an idle one is closed.
    setup.table.set_idle_limit(5);
    let old = setup.open(1);
    setup.table.forget(&1);
    drop(old);
    assert_eq!(setup.table.stats().ids, 0);
    drop(setup.open(1));
    assert_eq!(setup.table.stats().idle, 1);
    setup.table.forget(&1);
    assert_eq!(setup.table.stats().ids, 0);
    setup.table.forget(&99);
    assert!(setup.table.list().is_empty());
    drop(other);
    setup.tmpfs.unmount_when_idle()
}

#[apply(needs_passthrough)]
fn invalidate(sandbox: &Sandbox) -> Result<(), Failed> {
    let setup = Setup::new(sandbox)?;
    setup.table.set_idle_limit(1);
    let open = setup.open(1);
    assert!(!setup.table.invalidate(&1));
    assert!(
        setup.table.share(&1, RDONLY).is_some(),
        "nothing has changed"
    );
    drop(open);
    assert_eq!(setup.table.stats().idle, 1);
    assert!(setup.table.invalidate(&1));
    assert_eq!(setup.table.stats().ids, 0);
    assert!(setup.table.invalidate(&1));
    let served = setup.table.serve(&1).ok_or("not free")?;
    assert!(!setup.table.invalidate(&1), "open in server mode");
    drop(served);
    setup.tmpfs.unmount_when_idle()
}

#[apply(needs_passthrough)]
fn closes_that_fail(sandbox: &Sandbox) -> Result<(), Failed> {
    let setup = Setup::new(sandbox)?;
    let cause = BackingError::NotPermitted(NotPermitted::MissingCapability);
    let release_incapably = |open| without_cap_sys_admin(|| drop(open));

    release_incapably(setup.open(1));
    let stats = setup.table.stats();
    assert_eq!((stats.ids, stats.idle, stats.close_failures), (1, 0, 1));
    let listed = setup.table.list();
    assert_eq!((listed[0].opens, listed[0].close_failed), (0, Some(cause)));
    assert!(setup.pinned());

    // The id can be shared again, and its next release closes it.
    let again = setup.table.share(&1, RDWR).ok_or("not kept")?;
    assert_eq!(id(&again), Some(1));
    assert_eq!(setup.table.list()[0].close_failed, None);
    drop(again);
    assert_eq!(setup.table.stats().ids, 0);

    // `retry_closes` closes it once permitted.
    release_incapably(setup.open(2));
    let retried = without_cap_sys_admin(|| setup.table.retry_closes());
    assert_eq!(retried, Err(cause));
    assert_eq!(setup.table.stats().close_failures, 3);
    setup.table.retry_closes()?;
    assert_eq!((setup.table.stats().ids, setup.table.list().len()), (0, 0));

    // The id is not lost when its inode number goes to another file.
    release_incapably(setup.open(3));
    without_cap_sys_admin(|| setup.table.forget(&3));
    assert_eq!(setup.table.stats().ids, 1);
    let other = setup
        .table
        .open(&3, RDONLY, for_reading(&setup.file("other")))?;
    assert_eq!(setup.table.list().len(), 2);
    drop(other);
    setup.table.retry_closes()?;
    assert_eq!((setup.table.stats().ids, setup.table.list().len()), (0, 0));
    setup.tmpfs.unmount_when_idle()
}

/// If someone else closes a raw id of the table, the table counts a failed close and keeps no entry.
#[apply(needs_passthrough)]
fn closed_behind_its_back(sandbox: &Sandbox) -> Result<(), Failed> {
    let setup = Setup::new(sandbox)?;
    let open = setup.open(1);
    let stolen = id(&open).and_then(BackingId::from_raw);
    let stolen = stolen.ok_or("no passthrough")?;
    setup.connection.device().backing_close(stolen)?;
    drop(open);
    let stats = setup.table.stats();
    assert_eq!((stats.ids, stats.close_failures), (0, 1));
    assert!(setup.table.list().is_empty());
    Ok(())
}

#[apply(needs_passthrough)]
fn dropped_before_its_files(sandbox: &Sandbox) -> Result<(), Failed> {
    let Setup {
        table,
        tmpfs,
        connection,
    } = Setup::new(sandbox)?;
    table.set_idle_limit(5);
    let opened = |inode: u64| -> Result<_, Failed> {
        let file = tmpfs.file(&inode.to_string(), "")?;
        Ok(table.open(&inode, RDWR, for_both(&file))?)
    };
    let open = opened(1)?;
    drop(opened(2)?);
    assert_eq!(table.stats().ids, 2);
    drop(table);
    assert_eq!(id(&open), Some(1));
    assert_eq!(tmpfs.unmount(), Err(Errno::BUSY));
    drop(open);
    tmpfs.unmount_when_idle()?;
    drop(connection);
    Ok(())
}

/// Ids that cannot be closed do not keep the device: the connection ends, which closes them.
#[apply(needs_passthrough)]
fn dropped_without_capability(sandbox: &Sandbox) -> Result<(), Failed> {
    let Setup {
        table,
        tmpfs,
        connection,
    } = Setup::new(sandbox)?;
    table.set_idle_limit(5);
    drop(table.open(&1, RDWR, for_both(&tmpfs.file("1", "")?))?);
    without_cap_sys_admin(|| drop(table));
    assert_eq!(tmpfs.unmount(), Err(Errno::BUSY));
    drop(connection);
    tmpfs.unmount_when_idle()
}

/// As `dropped_without_capability`, with a release after the table was dropped.
#[apply(needs_passthrough)]
fn released_without_capability_and_table(sandbox: &Sandbox) -> Result<(), Failed> {
    let Setup {
        table,
        tmpfs,
        connection,
    } = Setup::new(sandbox)?;
    let open = table.open(&1, RDWR, for_both(&tmpfs.file("1", "")?))?;
    drop(table);
    without_cap_sys_admin(|| drop(open));
    assert_eq!(tmpfs.unmount(), Err(Errno::BUSY));
    drop(connection);
    tmpfs.unmount_when_idle()
}

#[apply(needs_passthrough)]
fn listing(sandbox: &Sandbox) -> Result<(), Failed> {
    use std::os::unix::fs::MetadataExt;
    let started = Instant::now();
    let setup = Setup::new(sandbox)?;
    setup.table.set_idle_limit(1);
    let file = setup.file("1");
    let _open = setup.table.open(&1, RDONLY, for_reading(&file))?;
    let _again = setup.table.share(&1, RDONLY);
    drop(setup.open(2));
    let _served = setup.table.serve(&3);

    let mut entries = setup.table.list().to_vec();
    entries.sort_by_key(|entry| entry.inode);
    let [one, two, three] = &entries[..] else {
        return Err(format!("{entries:?}").into());
    };
    let metadata = file.metadata()?;
    assert_eq!(
        (one.id, one.opens, one.access),
        (Some(1), 2, Some(Access::ReadOnly))
    );
    assert_eq!(one.backing_device, Some(metadata.dev()));
    assert_eq!(one.backing_inode, Some(metadata.ino()));
    assert_eq!((two.id, two.opens, two.server_reason), (Some(2), 0, None));
    assert_eq!((three.id, three.opens), (None, 1));
    assert_eq!(three.server_reason, Some(ServerReason::Chosen));

    let printed = setup.table.list().to_string();
    let lines: Vec<Vec<&str>> = printed
        .lines()
        .map(|l| l.split_whitespace().collect())
        .collect();
    assert_eq!(lines.len(), 4, "{printed}");
    let row = |inode| {
        lines
            .iter()
            .find(|line| line[0] == inode)
            .ok_or("no such row")
    };
    let device = format!(
        "{}:{}",
        rustix::fs::major(metadata.dev()),
        rustix::fs::minor(metadata.dev())
    );
    let inode = metadata.ino().to_string();
    let expected = [
        "1",
        "1",
        &device,
        &inode,
        "read-only",
        "2",
        "0s",
        "passthrough",
    ];
    assert_eq!(row("1")?[..], expected);
    assert!(printed.contains("passthrough, idle"), "{printed}");
    assert!(
        printed.contains("server: the server chose to read and write the file itself"),
        "{printed}"
    );

    thread::sleep(Duration::from_millis(1100));
    for entry in &setup.table.list() {
        let age = entry.age.as_secs();
        assert!(
            (1..=started.elapsed().as_secs() + 1).contains(&age),
            "{age}"
        );
    }
    Ok(())
}

/// Debug output suits a log: it shows figures and modes, no addresses and no device.
#[apply(needs_passthrough)]
fn debug(sandbox: &Sandbox) -> Result<(), Failed> {
    let setup = Setup::new(sandbox)?;
    let (open, served) = (setup.open(1), setup.table.serve(&2).ok_or("not free")?);
    let printed = format!("{:?}", setup.table);
    let stats = setup.table.stats();
    assert_eq!(printed, format!("BackingTable({stats:?})"));
    let printed = format!("{open:?} {served:?}");
    assert!(
        printed.contains("Passthrough(Registered { id: BackingId(1), "),
        "{printed}"
    );
    assert!(printed.contains("Server(Chosen)"), "{printed}");
    Ok(())
}

thread_local! {
    /// How many more calls of `Key::hash` succeed before one panics; `None` if none is to panic.
    static CALLS_LEFT: Cell<Option<u32>> = const { Cell::new(None) };
}

/// A key whose `hash` can panic. An open calls it twice: to choose the shard, and under the shard lock.
#[derive(Clone, PartialEq, Eq)]
struct Key(u64);

impl Hash for Key {
    fn hash<H: Hasher>(&self, state: &mut H) {
        match CALLS_LEFT.get() {
            Some(0) => resume_unwind(Box::new("a key that cannot be hashed")),
            left => CALLS_LEFT.set(left.map(|calls| calls - 1)),
        }
        self.0.hash(state);
    }
}

#[apply(needs_passthrough)]
fn panicking_keys(sandbox: &Sandbox) -> Result<(), Failed> {
    let connection = Connection::mount(sandbox, Init::passthrough(1))?;
    let table: BackingTable<Device, Key> = BackingTable::new(Arc::new(connection.device()));
    let file = tempfile::tempfile()?;
    let open = |key| table.open(&Key(key), RDONLY, for_reading(&file));
    // Enough keys to reach every shard.
    for key in 0..2_000 {
        for calls in 0..2 {
            CALLS_LEFT.set(Some(calls));
            let panicked = catch_unwind(AssertUnwindSafe(|| open(key).is_ok()));
            CALLS_LEFT.set(None);
            assert!(panicked.is_err(), "{calls}");
        }
    }
    // A release that panics leaves the key in the map.
    for key in 0..2_000 {
        let opened = open(key)?;
        CALLS_LEFT.set(Some(0));
        let panicked = catch_unwind(AssertUnwindSafe(|| drop(opened)));
        CALLS_LEFT.set(None);
        assert!(panicked.is_err());
    }
    for key in 0..2_000 {
        assert!(open(key)?.is_passthrough());
    }
    assert_eq!(table.stats().ids, 0);
    Ok(())
}

const SHARES: usize = 100;

/// Runs in a process of one thread, whose system calls are traced.
fn share_and_release(args: &[String]) -> Result<String, Box<dyn std::error::Error>> {
    let device = mounted(args[0].as_ref(), Init::passthrough(1)).map_err(|e| format!("{e:?}"))?;
    let table: BackingTable<_> = BackingTable::new(&device);
    let _open = table.open(&1, RDWR, for_both(&tempfile::tempfile()?))?;
    let file = tempfile::tempfile()?;
    let numbers = file.metadata()?;
    let known = || for_both(&file).identity(numbers.dev(), numbers.ino());
    let _known = table.open(&2, RDWR, known())?;
    let handles: Handles<_, Arc<File>> = Handles::new(BackingTable::new(&device));
    let file = Arc::new(tempfile::tempfile()?);
    let numbers = file.metadata()?;
    let open = || {
        let known = ServerFile::new(Arc::clone(&file)).access(Access::ReadWrite);
        let known = known.identity(numbers.dev(), numbers.ino());
        handles.open(&3, RDWR, known, FopenFlags::empty())
    };
    let _held = open()?;
    // Makes the slot that the opens below reuse.
    drop(handles.release(open()?.fh));
    trace::traced(|| {
        for _ in 0..SHARES {
            assert!(black_box(table.share(&1, RDWR)).is_some());
            assert!(black_box(table.open(&2, RDWR, known())).is_ok());
            let opened = black_box(open()).expect("it opens");
            assert!(handles.release(opened.fh).is_some());
        }
    })?;
    Ok("done".into())
}

#[apply(needs_passthrough)]
fn share_costs_nothing(sandbox: &Sandbox) -> Result<(), Failed> {
    let mountpoint = sandbox.folder("mnt")?;
    let made = trace::calls_of("share-and-release", &[mountpoint.as_os_str()])?;
    assert_eq!(made, []);

    let setup = Setup::new(sandbox)?;
    let _open = setup.open(1);
    let before = alloc::count();
    for _ in 0..SHARES {
        drop(black_box(setup.table.share(&1, RDWR)).ok_or("not registered")?);
    }
    assert_eq!(alloc::count() - before, 0);
    Ok(())
}

/// What a million open inodes cost in memory, and how much slower they make it to open and release one more.
#[apply(needs_passthrough)]
fn a_million_inodes(sandbox: &Sandbox) -> Result<(), Failed> {
    const FEW: u64 = 1_000;
    const ROUNDS: u64 = 51;
    const BATCH: u64 = 200;
    const ATTEMPTS: u32 = 10;

    // A million takes minutes if the kernel records each allocation, or if the machine is emulated.
    let slow = fail_nth() || patience_times() > 1;
    let many = if slow { 100_000 } else { 1_000_000 };
    let setup = Setup::new(sandbox)?;
    let small = Setup::new(sandbox)?;
    let file = setup.file("file");
    let open = |setup: &Setup, inode: u64| {
        setup.table.set_limit(usize::MAX);
        setup
            .table
            .open(&inode, RDONLY, for_reading(&file))
            .expect("opened")
    };
    let before = alloc::live_bytes();
    let mut held = Vec::with_capacity(many as usize);
    held.extend((0..many).map(|inode| open(&setup, inode)));
    let each = (alloc::live_bytes() - before) as f64 / many as f64;
    let few: Vec<_> = (0..FEW).map(|inode| open(&small, inode)).collect();
    assert!(held.iter().chain(&few).all(OpenFile::is_passthrough));

    // The rounds of both tables alternate, so that the machine's other work slows both.
    let time = |setup: &Setup, round: u64| {
        let start = Instant::now();
        for n in 0..BATCH {
            drop(open(setup, many + round * BATCH + n));
        }
        start.elapsed().as_secs_f64()
    };
    let median = || {
        let mut ratios: Vec<_> = (0..ROUNDS)
            .map(|round| time(&setup, round) / time(&small, round))
            .collect();
        ratios.sort_by(f64::total_cmp);
        ratios[ratios.len() / 2]
    };
    // Many inodes miss the TLB often, and an emulator walks page tables in software at each miss: the ratio was 2.8
    // on mips64.
    let most = if patience_times() > 1 { 4.0 } else { 1.5 };
    // Other work on the machine's caches raises the ratio, never lowers it: the lowest counts.
    let mut ratio = median();
    for _ in 1..ATTEMPTS {
        if ratio > most {
            ratio = ratio.min(median());
        }
    }
    println!("{many} open inodes: {each:.1} bytes each, a cold open {ratio:.2} times");
    assert!(each <= 176.0, "{each} bytes for each open inode");
    assert!(
        ratio <= most,
        "a cold open among {many} costs {ratio} times that among a thousand"
    );
    drop(held);
    assert_eq!(setup.table.stats().ids, 0);
    Ok(())
}
