//! Tables of calls. A mirror must answer each call as a plain directory does. [`place`](crate::place)
//! implements the calls.

use rustix::fs::{
    Access, Advice, AtFlags, FallocateFlags as F, FileType, FlockOperation, OFlags as O,
    RenameFlags, SeekFrom, Timespec, UTIME_NOW, UTIME_OMIT, XattrFlags,
};
use rustix::io::ReadWriteFlags as Rwf;

use crate::place::{Outcome, Place, at};

/// Calls that belong together. Each section of [`CALLS`] gets a folder of its own.
pub struct Section {
    pub name: &'static str,
    pub calls: &'static [Call],
}

pub struct Call {
    pub text: &'static str,
    pub make: fn(&mut Place) -> Outcome,
}

macro_rules! calls {
    ($($section:literal { $($call:ident($($arg:expr),* $(,)?);)* })*) => {
        &[$(Section {
            name: $section,
            calls: &[$(Call {
                text: concat!(stringify!($call), "(", stringify!($($arg),*), ")"),
                make: |place| place.$call($($arg),*),
            },)*],
        },)*]
    };
}

/// Slots for file descriptors.
const A: usize = 0;
const B: usize = 1;
const C: usize = 2;
const D: usize = 3;

/// Access mode 3, which is for ioctls alone: the open needs both permissions, and its fd can neither read nor write.
const NEITHER: O = O::from_bits_retain(3);

const NOW: Timespec = at(0, UTIME_NOW);
const OMIT: Timespec = at(0, UTIME_OMIT);
const FOLLOW: AtFlags = AtFlags::empty();
const NOFOLLOW: AtFlags = AtFlags::SYMLINK_NOFOLLOW;

const SET: XattrFlags = XattrFlags::empty();
const ALLOCATE: F = F::empty();

/// The ids of two unprivileged users, and of two groups.
const USER: u32 = 1000;
const OTHER: u32 = 1001;

/// `struct posix_acl_xattr_header` and its entries, each a tag, permissions and an id.
pub fn acl(entries: &[(u16, u16, u32)]) -> Vec<u8> {
    let mut bytes = 2_u32.to_le_bytes().to_vec();
    for (tag, permissions, id) in entries {
        bytes.extend(tag.to_le_bytes());
        bytes.extend(permissions.to_le_bytes());
        bytes.extend(id.to_le_bytes());
    }
    bytes
}

/// `ACL_UNDEFINED_ID`: the id of entries that need none.
pub const UNDEFINED_ID: u32 = u32::MAX;
pub const OWNER: u16 = 1;
pub const NAMED_USER: u16 = 2;
pub const GROUP: u16 = 4;
pub const MASK: u16 = 0x10;
pub const OTHERS: u16 = 0x20;

/// Owner rw, `USER` rw, group r, others nothing.
fn acl_for_user() -> Vec<u8> {
    acl(&[
        (OWNER, 6, UNDEFINED_ID),
        (NAMED_USER, 6, USER),
        (GROUP, 4, UNDEFINED_ID),
        (MASK, 6, UNDEFINED_ID),
        (OTHERS, 0, UNDEFINED_ID),
    ])
}

