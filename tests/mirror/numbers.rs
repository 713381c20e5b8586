//! The mirror reports the source's inode number of a file, or one that no other file has. The number stays the same
//! when the kernel forgets the file and looks it up again.

use std::error::Error;
use std::ffi::{CString, OsStr};
use std::fs::{self, File};
use std::io;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{DirEntryExt, MetadataExt, symlink};
use std::path::Path;
use std::process::{Command, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use libtest_mimic::Failed;
use macro_rules_attribute::apply;
use rustix::mount::{MountFlags, mount};

use crate::backing::Backing;
use crate::client::Role;
use crate::ext4::{self, Ext4};
use crate::identity::{WAYS, drop_caches, lines, read, same};
use crate::program;
use crate::sandbox::{Sandbox, unmount_when_idle};
use crate::server::Mirror;

pub const ROLES: &[(&str, Role)] = &[("list-numbers", list_numbers), ("reuse", reuse)];

/// A thread that makes the kernel forget files, over and over.
struct Forgetting {
    stop: Arc<AtomicBool>,
    thread: Option<JoinHandle<io::Result<()>>>,
}

impl Forgetting {
    fn start() -> Self {
        let stop = Arc::new(AtomicBool::new(false));
        let stopped = Arc::clone(&stop);
        let forget = move || {
            while !stopped.load(Ordering::Relaxed) {
                drop_caches()?;
            }
            Ok(())
        };
        let thread = Some(thread::spawn(forget));
        Self { stop, thread }
    }

    fn stop(mut self) -> Result<(), Failed> {
        self.stop.store(true, Ordering::Relaxed);
        let thread = self.thread.take().ok_or("it was stopped")?;
        Ok(thread.join().map_err(|_| "it panicked")??)
    }
}

impl Drop for Forgetting {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
    }
}

/// Commands that take a file for another one when its inode number changes. `diff-files` trusts git's index.
const COMMANDS: &[&str] = &[
    "cp -r tree copy",
    "diff -r tree copy",
    "rm -rf copy",
    "cp -a tree copy",
    "find copy -type f -links 2",
    "rm -rf copy",
    "tar -cf archive tree",
    "tar -xf archive -C extracted",
    "find extracted -type f -links 2",
    "rm -rf extracted/tree",
    "git -C repository status --porcelain",
    "git -C repository diff-files --name-only",
];

const ROUNDS: usize = 50;

/// Makes two trees of five folders each. A folder has five files, with six names.
fn make_trees(root: &Path) -> Result<(), Failed> {
    fs::create_dir(root.join("extracted"))?;
    for tree in ["tree", "repository"] {
        for folder in 0..5 {
            let folder = root.join(tree).join(folder.to_string());
            fs::create_dir_all(&folder)?;
            for file in 0..5 {
                fs::write(folder.join(file.to_string()), "content")?;
            }
            fs::hard_link(folder.join("0"), folder.join("linked"))?;
        }
    }
    let author = "-c user.name=name -c user.email=email";
    for command in ["init -q", "add .", &format!("{author} commit -qm message")] {
        succeeded(&run(&format!("git -C repository {command}"), root)?);
    }
    Ok(())
}

/// A command, its exit status and its output, whose lines are sorted: a listing may be in any order.
fn run(command: &str, root: &Path) -> Result<String, Failed> {
    let mut words = command.split(' ');
    let output = Command::new(words.next().ok_or("no program")?)
        .args(words)
        .current_dir(root)
        .env("GIT_CONFIG_GLOBAL", "/dev/null")
        .env("GIT_CONFIG_SYSTEM", "/dev/null")
        .stdin(Stdio::null())
        .output()
        .map_err(|error| format!("{command}: {error}"))?;
    let mut listed: Vec<_> = output.stdout.split(|byte| *byte == b'\n').collect();
    listed.sort_unstable();
    let listed = listed.join(&b' ').escape_ascii().to_string();
    let said = String::from_utf8_lossy(&output.stderr);
    let said = said.lines().next().unwrap_or_default();
    Ok(format!("{command}: {}: {listed} {said}", output.status))
}

fn succeeded(outcome: &str) {
    assert!(outcome.contains(": exit status: 0:"), "{outcome}");
}

#[apply(test_case)]
fn stay_while_the_kernel_forgets(name: &str) -> Result<(), Failed> {
    if program::in_path("git").is_none() {
        return Err("there is no git: apt-get install git".into());
    }
    let sandbox = Sandbox::patient(name, Duration::from_secs(120))?;
    let backing = Backing::in_memory(&sandbox, "tmpfs")?;
    let rounds = |root: &Path, rounds: usize| -> Result<Vec<String>, Failed> {
        make_trees(root)?;
        let forgetting = Forgetting::start();
        let commands = (0..rounds).flat_map(|_| COMMANDS);
        let outcomes = commands.map(|command| run(command, root)).collect();
        forgetting.stop()?;
        outcomes
    };
    let plain = rounds(&backing.folder("plain")?, ROUNDS)?;
    for outcome in &plain {
        succeeded(outcome);
    }
    for way in WAYS {
        let source = backing.folder(&format!("{way:?}"))?;
        let mirror = Mirror::start(&sandbox, &source, way)?;
        let outcomes = rounds(mirror.path(), ROUNDS)?;
        same(&format!("{way:?}"), &outcomes, &plain)?;
        mirror.wait_for_releases()?;
        mirror.stop_with(|| Ok(()))?;
    }
    backing.unmount_when_idle()
}

