//! The filesystem: each request becomes the same call on the source tree.
//!
//! A request names inodes, which are fds here, and single names below them. The server follows no
//! symbolic link, and every error is the errno of its own call.

use std::ffi::OsStr;
use std::mem::MaybeUninit;
use std::os::fd::OwnedFd;
use std::os::unix::ffi::OsStrExt;
use std::path::Path;
use std::sync::atomic::Ordering;
use std::sync::{Arc, PoisonError};
use std::time::{Duration, SystemTime};

use fuse_backing::Opened;
use fuser::{
    BsdFileFlags, CopyFileRangeFlags, FileAttr, FileHandle, Filesystem, FopenFlags, Generation,
    INodeNo, InitFlags, KernelConfig, LockOwner, ReplyAttr, ReplyCreate, ReplyData, ReplyDirectory,
    ReplyEmpty, ReplyEntry, ReplyLseek, ReplyOpen, ReplyStatfs, ReplyWrite, ReplyXattr, Request,
    TimeOrNow, WriteFlags,
};
use rustix::fs::{
    AtFlags, CWD, FallocateFlags, FileType, Gid, Mode, OFlags, RawDir, RenameFlags, SeekFrom,
    Timestamps, Uid, XattrFlags,
};
use rustix::io::{Errno, ReadWriteFlags};

use crate::attr::{attr, kind, timespec};
use crate::dirs::Dirs;
use crate::inodes::{Inode, Inodes};
use crate::on_behalf;
use crate::opens::{self, Device, Files, OpenFile};
use crate::source::{self, proc_path};
use crate::status::Status;

type Result<T> = std::result::Result<T, Errno>;

/// Nothing is cached: the source may change behind the mirror, and passthrough writes change it
/// without a word to the server.
const TTL: Duration = Duration::ZERO;

/// Nodeids are never reused, see [`Inodes`].
const GENERATION: Generation = Generation(0);

/// The inode number of a directory entry that the kernel was not told of. libfuse's choice too.
const UNKNOWN_INODE: INodeNo = INodeNo(0xffff_ffff);

const ACCESS_ACL: &str = "system.posix_acl_access";

pub(crate) struct Mirror {
    inodes: Inodes,
    files: Arc<Files>,
    dirs: Dirs,
    /// Until INIT, if passthrough is wanted.
    device: Option<Device>,
    killpriv: bool,
    /// Files that were opened with `O_DIRECT` can be mapped all the same.
    can_map_direct: bool,
    /// The kernel checks POSIX ACLs, and leaves the umask to the server.
    acl: bool,
    status: Arc<Status>,
}

impl Mirror {
    /// `source` is an fd of the directory that becomes the root, `device` that of the session to
    /// come, if passthrough is wanted.
    pub(crate) fn new(source: OwnedFd, device: Option<Device>, killpriv: bool) -> Result<Self> {
        let files = Arc::new(Files::default());
        let status = Arc::new(Status::of(Arc::downgrade(&files)));
        Ok(Self {
            inodes: Inodes::new(source)?,
            files,
            dirs: Dirs::default(),
            device,
            killpriv,
            can_map_direct: false,
            acl: false,
            status,
        })
    }

    pub(crate) fn status(&self) -> Arc<Status> {
        Arc::clone(&self.status)
    }

    /// One lookup of `name`, to be replied to.
    fn find(&self, parent: &Inode, name: &OsStr) -> Result<FileAttr> {
        self.remember(source::path_fd(parent, name)?)
    }

    fn remember(&self, fd: OwnedFd) -> Result<FileAttr> {
        let (nodeid, stat) = self.inodes.remember(fd)?;
        Ok(attr(nodeid, &stat))
    }

    fn attributes(&self, nodeid: INodeNo) -> Result<FileAttr> {
        let inode = self.inodes.get(nodeid)?;
        Ok(attr(nodeid, &rustix::fs::fstat(&inode)?))
    }

    /// The mode for a new file in `parent`. A default ACL takes the place of the umask.
    fn creation_mode(&self, parent: &Inode, mode: u32, umask: u32) -> Mode {
        // Without ACL support the kernel has applied the umask already.
        if !self.acl || source::has_default_acl(parent) {
            Mode::from_raw_mode(mode)
        } else {
            Mode::from_raw_mode(mode & !umask)
        }
    }

