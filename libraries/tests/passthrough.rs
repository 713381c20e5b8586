//! Each library passes through: a client in another process reads and writes files, and the server sees no READ
//! and no WRITE. Without a device to register files with, it sees both.

#[path = "../../tests/support/mode.rs"]
mod mode;
#[allow(dead_code)]
#[path = "../../tests/support/sandbox.rs"]
mod sandbox;

use std::env;
use std::fs;
use std::io;
use std::path::Path;
use std::process::{Command, ExitCode, Stdio};
use std::sync::atomic::Ordering::SeqCst;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use libraries::files::Files;
use libraries::{
    Server, fractal_fuse, fuse_backend_rs, fuse3, fuser_0_16, fuser_0_17, fuser_0_18, polyfuse,
    raw, rfuse3,
};
use libtest_mimic::{Arguments, Failed};
use rustix::mount::{UnmountFlags, unmount};

use mode::Mode;
use sandbox::Sandbox;

type Serve = fn(Arc<Files>, &Path) -> io::Result<Server>;

/// With how many MKNOD requests the library creates a file.
const LIBRARIES: &[(&str, Serve, u64)] = &[
    ("raw", raw::serve, 0),
    ("fuser_0_18", fuser_0_18::serve, 0),
    ("fuser_0_18_from_fd", fuser_0_18::serve_from_fd, 0),
    ("fuser_0_17", fuser_0_17::serve, 0),
    ("fuser_0_16", fuser_0_16::serve, 0),
    ("fractal_fuse", fractal_fuse::serve, 1),
    ("polyfuse", polyfuse::serve, 0),
    ("fuse3", fuse3::serve, 0),
    ("rfuse3", rfuse3::serve, 0),
    ("fuse_backend_rs", fuse_backend_rs::serve, 0),
];

/// fractal-fuse gets its requests by io_uring. The parameter is there from Linux 6.14 on, and off by default.
const ENABLE_URING: &str = "/sys/module/fuse/parameters/enable_uring";

fn main() -> ExitCode {
    prepend_to_path(Path::new(env!("CARGO_BIN_EXE_fusermount3")));
    let arguments = Arguments::from_args();
    let (mode, mut ready) = (Mode::from_env(), Ok(()));
    if mode != Mode::Off && !arguments.list {
        ready = sandbox::enter();
    }
    let mut trials = Vec::new();
    for (name, serve, mknods) in LIBRARIES {
        let uring = *name == "fractal_fuse";
        for pass_through in [true, false] {
            let name = format!("{name}{}", if pass_through { "" } else { "::control" });
            let test = {
                let name = name.clone();
                move || {
                    let _uring = uring.then(Uring::enable).transpose()?;
                    passes_through(&name, *serve, *mknods, pass_through)
                }
            };
            trials.push(mode.trial(&name, &ready, test));
        }
    }
    let conclusion = libtest_mimic::run(&arguments, trials);
    sandbox::leave();
    conclusion.exit_code()
}

fn passes_through(name: &str, serve: Serve, mknods: u64, pass_through: bool) -> Result<(), Failed> {
    let sandbox = Sandbox::new(name)?;
    let source = sandbox.tmpfs()?;
    let mountpoint = sandbox.folder("mnt")?;
    let content: Vec<u8> = (0..300_000_u32).flat_map(u32::to_le_bytes).collect();
    fs::write(source.path().join("file"), &content)?;

    let files = Files::new(source.path(), pass_through);
    let server = serve(Arc::clone(&files), &mountpoint)?;
    let mounted = Mounted(&mountpoint);
    assert_eq!(client("cat \"$0\"", &mountpoint.join("file"))?, content);
    let new = client("cat >\"$0\" <<<hello; cat \"$0\"", &mountpoint.join("new"))?;
    assert_eq!(new, b"hello\n");
    assert_eq!(fs::read(source.path().join("new"))?, b"hello\n");

    let requests = [&files.reads, &files.writes].map(|count| count.load(SeqCst));
    if pass_through {
        assert_eq!(requests, [0, 0]);
    } else {
        assert!(requests[0] > 0 && requests[1] > 0, "{requests:?}");
    }
    assert_eq!(files.mknods.load(SeqCst), mknods);
    let stats = files.handles.table().stats();
    assert_eq!(stats.served.is_empty(), pass_through, "{stats:?}");

    // RELEASE follows close(2) after a moment.
    wait_until("an id stays registered", || {
        files.handles.table().stats().ids == 0
    })?;

    drop(mounted);
    wait_until("the server goes on after the unmount", || {
        server.is_finished()
    })?;
    server.join().map_err(|_| "the server has panicked")??;
    drop(files);
    source.unmount_when_idle()
}

fn client(script: &str, path: &Path) -> io::Result<Vec<u8>> {
    let mut command = Command::new("timeout");
    command
        .args(["-s", "KILL", "20", "bash", "-c", script])
        .arg(path);
    let output = command.stderr(Stdio::inherit()).output()?;
    if !output.status.success() {
        return Err(io::Error::other(format!("{script}: {}", output.status)));
    }
    Ok(output.stdout)
}

fn wait_until(otherwise: &str, done: impl Fn() -> bool) -> Result<(), Failed> {
    let deadline = Instant::now() + Duration::from_secs(20);
    while !done() {
        if Instant::now() > deadline {
            return Err(otherwise.into());
        }
        thread::sleep(Duration::from_millis(5));
    }
    Ok(())
}

struct Mounted<'a>(&'a Path);

impl Drop for Mounted<'_> {
    fn drop(&mut self) {
        let _ = unmount(self.0, UnmountFlags::DETACH);
    }
}

/// The parameter is set. One test at a time may change it.
struct Uring {
    before: String,
    _alone: MutexGuard<'static, ()>,
}

impl Uring {
    fn enable() -> io::Result<Self> {
        static ALONE: Mutex<()> = Mutex::new(());
        let alone = ALONE.lock().unwrap_or_else(PoisonError::into_inner);
        let before = fs::read_to_string(ENABLE_URING)?;
        fs::write(ENABLE_URING, "Y")?;
        Ok(Self {
            before,
            _alone: alone,
        })
    }
}

impl Drop for Uring {
    fn drop(&mut self) {
        let _ = fs::write(ENABLE_URING, self.before.trim());
    }
}

fn prepend_to_path(program: &Path) {
    let path = env::var_os("PATH").unwrap_or_default();
    let folders = program.parent().map(Path::to_owned).into_iter();
    let path = env::join_paths(folders.chain(env::split_paths(&path))).expect("no colon");
    // SAFETY: There is no other thread yet.
    #[allow(unsafe_code)]
    unsafe {
        env::set_var("PATH", path);
    }
}
