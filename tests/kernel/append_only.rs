//! Append-only files (`chattr +a`): the table serves them in server mode, because in passthrough mode a
//! client can overwrite them.
//!
//! On its own filesystem such a file opens for writing only with `O_APPEND`, and fcntl(2) refuses to clear
//! that flag; the write itself looks at nothing but `O_APPEND`. FUSE does let a client clear it. In server
//! mode this changes nothing: the server's own fd still has the flag, so that its pwrite(2) appends. In
//! passthrough mode a synchronous write takes the flags of the open, and still appends; an asynchronous one
//! takes those of the moment, and overwrites. Linux 7.3.4 refuses both.

use std::ffi::{OsStr, c_long, c_ulong, c_void};
use std::fs::{self, File};
use std::io;
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::path::Path;
use std::ptr;
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, Mutex, OnceLock};

use fuse_backing::error::ServerReason;
use fuse_backing::{
    Access, BackingFile, BackingTable, Errno, FopenFlags, FuseDevice, OpenFile, OpenReply,
    ServerFile,
};
use libtest_mimic::Failed;
use rustix::fs::{
    IFlags, Mode, OFlags, XattrFlags, fcntl_getfl, fcntl_setfl, fsetxattr, ioctl_getflags,
    ioctl_setflags, open,
};
use rustix::io::pwrite;
use rustix::io_uring::{
    IORING_OFF_CQ_RING, IORING_OFF_SQ_RING, IORING_OFF_SQES, IoringEnterFlags, IoringOp,
    addr_or_splice_off_in_union, io_uring_cqe, io_uring_enter, io_uring_params, io_uring_ptr,
    io_uring_setup, io_uring_sqe, len_union,
};
use rustix::mm::{MapFlags, ProtFlags, mmap};

use crate::client::{self, Role};
use crate::ext4::{self, Ext4};
use crate::fuse::{Connection, Init, Node, OpenAnswer};
use crate::sandbox::{Sandbox, unmount_when_idle};
use crate::{Needs, Test};

pub const TESTS: &[Test] = &[
    (
        "table_only_lets_clients_append_on_tmpfs",
        Needs::Passthrough,
        table_only_lets_clients_append_on_tmpfs,
    ),
    (
        "table_only_lets_clients_append_on_ext4",
        Needs::Passthrough,
        table_only_lets_clients_append_on_ext4,
    ),
    (
        "passthrough_lets_clients_overwrite_on_tmpfs",
        Needs::Passthrough,
        passthrough_lets_clients_overwrite_on_tmpfs,
    ),
    (
        "passthrough_lets_clients_overwrite_on_ext4",
        Needs::Passthrough,
        passthrough_lets_clients_overwrite_on_ext4,
    ),
];

pub const ROLES: &[(&str, Role)] = &[("overwrite-appended", overwrite_appended)];

const CONTENT: &str = "what was logged before";
const TEXT: &str = "FORGED";
const PROTECTED: &str = "protected";
const BESIDE: &str = "beside";

type Device = Arc<FuseDevice<Arc<OwnedFd>>>;
type Table = BackingTable<Device>;

/// How many bytes, or why none.
type Written = Result<usize, Errno>;

/// How a client writes at offset 0.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Way {
    /// pwrite(2).
    Pwrite,
    /// io_submit(2) of `IOCB_CMD_PWRITE`.
    Aio,
    /// `IORING_OP_WRITE`.
    IoUring,
}

impl Way {
    const ALL: [Self; 3] = [Self::Pwrite, Self::Aio, Self::IoUring];