    /// Opens a file that the kernel knows. The server opens it itself first, with the client's
    /// flags: that is where ETXTBSY, EROFS or EINVAL come from, which the kernel's own open of the
    /// backing file would turn into EIO.
    fn open_file(&self, nodeid: INodeNo, flags: OFlags) -> Result<Opened> {
        let inode = self.inodes.get(nodeid)?;
        let file = rustix::fs::open(
            proc_path(&inode),
            source::server_flags(flags),
            Mode::empty(),
        )?;
        self.opened(nodeid, &inode, file, flags)
    }

    fn create_file(
        &self,
        req: &Request,
        parent: INodeNo,
        name: &OsStr,
        mode: (u32, u32),
        flags: OFlags,
    ) -> Result<(FileAttr, Opened)> {
        let parent = self.inodes.get(parent)?;
        let mode = self.creation_mode(&parent, mode.0, mode.1);
        // Always exclusively: nobody has checked the client's permissions on a file that exists.
        // If one has appeared since the kernel looked, ESTALE makes it look again, and then check
        // and OPEN that file.
        let exclusive = OFlags::CREATE | OFlags::EXCL | OFlags::NOFOLLOW;
        let exclusively = source::server_flags(flags) | exclusive;
        let open = || rustix::fs::openat(&parent, name, exclusively, mode);
        let file = on_behalf::make(req, open).map_err(|errno| match errno {
            Errno::EXIST if !flags.contains(OFlags::EXCL) => Errno::STALE,
            errno => errno,
        })?;
        self.created(file, flags).inspect_err(|_| {
            let _ = rustix::fs::unlinkat(&parent, name, AtFlags::empty());
        })
    }

    fn created(&self, file: OwnedFd, flags: OFlags) -> Result<(FileAttr, Opened)> {
        let attr = self.remember(source::path_fd_of(&file)?)?;
        let opened = self
            .inodes
            .get(attr.ino)
            .and_then(|inode| self.opened(attr.ino, &inode, file, flags))
            .inspect_err(|_| self.inodes.forget(attr.ino, 1))?;
        Ok((attr, opened))
    }

    fn opened(
        &self,
        nodeid: INodeNo,
        inode: &Inode,
        file: OwnedFd,
        flags: OFlags,
    ) -> Result<Opened> {
        // The server reads and writes what the page cache asks for, at any alignment and offset.
        // (An append-only file does not let go of O_APPEND, and is never written elsewhere.)
        if flags.intersects(OFlags::DIRECT | OFlags::APPEND) {
            if let Ok(set) = rustix::fs::fcntl_getfl(&file) {
                let _ = rustix::fs::fcntl_setfl(&file, set - OFlags::DIRECT - OFlags::APPEND);
            }
        }
        let asked = opens::reply_flags(flags, self.can_map_direct);
        let file = opens::opened(inode, file, flags);
        Ok(self.files.open(&nodeid, flags, file, asked)?)
    }

    /// An open file.
    fn handle(&self, handle: FileHandle) -> Result<Arc<OpenFile>> {
        self.files.get(handle.0).ok_or(Errno::BADF)
    }

    fn set_attributes(&self, req: &Request, nodeid: INodeNo, set: &SetAttr) -> Result<FileAttr> {
        let inode = self.inodes.get(nodeid)?;
        // The owner before the mode, since a change of owner takes setuid and setgid away; the size
        // before the times, since it sets them.
        if set.uid.is_some() || set.gid.is_some() {
            let (uid, gid) = (set.uid.map(Uid::from_raw), set.gid.map(Gid::from_raw));
            let group = rustix::fs::fstat(&inode)?.st_gid;
            on_behalf::change_rights(req, group, || {
                rustix::fs::chownat(&inode, "", uid, gid, AtFlags::EMPTY_PATH)
            })?;
        }
        if let Some(mode) = set.mode {
            rustix::fs::chmod(proc_path(&inode), Mode::from_raw_mode(mode))?;
        }
        if let Some(size) = set.size {
            let truncate = |file: &OwnedFd| {
                let kill = on_behalf::kills_setid(req);
                on_behalf::write(req, kill, || rustix::fs::ftruncate(file, size))
            };
            match set.handle {
                Some(handle) => truncate(&self.handle(handle)?.file)?,
                None => truncate(&source::open_for_writing(&inode)?)?,
            }
        }
        if set.atime.is_some() || set.mtime.is_some() {
            let times = Timestamps {
                last_access: timespec(set.atime),
                last_modification: timespec(set.mtime),
            };
            rustix::fs::utimensat(&inode, "", &times, AtFlags::EMPTY_PATH)?;
        }
        self.attributes(nodeid)
    }