/// Prints for each path the number that readdir(3) lists, and the file's number before and after the kernel forgets it.
fn list_numbers(args: &[String]) -> Result<String, Box<dyn Error>> {
    fn list(root: &Path, path: &str) -> io::Result<()> {
        for entry in fs::read_dir(root.join(path))? {
            let entry = entry?;
            let path = format!("{path}{}", entry.file_name().to_string_lossy());
            let number = || Ok(entry.path().symlink_metadata()?.ino()) as io::Result<u64>;
            let before = number()?;
            drop_caches()?;
            println!("{path} {} {before} {}", entry.ino(), number()?);
            if entry.file_type()?.is_dir() {
                list(root, &format!("{path}/"))?;
            }
        }
        Ok(())
    }
    let root = Path::new(&args[0]);
    // The kernel knows none of the files when they are listed.
    drop_caches()?;
    list(root, "")?;
    let number = root.metadata()?.ino();
    drop_caches()?;
    println!(". {number} {number} {}", root.metadata()?.ino());
    Ok("done".into())
}

struct Numbers {
    path: String,
    listed: u64,
    before: u64,
    after: u64,
}

impl Numbers {
    fn below(root: &Path) -> Result<Vec<Self>, Failed> {
        let parse = |line: &String| -> Result<Self, Failed> {
            let words: Vec<_> = line.split(' ').collect();
            let [path, listed, before, after] = words[..] else {
                return Err(line.into());
            };
            Ok(Self {
                path: path.to_owned(),
                listed: listed.parse()?,
                before: before.parse()?,
                after: after.parse()?,
            })
        };
        let lines = lines("list-numbers", &[root.as_os_str()])?;
        let mut numbers: Vec<_> = lines.iter().map(parse).collect::<Result<_, _>>()?;
        numbers.sort_by(|one, other| one.path.cmp(&other.path));
        Ok(numbers)
    }

    fn is_of_another_mount(&self) -> bool {
        self.path.starts_with(MOUNTS)
    }

    /// Whether this is a mount's root, for which readdir(3) natively lists the number of the folder under the mount.
    fn is_mount(&self) -> bool {
        self.is_of_another_mount() && self.path.len() == 1
    }
}

const MOUNTS: [char; 2] = ['x', 'y'];

#[apply(test_case)]
fn are_those_of_the_source(name: &str) -> Result<(), Failed> {
    for way in WAYS {
        let sandbox = Sandbox::new(name)?;
        let backing = Backing::in_memory(&sandbox, "tmpfs")?;
        let source = backing.folder("source")?;
        fs::create_dir(source.join("folder"))?;
        fs::write(source.join("folder/file"), "")?;
        symlink("folder", source.join("symlink"))?;
        let mounts = MOUNTS.map(|name| source.join(name.to_string()));
        for at in &mounts {
            fs::create_dir(at)?;
            mount("tmpfs", at, "tmpfs", MountFlags::empty(), None)?;
            fs::create_dir(at.join("folder"))?;
            fs::write(at.join("folder/file"), at.as_os_str().as_encoded_bytes())?;
        }
        let mirror = Mirror::start(&sandbox, &source, way)?;
        let native = Numbers::below(&source)?;
        let found = Numbers::below(mirror.path())?;
        let of = |path| native.iter().find(|numbers| numbers.path == path);
        let two = ["x/folder/file", "y/folder/file"].map(|path| of(path).map(|file| file.before));
        assert!(two[0].is_some() && two[0] == two[1], "{two:?}");

        let mut wrong = String::new();
        assert_eq!(found.len(), native.len());
        for (native, found) in native.iter().zip(&found) {
            let Numbers {
                path,
                listed,
                before,
                after,
            } = found;
            assert_eq!(*path, native.path);
            let is_own = !found.is_of_another_mount();
            let expected = if is_own || found.is_mount() {
                native.listed
            } else {
                *before
            };
            if before != after || *listed != expected || is_own && *before != native.before {
                let native = (native.listed, native.before);
                wrong += &format!("\n{path}: {listed}, {before}, {after}; native {native:?}");
            }
        }
        let mut all: Vec<_> = found.iter().map(|numbers| numbers.before).collect();
        all.sort_unstable();
        all.dedup();
        if all.len() < found.len() {
            wrong += &format!("\n{} files have {} numbers", found.len(), all.len());
        }
        if !wrong.is_empty() {
            return Err(format!("{way:?}: listed, before, after:{wrong}").into());
        }
        mirror.stop_with(|| {
            mounts.iter().try_for_each(|at| unmount_when_idle(at))?;
            backing.unmount_when_idle()
        })?;
    }
    Ok(())
}

