//! Attributes: from stat(2) to the kernel's, and times both ways.

use std::time::{Duration, SystemTime, UNIX_EPOCH};

use fuser::{FileAttr, INodeNo, TimeOrNow};
use rustix::fs::{FileType, Stat, Timespec, UTIME_NOW, UTIME_OMIT};

/// The attributes of the source file, under the nodeid that the kernel knows it by.
pub(crate) fn attr(nodeid: INodeNo, stat: &Stat) -> FileAttr {
    FileAttr {
        ino: nodeid,
        size: stat.st_size as u64,
        blocks: stat.st_blocks as u64,
        atime: system_time(stat.st_atime, stat.st_atime_nsec as u32),
        mtime: system_time(stat.st_mtime, stat.st_mtime_nsec as u32),
        ctime: system_time(stat.st_ctime, stat.st_ctime_nsec as u32),
        crtime: UNIX_EPOCH, // macOS only, as `flags` is
        kind: kind(FileType::from_raw_mode(stat.st_mode)).unwrap_or(fuser::FileType::RegularFile),
        perm: (stat.st_mode & 0o7777) as u16,
        nlink: stat.st_nlink as u32,
        uid: stat.st_uid,
        gid: stat.st_gid,
        rdev: stat.st_rdev as u32,
        blksize: stat.st_blksize as u32,
        flags: 0,
    }
}

/// `None` for a type that a directory entry did not tell.
pub(crate) fn kind(file_type: FileType) -> Option<fuser::FileType> {
    match file_type {
        FileType::RegularFile => Some(fuser::FileType::RegularFile),
        FileType::Directory => Some(fuser::FileType::Directory),
        FileType::Symlink => Some(fuser::FileType::Symlink),
        FileType::Fifo => Some(fuser::FileType::NamedPipe),
        FileType::Socket => Some(fuser::FileType::Socket),
        FileType::CharacterDevice => Some(fuser::FileType::CharDevice),
        FileType::BlockDevice => Some(fuser::FileType::BlockDevice),
        FileType::Unknown => None,
    }
}

/// A time of SETATTR, for utimensat(2).
pub(crate) fn timespec(time: Option<TimeOrNow>) -> Timespec {
    let special = |tv_nsec| Timespec { tv_sec: 0, tv_nsec };
    let time = match time {
        None => return special(UTIME_OMIT),
        Some(TimeOrNow::Now) => return special(UTIME_NOW),
        Some(TimeOrNow::SpecificTime(time)) => time,
    };
    match time.duration_since(UNIX_EPOCH) {
        Ok(since) => Timespec {
            tv_sec: since.as_secs() as i64,
            tv_nsec: since.subsec_nanos().into(),
        },
        // The request had -1.25 s as (-2 s, 0.75 s). fuser 0.18 makes that 2.75 s before 1970, so
        // that the two numbers can be taken apart again as they were.
        Err(before) => Timespec {
            tv_sec: -(before.duration().as_secs() as i64),
            tv_nsec: before.duration().subsec_nanos().into(),
        },
    }
}

fn system_time(seconds: i64, nanoseconds: u32) -> SystemTime {
    let whole = Duration::from_secs(seconds.unsigned_abs());
    let second = if seconds < 0 {
        UNIX_EPOCH - whole
    } else {
        UNIX_EPOCH + whole
    };
    second + Duration::from_nanos(nanoseconds.into())
}
