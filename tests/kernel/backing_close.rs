//! `FUSE_DEV_IOC_BACKING_CLOSE`: what closing frees, each error, and each misuse that the types do not rule out.

use std::fs::File;
use std::os::fd::AsFd;
use std::sync::Arc;
use std::sync::atomic::{AtomicI32, Ordering};

use fuse_backing::error::{BackingError, NotPermitted, Scope};
use fuse_backing::{
    Access, BackingFile, BackingId, BackingTable, FuseDevice, ServerFile, error::Errno, uapi,
};
use libtest_mimic::Failed;
use macro_rules_attribute::apply;

use crate::client::{self, Client, Role};
use crate::expect;
use crate::fuse::{Connection, Init, Node, unchecked};
use crate::sandbox::{Sandbox, Tmpfs};
use crate::seccomp::{Forged, forge};
use crate::thread::{apart, without_cap_sys_admin};

pub const ROLES: &[(&str, Role)] = &[
    ("close-after-fork", close_after_fork),
    ("release-after-fork", release_after_fork),
];

const CONTENT: &str = "what the backing file says";

/// A connection, and a tmpfs that cannot be unmounted while an id of its files is open.
fn setup(sandbox: &Sandbox) -> Result<(Connection, Tmpfs), Failed> {
    Ok((
        Connection::mount(sandbox, Init::passthrough(1))?,
        sandbox.tmpfs()?,
    ))
}

fn id(raw: i32) -> BackingId {
    BackingId::from_raw(raw).expect("positive")
}

#[apply(needs_passthrough)]
fn frees_the_file(sandbox: &Sandbox) -> Result<(), Failed> {
    let (connection, tmpfs) = setup(sandbox)?;
    let id = connection.device().backing_open(tmpfs.file("file", "")?)?;
    assert_eq!(tmpfs.unmount(), Err(Errno::BUSY));
    connection.device().backing_close(id)?;
    tmpfs.unmount_when_idle()
}

#[apply(needs_passthrough)]
fn unknown_id(sandbox: &Sandbox) -> Result<(), Failed> {
    let (connection, _) = setup(sandbox)?;
    for raw in [1, 77, i32::MAX] {
        let failed = connection.device().backing_close(id(raw)).unwrap_err();
        assert_eq!(failed.cause(), BackingError::UnknownId);
        assert_eq!(
            (failed.errno(), failed.cause().scope()),
            (Errno::NOENT, Scope::File)
        );
        assert_eq!(failed.into_inner().as_raw(), raw);
    }
    Ok(())
}

#[apply(needs_passthrough)]
fn device_not_attached(_: &Sandbox) -> Result<(), Failed> {
    let failed = FuseDevice::open()?.backing_close(id(1)).unwrap_err();
    expect::assert_unattached(failed.errno());
    assert!(
        matches!(failed.cause(), BackingError::NotAttached(_)),
        "{failed:?}"
    );
    assert_eq!(failed.cause().scope(), Scope::Connection);

    // The errno of the first kernel releases with passthrough.
    let device = FuseDevice::open()?;
    let forged = apart(|| {
        let invalid = Forged::Error(Errno::INVAL);
        forge(&[(uapi::FUSE_DEV_IOC_BACKING_CLOSE, invalid)]).expect("seccomp");
        device.backing_close(id(1)).unwrap_err()
    });
    assert_eq!(forged.errno(), Errno::INVAL);
    assert!(
        matches!(forged.cause(), BackingError::NotAttached(_)),
        "{forged:?}"
    );
    Ok(())
}

#[apply(needs_passthrough)]
fn without_capability(sandbox: &Sandbox) -> Result<(), Failed> {
    let (connection, tmpfs) = setup(sandbox)?;
    let device = connection.device();
    let id = device.backing_open(tmpfs.file("file", "")?)?;
    let raw = id.as_raw();
    let failed = without_cap_sys_admin(|| device.backing_close(id)).unwrap_err();
    let cause = BackingError::NotPermitted(NotPermitted::MissingCapability);
    assert_eq!((failed.cause(), failed.errno()), (cause, Errno::PERM));
    assert_eq!(failed.cause().scope(), Scope::Thread);
    assert_eq!(tmpfs.unmount(), Err(Errno::BUSY));

    // The id is not lost: the error has it, and this thread may close it.
    let id = failed.into_inner();
    assert_eq!(id.as_raw(), raw);
    device.backing_close(id)?;
    tmpfs.unmount_when_idle()
}

