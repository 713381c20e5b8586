//! What is one file in the source is one file through the mirror, and two files are two. That also holds on overlayfs,
//! where a file can change its numbers and two names of one file can become two files, and where files share a number.
//!
//! The control is the same filesystem without a mirror, with the same changes.

#![allow(unsafe_code)]

use std::error::Error;
use std::ffi::OsStr;
use std::fs::{self, File, Permissions};
use std::io::{self, Write};
use std::os::fd::AsRawFd;
use std::os::unix::fs::{FileExt, MetadataExt, OpenOptionsExt, PermissionsExt, chown};
use std::path::Path;
use std::ptr::null_mut;
use std::sync::Arc;
use std::sync::atomic::Ordering;

use fuse_backing::{FopenFlags, OpenReply};
use libtest_mimic::Failed;
use macro_rules_attribute::apply;
use nix::unistd::truncate;
use rustix::fs::{FlockOperation, XattrFlags, flock, getxattr, setxattr};
use rustix::io::Errno;
use rustix::mm::{MapFlags, MsyncFlags, ProtFlags, mmap, msync};
use rustix::mount::mount_bind;

use crate::backing::Backing;
use crate::client::{Client, Role};
use crate::fuse::{Connection, Init, Node};
use crate::overlay::{self, Layers, Overlay};
use crate::place::describe;
use crate::sandbox::{Sandbox, unmount_when_idle};
use crate::server::{Mirror, Way};

pub const ROLES: &[(&str, Role)] = &[
    ("change-each", change_each),
    ("change-two", change_two),
    ("use-bind-mount", use_bind_mount),
];

pub const WAYS: [Way; 2] = [Way::Passthrough, Way::Plain];

/// Makes the kernel forget all files that nobody uses, on the whole machine.
pub fn drop_caches() -> io::Result<()> {
    fs::write("/proc/sys/vm/drop_caches", "2")
}

/// The lines that a child prints before its last one, "done".
pub fn lines(role: &str, args: &[&OsStr]) -> Result<Vec<String>, Failed> {
    let mut child = Client::start(role, args)?;
    let mut lines = Vec::new();
    loop {
        let line = child.line()?;
        if line == "done" {
            return Ok(lines);
        }
        if line.is_empty() || line.starts_with("error: ") {
            let last = lines.last();
            return Err(format!("{role}: '{line}' after {} lines: {last:?}", lines.len()).into());
        }
        lines.push(line);
    }
}

/// Fails with the lines that differ.
pub fn same(what: &str, mirror: &[String], plain: &[String]) -> Result<(), Failed> {
    const TOLD: usize = 20;
    assert_eq!(mirror.len(), plain.len(), "{what}");
    let pairs = mirror.iter().zip(plain);
    let differ: Vec<_> = pairs.filter(|(mirror, plain)| mirror != plain).collect();
    if differ.is_empty() {
        return Ok(());
    }
    let (count, all) = (differ.len(), plain.len());
    let told = differ.iter().take(TOLD);
    let told = told.map(|(mirror, plain)| format!("\n  mirror {mirror}\n  plain  {plain}"));
    let told = told.collect::<String>();
    Err(format!("{what}: {count} of {all} differ, of which are the first:{told}").into())
}

fn outcome<T: ToString>(result: io::Result<T>) -> String {
    let result = result.map(|value| value.to_string());
    describe(&result.map_err(|error| Errno::from_io_error(&error).unwrap_or(Errno::IO)))
}

fn made(result: io::Result<()>) -> String {
    outcome(result.map(|()| "ok"))
}

/// A way to change a file.
type Change = fn(&Path) -> io::Result<()>;

