//! A change through the mirror leaves a file's set-user-ID and set-group-ID bits, and its `security.capability`, as the
//! same change in a plain directory does.
//!
//! The control is the same mirror with all of root's rights, [`Mirror::start_with_all_rights`]: a server that
//! negotiates `HANDLE_KILLPRIV_V2` but does not clear the bits. It shows that the tests notice bits that stay.

#![allow(unsafe_code)]

use std::error::Error;
use std::ffi::OsStr;
use std::fs::{self, Permissions};
use std::os::fd::OwnedFd;
use std::os::unix::fs::{FileExt, MetadataExt, PermissionsExt, chown};
use std::path::Path;
use std::ptr::null_mut;

use libtest_mimic::Failed;
use macro_rules_attribute::apply;
use rustix::fs::{FallocateFlags, Mode, OFlags, XattrFlags};
use rustix::io::Errno;
use rustix::mm::{MapFlags, MsyncFlags, ProtFlags, mmap, msync, munmap};
use rustix::pipe::{PipeFlags, SpliceFlags};
use rustix::thread::{CapabilitySet, capabilities, set_capabilities};

use crate::backing::Backing;
use crate::calls::{GROUP, MASK, NAMED_USER, OTHERS, OWNER, UNDEFINED_ID, acl};
use crate::client::{self, Client, Role, wait_for_parent};
use crate::ext4::{self, Ext4};
use crate::place::describe;
use crate::sandbox::{Sandbox, unmount_when_idle};
use crate::server::{Mirror, Way};
use crate::thread::become_user;

pub const ROLES: &[(&str, Role)] = &[
    ("change-all", change_all),
    ("write-twice", write_twice),
    ("set", set),
    ("set-acl", set_acl),
    ("write-pages", write_pages),
];

/// The owner of the files, and their group.
pub const OWNER_ID: u32 = 1000;

/// A user that changes files, by a name that is passed to a child. The user's group has the same id.
struct Writer {
    name: &'static str,
    id: u32,
    groups: &'static [u32],
    has_fsetid: bool,
}

const WRITERS: &[Writer] = &[
    Writer {
        name: "owner",
        id: OWNER_ID,
        groups: &[],
        has_fsetid: false,
    },
    Writer {
        name: "stranger",
        id: 1001,
        groups: &[],
        has_fsetid: false,
    },
    Writer {
        name: "member",
        id: 1002,
        groups: &[OWNER_ID],
        has_fsetid: false,
    },
    Writer {
        name: "root",
        id: 0,
        groups: &[],
        has_fsetid: true,
    },
    Writer {
        name: "root-without-fsetid",
        id: 0,
        groups: &[],
        has_fsetid: false,
    },
];

/// Gives this thread the writer's ids, groups and capabilities.
pub fn become_writer(name: &str) -> Result<(), Box<dyn Error>> {
    let writer = WRITERS.iter().find(|writer| writer.name == name);
    let writer = writer.ok_or("there is no such writer")?;
    become_user(writer.id, writer.groups)?;
    if writer.id == 0 && !writer.has_fsetid {
        let mut sets = capabilities(None)?;
        sets.effective.remove(CapabilitySet::FSETID);
        set_capabilities(None, sets)?;
    }
    Ok(())
}

struct File {
    name: &'static str,
    mode: u32,
    capable: bool,
}

const FILES: &[File] = &[
    File {
        name: "both",
        mode: 0o6777,
        capable: false,
    },
    // Only the owner and root can write it.
    File {
        name: "setuid",
        mode: 0o4755,
        capable: false,
    },
    // Set-group-ID without group execute, which once meant mandatory locks. It stays when a member of the group writes.
    File {
        name: "locking",
        mode: 0o2767,
        capable: false,
    },
    File {
        name: "capable",
        mode: 0o777,
        capable: true,
    },
];

const CAPABILITY: &str = "security.capability";

