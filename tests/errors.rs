//! What the errors say that need no kernel to be made: the errno, what it means for the next attempt,
//! and what is left of them in an `io::Error`. Those with fields that only the crate can fill in:
//! tests/kernel/.

#![allow(clippy::unwrap_used)]

use std::collections::HashSet;
use std::fmt::{Debug, Display};
use std::fs::File;
use std::io;
use std::os::fd::AsFd;
use std::os::fd::OwnedFd;

use fuse_backing::{
    Access, AccessError, BackingCloseCause, BackingOpenError, CloneConnectionError,
    DeviceOpenError, Errno, FileType, FuseDevice, NegotiateError, NotFuseDeviceReason,
    NotPermitted, Scope, SyncInitError, TableOpenError,
};
use rustix::fs::{Mode, OFlags};

/// Each with whom it concerns: what may be the thread's own is not said of the connection.
const NOT_PERMITTED: [(NotPermitted, Scope); 4] = [
    (NotPermitted::NotInInitialUserNamespace, Scope::Connection),
    (NotPermitted::MissingCapability, Scope::Thread),
    (NotPermitted::NotNegotiatedOrDenied, Scope::Connection),
    (NotPermitted::Undetermined, Scope::Thread),
];

/// A registrar says itself what its error is, and what it means.
const BY_REGISTRAR: [(Errno, Scope); 4] = [
    (Errno::ACCESS, Scope::File),
    (Errno::PIPE, Scope::Connection),
    (Errno::PERM, Scope::Thread),
    (Errno::AGAIN, Scope::Transient),
];

/// Each has its errno and its scope, and is told apart from the others.
fn each_has<E>(expected: &[(E, Errno, Scope)], has: impl Fn(&E) -> (Errno, Scope))
where
    E: std::error::Error + Into<io::Error> + Copy + PartialEq + Send + Sync + 'static,
{
    for (error, errno, scope) in expected {
        assert_eq!(has(error), (*errno, *scope), "{error:?}");
    }
    let errors: Vec<_> = expected.iter().map(|&(e, errno, _)| (e, errno)).collect();
    told_apart(&errors);
}

/// Each cause has a text of its own, which an `io::Error` of the errno's kind keeps, and gives back.
fn told_apart<E>(errors: &[(E, Errno)])
where
    E: std::error::Error + Into<io::Error> + Copy + PartialEq + Send + Sync + 'static,
{
    let mut texts = HashSet::new();
    for &(error, errno) in errors {
        let text = error.to_string();
        assert!(
            texts.insert(text.clone()),
            "{error:?} says what another says: {text}"
        );
        let io_error: io::Error = error.into();
        assert_eq!(io_error.kind(), io::Error::from(errno).kind(), "{error:?}");
        assert_eq!(io_error.to_string(), text);
        assert_eq!(io_error.raw_os_error(), None, "{error:?}");
        let inner = io_error
            .get_ref()
            .and_then(|inner| inner.downcast_ref::<E>());
        assert_eq!(inner, Some(&error));
    }
}

/// An errno that no cause is known of.
const OTHER: Errno = Errno::XDEV;

#[test]
fn backing_open() {
    use BackingOpenError as E;
    let mut expected = vec![
        (E::UnsupportedKernel, Errno::NOTTY, Scope::Connection),
        (E::Unimplemented, Errno::NOSYS, Scope::Connection),
        (E::DisabledInKernel, Errno::OPNOTSUPP, Scope::Connection),
        (E::FileNotSupported, Errno::OPNOTSUPP, Scope::File),
        (
            E::NotAttached {
                errno: Errno::INVAL,
            },
            Errno::INVAL,
            Scope::Connection,
        ),
        (
            E::NotRegularFile {
                file_type: FileType::Directory,
                errno: Errno::ISDIR,
            },
            Errno::ISDIR,
            Scope::File,
        ),
        (
            E::NotRegularFile {
                file_type: FileType::Fifo,
                errno: Errno::OPNOTSUPP,
            },
            Errno::OPNOTSUPP,
            Scope::File,
        ),
        (E::StackedTooDeep, Errno::LOOP, Scope::File),
        (E::PathOnlyFd, Errno::BADF, Scope::File),
        (E::BadFd, Errno::BADF, Scope::File),
        (E::OutOfMemory, Errno::NOMEM, Scope::Transient),
        (E::OutOfIds, Errno::NOSPC, Scope::Transient),
        (E::Interrupted, Errno::INTR, Scope::Transient),
        (E::InvalidId(0), Errno::PROTO, Scope::Connection),
        (E::InvalidId(-2), Errno::PROTO, Scope::Connection),
        (E::Other(OTHER), OTHER, Scope::File),
    ];
    expected.extend(NOT_PERMITTED.map(|(why, scope)| (E::NotPermitted(why), Errno::PERM, scope)));
    expected
        .extend(BY_REGISTRAR.map(|(errno, scope)| (E::Registrar { errno, scope }, errno, scope)));
    each_has(&expected, |error| (error.errno(), error.scope()));
}

