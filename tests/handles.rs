//! File handles from OPEN to RELEASE, and registrars that are attached later. These tests need no root.

#![allow(clippy::panic, clippy::unwrap_used)]

#[allow(dead_code, reason = "not all of it is of use here")]
#[path = "support/registrar.rs"]
mod registrar;

use std::collections::HashSet;
use std::fs::File;
use std::io;
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::fs::{FileExt, MetadataExt};
use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, OnceLock, Weak};

use fuse_backing::error::{BackingError, OpenError, Scope, ServerReason};
use fuse_backing::{
    Access, BackingFile, BackingId, BackingTable, FopenFlags, Handle, Handles, ServerFile,
    error::Errno, uapi,
};
use registrar::Fake;
use rustix::fs::OFlags;

const RDONLY: i32 = 0;
const RDWR: i32 = 2;

fn file(content: &[u8]) -> File {
    let file = tempfile::tempfile().unwrap();
    file.write_all_at(content, 0).unwrap();
    file
}

fn handles(kernel: &Arc<Fake>) -> Handles<Arc<Fake>> {
    Handles::new(BackingTable::new(Arc::clone(kernel)))
}

/// Opens an inode that the registrar refuses: its opens are served until the handle is released.
fn refused(handles: &Handles<Arc<Fake>>, kernel: &Fake, inode: u64) -> u64 {
    kernel.refuse_next(Errno::DQUOT, Scope::File);
    let opened = handles.open(&inode, RDWR, file(b""), FopenFlags::empty());
    let opened = opened.unwrap();
    assert_eq!(opened.backing_id, None);
    opened.fh
}

#[test]
fn an_open_is_stored_before_there_is_a_reply() {
    let kernel = Arc::default();
    let handles = handles(&kernel);
    let opened = handles
        .open(&2, RDWR, file(b"content"), FopenFlags::empty())
        .unwrap();
    let handle = handles.get(opened.fh).unwrap();
    let mut content = [0; 7];
    handle.file.read_exact_at(&mut content, 0).unwrap();
    assert_eq!(&content, b"content");
    assert_eq!(handle.open.inode(), &2);
    assert_eq!(
        handle.open.id().map(BackingId::as_raw),
        opened.backing_id,
        "the id of the reply"
    );
    assert_eq!(kernel.ids(), [1]);
    let out = opened.to_fuse_open_out();
    assert_eq!(
        (out.fh, out.open_flags, out.backing_id),
        (opened.fh, uapi::FOPEN_PASSTHROUGH, 1)
    );
}

#[test]
fn the_last_use_releases() {
    let kernel = Arc::default();
    let handles = handles(&kernel);
    let opened = handles
        .open(&2, RDWR, file(b""), FopenFlags::empty())
        .unwrap();
    let reading = handles.get(opened.fh).unwrap();
    let released = handles.release(opened.fh).unwrap();
    assert!(handles.get(opened.fh).is_none() && handles.release(opened.fh).is_none());
    drop(released);
    assert_eq!(kernel.ids(), [1], "the handle is still in use");
    reading.file.write_all_at(b"written", 0).unwrap();
    drop(reading);
    assert_eq!(kernel.ids(), [] as [i32; 0]);
}

#[test]
fn a_handle_is_not_used_twice() {
    let kernel = Arc::default();
    let handles = handles(&kernel);
    let mut seen = HashSet::new();
    let backing = file(b"");
    std::thread::scope(|threads| {
        let open = || {
            let open = |inode: u64| {
                let file = backing.try_clone().unwrap();
                let opened = handles.open(&inode, RDWR, file, FopenFlags::empty());
                let fh = opened.unwrap().fh;
                assert_eq!(handles.get(fh).unwrap().open.inode(), &inode);
                drop(handles.release(fh));
                fh
            };
            (1..200).map(open).collect::<Vec<_>>()
        };
        let threads = [(); 4].map(|()| threads.spawn(open));
        for thread in threads {
            for fh in thread.join().unwrap() {
                assert!(seen.insert(fh), "{fh} came twice");
            }
        }
    });
    assert_eq!(seen.len(), 4 * 199);
    assert_eq!(kernel.ids(), [] as [i32; 0]);
}

/// Also if a new handle has its place.
#[test]
fn a_released_number_leads_nowhere() {
    let kernel = Arc::default();
    let handles = handles(&kernel);
    let backing = file(b"");
    let open = || {
        let file = backing.try_clone().unwrap();
        let opened = handles.open(&2, RDWR, file, FopenFlags::empty());
        opened.unwrap().fh
    };
    let first = open();
    assert!(handles.release(first).is_some());
    let second = open();
    let place = |fh| fh % (1 << 36);
    assert_eq!(place(first), place(second));
    assert!(handles.get(first).is_none() && handles.release(first).is_none());
    assert!(handles.get(second).is_some());
    assert!(handles.release(second).is_some());
}

