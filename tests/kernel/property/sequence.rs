//! Random sequences of operations of the clients and the server, and their execution.

use std::collections::HashMap;
use std::fmt;
use std::os::fd::OwnedFd;
use std::os::unix::fs::FileExt;
use std::sync::Arc;

use fuse_backing::init::{InitFlags, MaxStackDepth, negotiate};
use fuse_backing::{FuseDevice, error::Errno};
use proptest::prelude::*;

use super::client::{Answer, MAPPED, Puppet, hex, open_command};
use super::model::Thread;
use super::server::Server;
use super::world::{Backing, Fd, First, Plan, Sabotage, Tally, World, name_of};
use super::{CLIENTS, NAMES, Wrong, failed};
use crate::fuse::{Connection, Init, handshake};
use crate::sandbox::{Sandbox, Tmpfs};

#[derive(Clone)]
pub struct Case {
    /// `FUSE_ATOMIC_O_TRUNC`: without it, the kernel sends a SETATTR for `O_TRUNC`.
    pub atomic_trunc: bool,
    /// `FUSE_DIRECT_IO_ALLOW_MMAP`.
    pub allow_mmap: bool,
    /// Whether the kernel may cache names, or looks them up at each open.
    pub entries_stay: bool,
    /// Whether the server passes FORGET on to the table, or leaves it to `open` to find that a number names another
    /// file.
    pub forgets: bool,
    pub drop: WhenDropped,
    pub ops: Vec<Op>,
}

/// What is left for the table's destructor to close.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum WhenDropped {
    Nothing,
    Idle,
    /// Idle ids, and open files that outlive the table.
    Open,
}

/// One line for each operation, for a report.
impl fmt::Debug for Case {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(
            f,
            "atomic_trunc {}, allow_mmap {}, entries_stay {}, forgets {}, drop {:?}",
            self.atomic_trunc, self.allow_mmap, self.entries_stay, self.forgets, self.drop
        )?;
        for (n, op) in self.ops.iter().enumerate() {
            writeln!(f, "{n:>3}. {op:?}")?;
        }
        Ok(())
    }
}

/// `nth` picks one of the open files or mappings; if there are none, the operation does nothing.
#[derive(Clone, Debug)]
pub enum Op {
    Open {
        client: usize,
        name: usize,
        how: How,
        plan: Plan,
        /// The open file that another client closes at the same time.
        closing: Option<usize>,
    },
    Close {
        nth: usize,
        thread: Thread,
    },
    Read {
        nth: usize,
        offset: usize,
        length: usize,
    },
    Write {
        nth: usize,
        offset: usize,
        length: usize,
        seed: u8,
    },
    Size {
        nth: usize,
    },
    Map {
        nth: usize,
    },
    Peek {
        nth: usize,
        offset: usize,
        length: usize,
    },
    Poke {
        nth: usize,
        offset: usize,
        length: usize,
        seed: u8,
    },
    Unmap {
        nth: usize,
        thread: Thread,
    },
    /// The kernel drops a name from its cache, and forgets the inode unless it is open.
    DropName {
        name: usize,
    },
    /// The name gets another file, or none.
    Replace {
        name: usize,
        new: bool,
        forget: Option<Thread>,
    },
    Forget {
        nodeid: u64,
        thread: Thread,
    },
    Invalidate {
        nodeid: u64,
        thread: Thread,
    },
    Limit {
        limit: usize,
        thread: Thread,
    },
    IdleLimit {
        limit: usize,
        thread: Thread,
    },
    Reset,
    RetryCloses {
        thread: Thread,
    },
}

/// The client's open(2).
#[derive(Clone, Copy, Debug)]
pub struct How {
    /// An access mode. Mode 3, which permits neither reading nor writing, is among them.
    mode: i32,
    truncate: bool,
    append: bool,
    create: bool,
}

impl How {
    fn flags(self) -> i32 {
        let flag = |set, flag| if set { flag } else { 0 };
        self.mode
            | flag(self.truncate, libc::O_TRUNC)
            | flag(self.append, libc::O_APPEND)
            | flag(self.create, libc::O_CREAT)
    }
}

