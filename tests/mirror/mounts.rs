//! Mounts in the source. What they permit and forbid holds through the mirror. A mirror that is mounted in its own
//! source does not wait for itself.

use std::error::Error;
use std::ffi::CString;
use std::fs::{self, File, Permissions};
use std::os::unix::fs::{PermissionsExt, chown, symlink};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::ptr::null_mut;
use std::time::{Duration, Instant};

use libtest_mimic::Failed;
use macro_rules_attribute::apply;
use rustix::fs::XattrFlags;
use rustix::io::Errno;
use rustix::mm::{MapFlags, ProtFlags, mmap};
use rustix::mount::{
    MountFlags, MountPropagationFlags, UnmountFlags, mount, mount_bind, mount_bind_recursive,
    mount_change, mount_remount, unmount,
};
use rustix::process::Signal;

use crate::ask::{Asked, ask_all};
use crate::backing::Backing;
use crate::client::{self, Role};
use crate::differential::{Made, compare, run};
use crate::place::describe;
use crate::program;
use crate::sandbox::{Sandbox, patience_times};
use crate::server::{Mirror, Way, within};

pub const ROLES: &[(&str, Role)] = &[("map-to-run", map_to_run)];

const WAYS: [Way; 2] = [Way::Passthrough, Way::Plain];
const SECOND: Duration = Duration::from_secs(1);

/// A mirror's source and a plain directory, with the same content.
struct Pair {
    backing: Backing,
    source: PathBuf,
    plain: PathBuf,
    mirror: Mirror,
    way: Way,
}

impl Pair {
    fn new(name: &str, way: Way, make: fn(&Path) -> Result<(), Failed>) -> Result<Self, Failed> {
        let sandbox = Sandbox::new(name)?;
        let backing = Backing::in_memory(&sandbox, "tmpfs")?;
        let (source, plain) = (backing.folder("source")?, backing.folder("plain")?);
        make(&source)?;
        make(&plain)?;
        let mirror = Mirror::start(&sandbox, &source, way)?;
        Ok(Self {
            backing,
            source,
            plain,
            mirror,
            way,
        })
    }

    /// Has a client make calls in both, which must have the same outcomes.
    fn same(&self, (table, folder, outcome, count): Calls<'_>) -> Result<Vec<Made>, Failed> {
        let folders = [self.mirror.path(), &self.plain].map(|place| place.join(folder));
        let made = run(table, &folders[0], &folders[1])?;
        compare(&made, self.way.is_passthrough()?, true)?;
        let found = made.iter().filter(|made| made.plain == outcome).count();
        assert_eq!(found, count, "{outcome} in '{table}'");
        Ok(made)
    }
}

/// A table of calls, the folder to make them in, an outcome, and how many of the calls have it.
type Calls<'a> = (&'a str, &'a str, &'a str, usize);

/// The mirror learns of the folder by the writable path first.
#[apply(test_case)]
fn read_only_known_as_writable(name: &str) -> Result<(), Failed> {
    let calls = [
        ("look", "", "ENOENT", 1),
        ("writable elsewhere", "", "EROFS", 8),
        ("read-only", "ro", "EROFS", 29),
    ];
    all_the_same(name, read_only_folder, "ro", &calls)
}

/// The mirror learns of the folder by the read-only path first.
#[apply(test_case)]
fn writable_known_as_read_only(name: &str) -> Result<(), Failed> {
    let calls = [("writable elsewhere", "", "EROFS", 8)];
    all_the_same(name, read_only_folder, "ro", &calls)
}

#[apply(test_case)]
fn read_only_file(name: &str) -> Result<(), Failed> {
    let calls = [("single file", "", "EROFS", 5)];
    all_the_same(name, single_file, "ro", &calls)
}

#[apply(test_case)]
fn noexec(name: &str) -> Result<(), Failed> {
    let calls = [("noexec", "", "EACCES", 2)];
    all_the_same(name, noexec_folder, "noexec", &calls)
}

