//! An ext4 filesystem in a file.

use std::ffi::OsStr;
use std::fs::{self, File};
use std::io::ErrorKind;
use std::path::{Path, PathBuf};
use std::process::Command;

use libtest_mimic::Failed;
use rustix::io::Errno;
use rustix::mount::{FsOpenFlags, UnmountFlags, fsopen, unmount};

use crate::sandbox::Sandbox;

/// A mounted ext4. mount(8) marks its loop device to be detached at unmount, so that none is left behind.
pub struct Ext4(PathBuf);

/// Whether this kernel can mount ext4 from a file.
pub fn is_supported() -> Result<bool, Failed> {
    if let Err(errno) = fsopen("ext4", FsOpenFlags::FSOPEN_CLOEXEC) {
        assert_eq!(errno, Errno::NODEV);
        return Ok(false);
    }
    // Mounting needs a loop device. Opening this file loads the driver, if there is one.
    if let Err(error) = File::open("/dev/loop-control") {
        let drivers = fs::read_to_string("/proc/misc")?;
        assert!(!drivers.contains("loop-control"), "/dev: {error}");
        return Ok(false);
    }
    Ok(true)
}

impl Ext4 {
    /// Makes and mounts one of this size in bytes, with these further arguments of mkfs.ext4(8).
    pub fn new(sandbox: &Sandbox, size: u64, arguments: &[&str]) -> Result<Self, Failed> {
        let image = sandbox.folder("image")?.join("ext4");
        File::create_new(&image)?.set_len(size)?;
        let image = image.as_os_str();
        let mkfs = ["-q", "-F"].iter().chain(arguments).map(OsStr::new);
        let mkfs: Vec<_> = mkfs.chain([image]).collect();
        run("mkfs.ext4", "e2fsprogs", &mkfs)?;
        let folder = sandbox.folder("ext4")?;
        let mount = ["-n", "-t", "ext4", "-o", "loop"].map(OsStr::new);
        let places = [image, folder.as_os_str()];
        run("mount", "mount", &[&mount[..], &places].concat())?;
        Ok(Self(folder))
    }

    pub fn path(&self) -> &Path {
        &self.0
    }
}

impl Drop for Ext4 {
    fn drop(&mut self) {
        // Fails if it was unmounted before.
        let _ = unmount(&self.0, UnmountFlags::DETACH);
    }
}

/// Runs a program, which this Debian package has.
fn run(program: &str, package: &str, args: &[&OsStr]) -> Result<(), Failed> {
    let output = match Command::new(program).args(args).output() {
        Ok(output) => output,
        Err(error) if error.kind() == ErrorKind::NotFound => {
            return Err(format!(
                "the kernel has ext4, but there is no {program}: apt-get install {package}"
            )
            .into());
        }
        Err(error) => return Err(error.into()),
    };
    if !output.status.success() {
        let said = String::from_utf8_lossy(&output.stderr);
        return Err(format!("{program}: {}: {said}", output.status).into());
    }
    Ok(())
}
