//! Clients' reads and writes through a registration, and the failures that the crate and its documentation describe.

use std::ffi::OsStr;
use std::fs::{self, File};
use std::io::{Read, Seek, SeekFrom, Write};
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::path::Path;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, OnceLock};

use fuse_backing::error::ServerReason;
use fuse_backing::{
    Access, BackingFile, BackingId, BackingTable, FopenFlags, FuseDevice, OpenFile, OpenReply,
    ServerFile, error::Errno, uapi,
};
use libtest_mimic::Failed;
use macro_rules_attribute::apply;
use rustix::fs::{Mode, OFlags, open};

use crate::client::{self, Client, Role, errno, errno_of, wait_for_parent};
use crate::fuse::{Connection, Init, Node, OpenAnswer, unchecked};
use crate::sandbox::{Sandbox, Tmpfs};

pub const ROLES: &[(&str, Role)] = &[
    ("read", read),
    ("overwrite", overwrite),
    ("overwrite-bytewise", overwrite_bytewise),
    ("hold", hold),
    ("hold-and-map", hold_and_map),
];

const CONTENT: &str = "what the backing file says";

/// Reads the file. Prints the content, or the errno.
fn read(args: &[String]) -> Result<String, Box<dyn std::error::Error>> {
    Ok(match fs::read_to_string(&args[0]) {
        Ok(content) => content,
        Err(error) => errno_of(&error),
    })
}

/// Opens for reading and writing, and writes.
fn overwrite(args: &[String]) -> Result<String, Box<dyn std::error::Error>> {
    let opened = File::options().read(true).write(true).open(&args[0]);
    Ok(
        match opened.and_then(|mut file| file.write_all(args[1].as_bytes())) {
            Ok(()) => "written".into(),
            Err(error) => errno_of(&error),
        },
    )
}

/// Writes each byte with a write(2) of its own.
fn overwrite_bytewise(args: &[String]) -> Result<String, Box<dyn std::error::Error>> {
    let mut file = File::options().write(true).open(&args[0])?;
    for byte in args[1].as_bytes() {
        file.write_all(&[*byte])?;
    }
    Ok("written".into())
}

/// Opens, prints "open", waits, and reads.
fn hold(args: &[String]) -> Result<String, Box<dyn std::error::Error>> {
    let mut file = match File::open(&args[0]) {
        Ok(file) => file,
        Err(error) => return Ok(errno_of(&error)),
    };
    println!("open");
    wait_for_parent()?;
    let mut content = String::new();
    file.seek(SeekFrom::Start(0))?;
    file.read_to_string(&mut content)?;
    Ok(content)
}

/// Opens, prints "open", waits, maps the file `MAP_SHARED` and unmaps it, prints the result, waits, and reads.
#[allow(unsafe_code)]
fn hold_and_map(args: &[String]) -> Result<String, Box<dyn std::error::Error>> {
    let mut file = File::open(&args[0])?;
    println!("open");
    wait_for_parent()?;
    // SAFETY: a new mapping, of which nothing is read.
    let mapped = unsafe {
        libc::mmap(
            std::ptr::null_mut(),
            CONTENT.len(),
            libc::PROT_READ,
            libc::MAP_SHARED,
            file.as_raw_fd(),
            0,
        )
    };
    if mapped == libc::MAP_FAILED {
        println!("{}", errno_of(&std::io::Error::last_os_error()));
    } else {
        // SAFETY: the mapping above, to which nothing refers.
        let unmapped = unsafe { libc::munmap(mapped, CONTENT.len()) };
        println!("mapped, unmapped: {unmapped}");
    }
    wait_for_parent()?;
    let mut content = String::new();
    file.read_to_string(&mut content)?;
    Ok(content)
}

type Device = FuseDevice<Arc<OwnedFd>>;
type Answer = dyn Fn(&Device, u64, i32) -> OpenAnswer + Send + Sync;

/// Mounts one file, whose backing file on `tmpfs` has `CONTENT`.
fn serve(sandbox: &Sandbox, tmpfs: &Tmpfs, answer: Arc<Answer>) -> Result<Connection, Failed> {
    serve_with(sandbox, tmpfs, Init::passthrough(1), answer)
}