/// A server can ask for the same flags in both modes: those that a mode does not permit are left out.
#[test]
fn reply_flags_are_those_that_the_mode_permits() {
    let kernel = Arc::default();
    let handles = handles(&kernel);
    let (kept, left_out) = (
        FopenFlags::NOFLUSH | FopenFlags::PARALLEL_DIRECT_WRITES,
        FopenFlags::KEEP_CACHE | FopenFlags::DIRECT_IO | FopenFlags::STREAM,
    );
    let opened = handles.open(&2, RDWR, file(b""), kept | left_out).unwrap();
    assert_eq!(opened.open_flags, kept | FopenFlags::PASSTHROUGH);

    refused(&handles, &kernel, 3);
    let all = kept | left_out | FopenFlags::PASSTHROUGH;
    let opened = handles.open(&3, RDWR, file(b""), all).unwrap();
    assert_eq!(
        (opened.open_flags, opened.backing_id),
        (kept | left_out, None)
    );
}

/// A server needs only `?` to give the client the errno.
#[test]
fn a_refused_open_answers_the_client() -> io::Result<()> {
    fn open(handles: &Handles<Arc<Fake>>, client_flags: i32) -> io::Result<u64> {
        let file = File::open("/dev/null")?;
        let opened = handles.open(&2, client_flags, file, FopenFlags::empty())?;
        Ok(opened.fh)
    }
    let kernel = Arc::default();
    let handles = handles(&kernel);
    open(&handles, RDONLY)?;
    let refused = open(&handles, RDWR).unwrap_err();
    assert_eq!(refused.raw_os_error(), Some(libc::EACCES));
    let refused = handles.open(&2, RDONLY, file(b""), FopenFlags::empty());
    let refused = io::Error::from(refused.unwrap_err());
    assert_eq!(refused.raw_os_error(), Some(libc::EIO), "a different file");
    assert_eq!(kernel.ids(), [1]);
    Ok(())
}

/// Handles also keep opens that the table shares, or serves by choice.
#[test]
fn opens_of_the_table_are_inserted() {
    let kernel = Arc::new(Fake::default());
    let handles: Handles<_, Option<File>> = Handles::new(BackingTable::new(Arc::clone(&kernel)));
    let backing = file(b"");
    let open = handles.table().open(&2, RDWR, ServerFile::new(&backing));
    let first = handles.insert(open.unwrap(), Some(backing), FopenFlags::empty());
    let shared = handles.table().share(&2, OFlags::RDONLY).unwrap();
    let shared = handles.insert(shared, None, FopenFlags::empty());
    assert_eq!((first.backing_id, shared.backing_id), (Some(1), Some(1)));
    drop(handles.release(first.fh));
    assert_eq!(kernel.ids(), [1]);
    drop(handles.release(shared.fh));
    assert_eq!(kernel.ids(), [] as [i32; 0]);

    let served = handles.table().serve(&2).unwrap();
    let served = handles.insert(served, None, FopenFlags::DIRECT_IO);
    assert_eq!(served.open_flags, FopenFlags::DIRECT_IO);
}

/// The table does not look up what the server states, which shows when the statement is false. tests/kernel/table.rs
/// shows that it makes no call.
#[test]
fn what_is_known_is_not_asked_for() {
    let kernel = Arc::default();
    let handles = handles(&kernel);
    let first = file(b"");
    let numbers = first.metadata().unwrap();
    let known = |file| ServerFile::new(file).identity(numbers.dev(), numbers.ino());
    let opened = handles.open(&2, RDWR, first, FopenFlags::empty());
    assert_eq!(opened.unwrap().backing_id, Some(1));
    let other = file(b"");
    assert_eq!(
        handles.open(&2, RDWR, other.try_clone().unwrap(), FopenFlags::empty()),
        Err(OpenError::DifferentFile)
    );
    let opened = handles.open(&2, RDWR, known(other), FopenFlags::empty());
    assert_eq!(opened.unwrap().backing_id, Some(1));

    let read_only = || File::open("/dev/null").unwrap();
    let exceeded = OpenError::AccessExceeded {
        granted: Access::ReadOnly,
        wanted: Access::ReadWrite,
    };
    assert_eq!(
        handles.open(&2, RDWR, known(read_only()), FopenFlags::empty()),
        Err(exceeded)
    );
    let granted = known(read_only()).access(Access::ReadWrite);
    let opened = handles.open(&2, RDWR, granted, FopenFlags::empty());
    assert_eq!(opened.unwrap().backing_id, Some(1));

    // The first open of an inode looks it up all the same. A false statement is found by the next open.
    let numbers = file(b"").metadata().unwrap();
    let wrong = ServerFile::new(file(b"")).identity(numbers.dev(), numbers.ino() + 1);
    let opened = handles.open(&3, RDWR, wrong, FopenFlags::empty()).unwrap();
    let ino = handles
        .get(opened.fh)
        .unwrap()
        .file
        .metadata()
        .unwrap()
        .ino();
    assert_eq!(kernel.past().last().unwrap().ino, ino);
    let wrong = ServerFile::new(file(b"")).identity(numbers.dev(), numbers.ino() + 1);
    assert_eq!(
        handles.open(&3, RDWR, wrong, FopenFlags::empty()),
        Err(OpenError::DifferentFile)
    );
}

