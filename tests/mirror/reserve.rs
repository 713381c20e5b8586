//! ext4 reserves blocks for root. Clients can fill as much of a filesystem through the mirror as without it.
//!
//! `tests/kernel/rights/thread.rs` shows that a server with root's rights gives root's blocks to everybody. The tests
//! here show that root gets them.

#![allow(unsafe_code)]

use std::error::Error;
use std::ffi::OsStr;
use std::fs::{self, File};
use std::io;
use std::os::unix::fs::{FileExt, chown};
use std::path::Path;
use std::ptr::null_mut;

use libtest_mimic::Failed;
use macro_rules_attribute::apply;
use rustix::fs::{FallocateFlags, fallocate, statvfs, syncfs};
use rustix::io::Errno;
use rustix::mm::{Advice, MapFlags, ProtFlags, madvise, mmap};

use crate::client::{self, Role};
use crate::ext4::{self, Ext4};
use crate::sandbox::{Sandbox, unmount_when_idle};
use crate::server::{Mirror, Way};
use crate::setid::{OWNER_ID, become_writer};

pub const ROLES: &[(&str, Role)] = &[("fill", fill)];

const BOTH: [Way; 2] = [Way::Passthrough, Way::Plain];

const SIZE: u64 = 6 << 20;

/// The bytes that ext4 keeps back even from root.
const KEPT: u64 = SIZE / 50 + FEW;

/// The bytes by which metadata may differ.
const FEW: u64 = 64 << 10;

/// Arguments: a file beside a folder, the writer that fills them, and how.
fn fill(args: &[String]) -> Result<String, Box<dyn Error>> {
    let [path, writer, how] = args else {
        return Err("a path, a writer and a way".into());
    };
    become_writer(writer)?;
    let file = File::options().read(true).write(true).open(path)?;
    match how.as_str() {
        "write" => {
            let data = vec![b'x'; STEP];
            fill_by(|end, step| file.write_at(&data[..step], end))?;
        }
        "fallocate" => fill_by(|end, step| {
            fallocate(&file, FallocateFlags::empty(), end, step as u64)?;
            Ok(step)
        })?,
        "mkdir" => fill_by_folders(&Path::new(path).with_file_name("folder"))?,
        _ => fill_mapped(&file)?,
    }
    // Mapped pages that were not written back yet may still get no block.
    match file.sync_all() {
        Err(error) if how != "map" || !is_full(&error) => Err(error.into()),
        _ => Ok("full".into()),
    }
}

const STEP: usize = 1 << 20;

/// Takes smaller and smaller steps, until there is not a KiB left.
fn fill_by(take: impl Fn(u64, usize) -> io::Result<usize>) -> io::Result<()> {
    let (mut step, mut end) = (STEP, 0);
    while step >= 1024 {
        match take(end, step) {
            Ok(taken) => end += taken as u64,
            Err(error) if is_full(&error) => step /= 2,
            Err(error) => return Err(error),
        }
    }
    Ok(())
}

fn is_full(error: &io::Error) -> bool {
    error.raw_os_error() == Some(Errno::NOSPC.raw_os_error())
}

/// Makes folders until there is no block for one more.
fn fill_by_folders(parent: &Path) -> io::Result<()> {
    for number in 0.. {
        match fs::create_dir(parent.join(number.to_string())) {
            Err(error) if is_full(&error) => break,
            made => made?,
        }
    }
    Ok(())
}

/// Populates a mapping page by page, until a page gets no block.
fn fill_mapped(file: &File) -> io::Result<()> {
    const PAGE: usize = 4096;
    file.set_len(SIZE)?;
    let size = SIZE as usize;
    let access = ProtFlags::READ | ProtFlags::WRITE;
    // SAFETY: a new mapping, at an address that the kernel chooses. It is never unmapped.
    let start = unsafe { mmap(null_mut(), size, access, MapFlags::SHARED, file, 0) }?;
    for at in (0..size).step_by(PAGE) {
        let page = start.wrapping_byte_add(at);
        // SAFETY: the page is in the mapping, and this changes nothing in it.
        match unsafe { madvise(page, PAGE, Advice::LinuxPopulateWrite) } {
            Ok(()) => {}
            // A write to this page would raise SIGBUS.
            Err(Errno::FAULT) => break,
            Err(errno) => return Err(errno.into()),
        }
    }
    Ok(())
}

