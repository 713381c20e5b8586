//! The filesystem: each request becomes the same call on the source tree.
//!
//! A request names inodes, for which the server has fds, and single names in directories. The server
//! follows no symbolic link, and every error is the errno of the server's own call.

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
    BsdFileFlags, CopyFileRangeFlags, FileAttr, FileHandle, Filesystem, FopenFlags, INodeNo,
    InitFlags, KernelConfig, LockOwner, ReplyAttr, ReplyCreate, ReplyData, ReplyDirectory,
    ReplyEmpty, ReplyEntry, ReplyLseek, ReplyOpen, ReplyStatfs, ReplyWrite, ReplyXattr, Request,
    TimeOrNow, WriteFlags,
};
use rustix::fs::{
    AtFlags, CWD, FallocateFlags, FileType, Gid, Mode, OFlags, RawDir, RenameFlags, SeekFrom,
    Statx, Timestamps, Uid, XattrFlags,
};
use rustix::io::{Errno, ReadWriteFlags};

use crate::attr::{attr, kind, timespec};
use crate::dirs::Dirs;
use crate::inodes::{Found, Inode, Inodes, identity, number};
use crate::on_behalf::{self, Client};
use crate::opens::{self, Device, Files, OpenFile};
use crate::session::Options;
use crate::source::{self, proc_path};
use crate::status::Status;
use crate::threads::Threads;

type Result<T> = std::result::Result<T, Errno>;

/// The kernel rounds this up to a tick of its clock, so that it does not ask again for attributes that a lookup just
/// returned. Unused without passthrough, where attributes decide how far a file can be read.
const TICK: Duration = Duration::from_nanos(1);

const ACCESS_ACL: &str = "system.posix_acl_access";

/// `lend!(reply, id)`: the id as fuser's `BackingId`, which replies need. Its drop would close the id, so the caller
/// must consume it with `into_raw`.
macro_rules! lend {
    ($reply:ident, $id:ident) => {{
        #[allow(
            unsafe_code,
            reason = "fuser cannot check an id that it did not register"
        )]
        // SAFETY: `Files` registered the id with the device of this session, and keeps it open until the
        // RELEASE of the open that is being answered.
        unsafe {
            $reply.wrap_backing($id as u32)
        }
    }};
}

/// `answer!(reply, result, |value| reply.method(value))`: sends the result of a call.
macro_rules! answer {
    ($reply:ident, $result:expr, |$value:pat_param| $send:expr) => {
        match $result {
            Ok($value) => $send,
            Err(errno) => $reply.error(fuse_errno(errno)),
        }
    };
}

pub(crate) struct Mirror {
    inodes: Inodes,
    files: Arc<Files>,
    dirs: Dirs,
    threads: Threads,
    /// Set until INIT, if passthrough is wanted.
    device: Option<Device>,
    options: Options,
    passes_through: bool,
    /// Files opened with `O_DIRECT` can be mapped (`FUSE_DIRECT_IO_ALLOW_MMAP`).
    can_map_direct: bool,
    /// The kernel checks POSIX ACLs, and the server applies the umask.
    acl: bool,
    status: Arc<Status>,
}

impl Mirror {
    /// `device` is the future session's, if passthrough is wanted.
    pub(crate) fn new(
        inodes: Inodes,
        files: Arc<Files>,
        device: Option<Device>,
        options: Options,
        status: Arc<Status>,
    ) -> std::io::Result<Self> {
        Ok(Self {
            inodes,
            files,
            dirs: Dirs::default(),
            threads: Threads::new()?,
            device,
            options,
            passes_through: false,
            can_map_direct: false,
            acl: false,
            status,
        })
    }

    /// The inode of a nodeid in a request. EBUSY if this is the last free thread and the inode's filesystem may hang,
    /// so that one thread always serves local filesystems.
    fn inode(&self, nodeid: INodeNo) -> Result<Arc<Inode>> {
        let inode = self.inodes.get(nodeid)?;
        if !inode.is_local() && self.threads.is_last() {
            return Err(Errno::BUSY);
        }
        Ok(inode)
    }

