//! A mirror in a process of its own, from its start to the proof that nothing is left of it.

use std::error::Error;
use std::fs::{self, File};
use std::io::Write;
use std::os::fd::OwnedFd;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::{Arc, OnceLock};
use std::thread;
use std::time::{Duration, Instant};

use fuse_backing::uapi;
use libtest_mimic::Failed;
use rustix::mount::{UnmountFlags, unmount};
use rustix::process::{
    Pid, PidfdFlags, PidfdGetfdFlags, Signal, kill_process, pidfd_getfd, pidfd_open,
};
use rustix::thread::{CapabilitiesSecureBits, set_capabilities_secure_bits};

use crate::backing::Backing;
use crate::client::{self, Role};
use crate::fuse::{Connection, Init, connection_number};
use crate::sandbox::Sandbox;
use crate::{program, seccomp};

/// How long to wait for something that takes milliseconds.
const PATIENCE: Duration = Duration::from_secs(20);

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Way {
    Passthrough,
    /// `--no-passthrough`
    Plain,
}

impl Way {
    /// Whether data passes through on this kernel.
    pub fn is_passthrough(self) -> Result<bool, Failed> {
        Ok(self == Self::Passthrough && kernel_has_passthrough()?)
    }
}

pub const ROLES: &[(&str, Role)] = &[("with-all-rights", with_all_rights)];

/// Executes the program in the arguments, for [`Mirror::start_with_all_rights`].
fn with_all_rights(args: &[String]) -> Result<String, Box<dyn Error>> {
    seccomp::pretend(libc::SYS_capset)?;
    set_capabilities_secure_bits(CapabilitiesSecureBits::NO_SETUID_FIXUP)?;
    Err(Command::new(&args[0]).args(&args[1..]).exec().into())
}

/// A running server. It is killed when dropped, unless it has ended.
pub struct Mirror {
    child: Child,
    mountpoint: PathBuf,
    source: PathBuf,
    way: Way,
    /// The file that its stderr goes to.
    log: PathBuf,
    /// fusectl's `abort` of its connection.
    abort: Arc<File>,
}

impl Mirror {
    pub fn start(sandbox: &Sandbox, source: &Path, way: Way) -> Result<Self, Failed> {
        Self::spawn(&program::example("mirror")?, sandbox, source, way)
    }

    /// `--no-killpriv`
    pub fn start_asking(sandbox: &Sandbox, source: &Path) -> Result<Self, Failed> {
        Self::start_with(sandbox, source, Way::Passthrough, &["--no-killpriv"])
    }

    pub fn start_with(
        sandbox: &Sandbox,
        source: &Path,
        way: Way,
        args: &[&str],
    ) -> Result<Self, Failed> {
        let mut command = Command::new(program::example("mirror")?);
        command.args(args);
        Self::spawn_by(command, sandbox, source, way)
    }

    /// Starts a mirror that keeps all of root's capabilities, though it tries to give some of them up: capset(2)
    /// succeeds and changes nothing, and setting another fsuid removes none.
    pub fn start_with_all_rights(
        sandbox: &Sandbox,
        source: &Path,
        way: Way,
    ) -> Result<Self, Failed> {
        let mut command = client::command(ROLES[0].0)?;
        command.arg(program::example("mirror")?);
        Self::spawn_by(command, sandbox, source, way)
    }

    /// Starts any server that takes the mirror's arguments.
    pub fn spawn(
        program: &Path,
        sandbox: &Sandbox,
        source: &Path,
        way: Way,
    ) -> Result<Self, Failed> {
        Self::spawn_by(Command::new(program), sandbox, source, way)
    }

    /// Starts it with a command that lacks only the mirror's arguments, and that becomes the mirror by exec.
    pub fn spawn_by(
        command: Command,
        sandbox: &Sandbox,
        source: &Path,
        way: Way,
    ) -> Result<Self, Failed> {
        Self::spawn_at(&sandbox.folder("mnt")?, command, sandbox, source, way)
    }

    /// The same, at the caller's mountpoint.
    pub fn spawn_at(
        mountpoint: &Path,
        mut command: Command,
        sandbox: &Sandbox,
        source: &Path,
        way: Way,
    ) -> Result<Self, Failed> {
        let log = sandbox.folder("log")?.join("stderr");
        if way == Way::Plain {
            command.arg("--no-passthrough");
        }
        let mut child = command
            .args([source, mountpoint])
            .stdin(Stdio::null())
            .stderr(File::create(&log)?)
            .spawn()?;
        match wait_until_mounted(sandbox, &mut child, mountpoint) {
            Ok(abort) => Ok(Self {
                child,
                mountpoint: mountpoint.to_owned(),
                source: source.to_owned(),
                way,
                log,
                abort,
            }),
            Err(why) => {
                let _ = child.kill();
                let _ = child.wait();
                let _ = unmount(mountpoint, UnmountFlags::DETACH);
                let said = fs::read_to_string(&log).unwrap_or_default();
                let why = why.message().unwrap_or_default();
                Err(format!("{why}; the mirror says: {said}").into())
            }
        }
    }

