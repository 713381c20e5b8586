//! A FUSE connection made by hand: mount(2), an INIT reply as the test needs it, and a server of a
//! few flat files that counts what the kernel asks of it.

use std::fs::{self, File};
use std::io::{self, Write};
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, mpsc};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use fuse_backing::{FopenFlags, FuseDevice, OpenReply, uapi};
use libtest_mimic::Failed;
use rustix::io::Errno;
use rustix::mount::{MountFlags, UnmountFlags, mount, unmount};

use crate::sandbox::Sandbox;

/// How INIT is answered.
#[derive(Clone, Copy, Debug)]
pub struct Init {
    /// Bits for the reply; those that the kernel did not offer are sent all the same.
    pub flags: u64,
    pub max_stack_depth: u32,
}

impl Init {
    pub const PLAIN: Self = Self {
        flags: 0,
        max_stack_depth: 0,
    };

    pub const fn passthrough(max_stack_depth: u32) -> Self {
        Self {
            flags: uapi::FUSE_INIT_EXT | uapi::FUSE_PASSTHROUGH,
            max_stack_depth,
        }
    }
}

/// A file in the mount's root, read and written through `backing` when the kernel asks the server.
#[derive(Debug)]
pub struct Node {
    pub name: String,
    pub backing: File,
}

/// The answer to OPEN: the body of the reply, or an errno.
pub type OpenAnswer = Result<uapi::fuse_open_out, Errno>;

/// Answers OPEN, given the nodeid and the client's flags. The first file's nodeid is `Connection::NODE`.
pub type OnOpen = dyn Fn(u64, i32) -> OpenAnswer + Send + Sync;

/// Counts the requests that the server got, and configures some of its answers.
#[derive(Debug, Default)]
pub struct Seen {
    pub opens: AtomicU64,
    pub reads: AtomicU64,
    pub writes: AtomicU64,
    pub releases: AtomicU64,
    pub getxattrs: AtomicU64,
    /// Whether GETXATTR is answered with ENODATA, rather than ENOSYS.
    pub has_xattrs: AtomicBool,
    /// Whether all files are reported to have the same inode number.
    pub has_one_number: AtomicBool,
}

/// What the kernel offered in its INIT request.
#[derive(Clone, Copy, Debug)]
pub struct Offer {
    pub minor: u32,
    pub flags: u64,
}

pub struct Connection {
    device: Arc<OwnedFd>,
    mountpoint: PathBuf,
    /// fusectl's `abort` file, opened at mount: once this connection is gone, its number goes to the next mount.
    abort: Option<Arc<File>>,
    server: Option<JoinHandle<()>>,
    /// The lock lets threads share the connection.
    negotiated: Option<Mutex<mpsc::Receiver<Offer>>>,
    offer: Option<Offer>,
    pub seen: Arc<Seen>,
}

impl Offer {
    fn of(request: &Request<'_>) -> Self {
        Self {
            minor: request.u32(4),
            flags: u64::from(request.u32(12)) | u64::from(request.u32(16)) << 32,
        }
    }
}

impl Connection {
    /// The nodeid of the first file.
    pub const NODE: u64 = 2;

    /// A mount without files, for tests of the ioctls alone.
    pub fn mount(sandbox: &Sandbox, init: Init) -> Result<Self, Failed> {
        Self::serve(sandbox, init, Vec::new(), Arc::new(|_, _| Err(Errno::IO)))
    }

    /// A mount with files, whose OPENs `on_open` answers.
    pub fn serve(
        sandbox: &Sandbox,
        init: Init,
        nodes: Vec<Node>,
        on_open: Arc<OnOpen>,
    ) -> Result<Self, Failed> {
        let mut connection = Self::unanswered(sandbox, FuseDevice::open()?.into_inner())?;
        connection.start(init, nodes, on_open)?;
        connection.wait_for_init()?;
        Ok(connection)
    }

    /// A mount whose server reads the device before it is mounted, as synchronous INIT requires.
    pub fn serve_before_mount(
        sandbox: &Sandbox,
        init: Init,
        device: FuseDevice<OwnedFd>,
    ) -> Result<Self, Failed> {
        let mut connection = Self::new(sandbox, device.into_inner())?;
        connection.start(init, Vec::new(), Arc::new(|_, _| Err(Errno::IO)))?;
        connection.attach(sandbox)?;
        connection.wait_for_init()?;
        Ok(connection)
    }

    /// A mount whose INIT is not answered.
    pub fn unanswered(sandbox: &Sandbox, device: OwnedFd) -> Result<Self, Failed> {
        let mut connection = Self::new(sandbox, device)?;
        connection.attach(sandbox)?;
        Ok(connection)
    }

