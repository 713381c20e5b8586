//! Measures what it costs to register with fewer rights.

use std::convert::Infallible;
use std::os::fd::{AsFd, BorrowedFd};
use std::sync::Arc;
use std::thread;

use fuse_backing::rights::{CapabilitySet, Lowered, RegistrarThread};
use fuse_backing::{Access, FuseDevice, Register};
use libtest_mimic::Failed;

use crate::domain::restrict;
use crate::peers::FuserSession;
use crate::sandbox::Sandbox;
use crate::support::{Contest, Report, per_op};
use crate::{PATIENCE, ROUNDS, in_turns};

const PLAIN: &str = "all rights";
const AROUND: &str = "Lowered::per_registration";
const FOR_GOOD: &str = "Lowered::permanently";
const THREAD: &str = "RegistrarThread";
const LANDLOCK: &str = "RegistrarThread, Landlock";

pub fn run(report: &mut Report) -> Result<(), Failed> {
    let sandbox = Sandbox::patient("rights", PATIENCE)?;
    let session = FuserSession::start(&sandbox)?;
    let file = tempfile::tempfile()?;
    let (device, file) = (&session.device, file.as_fd());
    let keep = CapabilitySet::empty();
    let rounds = report.args().rounds(ROUNDS / 2);
    let around = Lowered::per_registration(device, keep);
    let shared = Arc::new(FuseDevice::new(device.as_fd().try_clone_to_owned()?)?);
    let lowered = || Lowered::permanently(Arc::clone(&shared), keep);
    let registrar = RegistrarThread::spawn(lowered(), || Ok::<(), Infallible>(()))?;
    let restricted = RegistrarThread::spawn(lowered(), || restrict(Access::ReadOnly))?;

    let bursts = Contest::new(PHASES)
        .way(PLAIN, both(device, file))
        .way(AROUND, both(&around, file))
        .way(THREAD, both(&registrar, file))
        .way(LANDLOCK, both(&restricted, file))
        .run(rounds);
    let long = report.args().size(20_000);
    let [sustained] = Contest::new(["both"])
        .way(PLAIN, many(device, file, long))
        .way(AROUND, many(&around, file, long))
        .run(report.args().rounds(100));
    // Each runs in its own thread, which stays lowered. For a thread that keeps CAP_SETUID, the rights are checked
    // at each call.
    let once = |keep| {
        thread::scope(|scope| {
            let measured = scope.spawn(move || {
                let permanently = Lowered::permanently(device, keep);
                Contest::new(PHASES)
                    .way(PLAIN, both(device, file))
                    .way(FOR_GOOD, both(&permanently, file))
                    .run(rounds)
            });
            measured.join().expect("no panic")
        })
    };
    let [once, looked_at] = [keep, CapabilitySet::SETUID].map(once);

    let [.., pair] = &bursts;
    let title = "BACKING_OPEN and BACKING_CLOSE, in turns";
    report.comparison_of("rights-pair", title, pair, "ns", None);
    for (id, what, [open, _, pair]) in [
        ("once", "lowered for good", &once),
        ("looked-at", "lowered for good with CAP_SETUID", &looked_at),
    ] {
        report.comparison(&format!("rights-{id}"), &format!("The same, {what}"), pair);
        let title = format!("BACKING_OPEN, {what}");
        report.comparison(&format!("rights-{id}-open"), &title, open);
    }
    report.note(
        "The kernel frees credentials later (RCU), in the time of the way that runs then. After a batch of 64 that \
         is often another way; a batch of 20 000 pays for its own.",
    );
    report.comparison("rights-sustained", "The same, 20 000 in a row", &sustained);
    let (around, once) = (
        sustained.ratio(AROUND, PLAIN),
        once[0].ratio(FOR_GOOD, PLAIN),
    );
    report.at_most(
        "a pair, 20 000 in a row: Lowered::per_registration / all rights",
        around,
        1.7,
    );
    report.at_most(
        "backing_open: Lowered::permanently / all rights",
        once,
        1.01,
    );
    Ok(())
}

const PHASES: [&str; 3] = ["BACKING_OPEN", "BACKING_CLOSE", "both"];

fn both<'a>(registrar: &'a impl Register, file: BorrowedFd<'a>) -> impl FnMut() -> [f64; 3] + 'a {
    let open = move || {
        registrar
            .register(file, Access::ReadOnly)
            .expect("registered")
    };
    in_turns(open, move |id| registrar.unregister(id).expect("closed"))
}

/// Registers and unregisters `count` times in a row.
fn many<'a>(
    registrar: &'a impl Register,
    file: BorrowedFd<'a>,
    count: usize,
) -> impl FnMut() -> [f64; 1] + 'a {
    move || {
        let pairs = per_op(count, || {
            for _ in 0..count {
                let id = registrar.register(file, Access::ReadOnly);
                registrar
                    .unregister(id.expect("registered"))
                    .expect("closed");
            }
        });
        [pairs]
    }
}
