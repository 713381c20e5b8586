//! What the errors say: the errno, what it means for the next attempt, and what is left of them in an
//! `io::Error`. None of it needs a kernel.

#![allow(clippy::unwrap_used)]

use std::collections::HashSet;
use std::error::Error;
use std::fmt::{Debug, Display};
use std::fs::File;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use fuse_backing::error::{
    BackingCloseError, BackingError, DeviceError, FileType, NegotiateError, NotPermitted,
    OpenError, RegistrarThreadError, RightsError, Scope,
};
use fuse_backing::{
    Access, BackingFile, BackingId, FopenFlags, FuseDevice, Register, error::Errno,
};
use rustix::fs::{Mode, OFlags};

/// Each with whom it concerns: what may be the thread's own is not said of the connection.
const NOT_PERMITTED: [(NotPermitted, Scope); 4] = [
    (NotPermitted::NotInInitialUserNamespace, Scope::Connection),
    (NotPermitted::MissingCapability, Scope::Thread),
    (NotPermitted::NotNegotiatedOrDenied, Scope::Connection),
    (NotPermitted::Undetermined, Scope::Thread),
];

/// Capabilities are the thread's.
const RIGHTS: [(RightsError, Errno); 2] = [
    (RightsError::NotChanged(Errno::PERM), Errno::PERM),
    (RightsError::NotRestored(Errno::NOMEM), Errno::NOMEM),
];

/// An errno that no cause is known of.
const OTHER: Errno = Errno::XDEV;

/// Each cause has a text of its own.
fn told_apart<E: Display>(errors: impl IntoIterator<Item = E>) {
    let mut texts = HashSet::new();
    for error in errors {
        let text = error.to_string();
        assert!(texts.insert(text.clone()), "two say '{text}'");
    }
}

/// An `io::Error` of the errno's kind, with the text of what it holds, and that can be had back.
fn holds<E: Error + PartialEq + 'static>(error: &io::Error, held: &E, errno: Errno) {
    assert_eq!(error.kind(), io::Error::from(errno).kind(), "{held:?}");
    assert_eq!(error.to_string(), held.to_string());
    assert_eq!(error.raw_os_error(), None, "{held:?}");
    let inner = error.get_ref().and_then(|inner| inner.downcast_ref());
    assert_eq!(inner, Some(held));
}

/// Told apart, and kept in an `io::Error`.
fn kept<E>(errors: &[(E, Errno)])
where
    E: Error + Into<io::Error> + Into<Errno> + Copy + PartialEq + 'static,
{
    told_apart(errors.iter().map(|(error, _)| error));
    for &(error, errno) in errors {
        assert_eq!(Into::<Errno>::into(error), errno, "{error:?}");
        holds(&error.into(), &error, errno);
    }
}

#[test]
fn backing() {
    use BackingError as E;
    let mut expected = vec![
        (E::UnsupportedKernel, Errno::NOTTY, Scope::Connection),
        (E::Unimplemented, Errno::NOSYS, Scope::Connection),
        (E::DisabledInKernel, Errno::OPNOTSUPP, Scope::Connection),
        (E::FileNotSupported, Errno::OPNOTSUPP, Scope::File),
        (E::StackedTooDeep, Errno::LOOP, Scope::File),
        (E::PathOnlyFd, Errno::BADF, Scope::File),
        (E::BadFd, Errno::BADF, Scope::File),
        (E::UnknownId, Errno::NOENT, Scope::File),
        (E::OutOfMemory, Errno::NOMEM, Scope::Transient),
        (E::OutOfIds, Errno::NOSPC, Scope::Transient),
        (E::Interrupted, Errno::INTR, Scope::Transient),
        (E::InvalidId(0), Errno::PROTO, Scope::Connection),
        (E::InvalidId(-2), Errno::PROTO, Scope::Connection),
        (E::NotEnforceable, Errno::OPNOTSUPP, Scope::File),
        (E::Other(OTHER), OTHER, Scope::File),
    ];
    for (error, errno) in RIGHTS {
        let scope = match errno {
            Errno::NOMEM => Scope::Transient,
            _ => Scope::Thread,
        };
        expected.push((E::Rights(error), errno, scope));
        assert_eq!(E::from(error), E::Rights(error));
    }
    let errno = Errno::INVAL;
    expected.push((E::NotAttached(errno), errno, Scope::Connection));
    for (file_type, errno) in [
        (FileType::Directory, Errno::ISDIR),
        (FileType::Fifo, Errno::OPNOTSUPP),
    ] {
        expected.push((E::NotRegularFile { file_type, errno }, errno, Scope::File));
    }
    for (why, scope) in NOT_PERMITTED {
        expected.push((E::NotPermitted(why), Errno::PERM, scope));
    }
    // A registrar says itself what its error is, and what it means.
    for (errno, scope) in [
        (Errno::ACCESS, Scope::File),
        (Errno::PIPE, Scope::Connection),
        (Errno::PERM, Scope::Thread),
        (Errno::AGAIN, Scope::Transient),
    ] {
        expected.push((E::Registrar { errno, scope }, errno, scope));
    }
    for (error, errno, scope) in &expected {
        assert_eq!((error.errno(), error.scope()), (*errno, *scope));
    }
    let errors: Vec<_> = expected.iter().map(|&(e, errno, _)| (e, errno)).collect();
    kept(&errors);
}

