//! `ByAccess` with registrar threads in Landlock domains: the kernel holds clients to the grant, whatever the server
//! replies.

use std::fs::{self, File};
use std::io::{Seek, SeekFrom, Write};
use std::os::fd::{AsFd, AsRawFd};
use std::path::Path;

use fuse_backing::error::{BackingError, OpenError, RegistrarThreadError, ServerReason};
use fuse_backing::rights::{ByAccess, CapabilitySet, Lowered, RegistrarThread};
use fuse_backing::{Access, BackingTable, OpenFile, Register, ServerFile, error::Errno};
use landlock::RulesetError;
use libtest_mimic::Failed;
use macro_rules_attribute::apply;
use rustix::fs::{MemfdFlags, OFlags, memfd_create};
use rustix::mount::{MountFlags, mount};
use rustix::thread::{UnshareFlags, unshare_unsafe};

use super::{CONTENT, Device, Place, WRITTEN, known};
use crate::backing_open::{assert_no_overlayfs, overlay};
use crate::client::errno;
use crate::domain::restrict;
use crate::expect;
use crate::fuse::Init;
use crate::sandbox::Sandbox;
use crate::thread::apart;

type Thread = RegistrarThread<Lowered<Device>>;

fn thread(device: Device, access: Access) -> Result<Thread, RegistrarThreadError<RulesetError>> {
    let lowered = Lowered::permanently(device, CapabilitySet::empty());
    RegistrarThread::spawn(lowered, move || restrict(access))
}

fn registrars(place: &Place) -> Result<ByAccess<Thread>, RegistrarThreadError<RulesetError>> {
    ByAccess::new(|access| thread(place.connection.device(), access))
}

/// Without Landlock in the kernel, the preparation of the threads fails, and the server gets the error.
fn assert_no_landlock(place: &Place) {
    for access in [Access::ReadOnly, Access::WriteOnly] {
        assert!(apart(|| restrict(access)).is_err(), "{access}");
    }
    let refused = registrars(place);
    assert!(
        matches!(refused, Err(RegistrarThreadError::Prepare(_))),
        "{refused:?}"
    );
}

/// Registers the file for each grant, and checks what each client can do.
fn holds_clients_to_the_grant(sandbox: &Sandbox, file: &mut File) -> Result<(), Failed> {
    let denied = errno(Errno::IO);
    let (written, changed) = ("written", CONTENT.replacen("con", WRITTEN, 1));
    // The results of clients that open for reading, for both, and for writing; and the content afterwards.
    let all = [CONTENT, written, written];
    let expected = [
        (Access::ReadOnly, [CONTENT, &denied, &denied], CONTENT),
        (Access::WriteOnly, [&denied, &denied, written], &changed),
        (Access::ReadWrite, all, &changed),
    ];
    // Depth 2, for files on overlayfs.
    let place = Place::new(sandbox, Init::passthrough(2), file)?;
    if !expect::landlock() {
        assert_no_landlock(&place);
        return Ok(());
    }
    let registrars = registrars(&place)?;
    let device = place.connection.device();
    let mut check = |registrar: &dyn Register, grant, clients: [&str; 3], after: &str| {
        file.seek(SeekFrom::Start(0))?;
        file.write_all(CONTENT.as_bytes())?;
        let id = registrar.register(file.as_fd(), grant)?;
        let raw = id.as_raw();
        place.answer_with(id);
        for (how, expected) in ["r", "rw", "w"].into_iter().zip(clients) {
            assert_eq!(place.client(how)?, expected, "{how} of {grant}");
        }
        registrar.unregister(known(raw))?;
        assert_eq!(content(file)?, after, "{grant}");
        Ok::<(), Failed>(())
    };
    for (grant, clients, after) in expected {
        check(&registrars, grant, clients, after)?;
        // The control: the device itself ignores the grant.
        check(&device, grant, all, &changed)?;
    }
    assert_eq!(place.asked(), (0, 0));
    Ok(())
}

fn content(file: &File) -> Result<String, Failed> {
    Ok(fs::read_to_string(format!(
        "/proc/self/fd/{}",
        file.as_raw_fd()
    ))?)
}

#[apply(needs_passthrough)]
fn on_tmpfs(sandbox: &Sandbox) -> Result<(), Failed> {
    holds_clients_to_the_grant(sandbox, &mut sandbox.tmpfs()?.file("file", "")?)
}

#[apply(needs_passthrough)]
fn unlinked(sandbox: &Sandbox) -> Result<(), Failed> {
    let tmpfs = sandbox.tmpfs()?;
    let mut file = tmpfs.file("file", "")?;
    fs::remove_file(tmpfs.path().join("file"))?;
    holds_clients_to_the_grant(sandbox, &mut file)
}

#[apply(needs_passthrough)]
fn on_overlayfs(sandbox: &Sandbox) -> Result<(), Failed> {
    if !expect::overlayfs() {
        return assert_no_overlayfs(sandbox);
    }
    let tmpfs = sandbox.tmpfs()?;
    let lower = sandbox.folder("lower")?;
    let path = overlay(sandbox, &tmpfs, &lower)?.join("file");
    holds_clients_to_the_grant(sandbox, &mut created(&path)?)
}

fn created(path: &Path) -> Result<File, Failed> {
    let mut options = File::options();
    Ok(options.read(true).write(true).create_new(true).open(path)?)
}