/// `struct vfs_cap_data` of revision 2: CAP_NET_RAW, permitted and effective.
const CAP_NET_RAW: [u8; 20] = {
    let mut data = [0; 20];
    data[0] = 1;
    data[3] = 2;
    data[5] = 1 << 5;
    data
};

const SIZE: usize = 8192;

impl File {
    fn make(&self, path: &Path) -> Result<(), Failed> {
        fs::write(path, [b'x'; SIZE])?;
        chown(path, Some(OWNER_ID), Some(OWNER_ID))?;
        fs::set_permissions(path, Permissions::from_mode(self.mode))?;
        if self.capable {
            set_capability(path)?;
        }
        Ok(())
    }

    /// The name of the copy that is changed in this way.
    fn changed(&self, way: &str) -> String {
        format!("{}.{way}", self.name)
    }
}

fn set_capability(path: &Path) -> rustix::io::Result<()> {
    rustix::fs::setxattr(path, CAPABILITY, &CAP_NET_RAW, XattrFlags::empty())
}

/// What these tests compare: the mode, and whether the file has capabilities.
fn bits(path: &Path) -> Result<String, Failed> {
    let mode = fs::metadata(path)?.mode() & 0o7777;
    match rustix::fs::getxattr(path, CAPABILITY, &mut [0; 64][..]) {
        Ok(_) => Ok(format!("{mode:o} capable")),
        Err(Errno::NODATA) => Ok(format!("{mode:o}")),
        Err(errno) => Err(errno.into()),
    }
}

/// A way to change the data of the file at the first path. The second path is of a file to copy from.
type Change = fn(&Path, &Path) -> rustix::io::Result<()>;

const CHANGES: &[(&str, Change)] = &[
    ("write", |path, _| {
        let file = open(path, OFlags::WRONLY)?;
        rustix::io::pwrite(&file, b"changed", 0).map(drop)
    }),
    ("append", |path, _| {
        let file = open(path, OFlags::WRONLY | OFlags::APPEND)?;
        rustix::io::write(&file, b"changed").map(drop)
    }),
    ("write-direct", |path, _| {
        let file = open(path, OFlags::WRONLY | OFlags::DIRECT)?;
        rustix::io::pwrite(&file, &Aligned([b'c'; 4096]).0, 0).map(drop)
    }),
    ("splice", |path, _| {
        let file = open(path, OFlags::WRONLY)?;
        let (output, input) = rustix::pipe::pipe_with(PipeFlags::CLOEXEC)?;
        rustix::io::write(&input, b"changed")?;
        rustix::pipe::splice(&output, None, &file, None, 7, SpliceFlags::empty()).map(drop)
    }),
    ("map", |path, _| {
        let file = open(path, OFlags::RDWR)?;
        write_mapped(&file)
    }),
    ("truncate", |path, _| {
        nix::unistd::truncate(path, 100).map_err(|errno| Errno::from_raw_os_error(errno as i32))
    }),
    ("ftruncate", |path, _| {
        let file = open(path, OFlags::WRONLY)?;
        rustix::fs::ftruncate(&file, 100)
    }),
    ("open-truncating", |path, _| {
        open(path, OFlags::WRONLY | OFlags::TRUNC).map(drop)
    }),
    ("fallocate", |path, _| {
        let file = open(path, OFlags::WRONLY)?;
        rustix::fs::fallocate(&file, FallocateFlags::empty(), 0, 2 * SIZE as u64)
    }),
    ("punch", |path, _| {
        let file = open(path, OFlags::WRONLY)?;
        let mode = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
        rustix::fs::fallocate(&file, mode, 0, 4096)
    }),
    ("copy_file_range", |path, from| {
        let (from, file) = (open(from, OFlags::RDONLY)?, open(path, OFlags::WRONLY)?);
        let copied = rustix::fs::copy_file_range(&from, None, &file, None, SIZE)?;
        assert_eq!(copied, SIZE);
        Ok(())
    }),
];

/// Memory aligned as `O_DIRECT` demands.
#[repr(align(4096))]
struct Aligned([u8; 4096]);