    pub fn path(&self) -> &Path {
        &self.mountpoint
    }

    /// Has the watchdog abort the connection if the test of another sandbox hangs.
    pub fn watched_by(&self, sandbox: &Sandbox) {
        sandbox.also_watch(Arc::clone(&self.abort));
    }

    pub fn signal(&self, signal: Signal) -> Result<(), Failed> {
        Ok(kill_process(self.pid()?, signal)?)
    }

    /// Stops it with SIGSTOP, and waits until none of its threads runs.
    pub fn freeze(&self) -> Result<(), Failed> {
        self.signal(Signal::STOP)?;
        let tasks = format!("/proc/{}/task", self.child.id());
        within(PATIENCE, "all threads have stopped", || {
            for task in fs::read_dir(&tasks)? {
                let stat = fs::read_to_string(task?.path().join("stat"))?;
                // The state follows the name, which is in parentheses.
                let state = stat.rsplit(") ").next().unwrap_or_default();
                if !state.starts_with('T') {
                    return Ok(false);
                }
            }
            Ok(true)
        })
    }

    /// A duplicate of its device fd. It keeps the connection, and all that is registered there, when the
    /// mirror itself is gone.
    pub fn device(&self) -> Result<OwnedFd, Failed> {
        for fd in fs::read_dir(format!("/proc/{}/fd", self.child.id()))? {
            let fd = fd?;
            let number = fd.file_name().to_str().ok_or("not a number")?.parse()?;
            if fs::read_link(fd.path()).is_ok_and(|path| path == Path::new("/dev/fuse")) {
                let process = pidfd_open(self.pid()?, PidfdFlags::empty())?;
                return Ok(pidfd_getfd(process, number, PidfdGetfdFlags::empty())?);
            }
        }
        Err("the mirror has no device".into())
    }

    /// The number of source files that it has open for clients. `O_PATH` fds do not count: it has one of
    /// every file that the kernel remembers.
    pub fn open_files(&self) -> Result<usize, Failed> {
        let process = format!("/proc/{}", self.child.id());
        let mut count = 0;
        for fd in fs::read_dir(format!("{process}/fd"))? {
            let fd = fd?;
            // The fd may be closed by now.
            let Ok(file) = fs::read_link(fd.path()) else {
                continue;
            };
            let info = Path::new(&process).join("fdinfo").join(fd.file_name());
            let Ok(info) = fs::read_to_string(info) else {
                continue;
            };
            let flags = info.lines().find_map(|line| line.strip_prefix("flags:"));
            let flags = i32::from_str_radix(flags.ok_or("no flags")?.trim(), 8)?;
            if file.starts_with(&self.source) && flags & libc::O_PATH == 0 {
                count += 1;
            }
        }
        Ok(count)
    }

    /// The number of its fds.
    pub fn fds(&self) -> Result<usize, Failed> {
        Ok(fs::read_dir(format!("/proc/{}/fd", self.child.id()))?.count())
    }

    /// Waits until no file is open for clients: the kernel sends RELEASE after close(2) has returned.
    pub fn wait_for_releases(&self) -> Result<(), Failed> {
        self.wait_for_open_files(0)
    }

    /// The same, for a server that keeps `count` files open for itself. Wait before an unmount: if the mount goes away
    /// while a request is being read, read(2) of the device fails with ECONNABORTED, and fuser ends with that.
    pub fn wait_for_open_files(&self, count: usize) -> Result<(), Failed> {
        within(PATIENCE, "every file has been released", || {
            Ok(self.open_files()? == count)
        })
    }

    /// The number of bytes that it has read and written so far, including requests and replies.
    pub fn moved(&self) -> Result<u64, Failed> {
        Ok(self.io("rchar")? + self.io("wchar")?)
    }

    /// The number of its read calls so far, from all files. It makes one for each request.
    pub fn reads(&self) -> Result<u64, Failed> {
        self.io("syscr")
    }

    /// One of the counts in `/proc/PID/io`.
    fn io(&self, name: &str) -> Result<u64, Failed> {
        let io = fs::read_to_string(format!("/proc/{}/io", self.child.id()))?;
        let count = io
            .lines()
            .find_map(|line| line.strip_prefix(name)?.strip_prefix(": "));
        Ok(count.ok_or("no such count")?.parse()?)
    }