/// `tight` limits the ids to a few, keeps some idle, and makes more closes fail.
pub fn case(tight: bool) -> impl Strategy<Value = Case> {
    let settings = (
        prop::bool::weighted(0.8),
        prop::bool::weighted(0.7),
        any::<bool>(),
        prop::bool::weighted(0.7),
        prop_oneof![
            2 => Just(WhenDropped::Nothing),
            1 => Just(WhenDropped::Idle),
            1 => Just(WhenDropped::Open),
        ],
    );
    let ids = (1..4_usize, 1..4_usize);
    let ops = prop::collection::vec(op(if tight { 2 } else { 7 }), 0..60);
    (settings, ids, ops).prop_map(move |(settings, ids, mut ops)| {
        let (atomic_trunc, allow_mmap, entries_stay, forgets, drop) = settings;
        if tight {
            let (thread, (limit, idle)) = (Thread::Able, ids);
            ops.insert(0, Op::Limit { limit, thread });
            ops.insert(
                0,
                Op::IdleLimit {
                    limit: idle,
                    thread,
                },
            );
        }
        Case {
            atomic_trunc,
            allow_mmap,
            entries_stay,
            forgets,
            drop,
            ops,
        }
    })
}

/// One close in `able` + 1 fails.
fn op(able: u32) -> impl Strategy<Value = Op> {
    let nth = || 0..16_usize;
    let offset = || prop_oneof![2 => 0..200_usize, 3 => 0..9000_usize];
    let length = || prop_oneof![3 => 1..200_usize, 1 => 1..1200_usize];
    let nodeid = || 1..9_u64;
    // The thread on which the table closes ids.
    let thread = move || prop_oneof![able => Just(Thread::Able), 1 => Just(Thread::Incapable)];
    prop_oneof![
        14 => open(),
        7 => (nth(), thread()).prop_map(|(nth, thread)| Op::Close { nth, thread }),
        5 => (nth(), offset(), length())
            .prop_map(|(nth, offset, length)| Op::Read { nth, offset, length }),
        6 => (nth(), offset(), length(), any::<u8>())
            .prop_map(|(nth, offset, length, seed)| Op::Write { nth, offset, length, seed }),
        1 => nth().prop_map(|nth| Op::Size { nth }),
        3 => nth().prop_map(|nth| Op::Map { nth }),
        2 => (nth(), offset(), length())
            .prop_map(|(nth, offset, length)| Op::Peek { nth, offset, length }),
        2 => (nth(), offset(), length(), any::<u8>())
            .prop_map(|(nth, offset, length, seed)| Op::Poke { nth, offset, length, seed }),
        2 => (nth(), thread()).prop_map(|(nth, thread)| Op::Unmap { nth, thread }),
        2 => (0..NAMES).prop_map(|name| Op::DropName { name }),
        2 => (0..NAMES, prop::bool::weighted(0.8), prop::option::of(thread()))
            .prop_map(|(name, new, forget)| Op::Replace { name, new, forget }),
        1 => (nodeid(), thread()).prop_map(|(nodeid, thread)| Op::Forget { nodeid, thread }),
        2 => (nodeid(), thread()).prop_map(|(nodeid, thread)| Op::Invalidate { nodeid, thread }),
        2 => (prop_oneof![1 => 0..4_usize, 2 => Just(1000)], thread())
            .prop_map(|(limit, thread)| Op::Limit { limit, thread }),
        1 => (0..4_usize, thread()).prop_map(|(limit, thread)| Op::IdleLimit { limit, thread }),
        2 => Just(Op::Reset),
        1 => thread().prop_map(|thread| Op::RetryCloses { thread }),
    ]
}

fn open() -> impl Strategy<Value = Op> {
    let how = (
        prop_oneof![
            6 => Just(libc::O_RDONLY),
            4 => Just(libc::O_WRONLY),
            10 => Just(libc::O_RDWR),
            1 => Just(libc::O_ACCMODE),
        ],
        prop::bool::weighted(0.12),
        prop::bool::weighted(0.15),
        prop::bool::weighted(0.15),
    );
    let how = how.prop_map(|(mode, truncate, append, create)| How {
        mode,
        truncate,
        append,
        create,
    });
    let plan = (
        prop_oneof![5 => Just(First::Open), 6 => Just(First::Share), 2 => Just(First::Serve)],
        prop_oneof![
            16 => Just(Fd::Own),
            3 => Just(Fd::Wide),
            2 => Just(Fd::Narrow),
            2 => Just(Fd::Other),
            2 => Just(Fd::Unfit),
        ],
        prop::bool::weighted(0.3),
        prop::bool::weighted(0.2),
        prop::bool::weighted(0.2),
        prop_oneof![
            25 => Just(Thread::Able),
            1 => Just(Thread::Incapable),
            1 => Just(Thread::OutOfMemory),
            1 => Just(Thread::Denied),
        ],
    );
    let plan = plan.prop_map(|(first, fd, direct, noflush, parallel, thread)| Plan {
        first,
        fd,
        direct,
        noflush,
        parallel,
        thread,
    });
    let closing = prop::option::weighted(0.15, 0..16_usize);
    (0..CLIENTS, 0..NAMES, how, plan, closing).prop_map(|(client, name, how, plan, closing)| {
        Op::Open {
            client,
            name,
            how,
            plan,
            closing,
        }
    })
}