#[test]
fn a_registrar_is_attached_later() {
    let kernel = Arc::new(Fake::default());
    let handles = Handles::default();
    let backing = file(b"");
    let open = |inode: u64| {
        let file = backing.try_clone().unwrap();
        handles.open(&inode, RDWR, file, FopenFlags::empty())
    };
    let early = open(2).unwrap();
    assert_eq!(early.backing_id, None);
    let reason = handles.get(early.fh).unwrap().open.server_reason();
    assert_eq!(reason, Some(ServerReason::NoRegistrar));

    handles.table().attach(Arc::clone(&kernel)).unwrap();
    let served = open(2).unwrap();
    assert_eq!(
        served.backing_id, None,
        "the inode stays served until its last release"
    );
    assert_eq!(open(3).unwrap().backing_id, Some(1));
    drop((handles.release(early.fh), handles.release(served.fh)));
    assert_eq!(open(2).unwrap().backing_id, Some(2));

    let second = Arc::new(Fake::default());
    let refused = handles.table().attach(Arc::clone(&second)).unwrap_err();
    assert!(
        Arc::ptr_eq(&refused, &second),
        "the registrar is given back"
    );
}

#[test]
fn each_cause_is_told_once_and_counted() {
    let kernel = Arc::default();
    let handles = Arc::new(handles(&kernel));
    let refusal = |errno| {
        let scope = Scope::File;
        ServerReason::Refused(BackingError::Registrar { errno, scope })
    };
    // This one is refused before the callback is set.
    let early = refused(&handles, &kernel, 2);
    let told = Arc::new(Mutex::new(Vec::new()));
    handles.table().on_server_mode({
        let (told, handles) = (Arc::clone(&told), Arc::downgrade(&handles));
        move |why| {
            // No lock is held, so the callback may use the table, even for the same inodes.
            let handles = handles.upgrade().unwrap();
            let table = handles.table();
            for entry in &table.list() {
                assert!(table.share(&entry.inode, RDONLY).is_none());
                assert!(!table.invalidate(&entry.inode), "the inode is open");
            }
            told.lock().unwrap().push((why, table.stats().ids));
        }
    });
    let told = || told.lock().unwrap().clone();
    assert_eq!(told(), [(refusal(Errno::DQUOT), 0)]);

    refused(&handles, &kernel, 3);
    kernel.refuse_next(Errno::ACCESS, Scope::File);
    for _ in 0..3 {
        let opened = handles.open(&4, RDWR, file(b""), FopenFlags::empty());
        assert_eq!(opened.unwrap().backing_id, None);
    }
    handles.table().set_limit(0);
    let opened = handles.open(&5, RDWR, file(b""), FopenFlags::empty());
    assert_eq!(opened.unwrap().backing_id, None);
    let chosen = handles.table().serve(&6).unwrap();
    drop((chosen, handles.release(early)));

    let causes = [
        (refusal(Errno::DQUOT), 2),
        (refusal(Errno::ACCESS), 3),
        (ServerReason::LimitReached, 1),
        (ServerReason::Chosen, 1),
    ];
    assert_eq!(handles.table().stats().served, causes);
    let expected = causes[..3].iter().map(|(why, _)| (*why, 0));
    assert_eq!(told(), expected.collect::<Vec<_>>());
}

