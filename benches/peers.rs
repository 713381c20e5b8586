//! Compares the mirror example with other passthrough filesystems, over one directory.
//!
//! `cargo bench --bench peers [-- --quick] [-- PART]`, as root. Peers are searched for in `PATH`; a variable can
//! name another program. The report names missing ones. To get them:
//!
//! - `passthrough_hp` (`FUSE_BACKING_PEER_HP`): from the sources of libfuse 3.18,
//!   `meson setup --buildtype=release build && ninja -C build example/passthrough_hp`
//! - `loopback` (`FUSE_BACKING_PEER_LOOPBACK`): from those of go-fuse 2.10, `go build ./example/loopback`
//! - `mergerfs` (`FUSE_BACKING_PEER_MERGERFS`): its own packages, or from the sources of 2.42, `make NDEBUG=1`
//!
//! The first two do not report their version; set `FUSE_BACKING_PEER_HP_VERSION` and
//! `FUSE_BACKING_PEER_LOOPBACK_VERSION`. `FUSE_BACKING_PEER_MIRROR` names another build of the mirror. Servers and
//! clients share one CPU: with two, a server took 1.2 times as long as another in one run and 0.7 times in the next,
//! depending on where their threads ran.

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
#[allow(dead_code, reason = "not all of it is of use here")]
#[path = "../tests/support/sandbox.rs"]
mod sandbox;
#[path = "peers/server.rs"]
mod server;
#[allow(dead_code, unused_imports, reason = "not all of it is of use here")]
#[path = "support/mod.rs"]
mod support;
#[path = "peers/worker.rs"]
mod worker;

use std::fs::{self, File};
use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::Duration;

use libtest_mimic::Failed;
use serde_json::Value;

use sandbox::Sandbox;
use server::{PEERS, Peer, Server};
use support::{Comparison, Contest, Report, cpu};
use worker::{DATA, FILES, OPERATIONS, Operation};

/// The time limit for one part.
const PATIENCE: Duration = Duration::from_secs(600);

const NATIVE: &str = "native";
const MIRROR: &str = "mirror";

fn main() -> ExitCode {
    if let Some(code) = client::play(worker::ROLES) {
        return code;
    }
    let mut report = Report::new("peers");
    // Before the private mount namespace is entered, since the mirror may have to be built.
    let peers = PEERS.map(|peer| (peer.program(), peer));
    match sandbox::enter() {
        Ok(()) => {
            // Servers and clients inherit the pinning.
            let _pinned = cpu::pin();
            if let Err(why) = run(&mut report, &peers) {
                report.not_run("all of it", why.message().unwrap_or_default());
            }
            sandbox::leave();
        }
        Err(why) => report.not_run("all of it", &why),
    }
    report.finish()
}

fn run(report: &mut Report, peers: &[(Result<PathBuf, String>, Peer)]) -> Result<(), Failed> {
    report.note(
        "The source is a tmpfs. Servers and clients are pinned to one CPU. CPU time is that of client and server \
         together. open-hot, open-cold: open and close a file that the client holds open (hot) or that no process \
         holds open (cold). create: create, write 4 KiB, close. small-read: open, read 4 KiB, close. sequential: \
         1 MiB a call. random: 4 KiB a call.",
    );
    let source = Sandbox::new("source")?.folder("source")?;
    for n in 0..FILES {
        fs::write(source.join(format!("hot-{n}")), "")?;
        fs::write(source.join(format!("cold-{n}")), "")?;
    }
    let mut data = File::create(source.join("data"))?;
    // In pieces, as benches/io.rs does.
    let piece = [0x5a; 4 << 10];
    (0..DATA / piece.len()).try_for_each(|_| data.write_all(&piece))?;

    let mut servers = Vec::new();
    for (program, peer) in peers {
        let program = match program {
            Ok(program) => program,
            Err(why) => {
                report.note(&format!("Missing: {}: {why}.", peer.name));
                continue;
            }
        };
        report.note(&format!("{}: {}.", peer.name, peer.version(program)));
        for way in peer.ways {
            let name = format!("{} {way}", peer.name).trim().to_owned();
            match Server::start(&name, program, &format!("{way} {}", peer.args), &source) {
                Ok(server) => servers.push((name, server)),
                Err(why) => {
                    let why = why.message().unwrap_or_default();
                    report.note(&format!("Missing: {name}: {why}."));
                }
            }
        }
    }
    if !servers.iter().any(|(name, _)| name == MIRROR) {
        return Err("the mirror is missing".into());
    }

    let mut overview = Vec::new();
    for operation in &OPERATIONS {
        report.part(operation.0, operation.0, |report| {
            let ratios = measure(report, operation, &source, &servers)?;
            overview.push([vec![operation.0.to_owned()], ratios].concat());
            Ok(())
        });
    }
    let names = servers.iter().map(|(name, _)| name.as_str());
    let header: Vec<_> = std::iter::once("times native: wall, CPU")
        .chain(names)
        .collect();
    report.table("all", "Overview", &header, &overview, Value::Null);
    for (name, server) in &servers {
        let said = server.said();
        if !said.is_empty() {
            report.note(&format!("{name} wrote to stderr: {said}"));
        }
    }
    Ok(())
}

/// Each server's ratios to native.
fn measure(
    report: &mut Report,
    operation: &Operation,
    source: &Path,
    servers: &[(String, Server)],
) -> Result<Vec<String>, Failed> {
    let Operation(id, size, _) = operation;
    let sandbox = Sandbox::patient(id, PATIENCE)?;
    let native = (NATIVE, source, None);
    let others = servers.iter().map(|(name, server)| {
        let path = server.mountpoint.as_path();
        (name.as_str(), path, Some(server))
    });
    let mut contest = Contest::new(["wall", "CPU"]);
    for (name, folder, server) in std::iter::once(native).chain(others) {
        if server.is_some() {
            fuse::watched(&sandbox, folder)?;
        }
        // Each client creates names in its own folder, so that no other server caches them.
        let mut client = worker::start(operation, folder, name, server.map(Server::id))?;
        contest = contest.way(name, move || worker::batch(&mut client));
    }
    let [wall, cpu] = contest.run(report.args().rounds(size.rounds));
    report.comparison_of(id, id, &wall, "ns", Some(MIRROR));
    let (cpu_id, cpu_title) = (format!("{id}-cpu"), format!("{id}, CPU time"));
    report.comparison_of(&cpu_id, &cpu_title, &cpu, "ns", Some(MIRROR));
    let ratio = |of: &Comparison, name| of.ratio(name, NATIVE).median;
    let names = servers.iter().map(|(name, _)| name);
    Ok(names
        .map(|name| format!("{:.2}, {:.2}", ratio(&wall, name), ratio(&cpu, name)))
        .collect())
}