fn serve_with(
    sandbox: &Sandbox,
    tmpfs: &Tmpfs,
    init: Init,
    answer: Arc<Answer>,
) -> Result<Connection, Failed> {
    // The server's closure is made before the device, which is set later.
    let late: Arc<OnceLock<Device>> = Arc::default();
    let device = Arc::clone(&late);
    let handles = AtomicU64::new(1);
    let on_open = move |_, flags| {
        let device = device.get().ok_or(Errno::IO)?;
        answer(device, handles.fetch_add(1, Ordering::Relaxed), flags)
    };
    let node = Node {
        name: "file".into(),
        backing: tmpfs.file("file", CONTENT)?,
    };
    let connection = Connection::serve(sandbox, init, vec![node], Arc::new(on_open))?;
    late.set(connection.device()).map_err(|_| "set twice")?;
    Ok(connection)
}

/// Registers a file at the first OPEN, for good. `reply` makes the flags and the id of each answer.
fn registered(
    path: &Path,
    flags: OFlags,
    reply: impl Fn(i32, i32) -> Result<(u32, i32), Errno> + Send + Sync + 'static,
) -> Arc<Answer> {
    let path = path.to_owned();
    let id: Mutex<Option<i32>> = Mutex::default();
    Arc::new(move |device, fh, client_flags| {
        let mut id = id.lock().unwrap();
        let id = match *id {
            Some(id) => id,
            None => {
                let fd = open(&path, flags | OFlags::CLOEXEC, Mode::empty())?;
                *id.insert(device.backing_open(fd)?.into_raw())
            }
        };
        let (open_flags, backing_id) = reply(id, client_flags)?;
        Ok(unchecked(fh, open_flags, backing_id))
    })
}

/// The two fields of a reply that `OpenReply` has checked.
fn fields(reply: &OpenReply<'_>) -> (u32, i32) {
    let out = reply.to_fuse_open_out(0);
    (out.open_flags, out.backing_id)
}

/// The reply of a server that checks nothing.
fn passthrough_unchecked(id: i32, _: i32) -> Result<(u32, i32), Errno> {
    Ok((PASSTHROUGH, id))
}

fn client(connection: &Connection, role: &str, extra: &str) -> Result<String, Failed> {
    client::run(
        role,
        &[connection.path("file").as_os_str(), OsStr::new(extra)],
    )
}

fn backing_content(tmpfs: &Tmpfs) -> Result<String, Failed> {
    Ok(fs::read_to_string(tmpfs.path().join("file"))?)
}

/// The main use: with a guard for each inode and checked replies, the server gets no READ and no WRITE.
#[apply(needs_passthrough)]
fn reads_and_writes_bypass_the_server(sandbox: &Sandbox) -> Result<(), Failed> {
    let tmpfs = sandbox.tmpfs()?;
    let path = tmpfs.path().join("file");
    let opens: Mutex<Vec<BackingFile<Arc<Device>>>> = Mutex::default();
    let opens = Arc::new(opens);
    let kept = Arc::clone(&opens);
    let connection = serve(
        sandbox,
        &tmpfs,
        Arc::new(move |device, fh, flags| {
            let file = File::options().read(true).write(true).open(&path).unwrap();
            let granted = Access::of(&file).unwrap();
            let mut opens = kept.lock().unwrap();
            if opens.is_empty() {
                let device = FuseDevice::new(device.as_fd().try_clone_to_owned().unwrap().into());
                let device = Arc::new(device.unwrap());
                opens.push(BackingFile::open(device, &file, granted).unwrap());
            }
            let reply = OpenReply::passthrough(opens[0].id(), granted, flags, FopenFlags::NOFLUSH);
            Ok(reply.unwrap().to_fuse_open_out(fh))
        }),
    )?;
    assert_eq!(client(&connection, "read", "")?, CONTENT);
    assert_eq!(client(&connection, "overwrite", "WHAT")?, "written");
    assert_eq!(
        client(&connection, "read", "")?,
        CONTENT.replacen("what", "WHAT", 1)
    );
    assert_eq!(
        backing_content(&tmpfs)?,
        CONTENT.replacen("what", "WHAT", 1)
    );
    connection.wait_for_releases(3)?;
    let seen = &connection.seen;
    assert_eq!(seen.opens.load(Ordering::SeqCst), 3);
    assert_eq!(seen.reads.load(Ordering::SeqCst), 0);
    assert_eq!(seen.writes.load(Ordering::SeqCst), 0);
    // Closes the id, then the server's own fd.
    opens.lock().unwrap().clear();
    drop(connection);
    tmpfs.unmount_when_idle()
}

