//! Measures what an open costs a client: open(2) and close(2) of a file on a real mount, for several ways
//! to answer OPEN; and from which file size and number of reads passthrough is faster.
//!
//! `cargo bench --bench open [-- --quick] [-- PART]`, as root.

#![allow(
    clippy::cast_precision_loss,
    clippy::expect_used,
    clippy::multiple_unsafe_ops_per_block,
    clippy::panic,
    clippy::unwrap_used
)]
#![allow(missing_debug_implementations, missing_docs, unreachable_pub)]

#[allow(dead_code, reason = "not all of it is of use here")]
#[path = "../tests/support/client.rs"]
mod client;
#[allow(dead_code, reason = "not all of it is of use here")]
#[path = "../tests/support/fuse.rs"]
mod fuse;
#[path = "open/opener.rs"]
mod opener;
#[allow(dead_code, reason = "not all of it is of use here")]
#[path = "../tests/support/sandbox.rs"]
mod sandbox;
#[path = "open/server.rs"]
mod server;
#[allow(dead_code, unused_imports, reason = "not all of it is of use here")]
#[path = "support/mod.rs"]
mod support;
#[path = "open/ways.rs"]
mod ways;

use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::sync::atomic::Ordering;
use std::time::Duration;

use libtest_mimic::Failed;

use opener::{Opener, Reading};
use sandbox::Sandbox;
use server::Server;
use support::{Axis, Comparison, Contest, Lines, Report, Series, cpu};
use ways::{ByHandles, EveryOpen, HardCoded, Plain, Table, Use};

/// Opens in a row.
const BATCH: usize = 100;
const ROUNDS: usize = 1_500;
/// The time limit for one part.
const PATIENCE: Duration = Duration::from_secs(600);

const HARD_CODED: &str = "one id, hard-coded";
const PLAIN: &str = "plain FUSE";
const EVERY: &str = "registered at every open";
const COLD: &str = "table, cold";
const IDLE: &str = "table, idle id kept";
const SHARE: &str = "table, hot (share)";
const HARD_CODED_OWN: &str = "one id, hard-coded, and own open";
const OWN: &str = "table, hot (open)";
const HANDLES: &str = "handles.open";
const KNOWN: &str = "handles.open, access and identity known";

fn main() -> ExitCode {
    if let Some(code) = client::play(opener::ROLES) {
        return code;
    }
    let mut report = Report::new("open");
    match sandbox::enter() {
        Ok(()) => {
            // The servers' threads and the clients inherit the pinning.
            let pinned = cpu::pin();
            if let Some(pinned) = &pinned {
                report.note(&format!(
                    "Servers and clients are pinned to CPU {}.",
                    pinned.cpu
                ));
            }
            run(&mut report);
            sandbox::leave();
        }
        Err(why) => report.not_run("all of it", &why),
    }
    report.finish()
}

fn run(report: &mut Report) {
    type Part = fn(&mut Report) -> Result<(), Failed>;
    for (id, part) in [
        ("opens", opens as Part),
        ("bytes", by_bytes),
        ("passes", by_passes),
    ] {
        report.part(id, id, part);
    }
}

/// Creates the backing file on a tmpfs, with this size.
fn backing(sandbox: &Sandbox, bytes: u64) -> Result<PathBuf, Failed> {
    let path = sandbox.folder("backing")?.join("file");
    // Written, because reads of a hole have another speed.
    std::fs::write(&path, vec![0x5a; bytes as usize])?;
    Ok(path)
}

fn opens(report: &mut Report) -> Result<(), Failed> {
    let sandbox = Sandbox::patient("opens", PATIENCE)?;
    let file = backing(&sandbox, 4096)?;
    let file = file.as_path();
    let table = |usage| Server::start(&sandbox, file, |device| Table::new(device, file, usage));
    let hard_coded =
        |own| Server::start(&sandbox, file, |device| HardCoded::new(device, file, own));
    let handles =
        |known| Server::start(&sandbox, file, |device| ByHandles::new(device, file, known));
    let servers = [
        (HARD_CODED, hard_coded(false)?),
        (PLAIN, plain(&sandbox, file, false)?),
        (
            EVERY,
            Server::start(&sandbox, file, |device| EveryOpen::new(device, file))?,
        ),
        (COLD, table(Use::Cold)?),
        (IDLE, table(Use::Idle)?),
        (SHARE, table(Use::Share)?),
        (HARD_CODED_OWN, hard_coded(true)?),
        (OWN, table(Use::OwnOpen)?),
        (HANDLES, handles(false)?),
        (KNOWN, handles(true)?),
    ];
    let rounds = report.args().rounds(ROUNDS);
    let comparison = contest("open and close", &servers, BATCH, Reading::NONE, rounds)?;
    report.comparison_of(
        "opens",
        "A client's open(2) and close(2)",
        &comparison,
        "ns",
        Some(SHARE),
    );
    report.note(
        "The baseline is a server that names one id in every reply and does no bookkeeping. With \"own open\", \
         \"open\" and \"handles.open\", the server also opens and closes the file itself, as it would without \
         passthrough. With \"access and identity known\", it keeps an O_PATH fd of the inode, and called stat(2) \
         on it once.",
    );
    let price = comparison.ratio(HARD_CODED, PLAIN);
    report.note(&format!(
        "The kernel's own price of a passthrough open: {price} times plain FUSE."
    ));
    for (of, to) in [
        (SHARE, HARD_CODED),
        (IDLE, HARD_CODED),
        (OWN, HARD_CODED_OWN),
        (HANDLES, HARD_CODED_OWN),
        (KNOWN, HARD_CODED_OWN),
    ] {
        report.at_most(&format!("{of} / {to}"), comparison.ratio(of, to), 1.03);
    }
    Ok(())
}

