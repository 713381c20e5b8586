//! `OpenReply`, `FopenFlags`, `ClientFlags` and `Access`: every combination, against rules that are written down a
//! second time. These tests need no kernel. tests/kernel/passthrough.rs shows that the kernel has the same rules.

#![allow(clippy::unwrap_used)]

use std::fs::File;
use std::io;
use std::os::unix::fs::OpenOptionsExt;

use fuse_backing::error::OpenError;
use fuse_backing::{
    Access, BackingId, ClientFlags, FopenFlags, OpenReply, error::Errno, uapi::fuse_open_out,
};
use rustix::fs::OFlags;

const ALL: [Access; 3] = [Access::ReadOnly, Access::WriteOnly, Access::ReadWrite];

fn id() -> BackingId {
    BackingId::from_raw(7).unwrap()
}

/// The errno that a client gets.
fn raw(error: OpenError) -> i32 {
    io::Error::from(error).raw_os_error().unwrap()
}

#[test]
fn access_of_an_fd() {
    let open = |flags: OFlags| {
        File::options()
            .read(true)
            .custom_flags(flags.bits() as i32)
            .open("/dev/null")
            .unwrap()
    };
    let write = File::options().write(true).open("/dev/null").unwrap();
    let both = File::options().read(true).write(true).open("/dev/null");
    assert_eq!(Access::of(open(OFlags::empty())), Ok(Access::ReadOnly));
    assert_eq!(Access::of(&write), Ok(Access::WriteOnly));
    assert_eq!(Access::of(both.unwrap()), Ok(Access::ReadWrite));
    // F_GETFL reports O_RDONLY for an O_PATH fd, from which nothing can be read.
    assert_eq!(Access::of(open(OFlags::PATH)), Err(OpenError::NoAccess));
    // A read from such an fd gives the same errno.
    assert_eq!(OpenError::NoAccess.errno(), Errno::BADF);
}

/// Linux has access mode 3 for ioctls alone. qemu-user does not support it.
#[test]
fn access_of_an_fd_of_mode_3() {
    let fd = rustix::fs::open("/dev/null", OFlags::ACCMODE, rustix::fs::Mode::empty());
    assert_eq!(Access::of(fd.unwrap()), Err(OpenError::NoAccess));
}

#[test]
fn access_that_client_flags_ask_for() {
    // Other flags that a client's open may have, among them exec's 0o40.
    let others = [
        OFlags::empty(),
        OFlags::APPEND,
        OFlags::DIRECT,
        OFlags::NONBLOCK,
        OFlags::from_bits_retain(0o40),
        OFlags::from_bits_retain(1 << 31),
    ];
    for other in others {
        for (mode, plain, truncating) in [
            (OFlags::RDONLY, Access::ReadOnly, Access::ReadWrite),
            (OFlags::WRONLY, Access::WriteOnly, Access::WriteOnly),
            (OFlags::RDWR, Access::ReadWrite, Access::ReadWrite),
            (OFlags::ACCMODE, Access::ReadWrite, Access::ReadWrite),
        ] {
            let flags = mode | other;
            let truncates = flags | OFlags::TRUNC;
            let wanted = ClientFlags::from(flags).access();
            assert_eq!(wanted, plain, "{flags:?}");
            // O_TRUNC does not count: the server's own open has truncated the file.
            assert_eq!(ClientFlags::from(truncates).access(), plain, "{flags:?}");
            // A reply without a table cannot rely on that, so O_TRUNC counts as writing.
            for (flags, wanted) in [(flags, plain), (truncates, truncating)] {
                for granted in ALL {
                    let id = id();
                    let empty = FopenFlags::empty();
                    let reply = OpenReply::passthrough(&id, granted, flags, empty);
                    assert_eq!(reply.is_ok(), granted.allows(wanted), "{granted} {flags:?}");
                }
            }
        }
    }
}

/// FUSE libraries have them as different integer types.
#[test]
fn client_flags_of_each_type() {
    for flags in [0, 1, 2, 3, OFlags::TRUNC.bits() | 1, 1 << 31, u32::MAX] {
        let expected = ClientFlags::from(OFlags::from_bits_retain(flags));
        assert_eq!(ClientFlags::from(flags), expected, "{flags:#x}");
        assert_eq!(ClientFlags::from(flags as i32), expected, "{flags:#x}");
    }
}

