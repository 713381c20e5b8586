//! Files that their filesystem protects by an inode flag (ioctl_iflags(2)): append-only (`chattr +a`) and
//! immutable (`chattr +i`). Passthrough does not enforce the flags before Linux 7.3.4.
//!
//! On its own filesystem, an append-only file opens for writing only with `O_APPEND`, fcntl(2) refuses to clear that
//! flag, and mmap(2) refuses to map the file for writing; the write itself checks only `O_APPEND`. FUSE lets a client
//! clear `O_APPEND`. The table serves such files in server mode, where clearing it changes nothing: the server's own fd
//! still has the flag, so that its pwrite(2) appends. In passthrough mode, a synchronous write uses the flags of the
//! open, and still appends; an asynchronous one uses the current flags, and overwrites, as a mapping does.
//!
//! An immutable file does not open for writing at all. The table refuses a client that asks for it with `EPERM`, even
//! if the server would grant it. Passthrough itself lets that client write.

mod way;

use std::ffi::OsStr;
use std::fs::{self, File};
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::MetadataExt;
use std::path::Path;
use std::sync::atomic::Ordering;
use std::sync::{Arc, Mutex, OnceLock};

use fuse_backing::error::{OpenError, ServerReason};
use fuse_backing::{
    Access, BackingFile, BackingTable, FopenFlags, FuseDevice, OpenFile, OpenReply, ServerFile,
    error::Errno,
};
use libtest_mimic::Failed;
use macro_rules_attribute::apply;
use rustix::fs::{
    IFlags, Mode, OFlags, XattrFlags, fcntl_getfl, fcntl_setfl, fsetxattr, ioctl_getflags,
    ioctl_setflags, open,
};

use crate::client::{self, Role};
use crate::expect;
use crate::ext4::{self, Ext4};
use crate::fuse::{Connection, Init, Node, OpenAnswer};
use crate::sandbox::{Sandbox, unmount_when_idle};
use way::Way;

pub const ROLES: &[(&str, Role)] = &[
    ("overwrite-protected", overwrite_protected),
    ("read-protected", read_protected),
];

const CONTENT: &str = "what was logged before";
const TEXT: &str = "FORGED";
const PROTECTED: &str = "protected";
const BESIDE: &str = "beside";

type Device = Arc<FuseDevice<Arc<OwnedFd>>>;
type Table = BackingTable<Device>;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Protection {
    AppendOnly,
    Immutable,
}

impl Protection {
    fn protect(self, file: &File) -> rustix::io::Result<()> {
        let flag = match self {
            Self::AppendOnly => IFlags::APPEND,
            Self::Immutable => IFlags::IMMUTABLE,
        };
        ioctl_setflags(file, ioctl_getflags(file)? | flag)
    }

    /// A protected file and an ordinary one.
    fn make_files(self, folder: &Path) -> Result<(), Failed> {
        for name in [PROTECTED, BESIDE] {
            fs::write(folder.join(name), CONTENT)?;
        }
        let path = folder.join(PROTECTED);
        self.protect(&File::open(&path)?)?;

        // Its own filesystem protects it.
        let append = OFlags::RDWR | OFlags::APPEND;
        let open = |flags| open(&path, flags | OFlags::CLOEXEC, Mode::empty());
        for flags in [OFlags::WRONLY, OFlags::RDWR, append | OFlags::TRUNC] {
            assert_eq!(open(flags).err(), Some(Errno::PERM), "{flags:?}");
        }
        match self {
            Self::Immutable => assert_eq!(open(append).err(), Some(Errno::PERM)),
            Self::AppendOnly => {
                let appending = open(append)?;
                let cleared = fcntl_getfl(&appending)? - OFlags::APPEND;
                assert_eq!(fcntl_setfl(&appending, cleared), Err(Errno::PERM));
                let mapped = Way::Mmap.write(appending.as_fd(), TEXT.as_bytes());
                assert_eq!(mapped, Ok(Err(Errno::ACCESS)));
            }
        }
        Ok(())
    }
}

/// What a write in passthrough mode does.
impl Protection {
    /// The outcome from Linux 7.3.4 on.
    fn enforced(self, way: Way) -> Outcome {
        match (self, way) {
            (Self::AppendOnly, Way::Mmap) => Outcome::Refused(Errno::ACCESS),
            (Self::AppendOnly, _) => Outcome::Refused(Errno::PERM),
            // FUSE's errno for a backing file that cannot be opened.
            (Self::Immutable, _) => Outcome::NotOpened(Errno::IO),
        }
    }