fn plain(sandbox: &Sandbox, file: &Path, keep_cache: bool) -> Result<Server, Failed> {
    Server::start(sandbox, file, |_| Ok(Plain { keep_cache }))
}

fn contest(
    phase: &'static str,
    servers: &[(&'static str, Server)],
    batch: usize,
    reading: Reading,
    rounds: usize,
) -> Result<Comparison, Failed> {
    let mut contest = Contest::new([phase]);
    for (name, server) in servers {
        let mut opener = Opener::start(&server.path(), batch, reading)?;
        contest = contest.way(*name, move || [opener.batch()]);
    }
    let [comparison] = contest.run(rounds);
    Ok(comparison)
}

const KEEP: &str = "plain FUSE, KEEP_CACHE";

/// One read of a file, by file size.
fn by_bytes(report: &mut Report) -> Result<(), Failed> {
    let sizes = (12..=24).map(|power| 1_u64 << power);
    let points = sizes.map(|bytes| {
        let reading = Reading { bytes, passes: 1 };
        (bytes as f64, reading)
    });
    break_even(
        report,
        "bytes",
        "Open, read once, close: passthrough against plain FUSE",
        Axis::bytes("file size"),
        points.collect(),
    )
}

/// Repeated reads of a small file, by their number.
fn by_passes(report: &mut Report) -> Result<(), Failed> {
    let passes = (0..=8).map(|power| 1_usize << power);
    let points = passes.map(|passes| {
        let reading = Reading {
            bytes: 4096,
            passes,
        };
        (passes as f64, reading)
    });
    break_even(
        report,
        "passes",
        "Open, read 4 KiB repeatedly, close: passthrough against plain FUSE",
        Axis::log("reads of the same 4 KiB"),
        points.collect(),
    )
}

fn break_even(
    report: &mut Report,
    id: &str,
    title: &str,
    x: Axis,
    points: Vec<(f64, Reading)>,
) -> Result<(), Failed> {
    let rounds = report.args().rounds(200);
    let names = [EVERY, COLD, SHARE, KEEP];
    let mut series = names.map(|name| Series {
        name: name.to_owned(),
        points: Vec::new(),
    });
    let mut rows = Vec::new();
    for (at, reading) in points {
        let sandbox = Sandbox::patient(id, PATIENCE)?;
        let file = backing(&sandbox, reading.bytes)?;
        let file = file.as_path();
        let table = |usage| Server::start(&sandbox, file, |device| Table::new(device, file, usage));
        let servers = [
            (PLAIN, plain(&sandbox, file, false)?),
            (
                EVERY,
                Server::start(&sandbox, file, |device| EveryOpen::new(device, file))?,
            ),
            (COLD, table(Use::Cold)?),
            (SHARE, table(Use::Share)?),
            (KEEP, plain(&sandbox, file, true)?),
        ];
        // A batch takes about a millisecond.
        let moved = reading.bytes * reading.passes as u64;
        let batch = (1_000_000 / (20_000 + moved / 2)).clamp(1, 50) as usize;
        let comparison = contest("open, read, close", &servers, batch, reading, rounds)?;
        for (name, server) in &servers {
            let passed = ![PLAIN, KEEP].contains(name);
            let reads = server.reads.load(Ordering::Relaxed);
            assert!(!passed || reads == 0, "{name}: {reads} READ requests");
        }
        let mut row = vec![format!("{at}")];
        row.push(format!(
            "{:.1}",
            comparison.get(PLAIN).absolute().median / 1e3
        ));
        for (name, series) in names.iter().zip(&mut series) {
            let ratio = comparison.ratio(name, PLAIN);
            series.points.push((at, ratio.median));
            row.push(ratio.to_string());
        }
        rows.push(row);
    }
    let header: Vec<_> = [x.label.as_str(), "plain FUSE, µs"]
        .into_iter()
        .chain(names)
        .collect();
    report.table(id, title, &header, &rows, serde_json::Value::Null);
    report.plot(
        id,
        &Lines {
            title: title.to_owned(),
            x,
            y: Axis::log("time, as a multiple of plain FUSE"),
            series: series.into(),
            levels: vec![(PLAIN.to_owned(), 1.0)],
        },
    );
    Ok(())
}
