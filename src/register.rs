//! Registrars, and testing a server without root.
//!
//! # What a registrar is
//!
//! A [registrar](Register) registers backing files and closes their ids. [`BackingTable`](crate::BackingTable),
//! [`Handles`](crate::Handles) and [`BackingFile`](crate::BackingFile) work with any of them:
//!
//! - [`FuseDevice`] makes the ioctls in the calling thread. The kernel records that thread's rights, and reads and
//!   writes the file with them.
//! - The registrars in [`rights`](crate::rights) lower these rights, or register in another thread.
//! - A server's own registrar can ask another process, keep to a policy or a limit, or stand for the kernel in a test.
//!
//! # Testing a server without root
//!
//! A server that is generic over its registrar, or has a `Box<dyn Register + Send + Sync>`, can be tested without root
//! and without `/dev/fuse`. This registrar counts what is registered:
//!
//! ```
//! use fuse_backing::error::{BackingCloseError, BackingError, Scope};
//! use fuse_backing::{Access, BackingId, BackingTable, Register, ServerFile, error::Errno};
//! use std::os::fd::BorrowedFd;
//! use std::sync::atomic::{AtomicI32, Ordering::SeqCst};
//!
//! #[derive(Default)]
//! struct FakeKernel { last: AtomicI32, registered: AtomicI32 }
//!
//! impl Register for FakeKernel {
//!     fn register(&self, _: BorrowedFd<'_>, _: Access) -> Result<BackingId, BackingError> {
//!         // A registrar's own refusal has this variant.
//!         let refused = BackingError::Registrar { errno: Errno::NOSPC, scope: Scope::Transient };
//!         let id = BackingId::from_raw(self.last.fetch_add(1, SeqCst) + 1).ok_or(refused)?;
//!         self.registered.fetch_add(1, SeqCst);
//!         Ok(id)
//!     }
//!
//!     fn unregister(&self, _: BackingId) -> Result<(), BackingCloseError<BackingId>> {
//!         self.registered.fetch_sub(1, SeqCst);
//!         Ok(())
//!     }
//! }
//!
//! let kernel = FakeKernel::default();
//! let table = BackingTable::new(&kernel);
//! let file = std::fs::File::open("/dev/null")?;
//!
//! let open = table.open(&2, 0, ServerFile::new(&file))?;
//! assert_eq!(open.id().map(BackingId::as_raw), Some(1));
//! drop(open);
//! assert_eq!(kernel.registered.load(SeqCst), 0);
//! # Ok::<(), std::io::Error>(())
//! ```
//!
//! Such a test shows how the server answers OPEN and RELEASE, also when a registration or a close fails. It cannot
//! show what the kernel does: whether the INIT reply turns passthrough on, whether the kernel accepts a file or a
//! reply, and what clients read and write.
//!
//! # On a CI runner with `CAP_SYS_ADMIN`
//!
//! To see what the kernel does, mount the server in a test, and run the test as root on a kernel with passthrough:
//! Linux 6.9 or newer with `CONFIG_FUSE_PASSTHROUGH=y`. The runner's root needs `CAP_SYS_ADMIN` in the initial user
//! namespace. In a virtual machine it has that; in a rootless container it cannot.
//!
//! ```yaml
//! jobs:
//!   passthrough:
//!     runs-on: ubuntu-latest
//!     timeout-minutes: 20 # a server that does not answer hangs its clients
//!     env:
//!       REQUIRE_PASSTHROUGH: 1
//!     steps:
//!       - uses: actions/checkout@v4
//!       - run: uname -r && grep CONFIG_FUSE_PASSTHROUGH "/boot/config-$(uname -r)"
//!       - run: sudo modprobe fuse || true # it may be built in
//!       - run: sudo -E env "PATH=$PATH" cargo test
//! ```
//!
//! The last line builds as root too. This one builds as the runner's user, and runs only the tests as root:
//!
//! ```yaml
//!       - run: CARGO_TARGET_X86_64_UNKNOWN_LINUX_GNU_RUNNER='sudo -E' cargo test
//! ```
//!
//! Where passthrough is unavailable, the table serves files without it, and nothing fails. So a test must look at that,
//! and where passthrough is required it should fail, not skip:
//!
//! ```
//! /// Called at the end of each test.
//! fn check(handles: &fuse_backing::Handles) {
//!     let served = handles.table().stats().served; // opens in server mode, by cause
//!     if std::env::var_os("REQUIRE_PASSTHROUGH").is_some() {
//!         assert!(served.is_empty(), "without passthrough: {served:?}");
//!     }
//! }
//! # check(&fuse_backing::Handles::default());
//! ```

use std::os::fd::BorrowedFd;
use std::rc::Rc;
use std::sync::Arc;

use crate::access::Access;
use crate::device::{DeviceFd, FuseDevice};
use crate::error::{BackingCloseError, BackingError};
use crate::id::BackingId;