#[test]
fn device() {
    use DeviceError as E;
    const CONNECTION: Scope = Scope::Connection;
    let denied = |errno| (E::Denied(errno), errno, CONNECTION);
    let other = |errno, scope| (E::Other(errno), errno, scope);
    let needs = |needs| (E::UnsupportedKernel { needs }, Errno::NOTTY, CONNECTION);
    let errno = Errno::NXIO;
    let attached = Errno::PERM;
    let expected = [
        (E::Missing, Errno::NOENT, CONNECTION),
        (E::NoDriver(errno), errno, CONNECTION),
        denied(Errno::ACCESS),
        denied(Errno::PERM),
        (E::PathOnly, Errno::BADF, CONNECTION),
        (E::StandardStream, Errno::INVAL, CONNECTION),
        needs("4.2"),
        needs("6.18"),
        (E::Unimplemented, Errno::NOSYS, CONNECTION),
        (E::NotAttached(attached), attached, CONNECTION),
        (E::AlreadyAttached, Errno::INVAL, CONNECTION),
        other(Errno::INTR, Scope::Transient),
        other(Errno::MFILE, Scope::Transient),
        other(Errno::NFILE, Scope::Transient),
        other(Errno::NOMEM, Scope::Transient),
        other(OTHER, CONNECTION),
    ];
    for (error, errno, scope) in expected {
        assert_eq!((error.errno(), error.scope()), (errno, scope), "{error:?}");
    }
    kept(&expected.map(|(error, errno, _)| (error, errno)));
}

#[test]
fn negotiation() {
    let mut expected = vec![
        (NegotiateError::NotOffered, Errno::OPNOTSUPP),
        (NegotiateError::WritebackCacheWanted, Errno::INVAL),
        (NegotiateError::HandleKillprivWanted, Errno::INVAL),
        (NegotiateError::HandleKillprivV2Wanted, Errno::INVAL),
    ];
    expected.extend(NOT_PERMITTED.map(|(why, _)| (NegotiateError::NotPermitted(why), Errno::PERM)));
    for (error, errno) in &expected {
        assert_eq!(error.errno(), *errno, "{error:?}");
    }
    kept(&expected);
}

#[test]
fn rights() {
    for (error, errno) in RIGHTS {
        assert_eq!(error.errno(), errno, "{error:?}");
    }
    kept(&RIGHTS);
}

#[test]
fn registrar_thread() {
    type E = RegistrarThreadError<BackingError>;
    let cause = || io::Error::from(Errno::AGAIN);
    let prepare = BackingError::BadFd;
    told_apart([E::Spawn(cause()), E::Prepare(prepare), E::Died]);
    once(&E::Spawn(cause()), &cause());
    once(&E::Prepare(prepare), &prepare);

    let spawn = io::Error::from(E::Spawn(cause()));
    assert_eq!(spawn.raw_os_error(), Some(Errno::AGAIN.raw_os_error()));
    let prepared = io::Error::from(E::Prepare(prepare));
    let inner = prepared.get_ref().and_then(|inner| inner.downcast_ref());
    assert_eq!(inner, Some(&prepare));
    let died = io::Error::from(E::Died);
    assert_eq!(died.to_string(), E::Died.to_string());
    assert_eq!(died.raw_os_error(), None);
}

/// What to answer the client with, also where a FUSE library takes an `io::Error`.
#[test]
fn open() {
    use OpenError as E;
    let granted = Access::ReadOnly;
    let registered = granted;
    let wanted = Access::ReadWrite;
    let expected = [
        (E::AccessExceeded { granted, wanted }, Errno::ACCESS),
        (E::GrantExceeded { registered, wanted }, Errno::BUSY),
        (E::Immutable, Errno::PERM),
        (E::DifferentFile, Errno::IO),
        (E::NoAccess, Errno::BADF),
        (E::FlagsNotAllowed(FopenFlags::KEEP_CACHE), Errno::INVAL),
        (E::Unreadable(OTHER), OTHER),
    ];
    told_apart(expected.map(|(error, _)| error));
    for (error, errno) in expected {
        assert_eq!(error.errno(), errno, "{error:?}");
        assert_eq!(Errno::from(error), errno, "{error:?}");
        let raw = io::Error::from(error).raw_os_error();
        assert_eq!(raw, Some(errno.raw_os_error()), "{error:?}");
    }
}

