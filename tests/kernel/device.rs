//! `FuseDevice`: which fds it accepts, and the errors for others.

use std::fs::{self, File};
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::os::unix::fs::MetadataExt;
use std::rc::Rc;
use std::sync::Arc;

use fuse_backing::error::{DeviceError, FileType, Scope};
use fuse_backing::{DeviceFd, FuseDevice, error::Errno};
use libtest_mimic::Failed;
use macro_rules_attribute::apply;
use rustix::fs::{CWD, Mode, OFlags, makedev, mknodat, open};
use rustix::mount::{MountFlags, mount, mount_bind};
use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
use rustix::thread::{UnshareFlags, unshare_unsafe};

use crate::client::{self, Role};
use crate::fuse::{Connection, Init};
use crate::sandbox::Sandbox;

pub const ROLES: &[(&str, Role)] = &[("open-device-in-broken-dev", open_device_in_broken_dev)];

#[apply(needs_nothing)]
fn opens_the_node(_: &Sandbox) -> Result<(), Failed> {
    let fd = FuseDevice::open()?.into_inner();
    let flags = rustix::fs::fcntl_getfl(&fd)?;
    assert_eq!(flags & OFlags::ACCMODE, OFlags::RDWR);
    assert!(rustix::io::fcntl_getfd(&fd)?.contains(rustix::io::FdFlags::CLOEXEC));
    Ok(())
}

#[apply(needs_nothing)]
fn converts(_: &Sandbox) -> Result<(), Failed> {
    let device = FuseDevice::open()?;
    let raw = device.as_raw_fd();
    assert_eq!(device.as_fd().as_raw_fd(), raw);
    let fd = OwnedFd::from(device);
    assert_eq!(fd.as_raw_fd(), raw);
    let device = FuseDevice::try_from(fd)?;
    assert_eq!(device.as_raw_fd(), raw);
    let shared = FuseDevice::new(Arc::new(device.into_inner()))?;
    let clone = shared.clone();
    drop(shared);
    assert_eq!(clone.as_raw_fd(), raw);
    let refused = FuseDevice::try_from(OwnedFd::from(File::open("/dev/null")?)).unwrap_err();
    assert_eq!(refused.errno(), Errno::NOTTY);
    Ok(())
}

#[apply(needs_passthrough)]
fn takes_each_holder(sandbox: &Sandbox) -> Result<(), Failed> {
    fn register<Fd: DeviceFd>(holder: Fd) -> i32 {
        let device = FuseDevice::new(holder).expect("a FUSE device");
        let id = device
            .backing_open(tempfile::tempfile().unwrap())
            .expect("an id");
        let raw = id.as_raw();
        device.backing_close(id).expect("closed");
        raw
    }
    let connection = Connection::mount(sandbox, Init::passthrough(1))?;
    let owned: OwnedFd = connection.device().as_fd().try_clone_to_owned()?;
    assert_eq!(register(&owned), 1);
    assert_eq!(register(owned.as_fd()), 2);
    assert_eq!(register(Arc::new(owned.try_clone()?)), 3);
    assert_eq!(register(Rc::new(owned.as_fd())), 4);
    assert_eq!(register(Box::new(File::from(owned.try_clone()?))), 5);
    assert_eq!(register(File::from(owned.try_clone()?)), 6);
    assert_eq!(register(owned), 7);
    Ok(())
}

#[apply(needs_nothing)]
fn takes_a_node_elsewhere(sandbox: &Sandbox) -> Result<(), Failed> {
    let node = sandbox.folder("dev")?.join("any-name");
    mknodat(
        CWD,
        &node,
        FileType::CharacterDevice,
        Mode::RUSR | Mode::WUSR,
        makedev(10, 229),
    )?;
    FuseDevice::new(File::options().read(true).write(true).open(node)?)?;
    Ok(())
}