    /// The outcome before Linux 7.3.4.
    fn not_enforced(self, filesystem: Filesystem, way: Way) -> Outcome {
        match (self, filesystem, way) {
            (Self::Immutable, Filesystem::Ext4, Way::Mmap) => Outcome::Refused(Errno::FAULT),
            (Self::Immutable, Filesystem::Ext4, _) => Outcome::Refused(Errno::PERM),
            (_, _, Way::Pwrite) => Outcome::Appended,
            (_, _, Way::Aio | Way::IoUring | Way::Mmap) => Outcome::Overwritten,
        }
    }
}

/// Opens for appending, clears `O_APPEND`, and writes at offset 0.
fn overwrite_protected(args: &[String]) -> Result<String, Box<dyn std::error::Error>> {
    let [path, way, text] = args else {
        return Err("path, way and text".into());
    };
    let way = Way::ALL.into_iter().find(|known| known.name() == way);
    let way = way.ok_or("no such way")?;
    let append = OFlags::RDWR | OFlags::APPEND;
    let file = match open(path.as_str(), append | OFlags::CLOEXEC, Mode::empty()) {
        Ok(file) => file,
        Err(errno) => return Ok(format!("not-opened {}", errno.raw_os_error())),
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

fn read_protected(args: &[String]) -> Result<String, Box<dyn std::error::Error>> {
    Ok(fs::read_to_string(&args[0])?)
}

/// The outcome of a write at offset 0.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Outcome {
    Appended,
    Overwritten,
    /// The file did not open for writing, and is unchanged.
    NotOpened(Errno),
    /// The write failed, and the file is unchanged.
    Refused(Errno),
    /// This kernel does not have the call, and the file is unchanged.
    Unavailable,
}

/// Makes a client write to a file of the mount, and compares its report with the backing file's content. If they do not
/// agree on an outcome, that is an error.
fn attempt(
    connection: &Connection,
    folder: &Path,
    name: &str,
    way: Way,
) -> Result<Outcome, Failed> {
    let path = connection.path(name);
    let args = [path.as_os_str(), OsStr::new(way.name()), OsStr::new(TEXT)];
    let said = client::run("overwrite-protected", &args)?;
    let found = fs::read_to_string(folder.join(name))?;
    let unexpected = || format!("{way:?}: the client says '{said}', the file has '{found}'");

    let errno = |reported: &str| {
        let errno = reported.parse().map_err(|_| unexpected())?;
        Ok::<_, Failed>(Errno::from_raw_os_error(errno))
    };
    let overwritten = format!("{TEXT}{}", &CONTENT[TEXT.len()..]);
    // A mapping writes whole pages, so that the server appends the page.
    let appended = if way == Way::Mmap { &overwritten } else { TEXT };
    let outcome = match said.split_once(' ') {
        None if said == "written" && found == format!("{CONTENT}{appended}") => Outcome::Appended,
        None if said == "written" && found == overwritten => Outcome::Overwritten,
        Some(("not-opened", reported)) if found == CONTENT => Outcome::NotOpened(errno(reported)?),
        Some(("refused", reported)) if found == CONTENT => Outcome::Refused(errno(reported)?),
        Some(("unavailable", reported)) if found == CONTENT => {
            way.assert_unavailable(errno(reported)?);
            Outcome::Unavailable
        }
        _ => return Err(unexpected().into()),
    };
    Ok(outcome)
}

/// Mounts the two files of a folder. `answer` gets the nodeid and the client's flags of each OPEN, and an fd of the
/// backing file: with the access that the client asks for, if the file opens so, else read-only. The server writes
/// through an fd with `O_APPEND`, the only kind for writing that an append-only file has.
fn serve(
    sandbox: &Sandbox,
    folder: &Path,
    answer: impl Fn(&Device, u64, i32, &OwnedFd) -> OpenAnswer + Send + Sync + 'static,
) -> Result<Connection, Failed> {
    // The server's closure is made before the device, which is set later.
    let late: Arc<OnceLock<Device>> = Arc::default();
    let device = Arc::clone(&late);
    let names = [PROTECTED, BESIDE];
    let paths = names.map(|name| folder.join(name));
    let nodes = names.iter().zip(&paths).map(|(name, path)| {
        let appending = File::options().read(true).append(true).open(path);
        let backing = appending.or_else(|_| File::open(path))?;
        let name = (*name).to_owned();
        Ok::<_, io::Error>(Node { name, backing })
    });
    let nodes = nodes.collect::<Result<_, _>>()?;
    let on_open = move |nodeid, flags: i32| {
        let device = device.get().ok_or(Errno::IO)?;
        let asked = OFlags::from_bits_retain(flags as u32) & (OFlags::ACCMODE | OFlags::APPEND);
        let path = &paths[(nodeid - Connection::NODE) as usize];
        let open = |flags| open(path, flags | OFlags::CLOEXEC, Mode::empty());
        let file = open(asked).or_else(|_| open(OFlags::RDONLY))?;
        answer(device, nodeid, flags, &file)
    };
    let connection = Connection::serve(sandbox, Init::passthrough(1), nodes, Arc::new(on_open))?;
    late.set(Arc::new(connection.device()))
        .map_err(|_| "set twice")?;
    Ok(connection)
}

/// Runs the test for each way of writing, with files of its own.
fn each_way(
    folder: &Path,
    protection: Protection,
    test: impl Fn(Way, &Path) -> Result<Outcome, Failed>,
) -> Result<Vec<(Way, Outcome)>, Failed> {
    let outcome = |way: Way| {
        let folder = folder.join(format!("{protection:?}-{}", way.name()));
        fs::create_dir(&folder)?;
        protection.make_files(&folder)?;
        Ok((way, test(way, &folder)?))
    };
    Way::ALL.into_iter().map(outcome).collect()
}

/// The outcomes if a table answers the opens. `reasons` are the `server_reason` of each open that the table grants.
fn with_table(
    sandbox: &Sandbox,
    folder: &Path,
    protection: Protection,
    reasons: &[Option<ServerReason>],
) -> Result<Vec<(Way, Outcome)>, Failed> {
    each_way(folder, protection, |way, folder| {
        let table: Arc<OnceLock<Table>> = Arc::default();
        let opens: Arc<Mutex<Vec<OpenFile<Device>>>> = Arc::default();
        let (shared, kept) = (Arc::clone(&table), Arc::clone(&opens));
        let answer = move |device: &Device, nodeid, flags, file: &OwnedFd| {
            let table = shared.get_or_init(|| BackingTable::new(Arc::clone(device)));
            // This server grants what the file's mode permits.
            let file = ServerFile::new(file).access(Access::ReadWrite);
            let open = table.open(&nodeid, flags, file)?;
            let mut opens = kept.lock().unwrap();
            let reply = open.reply(FopenFlags::empty());
            let out = reply.to_fuse_open_out(opens.len() as u64);
            opens.push(open);
            Ok(out)
        };
        let connection = serve(sandbox, folder, answer)?;
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
        let found: Vec<_> = opens.iter().map(OpenFile::server_reason).collect();
        assert_eq!(found, reasons);
        // This is the connection's first id: the protected file was never registered, not even for a moment.
        let last = opens.last().ok_or("no open")?;
        assert_eq!(last.reply(FopenFlags::empty()).backing_id(), Some(1));
        drop(opens);

        let path = connection.path(PROTECTED);
        let read = client::run("read-protected", &[path.as_os_str()])?;
        assert_eq!(read, fs::read_to_string(folder.join(PROTECTED))?);
        let passed_through = seen.reads.load(Ordering::SeqCst) == 0;
        assert_eq!(passed_through, protection == Protection::Immutable);
        Ok(outcome)
    })
}

/// A filesystem with these flags.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Filesystem {
    Tmpfs,
    /// Checks the immutable flag at each write too.
    Ext4,
}

