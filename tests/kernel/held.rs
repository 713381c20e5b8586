//! What a registration holds: nothing of a released writer, and the fd if the table keeps it. Also what is registered
//! if there is no `O_PATH` fd.

use std::ffi::c_long;
use std::fs::{self, File};
use std::io::Read;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::atomic::Ordering;
use std::sync::{Arc, Mutex, OnceLock};
use std::thread::sleep;
use std::time::{Duration, Instant};

use fuse_backing::error::{OpenError, ServerReason};
use fuse_backing::{
    Access, BackingFile, BackingTable, FopenFlags, FuseDevice, OpenFile, OpenReply, ServerFile,
    error::Errno,
};
use libtest_mimic::Failed;
use macro_rules_attribute::apply;
use rustix::fs::{FlockOperation, Mode, OFlags, flock, open};
use rustix::io::fcntl_dupfd_cloexec;
use rustix::mount::{MountFlags, mount_remount};
use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};

use crate::client::{self, Client, Role, wait_for_parent};
use crate::expect::path_only_files;
use crate::fuse::{Connection, Init, Node, OpenAnswer, mounted};
use crate::sandbox::{Sandbox, Tmpfs, patience_times};
use crate::seccomp::refuse;
use crate::thread::apart;

#[apply(needs_passthrough)]
fn table_holds_no_released_writer(sandbox: &Sandbox) -> Result<(), Failed> {
    held(sandbox, Registered::ByTable)
}

#[apply(needs_passthrough)]
fn kept_fd_holds_no_released_writer(sandbox: &Sandbox) -> Result<(), Failed> {
    held(sandbox, Registered::Kept)
}

#[apply(needs_passthrough)]
fn table_without_path_fd_holds_a_released_writer(sandbox: &Sandbox) -> Result<(), Failed> {
    held(sandbox, Registered::WithoutPath)
}

#[apply(needs_passthrough)]
fn own_fd_holds_a_released_writer(sandbox: &Sandbox) -> Result<(), Failed> {
    held(sandbox, Registered::OwnFd)
}

pub const ROLES: &[(&str, Role)] = &[
    ("close-the-writer", close_the_writer),
    ("reach-the-limit", reach_the_limit),
    ("refused-statx", refused_statx),
];

type Device = Arc<FuseDevice<Arc<OwnedFd>>>;
type Table = BackingTable<Device>;

const RDWR: OFlags = OFlags::RDWR;

/// How the file is registered.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Registered {
    /// By a table, with its defaults.
    ByTable,
    /// By a table that keeps its fds.
    Kept,
    /// By a table, on a thread for which a policy denies open_tree(2).
    WithoutPath,
    /// The control: the fd of the first open, without a table.
    OwnFd,
}

impl Registered {
    /// Whether a registration that a writer's open made still counts as a writer after its release.
    fn holds_writer(self) -> bool {
        match self {
            Self::ByTable | Self::Kept => !path_only_files(),
            Self::WithoutPath | Self::OwnFd => true,
        }
    }
}

/// A server of one file, which is a program.
struct Server {
    connection: Connection,
    state: Arc<State>,
    tmpfs: Tmpfs,
}

struct State {
    registered: Registered,
    program: PathBuf,
    // The server's closure is made before the device and the table, which are set later.
    device: OnceLock<Device>,
    table: OnceLock<Table>,
    own: Mutex<Option<BackingFile<Device>>>,
    opens: Mutex<Vec<Open>>,
}

/// What the server keeps of an open until its RELEASE.
struct Open {
    writes: bool,
    _file: OwnedFd,
    _counted: Option<OpenFile<Device>>,
}

impl State {
    /// Opens the program with the client's access mode. For a writer, also locks it.
    fn answer(&self, nodeid: u64, flags: i32) -> OpenAnswer {
        let access_mode = OFlags::from_bits_retain(flags as u32) & OFlags::RWMODE;
        let file = open(&self.program, access_mode | OFlags::CLOEXEC, Mode::empty())?;
        let writes = access_mode != OFlags::RDONLY;
        if writes {
            flock(&file, FlockOperation::NonBlockingLockExclusive)?;
        }
        let (out, counted) = if self.registered == Registered::OwnFd {
            (self.register_own(&file, flags)?, None)
        } else {
            let open = self.open_in_table(nodeid, flags, &file)?;
            let out = open.reply(FopenFlags::empty()).to_fuse_open_out(1);
            (out, Some(open))
        };
        self.opens.lock().unwrap().push(Open {
            writes,
            _file: file,
            _counted: counted,
        });
        Ok(out)
    }

