//! Tests of the mirror example as users run it: the program in one process, its clients in others, and
//! a plain directory to compare with.
//!
//! `FUSE_BACKING_TEST=off|auto|require` works as in the kernel tests. On a kernel without passthrough the
//! mirror serves through plain FUSE, and must pass the same tests.

#![allow(clippy::panic)]
#![allow(missing_debug_implementations, missing_docs, unreachable_pub)]

macro_rules! test_case {
    ($(#[$attribute:meta])* fn $name:ident $($rest:tt)*) => {
        $(#[$attribute])*
        fn $name $($rest)*

        inventory::submit! {
            crate::Test {
                module: module_path!(),
                line: line!(),
                name: stringify!($name),
                run: $name,
            }
        }
    };
}

#[allow(dead_code, reason = "not all of it is of use here")]
#[path = "../support/client.rs"]
mod client;
#[path = "../support/ext4.rs"]
mod ext4;
#[allow(
    dead_code,
    clippy::expect_used,
    reason = "not all of it is of use here"
)]
#[path = "../support/fuse.rs"]
mod fuse;
#[path = "../support/mode.rs"]
mod mode;
#[allow(
    dead_code,
    clippy::expect_used,
    clippy::multiple_unsafe_ops_per_block,
    reason = "not all of it is of use here"
)]
#[path = "../support/sandbox.rs"]
mod sandbox;
#[allow(dead_code, reason = "not all of it is of use here")]
#[path = "../support/seccomp.rs"]
mod seccomp;
#[allow(
    dead_code,
    clippy::expect_used,
    reason = "not all of it is of use here"
)]
#[path = "../support/thread.rs"]
mod thread;

mod ask;
mod backing;
mod blocked;
mod calls;
mod differences;
mod differential;
mod enforced;
mod errnos;
mod fsx;
mod held;
mod hello;
mod identity;
mod killed;
mod mounts;
mod namespaces;
mod numbers;
mod overlay;
mod place;
mod program;
mod race;
mod requests;
mod reserve;
mod server;
mod setid;
mod stopped;
mod tree;

use std::process::ExitCode;

use libtest_mimic::{Arguments, Completion, Failed, Trial};

use mode::Mode;

/// A function with the attribute `#[apply(test_case)]`. The test's name is made of the function's module and name. The
/// function gets it as an argument, for its sandbox.
pub struct Test {
    module: &'static str,
    line: u32,
    name: &'static str,
    run: fn(&str) -> Result<(), Failed>,
}

inventory::collect!(Test);

/// Modules whose tests take longest, and so start first.
const LONG: &[&str] = &["mirror::numbers", "mirror::race"];

fn main() -> ExitCode {
    if let Some(code) = client::play(&roles()) {
        return code;
    }
    let mode = Mode::from_env();
    let ready = match mode {
        Mode::Off => Ok(()),
        Mode::Auto | Mode::Require => sandbox::enter(),
    };
    let mut trials = vec![fsx_trial(mode, ready.clone())];
    let mut tests: Vec<_> = inventory::iter::<Test>().collect();
    tests.sort_by_key(|test| (!LONG.contains(&test.module), test.module, test.line));
    trials.extend(tests.iter().map(|test| {
        let module = test.module.trim_start_matches("mirror::");
        let name = format!("{module}::{}", test.name);
        let run = test.run;
        mode.trial(&name.clone(), &ready, move || run(&name))
    }));
    let conclusion = libtest_mimic::run(&Arguments::from_args(), trials);
    sandbox::leave();
    if sandbox::hung() {
        eprintln!("a test hung");
        return ExitCode::FAILURE;
    }
    conclusion.exit_code()
}

fn roles() -> Vec<(&'static str, client::Role)> {
    [
        ask::ROLES,
        blocked::ROLES,
        differences::ROLES,
        differential::ROLES,
        enforced::ROLES,
        held::ROLES,
        hello::ROLES,
        identity::ROLES,
        killed::ROLES,
        mounts::ROLES,
        numbers::ROLES,
        race::ROLES,
        requests::ROLES,
        reserve::ROLES,
        server::ROLES,
        setid::ROLES,
        stopped::ROLES,
    ]
    .concat()
}

/// Whether this test can run is known only when it runs, since building fsx takes a minute.
fn fsx_trial(mode: Mode, ready: Result<(), String>) -> Trial {
    Trial::ignorable_test(fsx::NAME, move || {
        if mode == Mode::Off {
            return Ok(Completion::ignored_with("FUSE_BACKING_TEST=off"));
        }
        match ready.and_then(|()| fsx::find()) {
            Ok(program) => fsx::run(&program).map(|()| Completion::Completed),
            Err(why) if mode == Mode::Require => Err(format!("cannot run here: {why}").into()),
            Err(why) => Ok(Completion::ignored_with(why)),
        }
    })
}
