//! Measures what the crate adds to an ioctl: compares its BACKING_OPEN and BACKING_CLOSE with those of libc,
//! nix, fuser and the bare `syscall` instruction, on one mount and in one process.
//!
//! `cargo bench --bench round_trip [-- --quick] [-- PART]`. Without root, it measures only a call that the
//! kernel rejects, which needs only an open `/dev/fuse`.

#![allow(
    clippy::cast_precision_loss,
    clippy::expect_used,
    clippy::multiple_unsafe_ops_per_block,
    clippy::panic,
    clippy::unwrap_used
)]
#![allow(missing_debug_implementations, missing_docs, unreachable_pub)]

#[path = "round_trip/bare.rs"]
mod bare;
#[allow(dead_code, reason = "not all of it is of use here")]
#[path = "../tests/support/client.rs"]
mod client;
#[path = "../tests/support/domain.rs"]
mod domain;
#[allow(dead_code, reason = "not all of it is of use here")]
#[path = "../tests/support/fuse.rs"]
mod fuse;
#[path = "round_trip/live.rs"]
mod live;
#[path = "round_trip/peers.rs"]
mod peers;
#[path = "round_trip/rights.rs"]
mod rights;
#[allow(dead_code, reason = "not all of it is of use here")]
#[path = "../tests/support/sandbox.rs"]
mod sandbox;
#[allow(dead_code, unused_imports, reason = "not all of it is of use here")]
#[path = "support/mod.rs"]
mod support;

use std::fs::File;
use std::hint::black_box;
use std::os::fd::AsFd;
use std::process::ExitCode;
use std::time::{Duration, Instant};

use fuse_backing::{Access, BackingFile, FuseDevice};
use libtest_mimic::Failed;

use peers::{FuserSession, libc_ioctl, nix_macros};
use sandbox::Sandbox;
use support::{Comparison, Contest, Report, cpu, per_op};

/// Calls in a row. The kernel's tree of ids has nodes of 64.
const BATCH: usize = 64;
const ROUNDS: usize = 20_000;
/// The time limit for one part.
const PATIENCE: Duration = Duration::from_secs(600);

const BARE: &str = "syscall";
/// The same call again, at another place in the program. Differences come from code placement.
const CONTROL: &str = "syscall, again";
const LIBC: &str = "libc";
const NIX: &str = "nix";
const FUSER: &str = "fuser";
const OURS: &str = "fuse-backing";
const GUARD: &str = "BackingFile";

fn main() -> ExitCode {
    if let Some(code) = client::play(&[("open-and-wait", peers::open_and_wait)]) {
        return code;
    }
    let mut report = Report::new("round_trip");
    let entered = sandbox::enter();
    let pinned = cpu::pin();
    if let Some(pinned) = &pinned {
        report.note(&format!("Pinned to CPU {}.", pinned.cpu));
    }
    if report.wants("rejected") {
        rejected(&mut report);
    }
    for (id, what, run) in [
        (
            "accepted",
            "registering and closing",
            accepted as fn(&mut Report) -> Result<(), Failed>,
        ),
        ("rights", "lowered rights", rights::run),
        ("live", "many live ids", live::run),
    ] {
        report.part(id, what, |report| {
            entered.clone()?;
            run(report)
        });
    }
    sandbox::leave();
    report.finish()
}

/// The device is not attached, so the kernel's first check fails. The crate then finds out why.
fn rejected(report: &mut Report) {
    let device = match FuseDevice::open() {
        Ok(device) => device,
        Err(why) => return report.not_run("the rejected call", &why.to_string()),
    };
    let file = File::open("/dev/null").expect("/dev/null");
    let (fd, backing) = (device.as_fd(), file.as_fd());
    let [rejected] = Contest::new(["rejected"])
        .way(BARE, || [repeat(|| bare::open(fd, backing) < 0)])
        .way(LIBC, || [repeat(|| libc_ioctl::open(fd, backing) < 0)])
        .way(NIX, || [repeat(|| nix_macros::open(fd, backing).is_err())])
        .way(FUSER, || {
            [repeat(|| FuserSession::create_raw(fd, backing).is_err())]
        })
        .way(OURS, || [repeat(|| device.backing_open(&file).is_err())])
        .run(report.args().rounds(ROUNDS / 4));
    report.comparison(
        "rejected",
        "A rejected BACKING_OPEN (fuse-backing also finds out why)",
        &rejected,
    );
}

fn repeat(call: impl Fn() -> bool) -> f64 {
    per_op(BATCH, || {
        for _ in 0..BATCH {
            assert!(black_box(call()));
        }
    })
}

