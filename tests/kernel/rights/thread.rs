//! `RegistrarThread`: how it starts, how it ends, and what remains when it dies.

use std::fs::{self, File, Permissions};
use std::os::fd::AsFd;
use std::os::unix::fs::PermissionsExt;
use std::panic::resume_unwind;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, OnceLock};
use std::time::{Duration, Instant};

use fuse_backing::error::{BackingError, RegistrarThreadError, Scope, ServerReason};
use fuse_backing::rights::{CapabilitySet, Lowered, RegistrarThread};
use fuse_backing::{
    Access, BackingId, BackingTable, FuseDevice, Register, ServerFile, error::Errno,
};
use libtest_mimic::Failed;
use macro_rules_attribute::apply;
use nix::unistd::setfsuid;
use rustix::fs::{OFlags, statvfs};
use rustix::process::{Pid, getppid};
use rustix::thread::gettid;

use super::{CONTENT, Device, Noting, Place, assert_closed, known, sets};
use crate::client;
use crate::ext4::{self, Ext4};
use crate::fuse::{Connection, Init};
use crate::sandbox::{Sandbox, patience_times, unmount_when_idle};
use crate::seccomp::kill_at;
use crate::thread::apart;

/// The first call to a dead thread must fail within this time. It takes half a second.
const SOON: Duration = Duration::from_secs(5);
/// Later calls must fail within this time: they do not wait for the thread again.
const AT_ONCE: Duration = Duration::from_millis(400);

const DIED: BackingError = BackingError::Registrar {
    errno: Errno::OWNERDEAD,
    scope: Scope::Connection,
};

fn eventually(what: &str, mut holds: impl FnMut() -> bool) -> Result<(), Failed> {
    let deadline = Instant::now() + SOON * patience_times();
    while !holds() {
        if Instant::now() > deadline {
            return Err(format!("{what}: still not true").into());
        }
        std::thread::sleep(Duration::from_millis(1));
    }
    Ok(())
}

/// A file on the sandbox's own filesystem: a killed thread never closes the files that it was handed.
fn file() -> File {
    tempfile::tempfile().expect("a file")
}

fn register(registrar: &impl Register, file: &File) -> Result<BackingId, BackingError> {
    registrar.register(file.as_fd(), Access::ReadWrite)
}

#[apply(needs_passthrough)]
fn registers_with_what_it_has(sandbox: &Sandbox) -> Result<(), Failed> {
    let connection = Connection::mount(sandbox, Init::passthrough(1))?;
    let noting = Arc::new(Noting::new(connection.device()));
    let (before, file) = (sets(), file());
    let keep = CapabilitySet::CHOWN;
    let lowered = Lowered::permanently(Arc::clone(&noting), keep);
    let thread = RegistrarThread::spawn(lowered, || Ok::<(), Errno>(()))?;
    let id = register(&thread, &file)?;
    assert_eq!(noting.effective(), CapabilitySet::SYS_ADMIN | keep);
    let raw = id.as_raw();
    thread.unregister(id)?;
    let unknown = thread.unregister(known(raw)).unwrap_err();
    assert_eq!(unknown.cause(), BackingError::UnknownId);
    assert_eq!(unknown.into_inner().as_raw(), raw);
    assert_eq!(sets(), before, "this thread keeps its own");
    Ok(())
}

/// A stranger fills an ext4. Root's reserved blocks stay free only if the registering thread has another fsuid.
#[apply(needs_passthrough)]
fn reserved_blocks_need_another_fsuid(sandbox: &Sandbox) -> Result<(), Failed> {
    type Registering = fn(Device) -> Box<dyn Register + Send>;
    if !ext4::is_supported()? {
        return Ok(());
    }
    fn lowered(device: Device) -> Lowered<Device> {
        Lowered::permanently(device, CapabilitySet::empty())
    }
    let with_all_rights: Registering = |device| Box::new(device);
    let without_capabilities: Registering = |device| Box::new(lowered(device));
    let as_nobody: Registering = |device| {
        let prepare = || {
            let nobody = (u32::MAX - 1).into();
            setfsuid(nobody);
            assert_eq!(setfsuid(nobody), nobody);
            Ok::<(), ()>(())
        };
        Box::new(RegistrarThread::spawn(lowered(device), prepare).expect("prepared"))
    };
    for (registering, fills) in [
        (None, false),
        (Some(as_nobody), false),
        // The controls: root's fsuid alone opens the reserve.
        (Some(without_capabilities), true),
        (Some(with_all_rights), true),
    ] {
        let ext4 = Ext4::new(sandbox, 6 << 20, &["-O", "^has_journal", "-m", "20"])?;
        let path = ext4.path().join("file");
        let file = File::create_new(&path)?;
        file.set_permissions(Permissions::from_mode(0o666))?;
        let free = || Ok::<_, Failed>(statvfs(ext4.path())?);
        let before = free()?;
        let reserved = before.f_bfree - before.f_bavail;
        assert!(reserved > 100, "{reserved}");
        let filled = if let Some(registering) = registering {
            let place = Place::new(sandbox, Init::passthrough(1), &file)?;
            let device = place.connection.device();
            // `apart`, since the thread stays lowered.
            let id = apart(|| registering(device).register(file.as_fd(), Access::ReadWrite))?;
            place.answer_with(id);
            client::run("fill", &[place.connection.path("file").as_os_str()])?
        } else {
            client::run("fill", &[path.as_os_str()])?
        };
        assert_eq!(filled, "full");
        let left = free()?.f_bfree;
        assert_eq!(left < reserved / 2, fills, "{left} of {reserved}");
        drop(file);
        unmount_when_idle(ext4.path())?;
    }
    Ok(())
}

