//! A call through the crate is one system call, and nothing else.

use std::hint::black_box;
use std::os::fd::AsFd;

use fuse_backing::{BackingFile, FuseDevice, uapi};
use libtest_mimic::Failed;
use rustix::process::getppid;

use crate::alloc;
use crate::client::{Client, Role, wait_for_parent};
use crate::fuse::{Connection, Init, attach, handshake};
use crate::sandbox::Sandbox;
use crate::trace;
use crate::{Needs, Test};

pub const TESTS: &[Test] = &[
    (
        "one_system_call_each",
        Needs::Passthrough,
        one_system_call_each,
    ),
    ("no_allocation", Needs::Passthrough, no_allocation),
];

pub const ROLES: &[(&str, Role)] = &[("open-and-close", open_and_close)];

const ROUNDS: usize = 100;

fn rounds(device: &FuseDevice<impl AsFd>, file: &std::fs::File) {
    for _ in 0..ROUNDS {
        let id = device.backing_open(file).expect("registered");
        device.backing_close(id).expect("closed");
        drop(BackingFile::open(device, file).expect("registered"));
        let guard = BackingFile::open(device, file).expect("registered");
        guard.close().expect("closed");
    }
}

/// Mounts, negotiates, waits to be traced, and makes its rounds between two calls of getppid(2).
fn open_and_close(args: &[String]) -> Result<String, Box<dyn std::error::Error>> {
    let device = FuseDevice::open()?.into_inner();
    let failed = |e: Failed| format!("{e:?}");
    attach(&device, args[0].as_ref()).map_err(failed)?;
    handshake(&device, Init::passthrough(1)).map_err(failed)?;
    let device = FuseDevice::new(device)?;
    let file = tempfile::tempfile()?;
    println!("ready");
    wait_for_parent()?;
    let _ = getppid();
    rounds(&device, &file);
    let _ = getppid();
    Ok("done".into())
}

fn one_system_call_each(sandbox: &Sandbox) -> Result<(), Failed> {
    let mountpoint = sandbox.folder("mnt")?;
    let mut child = Client::start("open-and-close", &[mountpoint.as_os_str()])?;
    assert_eq!(child.line()?, "ready");
    let calls = trace::calls(&mut child)?;
    assert_eq!(child.finish()?, "done");

    let marks: Vec<_> = (0..calls.len())
        .filter(|&i| calls[i].number == libc::SYS_getppid)
        .collect();
    let [start, end] = marks[..] else {
        return Err(format!("{} marks", marks.len()).into());
    };
    let made = &calls[start + 1..end];
    let ioctls = [
        u64::from(uapi::FUSE_DEV_IOC_BACKING_OPEN),
        u64::from(uapi::FUSE_DEV_IOC_BACKING_CLOSE),
    ];
    assert_eq!(made.len(), 3 * ROUNDS * ioctls.len());
    for (call, ioctl) in made.iter().zip(ioctls.iter().cycle()) {
        assert_eq!((call.number, call.args[1]), (libc::SYS_ioctl, *ioctl));
    }
    Ok(())
}

fn no_allocation(sandbox: &Sandbox) -> Result<(), Failed> {
    let connection = Connection::mount(sandbox, Init::passthrough(1))?;
    let device = connection.device();
    let file = tempfile::tempfile()?;

    let before = alloc::count();
    black_box(Vec::<u8>::with_capacity(black_box(1)));
    assert_eq!(alloc::count() - before, 1, "allocations are counted");

    let before = alloc::count();
    rounds(&device, &file);
    assert_eq!(alloc::count() - before, 0);
    Ok(())
}