    fn new(sandbox: &Sandbox, device: OwnedFd) -> Result<Self, Failed> {
        Ok(Self {
            device: Arc::new(device),
            mountpoint: sandbox.folder("mnt")?,
            abort: None,
            server: None,
            negotiated: None,
            offer: None,
            seen: Arc::default(),
        })
    }

    fn attach(&mut self, sandbox: &Sandbox) -> Result<(), Failed> {
        attach(&self.device, &self.mountpoint)?;
        self.abort = Some(watched(sandbox, &self.mountpoint)?);
        Ok(())
    }

    fn start(&mut self, init: Init, nodes: Vec<Node>, on_open: Arc<OnOpen>) -> Result<(), Failed> {
        let (ready, negotiated) = mpsc::channel();
        let server = Server {
            device: Arc::clone(&self.device),
            nodes,
            on_open,
            seen: Arc::clone(&self.seen),
        };
        self.server = Some(thread::Builder::new().spawn(move || server.run(init, &ready))?);
        self.negotiated = Some(Mutex::new(negotiated));
        Ok(())
    }

    fn wait_for_init(&mut self) -> Result<(), Failed> {
        let negotiated = self.negotiated.take().ok_or("no server thread")?;
        let negotiated = negotiated.into_inner().expect("no panic");
        self.offer = Some(negotiated.recv_timeout(Duration::from_secs(10))?);
        Ok(())
    }

    pub fn offer(&self) -> Offer {
        self.offer.expect("INIT was not answered")
    }

    pub fn device(&self) -> FuseDevice<Arc<OwnedFd>> {
        FuseDevice::new(Arc::clone(&self.device)).expect("a FUSE device")
    }

    pub fn path(&self, name: &str) -> PathBuf {
        self.mountpoint.join(name)
    }

    pub fn abort(&self) -> io::Result<()> {
        match &self.abort {
            Some(abort) => abort.as_ref().write_all(b"1"),
            None => Ok(()),
        }
    }

    pub fn unmount(&self) -> rustix::io::Result<()> {
        unmount(&self.mountpoint, UnmountFlags::DETACH)
    }

    /// Waits for so many RELEASEs, which the kernel sends after close(2) has returned.
    pub fn wait_for_releases(&self, count: u64) -> Result<(), Failed> {
        let deadline = Instant::now() + Duration::from_secs(10);
        while self.seen.releases.load(Ordering::SeqCst) < count {
            if Instant::now() > deadline {
                return Err(format!("not all of {count} RELEASE came").into());
            }
            thread::sleep(Duration::from_millis(1));
        }
        Ok(())
    }
}

impl Drop for Connection {
    fn drop(&mut self) {
        // Abort first: after it, no call on the mount can hang, not even this thread's.
        let _ = self.abort();
        let _ = self.unmount();
        if let Some(server) = self.server.take() {
            let _ = server.join();
        }
    }
}

/// mount(2), which attaches the device to a new connection.
pub fn attach(device: &OwnedFd, mountpoint: &Path) -> Result<(), Failed> {
    use std::os::fd::AsRawFd;
    let data = format!(
        "fd={},rootmode=40000,user_id=0,group_id=0,allow_other",
        device.as_raw_fd()
    );
    let data = std::ffi::CString::new(data)?;
    mount(
        "fuse-backing-test",
        mountpoint,
        "fuse.fuse-backing-test",
        MountFlags::NOSUID | MountFlags::NODEV,
        data.as_c_str(),
    )?;
    Ok(())
}

/// A reply to OPEN with these fields, without the checks of `OpenReply`.
pub fn unchecked(fh: u64, open_flags: u32, backing_id: i32) -> uapi::fuse_open_out {
    let reply = OpenReply::server(FopenFlags::empty()).expect("no flag to refuse");
    let mut out = reply.to_fuse_open_out(fh);
    (out.open_flags, out.backing_id) = (open_flags, backing_id);
    out
}

/// Mounts and answers INIT in this thread, for a process that has no other.
pub fn mounted(mountpoint: &Path, init: Init) -> Result<FuseDevice<OwnedFd>, Failed> {
    let device = FuseDevice::open()?.into_inner();
    attach(&device, mountpoint)?;
    handshake(&device, init)?;
    Ok(FuseDevice::new(device)?)
}

/// Mounts, prints "mounted", and serves in this thread until the connection ends. For a process that is killed.
pub fn serve_here(
    mountpoint: &Path,
    init: Init,
    nodes: Vec<Node>,
    on_open: impl FnOnce(FuseDevice<Arc<OwnedFd>>) -> Arc<OnOpen>,
) -> Result<(), Failed> {
    let device = Arc::new(FuseDevice::open()?.into_inner());
    attach(&device, mountpoint)?;
    println!("mounted");
    let server = Server {
        on_open: on_open(FuseDevice::new(Arc::clone(&device))?),
        device,
        nodes,
        seen: Arc::default(),
    };
    server.run(init, &mpsc::channel().0);
    Ok(())
}