const CHANGES: &[(&str, Change)] = &[
    ("append", append),
    ("write", |path| {
        let file = File::options().write(true).open(path)?;
        file.write_all_at(b"written", 0)
    }),
    ("write-mapped", |path| {
        let file = File::options().read(true).write(true).open(path)?;
        let access = ProtFlags::READ | ProtFlags::WRITE;
        // SAFETY: a new mapping, at an address that the kernel chooses. It is never unmapped.
        let start = unsafe { mmap(null_mut(), 4096, access, MapFlags::SHARED, &file, 0) }?;
        // SAFETY: the mapping is long enough and writable, and nothing else uses it.
        unsafe { start.cast::<[u8; 6]>().write(*b"mapped") };
        // SAFETY: 4096 bytes are mapped at `start`.
        Ok(unsafe { msync(start, 4096, MsyncFlags::SYNC) }?)
    }),
    ("truncate", |path| Ok(truncate(path, 3)?)),
    ("open-truncating", |path| {
        let mut file = File::options().write(true).truncate(true).open(path)?;
        file.write_all(b"from here on")
    }),
    ("chmod", |path| {
        fs::set_permissions(path, Permissions::from_mode(0o640))
    }),
    ("chown", |path| chown(path, Some(1000), Some(1000))),
    ("setxattr", |path| {
        Ok(setxattr(path, XATTR, b"x", XattrFlags::empty())?)
    }),
    ("link", |path| {
        fs::hard_link(path, path.with_file_name("linked"))
    }),
    ("rename", |path| {
        fs::rename(path, path.with_file_name("renamed"))
    }),
    // rename(2) does nothing if both are names of one file.
    ("rename-onto-first", |path| {
        fs::rename(path, path.with_file_name(NAMES[0]))
    }),
    ("replace", |path| {
        let new = path.with_file_name("new");
        fs::write(&new, "the new one")?;
        fs::rename(new, path)
    }),
    ("unlink", |path| fs::remove_file(path)),
];

fn append(path: &Path) -> io::Result<()> {
    let mut file = File::options().append(true).open(path)?;
    file.write_all(b", appended")
}

const XATTR: &str = "trusted.fuse-backing-test";

/// The three names that files can have at first, and the two that changes give them.
const NAMES: [&str; 5] = ["a", "b", "c", "linked", "renamed"];

/// All that must be the same for the files in a folder, and for `held`, open files of the first names. For inode
/// numbers, this is which of them are equal.
fn view(folder: &Path, held: &[File]) -> String {
    let mut numbers = Vec::new();
    let mut attributes = |metadata: io::Result<fs::Metadata>| {
        let Ok(metadata) = metadata else {
            return outcome(metadata.map(|_| ""));
        };
        let (mode, uid, links) = (metadata.mode(), metadata.uid(), metadata.nlink());
        let number = (metadata.dev(), metadata.ino());
        numbers.push(number);
        let first = numbers.iter().position(|other| *other == number);
        let (size, first) = (metadata.len(), first.unwrap_or_default());
        format!("{mode:o} {uid} links {links} size {size} number {first}")
    };
    // On overlayfs some files change their numbers when the kernel forgets them, which another test can cause.
    let pinned = NAMES.map(|name| pin(&folder.join(name)));
    let mut text = String::new();
    for (name, pinned) in NAMES.iter().zip(&pinned) {
        if matches!(pinned, Err(error) if error.kind() == io::ErrorKind::NotFound) {
            continue;
        }
        let path = folder.join(name);
        let metadata = path.metadata();
        let content = outcome(fs::read_to_string(&path));
        let xattr = getxattr(&path, XATTR, &mut [0; 8][..]).map(|length| length.to_string());
        let (metadata, xattr) = (attributes(metadata), describe(&xattr));
        text += &format!("{name}: '{content}' {metadata} xattr {xattr}; ");
    }
    for (file, name) in held.iter().zip(NAMES) {
        let content = outcome(read(file));
        text += &format!("held {name}: '{content}' {}", attributes(file.metadata()));
        // The lock excludes every other open of the same file, by any of its names.
        let lock = |file: &File| flock(file, FlockOperation::NonBlockingLockExclusive);
        text += &format!(" locked {}", made(lock(file).map_err(Into::into)));
        for other in NAMES {
            if let Ok(other) = File::open(folder.join(other)) {
                text += &format!(" {}", made(lock(&other).map_err(Into::into)));
            }
        }
        let unlocked = flock(file, FlockOperation::Unlock);
        text += &format!(" unlocked {}; ", made(unlocked.map_err(Into::into)));
    }
    text
}

/// Keeps the kernel from forgetting a file. `O_PATH` does not open it.
fn pin(path: &Path) -> io::Result<File> {
    let mut options = File::options();
    options.read(true).custom_flags(libc::O_PATH).open(path)
}

/// Reads as much as the tests write at most.
pub fn read(file: &File) -> io::Result<String> {
    let mut content = [0; 64];
    let length = file.read_at(&mut content, 0)?;
    Ok(content[..length].escape_ascii().to_string())
}

/// Name, whether all names are held open meanwhile, and whether the kernel forgets files before and after a change.
const VARIANTS: [(&str, bool, bool); 4] = [
    ("known", false, false),
    ("held", true, false),
    ("forgotten", false, true),
    ("held-and-forgotten", true, true),
];