#[apply(needs_nothing)]
fn preparation_that_fails(_: &Sandbox) -> Result<(), Failed> {
    let registrar = Arc::new(FuseDevice::open()?);
    let refused = RegistrarThread::spawn(Arc::clone(&registrar), || Err(Errno::NOSYS));
    assert!(matches!(
        refused,
        Err(RegistrarThreadError::Prepare(Errno::NOSYS))
    ));
    assert_eq!(Arc::strong_count(&registrar), 1);
    Ok(())
}

#[apply(needs_nothing)]
fn preparation_that_panics(_: &Sandbox) -> Result<(), Failed> {
    let registrar = Arc::new(FuseDevice::open()?);
    let refused = RegistrarThread::spawn(Arc::clone(&registrar), panics::<Result<(), Errno>>);
    assert!(matches!(refused, Err(RegistrarThreadError::Died)));
    eventually("dropped", || Arc::strong_count(&registrar) == 1)
}

fn panics<T>() -> T {
    resume_unwind(Box::new("a registrar thread that panics"))
}

#[apply(needs_nothing)]
fn killed_in_the_preparation(_: &Sandbox) -> Result<(), Failed> {
    let start = Instant::now();
    let refused = RegistrarThread::spawn(FuseDevice::open()?, || {
        kill_at(libc::SYS_getppid)?;
        let _ = getppid();
        Ok::<(), std::io::Error>(())
    });
    assert!(matches!(refused, Err(RegistrarThreadError::Died)));
    assert!(start.elapsed() < SOON * patience_times());
    Ok(())
}

type Afterwards = Box<dyn Fn() + Send + Sync>;

/// Makes the thread's next ioctl kill it.
fn kills() -> Afterwards {
    Box::new(|| kill_at(libc::SYS_ioctl).expect("seccomp"))
}

/// Makes the second registration panic.
fn panics_at_the_second() -> Afterwards {
    let is_first = AtomicBool::new(true);
    Box::new(move || {
        if !is_first.swap(false, Ordering::SeqCst) {
            panics()
        }
    })
}

/// Runs `last`, in which the thread dies. Its registrations stay, others can close them, and no call hangs.
fn dies(
    sandbox: &Sandbox,
    afterwards: Afterwards,
    last: impl FnOnce(&RegistrarThread<Noting<Afterwards>>, BackingId),
) -> Result<(), Failed> {
    let tmpfs = sandbox.tmpfs()?;
    let backing = tmpfs.file("file", CONTENT)?;
    // The server's own fd is of another file, so that only the id pins this one.
    let place = Place::new(sandbox, Init::passthrough(1), &file())?;
    let device = place.connection.device();
    let noting = Noting::then(place.connection.device(), afterwards);
    let thread = RegistrarThread::spawn(noting, || Ok::<(), Errno>(()))?;
    let id = register(&thread, &backing)?;
    place.answer_with(known(id.as_raw()));

    let start = Instant::now();
    last(&thread, known(id.as_raw()));
    assert!(start.elapsed() < SOON * patience_times());
    let start = Instant::now();
    assert_eq!(register(&thread, &file()), Err(DIED));
    let failed = thread.unregister(id).unwrap_err();
    assert_eq!(failed.cause(), DIED);
    drop(thread);
    assert!(start.elapsed() < AT_ONCE * patience_times());

    assert_eq!(place.client("r")?, CONTENT);
    assert_eq!(place.asked(), (0, 0));
    drop(backing);
    assert_eq!(tmpfs.unmount(), Err(Errno::BUSY), "still registered");
    device.backing_close(failed.into_inner())?;
    tmpfs.unmount_when_idle()
}