#[apply(test_case)]
fn nosuid_and_nodev(name: &str) -> Result<(), Failed> {
    let calls = [("nosuid", "", r#"Some(0), None, "0\n""#, 1)];
    all_the_same(name, nosuid_folder, "nosuid", &calls)
}

#[apply(test_case)]
fn two_mounts_of_a_filesystem(name: &str) -> Result<(), Failed> {
    let calls = [("two mounts", "", "EXDEV", 4)];
    all_the_same(name, two_mounts, "again", &calls)
}

/// Calls have the same outcomes through a mirror as in a plain directory. `make` fills both and mounts `mountpoint`.
fn all_the_same(
    name: &str,
    make: fn(&Path) -> Result<(), Failed>,
    mountpoint: &str,
    calls: &[Calls<'_>],
) -> Result<(), Failed> {
    for way in WAYS {
        let pair = Pair::new(name, way, make)?;
        for calls in calls {
            pair.same(*calls)?;
        }
        pair.mirror.wait_for_releases()?;
        pair.mirror.stop_with(|| {
            unmount_soon(&pair.source.join(mountpoint))?;
            unmount_soon(&pair.plain.join(mountpoint))?;
            pair.backing.unmount_when_idle()
        })?;
    }
    Ok(())
}

fn unmount_soon(at: &Path) -> Result<(), Failed> {
    within(Duration::from_secs(10), "the mount is idle", || {
        Ok(unmount(at, UnmountFlags::NOFOLLOW).is_ok())
    })
}

/// Mounts one of a folder's files or folders on another, with these flags.
fn bind(folder: &Path, from: &str, to: &str, flags: MountFlags) -> Result<(), Failed> {
    let to = folder.join(to);
    mount_bind(folder.join(from), &to)?;
    if !flags.is_empty() {
        mount_remount(&to, MountFlags::BIND | flags, "")?;
    }
    Ok(())
}

/// What the table "read-only" needs, in `d`, which is mounted on `ro`.
fn read_only_folder(folder: &Path) -> Result<(), Failed> {
    let d = folder.join("d");
    fs::create_dir_all(d.join("folder"))?;
    fs::write(d.join("file"), "content")?;
    fs::write(d.join("folder/file"), "")?;
    rustix::fs::setxattr(d.join("file"), "user.a", b"a", XattrFlags::empty())?;
    symlink("file", d.join("link"))?;
    fs::create_dir(folder.join("ro"))?;
    bind(folder, "d", "ro", MountFlags::RDONLY)
}

fn single_file(folder: &Path) -> Result<(), Failed> {
    fs::write(folder.join("file"), "content")?;
    fs::write(folder.join("ro"), "")?;
    bind(folder, "file", "ro", MountFlags::RDONLY)
}

/// Copies a program with cp(1). If this process wrote it, a child of another test would inherit the fd between its fork
/// and its exec, and the program could not be run meanwhile.
fn copy_program(name: &str, to: &Path) -> Result<(), Failed> {
    let program = program::in_path(name).ok_or("there is no such program")?;
    let copied = Command::new("cp").arg(program).arg(to).status()?;
    assert!(copied.success(), "{copied}");
    Ok(())
}

fn noexec_folder(folder: &Path) -> Result<(), Failed> {
    fs::create_dir(folder.join("d"))?;
    copy_program("true", &folder.join("d/true"))?;
    copy_program("true", &folder.join("d/second"))?;
    fs::create_dir(folder.join("noexec"))?;
    bind(folder, "d", "noexec", MountFlags::NOEXEC)
}

fn nosuid_folder(folder: &Path) -> Result<(), Failed> {
    let id = folder.join("d/id");
    fs::create_dir(folder.join("d"))?;
    copy_program("id", &id)?;
    chown(&id, Some(1000), None)?;
    fs::set_permissions(&id, Permissions::from_mode(0o4755))?;
    fs::create_dir(folder.join("nosuid"))?;
    bind(
        folder,
        "d",
        "nosuid",
        MountFlags::NOSUID | MountFlags::NODEV,
    )
}

fn two_mounts(folder: &Path) -> Result<(), Failed> {
    fs::create_dir(folder.join("d"))?;
    fs::write(folder.join("d/file"), "content")?;
    fs::create_dir(folder.join("again"))?;
    bind(folder, "d", "again", MountFlags::empty())
}

/// Maps a file as executable, as ld.so(8) does, and returns the outcome.
#[allow(unsafe_code)]
fn map_to_run(args: &[String]) -> Result<String, Box<dyn Error>> {
    let file = File::open(&args[0])?;
    let access = ProtFlags::READ | ProtFlags::EXEC;
    // SAFETY: a new mapping, at an address that the kernel chooses. Nothing refers to it.
    let mapped = unsafe { mmap(null_mut(), 1, access, MapFlags::PRIVATE, file, 0) };
    Ok(describe(&mapped.map(|_| String::new())))
}

/// If the source is on a `noexec` and `nosymfollow` mount, so is the mirror's mount.
#[apply(test_case)]
fn mount_has_the_flags_of_the_source(name: &str) -> Result<(), Failed> {
    let forbids = MountFlags::NOEXEC | MountFlags::NOSYMFOLLOW;
    for (flags, expected) in [
        (MountFlags::empty(), [r#""content""#, "ok"]),
        (forbids, ["ELOOP", "EPERM"]),
    ] {
        let sandbox = Sandbox::new(name)?;
        let source = sandbox.folder("source")?;
        mount("tmpfs", &source, "tmpfs", flags, None)?;
        fs::write(source.join("file"), "content")?;
        symlink("file", source.join("link"))?;
        copy_program("true", &source.join("true"))?;
        let mirror = Mirror::start(&sandbox, &source, Way::Passthrough)?;
        for root in [&source, mirror.path()] {
            let followed = ask_all(root, &[("read", "link")], SECOND)?;
            let mapped = client::run("map-to-run", &[root.join("true").as_os_str()])?;
            assert_eq!([&followed[0], &mapped], expected);
        }
        mirror.wait_for_releases()?;
        mirror.stop_with(|| unmount_soon(&source))?;
    }
    Ok(())
}

#[apply(test_case)]
fn mounted_while_it_is_served(name: &str) -> Result<(), Failed> {
    for way in WAYS {
        let pair = Pair::new(name, way, |folder| {
            fs::create_dir(folder.join("d"))?;
            Ok(fs::write(folder.join("d/file"), "content")?)
        })?;
        let before = pair.same(("look", "", "ENOENT", 1))?;
        let mountpoints = [&pair.source, &pair.plain].map(|folder| folder.join("d"));
        for at in &mountpoints {
            mount(
                "tmpfs",
                at,
                "tmpfs",
                MountFlags::empty(),
                c"size=64k,mode=750",
            )?;
            fs::write(at.join("mounted"), "mounted")?;
        }
        let mounted = pair.same(("look", "", "ENOENT", 1))?;
        for at in &mountpoints {
            // Lazily, since the mirror has an fd of each file that the kernel remembers.
            unmount(at, UnmountFlags::DETACH)?;
        }
        let after = pair.same(("look", "", "ENOENT", 1))?;
        for ((before, mounted), after) in before.iter().zip(&mounted).zip(&after) {
            assert_ne!(before.plain, mounted.plain, "{}", before.call);
            assert_eq!(before.mirror, after.mirror, "{}", before.call);
        }
        pair.mirror.wait_for_releases()?;
        pair.mirror.stop(&pair.backing)?;
    }
    Ok(())
}

/// How a mirror's mount gets into its source.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Entry {
    Bind,
    BindRecursive,
    BindOfAFolder,
    /// By a mount in a peer of the source.
    Propagation,
}

#[apply(test_case)]
fn mirror_in_its_own_source(name: &str) -> Result<(), Failed> {
    for (entry, way) in [
        (Entry::Bind, Way::Passthrough),
        (Entry::Bind, Way::Plain),
        (Entry::BindRecursive, Way::Passthrough),
        (Entry::BindOfAFolder, Way::Passthrough),
        (Entry::Propagation, Way::Passthrough),
    ] {
        enter_itself(name, entry, way).map_err(|why| {
            let why = why.message().unwrap_or_default();
            format!("{entry:?}, {way:?}: {why}")
        })?;
    }
    Ok(())
}

fn enter_itself(name: &str, entry: Entry, way: Way) -> Result<(), Failed> {
    // After this time, the watchdog aborts a mirror that waits for itself.
    let sandbox = Sandbox::patient(name, 15 * SECOND)?;
    let backing = Backing::in_memory(&sandbox, "tmpfs")?;
    let folder = backing.folder("source")?;
    fs::create_dir_all(folder.join("other/deep"))?;
    fs::create_dir(folder.join("sub"))?;
    fs::write(folder.join("file"), "content")?;
    fs::write(folder.join("sub/file"), "content below")?;
    let (mut source, peer) = (folder.clone(), sandbox.folder("peer")?);
    if entry == Entry::Propagation {
        let shared = folder
            .parent()
            .ok_or("the source is in a filesystem of its own")?;
        mount_change(shared, MountPropagationFlags::SHARED)?;
        mount_bind(shared, &peer)?;
        source = peer.join("source");
    }
    let mirror = Mirror::start(&sandbox, &source, way)?;
    let outside = [("list", "other"), ("read", "file")];
    let inside = [
        ("stat", "sub"),
        ("list", "sub"),
        ("read", "sub/file"),
        ("list", "sub/sub"),
        ("stat", "sub/sub/sub/file"),
    ];
    let before = ask_all(
        mirror.path(),
        &[&outside[..], &inside[..3]].concat(),
        SECOND,
    )?;
    assert_eq!(before[4], r#""content below""#);

    let at = folder.join("sub");
    match entry {
        Entry::Bind | Entry::Propagation => mount_bind(mirror.path(), &at)?,
        Entry::BindRecursive => mount_bind_recursive(mirror.path(), &at)?,
        Entry::BindOfAFolder => mount_bind(mirror.path().join("other"), &at)?,
    }
    assert_eq!(ask_all(mirror.path(), &inside, SECOND)?, ["ELOOP"; 5]);
    assert_eq!(ask_all(mirror.path(), &outside, SECOND)?, before[..2]);

    let since = Instant::now();
    let find = Command::new("find").arg(mirror.path()).output()?;
    assert!(since.elapsed() < SECOND * patience_times());
    assert!(!find.status.success(), "the mount cannot be entered");
    let found = String::from_utf8(find.stdout)?;
    assert!(found.contains("other/deep"), "{found}");

    let since = Instant::now();
    let clients: Vec<_> = (0..40)
        .map(|_| Asked::start(mirror.path(), &inside))
        .collect::<Result<_, _>>()?;
    for mut client in clients {
        for _ in inside {
            assert_eq!(client.answer()?.0, "ELOOP");
        }
    }
    assert!(since.elapsed() < 10 * SECOND * patience_times());

    unmount_soon(&at)?;
    let again = ask_all(
        mirror.path(),
        &[&outside[..], &inside[..3]].concat(),
        SECOND,
    )?;
    assert_eq!(again, before);
    mirror.wait_for_releases()?;
    mirror.stop_with(|| {
        if entry == Entry::Propagation {
            unmount_soon(&peer)?;
        }
        backing.unmount_when_idle()
    })
}

/// Each of two mirrors is mounted in the other's source. Each level of a path takes threads of both.
#[apply(test_case)]
fn two_mirrors_in_each_other(name: &str) -> Result<(), Failed> {
    for way in WAYS {
        let sandbox = Sandbox::patient(name, 20 * SECOND)?;
        let backing = Backing::in_memory(&sandbox, "tmpfs")?;
        let source = backing.folder("source")?;
        fs::create_dir(source.join("sub"))?;
        fs::write(source.join("file"), "content")?;
        let outer = Mirror::start(&sandbox, &source, way)?;
        let command = Command::new(program::example("mirror")?);
        let at = source.join("sub");
        let inner = Mirror::spawn_at(&at, command, &sandbox, outer.path(), way)?;

        let levels = (1..=8).chain([20, 40]);
        let levels: Vec<_> = levels.map(|level| vec!["sub"; level].join("/")).collect();
        let calls: Vec<_> = levels
            .iter()
            .map(|level| ("list", level.as_str()))
            .collect();
        let since = Instant::now();
        let asked = ask_all(outer.path(), &calls, 10 * SECOND)?;
        // The longest path takes more threads than there are: the last thread refuses instead of waiting.
        assert_eq!(asked.last().map(String::as_str), Some("EBUSY"));
        ask_all(inner.path(), &calls[..3], 10 * SECOND)?;
        assert!(since.elapsed() < 10 * SECOND * patience_times());
        for mirror in [&outer, &inner] {
            let listed = ask_all(mirror.path(), &[("list", ""), ("read", "file")], SECOND)?;
            assert_eq!(
                listed,
                [
                    "[. Directory, .. Directory, file RegularFile, sub Directory]",
                    r#""content""#
                ]
            );
        }
        // Each holds files of the other's mount, so each reports that its mount is in use.
        for mirror in [inner, outer] {
            mirror.signal(Signal::TERM)?;
            mirror.wait_for_end()?;
        }
        backing.unmount_when_idle()?;
    }
    Ok(())
}

/// Passes `--depth` to the mirror, if it is given.
fn start_with_depth(
    sandbox: &Sandbox,
    source: &Path,
    depth: Option<&str>,
) -> Result<Mirror, Failed> {
    let args: Vec<_> = depth.iter().flat_map(|depth| ["--depth", *depth]).collect();
    Mirror::start_with(sandbox, source, Way::Passthrough, &args)
}

/// Mounts overlayfs with `lower` as its lower layer.
fn overlay(
    sandbox: &Sandbox,
    backing: &Backing,
    lower: &Path,
) -> Result<Result<PathBuf, Errno>, Failed> {
    let (upper, work) = (backing.folder("upper")?, backing.folder("work")?);
    let merged = sandbox.folder("merged")?;
    let options = [
        ("lowerdir=", lower),
        (",upperdir=", &upper),
        (",workdir=", &work),
    ];
    let options = options.map(|(option, path)| format!("{option}{}", path.display()));
    let options = CString::new(options.concat())?;
    let mounted = mount(
        "overlay",
        &merged,
        "overlay",
        MountFlags::empty(),
        &*options,
    );
    Ok(mounted.map(|()| merged))
}

/// A mirror can be a lower layer of overlayfs only with `--depth 1`. Otherwise mounting the overlay fails.
#[apply(test_case)]
fn mirror_below_an_overlay(name: &str) -> Result<(), Failed> {
    for (depth, mounts) in [(None, false), (Some("2"), false), (Some("1"), true)] {
        let sandbox = Sandbox::new(name)?;
        let backing = Backing::in_memory(&sandbox, "tmpfs")?;
        let source = backing.folder("source")?;
        fs::write(source.join("file"), "content")?;
        let mirror = start_with_depth(&sandbox, &source, depth)?;
        match overlay(&sandbox, &backing, mirror.path())? {
            Err(errno) => assert_eq!((errno, mounts), (Errno::INVAL, false)),
            Ok(merged) => {
                assert!(mounts);
                let calls = [("read", "file"), ("truncate", "file"), ("read", "file")];
                let outcomes = ask_all(&merged, &calls, SECOND)?;
                assert_eq!(outcomes, [r#""content""#, "ok", r#""con""#]);
                assert_eq!(fs::read_to_string(source.join("file"))?, "content");
                unmount_soon(&merged)?;
            }
        }
        mirror.wait_for_releases()?;
        mirror.stop(&backing)?;
    }
    Ok(())
}

/// With `--depth 1`, files that are on overlayfs are served without passthrough.
#[apply(test_case)]
fn mirror_on_an_overlay(name: &str) -> Result<(), Failed> {
    for (depth, without_passthrough) in [(None, false), (Some("1"), true)] {
        let sandbox = Sandbox::new(name)?;
        let backing = Backing::in_memory(&sandbox, "tmpfs")?;
        let lower = backing.folder("lower")?;
        fs::write(lower.join("file"), "content")?;
        let source = overlay(&sandbox, &backing, &lower)??;
        let mirror = start_with_depth(&sandbox, &source, depth)?;
        let calls = [("read", "file"), ("write", "file"), ("read", "file")];
        let outcomes = ask_all(mirror.path(), &calls, SECOND)?;
        assert_eq!(outcomes, [r#""content""#, "ok", r#""written""#]);
        mirror.wait_for_releases()?;
        mirror.stop_saying(without_passthrough, || {
            unmount_soon(&source)?;
            backing.unmount_when_idle()
        })?;
    }
    Ok(())
}
