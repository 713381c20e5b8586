//! What fails for want of memory, or is forged to fail: a typed error each time, nothing registered,
//! nothing leaked, and the next attempt works.
//!
//! On a kernel with `CONFIG_FAULT_INJECTION` every allocation of a call, and every copy to and from
//! user space, is failed in turn: the first of a call, then the second, until there are no more.
//! Elsewhere the results are forged, see also `forged_errors` of each ioctl's tests.

use std::cell::RefCell;
use std::fs::{self, File};
use std::os::fd::OwnedFd;
use std::os::unix::fs::FileExt;
use std::sync::Arc;

use fuse_backing::error::{BackingError, DeviceError, NotPermitted, Scope, ServerReason};
use fuse_backing::{
    Access, BackingFile, BackingId, BackingTable, FopenFlags, FuseDevice, OpenFile, ServerFile,
    error::Errno, uapi,
};
use libtest_mimic::Failed;
use macro_rules_attribute::apply;
use rustix::event::{PollFd, PollFlags, poll};
use rustix::fs::OFlags;
use rustix::mount::{MountFlags, UnmountFlags, mount, unmount};

use crate::fuse::{Connection, Init, attach, handshake};
use crate::sandbox::{Sandbox, Tmpfs};
use crate::seccomp::{Forged, forge};
use crate::thread::apart;

/// A walk that is longer than this goes in circles.
const MANY: u32 = 2000;
/// Walks of each call. What else happens to the thread, a page fault or a file that is put late,
/// allocates too, so that one walk may pass a failure by.
const WALKS: u32 = 5;

/// Has the allocations of this thread fail.
struct Failing(File);

impl Failing {
    fn new(sandbox: &Sandbox) -> Result<Self, Failed> {
        let debugfs = sandbox.folder("debugfs")?;
        mount("debugfs", &debugfs, "debugfs", MountFlags::empty(), None)?;
        // Those that may wait for memory too, which are nearly all.
        for (file, value) in [
            ("failslab/ignore-gfp-wait", "N"),
            ("fail_page_alloc/ignore-gfp-wait", "N"),
            ("fail_page_alloc/min-order", "0"),
            // Where it came from need not be on the console each time.
            ("failslab/verbose", "0"),
            ("fail_page_alloc/verbose", "0"),
            ("fail_usercopy/verbose", "0"),
        ] {
            fs::write(debugfs.join(file), value)?;
        }
        unmount(&debugfs, UnmountFlags::empty())?;
        let fail_nth = File::options()
            .read(true)
            .write(true)
            .open("/proc/thread-self/fail-nth")?;
        Ok(Self(fail_nth))
    }

    /// What comes of `f` when its `n`th allocation fails, and whether it has that many.
    fn nth<T>(&self, n: u32, f: impl FnOnce() -> T) -> Result<(T, bool), Failed> {
        let text = n.to_string();
        self.0.write_all_at(text.as_bytes(), 0)?;
        let result = f();
        // The count goes on in these calls: if it runs out here, then it had not in `f`.
        let mut left = [0; 16];
        let failed = match self.0.read_at(&mut left, 0) {
            Ok(length) => left[..length].trim_ascii() == b"0",
            Err(_) => false,
        };
        while self.0.write_all_at(b"0", 0).is_err() {}
        Ok((result, failed))
    }

    /// Fails one after the other until there are no more, some times over, and `check`s each result. Returns
    /// how many there were, where there were fewest.
    fn each<T>(
        &self,
        what: &str,
        mut f: impl FnMut() -> T,
        mut check: impl FnMut(T, bool) -> Result<(), Failed>,
    ) -> Result<u32, Failed> {
        let mut fewest = MANY;
        for _ in 0..WALKS {
            let mut n = 0;
            let mut failed = true;
            while failed {
                n += 1;
                if n == MANY {
                    return Err(format!("{what}: no end").into());
                }
                let result;
                (result, failed) = self.nth(n, &mut f)?;
                check(result, failed)
                    .map_err(|why| format!("{what}, {n}: {}", why.message().unwrap_or("failed")))?;
            }
            println!("{what}: {} allocations and copies failed in turn", n - 1);
            fewest = fewest.min(n - 1);
        }
        Ok(fewest)
    }
}

/// The errnos of a failed allocation, of a failed copy, and of a table of files that cannot grow.
fn expect_want(errno: Errno, scope: Scope) -> Result<(), Failed> {
    match (errno, scope) {
        (Errno::NOMEM, Scope::Transient) | (Errno::NFILE, _) | (Errno::FAULT, _) => Ok(()),
        other => Err(format!("{other:?}").into()),
    }
}

