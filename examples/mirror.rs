//! A passthrough mirror: serves a directory tree at another place. The kernel reads and writes the files itself,
//! without asking the server.
//!
//! `mirror SRC MNT` serves SRC at MNT until MNT is unmounted, or until Ctrl-C; `mirror --help` lists the options.
//! `mirror` alone compares native reads, plain FUSE and passthrough, and checks that no backing id is left open.
//!
//! Mounting needs root. Where the kernel refuses passthrough, because it is older than Linux 6.9 or the mirror runs in
//! a container with its own user namespace, the mirror prints the reason and serves without passthrough.
//!
//! | file | content |
//! |---|---|
//! | `mirror/opens.rs` | passthrough, and the rights of its I/O |
//! | `mirror/on_behalf.rs` | the rights of other calls |
//! | `mirror/inodes.rs` | which file is which |
//! | `mirror/fs.rs` | everything else that a filesystem does |
//! | `mirror/threads.rs` | calls that block |
//! | `mirror/session.rs` | mounting |
//! | `mirror/demo.rs` | the demonstration |
//!
//! How the mount differs from SRC:
//!
//! | what | why |
//! |---|---|
//! | Set-user-ID programs and device nodes do not work. | The mount is `nosuid` and `nodev`. |
//! | `O_TMPFILE`, `FS_IOC_*` and other ioctls, reflinks, inserting or collapsing ranges, and birth times fail. | fuser or FUSE has no such request, or the mirror does not implement it. |
//! | A lock (flock(2), fcntl(2)) taken on one side does not hold on the other. | The kernel keeps the mount's locks itself. |
//! | inotify(7) on the mount reports what happens on the mount, not what happens in SRC. | FUSE does not forward such events. |
//! | Clients of the mount cannot connect to a socket in SRC, or share a FIFO with SRC. | The kernel finds sockets and FIFOs by its own inode. |
//! | syncfs(2) and sync(2) on the mount write nothing in SRC; fsync(2) does. | The kernel sends SYNCFS only to virtiofs. Sync SRC itself. |
//! | access(2) does not report that SRC is read-only or `noexec`, lseek(2) does not know the maximum file size, and `F_SETFL` does not know whether `O_DIRECT` is supported. A client can reserve space beyond the end of a file despite its limit on file size. | The kernel answers these from attributes alone. |
//! | A change in SRC within one tick of the kernel's clock (1 to 10 ms) after a lookup shows in attributes one tick later. | The kernel does not ask for what it was just told. |
//! | Everybody sees the names, but not the values, of `trusted` attributes. | The server lists them as root. |
//! | Without passthrough, `O_DIRECT` requires no alignment. | The server reads and writes at any alignment. |
//! | A file opened with `O_APPEND` still appends after `fcntl` has cleared the flag. | Passthrough keeps the flags of the open. |
//! | Root's writes also clear set-user-ID and set-group-ID bits, and cannot use reserved blocks. A write by a member of the group clears the set-group-ID bit of a file that the group may not execute. On NFS, only files that everybody may read and write are passed through: use `--no-passthrough`. | Passthrough reads and writes as nobody. |
//! | Only for root do truncation, allocation and copying keep those bits: not for other users with `CAP_FSETID`, nor for root in another PID or user namespace. A client's supplementary groups do not count. | The request names the client's user, group and process, and nothing more. |
//! | Without passthrough, writes through a mapping use no reserved blocks, not even root's, and clear a file's capabilities. | The kernel does not say who wrote. |
//! | A program on a `noexec` mount within SRC can be mapped as executable, for example by ld.so(8); execve(2) refuses. `nosymfollow` of such a mount has no effect. | The kernel asks for neither. If SRC itself is `noexec` or `nosymfollow`, so is the mount. |
//! | If the mirror is mounted within its own source, by a bind mount or by propagation, access to it there fails with `ELOOP`. | The mirror would wait for itself. |
//! | A client that waits for a lease, or for a filesystem that hangs, cannot be killed meanwhile. | The server does not learn that the client was killed. |
//! | While 31 clients wait for slow or hanging filesystems, other requests fail with `EBUSY`, except for files known to be on btrfs, ext4, F2FS, tmpfs or XFS. | The last thread never waits. |
//! | On filesystems other than these, a lookup fails with `ENOSPC` once the kernel remembers more files than `fs.inotify.max_user_watches`, a limit that all of root's processes share. | Inode numbers do not identify files there, so the mirror keeps an inotify watch on each file that the kernel remembers. |
//! | A file that two mounts within SRC show becomes two files: locks taken by one path do not hold by the other, and with `--ttl` neither path shows at once what the other changes. On overlayfs, listings can have other inode numbers than stat(2). | The mounts may permit different things. Listings do not tell which layer a file is on. |
//! | With `--ttl`, set-user-ID bits that a write has cleared stay visible for that time. | The kernel does not know that they were cleared. |
//! | Filesystems in SRC cannot be unmounted while the kernel remembers files on them (`umount -l` works), and a lookup of an automount point mounts nothing. | The mirror holds an fd of each file that the kernel remembers. Its lookups (`O_PATH`, `AT_NO_AUTOMOUNT`) ask no filesystem for more than there is. |
//! | Files of /proc and similar filesystems, whose size is 0, are empty. close(2) reports no write errors; fsync(2) does. | The kernel reads no further than the size. It does not ask the mirror at close(2). |
//! | In a tree with more files than the server may have fds, lookups fail with `EMFILE`. The limit is the highest that root may have. | The mirror holds an fd of each file that the kernel remembers, because a path may lead elsewhere later. |

