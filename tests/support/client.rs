//! Child processes: clients of a mount, and roles that need a process of their own.
//!
//! A process that holds files open on its own FUSE mount can deadlock when it exits, so whatever
//! opens a file of a mount that the test process serves is a re-execution of the test binary.

use std::env;
use std::ffi::OsStr;
use std::io::{BufRead, BufReader, Write};
use std::os::fd::OwnedFd;
use std::process::{Child, ChildStdin, ChildStdout, Command, ExitCode, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use libtest_mimic::Failed;

/// The argument by which the test binary knows that it is a child.
const MARK: &str = "--fuse-backing-child";

/// A child's part: gets its arguments, talks on stdout, returns what it ends with.
pub type Role = fn(&[String]) -> Result<String, Box<dyn std::error::Error>>;

/// Runs this process's part, if it is a child.
pub fn play(roles: &[(&str, Role)]) -> Option<ExitCode> {
    let mut args = env::args().skip(1);
    if args.next()? != MARK {
        return None;
    }
    let name = args.next()?;
    let rest: Vec<_> = args.collect();
    let found: Vec<_> = roles.iter().filter(|(role, _)| *role == name).collect();
    let [(_, role)] = found[..] else {
        println!("{} roles {name}", found.len());
        return Some(ExitCode::FAILURE);
    };
    let (last, code) = match role(&rest) {
        Ok(last) => (last, ExitCode::SUCCESS),
        Err(error) => (format!("error: {error}"), ExitCode::FAILURE),
    };
    println!("{last}");
    Some(code)
}

/// A child that was started. Killed when dropped before it ended.
pub struct Client {
    child: Child,
    input: Option<ChildStdin>,
    output: BufReader<ChildStdout>,
}

impl Client {
    pub fn start(role: &str, args: &[&OsStr]) -> Result<Self, Failed> {
        Self::start_with(role, args, Stdio::piped())
    }

    /// With an fd as its standard input: the one way to hand it over that needs no inheritable fd.
    pub fn start_with_fd(role: &str, args: &[&OsStr], fd: OwnedFd) -> Result<Self, Failed> {
        Self::start_with(role, args, Stdio::from(fd))
    }

    fn start_with(role: &str, args: &[&OsStr], input: Stdio) -> Result<Self, Failed> {
        let mut child = command(role)?
            .args(args)
            .stdin(input)
            .stdout(Stdio::piped())
            .spawn()?;
        let output = child.stdout.take().ok_or("stdout is piped")?;
        Ok(Self {
            input: child.stdin.take(),
            output: BufReader::new(output),
            child,
        })
    }

    pub fn id(&self) -> u32 {
        self.child.id()
    }

    /// The next line that it prints.
    pub fn line(&mut self) -> Result<String, Failed> {
        let mut line = String::new();
        self.output.read_line(&mut line)?;
        Ok(line.trim_end().to_owned())
    }

    /// Lets a child go on that waits in `wait_for_parent`.
    pub fn proceed(&mut self) -> Result<(), Failed> {
        self.input.as_mut().ok_or("no pipe")?.write_all(b"\n")?;
        Ok(())
    }

    pub fn kill(&mut self) -> Result<(), Failed> {
        Ok(self.child.kill()?)
    }

    /// Whether it ends within that time.
    pub fn ends_within(&mut self, time: Duration) -> Result<bool, Failed> {
        let deadline = Instant::now() + time;
        while self.child.try_wait()?.is_none() {
            if Instant::now() > deadline {
                return Ok(false);
            }
            thread::sleep(Duration::from_millis(5));
        }
        Ok(true)
    }

    /// Waits for its end, and returns the last line that it printed.
    pub fn finish(mut self) -> Result<String, Failed> {
        drop(self.input.take());
        let mut last = String::new();
        let mut line = self.line()?;
        while !line.is_empty() {
            last = line;
            line = self.line()?;
        }
        self.child.wait()?;
        Ok(last)
    }
}

impl Drop for Client {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// A child that is yet to be started, with no argument so far.
pub fn command(role: &str) -> Result<Command, Failed> {
    let mut command = Command::new(env::current_exe()?);
    command
        .args([MARK, role])
        .env("TMPDIR", tempfile::env::temp_dir());
    Ok(command)
}

/// Start to end.
pub fn run(role: &str, args: &[&OsStr]) -> Result<String, Failed> {
    Client::start(role, args)?.finish()
}

/// In the child.
pub fn wait_for_parent() -> std::io::Result<()> {
    std::io::stdin().read_line(&mut String::new()).map(drop)
}