    fn register_own(&self, file: &OwnedFd, flags: i32) -> OpenAnswer {
        let device = self.device.get().ok_or(Errno::IO)?;
        let mut own = self.own.lock().unwrap();
        if own.is_none() {
            let device = Arc::clone(device);
            *own = Some(BackingFile::open(device, file, Access::ReadWrite)?);
        }
        let own = own.as_ref().ok_or(Errno::IO)?;
        let reply =
            OpenReply::passthrough(own.id(), Access::ReadWrite, flags, FopenFlags::empty())?;
        Ok(reply.to_fuse_open_out(1))
    }

    fn open_in_table(
        &self,
        nodeid: u64,
        flags: i32,
        file: &OwnedFd,
    ) -> Result<OpenFile<Device>, Errno> {
        let table = self.table.get().ok_or(Errno::IO)?;
        let open = || table.open(&nodeid, flags, ServerFile::new(file));
        Ok(match self.registered {
            Registered::WithoutPath => without(libc::SYS_open_tree, Errno::PERM, open)?,
            _ => open()?,
        })
    }
}

impl Server {
    fn start(sandbox: &Sandbox, registered: Registered) -> Result<Self, Failed> {
        let tmpfs = sandbox.tmpfs()?;
        let program = tmpfs.path().join("program");
        // This test binary is the one program that every machine has.
        fs::copy("/proc/self/exe", &program)?;
        let node = Node {
            name: "program".into(),
            backing: File::open(&program)?,
        };
        let state = Arc::new(State {
            registered,
            program,
            device: OnceLock::new(),
            table: OnceLock::new(),
            own: Mutex::default(),
            opens: Mutex::default(),
        });
        let answering = Arc::clone(&state);
        let connection = Connection::serve(
            sandbox,
            Init::passthrough(1),
            vec![node],
            Arc::new(move |nodeid, flags| answering.answer(nodeid, flags)),
        )?;
        let device = Arc::new(connection.device());
        let table = BackingTable::new(Arc::clone(&device));
        table.set_keep_fds(registered == Registered::Kept);
        table.set_idle_limit(1);
        state.device.set(device).map_err(|_| "set twice")?;
        state.table.set(table).map_err(|_| "set twice")?;
        Ok(Self {
            connection,
            state,
            tmpfs,
        })
    }

    fn table(&self) -> &Table {
        self.state.table.get().expect("started")
    }

    /// Waits until there were so many RELEASEs, and drops the opens that were released.
    fn release(&self, releases: u64, which: impl Fn(&Open) -> bool) -> Result<(), Failed> {
        self.connection.wait_for_releases(releases)?;
        self.state.opens.lock().unwrap().retain(|open| !which(open));
        Ok(())
    }

    /// Asserts that every call of `CALLS` fails if `busy`, and succeeds otherwise.
    #[track_caller]
    fn expect(&self, busy: bool, when: &str) {
        let outcomes = CALLS.map(|(name, call, _)| (name, self.lasting(call, busy)));
        let expected = CALLS.map(|(name, _, errno)| (name, if busy { Err(errno) } else { Ok(()) }));
        assert_eq!(outcomes, expected, "{:?}, {when}", self.state.registered);
    }

    /// The result of a call after retries. It can fail for a moment for other reasons: between fork and exec, a child
    /// of another test has all fds of this process, and the kernel drops a client's file a moment after its close(2).
    fn lasting(&self, call: Call, busy: bool) -> Result<(), Errno> {
        let patience = Duration::from_millis(if busy { 100 } else { 10_000 }) * patience_times();
        let deadline = Instant::now() + patience;
        loop {
            match call(self) {
                Err(_) if Instant::now() < deadline => sleep(Duration::from_millis(5)),
                outcome => return outcome,
            }
        }
    }
}

type Call = fn(&Server) -> Result<(), Errno>;

/// Calls that fail with the errno while the program has a writer, or is locked. None has a lasting effect.
const CALLS: [(&str, Call, Errno); 4] = [
    ("execve", run, Errno::TXTBSY),
    ("F_SETLEASE", lease, Errno::AGAIN),
    ("remount,ro", remount, Errno::BUSY),
    ("flock", lock, Errno::WOULDBLOCK),
];

fn run(server: &Server) -> Result<(), Errno> {
    let ended = Command::new(&server.state.program)
        .arg("--list")
        .env("FUSE_BACKING_TEST", "off")
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .status();
    let status = ended.map_err(|error| Errno::from_io_error(&error).expect("an errno"))?;
    assert!(status.success(), "{status}");
    Ok(())
}

