//! Checks whether files at a PATH can be backing files. Runs in a client process, since an unknown
//! filesystem can hang.

use std::collections::VecDeque;
use std::ffi::CStr;
use std::fmt::Display;
use std::io::{self, Write};
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::path::Path;

use fuse_backing::error::BackingError;
use fuse_backing::{Access, BackingFile, DeviceFd, FuseDevice};
use rustix::fs::{
    AtFlags, CWD, Dir, FileType, Mode, OFlags, ResolveFlags, StatxFlags, fstat, fstatfs, openat,
    openat2, statx,
};

use crate::advice::{CHECK_THE_LOG, Failure};

/// Limits of the search for a regular file: directory entries in each search, and levels upwards.
const ENTRIES: usize = 250;
const LEVELS: usize = 16;

/// What a client found, parsed from the lines that it printed.
#[derive(Default)]
pub(crate) struct Probed {
    pub(crate) filesystem: Option<String>,
    /// `None` if the client had no device, or did not finish.
    pub(crate) verdict: Option<Verdict>,
}

pub(crate) enum Verdict {
    Yes,
    /// A higher `max_stack_depth` may help.
    TooDeep(Failure),
    No(Failure),
}

const FILESYSTEM: &str = "filesystem";
const YES: &str = "yes";
const TOO_DEEP: &str = "too-deep";
const NO: &str = "no";
const ADVICE: &str = "advice";

impl Probed {
    pub(crate) fn parse(printed: &str) -> Self {
        let mut probed = Self::default();
        for line in printed.lines() {
            let (key, value) = line.split_once(' ').unwrap_or((line, ""));
            match (key, &mut probed.verdict) {
                (FILESYSTEM, _) => probed.filesystem = Some(value.to_owned()),
                (YES, _) => probed.verdict = Some(Verdict::Yes),
                (TOO_DEEP, _) => probed.verdict = Some(Verdict::TooDeep(Failure::new(value, ""))),
                (NO, _) => probed.verdict = Some(Verdict::No(Failure::new(value, ""))),
                (ADVICE, Some(Verdict::TooDeep(failure) | Verdict::No(failure))) => {
                    value.clone_into(&mut failure.advice);
                }
                _ => {}
            }
        }
        probed
    }
}

/// Runs in the client process. Standard input is the FUSE device, or something else if there is none.
pub(crate) fn probe(path: &Path) -> io::Result<()> {
    let opened = rustix::fs::open(path, OFlags::PATH | OFlags::CLOEXEC, Mode::empty());
    let place = match opened {
        Ok(place) => place,
        Err(errno) => {
            let failure = Failure::new(
                format!("cannot be opened: {errno}"),
                "name a path that exists and is accessible",
            );
            return print_failure(NO, &failure);
        }
    };
    print(FILESYSTEM, filesystem(&place))?;
    let Ok(device) = FuseDevice::new(io::stdin().as_fd().try_clone_to_owned()?) else {
        return Ok(());
    };
    match file_at(place).and_then(|file| register(&device, file)) {
        Ok(None) => print(YES, ""),
        Ok(Some(too_deep)) => print_failure(TOO_DEEP, &too_deep),
        Err(failure) => print_failure(NO, &failure),
    }
}

fn print_failure(key: &str, failure: &Failure) -> io::Result<()> {
    print(key, &failure.cause)?;
    print(ADVICE, &failure.advice)
}

/// Prints and flushes a line, because the next call may hang.
fn print(key: &str, value: impl Display) -> io::Result<()> {
    let mut stdout = io::stdout();
    writeln!(stdout, "{key} {value}")?;
    stdout.flush()
}

/// The filesystem's name, or else its magic number.
fn filesystem(place: &OwnedFd) -> String {
    if let Some(name) = filesystem_name(place) {
        return name;
    }
    match fstatfs(place) {
        Ok(statfs) => format!("{:#x}", statfs.f_type),
        Err(errno) => errno.to_string(),
    }
}

fn filesystem_name(place: &OwnedFd) -> Option<String> {
    let flags = AtFlags::EMPTY_PATH | AtFlags::STATX_DONT_SYNC;
    let statx = statx(place, "", flags, StatxFlags::MNT_ID).ok()?;
    if statx.stx_mask & StatxFlags::MNT_ID.bits() == 0 {
        return None;
    }
    let id = statx.stx_mnt_id.to_string();
    let mountinfo = std::fs::read("/proc/thread-self/mountinfo").ok()?;
    let mountinfo = String::from_utf8_lossy(&mountinfo);
    let mount = mountinfo
        .lines()
        .find(|line| line.split(' ').next() == Some(&id))?;
    // After the optional fields: type, source, options.
    let (_, filesystem) = mount.split_once(" - ")?;
    filesystem.split(' ').next().map(str::to_owned)
}

