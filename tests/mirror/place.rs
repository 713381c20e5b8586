//! Calls that are made in a folder, and their outcomes as text that can be compared.
//!
//! A place is made the current directory before each call. So the same calls, with the same relative
//! paths, can be made at every place.

use std::ffi::CString;
use std::io::{IoSlice, IoSliceMut};
use std::mem::MaybeUninit;
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::process::ExitStatusExt;
use std::path::Path;
use std::process::Command;
use std::ptr::null_mut;
use std::time::{SystemTime, UNIX_EPOCH};

use rustix::fs::{
    self, Access, Advice, AtFlags, CWD, FallocateFlags, FileType, FlockOperation, Gid, MemfdFlags,
    Mode, OFlags, RawDir, RenameFlags, SeekFrom, Stat, StatxFlags, Timespec, Timestamps, Uid,
    XattrFlags,
};
use rustix::io::{self, Errno, ReadWriteFlags};
use rustix::net::{AddressFamily, SocketAddrUnix, SocketType};
use rustix::pipe::{PipeFlags, SpliceFlags};
use rustix::process::{Resource, Rlimit};

use crate::program;

/// What a call returned.
pub type Outcome = Result<String, Errno>;

/// An outcome in words.
pub fn describe(outcome: &Outcome) -> String {
    match outcome {
        Ok(value) if value.is_empty() => "ok".to_owned(),
        Ok(value) => value.clone(),
        Err(errno) => name(*errno),
    }
}

/// The name of an errno that calls on files return. Other errnos keep rustix's text.
fn name(errno: Errno) -> String {
    macro_rules! names {
        ($($name:ident)*) => {
            match errno {
                $(Errno::$name => concat!("E", stringify!($name)).to_owned(),)*
                other => other.to_string(),
            }
        };
    }
    // rustix has other names for these.
    match errno {
        Errno::ACCESS => return "EACCES".to_owned(),
        Errno::TOOBIG => return "E2BIG".to_owned(),
        _ => {}
    }
    names! {
        ADDRINUSE AGAIN BADF BUSY CONNABORTED CONNREFUSED DQUOT EXIST FAULT FBIG INTR INVAL IO ISDIR
        LOOP MFILE MLINK NAMETOOLONG NFILE NODATA NODEV NOENT NOEXEC NOLCK NOMEM NOSPC NOSYS NOTCONN
        NOTDIR NOTEMPTY NOTTY NXIO OPNOTSUPP OVERFLOW PERM PIPE RANGE ROFS SPIPE STALE
        TXTBSY XDEV
    }
}

fn done<T>(_: T) -> Outcome {
    Ok(String::new())
}

fn number(n: impl ToString) -> Outcome {
    Ok(n.to_string())
}

/// Short data as it is, longer data by its checksum.
fn data(data: &[u8]) -> String {
    if data.len() <= 64 {
        format!("\"{}\"", data.escape_ascii())
    } else {
        format!("{} bytes, crc32 {:08x}", data.len(), crc32fast::hash(data))
    }
}

/// A time to pass to a call.
pub const fn at(tv_sec: i64, tv_nsec: i64) -> Timespec {
    Timespec { tv_sec, tv_nsec }
}

/// A time as text. A time that a call has set is exact. A time within the last hour is `now`, since the two calls that
/// are compared are not made at the same time.
pub fn time(seconds: i64, nanoseconds: impl std::fmt::Display) -> String {
    const RECENT: i64 = 3600;
    let now = SystemTime::now().duration_since(UNIX_EPOCH);
    let now = now.map_or(0, |now| now.as_secs() as i64);
    if (seconds - now).abs() < RECENT {
        "now".to_owned()
    } else {
        format!("{seconds}.{nanoseconds:0>9}")
    }
}

/// The attributes that are equal for files made by the same calls.
pub fn attributes(stat: &Stat) -> String {
    format!(
        "{:?} {:o} nlink {} uid {} gid {} size {} rdev {:#x} blksize {}",
        FileType::from_raw_mode(stat.st_mode),
        stat.st_mode & 0o7777,
        stat.st_nlink,
        stat.st_uid,
        stat.st_gid,
        stat.st_size,
        stat.st_rdev,
        stat.st_blksize,
    )
}

/// The number of slots. Calls name a file descriptor by the number of its slot.
const SLOTS: usize = 4;

pub struct Place {
    root: OwnedFd,
    /// Where calls are made: a folder in the root, or the root itself.
    folder: OwnedFd,
    fds: [Option<OwnedFd>; SLOTS],
}