#[allow(unsafe_code)]
fn lease(server: &Server) -> Result<(), Errno> {
    let file = open(
        &server.state.program,
        OFlags::RDONLY | OFlags::CLOEXEC,
        Mode::empty(),
    )?;
    // SAFETY: F_SETLEASE takes an int. The lease ends with the fd.
    match unsafe { libc::fcntl(file.as_raw_fd(), libc::F_SETLEASE, libc::F_RDLCK) } {
        0 => Ok(()),
        _ => {
            let error = std::io::Error::last_os_error();
            Err(Errno::from_io_error(&error).expect("an errno"))
        }
    }
}

fn remount(server: &Server) -> Result<(), Errno> {
    mount_remount(server.tmpfs.path(), MountFlags::RDONLY, "")?;
    mount_remount(server.tmpfs.path(), MountFlags::empty(), "")
}

fn lock(server: &Server) -> Result<(), Errno> {
    let file = File::open(&server.state.program).expect("readable");
    flock(&file, FlockOperation::NonBlockingLockExclusive)
}

/// How many bytes of the program are read, enough to recognize it.
const HEAD: usize = 64;

/// Opens the file for reading and writing, and again for reading. Closes the writer, reads with the reader, and closes
/// it, each after `proceed`.
fn close_the_writer(args: &[String]) -> Result<String, Box<dyn std::error::Error>> {
    let writer = File::options().read(true).write(true).open(&args[0])?;
    let mut reader = File::open(&args[0])?;
    println!("open");
    wait_for_parent()?;
    drop(writer);
    println!("the writer is closed");
    wait_for_parent()?;
    let mut head = [0; HEAD];
    reader.read_exact(&mut head)?;
    println!("{}", head.escape_ascii());
    wait_for_parent()?;
    drop(reader);
    Ok("closed".into())
}

/// A writer opens the file first, then a reader. The registration for the writer's open goes on to serve the reader.
fn held(sandbox: &Sandbox, registered: Registered) -> Result<(), Failed> {
    let server = Server::start(sandbox, registered)?;
    let holds_writer = registered.holds_writer();
    let head = fs::read(&server.state.program)?[..HEAD].to_vec();
    server.expect(false, "before");

    let path = server.connection.path("program");
    let mut client = Client::start("close-the-writer", &[path.as_os_str()])?;
    assert_eq!(client.line()?, "open");
    server.expect(true, "open for writing");

    client.proceed()?;
    assert_eq!(client.line()?, "the writer is closed");
    server.release(1, |open| open.writes)?;
    server.expect(holds_writer, "open for reading");
    client.proceed()?;
    assert_eq!(client.line()?, head.escape_ascii().to_string());
    let reads = &server.connection.seen.reads;
    assert_eq!(reads.load(Ordering::SeqCst), 0);

    assert_eq!(client.finish()?, "closed");
    server.release(2, |_| true)?;
    let stats = server.table().stats();
    if registered == Registered::OwnFd {
        assert_eq!((stats.ids, stats.by_open_fd), (0, 0));
    } else {
        assert_eq!((stats.ids, stats.idle), (1, 1));
        assert_eq!(stats.by_open_fd, u64::from(holds_writer));
    }
    server.expect(holds_writer, "idle");

    server.table().set_idle_limit(0);
    *server.state.own.lock().unwrap() = None;
    server.expect(false, "closed");
    Ok(())
}

/// A connection, an empty table for it, and a tmpfs for files.
fn setup(sandbox: &Sandbox) -> Result<(Connection, Table, Tmpfs), Failed> {
    let connection = Connection::mount(sandbox, Init::passthrough(1))?;
    let table = BackingTable::new(Arc::new(connection.device()));
    Ok((connection, table, sandbox.tmpfs()?))
}

/// Runs `f` on a thread whose calls of this kind fail.
fn without<T: Send>(call: c_long, errno: Errno, f: impl FnOnce() -> T + Send) -> T {
    apart(|| {
        refuse(call, errno).expect("seccomp");
        f()
    })
}

/// The table registers an `O_PATH` fd that the server has, without open_tree(2). The control: without such an fd, the
/// server's own fd is registered.
#[apply(needs_passthrough)]
fn path_fd_of_the_server_is_not_reopened(sandbox: &Sandbox) -> Result<(), Failed> {
    let (_connection, table, tmpfs) = setup(sandbox)?;
    let file = tmpfs.file("file", "")?;
    let path = open(
        tmpfs.path().join("file"),
        OFlags::PATH | OFlags::CLOEXEC,
        Mode::empty(),
    )?;
    let own = ServerFile::new(&file);
    let by_path = u64::from(path_only_files());
    for (file, by_open_fd) in [(own.path_fd(&path), 1 - by_path), (own, 2 - by_path)] {
        let open = without(libc::SYS_open_tree, Errno::PERM, || {
            table.open(&1, RDWR, file)
        })?;
        assert!(open.is_passthrough(), "{open:?}");
        assert_eq!(table.stats().by_open_fd, by_open_fd);
    }
    drop((file, path));
    tmpfs.unmount_when_idle()
}

