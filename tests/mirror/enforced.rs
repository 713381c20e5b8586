//! The `enforced` example: the server grants all access, and still no client can write, since the kernel enforces it.

use std::error::Error;
use std::fs::{self, File};
use std::io::Write;
use std::os::unix::process::CommandExt;
use std::process::Command;

use libtest_mimic::Failed;
use macro_rules_attribute::apply;
use rustix::mount::{UnmountFlags, unmount};

use crate::backing::Backing;
use crate::client::{self, Client, Role};
use crate::program;
use crate::sandbox::Sandbox;
use crate::seccomp;
use crate::server::{Mirror, Way};
use crate::stopped::CONTENT;

pub const ROLES: &[(&str, Role)] = &[
    ("try-to-write", try_to_write),
    ("without-landlock", without_landlock),
];

/// Executes the program in the arguments. When it enters a Landlock domain, the call succeeds and does nothing.
fn without_landlock(args: &[String]) -> Result<String, Box<dyn Error>> {
    seccomp::pretend(libc::SYS_landlock_restrict_self)?;
    Err(Command::new(&args[0]).args(&args[1..]).exec().into())
}

/// Reads the file, tries to write to it by each kind of open, and reads it again.
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

#[apply(test_case)]
fn nobody_writes(name: &str) -> Result<(), Failed> {
    let enforced = program::example("enforced")?;
    let sandbox = Sandbox::new(name)?;
    let backing = Backing::in_memory(&sandbox, "tmpfs")?;
    let file = backing.folder("source")?.join("file");
    fs::write(&file, CONTENT)?;
    if !Way::Passthrough.is_passthrough()? {
        // Without passthrough there is nothing to enforce, and the example fails.
        let mountpoint = sandbox.folder("mnt")?;
        let refused = Command::new(enforced).args([&file, &mountpoint]).output()?;
        assert!(!refused.status.success());
        return backing.unmount_when_idle();
    }
    let mut unenforced = client::command("without-landlock")?;
    unenforced.arg(&enforced);
    let (eio, written) = (Some(libc::EIO), CONTENT.replacen('w', "x", 1) + "x");
    for (command, refused, left) in [
        (Command::new(&enforced), eio, CONTENT),
        // The control.
        (unenforced, None, &written),
    ] {
        let server = Mirror::spawn_by(command, &sandbox, &file, Way::Passthrough)?;
        let path = server.path().join("file");
        let mut client = Client::start("try-to-write", &[path.as_os_str()])?;
        assert_eq!(client.line()?, CONTENT);
        assert_eq!(client.line()?, format!("{:?}", [refused; 3]));
        assert_eq!(client.finish()?, left);
        assert_eq!(fs::read_to_string(&file)?, left);
        server.wait_for_open_files(1)?;
        unmount(server.path(), UnmountFlags::empty())?;
        assert_eq!(server.wait_for_end()?, "");
    }
    backing.unmount_when_idle()
}
