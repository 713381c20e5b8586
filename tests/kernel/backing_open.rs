//! `FUSE_DEV_IOC_BACKING_OPEN`: which files and connections the kernel accepts, and the errors for all others.

use std::fs::{self, File};
use std::io::Write;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;
use std::sync::Arc;

use fuse_backing::error::{BackingError, DeviceError, FileType, NotPermitted, Scope};
use fuse_backing::{BackingId, DeviceFd, FopenFlags, FuseDevice, OpenReply, error::Errno, uapi};
use libtest_mimic::Failed;
use macro_rules_attribute::apply;
use rustix::fs::{CWD, MemfdFlags, Mode, OFlags, memfd_create, mknodat, open};
use rustix::mount::{MountFlags, mount};
use rustix::net::{AddressFamily, SocketFlags, SocketType, socketpair};
use rustix::thread::{UnshareFlags, unshare_unsafe};

use crate::client::{Client, Role};
use crate::expect;
use crate::fuse::{Connection, Init, Node};
use crate::sandbox::{Sandbox, Tmpfs};
use crate::seccomp::{Forged, forge};
use crate::thread::{apart, without_cap_sys_admin};

pub const ROLES: &[(&str, Role)] = &[
    ("register-in-user-namespace", register_in_user_namespace),
    ("register-without-proc", register_without_proc),
    ("register-on-closed-device", register_on_closed_device),
];

/// The error of registering `fd`, if it fails. If it succeeds, the id is closed.
fn error(device: &FuseDevice<impl DeviceFd>, fd: impl AsFd) -> Option<BackingError> {
    match device.backing_open(fd) {
        Ok(id) => {
            device.backing_close(id).expect("an id just registered");
            None
        }
        Err(error) => Some(error),
    }
}

#[track_caller]
fn assert_error(error: Option<BackingError>, debug: &str, errno: Errno, scope: Scope) {
    let error = error.expect("refused");
    assert_eq!(format!("{error:?}"), debug);
    assert_eq!((error.errno(), error.scope()), (errno, scope), "{debug}");
    let io_error = std::io::Error::from(error);
    assert_eq!(io_error.kind(), std::io::Error::from(errno).kind());
    assert_eq!(io_error.to_string(), error.to_string());
}

/// The cause that remains for `EPERM` when all others are ruled out.
#[track_caller]
fn assert_not_negotiated(error: Option<BackingError>) {
    assert_error(
        error,
        "NotPermitted(NotNegotiatedOrDenied)",
        Errno::PERM,
        Scope::Connection,
    );
}

#[apply(needs_passthrough)]
fn device_not_attached(_: &Sandbox) -> Result<(), Failed> {
    let device = FuseDevice::open()?;
    let refused = error(&device, tempfile::tempfile()?).expect("refused");
    expect::assert_unattached(refused.errno());
    let not_attached = |refused, errno: Errno| {
        let debug = format!("NotAttached({errno:?})");
        assert_error(Some(refused), &debug, errno, Scope::Connection);
    };
    not_attached(refused, refused.errno());

    // The errno of the first kernel releases with passthrough.
    let file = tempfile::tempfile()?;
    let forged = apart(|| {
        let invalid = Forged::Error(Errno::INVAL);
        forge(&[(uapi::FUSE_DEV_IOC_BACKING_OPEN, invalid)]).expect("seccomp");
        error(&device, &file).expect("refused")
    });
    not_attached(forged, Errno::INVAL);
    Ok(())
}

#[apply(needs_passthrough)]
fn init_not_answered(sandbox: &Sandbox) -> Result<(), Failed> {
    let connection = Connection::unanswered(sandbox, FuseDevice::open()?.into_inner())?;
    assert_not_negotiated(error(&connection.device(), tempfile::tempfile()?));
    Ok(())
}

