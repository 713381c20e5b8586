//! Tests of the crate on the running kernel: real mounts, exact errors.
//!
//! `FUSE_BACKING_TEST=off|auto|require`: tests that cannot run here, for example without root, are ignored with the
//! reason by `auto`, the default, and fail with `require`. If the kernel lacks a feature, its tests run and assert that
//! it is absent. `FUSE_BACKING_EXPECT` can say which features the kernel must have, see expect.rs.

#![allow(
    clippy::expect_used,
    clippy::panic,
    clippy::unwrap_used,
    clippy::multiple_unsafe_ops_per_block
)]
#![allow(missing_debug_implementations, missing_docs, unreachable_pub)]

/// Registers a function as a test with these [`Needs`]. Tests use the macros below as attributes, for example
/// `#[apply(needs_passthrough)]`, so that each test is named once.
macro_rules! needs {
    ($needs:ident, $(#[$attribute:meta])* fn $name:ident $($rest:tt)*) => {
        $(#[$attribute])*
        fn $name $($rest)*

        inventory::submit! {
            crate::Test {
                module: module_path!(),
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
macro_rules! needs_expectation {
    ($($test:tt)*) => { needs!(Expectation, $($test)*); };
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
#[allow(dead_code, reason = "this test target uses only part of it")]
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

/// A test: a function with one of the attributes `needs_*`.
pub struct Test {
    module: &'static str,
    line: u32,
    name: &'static str,
    needs: Needs,
    run: fn(&Sandbox) -> Result<(), Failed>,
}

inventory::collect!(Test);

/// What the kernel must have for a test to apply.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Needs {
    Nothing,
    /// On kernels without passthrough, the test is replaced by `assert_absent`.
    Passthrough,
    /// On kernels without synchronous INIT, the test is replaced by `sync_init::assert_absent`.
    SyncInit,
    /// Passthrough, and a kernel that was built with fault injection. On others the test is not listed.
    FailNth,
    /// `FUSE_BACKING_EXPECT`. Without it the test is not listed.
    Expectation,
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
    tests.sort_by_key(|test| (test.module, test.line));
    tests.retain(|test| match test.needs {
        Needs::FailNth => expect::fail_nth(),
        Needs::Expectation => expect::is_set(),
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
    let module = test.module.trim_start_matches("kernel::");
    let name = format!("{module}::{}", test.name);
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

/// Without passthrough in the kernel, registering and closing fail with the right cause, whatever was negotiated.
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
