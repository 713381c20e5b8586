//! Filesystems for source trees. They cannot be unmounted while a file of theirs is open or registered.

use std::fs::{self, Permissions};
use std::os::unix::fs::PermissionsExt;
use std::path::PathBuf;

use libtest_mimic::Failed;
use rustix::mount::{MountFlags, UnmountFlags, mount, mount_bind, unmount};
use tempfile::TempDir;

use crate::sandbox::{Sandbox, unmount_when_idle};

pub struct Backing {
    at: PathBuf,
    /// The folder that is bind-mounted there; `None` for a new filesystem.
    _scratch: Option<TempDir>,
}

impl Backing {
    /// A new filesystem in memory: `tmpfs`, or `ramfs`, which has no `O_DIRECT`.
    pub fn in_memory(sandbox: &Sandbox, kind: &str) -> Result<Self, Failed> {
        let at = sandbox.folder(kind)?;
        mount(kind, &at, kind, MountFlags::empty(), None)?;
        fs::set_permissions(&at, Permissions::from_mode(0o755))?;
        Ok(Self { at, _scratch: None })
    }

    /// A new folder among this machine's temporary files, bind-mounted.
    pub fn scratch(sandbox: &Sandbox) -> Result<Self, Failed> {
        let scratch = tempfile::Builder::new()
            .prefix("fuse-backing-test-")
            .permissions(Permissions::from_mode(0o755))
            // tempfile's default is the sandbox's tmpfs by now.
            .tempdir_in(std::env::temp_dir())?;
        let at = sandbox.folder("scratch")?;
        mount_bind(scratch.path(), &at)?;
        Ok(Self {
            at,
            _scratch: Some(scratch),
        })
    }

    /// A new folder in it.
    pub fn folder(&self, name: &str) -> Result<PathBuf, Failed> {
        let folder = self.at.join(name);
        fs::create_dir(&folder)?;
        fs::set_permissions(&folder, Permissions::from_mode(0o755))?;
        Ok(folder)
    }

    pub fn unmount(&self) -> rustix::io::Result<()> {
        unmount(&self.at, UnmountFlags::NOFOLLOW)
    }

    pub fn unmount_when_idle(&self) -> Result<(), Failed> {
        unmount_when_idle(&self.at)
    }
}

impl Drop for Backing {
    fn drop(&mut self) {
        // Fails if it was unmounted before.
        let _ = unmount(&self.at, UnmountFlags::DETACH);
    }
}
