//! What the crate composes for the kernel, decoded independently and checked against the kernel's rules,
//! which are written down here once more: every combination of what has a name, and random values for the
//! rest. These tests need no kernel. tests/kernel/ shows that the kernel has these rules.
//!
//! `PROPTEST_CASES` and `PROPTEST_RNG_SEED` have an effect. Without a seed the cases are always the same.

#![allow(clippy::panic, clippy::unwrap_used)]

use std::env;
use std::fs;

use fuse_backing::error::{NegotiateError, OpenError};
use fuse_backing::init::{
    InitFlags, MaxStackDepth, Negotiated, negotiate, negotiate_for_registrar,
};
use fuse_backing::rights::Lowered;
use fuse_backing::{Access, BackingId, FopenFlags, FuseDevice, Handles, OpenReply};
use proptest::prelude::{any, prop};
use proptest::strategy::Strategy;
use proptest::test_runner::{Config, RngAlgorithm, TestCaseError, TestRng, TestRunner};

/// Runs `property` on values of `strategy`.
fn check<S: Strategy>(strategy: &S, property: impl Fn(S::Value) -> Result<(), TestCaseError>) {
    let mut config = Config::default();
    if env::var_os("PROPTEST_CASES").is_none() {
        config.cases = 4096;
    }
    config.failure_persistence = None;
    let seed = env::var("PROPTEST_RNG_SEED").map_or(0, |seed| seed.parse::<u64>().unwrap());
    let seed = seed.to_le_bytes().repeat(4);
    let rng = TestRng::from_seed(RngAlgorithm::ChaCha, &seed);
    if let Err(error) = TestRunner::new_with_rng(config, rng).run(strategy, property) {
        panic!("{error}");
    }
}

/// The number in `bytes`, of any size, as this machine stores it.
fn number(bytes: &[u8]) -> u64 {
    let push = |number: u64, byte: &u8| number << 8 | u64::from(*byte);
    if cfg!(target_endian = "big") {
        bytes.iter().fold(0, push)
    } else {
        bytes.iter().rev().fold(0, push)
    }
}

/// `struct fuse_open_out`, as the kernel reads it.
#[derive(Debug, PartialEq, Eq)]
struct OpenOut {
    fh: u64,
    open_flags: u64,
    /// A bit pattern: the kernel's type is signed.
    backing_id: u64,
}

impl OpenOut {
    fn decode(bytes: &[u8]) -> Self {
        assert_eq!(bytes.len(), 16);
        Self {
            fh: number(&bytes[..8]),
            open_flags: number(&bytes[8..12]),
            backing_id: number(&bytes[12..]),
        }
    }

    /// Whether the kernel accepts this reply, judged by the reply alone, or gives the client `EIO`:
    /// `fuse_file_passthrough_open` and `fuse_passthrough_open` of fs/fuse.
    fn is_accepted(&self) -> bool {
        const PASSTHROUGH: u64 = 1 << 7;
        const ALLOWED_BESIDE: u64 = 1 | 1 << 5 | 1 << 6;
        self.open_flags & PASSTHROUGH == 0
            || self.open_flags & !(PASSTHROUGH | ALLOWED_BESIDE) == 0
                && (1..1 << 31).contains(&self.backing_id)
    }
}

/// Whether an open asks to read and to write: `ACC_MODE` of fs/open.c, and `O_TRUNC`, which takes write access.
fn asks_for(client_flags: i32) -> (bool, bool) {
    let mode = client_flags & libc::O_ACCMODE;
    let truncates = client_flags & libc::O_TRUNC != 0;
    (mode != libc::O_WRONLY, mode != libc::O_RDONLY || truncates)
}

const GRANTS: [(Access, (bool, bool)); 3] = [
    (Access::ReadOnly, (true, false)),
    (Access::WriteOnly, (false, true)),
    (Access::ReadWrite, (true, true)),
];