#[apply(needs_passthrough)]
fn after_abort(sandbox: &Sandbox) -> Result<(), Failed> {
    let (connection, tmpfs) = setup(sandbox)?;
    let id = connection.device().backing_open(tmpfs.file("file", "")?)?;
    connection.abort()?;
    assert_eq!(tmpfs.unmount(), Err(Errno::BUSY));
    connection.device().backing_close(id)?;
    tmpfs.unmount_when_idle()
}

#[apply(needs_passthrough)]
fn after_unmount(sandbox: &Sandbox) -> Result<(), Failed> {
    let (connection, tmpfs) = setup(sandbox)?;
    let id = connection.device().backing_open(tmpfs.file("file", "")?)?;
    connection.unmount()?;
    assert_eq!(tmpfs.unmount(), Err(Errno::BUSY));
    connection.device().backing_close(id)?;
    tmpfs.unmount_when_idle()
}

#[apply(needs_passthrough)]
fn forged_errors(sandbox: &Sandbox) -> Result<(), Failed> {
    let (connection, _) = setup(sandbox)?;
    let device = connection.device();
    let file = tempfile::tempfile()?;
    for (errno, cause, scope) in [
        (
            Errno::NOTTY,
            BackingError::UnsupportedKernel,
            Scope::Connection,
        ),
        (Errno::NOSYS, BackingError::Unimplemented, Scope::Connection),
        (
            Errno::OPNOTSUPP,
            BackingError::DisabledInKernel,
            Scope::Connection,
        ),
        (Errno::INTR, BackingError::Interrupted, Scope::Transient),
        (
            Errno::PERM,
            BackingError::NotPermitted(NotPermitted::NotNegotiatedOrDenied),
            Scope::Connection,
        ),
        (Errno::INVAL, BackingError::Other(Errno::INVAL), Scope::File),
        (Errno::IO, BackingError::Other(Errno::IO), Scope::File),
    ] {
        let id = device.backing_open(&file)?;
        let failed = apart(|| {
            forge(&[(uapi::FUSE_DEV_IOC_BACKING_CLOSE, Forged::Error(errno))]).expect("seccomp");
            device.backing_close(id).unwrap_err()
        });
        assert_eq!(
            (failed.cause(), failed.errno(), failed.cause().scope()),
            (cause, errno, scope)
        );
        device.backing_close(failed.into_inner())?;
    }
    Ok(())
}

/// The misuse that `#[must_use]` warns of: only the end of the connection frees the file.
#[apply(needs_passthrough)]
fn misuse_dropped_id_leaks(sandbox: &Sandbox) -> Result<(), Failed> {
    let (connection, tmpfs) = setup(sandbox)?;
    drop(connection.device().backing_open(tmpfs.file("file", "")?)?);
    assert_eq!(tmpfs.unmount(), Err(Errno::BUSY));
    connection.unmount()?;
    assert_eq!(
        tmpfs.unmount(),
        Err(Errno::BUSY),
        "a device fd is still open"
    );
    drop(connection);
    tmpfs.unmount_when_idle()
}

#[apply(needs_passthrough)]
fn misuse_forged_id(sandbox: &Sandbox) -> Result<(), Failed> {
    let (connection, tmpfs) = setup(sandbox)?;
    let device = connection.device();
    let victim = device.backing_open(tmpfs.file("file", "")?)?;
    device.backing_close(id(victim.as_raw()))?;
    tmpfs.unmount_when_idle()?;
    let failed = device.backing_close(victim).unwrap_err();
    assert_eq!(failed.cause(), BackingError::UnknownId);
    Ok(())
}