impl Place {
    pub fn new(root: &Path) -> io::Result<Self> {
        let open = || fs::open(root, OFlags::PATH | OFlags::CLOEXEC, Mode::empty());
        Ok(Self {
            root: open()?,
            folder: open()?,
            fds: Default::default(),
        })
    }

    /// Closes all files, and makes a new folder for the calls that follow.
    pub fn make_folder(&mut self, name: &str) -> Outcome {
        self.fds = Default::default();
        fs::mkdirat(&self.root, name, Mode::from_raw_mode(0o755))?;
        let flags = OFlags::PATH | OFlags::CLOEXEC;
        self.folder = fs::openat(&self.root, name, flags, Mode::empty())?;
        done(())
    }

    /// Makes a call here.
    pub fn make(&mut self, call: fn(&mut Self) -> Outcome) -> Outcome {
        rustix::process::fchdir(&self.folder)?;
        call(self)
    }

    fn fd(&self, slot: usize) -> Result<&OwnedFd, Errno> {
        self.fds[slot].as_ref().ok_or(Errno::BADF)
    }

    fn put(&mut self, slot: usize, fd: OwnedFd) -> Outcome {
        self.fds[slot] = Some(fd);
        done(())
    }
}

/// Opening and closing.
impl Place {
    pub fn open(&mut self, slot: usize, path: &str, flags: OFlags) -> Outcome {
        self.create(slot, path, flags, 0o644)
    }

    pub fn create(&mut self, slot: usize, path: &str, flags: OFlags, mode: u32) -> Outcome {
        self.fds[slot] = None;
        let mode = Mode::from_raw_mode(mode);
        let fd = fs::open(path, flags | OFlags::CLOEXEC, mode)?;
        self.put(slot, fd)
    }

    /// Opens the file of another slot once more, through /proc.
    pub fn reopen(&mut self, slot: usize, from: usize, flags: OFlags) -> Outcome {
        let path = format!("/proc/self/fd/{}", self.fd(from)?.as_raw_fd());
        self.open(slot, &path, flags)
    }

    pub fn close(&mut self, slot: usize) -> Outcome {
        done(self.fds[slot].take().ok_or(Errno::BADF)?)
    }

    pub fn dup(&mut self, slot: usize, from: usize) -> Outcome {
        let fd = io::fcntl_dupfd_cloexec(self.fd(from)?, 0)?;
        self.put(slot, fd)
    }

    /// Makes a new file with this content.
    pub fn file(&mut self, path: &str, content: &[u8]) -> Outcome {
        let flags = OFlags::WRONLY | OFlags::CREATE | OFlags::EXCL | OFlags::CLOEXEC;
        let file = fs::open(path, flags, Mode::from_raw_mode(0o644))?;
        number(io::write(&file, content)?)
    }

    /// Reads a whole file.
    pub fn content(&mut self, path: &str) -> Outcome {
        let file = fs::open(path, OFlags::RDONLY | OFlags::CLOEXEC, Mode::empty())?;
        let mut content = Vec::with_capacity(1 << 20);
        while io::read(&file, rustix::buffer::spare_capacity(&mut content))? > 0 {
            content.reserve(1 << 16);
        }
        Ok(data(&content))
    }

    pub fn getfl(&mut self, slot: usize) -> Outcome {
        Ok(format!("{:#o}", fs::fcntl_getfl(self.fd(slot)?)?.bits()))
    }

    pub fn setfl(&mut self, slot: usize, flags: OFlags) -> Outcome {
        done(fs::fcntl_setfl(self.fd(slot)?, flags)?)
    }

    pub fn flock(&mut self, slot: usize, operation: FlockOperation) -> Outcome {
        done(fs::flock(self.fd(slot)?, operation)?)
    }

    pub fn lock(&mut self, slot: usize, operation: FlockOperation) -> Outcome {
        done(fs::fcntl_lock(self.fd(slot)?, operation)?)
    }

    pub fn ioctl_getflags(&mut self, slot: usize) -> Outcome {
        done(fs::ioctl_getflags(self.fd(slot)?)?)
    }

    pub fn ioctl_ficlone(&mut self, to: usize, from: usize) -> Outcome {
        done(fs::ioctl_ficlone(self.fd(to)?, self.fd(from)?)?)
    }
}

/// Reading and writing.
impl Place {
    pub fn read(&mut self, slot: usize, len: usize) -> Outcome {
        let mut buffer = vec![0; len];
        let len = io::read(self.fd(slot)?, &mut buffer[..])?;
        Ok(data(&buffer[..len]))
    }