use std::error::Error;
use std::ffi::{OsStr, OsString};
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::Duration;

use fuse_backing::init::MaxStackDepth;
use rustix::io::Errno;
use rustix::process::{Resource, Rlimit, getrlimit, setrlimit, umask};
use rustix::thread::{CapabilitySet, capabilities, set_capabilities, set_thread_groups};

use session::{Event, Events, Mounted, Options};

#[path = "mirror/attr.rs"]
mod attr;
#[path = "mirror/demo.rs"]
mod demo;
#[path = "mirror/dirs.rs"]
mod dirs;
#[path = "mirror/fs.rs"]
mod fs;
#[path = "mirror/inodes.rs"]
mod inodes;
#[path = "mirror/on_behalf.rs"]
mod on_behalf;
#[path = "mirror/opens.rs"]
mod opens;
#[path = "mirror/session.rs"]
mod session;
#[path = "mirror/source.rs"]
mod source;
#[path = "mirror/status.rs"]
mod status;
#[path = "mirror/threads.rs"]
mod threads;

type Result<T> = std::result::Result<T, Box<dyn Error>>;

/// How long an interrupted mirror keeps serving clients that still use it.
const GRACE: Duration = Duration::from_secs(5);

const USAGE: &str = "\
usage: mirror [OPTIONS] SRC MNT   serve the directory SRC at MNT
       mirror                     demonstrate passthrough (as root)

options:
  --no-passthrough   serve through plain FUSE
  --no-killpriv      let the kernel ask for a file's capabilities before each write (slow)
  --depth 1          let overlayfs be stacked on MNT; files of SRC on overlayfs are then not passed through
  --ttl SECONDS      let the kernel cache names and attributes for so long, even if they change in SRC or
                     through another mount";

fn main() -> ExitCode {
    let args: Vec<_> = std::env::args_os().skip(1).collect();
    let done = match args.first().and_then(|first| first.to_str()) {
        None if args.is_empty() => demo::run(),
        Some("--help" | "-h") => {
            println!("{USAGE}");
            Ok(())
        }
        // A client process of the demonstration.
        Some("--read") => demo::read(args.get(1).map_or(Path::new(""), Path::new)),
        _ => parse(args)
            .and_then(|([source, mountpoint], options)| serve(&source, &mountpoint, options)),
    };
    match done {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("mirror: {error}");
            ExitCode::FAILURE
        }
    }
}