fn open(path: &Path, flags: OFlags) -> rustix::io::Result<OwnedFd> {
    rustix::fs::open(path, flags | OFlags::CLOEXEC, Mode::empty())
}

fn write_mapped(file: &OwnedFd) -> rustix::io::Result<()> {
    let access = ProtFlags::READ | ProtFlags::WRITE;
    // SAFETY: a new mapping, at an address that the kernel chooses.
    let at = unsafe { mmap(null_mut(), SIZE, access, MapFlags::SHARED, file, 0) }?;
    // SAFETY: the mapping and the file have `SIZE` bytes, and nothing else uses the mapping.
    unsafe { at.cast::<u8>().write(b'c') };
    // SAFETY: `SIZE` bytes are mapped at `at`.
    unsafe { msync(at, SIZE, MsyncFlags::SYNC) }?;
    // SAFETY: nothing refers to the mapping.
    unsafe { munmap(at, SIZE) }
}

/// Arguments: a folder and a writer. Changes each file in the way that its name says, and prints what the call
/// returned and the file's bits after it.
fn change_all(args: &[String]) -> Result<String, Box<dyn Error>> {
    let folder = Path::new(&args[0]);
    become_writer(&args[1])?;
    for file in FILES {
        for (way, change) in CHANGES {
            let path = folder.join(file.changed(way));
            let outcome = change(&path, &folder.join("from")).map(|()| String::new());
            println!("{} {}", describe(&outcome), for_role(bits(&path))?);
        }
    }
    Ok("done".into())
}

/// Turns the error into one that a role can return.
fn for_role<T>(result: Result<T, Failed>) -> Result<T, String> {
    result.map_err(|failed| failed.message().unwrap_or_default().to_owned())
}

/// The outcome of one way to change a file, for one writer.
struct Outcome {
    writer: &'static str,
    file: &'static str,
    way: &'static str,
    /// What the call returned, and the bits after it.
    outcome: String,
}

/// Has clients change files in `place`, whose files are in `backing`.
fn change_everything(place: &Path, backing: &Path) -> Result<Vec<Outcome>, Failed> {
    let mut outcomes = Vec::new();
    for writer in WRITERS.iter().map(|writer| writer.name) {
        let folder = backing.join(writer);
        fs::create_dir(&folder)?;
        fs::write(folder.join("from"), [b'y'; SIZE])?;
        for file in FILES {
            for (way, _) in CHANGES {
                file.make(&folder.join(file.changed(way)))?;
            }
        }
        let place = place.join(writer);
        let mut client = Client::start("change-all", &[place.as_os_str(), OsStr::new(writer)])?;
        for file in FILES {
            for (way, _) in CHANGES {
                let outcome = client.line()?;
                let bits = bits(&folder.join(file.changed(way)))?;
                // The client sees the same bits.
                let (_errno, seen) = outcome.split_once(' ').ok_or(outcome.clone())?;
                assert_eq!(seen, bits, "{writer} {} {way}", file.name);
                outcomes.push(Outcome {
                    writer,
                    file: file.name,
                    way,
                    outcome,
                });
            }
        }
        assert_eq!(client.finish()?, "done");
    }
    Ok(outcomes)
}

/// A known difference between a mirror and a plain directory.
struct Difference {
    writers: &'static [&'static str],
    /// A file's name, its outcome in a plain directory, and its outcome on the mirror.
    files: &'static [(&'static str, &'static str, &'static str)],
    ways: &'static [&'static [&'static str]],
}

const PASSED_THROUGH: &[&str] = &["write", "append", "write-direct", "splice"];
const SERVED: &[&str] = &[
    "truncate",
    "ftruncate",
    "open-truncating",
    "fallocate",
    "punch",
    "copy_file_range",
];

