//! Converts attributes from statx(2) to FUSE, and times both ways.

use std::time::{Duration, SystemTime, UNIX_EPOCH};

use fuser::{FileAttr, INodeNo, TimeOrNow};
use rustix::fs::{FileType, Statx, StatxTimestamp, Timespec, UTIME_NOW, UTIME_OMIT, makedev};

/// The attributes of a source file, with `number` as its inode number.
pub(crate) fn attr(number: INodeNo, stat: &Statx) -> FileAttr {
    let mode = stat.stx_mode.into();
    FileAttr {
        ino: number,
        size: stat.stx_size,
        blocks: stat.stx_blocks,
        atime: system_time(&stat.stx_atime),
        mtime: system_time(&stat.stx_mtime),
        ctime: system_time(&stat.stx_ctime),
        crtime: UNIX_EPOCH, // macOS only, like `flags`
        kind: kind(FileType::from_raw_mode(mode)).unwrap_or(fuser::FileType::RegularFile),
        perm: stat.stx_mode & 0o7777,
        nlink: stat.stx_nlink,
        uid: stat.stx_uid,
        gid: stat.stx_gid,
        rdev: makedev(stat.stx_rdev_major, stat.stx_rdev_minor) as u32,
        blksize: stat.stx_blksize,
        flags: 0,
    }
}

/// `None` for `DT_UNKNOWN`.
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

/// Converts a time of SETATTR for utimensat(2).
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
        // The kernel sends -1.25 s as (-2 s, 0.75 s). fuser 0.18 turns that into 2.75 s before 1970, from
        // which both numbers can be recovered.
        Err(before) => Timespec {
            tv_sec: -(before.duration().as_secs() as i64),
            tv_nsec: before.duration().subsec_nanos().into(),
        },
    }
}

fn system_time(time: &StatxTimestamp) -> SystemTime {
    let whole = Duration::from_secs(time.tv_sec.unsigned_abs());
    let second = if time.tv_sec < 0 {
        UNIX_EPOCH - whole
    } else {
        UNIX_EPOCH + whole
    };
    second + Duration::from_nanos(time.tv_nsec.into())
}
