//! Compares reads and writes through the mirror example, with and without passthrough, with those of the
//! source itself.
//!
//! `cargo bench --bench io [-- --quick] [-- PART]`, as root.

#![allow(
    clippy::cast_precision_loss,
    clippy::expect_used,
    clippy::multiple_unsafe_ops_per_block,
    clippy::panic,
    clippy::unwrap_used
)]
#![allow(missing_debug_implementations, missing_docs, unreachable_pub)]

#[path = "../examples/mirror/attr.rs"]
mod attr;
#[allow(dead_code, reason = "not all of it is of use here")]
#[path = "../tests/support/client.rs"]
mod client;
#[path = "../examples/mirror/dirs.rs"]
mod dirs;
#[path = "../tests/support/domain.rs"]
mod domain;
#[path = "io/enforced.rs"]
mod enforced;
#[allow(dead_code, reason = "not all of it is of use here")]
#[path = "../tests/support/ext4.rs"]
mod ext4;
#[path = "../examples/mirror/fs.rs"]
mod fs;
#[allow(dead_code, reason = "not all of it is of use here")]
#[path = "../tests/support/fuse.rs"]
mod fuse;
#[path = "../examples/mirror/inodes.rs"]
mod inodes;
#[path = "../examples/mirror/on_behalf.rs"]
mod on_behalf;
#[path = "../examples/mirror/opens.rs"]
mod opens;
#[path = "io/reader.rs"]
mod reader;
#[allow(dead_code, reason = "not all of it is of use here")]
#[path = "../tests/support/sandbox.rs"]
mod sandbox;
#[allow(dead_code, reason = "not all of it is of use here")]
#[path = "../examples/mirror/session.rs"]
mod session;
#[path = "../examples/mirror/source.rs"]
mod source;
#[allow(dead_code, reason = "not all of it is of use here")]
#[path = "../examples/mirror/status.rs"]
mod status;
#[allow(dead_code, unused_imports, reason = "not all of it is of use here")]
#[path = "support/mod.rs"]
mod support;
#[path = "../examples/mirror/threads.rs"]
mod threads;

use std::error::Error;
use std::fs::File;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use libtest_mimic::Failed;

use ext4::Ext4;
use opens::Device;
use reader::{Kind, Reader};
use sandbox::Sandbox;
use session::{Events, Mounted, Options};
use support::{Contest, Report};

/// The mirror's modules use this as `crate::Result`.
type Result<T> = std::result::Result<T, Box<dyn Error>>;

const SIZE: usize = 128 << 20;
/// The time limit for one part.
const PATIENCE: Duration = Duration::from_secs(600);

const NATIVE: &str = "native";
const PASSTHROUGH: &str = "passthrough";
/// Without `HANDLE_KILLPRIV_V2`: the kernel asks for `security.capability` before each write.
const NO_KILLPRIV: &str = "passthrough, --no-killpriv";
const PLAIN: &str = "plain FUSE";
const CACHED: &str = "plain FUSE, cached";

fn main() -> ExitCode {
    if let Some(code) = client::play(reader::ROLES) {
        return code;
    }
    let mut report = Report::new("io");
    match sandbox::enter() {
        Ok(()) => {
            report.note(
                "The mirror example serves a tmpfs, or ext4 without a journal in a file on a tmpfs. A single client \
                 thread is pinned to a CPU; the server is not. Before each batch of reads through plain FUSE, the \
                 kernel drops the file's cached pages. Only \"plain FUSE, cached\" keeps them all; there the kernel \
                 asks for the attributes at every read, because the mirror lets it cache none.",
            );
            for kind in Kind::ALL {
                for threads in [1, 2] {
                    let id = format!("{}-{threads}", kind.id());
                    report.part(&id, &id, |report| {
                        let sandbox = Sandbox::patient(&id, PATIENCE)?;
                        let source = sandbox.folder("source")?;
                        measure(report, &sandbox, &source, &id, kind, threads)
                    });
                }
            }
            for kind in [Kind::SequentialWrite, Kind::RandomWrite] {
                let id = format!("{}-ext4", kind.id());
                report.part(&id, &id, |report| {
                    let sandbox = Sandbox::patient(&id, PATIENCE)?;
                    let ext4 = Ext4::new(&sandbox, 2 * SIZE as u64, &["-O", "^has_journal"])?;
                    measure(report, &sandbox, ext4.path(), &id, kind, 1)
                });
            }
            report.part(
                "enforced",
                "reads through an id registered in a Landlock domain",
                enforced::run,
            );
            sandbox::leave();
        }
        Err(why) => report.not_run("all of it", &why),
    }
    report.finish()
}