/// A file that a client has open, or mapped.
struct OpenFile {
    client: usize,
    slot: u64,
    fh: u64,
    backing: Arc<Backing>,
    how: How,
    direct: bool,
    passthrough: bool,
    /// Whether its fd is still open.
    fd: bool,
    mapped: bool,
}

impl OpenFile {
    fn reads(&self) -> bool {
        matches!(self.how.mode, libc::O_RDONLY | libc::O_RDWR)
    }

    fn writes(&self) -> bool {
        matches!(self.how.mode, libc::O_WRONLY | libc::O_RDWR)
    }

    /// Whether reads and writes bypass the server.
    fn bypasses_server(&self) -> bool {
        self.passthrough && !self.direct
    }

    /// Whether it is not released yet. A mapping in passthrough mode maps the backing file, and does not hold the open
    /// file.
    fn is_held(&self) -> bool {
        self.fd || self.mapped && !self.passthrough
    }
}

/// The clients, the server, and what they share. The connection goes first, after which nothing can hang.
struct Run {
    server: Option<Server>,
    connection: Option<Connection>,
    clients: Vec<Puppet>,
    tmpfs: Tmpfs,
    files: Vec<OpenFile>,
    /// The expected content of each file that was written, by serial.
    contents: HashMap<u64, Vec<u8>>,
    last_slot: u64,
    allow_mmap: bool,
    sabotaged: bool,
}

impl Drop for Run {
    fn drop(&mut self) {
        if let Some(connection) = &self.connection {
            let _ = connection.abort();
        }
        if let Some(server) = self.server.take() {
            server.join();
        }
        self.connection = None;
    }
}

/// The result of a sequence, and whether it broke the rule that it was to break.
pub struct Outcome {
    pub result: Result<(), Wrong>,
    pub sabotaged: bool,
}

/// Runs a sequence, from mounting to unmounting. `offered` has the kernel's INIT flags.
pub fn run(
    sandbox: &Sandbox,
    offered: u64,
    case: &Case,
    sabotage: Option<Sabotage>,
    tally: &mut Tally,
) -> Outcome {
    let mut run = match Run::start(sandbox, offered, case, sabotage) {
        Ok(run) => run,
        Err(wrong) => {
            return Outcome {
                result: Err(wrong),
                sabotaged: false,
            };
        }
    };
    let result = run.carry_out(case);
    let world = run.server().world();
    tally.add(&world.tally);
    let sabotaged = world.sabotaged;
    drop(world);
    Outcome { result, sabotaged }
}

impl Run {
    fn start(
        sandbox: &Sandbox,
        offered: u64,
        case: &Case,
        sabotage: Option<Sabotage>,
    ) -> Result<Self, Wrong> {
        let atomic_o_trunc = InitFlags::from_bits_retain(1 << 3);
        let mut wanted = InitFlags::empty();
        wanted.set(atomic_o_trunc, case.atomic_trunc);
        wanted.set(InitFlags::DIRECT_IO_ALLOW_MMAP, case.allow_mmap);
        let offered = InitFlags::from_bits_retain(offered);
        let negotiated = negotiate(offered, wanted, MaxStackDepth::One)?;
        let init = Init {
            flags: negotiated.flags.bits(),
            max_stack_depth: negotiated.max_stack_depth,
        };

        let tmpfs = sandbox.tmpfs().map_err(failed)?;
        let device = FuseDevice::open()?.into_inner();
        let connection = Connection::unanswered(sandbox, device).map_err(failed)?;
        let device: Arc<OwnedFd> = connection.device().into_inner();
        handshake(&device, init).map_err(failed)?;
        let device = Arc::new(connection.device());
        let world = World::new(case.clone(), tmpfs.path().to_owned(), device, sabotage)?;
        let mut run = Self {
            server: Some(Server::start(world)),
            connection: Some(connection),
            clients: Vec::new(),
            tmpfs,
            files: Vec::new(),
            contents: HashMap::new(),
            last_slot: 0,
            allow_mmap: negotiated.flags.contains(InitFlags::DIRECT_IO_ALLOW_MMAP),
            sabotaged: sabotage.is_some(),
        };
        for _ in 0..CLIENTS {
            run.clients.push(Puppet::start().map_err(failed)?);
        }
        Ok(run)
    }

