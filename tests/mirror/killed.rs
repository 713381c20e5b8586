//! A server is killed while clients have files open. The clients get errors and do not hang, and the backing
//! filesystem can be unmounted.

use std::error::Error;
use std::fs::{self, File};
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::thread;
use std::time::Duration;

use libtest_mimic::Failed;
use macro_rules_attribute::apply;
use rustix::io::Errno;

use crate::backing::Backing;
use crate::client::{Client, Role, wait_for_parent};
use crate::sandbox::Sandbox;
use crate::server::{Mirror, Way, within};

pub const ROLES: &[(&str, Role)] = &[("hold", hold), ("stat", stat)];

const CONTENT: &str = "what the backing file says";

/// Opens a file for reading and writing, prints so, waits, and prints the outcomes of calls on it.
fn hold(args: &[String]) -> Result<String, Box<dyn Error>> {
    let path = Path::new(&args[0]);
    let file = File::options().read(true).write(true).open(path)?;
    println!("open");
    wait_for_parent()?;
    let mut content = [0; CONTENT.len()];
    let read = match file.read_exact_at(&mut content, 0) {
        Ok(()) => content.escape_ascii().to_string(),
        Err(error) => said(&error),
    };
    println!("{read}");
    println!("{}", outcome(file.metadata()));
    println!("{}", outcome(file.sync_all()));
    println!("{}", outcome(File::open(path)));
    println!(
        "{}",
        outcome(fs::read_dir(path.parent().ok_or("no parent")?))
    );
    drop(file);
    Ok("closed".into())
}

/// Makes one call that the server must answer.
fn stat(args: &[String]) -> Result<String, Box<dyn Error>> {
    Ok(outcome(fs::metadata(&args[0])))
}

fn outcome<T>(result: std::io::Result<T>) -> String {
    result.map_or_else(|error| said(&error), |_| "ok".into())
}

fn said(error: &std::io::Error) -> String {
    format!("errno {}", error.raw_os_error().unwrap_or(0))
}

fn errno(errno: Errno) -> String {
    format!("errno {}", errno.raw_os_error())
}

/// A mirror of one file, and a client that has it open.
fn setup(sandbox: &Sandbox, way: Way) -> Result<(Backing, Mirror, Client), Failed> {
    let backing = Backing::in_memory(sandbox, "tmpfs")?;
    let source = backing.folder("source")?;
    fs::write(source.join("file"), CONTENT)?;
    let mirror = Mirror::start(sandbox, &source, way)?;
    let path = mirror.path().join("file");
    let mut holder = Client::start("hold", &[path.as_os_str()])?;
    assert_eq!(holder.line()?, "open");
    // `Mirror::wait_for_releases` relies on this count.
    assert_eq!(mirror.open_files()?, 1);
    Ok((backing, mirror, holder))
}

/// Every call that the server would have to answer fails.
fn expect_errors(holder: &mut Client, way: Way) -> Result<(), Failed> {
    holder.proceed()?;
    let read = holder.line()?;
    let disconnected = errno(Errno::NOTCONN);
    if way.is_passthrough()? {
        // The kernel needs no server to read. Whether it checks for one is not asserted.
        assert!(read == CONTENT || read == disconnected, "{read}");
    } else {
        assert_eq!(read, disconnected);
    }
    for what in ["fstat", "fsync", "open", "opendir"] {
        assert_eq!(holder.line()?, disconnected, "{what}");
    }
    Ok(())
}

#[apply(test_case)]
fn with_passthrough(name: &str) -> Result<(), Failed> {
    killed(name, Way::Passthrough)
}

#[apply(test_case)]
fn without_passthrough(name: &str) -> Result<(), Failed> {
    killed(name, Way::Plain)
}

fn killed(name: &str, way: Way) -> Result<(), Failed> {
    let sandbox = Sandbox::new(name)?;
    let (backing, mut mirror, mut holder) = setup(&sandbox, way)?;
    mirror.kill()?;
    if way.is_passthrough()? {
        // The client's open file pins the backing filesystem.
        assert_eq!(backing.unmount(), Err(Errno::BUSY));
    }
    expect_errors(&mut holder, way)?;
    assert_eq!(holder.finish()?, "closed");
    mirror.unmount()?;
    backing.unmount_when_idle()
}

/// The server has a client's request, or is about to get it, and never answers.
#[apply(test_case)]
fn while_a_client_waits(name: &str) -> Result<(), Failed> {
    let sandbox = Sandbox::new(name)?;
    let (backing, mut mirror, mut holder) = setup(&sandbox, Way::Passthrough)?;
    mirror.freeze()?;
    let path = mirror.path().join("file");
    let mut asking = Client::start("stat", &[path.as_os_str()])?;
    wait_until_it_asks(&asking)?;
    mirror.kill()?;
    let answer = asking.line()?;
    let expected = [Errno::NOTCONN, Errno::CONNABORTED].map(errno);
    assert!(expected.contains(&answer), "{answer}");
    expect_errors(&mut holder, Way::Passthrough)?;
    assert_eq!(holder.finish()?, "closed");
    mirror.unmount()?;
    backing.unmount_when_idle()
}

/// Waits until the client has been in statx(2) for a while.
fn wait_until_it_asks(client: &Client) -> Result<(), Failed> {
    let call = format!("/proc/{}/syscall", client.id());
    let number = format!("{} ", libc::SYS_statx);
    let mut seen = 0;
    within(
        Duration::from_secs(10),
        "the client asks the server",
        || {
            let waits = fs::read_to_string(&call)?.starts_with(&number);
            seen = if waits { seen + 1 } else { 0 };
            Ok(seen == 20)
        },
    )
}

/// While a process has the device fd, an id that was not closed pins the backing filesystem: `Mirror::stop`
/// relies on that. And clients of a server that is gone wait until the connection is aborted.
#[apply(test_case)]
fn while_its_device_is_kept(name: &str) -> Result<(), Failed> {
    let sandbox = Sandbox::new(name)?;
    let (backing, mut mirror, mut holder) = setup(&sandbox, Way::Passthrough)?;
    let device = mirror.device()?;
    mirror.kill()?;
    let path = mirror.path().join("file");
    let mut asking = Client::start("stat", &[path.as_os_str()])?;
    wait_until_it_asks(&asking)?;
    mirror.abort()?;
    let expected = [Errno::NOTCONN, Errno::CONNABORTED].map(errno);
    let answer = asking.line()?;
    assert!(expected.contains(&answer), "{answer}");
    expect_errors(&mut holder, Way::Passthrough)?;
    assert_eq!(holder.finish()?, "closed");
    mirror.unmount()?;
    if Way::Passthrough.is_passthrough()? {
        thread::sleep(Duration::from_millis(100));
        assert_eq!(backing.unmount(), Err(Errno::BUSY));
    }
    drop(device);
    backing.unmount_when_idle()
}