    pub fn pread(&mut self, slot: usize, len: usize, offset: u64) -> Outcome {
        let mut buffer = vec![0; len];
        let len = io::pread(self.fd(slot)?, &mut buffer[..], offset)?;
        Ok(data(&buffer[..len]))
    }

    pub fn readv(&mut self, slot: usize, first: usize, second: usize) -> Outcome {
        let (mut one, mut two) = (vec![0; first], vec![0; second]);
        let mut buffers = [IoSliceMut::new(&mut one), IoSliceMut::new(&mut two)];
        let len = io::readv(self.fd(slot)?, &mut buffers)?;
        Ok(format!("{len}: {}, {}", data(&one), data(&two)))
    }

    pub fn preadv2(&mut self, slot: usize, offset: u64, flags: ReadWriteFlags) -> Outcome {
        let (mut one, mut two) = ([0; 3], [0; 5]);
        let mut buffers = [IoSliceMut::new(&mut one), IoSliceMut::new(&mut two)];
        let len = io::preadv2(self.fd(slot)?, &mut buffers, offset, flags)?;
        Ok(format!("{len}: {}, {}", data(&one), data(&two)))
    }

    pub fn write(&mut self, slot: usize, data: &[u8]) -> Outcome {
        number(io::write(self.fd(slot)?, data)?)
    }

    pub fn pwrite(&mut self, slot: usize, data: &[u8], offset: u64) -> Outcome {
        number(io::pwrite(self.fd(slot)?, data, offset)?)
    }

    pub fn writev(&mut self, slot: usize, first: &[u8], second: &[u8]) -> Outcome {
        let buffers = [IoSlice::new(first), IoSlice::new(second)];
        number(io::writev(self.fd(slot)?, &buffers)?)
    }

    pub fn pwritev2(
        &mut self,
        slot: usize,
        data: &[u8],
        offset: u64,
        flags: ReadWriteFlags,
    ) -> Outcome {
        let buffers = [IoSlice::new(data)];
        number(io::pwritev2(self.fd(slot)?, &buffers, offset, flags)?)
    }

    /// Reads into memory at a page boundary, as `O_DIRECT` demands.
    pub fn pread_aligned(&mut self, slot: usize, len: usize, offset: u64) -> Outcome {
        let mut memory = vec![0; len + PAGE];
        let start = memory.as_ptr().align_offset(PAGE);
        let buffer = &mut memory[start..start + len];
        let len = io::pread(self.fd(slot)?, &mut *buffer, offset)?;
        Ok(data(&buffer[..len]))
    }

    pub fn pwrite_aligned(&mut self, slot: usize, byte: u8, len: usize, offset: u64) -> Outcome {
        let memory = vec![byte; len + PAGE];
        let start = memory.as_ptr().align_offset(PAGE);
        let buffer = &memory[start..start + len];
        number(io::pwrite(self.fd(slot)?, buffer, offset)?)
    }

    pub fn seek(&mut self, slot: usize, position: SeekFrom) -> Outcome {
        number(fs::seek(self.fd(slot)?, position)?)
    }

    pub fn fsync(&mut self, slot: usize) -> Outcome {
        done(fs::fsync(self.fd(slot)?)?)
    }

    pub fn fdatasync(&mut self, slot: usize) -> Outcome {
        done(fs::fdatasync(self.fd(slot)?)?)
    }

    pub fn syncfs(&mut self, slot: usize) -> Outcome {
        done(fs::syncfs(self.fd(slot)?)?)
    }

    pub fn fadvise(&mut self, slot: usize, advice: Advice) -> Outcome {
        done(fs::fadvise(self.fd(slot)?, 0, None, advice)?)
    }

    pub fn ftruncate(&mut self, slot: usize, size: u64) -> Outcome {
        done(fs::ftruncate(self.fd(slot)?, size)?)
    }

    #[allow(unsafe_code)]
    pub fn truncate(&mut self, path: &str, size: i64) -> Outcome {
        let path = CString::new(path).map_err(|_| Errno::INVAL)?;
        // SAFETY: `path` is a C string, alive during the call.
        match unsafe { libc::truncate(path.as_ptr(), size) } {
            0 => done(()),
            _ => Err(last_error()),
        }
    }

    pub fn fallocate(
        &mut self,
        slot: usize,
        mode: FallocateFlags,
        offset: u64,
        len: u64,
    ) -> Outcome {
        done(fs::fallocate(self.fd(slot)?, mode, offset, len)?)
    }

