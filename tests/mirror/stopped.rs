//! Passthrough is in use: a client reads an open file while the server is stopped and cannot answer.

use std::error::Error;
use std::fs::{self, File};
use std::os::unix::fs::FileExt;
use std::thread::sleep;
use std::time::Duration;

use libtest_mimic::Failed;
use macro_rules_attribute::apply;
use rustix::process::Signal;

use crate::backing::Backing;
use crate::client::{Client, Role, wait_for_parent};
use crate::sandbox::Sandbox;
use crate::server::{Mirror, Way, within};

pub const ROLES: &[(&str, Role)] = &[("read-later", read_later)];

pub const CONTENT: &str = "what the backing file says";

fn read_later(args: &[String]) -> Result<String, Box<dyn Error>> {
    let _file = read_when_told(&args[0])?;
    // Closing the file asks the server.
    wait_for_parent()?;
    Ok("closed".into())
}

/// Opens a file, prints so, waits, and prints what it reads.
pub fn read_when_told(path: &str) -> Result<File, Box<dyn Error>> {
    let file = File::open(path)?;
    println!("open");
    wait_for_parent()?;
    // No more than the file has: at its end, the kernel would ask the server for the size.
    let mut content = [0; CONTENT.len()];
    file.read_exact_at(&mut content, 0)?;
    println!("{}", content.escape_ascii());
    Ok(file)
}

#[apply(test_case)]
fn server_is_not_asked(name: &str) -> Result<(), Failed> {
    read_while_stopped(name, Way::Passthrough)
}

#[apply(test_case)]
fn server_is_asked_without_passthrough(name: &str) -> Result<(), Failed> {
    read_while_stopped(name, Way::Plain)
}

fn read_while_stopped(name: &str, way: Way) -> Result<(), Failed> {
    let sandbox = Sandbox::new(name)?;
    let backing = Backing::in_memory(&sandbox, "tmpfs")?;
    let source = backing.folder("source")?;
    fs::write(source.join("file"), CONTENT)?;
    let mirror = Mirror::start(&sandbox, &source, way)?;
    let path = mirror.path().join("file");
    let mut reader = Client::start("read-later", &[path.as_os_str()])?;
    assert_eq!(reader.line()?, "open");

    mirror.freeze()?;
    reader.proceed()?;
    if way.is_passthrough()? {
        // A client that waited for the server would get an error, when the watchdog aborts the connection.
        assert_eq!(reader.line()?, CONTENT);
        mirror.signal(Signal::CONT)?;
    } else {
        let call = format!("/proc/{}/syscall", reader.id());
        let number = format!("{} ", libc::SYS_pread64);
        let reads =
            || -> Result<bool, Failed> { Ok(fs::read_to_string(&call)?.starts_with(&number)) };
        within(Duration::from_secs(10), "the client reads", reads)?;
        sleep(Duration::from_millis(300));
        assert!(reads()?, "the read does not wait for the server");
        mirror.signal(Signal::CONT)?;
        assert_eq!(reader.line()?, CONTENT);
    }
    assert_eq!(reader.finish()?, "closed");
    mirror.wait_for_releases()?;
    mirror.stop(&backing)
}
