//! Known differences between a mirror's answers and a plain directory's, with the reasons. The list stays
//! true: a difference that is gone fails the test just as a new one does.

use std::error::Error;
use std::fs::{DirEntry, File};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;
use std::process::Command;

use libtest_mimic::Failed;
use macro_rules_attribute::apply;
use rustix::fs::{FlockOperation, fcntl_lock, flock, fsync, inotify, syncfs};

use crate::backing::Backing;
use crate::client::{self, Client, Role, wait_for_parent};
use crate::place::describe;
use crate::program;
use crate::sandbox::Sandbox;
use crate::server::{Mirror, Way};

/// Roles for differences that take more than one call to show.
pub const ROLES: &[(&str, Role)] = &[
    ("lock", lock),
    ("sync", sync),
    ("watch", watch),
    ("connect", connect),
    ("stat-all", stat_all),
];

pub struct Difference {
    pub section: &'static str,
    pub call: &'static str,
    /// The mirror that differs; `None` for both.
    pub way: Option<Way>,
    pub mirror: &'static str,
    /// If the plain directory answers otherwise, its filesystem lacks the feature too, and the answers must be equal.
    pub plain: &'static str,
    pub on: On,
    pub why: &'static str,
}

/// The filesystems on which a difference must show.
#[derive(Clone, Copy, PartialEq, Eq)]
pub enum On {
    Tmpfs,
    /// Some, as the plain directory's answer tells.
    Some,
}

const NO_ALIGNMENT: &str = "the server clears O_DIRECT, and reads and writes at any alignment";
const NOT_IN_FUSE: &str = "the kernel does not ask FUSE servers for it";

