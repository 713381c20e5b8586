//! What the tests expect of this kernel, from `FUSE_BACKING_EXPECT` or from the kernel itself.
//!
//! tests/kernels/run chooses a kernel and sets the variable to what it must do. The tests assert that, so that a kernel
//! which lacks a feature by mistake fails. If the variable is unset, the tests rely on what the kernel shows; for what
//! it does not show, both outcomes pass. The tests print at their start which applies (`summary`).
//!
//! The variable's first word is the state of passthrough: `absent`, `disabled` or `present`. Then come those `WORDS`
//! that hold. A word with a question mark is decided by what the kernel shows.

use std::env;
use std::fmt::Write as _;
use std::path::Path;
use std::sync::OnceLock;

use fuse_backing::{error::Errno, uapi};
use libtest_mimic::Failed;
use macro_rules_attribute::apply;
use rustix::mount::{FsOpenFlags, fsopen};
use rustix::system::uname;

use crate::fuse::{Connection, Init, Offer};
use crate::sandbox::Sandbox;

/// Whether a kernel has passthrough.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Support {
    Present,
    /// The kernel was built without it. Protocol 7.40 is that of Linux 6.9, which has passthrough.
    Disabled,
    Absent,
}

impl Support {
    /// What INIT shows.
    fn offered() -> Self {
        let offer = offer();
        if offer.flags & uapi::FUSE_PASSTHROUGH != 0 {
            Self::Present
        } else if offer.minor >= 40 {
            Self::Disabled
        } else {
            Self::Absent
        }
    }
}

/// A property of kernels, and whether this one shows that it has it: `None` if only the tested call would show it.
#[derive(Clone, Copy)]
struct Word {
    name: &'static str,
    shown: fn() -> Option<bool>,
}

/// `FUSE_DEV_IOC_SYNC_INIT`: Linux 6.18, with protocol 7.45.
const SYNC_INIT: Word = Word {
    name: "sync-init",
    shown: || Some(offer().minor >= 45),
};
/// A process that is killed while mount(2) waits for INIT does not end: CVE-2026-31713. Seen on 6.18.5, 6.18.15 and
/// 6.19.14, but not on 6.18.44 nor from 7.0.4 on.
const SYNC_INIT_UNKILLABLE: Word = Word {
    name: "sync-init-unkillable",
    shown: || (offer().minor < 45).then_some(false),
};
/// The kernel refuses backing files that are not regular files: Linux 6.12.48, 6.16.8, 6.17 and later.
const REGULAR_FILES_ONLY: Word = Word {
    name: "regular-files-only",
    shown: || (offer().minor >= 45).then_some(true),
};
/// The passthrough ioctls fail with `EPERM` on a device that is not mounted. Other kernels give `EINVAL`.
const UNATTACHED_EPERM: Word = Word {
    name: "unattached-eperm",
    shown: || None,
};
/// CLONE of a device that is not mounted fails with `EPERM`. Other kernels give `EINVAL`.
const CLONE_EPERM: Word = Word {
    name: "clone-eperm",
    shown: || None,
};
/// Passthrough enforces that a backing file is append-only or immutable: Linux 7.3.4.
const INODE_FLAGS: Word = Word {
    name: "inode-flags",
    shown: || None,
};
/// Threads can enter Landlock domains.
const LANDLOCK: Word = Word {
    name: "landlock",
    shown: || Some(has_landlock()),
};
/// overlayfs is available, for files on a stacked filesystem.
const OVERLAYFS: Word = Word {
    name: "overlayfs",
    shown: || Some(has_overlayfs()),
};
/// `/proc/self/fail-nth`: the kernel was built with fault injection, which makes its allocations fail.
const FAIL_NTH: Word = Word {
    name: "fail-nth",
    shown: || Some(has_fail_nth()),
};
const WORDS: &[Word] = &[
    SYNC_INIT,
    SYNC_INIT_UNKILLABLE,
    REGULAR_FILES_ONLY,
    UNATTACHED_EPERM,
    CLONE_EPERM,
    INODE_FLAGS,
    LANDLOCK,
    OVERLAYFS,
    FAIL_NTH,
];

impl Word {
    /// Whether the kernel has it; `None` if both outcomes pass.
    fn known(self) -> Option<bool> {
        let Some(expected) = expectation() else {
            return (self.shown)();
        };
        let is_listed = |what: &str| expected.words.iter().any(|word| word == what);
        if is_listed(&format!("{}?", self.name)) {
            return (self.shown)();
        }
        Some(is_listed(self.name))
    }
}

struct Expectation {
    support: Support,
    words: Vec<String>,
}

fn expectation() -> Option<&'static Expectation> {
    static EXPECTATION: OnceLock<Option<Expectation>> = OnceLock::new();
    EXPECTATION
        .get_or_init(|| {
            let all = env::var("FUSE_BACKING_EXPECT").ok()?;
            let mut words = all.split_whitespace();
            let support = match words.next().unwrap_or_default() {
                "present" => Support::Present,
                "disabled" => Support::Disabled,
                "absent" => Support::Absent,
                other => {
                    panic!("FUSE_BACKING_EXPECT: '{other}' is not absent, disabled or present")
                }
            };
            let words: Vec<_> = words.map(str::to_owned).collect();
            for word in &words {
                let name = word.trim_end_matches('?');
                let known = WORDS.iter().any(|word| word.name == name);
                assert!(known, "FUSE_BACKING_EXPECT: unknown '{word}'");
            }
            Some(Expectation { support, words })
        })
        .as_ref()
}