/// Calls on a writable filesystem.
#[rustfmt::skip]
pub const CALLS: &[Section] = calls! {
    "opening" {
        open(A, "missing", O::RDONLY);
        open(A, "missing", O::WRONLY);
        open(A, "missing", O::RDWR | O::TRUNC);
        open(A, "missing/below", O::RDONLY);
        open(A, "missing/below", O::RDWR | O::CREATE);
        open(A, "", O::RDONLY);
        open(A, "file", O::RDWR | O::CREATE | O::EXCL);
        fstat(A);
        write(A, b"some content");
        open(B, "file", O::RDWR | O::CREATE | O::EXCL);
        open(B, "file", O::RDWR | O::CREATE);
        read(B, 100);
        open(B, "file", O::CREATE | O::RDONLY);
        read(B, 100);
        open(B, "file", O::RDONLY);
        read(B, 4);
        write(B, b"x");
        pwrite(B, b"x", 0);
        ftruncate(B, 0);
        fallocate(B, ALLOCATE, 0, 10);
        open(B, "file", O::WRONLY);
        write(B, b"SOME");
        read(B, 4);
        pread(B, 4, 0);
        mmap_read(B, 4096);
        open(B, "file", NEITHER);
        read(B, 4);
        write(B, b"x");
        ftruncate(B, 0);
        fstat(B);
        getfl(B);
        open(B, "file", NEITHER | O::CREATE);
        open(B, "file", O::PATH);
        read(B, 4);
        fsync(B);
        fchmod(B, 0o600);
        fstat(B);
        reopen(C, B, O::RDWR);
        read(C, 100);
        open(B, "file", O::RDONLY | O::DIRECTORY);
        open(B, "file", O::RDONLY | O::NONBLOCK);
        read(B, 100);
        open(B, "file", O::RDWR | O::SYNC);
        pwrite(B, b"sync", 0);
        getfl(B);
        open(B, "file", O::RDWR | O::DSYNC);
        pwrite(B, b"data", 0);
        getfl(B);
        open(B, "file", O::RDONLY | O::NOATIME);
        read(B, 100);
        open(B, "file", O::RDONLY | O::NOCTTY | O::NOFOLLOW);
        read(B, 100);
        open(B, "file/", O::RDONLY);
        open(B, "file/below", O::RDONLY);
        open(B, "file/below", O::RDWR | O::CREATE);
        open(B, "new/", O::WRONLY | O::CREATE);
        open(B, "new", O::WRONLY | O::CREATE | O::DIRECTORY);
        open(B, "new", O::RDONLY | O::TRUNC);
        create(B, "read-only", O::RDWR | O::CREATE, 0o444);
        write(B, b"the creator may write");
        create(B, "nothing", O::RDWR | O::CREATE | O::EXCL, 0o000);
        fstat(B);
        create(B, "special", O::RDWR | O::CREATE | O::EXCL, 0o6755);
        fstat(B);
        create(B, "created for reading", O::RDONLY | O::CREATE | O::EXCL, 0o200);
        read(B, 10);
        create(B, "created for neither", NEITHER | O::CREATE | O::EXCL, 0o644);
        read(B, 10);
        create(B, "created and truncated", O::RDWR | O::CREATE | O::TRUNC, 0o644);
        write(B, b"x");
        create(B, "created for appending", O::WRONLY | O::CREATE | O::APPEND, 0o644);
        write(B, b"x");
        umask(0o077);
        create(B, "masked", O::RDWR | O::CREATE, 0o666);
        fstat(B);
        umask(0o022);
        open(B, &"n".repeat(255), O::WRONLY | O::CREATE);
        open(B, &"n".repeat(256), O::WRONLY | O::CREATE);
        open(B, &"n".repeat(256), O::RDONLY);
        open(B, &"n".repeat(2000), O::RDONLY);
        open(B, &"./".repeat(3000), O::RDONLY);
        reopen(B, A, O::RDONLY);
        read(B, 100);
        reopen(B, A, O::RDWR | O::TRUNC);
        fstat(A);
        dup(B, A);
        seek(B, SeekFrom::Start(3));
        seek(A, SeekFrom::Current(0));
        close(A);
        write(B, b"by a duplicate");
        close(B);
        close(B);
        content("file");
        list(".");
    }
    "opening directories and links" {
        mkdir("folder", 0o755);
        file("folder/file", b"in the folder");
        open(A, "folder", O::RDONLY);
        read(A, 10);
        write(A, b"x");
        ftruncate(A, 0);
        fsync(A);
        fdatasync(A);
        fstat(A);
        getdents(A);
        open(A, "folder", O::RDONLY | O::DIRECTORY);
        open(A, "folder", O::WRONLY);
        open(A, "folder", O::RDWR);
        open(A, "folder", O::RDONLY | O::TRUNC);
        open(A, "folder", O::RDONLY | O::CREATE);
        open(A, "folder", O::RDWR | O::CREATE | O::EXCL);
        open(A, "folder/", O::RDONLY);
        open(A, "folder/../folder/./file", O::RDONLY);
        read(A, 100);
        symlink("folder/file", "link");
        open(A, "link", O::RDONLY);
        read(A, 100);
        open(A, "link", O::RDONLY | O::NOFOLLOW);
        open(A, "link", O::PATH | O::NOFOLLOW);
        fstat(A);
        open(A, "link", O::RDWR | O::CREATE | O::EXCL);
        open(A, "link", O::RDWR | O::TRUNC);
        content("folder/file");
        symlink("folder", "to the folder");
        open(A, "to the folder/file", O::RDONLY);
        open(A, "to the folder", O::RDONLY | O::DIRECTORY | O::NOFOLLOW);
        open(A, "to the folder", O::RDONLY | O::DIRECTORY);
        symlink("loop", "loop");
        open(A, "loop", O::RDONLY);
        open(A, "loop", O::WRONLY | O::CREATE);
        open(A, "loop/below", O::RDONLY);
        stat("loop");
        symlink("nowhere", "dangling");
        open(A, "dangling", O::RDONLY);
        open(A, "dangling", O::RDWR | O::CREATE | O::EXCL);
        open(A, "dangling", O::RDWR | O::CREATE);
        write(A, b"made through the link");
        content("nowhere");
    }
    "truncating opens" {
        file("file", b"0123456789");
        open(A, "file", O::RDWR);
        read(A, 4);
        open(B, "file", O::WRONLY | O::TRUNC);
        fstat(A);
        read(A, 4);
        write(B, b"abcdefgh");
        read(A, 4);
        open(B, "file", O::RDONLY | O::TRUNC);
        fstat(A);
        pwrite(A, b"0123456789", 0);
        open(B, "file", O::RDWR | O::TRUNC | O::CREATE);
        fstat(A);
        pwrite(A, b"0123456789", 0);
        open(B, "file", O::RDWR | O::TRUNC | O::APPEND);
        write(B, b"abc");
        content("file");
        open(B, "file", NEITHER | O::TRUNC);
        stat("file");
        pwrite(A, b"0123456789", 5);
        content("file");
        truncate("file", 7);
        content("file");
        truncate("file", 5000);
        content("file");
        truncate("file", 0);
        content("file");
        truncate("file", -1);
        truncate("missing", 0);
        truncate(".", 0);
        truncate("file/below", 0);
        ftruncate(A, 20);
        content("file");
        ftruncate(A, 1 << 40);
        fstat(A);
        ftruncate(A, 3);
        fstat(A);
        ftruncate(A, i64::MAX as u64);
        ftruncate(A, 3);
        fstat(A);
    }
    "reading and writing" {
        open(A, "file", O::RDWR | O::CREATE);
        write(A, b"0123456789");
        read(A, 10);
        seek(A, SeekFrom::Start(0));
        read(A, 4);
        read(A, 100);
        read(A, 100);
        read(A, 0);
        pread(A, 4, 8);
        pread(A, 4, 10);
        pread(A, 4, 1 << 40);
        pread(A, 4, i64::MAX as u64);
        pread(A, 4, u64::MAX);
        pwrite(A, b"ab", 2);
        pwrite(A, b"", 100);
        pwrite(A, b"cd", 20);
        pwrite(A, b"x", u64::MAX);
        seek(A, SeekFrom::Current(0));
        pread(A, 100, 0);
        seek(A, SeekFrom::Start(0));
        readv(A, 3, 5);
        readv(A, 100, 5);
        writev(A, b"one", b"two");
        preadv2(A, 1, Rwf::empty());
        pwritev2(A, b"dsync", 0, Rwf::DSYNC);
        pwritev2(A, b"append", 0, Rwf::APPEND);
        pwritev2(A, b"x", 0, Rwf::from_bits_retain(1 << 30));
        content("file");
        pwrite(A, &[b'x'; 100_000], 1000);
        pread(A, 200_000, 0);
        pwrite(A, &vec![b'y'; 3 << 20], 5000);
        fstat(A);
        content("file");
        pread(A, 2 << 20, 1 << 20);
        fadvise(A, Advice::WillNeed);
        fadvise(A, Advice::DontNeed);
        content("file");
        open(B, "file", O::RDWR);
        pwrite(B, b"seen by the other", 3);
        pread(A, 30, 0);
        reopen(B, A, O::RDONLY);
        pread(B, 30, 0);
    }
    "two descriptors, read-only first" {
        file("file", b"0123456789");
        open(A, "file", O::RDONLY);
        read(A, 3);
        open(B, "file", O::RDWR);
        pwrite(B, b"ab", 4);
        read(A, 100);
        open(C, "file", O::WRONLY);
        pwrite(C, b"cd", 0);
        pread(A, 100, 0);
        pread(B, 100, 0);
        write(A, b"x");
        read(C, 1);
        close(A);
        pread(B, 100, 0);
        open(A, "file", O::RDONLY);
        close(B);
        close(C);
        pread(A, 100, 0);
        open(B, "file", O::WRONLY | O::APPEND);
        write(B, b"!");
        pread(A, 100, 0);
        open(C, "file", O::RDONLY | O::TRUNC);
        pread(A, 100, 0);
        open(D, "file", NEITHER);
        write(B, b"again");
        pread(A, 100, 0);
    }
    "appending" {
        open(A, "file", O::RDWR | O::CREATE | O::APPEND);
        write(A, b"one ");
        open(B, "file", O::WRONLY | O::APPEND);
        write(B, b"two ");
        write(A, b"three ");
        seek(A, SeekFrom::Current(0));
        seek(A, SeekFrom::Start(0));
        read(A, 4);
        write(A, b"four ");
        seek(A, SeekFrom::Current(0));
        pwrite(A, b"five ", 0);
        writev(A, b"six ", b"seven ");
        content("file");
        open(C, "file", O::RDWR);
        pwrite(C, b"ONE", 0);
        write(A, b"eight ");
        content("file");
        ftruncate(A, 4);
        write(A, b"nine ");
        content("file");
        truncate("file", 2);
        write(B, b"ten ");
        content("file");
        mmap_write(A, 4096, 0, b"mapped");
        content("file");
        setfl(C, O::APPEND);
        getfl(C);
    }
    "setting O_APPEND later" {
        file("file", b"0123456789");
        open(A, "file", O::RDWR);
        setfl(A, O::APPEND);
        write(A, b"a");
        content("file");
    }
    "clearing O_APPEND" {
        open(A, "file", O::RDWR | O::CREATE | O::APPEND);
        write(A, b"0123456789");
        setfl(A, O::empty());
        getfl(A);
        pwrite(A, b"a", 0);
        content("file");
        ftruncate(A, 0);
    }
    "holes" {
        open(A, "file", O::RDWR | O::CREATE);
        seek(A, SeekFrom::Data(0));
        seek(A, SeekFrom::Hole(0));
        pwrite(A, &[b'x'; 65536], 1 << 20);
        pwrite(A, &[b'y'; 65536], 4 << 20);
        fstat(A);
        seek(A, SeekFrom::Data(0));
        seek(A, SeekFrom::Hole(0));
        seek(A, SeekFrom::Hole(1 << 20));
        seek(A, SeekFrom::Data((1 << 20) + 65536));
        seek(A, SeekFrom::Current(0));
        seek(A, SeekFrom::Hole((4 << 20) + 1));
        seek(A, SeekFrom::Data((4 << 20) + 65536));
        seek(A, SeekFrom::Hole(1 << 30));
        seek(A, SeekFrom::Data(i64::MAX as u64));
        seek(A, SeekFrom::End(0));
        seek(A, SeekFrom::End(-10));
        seek(A, SeekFrom::Current(-20));
        seek(A, SeekFrom::Current(-(1 << 40)));
        seek(A, SeekFrom::End(-(1 << 40)));
        seek(A, SeekFrom::Start(1 << 40));
        read(A, 10);
        seek(A, SeekFrom::Start(u64::MAX));
        fallocate(A, F::PUNCH_HOLE | F::KEEP_SIZE, 4 << 20, 65536);
        seek(A, SeekFrom::Data(2 << 20));
        pread(A, 100, 4 << 20);
        open(B, "file", O::WRONLY);
        seek(B, SeekFrom::Data(0));
        ftruncate(A, 8 << 20);
        seek(A, SeekFrom::Hole(4 << 20));
        content("file");
    }
    "mapping" {
        open(A, "file", O::RDWR | O::CREATE);
        write(A, b"0123456789");
        mmap_read(A, 4096);
        mmap_write(A, 4096, 2, b"ab");
        pread(A, 100, 0);
        content("file");
        fstat(A);
        mmap_private(A, b"private");
        content("file");
        mmap_sees_write(A, b"cd", 4);
        read_sees_mmap(A, b"ef", 6);
        content("file");
        open(B, "file", O::RDONLY);
        mmap_read(B, 4096);
        mmap_write(B, 4096, 0, b"x");
        mmap_private(B, b"private");
        open(B, "file", O::WRONLY);
        mmap_write(B, 4096, 0, b"x");
        ftruncate(A, 1 << 20);
        mmap_write(A, 1 << 20, 500_000, &[b'z'; 100_000]);
        content("file");
        pwrite(A, b"written", 500_000);
        mmap_read(A, 1 << 20);
        close(A);
        close(B);
        open(A, "file", O::RDONLY);
        mmap_read(A, 1 << 20);
        open(B, ".", O::RDONLY);
        mmap_read(B, 4096);
        utimens("file", at(1_000_000, 0), at(2_000_000, 0), FOLLOW);
        open(B, "file", O::RDWR);
        mmap_write(B, 4096, 0, b"and the time changes");
        close(B);
        times("file");
    }
    "sendfile" {
        file("from", b"0123456789");
        open(A, "from", O::RDONLY);
        memfd(B, b"");
        sendfile(B, A, None, 4);
        sendfile(B, A, Some(2), 100);
        sendfile(B, A, None, 100);
        pread(B, 100, 0);
        memfd(B, b"from outside");
        open(C, "to", O::RDWR | O::CREATE);
        sendfile(C, B, Some(0), 100);
        sendfile(C, A, Some(5), 100);
        content("to");
        pipe(B, D);
        sendfile(D, A, Some(0), 7);
        read(B, 100);
        open(C, "to", O::RDONLY);
        sendfile(C, A, Some(0), 1);
        open(C, "to", O::WRONLY | O::APPEND);
        sendfile(C, A, Some(0), 1);
        open(C, "to", O::WRONLY);
        sendfile(C, C, Some(0), 1);
        truncate("from", 300_000);
        sendfile(C, A, Some(0), 300_000);
        content("to");
    }
    "splice" {
        file("file", b"0123456789");
        open(A, "file", O::RDWR);
        pipe(B, C);
        splice((A, None), (C, None), 4);
        splice((A, Some(8)), (C, None), 100);
        read(B, 100);
        splice((A, Some(10)), (C, None), 100);
        write(C, b"by the pipe");
        splice((B, None), (A, Some(3)), 6);
        splice((B, None), (A, None), 100);
        content("file");
        open(D, "file", O::WRONLY | O::APPEND);
        write(C, b"x");
        splice((B, None), (D, None), 1);
        open(D, "file", O::RDONLY);
        splice((B, None), (D, None), 1);
        splice((A, None), (D, None), 1);
    }
    "copy_file_range" {
        file("from", b"0123456789");
        open(A, "from", O::RDWR);
        open(B, "to", O::RDWR | O::CREATE);
        copy_file_range((A, None), (B, None), 4);
        copy_file_range((A, Some(2)), (B, Some(20)), 100);
        copy_file_range((A, None), (B, None), 100);
        copy_file_range((A, None), (B, None), 100);
        content("to");
        copy_file_range((A, Some(0)), (A, Some(5)), 5);
        copy_file_range((A, Some(0)), (A, Some(2)), 5);
        content("from");
        copy_file_range((A, Some(100)), (B, Some(0)), 5);
        copy_file_range((A, Some(0)), (B, Some(0)), 0);
        copy_file_range((A, Some(u64::MAX - 1)), (B, Some(0)), 5);
        open(C, "to", O::RDONLY);
        copy_file_range((A, Some(0)), (C, Some(0)), 1);
        open(C, "to", O::WRONLY);
        copy_file_range((C, Some(0)), (A, Some(0)), 1);
        open(C, "to", O::WRONLY | O::APPEND);
        copy_file_range((A, Some(0)), (C, Some(0)), 1);
        open(C, ".", O::RDONLY);
        copy_file_range((C, Some(0)), (A, Some(0)), 1);
        memfd(C, b"outside");
        copy_file_range((C, Some(0)), (A, Some(0)), 1);
        copy_file_range((A, Some(0)), (C, Some(0)), 1);
        pipe(C, D);
        copy_file_range((A, Some(0)), (D, None), 1);
        pwrite(A, &[b'x'; 200_000], 0);
        copy_file_range((A, Some(10)), (B, Some(5)), 150_000);
        pread(B, 200_000, 0);
        content("to");
    }
    "allocation" {
        open(A, "file", O::RDWR | O::CREATE);
        fallocate(A, ALLOCATE, 0, 100_000);
        fstat(A);
        fallocate(A, F::KEEP_SIZE, 100_000, 100_000);
        fstat(A);
        pwrite(A, &[b'x'; 100_000], 0);
        fallocate(A, F::PUNCH_HOLE | F::KEEP_SIZE, 10_000, 20_000);
        content("file");
        fallocate(A, F::PUNCH_HOLE, 0, 10);
        fallocate(A, F::PUNCH_HOLE | F::KEEP_SIZE, 1 << 30, 4096);
        fallocate(A, ALLOCATE, 0, 0);
        fallocate(A, ALLOCATE, u64::MAX, 10);
        fallocate(A, ALLOCATE, 0, u64::MAX);
        fallocate(A, ALLOCATE, i64::MAX as u64, 10);
        fallocate(A, ALLOCATE, 0, 1 << 60);
        fallocate(A, F::from_bits_retain(1 << 20), 0, 10);
        open(B, "file", O::RDONLY);
        fallocate(B, ALLOCATE, 0, 10);
        open(B, "file", O::WRONLY | O::APPEND);
        fallocate(B, ALLOCATE, 0, 200_000);
        stat("file");
        open(B, ".", O::RDONLY);
        fallocate(B, ALLOCATE, 0, 10);
        pipe(B, C);
        fallocate(C, ALLOCATE, 0, 10);
        content("file");
        ftruncate(A, 0);
        fallocate(A, ALLOCATE, 0, 65536);
        fsync(A);
        blocks(A);
        fallocate(A, F::PUNCH_HOLE | F::KEEP_SIZE, 0, 65536);
        fsync(A);
        blocks(A);
    }
    "allocation, zeroing a range" {
        open(A, "file", O::RDWR | O::CREATE);
        pwrite(A, &[b'x'; 100_000], 0);
        fallocate(A, F::ZERO_RANGE, 5000, 20_000);
        content("file");
        fallocate(A, F::ZERO_RANGE, 90_000, 20_000);
        content("file");
        fallocate(A, F::ZERO_RANGE | F::KEEP_SIZE, 110_000, 20_000);
        stat("file");
    }
    "allocation, collapsing and inserting" {
        open(A, "file", O::RDWR | O::CREATE);
        pwrite(A, &[b'x'; 1 << 20], 0);
        fallocate(A, F::COLLAPSE_RANGE, 0, 65536);
        fallocate(A, F::INSERT_RANGE, 65536, 65536);
        fallocate(A, F::UNSHARE_RANGE, 0, 65536);
        ftruncate(A, 0);
    }
    "syncing" {
        open(A, "file", O::RDWR | O::CREATE);
        write(A, b"content");
        fsync(A);
        fdatasync(A);
        syncfs(A);
        open(B, "file", O::RDONLY);
        fsync(B);
        open(B, ".", O::RDONLY);
        fsync(B);
        syncfs(B);
        pipe(B, C);
        fsync(C);
    }
    "attributes" {
        file("file", b"0123456789");
        stat("file");
        lstat("file");
        statx("file", FOLLOW);
        open(A, "file", O::RDWR);
        fstat(A);
        stat("missing");
        stat("file/below");
        stat("");
        stat(".");
        stat("..");
        stat(&"n".repeat(255));
        stat(&"n".repeat(256));
        mkdir("folder", 0o755);
        stat("folder");
        statx("folder", FOLLOW);
        mkdir("folder/inner", 0o700);
        stat("folder");
        symlink("file", "link");
        stat("link");
        lstat("link");
        statx("link", NOFOLLOW);
        link("file", "other name");
        fstat(A);
        ftruncate(A, 123_456);
        stat("other name");
        access("file", Access::EXISTS);
        access("file", Access::READ_OK | Access::WRITE_OK);
        access("file", Access::EXEC_OK);
        chmod("file", 0o100);
        access("file", Access::EXEC_OK);
        access("folder", Access::READ_OK | Access::EXEC_OK);
        access("missing", Access::EXISTS);
        access("link", Access::READ_OK);
        statfs(".");
        statfs("file");
        statfs("missing");
        fstatfs(A);
    }
    "modes" {
        file("file", b"");
        chmod("file", 0o600);
        stat("file");
        chmod("file", 0o7777);
        stat("file");
        chmod("file", 0);
        stat("file");
        content("file");
        chmod("missing", 0o600);
        chmod("file/below", 0o600);
        open(A, "file", O::RDONLY);
        fchmod(A, 0o640);
        fstat(A);
        symlink("file", "link");
        chmod("link", 0o604);
        stat("file");
        lstat("link");
        mkdir("folder", 0o1777);
        stat("folder");
        chmod("folder", 0o2755);
        stat("folder");
        mkdir("folder/inherits", 0o755);
        stat("folder/inherits");
        umask(0);
        mkdir("all", 0o777);
        stat("all");
        umask(0o777);
        mkdir("none", 0o777);
        stat("none");
        umask(0o022);
    }
    "owners" {
        file("file", b"0123456789");
        chown("file", Some(USER), Some(OTHER));
        stat("file");
        chown("file", None, Some(0));
        stat("file");
        chown("file", Some(0), None);
        stat("file");
        chown("file", None, None);
        chown("missing", Some(0), Some(0));
        chown("file", Some(u32::MAX - 1), None);
        stat("file");
        chmod("file", 0o6755);
        chown("file", Some(USER), None);
        stat("file");
        chmod("file", 0o6745);
        chown("file", None, Some(USER));
        stat("file");
        chmod("file", 0o6755);
        open(A, "file", O::WRONLY);
        fchown(A, Some(OTHER), Some(OTHER));
        fstat(A);
        symlink("file", "link");
        lchown("link", Some(USER), Some(USER));
        lstat("link");
        chown("link", Some(OTHER), None);
        stat("file");
        mkdir("folder", 0o755);
        chmod("folder", 0o6755);
        chown("folder", Some(USER), Some(USER));
        stat("folder");
        file("folder/file", b"");
        stat("folder/file");
        mkdir("folder/inner", 0o755);
        stat("folder/inner");
        symlink("x", "folder/link");
        lstat("folder/link");
        mknod("folder/fifo", FileType::Fifo, 0o644, (0, 0));
        stat("folder/fifo");
    }
    "times" {
        file("file", b"0123456789");
        times("file");
        utimens("file", at(1_000_000_000, 123_456_789), at(1_100_000_000, 987_654_321), FOLLOW);
        times("file");
        utimens("file", OMIT, at(1_200_000_000, 1), FOLLOW);
        times("file");
        utimens("file", at(1_300_000_000, 2), OMIT, FOLLOW);
        times("file");
        utimens("file", OMIT, OMIT, FOLLOW);
        times("file");
        utimens("file", NOW, OMIT, FOLLOW);
        times("file");
        utimens("file", at(1, 0), NOW, FOLLOW);
        times("file");
        utimens("file", NOW, NOW, FOLLOW);
        times("file");
        utimens("file", at(0, 0), at(0, 1), FOLLOW);
        times("file");
        utimens("file", at(-1, 0), at(-2, 750_000_000), FOLLOW);
        times("file");
        utimens("file", at(-2_000_000_000, 999_999_999), at(-1, 1), FOLLOW);
        times("file");
        utimens("file", at(4_102_444_800, 5), at(1 << 33, 6), FOLLOW);
        times("file");
        utimens("file", at(0, 1_000_000_000), OMIT, FOLLOW);
        utimens("missing", NOW, NOW, FOLLOW);
        utimens("missing", OMIT, OMIT, FOLLOW);
        utimens("file/below", NOW, NOW, FOLLOW);
        open(A, "file", O::RDONLY);
        futimens(A, at(1_000_000, 0), at(2_000_000, 0));
        times("file");
        read(A, 4);
        times("file");
        close(A);
        utimens("file", at(1_000_000, 0), at(2_000_000, 0), FOLLOW);
        open(A, "file", O::RDWR);
        times("file");
        write(A, b"x");
        times("file");
        utimens("file", at(1_000_000, 0), at(2_000_000, 0), FOLLOW);
        ftruncate(A, 4);
        times("file");
        utimens("file", at(1_000_000, 0), at(2_000_000, 0), FOLLOW);
        ftruncate(A, 4);
        times("file");
        utimens("file", at(1_000_000, 0), at(2_000_000, 0), FOLLOW);
        truncate("file", 4);
        times("file");
        utimens("file", at(1_000_000, 0), at(2_000_000, 0), FOLLOW);
        fallocate(A, ALLOCATE, 0, 8);
        times("file");
        utimens("file", at(1_000_000, 0), at(2_000_000, 0), FOLLOW);
        open(B, "file", O::RDWR | O::TRUNC);
        times("file");
        utimens("file", at(1_000_000, 0), at(2_000_000, 0), FOLLOW);
        chmod("file", 0o600);
        link("file", "other");
        setxattr("file", "user.x", b"", SET);
        times("file");
        pwrite(A, b"", 0);
        times("file");
        memfd(C, b"outside");
        sendfile(A, C, Some(0), 7);
        times("file");
        utimens("file", at(1_000_000, 0), at(2_000_000, 0), FOLLOW);
        sendfile(C, A, Some(0), 7);
        times("file");
        open(C, "copy", O::RDWR | O::CREATE);
        futimens(C, at(1_000_000, 0), at(2_000_000, 0));
        copy_file_range((A, Some(0)), (C, Some(0)), 3);
        times("copy");
        symlink("file", "link");
        utimens("link", at(3_000_000, 0), at(4_000_000, 0), NOFOLLOW);
        times("link");
        times("file");
        utimens("link", at(5_000_000, 0), at(6_000_000, 0), FOLLOW);
        times("link");
        times("file");
        mkdir("folder", 0o755);
        utimens("folder", at(1_000_000, 0), at(2_000_000, 0), FOLLOW);
        times("folder");
        file("folder/file", b"");
        times("folder");
        utimens("folder", at(1_000_000, 0), at(2_000_000, 0), FOLLOW);
        rename("folder/file", "folder/renamed");
        times("folder");
        utimens("folder", at(1_000_000, 0), at(2_000_000, 0), FOLLOW);
        list("folder");
        times("folder");
    }
    "hard links" {
        file("file", b"0123456789");
        link("file", "second");
        stat("file");
        content("second");
        open(A, "second", O::RDWR);
        open(B, "file", O::RDWR);
        pwrite(A, b"ab", 0);
        pread(B, 100, 0);
        link("file", "second");
        link("missing", "third");
        link("file", "missing/third");
        link("file", "file/third");
        mkdir("folder", 0o755);
        link("folder", "folder 2");
        link("file", "folder");
        link("file", "folder/third");
        link("file", &"n".repeat(256));
        link("file", "/proc/third");
        symlink("file", "link");
        link("link", "link 2");
        lstat("link 2");
        lstat("link");
        link_following("link", "followed");
        lstat("followed");
        flink(A, "from the descriptor");
        stat("file");
        unlink("file");
        fstat(A);
        content("second");
        content("folder/third");
        mknod("fifo", FileType::Fifo, 0o644, (0, 0));
        link("fifo", "fifo 2");
        stat("fifo 2");
    }
    "symbolic links" {
        symlink("target", "link");
        readlink("link");
        lstat("link");
        symlink("target", "link");
        symlink("", "empty");
        symlink(&"t".repeat(4000), "long");
        readlink("long");
        lstat("long");
        symlink(&"t".repeat(5000), "too long");
        symlink("x", "missing/link");
        symlink("x", &"n".repeat(256));
        readlink("missing");
        mkdir("folder", 0o755);
        readlink("folder");
        file("folder/file", b"by way of links");
        readlink("folder/file");
        symlink("../folder", "folder/up");
        content("folder/up/up/up/file");
        symlink("chain 2", "chain 1");
        symlink("chain 3", "chain 2");
        symlink("folder/file", "chain 3");
        content("chain 1");
        rename("chain 3", "chain 4");
        content("chain 1");
        unlink("chain 1");
        readlink("chain 2");
    }
    "renaming" {
        file("a", b"a");
        file("b", b"b");
        mkdir("d", 0o755);
        mkdir("e", 0o755);
        file("e/inside", b"");
        rename("missing", "x");
        rename("a", "missing/x");
        rename("a", "b/x");
        rename("a", "d");
        rename("d", "a");
        rename("d", "e");
        rename("d", "d/inside");
        rename("e", "d/e");
        rename("d", "d/e/d");
        rename("d/e", "d");
        rename(".", "x");
        rename("a", ".");
        rename("a", "..");
        rename("a", &"n".repeat(256));
        rename("a", "/proc/x");
        rename("a", "a");
        open(A, "a", O::RDWR);
        open(B, "b", O::RDWR);
        rename("a", "b");
        fstat(A);
        fstat(B);
        pwrite(A, b"A", 0);
        pwrite(B, b"B", 0);
        pread(B, 10, 0);
        content("b");
        stat("a");
        link("b", "c");
        rename("b", "c");
        list(".");
        renameat2("b", "new", RenameFlags::NOREPLACE);
        file("other", b"other");
        renameat2("new", "other", RenameFlags::NOREPLACE);
        renameat2("new", "other", RenameFlags::EXCHANGE);
        content("new");
        content("other");
        renameat2("new", "d", RenameFlags::EXCHANGE);
        stat("new");
        content("d");
        renameat2("new", "missing", RenameFlags::EXCHANGE);
        renameat2("new", "new/e", RenameFlags::EXCHANGE);
        renameat2("d", "x", RenameFlags::NOREPLACE | RenameFlags::EXCHANGE);
        renameat2("d", "x", RenameFlags::from_bits_retain(1 << 10));
        renameat2("d", "over", RenameFlags::WHITEOUT);
        lstat("d");
        unlink("d");
        mkdir("empty", 0o755);
        mkdir("moves", 0o755);
        rename("moves", "empty");
        rename("empty", "new/renamed");
        stat("new");
        stat("new/e/inside");
        rename("new/e", "e");
        stat("new");
        stat("e/../e/inside");
        list("new");
        list(".");
    }
    "removing" {
        file("file", b"");
        mkdir("folder", 0o755);
        file("folder/file", b"");
        unlink("missing");
        unlink("folder");
        unlink("file/below");
        unlink("file/");
        rmdir("missing");
        rmdir("file");
        rmdir("folder");
        rmdir("folder/file");
        rmdir(".");
        rmdir("folder/..");
        unlink("folder/file");
        rmdir("folder/");
        stat("folder");
        unlink("file");
        unlink("file");
        file("file", b"new");
        content("file");
        symlink("file", "link");
        unlink("link");
        stat("file");
        mkdir("folder", 0o755);
        open(A, "folder", O::RDONLY);
        rmdir("folder");
        fstat(A);
        getdents(A);
        stat(".");
    }
    "unlinked but open" {
        file("file", b"0123456789");
        open(A, "file", O::RDWR);
        setxattr("file", "user.x", b"value", SET);
        link("file", "second");
        unlink("file");
        fstat(A);
        unlink("second");
        fstat(A);
        read(A, 4);
        write(A, b"abc");
        pread(A, 100, 0);
        ftruncate(A, 5);
        fstat(A);
        fallocate(A, ALLOCATE, 0, 100);
        fstat(A);
        fchmod(A, 0o600);
        fchown(A, Some(USER), Some(USER));
        futimens(A, at(1_000_000, 0), at(2_000_000, 0));
        fstat(A);
        fgetxattr(A, "user.x", 10);
        fsetxattr(A, "user.y", b"value");
        flistxattr(A, 100);
        fremovexattr(A, "user.x");
        flistxattr(A, 100);
        mmap_write(A, 4096, 0, b"mapped");
        pread(A, 100, 0);
        fsync(A);
        reopen(B, A, O::RDONLY);
        read(B, 100);
        reopen(C, A, O::RDWR);
        pwrite(C, b"by another", 0);
        pread(B, 100, 0);
        flink(A, "again");
        seek(A, SeekFrom::Data(0));
        file("file", b"another file of that name");
        pread(A, 10, 0);
        content("file");
        file("victim", b"victim");
        open(A, "victim", O::RDONLY);
        rename("file", "victim");
        read(A, 100);
        content("victim");
    }
    "directories" {
        mkdir("folder", 0o755);
        mkdir("folder", 0o755);
        mkdir("missing/folder", 0o755);
        file("file", b"");
        mkdir("file", 0o755);
        mkdir("file/folder", 0o755);
        mkdir("", 0o755);
        mkdir(".", 0o755);
        mkdir("slash/", 0o755);
        mkdir(&"n".repeat(255), 0o755);
        mkdir(&"n".repeat(256), 0o755);
        symlink("nowhere", "dangling");
        mkdir("dangling", 0o755);
        list(".");
        list("folder");
        list("file");
        list("missing");
        open(A, "folder", O::RDONLY);
        getdents(A);
        file("folder/a", b"");
        getdents(A);
        seek(A, SeekFrom::Start(0));
        getdents(A);
        seek(A, SeekFrom::Start(0));
        unlink("folder/a");
        getdents(A);
        mkdir("many", 0o755);
        make_many("many", 1000);
        stat("many");
        list("many");
        list_from("many", 0);
        list_from("many", 500);
        list_from("many", 1000);
        list_from("many", 1001);
        rmdir("many");
        remove_all("many");
        list("many");
        rmdir("many");
    }
    "special files" {
        mknod("regular", FileType::RegularFile, 0o640, (0, 0));
        stat("regular");
        open(A, "regular", O::RDWR);
        write(A, b"content");
        content("regular");
        mknod("regular", FileType::RegularFile, 0o640, (0, 0));
        mknod("directory", FileType::Directory, 0o640, (0, 0));
        mknod("fifo", FileType::Fifo, 0o600, (0, 0));
        stat("fifo");
        open(A, "fifo", O::WRONLY | O::NONBLOCK);
        open(A, "fifo", O::RDWR | O::NONBLOCK);
        read(A, 10);
        write(A, b"through the fifo");
        open(B, "fifo", O::RDONLY | O::NONBLOCK);
        read(B, 100);
        seek(A, SeekFrom::Start(0));
        truncate("fifo", 0);
        chmod("fifo", 0o644);
        stat("fifo");
        mknod("socket", FileType::Socket, 0o600, (0, 0));
        stat("socket");
        open(A, "socket", O::RDWR);
        connect(A, "socket");
        bind(A, "bound");
        stat("bound");
        connect(B, "bound");
        bind(C, "bound");
        connect(C, "missing");
        rename("bound", "moved");
        connect(C, "moved");
        close(A);
        connect(C, "moved");
        mknod("null", FileType::CharacterDevice, 0o666, (1, 3));
        stat("null");
        mknod("disk", FileType::BlockDevice, 0o600, (259, 70_000));
        stat("disk");
        statx("disk", FOLLOW);
        mknod("missing/fifo", FileType::Fifo, 0o600, (0, 0));
        list(".");
    }
    "running programs" {
        file("script", b"#!/bin/sh\necho it runs\n");
        run("./script", "");
        chmod("script", 0o755);
        run("./script", "");
        open(A, "script", O::WRONLY);
        run("./script", "");
        close(A);
        run("./script", "");
        run("./missing", "");
        run("./script/below", "");
        file("garbage", b"\x7fELF and nothing else");
        chmod("garbage", 0o755);
        run("./garbage", "");
        run(".", "");
    }
    "extended attributes" {
        file("file", b"");
        getxattr("file", "user.a", 100);
        listxattr("file", 100);
        setxattr("file", "user.a", b"value", SET);
        getxattr("file", "user.a", 0);
        getxattr("file", "user.a", 100);
        getxattr("file", "user.a", 5);
        getxattr("file", "user.a", 4);
        setxattr("file", "user.a", b"x", XattrFlags::CREATE);
        setxattr("file", "user.b", b"x", XattrFlags::REPLACE);
        setxattr("file", "user.a", b"longer value", XattrFlags::REPLACE);
        getxattr("file", "user.a", 100);
        setxattr("file", "user.b", b"", XattrFlags::CREATE);
        getxattr("file", "user.b", 0);
        getxattr("file", "user.b", 100);
        setxattr("file", "user.c", b"x", XattrFlags::from_bits_retain(1 << 10));
        listxattr("file", 0);
        listxattr("file", 100);
        listxattr("file", 14);
        listxattr("file", 13);
        removexattr("file", "user.a");
        removexattr("file", "user.a");
        listxattr("file", 100);
        setxattr("missing", "user.a", b"x", SET);
        getxattr("missing", "user.a", 100);
        listxattr("missing", 100);
        removexattr("missing", "user.a");
        setxattr("file", "user.", b"x", SET);
        setxattr("file", "", b"x", SET);
        setxattr("file", "nonsense.a", b"x", SET);
        getxattr("file", "nonsense.a", 100);
        removexattr("file", "nonsense.a");
        setxattr("file", &format!("user.{}", "n".repeat(250)), b"x", SET);
        getxattr("file", &format!("user.{}", "n".repeat(250)), 100);
        removexattr("file", &format!("user.{}", "n".repeat(250)));
        setxattr("file", &format!("user.{}", "n".repeat(251)), b"x", SET);
        setxattr("file", "user.large", &[b'v'; 3000], SET);
        getxattr("file", "user.large", 0);
        getxattr("file", "user.large", 65536);
        setxattr("file", "user.huge", &[b'v'; 65536], SET);
        getxattr("file", "user.huge", 65536);
        setxattr("file", "user.huge", &[b'v'; 65537], SET);
        removexattr("file", "user.huge");
        setxattr("file", "trusted.a", b"trusted", SET);
        getxattr("file", "trusted.a", 100);
        setxattr("file", "security.test", b"security", SET);
        getxattr("file", "security.test", 100);
        listxattr("file", 1000);
        open(A, "file", O::RDONLY);
        fsetxattr(A, "user.by-fd", b"value");
        fgetxattr(A, "user.by-fd", 100);
        flistxattr(A, 1000);
        fremovexattr(A, "user.by-fd");
        flistxattr(A, 1000);
        mkdir("folder", 0o755);
        setxattr("folder", "user.a", b"value", SET);
        getxattr("folder", "user.a", 100);
        symlink("file", "link");
        lsetxattr("link", "user.a", b"value");
        lsetxattr("link", "trusted.a", b"value");
        lgetxattr("link", "trusted.a", 100);
        lgetxattr("link", "user.large", 65536);
        getxattr("link", "trusted.a", 100);
        mknod("fifo", FileType::Fifo, 0o644, (0, 0));
        setxattr("fifo", "user.a", b"value", SET);
        setxattr("fifo", "trusted.a", b"value", SET);
        getxattr("fifo", "trusted.a", 100);
    }
    "access control lists" {
        file("file", b"for a user");
        getxattr("file", "system.posix_acl_access", 100);
        setxattr("file", "system.posix_acl_access", &acl_for_user(), SET);
        stat("file");
        getxattr("file", "system.posix_acl_access", 100);
        listxattr("file", 100);
        setxattr("file", "system.posix_acl_access", b"nonsense", SET);
        setxattr("file", "system.posix_acl_default", &acl_for_user(), SET);
        chown("file", Some(OTHER), Some(OTHER));
        become_user(USER, USER, &[]);
        content("file");
        open(A, "file", O::RDWR);
        setxattr("file", "system.posix_acl_access", &acl_for_user(), SET);
        become_root();
        chmod("file", 0o644);
        getxattr("file", "system.posix_acl_access", 100);
        become_user(USER, USER, &[]);
        content("file");
        open(A, "file", O::RDWR);
        become_root();
        removexattr("file", "system.posix_acl_access");
        getxattr("file", "system.posix_acl_access", 100);
        stat("file");
        mkdir("folder", 0o755);
        setxattr("folder", "system.posix_acl_default", &acl_for_user(), SET);
        getxattr("folder", "system.posix_acl_default", 100);
        create(A, "folder/file", O::RDWR | O::CREATE, 0o666);
        fstat(A);
        getxattr("folder/file", "system.posix_acl_access", 100);
        umask(0o077);
        create(A, "folder/unmasked", O::RDWR | O::CREATE, 0o666);
        fstat(A);
        mkdir("folder/folder", 0o777);
        stat("folder/folder");
        getxattr("folder/folder", "system.posix_acl_default", 100);
        mknod("folder/fifo", FileType::Fifo, 0o666, (0, 0));
        stat("folder/fifo");
        umask(0o022);
        removexattr("folder", "system.posix_acl_default");
        getxattr("folder", "system.posix_acl_default", 100);
    }
    "an unprivileged caller" {
        file("theirs", b"root's");
        file("readable", b"for all to read");
        chmod("readable", 0o604);
        file("writable", b"for all to write");
        chmod("writable", 0o602);
        chmod("theirs", 0o600);
        file("mine", b"the user's");
        chown("mine", Some(USER), Some(USER));
        file("group's", b"the group's");
        chown("group's", Some(OTHER), Some(OTHER));
        chmod("group's", 0o660);
        file("setuid", b"#!/bin/sh\n");
        chmod("setuid", 0o6777);
        mkdir("closed", 0o700);
        file("closed/file", b"");
        mkdir("searchable", 0o711);
        file("searchable/file", b"found");
        mkdir("listable", 0o744);
        file("listable/file", b"");
        mkdir("open", 0o755);
        chmod("open", 0o777);
        mkdir("sticky", 0o755);
        chmod("sticky", 0o1777);
        file("sticky/theirs", b"");
        mkdir("setgid", 0o755);
        chown("setgid", None, Some(OTHER));
        chmod("setgid", 0o2777);
        setxattr("theirs", "user.a", b"x", SET);
        setxattr("readable", "user.a", b"x", SET);
        setxattr("readable", "trusted.a", b"x", SET);

        become_user(USER, USER, &[]);
        content("theirs");
        open(A, "theirs", O::WRONLY);
        open(A, "theirs", O::RDONLY | O::TRUNC);
        open(A, "theirs", NEITHER);
        open(A, "theirs", O::PATH);
        fstat(A);
        content("readable");
        open(A, "readable", O::RDWR);
        open(A, "readable", NEITHER);
        open(A, "readable", O::RDONLY | O::NOATIME);
        open(A, "readable", O::RDONLY);
        fchmod(A, 0o666);
        fchown(A, Some(USER), None);
        futimens(A, NOW, NOW);
        content("writable");
        open(A, "writable", O::WRONLY | O::APPEND);
        write(A, b"!");
        utimens("writable", NOW, NOW, FOLLOW);
        utimens("writable", at(1_000_000, 0), NOW, FOLLOW);
        utimens("readable", NOW, NOW, FOLLOW);
        truncate("writable", 3);
        truncate("readable", 3);
        content("mine");
        open(A, "mine", O::RDWR | O::NOATIME);
        read(A, 100);
        chmod("mine", 0o400);
        write(A, b"still open for writing");
        open(B, "mine", O::WRONLY);
        chmod("mine", 0o6755);
        stat("mine");
        write(A, b"owners lose them too");
        stat("mine");
        chown("mine", Some(OTHER), None);
        chown("mine", None, Some(OTHER));
        chown("mine", Some(USER), Some(USER));
        utimens("mine", at(1_000_000, 0), at(2_000_000, 0), FOLLOW);
        times("mine");
        chmod("theirs", 0o666);
        chown("theirs", Some(USER), None);
        unlink("theirs");
        rename("theirs", "mine");
        link("theirs", "open/link");
        mkdir("new", 0o755);
        symlink("x", "new");
        mknod("new", FileType::Fifo, 0o644, (0, 0));
        open(A, "new", O::RDWR | O::CREATE);
        open(A, "readable", O::RDONLY | O::CREATE);
        open(A, "theirs", O::RDONLY | O::CREATE);
        stat("closed/file");
        list("closed");
        content("searchable/file");
        list("searchable");
        list("listable");
        stat("listable/file");
        access("theirs", Access::READ_OK);
        access("readable", Access::READ_OK);
        access("readable", Access::WRITE_OK);
        access("closed", Access::EXEC_OK);
        getxattr("theirs", "user.a", 100);
        getxattr("readable", "user.a", 100);
        getxattr("readable", "trusted.a", 100);
        setxattr("readable", "user.b", b"x", SET);
        setxattr("mine", "user.a", b"x", SET);
        setxattr("mine", "trusted.a", b"x", SET);
        setxattr("mine", "security.a", b"x", SET);
        removexattr("readable", "user.a");
        stat("setuid");
        open(A, "setuid", O::WRONLY);
        write(A, b"#!/bin/sh\necho\n");
        stat("setuid");
        content("group's");

        create(A, "open/file", O::RDWR | O::CREATE | O::EXCL, 0o644);
        write(A, b"the user's");
        fstat(A);
        fchmod(A, 0o000);
        open(B, "open/file", O::RDONLY);
        create(A, "open/unwritable", O::RDWR | O::CREATE | O::EXCL, 0o444);
        write(A, b"but for its creator");
        mkdir("open/folder", 0o755);
        stat("open/folder");
        symlink("x", "open/link");
        lstat("open/link");
        mknod("open/fifo", FileType::Fifo, 0o644, (0, 0));
        stat("open/fifo");
        mknod("open/null", FileType::CharacterDevice, 0o644, (1, 3));
        bind(A, "open/socket");
        stat("open/socket");
        unlink("sticky/theirs");
        rename("sticky/theirs", "sticky/mine");
        file("sticky/mine", b"");
        unlink("sticky/mine");
        file("setgid/file", b"");
        stat("setgid/file");
        mkdir("setgid/folder", 0o755);
        stat("setgid/folder");
        create(A, "setgid/set", O::RDWR | O::CREATE | O::EXCL, 0o2775);
        fstat(A);
        chmod("setgid/file", 0o2755);
        stat("setgid/file");

        become_user(USER, USER, &[OTHER]);
        content("group's");
        open(A, "group's", O::RDWR);
        chmod("group's", 0o666);
        chown("mine", None, Some(OTHER));
        stat("mine");
        create(A, "setgid/member's", O::RDWR | O::CREATE | O::EXCL, 0o2775);
        fstat(A);

        become_user(OTHER, OTHER, &[]);
        content("mine");
        unlink("open/file");
        list("open");
        become_root();
        list("open");
    }
    "setuid and setgid are cleared" {
        umask(0);
        create(A, "write", O::RDWR | O::CREATE, 0o6777);
        create(A, "pwrite", O::RDWR | O::CREATE, 0o6777);
        create(A, "truncate", O::RDWR | O::CREATE, 0o6777);
        create(A, "ftruncate", O::RDWR | O::CREATE, 0o6777);
        create(A, "open", O::RDWR | O::CREATE, 0o6777);
        create(A, "allocate", O::RDWR | O::CREATE, 0o6777);
        create(A, "map", O::RDWR | O::CREATE, 0o6777);
        create(A, "copy", O::RDWR | O::CREATE, 0o6777);
        create(A, "by root", O::RDWR | O::CREATE, 0o6777);
        umask(0o022);
        write(A, b"x");
        stat("by root");
        chmod("by root", 0o777);
        become_user(USER, USER, &[]);
        open(A, "write", O::WRONLY | O::APPEND);
        write(A, b"x");
        stat("write");
        open(A, "pwrite", O::WRONLY);
        pwrite(A, b"x", 5);
        stat("pwrite");
        truncate("truncate", 5);
        stat("truncate");
        open(A, "ftruncate", O::WRONLY);
        ftruncate(A, 5);
        stat("ftruncate");
        open(A, "open", O::WRONLY | O::TRUNC);
        stat("open");
        open(A, "copy", O::WRONLY);
        open(B, "pwrite", O::RDONLY);
        copy_file_range((B, Some(0)), (A, Some(0)), 3);
        stat("copy");
        open(A, "allocate", O::WRONLY);
        fallocate(A, ALLOCATE, 0, 10);
        stat("allocate");
        become_root();
    }
    "locks" {
        file("file", b"0123456789");
        open(A, "file", O::RDWR);
        open(B, "file", O::RDWR);
        flock(A, FlockOperation::NonBlockingLockExclusive);
        flock(B, FlockOperation::NonBlockingLockShared);
        flock(A, FlockOperation::NonBlockingLockShared);
        flock(B, FlockOperation::NonBlockingLockShared);
        flock(A, FlockOperation::NonBlockingLockExclusive);
        flock(B, FlockOperation::Unlock);
        flock(A, FlockOperation::NonBlockingLockExclusive);
        close(A);
        flock(B, FlockOperation::NonBlockingLockExclusive);
        lock(B, FlockOperation::NonBlockingLockExclusive);
        open(A, "file", O::RDONLY);
        lock(A, FlockOperation::NonBlockingLockExclusive);
        lock(A, FlockOperation::NonBlockingLockShared);
        lock(B, FlockOperation::NonBlockingUnlock);
    }
    "direct I/O" {
        open(A, "file", O::RDWR | O::CREATE | O::DIRECT);
        pwrite_aligned(A, b'x', 8192, 0);
        pwrite_aligned(A, b'y', 4096, 16384);
        fstat(A);
        pread_aligned(A, 65536, 0);
        pread_aligned(A, 4096, 4096);
        pread_aligned(A, 4096, 65536);
        content("file");
        open(B, "file", O::RDWR);
        pwrite(B, b"buffered", 100);
        pread_aligned(A, 4096, 0);
        pwrite_aligned(A, b'z', 4096, 4096);
        pread(B, 8192, 4000);
        open(C, "file", O::WRONLY | O::DIRECT | O::APPEND);
        pwrite_aligned(C, b'a', 4096, 0);
        content("file");
        open(C, "file", O::RDONLY | O::DIRECT);
        pread_aligned(C, 4096, 0);
        mmap_read(C, 4096);
        mmap_write(A, 4096, 0, b"mapped");
        pread_aligned(C, 4096, 0);
        pread(B, 10, 0);
        getfl(A);
        setfl(B, O::DIRECT);
        getfl(B);
        setfl(A, O::empty());
        pwrite_aligned(A, b'b', 4096, 0);
        content("file");
        open(A, "file", O::RDWR | O::DIRECT | O::TRUNC);
        pread_aligned(A, 4096, 0);
        stat("file");
    }
    "direct I/O, unaligned" {
        open(A, "file", O::RDWR | O::CREATE | O::DIRECT);
        pwrite_aligned(A, b'x', 8192, 0);
        pwrite_aligned(A, b'y', 100, 0);
        pwrite_aligned(A, b'y', 4096, 100);
        pread_aligned(A, 100, 0);
        pread_aligned(A, 4096, 100);
        ftruncate(A, 0);
    }
    "limits" {
        file("file", b"0123456789");
        open(A, "file", O::RDWR);
        limit_file_size(Some(100_000));
        pwrite(A, b"x", 99_999);
        pwrite(A, b"xyz", 99_998);
        pwrite(A, b"x", 100_000);
        ftruncate(A, 100_001);
        truncate("file", 100_001);
        fallocate(A, ALLOCATE, 0, 100_001);
        fallocate(A, F::KEEP_SIZE, 0, 100_001);
        fstat(A);
        limit_file_size(None);
        pwrite(A, b"x", i64::MAX as u64 - 1);
        pwrite(A, b"x", i64::MAX as u64);
        fstat(A);
        ftruncate(A, 0);
    }
    "the largest position" {
        open(A, "file", O::RDWR | O::CREATE);
        seek(A, SeekFrom::Start(i64::MAX as u64));
    }

    // The mirror is known to answer some of the following differently: see `differences`.
    "devices" {
        mknod("null", FileType::CharacterDevice, 0o666, (1, 3));
        open(A, "null", O::RDWR);
    }
    "unnamed files" {
        open(A, ".", O::RDWR | O::TMPFILE);
    }
    "ioctls" {
        file("file", b"");
        open(A, "file", O::RDWR);
        ioctl_getflags(A);
    }
    "birth times" {
        file("file", b"");
        statx_btime("file");
    }
    "names of trusted attributes" {
        file("file", b"");
        setxattr("file", "trusted.a", b"", SET);
        chmod("file", 0o666);
        become_user(USER, USER, &[]);
        listxattr("file", 100);
        become_root();
    }
    "reflinks" {
        file("from", b"content");
        open(A, "from", O::RDONLY);
        open(B, "to", O::RDWR | O::CREATE);
        ioctl_ficlone(B, A);
        ftruncate(B, 0);
    }
    "programs that set the user" {
        program("id", "id");
        run("./id", "-u");
        chown("id", Some(USER), None);
        chmod("id", 0o4755);
        run("./id", "-u");
        unlink("id");
    }
};