/// `struct file_handle`, which identifies a file without a name.
#[repr(C)]
struct Handle {
    bytes: u32,
    kind: i32,
    file: [u8; 128],
}

#[allow(unsafe_code)]
impl Handle {
    fn of(path: &Path) -> io::Result<Self> {
        let path = CString::new(path.as_os_str().as_bytes())?;
        let (bytes, kind, file) = (128, 0, [0; 128]);
        let mut handle = Self { bytes, kind, file };
        let mut mount = 0;
        // SAFETY: the kernel reads the path up to its NUL, and writes the handle, of that size, and the mount.
        let done = unsafe {
            let (number, at) = (libc::SYS_name_to_handle_at, libc::AT_FDCWD);
            libc::syscall(number, at, path.as_ptr(), &mut handle, &mut mount, 0)
        };
        if done == 0 {
            Ok(handle)
        } else {
            Err(io::Error::last_os_error())
        }
    }

    /// Opens the handle on the filesystem of the folder `on`, and returns the errno if that fails.
    fn refused(&self, on: &Path) -> io::Result<Option<i32>> {
        let on = File::open(on)?;
        let (number, on) = (libc::SYS_open_by_handle_at, on.as_raw_fd());
        // SAFETY: the kernel reads the handle up to its length.
        let fd = unsafe { libc::syscall(number, on, self, libc::O_RDONLY) };
        if fd >= 0 {
            // SAFETY: the kernel has just returned this fd, and nothing else owns it.
            drop(unsafe { OwnedFd::from_raw_fd(fd as i32) });
            return Ok(None);
        }
        Ok(io::Error::last_os_error().raw_os_error())
    }
}

/// Deletes a file that is open, and makes others until one has its number.
fn reuse(args: &[String]) -> Result<String, Box<dyn Error>> {
    const PATIENCE: Duration = Duration::from_secs(10);
    let root = Path::new(&args[0]);
    // The content of each file is its name.
    let check = |path: &Path| -> Result<u64, Box<dyn Error>> {
        let name = path.file_name().and_then(OsStr::to_str).ok_or("a name")?;
        let (file, number) = (File::open(path)?, path.metadata()?.ino());
        let (content, of_open) = (read(&file)?, file.metadata()?.ino());
        if content != name || of_open != number {
            return Err(format!("{name} has '{content}', and {of_open}, not {number}").into());
        }
        Ok(number)
    };
    let make = |name: &str| {
        fs::write(root.join(name), name)?;
        check(&root.join(name))
    };
    for _ in 0..ROUNDS {
        let number = make("old")?;
        let handle = Handle::of(&root.join("old"))?;
        assert_eq!(handle.refused(root)?, None);
        let old = File::open(root.join("old"))?;
        fs::remove_file(root.join("old"))?;
        drop_caches()?;
        for name in ["a", "b", "c"] {
            assert_ne!(make(name)?, number, "the number is in use");
        }
        assert_eq!(read(&old)?, "old");
        assert_eq!(old.metadata()?.ino(), number);
        drop(old);
        // RELEASE and FORGET are sent after close(2) has returned.
        let deadline = Instant::now() + PATIENCE;
        while make("new")? != number {
            if Instant::now() > deadline {
                return Err(format!("{number} is not used again").into());
            }
            fs::remove_file(root.join("new"))?;
        }
        assert_eq!(
            handle.refused(root)?,
            Some(libc::ESTALE),
            "the number is another file's"
        );
        drop_caches()?;
        for name in ["a", "b", "c", "new"] {
            check(&root.join(name))?;
            fs::remove_file(root.join(name))?;
        }
    }
    println!("all were used again");
    Ok("done".into())
}

/// On ext4, where a new file gets the lowest free number.
#[apply(test_case)]
fn are_used_again(name: &str) -> Result<(), Failed> {
    if !ext4::is_supported()? {
        return Ok(());
    }
    let sandbox = Sandbox::new(name)?;
    // Without a journal, ext4 waits for a minute before it uses a number again.
    let mkfs = ["-O", "has_journal", "-J", "size=4", "-b", "1024"];
    let backing = Ext4::new(&sandbox, 16 << 20, &mkfs)?;
    let source = backing.path();
    let plain = lines("reuse", &[source.as_os_str()])?;
    for way in WAYS {
        let mirror = Mirror::start(&sandbox, source, way)?;
        let used = lines("reuse", &[mirror.path().as_os_str()])?;
        same(&format!("{way:?}"), &used, &plain)?;
        mirror.wait_for_releases()?;
        mirror.stop_with(|| Ok(()))?;
    }
    unmount_when_idle(source)
}
