//! [`RegistrarThread`]: a thread that registers for the others.

use std::fmt;
use std::marker::PhantomData;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{
    Receiver, RecvTimeoutError, SendError, Sender, SyncSender, channel, sync_channel,
};
use std::thread;
use std::time::Duration;

use rustix::io::{Errno, fcntl_dupfd_cloexec};
use rustix::process::{Pid, getpid, test_kill_process};
use rustix::thread::gettid;
use static_assertions::assert_impl_all;

use crate::access::Access;
use crate::device::FuseDevice;
use crate::error::{BackingCloseError, BackingError, RegistrarThreadError, Scope};
use crate::id::BackingId;
use crate::register::{Register, WithoutFsetid};

/// Interval at which a waiting caller checks that the thread lives. A thread killed by seccomp drops nothing, so its
/// channel stays open.
const LIVENESS_CHECK: Duration = Duration::from_millis(500);

/// Registers in a thread of its own, which the server prepares: by entering a Landlock domain, which cannot be undone,
/// by setfsuid(2) and setfsgid(2), or by giving up capabilities. The prepared thread must still have `CAP_SYS_ADMIN`.
///
/// A registration or close costs two more thread switches. The file is passed as a duplicate fd. If an error concerns
/// the calling thread, it means the registrar's thread: every caller gets the same error.
///
/// Dropping it ends the thread and waits until the inner registrar is dropped. A
/// [`BackingTable`](crate::BackingTable) drops it when both the table and its last open file are dropped.
///
/// If the thread dies (the inner registrar panics, or seccomp kills the thread), every call fails with
/// [`BackingError::Registrar`], `EOWNERDEAD` and [`Scope::Connection`]: a table then serves new opens without
/// passthrough. Registered ids go on working until the connection ends, or another registrar of the connection closes
/// them. A killed thread leaks the inner registrar and the fd that it was registering.
///
/// # Examples
///
/// A registrar that keeps clients out of the blocks that a filesystem reserves for root, and has writes clear
/// set-user-ID bits:
///
/// ```no_run
/// use fuse_backing::rights::{CapabilitySet, Lowered, RegistrarThread};
/// use fuse_backing::{BackingTable, FuseDevice};
/// use nix::unistd::{Uid, setfsuid};
///
/// # fn f(device: FuseDevice) -> Result<(), Box<dyn std::error::Error>> {
/// let lowered = Lowered::permanently(device, CapabilitySet::empty());
/// let nobody = Uid::from_raw(u32::MAX - 1); // 65534 may have blocks reserved for it
/// let registrar = RegistrarThread::spawn(lowered, move || {
///     setfsuid(nobody); // reports no error: a second call returns what is set
///     let is_set = setfsuid(nobody) == nobody;
///     is_set.then_some(()).ok_or(std::io::ErrorKind::PermissionDenied)
/// })?;
/// let table: BackingTable<_> = BackingTable::new(registrar);
/// # Ok(()) }
/// ```
pub struct RegistrarThread<R> {
    requests: Sender<Request>,
    /// Process and thread that it runs in. After fork(2) the child has no such thread.
    place: (Pid, Pid),
    /// `Relaxed`, since it is a hint: a caller that does not see it yet finds out by itself.
    has_died: AtomicBool,
    takes_path_fd: bool,
    enforces_grant: bool,
    _registrar: PhantomData<fn() -> R>,
}

/// What a caller asks of the thread, each with the channel for the answer.
enum Request {
    Register(OwnedFd, Access, SyncSender<Result<BackingId, BackingError>>),
    Unregister(BackingId, SyncSender<Result<(), BackingError>>),
    End(SyncSender<()>),
}

const DIED: BackingError = BackingError::Registrar {
    errno: Errno::OWNERDEAD,
    scope: Scope::Connection,
};

assert_impl_all!(RegistrarThread<FuseDevice>: Send, Sync);