/// A mounted mirror.
struct Mirror {
    // Dropped before the device, which keeps the connection alive.
    mounted: Mounted,
    _device: Device,
    mountpoint: PathBuf,
}

impl Mirror {
    /// Runs in this process, which keeps the capabilities and groups that the mirror drops. They do not affect the
    /// time.
    fn start(
        sandbox: &Sandbox,
        source: &Path,
        options: Options,
    ) -> std::result::Result<Self, Failed> {
        let mountpoint = sandbox.folder("mirror")?;
        let (mounted, device) = Mounted::new(source, &mountpoint, options, Events::new())?;
        fuse::watched(sandbox, &mountpoint)?;
        if let Some(why) = mounted.status().refused() {
            return Err(why.to_string().into());
        }
        Ok(Self {
            mounted,
            _device: device,
            mountpoint,
        })
    }

    /// The numbers of READ and WRITE requests together, and of GETXATTR requests.
    fn requests(&self) -> (u64, u64) {
        let status = self.mounted.status();
        let count = |requests: &AtomicU64| requests.load(Ordering::Relaxed);
        let data = count(&status.reads) + count(&status.writes);
        (data, count(&status.getxattrs))
    }
}

/// Writes the file in pieces. A file written at once is cached in large folios, and ext4 then takes 0.1 ms to find
/// the 4 KiB to write in a folio.
fn make_data(path: &Path) -> std::io::Result<()> {
    let mut file = File::create(path)?;
    let piece = [0x5a; 4 << 10];
    (0..SIZE / piece.len()).try_for_each(|_| file.write_all(&piece))
}

fn measure(
    report: &mut Report,
    sandbox: &Sandbox,
    source: &Path,
    id: &str,
    kind: Kind,
    threads: usize,
) -> std::result::Result<(), Failed> {
    make_data(&source.join("data"))?;
    let mirror = |passthrough, killpriv| {
        let options = Options {
            passthrough,
            killpriv,
            ..Options::default()
        };
        Mirror::start(sandbox, source, options)
    };
    let (passthrough, plain) = (mirror(true, true)?, mirror(false, true)?);

    let at = |folder: &Path| folder.join("data");
    let reader = |folder, cold| Reader::start(&at(folder), kind, threads, cold);
    let mut native = reader(source, false)?;
    let mut passed = reader(&passthrough.mountpoint, false)?;
    let mut cold = reader(&plain.mountpoint, kind.reads())?;
    // On a separate mount, because the cache belongs to the inode.
    let (name, third) = if kind.reads() {
        (CACHED, mirror(false, true)?)
    } else {
        (NO_KILLPRIV, mirror(true, false)?)
    };
    let mut other = reader(&third.mountpoint, false)?;
    let [wall, cpu] = Contest::new(["call", "CPU"])
        .way(NATIVE, || native.batch())
        .way(PASSTHROUGH, || passed.batch())
        .way(PLAIN, || cold.batch())
        .way(name, || other.batch())
        .run(report.args().rounds(kind.rounds()));
    let [passed, third, plain] = [&passthrough, &third, &plain].map(Mirror::requests);

    let s = if threads == 1 { "" } else { "s" };
    let title = format!("{}, {threads} thread{s}", kind.title());
    report.comparison_of(id, &title, &wall, "ns", Some(PASSTHROUGH));
    let cpu_title = format!("{title}: CPU time of client and server");
    report.comparison(&format!("{id}-cpu"), &cpu_title, &cpu);
    let seen = if kind.reads() { "READ" } else { "WRITE" };
    report.note(&format!(
        "Requests that the server saw: passthrough {} {seen}, {} GETXATTR; {name} {}, {}; plain FUSE {}, {}.",
        passed.0, passed.1, third.0, third.1, plain.0, plain.1,
    ));
    let speed = format!("{title}: speed of passthrough / native");
    // The inverse of the ratio of times.
    let of_native = wall.ratio(NATIVE, PASSTHROUGH);
    match kind {
        _ if id.ends_with("ext4") => {
            let cpu = cpu.ratio(PASSTHROUGH, NATIVE);
            report.at_most(
                &format!("{cpu_title}, on ext4: passthrough / native"),
                cpu,
                1.1,
            );
        }
        Kind::SequentialRead | Kind::SequentialWrite => report.at_least(&speed, of_native, 0.97),
        Kind::RandomRead => report.at_least(&speed, of_native, 0.95),
        Kind::RandomWrite => report.at_least(&speed, of_native, 0.90),
    }
    Ok(())
}