/// The file to register: the place itself unless it is a directory; else a regular file near it; else
/// a new file without a name.
fn file_at(place: OwnedFd) -> Result<OwnedFd, Failure> {
    if file_type(&place) != FileType::Directory {
        return Ok(place);
    }
    if let Some(file) = regular_file_near(&place) {
        return Ok(file);
    }
    let unnamed = if is_overlay(&place) {
        Err("an unnamed one would make overlayfs copy the directory up".to_owned())
    } else {
        let flags = OFlags::TMPFILE | OFlags::RDWR | OFlags::CLOEXEC;
        openat(&place, ".", flags, Mode::RUSR | Mode::WUSR)
            .map_err(|errno| format!("an unnamed one cannot be created: {errno}"))
    };
    unnamed.map_err(|why| {
        Failure::new(
            format!("found no regular file there, and {why}"),
            "name a regular file instead of the directory",
        )
    })
}

/// A regular file in the directory, or else below or above it on the same mount. Opened with `O_PATH`,
/// which needs no permission on the file.
fn regular_file_near(directory: &OwnedFd) -> Option<OwnedFd> {
    let mut above = open_on_mount(directory, c".", LISTED)?;
    for _ in 0..LEVELS {
        if let Some(file) = regular_file_below(&above) {
            return Some(file);
        }
        above = open_on_mount(&above, c"..", LISTED)?;
    }
    None
}

fn regular_file_below(directory: &OwnedFd) -> Option<OwnedFd> {
    let mut directories = VecDeque::from([open_on_mount(directory, c".", LISTED)?]);
    let mut left = ENTRIES;
    while let Some(directory) = directories.pop_front() {
        for entry in Dir::read_from(&directory).ok()?.flatten() {
            left = left.checked_sub(1)?;
            let name = entry.file_name();
            let Some(found) = open_on_mount(&directory, name, OFlags::PATH) else {
                continue;
            };
            match file_type(&found) {
                FileType::RegularFile => return Some(found),
                FileType::Directory if name != c"." && name != c".." => {
                    directories.extend(open_on_mount(&directory, name, LISTED));
                }
                _ => {}
            }
        }
    }
    None
}

const LISTED: OFlags = OFlags::RDONLY.union(OFlags::DIRECTORY);

/// Opens `name`, but neither what is mounted there nor the target of a symbolic link.
fn open_on_mount(directory: &OwnedFd, name: &CStr, flags: OFlags) -> Option<OwnedFd> {
    let flags = flags | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    openat2(directory, name, flags, Mode::empty(), ResolveFlags::NO_XDEV).ok()
}

fn is_overlay(place: &OwnedFd) -> bool {
    // `OVERLAYFS_SUPER_MAGIC` of `<linux/magic.h>`.
    fstatfs(place).is_ok_and(|statfs| statfs.f_type == 0x794c_7630)
}

fn file_type(file: &OwnedFd) -> FileType {
    fstat(file).map_or(FileType::Unknown, |stat| {
        FileType::from_raw_mode(stat.st_mode)
    })
}

/// Registers the file and closes the id. `Some` if the file is stacked too deep.
fn register(device: &FuseDevice<impl DeviceFd>, file: OwnedFd) -> Result<Option<Failure>, Failure> {
    let regular = file_type(&file) == FileType::RegularFile;
    let backing = match BackingFile::open(device, &file, Access::ReadOnly) {
        // Linux before 6.12 refuses `O_PATH` fds.
        Err(BackingError::PathOnlyFd) if regular => {
            let file = for_reading(&file)?;
            BackingFile::open(device, file, Access::ReadOnly)
        }
        answer => answer,
    };
    let backing = match backing {
        Ok(backing) => backing,
        Err(error @ BackingError::StackedTooDeep) => return Ok(Some(error.into())),
        Err(error) => return Err(error.into()),
    };
    backing.close().map_err(|error| {
        let cause = error.cause();
        Failure::new(
            format!("registered, but cannot be closed: {cause}"),
            CHECK_THE_LOG,
        )
    })?;
    if regular {
        Ok(None)
    } else {
        // Linux 6.12 to 6.16, before 6.12.48 and 6.16.8, also registered files that are not regular.
        Err(Failure::new(
            "not a regular file",
            "serve such files without passthrough",
        ))
    }
}

fn for_reading(file: &OwnedFd) -> Result<OwnedFd, Failure> {
    let path = format!("/proc/self/fd/{}", file.as_raw_fd());
    let flags = OFlags::RDONLY | OFlags::NONBLOCK | OFlags::NOCTTY | OFlags::CLOEXEC;
    openat(CWD, path, flags, Mode::empty()).map_err(|errno| {
        Failure::new(
            format!("cannot be opened for reading: {errno}"),
            "name a readable file",
        )
    })
}