    fn server(&self) -> &Server {
        self.server.as_ref().expect("it serves until it is dropped")
    }

    fn carry_out(&mut self, case: &Case) -> Result<(), Wrong> {
        for (n, op) in case.ops.iter().enumerate() {
            let done = self.step(op).and_then(|()| self.check());
            done.map_err(|wrong| wrong.at(format!("{n}. {op:?}")))?;
        }
        self.end(case).map_err(|wrong| wrong.at("the end"))
    }

    fn check(&self) -> Result<(), Wrong> {
        let mut world = self.server().world();
        world.check()?;
        for backing in world.backings() {
            let mut content = vec![0; MAPPED + 1];
            let length = backing.file.read_at(&mut content, 0)?;
            content.truncate(length);
            if let Some(difference) = difference(self.content_of(&backing), &content) {
                let serial = backing.serial;
                return Err(Wrong::Rule(format!("backing file {serial}: {difference}")));
            }
        }
        Ok(())
    }

    /// The index of the `nth` file that fits, counted round.
    fn pick(&self, nth: usize, fits: impl Fn(&OpenFile) -> bool) -> Option<usize> {
        let fitting: Vec<_> = (0..self.files.len())
            .filter(|at| fits(&self.files[*at]))
            .collect();
        fitting
            .get(nth.checked_rem(fitting.len()).unwrap_or(0))
            .copied()
    }

    fn ask(&mut self, at: usize, verb: &str, rest: &str) -> Result<Answer, Wrong> {
        let file = &self.files[at];
        let command = format!("{verb} {} {rest}", file.slot);
        self.clients[file.client].ask(&command).map_err(failed)
    }

    /// Asks, and compares the answer.
    fn expect(&mut self, at: usize, verb: &str, rest: &str, answer: Answer) -> Result<(), Wrong> {
        let got = self.ask(at, verb, rest)?;
        compare(verb, &answer, &got)
    }

    fn content(&self, at: usize) -> &[u8] {
        self.content_of(&self.files[at].backing)
    }

    fn content_of<'a>(&'a self, backing: &'a Backing) -> &'a [u8] {
        let content = self.contents.get(&backing.serial);
        content.unwrap_or(&backing.initial)
    }

    /// Writes to the expected content.
    fn write(&mut self, at: usize, offset: usize, bytes: &[u8]) {
        let backing = &self.files[at].backing;
        let content = self.contents.entry(backing.serial);
        let content = content.or_insert_with(|| backing.initial.clone());
        let end = offset + bytes.len();
        content.resize(content.len().max(end), 0);
        content[offset..end].copy_from_slice(bytes);
    }

