//! Child processes: clients of a mount, and roles that need a process of their own.
//!
//! A process that holds files open on its own FUSE mount can deadlock when it exits. So files of a mount that the test
//! process serves are opened by a child, which executes the test binary again.

use std::env;
use std::ffi::OsStr;
use std::io::{self, BufRead, BufReader, Write};
use std::os::fd::OwnedFd;
use std::process::{Child, ChildStdin, ChildStdout, Command, ExitCode, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use libtest_mimic::Failed;
use rustix::io::Errno;

/// The first argument of a child: it tells the test binary that it is one.
const MARK: &str = "--fuse-backing-child";

/// What a child does: it gets its arguments, may print lines, and returns its last line.
pub type Role = fn(&[String]) -> Result<String, Box<dyn std::error::Error>>;

/// Runs this process's role, if it is a child.
pub fn play(roles: &[(&str, Role)]) -> Option<ExitCode> {
    let mut args = env::args().skip(1);
    if args.next()? != MARK {
        return None;
    }
    let name = args.next()?;
    let rest: Vec<_> = args.collect();
    let found: Vec<_> = roles.iter().filter(|(role, _)| *role == name).collect();
    let [(_, role)] = found[..] else {
        println!("{} roles are called {name}", found.len());
        return Some(ExitCode::FAILURE);
    };
    let (last, code) = match role(&rest) {
        Ok(last) => (last, ExitCode::SUCCESS),
        Err(error) => (format!("error: {error}"), ExitCode::FAILURE),
    };
    println!("{last}");
    Some(code)
}

/// A child that was started. Dropping it kills it.
pub struct Client {
    child: Child,
    input: Option<ChildStdin>,
    output: BufReader<ChildStdout>,
}

impl Client {
    pub fn start(role: &str, args: &[&OsStr]) -> Result<Self, Failed> {
        Self::start_with(role, args, Stdio::piped())
    }

    /// Starts it with an fd as its standard input, the only way to pass an fd without making it inheritable.
    pub fn start_with_fd(role: &str, args: &[&OsStr], fd: OwnedFd) -> Result<Self, Failed> {
        Self::start_with(role, args, Stdio::from(fd))
    }

    fn start_with(role: &str, args: &[&OsStr], input: Stdio) -> Result<Self, Failed> {
        let mut child = command(role)?
            .args(args)
            .stdin(input)
            .stdout(Stdio::piped())
            .spawn()?;
        let output = child.stdout.take().ok_or("stdout is not piped")?;
        Ok(Self {
            input: child.stdin.take(),
            output: BufReader::new(output),
            child,
        })
    }

    pub fn id(&self) -> u32 {
        self.child.id()
    }

    /// The next line that the child prints.
    pub fn line(&mut self) -> Result<String, Failed> {
        let mut line = String::new();
        self.output.read_line(&mut line)?;
        Ok(line.trim_end().to_owned())
    }

    /// Ends the child's `wait_for_parent`.
    pub fn proceed(&mut self) -> Result<(), Failed> {
        self.input.as_mut().ok_or("no pipe")?.write_all(b"\n")?;
        Ok(())
    }

    pub fn kill(&mut self) -> Result<(), Failed> {
        Ok(self.child.kill()?)
    }

    /// Whether the child ends within this time.
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

    /// Waits for the child's end, and returns the last line that it printed.
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

/// The command that starts a child of this role, without arguments.
pub fn command(role: &str) -> Result<Command, Failed> {
    let mut command = Command::new(env::current_exe()?);
    command
        .args([MARK, role])
        .env("TMPDIR", tempfile::env::temp_dir());
    Ok(command)
}

/// Starts a child, waits for its end, and returns the last line that it printed.
pub fn run(role: &str, args: &[&OsStr]) -> Result<String, Failed> {
    Client::start(role, args)?.finish()
}

/// How a child prints an errno.
pub fn errno(errno: Errno) -> String {
    format!("errno {}", errno.raw_os_error())
}

/// How a child prints the errno of an error, 0 if it has none.
pub fn errno_of(error: &io::Error) -> String {
    format!("errno {}", error.raw_os_error().unwrap_or(0))
}

/// In the child: waits for `Client::proceed`.
pub fn wait_for_parent() -> io::Result<()> {
    io::stdin().read_line(&mut String::new()).map(drop)
}