    pub fn blocks(&mut self, slot: usize) -> Outcome {
        number(fs::fstat(self.fd(slot)?)?.st_blocks)
    }
}

const PAGE: usize = 4096;

fn errno(error: std::io::Error) -> Errno {
    Errno::from_io_error(&error).unwrap_or(Errno::IO)
}

fn last_error() -> Errno {
    errno(std::io::Error::last_os_error())
}

/// A mapping of the first pages of a file. The file must not be truncated while the mapping exists: an
/// access beyond its end would kill the process.
struct Map {
    address: *mut u8,
    len: usize,
}

impl Map {
    #[allow(unsafe_code)]
    fn new(fd: &OwnedFd, len: usize, protection: i32, flags: i32) -> Result<Self, Errno> {
        // SAFETY: a new mapping, at an address that the kernel chooses.
        let address = unsafe { libc::mmap(null_mut(), len, protection, flags, fd.as_raw_fd(), 0) };
        if address == libc::MAP_FAILED {
            return Err(last_error());
        }
        let address = address.cast();
        Ok(Self { address, len })
    }

    #[allow(unsafe_code)]
    fn read(&self) -> String {
        // SAFETY: the mapping has `len` readable bytes. Nobody writes them meanwhile: this process makes one
        // call at a time, and only this test uses the file.
        data(unsafe { std::slice::from_raw_parts(self.address, self.len) })
    }

    #[allow(unsafe_code)]
    fn write(&self, offset: usize, data: &[u8]) {
        assert!(offset + data.len() <= self.len, "within the mapping");
        // SAFETY: within the mapping, as was just asserted.
        let to = unsafe { self.address.add(offset) };
        // SAFETY: every caller maps it writable, and `data` is not part of the mapping.
        unsafe { to.copy_from_nonoverlapping(data.as_ptr(), data.len()) };
    }

    #[allow(unsafe_code)]
    fn sync(&self) -> Result<(), Errno> {
        // SAFETY: `address` and `len` are those of the mapping.
        match unsafe { libc::msync(self.address.cast(), self.len, libc::MS_SYNC) } {
            0 => Ok(()),
            _ => Err(last_error()),
        }
    }
}

impl Drop for Map {
    #[allow(unsafe_code)]
    fn drop(&mut self) {
        // SAFETY: `address` and `len` are those of the mapping, and nothing refers to it any more.
        unsafe { libc::munmap(self.address.cast(), self.len) };
    }
}

/// Mapping, and moving data within the kernel.
impl Place {
    pub fn mmap_read(&mut self, slot: usize, len: usize) -> Outcome {
        let map = Map::new(self.fd(slot)?, len, libc::PROT_READ, libc::MAP_SHARED)?;
        Ok(map.read())
    }

    /// Writes to a private mapping, which must not change the file.
    pub fn mmap_private(&mut self, slot: usize, data: &[u8]) -> Outcome {
        let protection = libc::PROT_READ | libc::PROT_WRITE;
        let map = Map::new(self.fd(slot)?, PAGE, protection, libc::MAP_PRIVATE)?;
        map.write(0, data);
        Ok(map.read())
    }

    /// Writes through a shared mapping, syncs, and returns what the mapping has then.
    pub fn mmap_write(&mut self, slot: usize, len: usize, offset: usize, data: &[u8]) -> Outcome {
        let protection = libc::PROT_READ | libc::PROT_WRITE;
        let map = Map::new(self.fd(slot)?, len, protection, libc::MAP_SHARED)?;
        map.write(offset, data);
        map.sync()?;
        Ok(map.read())
    }

    /// Writes through the fd while the file is mapped. Returns what the mapping has before and after.
    pub fn mmap_sees_write(&mut self, slot: usize, data: &[u8], offset: u64) -> Outcome {
        let fd = self.fd(slot)?;
        let map = Map::new(fd, PAGE, libc::PROT_READ, libc::MAP_SHARED)?;
        let before = map.read();
        io::pwrite(fd, data, offset)?;
        Ok(format!("{before}, then {}", map.read()))
    }

    /// Writes through a mapping and reads through the fd, with nothing in between.
    pub fn read_sees_mmap(&mut self, slot: usize, data: &[u8], offset: usize) -> Outcome {
        let fd = self.fd(slot)?;
        let protection = libc::PROT_READ | libc::PROT_WRITE;
        let map = Map::new(fd, PAGE, protection, libc::MAP_SHARED)?;
        map.write(offset, data);
        self.pread(slot, PAGE, 0)
    }