pub const DIFFERENCES: &[Difference] = &[
    Difference {
        section: "clearing O_APPEND",
        call: r#"content("file")"#,
        way: Some(Way::Passthrough),
        mirror: r#""0123456789a""#,
        plain: r#""a123456789""#,
        on: On::Tmpfs,
        why: "the kernel's open file keeps the flags that the client opened it with",
    },
    Difference {
        section: "allocation, collapsing and inserting",
        call: "fallocate(A, F::COLLAPSE_RANGE, 0, 65536)",
        way: None,
        mirror: "EOPNOTSUPP",
        plain: "ok",
        on: On::Some,
        why: NOT_IN_FUSE,
    },
    Difference {
        section: "allocation, collapsing and inserting",
        call: "fallocate(A, F::INSERT_RANGE, 65536, 65536)",
        way: None,
        mirror: "EOPNOTSUPP",
        plain: "ok",
        on: On::Some,
        why: NOT_IN_FUSE,
    },
    Difference {
        section: "allocation, collapsing and inserting",
        call: "fallocate(A, F::UNSHARE_RANGE, 0, 65536)",
        way: None,
        mirror: "EOPNOTSUPP",
        plain: "ok",
        on: On::Some,
        why: NOT_IN_FUSE,
    },
    Difference {
        section: "direct I/O, unaligned",
        call: "pwrite_aligned(A, b'y', 100, 0)",
        way: Some(Way::Plain),
        mirror: "100",
        plain: "EINVAL",
        on: On::Some,
        why: NO_ALIGNMENT,
    },
    Difference {
        section: "direct I/O, unaligned",
        call: "pwrite_aligned(A, b'y', 4096, 100)",
        way: Some(Way::Plain),
        mirror: "4096",
        plain: "EINVAL",
        on: On::Some,
        why: NO_ALIGNMENT,
    },
    Difference {
        section: "direct I/O, unaligned",
        call: "pread_aligned(A, 100, 0)",
        way: Some(Way::Plain),
        mirror: "100 bytes, crc32 27deaa1a",
        plain: "EINVAL",
        on: On::Some,
        why: NO_ALIGNMENT,
    },
    Difference {
        section: "direct I/O, unaligned",
        call: "pread_aligned(A, 4096, 100)",
        way: Some(Way::Plain),
        mirror: "4096 bytes, crc32 c3d593f6",
        plain: "EINVAL",
        on: On::Some,
        why: NO_ALIGNMENT,
    },
    Difference {
        section: "limits",
        call: "fallocate(A, F::KEEP_SIZE, 0, 100_001)",
        way: None,
        mirror: "ok",
        plain: "EFBIG",
        on: On::Tmpfs,
        why: "the kernel checks the client's limit against new sizes alone; the server's own limit applies here",
    },
    Difference {
        section: "the largest position",
        call: "seek(A, SeekFrom::Start(i64::MAX as u64))",
        way: None,
        mirror: "9223372036854775807",
        plain: "EINVAL",
        on: On::Some,
        why: "the kernel does not know how large the source's files may be",
    },
    Difference {
        section: "devices",
        call: r#"open(A, "null", O::RDWR)"#,
        way: None,
        mirror: "EACCES",
        plain: "ok",
        on: On::Tmpfs,
        why: "the mount is nodev",
    },
    Difference {
        section: "unnamed files",
        call: r#"open(A, ".", O::RDWR | O::TMPFILE)"#,
        way: None,
        mirror: "EOPNOTSUPP",
        plain: "ok",
        on: On::Tmpfs,
        why: "the server does not make unnamed files",
    },
    Difference {
        section: "ioctls",
        call: "ioctl_getflags(A)",
        way: None,
        mirror: "ENOTTY",
        plain: "ok",
        on: On::Tmpfs,
        why: "the server answers no ioctls",
    },
    Difference {
        section: "birth times",
        call: r#"statx_btime("file")"#,
        way: None,
        mirror: "false",
        plain: "true",
        on: On::Tmpfs,
        why: "GETATTR has none, and the server does not answer STATX",
    },
    Difference {
        section: "names of trusted attributes",
        call: r#"listxattr("file", 100)"#,
        way: None,
        mirror: r"[trusted.a\x00]",
        plain: "[]",
        on: On::Tmpfs,
        why: "the server lists them as root; others still cannot read the values",
    },
    Difference {
        section: "reflinks",
        call: "ioctl_ficlone(B, A)",
        way: None,
        mirror: "EOPNOTSUPP",
        plain: "ok",
        on: On::Some,
        why: NOT_IN_FUSE,
    },
    Difference {
        section: "no direct I/O",
        call: "setfl(A, O::DIRECT)",
        way: None,
        mirror: "ok",
        plain: "EINVAL",
        on: On::Some,
        why: "the kernel does not ask the server; with passthrough, reads and writes then fail",
    },
    Difference {
        section: "a read-only filesystem",
        call: r#"access("file", Access::WRITE_OK)"#,
        way: None,
        mirror: "ok",
        plain: "EROFS",
        on: On::Tmpfs,
        why: "the kernel checks the file's mode alone; opening it for writing fails",
    },
    Difference {
        section: "setuid and setgid are cleared",
        call: r#"stat("by root")"#,
        way: Some(Way::Passthrough),
        mirror: "RegularFile 777 nlink 1 uid 0 gid 0 size 1 rdev 0x0 blksize 4096",
        plain: "RegularFile 6777 nlink 1 uid 0 gid 0 size 1 rdev 0x0 blksize 4096",
        on: On::Tmpfs,
        why: "passthrough writes without CAP_FSETID",
    },
    Difference {
        section: "programs that set the user",
        // The second of the two such calls. The first has the same outcome on both.
        call: r#"run("./id", "-u")"#,
        way: None,
        mirror: r#"Some(0), None, "0\n""#,
        plain: r#"Some(0), None, "1000\n""#,
        on: On::Some,
        why: "the mount is nosuid",
    },
];

