//! Clients: this program once more, for what must not be done by the process that serves the mount,
//! or could hang.

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

/// For what takes no time, unless something is broken or a disk has to spin up.
pub(crate) const PATIENCE: Duration = Duration::from_secs(10);

/// What came of a client.
pub(crate) struct Ran {
    /// What it printed in time.
    pub(crate) printed: String,
    /// Why it did not end well.
    pub(crate) result: Result<(), Failure>,
}

/// Runs a client with an fd as its standard input: the one way to hand it over that needs no
/// inheritable fd.
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
    // The path of the program may be another one, or none, in this mount namespace.
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
        // Killed, but not waited for: what hangs in the kernel may not end at once.
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

/// What the client prints, until it has closed its standard output.
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

/// Waits until it is done, but not forever.
pub(crate) fn within(patience: Duration, mut done: impl FnMut() -> bool) {
    let deadline = Instant::now() + patience;
    while !done() && Instant::now() < deadline {
        sleep(Duration::from_millis(1));
    }
}

/// In the client: the size and the checksum of a file.
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

/// What tells whether two processes have the same bytes.
pub(crate) fn summary(content: &[u8]) -> String {
    format!("{} {:08x}\n", content.len(), crc32fast::hash(content))
}