/// Arguments: a folder to look in, a folder to make changes in, and the number of names. The middle name is changed.
fn change_each(args: &[String]) -> Result<String, Box<dyn Error>> {
    let [look, change, names] = args else {
        return Err("two folders and a number".into());
    };
    let names = &NAMES[..names.parse()?];
    let changed = names[names.len() / 2];
    for (variant, holds, forgets) in VARIANTS {
        let forget = || if forgets { drop_caches() } else { Ok(()) };
        for (name, make) in CHANGES {
            let [look, change] =
                [look, change].map(|root| Path::new(root).join(variant).join(name));
            let tell = |when: &str, text: &str| println!("{variant}, {name}, {when}: {text}");
            tell("before", &view(&look, &[]));
            let folder = File::open(&look)?;
            let held = if holds { names } else { &[] };
            let held = held.iter().map(|name| File::open(look.join(name)));
            let held: Vec<_> = held.collect::<io::Result<_>>()?;
            forget()?;
            tell("made", &made(make(&change.join(changed))));
            forget()?;
            tell("after", &view(&look, &held));
            tell("first one appended", &made(append(&change.join(names[0]))));
            // The folder has been copied up as well.
            let folder = format!("/proc/self/fd/{}", folder.as_raw_fd());
            tell("in the open folder", &view(Path::new(&folder), &held));
        }
    }
    Ok("done".into())
}

#[apply(test_case)]
fn file_copied_up_within_a_filesystem(name: &str) -> Result<(), Failed> {
    changes(name, 1, Layers::Together)
}

#[apply(test_case)]
fn file_copied_up_to_another_filesystem(name: &str) -> Result<(), Failed> {
    changes(name, 1, Layers::Apart)
}

#[apply(test_case)]
fn two_names_without_an_index(name: &str) -> Result<(), Failed> {
    changes(name, 2, Layers::Apart)
}

#[apply(test_case)]
fn two_names_with_an_index(name: &str) -> Result<(), Failed> {
    changes(name, 2, Layers::Indexed)
}

#[apply(test_case)]
fn three_names(name: &str) -> Result<(), Failed> {
    changes(name, 3, Layers::Together)
}

/// Changes files on overlayfs, through the mirror and directly in its source.
fn changes(name: &str, names: usize, layers: Layers) -> Result<(), Failed> {
    if !overlay::is_supported() {
        return Ok(());
    }
    let sandbox = Sandbox::new(name)?;
    let overlay = || Overlay::new(&sandbox, layers, |lower| fill(lower, names));
    let names = names.to_string();
    let lines = |look: &Path, change: &Path| {
        let args = [look.as_os_str(), change.as_os_str(), OsStr::new(&names)];
        lines("change-each", &args)
    };
    let plain = overlay()?;
    let plain = lines(plain.path(), plain.path())?;
    let mut wrong = String::new();
    for way in WAYS {
        for is_behind in [false, true] {
            let source = overlay()?;
            let mirror = Mirror::start(&sandbox, source.path(), way)?;
            let change = if is_behind {
                source.path()
            } else {
                mirror.path()
            };
            let changed = lines(mirror.path(), change)?;
            let what = format!("{way:?}, changed behind the mirror: {is_behind}");
            if let Err(why) = same(&what, &changed, &plain) {
                wrong += why.message().unwrap_or_default();
                wrong += "\n";
            }
            mirror.wait_for_releases()?;
            mirror.stop_with(|| source.unmount_when_idle())?;
        }
    }
    if wrong.is_empty() {
        Ok(())
    } else {
        Err(wrong.into())
    }
}

fn fill(lower: &Path, names: usize) -> Result<(), Failed> {
    for (variant, ..) in VARIANTS {
        for (change, _) in CHANGES {
            let folder = lower.join(variant).join(change);
            fs::create_dir_all(&folder)?;
            let first = folder.join(NAMES[0]);
            fs::write(&first, format!("lower, {change}"))?;
            for name in &NAMES[1..names] {
                fs::hard_link(&first, folder.join(name))?;
            }
        }
    }
    Ok(())
}

/// Changes two files in a folder in which no file is made.
fn change_two(args: &[String]) -> Result<String, Box<dyn Error>> {
    let folder = Path::new(&args[0]);
    let [a, b] = ["a", "b"].map(|name| folder.join(name));
    println!("before: {}", view(folder, &[]));
    append(&b)?;
    println!("b appended: {}", view(folder, &[]));
    drop_caches()?;
    let held = [File::open(&a)?, File::open(&b)?];
    append(&a)?;
    println!("a appended: {}", view(folder, &held));
    drop_caches()?;
    println!("forgotten: {}", view(folder, &held));
    Ok("done".into())
}