/// Runs a test on each of these filesystems that this kernel has.
fn on_each(
    sandbox: &Sandbox,
    test: impl Fn(Filesystem, &Path) -> Result<(), Failed>,
) -> Result<(), Failed> {
    let tmpfs = sandbox.tmpfs()?;
    let file = tmpfs.file("can-be", "")?;
    match Protection::AppendOnly.protect(&file) {
        Ok(()) => test(Filesystem::Tmpfs, tmpfs.path())?,
        // Without CONFIG_TMPFS_XATTR, tmpfs has neither these flags nor extended attributes.
        Err(errno) => {
            assert!(matches!(errno, Errno::NOTTY | Errno::OPNOTSUPP), "{errno}");
            let xattr = fsetxattr(&file, "trusted.any", b"", XattrFlags::empty());
            assert_eq!(xattr, Err(Errno::OPNOTSUPP));
        }
    }
    drop(file);
    tmpfs.unmount_when_idle()?;
    if ext4::is_supported()? {
        let ext4 = Ext4::new(sandbox, 4 << 20, &["-O", "^has_journal"])?;
        test(Filesystem::Ext4, ext4.path())?;
        unmount_when_idle(ext4.path())?;
    }
    Ok(())
}

/// The table serves append-only files in server mode: the server gets the writes, and its fd appends.
#[apply(needs_passthrough)]
fn table_serves_append_only(sandbox: &Sandbox) -> Result<(), Failed> {
    let reasons = [Some(ServerReason::AppendOnly), None];
    on_each(sandbox, |_, folder| {
        for (way, outcome) in with_table(sandbox, folder, Protection::AppendOnly, &reasons)? {
            match (way, outcome) {
                (_, Outcome::Appended) | (Way::Aio | Way::IoUring, Outcome::Unavailable) => {}
                _ => panic!("{way:?}: {outcome:?}"),
            }
        }
        idle_id_is_not_used_again(sandbox, folder)
    })
}