static OFFER: OnceLock<Offer> = OnceLock::new();

/// Asks the kernel what it offers. Called once, before the tests.
pub fn ask() -> Result<(), String> {
    let ask = || {
        let sandbox = Sandbox::new("what the kernel offers")?;
        Ok(Connection::mount(&sandbox, Init::PLAIN)?.offer())
    };
    let offer = ask().map_err(|failed: Failed| failed.message().unwrap_or("INIT").to_owned())?;
    OFFER.set(offer).map_err(|_| "asked twice".to_owned())
}

/// What the kernel offered in INIT.
pub fn offer() -> Offer {
    *OFFER.get().expect("asked")
}

/// What the tests expect, and its source.
pub fn summary() -> String {
    let uname = uname();
    let release = uname.release().to_string_lossy();
    let source = match expectation() {
        Some(_) => "FUSE_BACKING_EXPECT says",
        None => "FUSE_BACKING_EXPECT is not set, the kernel shows",
    };
    let mut summary = format!(
        "Linux {release}, FUSE 7.{}; {source}: passthrough {}",
        offer().minor,
        format!("{:?}", support()).to_lowercase()
    );
    for (title, known) in [
        ("yes", Some(true)),
        ("no", Some(false)),
        ("unknown, both outcomes pass", None),
    ] {
        let words = WORDS.iter().filter(|word| word.known() == known);
        let names: Vec<_> = words.map(|word| word.name).collect();
        if !names.is_empty() {
            let _ = write!(summary, "; {title}: {}", names.join(", "));
        }
    }
    summary
}

pub fn is_set() -> bool {
    expectation().is_some()
}

pub fn support() -> Support {
    expectation().map_or_else(Support::offered, |expected| expected.support)
}

pub fn sync_init() -> bool {
    SYNC_INIT.known() == Some(true)
}

pub fn sync_init_unkillable() -> Option<bool> {
    SYNC_INIT_UNKILLABLE.known()
}

/// Whether the kernel accepts `O_PATH` backing fds, as it does from Linux 6.12 on, which has protocol 7.41.
pub fn path_only_files() -> bool {
    offer().minor >= 41
}

/// `None` if it may be one of the stable releases that refuse others.
pub fn regular_files_only() -> Option<bool> {
    REGULAR_FILES_ONLY.known()
}

pub fn inode_flags() -> Option<bool> {
    INODE_FLAGS.known()
}

pub fn fail_nth() -> bool {
    FAIL_NTH.known() == Some(true)
}

pub fn landlock() -> bool {
    LANDLOCK.known() == Some(true)
}

pub fn overlayfs() -> bool {
    OVERLAYFS.known() == Some(true)
}

/// `landlock_create_ruleset(NULL, 0, LANDLOCK_CREATE_RULESET_VERSION)`
#[allow(unsafe_code)]
fn has_landlock() -> bool {
    let (none, zero, version) = (std::ptr::null::<u8>(), 0_usize, 1_u32);
    // SAFETY: with this flag the call reads nothing.
    let abi = unsafe { libc::syscall(libc::SYS_landlock_create_ruleset, none, zero, version) };
    abi > 0
}

/// fsopen(2) loads the module, if there is one.
fn has_overlayfs() -> bool {
    fsopen("overlay", FsOpenFlags::FSOPEN_CLOEXEC).is_ok()
}

fn has_fail_nth() -> bool {
    Path::new("/proc/thread-self/fail-nth").exists()
}

/// Asserts the errno of a passthrough ioctl on a device that is not attached to a connection.
#[track_caller]
pub fn assert_unattached(errno: Errno) {
    assert_either(UNATTACHED_EPERM, errno);
}

/// Asserts the errno of CLONE from such a device.
#[track_caller]
pub fn assert_clone_unattached(errno: Errno) {
    assert_either(CLONE_EPERM, errno);
}

#[track_caller]
fn assert_either(eperm: Word, errno: Errno) {
    let expected: &[_] = match eperm.known() {
        Some(true) => &[Errno::PERM],
        Some(false) => &[Errno::INVAL],
        None => &[Errno::PERM, Errno::INVAL],
    };
    assert!(expected.contains(&errno), "{errno:?}, not {expected:?}");
}

/// What the kernel shows agrees with `FUSE_BACKING_EXPECT`.
#[apply(needs_expectation)]
fn kernel_is_as_told(_: &Sandbox) -> Result<(), Failed> {
    assert!(is_set());
    assert_eq!(support(), Support::offered());
    for word in WORDS {
        if let (Some(known), Some(shown)) = (word.known(), (word.shown)()) {
            assert_eq!(known, shown, "{}", word.name);
        }
    }
    Ok(())
}
