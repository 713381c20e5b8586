//! Calls that wait for something in the source: for the holder of a lease to give it up, or for a filesystem that does
//! not answer. Clients of other files do not wait with them.

use std::error::Error;
use std::ffi::OsStr;
use std::fs::{self, File};
use std::os::fd::AsRawFd;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use libtest_mimic::Failed;
use macro_rules_attribute::apply;
use rustix::process::{Pid, Signal, kill_process};

use crate::ask::{Asked, ask_all};
use crate::backing::Backing;
use crate::client::{Client, Role, wait_for_parent};
use crate::identity::drop_caches;
use crate::program;
use crate::sandbox::{Sandbox, patience_times};
use crate::server::{Mirror, Way, within};

pub const ROLES: &[(&str, Role)] = &[("lease", lease), ("hold-files", hold_files)];

/// The longest time that a call takes if it does not wait.
const AT_ONCE: Duration = Duration::from_millis(200);

/// Takes a lease of each file in the arguments, and gives them up when told to.
#[allow(unsafe_code)]
fn lease(args: &[String]) -> Result<String, Box<dyn Error>> {
    // The kernel asks for a lease back with SIGIO. The holder has `/proc/sys/fs/lease-break-time` to give it up, by
    // default 45 s.
    // SAFETY: SIG_IGN installs no handler.
    unsafe { libc::signal(libc::SIGIO, libc::SIG_IGN) };
    let mut files = Vec::new();
    for path in args {
        files.push(File::options().read(true).write(true).open(path)?);
    }
    let set = |kind: libc::c_int| {
        files.iter().try_for_each(|file| {
            // SAFETY: F_SETLEASE takes an int.
            match unsafe { libc::fcntl(file.as_raw_fd(), libc::F_SETLEASE, kind) } {
                0 => Ok(()),
                _ => Err(std::io::Error::last_os_error()),
            }
        })
    };
    set(libc::F_WRLCK)?;
    println!("leased");
    wait_for_parent()?;
    set(libc::F_UNLCK)?;
    Ok("given up".into())
}

/// Calls that wait for a lease.
const WAITING: [&str; 4] = ["read", "write", "replace", "truncate"];

/// Starts a client for each of `count` files in `root/leased`, and waits until all are blocked.
fn clients(root: &Path, count: usize) -> Result<Vec<Asked>, Failed> {
    let clients: Vec<_> = (0..count)
        .map(|n| Asked::start(root, &[(WAITING[n % 4], &format!("leased/{n}"))]))
        .collect::<Result<_, _>>()?;
    for client in &clients {
        client.wait_until_blocked()?;
    }
    Ok(clients)
}

#[apply(test_case)]
fn two_leases(name: &str) -> Result<(), Failed> {
    leases(name, Way::Passthrough, 2)?;
    leases(name, Way::Plain, 2)
}

#[apply(test_case)]
fn forty_leases(name: &str) -> Result<(), Failed> {
    leases(name, Way::Passthrough, 40)
}

