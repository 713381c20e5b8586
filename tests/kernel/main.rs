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

/// `#[apply(needs_passthrough)]` before a function makes it a test that needs [`Needs::Passthrough`]; likewise the others.
macro_rules! needs {
    ($needs:ident, $(#[$attribute:meta])* fn $name:ident $($rest:tt)*) => {
        $(#[$attribute])*
        fn $name $($rest)*

        inventory::submit! {
            crate::Test {
                file: module_path!(),
                line: line!(),
                name: stringify!($name),
                needs: crate::Needs::$needs,
                run: $name,
            }
        }
    };
}
macro_rules! needs_nothing {
    ($($test:tt)*) => { needs!(Nothing, $($test)*); };
}
macro_rules! needs_passthrough {
    ($($test:tt)*) => { needs!(Passthrough, $($test)*); };
}
macro_rules! needs_sync_init {
    ($($test:tt)*) => { needs!(SyncInit, $($test)*); };
}
macro_rules! needs_fail_nth {
    ($($test:tt)*) => { needs!(FailNth, $($test)*); };
}
macro_rules! needs_told {
    ($($test:tt)*) => { needs!(Told, $($test)*); };
}

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

/// A function with one of the attributes `needs_*`. Its module and its own name are the test's.
pub struct Test {
    file: &'static str,
    line: u32,
    name: &'static str,
    needs: Needs,
    run: fn(&Sandbox) -> Result<(), Failed>,
}

inventory::collect!(Test);

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
    let mut tests: Vec<_> = inventory::iter::<Test>().collect();
    tests.sort_by_key(|test| (test.file, test.line));
    tests.retain(|test| match test.needs {
        Needs::FailNth => expect::fail_nth(),
        Needs::Told => expect::is_told(),
        Needs::Nothing | Needs::Passthrough | Needs::SyncInit => true,
    });
    let trials = tests.iter().map(|test| trial(mode, &ready, test)).collect();
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

fn trial(mode: Mode, ready: &Result<(), String>, test: &'static Test) -> Trial {
    let file = test.file.strip_prefix("kernel::").unwrap_or(test.file);
    let name = format!("{file}::{}", test.name);
    mode.trial(&name.clone(), ready, move || {
        let sandbox = Sandbox::new(&name)?;
        let support = expect::support();
        match test.needs {
            Needs::Passthrough | Needs::FailNth if support != Support::Present => {
                assert_absent(&sandbox, support)
            }
            Needs::SyncInit if !expect::sync_init() => sync_init::assert_absent(),
            _ => (test.run)(&sandbox),
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
