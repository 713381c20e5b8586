//! What this kernel is known to do, told by `FUSE_BACKING_EXPECT` or shown by the kernel itself.
//!
//! tests/kernels/run chooses the kernel and tells it. The tests then assert that, so that a kernel which lacks a
//! feature by mistake fails. Where the variable is unset, what the kernel shows is believed, and what it does
//! not show is left open: both outcomes pass. The tests say at their start which it is (`summary`).
//!
//! It is `absent`, `disabled` or `present`, of passthrough, and then whichever hold of `WORDS`. A word with
//! a question mark is left open.

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

/// A property of kernels, and what this one shows of it: `None` where nothing but the tested call itself would.
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
/// A process that is killed in mount(2), where that waits for INIT, does not end: CVE-2026-31713. Seen on
/// 6.18.5, 6.18.15 and 6.19.14, not on 6.18.44 nor from 7.0.4 on.
const SYNC_INIT_UNKILLABLE: Word = Word {
    name: "sync-init-unkillable",
    shown: || (offer().minor < 45).then_some(false),
};
/// Backing files that are not regular files are refused: Linux 6.12.48, 6.16.8, 6.17 and later.
const REGULAR_FILES_ONLY: Word = Word {
    name: "regular-files-only",
    shown: || (offer().minor >= 45).then_some(true),
};
/// The ioctls of passthrough give `EPERM` for a device that is not mounted, else `EINVAL`.
const UNATTACHED_EPERM: Word = Word {
    name: "unattached-eperm",
    shown: || None,
};
/// So does CLONE.
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
/// There is overlayfs, to have files that are stacked.
const OVERLAYFS: Word = Word {
    name: "overlayfs",
    shown: || Some(has_overlayfs()),
};
/// `/proc/self/fail-nth`: a kernel that was built to have its allocations fail.
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
    /// `None`: it is left open.
    fn known(self) -> Option<bool> {
        let Some(told) = told() else {
            return (self.shown)();
        };
        let is_told = |what: &str| told.words.iter().any(|word| word == what);
        if is_told(&format!("{}?", self.name)) {
            return (self.shown)();
        }
        Some(is_told(self.name))
    }
}

struct Told {
    support: Support,
    words: Vec<String>,
}

fn told() -> Option<&'static Told> {
    static TOLD: OnceLock<Option<Told>> = OnceLock::new();
    TOLD.get_or_init(|| {
        let all = env::var("FUSE_BACKING_EXPECT").ok()?;
        let mut words = all.split_whitespace();
        let support = match words.next().unwrap_or_default() {
            "present" => Support::Present,
            "disabled" => Support::Disabled,
            "absent" => Support::Absent,
            other => panic!("FUSE_BACKING_EXPECT: '{other}' is not absent, disabled or present"),
        };
        let words: Vec<_> = words.map(str::to_owned).collect();
        for told in &words {
            let name = told.trim_end_matches('?');
            let known = WORDS.iter().any(|word| word.name == name);
            assert!(known, "FUSE_BACKING_EXPECT: unknown '{told}'");
        }
        Some(Told { support, words })
    })
    .as_ref()
}

static OFFER: OnceLock<Offer> = OnceLock::new();

/// Asks the kernel what it has, once and before the tests.
pub fn ask() -> Result<(), String> {
    let ask = || {
        let sandbox = Sandbox::new("what the kernel has")?;
        Ok(Connection::mount(&sandbox, Init::PLAIN)?.offer())
    };
    let offer = ask().map_err(|failed: Failed| failed.message().unwrap_or("INIT").to_owned())?;
    OFFER.set(offer).map_err(|_| "asked twice".to_owned())
}

/// What the kernel said in INIT.
pub fn offer() -> Offer {
    *OFFER.get().expect("asked")
}

/// What the tests go by, and where they have it from.
pub fn summary() -> String {
    let uname = uname();
    let release = uname.release().to_string_lossy();
    let source = match told() {
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
        ("not known, so that either passes", None),
    ] {
        let words = WORDS.iter().filter(|word| word.known() == known);
        let names: Vec<_> = words.map(|word| word.name).collect();
        if !names.is_empty() {
            let _ = write!(summary, "; {title}: {}", names.join(", "));
        }
    }
    summary
}

pub fn is_told() -> bool {
    told().is_some()
}

pub fn support() -> Support {
    told().map_or_else(Support::offered, |told| told.support)
}

pub fn sync_init() -> bool {
    SYNC_INIT.known() == Some(true)
}

pub fn sync_init_unkillable() -> Option<bool> {
    SYNC_INIT_UNKILLABLE.known()
}

/// Linux 6.12, which has protocol 7.41, takes `O_PATH` backing fds.
pub fn path_only_files() -> bool {
    offer().minor >= 41
}

/// `None`: it may be one of the stable releases that do.
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

/// Opening it loads its module, where there is one.
fn has_overlayfs() -> bool {
    fsopen("overlay", FsOpenFlags::FSOPEN_CLOEXEC).is_ok()
}

fn has_fail_nth() -> bool {
    Path::new("/proc/thread-self/fail-nth").exists()
}

/// Of a device that is not attached to a connection.
#[track_caller]
pub fn assert_unattached(errno: Errno) {
    assert_either(UNATTACHED_EPERM, errno);
}

/// Of CLONE, from such a device.
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

/// By what it shows, which is what the crate goes by.
#[apply(needs_told)]
fn kernel_is_as_told(_: &Sandbox) -> Result<(), Failed> {
    assert!(is_told());
    assert_eq!(support(), Support::offered());
    for word in WORDS {
        if let (Some(known), Some(shown)) = (word.known(), (word.shown)()) {
            assert_eq!(known, shown, "{}", word.name);
        }
    }
    Ok(())
}