impl<R: Register + Send + 'static> RegistrarThread<R> {
    /// Starts the thread, and waits for it to `prepare` itself.
    ///
    /// # Errors
    ///
    /// [`RegistrarThreadError`]. `registrar` is dropped then: soon after, if `prepare` panicked; not at all, if the
    /// thread was killed.
    pub fn spawn<E: Send + 'static>(
        registrar: R,
        prepare: impl FnOnce() -> Result<(), E> + Send + 'static,
    ) -> Result<Self, RegistrarThreadError<E>> {
        let (requests, inbox) = channel();
        let (started, start) = sync_channel(1);
        let (takes_path_fd, enforces_grant) =
            (registrar.takes_path_fd(), registrar.enforces_grant());
        let run = move || {
            // First, while nothing can have killed the thread yet.
            let _ = started.send(Started::In(gettid()));
            match prepare() {
                Ok(()) => {
                    let _ = started.send(Started::Prepared(Ok(())));
                    serve(registrar, &inbox);
                }
                Err(error) => {
                    drop(registrar);
                    let _ = started.send(Started::Prepared(Err(error)));
                }
            }
        };
        let thread = thread::Builder::new().name("fuse-registrar".to_owned());
        let _detached = thread.spawn(run).map_err(RegistrarThreadError::Spawn)?;
        let Ok(Started::In(thread)) = start.recv() else {
            return Err(RegistrarThreadError::Died);
        };
        let spawned = Self {
            requests,
            place: (getpid(), thread),
            has_died: AtomicBool::new(false),
            takes_path_fd,
            enforces_grant,
            _registrar: PhantomData,
        };
        match spawned.wait(&start) {
            Some(Started::Prepared(Ok(()))) => Ok(spawned),
            Some(Started::Prepared(Err(error))) => Err(RegistrarThreadError::Prepare(error)),
            Some(Started::In(_)) | None => Err(RegistrarThreadError::Died),
        }
    }
}

/// What the thread reports before it serves.
enum Started<E> {
    In(Pid),
    Prepared(Result<(), E>),
}

/// Answers requests until the caller ends the thread. An answer is not received if the caller has given up.
fn serve(registrar: impl Register, inbox: &Receiver<Request>) {
    for request in inbox {
        match request {
            Request::Register(file, grant, answer) => {
                let registered = registrar.register(file.as_fd(), grant);
                if let Err(SendError(Ok(id))) = answer.send(registered) {
                    let _ = registrar.unregister(id);
                }
            }
            Request::Unregister(id, answer) => {
                let closed = registrar.unregister(id);
                let _ = answer.send(closed.map_err(|failed| failed.cause()));
            }
            Request::End(answer) => {
                drop(registrar);
                let _ = answer.send(());
                return;
            }
        }
    }
}

impl<R> RegistrarThread<R> {
    /// Sends a request and waits for the answer. `None` if the thread has died.
    fn ask<T>(&self, request: impl FnOnce(SyncSender<T>) -> Request) -> Option<T> {
        if self.has_died.load(Ordering::Relaxed) {
            return None;
        }
        let (sender, answer) = sync_channel(1);
        self.requests.send(request(sender)).ok()?;
        self.wait(&answer)
    }

    /// Waits for an answer. `None` if the thread has died without one.
    fn wait<T>(&self, answer: &Receiver<T>) -> Option<T> {
        loop {
            match answer.recv_timeout(LIVENESS_CHECK) {
                Ok(answer) => return Some(answer),
                Err(RecvTimeoutError::Timeout) if self.is_alive() => {}
                Err(_) => {
                    self.has_died.store(true, Ordering::Relaxed);
                    // The thread may have answered before it died.
                    return answer.try_recv().ok();
                }
            }
        }
    }

    fn is_alive(&self) -> bool {
        let (process, thread) = self.place;
        // Not by way of /proc, which may be that of another PID namespace.
        process == getpid() && test_kill_process(thread) != Err(Errno::SRCH)
    }
}

impl<R> Register for RegistrarThread<R> {
    fn register(&self, file: BorrowedFd<'_>, grant: Access) -> Result<BackingId, BackingError> {
        let file = fcntl_dupfd_cloexec(file, 0).map_err(|errno| BackingError::Registrar {
            errno,
            scope: Scope::Transient,
        })?;
        let answer = self.ask(|answer| Request::Register(file, grant, answer));
        answer.unwrap_or(Err(DIED))
    }

    fn unregister(&self, id: BackingId) -> Result<(), BackingCloseError<BackingId>> {
        let answer = self.ask(|answer| Request::Unregister(id.alias(), answer));
        let closed = answer.unwrap_or(Err(DIED));
        closed.map_err(|cause| BackingCloseError::new(id, cause))
    }

    fn takes_path_fd(&self) -> bool {
        self.takes_path_fd
    }

    fn enforces_grant(&self) -> bool {
        self.enforces_grant
    }
}

impl<R: WithoutFsetid> WithoutFsetid for RegistrarThread<R> {}

impl<R> Drop for RegistrarThread<R> {
    fn drop(&mut self) {
        // An inner registrar that owns this handle drops it in the thread. Then the thread would wait for itself.
        if gettid() != self.place.1 {
            let _ = self.ask(Request::End);
        }
    }
}

impl<R> fmt::Debug for RegistrarThread<R> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("RegistrarThread")
            .field("thread", &self.place.1)
            .field("has_died", &self.has_died)
            .finish_non_exhaustive()
    }
}