/// The ids of every connection start at 1, so that the wrong device has the same id.
#[apply(needs_passthrough)]
fn misuse_other_connection(sandbox: &Sandbox) -> Result<(), Failed> {
    let (mine, tmpfs) = setup(sandbox)?;
    let (other, others_tmpfs) = setup(sandbox)?;
    let id = mine.device().backing_open(tmpfs.file("file", "")?)?;
    let others = other
        .device()
        .backing_open(others_tmpfs.file("file", "")?)?;
    assert_eq!(id, others);

    other.device().backing_close(id)?;
    others_tmpfs.unmount_when_idle()?;
    assert_eq!(tmpfs.unmount(), Err(Errno::BUSY));

    // A guard rules this misuse out: it knows its device.
    BackingFile::from_id(&mine.device(), others).close()?;
    tmpfs.unmount_when_idle()
}

#[apply(needs_passthrough)]
fn misuse_closed_twice(sandbox: &Sandbox) -> Result<(), Failed> {
    let (connection, _) = setup(sandbox)?;
    let device = connection.device();
    let raw = device.backing_open(tempfile::tempfile()?)?.into_raw();
    device.backing_close(id(raw))?;
    let failed = device.backing_close(id(raw)).unwrap_err();
    assert_eq!(failed.cause(), BackingError::UnknownId);
    Ok(())
}

/// After fork(2), the child's and the parent's copy of an id name one registration.
#[apply(needs_passthrough)]
fn misuse_closed_after_fork(sandbox: &Sandbox) -> Result<(), Failed> {
    let (connection, _) = setup(sandbox)?;
    let device = connection.device().as_fd().try_clone_to_owned()?;
    let child = Client::start_with_fd("close-after-fork", &[], device)?;
    assert_eq!(
        child.finish()?,
        "child closed it: true, parent: Err(UnknownId)"
    );
    Ok(())
}

/// Runs in a process of one thread, where fork(2) is harmless.
#[allow(unsafe_code)]
fn close_after_fork(_: &[String]) -> Result<String, Box<dyn std::error::Error>> {
    let stdin = std::io::stdin();
    let device = FuseDevice::new(stdin.as_fd().try_clone_to_owned()?)?;
    let id = device.backing_open(tempfile::tempfile()?)?;
    // SAFETY: this process has one thread, so that the child inherits no lock of another thread.
    let pid = unsafe { libc::fork() };
    if pid == 0 {
        let closed = device.backing_close(id).is_ok();
        // SAFETY: ends the child without running what belongs to the parent.
        unsafe { libc::_exit(i32::from(!closed)) };
    }
    let mut status = 0;
    // SAFETY: `status` is a live int.
    unsafe { libc::waitpid(pid, &raw mut status, 0) };
    let parent = device.backing_close(id).map_err(|failed| failed.cause());
    Ok(format!(
        "child closed it: {}, parent: {parent:?}",
        status == 0
    ))
}

/// The same misuse with an `OpenFile`: if the child drops its copy, the parent answers with a closed id. If the child
/// merely exits, the id stays open.
#[apply(needs_passthrough)]
fn misuse_released_after_fork(sandbox: &Sandbox) -> Result<(), Failed> {
    let tmpfs = sandbox.tmpfs()?;
    let node = Node {
        name: "file".into(),
        backing: tmpfs.file("file", CONTENT)?,
    };
    let parents = Arc::new(AtomicI32::new(0));
    let answered = Arc::clone(&parents);
    let on_open = move |_, _| {
        let id = answered.load(Ordering::SeqCst);
        Ok(unchecked(1, uapi::FOPEN_PASSTHROUGH, id))
    };
    let init = Init::passthrough(1);
    let connection = Connection::serve(sandbox, init, vec![node], Arc::new(on_open))?;
    let (path, file) = (tmpfs.path().join("file"), connection.path("file"));
    let eio = client::errno(Errno::IO);
    let mut releases = 0;
    for (child, says, client, closed) in [
        (
            "exits",
            "ids of the child: 1, failed closes: 0",
            CONTENT,
            Ok(()),
        ),
        (
            "drops",
            "ids of the child: 0, failed closes: 1",
            &eio,
            Err(BackingError::UnknownId),
        ),
    ] {
        let device = connection.device().as_fd().try_clone_to_owned()?;
        let args = [path.as_os_str(), child.as_ref()];
        let mut server = Client::start_with_fd("release-after-fork", &args, device)?;
        let raw = server.line()?.parse()?;
        assert_eq!(server.finish()?, says);
        parents.store(raw, Ordering::SeqCst);
        assert_eq!(client::run("read", &[file.as_os_str()])?, client);
        releases += 1;
        connection.wait_for_releases(releases)?;
        let close = connection.device().backing_close(id(raw));
        assert_eq!(close.map_err(|failed| failed.cause()), closed);
    }
    assert_eq!(connection.seen.reads.load(Ordering::SeqCst), 0);
    Ok(())
}