    /// Looks `name` up. Counts a lookup, so the caller must reply with the result.
    fn find(&self, parent: &Inode, name: &OsStr) -> Result<Found> {
        // The fast path for known files. Elsewhere it would only be one more request to the filesystem's server.
        if parent.is_local() {
            let now = self.inodes.now();
            let stat = source::look(parent, name, AtFlags::SYMLINK_NOFOLLOW)?;
            if let Some(found) = self.inodes.find_known(parent, &stat, now) {
                return Ok(found);
            }
        }
        self.inodes.remember(parent, source::path_fd(parent, name)?)
    }

    /// The attributes that come with an entry, and how long the kernel may keep them.
    fn entry(&self, found: &Found) -> (FileAttr, Duration) {
        let attr = attr(found.nodeid, &found.stat);
        // The kernel must not keep a wrong inode number: without a ttl it asks again and gets the right one.
        let ttl = found.is_current.then_some(self.options.ttl);
        (attr, ttl.unwrap_or(Duration::ZERO))
    }

    fn reply_entry(&self, reply: ReplyEntry, found: Result<Found>) {
        answer!(reply, found, |found| {
            let (attr, ttl) = self.entry(&found);
            let keeps = found.is_current && self.passes_through;
            let ttl = if keeps { ttl.max(TICK) } else { ttl };
            reply.entry_with_ttls(&ttl, &self.options.ttl, &attr, found.generation);
        });
    }

    /// Makes `call`, which creates a file or a link `name`, for the client, and replies with the entry.
    fn make(
        &self,
        req: &Request,
        parent: INodeNo,
        name: &OsStr,
        reply: ReplyEntry,
        call: impl FnOnce(&Inode) -> Result<()>,
    ) {
        let made = self.inode(parent).and_then(|parent| {
            on_behalf::make(req.into(), || call(&parent))?;
            self.find(&parent, name)
        });
        self.reply_entry(reply, made);
    }

    fn remove(&self, parent: INodeNo, name: &OsStr, flags: AtFlags, reply: ReplyEmpty) {
        let parent = self.inode(parent);
        let done = parent.and_then(|parent| rustix::fs::unlinkat(&parent, name, flags));
        answer!(reply, done, |()| reply.ok());
    }

    fn reply_xattr(
        &self,
        nodeid: INodeNo,
        size: u32,
        reply: ReplyXattr,
        query: impl FnOnce(&str) -> Result<usize>,
        get: impl FnOnce(&str, &mut [u8]) -> Result<usize>,
    ) {
        // A buffer of the client's size, so that the call itself returns ERANGE.
        let mut buffer = vec![0; size as usize];
        let path = self.inode(nodeid).map(|inode| (proc_path(&inode), inode));
        let length = path.and_then(|(path, _inode)| match size {
            0 => query(&path),
            _ => get(&path, &mut buffer),
        });
        answer!(reply, length, |length| match size {
            0 => reply.size(length as u32),
            _ => reply.data(&buffer[..length]),
        });
    }

    /// The mode for a new file in `parent`. A default ACL replaces the umask.
    fn creation_mode(&self, parent: &Inode, mode: u32, umask: u32) -> Mode {
        // Without ACL support the kernel has applied the umask already.
        let takes_umask = self.acl && mode & umask != 0 && !source::has_default_acl(parent);
        Mode::from_raw_mode(if takes_umask { mode & !umask } else { mode })
    }

    fn create_file(
        &self,
        req: &Request,
        parent: INodeNo,
        name: &OsStr,
        mode: (u32, u32),
        flags: OFlags,
    ) -> Result<(Found, Opened)> {
        let parent = self.inode(parent)?;
        let mode = self.creation_mode(&parent, mode.0, mode.1);
        // Always O_EXCL, because nobody has checked the client's permissions on an existing file. If one
        // has appeared since the kernel's lookup, ESTALE makes the kernel look it up again, check the
        // permissions, and send OPEN.
        let exclusive = OFlags::CREATE | OFlags::EXCL | OFlags::NOFOLLOW;
        let exclusively = source::server_flags(&parent, flags) | exclusive;
        let open = || rustix::fs::openat(&parent, name, exclusively, mode);
        let file = on_behalf::make(req.into(), open).map_err(|errno| match errno {
            Errno::EXIST if !flags.contains(OFlags::EXCL) => Errno::STALE,
            errno => errno,
        })?;
        self.created(&parent, file, flags).inspect_err(|_| {
            let _ = rustix::fs::unlinkat(&parent, name, AtFlags::empty());
        })
    }