#[apply(needs_passthrough)]
fn negotiations_ignored_silently(sandbox: &Sandbox) -> Result<(), Failed> {
    use uapi::{FUSE_INIT_EXT, FUSE_PASSTHROUGH, FUSE_WRITEBACK_CACHE};
    for (flags, max_stack_depth) in [
        (0, 0),
        // Without INIT_EXT the kernel does not read flags2.
        (FUSE_PASSTHROUGH, 1),
        (FUSE_INIT_EXT, 1),
        (FUSE_INIT_EXT | FUSE_PASSTHROUGH, 0),
        (FUSE_INIT_EXT | FUSE_PASSTHROUGH, 3),
        (FUSE_INIT_EXT | FUSE_PASSTHROUGH, u32::MAX),
        (FUSE_INIT_EXT | FUSE_PASSTHROUGH | FUSE_WRITEBACK_CACHE, 1),
    ] {
        let init = Init {
            flags,
            max_stack_depth,
        };
        let connection = Connection::mount(sandbox, init)?;
        assert_not_negotiated(error(&connection.device(), tempfile::tempfile()?));
    }
    Ok(())
}

#[apply(needs_passthrough)]
fn negotiations_accepted(sandbox: &Sandbox) -> Result<(), Failed> {
    for depth in [1, 2] {
        let connection = Connection::mount(sandbox, Init::passthrough(depth))?;
        assert_eq!(
            error(&connection.device(), sandbox.tmpfs()?.file("f", "")?),
            None
        );
    }
    Ok(())
}

#[apply(needs_passthrough)]
fn regular_files(sandbox: &Sandbox) -> Result<(), Failed> {
    // Depth 2, because the machine's scratch filesystem may be an overlay.
    let connection = Connection::mount(sandbox, Init::passthrough(2))?;
    let device = connection.device();
    let accepted = |what: &str, fd: OwnedFd| {
        assert_eq!(error(&device, fd), None, "{what}");
    };
    let path_only = |fd: OwnedFd| {
        let refused = error(&device, fd);
        if expect::path_only_files() {
            assert_eq!(refused, None, "O_PATH");
        } else {
            assert_error(refused, "PathOnlyFd", Errno::BADF, Scope::File);
        }
    };

    let tmpfs = sandbox.tmpfs()?;
    let scratch = tempfile::NamedTempFile::new_in(std::env::temp_dir())?;
    for path in [scratch.path(), &tmpfs.path().join("file")] {
        fs::write(path, "content")?;
        for (what, flags) in [
            ("O_RDONLY", OFlags::RDONLY),
            ("O_WRONLY", OFlags::WRONLY),
            ("O_RDWR", OFlags::RDWR),
            ("O_APPEND", OFlags::WRONLY | OFlags::APPEND),
            ("access mode 3", OFlags::ACCMODE),
        ] {
            accepted(what, open(path, flags | OFlags::CLOEXEC, Mode::empty())?);
        }
        path_only(open(path, OFlags::PATH | OFlags::CLOEXEC, Mode::empty())?);
        match open(
            path,
            OFlags::RDWR | OFlags::DIRECT | OFlags::CLOEXEC,
            Mode::empty(),
        ) {
            Ok(fd) => accepted("O_DIRECT", fd),
            // The filesystem refuses it, not the FUSE driver.
            Err(errno) => assert_eq!(errno, Errno::INVAL),
        }
    }
    accepted("memfd", memfd_create("memfd", MemfdFlags::CLOEXEC)?);
    accepted("unlinked file", tempfile::tempfile()?.into());
    accepted("duplicate", scratch.as_file().try_clone()?.into());
    Ok(())
}