    fn name(self) -> &'static str {
        match self {
            Self::Pwrite => "pwrite",
            Self::Aio => "aio",
            Self::IoUring => "io_uring",
        }
    }

    /// The outer `Err` is of a kernel that does not have this call, or has it turned off.
    fn write(self, fd: BorrowedFd<'_>, data: &[u8]) -> Result<Written, Errno> {
        match self {
            Self::Pwrite => Ok(pwrite(fd, data, 0)),
            Self::Aio => aio(fd, data),
            Self::IoUring => io_uring(fd, data),
        }
    }

    /// The kernel's settings say so as well. A client that makes the call wrongly could get the same errno.
    fn assert_unavailable(self, errno: Errno) {
        let (setting, disabled) = match self {
            Self::Pwrite => panic!("pwrite: {errno}"),
            Self::Aio => ("/proc/sys/fs/aio-max-nr", None),
            Self::IoUring => ("/proc/sys/kernel/io_uring_disabled", Some("2")),
        };
        let value = fs::read_to_string(setting).ok();
        let value = value.as_deref().map(str::trim);
        match errno {
            Errno::NOSYS => assert_eq!(value, None, "{setting}"),
            Errno::PERM if disabled.is_some() => assert_eq!(value, disabled, "{setting}"),
            errno => panic!("{self:?}: {errno}"),
        }
    }
}

/// `io_submit(context, 1, {IOCB_CMD_PWRITE at offset 0})`. Its context ends with the process.
#[allow(unsafe_code)]
fn aio(fd: BorrowedFd<'_>, data: &[u8]) -> Result<Written, Errno> {
    const IOCB_CMD_PWRITE: u16 = 1;
    // `struct io_event`: data, obj, res, res2.
    let mut event = [0_i64; 4];
    let last = || Errno::from_io_error(&io::Error::last_os_error()).expect("an errno");

    let one: c_long = 1;
    let mut context: c_ulong = 0;
    // SAFETY: the kernel writes an `aio_context_t`, which is an `unsigned long`.
    if unsafe { libc::syscall(libc::SYS_io_setup, one, &raw mut context) } != 0 {
        return Err(last());
    }
    // SAFETY: integers all.
    let mut block: libc::iocb = unsafe { MaybeUninit::zeroed().assume_init() };
    block.aio_lio_opcode = IOCB_CMD_PWRITE;
    block.aio_fildes = fd.as_raw_fd() as u32;
    block.aio_buf = data.as_ptr().addr() as u64;
    block.aio_nbytes = data.len() as u64;
    let mut blocks = [&raw mut block];
    // SAFETY: an array of one pointer to an `iocb`, whose buffer is live until the event below.
    let result = unsafe { libc::syscall(libc::SYS_io_submit, context, one, blocks.as_mut_ptr()) };
    if result != 1 {
        return Ok(Err(last()));
    }
    let forever = ptr::null_mut::<c_void>();
    // SAFETY: the kernel writes one `io_event`.
    let result = unsafe {
        libc::syscall(
            libc::SYS_io_getevents,
            context,
            one,
            one,
            event.as_mut_ptr(),
            forever,
        )
    };
    assert_eq!(result, 1, "{}", last());
    Ok(written(event[2]))
}

