//! Many clients open and close files at the same time. They get no error, and nothing is left behind.

use std::error::Error;
use std::ffi::OsString;
use std::fs::{self, File};
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::thread;

use libtest_mimic::Failed;
use macro_rules_attribute::apply;

use crate::backing::Backing;
use crate::client::{Client, Role};
use crate::sandbox::Sandbox;
use crate::server::{Mirror, Way};

pub const ROLES: &[(&str, Role)] = &[("race", open_and_close)];

const PROCESSES: usize = 4;
const THREADS: usize = 2;
const OPENS: usize = 100_000;

fn content(file: usize) -> String {
    format!("this is file {file:02}")
}

#[apply(test_case)]
fn one_inode(name: &str) -> Result<(), Failed> {
    race(name, 1)
}

#[apply(test_case)]
fn many_inodes(name: &str) -> Result<(), Failed> {
    race(name, 64)
}

fn race(name: &str, files: usize) -> Result<(), Failed> {
    let sandbox = Sandbox::new(name)?;
    let backing = Backing::in_memory(&sandbox, "tmpfs")?;
    let source = backing.folder("source")?;
    for file in 0..files {
        fs::write(source.join(file.to_string()), content(file))?;
    }
    let mirror = Mirror::start(&sandbox, &source, Way::Passthrough)?;
    let clients: Vec<_> = (0..PROCESSES)
        .map(|process| {
            let args: [OsString; 3] = [
                mirror.path().into(),
                files.to_string().into(),
                process.to_string().into(),
            ];
            Client::start("race", &args.each_ref().map(|arg| arg.as_os_str()))
        })
        .collect::<Result<_, _>>()?;
    let opens = OPENS / PROCESSES;
    for client in clients {
        assert_eq!(client.finish()?, format!("{opens} opens without an error"));
    }
    mirror.wait_for_releases()?;
    for file in 0..files {
        let found = fs::read_to_string(source.join(file.to_string()))?;
        assert_eq!(found, content(file));
    }
    mirror.stop(&backing)
}

/// Arguments: a folder, the number of files in it, and this client's own number.
fn open_and_close(args: &[String]) -> Result<String, Box<dyn Error>> {
    let [folder, files, process] = args else {
        return Err("a folder and two numbers".into());
    };
    let (folder, files, process) = (Path::new(folder), files.parse()?, process.parse::<usize>()?);
    let opens: Result<usize, String> = thread::scope(|scope| {
        let threads: Vec<_> = (0..THREADS)
            .map(|thread| {
                let seed = (process * THREADS + thread + 1) as u64;
                scope.spawn(move || one_thread(folder, files, seed))
            })
            .collect();
        threads
            .into_iter()
            .map(|thread| thread.join().map_err(|_| "a thread panicked".to_owned())?)
            .sum()
    });
    Ok(format!("{} opens without an error", opens?))
}

fn one_thread(folder: &Path, files: usize, seed: u64) -> Result<usize, String> {
    const OPENS_OF_A_THREAD: usize = OPENS / PROCESSES / THREADS;
    // xorshift64, so that each thread has its own sequence.
    let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15);
    for n in 0..OPENS_OF_A_THREAD {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        let file = state as usize % files;
        let writing = state >> 32 & 1 == 1;
        one_open(folder, file, writing, n)
            .map_err(|error| format!("open {n}, of file {file}, writing: {writing}: {error}"))?;
    }
    Ok(OPENS_OF_A_THREAD)
}

fn one_open(folder: &Path, file: usize, writing: bool, n: usize) -> Result<(), Box<dyn Error>> {
    let path = folder.join(file.to_string());
    let open = File::options().read(true).write(writing).open(path)?;
    // Most opens are not used, so that more of them happen at the same time.
    if n % 16 == 0 {
        let expected = content(file);
        if writing {
            open.write_all_at(&expected.as_bytes()[..4], 0)?;
        }
        let mut found = vec![0; expected.len()];
        open.read_exact_at(&mut found, 0)?;
        if found != expected.as_bytes() {
            return Err(format!("it has \"{}\"", found.escape_ascii()).into());
        }
    }
    Ok(())
}