fn accepted(report: &mut Report) -> Result<(), Failed> {
    let sandbox = Sandbox::patient("accepted", PATIENCE)?;
    let session = FuserSession::start(&sandbox)?;
    let file = tempfile::tempfile()?;
    let rounds = report.args().rounds(ROUNDS);
    let (device, fd, backing) = (&session.device, session.device.as_fd(), file.as_fd());

    let bare_open = || {
        let id = bare::open(fd, backing);
        assert!(id > 0, "{id}");
        id as i32
    };
    let bare_close = |id| assert_eq!(bare::close(fd, id), 0);
    // Different messages, so that the compiler does not merge this with the code above.
    let control_open = || {
        let id = bare::open(fd, backing);
        assert!(id > 0, "not registered: {id}");
        id as i32
    };
    let control_close = |id| assert_eq!(bare::close(fd, id), 0, "not closed");
    let libc_open = || {
        let id = libc_ioctl::open(fd, backing);
        assert!(id > 0, "{id}");
        id
    };
    let libc_close = |id| assert_eq!(libc_ioctl::close(fd, id), 0);
    let nix_open = || nix_macros::open(fd, backing).expect("registered") as u32;
    let nix_close = |id| {
        nix_macros::close(fd, id).expect("closed");
    };
    let fuser_open = || session.open(backing);
    let our_open = || device.backing_open(backing).expect("registered");
    let our_close = |id| device.backing_close(id).expect("closed");
    let guard_open = || BackingFile::open(device, backing, Access::ReadWrite).expect("registered");

    let in_a_row = Contest::new(["BACKING_OPEN", "BACKING_CLOSE"])
        .way(BARE, apart(bare_open, bare_close))
        .way(CONTROL, apart(control_open, control_close))
        .way(LIBC, apart(libc_open, libc_close))
        .way(NIX, apart(nix_open, nix_close))
        .way(FUSER, apart(fuser_open, drop))
        .way(OURS, apart(our_open, our_close))
        .way(GUARD, apart(guard_open, drop))
        .run(rounds);
    let turns = Contest::new(["BACKING_OPEN", "BACKING_CLOSE", "both"])
        .way(BARE, in_turns(bare_open, bare_close))
        .way(CONTROL, in_turns(control_open, control_close))
        .way(LIBC, in_turns(libc_open, libc_close))
        .way(NIX, in_turns(nix_open, nix_close))
        .way(FUSER, in_turns(fuser_open, drop))
        .way(OURS, in_turns(our_open, our_close))
        .way(GUARD, in_turns(guard_open, drop))
        .run(rounds);

    report.note(&format!(
        "In turns: each id is closed before the next is opened. The times of open and of close each include a \
         clock reading. There is no other id, so the kernel builds its tree of ids and tears it down each time. \
         In a row: {BATCH} ids are opened, then closed. The calls cost the least this way, so an overhead is the \
         largest part of it.\n\nThe intervals are those of this run of this program. Ratios also change from \
         build to build with the placement of the same instructions; \"{CONTROL}\" shows by how much.",
    ));
    let [open, close, both] = &turns;
    let [row_open, row_close] = &in_a_row;
    for (id, what, comparison) in [
        ("open", "BACKING_OPEN, in turns", open),
        ("close", "BACKING_CLOSE, in turns", close),
        ("pair", "BACKING_OPEN and BACKING_CLOSE, in turns", both),
        ("row-open", "BACKING_OPEN, in a row", row_open),
        ("row-close", "BACKING_CLOSE, in a row", row_close),
    ] {
        report.comparison_of(id, what, comparison, "ns", Some(OURS));
    }
    for (what, comparison, limit) in [
        ("backing_open, in turns", open, 1.01),
        ("backing_close, in turns", close, 1.005),
        ("both, in turns", both, 1.01),
        ("backing_open, in a row", row_open, 1.01),
        ("backing_close, in a row", row_close, 1.005),
    ] {
        let ratio = comparison.ratio(OURS, BARE);
        report.at_most(&format!("{what}: {OURS} / {BARE}"), ratio, limit);
        against_all(report, what, comparison);
    }
    Ok(())
}

fn against_all(report: &mut Report, what: &str, comparison: &Comparison) {
    for other in [BARE, LIBC, NIX, FUSER] {
        let ratio = comparison.ratio(OURS, other);
        report.surely_at_most(&format!("{what}: {OURS} / {other}"), ratio, 1.02);
    }
}

/// A batch of opens, then as many closes, timed separately.
fn apart<T>(open: impl Fn() -> T, close: impl Fn(T)) -> impl FnMut() -> [f64; 2] {
    let mut ids = Vec::with_capacity(BATCH);
    move || {
        let opened = per_op(BATCH, || {
            for _ in 0..BATCH {
                ids.push(open());
            }
        });
        let closed = per_op(BATCH, || ids.drain(..).for_each(&close));
        [opened, closed]
    }
}

/// Closes each id before the next is opened. Times opens, closes, and pairs.
fn in_turns<T>(open: impl Fn() -> T, close: impl Fn(T)) -> impl FnMut() -> [f64; 3] {
    move || {
        let (mut opening, mut closing) = (Duration::ZERO, Duration::ZERO);
        for _ in 0..BATCH {
            let start = Instant::now();
            let id = black_box(open());
            let opened = Instant::now();
            close(id);
            closing += opened.elapsed();
            opening += opened - start;
        }
        let pair = per_op(BATCH, || {
            for _ in 0..BATCH {
                close(open());
            }
        });
        let each = |time: Duration| time.as_nanos() as f64 / BATCH as f64;
        [each(opening), each(closing), pair]
    }
}
