//! A minimal FUSE server of one file. Two servers differ only in how they answer OPEN and RELEASE.
//!
//! The kernel caches names. FLUSH is not implemented, which the kernel remembers. So a client's open and
//! close cause exactly one OPEN and one RELEASE.

use std::fs::File;
use std::io::Write;
use std::os::fd::AsFd;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, mpsc};
use std::thread::{self, JoinHandle};
use std::time::Duration;

use fuse_backing::{FopenFlags, FuseDevice, uapi};
use libtest_mimic::Failed;
use rustix::io::Errno;
use rustix::mount::{UnmountFlags, unmount};

use crate::fuse::{attach, watched};
use crate::sandbox::Sandbox;

pub type Device = Arc<FuseDevice>;

/// The only file.
pub const NAME: &str = "file";
const NODE: u64 = 2;

/// How a server answers OPEN, and what it does at RELEASE. Called by one thread.
pub trait Opens: Send {
    fn open(&mut self, client_flags: u32) -> Answer;
    fn release(&mut self, fh: u64);
}

/// `fuse_open_out`
pub struct Answer {
    pub fh: u64,
    pub open_flags: FopenFlags,
    pub backing_id: Option<i32>,
}

pub struct Server {
    pub reads: Arc<AtomicU64>,
    mountpoint: PathBuf,
    abort: Arc<File>,
    thread: Option<JoinHandle<()>>,
}

