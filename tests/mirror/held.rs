//! What is registered for a writer does not outlive the writer: a program that was written through the
//! mirror runs as soon as the writer has closed it, although a reader still has it open.

use std::error::Error;
use std::fs::{self, File};
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::Duration;

use libtest_mimic::Failed;
use macro_rules_attribute::apply;

use crate::backing::Backing;
use crate::client::{Client, Role, wait_for_parent};
use crate::fuse::{Connection, Init};
use crate::program;
use crate::sandbox::Sandbox;
use crate::server::{Mirror, Way, within};

pub const ROLES: &[(&str, Role)] = &[("close-the-writer", close_the_writer)];

/// Does what a shell's `exec 4<>FILE 5<FILE` does, and `exec 4>&-` when told to. Then reads from the fd that is left.
fn close_the_writer(args: &[String]) -> Result<String, Box<dyn Error>> {
    let writer = File::options().read(true).write(true).open(&args[0])?;
    let reader = File::open(&args[0])?;
    println!("open");
    wait_for_parent()?;
    drop(writer);
    println!("the writer is closed");
    wait_for_parent()?;
    let mut magic = [0; 4];
    reader.read_exact_at(&mut magic, 0)?;
    Ok(magic.escape_ascii().to_string())
}

/// Runs a program, and returns whether it succeeds, or the errno of starting it.
fn run(program: &Path) -> Result<bool, i32> {
    let mut command = Command::new(program);
    // A multi-call binary chooses its program by this name.
    std::os::unix::process::CommandExt::arg0(&mut command, "true");
    match command.stdin(Stdio::null()).status() {
        Ok(status) => Ok(status.success()),
        Err(error) => Err(error.raw_os_error().unwrap_or(0)),
    }
}

fn runs(program: &Path) -> Result<(), Failed> {
    // A child of another test can have the program open for writing between its fork and its exec.
    within(Duration::from_secs(10), "the program runs", || {
        match run(program) {
            Ok(ended_well) => {
                assert!(ended_well);
                Ok(true)
            }
            Err(libc::ETXTBSY) => Ok(false),
            Err(errno) => Err(format!("errno {errno}").into()),
        }
    })
}

/// The control is a plain directory.
#[apply(test_case)]
fn writer_is_not_held(name: &str) -> Result<(), Failed> {
    for way in [Way::Passthrough, Way::Plain] {
        let sandbox = Sandbox::new(name)?;
        let backing = Backing::in_memory(&sandbox, "tmpfs")?;
        let (source, plain) = (backing.folder("source")?, backing.folder("plain")?);
        for folder in [&source, &plain] {
            let program = program::in_path("true").ok_or("there is no true")?;
            fs::copy(program, folder.join("program"))?;
        }
        // Linux 6.12, which has protocol 7.41, can register O_PATH fds.
        let path_fds = Connection::mount(&sandbox, Init::PLAIN)?.offer().minor >= 41;
        let mirror = Mirror::start(&sandbox, &source, way)?;
        // The folder in which the program is opened, and the one in which it is run.
        for (opened, run_in) in [(plain.as_path(), &plain), (mirror.path(), &source)] {
            let program = run_in.join("program");
            runs(&program)?;
            let opened = opened.join("program");
            let mut client = Client::start("close-the-writer", &[opened.as_os_str()])?;
            assert_eq!(client.line()?, "open");
            assert_eq!(run(&program), Err(libc::ETXTBSY), "{}", opened.display());

            client.proceed()?;
            assert_eq!(client.line()?, "the writer is closed");
            if run_in == &source && way.is_passthrough()? && !path_fds {
                assert_eq!(
                    run(&program),
                    Err(libc::ETXTBSY),
                    "the writer's fd is registered"
                );
            } else {
                runs(&program)?;
            }
            client.proceed()?;
            assert_eq!(client.finish()?, r"\x7fELF");
            runs(&program)?;
        }
        mirror.wait_for_releases()?;
        mirror.stop(&backing)?;
    }
    Ok(())
}