const OF_PASSTHROUGH: &[Difference] = &[
    // Passthrough writes as nobody, without CAP_FSETID: root's writes clear the bits.
    Difference {
        writers: &["root"],
        files: &[
            ("both", "ok 6777", "ok 777"),
            ("setuid", "ok 4755", "ok 755"),
        ],
        ways: &[PASSED_THROUGH],
    },
    // Passthrough writes as a member of no group: every write clears this bit.
    Difference {
        writers: &["owner", "member", "root"],
        files: &[("locking", "ok 2767", "ok 767")],
        ways: &[PASSED_THROUGH],
    },
    // The server takes on a client's user and group, but not its supplementary groups.
    Difference {
        writers: &["member"],
        files: &[("locking", "ok 2767", "ok 767")],
        ways: &[SERVED],
    },
];

const OF_PLAIN_FUSE: &[Difference] = &[
    // The server does not take on a client's supplementary groups.
    Difference {
        writers: &["member"],
        files: &[("locking", "ok 2767", "ok 767")],
        ways: &[PASSED_THROUGH, SERVED],
    },
    // The server writes the pages of a mapping with write(2), which removes capabilities.
    Difference {
        writers: EVERYBODY,
        files: &[("capable", "ok 777 capable", "ok 777")],
        ways: &[&["map"]],
    },
];

const EVERYBODY: &[&str] = &["owner", "stranger", "member", "root", "root-without-fsetid"];

/// Every bit that a plain directory clears stays, in each way to change the file. Capabilities are removed by every
/// write(2), with any rights.
const OF_ALL_RIGHTS: &[Difference] = &[Difference {
    writers: EVERYBODY,
    files: STAYING,
    ways: &[PASSED_THROUGH, SERVED],
}];

const STAYING: &[(&str, &str, &str)] = &[
    ("both", "ok 777", "ok 6777"),
    ("setuid", "ok 755", "ok 4755"),
    ("locking", "ok 767", "ok 2767"),
];

struct Server {
    name: &'static str,
    start: fn(&Sandbox, &Path) -> Result<Mirror, Failed>,
    needs_passthrough: bool,
    differences: &'static [Difference],
}

const SERVERS: &[Server] = &[
    Server {
        name: "passthrough",
        start: |sandbox, source| Mirror::start(sandbox, source, Way::Passthrough),
        needs_passthrough: true,
        differences: OF_PASSTHROUGH,
    },
    Server {
        name: "asking",
        start: Mirror::start_asking,
        needs_passthrough: true,
        differences: OF_PASSTHROUGH,
    },
    Server {
        name: "plain FUSE",
        start: |sandbox, source| Mirror::start(sandbox, source, Way::Plain),
        needs_passthrough: false,
        differences: OF_PLAIN_FUSE,
    },
    // The control.
    Server {
        name: "all rights",
        start: |sandbox, source| Mirror::start_with_all_rights(sandbox, source, Way::Passthrough),
        needs_passthrough: true,
        differences: OF_ALL_RIGHTS,
    },
];

/// Fails for every unknown difference, and for every known one that does not show.
fn compare(
    what: &str,
    native: &[Outcome],
    mirror: &[Outcome],
    known: &[Difference],
) -> Result<(), Failed> {
    assert_eq!(native.len(), mirror.len());
    let mut wrong = Vec::new();
    for (native, mirror) in native.iter().zip(mirror) {
        let (writer, file, way) = (native.writer, native.file, native.way);
        assert_eq!(
            (writer, file, way),
            (mirror.writer, mirror.file, mirror.way)
        );
        let known = known
            .iter()
            .filter(|known| known.writers.contains(&writer) && known.ways.concat().contains(&way))
            .flat_map(|known| known.files)
            .find(|(of, plain, _)| *of == file && *plain == native.outcome);
        let expected = known.map_or(native.outcome.as_str(), |(_, _, mirror)| mirror);
        if mirror.outcome != expected {
            let (native, mirror) = (&native.outcome, &mirror.outcome);
            wrong.push(format!(
                "{writer} {file} {way}: native {native}, mirror {mirror}, expected {expected}"
            ));
        }
    }
    if wrong.is_empty() {
        Ok(())
    } else {
        let (count, all) = (wrong.len(), native.len());
        Err(format!("{what}: {count} of {all}:\n{}", wrong.join("\n")).into())
    }
}