#[apply(needs_passthrough)]
fn other_files(sandbox: &Sandbox) -> Result<(), Failed> {
    let connection = Connection::mount(sandbox, Init::passthrough(2))?;
    let device = connection.device();
    let known = expect::regular_files_only();
    // Some kernels accept other files, and kernels before Linux 6.12 refuse them with other errnos.
    let is_possible = |refused: &Option<BackingError>| match refused {
        None => known != Some(true),
        Some(BackingError::PathOnlyFd) => !expect::path_only_files(),
        Some(refused) => matches!(refused, BackingError::NotRegularFile { .. }),
    };
    let refused = |fd: OwnedFd, file_type: FileType, errno: Errno| {
        let refused = error(&device, fd);
        if known == Some(true) {
            let debug = format!("NotRegularFile {{ file_type: {file_type:?}, errno: {errno:?} }}");
            assert_error(refused, &debug, errno, Scope::File);
        } else {
            assert!(is_possible(&refused), "{file_type:?}: {refused:?}");
        }
    };
    let folder = sandbox.folder("files")?;
    let open_path = |path: &Path, flags| open(path, flags | OFlags::CLOEXEC, Mode::empty());

    refused(
        open_path(&folder, OFlags::RDONLY)?,
        FileType::Directory,
        Errno::ISDIR,
    );
    refused(
        open_path(&folder, OFlags::PATH)?,
        FileType::Directory,
        Errno::ISDIR,
    );

    std::os::unix::fs::symlink("target", folder.join("symlink"))?;
    refused(
        open_path(&folder.join("symlink"), OFlags::PATH | OFlags::NOFOLLOW)?,
        FileType::Symlink,
        Errno::INVAL,
    );

    let (reader, writer) = rustix::pipe::pipe()?;
    refused(reader, FileType::Fifo, Errno::INVAL);
    refused(writer, FileType::Fifo, Errno::INVAL);

    let (socket, _) = socketpair(
        AddressFamily::UNIX,
        SocketType::STREAM,
        SocketFlags::CLOEXEC,
        None,
    )?;
    refused(socket, FileType::Socket, Errno::INVAL);

    refused(
        File::open("/dev/null")?.into(),
        FileType::CharacterDevice,
        Errno::INVAL,
    );
    refused(
        FuseDevice::open()?.into_inner(),
        FileType::CharacterDevice,
        Errno::INVAL,
    );

    let block = folder.join("block");
    mknodat(CWD, &block, FileType::BlockDevice, Mode::RUSR, 7 << 8)?;
    refused(
        open_path(&block, OFlags::PATH)?,
        FileType::BlockDevice,
        Errno::INVAL,
    );

    // An anonymous inode has no type.
    let eventfd = rustix::event::eventfd(0, rustix::event::EventfdFlags::CLOEXEC)?;
    let anonymous = error(&device, eventfd);
    if known == Some(true) {
        assert_eq!(anonymous.expect("refused").errno(), Errno::INVAL);
    }
    assert!(is_possible(&anonymous), "{anonymous:?}");
    Ok(())
}

const TOO_DEEP: (&str, Errno, Scope) = ("StackedTooDeep", Errno::LOOP, Scope::File);

/// procfs has the maximum stack depth, so that nothing can be stacked on it.
#[apply(needs_passthrough)]
fn procfs(sandbox: &Sandbox) -> Result<(), Failed> {
    let connection = Connection::mount(sandbox, Init::passthrough(2))?;
    let (debug, errno, scope) = TOO_DEEP;
    assert_error(
        error(&connection.device(), File::open("/proc/version")?),
        debug,
        errno,
        scope,
    );
    Ok(())
}

#[apply(needs_passthrough)]
fn overlayfs(sandbox: &Sandbox) -> Result<(), Failed> {
    if !expect::overlayfs() {
        return assert_no_overlayfs(sandbox);
    }
    let tmpfs = sandbox.tmpfs()?;
    fs::create_dir(tmpfs.path().join("lower"))?;
    fs::write(tmpfs.path().join("lower/file"), "content")?;
    let once = overlay(sandbox, &tmpfs, &tmpfs.path().join("lower"))?;
    let twice = overlay(sandbox, &tmpfs, &once)?;
    let (once, twice) = (
        File::open(once.join("file"))?,
        File::open(twice.join("file"))?,
    );

    let one = Connection::mount(sandbox, Init::passthrough(1))?;
    let two = Connection::mount(sandbox, Init::passthrough(2))?;
    let (debug, errno, scope) = TOO_DEEP;
    assert_error(error(&one.device(), &once), debug, errno, scope);
    assert_eq!(error(&two.device(), &once), None);
    assert_error(error(&two.device(), &twice), debug, errno, scope);
    Ok(())
}