/// `OpenReply` gives a reply exactly if the server's grant and the kernel's rules both allow it, and its bytes
/// say what was asked for.
fn passthrough_as_the_rules_say(
    grant: (Access, (bool, bool)),
    client_flags: i32,
    flags: u32,
    id: i32,
    fh: u64,
) {
    let (granted, (may_read, may_write)) = grant;
    let (reads, writes) = asks_for(client_flags);
    let exceeds = reads && !may_read || writes && !may_write;
    let wished = OpenOut {
        fh,
        open_flags: u64::from(flags) | 1 << 7,
        backing_id: u64::from(id as u32),
    };
    let id = BackingId::from_raw(id).unwrap();
    let flags = FopenFlags::from_bits_retain(flags);
    match OpenReply::passthrough(&id, granted, client_flags, flags) {
        Ok(reply) => {
            assert!(!exceeds, "{granted} for {client_flags:#o}");
            let bytes = reply.to_fuse_open_out(fh).to_bytes();
            let decoded = OpenOut::decode(&bytes);
            assert_eq!(decoded, wished);
            assert!(decoded.is_accepted(), "{decoded:?}");
            assert_eq!(u64::from(reply.open_flags().bits()), wished.open_flags);
            assert_eq!(reply.backing_id(), Some(id.as_raw()));
        }
        Err(OpenError::AccessExceeded {
            granted: said,
            wanted,
        }) => {
            assert!(exceeds, "{granted} for {client_flags:#o}");
            assert_eq!(said, granted);
            let (_, rights) = GRANTS.iter().find(|(access, _)| *access == wanted).unwrap();
            assert_eq!(*rights, (reads, writes));
        }
        Err(OpenError::FlagsNotAllowed(refused)) => {
            assert!(!exceeds && !wished.is_accepted(), "{wished:?}");
            let kept = OpenOut {
                open_flags: wished.open_flags & !u64::from(refused.bits()),
                ..wished
            };
            assert!(kept.is_accepted(), "{refused:?} are not all that must go");
            assert!(flags.contains(refused));
        }
        Err(other) => panic!("{other}"),
    }
}

#[test]
fn open_replies_of_every_named_combination() {
    let modes = [
        libc::O_RDONLY,
        libc::O_WRONLY,
        libc::O_RDWR,
        libc::O_ACCMODE,
    ];
    // O_TRUNC, what exec sends, an O_DIRECT append, and the sign bit.
    let others = [
        0,
        libc::O_TRUNC,
        0o40,
        libc::O_APPEND | libc::O_DIRECT,
        i32::MIN,
    ];
    for flags in 0..=0x1ff {
        for grant in GRANTS {
            for mode in modes {
                for other in others {
                    passthrough_as_the_rules_say(grant, mode | other, flags, 7, 1);
                }
            }
        }
        let reply = OpenReply::server(FopenFlags::from_bits_retain(flags));
        let out = OpenOut {
            fh: 2,
            open_flags: u64::from(flags),
            backing_id: 0,
        };
        // Without an id, only a reply without passthrough is accepted.
        assert_eq!(reply.is_ok(), out.is_accepted(), "{flags:#x}");
        if let Ok(reply) = reply {
            assert_eq!(OpenOut::decode(&reply.to_fuse_open_out(2).to_bytes()), out);
        }
    }
}

#[test]
fn open_replies_of_random_numbers() {
    let grants = prop::sample::select(&GRANTS[..]);
    // Half of the values have only flags that can be accepted.
    let flags = prop::strategy::Union::new([
        any::<u32>().boxed(),
        any::<u32>().prop_map(|flags| flags & 0xe1).boxed(),
    ]);
    let cases = (grants, any::<i32>(), flags, 1..=i32::MAX, any::<u64>());
    check(&cases, |(grant, client_flags, flags, id, fh)| {
        passthrough_as_the_rules_say(grant, client_flags, flags, id, fh);
        Ok(())
    });
}

/// The struct's fields are public, and can have any value.
#[test]
fn bytes_of_any_fuse_open_out() {
    let cases = (any::<u64>(), any::<u32>(), any::<i32>());
    check(&cases, |(fh, open_flags, backing_id)| {
        let mut out = OpenReply::server(FopenFlags::empty())
            .unwrap()
            .to_fuse_open_out(fh);
        out.open_flags = open_flags;
        out.backing_id = backing_id;
        let expected = OpenOut {
            fh,
            open_flags: u64::from(open_flags),
            backing_id: u64::from(backing_id as u32),
        };
        assert_eq!(OpenOut::decode(&out.to_bytes()), expected);
        Ok(())
    });
}