/// Calls on `program` while it runs from the source, not from the mirror.
#[rustfmt::skip]
pub const RUNNING: &[Section] = calls! {
    "a running program" {
        open(A, "program", O::RDONLY);
        pread(A, 4, 0);
        open(B, "program", O::WRONLY);
        open(B, "program", O::RDWR);
        open(B, "program", O::WRONLY | O::APPEND);
        open(B, "program", O::WRONLY | O::CREATE);
        open(B, "program", O::RDONLY | O::TRUNC);
        open(B, "program", NEITHER);
        truncate("program", 0);
        pread(A, 4, 0);
        chmod("program", 0o700);
        link("program", "second");
        open(B, "second", O::RDWR);
        rename("program", "renamed");
        open(B, "renamed", O::RDWR);
        unlink("renamed");
        unlink("second");
        file("program", b"another");
        content("program");
    }
};

/// Calls on a filesystem without `O_DIRECT`, in a folder that has `file`.
#[rustfmt::skip]
pub const WITHOUT_DIRECT: &[Section] = calls! {
    "no direct I/O" {
        open(A, "file", O::RDONLY | O::DIRECT);
        open(A, "file", O::RDWR | O::DIRECT);
        open(A, "file", O::WRONLY | O::DIRECT | O::TRUNC);
        content("file");
        open(A, "new", O::RDWR | O::DIRECT | O::CREATE);
        stat("new");
        open(A, "newer", O::RDWR | O::DIRECT | O::CREATE | O::EXCL);
        stat("newer");
        open(A, "file", O::RDWR);
        open(B, "file", O::RDONLY | O::DIRECT);
        pwrite(A, b"written", 0);
        content("file");
        setfl(A, O::DIRECT);
    }
};