#[apply(needs_passthrough)]
fn direct_io_comes_to_the_server(sandbox: &Sandbox) -> Result<(), Failed> {
    let tmpfs = sandbox.tmpfs()?;
    let checked = |id: i32, flags| {
        let id = BackingId::from_raw(id).ok_or(Errno::IO)?;
        let direct = FopenFlags::DIRECT_IO;
        let reply = OpenReply::passthrough(&id, Access::ReadWrite, flags, direct)?;
        Ok(fields(&reply))
    };
    let answer = registered(&tmpfs.path().join("file"), OFlags::RDWR, checked);
    let connection = serve(sandbox, &tmpfs, answer)?;
    assert_eq!(client(&connection, "read", "")?, CONTENT);
    assert_ne!(connection.seen.reads.load(Ordering::SeqCst), 0);
    Ok(())
}

/// The control of `reads_and_writes_bypass_the_server`: the counts of READs and WRITEs work.
#[apply(needs_passthrough)]
fn server_reply_is_plain_fuse(sandbox: &Sandbox) -> Result<(), Failed> {
    let tmpfs = sandbox.tmpfs()?;
    let answer: Arc<Answer> = Arc::new(|_, fh, _| {
        let reply = OpenReply::server(FopenFlags::empty())?;
        Ok(reply.to_fuse_open_out(fh))
    });
    let connection = serve(sandbox, &tmpfs, answer)?;
    assert_eq!(client(&connection, "read", "")?, CONTENT);
    assert_eq!(client(&connection, "overwrite", "WHAT")?, "written");
    assert_ne!(connection.seen.reads.load(Ordering::SeqCst), 0);
    assert_ne!(connection.seen.writes.load(Ordering::SeqCst), 0);
    Ok(())
}

/// The kernel asks at each write whether the file has capabilities to remove, until the server answers that it has no
/// extended attributes.
#[apply(needs_passthrough)]
fn writes_ask_for_capabilities(sandbox: &Sandbox) -> Result<(), Failed> {
    const WRITES: &str = "WHAT";
    for (has_xattrs, expected) in [(true, WRITES.len() as u64), (false, 1)] {
        let tmpfs = sandbox.tmpfs()?;
        let answer = registered(
            &tmpfs.path().join("file"),
            OFlags::RDWR,
            passthrough_unchecked,
        );
        let connection = serve(sandbox, &tmpfs, answer)?;
        let seen = &connection.seen;
        seen.has_xattrs.store(has_xattrs, Ordering::SeqCst);
        assert_eq!(
            client(&connection, "overwrite-bytewise", WRITES)?,
            "written"
        );
        assert_eq!(seen.writes.load(Ordering::SeqCst), 0);
        assert_eq!(seen.getxattrs.load(Ordering::SeqCst), expected);
    }
    Ok(())
}

/// Without the check, a client writes through a registration that the server made with a read-only fd, or with an
/// `O_PATH` fd, which can neither read nor write.
#[apply(needs_passthrough)]
fn access_mode_is_ignored(sandbox: &Sandbox) -> Result<(), Failed> {
    for flags in [OFlags::RDONLY, OFlags::PATH] {
        let tmpfs = sandbox.tmpfs()?;
        let answer = registered(&tmpfs.path().join("file"), flags, passthrough_unchecked);
        let connection = serve(sandbox, &tmpfs, answer)?;
        assert_eq!(client(&connection, "overwrite", "WHAT")?, "written");
        assert_eq!(
            backing_content(&tmpfs)?,
            CONTENT.replacen("what", "WHAT", 1)
        );
    }
    Ok(())
}