/// Closes nothing.
struct Unclosing;

impl Register for Unclosing {
    fn register(&self, _: BorrowedFd<'_>, _: Access) -> Result<BackingId, BackingError> {
        Ok(BackingId::from_raw(1).unwrap())
    }

    fn unregister(&self, id: BackingId) -> Result<(), BackingCloseError<BackingId>> {
        Err(BackingCloseError::new(id, BackingError::UnknownId))
    }
}

/// An `io::Error` of a guard holds why it is not closed, and not the guard, which borrows.
#[test]
fn close_of_a_guard_that_borrows() {
    fn close<R: Register>(guard: BackingFile<R>) -> io::Result<()> {
        Ok(guard.close()?)
    }
    // It compiles: a device is not at hand.
    let _close = close::<&FuseDevice>;

    let guard = || BackingFile::from_id(&Unclosing, BackingId::from_raw(1).unwrap());
    let unknown = BackingError::UnknownId;
    let error = close(guard()).unwrap_err();
    assert_eq!(error.kind(), io::ErrorKind::NotFound);
    holds(&error, &unknown, Errno::NOENT);
    let failed = guard().close().unwrap_err();
    assert_eq!((failed.cause(), failed.errno()), (unknown, Errno::NOENT));
    assert_eq!(format!("{failed:?}"), "UnknownId");
    assert_eq!(failed.to_string(), unknown.to_string());
    assert_eq!(Errno::from(failed), Errno::NOENT);
}

/// The same of an fd that is no device.
#[test]
fn device_of_an_fd_that_is_borrowed() {
    fn device(fd: BorrowedFd<'_>) -> io::Result<()> {
        FuseDevice::new(fd)?;
        Ok(())
    }
    let null = File::open("/dev/null").unwrap();
    let reason = DeviceError::OtherDevice { major: 1, minor: 3 };
    let text = "the fd is not a FUSE device: it is the character device 1:3, not 10:229";
    holds(&device(null.as_fd()).unwrap_err(), &reason, Errno::NOTTY);

    let refused = FuseDevice::new(null.as_fd()).unwrap_err();
    assert_eq!((refused.cause(), refused.errno()), (reason, Errno::NOTTY));
    assert_eq!(refused.to_string(), text);
    assert_eq!(format!("{refused:?}"), format!("{reason:?}"));
    assert_eq!(Errno::from(refused), Errno::NOTTY);
}

#[test]
fn not_a_device() {
    use DeviceError as E;
    let other = |file_type| (E::NotCharacterDevice(file_type), Errno::NOTTY);
    let expected = [
        other(FileType::RegularFile),
        other(FileType::Directory),
        other(FileType::Symlink),
        other(FileType::Fifo),
        other(FileType::Socket),
        other(FileType::BlockDevice),
        other(FileType::Unknown),
        (E::OtherDevice { major: 1, minor: 3 }, Errno::NOTTY),
        (E::PathOnly, Errno::BADF),
        (E::StandardStream, Errno::INVAL),
    ];
    for (error, errno) in &expected {
        assert_eq!(error.errno(), *errno, "{error:?}");
    }
    kept(&expected);
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
    let file = tempfile::tempfile().unwrap();
    let folder = File::open(folder.path()).unwrap();
    for (fd, kind) in [
        (OwnedFd::from(file), "a regular file"),
        (folder.into(), "a directory"),
        (link, "a symbolic link"),
        (pipe, "a pipe"),
        (socket.into(), "a socket"),
    ] {
        let refused = FuseDevice::new(fd).unwrap_err();
        let text = format!("the fd is not a FUSE device: it is {kind}");
        assert_eq!(refused.to_string(), text);
    }
    // Whatever it leads to now.
    let stdin = std::io::stdin();
    let refused = FuseDevice::new(stdin.as_fd()).unwrap_err();
    assert_eq!(refused.cause(), DeviceError::StandardStream);
}

/// What stands inside of another error's text stands there once.
fn once(outer: &(impl Display + Debug), inner: &impl Display) {
    let (text, inner) = (outer.to_string(), inner.to_string());
    assert_eq!(text.matches(&inner).count(), 1, "{outer:?}: {text}");
}

#[test]
fn causes_are_told_once() {
    for (why, _) in NOT_PERMITTED {
        once(&BackingError::NotPermitted(why), &why);
        once(&NegotiateError::NotPermitted(why), &why);
    }
    for (error, _) in RIGHTS {
        once(&BackingError::Rights(error), &error);
    }
}