/// Whether rustix uses statx(2) for fstat(2). It falls back to fstat(2) only at ENOSYS.
const FSTAT_IS_STATX: bool = cfg!(any(target_pointer_width = "32", target_arch = "mips64"));

/// Without statx(2) the table does not know whether the file is append-only.
#[apply(needs_passthrough)]
fn without_statx_nothing_is_registered(sandbox: &Sandbox) -> Result<(), Failed> {
    let (_connection, table, tmpfs) = setup(sandbox)?;
    let file = tmpfs.file("file", "")?;
    let open = || table.open(&1, RDWR, ServerFile::new(&file));
    for errno in [Errno::NOSYS, Errno::PERM] {
        let opened = without(libc::SYS_statx, errno, open);
        if FSTAT_IS_STATX && errno == Errno::PERM {
            assert_eq!(opened.err(), Some(OpenError::Unreadable(errno)));
        } else {
            let opened = opened?;
            assert_eq!(
                opened.server_reason(),
                Some(ServerReason::Unreadable(errno))
            );
            assert_eq!(opened.reply(FopenFlags::empty()).backing_id(), None);
            // Only this inode is in server mode, until its last release.
            assert_eq!((table.stats().ids, table.stats().refused), (0, None));
            assert!(!open()?.is_passthrough());
        }
        assert_eq!((table.stats().ids, table.list().len()), (0, 0));
        assert!(open()?.is_passthrough(), "after release, {errno:?}");
    }
    let _opened = without(libc::SYS_statx, Errno::NOSYS, open)?;
    drop(file);
    tmpfs.unmount_when_idle()
}

/// Runs in a process whose first statx(2) is refused, on one thread. rustix would then never call statx(2) again, on
/// any thread, if the crate had not shown it that the kernel has the call.
fn refused_statx(args: &[String]) -> Result<String, Box<dyn std::error::Error>> {
    let device = mounted(args[0].as_ref(), Init::passthrough(1)).map_err(|e| format!("{e:?}"))?;
    let table = BackingTable::<_, u64>::new(&device);
    let file = tempfile::tempfile()?;
    let open = || table.open(&1, RDWR, ServerFile::new(&file));
    let refused = without(libc::SYS_statx, Errno::PERM, || open().map(drop));
    Ok(format!(
        "{:?}, {}",
        refused.is_ok(),
        open()?.is_passthrough()
    ))
}

#[apply(needs_passthrough)]
fn a_refused_statx_affects_only_its_thread(sandbox: &Sandbox) -> Result<(), Failed> {
    let mountpoint = sandbox.folder("mnt")?;
    let ended = client::run("refused-statx", &[mountpoint.as_os_str()])?;
    assert_eq!(ended, format!("{}, true", !FSTAT_IS_STATX));
    Ok(())
}

/// The flags of each fd of this process that is of this path, from where lsof has them.
fn fds_of(path: &Path) -> Result<Vec<OFlags>, Failed> {
    let mut found = Vec::new();
    for fd in fs::read_dir("/proc/self/fd")? {
        let fd = fd?;
        // Another test may have closed the fd by now.
        if fs::read_link(fd.path()).is_ok_and(|link| link == path) {
            let info = Path::new("/proc/self/fdinfo").join(fd.file_name());
            let info = fs::read_to_string(info)?;
            let flags = info.lines().find_map(|line| line.strip_prefix("flags:"));
            let flags = u32::from_str_radix(flags.ok_or("no flags")?.trim(), 8)?;
            found.push(OFlags::from_bits_retain(flags));
        }
    }
    Ok(found)
}