    fn step(&mut self, op: &Op) -> Result<(), Wrong> {
        match *op {
            Op::Open {
                client,
                name,
                how,
                plan,
                closing,
            } => self.open(client, name, how, plan, closing),
            Op::Close { nth, thread } => match self.pick(nth, |file| file.fd) {
                Some(at) => self.close(at, thread),
                None => Ok(()),
            },
            Op::Read {
                nth,
                offset,
                length,
            } => match self.pick(nth, |file| file.fd) {
                Some(at) => self.read(at, offset, length),
                None => Ok(()),
            },
            Op::Write {
                nth,
                offset,
                length,
                seed,
            } => match self.pick(nth, |file| file.fd) {
                Some(at) => self.write_through(at, offset, &pattern(seed, length)),
                None => Ok(()),
            },
            Op::Size { nth } => match self.pick(nth, |file| file.fd) {
                Some(at) => {
                    let size = self.content(at).len().to_string();
                    self.expect(at, "size", "", Ok(size))
                }
                None => Ok(()),
            },
            Op::Map { nth } => match self.pick(nth, |file| file.fd && !file.mapped) {
                Some(at) => self.map(at),
                None => Ok(()),
            },
            Op::Peek {
                nth,
                offset,
                length,
            } => {
                let Some(at) = self.pick(nth, |file| file.mapped) else {
                    return Ok(());
                };
                self.peek(at, offset, length)
            }
            Op::Poke {
                nth,
                offset,
                length,
                seed,
            } => {
                let Some(at) = self.pick(nth, |file| file.mapped && file.writes()) else {
                    return Ok(());
                };
                self.poke(at, offset, length, seed)
            }
            Op::Unmap { nth, thread } => match self.pick(nth, |file| file.mapped) {
                Some(at) => self.unmap(at, thread),
                None => Ok(()),
            },
            Op::DropName { name } => {
                self.server().invalidate_entry(name);
                // A mapping of the backing file holds the inode even after RELEASE, so that there is no FORGET.
                let backing = self.server().world().backing(name).map(|b| b.serial);
                let mut held = self.files.iter().map(|file| file.backing.serial);
                if held.any(|serial| Some(serial) == backing) {
                    return Ok(());
                }
                let forgotten = |world: &World| world.node_of(name).is_none();
                self.server().wait("FORGET", forgotten)
            }
            Op::Replace { name, new, forget } => {
                self.server().world().replace(name, new, forget)?;
                self.server().invalidate_entry(name);
                Ok(())
            }
            Op::Forget { nodeid, thread } => {
                let mut world = self.server().world();
                if world.model.opens(nodeid) == 0 || !world.is_named(nodeid) {
                    world.forget(nodeid, thread);
                }
                Ok(())
            }
            Op::Invalidate { nodeid, thread } => self.server().world().invalidate(nodeid, thread),
            Op::Limit { limit, thread } => {
                self.server().world().set_limit(limit, thread);
                Ok(())
            }
            Op::IdleLimit { limit, thread } => {
                self.server().world().set_idle_limit(limit, thread);
                Ok(())
            }
            Op::Reset => {
                self.server().world().reset();
                Ok(())
            }
            Op::RetryCloses { thread } => self.server().world().retry_closes(thread),
        }
    }

    fn open(
        &mut self,
        client: usize,
        name: usize,
        how: How,
        mut plan: Plan,
        closing: Option<usize>,
    ) -> Result<(), Wrong> {
        // A close at the same time changes the kernel's count of opens, so that a broken rule may be none.
        let closing = closing.filter(|_| !self.sabotaged);
        let closing = closing.and_then(|nth| {
            self.pick(nth, |file| file.fd && !file.mapped && file.client != client)
        });
        let mut world = self.server().world();
        let open = world
            .node_of(name)
            .is_some_and(|nodeid| world.model.is_open_in_passthrough(nodeid));
        match plan.fd {
            Fd::Other if !open || closing.is_some() => plan.fd = Fd::Own,
            // A server with a read-only fd would have to refuse O_TRUNC itself.
            Fd::Narrow if how.truncate => plan.fd = Fd::Own,
            _ => {}
        }
        world.plan = plan;
        world.last = None;
        world.hide(name, how.create);
        let exists = how.create || world.backing(name).is_some();
        drop(world);
        if how.create {
            self.server().invalidate_entry(name);
        }

        self.last_slot += 1;
        let slot = self.last_slot;
        let connection = self.connection.as_ref().ok_or("unmounted")?;
        let path = connection.path(&name_of(name));
        let command = open_command(slot, how.flags(), &path);
        let got = match closing {
            None => self.clients[client].ask(&command).map_err(failed)?,
            Some(at) => {
                let (closer, close) = (self.files[at].client, self.files[at].slot);
                self.clients[closer].send(&format!("close {close}"))?;
                self.clients[client].send(&command)?;
                let got = self.clients[client].answer().map_err(failed)?;
                let closed = self.clients[closer].answer().map_err(failed)?;
                compare("close", &Ok(String::new()), &closed)?;
                self.hit("closed and opened at once");
                self.files[at].fd = false;
                self.wait_for_release(at)?;
                got
            }
        };

        let mut world = self.server().world();
        world.hide(name, false);
        let last = world.last.take();
        drop(world);
        let expected = match &last {
            Some(Ok(_)) => Ok(String::new()),
            Some(Err(errno)) => Err(errno.raw_os_error()),
            None if exists => return Err(Wrong::Rule(format!("no OPEN came: {got:?}"))),
            None => Err(libc::ENOENT),
        };
        if let Some(Ok(opened)) = last {
            if got.is_err() {
                // The kernel releases a file whose reply it refused.
                let released = |world: &World| world.asked(opened.fh).is_none();
                self.server().wait("RELEASE", released)?;
            } else {
                if how.truncate {
                    self.hit("truncated");
                    self.contents.insert(opened.backing.serial, Vec::new());
                }
                self.files.push(OpenFile {
                    client,
                    slot,
                    fh: opened.fh,
                    backing: opened.backing,
                    how,
                    direct: plan.direct,
                    passthrough: opened.passthrough,
                    fd: true,
                    mapped: false,
                });
            }
        }
        compare("open", &expected, &got)
    }