#[test]
fn access_allows_no_more_than_it_is() {
    for granted in ALL {
        for wanted in ALL {
            let reads = |access| access != Access::WriteOnly;
            let writes = |access| access != Access::ReadOnly;
            let expected =
                (!reads(wanted) || reads(granted)) && (!writes(wanted) || writes(granted));
            assert_eq!(granted.allows(wanted), expected, "{granted} {wanted}");
        }
    }
}

#[test]
fn access_in_words() {
    let words = ALL.map(|access| access.to_string());
    assert_eq!(words, ["read-only", "write-only", "read-write"]);
}

#[test]
fn access_exceeded() {
    for granted in ALL {
        for flags in [OFlags::RDONLY, OFlags::WRONLY, OFlags::RDWR] {
            let wanted = ClientFlags::from(flags).access();
            let id = id();
            let empty = FopenFlags::empty();
            let reply = OpenReply::passthrough(&id, granted, flags, empty);
            if granted.allows(wanted) {
                assert!(reply.is_ok());
            } else {
                let error = reply.unwrap_err();
                assert_eq!(error, OpenError::AccessExceeded { granted, wanted });
                let message = format!(
                    "the client asks for {wanted} access, but the server grants {granted} access"
                );
                assert_eq!(error.to_string(), message);
                assert_eq!(error.errno(), Errno::ACCESS);
                assert_eq!(raw(error), Errno::ACCESS.raw_os_error());
            }
        }
    }
}

#[test]
fn flags_beside_passthrough() {
    let allowed = [0, 5, 6, 7];
    for bit in 0..32 {
        let flags = FopenFlags::from_bits_retain(1 << bit);
        let id = id();
        let reply = OpenReply::passthrough(&id, Access::ReadOnly, 0, flags);
        if allowed.contains(&bit) {
            let reply = reply.unwrap();
            assert_eq!(reply.open_flags().bits(), 1 << bit | 1 << 7);
            assert_eq!(reply.backing_id(), Some(7));
        } else {
            let error = reply.unwrap_err();
            assert_eq!(error, OpenError::FlagsNotAllowed(flags));
            assert_eq!(raw(error), Errno::INVAL.raw_os_error());
        }
    }
}

/// Beside flags that are allowed, the error has only the one that is refused.
#[test]
fn zero_copy_beside_passthrough() {
    let zero_copy = FopenFlags::IO_URING_ZERO_COPY;
    let id = id();
    let flags = zero_copy | FopenFlags::PASSTHROUGH | FopenFlags::NOFLUSH;
    let reply = OpenReply::passthrough(&id, Access::ReadOnly, 0, flags);
    assert_eq!(reply, Err(OpenError::FlagsNotAllowed(zero_copy)));
    assert_eq!(
        OpenReply::server(zero_copy).unwrap().open_flags(),
        zero_copy
    );
}

/// All bits except passthrough are sent unchanged, known or not.
#[test]
fn flags_without_passthrough() {
    for bit in (0..32).filter(|&bit| bit != 7) {
        let flags = FopenFlags::from_bits_retain(1 << bit);
        let reply = OpenReply::server(flags).unwrap();
        assert_eq!((reply.open_flags(), reply.backing_id()), (flags, None));
        let out = reply.to_fuse_open_out(1);
        assert_eq!((out.open_flags, out.backing_id), (1 << bit, 0));
    }
    assert_eq!(
        OpenReply::server(FopenFlags::PASSTHROUGH | FopenFlags::KEEP_CACHE),
        Err(OpenError::FlagsNotAllowed(FopenFlags::PASSTHROUGH))
    );
}

#[test]
fn bytes_of_fuse_open_out() {
    let id = BackingId::from_raw(i32::MAX).unwrap();
    let reply = OpenReply::passthrough(&id, Access::ReadWrite, 2, FopenFlags::NOFLUSH);
    let out: fuse_open_out = reply.unwrap().to_fuse_open_out(u64::MAX - 1);
    assert_eq!(
        (out.fh, out.open_flags, out.backing_id),
        (u64::MAX - 1, 0xa0, i32::MAX)
    );
    let expected = [
        &(u64::MAX - 1).to_ne_bytes()[..],
        &0xa0_u32.to_ne_bytes(),
        &i32::MAX.to_ne_bytes(),
    ];
    assert_eq!(out.to_bytes().as_slice(), expected.concat());
}