fn leases(name: &str, way: Way, count: usize) -> Result<(), Failed> {
    // After this time, the watchdog aborts a server that waits with its clients.
    let sandbox = Sandbox::patient(name, Duration::from_secs(20))?;
    let backing = Backing::in_memory(&sandbox, "tmpfs")?;
    let folders = [backing.folder("source")?, backing.folder("plain")?];
    let mut holders = Vec::new();
    for folder in &folders {
        fs::create_dir(folder.join("leased"))?;
        fs::create_dir(folder.join("other"))?;
        fs::write(folder.join("other/file"), "content")?;
        let paths: Vec<_> = (0..count)
            .map(|n| folder.join(format!("leased/{n}")))
            .collect();
        for path in &paths {
            fs::write(path, "leased content")?;
        }
        let paths: Vec<&OsStr> = paths.iter().map(|path| path.as_os_str()).collect();
        let mut holder = Client::start("lease", &paths)?;
        assert_eq!(holder.line()?, "leased");
        holders.push(holder);
    }
    let [source, plain] = &folders;
    let mirror = Mirror::start(&sandbox, source, way)?;
    let mut blocked = clients(mirror.path(), count)?;
    let mut controls = clients(plain, count)?;

    let others = [
        ("list", "other"),
        ("list", "leased"),
        ("stat", "leased/0"),
        ("read", "other/file"),
        ("write", "other/file"),
        ("open nonblocking", "leased/0"),
    ];
    let outcomes = ask_all(plain, &others, AT_ONCE)?;
    assert_eq!(outcomes[5], "EAGAIN");
    assert_eq!(ask_all(mirror.path(), &others, AT_ONCE)?, outcomes);
    for client in blocked.iter().chain(&controls) {
        client.wait_until_blocked()?;
    }

    // A killed client ends at the latest when it gets its answer.
    let killed = blocked.remove(0);
    let pid = Pid::from_raw(killed.id().try_into()?).ok_or("0 is no process")?;
    kill_process(pid, Signal::KILL)?;
    let expected = controls.remove(0);
    let since = Instant::now();
    for mut holder in holders {
        holder.proceed()?;
        assert_eq!(holder.finish()?, "given up");
    }
    for (n, (mut client, mut control)) in blocked.into_iter().zip(controls).enumerate() {
        let (outcome, _) = client.answer()?;
        assert_eq!(outcome, control.answer()?.0, "client {n}");
        assert!(!outcome.starts_with('E'), "{outcome}");
    }
    drop((killed, expected));
    assert!(since.elapsed() < Duration::from_secs(2) * patience_times());
    for n in 0..count {
        let [source, plain] = [source, plain].map(|folder| folder.join(format!("leased/{n}")));
        assert_eq!(fs::read(source)?, fs::read(plain)?, "leased/{n}");
    }
    mirror.wait_for_releases()?;
    mirror.stop(&backing)
}

/// How a filesystem's hang ends.
#[derive(Clone, Copy, PartialEq, Eq)]
enum End {
    Resumed,
    Aborted,
}

/// A mirror, with a filesystem in its source that can be stopped: another mirror.
struct Hanging {
    mirror: Mirror,
    hung: Mirror,
    source: PathBuf,
    backing: Backing,
    sandbox: Sandbox,
}

impl Hanging {
    /// Makes `count` files in the filesystem that can be stopped, and `count` in another folder.
    fn start(name: &str, count: usize, way: Way) -> Result<Self, Failed> {
        let sandbox = Sandbox::patient(name, Duration::from_secs(20))?;
        let backing = Backing::in_memory(&sandbox, "tmpfs")?;
        let (source, behind) = (backing.folder("source")?, backing.folder("behind")?);
        let (at, other) = (source.join("hung"), source.join("other"));
        fs::create_dir(&at)?;
        fs::create_dir(&other)?;
        fs::write(other.join("file"), "content")?;
        for n in 0..count {
            fs::write(behind.join(n.to_string()), "content")?;
            fs::write(other.join(n.to_string()), "content")?;
        }
        let command = Command::new(program::example("mirror")?);
        let hung = Mirror::spawn_at(&at, command, &sandbox, &behind, Way::Plain)?;
        let mirror = Mirror::start(&sandbox, &source, way)?;
        Ok(Self {
            mirror,
            hung,
            source,
            backing,
            sandbox,
        })
    }

    /// Resumes the filesystem, and stops both mirrors.
    fn stop(self) -> Result<(), Failed> {
        self.hung.signal(Signal::CONT)?;
        self.mirror.wait_for_releases()?;
        self.mirror.stop_with(|| Ok(()))?;
        self.hung.stop(&self.backing)?;
        drop(self.sandbox);
        Ok(())
    }
}

/// The mirror closes its fds of forgotten files also when a hang has made more threads serve than usual.
#[apply(test_case)]
fn forgotten_after_a_hang(name: &str) -> Result<(), Failed> {
    const COUNT: usize = 3_000;
    let hanging = Hanging::start(name, COUNT, Way::Passthrough)?;
    let mirror = &hanging.mirror;
    ask_all(mirror.path(), &[("list", "hung")], Duration::from_secs(1))?;
    let before = mirror.fds()?;
    hanging.hung.freeze()?;
    let clients: Vec<_> = (0..12)
        .map(|_| Asked::start(mirror.path(), &[("list", "hung")]))
        .collect::<Result<_, _>>()?;
    for client in &clients {
        client.wait_until_blocked()?;
    }
    // The threads take up serving one after the other.
    ask_all(mirror.path(), &[("list", "other")], AT_ONCE)?;
    hanging.hung.signal(Signal::CONT)?;
    for mut client in clients {
        client.answer()?;
    }
    let find = Command::new("find")
        .arg(mirror.path().join("other"))
        .args(["-size", "+1"])
        .stdout(Stdio::null())
        .status()?;
    assert!(find.success(), "{find}");
    assert!(mirror.fds()? > COUNT, "it has an fd of each file");
    let forgotten = || {
        drop_caches()?;
        Ok(mirror.fds()? < before + 100)
    };
    within(
        Duration::from_secs(10),
        "the files are forgotten",
        forgotten,
    )?;
    hanging.stop()
}