#[test]
fn ids_are_positive() {
    check(&any::<i32>(), |raw| {
        let id = BackingId::from_raw(raw);
        assert_eq!(id.is_some(), raw > 0, "{raw}");
        assert_eq!(id.map(BackingId::into_raw), (raw > 0).then_some(raw));
        Ok(())
    });
    for edge in [i32::MIN, -1, 0] {
        assert_eq!(BackingId::from_raw(edge), None);
    }
}

/// The flags of `process_init_reply` in fs/fuse/inode.c.
const WRITEBACK_CACHE: u64 = 1 << 16;
const HANDLE_KILLPRIV: u64 = 1 << 19;
const HANDLE_KILLPRIV_V2: u64 = 1 << 28;
const INIT_EXT: u64 = 1 << 30;
const PASSTHROUGH: u64 = 1 << 37;
/// Flags that a server cannot want together with passthrough, or must ask for in another way.
const EXCLUDED: u64 = WRITEBACK_CACHE | HANDLE_KILLPRIV | HANDLE_KILLPRIV_V2;

/// What the kernel takes from an INIT reply: its flags, and the depth if passthrough is on.
fn process_init_reply(init_out: &[u8; 64]) -> (u64, Option<u64>) {
    let mut flags = number(&init_out[12..16]);
    if flags & INIT_EXT != 0 {
        flags |= number(&init_out[32..36]) << 32;
    }
    let depth = number(&init_out[36..40]);
    let on = flags & PASSTHROUGH != 0 && (1..=2).contains(&depth) && flags & WRITEBACK_CACHE == 0;
    (flags, on.then_some(depth))
}

fn init_out(reply: &Negotiated) -> [u8; 64] {
    let mut bytes = [0; 64];
    let (flags, flags2) = reply.flags.to_fields();
    bytes[12..16].copy_from_slice(&flags.to_ne_bytes());
    bytes[32..36].copy_from_slice(&flags2.to_ne_bytes());
    bytes[36..40].copy_from_slice(&reply.max_stack_depth.to_ne_bytes());
    bytes
}

/// Whether this thread may register files, according to /proc.
fn may_register() -> bool {
    const CAP_SYS_ADMIN: u32 = 21;
    let status = fs::read_to_string("/proc/thread-self/status").unwrap();
    let effective = status
        .lines()
        .find_map(|line| line.strip_prefix("CapEff:"))
        .unwrap();
    let effective = u64::from_str_radix(effective.trim(), 16).unwrap();
    let namespace = fs::read_link("/proc/thread-self/ns/user").unwrap();
    namespace.as_os_str() == "user:[4026531837]" && effective >> CAP_SYS_ADMIN & 1 == 1
}