    /// A file outside this place, in memory.
    pub fn memfd(&mut self, slot: usize, content: &[u8]) -> Outcome {
        let fd = fs::memfd_create("outside", MemfdFlags::CLOEXEC)?;
        io::pwrite(&fd, content, 0)?;
        self.put(slot, fd)
    }

    pub fn pipe(&mut self, reader: usize, writer: usize) -> Outcome {
        let (r, w) = rustix::pipe::pipe_with(PipeFlags::CLOEXEC | PipeFlags::NONBLOCK)?;
        self.put(reader, r)?;
        self.put(writer, w)
    }

    pub fn sendfile(
        &mut self,
        to: usize,
        from: usize,
        mut offset: Option<u64>,
        len: usize,
    ) -> Outcome {
        let (out, input) = (self.fd(to)?, self.fd(from)?);
        let sent = fs::sendfile(out, input, offset.as_mut(), len)?;
        Ok(format!("{sent}, at {offset:?}"))
    }

    pub fn splice(
        &mut self,
        (from, mut offset_in): (usize, Option<u64>),
        (to, mut offset_out): (usize, Option<u64>),
        len: usize,
    ) -> Outcome {
        let (input, out) = (self.fd(from)?, self.fd(to)?);
        let (at_in, at_out) = (offset_in.as_mut(), offset_out.as_mut());
        let flags = SpliceFlags::empty();
        let moved = rustix::pipe::splice(input, at_in, out, at_out, len, flags)?;
        Ok(format!("{moved}, at {offset_in:?}, {offset_out:?}"))
    }

    pub fn copy_file_range(
        &mut self,
        (from, mut offset_in): (usize, Option<u64>),
        (to, mut offset_out): (usize, Option<u64>),
        len: usize,
    ) -> Outcome {
        let (input, out) = (self.fd(from)?, self.fd(to)?);
        let (at_in, at_out) = (offset_in.as_mut(), offset_out.as_mut());
        let copied = fs::copy_file_range(input, at_in, out, at_out, len)?;
        Ok(format!("{copied}, at {offset_in:?}, {offset_out:?}"))
    }
}

/// Attributes.
impl Place {
    pub fn stat(&mut self, path: &str) -> Outcome {
        Ok(attributes(&fs::stat(path)?))
    }

    pub fn lstat(&mut self, path: &str) -> Outcome {
        Ok(attributes(&fs::lstat(path)?))
    }

    pub fn fstat(&mut self, slot: usize) -> Outcome {
        Ok(attributes(&fs::fstat(self.fd(slot)?)?))
    }

    pub fn statx(&mut self, path: &str, flags: AtFlags) -> Outcome {
        let mask = StatxFlags::BASIC_STATS;
        let statx = fs::statx(CWD, path, flags, mask)?;
        let rdev = (statx.stx_rdev_major, statx.stx_rdev_minor);
        Ok(format!(
            "mask {:#x} mode {:o} nlink {} uid {} gid {} size {} rdev {rdev:?} blksize {}",
            statx.stx_mask & mask.bits(),
            statx.stx_mode,
            statx.stx_nlink,
            statx.stx_uid,
            statx.stx_gid,
            statx.stx_size,
            statx.stx_blksize,
        ))
    }

    /// Whether statx(2) returns a birth time.
    pub fn statx_btime(&mut self, path: &str) -> Outcome {
        let statx = fs::statx(CWD, path, AtFlags::empty(), StatxFlags::BTIME)?;
        number(statx.stx_mask & StatxFlags::BTIME.bits() != 0)
    }

    pub fn times(&mut self, path: &str) -> Outcome {
        let stat = fs::lstat(path)?;
        Ok(format!(
            "atime {} mtime {} ctime {}",
            time(stat.st_atime, stat.st_atime_nsec),
            time(stat.st_mtime, stat.st_mtime_nsec),
            time(stat.st_ctime, stat.st_ctime_nsec),
        ))
    }

    pub fn utimens(
        &mut self,
        path: &str,
        atime: Timespec,
        mtime: Timespec,
        flags: AtFlags,
    ) -> Outcome {
        let times = Timestamps {
            last_access: atime,
            last_modification: mtime,
        };
        done(fs::utimensat(CWD, path, &times, flags)?)
    }