    fn created(&self, parent: &Inode, file: OwnedFd, flags: OFlags) -> Result<(Found, Opened)> {
        let found = self.inodes.remember(parent, source::path_fd_of(&file)?)?;
        let nodeid = found.nodeid;
        let open = |inode: Arc<_>| {
            let (files, can_map_direct) = (&self.files, self.can_map_direct);
            opens::opened(files, nodeid, &inode, file, flags, can_map_direct)
        };
        let opened = self.inodes.get(nodeid).and_then(open);
        let opened = opened.inspect_err(|_| self.forget_lookups(nodeid, 1))?;
        Ok((found, opened))
    }

    fn forget_lookups(&self, nodeid: INodeNo, lookups: u64) {
        // Another file may get this nodeid later.
        let forget = || self.files.table().forget(&nodeid);
        self.inodes.forget(nodeid, lookups, forget);
    }

    /// The open file of a handle. EBUSY as in `inode`.
    fn handle(&self, nodeid: INodeNo, handle: FileHandle) -> Result<Arc<OpenFile>> {
        self.inode(nodeid)?;
        self.files.get(handle.0).ok_or(Errno::BADF)
    }

    /// Adds the entries from `offset` on. Offsets are those of the source directory, valid while it is
    /// open. The next request reads entries that did not fit into the reply again.
    fn read_dir(
        &self,
        nodeid: INodeNo,
        handle: FileHandle,
        offset: u64,
        reply: &mut ReplyDirectory,
    ) -> Result<()> {
        let (dev, _) = self.inode(nodeid)?.identity();
        let dir = self.dirs.get(handle)?;
        let dir = dir.lock().unwrap_or_else(PoisonError::into_inner);
        rustix::fs::seek(&*dir, SeekFrom::Start(offset))?;
        let mut buffer = [MaybeUninit::uninit(); 4096];
        let mut entries = RawDir::new(&*dir, &mut buffer);
        while let Some(entry) = entries.next() {
            let entry = entry?;
            let Some(kind) = kind(entry.file_type()).or_else(|| {
                // The filesystem's directories contain no types.
                let name = entry.file_name();
                let stat = source::look(&*dir, name, AtFlags::SYMLINK_NOFOLLOW).ok()?;
                kind(FileType::from_raw_mode(stat.stx_mode.into()))
            }) else {
                continue; // Removed in the meantime.
            };
            let number = number(self.inodes.dev, (dev, entry.ino()));
            let name = OsStr::from_bytes(entry.file_name().to_bytes());
            if reply.add(number, entry.next_entry_cookie(), kind, name) {
                break;
            }
        }
        Ok(())
    }

    fn read_at(open: &OpenFile, offset: u64, size: u32) -> Result<Vec<u8>> {
        let mut data = Vec::with_capacity(size as usize);
        let unused = rustix::buffer::spare_capacity(&mut data);
        rustix::io::pread(&open.file, unused, offset)?;
        Ok(data)
    }

    fn write_at(
        req: &Request,
        open: &OpenFile,
        offset: u64,
        data: &[u8],
        flags: (OFlags, WriteFlags),
    ) -> Result<usize> {
        let (open_flags, write_flags) = flags;
        // Pages written through a mapping go to their offset, even if the kernel sends them with a handle that is open
        // for appending.
        if write_flags.contains(WriteFlags::FUSE_WRITE_CACHE) {
            return on_behalf::write_pages(|| rustix::io::pwrite(&open.file, data, offset));
        }
        let kill = write_flags.contains(WriteFlags::FUSE_WRITE_KILL_SUIDGID);
        on_behalf::write(req.into(), kill, || {
            if open_flags.contains(OFlags::APPEND) {
                // The kernel's file size may be outdated, so do not write at its offset.
                let data = [std::io::IoSlice::new(data)];
                rustix::io::pwritev2(&open.file, &data, offset, ReadWriteFlags::APPEND)
            } else {
                rustix::io::pwrite(&open.file, data, offset)
            }
        })
    }
}

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

