//! A passthrough mirror: serves a directory tree at another place, where reads and writes do not
//! come to the server.
//!
//! `mirror SRC MNT` serves SRC at MNT until it is unmounted, or Ctrl-C; `mirror --help` lists the options. `mirror` alone
//! measures plain FUSE and passthrough against the source, and checks that nothing leaks.
//!
//! Mounting takes root. Where the kernel refuses passthrough, being older than Linux 6.9 or in a
//! container with users of its own, the mirror says why and serves plainly.
//!
//! Where to look: `mirror/opens.rs` is about passthrough and its rights, `mirror/on_behalf.rs` about those of other
//! calls, `mirror/inodes.rs` about which file is which, `mirror/fs.rs` about everything else that a filesystem does,
//! `mirror/threads.rs` about calls that block, `mirror/session.rs` about mounting, `mirror/demo.rs` about the measurement.
//!
//! What differs from the source:
//!
//! | what | why |
//! |---|---|
//! | Set-user-ID programs and device nodes do not work. | The mount is `nosuid` and `nodev`. |
//! | With `O_TMPFILE`, `FS_IOC_*` and other ioctls, reflinks, inserting or collapsing ranges, birth times: errors. | fuser, or FUSE itself, has no such request, or the mirror does not answer it. |
//! | A lock (flock(2), fcntl(2)) on one side does not hold on the other. | The kernel keeps those of the mount itself. |
//! | inotify(7) on the mount sees what happens on the mount, not what happens in SRC. | FUSE passes no such events on. |
//! | A socket in SRC cannot be connected to through the mount. | The kernel finds sockets by its own inode, and FIFOs too. |
//! | syncfs(2) and sync(2) of the mount write nothing in SRC; fsync(2) does. | The kernel sends SYNCFS to virtiofs alone. Sync SRC itself. |
//! | access(2) does not tell that SRC is read-only or `noexec`, lseek(2) how large files may be, `F_SETFL` whether there is `O_DIRECT`. A limit on a client's file size does not keep it from reserving space beyond the end. | The kernel answers these by attributes alone. |
//! | What changes in SRC within a tick of the kernel's clock (1 to 10 ms) after a lookup shows a tick later in attributes. | The kernel does not ask for what it was just told. |
//! | The names of `trusted` attributes, not their values, are listed for everybody. | The server lists them, and it is root. |
//! | Without passthrough `O_DIRECT` asks for no alignment. | The server reads and writes at any. |
//! | A file opened with `O_APPEND` goes on appending when `fcntl` has cleared the flag. | Passthrough keeps the flags of the open. |
//! | Root's writes, too, clear set-user-ID and set-group-ID bits, and find no room in reserved blocks. The set-group-ID bit of a file that its group may not execute goes when a member of the group writes. On NFS, only what everybody may read and write is passed through: use `--no-passthrough`. | Passthrough reads and writes as nobody. |
//! | Truncation, allocation and copying leave those bits for root alone: not for other users with `CAP_FSETID`, nor for root in another PID or user namespace. A client's supplementary groups do not count. | The request has the client's user, group and process, and no more. |
//! | Without passthrough, what is written through a mapping takes no reserved blocks, be it root's, and takes a file's capabilities away. | The kernel does not say who wrote. |
//! | A program in a `noexec` mount within SRC can be mapped to be run, by ld.so(8) say; execve(2) refuses. `nosymfollow` there does not hold. | The kernel asks for neither. Where SRC itself is `noexec` or `nosymfollow`, so is the mount. |
//! | Where the mirror is mounted in its own source, by a bind mount or by propagation, there is `ELOOP`. | It would wait for itself. |
//! | A client that waits for a lease, or for a filesystem that hangs, cannot be killed meanwhile. | Nor does the server know that the client has been. |
//! | While 31 clients wait for filesystems that are slow or hang, `EBUSY` for what is not known to be on btrfs, ext4, F2FS, tmpfs or XFS. | The last thread does not wait. |
//! | On other filesystems than these, `ENOSPC` for more files than `fs.inotify.max_user_watches`, which all of root's processes share. | Their inode numbers do not tell files apart: the mirror has a watch of each file that the kernel remembers. |
//! | A file that two mounts within SRC show is two files in one: locks by one path do not hold by the other, and with `--ttl` neither shows at once what is done by the other. On overlayfs, listings can have other inode numbers than stat(2). | The mounts may permit different things. Listings do not tell which layer a file is on. |
//! | With `--ttl`, set-user-ID bits that a write has cleared show that much longer. | The kernel does not know that they are gone. |
//! | Filesystems in SRC cannot be unmounted while the kernel remembers files of them (`umount -l`), and looking at an automount point mounts nothing. | The mirror holds an fd of each file that the kernel remembers. Its lookups ask no filesystem for more than there is. |
//! | Files of /proc and the like, whose size is 0, are empty. close(2) reports no errors of writing; fsync(2) does. | The kernel reads no further than that. The mirror is not asked at close(2). |
//! | In a tree of more files than the server may have fds, lookups fail with `EMFILE`. It gets as many as root may. | It holds an fd of each file that the kernel remembers, since a path may lead elsewhere by then. |

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

/// How long a mirror that was interrupted waits for those who use it.
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
        // What a client process of the demonstration does.
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
    // Before there is anything to clean up.
    let interrupted = events.sender.clone();
    ctrlc::set_handler(move || drop(interrupted.send(Event::Interrupted)))?;

    // The device is dropped at once: the filesystem has its own, until it ends.
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
    // If it is still in use then, or interrupted once more: the connection ends with the process.
    match mirror.wait(GRACE) {
        Some(Event::Ended(result)) => Ok(result?),
        Some(Event::Interrupted) | None => Ok(()),
    }
}

/// What a server that creates files for others, and holds an fd of each, needs. Before there are other threads, which
/// inherit it.
fn prepare_process() -> Result<()> {
    // The modes in requests are final.
    umask(rustix::fs::Mode::empty());
    // As many fds as root may have, or else as many as everybody may.
    let highest = std::fs::read_to_string("/proc/sys/fs/nr_open")?;
    let limit = |maximum| Rlimit {
        current: maximum,
        maximum,
    };
    setrlimit(Resource::Nofile, limit(highest.trim().parse().ok()))
        .or_else(|_| setrlimit(Resource::Nofile, limit(getrlimit(Resource::Nofile).maximum)))?;
    // It takes blocks for others, and is in no group of theirs: `on_behalf.rs`.
    let mut sets = capabilities(None)?;
    sets.effective.remove(CapabilitySet::SYS_RESOURCE);
    set_capabilities(None, sets)?;
    match set_thread_groups(&[]) {
        // A user namespace can deny it: the groups that are left are those of the user who started the server.
        Ok(()) | Err(Errno::PERM) => Ok(()),
        Err(errno) => Err(format!("cannot drop supplementary groups: {errno}").into()),
    }
}