/// A filesystem that was filled: the bytes that are left, and those that were reserved for root.
#[derive(Debug)]
struct Filled {
    left: u64,
    reserve: u64,
}

impl Filled {
    /// Fills a new filesystem, through a mirror if there is a `way`.
    fn by(sandbox: &Sandbox, writer: &str, how: &str, way: Option<Way>) -> Result<Self, Failed> {
        // `-N` makes inodes for as many folders as there are blocks.
        let mkfs = ["-m", "20", "-O", "^has_journal", "-b", "1024", "-N", "4096"];
        let backing = Ext4::new(sandbox, SIZE, &mkfs)?;
        let path = backing.path().join("file");
        File::create_new(&path)?;
        let folder = backing.path().join("folder");
        fs::create_dir(&folder)?;
        for theirs in [&path, &folder] {
            chown(theirs, Some(OWNER_ID), Some(OWNER_ID))?;
        }
        let stat = statvfs(backing.path())?;
        let reserve = (stat.f_bfree - stat.f_bavail) * stat.f_frsize;
        assert!(reserve > 2 * KEPT, "{reserve}");
        // This takes all but 1 MiB of the blocks that are not reserved.
        let ballast = File::create_new(backing.path().join("ballast"))?;
        let size = stat.f_bavail * stat.f_frsize - (1 << 20);
        fallocate(&ballast, FallocateFlags::empty(), 0, size)?;

        let mirror = way.map(|way| Mirror::start(sandbox, backing.path(), way));
        let mirror = mirror.transpose()?;
        let place = mirror.as_ref().map_or(backing.path(), Mirror::path);
        let place = place.join("file");
        let args = [place.as_os_str(), OsStr::new(writer), OsStr::new(how)];
        assert_eq!(client::run("fill", &args)?, "full", "{writer}, {how}");
        if let Some(mirror) = mirror {
            mirror.wait_for_releases()?;
            mirror.stop_with(|| Ok(()))?;
        }
        syncfs(&ballast)?;
        drop(ballast);
        let stat = statvfs(backing.path())?;
        unmount_when_idle(backing.path())?;
        Ok(Self {
            left: stat.f_bfree * stat.f_frsize,
            reserve,
        })
    }

    /// Whether root's blocks are taken. Either all are, or none.
    fn is_all(&self) -> bool {
        let is_all = self.left <= KEPT;
        assert!(is_all || self.left >= self.reserve, "{self:?}");
        is_all
    }

    fn is_as(&self, other: &Self) -> bool {
        self.left.abs_diff(other.left) <= FEW
    }
}

#[apply(test_case)]
fn by_write(name: &str) -> Result<(), Failed> {
    fills_as_much(name, "write", &BOTH)
}

#[apply(test_case)]
fn by_fallocate(name: &str) -> Result<(), Failed> {
    fills_as_much(name, "fallocate", &BOTH)
}

#[apply(test_case)]
fn by_mkdir(name: &str) -> Result<(), Failed> {
    fills_as_much(name, "mkdir", &BOTH)
}

#[apply(test_case)]
fn by_map(name: &str) -> Result<(), Failed> {
    fills_as_much(name, "map", &[Way::Passthrough])
}

#[apply(test_case)]
fn by_map_plain(name: &str) -> Result<(), Failed> {
    fills_as_much(name, "map", &[Way::Plain])
}

fn fills_as_much(name: &str, how: &str, ways: &[Way]) -> Result<(), Failed> {
    if !ext4::is_supported()? {
        return Ok(());
    }
    let sandbox = Sandbox::new(name)?;
    for (writer, all) in [("owner", false), ("root", true)] {
        let native = Filled::by(&sandbox, writer, how, None)?;
        assert_eq!(native.is_all(), all, "{writer}: {native:?}");
        for &way in ways {
            let passthrough = way.is_passthrough()?;
            if how == "map" && writer == "root" && !passthrough {
                // The kernel writes the pages later, and does not say who changed them.
                continue;
            }
            let mirror = Filled::by(&sandbox, writer, how, Some(way))?;
            let what = format!("{writer}, {way:?}: {mirror:?}, native {native:?}");
            if how == "write" && writer == "root" && passthrough {
                // Passthrough writes as nobody.
                assert!(!mirror.is_all(), "{what}");
            } else {
                assert_eq!(mirror.is_all(), all, "{what}");
                assert!(mirror.is_as(&native), "{what}");
            }
        }
    }
    Ok(())
}
