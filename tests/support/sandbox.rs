//! Where every test that mounts runs: a private mount namespace, a scratch tmpfs, fusectl, and a watchdog.

use std::collections::HashMap;
use std::env;
use std::fs::{self, File};
use std::io::Write;
use std::mem;
use std::path::{Path, PathBuf};
use std::process;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, OnceLock, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use libtest_mimic::Failed;
use rustix::mount::{
    MountFlags, MountPropagationFlags, UnmountFlags, mount, mount_change, unmount,
};
use rustix::process::geteuid;
use rustix::thread::{UnshareFlags, unshare_unsafe};

/// After this time the watchdog aborts the test's connections, which fails the calls that hang on them. Slow machines
/// multiply it by `FUSE_BACKING_PATIENCE`.
const PATIENCE: Duration = Duration::from_secs(60);
/// If the test still hangs this long after `PATIENCE`, the process ends.
const GRACE: Duration = Duration::from_secs(20);

static ROOT: OnceLock<PathBuf> = OnceLock::new();
static HUNG: AtomicBool = AtomicBool::new(false);
static TESTS: Mutex<Option<HashMap<u64, Watched>>> = Mutex::new(None);

struct Watched {
    name: String,
    since: Instant,
    patience: Duration,
    /// Whether the watchdog has reported the hang.
    reported: bool,
    folder: PathBuf,
    /// fusectl's `abort` files of connections that may not be mounted when the test hangs.
    connections: Vec<Arc<File>>,
}

impl Watched {
    /// fusectl's `abort` file of each connection of the test.
    fn aborts(&mut self) -> Vec<Arc<File>> {
        // A number names the same connection as long as that is mounted.
        let mounted = mounted_connections(&self.folder).into_iter();
        let paths = mounted.map(|number| fusectl().join(number.to_string()).join("abort"));
        let open = |path| File::options().write(true).open(path).ok();
        let mut aborts = mem::take(&mut self.connections);
        aborts.extend(paths.filter_map(open).map(Arc::new));
        aborts
    }
}

/// The numbers of the FUSE connections that are mounted in a folder.
pub fn mounted_connections(folder: &Path) -> Vec<u32> {
    let mountinfo = fs::read_to_string("/proc/self/mountinfo").unwrap_or_default();
    let connection = |line: &str| {
        let (mount, filesystem) = line.split_once(" - ")?;
        let mut mount = mount.split(' ').skip(2);
        let (device, path) = (mount.next()?, mount.nth(1)?);
        let kind = filesystem.split([' ', '.']).next();
        let is_one = kind == Some("fuse") && Path::new(path).starts_with(folder);
        is_one.then(|| device.split_once(':')?.1.parse().ok())?
    };
    mountinfo.lines().filter_map(connection).collect()
}

fn fusectl() -> PathBuf {
    ROOT.get().expect("entered").join("fusectl")
}

/// Enters a private mount namespace, so that no mount of a test is left behind. Must be called before any thread is
/// started: unshare(2) moves the calling thread only.
pub fn enter() -> Result<(), String> {
    if !geteuid().is_root() {
        return Err("not root: mount(2) and CAP_SYS_ADMIN are needed".into());
    }
    fuse_backing::FuseDevice::open().map_err(|e| e.to_string())?;
    let failed = |what: &str, errno| format!("{what}: {errno}");
    unshare_mounts().map_err(|e| failed("unshare(CLONE_NEWNS)", e))?;
    let private = MountPropagationFlags::PRIVATE | MountPropagationFlags::REC;
    mount_change("/", private).map_err(|e| failed("mount --make-rprivate /", e))?;

    let root = tempfile::Builder::new()
        .prefix("fuse-backing-test-")
        .tempdir()
        .map_err(|e| format!("a scratch folder: {e}"))?
        .keep();
    // The watchdog looks for the path that mountinfo has.
    let root = root.canonicalize().map_err(|e| e.to_string())?;
    if root.to_string_lossy().contains(char::is_whitespace) {
        return Err(format!(
            "TMPDIR has a space in its path: {}",
            root.display()
        ));
    }
    mount("tmpfs", &root, "tmpfs", MountFlags::empty(), None).map_err(|e| failed("tmpfs", e))?;
    let fusectl = root.join("fusectl");
    fs::create_dir(&fusectl).map_err(|e| e.to_string())?;
    mount("fusectl", &fusectl, "fusectl", MountFlags::empty(), None)
        .map_err(|e| failed("fusectl", e))?;
    // Temporary files are made on this tmpfs: /tmp may be on a stacked filesystem.
    tempfile::env::override_temp_dir(&root).map_err(|_| "there is an override already")?;
    ROOT.set(root).map_err(|_| "entered twice")?;
    thread::spawn(watchdog);
    Ok(())
}