    pub fn futimens(&mut self, slot: usize, atime: Timespec, mtime: Timespec) -> Outcome {
        let times = Timestamps {
            last_access: atime,
            last_modification: mtime,
        };
        done(fs::futimens(self.fd(slot)?, &times)?)
    }

    pub fn chmod(&mut self, path: &str, mode: u32) -> Outcome {
        done(fs::chmod(path, Mode::from_raw_mode(mode))?)
    }

    pub fn fchmod(&mut self, slot: usize, mode: u32) -> Outcome {
        done(fs::fchmod(self.fd(slot)?, Mode::from_raw_mode(mode))?)
    }

    pub fn chown(&mut self, path: &str, uid: Option<u32>, gid: Option<u32>) -> Outcome {
        let (uid, gid) = (uid.map(Uid::from_raw), gid.map(Gid::from_raw));
        done(fs::chown(path, uid, gid)?)
    }

    pub fn lchown(&mut self, path: &str, uid: Option<u32>, gid: Option<u32>) -> Outcome {
        let (uid, gid) = (uid.map(Uid::from_raw), gid.map(Gid::from_raw));
        done(fs::chownat(CWD, path, uid, gid, AtFlags::SYMLINK_NOFOLLOW)?)
    }

    pub fn fchown(&mut self, slot: usize, uid: Option<u32>, gid: Option<u32>) -> Outcome {
        let (uid, gid) = (uid.map(Uid::from_raw), gid.map(Gid::from_raw));
        done(fs::fchown(self.fd(slot)?, uid, gid)?)
    }

    pub fn access(&mut self, path: &str, access: Access) -> Outcome {
        done(fs::access(path, access)?)
    }

    /// The fields that do not change with other use of the filesystem.
    pub fn statfs(&mut self, path: &str) -> Outcome {
        let stat = fs::statvfs(path)?;
        Ok(format!(
            "bsize {} frsize {} blocks {} files {} namemax {}",
            stat.f_bsize, stat.f_frsize, stat.f_blocks, stat.f_files, stat.f_namemax,
        ))
    }

    pub fn fstatfs(&mut self, slot: usize) -> Outcome {
        let stat = fs::fstatvfs(self.fd(slot)?)?;
        Ok(format!("bsize {} blocks {}", stat.f_bsize, stat.f_blocks))
    }
}

/// Names.
impl Place {
    pub fn link(&mut self, old: &str, new: &str) -> Outcome {
        done(fs::linkat(CWD, old, CWD, new, AtFlags::empty())?)
    }

    pub fn link_following(&mut self, old: &str, new: &str) -> Outcome {
        done(fs::linkat(CWD, old, CWD, new, AtFlags::SYMLINK_FOLLOW)?)
    }

    /// Gives an open file another name.
    pub fn flink(&mut self, slot: usize, new: &str) -> Outcome {
        done(fs::linkat(
            self.fd(slot)?,
            "",
            CWD,
            new,
            AtFlags::EMPTY_PATH,
        )?)
    }

    pub fn symlink(&mut self, target: &str, link: &str) -> Outcome {
        done(fs::symlink(target, link)?)
    }

    pub fn readlink(&mut self, path: &str) -> Outcome {
        Ok(data(fs::readlink(path, Vec::new())?.as_bytes()))
    }

    pub fn rename(&mut self, old: &str, new: &str) -> Outcome {
        done(fs::rename(old, new)?)
    }

    pub fn renameat2(&mut self, old: &str, new: &str, flags: RenameFlags) -> Outcome {
        done(fs::renameat_with(CWD, old, CWD, new, flags)?)
    }

    pub fn unlink(&mut self, path: &str) -> Outcome {
        done(fs::unlink(path)?)
    }

    pub fn rmdir(&mut self, path: &str) -> Outcome {
        done(fs::rmdir(path)?)
    }

    pub fn mkdir(&mut self, path: &str, mode: u32) -> Outcome {
        done(fs::mkdir(path, Mode::from_raw_mode(mode))?)
    }

    pub fn mknod(&mut self, path: &str, kind: FileType, mode: u32, rdev: (u32, u32)) -> Outcome {
        let mode = Mode::from_raw_mode(mode);
        let rdev = fs::makedev(rdev.0, rdev.1);
        done(fs::mknodat(CWD, path, kind, mode, rdev)?)
    }

    /// Makes new empty files, whose names are numbers.
    pub fn make_many(&mut self, folder: &str, count: usize) -> Outcome {
        let flags = OFlags::WRONLY | OFlags::CREATE | OFlags::EXCL | OFlags::CLOEXEC;
        for n in 0..count {
            let path = format!("{folder}/{n:04}");
            fs::open(path, flags, Mode::from_raw_mode(0o644))?;
        }
        done(())
    }

