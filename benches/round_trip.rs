//! What the crate adds to an ioctl: the same calls through it and through libc's `ioctl`, in small
//! interleaved batches of one process. The figures are ratios, round by round, because absolute
//! times on a shared machine say little.
//!
//! `cargo bench --bench round_trip`. Without root the successful calls are left out, and said to be.

#![allow(
    clippy::cast_precision_loss,
    clippy::expect_used,
    clippy::panic,
    clippy::unwrap_used
)]
#![allow(
    missing_debug_implementations,
    missing_docs,
    unreachable_pub,
    dead_code
)]

#[path = "../tests/support/fuse.rs"]
mod fuse;
#[path = "../tests/support/sandbox.rs"]
mod sandbox;

use std::fs::File;
use std::hint::black_box;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd};
use std::time::{Duration, Instant};

use fuse_backing::{BackingFile, FuseDevice, uapi};

use fuse::{Connection, Init};
use sandbox::Sandbox;

const ROUNDS: usize = 2_000;
const BATCH: u32 = 50;

fn main() {
    // `cargo test --benches` runs it too, to see that it works.
    let rounds = if std::env::args().any(|arg| arg == "--bench") {
        ROUNDS
    } else {
        10
    };
    println!(
        "ratios to libc's ioctl, median of {rounds} rounds of {BATCH} calls (5 % and 95 % quantile)"
    );
    rejected(rounds);
    match sandbox::enter() {
        Ok(()) => {
            accepted(rounds);
            sandbox::leave();
        }
        Err(why) => println!("open and close: not measured, {why}"),
    }
}

/// The kernel's first check fails: needs nothing but permission to open /dev/fuse.
fn rejected(rounds: usize) {
    let device = match FuseDevice::open() {
        Ok(device) => device,
        Err(why) => return println!("rejected open: not measured, {why}"),
    };
    let file = File::open("/dev/null").expect("/dev/null");
    compare(
        "rejected open (the crate also finds out why)",
        rounds,
        || {
            assert_eq!(bare_open(device.as_fd(), file.as_fd()), -1);
        },
        || {
            let _ = black_box(device.backing_open(&file).is_err());
        },
    );
}

fn accepted(rounds: usize) {
    let sandbox = Sandbox::new("round_trip").expect("a sandbox");
    let connection = Connection::mount(&sandbox, Init::passthrough(1)).expect("a mount");
    let device = connection.device();
    let file = tempfile::tempfile().expect("a file");

    let bare = || {
        let id = bare_open(device.as_fd(), file.as_fd());
        assert!(id > 0, "{id}");
        assert_eq!(bare_close(device.as_fd(), id), 0);
    };
    compare("backing_open and backing_close", rounds, bare, || {
        let id = device.backing_open(&file).expect("registered");
        device.backing_close(id).expect("closed");
    });
    compare("BackingFile::open and drop", rounds, bare, || {
        drop(BackingFile::open(&device, &file).expect("registered"));
    });
}

fn compare(what: &str, rounds: usize, bare: impl Fn(), ours: impl Fn()) {
    let time = |call: &dyn Fn()| {
        let start = Instant::now();
        for _ in 0..BATCH {
            call();
        }
        start.elapsed() / BATCH
    };
    let (mut ratios, mut times) = (Vec::new(), Vec::new());
    for round in 0..rounds {
        // Whichever comes first has the colder caches.
        let (ours, bare) = if round % 2 == 0 {
            let ours = time(&ours);
            (ours, time(&bare))
        } else {
            let bare = time(&bare);
            (time(&ours), bare)
        };
        ratios.push(ours.as_secs_f64() / bare.as_secs_f64());
        times.push(bare);
    }
    ratios.sort_by(f64::total_cmp);
    times.sort();
    let quantile = |q: f64| ratios[(q * (ratios.len() - 1) as f64) as usize];
    let bare: Duration = times[times.len() / 2];
    println!(
        "{what:<45} {:.3} ({:.3} to {:.3}); libc: {bare:?}",
        quantile(0.5),
        quantile(0.05),
        quantile(0.95),
    );
}

#[repr(C)]
struct Map {
    fd: i32,
    flags: u32,
    padding: u64,
}

#[allow(unsafe_code)]
fn bare_open(device: BorrowedFd<'_>, file: BorrowedFd<'_>) -> i32 {
    let map = Map {
        fd: file.as_raw_fd(),
        flags: 0,
        padding: 0,
    };
    let request = uapi::FUSE_DEV_IOC_BACKING_OPEN;
    // SAFETY: the kernel reads `map`, of the size that the request encodes.
    unsafe { libc::ioctl(device.as_raw_fd(), request as _, &raw const map) }
}

#[allow(unsafe_code)]
fn bare_close(device: BorrowedFd<'_>, id: i32) -> i32 {
    let request = uapi::FUSE_DEV_IOC_BACKING_CLOSE;
    // SAFETY: the kernel reads `id`, of the size that the request encodes.
    unsafe { libc::ioctl(device.as_raw_fd(), request as _, &raw const id) }
}