/// As `close_after_fork`. The parent drops its `OpenFile` only if the child did, so that the child alone decides
/// whether the id is closed.
#[allow(unsafe_code)]
fn release_after_fork(args: &[String]) -> Result<String, Box<dyn std::error::Error>> {
    let [path, child] = args else {
        return Err("a file, and what the child does".into());
    };
    let drops = child == "drops";
    let stdin = std::io::stdin();
    let device = FuseDevice::new(stdin.as_fd().try_clone_to_owned()?)?;
    let table: BackingTable<_> = BackingTable::new(&device);
    let file = File::open(path)?;
    let open = table.open(&1, 0, ServerFile::new(&file))?;
    println!("{}", open.id().ok_or("no passthrough")?.as_raw());
    // SAFETY: this process has one thread, so that the child inherits no lock of another thread.
    let pid = unsafe { libc::fork() };
    if pid == 0 {
        if drops {
            drop(open);
        }
        // SAFETY: ends the child without running what belongs to the parent.
        unsafe { libc::_exit(table.stats().ids as i32) };
    }
    let mut status = 0;
    // SAFETY: `status` is a live int.
    unsafe { libc::waitpid(pid, &raw mut status, 0) };
    assert!(open.is_passthrough(), "the parent does not notice");
    assert_eq!(table.stats().ids, 1);
    if drops {
        drop(open);
        assert_eq!(table.stats().ids, 0);
    } else {
        std::mem::forget(open);
    }
    Ok(format!(
        "ids of the child: {}, failed closes: {}",
        libc::WEXITSTATUS(status),
        table.stats().close_failures
    ))
}

#[apply(needs_passthrough)]
fn guard_closes_on_drop(sandbox: &Sandbox) -> Result<(), Failed> {
    let (connection, tmpfs) = setup(sandbox)?;
    let device = connection.device();
    let guard = BackingFile::open(&device, tmpfs.file("file", "")?, Access::ReadWrite)?;
    assert_eq!(tmpfs.unmount(), Err(Errno::BUSY));
    drop(guard);
    tmpfs.unmount_when_idle()
}

/// A guard can outlive the function that made its device, and can be dropped on another thread, as in a server.
#[apply(needs_passthrough)]
fn guard_in_an_arc(sandbox: &Sandbox) -> Result<(), Failed> {
    let (connection, tmpfs) = setup(sandbox)?;
    let guard = {
        let device = Arc::new(connection.device());
        BackingFile::open(device, tmpfs.file("file", "")?, Access::ReadWrite)?
    };
    assert_eq!(tmpfs.unmount(), Err(Errno::BUSY));
    std::thread::spawn(move || drop(guard))
        .join()
        .expect("no panic");
    tmpfs.unmount_when_idle()
}

