//! Backing files that the kernel cannot open as the client asks. The kernel alone would give the client a
//! bare `EIO`. The mirror opens the file first, and the client gets the errno of that open.

use std::fs::{self, Permissions};
use std::os::unix::fs::{PermissionsExt, symlink};
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use libtest_mimic::Failed;
use macro_rules_attribute::apply;
use rustix::fs::XattrFlags;
use rustix::mount::{MountFlags, UnmountFlags, mount_bind, mount_remount, unmount};

use crate::backing::Backing;
use crate::differential::{Made, compare, run, same_trees};
use crate::program;
use crate::sandbox::Sandbox;
use crate::server::{Mirror, Way, within};
use crate::tree::Detail;

const WAYS: [Way; 2] = [Way::Passthrough, Way::Plain];

/// A running program, which is killed when dropped.
struct Running(Child);

impl Running {
    /// Runs a copy of sleep(1).
    fn start(folder: &Path) -> Result<Self, Failed> {
        let path = folder.join("program");
        fs::copy(program::in_path("sleep").ok_or("there is no sleep")?, &path)?;
        fs::set_permissions(&path, Permissions::from_mode(0o755))?;
        // A child of another test can have the copy open for writing between its fork and its exec.
        let mut child = None;
        within(Duration::from_secs(10), "the program runs", || {
            let mut command = Command::new(&path);
            // A multi-call binary chooses its program by this name.
            std::os::unix::process::CommandExt::arg0(&mut command, "sleep");
            match command.arg("1000").stdin(Stdio::null()).spawn() {
                Ok(running) => child = Some(running),
                Err(error) if error.raw_os_error() == Some(libc::ETXTBSY) => {}
                Err(error) => return Err(error.into()),
            }
            Ok(child.is_some())
        })?;
        Ok(Self(child.ok_or("the program does not run")?))
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// How many calls had this outcome in the plain directory.
fn count(made: &[Made], outcome: &str) -> usize {
    made.iter().filter(|made| made.plain == outcome).count()
}

#[apply(test_case)]
fn running_program(name: &str) -> Result<(), Failed> {
    for way in WAYS {
        let sandbox = Sandbox::new(name)?;
        let backing = Backing::in_memory(&sandbox, "tmpfs")?;
        let (source, plain) = (backing.folder("source")?, backing.folder("plain")?);
        let programs = [Running::start(&source)?, Running::start(&plain)?];
        let mirror = Mirror::start(&sandbox, &source, way)?;
        let made = run("running", mirror.path(), &plain)?;
        compare(&made, way.is_passthrough()?, false)?;
        assert_eq!(count(&made, "ETXTBSY"), 8);
        same_trees(mirror.path(), &plain, Detail::Calls)?;
        drop(programs);
        mirror.wait_for_releases()?;
        mirror.stop(&backing)?;
    }
    Ok(())
}

#[apply(test_case)]
fn without_direct_io(name: &str) -> Result<(), Failed> {
    for way in WAYS {
        let sandbox = Sandbox::new(name)?;
        let backing = Backing::in_memory(&sandbox, "ramfs")?;
        let (source, plain) = (backing.folder("source")?, backing.folder("plain")?);
        for folder in [&source, &plain] {
            fs::write(folder.join("file"), "content")?;
        }
        let mirror = Mirror::start(&sandbox, &source, way)?;
        let made = run("without direct", mirror.path(), &plain)?;
        compare(&made, way.is_passthrough()?, false)?;
        assert_eq!(count(&made, "EINVAL"), 7);
        same_trees(mirror.path(), &plain, Detail::Calls)?;
        mirror.wait_for_releases()?;
        mirror.stop(&backing)?;
    }
    Ok(())
}

#[apply(test_case)]
fn read_only_source(name: &str) -> Result<(), Failed> {
    for way in WAYS {
        let sandbox = Sandbox::new(name)?;
        let backing = Backing::in_memory(&sandbox, "tmpfs")?;
        let source = backing.folder("source")?;
        fs::write(source.join("file"), "content")?;
        rustix::fs::setxattr(source.join("file"), "user.a", b"a", XattrFlags::empty())?;
        fs::create_dir(source.join("folder"))?;
        fs::write(source.join("folder/file"), "")?;
        symlink("file", source.join("link"))?;

        let read_only = ReadOnly::of(&sandbox, &source)?;
        let mirror = Mirror::start(&sandbox, &read_only.0, way)?;
        // Nothing changes, so the source can be its own plain directory.
        let made = run("read-only", mirror.path(), &read_only.0)?;
        compare(&made, way.is_passthrough()?, true)?;
        assert_eq!(count(&made, "EROFS"), 29);
        same_trees(mirror.path(), &source, Detail::Calls)?;
        mirror.wait_for_releases()?;
        // What the mirror has open pins the read-only mount as well as the backing.
        let at = read_only.0.clone();
        mirror.stop_with(|| {
            within(
                Duration::from_secs(10),
                "the read-only mount is idle",
                || Ok(unmount(&at, UnmountFlags::NOFOLLOW).is_ok()),
            )?;
            backing.unmount_when_idle()
        })?;
    }
    Ok(())
}

/// A read-only mount of a folder that is writable by another path.
struct ReadOnly(std::path::PathBuf);

impl ReadOnly {
    fn of(sandbox: &Sandbox, folder: &Path) -> Result<Self, Failed> {
        let at = sandbox.folder("read-only")?;
        mount_bind(folder, &at)?;
        mount_remount(&at, MountFlags::BIND | MountFlags::RDONLY, "")?;
        Ok(Self(at))
    }
}

impl Drop for ReadOnly {
    fn drop(&mut self) {
        // Fails if it was unmounted before.
        let _ = unmount(&self.0, UnmountFlags::DETACH);
    }
}
