//! The server's state. It answers every OPEN through one `BackingTable`, and compares each answer of the table with the
//! model's.

use std::collections::{BTreeMap, HashMap};
use std::fs::{self, File};
use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::fs::{FileExt, MetadataExt, OpenOptionsExt};
use std::path::PathBuf;
use std::sync::Arc;

use fuse_backing::error::{BackingError, NotPermitted, OpenError, ServerReason};
use fuse_backing::{
    Access, BackingId, BackingTable, FopenFlags, FuseDevice, OpenFile, OpenReply, ServerFile,
    error::Errno, uapi,
};

use super::model::{FileId, Model, Thread, Uid, rows};
use super::sequence::Case;
use super::server::{CREATE, FSYNC, ROOT};
use super::{NAMES, Wrong};
use crate::fuse::{
    FLUSH, GETATTR, LOOKUP, OPEN, READ, RELEASE, Request, SETATTR, WRITE, attr, errno,
};
use crate::seccomp::{Forged, forge};
use crate::thread::{apart, without_cap_sys_admin};

pub type Device = Arc<FuseDevice<Arc<OwnedFd>>>;
type Table = BackingTable<Device>;

/// How the server answers the next OPEN or CREATE.
#[derive(Clone, Copy, Debug)]
pub struct Plan {
    pub first: First,
    pub fd: Fd,
    /// Whether it adds `FOPEN_DIRECT_IO`.
    pub direct: bool,
    pub noflush: bool,
    pub parallel: bool,
    pub thread: Thread,
}

/// The method that is tried first; after `share` or `serve`, `BackingTable::open` follows if they decline.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum First {
    Open,
    Share,
    Serve,
}

/// The fd that `BackingTable::open` gets.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fd {
    /// Opened with the client's flags.
    Own,
    /// Always opened for reading and writing.
    Wide,
    /// Always opened for reading.
    Narrow,
    /// An fd of a file that is not the inode's. Only while the inode is open in passthrough mode: otherwise the table
    /// would serve this file.
    Other,
    /// An fd of a file that the kernel refuses. It is on /proc: which other files are refused depends on the kernel's
    /// version.
    Unfit,
}

/// A rule that the server breaks, which the kernel must refuse.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Sabotage {
    /// A further open of an inode in passthrough mode is answered without passthrough.
    CachedWhilePassthrough,
    /// A further open of an inode in cached mode is answered with passthrough.
    PassthroughWhileCached,
    /// A further open of an inode in passthrough mode is answered with another id of its file.
    SecondId,
    /// The id is closed before the reply.
    ClosedId,
    /// The inode is forgotten while it is open, and opened under its old number.
    ForgottenNumber,
}

/// A file on the tmpfs.
#[derive(Debug)]
pub struct Backing {
    pub serial: u64,
    path: PathBuf,
    pub file: File,
    /// Its content when it was made.
    pub initial: Vec<u8>,
}

/// The result of an OPEN or CREATE that succeeded.
#[derive(Clone, Debug)]
pub struct Opened {
    pub fh: u64,
    pub backing: Arc<Backing>,
    pub passthrough: bool,
}

struct Node {
    name: usize,
    backing: Arc<Backing>,
    generation: u64,
    /// How many references the kernel has.
    lookups: u64,
    /// Not opened yet under this number. The number may have been another file's before.
    fresh: bool,
}

#[derive(Default)]
struct Name {
    backing: Option<Arc<Backing>>,
    node: Option<u64>,
    /// Whether LOOKUP does not find it, so that the kernel sends CREATE.
    hidden: bool,
}

struct Handle {
    open: OpenFile<Device>,
    uid: Uid,
    nodeid: u64,
    backing: Arc<Backing>,
    cached: bool,
    release: Thread,
    reads: u64,
    writes: u64,
}

pub struct World {
    case: Case,
    folder: PathBuf,
    device: Device,
    pub table: Option<Table>,
    pub model: Model,
    names: [Name; NAMES],
    nodes: BTreeMap<u64, Node>,
    /// Numbers that the kernel has forgotten. They are given out again before new ones.
    free: Vec<u64>,
    generation: u64,
    serial: u64,
    handles: HashMap<u64, Handle>,
    last_handle: u64,
    pub plan: Plan,
    /// The answer to the last OPEN or CREATE.
    pub last: Option<Result<Opened, Errno>>,
    sabotage: Option<Sabotage>,
    pub sabotaged: bool,
    /// The first error that was found while a request was answered.
    trouble: Option<String>,
    /// How many ids there were at the last check.
    ids: usize,
    /// The greatest id that was given out.
    greatest_id: i32,
    pub tally: Tally,
}