/// Answers INIT, and leaves later requests unread.
pub fn handshake(device: &OwnedFd, init: Init) -> Result<Offer, Failed> {
    let mut buffer = vec![0; BUFFER];
    let length = rustix::io::read(device, &mut buffer[..])?;
    let request = Request(&buffer[..length]);
    assert_eq!(request.opcode(), INIT);
    reply(device, &request, Ok(init_reply(init)));
    Ok(Offer::of(&request))
}

/// Opens fusectl's `abort` file of a mount, for the watchdog too.
pub fn watched(sandbox: &Sandbox, mountpoint: &Path) -> Result<Arc<File>, Failed> {
    sandbox.watch(connection_number(mountpoint)?)
}

/// The connection's number, which is the minor number of the mount's device. It is read from mountinfo, since stat(2)
/// would ask the server.
pub fn connection_number(mountpoint: &Path) -> Result<u32, Failed> {
    let mountinfo = fs::read_to_string("/proc/self/mountinfo")?;
    let path = mountpoint.to_str().ok_or("the path is not UTF-8")?;
    mountinfo
        .lines()
        .filter_map(|line| {
            let mut fields = line.split(' ').skip(2);
            let device = fields.next()?;
            (fields.nth(1)? == path).then_some(device)
        })
        .next_back()
        .and_then(|device| device.split_once(':')?.1.parse().ok())
        .ok_or_else(|| format!("{path} is not in mountinfo").into())
}

struct Server {
    device: Arc<OwnedFd>,
    nodes: Vec<Node>,
    on_open: Arc<OnOpen>,
    seen: Arc<Seen>,
}

/// Room for the largest WRITE that `init_reply` permits, with its headers.
pub const BUFFER: usize = (1 << 20) + 4096;

pub const LOOKUP: u32 = 1;
pub const FORGET: u32 = 2;
pub const GETATTR: u32 = 3;
pub const SETATTR: u32 = 4;
pub const OPEN: u32 = 14;
pub const READ: u32 = 15;
pub const WRITE: u32 = 16;
const STATFS: u32 = 17;
pub const RELEASE: u32 = 18;
const GETXATTR: u32 = 22;
pub const FLUSH: u32 = 25;
const INIT: u32 = 26;
pub const INTERRUPT: u32 = 36;
pub const BATCH_FORGET: u32 = 42;

impl Server {
    fn run(self, init: Init, ready: &mpsc::Sender<Offer>) {
        let mut buffer = vec![0; BUFFER];
        loop {
            let length = match rustix::io::read(self.device.as_fd(), &mut buffer[..]) {
                Ok(length) => length,
                Err(Errno::NOENT | Errno::INTR | Errno::AGAIN) => continue,
                // Aborted or unmounted.
                Err(_) => return,
            };
            let request = Request(&buffer[..length]);
            match request.opcode() {
                FORGET | BATCH_FORGET | INTERRUPT => {}
                INIT => {
                    reply(&self.device, &request, Ok(init_reply(init)));
                    let _ = ready.send(Offer::of(&request));
                }
                _ => reply(&self.device, &request, self.answer(&request)),
            }
        }
    }

    fn node(&self, nodeid: u64) -> Result<&Node, Errno> {
        nodeid
            .checked_sub(Connection::NODE)
            .and_then(|index| self.nodes.get(usize::try_from(index).ok()?))
            .ok_or(Errno::NOENT)
    }

