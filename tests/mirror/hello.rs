//! README's example passes through, answers clients with the errno, and leaves nothing behind.

use std::error::Error;
use std::fs::{self, File};

use libtest_mimic::Failed;
use macro_rules_attribute::apply;
use rustix::mount::{UnmountFlags, unmount};
use rustix::process::Signal;

use crate::backing::Backing;
use crate::client::{Client, Role, wait_for_parent};
use crate::program;
use crate::sandbox::Sandbox;
use crate::server::{Mirror, Way};
use crate::stopped::{CONTENT, read_when_told};

pub const ROLES: &[(&str, Role)] = &[("use-hello", use_hello)];

/// Lists the directory. Opens the file, says so, and reads it when told to. Then opens it for writing, and says which
/// errno it got.
fn use_hello(args: &[String]) -> Result<String, Box<dyn Error>> {
    let mut names = Vec::new();
    for entry in fs::read_dir(&args[0])? {
        names.push(entry?.file_name().into_string().unwrap_or_default());
    }
    names.sort();
    println!("{}", names.join(" "));
    let path = format!("{}/file", args[0]);
    let _file = read_when_told(&path)?;
    wait_for_parent()?;
    let refused = File::options().write(true).open(&path).err();
    Ok(format!(
        "{:?}",
        refused.and_then(|error| error.raw_os_error())
    ))
}

#[apply(test_case)]
fn serves_a_directory(name: &str) -> Result<(), Failed> {
    let sandbox = Sandbox::new(name)?;
    let backing = Backing::in_memory(&sandbox, "tmpfs")?;
    let source = backing.folder("source")?;
    fs::write(source.join("file"), CONTENT)?;
    fs::write(source.join("other"), "")?;
    fs::create_dir(source.join("folder"))?;
    let hello = Mirror::spawn(
        &program::example("hello")?,
        &sandbox,
        &source,
        Way::Passthrough,
    )?;
    let mut client = Client::start("use-hello", &[hello.path().as_os_str()])?;
    assert_eq!(client.line()?, "file other");
    assert_eq!(client.line()?, "open");

    let passes_through = Way::Passthrough.is_passthrough()?;
    if passes_through {
        hello.freeze()?;
    }
    client.proceed()?;
    assert_eq!(client.line()?, CONTENT);
    if passes_through {
        hello.signal(Signal::CONT)?;
    }
    client.proceed()?;
    assert_eq!(client.finish()?, format!("Some({})", libc::EACCES));

    hello.wait_for_releases()?;
    unmount(hello.path(), UnmountFlags::empty())?;
    let said = hello.wait_for_end()?;
    // It says so twice: at INIT, and at the first open.
    let expected = if passes_through { 0 } else { 2 };
    assert_eq!(said.matches("no passthrough: ").count(), expected, "{said}");
    assert!(passes_through == said.is_empty(), "{said}");
    backing.unmount_when_idle()
}
