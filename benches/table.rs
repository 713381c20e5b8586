//! Compares the table with the cache that servers usually write by hand: `Mutex<HashMap<u64, Weak<_>>>`.
//!
//! `cargo bench --bench table [-- --quick] [-- PART]`. Needs root, to mount.

#![allow(
    clippy::cast_possible_truncation,
    clippy::cast_precision_loss,
    clippy::expect_used,
    clippy::panic,
    clippy::unwrap_used
)]
#![allow(missing_debug_implementations, missing_docs, unreachable_pub)]

#[allow(dead_code, reason = "not all of it is of use here")]
#[path = "../tests/support/fuse.rs"]
mod fuse;
#[allow(dead_code, reason = "not all of it is of use here")]
#[path = "../tests/support/sandbox.rs"]
mod sandbox;
#[allow(dead_code, unused_imports, reason = "not all of it is of use here")]
#[path = "support/mod.rs"]
mod support;
#[path = "table/usual.rs"]
mod usual;

use std::fs::File;
use std::hint::black_box;
use std::os::fd::{AsFd, OwnedFd};
use std::process::ExitCode;
use std::sync::Arc;
use std::time::Duration;

use fuse_backing::{Access, BackingTable, FuseDevice, OpenFile, ServerFile};
use libtest_mimic::Failed;
use rustix::fs::{AtFlags, StatxFlags};
use rustix::mount::{OpenTreeFlags, open_tree};

use fuse::{Connection, Init};
use sandbox::Sandbox;
use support::contest::Random;
use support::{Axis, Comparison, Contest, Lines, Report, Series, cpu, per_op, threads};
use usual::Usual;

type Device = FuseDevice<Arc<OwnedFd>>;

const USUAL: &str = "the usual cache";
const SHARE: &str = "share";
const OPEN: &str = "open, with the server's fd";
const PAIR: &str = "BACKING_OPEN and BACKING_CLOSE";

const RDONLY: i32 = 0;
/// The time limit for one part.
const PATIENCE: Duration = Duration::from_secs(600);
/// Operations in a batch.
const OPS: usize = 1_000;
const ROUNDS: usize = 4_000;

fn main() -> ExitCode {
    let mut report = Report::new("table");
    if let Err(why) = sandbox::enter() {
        report.not_run("all of it", &why);
        return report.finish();
    }
    type Part = fn(&mut Report, &Device) -> Result<(), Failed>;
    let parts: [(&str, Part); 4] = [
        ("hot", hot),
        ("cold", cold),
        ("threads", many_threads),
        ("size", sizes),
    ];
    for (id, run) in parts {
        report.part(id, id, |report| {
            let sandbox = Sandbox::patient(id, PATIENCE)?;
            let connection = Connection::mount(&sandbox, Init::passthrough(1))?;
            run(report, &connection.device())
        });
    }
    sandbox::leave();
    report.finish()
}

/// Both caches, with the same inodes open. Each inode is held open once.
struct Open<'d> {
    usual: Usual<'d>,
    table: BackingTable<&'d Device>,
    file: File,
    kept: Vec<(usual::Backing<'d>, OpenFile<&'d Device>)>,
}

impl<'d> Open<'d> {
    fn new(device: &'d Device, inodes: u64) -> Result<Self, Failed> {
        let mut open = Self {
            usual: Usual::new(device),
            table: BackingTable::new(device),
            file: tempfile::tempfile()?,
            kept: Vec::new(),
        };
        open.table.set_limit(usize::MAX);
        open.grow(inodes)?;
        Ok(open)
    }

    fn grow(&mut self, inodes: u64) -> Result<(), Failed> {
        for inode in self.kept.len() as u64..inodes {
            let usual = self.usual.open(inode, &self.file)?;
            let ours = self.table.open(&inode, RDONLY, for_reading(&self.file))?;
            assert!(ours.is_passthrough());
            self.kept.push((usual, ours));
        }
        Ok(())
    }

    fn usual(&self, inode: u64) {
        black_box(self.usual.open(inode, &self.file).expect("registered"));
    }