/// A file that became append-only while it was open stays in passthrough mode until its last release. Its idle id is
/// then closed instead of used again.
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
    Protection::AppendOnly.protect(&file)?;
    assert!(open()?.is_passthrough(), "still open");
    drop(before);
    assert_eq!(table.stats().idle, 1);
    assert_eq!(open()?.server_reason(), Some(ServerReason::AppendOnly));
    assert_eq!(table.stats().ids, 0);
    Ok(())
}

#[apply(needs_passthrough)]
fn table_refuses_to_write_immutable(sandbox: &Sandbox) -> Result<(), Failed> {
    on_each(sandbox, |_, folder| {
        for (way, outcome) in with_table(sandbox, folder, Protection::Immutable, &[None])? {
            assert_eq!(outcome, Outcome::NotOpened(Errno::PERM), "{way:?}");
        }
        beside_a_reader(sandbox, folder)
    })
}

/// A client cannot write to an immutable file through a reader's registration, whatever access the server grants.
fn beside_a_reader(sandbox: &Sandbox, folder: &Path) -> Result<(), Failed> {
    let connection = Connection::mount(sandbox, Init::passthrough(1))?;
    let table: Table = BackingTable::new(Arc::new(connection.device()));
    let path = folder.join("read");
    fs::write(&path, CONTENT)?;
    let file = File::open(&path)?;
    let (device, inode) = (file.metadata()?.dev(), file.metadata()?.ino());
    let open = |flags| {
        let granting = ServerFile::new(&file).access(Access::ReadWrite);
        table.open(&1, flags, granting.identity(device, inode))
    };
    // The control: while the file is not immutable, readers and writers are passed through.
    let before = (open(libc::O_RDONLY)?, open(libc::O_RDWR)?);
    assert!(table.share(&1, libc::O_RDWR).is_some());
    drop(before);

    Protection::Immutable.protect(&file)?;
    let reader = open(libc::O_RDONLY)?;
    let another = open(libc::O_RDONLY)?;
    assert!(reader.is_passthrough() && another.is_passthrough());
    for flags in [libc::O_WRONLY, libc::O_RDWR] {
        assert_eq!(open(flags).err(), Some(OpenError::Immutable), "{flags:#o}");
        assert!(table.share(&1, flags).is_none(), "{flags:#o}");
    }
    assert!(table.share(&1, libc::O_RDONLY).is_some());
    Ok(())
}

/// The control: without the table, the server registers the same files, and grants access that its fd does not have.
#[apply(needs_passthrough)]
fn passthrough_without_the_table(sandbox: &Sandbox) -> Result<(), Failed> {
    on_each(sandbox, |filesystem, folder| {
        let mut enforces = expect::inode_flags();
        for protection in [Protection::Immutable, Protection::AppendOnly] {
            let outcomes = without_table(sandbox, folder, protection)?;
            // If unknown, the kernel enforces the flags if the immutable file does not open.
            let enforces = *enforces.get_or_insert(matches!(outcomes[0].1, Outcome::NotOpened(_)));
            for (way, outcome) in outcomes {
                let expected = match enforces {
                    true => protection.enforced(way),
                    false => protection.not_enforced(filesystem, way),
                };
                if outcome != Outcome::Unavailable {
                    assert_eq!(outcome, expected, "{filesystem:?}, {protection:?}, {way:?}");
                }
            }
        }
        Ok(())
    })
}

fn without_table(
    sandbox: &Sandbox,
    folder: &Path,
    protection: Protection,
) -> Result<Vec<(Way, Outcome)>, Failed> {
    each_way(folder, protection, |way, folder| {
        let kept: Mutex<Option<BackingFile<Device>>> = Mutex::default();
        let answer = move |device: &Device, _, flags, file: &OwnedFd| {
            let mut kept = kept.lock().unwrap();
            if kept.is_none() {
                let device = Arc::clone(device);
                *kept = Some(BackingFile::open(device, file, Access::ReadWrite)?);
            }
            let id = kept.as_ref().map(BackingFile::id).ok_or(Errno::IO)?;
            let none = FopenFlags::empty();
            let reply = OpenReply::passthrough(id, Access::ReadWrite, flags, none)?;
            Ok(reply.to_fuse_open_out(0))
        };
        let connection = serve(sandbox, folder, answer)?;
        let path = connection.path(PROTECTED);
        let read = client::run("read-protected", &[path.as_os_str()])?;
        assert_eq!(read, CONTENT);
        let outcome = attempt(&connection, folder, PROTECTED, way)?;
        let seen = &connection.seen;
        let seen = [&seen.opens, &seen.reads, &seen.writes];
        let seen = seen.map(|count| count.load(Ordering::SeqCst));
        assert_eq!(seen, [2, 0, 0]);
        Ok(outcome)
    })
}
