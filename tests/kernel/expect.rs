//! `FUSE_BACKING_EXPECT`: what the kernel is known to do, from whoever chose it (tests/kernels/run).
//!
//! The tests then assert that, so that one which is wrong about what the kernel has cannot pass for
//! a kernel that has it not. Where it is unset, what the kernel says of itself is believed, and what
//! it does not say is left open.
//!
//! It is `absent`, `disabled` or `present`, of passthrough, and then whichever hold of
//!
//! | word | |
//! |---|---|
//! | `sync-init` | `FUSE_DEV_IOC_SYNC_INIT`: Linux 6.18 |
//! | `regular-files-only` | other backing files are refused: Linux 6.12.48, 6.16.8, 6.17 and later |
//! | `unattached-eperm` | a device that is not mounted gets `EPERM`, else `EINVAL`, from the ioctls of passthrough |
//! | `clone-eperm` | and from CLONE |
//! | `landlock` | threads can enter Landlock domains |
//! | `fail-nth` | `/proc/self/fail-nth`: a kernel that was built to have its allocations fail |

use std::env;
use std::path::Path;
use std::sync::OnceLock;

use fuse_backing::{Errno, uapi};
use libtest_mimic::Failed;

use crate::fuse::{Connection, Init, Offer};
use crate::sandbox::Sandbox;
use crate::{Needs, Test};

pub const TESTS: &[Test] = &[("kernel_is_as_told", Needs::Told, kernel_is_as_told)];

/// What a kernel has of passthrough.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Support {
    Present,
    /// Protocol 7.40 is of Linux 6.9, so the kernel knows passthrough, and was built without.
    Disabled,
    Absent,
}

impl Support {
    /// What it says in INIT.
    fn offered(offer: Offer) -> Self {
        if offer.flags & uapi::FUSE_PASSTHROUGH != 0 {
            Self::Present
        } else if offer.minor >= 40 {
            Self::Disabled
        } else {
            Self::Absent
        }
    }
}

struct Told {
    support: Support,
    words: Vec<String>,
}

const WORDS: &[&str] = &[
    "sync-init",
    "regular-files-only",
    "unattached-eperm",
    "clone-eperm",
    "landlock",
    "fail-nth",
];

fn told() -> Option<&'static Told> {
    static TOLD: OnceLock<Option<Told>> = OnceLock::new();
    TOLD.get_or_init(|| {
        let all = env::var("FUSE_BACKING_EXPECT").ok()?;
        let mut words = all.split_whitespace().map(str::to_owned);
        let support = match words.next().unwrap_or_default().as_str() {
            "present" => Support::Present,
            "disabled" => Support::Disabled,
            "absent" => Support::Absent,
            other => panic!("FUSE_BACKING_EXPECT: '{other}' is not absent, disabled or present"),
        };
        let words: Vec<_> = words.collect();
        if let Some(other) = words.iter().find(|word| !WORDS.contains(&word.as_str())) {
            panic!("FUSE_BACKING_EXPECT: '{other}' is none of {WORDS:?}");
        }
        Some(Told { support, words })
    })
    .as_ref()
}

fn told_of(word: &str) -> Option<bool> {
    assert!(WORDS.contains(&word));
    Some(told()?.words.iter().any(|known| known == word))
}

pub fn is_told() -> bool {
    told().is_some()
}

pub fn support(offer: Offer) -> Support {
    told().map_or(Support::offered(offer), |told| told.support)
}

pub fn sync_init(offer: Offer) -> bool {
    told_of("sync-init").unwrap_or(offer.minor >= 45)
}

/// Linux 6.12, which has protocol 7.41, takes `O_PATH` backing fds.
pub fn path_only_files(offer: Offer) -> bool {
    offer.minor >= 41
}

/// `None`: it may be one of the stable releases that do.
pub fn regular_files_only(offer: Offer) -> Option<bool> {
    told_of("regular-files-only").or((offer.minor >= 45).then_some(true))
}

pub fn fail_nth() -> bool {
    told_of("fail-nth").unwrap_or_else(has_fail_nth)
}

pub fn landlock() -> bool {
    told_of("landlock").unwrap_or_else(has_landlock)
}

/// `landlock_create_ruleset(NULL, 0, LANDLOCK_CREATE_RULESET_VERSION)`
#[allow(unsafe_code)]
fn has_landlock() -> bool {
    let (none, zero, version) = (std::ptr::null::<u8>(), 0_usize, 1_u32);
    // SAFETY: with this flag the call reads nothing.
    let abi = unsafe { libc::syscall(libc::SYS_landlock_create_ruleset, none, zero, version) };
    abi > 0
}

fn has_fail_nth() -> bool {
    Path::new("/proc/thread-self/fail-nth").exists()
}

/// Of a device that is not attached to a connection.
#[track_caller]
pub fn assert_unattached(errno: Errno) {
    assert_either(told_of("unattached-eperm"), errno);
}

/// Of CLONE, from such a device.
#[track_caller]
pub fn assert_clone_unattached(errno: Errno) {
    assert_either(told_of("clone-eperm"), errno);
}

#[track_caller]
fn assert_either(eperm: Option<bool>, errno: Errno) {
    let expected: &[_] = match eperm {
        Some(true) => &[Errno::PERM],
        Some(false) => &[Errno::INVAL],
        None => &[Errno::PERM, Errno::INVAL],
    };
    assert!(expected.contains(&errno), "{errno:?}, not {expected:?}");
}

/// By what it says itself, which is what the crate goes by.
fn kernel_is_as_told(sandbox: &Sandbox) -> Result<(), Failed> {
    let offer = Connection::mount(sandbox, Init::PLAIN)?.offer();
    let told = told().ok_or("FUSE_BACKING_EXPECT is not set")?;
    assert_eq!(Support::offered(offer), told.support);
    assert_eq!(sync_init(offer), offer.minor >= 45);
    assert_eq!(landlock(), has_landlock());
    assert_eq!(fail_nth(), has_fail_nth());
    Ok(())
}