fn parse(args: Vec<OsString>) -> Result<([PathBuf; 2], Options)> {
    let mut options = Options::default();
    let mut paths = Vec::new();
    let mut args = args.into_iter();
    while let Some(arg) = args.next() {
        match arg.to_str() {
            Some("--no-passthrough") => options.passthrough = false,
            Some("--no-killpriv") => options.killpriv = false,
            Some("--depth") => {
                options.depth = match args.next().as_deref().and_then(OsStr::to_str) {
                    Some("1") => MaxStackDepth::One,
                    Some("2") => MaxStackDepth::Two,
                    _ => return Err("--depth takes 1 or 2".into()),
                }
            }
            Some("--ttl") => {
                let seconds = args.next().and_then(|arg| arg.to_str()?.parse().ok());
                let ttl = seconds.and_then(|seconds| Duration::try_from_secs_f64(seconds).ok());
                options.ttl = ttl.ok_or("--ttl takes a number of seconds")?;
            }
            Some(option) if option.starts_with('-') => {
                return Err(format!("unknown option {option}\n{USAGE}").into());
            }
            _ => paths.push(PathBuf::from(arg)),
        }
    }
    let number = paths.len();
    let paths = <[PathBuf; 2]>::try_from(paths);
    let paths =
        paths.map_err(|_| format!("expected two paths, SRC and MNT; got {number}\n{USAGE}"))?;
    Ok((paths, options))
}

fn serve(source: &Path, mountpoint: &Path, options: Options) -> Result<()> {
    prepare_process()?;
    let events = Events::new();
    // Set before the mount, so that an interrupt never leaves a mount behind.
    let interrupted = events.sender.clone();
    ctrlc::set_handler(move || drop(interrupted.send(Event::Interrupted)))?;

    // Dropping this reference to the device is fine: the filesystem holds its own until it ends.
    let (mut mirror, _) = Mounted::new(source, mountpoint, options, events)?;
    if let Some(why) = mirror.status().refused() {
        eprintln!("mirror: serving without passthrough: {why}");
    }
    if let Some(Event::Ended(result)) = mirror.wait(Duration::MAX) {
        return Ok(result?);
    }
    if mirror.unmount()? {
        eprintln!(
            "mirror: {} is in use: detached it, and serving it for at most {} more seconds",
            mountpoint.display(),
            GRACE.as_secs(),
        );
    }
    // After the grace period or a second interrupt, the connection ends with the process.
    match mirror.wait(GRACE) {
        Some(Event::Ended(result)) => Ok(result?),
        Some(Event::Interrupted) | None => Ok(()),
    }
}

/// Prepares the process to create files for clients and to hold many fds. Must run before other threads start, because
/// they inherit its settings.
fn prepare_process() -> Result<()> {
    // The modes in requests are final: the server's own umask must not change them.
    umask(rustix::fs::Mode::empty());
    // The highest limit that root may set, or else the current hard limit.
    let highest = std::fs::read_to_string("/proc/sys/fs/nr_open")?;
    let limit = |maximum| Rlimit {
        current: maximum,
        maximum,
    };
    setrlimit(Resource::Nofile, limit(highest.trim().parse().ok()))
        .or_else(|_| setrlimit(Resource::Nofile, limit(getrlimit(Resource::Nofile).maximum)))?;
    // CAP_SYS_RESOURCE and supplementary groups would open reserved blocks to clients: see `on_behalf.rs`.
    let mut sets = capabilities(None)?;
    sets.effective.remove(CapabilitySet::SYS_RESOURCE);
    set_capabilities(None, sets)?;
    match set_thread_groups(&[]) {
        // A user namespace can deny it. The process then keeps the groups of the user who started it.
        Ok(()) | Err(Errno::PERM) => Ok(()),
        Err(errno) => Err(format!("cannot drop supplementary groups: {errno}").into()),
    }
}