    fn open_dir(&self, nodeid: INodeNo) -> Result<FileHandle> {
        let inode = self.inodes.get(nodeid)?;
        let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
        let dir = rustix::fs::openat(&inode, ".", flags, Mode::empty())?;
        Ok(self.dirs.insert(dir))
    }

    /// Adds the entries from `offset` on. Offsets are the source's own, good for as long as the
    /// directory is open: what did not fit into the reply is read again by the next request.
    fn read_dir(&self, handle: FileHandle, offset: u64, reply: &mut ReplyDirectory) -> Result<()> {
        let dir = self.dirs.get(handle)?;
        let dir = dir.lock().unwrap_or_else(PoisonError::into_inner);
        let dev = rustix::fs::fstat(&*dir)?.st_dev;
        rustix::fs::seek(&*dir, SeekFrom::Start(offset))?;
        let mut buffer = [MaybeUninit::uninit(); 4096];
        let mut entries = RawDir::new(&*dir, &mut buffer);
        while let Some(entry) = entries.next() {
            let entry = entry?;
            let Some(kind) = kind(entry.file_type()).or_else(|| {
                // The filesystem keeps no types in its directories.
                let name = entry.file_name();
                let stat = rustix::fs::statat(&*dir, name, AtFlags::SYMLINK_NOFOLLOW).ok()?;
                kind(FileType::from_raw_mode(stat.st_mode))
            }) else {
                continue; // Gone in the meantime.
            };
            let nodeid = self
                .inodes
                .nodeid(dev, entry.ino())
                .unwrap_or(UNKNOWN_INODE);
            let name = OsStr::from_bytes(entry.file_name().to_bytes());
            if reply.add(nodeid, entry.next_entry_cookie(), kind, name) {
                break;
            }
        }
        Ok(())
    }

    fn read_at(&self, handle: FileHandle, offset: u64, size: u32) -> Result<Vec<u8>> {
        let open = self.handle(handle)?;
        let mut data = Vec::with_capacity(size as usize);
        let unused = rustix::buffer::spare_capacity(&mut data);
        rustix::io::pread(&open.file, unused, offset)?;
        Ok(data)
    }

    fn write_at(
        &self,
        req: &Request,
        handle: FileHandle,
        offset: u64,
        data: &[u8],
        flags: (OFlags, WriteFlags),
    ) -> Result<usize> {
        let (open_flags, write_flags) = flags;
        let open = self.handle(handle)?;
        // Pages that were written through a mapping go where they belong, also if the file that the kernel chose for
        // them is open for appending.
        if write_flags.contains(WriteFlags::FUSE_WRITE_CACHE) {
            return on_behalf::write_pages(|| rustix::io::pwrite(&open.file, data, offset));
        }
        let kill = write_flags.contains(WriteFlags::FUSE_WRITE_KILL_SUIDGID);
        on_behalf::write(req, kill, || {
            if open_flags.contains(OFlags::APPEND) {
                // The kernel's idea of where the file ends may be old.
                let data = [std::io::IoSlice::new(data)];
                rustix::io::pwritev2(&open.file, &data, offset, ReadWriteFlags::APPEND)
            } else {
                rustix::io::pwrite(&open.file, data, offset)
            }
        })
    }
}

/// What a SETATTR request changes.
struct SetAttr {
    mode: Option<u32>,
    uid: Option<u32>,
    gid: Option<u32>,
    size: Option<u64>,
    atime: Option<TimeOrNow>,
    mtime: Option<TimeOrNow>,
    handle: Option<FileHandle>,
}

/// The bit pattern of a request's open flags.
fn open_flags(client: i32) -> OFlags {
    OFlags::from_bits_retain(client as u32)
}

fn fuser_fields(opened: &Opened) -> (FileHandle, FopenFlags) {
    let flags = FopenFlags::from_bits_retain(opened.open_flags.bits());
    (FileHandle(opened.fh), flags)
}

fn fuse_errno(errno: Errno) -> fuser::Errno {
    fuser::Errno::from_i32(errno.raw_os_error())
}

