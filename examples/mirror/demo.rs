//! The demonstration: one file read in three ways, and the proof that no id is left open.

use std::fs::{self, File};
use std::io::{BufWriter, Read, Write};
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::sleep;
use std::time::{Duration, Instant};

use fuse_backing::{Access, BackingFile};
use rustix::io::Errno;
use rustix::mount::{MountFlags, MountPropagationFlags, UnmountFlags};
use rustix::thread::{UnshareFlags, unshare_unsafe};

use crate::Result;
use crate::opens::Device;
use crate::session::{Event, Events, Mounted, Options};

const SIZE: u64 = 256 << 20;
const CHUNK: usize = 1 << 20;
/// Odd, for the median.
const ROUNDS: usize = 3;
const OPENS: u32 = 5_000;
/// For what takes no time unless something is broken.
const PATIENCE: Duration = Duration::from_secs(5);
const CLIENT_PATIENCE: Duration = Duration::from_secs(60);

/// Where the file is in the tree: behind a symbolic link, for the mirror to have more to do.
const DATA: &str = "latest";

static INTERRUPTED: AtomicBool = AtomicBool::new(false);

pub(crate) fn run() -> Result<()> {
    if !rustix::process::geteuid().is_root() {
        return Err("the demonstration mounts filesystems, which takes root".into());
    }
    enter_private_mount_namespace()
        .map_err(|e| format!("a mount namespace of its own is not to be had: {e}"))?;
    crate::prepare_process()?;
    ctrlc::set_handler(|| INTERRUPTED.store(true, Ordering::Relaxed))?;

    // Undone in reverse: the mirrors, the source, the directory.
    let scratch = tempfile::Builder::new().prefix("mirror-").tempdir()?;
    let mut source = Tmpfs::mount(scratch.path().join("source"))?;
    make_tree(&source.at)?;
    let mut plain = Running::start(&source.at, scratch.path().join("plain"), false)?;
    let mut passthrough = Running::start(&source.at, scratch.path().join("passthrough"), true)?;
    passthrough.require_passthrough(&source.at)?;
    make_data(&source.at)?;

    let mut ways = [
        Way::new("native", &source.at, None),
        Way::new("plain FUSE", &plain.at, Some(&plain)),
        Way::new("passthrough", &passthrough.at, Some(&passthrough)),
    ];
    for _ in 0..ROUNDS {
        for way in &mut ways {
            way.read()?;
        }
    }
    print_table(&mut ways);
    show_hot_and_cold(&plain, &passthrough)?;
    let expected = ways[0].readings[0].checksum;
    let equal = ways
        .iter()
        .flat_map(|way| &way.readings)
        .all(|reading| reading.bytes == SIZE && reading.checksum == expected);
    let reads = passthrough.reads();
    let left = ids_left_open(&mut source, &mut plain, &mut passthrough)?;
    println!();
    println!("READ requests with passthrough: {reads}");
    println!("checksums equal: {}", if equal { "yes" } else { "no" });
    println!("ids left open: {left}");

    let failures = [
        (
            reads != 0,
            "reads came to the server in spite of passthrough",
        ),
        (!equal, "not every way read the same bytes"),
        (left != 0, "backing ids were left open"),
    ];
    let failures: Vec<_> = failures.iter().filter(|f| f.0).map(|f| f.1).collect();
    if failures.is_empty() {
        Ok(())
    } else {
        Err(failures.join("; ").into())
    }
}

/// A client: opens and closes a file over and over, and prints the microseconds that each took.
pub(crate) fn open(path: &Path) -> Result<()> {
    let start = Instant::now();
    for _ in 0..OPENS {
        File::open(path)?;
    }
    println!("{}", start.elapsed().as_secs_f64() * 1e6 / f64::from(OPENS));
    Ok(())
}

/// A client: keeps a file open until its standard input ends.
pub(crate) fn hold(path: &Path) -> Result<()> {
    let _file = File::open(path)?;
    println!("open");
    std::io::stdin().read_to_end(&mut Vec::new())?;
    Ok(())
}

/// A client: reads a file from start to end, and prints its size, its checksum, and the seconds
/// spent in read(2). Clients are processes of their own: one that has files open on a mount which it
/// serves itself can end up waiting for itself.
pub(crate) fn read(path: &Path) -> Result<()> {
    let mut file = File::open(path)?;
    let mut buffer = vec![0; CHUNK];
    let mut checksum = crc32fast::Hasher::new();
    let mut bytes = 0;
    let mut spent = Duration::ZERO;
    loop {
        let start = Instant::now();
        let length = file.read(&mut buffer)?;
        spent += start.elapsed();
        if length == 0 {
            break;
        }
        checksum.update(&buffer[..length]);
        bytes += length;
    }
    println!("{bytes} {} {}", checksum.finalize(), spent.as_secs_f64());
    Ok(())
}

