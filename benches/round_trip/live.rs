//! Measures how live ids affect the cost of the next one, and how much kernel memory they take.

use std::fs;
use std::os::fd::AsFd;

use libtest_mimic::Failed;
use serde_json::json;

use crate::fuse::{Connection, Init};
use crate::sandbox::Sandbox;
use crate::support::progress::Progress;
use crate::support::{Contest, Report};
use crate::{PATIENCE, ROUNDS, apart};

const LIVE: [usize; 4] = [0, 1_000, 100_000, 1_000_000];
/// The baseline.
const FEW: usize = 1_000;

pub fn run(report: &mut Report) -> Result<(), Failed> {
    let sandbox = Sandbox::patient("live", PATIENCE)?;
    let file = tempfile::tempfile()?;
    let mut connections = Vec::new();
    let mut rows = Vec::new();
    let mut data = Vec::new();
    for live in LIVE {
        let live = report.args().size(live);
        let connection = Connection::mount(&sandbox, Init::passthrough(1))?;
        let device = connection.device();
        let before = slab();
        let mut progress = Progress::new(format!("{live} ids"), live);
        for _ in 0..live {
            // The ids end with the connection.
            let _ = device.backing_open(&file)?.into_raw();
            progress.step();
        }
        if live > FEW {
            let bytes = slab().zip(before).map(|(after, before)| after - before);
            let each = bytes.map(|bytes| bytes as f64 / live as f64);
            let text = each.map_or("unknown".to_owned(), |each| format!("{each:.0}"));
            rows.push(vec![live.to_string(), text]);
            data.push(json!({ "live": live, "bytes_per_id": each }));
        }
        connections.push((live, connection, device));
    }

    connections.sort_by_key(|(live, ..)| *live != report.args().size(FEW));
    let mut contest = Contest::new(["open", "close"]);
    for (live, _, device) in &connections {
        let open = || device.backing_open(file.as_fd()).expect("registered");
        let close = |id| device.backing_close(id).expect("closed");
        contest = contest.way(name(*live), apart(open, close));
    }
    let [open, close] = contest.run(report.args().rounds(ROUNDS / 4));
    report.comparison("live-open", "BACKING_OPEN with live ids", &open);
    report.comparison("live-close", "BACKING_CLOSE with live ids", &close);
    report.table(
        "live-memory",
        "Kernel memory of an id (growth of Slab in /proc/meminfo, all ids of one file)",
        &["live ids", "bytes each"],
        &rows,
        json!(data),
    );
    let (most, few) = (name(LIVE[3]), name(FEW));
    for comparison in [&open, &close] {
        if comparison.has(&most) {
            let what = format!("{}: 1 000 000 live ids / 1 000", comparison.phase);
            report.at_most(&what, comparison.ratio(&most, &few), 1.2);
        }
    }
    Ok(())
}

fn name(live: usize) -> String {
    format!("{live} live")
}

/// The size of the kernel's slabs in bytes. They contain what the kernel allocates for an id.
fn slab() -> Option<i64> {
    let meminfo = fs::read_to_string("/proc/meminfo").ok()?;
    let line = meminfo
        .lines()
        .find_map(|line| line.strip_prefix("Slab:"))?;
    let kib: i64 = line.trim().strip_suffix(" kB")?.parse().ok()?;
    Some(kib * 1024)
}