#[test]
fn backing_close() {
    use BackingCloseCause as E;
    let mut expected = vec![
        (E::UnknownId, Errno::NOENT, Scope::File),
        (
            E::NotAttached { errno: Errno::PERM },
            Errno::PERM,
            Scope::Connection,
        ),
        (E::UnsupportedKernel, Errno::NOTTY, Scope::Connection),
        (E::Unimplemented, Errno::NOSYS, Scope::Connection),
        (E::DisabledInKernel, Errno::OPNOTSUPP, Scope::Connection),
        (E::Interrupted, Errno::INTR, Scope::Transient),
        (E::Other(OTHER), OTHER, Scope::File),
    ];
    expected.extend(NOT_PERMITTED.map(|(why, scope)| (E::NotPermitted(why), Errno::PERM, scope)));
    expected
        .extend(BY_REGISTRAR.map(|(errno, scope)| (E::Registrar { errno, scope }, errno, scope)));
    each_has(&expected, |error| (error.errno(), error.scope()));
}

#[test]
fn device_open() {
    use DeviceOpenError as E;
    let unreadable = NotFuseDeviceReason::Unreadable(Errno::PERM);
    let expected = [
        (E::Missing, Errno::NOENT, Scope::Connection),
        (
            E::NotFuse(NotFuseDeviceReason::PathOnly),
            Errno::BADF,
            Scope::Connection,
        ),
        (E::NotFuse(unreadable), Errno::PERM, Scope::Connection),
        (E::Other(Errno::INTR), Errno::INTR, Scope::Transient),
        (E::Other(Errno::MFILE), Errno::MFILE, Scope::Transient),
        (E::Other(Errno::NFILE), Errno::NFILE, Scope::Transient),
        (E::Other(Errno::NOMEM), Errno::NOMEM, Scope::Transient),
        (E::Other(OTHER), OTHER, Scope::Connection),
    ];
    for (error, errno, scope) in expected {
        assert_eq!((error.errno(), error.scope()), (errno, scope), "{error:?}");
        let clone = CloneConnectionError::Open(error);
        assert_eq!((clone.errno(), clone.scope()), (errno, scope), "{clone:?}");
        assert_eq!(clone.to_string(), error.to_string());
    }
    told_apart(&expected.map(|(e, errno, _)| (e, errno)));
    told_apart(&[
        (NotFuseDeviceReason::PathOnly, Errno::BADF),
        (unreadable, Errno::PERM),
    ]);
}

#[test]
fn clone_connection() {
    use CloneConnectionError as E;
    let expected = [
        (E::UnsupportedKernel, Errno::NOTTY, Scope::Connection),
        (E::Unimplemented, Errno::NOSYS, Scope::Connection),
        (E::OutOfMemory, Errno::NOMEM, Scope::Transient),
        (E::Interrupted, Errno::INTR, Scope::Transient),
        (E::Other(OTHER), OTHER, Scope::Connection),
    ];
    for (error, errno, scope) in expected {
        assert_eq!((error.errno(), error.scope()), (errno, scope), "{error:?}");
    }
    told_apart(&expected.map(|(e, errno, _)| (e, errno)));
}