/// Opens files, and waits.
fn hold_files(args: &[String]) -> Result<String, Box<dyn Error>> {
    let files = args.iter().map(File::open).collect::<Result<Vec<_>, _>>()?;
    println!("open");
    wait_for_parent()?;
    Ok(files.len().to_string())
}

/// A killed client's files on a filesystem that hangs are released only when it resumes. Other releases do not wait.
#[apply(test_case)]
fn releases_of_a_killed_client_delay_no_others(name: &str) -> Result<(), Failed> {
    for way in [Way::Passthrough, Way::Plain] {
        let hanging = Hanging::start(name, 60, way)?;
        let root = hanging.mirror.path();
        let paths: Vec<_> = (0..60).map(|n| root.join(format!("hung/{n}"))).collect();
        let paths: Vec<_> = paths.iter().map(|path| path.as_os_str()).collect();
        let mut holder = Client::start("hold-files", &paths)?;
        assert_eq!(holder.line()?, "open");
        hanging.hung.freeze()?;
        let pid = Pid::from_raw(holder.id().try_into()?).ok_or("0 is no process")?;
        kill_process(pid, Signal::KILL)?;
        drop(holder);
        // The copy can run once cp's open of it has been released.
        let program = program::in_path("true").ok_or("there is no true")?;
        let copied = Command::new("cp")
            .arg(program)
            .arg(root.join("true"))
            .status()?;
        assert!(copied.success(), "{copied}");
        within(
            Duration::from_secs(5),
            "the program runs",
            || match Command::new(hanging.source.join("true")).status() {
                Ok(status) => Ok(status.success()),
                Err(error) if error.raw_os_error() == Some(libc::ETXTBSY) => Ok(false),
                Err(error) => Err(error.into()),
            },
        )?;
        ask_all(root, &[("list", "other"), ("read", "other/file")], AT_ONCE)?;
        hanging.stop()?;
    }
    Ok(())
}

#[apply(test_case)]
fn filesystem_that_is_stopped_and_resumed(name: &str) -> Result<(), Failed> {
    filesystem_that_hangs(name, End::Resumed)
}

#[apply(test_case)]
fn filesystem_that_is_aborted(name: &str) -> Result<(), Failed> {
    filesystem_that_hangs(name, End::Aborted)
}

fn filesystem_that_hangs(name: &str, end: End) -> Result<(), Failed> {
    let hanging = Hanging::start(name, 1, Way::Passthrough)?;
    let (mirror, hung, source) = (&hanging.mirror, &hanging.hung, &hanging.source);
    // The kernel knows the name after this, so each client sends a request of its own.
    let before = ask_all(mirror.path(), &[("list", "hung")], Duration::from_secs(1))?;

    hung.freeze()?;
    let mut clients = Vec::new();
    for count in [2, 12] {
        while clients.len() < count {
            clients.push(Asked::start(mirror.path(), &[("list", "hung")])?);
        }
        for client in &clients {
            client.wait_until_blocked()?;
        }
        for root in [source, mirror.path()] {
            let others = [
                ("list", "other"),
                ("read", "other/file"),
                ("write", "other/file"),
            ];
            ask_all(root, &others, AT_ONCE)?;
        }
    }
    if end == End::Aborted {
        hung.abort()?;
    }
    hung.signal(Signal::CONT)?;
    for mut client in clients {
        let (outcome, _) = client.answer()?;
        match end {
            End::Resumed => assert_eq!(outcome, before[0]),
            End::Aborted => assert!(
                ["ENOTCONN", "ECONNABORTED"].contains(&&*outcome),
                "{outcome}"
            ),
        }
    }
    match end {
        End::Resumed => hanging.stop(),
        End::Aborted => {
            mirror.wait_for_releases()?;
            hanging.mirror.stop_with(|| Ok(()))?;
            hanging.hung.wait_for_end()?;
            hanging.backing.unmount_when_idle()
        }
    }
}