#[apply(needs_fail_nth)]
fn failing_backing_open(sandbox: &Sandbox) -> Result<(), Failed> {
    let failing = Failing::new(sandbox)?;
    let connection = Connection::mount(sandbox, Init::passthrough(1))?;
    let device = connection.device();
    let fresh = || -> Result<(Tmpfs, File), Failed> {
        let tmpfs = sandbox.tmpfs()?;
        let file = tmpfs.file("file", "")?;
        Ok((tmpfs, file))
    };
    let place = RefCell::new(fresh()?);
    let mut seen = Vec::new();
    failing.each(
        "BACKING_OPEN",
        || device.backing_open(&place.borrow().1),
        |result, failed| {
            let (tmpfs, file) = place.replace(fresh()?);
            drop(file);
            match result {
                Ok(id) => {
                    assert_eq!(tmpfs.unmount(), Err(Errno::BUSY), "the control");
                    device.backing_close(id)?;
                }
                Err(error) => {
                    assert!(failed, "{error:?}");
                    seen.push(error);
                }
            }
            // Nothing of it is left.
            tmpfs.unmount_when_idle()
        },
    )?;
    // The copy of the argument; the registration and its id.
    let (copy, memory) = (BackingError::Other(Errno::FAULT), BackingError::OutOfMemory);
    assert!(seen.contains(&copy) && seen.contains(&memory), "{seen:?}");
    seen.retain(|error| ![copy, memory].contains(error));
    assert_eq!(seen, []);
    Ok(())
}

/// It allocates nothing, so that memory can always be given back.
#[apply(needs_fail_nth)]
fn failing_backing_close(sandbox: &Sandbox) -> Result<(), Failed> {
    let failing = Failing::new(sandbox)?;
    let connection = Connection::mount(sandbox, Init::passthrough(1))?;
    let device = connection.device();
    let tmpfs = sandbox.tmpfs()?;
    let id = device.backing_open(tmpfs.file("file", "")?)?;
    let (closed, failed) = failing.nth(1, || device.backing_close(id))?;
    closed?;
    assert!(!failed);
    tmpfs.unmount_when_idle()
}

/// Opening the device, and attaching it.
#[apply(needs_fail_nth)]
fn failing_clone(sandbox: &Sandbox) -> Result<(), Failed> {
    let failing = Failing::new(sandbox)?;
    let connection = Connection::mount(sandbox, Init::passthrough(1))?;
    let device = connection.device();
    let tmpfs = sandbox.tmpfs()?;
    let refused = |error: DeviceError, failed: bool| {
        assert!(failed, "{error:?}");
        expect_want(error.errno(), error.scope())
    };
    let opening = failing.each("open", FuseDevice::open, |opened, failed| match opened {
        Err(error) => refused(error, failed),
        Ok(_) => Ok(()),
    })?;
    let cloning = failing.each(
        "CLONE",
        || device.clone_connection(),
        |clone, failed| match clone {
            Err(error) => refused(error, failed),
            Ok(clone) => {
                let id = clone.backing_open(tmpfs.file("file", "")?)?;
                Ok(device.backing_close(id)?)
            }
        },
    )?;
    assert!(cloning > opening, "the ioctl itself has not failed");
    tmpfs.unmount_when_idle()
}

/// mount(2), and what the crate says of a device whose mount has failed.
#[apply(needs_fail_nth)]
fn failing_mount(sandbox: &Sandbox) -> Result<(), Failed> {
    let failing = Failing::new(sandbox)?;
    let mountpoint = sandbox.folder("mnt")?;
    let (mut refused, mut spent, mut silent) = (0, 0, 0);
    let tmpfs = sandbox.tmpfs()?;
    let device = RefCell::new(FuseDevice::open()?.into_inner());
    failing.each(
        "mount",
        || attach(&device.borrow(), &mountpoint),
        |result, failed| {
            let mut device = device.replace(FuseDevice::open()?.into_inner());
            let file = tmpfs.file("file", "")?;
            if let Err(why) = result {
                assert!(failed, "{why:?}");
                refused += 1;
                match FuseDevice::new(&device)?.backing_open(&file) {
                    // The same device can be mounted all the same.
                    Err(BackingError::NotAttached(_)) => {}
                    // What failed came after the filesystem was made, and has ended it: the device
                    // is that of a connection that is gone.
                    Err(BackingError::NotPermitted(NotPermitted::NotNegotiatedOrDenied)) => {
                        spent += 1;
                        assert!(attach(&device, &mountpoint).is_err());
                        device = FuseDevice::open()?.into_inner();
                    }
                    other => return Err(format!("{other:?}").into()),
                }
                attach(&device, &mountpoint)?;
            }
            let attached = FuseDevice::new(&device)?;
            if is_readable(&device)? {
                handshake(&device, Init::passthrough(1))?;
                // Not closed: that is left to the end of the connection.
                let _ = attached.backing_open(&file)?.into_raw();
            } else {
                // What failed was the INIT request: mount(2) succeeds, and it is never sent.
                assert!(failed);
                silent += 1;
                let denied = NotPermitted::NotNegotiatedOrDenied;
                assert_eq!(
                    attached.backing_open(&file),
                    Err(BackingError::NotPermitted(denied))
                );
            }
            Ok(unmount(&mountpoint, UnmountFlags::DETACH)?)
        },
    )?;
    println!(
        "mount: {refused} refused, {spent} of them with the device attached; {silent} without INIT"
    );
    assert!(refused >= 10, "{refused}");
    tmpfs.unmount_when_idle()
}