#[apply(test_case)]
fn changes_on_tmpfs(name: &str) -> Result<(), Failed> {
    let sandbox = Sandbox::new(name)?;
    let backing = Backing::in_memory(&sandbox, "tmpfs")?;
    changes(&sandbox, &backing.folder("all")?)?;
    backing.unmount_when_idle()
}

#[apply(test_case)]
fn changes_on_ext4(name: &str) -> Result<(), Failed> {
    if !ext4::is_supported()? {
        return Ok(());
    }
    let sandbox = Sandbox::new(name)?;
    let backing = Ext4::new(&sandbox, 16 << 20, &[])?;
    changes(&sandbox, backing.path())?;
    unmount_when_idle(backing.path())
}

fn changes(sandbox: &Sandbox, backing: &Path) -> Result<(), Failed> {
    let plain = backing.join("plain");
    fs::create_dir(&plain)?;
    let native = change_everything(&plain, &plain)?;
    // The control: without a mirror, a stranger's write clears the bits.
    let written = native.iter().find(|outcome| outcome.writer == "stranger");
    assert_eq!(written.map(|write| write.outcome.as_str()), Some("ok 777"));

    for server in SERVERS {
        if server.needs_passthrough && !Way::Passthrough.is_passthrough()? {
            continue;
        }
        let source = backing.join(server.name);
        fs::create_dir(&source)?;
        let mirror = (server.start)(sandbox, &source)?;
        let outcomes = change_everything(mirror.path(), &source)?;
        compare(server.name, &native, &outcomes, server.differences)?;
        mirror.wait_for_releases()?;
        mirror.stop_with(|| Ok(()))?;
    }
    Ok(())
}

/// As a stranger, opens a file and writes to it, and writes once more when told to.
fn write_twice(args: &[String]) -> Result<String, Box<dyn Error>> {
    become_writer("stranger")?;
    let file = fs::File::options().write(true).open(&args[0])?;
    file.write_all_at(b"first", 0)?;
    println!("written");
    wait_for_parent()?;
    file.write_all_at(b"second", 0)?;
    Ok("written".into())
}

/// Gives a file something that the next write must clear: for `mode`, set-user-ID and set-group-ID bits, as its owner;
/// for `capability`, capabilities.
fn set(args: &[String]) -> Result<String, Box<dyn Error>> {
    let path = Path::new(&args[0]);
    if args[1] == "mode" {
        become_writer("owner")?;
        fs::set_permissions(path, Permissions::from_mode(0o6777))?;
    } else {
        set_capability(path)?;
    }
    Ok("set".into())
}

/// The bits that are left after a stranger has written twice in the folder `written`. Between the two writes, `what` is
/// set through the folder `set`.
fn written_after_set(
    written: &Path,
    set: &Path,
    backing: &Path,
    what: &str,
) -> Result<String, Failed> {
    let file = File {
        name: "file",
        mode: 0o777,
        capable: false,
    };
    file.make(&backing.join(file.name))?;
    let path = written.join(file.name);
    let mut stranger = Client::start("write-twice", &[path.as_os_str()])?;
    assert_eq!(stranger.line()?, "written");
    let path = set.join(file.name);
    let done = client::run("set", &[path.as_os_str(), OsStr::new(what)])?;
    assert_eq!(done, "set");
    let path = backing.join(file.name);
    assert_ne!(bits(&path)?, "777", "{what} is set");
    stranger.proceed()?;
    assert_eq!(stranger.finish()?, "written");
    let left = bits(&path)?;
    fs::remove_file(&path)?;
    Ok(left)
}