/// Removes the scratch folder; the mounts end with the namespace.
pub fn leave() {
    if let Some(root) = ROOT.get() {
        let _ = unmount(root, UnmountFlags::DETACH);
        let _ = fs::remove_dir(root);
    }
}

/// Whether the watchdog aborted a connection. The run fails then: a test may have passed because of the error that the
/// abort caused.
pub fn hung() -> bool {
    HUNG.load(Ordering::Relaxed)
}

#[allow(unsafe_code)]
fn unshare_mounts() -> rustix::io::Result<()> {
    // SAFETY: what makes `unshare` unsafe is a change of the table of file descriptors; CLONE_NEWNS does not touch it.
    unsafe { unshare_unsafe(UnshareFlags::NEWNS) }
}

/// How many times longer things may take on this machine: 1, or `FUSE_BACKING_PATIENCE`, set for emulated machines.
pub fn patience_times() -> u32 {
    let times = env::var("FUSE_BACKING_PATIENCE").ok();
    times.map_or(1, |times| times.parse().expect("a number"))
}

fn watchdog() {
    let times = patience_times();
    loop {
        thread::sleep(Duration::from_millis(200));
        let mut tests = TESTS.lock().unwrap_or_else(PoisonError::into_inner);
        for test in tests.iter_mut().flat_map(HashMap::values_mut) {
            let age = test.since.elapsed();
            if age > test.patience * times {
                let aborts = test.aborts();
                if !test.reported {
                    test.reported = true;
                    let (name, count) = (&test.name, aborts.len());
                    eprintln!("watchdog: {name} has run for {age:.0?}\n{}", threads());
                    eprintln!("watchdog: {name} hangs, aborting its connections: {count}");
                }
                for abort in aborts {
                    HUNG.store(true, Ordering::Relaxed);
                    let _ = abort.as_ref().write_all(b"1");
                }
            }
            if age > test.patience * times + GRACE {
                eprintln!(
                    "watchdog: {} still hangs, giving up\n{}",
                    test.name,
                    threads()
                );
                process::exit(124);
            }
        }
    }
}

/// What each thread of this process and of its children is doing: the fields of `stat`, with its state, ticks and
/// parent, its system call, and its kernel stack.
fn threads() -> String {
    let me = process::id().to_string();
    let numbers = |folder: &str| -> Vec<String> {
        let entries = fs::read_dir(folder).into_iter().flatten().flatten();
        let names = entries.map(|entry| entry.file_name().to_string_lossy().into_owned());
        names.filter(|name| name.parse::<u32>().is_ok()).collect()
    };
    let read = |path: String| fs::read_to_string(path).unwrap_or_default();
    let mut report = String::new();
    for pid in numbers("/proc") {
        let stat = read(format!("/proc/{pid}/stat"));
        // The state and the parent follow the command's name, which may contain any character.
        let after_name = stat.rsplit(')').next().unwrap_or_default();
        if pid != me && after_name.split_whitespace().nth(1) != Some(&me) {
            continue;
        }
        let tasks = format!("/proc/{pid}/task");
        for thread in numbers(&tasks) {
            let of = |file| read(format!("{tasks}/{thread}/{file}"));
            let (stat, call, stack) = (of("stat"), of("syscall"), of("stack"));
            report += &format!(
                "watchdog: {}\n  system call {}\n{stack}",
                stat.trim(),
                call.trim()
            );
        }
    }
    report
}

/// A folder for one test, which the watchdog watches until the last clone is dropped.
#[derive(Clone)]
pub struct Sandbox(Arc<Inner>);

struct Inner {
    key: u64,
    folder: PathBuf,
    folders: AtomicU64,
}

