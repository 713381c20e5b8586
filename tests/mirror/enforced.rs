//! The example of access that the kernel enforces: its server grants everything, and no client can write.

use std::error::Error;
use std::fs::{self, File};
use std::io::Write;

use libtest_mimic::Failed;
use rustix::mount::{UnmountFlags, unmount};

use crate::Test;
use crate::backing::Backing;
use crate::client::{self, Role};
use crate::program;
use crate::sandbox::Sandbox;
use crate::server::{Mirror, Way};
use crate::stopped::CONTENT;

pub const TESTS: &[Test] = &[("nobody_writes", nobody_writes)];

pub const ROLES: &[(&str, Role)] = &[("try-to-write", try_to_write)];

/// Reads the file; tries to write in each way; reads it again.
fn try_to_write(args: &[String]) -> Result<String, Box<dyn Error>> {
    let path = &args[0];
    println!("{}", fs::read_to_string(path)?);
    let write = |options: &mut fs::OpenOptions| {
        let error = options.open(path).and_then(|mut file| file.write(b"x"));
        error.err().and_then(|error| error.raw_os_error())
    };
    println!(
        "{:?}",
        [
            write(File::options().write(true)),
            write(File::options().read(true).write(true)),
            write(File::options().append(true)),
        ]
    );
    Ok(fs::read_to_string(path)?)
}

fn nobody_writes(name: &str) -> Result<(), Failed> {
    let enforced = program::example("enforced")?;
    let sandbox = Sandbox::new(name)?;
    let backing = Backing::in_memory(&sandbox, "tmpfs")?;
    let file = backing.folder("source")?.join("file");
    fs::write(&file, CONTENT)?;
    if !Way::Passthrough.is_passthrough()? {
        // There is nothing to enforce, and it says so.
        let mountpoint = sandbox.folder("mnt")?;
        let refused = std::process::Command::new(enforced)
            .args([&file, &mountpoint])
            .output()?;
        assert!(!refused.status.success());
        return backing.unmount_when_idle();
    }
    let server = Mirror::spawn(&enforced, &sandbox, &file, Way::Passthrough)?;
    let path = server.path().join("file");
    let mut client = client::Client::start("try-to-write", &[path.as_os_str()])?;
    assert_eq!(client.line()?, CONTENT);
    let eio = Some(libc::EIO);
    assert_eq!(client.line()?, format!("{:?}", [eio; 3]));
    assert_eq!(client.finish()?, CONTENT);
    assert_eq!(fs::read_to_string(&file)?, CONTENT);

    server.wait_for_open_files(1)?;
    unmount(server.path(), UnmountFlags::empty())?;
    assert_eq!(server.wait_for_end()?, "");
    backing.unmount_when_idle()
}