/// A server that succeeds another one on the same connection takes over the opens that the other has answered.
#[test]
fn opens_of_a_predecessor_are_adopted() {
    let kernel = Arc::new(Fake::default());
    let backing = file(b"");
    let id = BackingId::from_raw(1).unwrap();
    let predecessor = BackingFile::open(&kernel, &backing, Access::ReadWrite).unwrap();
    assert_eq!(predecessor.into_id(), id);

    // All handles that can come next, another one of the same form, and one of no form.
    let numbers: Vec<u64> = {
        let handles = handles(&Arc::default());
        let opened = handles.open(&2, RDWR, file(b""), FopenFlags::empty());
        let first = opened.unwrap().fh;
        let next = (0..16).map(|shard| first & !15 | shard);
        next.chain([first | 1 << 40, 0]).collect()
    };
    let handles = handles(&kernel);
    handles.table().set_limit(1);
    let handle = |file: &File| {
        let file = file.try_clone().unwrap();
        let open = handles.table().adopt(&2, &id, ServerFile::new(&file))?;
        Ok::<_, OpenError>(Handle { open, file })
    };
    for &fh in &numbers {
        assert!(handles.adopt(fh, handle(&backing).unwrap()).is_ok());
        let taken = handles.adopt(fh, handle(&backing).unwrap()).unwrap_err();
        assert_eq!(taken.open.id(), Some(&id), "the handle is given back");
        assert!(handles.get(fh).is_some());
    }
    assert_eq!(handles.table().stats().ids, 1);

    // New handles avoid the adopted numbers, and share the id.
    let open = || {
        let opened = handles.open(&2, RDWR, backing.try_clone().unwrap(), FopenFlags::empty());
        let opened = opened.unwrap();
        assert_eq!(opened.backing_id, Some(1));
        assert!(!numbers.contains(&opened.fh));
        opened.fh
    };
    let fresh = open();
    assert_eq!(
        handles
            .adopt(fresh, handle(&backing).unwrap())
            .map_err(|h| h.open.id() == Some(&id)),
        Err(true)
    );

    // An open with another id, or of another file, is not the predecessor's.
    assert_eq!(handle(&file(b"")).unwrap_err(), OpenError::DifferentFile);
    let other = BackingId::from_raw(2).unwrap();
    let refused = handles.table().adopt(&2, &other, ServerFile::new(&backing));
    assert_eq!(refused.unwrap_err(), OpenError::DifferentFile);

    for fh in [fresh, numbers[0], numbers[16]] {
        assert!(handles.release(fh).is_some());
        assert!(handles.get(fh).is_none() && handles.release(fh).is_none());
    }
    assert_ne!(open(), fresh, "a released number is not used again");
    assert_eq!(kernel.ids(), [1]);
    drop(handles);
    assert_eq!(kernel.ids(), [] as [i32; 0], "the last open closes the id");
}

/// An idle id that is adopted is not closed, even if the file that comes with it is another one.
#[test]
fn an_idle_id_is_not_closed_to_be_adopted() {
    let kernel = Arc::new(Fake::default());
    let table: BackingTable<_, u64> = BackingTable::new(Arc::clone(&kernel));
    table.set_idle_limit(1);
    let backing = file(b"");
    drop(table.open(&2, RDWR, ServerFile::new(&backing)).unwrap());
    let id = BackingId::from_raw(1).unwrap();
    let refused = table.adopt(&2, &id, ServerFile::new(&file(b"")));
    assert_eq!(refused.unwrap_err(), OpenError::DifferentFile);
    assert_eq!((kernel.ids(), table.stats().idle), (vec![1], 1));
    let adopted = table.adopt(&2, &id, ServerFile::new(&backing)).unwrap();
    assert_eq!((adopted.id(), table.stats().idle), (Some(&id), 0));
}

/// A registrar that is attached later also enforces its grants on adopted files that are open by then.
#[test]
fn grants_of_what_was_adopted_are_enforced() {
    let kernel = Fake {
        enforces_grant: true,
        ..Fake::default()
    };
    let backing = file(b"");
    let table = BackingTable::<_, u64>::default();
    let id = BackingId::from_raw(1).unwrap();
    let read = ServerFile::new(&backing).access(Access::ReadOnly);
    let _reader = table.adopt(&2, &id, read).unwrap();
    let _writer = table.adopt(&2, &id, ServerFile::new(&backing)).unwrap();
    assert!(table.share(&2, RDWR).is_some());
    assert!(table.attach(&kernel).is_ok());
    assert!(table.share(&2, RDWR).is_none());
    assert!(table.share(&2, RDONLY).is_some());
    assert_eq!(table.list()[0].access, Some(Access::ReadOnly));
    let refused = table.open(&2, RDWR, ServerFile::new(&backing)).err();
    let (registered, wanted) = (Access::ReadOnly, Access::ReadWrite);
    assert_eq!(
        refused,
        Some(OpenError::GrantExceeded { registered, wanted })
    );
}