fn reply_attr(reply: ReplyAttr, stat: Result<Statx>, root_dev: u64, ttl: &Duration) {
    answer!(reply, stat, |stat| {
        let number = number(root_dev, identity(&stat));
        reply.attr(ttl, &attr(number, &stat));
    });
}

impl Filesystem for Mirror {
    fn init(&mut self, _req: &Request, config: &mut KernelConfig) -> std::io::Result<()> {
        self.passes_through = self.device.take().is_some_and(|device| {
            let attached = opens::attach(&self.files, device, self.options, config);
            attached.map_err(|why| self.status.refuse(why)).is_ok()
        });
        // Lets releases and readahead on local filesystems proceed while those on filesystems that hang wait.
        let _ = config.set_max_background(u16::MAX);
        let offered = config.capabilities();
        let mut add = |wanted| offered.contains(wanted) && config.add_capabilities(wanted).is_ok();
        // Without passthrough, the server sees each write. With passthrough, `opens::attach` sets this flag.
        if self.options.killpriv && !self.passes_through {
            add(InitFlags::FUSE_HANDLE_KILLPRIV_V2);
        }
        add(InitFlags::FUSE_PARALLEL_DIROPS);
        // In server mode, the kernel then drops cached pages of a file that has changed.
        add(InitFlags::FUSE_AUTO_INVAL_DATA);
        // The kernel checks the ACLs of the source's files, not only their modes.
        self.acl = add(InitFlags::FUSE_POSIX_ACL | InitFlags::FUSE_DONT_MASK);
        self.can_map_direct = add(InitFlags::FUSE_DIRECT_IO_ALLOW_MMAP);
        Ok(())
    }

    fn lookup(&self, _req: &Request, parent: INodeNo, name: &OsStr, reply: ReplyEntry) {
        let _turn = self.threads.begin();
        let found = self
            .inode(parent)
            .and_then(|parent| self.find(&parent, name));
        self.reply_entry(reply, found);
    }

    // fuser splits a BATCH_FORGET into calls of this. It takes no turn: if the thread waited for one after each call,
    // the rest of the batch would be delayed.
    fn forget(&self, _req: &Request, ino: INodeNo, nlookup: u64) {
        self.forget_lookups(ino, nlookup);
    }

    fn getattr(&self, _req: &Request, ino: INodeNo, _fh: Option<FileHandle>, reply: ReplyAttr) {
        let _turn = self.threads.begin();
        let stat = self.inode(ino).and_then(|inode| source::attributes(&inode));
        reply_attr(reply, stat, self.inodes.dev, &self.options.ttl);
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
        let _turn = self.threads.begin();
        let (client, files) = (Client::from(req), Arc::clone(&self.files));
        let (root_dev, ttl) = (self.inodes.dev, self.options.ttl);
        let inode = self.inode(ino);
        let waits = inode.as_ref().is_ok_and(|inode| inode.is_local());
        let set = move || {
            let inode = inode.as_ref().map_err(|&errno| errno)?;
            let handle = fh
                .map(|fh| files.get(fh.0).ok_or(Errno::BADF))
                .transpose()?;
            // Opened before anything is changed: it fails with EAGAIN while a lease is being broken.
            let opened = match (size, &handle) {
                (Some(_), None) => Some(source::open_for_writing(inode)?),
                _ => None,
            };
            // The owner before the mode, since a change of owner clears set-user-ID and set-group-ID bits; the
            // size before the times, since it sets them.
            if uid.is_some() || gid.is_some() {
                let (uid, gid) = (uid.map(Uid::from_raw), gid.map(Gid::from_raw));
                let group = rustix::fs::fstat(inode)?.st_gid;
                on_behalf::change_rights(client, group, || {
                    rustix::fs::chownat(inode, "", uid, gid, AtFlags::EMPTY_PATH)
                })?;
            }
            if let Some(mode) = mode {
                rustix::fs::chmod(proc_path(inode), Mode::from_raw_mode(mode))?;
            }
            let file = opened
                .as_ref()
                .or(handle.as_ref().map(|handle| &handle.file));
            if let (Some(size), Some(file)) = (size, file) {
                let kill = on_behalf::kills_setid(client);
                on_behalf::write(client, kill, || rustix::fs::ftruncate(file, size))?;
            }
            if atime.is_some() || mtime.is_some() {
                let times = Timestamps {
                    last_access: timespec(atime),
                    last_modification: timespec(mtime),
                };
                rustix::fs::utimensat(inode, "", &times, AtFlags::EMPTY_PATH)?;
            }
            source::attributes(inode)
        };
        let send = move |stat| reply_attr(reply, stat, root_dev, &ttl);
        self.threads.answer(waits, set, send);
    }