/// A ring for one `IORING_OP_WRITE` at offset 0. It ends with the process.
#[allow(unsafe_code)]
fn io_uring(fd: BorrowedFd<'_>, data: &[u8]) -> Result<Written, Errno> {
    let mut params = io_uring_params::default();
    // SAFETY: no flags, so no `wq_fd`.
    let ring = unsafe { io_uring_setup(1, &mut params) }?;
    let map = |offset, length| {
        let (prot, flags) = (ProtFlags::READ | ProtFlags::WRITE, MapFlags::SHARED);
        // SAFETY: a mapping of its own, which is never taken away.
        unsafe { mmap(ptr::null_mut(), length, prot, flags, &ring, offset) }
    };
    let (submission, completion) = (params.sq_off, params.cq_off);
    // The last things in the two rings: the indexes of requests, of which the first is 0, and the completions.
    let array = submission.array as usize + params.sq_entries as usize * size_of::<u32>();
    let queue = map(IORING_OFF_SQ_RING, array)?;
    let entries = params.cq_entries as usize * size_of::<io_uring_cqe>();
    let done = map(IORING_OFF_CQ_RING, completion.cqes as usize + entries)?;
    let request = map(IORING_OFF_SQES, size_of::<io_uring_sqe>())?;

    let write = io_uring_sqe {
        opcode: IoringOp::Write,
        fd: fd.as_raw_fd(),
        addr_or_splice_off_in: addr_or_splice_off_in_union {
            addr: io_uring_ptr::new(data.as_ptr().cast_mut().cast()),
        },
        len: len_union {
            len: data.len() as u32,
        },
        // Offset 0 among it.
        ..io_uring_sqe::default()
    };
    // SAFETY: the mapping is of the first entry at least, and the kernel reads none yet.
    unsafe { request.cast::<io_uring_sqe>().write(write) };
    // SAFETY: the kernel says where the tail is, which it reads as we write it: atomically.
    let tail = unsafe { AtomicU32::from_ptr(queue.byte_add(submission.tail as usize).cast()) };
    tail.store(1, Ordering::Release);
    // SAFETY: `data` is live until the completion, which is waited for.
    let submitted = unsafe { io_uring_enter(&ring, 1, 1, IoringEnterFlags::GETEVENTS) };
    assert_eq!(submitted, Ok(1));
    // SAFETY: the kernel says where the tail is, and writes it atomically.
    let tail = unsafe { AtomicU32::from_ptr(done.byte_add(completion.tail as usize).cast()) };
    assert_eq!(tail.load(Ordering::Acquire), 1);
    // SAFETY: the first entry, which is complete.
    let result = unsafe {
        (*done
            .byte_add(completion.cqes as usize)
            .cast::<io_uring_cqe>())
        .res
    };
    Ok(written(i64::from(result)))
}

/// A count, or an errno below zero.
fn written(result: i64) -> Written {
    usize::try_from(result).map_err(|_| Errno::from_raw_os_error(-result as i32))
}

/// Opens for appending, clears `O_APPEND`, and writes at offset 0.
fn overwrite_appended(args: &[String]) -> Result<String, Box<dyn std::error::Error>> {
    let [path, way, text] = args else {
        return Err("path, way and text".into());
    };
    let way = Way::ALL.into_iter().find(|known| known.name() == way);
    let way = way.ok_or("no such way")?;
    let append = OFlags::WRONLY | OFlags::APPEND;
    let file = match open(path.as_str(), append | OFlags::CLOEXEC, Mode::empty()) {
        Ok(file) => file,
        Err(errno) => return Ok(format!("not opened {}", errno.raw_os_error())),
    };
    let flags = fcntl_getfl(&file)?;
    fcntl_setfl(&file, flags - OFlags::APPEND)?;
    if fcntl_getfl(&file)?.contains(OFlags::APPEND) {
        return Err("O_APPEND is not cleared".into());
    }
    Ok(match way.write(file.as_fd(), text.as_bytes()) {
        Ok(Ok(count)) if count == text.len() => "written".into(),
        Ok(Ok(count)) => return Err(format!("{count} bytes written").into()),
        Ok(Err(errno)) => format!("refused {}", errno.raw_os_error()),
        Err(errno) => format!("unavailable {}", errno.raw_os_error()),
    })
}

/// What a write at offset 0 did to the file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Outcome {
    Appended,
    Overwritten,
    /// Nothing: the write failed.
    Refused(Errno),
    /// Nothing: this kernel does not have the call.
    Unavailable,
}