    fn answer(&self, request: &Request<'_>) -> Result<Vec<u8>, Errno> {
        let nodeid = request.nodeid();
        match request.opcode() {
            LOOKUP => {
                let name = request.body().strip_suffix(&[0]).ok_or(Errno::INVAL)?;
                let index = self
                    .nodes
                    .iter()
                    .position(|node| node.name.as_bytes() == name)
                    .ok_or(Errno::NOENT)?;
                let nodeid = Connection::NODE + index as u64;
                let mut entry = [nodeid, 0, 0, 0, 0].map(u64::to_ne_bytes).concat();
                entry.extend(self.attributes(nodeid)?);
                Ok(entry)
            }
            GETATTR | SETATTR => {
                let mut out = vec![0; 16];
                out.extend(self.attributes(nodeid)?);
                Ok(out)
            }
            OPEN => {
                self.seen.opens.fetch_add(1, Ordering::SeqCst);
                let out = (self.on_open)(nodeid, request.u32(0) as i32)?;
                Ok(out.to_bytes().to_vec())
            }
            READ => {
                self.seen.reads.fetch_add(1, Ordering::SeqCst);
                let mut data = vec![0; request.u32(16) as usize];
                let length = self
                    .node(nodeid)?
                    .backing
                    .read_at(&mut data, request.u64(8))
                    .map_err(errno)?;
                data.truncate(length);
                Ok(data)
            }
            WRITE => {
                self.seen.writes.fetch_add(1, Ordering::SeqCst);
                let data = &request.body()[40..][..request.u32(16) as usize];
                self.node(nodeid)?
                    .backing
                    .write_all_at(data, request.u64(8))
                    .map_err(errno)?;
                Ok([request.u32(16), 0].map(u32::to_ne_bytes).concat())
            }
            RELEASE => {
                self.seen.releases.fetch_add(1, Ordering::SeqCst);
                Ok(Vec::new())
            }
            GETXATTR => {
                self.seen.getxattrs.fetch_add(1, Ordering::SeqCst);
                if self.seen.has_xattrs.load(Ordering::SeqCst) {
                    Err(Errno::NODATA)
                } else {
                    Err(Errno::NOSYS)
                }
            }
            FLUSH => Ok(Vec::new()),
            // A zeroed `struct fuse_statfs_out`.
            STATFS => Ok(vec![0; 80]),
            _ => Err(Errno::NOSYS),
        }
    }

    fn attributes(&self, nodeid: u64) -> Result<Vec<u8>, Errno> {
        let (mode, size) = if nodeid == 1 {
            (0o40_755, 0)
        } else {
            let metadata = self.node(nodeid)?.backing.metadata().map_err(errno)?;
            (metadata.mode(), metadata.len())
        };
        let number = match self.seen.has_one_number.load(Ordering::SeqCst) {
            true if nodeid != 1 => Connection::NODE,
            _ => nodeid,
        };
        Ok(attr(number, size, mode))
    }
}

/// A `struct fuse_attr` with this inode number.
pub fn attr(number: u64, size: u64, mode: u32) -> Vec<u8> {
    let mut attr = [number, size, 0, 0, 0, 0].map(u64::to_ne_bytes).concat();
    // The nanoseconds of three times, mode, nlink, uid, gid, rdev, blksize, flags.
    let rest = [0, 0, 0, mode, 1, 0, 0, 0, 4096, 0];
    attr.extend(rest.map(u32::to_ne_bytes).concat());
    attr
}

/// Answers a request.
pub fn reply(device: impl AsFd, request: &Request<'_>, answer: Result<Vec<u8>, Errno>) {
    let (error, body) = match answer {
        Ok(body) => (0, body),
        Err(errno) => (-errno.raw_os_error(), Vec::new()),
    };
    let mut reply = ((16 + body.len()) as u32).to_ne_bytes().to_vec();
    reply.extend(error.to_ne_bytes());
    reply.extend(request.unique().to_ne_bytes());
    reply.extend(body);
    // Fails with ENOENT if the request was interrupted, with ENODEV if the connection was aborted.
    let _ = rustix::io::write(device, &reply);
}

pub fn errno(error: io::Error) -> Errno {
    Errno::from_io_error(&error).unwrap_or(Errno::IO)
}

/// A `struct fuse_init_out` of protocol 7.40. Besides what `init` says, it has a `max_write` of 1 MiB and a `time_gran`
/// of 1 ns.
fn init_reply(init: Init) -> Vec<u8> {
    let words: [u32; 16] = [
        7,
        40,
        0,
        init.flags as u32,
        0,
        1 << 20,
        1,
        0,
        (init.flags >> 32) as u32,
        init.max_stack_depth,
        0,
        0,
        0,
        0,
        0,
        0,
    ];
    words.map(u32::to_ne_bytes).concat()
}

/// A request: a `fuse_in_header` of 40 bytes, and the body.
pub struct Request<'a>(pub &'a [u8]);

impl Request<'_> {
    fn field<const N: usize>(&self, offset: usize) -> [u8; N] {
        self.0[offset..offset + N].try_into().expect("N bytes")
    }
    pub fn opcode(&self) -> u32 {
        u32::from_ne_bytes(self.field(4))
    }
    fn unique(&self) -> u64 {
        u64::from_ne_bytes(self.field(8))
    }
    pub fn nodeid(&self) -> u64 {
        u64::from_ne_bytes(self.field(16))
    }
    pub fn body(&self) -> &[u8] {
        &self.0[40..]
    }
    /// The field at this offset in the body.
    pub fn u32(&self, offset: usize) -> u32 {
        u32::from_ne_bytes(self.field(40 + offset))
    }
    /// The field at this offset in the body.
    pub fn u64(&self, offset: usize) -> u64 {
        u64::from_ne_bytes(self.field(40 + offset))
    }
}