    fn readlink(&self, _req: &Request, ino: INodeNo, reply: ReplyData) {
        let _turn = self.threads.begin();
        let target = self
            .inode(ino)
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
        let _turn = self.threads.begin();
        self.make(req, parent, name, reply, |parent| {
            let file_type = FileType::from_raw_mode(mode);
            let mode = self.creation_mode(parent, mode, umask);
            rustix::fs::mknodat(parent, name, file_type, mode, rdev.into())
        });
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
        let _turn = self.threads.begin();
        self.make(req, parent, name, reply, |parent| {
            let mode = self.creation_mode(parent, mode, umask);
            rustix::fs::mkdirat(parent, name, mode)
        });
    }

    fn symlink(
        &self,
        req: &Request,
        parent: INodeNo,
        link_name: &OsStr,
        target: &Path,
        reply: ReplyEntry,
    ) {
        let _turn = self.threads.begin();
        self.make(req, parent, link_name, reply, |parent| {
            rustix::fs::symlinkat(target, parent, link_name)
        });
    }

    fn link(
        &self,
        req: &Request,
        ino: INodeNo,
        newparent: INodeNo,
        newname: &OsStr,
        reply: ReplyEntry,
    ) {
        let _turn = self.threads.begin();
        self.make(req, newparent, newname, reply, |parent| {
            let inode = self.inode(ino)?;
            let path = proc_path(&inode);
            rustix::fs::linkat(CWD, path, parent, newname, AtFlags::SYMLINK_FOLLOW)
        });
    }

    fn unlink(&self, _req: &Request, parent: INodeNo, name: &OsStr, reply: ReplyEmpty) {
        let _turn = self.threads.begin();
        self.remove(parent, name, AtFlags::empty(), reply);
    }

    fn rmdir(&self, _req: &Request, parent: INodeNo, name: &OsStr, reply: ReplyEmpty) {
        let _turn = self.threads.begin();
        self.remove(parent, name, AtFlags::REMOVEDIR, reply);
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
        let _turn = self.threads.begin();
        let done = self.inode(parent).and_then(|parent| {
            let newparent = self.inode(newparent)?;
            let flags = RenameFlags::from_bits_retain(flags.bits());
            on_behalf::make(req.into(), || {
                rustix::fs::renameat_with(&parent, name, &newparent, newname, flags)
            })
        });
        answer!(reply, done, |()| reply.ok());
    }