    fn close(&mut self, at: usize, thread: Thread) -> Result<(), Wrong> {
        let fh = self.files[at].fh;
        self.server().world().release_on(fh, thread);
        self.expect(at, "close", "", Ok(String::new()))?;
        self.files[at].fd = false;
        self.wait_for_release(at)
    }

    fn unmap(&mut self, at: usize, thread: Thread) -> Result<(), Wrong> {
        let fh = self.files[at].fh;
        self.server().world().release_on(fh, thread);
        self.expect(at, "unmap", "", Ok(String::new()))?;
        self.files[at].mapped = false;
        self.wait_for_release(at)
    }

    /// To be called after its fd was closed or its mapping removed.
    fn wait_for_release(&mut self, at: usize) -> Result<(), Wrong> {
        let (fh, mapped) = (self.files[at].fh, self.files[at].mapped);
        if !self.files[at].is_held() {
            let released = |world: &World| world.asked(fh).is_none();
            self.server().wait("RELEASE", released)?;
            if !mapped {
                self.files.remove(at);
            }
        }
        Ok(())
    }

    fn read(&mut self, at: usize, offset: usize, length: usize) -> Result<(), Wrong> {
        let content = self.content(at);
        let start = offset.min(content.len());
        let bytes = &content[start..(start + length).min(content.len())];
        let expected = if self.files[at].reads() {
            Ok(hex(bytes))
        } else {
            Err(libc::EBADF)
        };
        let before = self.asked(at)?;
        self.expect(at, "read", &format!("{offset} {length}"), expected)?;
        let reads = self.asked(at)?.0 - before.0;
        let file = &self.files[at];
        if file.bypasses_server() && reads > 0 {
            return Err(Wrong::Rule(format!("{reads} READs in passthrough mode")));
        }
        if file.direct && file.reads() && reads == 0 {
            return Err(Wrong::Rule("no READ of a direct file".into()));
        }
        Ok(())
    }

    fn write_through(&mut self, at: usize, offset: usize, bytes: &[u8]) -> Result<(), Wrong> {
        let appends = self.files[at].how.append;
        let start = if appends {
            self.content(at).len()
        } else {
            offset
        };
        if start + bytes.len() > MAPPED {
            return Ok(());
        }
        let rest = format!("{offset} {}", hex(bytes));
        if !self.files[at].writes() {
            return self.expect(at, "write", &rest, Err(libc::EBADF));
        }
        if appends {
            self.hit("appended");
        }
        let before = self.asked(at)?;
        self.expect(at, "write", &rest, Ok(bytes.len().to_string()))?;
        self.write(at, start, bytes);
        let writes = self.asked(at)?.1 - before.1;
        if self.files[at].bypasses_server() != (writes == 0) {
            return Err(Wrong::Rule(format!("{writes} WRITEs")));
        }
        Ok(())
    }

    fn map(&mut self, at: usize) -> Result<(), Wrong> {
        let file = &self.files[at];
        let answer = if !file.reads() {
            Err(libc::EACCES)
        } else if file.direct && !file.passthrough && !self.allow_mmap {
            Err(libc::ENODEV)
        } else {
            Ok(String::new())
        };
        self.files[at].mapped = answer.is_ok();
        let what = match (&answer, self.files[at].passthrough, self.files[at].direct) {
            (Err(_), ..) => "mapping refused",
            (Ok(_), true, false) => "mapped in passthrough",
            (Ok(_), true, true) => "mapped in passthrough, direct",
            (Ok(_), false, false) => "mapped cached",
            (Ok(_), false, true) => "mapped direct",
        };
        self.hit(what);
        let rest = if self.files[at].writes() { "rw" } else { "r" };
        self.expect(at, "map", rest, answer)
    }