/// While an inode is open, its opens have one mode. Nothing is left registered.
#[test]
fn a_registrar_is_attached_while_others_open() {
    for _ in 0..200 {
        let kernel = Arc::new(Fake::default());
        let handles = Handles::default();
        let backing = file(b"");
        std::thread::scope(|threads| {
            for _ in 0..2 {
                threads.spawn(|| {
                    for _ in 0..20 {
                        let open = || {
                            let file = backing.try_clone().unwrap();
                            handles.open(&2, RDWR, file, FopenFlags::empty()).unwrap()
                        };
                        let (first, second) = (open(), open());
                        assert_eq!(first.backing_id, second.backing_id);
                        drop((handles.release(first.fh), handles.release(second.fh)));
                    }
                });
            }
            threads.spawn(|| handles.table().attach(Arc::clone(&kernel)).unwrap());
        });
        assert_eq!(kernel.ids(), [] as [i32; 0]);
        let opened = handles.open(&2, RDWR, file(b""), FopenFlags::empty());
        assert!(opened.unwrap().backing_id.is_some());
    }
}

type Late = Arc<OnceLock<Weak<Handles<Arc<Fake>, Reentrant>>>>;

/// A file whose drop uses the handles and the table. It would deadlock if a lock were held around the drop.
struct Reentrant {
    file: File,
    handles: Late,
    dropped: Arc<AtomicUsize>,
}

impl AsFd for Reentrant {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.file.as_fd()
    }
}

impl Drop for Reentrant {
    fn drop(&mut self) {
        if let Some(handles) = self.handles.get().and_then(Weak::upgrade) {
            // These take the lock of every shard, and the table's.
            for fh in 0..64 {
                drop(handles.get(fh));
            }
            let _ = (handles.table().list(), handles.table().share(&2, RDONLY));
        }
        self.dropped.fetch_add(1, Ordering::SeqCst);
    }
}

#[test]
fn files_are_dropped_without_a_lock() {
    let kernel = Arc::new(Fake::default());
    let late = Late::default();
    let dropped = Arc::new(AtomicUsize::new(0));
    let handles = Arc::new(Handles::new(BackingTable::new(Arc::clone(&kernel))));
    let file = |content| Reentrant {
        file: file(content),
        handles: Arc::clone(&late),
        dropped: Arc::clone(&dropped),
    };
    late.set(Arc::downgrade(&handles)).unwrap();
    let opened = handles.open(&2, RDWR, file(b""), FopenFlags::empty());
    let opened = opened.unwrap();
    // An error drops its file without a lock, too.
    let refused = handles.open(&2, RDWR, file(b""), FopenFlags::empty());
    assert_eq!(refused, Err(OpenError::DifferentFile));
    assert_eq!(dropped.load(Ordering::SeqCst), 1);
    drop(handles.release(opened.fh));
    assert_eq!(dropped.load(Ordering::SeqCst), 2);
    assert_eq!(kernel.ids(), [] as [i32; 0]);
}

/// If the callback panics, the open that it is told of is undone.
#[test]
fn a_callback_that_panics() {
    let kernel: Arc<Fake> = Arc::default();
    let table: BackingTable<_, u64> = BackingTable::new(Arc::clone(&kernel));
    table.on_server_mode(|why| resume_unwind(Box::new(why)));
    kernel.refuse_next(Errno::DQUOT, Scope::File);
    let backing = file(b"");
    let open = || table.open(&2, RDWR, ServerFile::new(&backing));
    assert!(catch_unwind(AssertUnwindSafe(open)).is_err());
    assert!(table.list().is_empty());
    assert!(open().unwrap().is_passthrough());
}

/// `Debug` works for any kept type, and does not use the type's own: its code would run under a lock.
#[test]
fn debug_of_any_kept_type() {
    struct Opaque;
    let kernel: Arc<Fake> = Arc::default();
    let handles = Handles::new(BackingTable::new(Arc::clone(&kernel)));
    let backing = file(b"");
    let open = handles.table().open(&2, RDWR, ServerFile::new(&backing));
    let opened = handles.insert(open.unwrap(), Opaque, FopenFlags::empty());
    let handle = handles.get(opened.fh).unwrap();
    let text = format!("{handle:?}");
    assert!(
        text.starts_with("Handle(OpenFile { mode: Some(Passthrough"),
        "{text}"
    );
    let text = format!("{handles:?}");
    assert!(
        text.starts_with("Handles(BackingTable(TableStats { ids: 1"),
        "{text}"
    );
}