impl Server {
    /// `make` gets the device after INIT is answered, when files can be registered.
    pub fn start<O: Opens + 'static>(
        sandbox: &Sandbox,
        file: &Path,
        make: impl FnOnce(&Device) -> Result<O, Failed>,
    ) -> Result<Self, Failed> {
        let device = FuseDevice::open()?.into_inner();
        let mountpoint = sandbox.folder("mnt")?;
        attach(&device, &mountpoint)?;
        let abort = watched(sandbox, &mountpoint)?;
        let device = Arc::new(FuseDevice::new(device)?);
        answer_init(&device)?;

        let reads = Arc::new(AtomicU64::new(0));
        let mut serving = Serving {
            file: File::options().read(true).write(true).open(file)?,
            opens: make(&device)?,
            device,
            reads: Arc::clone(&reads),
        };
        let (ready, is_ready) = mpsc::channel();
        let thread = thread::Builder::new().spawn(move || {
            let _ = ready.send(());
            serving.run();
        })?;
        is_ready.recv_timeout(Duration::from_secs(10))?;
        Ok(Self {
            reads,
            mountpoint,
            abort,
            thread: Some(thread),
        })
    }

    pub fn path(&self) -> PathBuf {
        self.mountpoint.join(NAME)
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        let _ = self.abort.as_ref().write_all(b"1");
        let _ = unmount(&self.mountpoint, UnmountFlags::DETACH);
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

struct Serving<O> {
    device: Device,
    file: File,
    opens: O,
    reads: Arc<AtomicU64>,
}

const LOOKUP: u32 = 1;
const FORGET: u32 = 2;
const GETATTR: u32 = 3;
const OPEN: u32 = 14;
const READ: u32 = 15;
const RELEASE: u32 = 18;
const INTERRUPT: u32 = 36;
const BATCH_FORGET: u32 = 42;

const IN_HEADER: usize = 40;
const OUT_HEADER: usize = 16;
/// The largest READ and WRITE.
const LARGEST: usize = 1 << 20;
/// How long the kernel may cache names and attributes, in seconds.
const VALID: u64 = 3_600;

const ASYNC_READ: u64 = 1;
const MAX_PAGES: u64 = 1 << 22;

fn answer_init(device: &Device) -> Result<(), Failed> {
    let mut request = vec![0; LARGEST + 4096];
    rustix::io::read(device.as_fd(), &mut request[..])?;
    let flags = ASYNC_READ | MAX_PAGES | uapi::FUSE_INIT_EXT | uapi::FUSE_PASSTHROUGH;
    let words: [u32; 16] = [
        7,
        40,
        LARGEST as u32, // readahead
        flags as u32,
        0,
        LARGEST as u32,
        1,
        (LARGEST / 4096) as u32,
        (flags >> 32) as u32,
        1, // max_stack_depth
        0,
        0,
        0,
        0,
        0,
        0,
    ];
    let body = words.map(u32::to_ne_bytes).concat();
    let mut reply = vec![0; OUT_HEADER];
    reply.extend(body);
    send(device, &request, &mut reply, 0);
    Ok(())
}

/// Fills in the header.
fn send(device: &Device, request: &[u8], reply: &mut [u8], error: i32) {
    let length = (reply.len() as u32).to_ne_bytes();
    reply[..4].copy_from_slice(&length);
    reply[4..8].copy_from_slice(&(-error).to_ne_bytes());
    reply[8..16].copy_from_slice(&request[8..16]);
    // Fails if the connection was aborted.
    let _ = rustix::io::write(device.as_fd(), reply);
}

impl<O: Opens> Serving<O> {
    fn run(&mut self) {
        let mut request = vec![0; LARGEST + 4096];
        let mut reply = vec![0; LARGEST + OUT_HEADER];
        loop {
            match rustix::io::read(self.device.as_fd(), &mut request[..]) {
                Ok(_) => {}
                Err(Errno::NOENT | Errno::INTR | Errno::AGAIN) => continue,
                // Aborted or unmounted.
                Err(_) => return,
            }
            match u32_at(&request, 4) {
                FORGET | BATCH_FORGET | INTERRUPT => {}
                opcode => {
                    let (length, error) =
                        match self.answer(opcode, &request, &mut reply[OUT_HEADER..]) {
                            Ok(length) => (length, 0),
                            Err(errno) => (0, errno.raw_os_error()),
                        };
                    let reply = &mut reply[..OUT_HEADER + length];
                    send(&self.device, &request, reply, error);
                }
            }
        }
    }

    /// Returns the length of the reply's body.
    fn answer(&mut self, opcode: u32, request: &[u8], body: &mut [u8]) -> Result<usize, Errno> {
        let nodeid = u64_at(request, 16);
        match opcode {
            LOOKUP => {
                let name = &request[IN_HEADER..u32_at(request, 0) as usize - 1];
                if name != NAME.as_bytes() {
                    return Err(Errno::NOENT);
                }
                let entry = [NODE, 0, VALID, VALID, 0].map(u64::to_ne_bytes).concat();
                body[..40].copy_from_slice(&entry);
                Ok(40 + self.attributes(NODE, &mut body[40..])?)
            }
            GETATTR => {
                let valid = [VALID, 0].map(u64::to_ne_bytes).concat();
                body[..16].copy_from_slice(&valid);
                Ok(16 + self.attributes(nodeid, &mut body[16..])?)
            }
            OPEN => {
                let out = self.opens.open(u32_at(request, IN_HEADER));
                body[..8].copy_from_slice(&out.fh.to_ne_bytes());
                body[8..12].copy_from_slice(&out.open_flags.bits().to_ne_bytes());
                body[12..16].copy_from_slice(&out.backing_id.unwrap_or(0).to_ne_bytes());
                Ok(16)
            }
            READ => {
                self.reads.fetch_add(1, Ordering::Relaxed);
                let length = u32_at(request, IN_HEADER + 16) as usize;
                let offset = u64_at(request, IN_HEADER + 8);
                let read = self.file.read_at(&mut body[..length], offset);
                read.map_err(|_| Errno::IO)
            }
            RELEASE => {
                self.opens.release(u64_at(request, IN_HEADER));
                Ok(0)
            }
            _ => Err(Errno::NOSYS),
        }
    }

    fn attributes(&self, nodeid: u64, to: &mut [u8]) -> Result<usize, Errno> {
        let (mode, size) = if nodeid == NODE {
            let metadata = self.file.metadata().map_err(|_| Errno::IO)?;
            (0o100_666, metadata.len())
        } else {
            (0o40_755, 0)
        };
        let mut attr = [nodeid, size, 0, 0, 0, 0].map(u64::to_ne_bytes).concat();
        // The nanoseconds of three times, mode, nlink, uid, gid, rdev, blksize, flags.
        let rest = [0, 0, 0, mode, 1, 0, 0, 0, 4096, 0];
        attr.extend(rest.map(u32::to_ne_bytes).concat());
        to[..attr.len()].copy_from_slice(&attr);
        Ok(attr.len())
    }
}

fn u32_at(bytes: &[u8], offset: usize) -> u32 {
    u32::from_ne_bytes(bytes[offset..offset + 4].try_into().expect("4 bytes"))
}

fn u64_at(bytes: &[u8], offset: usize) -> u64 {
    u64::from_ne_bytes(bytes[offset..offset + 8].try_into().expect("8 bytes"))
}