/// With the check, the same server refuses the client.
#[apply(needs_passthrough)]
fn checked_reply_refuses_the_access(sandbox: &Sandbox) -> Result<(), Failed> {
    let tmpfs = sandbox.tmpfs()?;
    let path = tmpfs.path().join("file");
    let granted = Access::of(File::open("/proc/self/exe")?)?;
    let checked = move |id: i32, flags| {
        let id = BackingId::from_raw(id).ok_or(Errno::IO)?;
        let empty = FopenFlags::empty();
        let reply = OpenReply::passthrough(&id, granted, flags, empty)?;
        Ok(fields(&reply))
    };
    let connection = serve(sandbox, &tmpfs, registered(&path, OFlags::RDONLY, checked))?;
    assert_eq!(
        client(&connection, "overwrite", "WHAT")?,
        errno(Errno::ACCESS)
    );
    assert_eq!(backing_content(&tmpfs)?, CONTENT);
    assert_eq!(client(&connection, "read", "")?, CONTENT);
    Ok(())
}

/// SECURITY.md's recommendation to servers that cannot trust every reply: the kernel refuses writes if the file was
/// opened through a detached read-only clone of its mount.
#[apply(needs_passthrough)]
#[allow(unsafe_code)]
fn read_only_mount_does_stop_writes(sandbox: &Sandbox) -> Result<(), Failed> {
    let tmpfs = sandbox.tmpfs()?;
    let folder = tmpfs.path().to_owned();
    let id: OnceLock<i32> = OnceLock::new();
    let answer: Arc<Answer> = Arc::new(move |device, fh, _| {
        let id = id.get_or_init(|| {
            use rustix::mount::{OpenTreeFlags, open_tree};
            let flags = OpenTreeFlags::OPEN_TREE_CLONE | OpenTreeFlags::OPEN_TREE_CLOEXEC;
            let tree = open_tree(rustix::fs::CWD, &folder, flags).unwrap();
            read_only(&tree);
            let file = rustix::fs::openat(
                &tree,
                "file",
                OFlags::RDONLY | OFlags::CLOEXEC,
                Mode::empty(),
            );
            device.backing_open(file.unwrap()).unwrap().into_raw()
        });
        Ok(unchecked(fh, PASSTHROUGH, *id))
    });
    let connection = serve(sandbox, &tmpfs, answer)?;
    assert_eq!(client(&connection, "overwrite", "WHAT")?, errno(Errno::IO));
    assert_eq!(backing_content(&tmpfs)?, CONTENT);
    assert_eq!(client(&connection, "read", "")?, CONTENT);
    assert_eq!(connection.seen.reads.load(Ordering::SeqCst), 0);
    Ok(())
}

/// `mount_setattr(tree, "", AT_EMPTY_PATH, {.attr_set = MOUNT_ATTR_RDONLY})`
#[allow(unsafe_code)]
fn read_only(tree: &OwnedFd) {
    const MOUNT_ATTR_RDONLY: u64 = 1;
    let attr: [u64; 4] = [MOUNT_ATTR_RDONLY, 0, 0, 0];
    // SAFETY: `attr` is a `struct mount_attr` of the size that is passed, and the path is a C string.
    let result = unsafe {
        libc::syscall(
            libc::SYS_mount_setattr,
            tree.as_raw_fd(),
            c"".as_ptr(),
            libc::AT_EMPTY_PATH,
            attr.as_ptr(),
            size_of_val(&attr),
        )
    };
    assert_eq!(result, 0, "{}", std::io::Error::last_os_error());
}