/// A file that nobody has open is registered at its open, and closed at its release; one that
/// somebody has open shares what is registered.
fn show_hot_and_cold(plain: &Running, passthrough: &Running) -> Result<()> {
    let path = passthrough.at.join("readme");
    let plain = client("--open", &plain.at.join("readme"))?;
    let cold = client("--open", &path)?;
    let mut holder = Command::new(std::env::current_exe()?)
        .arg("--hold")
        .arg(&path)
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()?;
    let files = passthrough.mirror.status().files.upgrade();
    let is_open = || {
        let list = files.as_ref().map(|files| files.table().list());
        list.filter(|list| list.iter().any(|entry| entry.opens > 0))
    };
    let mut listing = None;
    within(PATIENCE, || {
        listing = is_open();
        listing.is_some()
    });
    let hot = client("--open", &path);
    // Ends the holder, also if the client failed.
    drop(holder.stdin.take());
    holder.wait()?;
    println!();
    println!(
        "open and close, microseconds: plain FUSE {}, passthrough cold {}, hot {}",
        rounded(&plain)?,
        rounded(&cold)?,
        rounded(&hot?)?,
    );
    if let Some(listing) = listing {
        println!("registered while it was hot:");
        print!("{listing}");
    }
    Ok(())
}

fn rounded(printed: &str) -> Result<String> {
    Ok(format!("{:.1}", printed.trim().parse::<f64>()?))
}

/// How many ids the passthrough mirror did not close. Unmounts everything to find out.
///
/// The mirror's own count is one half of it. The other is the kernel's word: an id pins the mount of
/// its file until it is closed or its connection is gone, so that a source which can be unmounted
/// *while the connection is still there* has no id left. The connection is kept by a device fd; the
/// mirrors have to go first, as their fds of the source pin it too.
fn ids_left_open(
    source: &mut Tmpfs,
    plain: &mut Running,
    passthrough: &mut Running,
) -> Result<usize> {
    // RELEASE comes some time after close(2).
    let count = || passthrough.mirror.status().ids();
    within(PATIENCE, || count() == 0);
    let count = count();
    plain.stop()?;
    passthrough.stop()?;
    let _connection: &Device = &passthrough.device;
    let mut unmounted = Err(Errno::BUSY);
    within(PATIENCE, || {
        unmounted = source.unmount();
        unmounted != Err(Errno::BUSY)
    });
    match unmounted {
        Ok(()) => Ok(count),
        Err(Errno::BUSY) => Ok(count.max(1)),
        Err(errno) => Err(errno.into()),
    }
}

/// A mirror, and the device of its connection.
struct Running {
    at: PathBuf,
    mirror: Mounted,
    device: Device,
}

impl Running {
    fn start(source: &Path, at: PathBuf, passthrough: bool) -> Result<Self> {
        fs::create_dir(&at)?;
        let options = Options {
            passthrough,
            ..Options::default()
        };
        let (mirror, device) = Mounted::new(source, &at, options, Events::new())?;
        Ok(Self { at, mirror, device })
    }

    /// Asks before anything is measured.
    fn require_passthrough(&self, source: &Path) -> Result<()> {
        if let Some(why) = self.mirror.status().refused() {
            return Err(why.to_string().into());
        }
        let file = File::open(source.join("readme"))?;
        let device = Arc::clone(&self.device);
        BackingFile::open(device, file, Access::ReadOnly)?.close()?;
        Ok(())
    }

    fn reads(&self) -> u64 {
        self.mirror.status().reads.load(Ordering::Relaxed)
    }

    /// Unmounts, and waits until the filesystem and its fds are gone.
    fn stop(&mut self) -> Result<()> {
        let at = self.at.display();
        if self.mirror.unmount()? {
            return Err(format!("{at} is still in use").into());
        }
        match self.mirror.wait(PATIENCE) {
            Some(Event::Ended(result)) => Ok(result?),
            _ => Err(format!("the server of {at} does not end").into()),
        }
    }
}

/// A way to read the file.
struct Way<'a> {
    name: &'static str,
    path: PathBuf,
    mirror: Option<&'a Running>,
    readings: Vec<Reading>,
}

struct Reading {
    bytes: u64,
    checksum: u32,
    seconds: f64,
    /// READ requests that the server saw.
    requests: Option<u64>,
}

impl<'a> Way<'a> {
    fn new(name: &'static str, root: &Path, mirror: Option<&'a Running>) -> Self {
        Self {
            name,
            path: root.join(DATA),
            mirror,
            readings: Vec::new(),
        }
    }

    fn read(&mut self) -> Result<()> {
        let before = self.mirror.map(Running::reads);
        let printed = client("--read", &self.path)?;
        let after = self.mirror.map(Running::reads);

        let mut words = printed.split_whitespace();
        let mut word = || words.next().ok_or("the client printed too little");
        self.readings.push(Reading {
            bytes: word()?.parse()?,
            checksum: word()?.parse()?,
            seconds: word()?.parse()?,
            requests: after.zip(before).map(|(after, before)| after - before),
        });
        Ok(())
    }