pub fn assert_no_overlayfs(sandbox: &Sandbox) -> Result<(), Failed> {
    let folder = sandbox.folder("merged")?;
    let refused = mount("overlay", &folder, "overlay", MountFlags::empty(), None);
    assert_eq!(refused, Err(Errno::NODEV));
    Ok(())
}

pub fn overlay(
    sandbox: &Sandbox,
    tmpfs: &Tmpfs,
    lower: &Path,
) -> Result<std::path::PathBuf, Failed> {
    let own = tempfile::tempdir_in(tmpfs.path())?.keep();
    let (upper, work, merged) = (
        own.join("upper"),
        own.join("work"),
        sandbox.folder("merged")?,
    );
    fs::create_dir(&upper)?;
    fs::create_dir(&work)?;
    let options = format!(
        "lowerdir={},upperdir={},workdir={}",
        lower.display(),
        upper.display(),
        work.display()
    );
    let options = std::ffi::CString::new(options)?;
    mount(
        "overlay",
        &merged,
        "overlay",
        MountFlags::empty(),
        options.as_c_str(),
    )?;
    Ok(merged)
}

/// A plain FUSE mount has stack depth 0; one with passthrough has the depth that it negotiated.
#[apply(needs_passthrough)]
fn files_of_other_fuse_mounts(sandbox: &Sandbox) -> Result<(), Failed> {
    let tmpfs = sandbox.tmpfs()?;
    let lower = |init| {
        let node = Node {
            name: "file".into(),
            backing: tmpfs.file("file", "content")?,
        };
        let on_open = |_, _| {
            let reply = OpenReply::server(FopenFlags::empty()).expect("no passthrough");
            Ok(reply.to_fuse_open_out(1))
        };
        Connection::serve(sandbox, init, vec![node], Arc::new(on_open))
    };
    let (plain, one, two) = (
        lower(Init::PLAIN)?,
        lower(Init::passthrough(1))?,
        lower(Init::passthrough(2))?,
    );
    let upper_1 = Connection::mount(sandbox, Init::passthrough(1))?;
    let upper_2 = Connection::mount(sandbox, Init::passthrough(2))?;

    let refused_by = |upper: &Connection, lower: &Connection| -> Result<_, Failed> {
        Ok(error(&upper.device(), File::open(lower.path("file"))?))
    };
    let (debug, errno, scope) = TOO_DEEP;
    assert_eq!(refused_by(&upper_1, &plain)?, None);
    assert_error(refused_by(&upper_1, &one)?, debug, errno, scope);
    assert_eq!(refused_by(&upper_2, &one)?, None);
    assert_error(refused_by(&upper_2, &two)?, debug, errno, scope);
    Ok(())
}

#[apply(needs_passthrough)]
fn without_capability(sandbox: &Sandbox) -> Result<(), Failed> {
    let connection = Connection::mount(sandbox, Init::passthrough(1))?;
    let device = connection.device();
    let file = tempfile::tempfile()?;
    let refused = without_cap_sys_admin(|| error(&device, &file));
    assert_error(
        refused,
        "NotPermitted(MissingCapability)",
        Errno::PERM,
        Scope::Thread,
    );
    assert_eq!(error(&device, &file), None, "this thread still has it");

    // The kernel checks the connection before the capability, and so does the diagnosis.
    let unattached = FuseDevice::open()?;
    let refused = without_cap_sys_admin(|| error(&unattached, &file));
    assert!(
        matches!(refused, Some(BackingError::NotAttached(_))),
        "{refused:?}"
    );
    Ok(())
}

