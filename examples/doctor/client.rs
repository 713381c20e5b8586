//! Client processes: this program started again, for work that could hang or that the process which
//! serves the mount must not do.

use std::error::Error;
use std::ffi::OsStr;
use std::fs::File;
use std::io::{self, Read};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::thread::sleep;
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::fs::{Mode, OFlags, openat};
use rustix::io::Errno;

use crate::advice::{CHECK_THE_LOG, Failure};

/// `--client-read NAME`: reads a file of the directory on standard input.
pub(crate) const READ: &str = "--client-read";
/// `--client-probe PATH`: registers a file at PATH with the FUSE device on standard input.
pub(crate) const PROBE: &str = "--client-probe";

/// Limit for steps that are immediate, unless something is broken or a disk has to spin up.
pub(crate) const PATIENCE: Duration = Duration::from_secs(10);

/// The result of a client process.
pub(crate) struct Ran {
    /// What it printed within `PATIENCE`.
    pub(crate) printed: String,
    /// Why it failed, if it did.
    pub(crate) result: Result<(), Failure>,
}

/// Runs a client process. It gets its fd as standard input, so that no other fd has to be inheritable.
pub(crate) fn run(part: &str, operand: impl AsRef<OsStr>, stdin: Stdio) -> Ran {
    let mut printed = Vec::new();
    let started = start(part, operand.as_ref(), stdin);
    let result = match started {
        Ok(child) => follow(child, &mut printed),
        Err(e) => Err(Failure::new(
            format!("cannot start a client process: {e}"),
            "make /proc accessible: the doctor starts itself again through it",
        )),
    };
    Ran {
        printed: String::from_utf8_lossy(&printed).into_owned(),
        result,
    }
}

fn start(part: &str, operand: &OsStr, stdin: Stdio) -> io::Result<Child> {
    // Not by path: in this mount namespace the path may be missing, or be another program.
    Command::new("/proc/self/exe")
        .arg(part)
        .arg(operand)
        .stdin(stdin)
        .stdout(Stdio::piped())
        .spawn()
}

fn follow(mut child: Child, printed: &mut Vec<u8>) -> Result<(), Failure> {
    let deadline = Instant::now() + PATIENCE;
    let ended = gather(&mut child, deadline, printed).and_then(|()| wait_for(&mut child, deadline));
    match ended {
        Ok(Some(status)) if status.success() => Ok(()),
        Ok(Some(status)) => {
            let cause = match String::from_utf8_lossy(printed).trim_end() {
                "" => format!("a client process failed: {status}"),
                why => why.to_owned(),
            };
            Err(Failure::new(cause, CHECK_THE_LOG))
        }
        // Not waited for after the kill: a process that hangs in the kernel may not end at once.
        Ok(None) => {
            let _ = child.kill();
            Err(Failure::new(
                format!("no answer within {} seconds", PATIENCE.as_secs()),
                "check that the disk, or the server of the filesystem, still works",
            ))
        }
        Err(e) => {
            let _ = child.kill();
            Err(Failure::new(
                format!("cannot wait for a client process: {e}"),
                CHECK_THE_LOG,
            ))
        }
    }
}

/// Collects what the client prints, until it closes its standard output.
fn gather(child: &mut Child, deadline: Instant, printed: &mut Vec<u8>) -> io::Result<()> {
    let Some(mut output) = child.stdout.take() else {
        return Ok(());
    };
    let mut buffer = [0; 4096];
    loop {
        let left = deadline.saturating_duration_since(Instant::now());
        let left = Timespec::try_from(left).map_err(|_| Errno::INVAL)?;
        match poll(&mut [PollFd::new(&output, PollFlags::IN)], Some(&left)) {
            Ok(0) => return Ok(()),
            Ok(_) => match output.read(&mut buffer)? {
                0 => return Ok(()),
                length => printed.extend_from_slice(&buffer[..length]),
            },
            Err(Errno::INTR) => {}
            Err(errno) => return Err(errno.into()),
        }
    }
}

fn wait_for(child: &mut Child, deadline: Instant) -> io::Result<Option<ExitStatus>> {
    let mut status = Ok(None);
    within(deadline.saturating_duration_since(Instant::now()), || {
        status = child.try_wait();
        !matches!(status, Ok(None))
    });
    status
}

/// Waits until `done` returns true, for at most `patience`.
pub(crate) fn within(patience: Duration, mut done: impl FnMut() -> bool) {
    let deadline = Instant::now() + patience;
    while !done() && Instant::now() < deadline {
        sleep(Duration::from_millis(1));
    }
}

/// Runs in the client process: returns the size and the checksum of a file.
pub(crate) fn read(name: &OsStr) -> Result<String, Box<dyn Error>> {
    let flags = OFlags::RDONLY | OFlags::CLOEXEC;
    let file = openat(io::stdin(), name, flags, Mode::empty())
        .map_err(|errno| format!("the client's open failed: {errno}"))?;
    let mut content = Vec::new();
    File::from(file)
        .read_to_end(&mut content)
        .map_err(|e| format!("the client's read failed: {e}"))?;
    Ok(summary(&content))
}

/// Size and checksum, to compare what two processes have read.
pub(crate) fn summary(content: &[u8]) -> String {
    format!("{} {:08x}\n", content.len(), crc32fast::hash(content))
}