/// Has a client write to a file of the mount, and compares what it says with the backing file's content.
/// Whatever else they say is an error.
fn attempt(
    connection: &Connection,
    folder: &Path,
    name: &str,
    way: Way,
) -> Result<Outcome, Failed> {
    let path = connection.path(name);
    let args = [path.as_os_str(), OsStr::new(way.name()), OsStr::new(TEXT)];
    let said = client::run("overwrite-appended", &args)?;
    let found = fs::read_to_string(folder.join(name))?;
    let unexpected = || format!("{way:?}: the client says '{said}', the file has '{found}'");

    let errno = |told: &str| {
        let errno = told.parse().map_err(|_| unexpected())?;
        Ok::<_, Failed>(Errno::from_raw_os_error(errno))
    };
    let outcome = match said.split_once(' ') {
        None if said == "written" && found == format!("{CONTENT}{TEXT}") => Outcome::Appended,
        None if said == "written" && found == format!("{TEXT}{}", &CONTENT[TEXT.len()..]) => {
            Outcome::Overwritten
        }
        Some(("refused", told)) if found == CONTENT => Outcome::Refused(errno(told)?),
        Some(("unavailable", told)) if found == CONTENT => {
            way.assert_unavailable(errno(told)?);
            Outcome::Unavailable
        }
        _ => return Err(unexpected().into()),
    };
    Ok(outcome)
}

/// A mount of files of this folder. For each OPEN the server opens the backing file with the client's
/// flags; `answer` gets the nodeid, these flags and that fd. WRITEs go through an fd with `O_APPEND`, since
/// the server cannot have any other of an append-only file.
fn serve(
    sandbox: &Sandbox,
    folder: &Path,
    names: &[&str],
    answer: impl Fn(&Device, u64, i32, &OwnedFd) -> OpenAnswer + Send + Sync + 'static,
) -> Result<Connection, Failed> {
    // The server's closure is made before there is a device to give it.
    let late: Arc<OnceLock<Device>> = Arc::default();
    let device = Arc::clone(&late);
    let paths: Vec<_> = names.iter().map(|name| folder.join(name)).collect();
    let nodes = names.iter().zip(&paths).map(|(name, path)| {
        let backing = File::options().read(true).append(true).open(path)?;
        let name = (*name).to_owned();
        Ok::<_, io::Error>(Node { name, backing })
    });
    let nodes = nodes.collect::<Result<_, _>>()?;
    let on_open = move |nodeid, flags: i32| {
        let device = device.get().ok_or(Errno::IO)?;
        let asked = OFlags::from_bits_retain(flags as u32) & (OFlags::ACCMODE | OFlags::APPEND);
        let path = &paths[(nodeid - Connection::NODE) as usize];
        let file = open(path, asked | OFlags::CLOEXEC, Mode::empty())?;
        answer(device, nodeid, flags, &file)
    };
    let connection = Connection::serve(sandbox, Init::passthrough(1), nodes, Arc::new(on_open))?;
    late.set(Arc::new(connection.device()))
        .map_err(|_| "set twice")?;
    Ok(connection)
}

/// An append-only file and an ordinary one.
fn make_files(folder: &Path) -> Result<(), Failed> {
    for name in [PROTECTED, BESIDE] {
        fs::write(folder.join(name), CONTENT)?;
    }
    let path = folder.join(PROTECTED);
    make_append_only(&File::open(&path)?)?;

    // On its own filesystem it is protected.
    let append = OFlags::WRONLY | OFlags::APPEND;
    for flags in [OFlags::WRONLY, OFlags::RDWR, append | OFlags::TRUNC] {
        let refused = open(&path, flags | OFlags::CLOEXEC, Mode::empty());
        assert_eq!(refused.err(), Some(Errno::PERM), "{flags:?}");
    }
    let appending = open(&path, append | OFlags::CLOEXEC, Mode::empty())?;
    let flags = fcntl_getfl(&appending)?;
    assert_eq!(
        fcntl_setfl(&appending, flags - OFlags::APPEND),
        Err(Errno::PERM)
    );
    Ok(())
}

fn make_append_only(file: &File) -> rustix::io::Result<()> {
    ioctl_setflags(file, ioctl_getflags(file)? | IFlags::APPEND)
}