/// Registers backing files, and closes their ids. An id belongs to the connection of the registrar that gave it.
///
/// [The guide](self) lists the registrars.
///
/// [`BackingTable`](crate::BackingTable) calls a registrar from the thread that opens or releases an inode. During the
/// call the table holds at most one lock: the one that makes other opens of the same inode wait. If
/// [`register`](Self::register) panics, nothing counts as registered. If [`unregister`](Self::unregister) panics or
/// returns [`BackingError::Registrar`], the id may or may not be closed: the table keeps it for
/// [`retry_closes`](crate::BackingTable::retry_closes), and answers no open with it.
///
/// # Examples
///
/// [The guide](self#testing-a-server-without-root) has a registrar that stands for the kernel in a test.
pub trait Register {
    /// Registers a file. `grant` is the most that will ever be granted through this id. A registrar that
    /// [enforces](Self::enforces_grant) it registers for no more.
    ///
    /// # Errors
    ///
    /// [`BackingError`]; nothing stays registered.
    fn register(&self, file: BorrowedFd<'_>, grant: Access) -> Result<BackingId, BackingError>;

    /// Closes an id that [`register`](Self::register) gave.
    ///
    /// # Errors
    ///
    /// [`BackingCloseError`] gives the id back. The id still counts as registered, unless the cause is
    /// [`BackingError::UnknownId`].
    fn unregister(&self, id: BackingId) -> Result<(), BackingCloseError<BackingId>>;

    /// Whether [`BackingTable`](crate::BackingTable) may pass an `O_PATH` fd of the file. If false, it passes the fd
    /// that the server opened, for a registrar that checks what the fd permits.
    fn takes_path_fd(&self) -> bool {
        true
    }

    /// Whether an id gives clients no more than its `grant`, even if a reply grants more. If false, only the table
    /// keeps to the grant.
    fn enforces_grant(&self) -> bool {
        false
    }
}

/// Makes the ioctls in the calling thread. The kernel enforces no grant.
impl<Fd: DeviceFd> Register for FuseDevice<Fd> {
    #[inline]
    fn register(&self, file: BorrowedFd<'_>, _: Access) -> Result<BackingId, BackingError> {
        self.backing_open(file)
    }

    #[inline]
    fn unregister(&self, id: BackingId) -> Result<(), BackingCloseError<BackingId>> {
        self.backing_close(id)
    }
}

/// Marks registrars that make the system call in the thread that calls `register`, and so with that thread's rights.
/// [`Lowered`](crate::rights::Lowered) takes no others.
pub trait InCallingThread: Register {}

impl<Fd: DeviceFd> InCallingThread for FuseDevice<Fd> {}

/// Marks registrars that register every file without `CAP_FSETID`, so that the filesystem of a backing file clears
/// set-user-ID and set-group-ID bits at each write.
///
/// [`Negotiated::handle_killpriv_v2`](crate::init::Negotiated::handle_killpriv_v2) takes one. Implement it only if it
/// holds for every registration, from every thread.
///
/// # Examples
///
/// ```
/// use fuse_backing::rights::{Lowered, RegistrarThread};
/// use fuse_backing::{BackingTable, FuseDevice, register::WithoutFsetid};
///
/// fn is_one<T: WithoutFsetid>() {}
/// is_one::<BackingTable<RegistrarThread<Lowered<FuseDevice>>>>();
/// ```
///
/// A device registers with all capabilities of the calling thread:
///
/// ```compile_fail,E0277
/// # fn is_one<T: fuse_backing::register::WithoutFsetid>() {}
/// is_one::<fuse_backing::BackingTable<fuse_backing::FuseDevice>>();
/// ```
pub trait WithoutFsetid {}

macro_rules! forward {
    ($($holder:ty),*) => { $(
        impl<R: InCallingThread + ?Sized> InCallingThread for $holder {}
        impl<R: WithoutFsetid + ?Sized> WithoutFsetid for $holder {}

        impl<R: Register + ?Sized> Register for $holder {
            #[inline]
            fn register(
                &self,
                file: BorrowedFd<'_>,
                grant: Access,
            ) -> Result<BackingId, BackingError> {
                (**self).register(file, grant)
            }

            #[inline]
            fn unregister(&self, id: BackingId) -> Result<(), BackingCloseError<BackingId>> {
                (**self).unregister(id)
            }

            #[inline]
            fn takes_path_fd(&self) -> bool {
                (**self).takes_path_fd()
            }

            #[inline]
            fn enforces_grant(&self) -> bool {
                (**self).enforces_grant()
            }
        }
    )* };
}

forward!(&R, Arc<R>, Rc<R>, Box<R>);

static_assertions::assert_impl_all!(Box<dyn Register + Send + Sync>: Register, Send, Sync);