/// The id in the type that fuser's reply wants it in: `lend!(reply, id)`. That type would close the id when it
/// is dropped, so it is to be taken apart with `into_raw`.
macro_rules! lend {
    ($reply:ident, $id:ident) => {{
        #[allow(
            unsafe_code,
            reason = "fuser cannot check an id that it did not register"
        )]
        // SAFETY: `Files` registered the id with the device of this session, and keeps it open until the
        // RELEASE of the very open that is being answered.
        unsafe {
            $reply.wrap_backing($id as u32)
        }
    }};
}

/// Sends what the call returned: `answer!(reply, result, |value| reply.method(value))`.
macro_rules! answer {
    ($reply:ident, $result:expr, |$value:pat_param| $send:expr) => {
        match $result {
            Ok($value) => $send,
            Err(errno) => $reply.error(fuse_errno(errno)),
        }
    };
}

impl Filesystem for Mirror {
    fn init(&mut self, _req: &Request, config: &mut KernelConfig) -> std::io::Result<()> {
        let attached = self.device.take().is_some_and(|device| {
            let attached = opens::attach(&self.files, device, self.killpriv, config);
            attached.map_err(|why| self.status.refuse(why)).is_ok()
        });
        let offered = config.capabilities();
        let mut add = |wanted| offered.contains(wanted) && config.add_capabilities(wanted).is_ok();
        // What is written without passthrough, the server sees.
        if self.killpriv && !attached {
            add(InitFlags::FUSE_HANDLE_KILLPRIV_V2);
        }
        add(InitFlags::FUSE_PARALLEL_DIROPS);
        // For inodes in server mode: pages of a file that has changed are dropped.
        add(InitFlags::FUSE_AUTO_INVAL_DATA);
        // The kernel is to check the ACLs that the source's files have, not their modes alone.
        self.acl = add(InitFlags::FUSE_POSIX_ACL | InitFlags::FUSE_DONT_MASK);
        self.can_map_direct = add(InitFlags::FUSE_DIRECT_IO_ALLOW_MMAP);
        Ok(())
    }

    fn lookup(&self, _req: &Request, parent: INodeNo, name: &OsStr, reply: ReplyEntry) {
        let found = self
            .inodes
            .get(parent)
            .and_then(|parent| self.find(&parent, name));
        answer!(reply, found, |attr| reply.entry(&TTL, &attr, GENERATION));
    }

    // BATCH_FORGET comes here too, one by one.
    fn forget(&self, _req: &Request, ino: INodeNo, nlookup: u64) {
        self.inodes.forget(ino, nlookup);
    }

    fn getattr(&self, _req: &Request, ino: INodeNo, _fh: Option<FileHandle>, reply: ReplyAttr) {
        answer!(reply, self.attributes(ino), |attr| reply.attr(&TTL, &attr));
    }

    fn setattr(
        &self,
        req: &Request,
        ino: INodeNo,
        mode: Option<u32>,
        uid: Option<u32>,
        gid: Option<u32>,
        size: Option<u64>,
        atime: Option<TimeOrNow>,
        mtime: Option<TimeOrNow>,
        _ctime: Option<SystemTime>,
        fh: Option<FileHandle>,
        _crtime: Option<SystemTime>,
        _chgtime: Option<SystemTime>,
        _bkuptime: Option<SystemTime>,
        _flags: Option<BsdFileFlags>,
        reply: ReplyAttr,
    ) {
        let set = SetAttr {
            mode,
            uid,
            gid,
            size,
            atime,
            mtime,
            handle: fh,
        };
        let attr = self.set_attributes(req, ino, &set);
        answer!(reply, attr, |attr| reply.attr(&TTL, &attr));
    }

    fn readlink(&self, _req: &Request, ino: INodeNo, reply: ReplyData) {
        let target = self
            .inodes
            .get(ino)
            .and_then(|inode| rustix::fs::readlinkat(&inode, "", Vec::new()));
        answer!(reply, target, |target| reply.data(target.as_bytes()));
    }

    fn mknod(
        &self,
        req: &Request,
        parent: INodeNo,
        name: &OsStr,
        mode: u32,
        umask: u32,
        rdev: u32,
        reply: ReplyEntry,
    ) {
        let attr = self.inodes.get(parent).and_then(|parent| {
            let file_type = FileType::from_raw_mode(mode);
            let mode = self.creation_mode(&parent, mode, umask);
            let mknod = || rustix::fs::mknodat(&parent, name, file_type, mode, rdev.into());
            on_behalf::make(req, mknod)?;
            self.find(&parent, name)
        });
        answer!(reply, attr, |attr| reply.entry(&TTL, &attr, GENERATION));
    }