/// Each way of writing, to files of their own.
fn each_way(
    folder: &Path,
    test: impl Fn(Way, &Path) -> Result<Outcome, Failed>,
) -> Result<Vec<(Way, Outcome)>, Failed> {
    let outcome = |way: Way| {
        let folder = folder.join(way.name());
        fs::create_dir(&folder)?;
        make_files(&folder)?;
        Ok((way, test(way, &folder)?))
    };
    Way::ALL.into_iter().map(outcome).collect()
}

/// The client's writes come to the server, whose fd appends.
fn table_only_lets_clients_append(sandbox: &Sandbox, folder: &Path) -> Result<(), Failed> {
    let outcomes = each_way(folder, |way, folder| {
        let table: Arc<OnceLock<Table>> = Arc::default();
        let opens: Arc<Mutex<Vec<OpenFile<Device>>>> = Arc::default();
        let (shared, kept) = (Arc::clone(&table), Arc::clone(&opens));
        let answer = move |device: &Device, nodeid, flags, file: &OwnedFd| {
            let table = shared.get_or_init(|| BackingTable::new(Arc::clone(device)));
            let open = table.open(&nodeid, flags, ServerFile::new(file))?;
            let mut opens = kept.lock().unwrap();
            let reply = open.reply(FopenFlags::empty());
            let out = reply.to_fuse_open_out(opens.len() as u64);
            opens.push(open);
            Ok(out)
        };
        let connection = serve(sandbox, folder, &[PROTECTED, BESIDE], answer)?;
        let outcome = attempt(&connection, folder, PROTECTED, way)?;
        let ids = || table.get().map(|table| table.stats().ids);
        assert_eq!(ids(), Some(0), "{way:?}: {outcome:?}");
        let seen = &connection.seen;
        let writes = u64::from(outcome == Outcome::Appended);
        assert_eq!(seen.writes.load(Ordering::SeqCst), writes);

        // The control: an ordinary file on the same mount is passed through.
        let beside = attempt(&connection, folder, BESIDE, Way::Pwrite)?;
        assert_eq!(beside, Outcome::Appended);
        assert_eq!(seen.writes.load(Ordering::SeqCst), writes);
        assert_eq!(ids(), Some(1));
        let opens = opens.lock().unwrap();
        let reasons: Vec<_> = opens.iter().map(OpenFile::server_reason).collect();
        assert_eq!(reasons, [Some(ServerReason::AppendOnly), None]);
        // The connection's first id: the append-only file was not registered for a moment either.
        assert_eq!(opens[1].reply(FopenFlags::empty()).backing_id(), Some(1));
        Ok(outcome)
    })?;
    for (way, outcome) in outcomes {
        match outcome {
            Outcome::Appended | Outcome::Unavailable => {}
            Outcome::Overwritten | Outcome::Refused(_) => panic!("{way:?}: {outcome:?}"),
        }
    }
    idle_id_is_not_used_again(sandbox, folder)
}

/// Of a file that became append-only in the meantime. While it is open, its opens have one mode.
fn idle_id_is_not_used_again(sandbox: &Sandbox, folder: &Path) -> Result<(), Failed> {
    let connection = Connection::mount(sandbox, Init::passthrough(1))?;
    let table: Table = BackingTable::new(Arc::new(connection.device()));
    table.set_idle_limit(1);
    let file = File::options()
        .append(true)
        .create(true)
        .open(folder.join("later"))?;
    let open = || table.open(&1, libc::O_WRONLY, ServerFile::new(&file));
    let before = open()?;
    assert!(before.is_passthrough());
    make_append_only(&file)?;
    assert!(open()?.is_passthrough(), "it is open");
    drop(before);
    assert_eq!(table.stats().idle, 1);
    assert_eq!(open()?.server_reason(), Some(ServerReason::AppendOnly));
    assert_eq!(table.stats().ids, 0);
    Ok(())
}