#[apply(needs_nothing)]
fn refuses_others_and_gives_them_back(sandbox: &Sandbox) -> Result<(), Failed> {
    let folder = sandbox.folder("files")?;
    fs::write(folder.join("file"), "")?;
    // A block device with the number of /dev/fuse.
    let block = folder.join("block");
    mknodat(
        CWD,
        &block,
        FileType::BlockDevice,
        Mode::RUSR,
        makedev(10, 229),
    )?;
    let (reader, _writer) = rustix::pipe::pipe()?;
    let opened = |path: &std::path::Path, flags| open(path, flags | OFlags::CLOEXEC, Mode::empty());

    let refused = |fd: OwnedFd| {
        let inode = File::from(fd.try_clone().unwrap())
            .metadata()
            .unwrap()
            .ino();
        let refused = FuseDevice::new(fd).unwrap_err();
        let reason = refused.cause();
        assert_eq!(refused.errno(), Errno::NOTTY);
        let message = format!("{refused} {refused:?}");
        assert!(
            message.starts_with("the fd is not a FUSE device: "),
            "{message}"
        );
        let returned = File::from(refused.into_inner()).metadata().unwrap();
        assert_eq!(returned.ino(), inode, "the same fd, still open");
        format!("{reason:?}")
    };
    let other = |file_type| format!("NotCharacterDevice({file_type})");
    assert_eq!(
        refused(opened(&folder.join("file"), OFlags::RDONLY)?),
        other("RegularFile")
    );
    assert_eq!(
        refused(opened(&folder, OFlags::RDONLY)?),
        other("Directory")
    );
    assert_eq!(refused(opened(&block, OFlags::PATH)?), other("BlockDevice"));
    assert_eq!(refused(reader), other("Fifo"));
    assert_eq!(
        refused(File::open("/dev/null")?.into()),
        "OtherDevice { major: 1, minor: 3 }"
    );
    Ok(())
}

/// An `O_PATH` fd of /dev/fuse has the right device number, but every ioctl on it fails with EBADF.
#[apply(needs_nothing)]
fn refuses_o_path(_: &Sandbox) -> Result<(), Failed> {
    let fd = open("/dev/fuse", OFlags::PATH | OFlags::CLOEXEC, Mode::empty())?;
    let refused = FuseDevice::new(fd).unwrap_err();
    assert_eq!(refused.cause(), DeviceError::PathOnly);
    assert_eq!(refused.errno(), Errno::BADF);
    let io_error = std::io::Error::from(refused);
    assert!(io_error.to_string().contains("O_PATH"), "{io_error}");
    Ok(())
}

#[apply(needs_nothing)]
fn open_says_what_is_wrong(_: &Sandbox) -> Result<(), Failed> {
    assert_eq!(client::run("open-device-in-broken-dev", &[])?, "ok");
    Ok(())
}

/// Runs in a process of its own, which covers /dev in its mount namespace.
#[allow(unsafe_code)]
fn open_device_in_broken_dev(_: &[String]) -> Result<String, Box<dyn std::error::Error>> {
    // SAFETY: CLONE_NEWNS does not touch the table of file descriptors.
    unsafe { unshare_unsafe(UnshareFlags::NEWNS) }?;

    let limit = getrlimit(Resource::Nofile);
    let device = FuseDevice::open()?;
    setrlimit(
        Resource::Nofile,
        Rlimit {
            current: Some(0),
            ..limit
        },
    )?;
    let error = FuseDevice::open().unwrap_err();
    assert_eq!(error, DeviceError::Other(Errno::MFILE));
    assert_eq!(
        (error.errno(), error.scope()),
        (Errno::MFILE, Scope::Transient)
    );
    assert_eq!(device.clone_connection().unwrap_err(), error);
    setrlimit(Resource::Nofile, limit)?;

    mount_bind("/dev/null", "/dev/fuse")?;
    let error = FuseDevice::open().unwrap_err();
    assert_eq!(error, DeviceError::OtherDevice { major: 1, minor: 3 });
    assert_eq!(
        (error.errno(), error.scope()),
        (Errno::NOTTY, Scope::Connection)
    );

    mount("tmpfs", "/dev", "tmpfs", MountFlags::empty(), None)?;
    let error = FuseDevice::open().unwrap_err();
    assert_eq!((error, error.errno()), (DeviceError::Missing, Errno::NOENT));
    assert_eq!(error.scope(), Scope::Connection);

    // A device number that no driver has claimed.
    mknodat(
        CWD,
        "/dev/fuse",
        FileType::CharacterDevice,
        Mode::RUSR,
        makedev(10, 255),
    )?;
    let error = FuseDevice::open().unwrap_err();
    assert!(matches!(error, DeviceError::NoDriver(_)), "{error:?}");

    // A filesystem on which no device can be opened.
    mount("tmpfs", "/dev", "tmpfs", MountFlags::NODEV, None)?;
    mknodat(
        CWD,
        "/dev/fuse",
        FileType::CharacterDevice,
        Mode::RUSR,
        makedev(10, 229),
    )?;
    let error = FuseDevice::open().unwrap_err();
    assert!(matches!(error, DeviceError::Denied(_)), "{error:?}");
    assert_eq!(
        (error.errno(), error.scope()),
        (Errno::ACCESS, Scope::Connection)
    );
    Ok("ok".into())
}