    fn median(&mut self) -> &Reading {
        self.readings
            .sort_by(|a, b| a.seconds.total_cmp(&b.seconds));
        &self.readings[self.readings.len() / 2]
    }
}

fn print_table(ways: &mut [Way<'_>]) {
    println!(
        "{} MiB in reads of 1 MiB, the median of {ROUNDS}:",
        SIZE >> 20
    );
    println!();
    println!(
        "{:<12} {:>7} {:>14} {:>9}",
        "way", "MiB/s", "READ requests", "crc32"
    );
    for way in ways {
        let name = way.name;
        let median = way.median();
        let mib = median.bytes as f64 / f64::from(1 << 20);
        let requests = median.requests.map_or("-".to_owned(), |n| n.to_string());
        let (speed, checksum) = (mib / median.seconds, median.checksum);
        println!("{name:<12} {speed:>7.0} {requests:>14} {checksum:>9.8x}");
    }
}

/// Runs this program once more as a client, and returns what it printed.
fn client(part: &str, path: &Path) -> Result<String> {
    let mut child = Command::new(std::env::current_exe()?)
        .arg(part)
        .arg(path)
        .stdout(Stdio::piped())
        .spawn()?;
    let mut status = None;
    let mut error = None;
    let ended = within(CLIENT_PATIENCE, || {
        match child.try_wait() {
            Ok(exited) => status = exited,
            Err(e) => error = Some(e),
        }
        status.is_some() || error.is_some() || INTERRUPTED.load(Ordering::Relaxed)
    });
    if let Some(error) = error {
        return Err(error.into());
    }
    let interrupted = INTERRUPTED.load(Ordering::Relaxed);
    match status {
        Some(status) if status.success() => {}
        Some(status) if !interrupted => return Err(format!("the client failed: {status}").into()),
        _ => {
            // Not waited for: a client that hangs in a request ends with its connection.
            let _ = child.kill();
            let why = if ended {
                "interrupted"
            } else {
                "the client hangs"
            };
            return Err(why.into());
        }
    }
    let mut printed = String::new();
    if let Some(mut stdout) = child.stdout.take() {
        stdout.read_to_string(&mut printed)?;
    }
    Ok(printed)
}

/// Waits until it is done, but not forever.
fn within(patience: Duration, mut done: impl FnMut() -> bool) -> bool {
    let deadline = Instant::now() + patience;
    loop {
        if done() {
            return true;
        }
        if Instant::now() > deadline {
            return false;
        }
        sleep(Duration::from_millis(5));
    }
}

/// A filesystem of its own, so that nothing but the demonstration keeps it from being unmounted.
struct Tmpfs {
    at: PathBuf,
    mounted: bool,
}

impl Tmpfs {
    fn mount(at: PathBuf) -> Result<Self> {
        fs::create_dir(&at)?;
        let flags = MountFlags::NODEV | MountFlags::NOSUID;
        rustix::mount::mount("mirror", &at, "tmpfs", flags, c"mode=700,size=300m")?;
        Ok(Self { at, mounted: true })
    }

    fn unmount(&mut self) -> rustix::io::Result<()> {
        rustix::mount::unmount(&self.at, UnmountFlags::empty())?;
        self.mounted = false;
        Ok(())
    }
}

impl Drop for Tmpfs {
    fn drop(&mut self) {
        if self.mounted {
            // What fails here is undone with the namespace.
            let _ = rustix::mount::unmount(&self.at, UnmountFlags::DETACH);
        }
    }
}

fn make_tree(root: &Path) -> Result<()> {
    fs::write(root.join("readme"), "a tree to be mirrored\n")?;
    fs::create_dir_all(root.join("deeply/nested"))?;
    symlink("deeply/nested/data", root.join(DATA))?;
    Ok(())
}

/// Content without a pattern that a page at the wrong place would fit into: xorshift64.
fn make_data(root: &Path) -> Result<()> {
    let mut data = BufWriter::with_capacity(CHUNK, File::create(root.join(DATA))?);
    let mut state = 0x9e37_79b9_7f4a_7c15_u64;
    for _ in 0..SIZE / 8 {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        data.write_all(&state.to_le_bytes())?;
    }
    data.flush()?;
    Ok(())
}

/// From here on, nothing that this process mounts is seen outside, or outlives it.
fn enter_private_mount_namespace() -> rustix::io::Result<()> {
    unshare_mounts()?;
    let private = MountPropagationFlags::PRIVATE | MountPropagationFlags::REC;
    rustix::mount::mount_change("/", private)
}

#[allow(
    unsafe_code,
    reason = "unshare(2) can also take fds from other threads"
)]
fn unshare_mounts() -> rustix::io::Result<()> {
    // SAFETY: the flags have no CLONE_FILES, so that the fds stay those of the whole process; no
    // memory is concerned.
    unsafe { unshare_unsafe(UnshareFlags::NEWNS) }
}
