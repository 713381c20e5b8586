//! A call through the crate is one system call, and nothing else.

use std::hint::black_box;

use fuse_backing::{Access, BackingFile, DeviceFd, FuseDevice, uapi};
use libtest_mimic::Failed;
use macro_rules_attribute::apply;

use crate::alloc;
use crate::client::Role;
use crate::fuse::{Connection, Init, mounted};
use crate::sandbox::Sandbox;
use crate::trace;

pub const ROLES: &[(&str, Role)] = &[("open-and-close", open_and_close)];

const ROUNDS: usize = 100;

fn rounds(device: &FuseDevice<impl DeviceFd>, file: &std::fs::File) {
    for _ in 0..ROUNDS {
        let id = device.backing_open(file).expect("registered");
        device.backing_close(id).expect("closed");
        drop(BackingFile::open(device, file, Access::ReadWrite).expect("registered"));
        let guard = BackingFile::open(device, file, Access::ReadWrite).expect("registered");
        guard.close().expect("closed");
    }
}

fn open_and_close(args: &[String]) -> Result<String, Box<dyn std::error::Error>> {
    let device = mounted(args[0].as_ref(), Init::passthrough(1)).map_err(|e| format!("{e:?}"))?;
    let file = tempfile::tempfile()?;
    trace::traced(|| rounds(&device, &file))?;
    Ok("done".into())
}

#[apply(needs_passthrough)]
fn one_system_call_each(sandbox: &Sandbox) -> Result<(), Failed> {
    let mountpoint = sandbox.folder("mnt")?;
    let made = trace::calls_of("open-and-close", &[mountpoint.as_os_str()])?;
    let ioctls = [
        uapi::FUSE_DEV_IOC_BACKING_OPEN,
        uapi::FUSE_DEV_IOC_BACKING_CLOSE,
    ];
    assert_eq!(made.len(), 3 * ROUNDS * ioctls.len());
    for (call, ioctl) in made.iter().zip(ioctls.iter().cycle()) {
        // The kernel takes an `unsigned int`; some ABIs sign-extend it in the register.
        let request = call.args[1] as u32;
        assert_eq!((call.number, request), (libc::SYS_ioctl, *ioctl));
    }
    Ok(())
}

#[apply(needs_passthrough)]
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