    /// Ends it with SIGTERM, and checks that it succeeds, unmounts, and leaves no backing file registered.
    pub fn stop(self, backing: &Backing) -> Result<(), Failed> {
        self.stop_with(|| backing.unmount_when_idle())
    }

    /// The same, with the caller's check: `unmounted` must succeed only if nothing pins the source.
    pub fn stop_with(self, unmounted: impl FnOnce() -> Result<(), Failed>) -> Result<(), Failed> {
        let serves_without = self.way == Way::Passthrough && !kernel_has_passthrough()?;
        self.stop_saying(serves_without, unmounted)
    }

    /// The same. `serves_without` is whether the mirror must report that it serves without passthrough.
    pub fn stop_saying(
        mut self,
        serves_without: bool,
        unmounted: impl FnOnce() -> Result<(), Failed>,
    ) -> Result<(), Failed> {
        let device = self.device()?;
        self.signal(Signal::TERM)?;
        let status = self.wait()?;
        let said = fs::read_to_string(&self.log)?;
        assert!(status.success(), "the mirror ended with {status}: {said}");
        if serves_without {
            assert!(said.contains("serving without passthrough"), "{said}");
        } else {
            assert_eq!(said, "", "the mirror wrote to stderr");
        }
        assert!(
            connection_number(&self.mountpoint).is_err(),
            "the mirror did not unmount"
        );
        // `device` keeps the connection. So this succeeds only if the mirror has closed every backing id
        // itself.
        unmounted()?;
        drop(device);
        Ok(())
    }

    /// Waits for its end after it was unmounted, and returns what it wrote to stderr.
    pub fn wait_for_end(mut self) -> Result<String, Failed> {
        let status = self.wait()?;
        let said = fs::read_to_string(&self.log)?;
        assert!(status.success(), "it ended with {status}: {said}");
        Ok(said)
    }

    /// Kills it with SIGKILL, and waits for its end.
    pub fn kill(&mut self) -> Result<(), Failed> {
        self.child.kill()?;
        self.wait().map(drop)
    }

    pub fn abort(&self) -> Result<(), Failed> {
        Ok(self.abort.as_ref().write_all(b"1")?)
    }

    /// Removes the mount of a mirror that was killed.
    pub fn unmount(&self) -> Result<(), Failed> {
        Ok(unmount(&self.mountpoint, UnmountFlags::DETACH)?)
    }

    fn pid(&self) -> Result<Pid, Failed> {
        Ok(Pid::from_raw(self.child.id().try_into()?).ok_or("0 is no process")?)
    }

    fn wait(&mut self) -> Result<ExitStatus, Failed> {
        let mut status = None;
        within(PATIENCE, "the mirror has ended", || {
            status = self.child.try_wait()?;
            Ok(status.is_some())
        })?;
        Ok(status.ok_or("it has not")?)
    }
}

impl Drop for Mirror {
    fn drop(&mut self) {
        if matches!(self.child.try_wait(), Ok(None)) {
            // Abort first: after it, nothing that is done on the mount can hang.
            let _ = self.abort();
            let _ = self.child.kill();
            let _ = self.child.wait();
        }
        // This fails if it is unmounted already.
        let _ = unmount(&self.mountpoint, UnmountFlags::DETACH);
    }
}

/// Returns fusectl's `abort` of the connection.
fn wait_until_mounted(
    sandbox: &Sandbox,
    child: &mut Child,
    mountpoint: &Path,
) -> Result<Arc<File>, Failed> {
    let mut number = None;
    within(PATIENCE, "the mirror is mounted", || {
        if let Some(status) = child.try_wait()? {
            return Err(format!("the mirror ended with {status}").into());
        }
        number = connection_number(mountpoint).ok();
        Ok(number.is_some())
    })?;
    sandbox.watch(number.ok_or("it is not mounted")?)
}

/// Waits until `done` returns true, and fails if that takes longer than `patience`.
pub fn within(
    patience: Duration,
    what: &str,
    mut done: impl FnMut() -> Result<bool, Failed>,
) -> Result<(), Failed> {
    let deadline = Instant::now() + patience;
    while !done()? {
        if Instant::now() > deadline {
            return Err(format!("not within {patience:?}: {what}").into());
        }
        thread::sleep(Duration::from_millis(2));
    }
    Ok(())
}

fn kernel_has_passthrough() -> Result<bool, Failed> {
    static OFFERED: OnceLock<bool> = OnceLock::new();
    if let Some(offered) = OFFERED.get() {
        return Ok(*offered);
    }
    let sandbox = Sandbox::new("INIT")?;
    let offer = Connection::mount(&sandbox, Init::PLAIN)?.offer();
    let offered = offer.flags & uapi::FUSE_PASSTHROUGH != 0;
    Ok(*OFFERED.get_or_init(|| offered))
}