/// The control: the same file registered without the table. Asynchronous writes overwrite it. Linux 7.3.4
/// refuses them with `EPERM` instead, and synchronous ones too, by which such a kernel is recognised; `EIO`
/// is the errno that FUSE has for what it cannot do to a backing file.
fn passthrough_lets_clients_overwrite(sandbox: &Sandbox, folder: &Path) -> Result<(), Failed> {
    let outcomes = each_way(folder, |way, folder| {
        let kept: Mutex<Option<BackingFile<Device>>> = Mutex::default();
        let answer = move |device: &Device, _, flags, file: &OwnedFd| {
            let granted = Access::of(file)?;
            let backing = BackingFile::open(Arc::clone(device), file, granted)?;
            let mut kept = kept.lock().unwrap();
            let backing = kept.insert(backing);
            let reply = OpenReply::passthrough(backing.id(), granted, flags, FopenFlags::empty())?;
            Ok(reply.to_fuse_open_out(0))
        };
        let connection = serve(sandbox, folder, &[PROTECTED], answer)?;
        let outcome = attempt(&connection, folder, PROTECTED, way)?;
        assert_eq!(connection.seen.opens.load(Ordering::SeqCst), 1);
        assert_eq!(connection.seen.writes.load(Ordering::SeqCst), 0);
        Ok(outcome)
    })?;
    let refuses = matches!(outcomes[0], (Way::Pwrite, Outcome::Refused(_)));
    for (way, outcome) in outcomes {
        match (way, outcome) {
            (_, Outcome::Refused(Errno::PERM | Errno::IO)) if refuses => {}
            (Way::Pwrite, Outcome::Appended) => {}
            (Way::Aio | Way::IoUring, Outcome::Overwritten) if !refuses => {}
            (Way::Aio | Way::IoUring, Outcome::Unavailable) => {}
            _ => panic!("{way:?}: {outcome:?}"),
        }
    }
    Ok(())
}

fn on_tmpfs(
    sandbox: &Sandbox,
    test: fn(&Sandbox, &Path) -> Result<(), Failed>,
) -> Result<(), Failed> {
    let tmpfs = sandbox.tmpfs()?;
    let file = tmpfs.file("can-be", "")?;
    match make_append_only(&file) {
        Ok(()) => test(sandbox, tmpfs.path())?,
        // A kernel without CONFIG_TMPFS_XATTR, where tmpfs has neither.
        Err(errno) => {
            assert!(matches!(errno, Errno::NOTTY | Errno::OPNOTSUPP), "{errno}");
            let xattr = fsetxattr(&file, "trusted.any", b"", XattrFlags::empty());
            assert_eq!(xattr, Err(Errno::OPNOTSUPP));
        }
    }
    drop(file);
    tmpfs.unmount_when_idle()
}

fn on_ext4(
    sandbox: &Sandbox,
    test: fn(&Sandbox, &Path) -> Result<(), Failed>,
) -> Result<(), Failed> {
    if !ext4::is_supported()? {
        return Ok(());
    }
    let ext4 = Ext4::new(sandbox, 4 << 20, &["-O", "^has_journal"])?;
    test(sandbox, ext4.path())?;
    unmount_when_idle(ext4.path())
}

fn table_only_lets_clients_append_on_tmpfs(sandbox: &Sandbox) -> Result<(), Failed> {
    on_tmpfs(sandbox, table_only_lets_clients_append)
}

fn table_only_lets_clients_append_on_ext4(sandbox: &Sandbox) -> Result<(), Failed> {
    on_ext4(sandbox, table_only_lets_clients_append)
}

fn passthrough_lets_clients_overwrite_on_tmpfs(sandbox: &Sandbox) -> Result<(), Failed> {
    on_tmpfs(sandbox, passthrough_lets_clients_overwrite)
}

fn passthrough_lets_clients_overwrite_on_ext4(sandbox: &Sandbox) -> Result<(), Failed> {
    on_ext4(sandbox, passthrough_lets_clients_overwrite)
}