fn last_registration(thread: &RegistrarThread<Noting<Afterwards>>, _: BackingId) {
    assert_eq!(register(thread, &file()), Err(DIED));
}

#[apply(needs_passthrough)]
fn killed_when_it_registers(sandbox: &Sandbox) -> Result<(), Failed> {
    dies(sandbox, kills(), last_registration)
}

#[apply(needs_passthrough)]
fn killed_when_it_closes(sandbox: &Sandbox) -> Result<(), Failed> {
    dies(sandbox, kills(), |thread, id| {
        assert_eq!(thread.unregister(id).unwrap_err().cause(), DIED);
    })
}

#[apply(needs_passthrough)]
fn registrar_that_panics(sandbox: &Sandbox) -> Result<(), Failed> {
    dies(sandbox, panics_at_the_second(), last_registration)
}

/// When the thread has died, the table serves new inodes in server mode, and reports it.
#[apply(needs_passthrough)]
fn table_outlives_a_killed_thread(sandbox: &Sandbox) -> Result<(), Failed> {
    let tmpfs = sandbox.tmpfs()?;
    let backing = tmpfs.file("file", CONTENT)?;
    let place = Place::new(sandbox, Init::passthrough(1), &file())?;
    let noting = Noting::then(place.connection.device(), kills());
    let thread = RegistrarThread::spawn(noting, || Ok::<(), Errno>(()))?;
    let table: BackingTable<_, u32> = BackingTable::new(thread);
    let reported = Arc::<Mutex<Vec<ServerReason>>>::default();
    table.on_server_mode({
        let reported = Arc::clone(&reported);
        move |why| reported.lock().unwrap().push(why)
    });
    let open = |inode, file: &File| table.open(&inode, OFlags::RDWR, ServerFile::new(file));

    let before = open(1, &backing)?;
    let id = before.id().ok_or("no passthrough")?.as_raw();
    place.answer_with(known(id));
    let reason = ServerReason::Refused(DIED);
    let other = file();
    for inode in [2, 3] {
        assert_eq!(open(inode, &other)?.server_reason(), Some(reason));
    }
    assert_eq!(*reported.lock().unwrap(), [reason]);
    let stats = table.stats();
    assert_eq!(
        (stats.refused, stats.served),
        (Some(DIED), vec![(reason, 2)])
    );

    assert!(open(1, &backing)?.is_passthrough());
    assert_eq!(place.client("r")?, CONTENT);
    assert_eq!(place.asked(), (0, 0));
    drop(before);
    assert_eq!(table.list()[0].close_failed, Some(DIED));
    drop(table);
    drop(backing);
    assert_eq!(tmpfs.unmount(), Err(Errno::BUSY), "still registered");
    place.connection.device().backing_close(known(id))?;
    tmpfs.unmount_when_idle()
}

#[apply(needs_passthrough)]
fn open_outlives_its_table(sandbox: &Sandbox) -> Result<(), Failed> {
    let tmpfs = sandbox.tmpfs()?;
    let backing = tmpfs.file("file", CONTENT)?;
    let place = Place::new(sandbox, Init::passthrough(1), &file())?;
    let tid = Arc::<OnceLock<Pid>>::default();
    let noting = Arc::new(Noting::then(place.connection.device(), {
        let tid = Arc::clone(&tid);
        move || tid.set(gettid()).expect("one registration")
    }));
    let thread = RegistrarThread::spawn(Arc::clone(&noting), || Ok::<(), Errno>(()))?;
    let table: BackingTable<_> = BackingTable::new(thread);
    let open = table.open(&1, OFlags::RDWR, ServerFile::new(&backing))?;
    drop(backing);
    place.answer_with(known(noting.id()));
    let tid = tid.get().ok_or("not registered")?.as_raw_pid();
    let name = move || fs::read_to_string(format!("/proc/self/task/{tid}/comm"));

    drop(table);
    assert_eq!(place.client("r")?, CONTENT);
    assert_eq!(name()?.trim_end(), "fuse-registrar");
    drop(open);
    assert_closed(&place.connection, noting.id());
    assert_eq!(Arc::strong_count(&noting), 1);
    eventually("the thread has ended", || name().is_err())?;
    tmpfs.unmount_when_idle()
}