    fn mkdir(
        &self,
        req: &Request,
        parent: INodeNo,
        name: &OsStr,
        mode: u32,
        umask: u32,
        reply: ReplyEntry,
    ) {
        let attr = self.inodes.get(parent).and_then(|parent| {
            let mode = self.creation_mode(&parent, mode, umask);
            on_behalf::make(req, || rustix::fs::mkdirat(&parent, name, mode))?;
            self.find(&parent, name)
        });
        answer!(reply, attr, |attr| reply.entry(&TTL, &attr, GENERATION));
    }

    fn symlink(
        &self,
        req: &Request,
        parent: INodeNo,
        link_name: &OsStr,
        target: &Path,
        reply: ReplyEntry,
    ) {
        let attr = self.inodes.get(parent).and_then(|parent| {
            on_behalf::make(req, || rustix::fs::symlinkat(target, &parent, link_name))?;
            self.find(&parent, link_name)
        });
        answer!(reply, attr, |attr| reply.entry(&TTL, &attr, GENERATION));
    }

    fn link(
        &self,
        req: &Request,
        ino: INodeNo,
        newparent: INodeNo,
        newname: &OsStr,
        reply: ReplyEntry,
    ) {
        let attr = self.inodes.get(ino).and_then(|inode| {
            let parent = self.inodes.get(newparent)?;
            let follow = AtFlags::SYMLINK_FOLLOW;
            let path = proc_path(&inode);
            on_behalf::make(req, || {
                rustix::fs::linkat(CWD, path, &parent, newname, follow)
            })?;
            self.find(&parent, newname)
        });
        answer!(reply, attr, |attr| reply.entry(&TTL, &attr, GENERATION));
    }

    fn unlink(&self, _req: &Request, parent: INodeNo, name: &OsStr, reply: ReplyEmpty) {
        let done = self
            .inodes
            .get(parent)
            .and_then(|parent| rustix::fs::unlinkat(&parent, name, AtFlags::empty()));
        answer!(reply, done, |()| reply.ok());
    }

    fn rmdir(&self, _req: &Request, parent: INodeNo, name: &OsStr, reply: ReplyEmpty) {
        let done = self
            .inodes
            .get(parent)
            .and_then(|parent| rustix::fs::unlinkat(&parent, name, AtFlags::REMOVEDIR));
        answer!(reply, done, |()| reply.ok());
    }

    fn rename(
        &self,
        req: &Request,
        parent: INodeNo,
        name: &OsStr,
        newparent: INodeNo,
        newname: &OsStr,
        flags: fuser::RenameFlags,
        reply: ReplyEmpty,
    ) {
        let done = self.inodes.get(parent).and_then(|parent| {
            let newparent = self.inodes.get(newparent)?;
            let flags = RenameFlags::from_bits_retain(flags.bits());
            on_behalf::make(req, || {
                rustix::fs::renameat_with(&parent, name, &newparent, newname, flags)
            })
        });
        answer!(reply, done, |()| reply.ok());
    }

    fn open(&self, _req: &Request, ino: INodeNo, flags: fuser::OpenFlags, reply: ReplyOpen) {
        let opened = self.open_file(ino, open_flags(flags.0));
        answer!(reply, opened, |opened| {
            let (handle, flags) = fuser_fields(&opened);
            let Some(id) = opened.backing_id else {
                return reply.opened(handle, flags);
            };
            let lent = lend!(reply, id);
            reply.opened_passthrough(handle, flags, &lent);
            let _ = lent.into_raw();
        });
    }

    fn create(
        &self,
        req: &Request,
        parent: INodeNo,
        name: &OsStr,
        mode: u32,
        umask: u32,
        flags: i32,
        reply: ReplyCreate,
    ) {
        let created = self.create_file(req, parent, name, (mode, umask), open_flags(flags));
        answer!(reply, created, |(attr, opened)| {
            let (handle, flags) = fuser_fields(&opened);
            let Some(id) = opened.backing_id else {
                return reply.created(&TTL, &attr, GENERATION, handle, flags);
            };
            let lent = lend!(reply, id);
            reply.created_passthrough(&TTL, &attr, GENERATION, handle, flags, &lent);
            let _ = lent.into_raw();
        });
    }