    fn share(&self, inode: u64) {
        let _ = black_box(self.table.share(&inode, RDONLY).expect("registered"));
    }

    fn open(&self, inode: u64) {
        let open = self.table.open(&inode, RDONLY, for_reading(&self.file));
        let _ = black_box(open.expect("registered"));
    }
}

fn for_reading(file: &File) -> ServerFile<'_, &File> {
    ServerFile::new(file).access(Access::ReadOnly)
}

/// Random inodes from the range.
fn random(seed: u64, from: u64, inodes: u64) -> Vec<u64> {
    let mut random = Random(seed);
    (0..OPS).map(|_| from + random.next() % inodes).collect()
}

fn each(inodes: &[u64], mut op: impl FnMut(u64)) -> [f64; 1] {
    [per_op(inodes.len(), || {
        inodes.iter().for_each(|&inode| op(inode))
    })]
}

/// Opens and releases of inodes that are open already.
fn hot(report: &mut Report, device: &Device) -> Result<(), Failed> {
    const INODES: u64 = 1_000;
    let _pinned = cpu::pin();
    let open = Open::new(device, INODES)?;
    let inodes = random(1, 0, INODES);
    let [hot] = Contest::new(["open and release"])
        .way(USUAL, || each(&inodes, |inode| open.usual(inode)))
        .way(SHARE, || each(&inodes, |inode| open.share(inode)))
        .way(OPEN, || each(&inodes, |inode| open.open(inode)))
        .way(PAIR, || each(&inodes[..100], |_| pair(device, &open.file)))
        .run(report.args().rounds(ROUNDS));
    report.comparison(
        "hot",
        "Open and release of an open inode, among 1 000",
        &hot,
    );
    report.at_most(
        "a hot share and release / an ioctl pair",
        hot.ratio(SHARE, PAIR),
        0.05,
    );
    report.surely_at_most(
        "a hot share and release / the usual cache",
        hot.ratio(SHARE, USUAL),
        1.45,
    );
    Ok(())
}

fn pair(device: &Device, file: impl AsFd) {
    let id = device.backing_open(&file).expect("registered");
    // If `file` is a reopened fd, this closes it right after the registration.
    drop(file);
    device.backing_close(id).expect("closed");
}

/// Reopens the file as the table does when it is given no `O_PATH` fd.
fn reopened(file: &File) -> OwnedFd {
    let flags = OpenTreeFlags::AT_EMPTY_PATH | OpenTreeFlags::OPEN_TREE_CLOEXEC;
    let path = open_tree(file, "", flags).expect("an O_PATH fd");
    let same =
        rustix::fs::statx(&path, "", AtFlags::EMPTY_PATH, StatxFlags::INO).expect("its file");
    black_box(same);
    path
}

/// First opens and last releases of inodes.
fn cold(report: &mut Report, device: &Device) -> Result<(), Failed> {
    let _pinned = cpu::pin();
    let mut open = Open::new(device, 0)?;
    for (id, among) in [
        ("cold-few", 1_000),
        ("cold-many", report.args().size(1_000_000) as u64),
    ] {
        open.grow(among)?;
        // Inodes that are not open. Each is used once before any is used again.
        let fresh: Vec<_> = (among..among + 100).collect();
        let idle = BackingTable::new(device);
        idle.set_limit(usize::MAX);
        idle.set_idle_limit(fresh.len());
        let path = reopened(&open.file);
        let [cold] = Contest::new(["open and release"])
            .way(PAIR, || each(&fresh, |_| pair(device, &open.file)))
            .way("the same, of an fd reopened with O_PATH", || {
                each(&fresh, |_| pair(device, reopened(&open.file)))
            })
            .way(USUAL, || each(&fresh, |inode| open.usual(inode)))
            .way("open", || each(&fresh, |inode| open.open(inode)))
            .way("open, with an O_PATH fd", || {
                each(&fresh, |inode| {
                    let file = for_reading(&open.file).path_fd(&path);
                    let opened = open.table.open(&inode, RDONLY, file);
                    let _ = black_box(opened.expect("registered"));
                })
            })
            .way("open, idle ids kept", || {
                each(&fresh, |inode| {
                    let opened = idle.open(&inode, RDONLY, for_reading(&open.file));
                    let _ = black_box(opened.expect("registered"));
                })
            })
            .run(report.args().rounds(ROUNDS));
        report.comparison(
            id,
            &format!("Open and release of an inode that is not open, among {among} that are"),
            &cold,
        );
    }
    Ok(())
}