#[apply(needs_passthrough)]
fn guard_close_reports(sandbox: &Sandbox) -> Result<(), Failed> {
    let (connection, tmpfs) = setup(sandbox)?;
    let device = connection.device();
    let guard = BackingFile::open(&device, tmpfs.file("file", "")?, Access::ReadWrite)?;
    let failed = without_cap_sys_admin(|| guard.close()).unwrap_err();
    assert_eq!(
        failed.cause(),
        BackingError::NotPermitted(NotPermitted::MissingCapability)
    );
    assert_eq!(tmpfs.unmount(), Err(Errno::BUSY));
    failed.into_inner().close()?;
    tmpfs.unmount_when_idle()?;

    // An error that is ignored still holds the guard, which closes on drop.
    let tmpfs = sandbox.tmpfs()?;
    let guard = BackingFile::open(&device, tmpfs.file("file", "")?, Access::ReadWrite)?;
    drop(without_cap_sys_admin(|| guard.close()));
    tmpfs.unmount_when_idle()?;

    // The guard's id was closed elsewhere.
    let guard = BackingFile::open(&device, tempfile::tempfile()?, Access::ReadWrite)?;
    let raw = guard.id().as_raw();
    device.backing_close(id(raw))?;
    let failed = guard.close().unwrap_err();
    assert_eq!(failed.cause(), BackingError::UnknownId);

    // A guard whose id was unknown does not close a later registration that gets the same number.
    let failed = BackingFile::from_id(&device, id(raw + 1))
        .close()
        .unwrap_err();
    assert_eq!(failed.cause(), BackingError::UnknownId);
    let tmpfs = sandbox.tmpfs()?;
    let next = device.backing_open(tmpfs.file("file", "")?)?;
    assert_eq!(next.as_raw(), raw + 1);
    let failed = failed.into_inner().close().unwrap_err();
    assert_eq!(failed.cause(), BackingError::UnknownId);
    drop(failed);
    assert_eq!(tmpfs.unmount(), Err(Errno::BUSY));
    device.backing_close(next)?;
    tmpfs.unmount_when_idle()?;
    Ok(())
}

/// As documented, dropping a guard cannot report that the close failed.
#[apply(needs_passthrough)]
fn guard_drop_without_capability_leaks(sandbox: &Sandbox) -> Result<(), Failed> {
    let (connection, tmpfs) = setup(sandbox)?;
    let device = connection.device();
    let guard = BackingFile::open(&device, tmpfs.file("file", "")?, Access::ReadWrite)?;
    let raw = guard.id().as_raw();
    without_cap_sys_admin(|| drop(guard));
    assert_eq!(tmpfs.unmount(), Err(Errno::BUSY));
    device.backing_close(id(raw))?;
    tmpfs.unmount_when_idle()
}

/// A guard closes its id on its own device, not on another that has the same id.
#[apply(needs_passthrough)]
fn guard_keeps_to_its_device(sandbox: &Sandbox) -> Result<(), Failed> {
    let (mine, tmpfs) = setup(sandbox)?;
    let (other, others_tmpfs) = setup(sandbox)?;
    let (device, others) = (mine.device(), other.device());
    let kept = others.backing_open(others_tmpfs.file("file", "")?)?;
    let guard = BackingFile::open(&device, tmpfs.file("file", "")?, Access::ReadWrite)?;
    assert_eq!(*guard.id(), kept);
    guard.close()?;
    tmpfs.unmount_when_idle()?;
    assert_eq!(others_tmpfs.unmount(), Err(Errno::BUSY));
    others.backing_close(kept)?;
    others_tmpfs.unmount_when_idle()
}

/// A close error becomes an `io::Error` that has the cause, and does not borrow the device.
#[apply(needs_passthrough)]
fn errors_become_io_errors(sandbox: &Sandbox) -> Result<(), Failed> {
    let (connection, _) = setup(sandbox)?;
    let device = connection.device();
    let close = || -> std::io::Result<()> { Ok(BackingFile::from_id(&device, id(5)).close()?) };
    let error = close().unwrap_err();
    assert_eq!(error.kind(), std::io::ErrorKind::NotFound);
    let inner = error.get_ref().and_then(|inner| inner.downcast_ref());
    assert_eq!(inner, Some(&BackingError::UnknownId));
    Ok(())
}

#[apply(needs_passthrough)]
fn guard_to_id_and_back(sandbox: &Sandbox) -> Result<(), Failed> {
    let (connection, tmpfs) = setup(sandbox)?;
    let device = connection.device();
    let guard = BackingFile::open(&device, tmpfs.file("file", "")?, Access::ReadWrite)?;
    let raw = guard.into_id().into_raw();
    assert_eq!(tmpfs.unmount(), Err(Errno::BUSY), "still registered");
    drop(BackingFile::from_id(&device, id(raw)));
    tmpfs.unmount_when_idle()
}