/// Whether there is a request, which after mount(2) there is.
fn is_readable(device: &OwnedFd) -> Result<bool, Failed> {
    let mut fds = [PollFd::new(device, PollFlags::IN)];
    let now = rustix::event::Timespec {
        tv_sec: 0,
        tv_nsec: 0,
    };
    Ok(poll(&mut fds, Some(&now))? > 0)
}

type Device = Arc<FuseDevice<Arc<OwnedFd>>>;
type Table = BackingTable<Device>;

const OPEN: u32 = uapi::FUSE_DEV_IOC_BACKING_OPEN;
const CLOSE: u32 = uapi::FUSE_DEV_IOC_BACKING_CLOSE;
const RDWR: OFlags = OFlags::RDWR;

/// Runs `f` on a thread whose calls of this ioctl return what is forged.
fn with<T: Send>(ioctl: u32, forged: Forged, f: impl FnOnce() -> T + Send) -> T {
    apart(|| {
        forge(&[(ioctl, forged)]).expect("seccomp");
        f()
    })
}

/// What passes is of the inode's opens, and forgotten with them.
#[apply(needs_passthrough)]
fn table_when_opens_fail(sandbox: &Sandbox) -> Result<(), Failed> {
    let connection = Connection::mount(sandbox, Init::passthrough(1))?;
    let table: Table = BackingTable::new(Arc::new(connection.device()));
    let tmpfs = sandbox.tmpfs()?;
    let file = tmpfs.file("file", "")?;
    let open = |inode| {
        table.open(
            &inode,
            RDWR,
            ServerFile::new(&file).access(Access::ReadWrite),
        )
    };
    for (errno, error) in [
        (Errno::INTR, BackingError::Interrupted),
        (Errno::NOMEM, BackingError::OutOfMemory),
        (Errno::NOSPC, BackingError::OutOfIds),
    ] {
        let refused = with(OPEN, Forged::Error(errno), || open(1))?;
        assert_eq!(refused.server_reason(), Some(ServerReason::Refused(error)));
        assert_eq!((table.stats().ids, table.stats().refused), (0, None));
        assert!(open(2)?.is_passthrough(), "another inode, {errno:?}");
        drop(refused);
        assert!(open(1)?.is_passthrough(), "later, {errno:?}");
    }
    // No id, and so no file either; what answers so is not to be asked again.
    for value in [0, -4096, i32::MIN] {
        let refused = with(OPEN, Forged::Value(value), || open(1))?;
        let error = BackingError::InvalidId(value);
        assert_eq!(refused.server_reason(), Some(ServerReason::Refused(error)));
        assert_eq!(refused.reply(FopenFlags::empty()).backing_id(), None);
        assert_eq!(table.stats().refused, Some(error));
        drop(refused);
        table.reset();
        assert!(open(1)?.is_passthrough(), "later, {value}");
    }
    assert_eq!(table.stats().ids, 0);
    drop(file);
    tmpfs.unmount_when_idle()
}

/// What a close can be forged to fail with, and what that is.
const CLOSES: [(Errno, BackingError); 4] = [
    (Errno::INTR, BackingError::Interrupted),
    (Errno::NOMEM, BackingError::Other(Errno::NOMEM)),
    (Errno::NOSPC, BackingError::Other(Errno::NOSPC)),
    (
        Errno::PERM,
        BackingError::NotPermitted(NotPermitted::NotNegotiatedOrDenied),
    ),
];