    fn open(&self, _req: &Request, ino: INodeNo, flags: fuser::OpenFlags, reply: ReplyOpen) {
        let _turn = self.threads.begin();
        let (files, flags) = (Arc::clone(&self.files), open_flags(flags.0));
        let (inode, can_map_direct) = (self.inode(ino), self.can_map_direct);
        let is_local = inode.as_ref().is_ok_and(|inode| inode.is_local());
        let open = move || {
            let inode = inode.as_ref().map_err(|&errno| errno)?;
            opens::open(&files, ino, inode, flags, can_map_direct)
        };
        let asks_to_wait = !flags.contains(OFlags::NONBLOCK);
        self.threads
            .answer(asks_to_wait && is_local, open, |opened| {
                answer!(reply, opened, |opened| {
                    let (handle, flags) = fuser_fields(&opened);
                    let Some(id) = opened.backing_id else {
                        return reply.opened(handle, flags);
                    };
                    let lent = lend!(reply, id);
                    reply.opened_passthrough(handle, flags, &lent);
                    let _ = lent.into_raw();
                });
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
        let _turn = self.threads.begin();
        let created = self.create_file(req, parent, name, (mode, umask), open_flags(flags));
        answer!(reply, created, |(found, opened)| {
            let (attr, ttl) = self.entry(&found);
            let (handle, flags) = fuser_fields(&opened);
            let Some(id) = opened.backing_id else {
                return reply.created(&ttl, &attr, found.generation, handle, flags);
            };
            let lent = lend!(reply, id);
            reply.created_passthrough(&ttl, &attr, found.generation, handle, flags, &lent);
            let _ = lent.into_raw();
        });
    }

    fn read(
        &self,
        _req: &Request,
        ino: INodeNo,
        fh: FileHandle,
        offset: u64,
        size: u32,
        _flags: fuser::OpenFlags,
        _lock_owner: Option<LockOwner>,
        reply: ReplyData,
    ) {
        let _turn = self.threads.begin();
        self.status.reads.fetch_add(1, Ordering::Relaxed);
        let open = self.handle(ino, fh);
        let data = open.and_then(|open| Self::read_at(&open, offset, size));
        answer!(reply, data, |data| reply.data(&data));
    }

    fn write(
        &self,
        req: &Request,
        ino: INodeNo,
        fh: FileHandle,
        offset: u64,
        data: &[u8],
        write_flags: WriteFlags,
        flags: fuser::OpenFlags,
        _lock_owner: Option<LockOwner>,
        reply: ReplyWrite,
    ) {
        let _turn = self.threads.begin();
        self.status.writes.fetch_add(1, Ordering::Relaxed);
        let flags = (open_flags(flags.0), write_flags);
        let open = self.handle(ino, fh);
        let written = open.and_then(|open| Self::write_at(req, &open, offset, data, flags));
        answer!(reply, written, |written| reply.written(written as u32));
    }

    fn release(
        &self,
        _req: &Request,
        ino: INodeNo,
        fh: FileHandle,
        _flags: fuser::OpenFlags,
        _lock_owner: Option<LockOwner>,
        _flush: bool,
        reply: ReplyEmpty,
    ) {
        let _turn = self.threads.begin();
        let file = self.files.release(fh.0);
        reply.ok();
        // close(2) can block on a filesystem that hangs, and the last thread must not block.
        if self.inode(ino).is_err() {
            std::thread::spawn(move || drop(file));
        }
    }

    fn fsync(
        &self,
        _req: &Request,
        ino: INodeNo,
        fh: FileHandle,
        datasync: bool,
        reply: ReplyEmpty,
    ) {
        let _turn = self.threads.begin();
        let done = self
            .handle(ino, fh)
            .and_then(|open| source::sync(&open.file, datasync));
        answer!(reply, done, |()| reply.ok());
    }

    fn opendir(&self, _req: &Request, ino: INodeNo, _flags: fuser::OpenFlags, reply: ReplyOpen) {
        let _turn = self.threads.begin();
        let opened = self.inode(ino).and_then(|inode| {
            let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
            rustix::fs::openat(&inode, ".", flags, Mode::empty())
        });
        answer!(reply, opened, |dir| {
            reply.opened(self.dirs.insert(dir), FopenFlags::empty());
        });
    }

    fn readdir(
        &self,
        _req: &Request,
        ino: INodeNo,
        fh: FileHandle,
        offset: u64,
        mut reply: ReplyDirectory,
    ) {
        let _turn = self.threads.begin();
        let done = self.read_dir(ino, fh, offset, &mut reply);
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
        let _turn = self.threads.begin();
        self.dirs.remove(fh);
        reply.ok();
    }

    fn fsyncdir(
        &self,
        _req: &Request,
        ino: INodeNo,
        fh: FileHandle,
        datasync: bool,
        reply: ReplyEmpty,
    ) {
        let _turn = self.threads.begin();
        let done = self
            .inode(ino)
            .and_then(|_| self.dirs.get(fh))
            .and_then(|dir| {
                let dir = dir.lock().unwrap_or_else(PoisonError::into_inner);
                source::sync(&*dir, datasync)
            });
        answer!(reply, done, |()| reply.ok());
    }

    fn statfs(&self, _req: &Request, ino: INodeNo, reply: ReplyStatfs) {
        let _turn = self.threads.begin();
        let stat = self
            .inode(ino)
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
        let _turn = self.threads.begin();
        let done = self.inode(ino).and_then(|inode| {
            let flags = XattrFlags::from_bits_retain(flags as u32);
            let set = || rustix::fs::setxattr(proc_path(&inode), name, value, flags);
            on_behalf::make(req.into(), || {
                if name == ACCESS_ACL {
                    on_behalf::change_rights(req.into(), rustix::fs::fstat(&inode)?.st_gid, set)
                } else {
                    set()
                }
            })
        });
        answer!(reply, done, |()| reply.ok());
    }

    fn getxattr(&self, _req: &Request, ino: INodeNo, name: &OsStr, size: u32, reply: ReplyXattr) {
        let _turn = self.threads.begin();
        self.status.getxattrs.fetch_add(1, Ordering::Relaxed);
        let query = |path: &str| rustix::fs::getxattr_query(path, name);
        let get = |path: &str, value: &mut _| rustix::fs::getxattr(path, name, value);
        self.reply_xattr(ino, size, reply, query, get);
    }

    fn listxattr(&self, _req: &Request, ino: INodeNo, size: u32, reply: ReplyXattr) {
        let _turn = self.threads.begin();
        let query = |path: &str| rustix::fs::listxattr_query(path);
        let list = |path: &str, names: &mut _| rustix::fs::listxattr(path, names);
        self.reply_xattr(ino, size, reply, query, list);
    }

    fn removexattr(&self, _req: &Request, ino: INodeNo, name: &OsStr, reply: ReplyEmpty) {
        let _turn = self.threads.begin();
        let done = self
            .inode(ino)
            .and_then(|inode| rustix::fs::removexattr(proc_path(&inode), name));
        answer!(reply, done, |()| reply.ok());
    }

    fn fallocate(
        &self,
        req: &Request,
        ino: INodeNo,
        fh: FileHandle,
        offset: u64,
        length: u64,
        mode: i32,
        reply: ReplyEmpty,
    ) {
        let _turn = self.threads.begin();
        let done = self.handle(ino, fh).and_then(|open| {
            let mode = FallocateFlags::from_bits_retain(mode as u32);
            on_behalf::write(req.into(), on_behalf::kills_setid(req.into()), || {
                rustix::fs::fallocate(&open.file, mode, offset, length)
            })
        });
        answer!(reply, done, |()| reply.ok());
    }

    fn lseek(
        &self,
        _req: &Request,
        ino: INodeNo,
        fh: FileHandle,
        offset: i64,
        whence: i32,
        reply: ReplyLseek,
    ) {
        let _turn = self.threads.begin();
        // The kernel sends only SEEK_HOLE and SEEK_DATA: it keeps the positions itself.
        let position = self.handle(ino, fh).and_then(|open| {
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
        ino_in: INodeNo,
        fh_in: FileHandle,
        mut offset_in: u64,
        ino_out: INodeNo,
        fh_out: FileHandle,
        mut offset_out: u64,
        len: u64,
        _flags: CopyFileRangeFlags,
        reply: ReplyWrite,
    ) {
        let _turn = self.threads.begin();
        // The length in the reply has 32 bits.
        let len = len.min(1 << 30) as usize;
        let copied = self.handle(ino_in, fh_in).and_then(|from| {
            let to = self.handle(ino_out, fh_out)?;
            let (at, into) = (Some(&mut offset_in), Some(&mut offset_out));
            on_behalf::write(req.into(), on_behalf::kills_setid(req.into()), || {
                rustix::fs::copy_file_range(&from.file, at, &to.file, into, len)
            })
        });
        answer!(reply, copied, |copied| reply.written(copied as u32));
    }
}