/// How often each event happened.
#[derive(Clone, Debug, Default)]
pub struct Tally(pub BTreeMap<&'static str, u64>);

impl Tally {
    pub fn hit(&mut self, what: &'static str) {
        *self.0.entry(what).or_default() += 1;
    }

    pub fn add(&mut self, other: &Self) {
        for (what, count) in &other.0 {
            *self.0.entry(what).or_default() += count;
        }
    }
}

/// Runs `f` on a thread of this kind.
fn on<T: Send>(thread: Thread, f: impl FnOnce() -> T + Send) -> T {
    match thread {
        Thread::Able => f(),
        Thread::Incapable => without_cap_sys_admin(f),
        Thread::OutOfMemory => registering_fails(Errno::NOMEM, f),
        Thread::Denied => registering_fails(Errno::PERM, f),
    }
}

/// Runs `f` on a thread whose registrations fail with this errno.
fn registering_fails<T: Send>(errno: Errno, f: impl FnOnce() -> T + Send) -> T {
    apart(|| {
        let error = Forged::Error(errno);
        forge(&[(uapi::FUSE_DEV_IOC_BACKING_OPEN, error)]).expect("a filter");
        f()
    })
}

impl World {
    pub fn new(
        case: Case,
        folder: PathBuf,
        device: Device,
        sabotage: Option<Sabotage>,
    ) -> io::Result<Self> {
        let table = BackingTable::new(Arc::clone(&device));
        let mut world = Self {
            case,
            folder,
            device,
            model: Model::new(table.stats().limit),
            table: Some(table),
            names: Default::default(),
            nodes: BTreeMap::new(),
            free: Vec::new(),
            generation: 0,
            serial: 0,
            handles: HashMap::new(),
            last_handle: 0,
            plan: Plan {
                first: First::Open,
                fd: Fd::Own,
                direct: false,
                noflush: false,
                parallel: false,
                thread: Thread::Able,
            },
            last: None,
            sabotage,
            sabotaged: false,
            trouble: None,
            ids: 0,
            greatest_id: 0,
            tally: Tally::default(),
        };
        // The last name has no file until a client creates it.
        for name in 0..NAMES - 1 {
            world.new_backing(name, content_of(name as u64))?;
        }
        Ok(world)
    }

    pub fn device(&self) -> Device {
        Arc::clone(&self.device)
    }

    fn table(&self) -> &Table {
        self.table.as_ref().expect("not dropped yet")
    }

    /// Gives a name a new file. The old file stays open where it is open.
    fn new_backing(&mut self, name: usize, initial: Vec<u8>) -> io::Result<()> {
        self.remove(name)?;
        self.serial += 1;
        let path = self
            .folder
            .join(format!("{}-{}", name_of(name), self.serial));
        fs::write(&path, &initial)?;
        let backing = Backing {
            serial: self.serial,
            file: File::options().read(true).write(true).open(&path)?,
            path,
            initial,
        };
        self.names[name].backing = Some(Arc::new(backing));
        Ok(())
    }

    /// Removes a name's file. Its node stays until the kernel forgets it, and is never opened again.
    fn remove(&mut self, name: usize) -> io::Result<()> {
        self.names[name].node = None;
        match self.names[name].backing.take() {
            Some(backing) => fs::remove_file(&backing.path),
            None => Ok(()),
        }
    }

    pub fn backing(&self, name: usize) -> Option<&Arc<Backing>> {
        self.names[name].backing.as_ref()
    }

    pub fn hide(&mut self, name: usize, hidden: bool) {
        self.names[name].hidden = hidden;
    }

    pub fn node_of(&self, name: usize) -> Option<u64> {
        self.names[name].node
    }

    /// Whether a name leads to this number, so that the kernel may open it.
    pub fn is_named(&self, nodeid: u64) -> bool {
        self.names.iter().any(|name| name.node == Some(nodeid))
    }

    /// The backing files of all names and open files.
    pub fn backings(&self) -> Vec<Arc<Backing>> {
        let names = self.names.iter().filter_map(|name| name.backing.as_ref());
        let handles = self.handles.values().map(|handle| &handle.backing);
        names.chain(handles).cloned().collect()
    }

    pub fn in_server_mode(&self, serial: u64) -> bool {
        let mut handles = self.handles.values();
        handles.any(|handle| handle.backing.serial == serial && !handle.open.is_passthrough())
    }

    /// How many READs and WRITEs an open file had; `None` once it is released.
    pub fn asked(&self, fh: u64) -> Option<(u64, u64)> {
        let handle = self.handles.get(&fh)?;
        Some((handle.reads, handle.writes))
    }

    /// Sets the kind of thread that drops the open file.
    pub fn release_on(&mut self, fh: u64, thread: Thread) {
        if let Some(handle) = self.handles.get_mut(&fh) {
            handle.release = thread;
        }
    }

    pub fn open_files(&self) -> usize {
        self.handles.len()
    }

    /// Closes the server's own fds.
    pub fn close_files(&mut self) {
        self.names = Default::default();
        self.nodes.clear();
    }

    /// Replaces or removes the file of a name. With `forget`, the table forgets the old number at once, otherwise when
    /// the kernel does.
    pub fn replace(&mut self, name: usize, new: bool, forget: Option<Thread>) -> Result<(), Wrong> {
        let old = self.names[name].node;
        if new {
            self.new_backing(name, content_of(self.serial))?;
        } else {
            self.remove(name)?;
        }
        if let (Some(key), Some(thread)) = (old, forget) {
            if self.model.opens(key) > 0 {
                self.tally.hit("forgotten while open");
            }
            self.forget(key, thread);
        }
        Ok(())
    }

    /// Calls `BackingTable::forget`. The inode must not be both open and named: the kernel might open it again.
    pub fn forget(&mut self, key: u64, thread: Thread) {
        if self.model.is_idle(key) {
            self.tally.hit("forgotten while idle");
        }
        if let Some(table) = &self.table {
            self.model.forget(key, thread);
            on(thread, || table.forget(&key));
        }
    }

    pub fn invalidate(&mut self, key: u64, thread: Thread) -> Result<(), Wrong> {
        let expected = self.model.invalidate(key, thread);
        let got = on(thread, || self.table().invalidate(&key));
        self.tally.hit(if got { "invalidated" } else { "busy" });
        same("invalidate", expected, got)
    }

    pub fn set_limit(&mut self, limit: usize, thread: Thread) {
        self.model.set_limit(limit, thread);
        on(thread, || self.table().set_limit(limit));
    }

    pub fn set_idle_limit(&mut self, limit: usize, thread: Thread) {
        self.model.set_idle_limit(limit, thread);
        on(thread, || self.table().set_idle_limit(limit));
    }

    pub fn reset(&mut self) {
        self.model.refused = None;
        self.table().retry_registrations();
    }

    pub fn retry_closes(&mut self, thread: Thread) -> Result<(), Wrong> {
        let before = self.model.ids();
        let expected = self.model.retry_closes(thread);
        if self.model.ids() < before {
            self.tally.hit("closed at last");
        }
        let got = on(thread, || self.table().retry_closes());
        same("retry_closes", expected, got)
    }

    /// Checks what must hold between any two requests.
    pub fn check(&mut self) -> Result<(), Wrong> {
        if let Some(trouble) = self.trouble.take() {
            return Err(Wrong::Rule(trouble));
        }
        let Some(table) = &self.table else {
            return Ok(());
        };
        same("list", self.model.rows(), rows(&table.list()))?;
        let stats = table.stats();
        same("ids", self.model.ids(), stats.ids)?;
        same("limit", self.model.limit, stats.limit)?;
        same("idle", self.model.idle(), stats.idle)?;
        same("served", &self.model.served, &stats.served)?;
        let failures = self.model.close_failures;
        same("close_failures", failures, stats.close_failures)?;
        same("refused", self.model.refused, stats.refused)?;
        // Independent of the model: above the limit, the number of ids only falls.
        if stats.ids > stats.limit.max(self.ids) {
            return Err(Wrong::Rule(format!(
                "{} ids, the limit is {}",
                stats.ids, stats.limit
            )));
        }
        self.ids = stats.ids;
        Ok(())
    }

    /// Checks that only idle ids are registered.
    pub fn check_idle(&mut self) -> Result<(), Wrong> {
        self.check()?;
        let (stats, rows) = (self.table().stats(), self.table().list());
        let kept = self.model.idle_limit.min(stats.limit);
        if stats.ids == stats.idle && stats.idle <= kept && rows.len() == stats.idle {
            Ok(())
        } else {
            Err(Wrong::Rule(format!(
                "all files are closed, but {stats:?} {rows:?}"
            )))
        }
    }

    /// Checks that the kernel has none of the ids any more.
    pub fn check_closed(&self) -> Result<(), Wrong> {
        for id in 1..=self.greatest_id {
            let id = BackingId::from_raw(id).ok_or("not positive")?;
            if self.device.backing_close(id).is_ok() {
                return Err(Wrong::Rule("an id was still registered".into()));
            }
        }
        Ok(())
    }

    pub fn answer(&mut self, request: &Request<'_>) -> Result<Vec<u8>, Errno> {
        let nodeid = request.nodeid();
        match request.opcode() {
            LOOKUP => {
                let name = self.name(request.body())?;
                if self.names[name].hidden {
                    return Err(Errno::NOENT);
                }
                let nodeid = self.look_up(name)?;
                self.entry(nodeid)
            }
            GETATTR => self.attr_out(nodeid),
            SETATTR => {
                const FATTR_SIZE: u32 = 1 << 3;
                if request.u32(0) & FATTR_SIZE != 0 {
                    let file = &self.node(nodeid)?.backing.file;
                    file.set_len(request.u64(16)).map_err(errno)?;
                }
                self.attr_out(nodeid)
            }
            OPEN => {
                let out = self.open(nodeid, request.u32(0) as i32)?;
                Ok(out.to_bytes().to_vec())
            }
            CREATE => {
                let name = self.name(&request.body()[16..])?;
                self.names[name].hidden = false;
                self.tally.hit(match self.names[name].backing {
                    Some(_) => "created what was there",
                    None => "created",
                });
                if self.names[name].backing.is_none() {
                    self.new_backing(name, Vec::new()).map_err(errno)?;
                }
                let nodeid = self.look_up(name)?;
                let opened = self.open(nodeid, request.u32(0) as i32);
                if opened.is_err() {
                    self.dereference(nodeid, 1);
                }
                let out = opened?;
                let mut reply = self.entry(nodeid)?;
                reply.extend(out.to_bytes());
                Ok(reply)
            }
            READ => {
                let handle = self.handle(request.u64(0))?;
                handle.reads += 1;
                let mut data = vec![0; request.u32(16) as usize];
                let file = &handle.backing.file;
                let length = file.read_at(&mut data, request.u64(8)).map_err(errno)?;
                data.truncate(length);
                Ok(data)
            }
            WRITE => {
                let data = &request.body()[40..][..request.u32(16) as usize];
                let handle = self.handle(request.u64(0))?;
                handle.writes += 1;
                let file = &handle.backing.file;
                file.write_all_at(data, request.u64(8)).map_err(errno)?;
                Ok([request.u32(16), 0].map(u32::to_ne_bytes).concat())
            }
            RELEASE => {
                let fh = request.u64(0);
                let handle = self.handles.remove(&fh).ok_or(Errno::BADF)?;
                let failures = self.model.close_failures;
                self.model.release(handle.uid, handle.release);
                on(handle.release, || drop(handle.open));
                if self.model.close_failures > failures {
                    self.tally.hit("release could not close");
                }
                Ok(Vec::new())
            }
            FLUSH | FSYNC => Ok(Vec::new()),
            _ => Err(Errno::NOSYS),
        }
    }

    fn name(&self, text: &[u8]) -> Result<usize, Errno> {
        let text = text.strip_suffix(&[0]).ok_or(Errno::INVAL)?;
        let found = (0..NAMES).find(|name| name_of(*name).as_bytes() == text);
        found.ok_or(Errno::NOENT)
    }

    fn node(&self, nodeid: u64) -> Result<&Node, Errno> {
        self.nodes.get(&nodeid).ok_or(Errno::STALE)
    }

    fn handle(&mut self, fh: u64) -> Result<&mut Handle, Errno> {
        self.handles.get_mut(&fh).ok_or(Errno::BADF)
    }

    /// The number of a name, which gets one if it has none. Adds a reference.
    fn look_up(&mut self, name: usize) -> Result<u64, Errno> {
        const FIRST: u64 = 2;
        let backing = self.names[name].backing.clone().ok_or(Errno::NOENT)?;
        let nodeid = match self.names[name].node {
            Some(nodeid) => nodeid,
            None => {
                self.generation += 1;
                let unused = FIRST + (self.nodes.len() + self.free.len()) as u64;
                let nodeid = match self.free.pop() {
                    Some(nodeid) => {
                        self.tally.hit("number given out again");
                        nodeid
                    }
                    None => unused,
                };
                let node = Node {
                    name,
                    backing,
                    generation: self.generation,
                    lookups: 0,
                    fresh: true,
                };
                self.nodes.insert(nodeid, node);
                self.names[name].node = Some(nodeid);
                nodeid
            }
        };
        if let Some(node) = self.nodes.get_mut(&nodeid) {
            node.lookups += 1;
        }
        Ok(nodeid)
    }

    /// Drops references of the kernel. After the last one, the number is free.
    pub fn dereference(&mut self, nodeid: u64, count: u64) {
        let Some(node) = self.nodes.get_mut(&nodeid) else {
            return;
        };
        node.lookups = node.lookups.saturating_sub(count);
        if node.lookups > 0 {
            return;
        }
        if self.handles.values().any(|handle| handle.nodeid == nodeid) {
            self.trouble(format!("the kernel forgot {nodeid}, which is open"));
        }
        if let Some(node) = self.nodes.remove(&nodeid) {
            if self.names[node.name].node == Some(nodeid) {
                self.names[node.name].node = None;
            }
        }
        self.free.push(nodeid);
        if self.case.forgets {
            self.forget(nodeid, Thread::Able);
        }
    }

    fn entry(&self, nodeid: u64) -> Result<Vec<u8>, Errno> {
        let generation = self.node(nodeid)?.generation;
        let valid = if self.case.entries_stay { 3600 } else { 0 };
        let mut entry = [nodeid, generation, valid, 0, 0]
            .map(u64::to_ne_bytes)
            .concat();
        entry.extend(self.attributes(nodeid)?);
        Ok(entry)
    }

    fn attr_out(&self, nodeid: u64) -> Result<Vec<u8>, Errno> {
        let mut out = vec![0; 16];
        out.extend(self.attributes(nodeid)?);
        Ok(out)
    }

    fn attributes(&self, nodeid: u64) -> Result<Vec<u8>, Errno> {
        let (mode, size) = if nodeid == ROOT {
            (0o40_755, 0)
        } else {
            let metadata = self.node(nodeid)?.backing.file.metadata();
            (0o100_666, metadata.map_err(errno)?.len())
        };
        Ok(attr(nodeid, size, mode))
    }

    fn open(&mut self, nodeid: u64, flags: i32) -> Result<uapi::fuse_open_out, Errno> {
        let answer = self.answer_open(nodeid, flags);
        self.last = Some(match &answer {
            Ok((opened, _)) => Ok(opened.clone()),
            Err(errno) => Err(*errno),
        });
        answer.map(|(_, out)| out)
    }

    fn answer_open(
        &mut self,
        nodeid: u64,
        flags: i32,
    ) -> Result<(Opened, uapi::fuse_open_out), Errno> {
        let plan = self.plan;
        let node = self.nodes.get_mut(&nodeid).ok_or(Errno::STALE)?;
        let backing = Arc::clone(&node.backing);
        // The number may have been another file's, whose registration must not be shared.
        let fresh = std::mem::replace(&mut node.fresh, false);
        if self.sabotage == Some(Sabotage::ForgottenNumber)
            && self.model.is_open_in_passthrough(nodeid)
            && plan.fd == Fd::Own
            && !plan.direct
        {
            // This is the server's error: model and table still agree.
            self.forget(nodeid, Thread::Able);
            self.sabotaged = true;
        }
        let was_idle = self.model.is_idle(nodeid);
        let remembers = self.model.refused.is_some() && self.model.opens(nodeid) == 0;
        let first = match plan.first {
            First::Open => None,
            First::Share if fresh => None,
            First::Share => {
                let expected = self.model.share(nodeid, flags);
                let got = self.table().share(&nodeid, flags);
                if got.is_some() {
                    self.tally.hit("shared");
                }
                self.agree("share", expected, got)
            }
            First::Serve => {
                let expected = self.model.serve(nodeid, plan.thread);
                let got = on(plan.thread, || self.table().serve(&nodeid));
                if got.is_some() && flags & libc::O_TRUNC != 0 {
                    truncate(&backing)?;
                }
                self.agree("serve", expected, got)
            }
        };
        let (uid, open) = match first {
            Some(answer) => answer,
            None => self.open_with_fd(nodeid, flags, &backing)?,
        };
        if was_idle && open.is_passthrough() {
            self.tally.hit("idle id used again");
        }

        let mut extra = FopenFlags::empty();
        extra.set(FopenFlags::DIRECT_IO, plan.direct);
        extra.set(FopenFlags::NOFLUSH, plan.noflush);
        extra.set(FopenFlags::PARALLEL_DIRECT_WRITES, plan.parallel);
        self.last_handle += 1;
        let fh = self.last_handle;
        let reply = match open.id() {
            // `OpenFile::reply` would leave DIRECT_IO out.
            Some(id) if plan.direct => OpenReply::passthrough(id, Access::ReadWrite, flags, extra)
                .map_err(|why| self.trouble(format!("{why}")))?,
            _ => open.reply(extra),
        };
        let mut out = reply.to_fuse_open_out(fh);
        let id = (out.backing_id != 0).then_some(out.backing_id);
        let passthrough = out.open_flags & uapi::FOPEN_PASSTHROUGH != 0;
        if passthrough != open.is_passthrough() || passthrough != id.is_some() {
            self.trouble(format!("a reply that contradicts itself: {out:?}"));
        }
        let known = self.model.check_id(uid, id);
        known.map_err(|why| self.trouble(why))?;
        self.greatest_id = self.greatest_id.max(out.backing_id);
        if self.model.reason(uid) != open.server_reason() {
            let (expected, got) = (self.model.reason(uid), open.server_reason());
            self.trouble(format!("reason: {got:?}, expected {expected:?}"));
        }
        match self.model.reason(uid) {
            None => self.tally.hit(match plan.direct {
                false => "passthrough",
                true => "passthrough, direct",
            }),
            Some(reason) => {
                self.tally
                    .hit(if plan.direct { "direct" } else { "cached" });
                self.tally.hit(match reason {
                    ServerReason::Refused(_) if remembers => "remembered",
                    _ => reason_name(reason),
                });
            }
        }

        self.sabotage(nodeid, &backing, &mut out);
        let handle = Handle {
            open,
            uid,
            nodeid,
            backing: Arc::clone(&backing),
            cached: !passthrough && !plan.direct,
            release: Thread::Able,
            reads: 0,
            writes: 0,
        };
        self.handles.insert(fh, handle);
        let opened = Opened {
            fh,
            backing,
            passthrough,
        };
        Ok((opened, out))
    }

    /// Opens the file, as a server without passthrough would, and hands the fd to the table.
    fn open_with_fd(
        &mut self,
        nodeid: u64,
        flags: i32,
        backing: &Backing,
    ) -> Result<(Uid, OpenFile<Device>), Errno> {
        let plan = self.plan;
        let truncates = flags & libc::O_TRUNC != 0;
        let path = match plan.fd {
            Fd::Own | Fd::Wide | Fd::Narrow => backing.path.clone(),
            Fd::Other => {
                let other = self.folder.join("other");
                fs::write(&other, "another file").map_err(errno)?;
                other
            }
            Fd::Unfit => "/proc/version".into(),
        };
        let mut options = File::options();
        match plan.fd {
            Fd::Own => {
                let mode = flags & libc::O_ACCMODE;
                let (reads, writes) = (mode != libc::O_WRONLY, mode != libc::O_RDONLY);
                options.read(reads).write(writes);
                options.custom_flags(flags & (libc::O_TRUNC | libc::O_APPEND));
            }
            Fd::Wide | Fd::Other => {
                options.read(true).write(true);
                options.custom_flags(flags & libc::O_TRUNC);
            }
            Fd::Narrow | Fd::Unfit => {
                options.read(true);
            }
        }
        let file = options.open(path).map_err(errno)?;
        let access = match plan.fd {
            Fd::Unfit => Access::ReadWrite,
            _ => Access::of(&file)?,
        };
        let id = file_id(&file, plan.fd != Fd::Unfit).map_err(errno)?;
        let expected = self.model.open(nodeid, flags, id, access, plan.thread);
        let got = on(plan.thread, || {
            let opened = ServerFile::new(&file).access(access);
            self.table().open(&nodeid, flags, opened)
        });
        match (expected, got) {
            (Ok(uid), Ok(open)) => {
                if truncates && plan.fd == Fd::Unfit {
                    truncate(backing)?;
                }
                Ok((uid, open))
            }
            (Err(expected), Err(got)) if expected == got => Err(match got {
                OpenError::AccessExceeded { .. } => {
                    self.tally.hit("access exceeded");
                    Errno::ACCESS
                }
                _ => {
                    self.tally.hit("different file");
                    Errno::STALE
                }
            }),
            (expected, got) => Err(self.trouble(format!(
                "open: {:?}, expected {expected:?}",
                got.map(|open| open.is_passthrough())
            ))),
        }
    }

    /// Pairs the two answers. It is an error if only one of them opens the file.
    fn agree(
        &mut self,
        what: &str,
        expected: Option<Uid>,
        got: Option<OpenFile<Device>>,
    ) -> Option<(Uid, OpenFile<Device>)> {
        if expected.is_some() != got.is_some() {
            let (expected, got) = (expected.is_some(), got.is_some());
            self.trouble(format!("{what}: opens {got}, expected {expected}"));
        }
        expected.zip(got)
    }

    fn sabotage(&mut self, nodeid: u64, backing: &Backing, out: &mut uapi::fuse_open_out) {
        let mut others = self.handles.values().filter(|open| open.nodeid == nodeid);
        let open_already = others.clone().next().is_some();
        let cached_already = others.any(|open| open.cached);
        let passthrough = out.open_flags & uapi::FOPEN_PASSTHROUGH != 0;
        let register = || {
            let id = self.device.backing_open(&backing.file);
            id.map(BackingId::into_raw).expect("registered")
        };
        match self.sabotage {
            Some(Sabotage::CachedWhilePassthrough) if passthrough && open_already => {
                (out.open_flags, out.backing_id) = (0, 0);
            }
            Some(Sabotage::PassthroughWhileCached) if !passthrough && cached_already => {
                (out.open_flags, out.backing_id) = (uapi::FOPEN_PASSTHROUGH, register());
            }
            Some(Sabotage::SecondId) if passthrough && open_already => {
                out.backing_id = register();
            }
            Some(Sabotage::ClosedId) if passthrough => {
                let id = BackingId::from_raw(out.backing_id).expect("positive");
                self.device.backing_close(id).expect("closed");
            }
            _ => return,
        }
        self.sabotaged = true;
    }

    /// Keeps the first error, and returns the errno to answer with.
    pub fn trouble(&mut self, what: String) -> Errno {
        self.trouble.get_or_insert(what);
        Errno::NOTRECOVERABLE
    }
}

pub fn name_of(name: usize) -> String {
    format!("file{name}")
}

/// More than one page of bytes, which differ between seeds.
fn content_of(seed: u64) -> Vec<u8> {
    let byte = |at: u64| (at ^ at >> 8).wrapping_add(seed) as u8;
    (0..5000).map(byte).collect()
}

fn same<T: PartialEq + std::fmt::Debug>(what: &str, expected: T, got: T) -> Result<(), Wrong> {
    if expected == got {
        Ok(())
    } else {
        Err(Wrong::Rule(format!(
            "{what}: {got:#?}, expected {expected:#?}"
        )))
    }
}

fn reason_name(reason: ServerReason) -> &'static str {
    match reason {
        ServerReason::Refused(BackingError::StackedTooDeep) => "refused",
        ServerReason::Refused(BackingError::NotPermitted(NotPermitted::MissingCapability)) => {
            "not permitted"
        }
        ServerReason::Refused(BackingError::NotPermitted(_)) => "denied",
        ServerReason::Refused(BackingError::OutOfMemory) => "out of memory",
        ServerReason::LimitReached => "limit reached",
        ServerReason::Chosen => "chosen",
        _ => "another reason",
    }
}

fn file_id(file: &File, registrable: bool) -> io::Result<FileId> {
    let metadata = file.metadata()?;
    Ok(FileId {
        device: metadata.dev(),
        inode: metadata.ino(),
        registrable,
    })
}

/// Truncates by path, as a server's own open(2) would.
fn truncate(backing: &Backing) -> Result<(), Errno> {
    let mut options = File::options();
    let file = options.write(true).truncate(true).open(&backing.path);
    file.map(drop).map_err(errno)
}