    fn read(
        &self,
        _req: &Request,
        _ino: INodeNo,
        fh: FileHandle,
        offset: u64,
        size: u32,
        _flags: fuser::OpenFlags,
        _lock_owner: Option<LockOwner>,
        reply: ReplyData,
    ) {
        self.status.reads.fetch_add(1, Ordering::Relaxed);
        let data = self.read_at(fh, offset, size);
        answer!(reply, data, |data| reply.data(&data));
    }

    fn write(
        &self,
        req: &Request,
        _ino: INodeNo,
        fh: FileHandle,
        offset: u64,
        data: &[u8],
        write_flags: WriteFlags,
        flags: fuser::OpenFlags,
        _lock_owner: Option<LockOwner>,
        reply: ReplyWrite,
    ) {
        self.status.writes.fetch_add(1, Ordering::Relaxed);
        let flags = (open_flags(flags.0), write_flags);
        let written = self.write_at(req, fh, offset, data, flags);
        answer!(reply, written, |written| reply.written(written as u32));
    }

    fn flush(
        &self,
        _req: &Request,
        _ino: INodeNo,
        _fh: FileHandle,
        _lock_owner: LockOwner,
        reply: ReplyEmpty,
    ) {
        // The server holds back no writes, and locks are the kernel's.
        reply.ok();
    }

    fn release(
        &self,
        _req: &Request,
        _ino: INodeNo,
        fh: FileHandle,
        _flags: fuser::OpenFlags,
        _lock_owner: Option<LockOwner>,
        _flush: bool,
        reply: ReplyEmpty,
    ) {
        drop(self.files.release(fh.0));
        reply.ok();
    }

    fn fsync(
        &self,
        _req: &Request,
        _ino: INodeNo,
        fh: FileHandle,
        datasync: bool,
        reply: ReplyEmpty,
    ) {
        let done = self
            .handle(fh)
            .and_then(|open| source::sync(&open.file, datasync));
        answer!(reply, done, |()| reply.ok());
    }

    fn opendir(&self, _req: &Request, ino: INodeNo, _flags: fuser::OpenFlags, reply: ReplyOpen) {
        answer!(reply, self.open_dir(ino), |handle| reply
            .opened(handle, FopenFlags::empty()));
    }

    fn readdir(
        &self,
        _req: &Request,
        _ino: INodeNo,
        fh: FileHandle,
        offset: u64,
        mut reply: ReplyDirectory,
    ) {
        let done = self.read_dir(fh, offset, &mut reply);
        answer!(reply, done, |()| reply.ok());
    }

    fn releasedir(
        &self,
        _req: &Request,
        _ino: INodeNo,
        fh: FileHandle,
        _flags: fuser::OpenFlags,
        reply: ReplyEmpty,
    ) {
        self.dirs.remove(fh);
        reply.ok();
    }

    fn fsyncdir(
        &self,
        _req: &Request,
        _ino: INodeNo,
        fh: FileHandle,
        datasync: bool,
        reply: ReplyEmpty,
    ) {
        let done = self.dirs.get(fh).and_then(|dir| {
            let dir = dir.lock().unwrap_or_else(PoisonError::into_inner);
            source::sync(&*dir, datasync)
        });
        answer!(reply, done, |()| reply.ok());
    }

    fn statfs(&self, _req: &Request, ino: INodeNo, reply: ReplyStatfs) {
        let stat = self
            .inodes
            .get(ino)
            .and_then(|inode| rustix::fs::fstatvfs(&inode));
        answer!(reply, stat, |stat| reply.statfs(
            stat.f_blocks,
            stat.f_bfree,
            stat.f_bavail,
            stat.f_files,
            stat.f_ffree,
            stat.f_bsize as u32,
            stat.f_namemax as u32,
            stat.f_frsize as u32,
        ));
    }

    fn setxattr(
        &self,
        req: &Request,
        ino: INodeNo,
        name: &OsStr,
        value: &[u8],
        flags: i32,
        _position: u32,
        reply: ReplyEmpty,
    ) {
        let done = self.inodes.get(ino).and_then(|inode| {
            let flags = XattrFlags::from_bits_retain(flags as u32);
            let set = || rustix::fs::setxattr(proc_path(&inode), name, value, flags);
            on_behalf::make(req, || {
                if name == ACCESS_ACL {
                    on_behalf::change_rights(req, rustix::fs::fstat(&inode)?.st_gid, set)
                } else {
                    set()
                }
            })
        });
        answer!(reply, done, |()| reply.ok());
    }

