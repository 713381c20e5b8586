//! Calls that fail for lack of memory, or are forged to fail. Each gives a typed error, registers nothing and leaks
//! nothing, and the next attempt works.
//!
//! On a kernel with `CONFIG_FAULT_INJECTION`, every allocation of a call and every copy to and from user space fails in
//! turn: first the first one, then the second, until there are no more. On other kernels the results are forged; see
//! also `forged_errors` in each ioctl's tests.

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

/// A walk that is longer than this will not end.
const MANY: u32 = 2000;
/// How many walks each call gets. A page fault, or a file that is closed late, allocates on the thread too, so that one
/// walk may miss a failure.
const WALKS: u32 = 5;

/// Makes allocations of this thread fail.
struct Failing(File);

impl Failing {
    fn new(sandbox: &Sandbox) -> Result<Self, Failed> {
        let debugfs = sandbox.folder("debugfs")?;
        mount("debugfs", &debugfs, "debugfs", MountFlags::empty(), None)?;
        // Includes allocations that may wait for memory, which are nearly all.
        for (file, value) in [
            ("failslab/ignore-gfp-wait", "N"),
            ("fail_page_alloc/ignore-gfp-wait", "N"),
            ("fail_page_alloc/min-order", "0"),
            // Keeps the stack traces off the console.
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

    /// The result of `f` when its `n`th allocation fails, and whether it has that many.
    fn nth<T>(&self, n: u32, f: impl FnOnce() -> T) -> Result<(T, bool), Failed> {
        let text = n.to_string();
        self.0.write_all_at(text.as_bytes(), 0)?;
        let result = f();
        // The count continues in these calls. If it runs out here, `f` had fewer allocations.
        let mut left = [0; 16];
        let failed = match self.0.read_at(&mut left, 0) {
            Ok(length) => left[..length].trim_ascii() == b"0",
            Err(_) => false,
        };
        while self.0.write_all_at(b"0", 0).is_err() {}
        Ok((result, failed))
    }

    /// Makes one allocation after the other fail until there are no more, in several walks, and `check`s each result.
    /// Returns how many the shortest walk had.
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

/// Accepts the errnos of a failed allocation, of a table of files that cannot grow, and of a failed copy.
fn expect_shortage(errno: Errno, scope: Scope) -> Result<(), Failed> {
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
                    assert_eq!(tmpfs.unmount(), Err(Errno::BUSY), "registered");
                    device.backing_close(id)?;
                }
                Err(error) => {
                    assert!(failed, "{error:?}");
                    seen.push(error);
                }
            }
            // No registration is left.
            tmpfs.unmount_when_idle()
        },
    )?;
    // `copy` is from the ioctl's argument, `memory` from the registration and its id.
    let (copy, memory) = (BackingError::Other(Errno::FAULT), BackingError::OutOfMemory);
    assert!(seen.contains(&copy) && seen.contains(&memory), "{seen:?}");
    seen.retain(|error| ![copy, memory].contains(error));
    assert_eq!(seen, []);
    Ok(())
}

/// BACKING_CLOSE allocates nothing, so that it can always free memory.
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

/// `clone_connection` opens the device and attaches it; both can fail.
#[apply(needs_fail_nth)]
fn failing_clone(sandbox: &Sandbox) -> Result<(), Failed> {
    let failing = Failing::new(sandbox)?;
    let connection = Connection::mount(sandbox, Init::passthrough(1))?;
    let device = connection.device();
    let tmpfs = sandbox.tmpfs()?;
    let refused = |error: DeviceError, failed: bool| {
        assert!(failed, "{error:?}");
        expect_shortage(error.errno(), error.scope())
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

/// mount(2) fails. The crate's error for the device then tells whether the device can be mounted again.
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
                    // The same device can still be mounted.
                    Err(BackingError::NotAttached(_)) => {}
                    // The failure came after the connection was made, and ended it: the device is useless.
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
                // The end of the connection closes the id.
                let _ = attached.backing_open(&file)?.into_raw();
            } else {
                // The INIT request failed: mount(2) succeeded, and INIT is never sent.
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

/// Whether the device has a request to read. After mount(2) it has INIT.
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

/// Runs `f` on a thread whose calls of this ioctl return the forged result.
fn with<T: Send>(ioctl: u32, forged: Forged, f: impl FnOnce() -> T + Send) -> T {
    apart(|| {
        forge(&[(ioctl, forged)]).expect("seccomp");
        f()
    })
}

/// A transient failure puts only its inode in server mode, until the inode's last release. An invalid id is remembered
/// for the connection.
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
        assert!(open(1)?.is_passthrough(), "after release, {errno:?}");
    }
    // A value that is no id: nothing is registered, and the table does not ask such a kernel again.
    for value in [0, -4096, i32::MIN] {
        let refused = with(OPEN, Forged::Value(value), || open(1))?;
        let error = BackingError::InvalidId(value);
        assert_eq!(refused.server_reason(), Some(ServerReason::Refused(error)));
        assert_eq!(refused.reply(FopenFlags::empty()).backing_id(), None);
        assert_eq!(table.stats().refused, Some(error));
        drop(refused);
        table.retry_registrations();
        assert!(open(1)?.is_passthrough(), "after reset, {value}");
    }
    assert_eq!(table.stats().ids, 0);
    drop(file);
    tmpfs.unmount_when_idle()
}

/// Forged errnos of a close, with the causes that they are reported as.
const CLOSES: [(Errno, BackingError); 4] = [
    (Errno::INTR, BackingError::Interrupted),
    (Errno::NOMEM, BackingError::Other(Errno::NOMEM)),
    (Errno::NOSPC, BackingError::Other(Errno::NOSPC)),
    (
        Errno::PERM,
        BackingError::NotPermitted(NotPermitted::NotNegotiatedOrDenied),
    ),
];

/// The table keeps an id that it could not close, lists it, and closes it when that is possible again.
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

/// A failed close returns the guard in the error, and dropping the error closes the id.
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

/// The kernel returns an id that another guard has, and registers nothing. Nothing shows this, but each guard closes
/// the id once, and the second close fails.
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

    assert_eq!(others.unmount(), Err(Errno::BUSY), "still registered");
    forged.close()?;
    others.unmount_when_idle()?;
    let failed = live.close().expect_err("it is closed");
    assert_eq!(failed.cause(), BackingError::UnknownId);
    Ok(())
}

/// A table counts two inodes with one id as two registrations, of which one cannot be closed.
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
    // Nothing is left to retry.
    assert_eq!((table.stats().ids, table.stats().close_failures), (0, 1));
    assert!(table.list().is_empty());

    // The table works on as usual.
    let again = table.open(&2, RDWR, ServerFile::new(&two))?;
    assert_ne!(id(&again), Some(raw));
    assert!(again.is_passthrough());
    let unknown = BackingId::from_raw(raw).ok_or("not positive")?;
    let failed = connection.device().backing_close(unknown);
    assert_eq!(failed.expect_err("closed").cause(), BackingError::UnknownId);
    drop((again, one, two));
    tmpfs.unmount_when_idle()
}