/// Locks a file with flock(2) and fcntl(2), prints the outcomes, and waits.
fn lock(args: &[String]) -> Result<String, Box<dyn Error>> {
    let file = File::options().read(true).write(true).open(&args[0])?;
    let tried = [
        flock(&file, FlockOperation::NonBlockingLockExclusive),
        fcntl_lock(&file, FlockOperation::NonBlockingLockExclusive),
    ];
    let [by_flock, by_fcntl] = tried.map(|tried| describe(&tried.map(|()| String::new())));
    println!("{by_flock} {by_fcntl}");
    wait_for_parent()?;
    Ok("done".into())
}

#[apply(test_case)]
fn locks_hold_on_one_side_only(name: &str) -> Result<(), Failed> {
    for way in [Way::Passthrough, Way::Plain] {
        let sandbox = Sandbox::new(name)?;
        let backing = Backing::in_memory(&sandbox, "tmpfs")?;
        let source = backing.folder("source")?;
        std::fs::write(source.join("file"), "")?;
        let mirror = Mirror::start(&sandbox, &source, way)?;
        let holders = [
            (mirror.path(), "ok ok"),
            (mirror.path(), "EAGAIN EAGAIN"),
            (&source, "ok ok"),
            (&source, "EAGAIN EAGAIN"),
        ]
        .map(|(side, expected)| {
            let mut holder = Client::start("lock", &[side.join("file").as_os_str()])?;
            assert_eq!(holder.line()?, expected);
            Ok(holder)
        });
        for holder in holders {
            holder.and_then(Client::finish)?;
        }
        mirror.wait_for_releases()?;
        mirror.stop(&backing)?;
    }
    Ok(())
}

/// Syncs the filesystem of a file, then the file.
fn sync(args: &[String]) -> Result<String, Box<dyn Error>> {
    let file = File::open(&args[0])?;
    println!("open");
    wait_for_parent()?;
    syncfs(&file)?;
    println!("syncfs");
    wait_for_parent()?;
    fsync(&file)?;
    println!("fsync");
    wait_for_parent()?;
    Ok("done".into())
}

/// The kernel asks no FUSE server to sync its filesystem, except virtiofs.
#[apply(test_case)]
fn syncfs_stays_in_the_kernel(name: &str) -> Result<(), Failed> {
    let sandbox = Sandbox::new(name)?;
    let backing = Backing::in_memory(&sandbox, "tmpfs")?;
    let source = backing.folder("source")?;
    std::fs::write(source.join("file"), "")?;
    let mirror = Mirror::start(&sandbox, &source, Way::Passthrough)?;
    let mut client = Client::start("sync", &[mirror.path().join("file").as_os_str()])?;
    assert_eq!(client.line()?, "open");
    let mut requests = |call| -> Result<u64, Failed> {
        let before = mirror.reads()?;
        client.proceed()?;
        assert_eq!(client.line()?, call);
        Ok(mirror.reads()? - before)
    };
    assert_eq!(requests("syncfs")?, 0);
    assert_eq!(requests("fsync")?, 1);
    client.finish()?;
    mirror.wait_for_releases()?;
    mirror.stop(&backing)
}

/// Watches each file with inotify(7), and prints whether the watch reports a change that is made meanwhile.
fn watch(args: &[String]) -> Result<String, Box<dyn Error>> {
    let watches: Vec<_> = args
        .iter()
        .map(|path| {
            let watch = inotify::init(inotify::CreateFlags::NONBLOCK)?;
            inotify::add_watch(&watch, path, inotify::WatchFlags::MODIFY)?;
            Ok(watch)
        })
        .collect::<rustix::io::Result<_>>()?;
    println!("watching");
    wait_for_parent()?;
    let told = watches.iter().map(|watch| {
        let told = rustix::io::read(watch, &mut [0; 4096]);
        describe(&told.map(|_| String::new()))
    });
    println!("{}", told.collect::<Vec<_>>().join(" "));
    Ok("done".into())
}