/// Root of a user namespace has all capabilities there, which the kernel does not accept.
#[apply(needs_passthrough)]
fn in_a_user_namespace(sandbox: &Sandbox) -> Result<(), Failed> {
    let connection = Connection::mount(sandbox, Init::passthrough(1))?;
    let device = connection.device().as_fd().try_clone_to_owned()?;
    let child = Client::start_with_fd("register-in-user-namespace", &[], device)?;
    assert_eq!(
        child.finish()?,
        "true Some(NotPermitted(NotInInitialUserNamespace))"
    );
    Ok(())
}

#[allow(unsafe_code)]
fn register_in_user_namespace(_: &[String]) -> Result<String, Box<dyn std::error::Error>> {
    let stdin = std::io::stdin();
    let device = FuseDevice::new(stdin.as_fd().try_clone_to_owned()?)?;
    let file = tempfile::tempfile()?;
    // SAFETY: CLONE_NEWUSER does not touch the table of file descriptors.
    unsafe { unshare_unsafe(UnshareFlags::NEWUSER) }?;
    let capable = rustix::thread::capabilities(None)?
        .effective
        .contains(rustix::thread::CapabilitySet::SYS_ADMIN);
    Ok(format!("{capable} {:?}", error(&device, file)))
}

#[apply(needs_passthrough)]
fn after_abort(sandbox: &Sandbox) -> Result<(), Failed> {
    let connection = Connection::mount(sandbox, Init::passthrough(1))?;
    connection.abort()?;
    assert_eq!(error(&connection.device(), tempfile::tempfile()?), None);
    Ok(())
}

#[apply(needs_passthrough)]
fn after_unmount(sandbox: &Sandbox) -> Result<(), Failed> {
    let connection = Connection::mount(sandbox, Init::passthrough(1))?;
    connection.unmount()?;
    assert_eq!(error(&connection.device(), tempfile::tempfile()?), None);
    Ok(())
}

/// The kernel does not soon reuse a closed id, so that a late close or reply does not hit another file's.
#[apply(needs_passthrough)]
fn ids_are_cyclic(sandbox: &Sandbox) -> Result<(), Failed> {
    let connection = Connection::mount(sandbox, Init::passthrough(1))?;
    let device = connection.device();
    let file = tempfile::tempfile()?;
    for expected in 1..=100 {
        let id = device.backing_open(&file)?;
        assert_eq!(id.as_raw(), expected);
        device.backing_close(id)?;
    }
    Ok(())
}

#[apply(needs_passthrough)]
fn hundred_thousand_ids(sandbox: &Sandbox) -> Result<(), Failed> {
    let tmpfs = sandbox.tmpfs()?;
    let file = tmpfs.file("file", "content")?;
    let connection = Connection::mount(sandbox, Init::passthrough(1))?;
    let device = connection.device();
    // More than the limit on open files would let this process open.
    let ids = (0..100_000)
        .map(|_| device.backing_open(&file))
        .collect::<Result<Vec<_>, _>>()?;
    drop(file);
    assert_eq!(tmpfs.unmount(), Err(Errno::BUSY));
    for id in ids {
        device.backing_close(id)?;
    }
    tmpfs.unmount_when_idle()?;
    Ok(())
}

#[apply(needs_passthrough)]
fn fd_may_be_closed_at_once(sandbox: &Sandbox) -> Result<(), Failed> {
    let tmpfs = sandbox.tmpfs()?;
    let connection = Connection::mount(sandbox, Init::passthrough(1))?;
    let device = connection.device();
    // Passing the file by value closes it when the call returns.
    let id = device.backing_open(tmpfs.file("file", "content")?)?;
    assert_eq!(tmpfs.unmount(), Err(Errno::BUSY));
    device.backing_close(id)?;
    tmpfs.unmount_when_idle()?;
    Ok(())
}