    /// Removes all files of a folder while it is being listed.
    pub fn remove_all(&mut self, folder: &str) -> Outcome {
        let mut removed = 0;
        let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
        let dir = fs::open(folder, flags, Mode::empty())?;
        for (name, _, _) in entries(&dir)? {
            if name != "." && name != ".." {
                fs::unlinkat(&dir, name.as_str(), AtFlags::empty())?;
                removed += 1;
            }
        }
        number(removed)
    }

    /// The names and types of a directory's entries, sorted.
    pub fn list(&mut self, path: &str) -> Outcome {
        let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
        let dir = fs::open(path, flags, Mode::empty())?;
        Ok(listing(entries(&dir)?))
    }

    /// The entries of an open directory that are not listed yet.
    pub fn getdents(&mut self, slot: usize) -> Outcome {
        Ok(listing(entries(self.fd(slot)?)?))
    }

    /// Lists a directory, seeks to the position after the entry of that number, and counts the entries
    /// that follow.
    pub fn list_from(&mut self, path: &str, number: usize) -> Outcome {
        let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
        let dir = fs::open(path, flags, Mode::empty())?;
        let all = entries(&dir)?;
        let cookie = all.get(number).ok_or(Errno::NOENT)?.2;
        fs::seek(&dir, SeekFrom::Start(cookie))?;
        let rest = entries(&dir)?;
        let names = |entries: &[Entry]| -> Vec<_> { entries.iter().map(|e| e.0.clone()).collect() };
        let same = names(&rest) == names(&all[number + 1..]);
        Ok(format!("{} of {}, the same: {same}", rest.len(), all.len()))
    }
}

/// Name, type, and the position of the next entry.
type Entry = (String, FileType, u64);

fn entries(dir: &OwnedFd) -> Result<Vec<Entry>, Errno> {
    let mut buffer = [MaybeUninit::uninit(); 4096];
    let mut entries = RawDir::new(dir, &mut buffer);
    let mut all = Vec::new();
    while let Some(entry) = entries.next() {
        let entry = entry?;
        let name = entry.file_name().to_string_lossy().into_owned();
        all.push((name, entry.file_type(), entry.next_entry_cookie()));
    }
    Ok(all)
}

fn listing(mut entries: Vec<Entry>) -> String {
    entries.sort_by(|a, b| a.0.cmp(&b.0));
    let entries: Vec<_> = entries
        .iter()
        .map(|(name, kind, _)| format!("{name} {kind:?}"))
        .collect();
    if entries.len() <= 16 {
        format!("[{}]", entries.join(", "))
    } else {
        let all = data(entries.join("\n").as_bytes());
        format!("{} entries: {all}", entries.len())
    }
}

/// Extended attributes.
impl Place {
    pub fn setxattr(&mut self, path: &str, name: &str, value: &[u8], flags: XattrFlags) -> Outcome {
        done(fs::setxattr(path, name, value, flags)?)
    }

    pub fn lsetxattr(&mut self, path: &str, name: &str, value: &[u8]) -> Outcome {
        done(fs::lsetxattr(path, name, value, XattrFlags::empty())?)
    }

    pub fn fsetxattr(&mut self, slot: usize, name: &str, value: &[u8]) -> Outcome {
        let fd = self.fd(slot)?;
        done(fs::fsetxattr(fd, name, value, XattrFlags::empty())?)
    }

    /// Reads with a buffer of `size` bytes, or asks for the size of the value if `size` is 0.
    pub fn getxattr(&mut self, path: &str, name: &str, size: usize) -> Outcome {
        if size == 0 {
            return number(fs::getxattr_query(path, name)?);
        }
        let mut buffer = vec![0; size];
        let len = fs::getxattr(path, name, &mut buffer[..])?;
        Ok(data(&buffer[..len]))
    }

    pub fn lgetxattr(&mut self, path: &str, name: &str, size: usize) -> Outcome {
        let mut buffer = vec![0; size];
        let len = fs::lgetxattr(path, name, &mut buffer[..])?;
        Ok(data(&buffer[..len]))
    }

    pub fn fgetxattr(&mut self, slot: usize, name: &str, size: usize) -> Outcome {
        let mut buffer = vec![0; size];
        let len = fs::fgetxattr(self.fd(slot)?, name, &mut buffer[..])?;
        Ok(data(&buffer[..len]))
    }