/// Calls on a read-only filesystem that has `file`, with an extended attribute, `folder/file` and `link`.
#[rustfmt::skip]
pub const READ_ONLY: &[Section] = calls! {
    "a read-only filesystem" {
        content("file");
        stat("file");
        open(A, "file", O::WRONLY);
        open(A, "file", O::RDWR);
        open(A, "file", O::RDONLY | O::TRUNC);
        open(A, "file", O::WRONLY | O::APPEND);
        open(A, "file", O::WRONLY | O::CREATE);
        open(A, "file", NEITHER);
        open(A, "link", O::WRONLY);
        open(A, "file", O::RDONLY | O::CREATE);
        open(A, "new", O::RDWR | O::CREATE);
        open(A, "new", O::RDONLY | O::CREATE | O::EXCL);
        open(A, "file", O::RDONLY);
        read(A, 100);
        fchmod(A, 0o600);
        fchown(A, Some(0), None);
        futimens(A, NOW, NOW);
        fsetxattr(A, "user.a", b"x");
        fremovexattr(A, "user.a");
        fsync(A);
        mmap_read(A, 4096);
        truncate("file", 0);
        chmod("file", 0o600);
        chown("file", Some(0), Some(0));
        utimens("file", NOW, NOW, FOLLOW);
        setxattr("file", "user.a", b"x", SET);
        removexattr("file", "user.a");
        getxattr("file", "user.a", 100);
        unlink("file");
        rmdir("folder");
        rename("file", "new");
        rename("file", "folder/file");
        link("file", "new");
        symlink("file", "new");
        mkdir("new", 0o755);
        mknod("new", FileType::Fifo, 0o644, (0, 0));
        bind(A, "new");
        list("folder");
        readlink("link");
        access("file", Access::READ_OK);
        access("file", Access::WRITE_OK);
    }
};

