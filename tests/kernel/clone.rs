//! `FUSE_DEV_IOC_CLONE`: further fds of one connection.

use fuse_backing::error::{DeviceError, Scope};
use fuse_backing::{FuseDevice, error::Errno, uapi};
use libtest_mimic::Failed;
use macro_rules_attribute::apply;

use crate::expect;
use crate::fuse::{Connection, Init};
use crate::sandbox::Sandbox;
use crate::seccomp::{Forged, forge};
use crate::thread::apart;

#[apply(needs_nothing)]
fn device_not_attached(_: &Sandbox) -> Result<(), Failed> {
    let failed = FuseDevice::open()?.clone_connection().unwrap_err();
    expect::assert_clone_unattached(failed.errno());
    assert!(matches!(failed, DeviceError::NotAttached(_)), "{failed:?}");
    assert_eq!(failed.scope(), Scope::Connection);

    // The errno of older kernel releases.
    let device = FuseDevice::open()?;
    let forged = apart(|| {
        let invalid = Forged::Error(Errno::INVAL);
        forge(&[(uapi::FUSE_DEV_IOC_CLONE, invalid)]).expect("seccomp");
        device.clone_connection().unwrap_err()
    });
    assert_eq!(forged.errno(), Errno::INVAL);
    assert!(matches!(forged, DeviceError::NotAttached(_)), "{forged:?}");
    Ok(())
}

#[apply(needs_passthrough)]
fn shares_ids(sandbox: &Sandbox) -> Result<(), Failed> {
    let connection = Connection::mount(sandbox, Init::passthrough(1))?;
    let device = connection.device();
    let clone = device.clone_connection()?;
    let again = clone.clone_connection()?;
    let file = tempfile::tempfile()?;

    let first = device.backing_open(&file)?;
    let second = clone.backing_open(&file)?;
    assert_eq!((first.as_raw(), second.as_raw()), (1, 2));
    clone.backing_close(first)?;
    again.backing_close(second)?;
    Ok(())
}

#[apply(needs_passthrough)]
fn keeps_the_connection(sandbox: &Sandbox) -> Result<(), Failed> {
    let tmpfs = sandbox.tmpfs()?;
    let connection = Connection::mount(sandbox, Init::passthrough(1))?;
    let clone = connection.device().clone_connection()?;
    let id = connection.device().backing_open(tmpfs.file("file", "")?)?;
    drop(connection);
    assert_eq!(tmpfs.unmount(), Err(Errno::BUSY));
    clone.backing_close(id)?;
    tmpfs.unmount_when_idle()?;

    // Closing the last fd closes the ids that are left.
    let tmpfs = sandbox.tmpfs()?;
    let leaked = clone.backing_open(tmpfs.file("file", "")?)?;
    assert_eq!(tmpfs.unmount(), Err(Errno::BUSY));
    drop((leaked, clone));
    tmpfs.unmount_when_idle()
}

#[apply(needs_nothing)]
fn forged_errors(sandbox: &Sandbox) -> Result<(), Failed> {
    let connection = Connection::mount(sandbox, Init::PLAIN)?;
    let device = connection.device();
    const UNSUPPORTED: DeviceError = DeviceError::UnsupportedKernel { needs: "4.2" };
    for (errno, error, scope) in [
        (Errno::NOTTY, UNSUPPORTED, Scope::Connection),
        (Errno::NOSYS, DeviceError::Unimplemented, Scope::Connection),
        (
            Errno::NOMEM,
            DeviceError::Other(Errno::NOMEM),
            Scope::Transient,
        ),
        (
            Errno::INTR,
            DeviceError::Other(Errno::INTR),
            Scope::Transient,
        ),
        (
            Errno::INVAL,
            DeviceError::Other(Errno::INVAL),
            Scope::Connection,
        ),
    ] {
        let failed = apart(|| {
            forge(&[(uapi::FUSE_DEV_IOC_CLONE, Forged::Error(errno))]).expect("seccomp");
            device.clone_connection().unwrap_err()
        });
        assert_eq!(
            (failed, failed.errno(), failed.scope()),
            (error, errno, scope)
        );
    }
    Ok(())
}
