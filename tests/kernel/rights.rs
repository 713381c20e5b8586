//! With whose rights passthrough I/O runs: the rows of the table in `fuse_backing::rights`, and the registering thread
//! afterwards. tests/rights.rs has the tests that need no kernel.

pub mod by_access;
pub mod lowered;
pub mod thread;

use std::env;
use std::ffi::OsStr;
use std::fs::File;
use std::io::{Read, Write};
use std::os::fd::{BorrowedFd, OwnedFd};
use std::path::Path;
use std::sync::atomic::{AtomicI32, Ordering};
use std::sync::{Arc, Mutex};

use fuse_backing::error::{BackingCloseError, BackingError};
use fuse_backing::rights::CapabilitySet;
use fuse_backing::{Access, BackingId, FuseDevice, Register, register::InCallingThread, uapi};
use libtest_mimic::Failed;
use rustix::thread::{CapabilitySets, capabilities};

use crate::client::{self, Role, errno_of};
use crate::fuse::{Connection, Init, Node, unchecked};
use crate::sandbox::Sandbox;
use crate::thread::become_user;

pub const ROLES: &[(&str, Role)] = &[
    ("stranger", stranger),
    ("register-lowered", lowered::register),
    ("fill", fill),
];

const CONTENT: &str = "content";
/// What a stranger writes.
const WRITTEN: &str = "CON";

type Device = FuseDevice<Arc<OwnedFd>>;

/// Enters the file's folder, which only root may be able to reach, and becomes an ordinary user. Returns the file's
/// name.
fn become_stranger(path: &Path) -> Result<&OsStr, Box<dyn std::error::Error>> {
    env::set_current_dir(path.parent().ok_or("no folder")?)?;
    become_user(1001, &[])?;
    assert!(sets().effective.is_empty());
    Ok(path.file_name().unwrap_or_default())
}

/// As a stranger, appends to the file until ENOSPC.
fn fill(args: &[String]) -> Result<String, Box<dyn std::error::Error>> {
    let name = become_stranger(Path::new(&args[0]))?;
    let mut file = File::options().append(true).open(name)?;
    loop {
        match file.write(&[0x5a; 4096]) {
            Ok(_) => {}
            Err(error) if error.raw_os_error() == Some(libc::ENOSPC) => return Ok("full".into()),
            Err(error) => return Err(error.into()),
        }
    }
}

/// As a stranger, opens the file for "r", "w" or "rw". Writes if it opened for writing, otherwise reads. Prints
/// "written", what it read, or the errno.
fn stranger(args: &[String]) -> Result<String, Box<dyn std::error::Error>> {
    let name = become_stranger(Path::new(&args[0]))?;
    let (reads, writes) = (args[1].contains('r'), args[1].contains('w'));
    let used = || {
        let mut options = File::options();
        let mut file = options.read(reads).write(writes).open(name)?;
        if writes {
            file.write_all(WRITTEN.as_bytes())?;
            return Ok("written".to_owned());
        }
        let mut content = String::new();
        file.read_to_string(&mut content).map(|_| content)
    };
    Ok(used().unwrap_or_else(|error| errno_of(&error)))
}

fn as_stranger(path: &Path, how: &str) -> Result<String, Failed> {
    client::run("stranger", &[path.as_os_str(), OsStr::new(how)])
}

/// A mount of one file. Its server answers every OPEN with the id of the last `answer_with`, whatever the client's
/// flags.
struct Place {
    connection: Connection,
    id: Arc<AtomicI32>,
}

impl Place {
    fn new(sandbox: &Sandbox, init: Init, backing: &File) -> Result<Self, Failed> {
        let id = Arc::<AtomicI32>::default();
        let node = Node {
            name: "file".into(),
            backing: backing.try_clone()?,
        };
        let on_open = {
            let id = Arc::clone(&id);
            move |_, _| {
                let id = id.load(Ordering::SeqCst);
                Ok(unchecked(1, uapi::FOPEN_PASSTHROUGH, id))
            }
        };
        let connection = Connection::serve(sandbox, init, vec![node], Arc::new(on_open))?;
        Ok(Self { connection, id })
    }

    fn answer_with(&self, id: BackingId) {
        self.id.store(id.into_raw(), Ordering::SeqCst);
    }

    fn client(&self, how: &str) -> Result<String, Failed> {
        as_stranger(&self.connection.path("file"), how)
    }

    /// How many READ and WRITE requests the server got.
    fn asked(&self) -> (u64, u64) {
        let seen = &self.connection.seen;
        let asked = [&seen.reads, &seen.writes].map(|count| count.load(Ordering::SeqCst));
        (asked[0], asked[1])
    }
}

/// Asserts that the kernel no longer knows this id.
#[track_caller]
fn assert_closed(connection: &Connection, id: i32) {
    let closed = connection.device().backing_close(known(id));
    assert_eq!(closed.unwrap_err().cause(), BackingError::UnknownId);
}

fn known(id: i32) -> BackingId {
    BackingId::from_raw(id).expect("positive")
}

fn sets() -> CapabilitySets {
    capabilities(None).expect("capget")
}

/// A device that notes the thread's capabilities and the id at each registration, and then calls `afterwards`.
struct Noting<F = fn()> {
    device: Device,
    noted: Mutex<Vec<(CapabilitySets, Option<i32>)>>,
    afterwards: F,
}

impl Noting {
    fn new(device: Device) -> Self {
        Self::then(device, || {})
    }
}

impl<F: Fn()> Noting<F> {
    fn then(device: Device, afterwards: F) -> Self {
        Self {
            device,
            noted: Mutex::default(),
            afterwards,
        }
    }

    fn noted(&self) -> Vec<(CapabilitySets, Option<i32>)> {
        self.noted.lock().unwrap().clone()
    }

    /// The thread's effective capabilities at the last registration.
    fn effective(&self) -> CapabilitySet {
        let noted = self.noted();
        noted.last().expect("registered").0.effective
    }

    /// The id of the last registration.
    fn id(&self) -> i32 {
        let noted = self.noted();
        noted.last().and_then(|(_, id)| *id).expect("registered")
    }
}

impl<F: Fn()> InCallingThread for Noting<F> {}

impl<F: Fn()> Register for Noting<F> {
    fn register(&self, file: BorrowedFd<'_>, grant: Access) -> Result<BackingId, BackingError> {
        let result = self.device.register(file, grant);
        let id = result.as_ref().ok().map(BackingId::as_raw);
        self.noted.lock().unwrap().push((sets(), id));
        (self.afterwards)();
        result
    }

    fn unregister(&self, id: BackingId) -> Result<(), BackingCloseError<BackingId>> {
        self.device.unregister(id)
    }
}
