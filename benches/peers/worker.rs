//! The client, a separate process: does one operation over and over.

#![allow(unsafe_code)]

use std::ffi::OsStr;
use std::fs::{self, File};
use std::io::{BufRead, Read, stdin};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use libtest_mimic::Failed;

use crate::client::{Client, Role};
use crate::support::contest::Random;
use crate::support::per_op;

pub const ROLES: &[(&str, Role)] = &[("operate", operate)];

/// Files in a batch. The kernel sends RELEASE after close(2) has returned, so a single file that is opened again and
/// again would not be cold.
pub const FILES: usize = 64;
pub const DATA: usize = 128 << 20;

/// The id, the size, and the three steps of a batch. Only the middle step is measured.
pub struct Operation(pub &'static str, pub Size, pub [fn(&mut Worker); 3]);

#[derive(Clone, Copy)]
pub struct Size {
    pub rounds: usize,
    /// Calls in a batch.
    calls: usize,
    /// Bytes of a read or write.
    bytes: usize,
}

const META: Size = size(500, FILES, 4 << 10);
const RANDOM: Size = size(500, 500, 4 << 10);
const SEQUENTIAL: Size = size(150, 32, 1 << 20);

pub const OPERATIONS: [Operation; 10] = [
    Operation("open-hot", META, [idle, open, idle]),
    Operation("open-cold", META, [idle, open, idle]),
    Operation("stat", META, [idle, stat, idle]),
    Operation("create", META, [idle, create, unlink]),
    Operation("small-read", META, [create, small_read, unlink]),
    Operation("unlink", META, [create, unlink, idle]),
    Operation("sequential-read", SEQUENTIAL, [idle, read, idle]),
    Operation("random-read", RANDOM, [idle, read, idle]),
    Operation("sequential-write", SEQUENTIAL, [idle, write, idle]),
    Operation("random-write", RANDOM, [idle, write, idle]),
];

const fn size(rounds: usize, calls: usize, bytes: usize) -> Size {
    Size {
        rounds,
        calls,
        bytes,
    }
}

/// `own`: the name of a folder that no other client uses. `server`: the process id of the server, if any.
pub fn start(
    operation: &Operation,
    folder: &Path,
    own: &str,
    server: Option<u32>,
) -> Result<Client, Failed> {
    let server = server.map(|id| id.to_string()).unwrap_or_default();
    let args: [&OsStr; 4] = [
        operation.0.as_ref(),
        folder.as_ref(),
        own.as_ref(),
        server.as_ref(),
    ];
    Client::start(ROLES[0].0, &args)
}

/// Runs a batch. Returns nanoseconds per call, and nanoseconds of CPU time per call, of client and server together.
pub fn batch(client: &mut Client) -> [f64; 2] {
    client.proceed().expect("the client lives");
    let line = client.line().expect("the client answers");
    let figures: Vec<f64> = line.split(' ').flat_map(str::parse).collect();
    let pair = figures.try_into();
    pair.unwrap_or_else(|_| panic!("the client says: {line:?}"))
}

pub struct Worker {
    /// Files that all clients share.
    paths: Vec<PathBuf>,
    /// This client's own files.
    own: Vec<PathBuf>,
    data: File,
    size: Size,
    buffer: Vec<u8>,
    random: Random,
    at: u64,
}

fn operate(args: &[String]) -> Result<String, Box<dyn std::error::Error>> {
    let operation = OPERATIONS.into_iter().find(|known| known.0 == args[0]);
    let Operation(name, size, steps) = operation.ok_or("no such operation")?;
    let (folder, own) = (Path::new(&args[1]), Path::new(&args[1]).join(&args[2]));
    fs::create_dir_all(&own)?;
    let hot = name == "open-hot";
    let shared = if hot { "hot" } else { "cold" };
    let mut worker = Worker {
        paths: (0..FILES)
            .map(|n| folder.join(format!("{shared}-{n}")))
            .collect(),
        own: (0..FILES).map(|n| own.join(n.to_string())).collect(),
        data: File::options()
            .read(true)
            .write(true)
            .open(folder.join("data"))?,
        size,
        buffer: vec![0x5a; size.bytes],
        // Another order in every client, so that none finds in the CPU's caches what another has just read.
        random: Random(u64::from(std::process::id())),
        at: 0,
    };
    let held = worker.paths.iter().filter(|_| hot).map(File::open);
    let _held = held.collect::<Result<Vec<_>, _>>()?;
    let mut clocks = vec![libc::CLOCK_PROCESS_CPUTIME_ID];
    if let Ok(server) = args[3].parse() {
        clocks.push(clock_of(server)?);
    }
    let cpu_time = || -> f64 { clocks.iter().copied().map(time).sum() };
    for line in stdin().lock().lines() {
        line?;
        steps[0](&mut worker);
        let before = cpu_time();
        let wall = per_op(size.calls, || steps[1](&mut worker));
        let cpu = (cpu_time() - before) / size.calls as f64;
        steps[2](&mut worker);
        println!("{wall} {cpu}");
    }
    Ok(String::new())
}

/// The CPU clock of a process, all its threads included.
fn clock_of(process: libc::pid_t) -> std::io::Result<libc::clockid_t> {
    let mut clock = 0;
    // SAFETY: the call writes a clock id to `clock`, which outlives it.
    match unsafe { libc::clock_getcpuclockid(process, &raw mut clock) } {
        0 => Ok(clock),
        errno => Err(std::io::Error::from_raw_os_error(errno)),
    }
}

/// The CPU time of a clock, in nanoseconds.
fn time(clock: libc::clockid_t) -> f64 {
    let mut time = libc::timespec {
        tv_sec: 0,
        tv_nsec: 0,
    };
    // SAFETY: the call writes a timespec to `time`, which outlives it.
    let failed = unsafe { libc::clock_gettime(clock, &raw mut time) };
    assert_eq!(failed, 0, "the server has ended");
    time.tv_sec as f64 * 1e9 + time.tv_nsec as f64
}

fn idle(_: &mut Worker) {}

fn open(worker: &mut Worker) {
    for path in &worker.paths {
        File::open(path).expect("it opens");
    }
}

fn stat(worker: &mut Worker) {
    for path in &worker.paths {
        rustix::fs::stat(path).expect("it is there");
    }
}

fn create(worker: &mut Worker) {
    for path in &worker.own {
        fs::write(path, &worker.buffer).expect("it creates and writes");
    }
}

fn small_read(worker: &mut Worker) {
    for path in &worker.own {
        let mut file = File::open(path).expect("it opens");
        file.read_exact(&mut worker.buffer).expect("it reads");
    }
}

fn unlink(worker: &mut Worker) {
    for path in &worker.own {
        fs::remove_file(path).expect("it unlinks");
    }
}

impl Worker {
    fn each_piece(&mut self, call: fn(&File, &mut [u8], u64) -> std::io::Result<()>) {
        let Size { calls, bytes, .. } = self.size;
        for _ in 0..calls {
            let next = if bytes == RANDOM.bytes {
                self.random.next()
            } else {
                self.at + 1
            };
            self.at = next % (DATA / bytes) as u64;
            let offset = self.at * bytes as u64;
            call(&self.data, &mut self.buffer, offset).expect("it reads or writes");
        }
    }
}

fn read(worker: &mut Worker) {
    worker.each_piece(|file, piece, at| file.read_exact_at(piece, at));
}

fn write(worker: &mut Worker) {
    worker.each_piece(|file, piece, at| file.write_all_at(piece, at));
}