    fn peek(&mut self, at: usize, offset: usize, length: usize) -> Result<(), Wrong> {
        let Some((start, end)) = within(self.content(at).len(), offset, length) else {
            return Ok(());
        };
        self.hit("mapping read");
        let bytes = hex(&self.content(at)[start..end]);
        let asked = |run: &Self| run.server().world().asked(run.files[at].fh);
        let before = asked(self);
        self.expect(at, "peek", &format!("{start} {}", end - start), Ok(bytes))?;
        if self.files[at].passthrough && before != asked(self) {
            return Err(Wrong::Rule("READ for a mapping in passthrough mode".into()));
        }
        Ok(())
    }

    fn poke(&mut self, at: usize, offset: usize, length: usize, seed: u8) -> Result<(), Wrong> {
        let Some((start, end)) = within(self.content(at).len(), offset, length) else {
            return Ok(());
        };
        // A mapping of the backing file outlives the open file and the inode's passthrough mode. In server mode, the
        // FUSE page cache would not see what it writes.
        let serial = self.files[at].backing.serial;
        if self.files[at].passthrough && self.server().world().in_server_mode(serial) {
            return Ok(());
        }
        self.hit("mapping written");
        let bytes = pattern(seed, end - start);
        let rest = format!("{start} {}", hex(&bytes));
        self.expect(at, "poke", &rest, Ok(String::new()))?;
        self.write(at, start, &bytes);
        Ok(())
    }

    fn asked(&self, at: usize) -> Result<(u64, u64), Wrong> {
        let asked = self.server().world().asked(self.files[at].fh);
        asked.ok_or_else(|| Wrong::Rule("released while it was open".into()))
    }

    fn hit(&self, what: &'static str) {
        self.server().world().tally.hit(what);
    }

    /// Closes everything. The table then has only idle ids, and none after it was dropped.
    fn end(&mut self, case: &Case) -> Result<(), Wrong> {
        if case.drop == WhenDropped::Open {
            self.server().world().table = None;
        }
        while let Some(at) = self.pick(0, |file| file.mapped) {
            self.unmap(at, Thread::Able)?;
        }
        while let Some(at) = self.pick(0, |file| file.fd) {
            self.close(at, Thread::Able)?;
        }
        for client in self.clients.drain(..) {
            client.finish().map_err(failed)?;
        }
        self.check()?;

        let mut world = self.server().world();
        if world.open_files() > 0 {
            return Err(Wrong::Rule("a file is still open".into()));
        }
        if world.table.is_some() {
            world.retry_closes(Thread::Able)?;
            world.check_idle()?;
            if case.drop == WhenDropped::Nothing {
                world.set_idle_limit(0, Thread::Able);
                world.check_idle()?;
            }
            world.table = None;
        }
        world.check_closed()?;
        world.close_files();
        drop(world);
        // The connection still exists: its end would close every id.
        self.tmpfs.unmount_when_idle().map_err(failed)
    }
}

fn compare(verb: &str, expected: &Answer, got: &Answer) -> Result<(), Wrong> {
    if expected == got {
        return Ok(());
    }
    Err(match (expected, got) {
        (_, Err(errno)) => Wrong::Errno {
            text: format!(
                "{verb}: the client gets {}, expected {expected:?}",
                Errno::from_raw_os_error(*errno)
            ),
            errno: *errno,
        },
        _ => Wrong::Rule(format!(
            "{verb}: the client gets {got:?}, expected {expected:?}"
        )),
    })
}

/// How the contents of two files differ.
fn difference(expected: &[u8], got: &[u8]) -> Option<String> {
    if expected == got {
        return None;
    }
    let mut pairs = expected.iter().zip(got);
    let at = pairs.position(|(a, b)| a != b);
    Some(format!(
        "{} bytes, expected {}; the first difference at {at:?}",
        got.len(),
        expected.len()
    ))
}

/// A non-empty range in a file of this size; `None` if the file is empty.
fn within(size: usize, offset: usize, length: usize) -> Option<(usize, usize)> {
    let start = offset.checked_rem(size)?;
    Some((start, size.min(start + length)))
}

fn pattern(seed: u8, length: usize) -> Vec<u8> {
    (0..length).map(|at| seed.wrapping_add(at as u8)).collect()
}
