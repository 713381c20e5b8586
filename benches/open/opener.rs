//! The client, a separate process: opens a file, possibly reads it, and closes it, over and over.

use std::ffi::OsString;
use std::fs::File;
use std::io::{BufRead, stdin};
use std::os::unix::fs::FileExt;
use std::path::Path;

use libtest_mimic::Failed;

use crate::client::{Client, Role};
use crate::support::per_op;

pub const ROLES: &[(&str, Role)] = &[("open-and-close", open_and_close)];

/// The largest read.
const CHUNK: usize = 128 << 10;

/// What the client reads between open and close.
#[derive(Clone, Copy, Debug)]
pub struct Reading {
    pub bytes: u64,
    /// How many times the file is read from start to end.
    pub passes: usize,
}

impl Reading {
    pub const NONE: Self = Self {
        bytes: 0,
        passes: 0,
    };
}

pub struct Opener(Client);

impl Opener {
    pub fn start(path: &Path, batch: usize, reading: Reading) -> Result<Self, Failed> {
        let numbers = [batch as u64, reading.bytes, reading.passes as u64];
        let mut args = vec![path.as_os_str().to_owned()];
        args.extend(numbers.map(|number| OsString::from(number.to_string())));
        let args: Vec<_> = args.iter().map(OsString::as_os_str).collect();
        Ok(Self(Client::start(ROLES[0].0, &args)?))
    }

    /// Runs a batch. Returns nanoseconds per open and close.
    pub fn batch(&mut self) -> f64 {
        self.0.proceed().expect("the client lives");
        let line = self.0.line().expect("the client answers");
        line.parse()
            .unwrap_or_else(|_| panic!("the client says: {line:?}"))
    }
}

fn open_and_close(args: &[String]) -> Result<String, Box<dyn std::error::Error>> {
    let (path, batch) = (&args[0], args[1].parse()?);
    let reading = Reading {
        bytes: args[2].parse()?,
        passes: args[3].parse()?,
    };
    let mut buffer = vec![0; CHUNK.min(reading.bytes as usize)];
    for line in stdin().lock().lines() {
        line?;
        let each = per_op(batch, || {
            for _ in 0..batch {
                let file = File::open(path).expect("it opens");
                for _ in 0..reading.passes {
                    read(&file, &mut buffer, reading.bytes);
                }
            }
        });
        println!("{each}");
    }
    Ok(String::new())
}

fn read(file: &File, buffer: &mut [u8], bytes: u64) {
    let mut offset = 0;
    while offset < bytes {
        let length = file.read_at(buffer, offset).expect("it reads");
        assert!(length > 0, "the file is too short");
        offset += length as u64;
    }
}