/// The source is a FUSE filesystem, which can report any numbers.
#[apply(test_case)]
fn two_files_with_one_number(name: &str) -> Result<(), Failed> {
    let sandbox = Sandbox::new(name)?;
    let serve = || {
        let on = sandbox.tmpfs()?;
        let node = |name: &str| {
            let backing = on.file(name, &format!("this is {name}"))?;
            let name = name.to_owned();
            Ok::<_, Failed>(Node { name, backing })
        };
        let open = OpenReply::server(FopenFlags::empty())?.to_fuse_open_out(1);
        let nodes = vec![node("a")?, node("b")?];
        let served =
            Connection::serve(&sandbox, Init::PLAIN, nodes, Arc::new(move |_, _| Ok(open)));
        let served = served?;
        served.seen.has_one_number.store(true, Ordering::SeqCst);
        Ok::<_, Failed>(served)
    };
    let plain = serve()?;
    let plain = lines("change-two", &[plain.path("").as_os_str()])?;
    for way in WAYS {
        let source = serve()?;
        let mirror = Mirror::start(&sandbox, &source.path(""), way)?;
        let changed = lines("change-two", &[mirror.path().as_os_str()])?;
        same(&format!("{way:?}"), &changed, &plain)?;
        mirror.wait_for_releases()?;
        mirror.stop_with(|| Ok(source.unmount()?))?;
    }
    Ok(())
}

/// Changes a file in the folder `a`, which is bind-mounted on `b`.
fn use_bind_mount(args: &[String]) -> Result<String, Box<dyn Error>> {
    let [a, b] = ["a", "b"].map(|folder| Path::new(&args[0]).join(folder));
    let tell = |when: &str| {
        println!("{when}, a: {}", view(&a, &[]));
        println!("{when}, b: {}", view(&b, &[]));
        let number = |folder: &Path| folder.join("a").metadata().map(|file| file.ino()).ok();
        println!("{when}: one number: {}", number(&a) == number(&b));
    };
    tell("before");
    append(&b.join("a"))?;
    tell("written in b");
    drop_caches()?;
    append(&a.join("a"))?;
    tell("written in a");
    let (from, to) = (a.join("a"), b.join("renamed"));
    println!("rename: {}", made(fs::rename(&from, &to)));
    println!("link: {}", made(fs::hard_link(&from, &to)));
    println!("link in b: {}", made(fs::hard_link(b.join("a"), &to)));
    tell("linked");
    println!("unlink in a: {}", made(fs::remove_file(&from)));
    tell("unlinked");
    Ok("done".into())
}

#[apply(test_case)]
fn bind_mount(name: &str) -> Result<(), Failed> {
    let fill = |root: &Path| {
        for folder in ["source", "plain"].map(|folder| root.join(folder)) {
            fs::create_dir_all(folder.join("a"))?;
            fs::create_dir(folder.join("b"))?;
            fs::write(folder.join("a/a"), "content")?;
        }
        Ok(())
    };
    for way in WAYS {
        let sandbox = Sandbox::new(name)?;
        let backing = Backing::in_memory(&sandbox, "tmpfs")?;
        let folder = backing.folder("folder")?;
        fill(&folder)?;
        use_bind_mounts(&sandbox, way, &folder, || backing.unmount_when_idle())?;
        if overlay::is_supported() {
            // Inode numbers of overlayfs do not tell files apart.
            let overlay = Overlay::new(&sandbox, Layers::Together, fill)?;
            let unmounted = || overlay.unmount_when_idle();
            use_bind_mounts(&sandbox, way, overlay.path(), unmounted)?;
        }
    }
    Ok(())
}

fn use_bind_mounts(
    sandbox: &Sandbox,
    way: Way,
    folder: &Path,
    unmounted: impl FnOnce() -> Result<(), Failed>,
) -> Result<(), Failed> {
    let [source, plain] = ["source", "plain"].map(|name| folder.join(name));
    for folder in [&source, &plain] {
        mount_bind(folder.join("a"), folder.join("b"))?;
    }
    let mirror = Mirror::start(sandbox, &source, way)?;
    let used = lines("use-bind-mount", &[mirror.path().as_os_str()])?;
    let expected = lines("use-bind-mount", &[plain.as_os_str()])?;
    same(&format!("{way:?}"), &used, &expected)?;
    mirror.wait_for_releases()?;
    mirror.stop_with(|| {
        unmount_when_idle(&source.join("b"))?;
        unmount_when_idle(&plain.join("b"))?;
        unmounted()
    })
}