/// Calls where `d` is also mounted on `ro`, read-only.
#[rustfmt::skip]
pub const WRITABLE_ELSEWHERE: &[Section] = calls! {
    "a folder that is read-only elsewhere" {
        open(A, "ro/file", O::RDONLY);
        open(B, "d/file", O::RDWR | O::APPEND);
        write(B, b", and more");
        open(C, "ro/file", O::WRONLY);
        open(C, "d/file", O::WRONLY | O::TRUNC);
        content("ro/file");
        write(C, b"new content");
        content("ro/file");
        truncate("ro/file", 3);
        truncate("d/file", 3);
        content("ro/file");
        chmod("ro/file", 0o600);
        chmod("d/file", 0o600);
        stat("ro/file");
        read(A, 100);
        setxattr("ro/file", "user.b", b"x", SET);
        setxattr("d/file", "user.b", b"x", SET);
        getxattr("ro/file", "user.b", 100);
        mkdir("d/new", 0o755);
        mkdir("ro/newer", 0o755);
        rename("d/new", "d/renamed");
        rename("ro/renamed", "ro/new");
        link("d/file", "d/second");
        symlink("x", "d/symlink");
        mknod("d/fifo", FileType::Fifo, 0o644, (0, 0));
        list("ro");
        unlink("ro/second");
        unlink("d/second");
        unlink("d/symlink");
        unlink("d/fifo");
        rmdir("ro/renamed");
        rmdir("d/renamed");
        list("ro");
    }
};

