//! The FUSE protocol, as far as sequences need it.

use std::os::fd::AsFd;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use fuse_backing::error::Errno;

use super::Wrong;
use super::world::{Device, World, name_of};

/// The thread that serves, and what it serves.
pub struct Server {
    shared: Arc<(Mutex<World>, Condvar)>,
    device: Device,
    thread: JoinHandle<()>,
}

impl Server {
    /// On a connection whose INIT is answered.
    pub fn start(world: World) -> Self {
        let device = world.device();
        let shared = Arc::new((Mutex::new(world), Condvar::new()));
        let (served, on) = (Arc::clone(&shared), Arc::clone(&device));
        let thread = thread::spawn(move || serve(&served, &on));
        Self {
            shared,
            device,
            thread,
        }
    }

    pub fn world(&self) -> MutexGuard<'_, World> {
        lock(&self.shared.0)
    }

    /// Bounded: RELEASE is sent after close(2) has returned, and FORGET some time later.
    pub fn wait(&self, what: &str, done: impl Fn(&World) -> bool) -> Result<(), Wrong> {
        let deadline = Instant::now() + Duration::from_secs(5);
        let mut world = self.world();
        while !done(&world) {
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return Err(Wrong::Rule(format!("waited in vain for {what}")));
            }
            let waited = self.shared.1.wait_timeout(world, left);
            world = waited.unwrap_or_else(PoisonError::into_inner).0;
        }
        Ok(())
    }

    /// Has the kernel look a name up again. What is not open it then forgets.
    pub fn invalidate_entry(&self, name: usize) {
        const FUSE_NOTIFY_INVAL_ENTRY: u32 = 3;
        let name = name_of(name);
        let length = 16 + 16 + name.len() + 1;
        let mut message = (length as u32).to_ne_bytes().to_vec();
        message.extend(FUSE_NOTIFY_INVAL_ENTRY.to_ne_bytes());
        message.extend([0, ROOT].map(u64::to_ne_bytes).concat());
        message.extend([name.len() as u32, 0].map(u32::to_ne_bytes).concat());
        message.extend(name.as_bytes());
        message.push(0);
        // ENOENT: it does not know the name.
        let _ = rustix::io::write(self.device.as_fd(), &message);
    }

    /// After the connection was aborted or unmounted.
    pub fn join(self) {
        let _ = self.thread.join();
    }
}

fn lock(world: &Mutex<World>) -> MutexGuard<'_, World> {
    world.lock().unwrap_or_else(PoisonError::into_inner)
}

pub const ROOT: u64 = 1;
/// For the largest WRITE that the INIT reply permits, and its headers.
const BUFFER: usize = (1 << 20) + 4096;

pub const LOOKUP: u32 = 1;
const FORGET: u32 = 2;
pub const GETATTR: u32 = 3;
pub const SETATTR: u32 = 4;
pub const OPEN: u32 = 14;
pub const READ: u32 = 15;
pub const WRITE: u32 = 16;
pub const RELEASE: u32 = 18;
pub const FSYNC: u32 = 20;
pub const FLUSH: u32 = 25;
pub const CREATE: u32 = 35;
const INTERRUPT: u32 = 36;
const BATCH_FORGET: u32 = 42;

fn serve(shared: &(Mutex<World>, Condvar), device: &Device) {
    let mut buffer = vec![0; BUFFER];
    loop {
        let length = match rustix::io::read(device.as_fd(), &mut buffer[..]) {
            Ok(length) => length,
            Err(Errno::NOENT | Errno::INTR | Errno::AGAIN) => continue,
            // Aborted or unmounted.
            Err(_) => return,
        };
        let request = Request(&buffer[..length]);
        let mut world = lock(&shared.0);
        // A panic must not leave a client waiting.
        let answer = catch_unwind(AssertUnwindSafe(|| match request.opcode() {
            INTERRUPT => None,
            FORGET => {
                world.dereference(request.nodeid(), request.u64(0));
                None
            }
            BATCH_FORGET => {
                for at in 0..request.u32(0) as usize {
                    let (nodeid, count) = (request.u64(8 + 16 * at), request.u64(16 + 16 * at));
                    world.dereference(nodeid, count);
                }
                None
            }
            _ => Some(world.answer(&request)),
        }));
        let answer = answer.unwrap_or_else(|_| {
            let opcode = request.opcode();
            Some(Err(world.trouble(format!("a panic at request {opcode}"))))
        });
        drop(world);
        shared.1.notify_all();
        if let Some(answer) = answer {
            reply(device, &request, answer);
        }
    }
}

fn reply(device: &Device, request: &Request<'_>, answer: Result<Vec<u8>, Errno>) {
    let (error, body) = match answer {
        Ok(body) => (0, body),
        Err(errno) => (-errno.raw_os_error(), Vec::new()),
    };
    let mut reply = ((16 + body.len()) as u32).to_ne_bytes().to_vec();
    reply.extend(error.to_ne_bytes());
    reply.extend(request.unique().to_ne_bytes());
    reply.extend(body);
    // ENODEV: the connection was aborted.
    let _ = rustix::io::write(device.as_fd(), &reply);
}

/// `fuse_in_header` and what follows it.
pub struct Request<'a>(&'a [u8]);

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
    /// In the body.
    pub fn u32(&self, offset: usize) -> u32 {
        u32::from_ne_bytes(self.field(40 + offset))
    }
    pub fn u64(&self, offset: usize) -> u64 {
        u64::from_ne_bytes(self.field(40 + offset))
    }
}