/// The id is kept, known, and closed when that is possible again.
#[apply(needs_passthrough)]
fn table_when_closes_fail(sandbox: &Sandbox) -> Result<(), Failed> {
    let connection = Connection::mount(sandbox, Init::passthrough(1))?;
    let table: Table = BackingTable::new(Arc::new(connection.device()));
    for (errno, cause) in CLOSES {
        let tmpfs = sandbox.tmpfs()?;
        let file = tmpfs.file("file", "")?;
        let open = table.open(&1, RDWR, ServerFile::new(&file))?;
        drop(file);
        with(CLOSE, Forged::Error(errno), || drop(open));
        assert_eq!(table.stats().ids, 1, "{errno:?}");
        assert_eq!(table.list()[0].close_failed, Some(cause));
        assert_eq!(tmpfs.unmount(), Err(Errno::BUSY));
        table.retry_closes()?;
        assert_eq!(table.stats().ids, 0);
        tmpfs.unmount_when_idle()?;
    }
    Ok(())
}

/// The guard comes back, and closes when it is dropped.
#[apply(needs_passthrough)]
fn guard_when_closes_fail(sandbox: &Sandbox) -> Result<(), Failed> {
    let connection = Connection::mount(sandbox, Init::passthrough(1))?;
    let device = connection.device();
    for (errno, cause) in CLOSES {
        let tmpfs = sandbox.tmpfs()?;
        let guard = BackingFile::open(&device, tmpfs.file("file", "")?, Access::ReadWrite)?;
        let failed = with(CLOSE, Forged::Error(errno), || guard.close()).expect_err("forged");
        assert_eq!((failed.cause(), failed.errno()), (cause, errno));
        assert_eq!(tmpfs.unmount(), Err(Errno::BUSY), "{errno:?}");
        drop(failed);
        tmpfs.unmount_when_idle()?;
    }
    Ok(())
}

/// An id that somebody else has, for a file that is not registered at all: nobody can tell, but each
/// is closed once, and the second of them is told.
#[apply(needs_passthrough)]
fn id_that_is_live_elsewhere(sandbox: &Sandbox) -> Result<(), Failed> {
    let connection = Connection::mount(sandbox, Init::passthrough(1))?;
    let device = connection.device();
    let (mine, others) = (sandbox.tmpfs()?, sandbox.tmpfs()?);
    let live = BackingFile::open(&device, others.file("file", "")?, Access::ReadWrite)?;
    let file = mine.file("file", "")?;
    let raw = live.id().as_raw();
    let forged = with(OPEN, Forged::Value(raw), || {
        BackingFile::open(&device, &file, Access::ReadWrite)
    })?;
    assert_eq!(forged.id().as_raw(), raw);
    drop(file);
    mine.unmount_when_idle()?;

    assert_eq!(others.unmount(), Err(Errno::BUSY), "the control");
    forged.close()?;
    others.unmount_when_idle()?;
    let failed = live.close().expect_err("it is closed");
    assert_eq!(failed.cause(), BackingError::UnknownId);
    Ok(())
}

/// In a table: two inodes with one id are two registrations to it, of which one cannot be closed.
#[apply(needs_passthrough)]
fn table_with_an_id_that_is_live_elsewhere(sandbox: &Sandbox) -> Result<(), Failed> {
    let connection = Connection::mount(sandbox, Init::passthrough(1))?;
    let table: Table = BackingTable::new(Arc::new(connection.device()));
    let tmpfs = sandbox.tmpfs()?;
    let (one, two) = (tmpfs.file("1", "")?, tmpfs.file("2", "")?);
    let id = |open: &OpenFile<Device>| open.reply(FopenFlags::empty()).backing_id();
    let live = table.open(&1, RDWR, ServerFile::new(&one))?;
    let raw = id(&live).ok_or("no passthrough")?;
    let forged = with(OPEN, Forged::Value(raw), || {
        table.open(&2, RDWR, ServerFile::new(&two).access(Access::ReadWrite))
    })?;
    assert_eq!(id(&forged), Some(raw));
    assert_eq!((table.stats().ids, table.stats().close_failures), (2, 0));
    drop((live, forged));
    // Nothing to be tried again.
    assert_eq!((table.stats().ids, table.stats().close_failures), (0, 1));
    assert!(table.list().is_empty());

    // And goes on as if nothing had been.
    let again = table.open(&2, RDWR, ServerFile::new(&two))?;
    assert_ne!(id(&again), Some(raw));
    assert!(again.is_passthrough());
    let unknown = BackingId::from_raw(raw).ok_or("positive")?;
    let failed = connection.device().backing_close(unknown);
    assert_eq!(failed.expect_err("closed").cause(), BackingError::UnknownId);
    drop((again, one, two));
    tmpfs.unmount_when_idle()
}