/// Calls where `file` is also mounted on `ro`, read-only.
#[rustfmt::skip]
pub const SINGLE_FILE: &[Section] = calls! {
    "a file that is read-only elsewhere" {
        content("file");
        content("ro");
        open(A, "ro", O::RDONLY);
        open(B, "ro", O::RDWR);
        open(B, "ro", O::RDONLY | O::TRUNC);
        truncate("ro", 0);
        chmod("ro", 0o600);
        setxattr("ro", "user.a", b"x", SET);
        link("ro", "link");
        rename("ro", "renamed");
        unlink("ro");
        open(B, "file", O::RDWR | O::TRUNC);
        write(B, b"written");
        read(A, 100);
        content("ro");
    }
};

/// Calls where `d`, which has two programs, is also mounted on `noexec`, with that flag.
#[rustfmt::skip]
pub const NOEXEC: &[Section] = calls! {
    "a mount without programs" {
        run("d/true", "");
        run("noexec/true", "");
        open(A, "noexec/true", O::RDONLY);
        pread(A, 4, 0);
        run("d/true", "");
    }
    "a mount without programs that is seen first" {
        open(A, "noexec/second", O::RDWR);
        pread(A, 4, 0);
        close(A);
        run("noexec/second", "");
        run("d/second", "");
    }
};

/// Calls where `d`, which has a set-user-ID program, is also mounted on `nosuid`, with the flags nosuid and nodev.
#[rustfmt::skip]
pub const NOSUID: &[Section] = calls! {
    "a mount without rights" {
        run("nosuid/id", "-u");
        mknod("nosuid/null", FileType::CharacterDevice, 0o666, (1, 3));
        stat("nosuid/null");
        open(A, "nosuid/null", O::RDWR);
    }
};

/// Calls where `d` is also mounted on `again`.
#[rustfmt::skip]
pub const TWO_MOUNTS: &[Section] = calls! {
    "two mounts" {
        content("d/file");
        content("again/file");
        rename("d/file", "again/renamed");
        rename("again/file", "d/renamed");
        link("d/file", "again/link");
        link("again/file", "d/link");
        rename("d/file", "d/renamed");
        link("again/renamed", "again/link");
        rename("again/renamed", "again/file");
        unlink("d/link");
        list("again");
    }
};

/// Calls that only look at `d`, on which a test may have mounted a filesystem.
#[rustfmt::skip]
pub const LOOK: &[Section] = calls! {
    "what is mounted" {
        list("d");
        stat("d");
        content("d/file");
        content("d/mounted");
        statfs("d");
    }
};