    fn getxattr(&self, _req: &Request, ino: INodeNo, name: &OsStr, size: u32, reply: ReplyXattr) {
        self.status.getxattrs.fetch_add(1, Ordering::Relaxed);
        let value = self.inodes.get(ino).and_then(|inode| {
            let path = &proc_path(&inode);
            match size {
                0 => rustix::fs::getxattr_query(path, name).map(XattrAnswer::Size),
                _ => fill(size, |buffer| rustix::fs::getxattr(path, name, buffer)),
            }
        });
        answer!(reply, value, |value| value.send(reply));
    }

    fn listxattr(&self, _req: &Request, ino: INodeNo, size: u32, reply: ReplyXattr) {
        let names = self.inodes.get(ino).and_then(|inode| {
            let path = &proc_path(&inode);
            match size {
                0 => rustix::fs::listxattr_query(path).map(XattrAnswer::Size),
                _ => fill(size, |buffer| rustix::fs::listxattr(path, buffer)),
            }
        });
        answer!(reply, names, |names| names.send(reply));
    }

    fn removexattr(&self, _req: &Request, ino: INodeNo, name: &OsStr, reply: ReplyEmpty) {
        let done = self
            .inodes
            .get(ino)
            .and_then(|inode| rustix::fs::removexattr(proc_path(&inode), name));
        answer!(reply, done, |()| reply.ok());
    }

    fn fallocate(
        &self,
        req: &Request,
        _ino: INodeNo,
        fh: FileHandle,
        offset: u64,
        length: u64,
        mode: i32,
        reply: ReplyEmpty,
    ) {
        let done = self.handle(fh).and_then(|open| {
            let mode = FallocateFlags::from_bits_retain(mode as u32);
            on_behalf::write(req, on_behalf::kills_setid(req), || {
                rustix::fs::fallocate(&open.file, mode, offset, length)
            })
        });
        answer!(reply, done, |()| reply.ok());
    }

    fn lseek(
        &self,
        _req: &Request,
        _ino: INodeNo,
        fh: FileHandle,
        offset: i64,
        whence: i32,
        reply: ReplyLseek,
    ) {
        // The kernel asks for holes and data alone: it keeps the positions itself.
        let position = self.handle(fh).and_then(|open| {
            let from = match whence {
                libc::SEEK_DATA => SeekFrom::Data(offset as u64),
                libc::SEEK_HOLE => SeekFrom::Hole(offset as u64),
                _ => return Err(Errno::INVAL),
            };
            rustix::fs::seek(&open.file, from)
        });
        answer!(reply, position, |position| reply.offset(position as i64));
    }

    fn copy_file_range(
        &self,
        req: &Request,
        _ino_in: INodeNo,
        fh_in: FileHandle,
        mut offset_in: u64,
        _ino_out: INodeNo,
        fh_out: FileHandle,
        mut offset_out: u64,
        len: u64,
        _flags: CopyFileRangeFlags,
        reply: ReplyWrite,
    ) {
        // The reply counts in 32 bits.
        let len = len.min(1 << 30) as usize;
        let copied = self.handle(fh_in).and_then(|from| {
            let to = self.handle(fh_out)?;
            let (at, into) = (Some(&mut offset_in), Some(&mut offset_out));
            on_behalf::write(req, on_behalf::kills_setid(req), || {
                rustix::fs::copy_file_range(&from.file, at, &to.file, into, len)
            })
        });
        answer!(reply, copied, |copied| reply.written(copied as u32));
    }
}

/// The answer to a request for extended attributes.
enum XattrAnswer {
    /// To a request of size 0: the size to come back with.
    Size(usize),
    Data(Vec<u8>),
}

impl XattrAnswer {
    fn send(self, reply: ReplyXattr) {
        match self {
            Self::Size(size) => reply.size(size as u32),
            Self::Data(data) => reply.data(&data),
        }
    }
}

/// Calls with a buffer of the client's size, so that `ERANGE` is the call's own.
fn fill(size: u32, call: impl FnOnce(&mut [u8]) -> Result<usize>) -> Result<XattrAnswer> {
    let mut buffer = vec![0; size as usize];
    let length = call(&mut buffer)?;
    buffer.truncate(length);
    Ok(XattrAnswer::Data(buffer))
}
