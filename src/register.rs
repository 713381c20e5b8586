//! [`Register`]: who asks the kernel to register a file, and with whose rights.

use std::os::fd::BorrowedFd;
use std::rc::Rc;
use std::sync::Arc;

use crate::access::Access;
use crate::device::{DeviceFd, FuseDevice};
use crate::error::{BackingCloseError, BackingError};
use crate::id::BackingId;

/// Who registers backing files, and closes their ids.
///
/// A [`FuseDevice`] makes the ioctls in the calling thread. The kernel records that thread's rights, and reads
/// and writes the file with them. Another registrar can lower them, ask another thread or process, or stand
/// for the kernel in a test. An id belongs to the connection of the registrar that gave it.
///
/// [`BackingTable`](crate::BackingTable) calls a registrar from the thread that opens or releases an inode, and
/// holds no lock over the call but that of the inode which is being opened. If `register` panics, nothing
/// counts as registered. If `unregister` panics or answers [`Registrar`](crate::error::BackingError::Registrar), the id may be closed or not: the
/// table keeps it for [`retry_closes`](crate::BackingTable::retry_closes), and answers no open with it.
///
/// # Examples
///
/// A server tested without root and without `/dev/fuse`. This registrar knows how many are registered:
///
/// ```
/// use fuse_backing::error::{BackingCloseError, BackingError, Scope};
/// use fuse_backing::{Access, BackingId, BackingTable, Register, ServerFile, error::Errno};
/// use std::os::fd::BorrowedFd;
/// use std::sync::atomic::{AtomicI32, Ordering::SeqCst};
///
/// #[derive(Default)]
/// struct Kernel { last: AtomicI32, registered: AtomicI32 }
///
/// impl Register for Kernel {
///     fn register(&self, _: BorrowedFd<'_>, _: Access) -> Result<BackingId, BackingError> {
///         // What a registrar itself refuses has a variant of its own.
///         let refused = BackingError::Registrar { errno: Errno::NOSPC, scope: Scope::Transient };
///         let id = BackingId::from_raw(self.last.fetch_add(1, SeqCst) + 1).ok_or(refused)?;
///         self.registered.fetch_add(1, SeqCst);
///         Ok(id)
///     }
///
///     fn unregister(&self, _: BackingId) -> Result<(), BackingCloseError<BackingId>> {
///         self.registered.fetch_sub(1, SeqCst);
///         Ok(())
///     }
/// }
///
/// let kernel = Kernel::default();
/// let table = BackingTable::new(&kernel);
/// let file = std::fs::File::open("/dev/null")?;
///
/// let open = table.open(&2, 0, ServerFile::new(&file))?;
/// assert_eq!(open.id().map(BackingId::as_raw), Some(1));
/// drop(open);
/// assert_eq!(kernel.registered.load(SeqCst), 0);
/// # Ok::<(), std::io::Error>(())
/// ```
pub trait Register {
    /// Registers a file. `grant` is the most that will ever be granted through this id; a registrar that
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
    /// [`BackingCloseError`] gives the id back. It counts as registered still, unless the cause is
    /// [`UnknownId`](crate::error::BackingError::UnknownId).
    fn unregister(&self, id: BackingId) -> Result<(), BackingCloseError<BackingId>>;

    /// Whether [`BackingTable`](crate::BackingTable) is to register an `O_PATH` fd of the file. False: it
    /// hands over the fd that the server opened, for a registrar that checks what the fd permits.
    fn takes_path_fd(&self) -> bool {
        true
    }

    /// Whether an id gives clients no more than its `grant`, whatever a reply says. False: the table alone
    /// keeps to the grant.
    fn enforces_grant(&self) -> bool {
        false
    }
}

/// The ioctls, in the calling thread. The kernel enforces no grant.
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

/// Marks registrars that make the system call in the thread that calls `register`, and so with its rights:
/// [`Lowered`](crate::rights::Lowered) takes no others.
pub trait InCallingThread: Register {}

impl<Fd: DeviceFd> InCallingThread for FuseDevice<Fd> {}

/// Marks registrars that register every file without `CAP_FSETID`, so that the filesystem of a backing file clears
/// set-user-ID and set-group-ID bits at each write.
/// [`Negotiated::handle_killpriv_v2`](crate::init::Negotiated::handle_killpriv_v2) takes one. Implement it only if that
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
/// A device registers with all that the calling thread has:
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
