//! Counts the instructions that the process executes, with callgrind. Unlike times, the counts are the
//! same in every run of a build.
//!
//! `cargo bench --bench instructions`. Needs valgrind, gungraun-runner in gungraun's version, and root.
//! `.ci/instructions` compares a run with the counts in `benches/instructions.json`.

#![allow(
    clippy::cast_possible_truncation,
    clippy::expect_used,
    clippy::multiple_unsafe_ops_per_block,
    clippy::panic,
    clippy::unwrap_used
)]
#![allow(missing_debug_implementations, missing_docs, unreachable_pub)]

#[path = "round_trip/bare.rs"]
mod bare;
#[allow(dead_code, reason = "not all of it is of use here")]
#[path = "../tests/support/fuse.rs"]
mod fuse;
#[allow(dead_code, reason = "not all of it is of use here")]
#[path = "../tests/support/sandbox.rs"]
mod sandbox;
#[path = "table/usual.rs"]
mod usual;

use std::fs::File;
use std::hint::black_box;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;

use fuse_backing::{Access, BackingFile, BackingTable, FuseDevice, OpenFile, ServerFile};
use gungraun::{library_benchmark, library_benchmark_group, main};

use fuse::{Connection, Init};
use sandbox::Sandbox;
use usual::Usual;

type Device = FuseDevice<Arc<OwnedFd>>;

/// Enough calls to make the code around them negligible.
const ROUNDS: usize = 1_000;

const RDONLY: i32 = 0;

struct Mounted {
    device: &'static Device,
    file: File,
    _connection: Connection,
}

fn mounted() -> Mounted {
    sandbox::enter().expect("root");
    let sandbox = Sandbox::new("instructions").expect("a folder");
    let connection = Connection::mount(&sandbox, Init::passthrough(1)).expect("a mount");
    Mounted {
        device: Box::leak(Box::new(connection.device())),
        file: tempfile::tempfile().expect("a file"),
        _connection: connection,
    }
}

struct Opened {
    usual: Usual<'static>,
    table: BackingTable<&'static Device>,
    _kept: (usual::Backing<'static>, OpenFile<&'static Device>),
    mounted: Mounted,
}

fn for_reading(file: &File) -> ServerFile<'_, &File> {
    ServerFile::new(file).access(Access::ReadOnly)
}

/// Both caches, with one inode open.
fn opened() -> Opened {
    let mounted = mounted();
    let (usual, table) = (
        Usual::new(mounted.device),
        BackingTable::new(mounted.device),
    );
    let kept = (
        usual.open(1, &mounted.file).expect("registered"),
        table
            .open(&1, RDONLY, for_reading(&mounted.file))
            .expect("opened"),
    );
    Opened {
        usual,
        table,
        _kept: kept,
        mounted,
    }
}

#[library_benchmark(setup = mounted)]
fn pair_syscall(mounted: Mounted) -> Mounted {
    for _ in 0..ROUNDS {
        let (device, file) = (mounted.device.as_fd(), mounted.file.as_fd());
        let id = bare::open(black_box(device), black_box(file));
        assert!(id > 0);
        assert!(bare::close(black_box(device), id as i32) == 0);
    }
    mounted
}

#[library_benchmark(setup = mounted)]
fn pair_crate(mounted: Mounted) -> Mounted {
    for _ in 0..ROUNDS {
        let device = black_box(mounted.device);
        let id = device.backing_open(black_box(&mounted.file));
        assert!(device.backing_close(id.expect("registered")).is_ok());
    }
    mounted
}

#[library_benchmark(setup = mounted)]
fn pair_guard(mounted: Mounted) -> Mounted {
    for _ in 0..ROUNDS {
        let device = black_box(mounted.device);
        let backing = BackingFile::open(device, black_box(&mounted.file), Access::ReadOnly);
        drop(backing.expect("registered"));
    }
    mounted
}

#[library_benchmark(setup = opened)]
fn hot_usual(opened: Opened) -> Opened {
    for _ in 0..ROUNDS {
        let open = opened.usual.open(black_box(1), &opened.mounted.file);
        drop(black_box(open).expect("registered"));
    }
    opened
}

#[library_benchmark(setup = opened)]
fn hot_share(opened: Opened) -> Opened {
    for _ in 0..ROUNDS {
        let open = opened.table.share(black_box(&1), black_box(RDONLY));
        drop(black_box(open).expect("registered"));
    }
    opened
}

#[library_benchmark(setup = opened)]
fn hot_open(opened: Opened) -> Opened {
    for _ in 0..ROUNDS {
        let file = black_box(&opened.mounted.file);
        let open = opened
            .table
            .open(black_box(&1), black_box(RDONLY), for_reading(file));
        drop(black_box(open).expect("registered"));
    }
    opened
}

#[library_benchmark(setup = opened)]
fn cold_open(opened: Opened) -> Opened {
    for _ in 0..ROUNDS {
        let file = black_box(&opened.mounted.file);
        let open = opened
            .table
            .open(black_box(&2), black_box(RDONLY), for_reading(file));
        drop(black_box(open).expect("registered"));
    }
    opened
}

library_benchmark_group!(
    name = ioctls,
    benchmarks = [pair_syscall, pair_crate, pair_guard]
);
library_benchmark_group!(
    name = table,
    benchmarks = [hot_usual, hot_share, hot_open, cold_open]
);
main!(library_benchmark_groups = [ioctls, table]);