#[apply(needs_passthrough)]
fn failures_register_nothing(sandbox: &Sandbox) -> Result<(), Failed> {
    let tmpfs = sandbox.tmpfs()?;
    let file = tmpfs.file("file", "content")?;
    let passthrough = Connection::mount(sandbox, Init::passthrough(1))?;
    let plain = Connection::mount(sandbox, Init::PLAIN)?;

    let device = passthrough.device();
    assert!(without_cap_sys_admin(|| device.backing_open(&file)).is_err());
    if expect::regular_files_only() == Some(true) {
        assert!(device.backing_open(File::open(tmpfs.path())?).is_err());
    }
    assert!(plain.device().backing_open(&file).is_err());
    assert!(FuseDevice::open()?.backing_open(&file).is_err());

    drop(file);
    // Both connections still exist: their end would close every id.
    tmpfs.unmount_when_idle()?;
    Ok(())
}

/// A wrong implementation of `AsFd`: such a value can reach the crate from safe code.
#[derive(Debug)]
struct Closed;

impl AsFd for Closed {
    #[allow(unsafe_code)]
    fn as_fd(&self) -> BorrowedFd<'_> {
        // SAFETY: the contract is broken on purpose, since no fd has this number. The kernel answers EBADF.
        unsafe { BorrowedFd::borrow_raw(1 << 29) }
    }
}

#[apply(needs_passthrough)]
fn closed_fd(sandbox: &Sandbox) -> Result<(), Failed> {
    let connection = Connection::mount(sandbox, Init::passthrough(1))?;
    assert_error(
        error(&connection.device(), Closed),
        "BadFd",
        Errno::BADF,
        Scope::File,
    );
    Ok(())
}

/// If the device's fd was closed elsewhere, the error does not blame the backing file for `EBADF`.
#[apply(needs_passthrough)]
fn closed_device(sandbox: &Sandbox) -> Result<(), Failed> {
    let never_open = FuseDevice::new(Closed.as_fd()).unwrap_err();
    assert_eq!(
        (never_open.cause(), never_open.errno()),
        (DeviceError::Other(Errno::BADF), Errno::BADF)
    );

    let connection = Connection::mount(sandbox, Init::passthrough(1))?;
    let device = connection.device().as_fd().try_clone_to_owned()?;
    let child = Client::start_with_fd("register-on-closed-device", &[], device)?;
    assert_eq!(child.finish()?, "ok");
    Ok(())
}

/// Runs in a process of one thread, where no other thread can reuse the number of the closed fd.
#[allow(unsafe_code)]
fn register_on_closed_device(_: &[String]) -> Result<String, Box<dyn std::error::Error>> {
    let stdin = std::io::stdin();
    let owned = stdin.as_fd().try_clone_to_owned()?;
    // SAFETY: the fd is closed while it is borrowed, on purpose. No other fd gets its number until then: there is no
    // other thread, and this one opens nothing in between.
    let lent = unsafe { BorrowedFd::borrow_raw(owned.as_raw_fd()) };
    let device = FuseDevice::new(lent).map_err(|refused| refused.cause())?;
    let file = tempfile::NamedTempFile::new()?;
    let path_only = open(file.path(), OFlags::PATH | OFlags::CLOEXEC, Mode::empty())?;
    let id = device.backing_open(&file)?;

    drop(owned);
    let unknown = Some(BackingError::Other(Errno::BADF));
    assert_eq!(error(&device, &path_only), unknown);
    assert_eq!(error(&device, &file), unknown);
    let failed = device.backing_close(id).unwrap_err();
    assert_eq!(failed.cause(), BackingError::Other(Errno::BADF));

    let again = rustix::io::fcntl_dupfd_cloexec(stdin.as_fd(), lent.as_raw_fd())?;
    assert_eq!(again.as_raw_fd(), lent.as_raw_fd());
    device.backing_close(failed.into_inner())?;
    Ok("ok".into())
}

