//! The FUSE protocol, as far as sequences need it.

use std::os::fd::AsFd;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use fuse_backing::error::Errno;

use super::Wrong;
use super::world::{Device, World, name_of};
use crate::fuse::{BATCH_FORGET, BUFFER, FORGET, INTERRUPT, Request, reply};

/// The thread that serves, and the state that it shares.
pub struct Server {
    shared: Arc<(Mutex<World>, Condvar)>,
    device: Device,
    thread: JoinHandle<()>,
}

impl Server {
    /// Serves a connection whose INIT was answered.
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

    /// Waits for at most 5 seconds: the kernel sends RELEASE after close(2) has returned, and FORGET some time later.
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

    /// Makes the kernel look a name up again. It then forgets the inode, unless that is open.
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
        // Fails with ENOENT if the kernel does not know the name.
        let _ = rustix::io::write(self.device.as_fd(), &message);
    }

    /// To be called after the connection was aborted or unmounted.
    pub fn join(self) {
        let _ = self.thread.join();
    }
}

fn lock(world: &Mutex<World>) -> MutexGuard<'_, World> {
    world.lock().unwrap_or_else(PoisonError::into_inner)
}

pub const ROOT: u64 = 1;
pub const FSYNC: u32 = 20;
pub const CREATE: u32 = 35;

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
            Some(Err(world.trouble(format!("a panic at opcode {opcode}"))))
        });
        drop(world);
        shared.1.notify_all();
        if let Some(answer) = answer {
            reply(device, &request, answer);
        }
    }
}