/// Opens of open inodes by several threads: all of one inode, or each thread of its own inodes.
fn many_threads(report: &mut Report, device: &Device) -> Result<(), Failed> {
    const INODES: u64 = 1_000;
    // Makes the batch long enough that a late start of a thread does not matter.
    const REPEAT: usize = 20;
    let open = Open::new(device, INODES)?;
    for count in 1..=4 {
        let each_own: Vec<_> = (0..count as u64)
            .map(|n| random(n + 1, n * INODES / 4, INODES / 4))
            .collect();
        let one = vec![vec![0; OPS]; count];
        for (id, what, inodes) in [
            ("distinct", "inodes of their own", &each_own),
            ("one", "one inode", &one),
        ] {
            let run = |op: &(dyn Fn(u64) + Sync)| {
                let batch = |thread: usize| {
                    for _ in 0..REPEAT {
                        inodes[thread].iter().for_each(|&inode| op(inode));
                    }
                };
                [threads::per_op(count, count * REPEAT * OPS, batch)]
            };
            let [comparison] = Contest::new(["open and release"])
                .way(USUAL, || run(&|inode| open.usual(inode)))
                .way(SHARE, || run(&|inode| open.share(inode)))
                .run(report.args().rounds(ROUNDS / 10));
            let s = if count == 1 { "" } else { "s" };
            let title = format!("{count} thread{s}, {what}");
            report.comparison(&format!("threads-{count}-{id}"), &title, &comparison);
            if id == "distinct" {
                // The table takes its lock once more than the usual cache.
                let limit = if count == 1 { 1.45 } else { 1.0 };
                report.surely_at_most(
                    &format!("{title}: {SHARE} / {USUAL}"),
                    comparison.ratio(SHARE, USUAL),
                    limit,
                );
            }
        }
    }
    Ok(())
}

/// Random opens of open inodes, among a growing number of them.
fn sizes(report: &mut Report, device: &Device) -> Result<(), Failed> {
    let _pinned = cpu::pin();
    let mut open = Open::new(device, 0)?;
    let mut found: Vec<(f64, Comparison)> = Vec::new();
    for size in [1_000, 10_000, 100_000, 1_000_000] {
        let size = report.args().size(size) as u64;
        open.grow(size)?;
        // New inodes for each batch: the last ones would still be in the CPU's caches.
        let mut seed = 0;
        let mut inodes = || {
            seed += 1;
            random(seed, 0, size)
        };
        let next = std::cell::RefCell::new(&mut inodes);
        let batch = |op: &dyn Fn(u64)| {
            let inodes = next.borrow_mut()();
            each(&inodes, op)
        };
        let [comparison] = Contest::new(["open and release"])
            .way(USUAL, || batch(&|inode| open.usual(inode)))
            .way(SHARE, || batch(&|inode| open.share(inode)))
            .run(report.args().rounds(ROUNDS / 4));
        let id = format!("size-{size}");
        let heading = format!("Open and release at random among {size} open inodes");
        report.comparison(&id, &heading, &comparison);
        report.at_most(
            &format!("at random among {size}: {SHARE} / {USUAL}"),
            comparison.ratio(SHARE, USUAL),
            1.45,
        );
        found.push((size as f64, comparison));
    }
    let series = |name: &str| Series {
        name: name.to_owned(),
        points: found
            .iter()
            .map(|(size, comparison)| (*size, comparison.get(name).absolute().median))
            .collect(),
    };
    report.plot(
        "sizes",
        &Lines {
            title: "Open and release at random among open inodes".to_owned(),
            x: Axis::log("open inodes"),
            y: Axis::linear("ns"),
            series: vec![series(USUAL), series(SHARE)],
            levels: Vec::new(),
        },
    );
    Ok(())
}