impl Sandbox {
    pub fn new(test: &str) -> Result<Self, Failed> {
        Self::patient(test, PATIENCE)
    }

    /// As `new`, for a test that may take longer.
    pub fn patient(test: &str, patience: Duration) -> Result<Self, Failed> {
        static KEYS: AtomicU64 = AtomicU64::new(0);
        let key = KEYS.fetch_add(1, Ordering::Relaxed);
        let root = ROOT.get().ok_or("the sandbox was not entered")?;
        let folder = root.join(key.to_string());
        fs::create_dir(&folder)?;
        let watched = Watched {
            name: test.to_owned(),
            since: Instant::now(),
            patience,
            reported: false,
            folder: folder.clone(),
            connections: Vec::new(),
        };
        let mut tests = TESTS.lock().unwrap_or_else(PoisonError::into_inner);
        tests.get_or_insert_default().insert(key, watched);
        Ok(Self(Arc::new(Inner {
            key,
            folder,
            folders: AtomicU64::new(0),
        })))
    }

    /// A new, empty folder.
    pub fn folder(&self, name: &str) -> Result<PathBuf, Failed> {
        let n = self.0.folders.fetch_add(1, Ordering::Relaxed);
        let folder = self.0.folder.join(format!("{n}-{name}"));
        fs::create_dir(&folder)?;
        Ok(folder)
    }

    /// Mounts a new tmpfs. Unmounting it shows whether anything pins a file on it.
    pub fn tmpfs(&self) -> Result<Tmpfs, Failed> {
        let folder = self.folder("tmpfs")?;
        mount("tmpfs", &folder, "tmpfs", MountFlags::empty(), None)?;
        Ok(Tmpfs(folder))
    }

    /// Opens fusectl's `abort` file of a connection. If the test hangs, the watchdog writes to it, even if the
    /// connection is no longer mounted.
    pub fn watch(&self, connection: u32) -> Result<Arc<File>, Failed> {
        let path = fusectl().join(connection.to_string()).join("abort");
        let abort = Arc::new(File::options().write(true).open(path)?);
        self.also_watch(Arc::clone(&abort));
        Ok(abort)
    }

    /// As `watch`, for an `abort` file that is open already.
    pub fn also_watch(&self, abort: Arc<File>) {
        let mut tests = TESTS.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(test) = tests.as_mut().and_then(|tests| tests.get_mut(&self.0.key)) {
            test.connections.push(abort);
        }
    }
}

impl Drop for Inner {
    fn drop(&mut self) {
        let mut tests = TESTS.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(tests) = tests.as_mut() {
            tests.remove(&self.key);
        }
    }
}

/// A tmpfs that shows leaks: it cannot be unmounted while any of its files is open or registered.
pub struct Tmpfs(PathBuf);

impl Tmpfs {
    pub fn path(&self) -> &Path {
        &self.0
    }

    /// Makes a file with this content, and opens it for reading and writing.
    pub fn file(&self, name: &str, content: &str) -> Result<File, Failed> {
        let path = self.0.join(name);
        fs::write(&path, content)?;
        Ok(File::options().read(true).write(true).open(path)?)
    }

    pub fn unmount(&self) -> rustix::io::Result<()> {
        unmount(&self.0, UnmountFlags::NOFOLLOW)
    }

    pub fn unmount_when_idle(&self) -> Result<(), Failed> {
        unmount_when_idle(&self.0)
    }
}

/// Retries for 10 seconds: between fork and exec, a child of another test has all fds of this process, and the kernel
/// drops a file's last reference a moment after close(2).
pub fn unmount_when_idle(path: &Path) -> Result<(), Failed> {
    let deadline = Instant::now() + Duration::from_secs(10);
    loop {
        match unmount(path, UnmountFlags::NOFOLLOW) {
            Ok(()) => return Ok(()),
            Err(errno) if Instant::now() > deadline => {
                return Err(format!("something pins a file: umount says {errno}").into());
            }
            Err(_) => thread::sleep(Duration::from_millis(5)),
        }
    }
}

impl Drop for Tmpfs {
    fn drop(&mut self) {
        let _ = unmount(&self.0, UnmountFlags::DETACH);
    }
}