fn negotiate_as_the_rules_say(offered: u64, wanted: u64, depth: MaxStackDepth, permitted: bool) {
    let flags = InitFlags::from_bits_retain;
    let negotiated = negotiate(flags(offered), flags(wanted), depth);
    // `reply` gives the same, except that it does not check the permission.
    match negotiate_for_registrar(flags(offered), flags(wanted), depth) {
        Ok(_) if !permitted => assert!(matches!(negotiated, Err(NegotiateError::NotPermitted(_)))),
        reply => assert_eq!(reply, negotiated),
    }
    match negotiated {
        Ok(reply) => {
            let (taken, on) = process_init_reply(&init_out(&reply));
            assert!(permitted);
            assert_eq!(taken, reply.flags.bits(), "the fields have all flags");
            let expected = match depth {
                MaxStackDepth::One => 1,
                MaxStackDepth::Two => 2,
            };
            assert_eq!(on, Some(expected), "{taken:#x}");
            // The reply has every flag that is wanted and offered. Beyond these it has only PASSTHROUGH, and
            // INIT_EXT, without which the kernel does not read the word with PASSTHROUGH.
            assert_eq!(wanted & offered & !taken, 0);
            assert_eq!(
                taken & !(offered & wanted),
                (PASSTHROUGH | INIT_EXT) & !(offered & wanted)
            );
            assert_eq!(wanted & EXCLUDED, 0);
            let handles = Handles::<Lowered<FuseDevice>>::default();
            let with_killpriv = taken | offered & HANDLE_KILLPRIV_V2;
            for more in [
                reply.handle_killpriv_v2(&handles),
                reply.handle_killpriv_v2_with_fsetid(),
            ] {
                assert_eq!(process_init_reply(&init_out(&more)), (with_killpriv, on));
            }
        }
        Err(NegotiateError::NotOffered) => assert_eq!(offered & PASSTHROUGH, 0),
        Err(NegotiateError::WritebackCacheWanted) => {
            assert_ne!(offered & PASSTHROUGH, 0);
            assert_ne!(wanted & WRITEBACK_CACHE, 0);
        }
        Err(NegotiateError::HandleKillprivWanted) => {
            assert_ne!(offered & PASSTHROUGH, 0);
            assert_eq!(wanted & WRITEBACK_CACHE, 0);
            assert_ne!(wanted & HANDLE_KILLPRIV, 0);
        }
        Err(NegotiateError::HandleKillprivV2Wanted) => {
            assert_ne!(offered & PASSTHROUGH, 0);
            assert_eq!(wanted & (WRITEBACK_CACHE | HANDLE_KILLPRIV), 0);
            assert_ne!(wanted & HANDLE_KILLPRIV_V2, 0);
        }
        Err(NegotiateError::NotPermitted(_)) => {
            assert!(!permitted);
            assert_ne!(offered & PASSTHROUGH, 0);
            assert_eq!(wanted & EXCLUDED, 0);
        }
        Err(other) => panic!("{other}"),
    }
}

const DEPTHS: [MaxStackDepth; 2] = [MaxStackDepth::One, MaxStackDepth::Two];

#[test]
fn negotiations_of_every_named_combination() {
    let permitted = may_register();
    let names: Vec<_> = InitFlags::all().iter_names().collect();
    assert_eq!(names.len(), 6);
    // Flags without a name change nothing. Each of the two fields gets one.
    let others = InitFlags::from_bits_retain(1 << 2 | 1 << 63);
    let named = names.iter().map(|&(_, flag)| flag);
    let bits: Vec<u64> = named.chain([others]).map(|flags| flags.bits()).collect();
    let subsets = |bits: &[u64]| -> Vec<u64> {
        let pick = |subset: u32| (0..bits.len()).filter(move |i| subset >> i & 1 == 1);
        (0..1 << bits.len())
            .map(|subset| pick(subset).map(|i| bits[i]).sum())
            .collect()
    };
    for &offered in &subsets(&bits) {
        for &wanted in &subsets(&bits) {
            for depth in DEPTHS {
                negotiate_as_the_rules_say(offered, wanted, depth, permitted);
            }
        }
    }
}

#[test]
fn negotiations_of_random_flags() {
    let permitted = may_register();
    // Half of the values have no flag that is always refused.
    let wanted = prop::strategy::Union::new([
        any::<u64>().boxed(),
        any::<u64>().prop_map(|flags| flags & !EXCLUDED).boxed(),
    ]);
    let cases = (any::<u64>(), wanted, prop::sample::select(&DEPTHS[..]));
    check(&cases, |(offered, wanted, depth)| {
        negotiate_as_the_rules_say(offered, wanted, depth, permitted);
        Ok(())
    });
}

#[test]
fn init_flags_from_fields() {
    check(&(any::<u32>(), any::<u32>()), |(flags, flags2)| {
        let mut bytes = [0; 64];
        bytes[12..16].copy_from_slice(&(flags | 1 << 30).to_ne_bytes());
        bytes[32..36].copy_from_slice(&flags2.to_ne_bytes());
        let (taken, _) = process_init_reply(&bytes);
        let composed = InitFlags::from_fields(flags | 1 << 30, flags2);
        assert_eq!(composed.bits(), taken);
        // Without INIT_EXT, the kernel has sent no second word.
        let low = flags & !(1 << 30);
        assert_eq!(InitFlags::from_fields(low, flags2).bits(), low.into());
        // The integers that FUSE libraries have.
        assert_eq!(InitFlags::from(taken), composed);
        assert_eq!(FopenFlags::from(flags).bits(), flags);
        Ok(())
    });
}
