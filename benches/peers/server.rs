//! The servers, which are separate processes: finds, starts and ends them.

use std::env;
use std::fs::{self, File};
use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::thread;
use std::time::{Duration, Instant};

use libtest_mimic::Failed;
use rustix::mount::{UnmountFlags, unmount};

use crate::fuse;
use crate::sandbox::Sandbox;

/// How long a server may take to mount.
const PATIENCE: Duration = Duration::from_secs(20);

pub struct Peer {
    pub name: &'static str,
    /// The suffix of the variable `FUSE_BACKING_PEER_*` that names the program.
    variable: &'static str,
    /// Arguments. `SRC` and `MNT` stand for the folders.
    pub args: &'static str,
    /// The ways to run it: arguments that precede `args`.
    pub ways: &'static [&'static str],
}

/// All of them let the kernel check permissions (`default_permissions`).
pub const PEERS: [Peer; 4] = [
    Peer {
        name: "mirror",
        variable: "MIRROR",
        args: "SRC MNT",
        ways: &["", "--ttl 1"],
    },
    Peer {
        name: "passthrough_hp",
        variable: "HP",
        args: "--foreground SRC MNT",
        ways: &["--nocache", ""],
    },
    Peer {
        name: "loopback",
        variable: "LOOPBACK",
        args: "-q -directmount -allow-other MNT SRC",
        ways: &[""],
    },
    Peer {
        name: "mergerfs",
        variable: "MERGERFS",
        // By default, mergerfs creates files only where 4 GiB are free. It raises its own priority, to nice -10.
        args: "-f -o minfreespace=0 SRC MNT",
        ways: &["", "-o passthrough.io=rw,cache.files=auto-full"],
    },
];

impl Peer {
    pub fn program(&self) -> Result<PathBuf, String> {
        let variable = format!("FUSE_BACKING_PEER_{}", self.variable);
        if let Some(program) = env::var_os(&variable) {
            let program = PathBuf::from(program);
            return fs::canonicalize(&program).map_err(|e| format!("{}: {e}", program.display()));
        }
        if self.name == "mirror" {
            return build_mirror();
        }
        let path = env::var_os("PATH").unwrap_or_default();
        env::split_paths(&path)
            .map(|folder| folder.join(self.name))
            .find(|program| program.is_file())
            .ok_or_else(|| format!("not in PATH, and {variable} is not set"))
    }

    pub fn version(&self, program: &Path) -> String {
        if self.name == "mirror" {
            return env!("CARGO_PKG_VERSION").to_owned();
        }
        let variable = format!("FUSE_BACKING_PEER_{}_VERSION", self.variable);
        env::var(&variable).unwrap_or_else(|_| {
            let out = Command::new(program).arg("--version").output().ok();
            let out = out.filter(|out| out.status.success());
            let text = out.and_then(|out| String::from_utf8(out.stdout).ok());
            let line = text.and_then(|text| Some(text.lines().next()?.to_owned()));
            line.unwrap_or_else(|| format!("unknown version, {variable} is not set"))
        })
    }
}

/// Builds the mirror of this checkout in the bench's profile, because `cargo bench --bench peers` builds no example.
fn build_mirror() -> Result<PathBuf, String> {
    let mut build = Command::new(env::var_os("CARGO").unwrap_or("cargo".into()));
    build.args(["build", "--quiet", "--example", "mirror"]);
    if !cfg!(debug_assertions) {
        build.arg("--release");
    }
    let built = build.status().map_err(|e| format!("cargo: {e}"))?;
    let bench = env::current_exe().map_err(|e| e.to_string())?;
    // The bench is in `deps`.
    let mirror = bench.ancestors().nth(2).map(|p| p.join("examples/mirror"));
    mirror
        .filter(|mirror| built.success() && mirror.is_file())
        .ok_or_else(|| format!("{build:?} failed"))
}

/// A running server. Dropping it unmounts and ends it.
pub struct Server {
    child: Child,
    pub mountpoint: PathBuf,
    abort: Option<Arc<File>>,
    stderr: PathBuf,
}

impl Server {
    /// Returns once INIT is answered. If the server ends before that, fails with its message.
    pub fn start(name: &str, program: &Path, args: &str, source: &Path) -> Result<Self, Failed> {
        let sandbox = Sandbox::new(name)?;
        let mountpoint = sandbox.folder("mount")?;
        let stderr = mountpoint.with_extension("stderr");
        let args = args.split_whitespace().map(|arg| match arg {
            "SRC" => source.as_os_str(),
            "MNT" => mountpoint.as_os_str(),
            _ => arg.as_ref(),
        });
        let child = Command::new(program)
            .args(args)
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(File::create(&stderr)?)
            .spawn()?;
        let mut server = Self {
            child,
            mountpoint,
            abort: None,
            stderr,
        };
        let deadline = Instant::now() + PATIENCE;
        while fuse::connection_number(&server.mountpoint).is_err() {
            if let Some(status) = server.child.try_wait()? {
                return Err(format!("{status}: {}", server.said()).into());
            }
            if Instant::now() > deadline {
                return Err(format!("not mounted within {} s", PATIENCE.as_secs()).into());
            }
            thread::sleep(Duration::from_millis(1));
        }
        server.abort = Some(fuse::watched(&sandbox, &server.mountpoint)?);
        // Waits for INIT.
        fs::metadata(&server.mountpoint)?;
        Ok(server)
    }

    pub fn id(&self) -> u32 {
        self.child.id()
    }

    /// The first line of what it wrote to stderr.
    pub fn said(&self) -> String {
        let text = fs::read_to_string(&self.stderr).unwrap_or_default();
        text.lines().next().unwrap_or_default().to_owned()
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        // Aborts first, so that nothing on the mount can hang afterwards.
        if let Some(abort) = &self.abort {
            let _ = abort.as_ref().write_all(b"1");
        }
        let _ = unmount(&self.mountpoint, UnmountFlags::DETACH);
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}