/// The control of `OpenError::FlagsNotAllowed`: with each flag that is not allowed the client gets EIO, and with each
/// allowed one it does not.
#[apply(needs_passthrough)]
fn flags_that_the_kernel_refuses(sandbox: &Sandbox) -> Result<(), Failed> {
    for bit in 0..32 {
        let flag = 1 << bit;
        let id = BackingId::from_raw(1).ok_or("not positive")?;
        let allowed =
            OpenReply::passthrough(&id, Access::ReadOnly, 0, FopenFlags::from_bits_retain(flag))
                .is_ok();

        let tmpfs = sandbox.tmpfs()?;
        let with_flag = move |id, _| Ok((PASSTHROUGH | flag, id));
        let answer = registered(&tmpfs.path().join("file"), OFlags::RDONLY, with_flag);
        let connection = serve(sandbox, &tmpfs, answer)?;
        let expected = if allowed {
            CONTENT.to_owned()
        } else {
            errno(Errno::IO)
        };
        assert_eq!(client(&connection, "read", "")?, expected, "bit {bit}");
    }
    Ok(())
}

/// The error that the borrow in `OpenReply` rules out.
#[apply(needs_passthrough)]
fn id_closed_before_the_reply(sandbox: &Sandbox) -> Result<(), Failed> {
    let tmpfs = sandbox.tmpfs()?;
    let path = tmpfs.path().join("file");
    let answer: Arc<Answer> = Arc::new(move |device, fh, _| {
        let id = device.backing_open(File::open(&path).unwrap()).unwrap();
        let out = unchecked(fh, PASSTHROUGH, id.as_raw());
        device.backing_close(id).unwrap();
        Ok(out)
    });
    let connection = serve(sandbox, &tmpfs, answer)?;
    assert_eq!(client(&connection, "read", "")?, errno(Errno::IO));
    // The kernel sends a RELEASE after such a failure, so that the server's handle is not leaked.
    connection.wait_for_releases(1)
}

/// Open files keep working; a new open with the closed id fails.
#[apply(needs_passthrough)]
fn id_closed_while_files_are_open(sandbox: &Sandbox) -> Result<(), Failed> {
    let tmpfs = sandbox.tmpfs()?;
    let answer = registered(
        &tmpfs.path().join("file"),
        OFlags::RDONLY,
        passthrough_unchecked,
    );
    let connection = serve(sandbox, &tmpfs, answer)?;
    let path = connection.path("file");
    let mut holder = Client::start("hold", &[path.as_os_str()])?;
    assert_eq!(holder.line()?, "open");

    let id = BackingId::from_raw(1).ok_or("not positive")?;
    connection.device().backing_close(id)?;
    assert_eq!(client(&connection, "read", "")?, errno(Errno::IO));

    holder.proceed()?;
    assert_eq!(holder.finish()?, CONTENT);
    assert_eq!(connection.seen.reads.load(Ordering::SeqCst), 0);
    Ok(())
}

/// The kernel refuses a second id for an open inode, so that one `BackingFile` must serve all its opens.
#[apply(needs_passthrough)]
fn second_id_for_an_open_inode(sandbox: &Sandbox) -> Result<(), Failed> {
    let tmpfs = sandbox.tmpfs()?;
    let path = tmpfs.path().join("file");
    // This server registers the same file at each open.
    let answer: Arc<Answer> = Arc::new(move |device, fh, _| {
        let id = device
            .backing_open(File::open(&path).unwrap())
            .unwrap()
            .into_raw();
        Ok(unchecked(fh, PASSTHROUGH, id))
    });
    let connection = serve(sandbox, &tmpfs, answer)?;
    let mut holder = Client::start("hold", &[connection.path("file").as_os_str()])?;
    assert_eq!(holder.line()?, "open");
    assert_eq!(client(&connection, "read", "")?, errno(Errno::IO));
    holder.proceed()?;
    assert_eq!(holder.finish()?, CONTENT);
    connection.wait_for_releases(2)?;
    assert_eq!(
        client(&connection, "read", "")?,
        CONTENT,
        "no longer open elsewhere"
    );
    Ok(())
}

const DIRECT: u32 = uapi::FOPEN_DIRECT_IO;
const CACHED: u32 = 0;
const PASSTHROUGH: u32 = uapi::FOPEN_PASSTHROUGH;

