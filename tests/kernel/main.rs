//! The crate against the kernel that runs here: real mounts, exact errors.
//!
//! `FUSE_BACKING_TEST=off|auto|require`: `auto`, the default, reports what cannot run here as
//! ignored, with the reason; `require` fails it. A feature that the kernel lacks is no reason: its
//! tests then assert that it is absent. What it is to have can be told, see expect.rs.

#![allow(
    clippy::expect_used,
    clippy::panic,
    clippy::unwrap_used,
    clippy::multiple_unsafe_ops_per_block
)]
#![allow(missing_debug_implementations, missing_docs, unreachable_pub)]

#[path = "../support/alloc.rs"]
mod alloc;
#[path = "../support/client.rs"]
mod client;
#[path = "../support/domain.rs"]
mod domain;
#[path = "../support/ext4.rs"]
mod ext4;
#[path = "../support/fuse.rs"]
mod fuse;
#[path = "../support/mode.rs"]
mod mode;
#[path = "../support/sandbox.rs"]
mod sandbox;
#[allow(dead_code, reason = "not all of it is of use here")]
#[path = "../support/seccomp.rs"]
mod seccomp;
#[path = "../support/thread.rs"]
mod thread;
#[path = "../support/trace.rs"]
mod trace;

mod abi;
mod backing_close;
mod backing_open;
mod clone;
mod cost;
mod device;
mod expect;
mod faults;
mod handles;
mod held;
mod inode_flags;
mod killed;
mod passthrough;
mod property;
mod rights;
mod sync_init;
mod table;

use std::process::ExitCode;

use fuse_backing::{BackingId, error::BackingError};
use libtest_mimic::{Arguments, Failed, Trial};

use expect::Support;
use fuse::{Connection, Init};
use mode::Mode;
use sandbox::Sandbox;

/// A test, by its name below the file's.
pub type Test = (&'static str, Needs, fn(&Sandbox) -> Result<(), Failed>);

/// What a kernel must have for a test to be meaningful.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Needs {
    Nothing,
    /// Where it lacks, its absence is asserted instead.
    Passthrough,
    SyncInit,
    /// Passthrough, and allocations that fail on request. Only of kernels that were built for it,
    /// and not listed elsewhere.
    FailNth,
    /// That the kernel is known. Not listed elsewhere.
    Told,
}

fn main() -> ExitCode {
    if let Some(code) = client::play(&roles()) {
        return code;
    }
    let mode = Mode::from_env();
    let arguments = Arguments::from_args();
    let ready = match mode {
        Mode::Off => Ok(()),
        Mode::Auto | Mode::Require => sandbox::enter(),
    };
    if mode != Mode::Off && ready.is_ok() && !arguments.list {
        if let Err(why) = expect::ask() {
            eprintln!("no FUSE mount: {why}");
            sandbox::leave();
            return ExitCode::FAILURE;
        }
        eprintln!("{}", expect::summary());
    }
    let tests = [
        ("abi", abi::TESTS),
        ("inode_flags", inode_flags::TESTS),
        ("backing_close", backing_close::TESTS),
        ("backing_open", backing_open::TESTS),
        ("clone", clone::TESTS),
        ("cost", cost::TESTS),
        ("device", device::TESTS),
        ("expect", expect::TESTS),
        ("faults", faults::TESTS),
        ("handles", handles::TESTS),
        ("held", held::TESTS),
        ("killed", killed::TESTS),
        ("passthrough", passthrough::TESTS),
        ("property", property::TESTS),
        ("rights::by_access", rights::by_access::TESTS),
        ("rights::lowered", rights::lowered::TESTS),
        ("rights::thread", rights::thread::TESTS),
        ("sync_init", sync_init::TESTS),
        ("table", table::TESTS),
    ];
    let mut trials = Vec::new();
    for (file, tests) in tests {
        let tests = tests.iter().filter(|test| match test.1 {
            Needs::FailNth => expect::fail_nth(),
            Needs::Told => expect::is_told(),
            Needs::Nothing | Needs::Passthrough | Needs::SyncInit => true,
        });
        trials.extend(tests.map(|test| trial(mode, &ready, file, *test)));
    }
    let conclusion = libtest_mimic::run(&arguments, trials);
    sandbox::leave();
    if sandbox::hung() {
        eprintln!("a test hung");
        return ExitCode::FAILURE;
    }
    conclusion.exit_code()
}

fn roles() -> Vec<(&'static str, client::Role)> {
    [
        inode_flags::ROLES,
        backing_close::ROLES,
        backing_open::ROLES,
        cost::ROLES,
        device::ROLES,
        held::ROLES,
        killed::ROLES,
        passthrough::ROLES,
        property::ROLES,
        rights::ROLES,
        sync_init::ROLES,
        table::ROLES,
    ]
    .concat()
}

fn trial(mode: Mode, ready: &Result<(), String>, file: &str, test: Test) -> Trial {
    let (name, needs, run) = test;
    let name = format!("{file}::{name}");
    mode.trial(&name.clone(), ready, move || {
        let sandbox = Sandbox::new(&name)?;
        let support = expect::support();
        match needs {
            Needs::Passthrough | Needs::FailNth if support != Support::Present => {
                assert_absent(&sandbox, support)
            }
            Needs::SyncInit if !expect::sync_init() => sync_init::assert_absent(),
            _ => run(&sandbox),
        }
    })
}

/// On a kernel without passthrough, whatever was negotiated.
fn assert_absent(sandbox: &Sandbox, support: Support) -> Result<(), Failed> {
    let connection = Connection::mount(sandbox, Init::passthrough(2))?;
    let device = connection.device();
    let expected = match support {
        Support::Disabled => BackingError::DisabledInKernel,
        _ => BackingError::UnsupportedKernel,
    };
    assert_eq!(device.backing_open(tempfile::tempfile()?), Err(expected));
    let id = BackingId::from_raw(1).expect("positive");
    let close = device.backing_close(id).expect_err("no such ioctl");
    assert_eq!(close.errno(), expected.errno());
    Ok(())
}
