//! What reads and writes cost through the mirror example, with passthrough and without it, against the
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
#[path = "../examples/mirror/fs.rs"]
mod fs;
#[allow(dead_code, reason = "not all of it is of use here")]
#[path = "../tests/support/fuse.rs"]
mod fuse;
#[path = "../examples/mirror/inodes.rs"]
mod inodes;
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

use std::error::Error;
use std::fs::File;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use libtest_mimic::Failed;

use opens::Device;
use reader::{Kind, Reader};
use sandbox::Sandbox;
use session::{Events, Mounted};
use support::{Contest, Report};

/// That of the mirror's modules.
type Result<T> = std::result::Result<T, Box<dyn Error>>;

const SIZE: usize = 128 << 20;
/// For one part.
const PATIENCE: Duration = Duration::from_secs(600);

const NATIVE: &str = "native";
const PASSTHROUGH: &str = "passthrough";
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
                "The mirror example on a tmpfs. One thread is pinned to a CPU, the server is not. Before \
                 each batch of reads through plain FUSE the kernel forgets what it has cached of the file, \
                 but where it says cached: there it has all of it, and asks for \
                 the attributes at every read, as the mirror lets it cache none.",
            );
            for kind in Kind::ALL {
                for threads in [1, 2] {
                    let id = format!("{}-{threads}", kind.id());
                    report.part(&id, &id, |report| measure(report, &id, kind, threads));
                }
            }
            sandbox::leave();
        }
        Err(why) => report.not_run("all of it", &why),
    }
    report.finish()
}

/// A mirror, and its part of the report.
struct Mirror {
    // Before the device, which keeps the connection.
    mounted: Mounted,
    _device: Device,
    mountpoint: PathBuf,
}

impl Mirror {
    fn start(
        sandbox: &Sandbox,
        source: &Path,
        passthrough: bool,
    ) -> std::result::Result<Self, Failed> {
        let mountpoint = sandbox.folder("mirror")?;
        let (mounted, device) = Mounted::new(source, &mountpoint, passthrough, Events::new())?;
        let number = fuse::connection_number(&mountpoint)?.to_string();
        let abort = sandbox.fusectl().join(number).join("abort");
        sandbox.watch(Arc::new(File::options().write(true).open(abort)?));
        if let Some(why) = mounted.status().refused() {
            return Err(why.to_string().into());
        }
        Ok(Self {
            mounted,
            _device: device,
            mountpoint,
        })
    }

    /// READ and WRITE requests so far.
    fn requests(&self) -> u64 {
        let status = self.mounted.status();
        status.reads.load(Ordering::Relaxed) + status.writes.load(Ordering::Relaxed)
    }
}

fn measure(
    report: &mut Report,
    id: &str,
    kind: Kind,
    threads: usize,
) -> std::result::Result<(), Failed> {
    let sandbox = Sandbox::patient(id, PATIENCE)?;
    let source = sandbox.folder("source")?;
    std::fs::write(source.join("data"), vec![0x5a; SIZE])?;
    let passthrough = Mirror::start(&sandbox, &source, true)?;
    let plain = Mirror::start(&sandbox, &source, false)?;

    let at = |folder: &Path| folder.join("data");
    let reader = |folder, cold| Reader::start(&at(folder), kind, threads, cold);
    let mut native = reader(&source, false)?;
    let mut passed = reader(&passthrough.mountpoint, false)?;
    let mut cold = reader(&plain.mountpoint, kind.reads())?;
    let mut contest = Contest::new(["call"])
        .way(NATIVE, || [native.batch()])
        .way(PASSTHROUGH, || [passed.batch()])
        .way(PLAIN, || [cold.batch()]);
    // On a mount of its own: the cache is the inode's.
    let caching = kind
        .reads()
        .then(|| Mirror::start(&sandbox, &source, false));
    if let Some(caching) = caching.transpose()? {
        let mut cached = reader(&caching.mountpoint, false)?;
        contest = contest.way(CACHED, move || {
            let _served = &caching;
            [cached.batch()]
        });
    }
    let [comparison] = contest.run(report.args().rounds(kind.rounds()));
    let requests = (passthrough.requests(), plain.requests());

    let s = if threads == 1 { "" } else { "s" };
    let title = format!("{}, {threads} thread{s}", kind.title());
    report.comparison_of(id, &title, &comparison, "ns", Some(PASSTHROUGH));
    let seen = if kind.reads() { "READ" } else { "WRITE" };
    report.note(&format!(
        "{seen} requests that the server saw: passthrough {}, plain FUSE {}.",
        requests.0, requests.1
    ));
    // Of speed: the inverse of that of times.
    let speed = comparison.ratio(NATIVE, PASSTHROUGH);
    let limit = match kind {
        Kind::SequentialRead => 0.97,
        Kind::RandomRead => 0.95,
        Kind::SequentialWrite | Kind::RandomWrite => return Ok(()),
    };
    report.at_least(
        &format!("{title}: passthrough, of native speed"),
        speed,
        limit,
    );
    Ok(())
}