/// A server that answers the first OPEN with the flags `first`, and all later ones with `later`.
fn first_and_later(tmpfs: &Tmpfs, first: u32, later: u32) -> Arc<Answer> {
    let opens = AtomicUsize::new(0);
    let path = tmpfs.path().join("file");
    registered(&path, OFlags::RDWR, move |id, _| {
        let is_first = opens.fetch_add(1, Ordering::SeqCst) == 0;
        let flags = if is_first { first } else { later };
        Ok((flags, if flags == PASSTHROUGH { id } else { 0 }))
    })
}

fn start(connection: &Connection, role: &str) -> Result<Client, Failed> {
    let mut client = Client::start(role, &[connection.path("file").as_os_str()])?;
    assert_eq!(client.line()?, "open");
    Ok(client)
}

fn reads(connection: &Connection) -> u64 {
    connection.seen.reads.load(Ordering::SeqCst)
}

/// The one mixture of modes that the kernel accepts is passthrough after a plain `DIRECT_IO` open. After a cached open
/// it refuses passthrough.
#[apply(needs_passthrough)]
fn passthrough_while_open_in_server_mode(sandbox: &Sandbox) -> Result<(), Failed> {
    let tmpfs = sandbox.tmpfs()?;
    let answer = first_and_later(&tmpfs, DIRECT, PASSTHROUGH);
    let connection = serve(sandbox, &tmpfs, answer)?;
    let mut direct = start(&connection, "hold")?;
    let mut passed = start(&connection, "hold")?;
    assert_eq!(client(&connection, "overwrite", "WHAT")?, "written");
    assert_eq!(
        connection.seen.writes.load(Ordering::SeqCst),
        0,
        "passed through, while the file is open for direct I/O"
    );
    // Each stays in its own mode, and reads what was written.
    let content = CONTENT.replacen("what", "WHAT", 1);
    assert_eq!(reads(&connection), 0);
    direct.proceed()?;
    assert_eq!(direct.finish()?, content);
    let direct_reads = reads(&connection);
    assert_ne!(direct_reads, 0);
    passed.proceed()?;
    assert_eq!(passed.finish()?, content);
    assert_eq!(reads(&connection), direct_reads);
    connection.wait_for_releases(3)?;

    let tmpfs = sandbox.tmpfs()?;
    let answer = first_and_later(&tmpfs, CACHED, PASSTHROUGH);
    let connection = serve(sandbox, &tmpfs, answer)?;
    let mut cached = start(&connection, "hold")?;
    assert_eq!(client(&connection, "read", "")?, errno(Errno::IO));
    cached.proceed()?;
    assert_eq!(cached.finish()?, CONTENT);
    connection.wait_for_releases(2)?;
    assert_eq!(client(&connection, "read", "")?, CONTENT, "it is released");
    Ok(())
}

/// The kernel refuses the reverse order, for both direct and cached opens.
#[apply(needs_passthrough)]
fn server_mode_while_open_in_passthrough(sandbox: &Sandbox) -> Result<(), Failed> {
    for later in [DIRECT, CACHED] {
        let tmpfs = sandbox.tmpfs()?;
        let answer = first_and_later(&tmpfs, PASSTHROUGH, later);
        let connection = serve(sandbox, &tmpfs, answer)?;
        let mut passed = start(&connection, "hold")?;
        assert_eq!(client(&connection, "read", "")?, errno(Errno::IO));
        passed.proceed()?;
        assert_eq!(passed.finish()?, CONTENT);
        assert_eq!(reads(&connection), 0);
        connection.wait_for_releases(2)?;
        assert_eq!(client(&connection, "read", "")?, CONTENT, "it is released");
        assert_ne!(reads(&connection), 0);
    }
    Ok(())
}

/// Lets clients map direct files `MAP_SHARED`.
fn with_direct_mmap() -> Init {
    let mut init = Init::passthrough(1);
    init.flags |= uapi::FUSE_DIRECT_IO_ALLOW_MMAP;
    init
}

