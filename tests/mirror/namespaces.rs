//! Servers with fewer rights than root has, and clients with fewer rights than they seem to have.

use std::fs::{self, File, Permissions};
use std::os::unix::fs::{MetadataExt, PermissionsExt, chown};
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::Duration;

use libtest_mimic::Failed;
use macro_rules_attribute::apply;
use rustix::process::{Pid, Signal, kill_process};

use crate::backing::Backing;
use crate::program;
use crate::sandbox::Sandbox;
use crate::server::{Mirror, Way, within};

#[apply(test_case)]
fn truncation_by_root_of_another_user_namespace(name: &str) -> Result<(), Failed> {
    compare(name, 0o6777, &["unshare", "-Ur", "truncate", "-s", "1"])
}

#[apply(test_case)]
fn group_change_by_the_owner(name: &str) -> Result<(), Failed> {
    let owner = ["setpriv", "--reuid=1000", "--regid=1000", "--groups=3000"];
    compare(name, 0o2747, &[&owner[..], &["chgrp", "3000"]].concat())
}

/// A command leaves the same mode of a file through the mirror as without it. The file's owner is 1000, its group 2000.
fn compare(name: &str, mode: u32, command: &[&str]) -> Result<(), Failed> {
    for way in [Way::Passthrough, Way::Plain] {
        let sandbox = Sandbox::new(name)?;
        let backing = Backing::in_memory(&sandbox, "tmpfs")?;
        let (source, plain) = (backing.folder("source")?, backing.folder("plain")?);
        let mirror = Mirror::start(&sandbox, &source, way)?;
        let left = |made: &Path, used: &Path| -> Result<u32, Failed> {
            fs::write(made.join("file"), "content")?;
            chown(made.join("file"), Some(1000), Some(2000))?;
            fs::set_permissions(made.join("file"), Permissions::from_mode(mode))?;
            let status = Command::new(command[0])
                .args(&command[1..])
                .arg(used.join("file"))
                .status()?;
            assert!(status.success(), "{command:?}: {status}");
            Ok(fs::metadata(made.join("file"))?.mode() & 0o7777)
        };
        let native = left(&plain, &plain)?;
        assert_ne!(native, mode, "the command changes the mode");
        assert_eq!(left(&source, mirror.path())?, native, "{way:?}");
        mirror.wait_for_releases()?;
        mirror.stop(&backing)?;
    }
    Ok(())
}

/// The server can neither register files nor give up groups there, and serves without passthrough.
#[apply(test_case)]
fn server_in_a_user_namespace(name: &str) -> Result<(), Failed> {
    let sandbox = Sandbox::new(name)?;
    let (source, mountpoint) = (sandbox.folder("source")?, sandbox.folder("mnt")?);
    let log = sandbox.folder("log")?.join("stderr");
    let mut mirror = Command::new("unshare")
        .arg("-Urm")
        .arg(program::example("mirror")?)
        .args([&source, &mountpoint])
        .stdin(Stdio::null())
        .stderr(File::create(&log)?)
        .spawn()?;
    let serves = || {
        let ended = mirror.try_wait()?;
        let said = fs::read_to_string(&log)?;
        assert!(ended.is_none(), "{ended:?}: {said}");
        Ok(said.contains("serving without passthrough"))
    };
    let serving = within(Duration::from_secs(20), "it serves", serves);
    let pid = Pid::from_raw(mirror.id().try_into()?).ok_or("0 is no process")?;
    kill_process(pid, Signal::TERM)?;
    let status = mirror.wait()?;
    serving?;
    assert!(status.success(), "{status}");
    Ok(())
}

/// Without `CAP_SETUID` the server makes no file for a client, since the file would be root's.
#[apply(test_case)]
fn server_that_cannot_take_ids(name: &str) -> Result<(), Failed> {
    let sandbox = Sandbox::new(name)?;
    let backing = Backing::in_memory(&sandbox, "tmpfs")?;
    let source = backing.folder("source")?;
    fs::set_permissions(&source, Permissions::from_mode(0o777))?;
    let mut server = Command::new("setpriv");
    server
        .arg("--bounding-set=-setuid")
        .arg(program::example("mirror")?);
    let mirror = Mirror::spawn_by(server, &sandbox, &source, Way::Plain)?;
    let made = Command::new("setpriv")
        .args(["--reuid=1000", "--regid=1000", "--clear-groups", "touch"])
        .arg(mirror.path().join("file"))
        .stderr(Stdio::null())
        .status()?;
    assert!(!made.success());
    assert!(!source.join("file").exists());
    mirror.wait_for_releases()?;
    mirror.stop(&backing)
}
