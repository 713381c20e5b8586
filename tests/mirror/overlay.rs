//! An overlayfs of two layers, on filesystems of its own.

use std::ffi::CString;
use std::path::{Path, PathBuf};

use libtest_mimic::Failed;
use rustix::io::Errno;
use rustix::mount::{FsOpenFlags, MountFlags, UnmountFlags, fsopen, mount, unmount};

use crate::backing::Backing;
use crate::sandbox::{Sandbox, unmount_when_idle};

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Layers {
    /// On one filesystem.
    Together,
    /// On two: not all files have the same `st_dev`.
    Apart,
    /// On one, with an index: the names of a lower file stay names of one file when it is copied up. Without an index,
    /// each name gets a file of its own.
    Indexed,
}

pub struct Overlay {
    at: PathBuf,
    /// Dropped after the overlay is unmounted.
    layers: Vec<Backing>,
}

/// Whether this kernel has overlayfs.
pub fn is_supported() -> bool {
    match fsopen("overlay", FsOpenFlags::FSOPEN_CLOEXEC) {
        Ok(_) => true,
        Err(errno) => {
            assert_eq!(errno, Errno::NODEV);
            false
        }
    }
}

impl Overlay {
    /// `fill` makes the files of the lower layer.
    pub fn new(
        sandbox: &Sandbox,
        layers: Layers,
        fill: impl FnOnce(&Path) -> Result<(), Failed>,
    ) -> Result<Self, Failed> {
        let upper_on = Backing::in_memory(sandbox, "tmpfs")?;
        let lower_on = match layers {
            Layers::Together | Layers::Indexed => None,
            Layers::Apart => Some(Backing::in_memory(sandbox, "tmpfs")?),
        };
        let lower = lower_on.as_ref().unwrap_or(&upper_on).folder("lower")?;
        fill(&lower)?;
        let [upper, work] = [upper_on.folder("upper")?, upper_on.folder("work")?];
        let at = sandbox.folder("overlay")?;
        let [lower, upper, work] = [lower, upper, work].map(|path| path.display().to_string());
        let index = if layers == Layers::Indexed {
            "on"
        } else {
            "off"
        };
        let data =
            format!("lowerdir={lower},upperdir={upper},workdir={work},index={index},xino=off");
        let data = CString::new(data)?;
        mount(
            "overlay",
            &at,
            "overlay",
            MountFlags::empty(),
            data.as_c_str(),
        )?;
        let layers = [upper_on].into_iter().chain(lower_on).collect();
        Ok(Self { at, layers })
    }

    pub fn path(&self) -> &Path {
        &self.at
    }

    /// Succeeds only if nothing pins a file of it, or of its layers.
    pub fn unmount_when_idle(&self) -> Result<(), Failed> {
        unmount_when_idle(&self.at)?;
        self.layers.iter().try_for_each(Backing::unmount_when_idle)
    }
}

impl Drop for Overlay {
    fn drop(&mut self) {
        // Fails if it was unmounted before.
        let _ = unmount(&self.at, UnmountFlags::DETACH);
    }
}