/// Why the table does not pass through after direct opens: a mapping puts the inode in cached mode until the mapped
/// file is released, and the kernel does not tell the server.
#[apply(needs_passthrough)]
fn passthrough_after_direct_file_was_mapped(sandbox: &Sandbox) -> Result<(), Failed> {
    let tmpfs = sandbox.tmpfs()?;
    let answer = first_and_later(&tmpfs, DIRECT, PASSTHROUGH);
    let connection = serve_with(sandbox, &tmpfs, with_direct_mmap(), answer)?;
    let mut direct = start(&connection, "hold-and-map")?;
    direct.proceed()?;
    assert_eq!(direct.line()?, "mapped, unmapped: 0");
    assert_eq!(client(&connection, "read", "")?, errno(Errno::IO));
    direct.proceed()?;
    assert_eq!(direct.finish()?, CONTENT);
    connection.wait_for_releases(2)?;
    let before = reads(&connection);
    assert_eq!(client(&connection, "read", "")?, CONTENT, "it is released");
    assert_eq!(reads(&connection), before);
    Ok(())
}

/// While the inode is open in passthrough mode, a direct file cannot be mapped, but can be read.
#[apply(needs_passthrough)]
fn direct_file_cannot_be_mapped_while_open_in_passthrough(sandbox: &Sandbox) -> Result<(), Failed> {
    let tmpfs = sandbox.tmpfs()?;
    let answer = first_and_later(&tmpfs, DIRECT, PASSTHROUGH);
    let connection = serve_with(sandbox, &tmpfs, with_direct_mmap(), answer)?;
    let mut direct = start(&connection, "hold-and-map")?;
    let mut passed = start(&connection, "hold")?;
    direct.proceed()?;
    assert_eq!(direct.line()?, errno(Errno::NODEV));
    direct.proceed()?;
    assert_eq!(direct.finish()?, CONTENT);
    passed.proceed()?;
    assert_eq!(passed.finish()?, CONTENT);
    Ok(())
}

/// The table gives all opens of an inode one mode, even where the kernel would accept two.
#[apply(needs_passthrough)]
fn table_keeps_to_server_mode_after_direct_io(sandbox: &Sandbox) -> Result<(), Failed> {
    type Opens = Mutex<Vec<OpenFile<Arc<Device>>>>;
    let tmpfs = sandbox.tmpfs()?;
    let path = tmpfs.path().join("file");
    let late: Arc<OnceLock<BackingTable<Arc<Device>>>> = Arc::default();
    let opens: Arc<Opens> = Arc::default();
    let (table, kept) = (Arc::clone(&late), Arc::clone(&opens));
    let serves = AtomicUsize::new(0);
    let answer: Arc<Answer> = Arc::new(move |_, fh, flags| {
        let table = table.get().ok_or(Errno::IO)?;
        let open = if serves.fetch_add(1, Ordering::SeqCst) == 0 {
            table.serve(&Connection::NODE).ok_or(Errno::IO)?
        } else {
            let file = File::open(&path).map_err(|_| Errno::IO)?;
            table.open(&Connection::NODE, flags, ServerFile::new(&file))?
        };
        let out = open.reply(FopenFlags::DIRECT_IO).to_fuse_open_out(fh);
        kept.lock().unwrap().push(open);
        Ok(out)
    });
    let connection = serve(sandbox, &tmpfs, answer)?;
    let table = BackingTable::new(Arc::new(connection.device()));
    late.set(table).map_err(|_| "set twice")?;

    let mut clients = [start(&connection, "hold")?, start(&connection, "hold")?];
    for open in &*opens.lock().unwrap() {
        assert_eq!(open.server_reason(), Some(ServerReason::Chosen));
    }
    assert_eq!(late.get().ok_or("not set")?.stats().ids, 0);
    for client in &mut clients {
        client.proceed()?;
        assert_eq!(client.line()?, CONTENT);
    }
    connection.wait_for_releases(2)?;
    opens.lock().unwrap().clear();
    let before = reads(&connection);
    assert_eq!(client(&connection, "read", "")?, CONTENT);
    assert!(opens.lock().unwrap()[0].is_passthrough(), "after release");
    // The reply leaves DIRECT_IO out, which would send reads to the server.
    assert_eq!(reads(&connection), before);
    Ok(())
}