#[test]
fn sync_init() {
    use SyncInitError as E;
    let expected = [
        (E::UnsupportedKernel, Errno::NOTTY),
        (E::Unimplemented, Errno::NOSYS),
        (E::AlreadyAttached, Errno::INVAL),
        (E::Other(OTHER), OTHER),
    ];
    for (error, errno) in expected {
        assert_eq!(
            (error.errno(), error.scope()),
            (errno, Scope::Connection),
            "{error:?}"
        );
    }
    told_apart(&expected);
}

/// It has no errno: the kernel was not asked.
#[test]
fn negotiation() {
    let mut expected = vec![
        (NegotiateError::NotOffered, Errno::OPNOTSUPP),
        (NegotiateError::WritebackCacheWanted, Errno::INVAL),
    ];
    expected.extend(NOT_PERMITTED.map(|(why, _)| (NegotiateError::NotPermitted(why), Errno::PERM)));
    told_apart(&expected);
}

/// What to answer the client.
#[test]
fn table_open() {
    use TableOpenError as E;
    let granted = Access::ReadOnly;
    let registered = granted;
    let wanted = Access::ReadWrite;
    let expected = [
        (E::AccessExceeded { granted, wanted }, Errno::ACCESS),
        (E::GrantExceeded { registered, wanted }, Errno::BUSY),
        (E::DifferentFile, Errno::IO),
        (E::Unreadable(OTHER), OTHER),
    ];
    for (error, errno) in expected {
        assert_eq!(error.errno(), errno, "{error:?}");
    }
    told_apart(&expected);
}

#[test]
fn access() {
    told_apart(&[
        (AccessError::PathOnly, Errno::BADF),
        (AccessError::Neither, Errno::BADF),
        (AccessError::Unreadable(Errno::PERM), Errno::PERM),
    ]);
}

/// Of whatever is no character device it is said what it is.
#[test]
fn kinds_of_files() {
    let folder = tempfile::tempdir().unwrap();
    let link = folder.path().join("link");
    std::os::unix::fs::symlink("nowhere", &link).unwrap();
    let link = rustix::fs::open(&link, OFlags::PATH | OFlags::NOFOLLOW, Mode::empty()).unwrap();
    let (pipe, _writer) = rustix::pipe::pipe().unwrap();
    let (socket, _peer) = std::os::unix::net::UnixStream::pair().unwrap();
    for (fd, kind) in [
        (
            OwnedFd::from(tempfile::tempfile().unwrap()),
            "a regular file",
        ),
        (File::open(folder.path()).unwrap().into(), "a directory"),
        (link, "a symbolic link"),
        (pipe, "a pipe"),
        (socket.into(), "a socket"),
    ] {
        let refused = FuseDevice::new(fd).unwrap_err();
        let text = format!("not a FUSE device: it is no character device but {kind}");
        assert_eq!(refused.to_string(), text);
        assert_eq!(refused.errno(), Errno::NOTTY);
    }
    // Whatever it leads to now.
    let stdin = std::io::stdin();
    let refused = FuseDevice::new(stdin.as_fd()).unwrap_err();
    assert_eq!(refused.reason(), NotFuseDeviceReason::StandardStream);
    assert_eq!(refused.errno(), Errno::INVAL);
    let refused = FuseDevice::new(File::open("/dev/null").unwrap()).unwrap_err();
    let text = "not a FUSE device: it is the character device 1:3, not 10:229";
    assert_eq!(refused.to_string(), text);
    // Whatever holds the fd, and without it.
    let debug = "NotFuseDevice { reason: OtherDevice { major: 1, minor: 3 }, .. }";
    assert_eq!(format!("{refused:?}"), debug);
}

/// What stands inside of another error's text stands there once.
#[test]
fn causes_are_told_once() {
    fn once(outer: &(impl Display + Debug), inner: &impl Display) {
        let (outer_text, inner) = (outer.to_string(), inner.to_string());
        assert_eq!(
            outer_text.matches(&inner).count(),
            1,
            "{outer:?}: {outer_text}"
        );
    }
    for (why, _) in NOT_PERMITTED {
        once(&BackingOpenError::NotPermitted(why), &why);
        once(&BackingCloseCause::NotPermitted(why), &why);
        once(&NegotiateError::NotPermitted(why), &why);
    }
    let reason = NotFuseDeviceReason::PathOnly;
    once(&DeviceOpenError::NotFuse(reason), &reason);
}