    pub fn listxattr(&mut self, path: &str, size: usize) -> Outcome {
        if size == 0 {
            return number(fs::listxattr_query(path)?);
        }
        let mut buffer = vec![0; size];
        let len = fs::listxattr(path, &mut buffer[..])?;
        Ok(names(&buffer[..len]))
    }

    pub fn flistxattr(&mut self, slot: usize, size: usize) -> Outcome {
        let mut buffer = vec![0; size];
        let len = fs::flistxattr(self.fd(slot)?, &mut buffer[..])?;
        Ok(names(&buffer[..len]))
    }

    pub fn removexattr(&mut self, path: &str, name: &str) -> Outcome {
        done(fs::removexattr(path, name)?)
    }

    pub fn fremovexattr(&mut self, slot: usize, name: &str) -> Outcome {
        done(fs::fremovexattr(self.fd(slot)?, name)?)
    }
}

/// Attribute names, sorted: filesystems list them in different orders.
fn names(list: &[u8]) -> String {
    let mut names: Vec<_> = list
        .split_inclusive(|byte| *byte == 0)
        .map(|name| name.escape_ascii().to_string())
        .collect();
    names.sort();
    format!("[{}]", names.join(", "))
}

/// Sockets, programs, and the user and limits of the calls.
impl Place {
    /// A listening socket of that name.
    pub fn bind(&mut self, slot: usize, path: &str) -> Outcome {
        let socket = rustix::net::socket(AddressFamily::UNIX, SocketType::STREAM, None)?;
        rustix::net::bind(&socket, &SocketAddrUnix::new(path)?)?;
        rustix::net::listen(&socket, 1)?;
        self.put(slot, socket)
    }

    pub fn connect(&mut self, slot: usize, path: &str) -> Outcome {
        let socket = rustix::net::socket(AddressFamily::UNIX, SocketType::STREAM, None)?;
        rustix::net::connect(&socket, &SocketAddrUnix::new(path)?)?;
        self.put(slot, socket)
    }

    /// Copies a program from `PATH`.
    pub fn program(&mut self, name: &str, path: &str) -> Outcome {
        let program = program::in_path(name).ok_or(Errno::NOENT)?;
        done(std::fs::copy(program, path).map_err(errno)?)
    }

    /// Runs a program, and returns its exit status and output.
    pub fn run(&mut self, path: &str, args: &str) -> Outcome {
        let mut command = Command::new(path);
        let output = command.args(args.split_whitespace()).output();
        let output = output.map_err(errno)?;
        let signal = output.status.signal();
        Ok(format!(
            "{:?}, {signal:?}, {}",
            output.status.code(),
            data(&output.stdout)
        ))
    }

    /// Makes the calls that follow as another user.
    pub fn become_user(&mut self, uid: u32, gid: u32, groups: &[u32]) -> Outcome {
        self.become_root()?;
        let groups: Vec<_> = groups.iter().map(|&gid| Gid::from_raw(gid)).collect();
        rustix::thread::set_thread_groups(&groups)?;
        let (uid, gid) = (Uid::from_raw(uid), Gid::from_raw(gid));
        rustix::thread::set_thread_res_gid(gid, gid, Gid::ROOT)?;
        done(rustix::thread::set_thread_res_uid(uid, uid, Uid::ROOT)?)
    }

    pub fn become_root(&mut self) -> Outcome {
        rustix::thread::set_thread_res_uid(Uid::ROOT, Uid::ROOT, Uid::ROOT)?;
        rustix::thread::set_thread_res_gid(Gid::ROOT, Gid::ROOT, Gid::ROOT)?;
        done(rustix::thread::set_thread_groups(&[])?)
    }

    pub fn umask(&mut self, mask: u32) -> Outcome {
        // The old umask is not compared: the other place, in the same process, has set it.
        done(rustix::process::umask(Mode::from_raw_mode(mask)))
    }

    /// Limits how large this process may make a file.
    #[allow(unsafe_code)]
    pub fn limit_file_size(&mut self, current: Option<u64>) -> Outcome {
        // SAFETY: SIG_IGN installs no handler. The signal comes with EFBIG, and would end the process.
        unsafe { libc::signal(libc::SIGXFSZ, libc::SIG_IGN) };
        let maximum = rustix::process::getrlimit(Resource::Fsize).maximum;
        let limit = Rlimit { current, maximum };
        done(rustix::process::setrlimit(Resource::Fsize, limit)?)
    }
}
