//! The client, a separate process: reads or writes a file that it keeps open.

use std::ffi::OsString;
use std::fs::File;
use std::io::{BufRead, stdin};
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::sync::Mutex;

use libtest_mimic::Failed;
use rustix::fs::{Advice, fadvise};
use rustix::time::{ClockId, clock_gettime};

use crate::client::{Client, Role};
use crate::support::contest::Random;
use crate::support::{cpu, threads};

pub const ROLES: &[(&str, Role)] = &[("read-or-write", read_or_write)];

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    SequentialRead,
    RandomRead,
    SequentialWrite,
    RandomWrite,
}

impl Kind {
    pub const ALL: [Self; 4] = [
        Self::SequentialRead,
        Self::RandomRead,
        Self::SequentialWrite,
        Self::RandomWrite,
    ];

    pub fn id(self) -> &'static str {
        match self {
            Self::SequentialRead => "sequential-read",
            Self::RandomRead => "random-read",
            Self::SequentialWrite => "sequential-write",
            Self::RandomWrite => "random-write",
        }
    }

    pub fn title(self) -> &'static str {
        match self {
            Self::SequentialRead => "Sequential reads of 1 MiB",
            Self::RandomRead => "Random reads of 4 KiB",
            Self::SequentialWrite => "Sequential writes of 1 MiB",
            Self::RandomWrite => "Random writes of 4 KiB",
        }
    }

    pub fn reads(self) -> bool {
        matches!(self, Self::SequentialRead | Self::RandomRead)
    }

    fn is_sequential(self) -> bool {
        matches!(self, Self::SequentialRead | Self::SequentialWrite)
    }

    fn length(self) -> usize {
        if self.is_sequential() {
            1 << 20
        } else {
            4 << 10
        }
    }

    pub fn rounds(self) -> usize {
        if self.is_sequential() { 150 } else { 1_000 }
    }

    /// Calls of one thread in a batch.
    pub fn calls(self) -> usize {
        if self.is_sequential() { 32 } else { 500 }
    }
}

pub struct Reader(Client);

impl Reader {
    /// `cold`: before each batch, the kernel drops the file's cached pages.
    pub fn start(path: &Path, kind: Kind, threads: usize, cold: bool) -> Result<Self, Failed> {
        let mut args = vec![path.as_os_str().to_owned(), OsString::from(kind.id())];
        args.push(threads.to_string().into());
        args.push(cold.to_string().into());
        let args: Vec<_> = args.iter().map(OsString::as_os_str).collect();
        Ok(Self(Client::start(ROLES[0].0, &args)?))
    }

    /// Nanoseconds per call of a batch, and nanoseconds of CPU time per call: the client's plus this process's, where
    /// the server runs.
    pub fn batch(&mut self) -> [f64; 2] {
        let before = cpu_time();
        self.0.proceed().expect("the client lives");
        let line = self.0.line().expect("the client answers");
        let server = cpu_time() - before;
        let figures: Vec<f64> = line.split(' ').flat_map(str::parse).collect();
        let [each, client, ops] = figures[..] else {
            panic!("the client says: {line:?}");
        };
        [each, client + server / ops]
    }
}

/// A thread's own open of the file, and its position.
struct Worker {
    file: File,
    buffer: Vec<u8>,
    random: Random,
    at: u64,
    calls: u64,
}

fn read_or_write(args: &[String]) -> Result<String, Box<dyn std::error::Error>> {
    let (path, threads, cold) = (&args[0], args[2].parse::<usize>()?, args[3] == "true");
    let kind = Kind::ALL.into_iter().find(|kind| kind.id() == args[1]);
    let kind = kind.ok_or("no such kind")?;
    // A single thread runs on the same CPU in every batch; the kernel places the server.
    let _pinned = (threads == 1).then(cpu::pin);

    let calls = std::fs::metadata(path)?.len() / kind.length() as u64;
    let mut workers = Vec::new();
    for index in 0..threads as u64 {
        let file = File::options().read(true).write(!kind.reads()).open(path)?;
        workers.push(Mutex::new(Worker {
            file,
            buffer: vec![0x5a; kind.length()],
            // Another order in every client, so that none finds in the CPU's caches what another has
            // just read.
            random: Random((u64::from(std::process::id()) << 8) | (index + 1)),
            // Threads start apart from each other.
            at: index * calls / threads as u64,
            calls,
        }));
    }
    if kind.reads() && !cold {
        // Fills the page cache, which the open has emptied.
        let file = &workers[0].lock().expect("no panic").file;
        std::io::copy(&mut &*file, &mut std::io::sink())?;
    }
    let ops = threads * kind.calls();
    for line in stdin().lock().lines() {
        line?;
        if cold {
            let worker = workers[0].lock().expect("no panic");
            fadvise(&worker.file, 0, None, Advice::DontNeed)?;
        }
        let before = cpu_time();
        let each = threads::per_op(threads, ops, |index| {
            workers[index].lock().expect("no panic").work(kind);
        });
        let client = (cpu_time() - before) / ops as f64;
        println!("{each} {client} {ops}");
    }
    Ok(String::new())
}

/// The CPU time of this process, in nanoseconds.
fn cpu_time() -> f64 {
    let time = clock_gettime(ClockId::ProcessCPUTime);
    time.tv_sec as f64 * 1e9 + time.tv_nsec as f64
}

impl Worker {
    fn work(&mut self, kind: Kind) {
        for _ in 0..kind.calls() {
            let call = if kind.is_sequential() {
                self.at += 1;
                self.at % self.calls
            } else {
                self.random.next() % self.calls
            };
            let offset = call * kind.length() as u64;
            if kind.reads() {
                let read = self.file.read_exact_at(&mut self.buffer, offset);
                read.expect("it reads");
            } else {
                let written = self.file.write_all_at(&self.buffer, offset);
                written.expect("it writes");
            }
        }
    }
}