/// Without /proc the user namespace is unknown, and no cause of `EPERM` is ruled out.
#[apply(needs_passthrough)]
fn without_proc(sandbox: &Sandbox) -> Result<(), Failed> {
    let connection = Connection::mount(sandbox, Init::PLAIN)?;
    let device = connection.device().as_fd().try_clone_to_owned()?;
    let child = Client::start_with_fd("register-without-proc", &[], device)?;
    assert_eq!(child.finish()?, "Some(NotPermitted(Undetermined))");
    Ok(())
}

#[allow(unsafe_code)]
fn register_without_proc(_: &[String]) -> Result<String, Box<dyn std::error::Error>> {
    let stdin = std::io::stdin();
    let device = FuseDevice::new(stdin.as_fd().try_clone_to_owned()?)?;
    let file = tempfile::tempfile()?;
    // SAFETY: CLONE_NEWNS does not touch the table of file descriptors.
    unsafe { unshare_unsafe(UnshareFlags::NEWNS) }?;
    mount("tmpfs", "/proc", "tmpfs", MountFlags::empty(), None)?;
    let without = error(&device, &file);
    // Another filesystem at /proc with a file of that name makes no difference.
    fs::create_dir_all("/proc/thread-self/ns")?;
    fs::write("/proc/thread-self/ns/user", "")?;
    assert_eq!(error(&device, &file), without);
    Ok(format!("{without:?}"))
}

/// The diagnosis writes to the device to find out whether it is attached, which a read-only fd does not allow.
#[apply(needs_passthrough)]
fn read_only_device(_: &Sandbox) -> Result<(), Failed> {
    let undetermined = BackingError::NotPermitted(NotPermitted::Undetermined);
    let device = FuseDevice::new(File::open("/dev/fuse")?)?;
    assert_eq!(error(&device, tempfile::tempfile()?), Some(undetermined));
    let close = device.backing_close(BackingId::from_raw(1).expect("positive"));
    assert_eq!(close.map_err(|failed| failed.cause()), Err(undetermined));
    Ok(())
}

/// A policy denies the ioctl before the driver sees it, on a device whose reads block: the diagnosis does not block.
#[apply(needs_sync_init)]
fn denied_in_synchronous_init(_: &Sandbox) -> Result<(), Failed> {
    let device = FuseDevice::open()?;
    device.sync_init()?;
    let file = tempfile::tempfile()?;
    let refused = apart(|| {
        let denied = Forged::Error(Errno::PERM);
        forge(&[(uapi::FUSE_DEV_IOC_BACKING_OPEN, denied)]).expect("seccomp");
        error(&device, &file)
    });
    assert!(
        matches!(refused, Some(BackingError::NotAttached(_))),
        "{refused:?}"
    );
    Ok(())
}