#[apply(test_case)]
fn bits_set_between_two_writes_are_cleared(name: &str) -> Result<(), Failed> {
    let sandbox = Sandbox::new(name)?;
    let backing = Backing::in_memory(&sandbox, "tmpfs")?;
    let folder = backing.folder("folder")?;
    for what in ["mode", "capability"] {
        assert_eq!(written_after_set(&folder, &folder, &folder, what)?, "777");
    }
    for way in [Way::Passthrough, Way::Plain] {
        let mirror = Mirror::start(&sandbox, &folder, way)?;
        for set in [&folder, mirror.path()] {
            for what in ["mode", "capability"] {
                let left = written_after_set(mirror.path(), set, &folder, what)?;
                assert_eq!(left, "777", "{way:?}, {what} set in {}", set.display());
            }
        }
        mirror.wait_for_releases()?;
        mirror.stop_with(|| Ok(()))?;
    }
    if Way::Passthrough.is_passthrough()? {
        let control = Mirror::start_with_all_rights(&sandbox, &folder, Way::Passthrough)?;
        for set in [&folder, control.path()] {
            let left = written_after_set(control.path(), set, &folder, "mode")?;
            assert_eq!(left, "6777");
        }
        control.wait_for_releases()?;
        control.stop_with(|| Ok(()))?;
    }
    backing.unmount_when_idle()
}

/// Sets the access ACLs of two files: `minimal` gets one that equals a mode, `extended` one with a named user.
/// Arguments: a folder, the id of the user that sets the ACLs, and the id of a group that the user is in.
fn set_acl(args: &[String]) -> Result<String, Box<dyn Error>> {
    let [folder, user, group] = args else {
        return Err("a folder, a user and a group".into());
    };
    become_user(user.parse()?, &[group.parse()?])?;
    let minimal = acl(&[
        (OWNER, 7, UNDEFINED_ID),
        (GROUP, 7, UNDEFINED_ID),
        (OTHERS, 5, UNDEFINED_ID),
    ]);
    let extended = acl(&[
        (OWNER, 7, UNDEFINED_ID),
        (NAMED_USER, 6, 1001),
        (GROUP, 7, UNDEFINED_ID),
        (MASK, 7, UNDEFINED_ID),
        (OTHERS, 5, UNDEFINED_ID),
    ]);
    for (file, acl) in [("minimal", minimal), ("extended", extended)] {
        let path = Path::new(folder).join(file);
        let name = "system.posix_acl_access";
        rustix::fs::setxattr(&path, name, &acl, XattrFlags::empty())?;
    }
    Ok("set".into())
}

/// The modes of two set-group-ID files of group 2000 after `user` has set their ACLs in `place`. `group` is the user's
/// supplementary group.
fn modes_after_acl(
    place: &Path,
    backing: &Path,
    user: u32,
    group: u32,
) -> Result<[u32; 2], Failed> {
    let files = ["minimal", "extended"].map(|file| backing.join(file));
    for file in &files {
        fs::write(file, "")?;
        chown(file, Some(OWNER_ID), Some(2000))?;
        fs::set_permissions(file, Permissions::from_mode(0o2775))?;
    }
    let (user, group) = (user.to_string(), group.to_string());
    let args = [place.as_os_str(), OsStr::new(&user), OsStr::new(&group)];
    assert_eq!(client::run("set-acl", &args)?, "set");
    let mut modes = [0; 2];
    for (file, mode) in files.iter().zip(&mut modes) {
        *mode = fs::metadata(file)?.mode() & 0o7777;
        fs::remove_file(file)?;
    }
    Ok(modes)
}

