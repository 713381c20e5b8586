//! The demonstration: reads one file in three ways, and checks that no backing id is left open.

use std::fs::{self, File};
use std::io::{BufWriter, Read, Write};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::atomic::Ordering;
use std::thread::sleep;
use std::time::{Duration, Instant};

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
/// Limit for steps that are immediate unless something is broken.
const PATIENCE: Duration = Duration::from_secs(5);

const DATA: &str = "data";

pub(crate) fn run() -> Result<()> {
    if !rustix::process::geteuid().is_root() {
        return Err("the demonstration mounts filesystems: run it as root".into());
    }
    enter_private_mount_namespace()
        .map_err(|e| format!("cannot create a private mount namespace: {e}"))?;
    crate::prepare_process()?;
    // Ctrl-C ends the clients; the demonstration then fails and cleans up.
    ctrlc::set_handler(|| {})?;

    // Dropped in reverse: the mirrors, the source, the directory.
    let scratch = tempfile::Builder::new().prefix("mirror-").tempdir()?;
    let source = Tmpfs::mount(scratch.path().join("source"))?;
    let mut plain = Running::start(&source.at, scratch.path().join("plain"), false)?;
    let mut passthrough = Running::start(&source.at, scratch.path().join("passthrough"), true)?;
    if let Some(why) = passthrough.mirror.status().refused() {
        return Err(format!("passthrough is unavailable: {why}").into());
    }
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
    let expected = ways[0].readings[0].checksum;
    let equal = ways
        .iter()
        .flat_map(|way| &way.readings)
        .all(|reading| reading.bytes == SIZE && reading.checksum == expected);
    let reads = passthrough.reads();
    let left = ids_left_open(&source, &mut plain, &mut passthrough)?;
    println!();
    println!("READ requests with passthrough: {reads}");
    println!("checksums equal: {}", if equal { "yes" } else { "no" });
    println!("ids left open: {left}");

    if reads == 0 && equal && left == 0 {
        Ok(())
    } else {
        Err("expected 0 READ requests, equal checksums, and 0 ids left open".into())
    }
}

/// The client: reads a file from start to end, and prints its size, its checksum, and the seconds
/// spent in read(2). It is a separate process, because a process with files open on a mount that it
/// serves itself can wait for itself forever.
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

/// How many ids the passthrough mirror did not close. Unmounts everything to find out.
///
/// The mirror's own count is checked against the kernel. An id pins the mount of its file until the id
/// is closed or its connection is gone. So if the source can be unmounted *while the connection
/// exists*, no id is left. A device fd keeps the connection alive. The mirrors are stopped first,
/// because their fds pin the source too.
fn ids_left_open(source: &Tmpfs, plain: &mut Running, passthrough: &mut Running) -> Result<usize> {
    // The kernel sends RELEASE some time after close(2).
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

/// A mounted mirror, with a device fd of its connection.
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

    fn reads(&self) -> u64 {
        self.mirror.status().reads.load(Ordering::Relaxed)
    }

    /// Unmounts the mirror, and waits until the filesystem and its fds are gone.
    fn stop(&mut self) -> Result<()> {
        let at = self.at.display();
        if self.mirror.unmount()? {
            return Err(format!("{at} is still in use").into());
        }
        match self.mirror.wait(PATIENCE) {
            Some(Event::Ended(result)) => Ok(result?),
            _ => Err(format!("the server of {at} did not end").into()),
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
        let printed = client(&self.path)?;
        let after = self.mirror.map(Running::reads);

        let mut words = printed.split_whitespace();
        let mut word = || words.next().ok_or("the output of the client is incomplete");
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
    println!("{} MiB in reads of 1 MiB, median of {ROUNDS}:", SIZE >> 20);
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
fn client(path: &Path) -> Result<String> {
    let mut command = Command::new(std::env::current_exe()?);
    let client = command.arg("--read").arg(path).stdout(Stdio::piped());
    let output = client.spawn()?.wait_with_output()?;
    if !output.status.success() {
        return Err(format!("the client failed: {}", output.status).into());
    }
    Ok(String::from_utf8(output.stdout)?)
}

/// Waits until `done` returns true, for at most `patience`.
fn within(patience: Duration, mut done: impl FnMut() -> bool) {
    let deadline = Instant::now() + patience;
    while !done() && Instant::now() < deadline {
        sleep(Duration::from_millis(5));
    }
}

/// The source: a separate filesystem, so that nothing but the demonstration can keep it busy.
struct Tmpfs {
    at: PathBuf,
}

impl Tmpfs {
    fn mount(at: PathBuf) -> Result<Self> {
        fs::create_dir(&at)?;
        let flags = MountFlags::NODEV | MountFlags::NOSUID;
        rustix::mount::mount("mirror", &at, "tmpfs", flags, c"mode=700,size=300m")?;
        Ok(Self { at })
    }

    fn unmount(&self) -> rustix::io::Result<()> {
        rustix::mount::unmount(&self.at, UnmountFlags::empty())
    }
}

impl Drop for Tmpfs {
    fn drop(&mut self) {
        let _ = rustix::mount::unmount(&self.at, UnmountFlags::DETACH);
    }
}

/// Writes random content (xorshift64), so that a misplaced page changes the checksum.
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

/// After this, mounts of this process are invisible outside it and do not outlive it.
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
    // SAFETY: the flags do not contain CLONE_FILES, so the whole process keeps sharing one set of fds.
    // The call accesses no memory.
    unsafe { unshare_unsafe(UnshareFlags::NEWNS) }
}