/// Errors whose causes this kernel does not have, or cannot produce on request.
#[apply(needs_passthrough)]
fn forged_errors(sandbox: &Sandbox) -> Result<(), Failed> {
    const OPEN: u32 = uapi::FUSE_DEV_IOC_BACKING_OPEN;
    const CLOSE: u32 = uapi::FUSE_DEV_IOC_BACKING_CLOSE;

    let connection = Connection::mount(sandbox, Init::passthrough(1))?;
    let device = connection.device();
    let mut file = tempfile::tempfile()?;
    file.write_all(b"content")?;
    let path_only = File::options()
        .read(true)
        .custom_flags(OFlags::PATH.bits() as i32)
        .open(tempfile::NamedTempFile::new()?.path())?;

    let forged = |file: &(dyn AsFd + Sync), ioctls: &[(u32, Errno)]| {
        let ioctls: Vec<_> = ioctls
            .iter()
            .map(|&(ioctl, errno)| (ioctl, Forged::Error(errno)))
            .collect();
        apart(|| {
            forge(&ioctls).expect("seccomp");
            device.backing_open(file).err()
        })
    };
    for (errno, debug, scope) in [
        (Errno::NOTTY, "UnsupportedKernel", Scope::Connection),
        (Errno::NOSYS, "Unimplemented", Scope::Connection),
        (Errno::NOMEM, "OutOfMemory", Scope::Transient),
        (Errno::NOSPC, "OutOfIds", Scope::Transient),
        (Errno::INTR, "Interrupted", Scope::Transient),
        // File, thread and connection have all that the kernel requires: a policy denied it.
        (
            Errno::PERM,
            "NotPermitted(NotNegotiatedOrDenied)",
            Scope::Connection,
        ),
    ] {
        assert_error(forged(&file, &[(OPEN, errno)]), debug, errno, scope);
    }
    // The cause is unknown for errnos whose usual cause is absent, and for one that the crate does not know.
    for errno in [Errno::INVAL, Errno::BADF, Errno::FAULT, Errno::ACCESS] {
        let debug = format!("Other({errno:?})");
        assert_error(forged(&file, &[(OPEN, errno)]), &debug, errno, Scope::File);
    }

    // EOPNOTSUPP concerns the file, unless BACKING_CLOSE gets it too.
    let unsupported = Errno::OPNOTSUPP;
    assert_error(
        forged(&file, &[(OPEN, unsupported)]),
        "FileNotSupported",
        unsupported,
        Scope::File,
    );
    assert_error(
        forged(&file, &[(OPEN, unsupported), (CLOSE, unsupported)]),
        "DisabledInKernel",
        unsupported,
        Scope::Connection,
    );
    // These errnos of BACKING_CLOSE leave the cause open.
    let unknown = format!("Other({unsupported:?})");
    for errno in [Errno::FAULT, Errno::PERM] {
        assert_error(
            forged(&file, &[(OPEN, unsupported), (CLOSE, errno)]),
            &unknown,
            unsupported,
            Scope::File,
        );
    }
    // If fstat(2) of the file fails, the error names no file type.
    for errno in [unsupported, Errno::INVAL] {
        let debug = format!("Other({errno:?})");
        assert_error(
            forged(&Closed, &[(OPEN, errno)]),
            &debug,
            errno,
            Scope::File,
        );
    }
    assert_error(
        forged(&Closed, &[(OPEN, Errno::ISDIR)]),
        &format!(
            "NotRegularFile {{ file_type: Directory, errno: {:?} }}",
            Errno::ISDIR
        ),
        Errno::ISDIR,
        Scope::File,
    );
    assert_error(
        forged(&File::open("/")?, &[(OPEN, unsupported)]),
        &format!("NotRegularFile {{ file_type: Directory, errno: {unsupported:?} }}"),
        unsupported,
        Scope::File,
    );
    assert_error(
        forged(&path_only, &[(OPEN, Errno::BADF)]),
        "PathOnlyFd",
        Errno::BADF,
        Scope::File,
    );
    assert_eq!(
        forged(&file, &[(OPEN, Errno::PERM)]),
        Some(BackingError::NotPermitted(
            NotPermitted::NotNegotiatedOrDenied
        ))
    );
    Ok(())
}

/// A result of 0, or below -4095, is no backing id, and must not become one that a reply sends to the kernel. Results
/// from -4095 to -1 are errnos.
#[apply(needs_passthrough)]
fn forged_success_without_id(sandbox: &Sandbox) -> Result<(), Failed> {
    let connection = Connection::mount(sandbox, Init::passthrough(1))?;
    let device = connection.device();
    let file = tempfile::tempfile()?;
    let forged = |value| {
        apart(|| {
            forge(&[(uapi::FUSE_DEV_IOC_BACKING_OPEN, Forged::Value(value))]).expect("seccomp");
            device.backing_open(&file)
        })
    };
    for value in [0, -4096, i32::MIN] {
        let debug = format!("InvalidId({value})");
        assert_error(forged(value).err(), &debug, Errno::PROTO, Scope::Connection);
    }
    // The control: forged values arrive.
    for value in [1, i32::MAX] {
        assert_eq!(forged(value).map(BackingId::into_raw), Ok(value));
    }
    Ok(())
}