#[apply(test_case)]
fn acl_set_outside_the_group_clears_setgid(name: &str) -> Result<(), Failed> {
    let sandbox = Sandbox::new(name)?;
    let backing = Backing::in_memory(&sandbox, "tmpfs")?;
    let folder = backing.folder("folder")?;
    // A user, the user's supplementary group, and the mode that is left.
    let expected = [
        (OWNER_ID, 3000, 0o775),
        (OWNER_ID, 2000, 0o2775),
        (0, 3000, 0o2775),
    ];
    for (user, group, mode) in expected {
        let modes = modes_after_acl(&folder, &folder, user, group)?;
        assert_eq!(modes, [mode; 2], "{user} in {group}");
    }
    for way in [Way::Passthrough, Way::Plain] {
        let mirror = Mirror::start(&sandbox, &folder, way)?;
        for (user, group, mode) in expected {
            let modes = modes_after_acl(mirror.path(), &folder, user, group)?;
            assert_eq!(modes, [mode; 2], "{way:?}, {user} in {group}");
        }
        mirror.stop_with(|| Ok(()))?;
    }
    let control = Mirror::start_with_all_rights(&sandbox, &folder, Way::Passthrough)?;
    let modes = modes_after_acl(control.path(), &folder, OWNER_ID, 3000)?;
    assert_eq!(modes, [0o2775; 2]);
    control.stop_with(|| Ok(()))?;
    backing.unmount_when_idle()
}

const PAGES: u64 = 1000;
const PAGE: u64 = 4096;
/// The most requests that are neither a WRITE nor a GETXATTR for each write: the first write's GETXATTR, and those that
/// other processes or a slow machine cause, for example a GETATTR of the root by a program that lists mounts.
const OTHER_REQUESTS: u64 = 10;

/// Opens a file, prints so, and then writes each of its pages once, out of order.
fn write_pages(args: &[String]) -> Result<String, Box<dyn Error>> {
    become_writer("stranger")?;
    let file = fs::File::options().write(true).open(&args[0])?;
    println!("open");
    wait_for_parent()?;
    for i in 0..PAGES {
        // Every page comes once: 617 and `PAGES` have no common divisor.
        let page = i * 617 % PAGES;
        file.write_all_at(&[b'y'; PAGE as usize], page * PAGE)?;
    }
    println!("written");
    wait_for_parent()?;
    Ok("done".into())
}

/// The number of requests that a mirror gets while a client writes all pages.
fn requests(mirror: &Mirror, source: &Path) -> Result<u64, Failed> {
    let file = source.join("file");
    fs::write(&file, vec![b'x'; (PAGES * PAGE) as usize])?;
    fs::set_permissions(&file, Permissions::from_mode(0o666))?;
    let path = mirror.path().join("file");
    let mut client = Client::start("write-pages", &[path.as_os_str()])?;
    assert_eq!(client.line()?, "open");
    let before = mirror.reads()?;
    client.proceed()?;
    assert_eq!(client.line()?, "written");
    let requests = mirror.reads()? - before;
    client.proceed()?;
    assert_eq!(client.finish()?, "done");
    Ok(requests)
}

/// The kernel does not ask for `security.capability`, by GETXATTR. The mirror's read(2) calls count its requests: it
/// reads one request at a time, and nothing else.
#[apply(test_case)]
fn server_is_not_asked_before_a_write(name: &str) -> Result<(), Failed> {
    let sandbox = Sandbox::new(name)?;
    let backing = Backing::in_memory(&sandbox, "tmpfs")?;
    let source = backing.folder("source")?;
    // The number of requests beyond the `sent` WRITE requests that the server must get.
    let more = |mirror: Mirror, sent: u64| -> Result<u64, Failed> {
        let requests = requests(&mirror, &source)?;
        mirror.wait_for_releases()?;
        mirror.stop_with(|| Ok(()))?;
        assert!(requests >= sent, "{requests} requests");
        Ok(requests - sent)
    };
    let asked = more(Mirror::start(&sandbox, &source, Way::Plain)?, PAGES)?;
    assert!(asked <= OTHER_REQUESTS, "{asked} requests");
    if Way::Passthrough.is_passthrough()? {
        let asked = more(Mirror::start(&sandbox, &source, Way::Passthrough)?, 0)?;
        assert!(asked <= OTHER_REQUESTS, "{asked} requests");
        // The control.
        let asked = more(Mirror::start_asking(&sandbox, &source)?, 0)?;
        assert!(asked >= PAGES, "{asked} requests");
    }
    backing.unmount_when_idle()
}