#[apply(test_case)]
fn inotify_sees_one_side_only(name: &str) -> Result<(), Failed> {
    let sandbox = Sandbox::new(name)?;
    let backing = Backing::in_memory(&sandbox, "tmpfs")?;
    let source = backing.folder("source")?;
    std::fs::write(source.join("file"), "")?;
    let mirror = Mirror::start(&sandbox, &source, Way::Passthrough)?;
    let files = [source.join("file"), mirror.path().join("file")];
    let mut watcher = Client::start("watch", &files.each_ref().map(|file| file.as_os_str()))?;
    assert_eq!(watcher.line()?, "watching");
    std::fs::write(&files[0], "changed")?;
    watcher.proceed()?;
    assert_eq!(
        watcher.line()?,
        "ok EAGAIN",
        "a watch in the source, and one through the mirror"
    );
    watcher.finish()?;
    mirror.wait_for_releases()?;
    mirror.stop(&backing)
}

/// Connects to each socket, and returns the outcomes.
fn connect(args: &[String]) -> Result<String, Box<dyn Error>> {
    let connected = args.iter().map(|path| match UnixStream::connect(path) {
        Ok(_) => "ok".to_owned(),
        Err(error) => format!("{:?}", error.kind()),
    });
    Ok(connected.collect::<Vec<_>>().join(" "))
}

#[apply(test_case)]
fn sockets_connect_on_one_side_only(name: &str) -> Result<(), Failed> {
    let sandbox = Sandbox::new(name)?;
    let backing = Backing::in_memory(&sandbox, "tmpfs")?;
    let source = backing.folder("source")?;
    let listener = UnixListener::bind(source.join("socket"))?;
    let mirror = Mirror::start(&sandbox, &source, Way::Passthrough)?;
    let sockets = [source.join("socket"), mirror.path().join("socket")];
    let connected = client::run("connect", &sockets.each_ref().map(|path| path.as_os_str()))?;
    assert_eq!(connected, "ok ConnectionRefused");
    drop(listener);
    mirror.stop(&backing)
}

/// Returns whether all files of a folder have attributes, and the errno of the first that has none.
fn stat_all(args: &[String]) -> Result<String, Box<dyn Error>> {
    let files = std::fs::read_dir(&args[0])?.collect::<Result<Vec<_>, _>>()?;
    let known = files.iter().map(DirEntry::metadata);
    let (known, unknown): (Vec<_>, Vec<_>) = known.partition(Result::is_ok);
    let why = unknown.first().and_then(|first| first.as_ref().err());
    let why = why.and_then(std::io::Error::raw_os_error);
    Ok(format!("{} {why:?}", files.len() == known.len()))
}

/// The server has an fd of each file that the kernel remembers. Without fds, its lookups fail with `EMFILE`.
#[apply(test_case)]
fn lookups_fail_when_fds_run_out(name: &str) -> Result<(), Failed> {
    let sandbox = Sandbox::new(name)?;
    let backing = Backing::in_memory(&sandbox, "tmpfs")?;
    let source = backing.folder("source")?;
    for file in 0..500 {
        std::fs::write(source.join(file.to_string()), "")?;
    }
    let stat_all = |root: &Path| client::run("stat-all", &[root.as_os_str()]);
    assert_eq!(stat_all(&source)?, "true None");
    let mirror = Mirror::start(&sandbox, &source, Way::Passthrough)?;
    assert_eq!(
        stat_all(mirror.path())?,
        "true None",
        "it has as many as root may"
    );
    drop(mirror);

    let limited = Sandbox::new(name)?;
    let mut server = Command::new("setpriv");
    server
        .args(["--bounding-set=-sys_resource", "prlimit", "--nofile=400"])
        .arg(program::example("mirror")?);
    let mirror = Mirror::spawn_by(server, &limited, &source, Way::Passthrough)?;
    let expected = format!("false {:?}", Some(libc::EMFILE));
    assert_eq!(stat_all(mirror.path())?, expected);
    mirror.stop(&backing)
}
