//! `FUSE_DEV_IOC_SYNC_INIT` (Linux 6.18): mount(2) waits for INIT.

use std::fs;
use std::io::Write;
use std::os::fd::{AsFd, AsRawFd};
use std::process::Command;
use std::thread;
use std::time::{Duration, Instant};

use fuse_backing::error::{DeviceError, Scope};
use fuse_backing::{FuseDevice, error::Errno, uapi};
use libtest_mimic::Failed;
use macro_rules_attribute::apply;

use crate::client::{self, Role};
use crate::expect;
use crate::fuse::{Connection, Init, attach, connection_number};
use crate::sandbox::{Sandbox, mounted_connections, patience_times};
use crate::seccomp::{Forged, forge};
use crate::thread::apart;

pub const ROLES: &[(&str, Role)] = &[
    ("mount-synchronously", mount_synchronously),
    ("register-before-mount", register_before_mount),
];

const UNSUPPORTED: DeviceError = DeviceError::UnsupportedKernel { needs: "6.18" };

/// Replaces the tests on an older kernel.
pub fn assert_absent() -> Result<(), Failed> {
    let refused = FuseDevice::open()?.sync_init();
    assert_eq!(refused, Err(UNSUPPORTED));
    Ok(())
}

/// mount(2) does not return until INIT is answered. The control is `backing_open::init_not_answered`, where it returns.
#[apply(needs_sync_init)]
fn mount_waits_for_init(sandbox: &Sandbox) -> Result<(), Failed> {
    let mountpoint = sandbox.folder("mnt")?;
    let mut child = client::Client::start("mount-synchronously", &[mountpoint.as_os_str()])?;
    let fd = child.line()?;
    // From here on the watchdog can free the child, whatever fails below.
    let abort = sandbox.watch(connection_of(child.id(), &fd)?)?;
    assert!(!child.ends_within(Duration::from_millis(300))?);
    let folder = mountpoint.parent().ok_or("no folder")?;
    assert!(mounted_connections(folder).is_empty());

    // A signal ends the wait, and closing the last device fd ends the connection.
    child.kill()?;
    let unkillable = !child.ends_within(Duration::from_secs(3) * patience_times())?;
    if unkillable {
        eprintln!(
            "sync_init::mount_waits_for_init: CVE-2026-31713: on this kernel a process that waits for INIT in \
             mount(2) cannot be killed: writing fusectl's abort frees it"
        );
        abort.as_ref().write_all(b"1")?;
        assert!(child.ends_within(Duration::from_secs(10) * patience_times())?);
    }
    let expected = expect::sync_init_unkillable().unwrap_or(unkillable);
    assert_eq!(unkillable, expected);

    // With an answer, mount(2) returns when passthrough is on: a file can be registered at once.
    let device = FuseDevice::open()?;
    device.sync_init()?;
    let connection = Connection::serve_before_mount(sandbox, Init::passthrough(1), device)?;
    // This is the connection that the watchdog would abort.
    let file = connection.path("file");
    let number = connection_number(file.parent().ok_or("no mountpoint")?)?;
    assert_eq!(mounted_connections(folder), [number]);
    let device = connection.device();
    let id = device.backing_open(tempfile::tempfile()?)?;
    device.backing_close(id)?;
    Ok(())
}

/// The number of the connection of another process's device fd (Linux 6.18). It may have no mount yet.
fn connection_of(process: u32, fd: &str) -> Result<u32, Failed> {
    let fdinfo = format!("/proc/{process}/fdinfo/{fd}");
    let deadline = Instant::now() + Duration::from_secs(10) * patience_times();
    loop {
        let text = fs::read_to_string(&fdinfo)?;
        let mut lines = text.lines();
        if let Some(number) = lines.find_map(|line| line.strip_prefix("fuse_connection:")) {
            return Ok(number.trim().parse()?);
        }
        if Instant::now() > deadline {
            return Err(format!("{fdinfo} names no connection").into());
        }
        thread::sleep(Duration::from_millis(5));
    }
}

fn mount_synchronously(args: &[String]) -> Result<String, Box<dyn std::error::Error>> {
    let device = FuseDevice::open()?;
    device.sync_init()?;
    println!("{}", device.as_fd().as_raw_fd());
    attach(&device.into_inner(), args[0].as_ref()).map_err(|e| format!("{e:?}"))?;
    Ok("mounted".into())
}

#[apply(needs_sync_init)]
fn already_attached(sandbox: &Sandbox) -> Result<(), Failed> {
    let connection = Connection::mount(sandbox, Init::PLAIN)?;
    let refused = connection.device().sync_init().unwrap_err();
    assert_eq!(refused, DeviceError::AlreadyAttached);
    assert_eq!(
        (refused.errno(), refused.scope()),
        (Errno::INVAL, Scope::Connection)
    );
    Ok(())
}

/// BACKING_OPEN before mount(2) waits forever. It runs in a child, where a signal ends it.
#[apply(needs_sync_init)]
fn backing_open_waits_for_mount(_: &Sandbox) -> Result<(), Failed> {
    let result = client::run("register-before-mount", &[])?;
    assert_eq!(result, "waited: true, Interrupted Transient");
    Ok(())
}

#[allow(unsafe_code)]
fn register_before_mount(_: &[String]) -> Result<String, Box<dyn std::error::Error>> {
    extern "C" fn nothing(_: libc::c_int) {}
    let device = FuseDevice::open()?;
    device.sync_init()?;
    let file = tempfile::tempfile()?;
    // The signal interrupts the ioctl, since its handler is installed without SA_RESTART.
    // SAFETY: zero is a valid value of every member.
    let mut action: libc::sigaction = unsafe { std::mem::zeroed() };
    action.sa_sigaction = nothing as *const () as usize;
    // SAFETY: `action` lives, and the handler does nothing.
    unsafe { libc::sigaction(libc::SIGUSR1, &raw const action, std::ptr::null_mut()) };
    let script = format!("sleep 0.5; kill -USR1 {}", std::process::id());
    let mut alarm = Command::new("sh").args(["-c", &script]).spawn()?;
    let start = std::time::Instant::now();
    let error = device.backing_open(&file).expect_err("there is no mount");
    let waited = start.elapsed() > Duration::from_millis(200);
    alarm.wait()?;
    Ok(format!("waited: {waited}, {error:?} {:?}", error.scope()))
}

#[apply(needs_nothing)]
fn forged_errors(_: &Sandbox) -> Result<(), Failed> {
    let device = FuseDevice::open()?;
    for (errno, error) in [
        (Errno::NOTTY, UNSUPPORTED),
        (Errno::NOSYS, DeviceError::Unimplemented),
        (Errno::IO, DeviceError::Other(Errno::IO)),
    ] {
        let failed = apart(|| {
            forge(&[(uapi::FUSE_DEV_IOC_SYNC_INIT, Forged::Error(errno))]).expect("seccomp");
            device.sync_init().unwrap_err()
        });
        assert_eq!(
            (failed, failed.errno(), failed.scope()),
            (error, errno, Scope::Connection)
        );
    }
    Ok(())
}