#[apply(needs_passthrough)]
fn kept_fds_are_listed(sandbox: &Sandbox) -> Result<(), Failed> {
    let (_connection, table, tmpfs) = setup(sandbox)?;
    let path = tmpfs.path().join("file");
    let by_path = path_only_files();
    for keep in [false, true] {
        table.set_keep_fds(keep);
        table.set_idle_limit(1);
        let file = tmpfs.file("file", "")?;
        let open = table.open(&1, RDWR, ServerFile::new(&file))?;
        drop(file);
        let expect_fd = |when| -> Result<(), Failed> {
            assert_eq!(table.stats().ids, 1);
            let kept = fds_of(&path)?;
            assert_eq!(kept.len(), usize::from(keep), "{when}");
            for flags in kept {
                assert_eq!(flags.contains(OFlags::PATH), by_path, "{flags:?}, {when}");
            }
            Ok(())
        };
        expect_fd("open")?;
        drop(open);
        expect_fd("idle")?;
        table.set_idle_limit(0);
        assert_eq!((table.stats().ids, fds_of(&path)?.len()), (0, 0));
    }
    tmpfs.unmount_when_idle()
}

#[apply(needs_passthrough)]
fn kept_fds_are_accounted(sandbox: &Sandbox) -> Result<(), Failed> {
    let (connection, _, tmpfs) = setup(sandbox)?;
    let by_path = path_only_files().to_string();
    let device = connection.device().as_fd().try_clone_to_owned()?;
    let args = [tmpfs.path().as_os_str(), by_path.as_ref()];
    let child = Client::start_with_fd("reach-the-limit", &args, device)?;
    assert_eq!(child.finish()?, "done");
    tmpfs.unmount_when_idle()
}

/// Runs in a process of its own, which is limited to a few fds.
fn reach_the_limit(args: &[String]) -> Result<String, Box<dyn std::error::Error>> {
    const FDS: u64 = 32;
    let [folder, by_path] = args else {
        return Err("a folder, and whether O_PATH fds are registered".into());
    };
    let by_path: bool = by_path.parse()?;
    let stdin = std::io::stdin();
    let device = FuseDevice::new(stdin.as_fd().try_clone_to_owned()?)?;
    let limit = getrlimit(Resource::Nofile);
    setrlimit(
        Resource::Nofile,
        Rlimit {
            current: Some(FDS),
            ..limit
        },
    )?;
    let open = |table: &BackingTable<_>, inode: u64| -> std::io::Result<_> {
        let path = Path::new(folder).join(inode.to_string());
        let options = File::options()
            .read(true)
            .write(true)
            .create(true)
            .truncate(false)
            .clone();
        let file = options.open(path)?;
        Ok(table.open(&inode, RDWR, ServerFile::new(&file))?)
    };
    // Takes all fds but one, which remains for the server's own open.
    let take_all_but_one = || -> Vec<OwnedFd> {
        let mut all: Vec<_> = std::iter::from_fn(|| fcntl_dupfd_cloexec(&stdin, 0).ok()).collect();
        all.pop();
        all
    };

    // The control: more registrations than fds.
    let table = BackingTable::new(&device);
    assert_eq!(table.stats().limit as u64, FDS);
    table.set_limit(usize::MAX);
    let opens = (1..=2 * FDS).map(|inode| open(&table, inode));
    let mut opens = opens.collect::<Result<Vec<_>, _>>()?;
    assert!(opens.iter().all(OpenFile::is_passthrough));
    assert_eq!(table.stats().by_open_fd, if by_path { 0 } else { 2 * FDS });
    // If no fd is left for an O_PATH fd, the table registers the server's own.
    let taken = take_all_but_one();
    assert!(!taken.is_empty());
    opens.push(open(&table, 2 * FDS + 1)?);
    assert!(opens[2 * FDS as usize].is_passthrough());
    assert_eq!(
        table.stats().by_open_fd,
        if by_path { 1 } else { 2 * FDS + 1 }
    );
    drop((taken, opens));
    assert_eq!(table.stats().ids, 0);

    table.set_keep_fds(true);
    let room = take_all_but_one().len();
    let opened = (0..=room as u64).map(|inode| open(&table, inode));
    let mut opens = opened.collect::<Result<Vec<_>, _>>()?;
    // Each open keeps an fd. The last free fd went to the server's own open.
    let refused = opens.pop().ok_or("no fd is free")?;
    assert!(opens.iter().all(OpenFile::is_passthrough));
    let no_fd = ServerReason::NoFd(Errno::MFILE);
    assert_eq!(refused.server_reason(), Some(no_fd));
    assert_eq!(refused.reply(FopenFlags::empty()).backing_id(), None);
    assert_eq!(
        (table.stats().ids, table.stats().refused),
        (opens.len(), None)
    );
    // Opens of a registered inode still share its id.
    assert!(open(&table, 0)?.is_passthrough());
    // Another inode can be registered as soon as one is released.
    drop(opens.pop());
    assert!(open(&table, FDS)?.is_passthrough());
    drop((refused, opens));
    assert_eq!((table.stats().ids, table.list().len()), (0, 0));
    Ok("done".into())
}