/// The file is on a mount that exists only in another mount namespace.
#[apply(needs_passthrough)]
#[allow(unsafe_code)]
fn other_mount_namespace(sandbox: &Sandbox) -> Result<(), Failed> {
    let folder = sandbox.folder("elsewhere")?;
    let mut elsewhere = apart(|| {
        // SAFETY: neither touches the table of file descriptors.
        unsafe { unshare_unsafe(UnshareFlags::NEWNS | UnshareFlags::FS) }?;
        mount("tmpfs", &folder, "tmpfs", MountFlags::empty(), None)?;
        // The namespace exists as long as this is open.
        let namespace = File::open("/proc/thread-self/ns/mnt")?;
        let file = created(&folder.join("file"))?;
        Ok::<_, Failed>((namespace, file))
    })?;
    assert!(!folder.join("file").exists());
    holds_clients_to_the_grant(sandbox, &mut elsewhere.1)
}

/// Landlock does not restrict a memfd, so that the registrar must refuse every narrower grant.
#[apply(needs_passthrough)]
fn memfd(sandbox: &Sandbox) -> Result<(), Failed> {
    let mut file = File::from(memfd_create("memfd", MemfdFlags::CLOEXEC)?);
    file.write_all(CONTENT.as_bytes())?;
    let place = Place::new(sandbox, Init::passthrough(1), &file)?;
    if !expect::landlock() {
        assert_no_landlock(&place);
        return Ok(());
    }
    let registrars = registrars(&place)?;
    for grant in [Access::ReadOnly, Access::WriteOnly] {
        let refused = registrars.register(file.as_fd(), grant);
        assert_eq!(refused, Err(BackingError::NotEnforceable), "{grant}");
    }
    let table: BackingTable<_> = BackingTable::new(&registrars);
    let open = |flags, access| table.open(&1, flags, ServerFile::new(&file).access(access));
    for (flags, access) in [
        (OFlags::RDONLY, Access::ReadOnly),
        (OFlags::WRONLY, Access::WriteOnly),
    ] {
        let reason = ServerReason::Refused(BackingError::NotEnforceable);
        assert_eq!(open(flags, access)?.server_reason(), Some(reason));
    }
    // The refusal concerns this file alone.
    assert_eq!(table.stats().refused, None);
    assert!(open(OFlags::RDWR, Access::ReadWrite)?.is_passthrough());

    // The control: through a registration that is not refused, a client writes.
    let read_only = thread(place.connection.device(), Access::ReadOnly)?;
    place.answer_with(read_only.register(file.as_fd(), Access::ReadOnly)?);
    assert_eq!(place.client("rw")?, "written");
    assert_eq!(content(&file)?, CONTENT.replacen("con", WRITTEN, 1));
    assert_eq!(place.asked(), (0, 0));

    // Landlock does not restrict a memfd in huge pages either. The kernel refuses to register it.
    let flags = MemfdFlags::CLOEXEC | MemfdFlags::HUGETLB;
    match memfd_create("huge", flags) {
        Ok(huge) => {
            let refused = read_only.register(huge.as_fd(), Access::ReadOnly);
            assert_eq!(refused, Err(BackingError::StackedTooDeep));
        }
        // The kernel is without CONFIG_HUGETLBFS.
        Err(failed) => assert_eq!(failed, Errno::NOSYS),
    }
    Ok(())
}

/// The first open decides for which access the inode is registered, until its last release.
#[apply(needs_passthrough)]
fn in_a_table(sandbox: &Sandbox) -> Result<(), Failed> {
    let tmpfs = sandbox.tmpfs()?;
    let file = tmpfs.file("file", CONTENT)?;
    let path = tmpfs.path().join("file");
    let place = Place::new(sandbox, Init::passthrough(1), &file)?;
    if !expect::landlock() {
        assert_no_landlock(&place);
        return Ok(());
    }
    let table: BackingTable<_> = BackingTable::new(registrars(&place)?);
    let (reader, writer) = (File::open(&path)?, file);
    let wanted = Access::ReadWrite;
    let reading = |grant: Option<Access>| {
        let file = ServerFile::new(&reader);
        let file = grant.map_or(file, |grant| file.grant(grant));
        table.open(&1, OFlags::RDONLY, file)
    };
    let writing = || table.open(&1, OFlags::RDWR, ServerFile::new(&writer));
    let id = |open: &OpenFile<_>| open.id().map(|id| known(id.as_raw()));

    let open = reading(None)?;
    place.answer_with(id(&open).ok_or("no passthrough")?);
    let registered = Access::ReadOnly;
    let refused = writing().map(drop);
    assert_eq!(
        refused,
        Err(OpenError::GrantExceeded { registered, wanted })
    );
    // The kernel refuses the client even if the server answers with the id.
    assert_eq!(place.client("rw")?, errno(Errno::IO));
    assert_eq!(place.client("r")?, CONTENT);
    drop(open);

    for grant in [None, Some(wanted)] {
        // After the release it can be registered for more: by a writer, or by a reader with a wider grant.
        let open = grant.map_or_else(writing, |grant| reading(Some(grant)))?;
        place.answer_with(id(&open).ok_or("no passthrough")?);
        assert!(writing()?.is_passthrough());
        assert_eq!(place.client("rw")?, "written");
        drop(open);
    }
    assert_eq!(
        fs::read_to_string(&path)?,
        CONTENT.replacen("con", WRITTEN, 1)
    );
    assert_eq!(place.asked(), (0, 0));
    Ok(())
}
