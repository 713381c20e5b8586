//! The doctor's steps.

use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use fuse_backing::error::{BackingError, DeviceError, NegotiateError, NotPermitted};
use fuse_backing::init::{InitFlags, MaxStackDepth, negotiate};
use fuse_backing::{Access, BackingFile, FuseDevice};
use rustix::fs::OFlags;
use rustix::io::Errno;
use rustix::thread::{CapabilitySet, capabilities};

use crate::advice::{CHECK_THE_LOG, Failure};
use crate::client::{self, PATIENCE, within};
use crate::probe::{Probed, Verdict};
use crate::report::{Feature, Outcome, PathReport, Report, Step};
use crate::scratch::{Connection, Device, Tmpfs, enter_mount_namespace};
use crate::server::{Offer, PASSED_THROUGH, SERVED};

/// The size of the files: several READ requests.
const SIZE: usize = 1 << 20;

pub(crate) fn examine(paths: &[PathBuf]) -> Report {
    let content = content();
    let mut steps = Steps::default();

    let device = steps.run("device node", Ok(()), |()| open_device());
    steps.note("ioctl", by_ref(&device), try_ioctl);
    let capable = steps.run("capability", Ok(()), |()| look_at_capability());
    steps.note("user namespace", Ok(()), |()| look_at_user_namespace());
    let sync_init = try_sync_init(by_ref(&device));

    let needed = device.and_then(|device| capable.map(|()| device));
    let scratch = steps.run("scratch mount", needed, |device| mount(device, &content));
    let offer = steps.run("offered", by_ref(&scratch), look_at_offer);
    let negotiated = steps.run("negotiated", by_ref(&offer), look_at_reply);

    let mounted = by_ref(&scratch).map(|scratch| &scratch.connection);
    let ready = negotiated.and(by_ref(&scratch));
    let registered = steps.run("registration", ready, register);
    let needed = registered.and(mounted);
    steps.note("passthrough read", needed, |connection| {
        read_passed_through(connection, &content)
    });
    let needed = by_ref(&offer).and(mounted);
    steps.note("plain read", needed, |connection| {
        read_served(connection, &content)
    });
    let closed = steps.run("close", registered.and(mounted), close);
    let path_fds = try_path_fd(ready);

    let (backing, connection) = match scratch {
        Ok(scratch) => (Ok((scratch.tmpfs, scratch.private)), Ok(scratch.connection)),
        Err(blocker) => (Err(blocker), Err(blocker)),
    };
    // The connection still exists here, so a file that is still registered would keep the mount busy.
    steps.note("unmount", closed.and(backing), |(tmpfs, private)| {
        unmount(tmpfs, private)
    });

    let mut depths = Depths {
        one: negotiated.and(connection),
        two: None,
        content,
    };
    let paths = paths.iter().map(|path| depths.examine(path)).collect();
    Report {
        steps: steps.0,
        path_fds,
        sync_init,
        paths,
    }
}

/// The result of a step for later steps, or the name of the step that blocks it.
type Done<T> = Result<T, &'static str>;

fn by_ref<T>(done: &Done<T>) -> Done<&T> {
    done.as_ref().map_err(|blocker| *blocker)
}

fn needs_step(blocker: &str) -> String {
    format!("needs `{blocker}`")
}

/// What to report, and the result for later steps.
type Found<T> = Result<(String, T), Trouble>;

/// Why a step has no result.
enum Trouble {
    Failed(Failure),
    /// The step cannot find out, which counts as neither success nor failure.
    Unknown(String),
}

impl<F: Into<Failure>> From<F> for Trouble {
    fn from(failure: F) -> Self {
        Self::Failed(failure.into())
    }
}

#[derive(Default)]
struct Steps(Vec<Step>);

impl Steps {
    /// Runs a step, unless another step blocks it.
    fn run<N, T>(
        &mut self,
        name: &'static str,
        needed: Done<N>,
        step: impl FnOnce(N) -> Found<T>,
    ) -> Done<T> {
        let (outcome, done) = match needed.map(step) {
            Ok(Ok((found, done))) => (Outcome::Ok(found), Ok(done)),
            Ok(Err(Trouble::Failed(failure))) => (Outcome::Failed(failure), Err(name)),
            Ok(Err(Trouble::Unknown(why))) => (Outcome::Skipped(why), Err(name)),
            Err(blocker) => (Outcome::Skipped(needs_step(blocker)), Err(blocker)),
        };
        self.0.push(Step { name, outcome });
        done
    }

    /// Runs a step that no other step needs.
    fn note<N>(
        &mut self,
        name: &'static str,
        needed: Done<N>,
        step: impl FnOnce(N) -> Result<String, Trouble>,
    ) {
        // `run` has recorded the outcome.
        let _ = self.run(name, needed, |needed| Ok((step(needed)?, ())));
    }
}

fn open_device() -> Found<Device> {
    let device = FuseDevice::open()?;
    let found = "/dev/fuse, the character device 10:229".to_owned();
    Ok((found, Arc::new(device)))
}

/// Whether the kernel knows the ioctl. A device that is not mounted refuses every registration. A
/// kernel built without passthrough can be recognized only on a mounted device.
fn try_ioctl(device: &Device) -> Result<String, Trouble> {
    match device.backing_open(device) {
        Err(BackingError::NotAttached(_)) => {
            Ok("the kernel knows FUSE_DEV_IOC_BACKING_OPEN".to_owned())
        }
        Err(error) => Err(error.into()),
        Ok(id) => {
            let closed = device.backing_close(id);
            let closed = closed.map_or_else(|e| e.to_string(), |()| "and closed it".to_owned());
            let cause = format!("a device that is not mounted registered a file: {closed}");
            Err(Failure::new(cause, CHECK_THE_LOG).into())
        }
    }
}

fn look_at_capability() -> Found<()> {
    let sets = capabilities(None).map_err(|errno| {
        let cause = format!("capget(2) failed: {errno}");
        Failure::new(cause, "find the seccomp profile that denies it")
    })?;
    if sets.effective.contains(CapabilitySet::SYS_ADMIN) {
        Ok((
            "CAP_SYS_ADMIN is effective in this user namespace".to_owned(),
            (),
        ))
    } else {
        Err(NotPermitted::MissingCapability.into())
    }
}

fn look_at_user_namespace() -> Result<String, Trouble> {
    let everything = InitFlags::PASSTHROUGH | InitFlags::INIT_EXT;
    let answer = negotiate(everything, InitFlags::empty(), MaxStackDepth::One);
    if let Err(NegotiateError::NotPermitted(why @ NotPermitted::NotInInitialUserNamespace)) = answer
    {
        return Err(why.into());
    }
    // `negotiate` also succeeds if it cannot find out.
    match std::fs::read_link("/proc/thread-self/ns/user") {
        Ok(name) => Ok(format!("{}, the initial one", name.display())),
        Err(e) => Err(Trouble::Unknown(format!("cannot read it from /proc: {e}"))),
    }
}

struct Scratch {
    tmpfs: Tmpfs,
    connection: Connection,
    /// Whether the mount namespace is private.
    private: rustix::io::Result<()>,
}

fn mount(device: Device, content: &Arc<[u8]>) -> Found<Scratch> {
    let private = enter_mount_namespace()?;
    let scratch = Scratch {
        tmpfs: Tmpfs::new(content)?,
        connection: Connection::new(device, MaxStackDepth::One, Arc::clone(content))?,
        private,
    };
    let found = "tmpfs and FUSE, in a new mount namespace".to_owned();
    Ok((found, scratch))
}

fn look_at_offer(scratch: &Scratch) -> Found<Offer> {
    let offer = scratch.connection.offer()?;
    let version = format!("protocol {}.{}", offer.major, offer.minor);
    if offer.flags.contains(InitFlags::PASSTHROUGH) {
        return Ok((format!("{version}, with FUSE_PASSTHROUGH"), offer));
    }
    // The error of a registration may say why.
    let why = match scratch.tmpfs.open(OFlags::RDONLY) {
        Ok(file) => scratch.connection.device.backing_open(file).err(),
        Err(_) => None,
    };
    let mut failure = match why {
        Some(why @ (BackingError::UnsupportedKernel | BackingError::DisabledInKernel)) => {
            Failure::from(why)
        }
        _ => NegotiateError::NotOffered.into(),
    };
    failure.cause = format!("{version}, without FUSE_PASSTHROUGH: {}", failure.cause);
    Err(failure.into())
}

fn look_at_reply(offer: &Offer) -> Found<()> {
    let reply = offer.negotiated?;
    Ok((format!("max_stack_depth {}", reply.max_stack_depth), ()))
}

fn register(scratch: &Scratch) -> Found<()> {
    let Scratch {
        tmpfs, connection, ..
    } = scratch;
    let file = tmpfs.open(OFlags::RDONLY).map_err(cannot_open_backing)?;
    let backing = BackingFile::open(Arc::clone(&connection.device), file, Access::ReadOnly)?;
    let found = format!("backing id {}", backing.id().as_raw());
    connection.shared.swap_backing(Some(backing));
    Ok((found, ()))
}

fn cannot_open_backing(errno: Errno) -> Failure {
    Failure::new(
        format!("cannot open the backing file: {errno}"),
        CHECK_THE_LOG,
    )
}

fn read_passed_through(connection: &Connection, content: &[u8]) -> Result<String, Trouble> {
    let reads = &connection.shared.passed_through_reads;
    match read(connection, PASSED_THROUGH, reads, content)? {
        0 => Ok(format!("{SIZE} correct bytes, 0 READ requests")),
        reads => Err(Failure::new(
            format!("the server got {reads} READ requests despite passthrough"),
            CHECK_THE_LOG,
        )
        .into()),
    }
}

/// The control: without passthrough, READ requests do reach the server.
fn read_served(connection: &Connection, content: &[u8]) -> Result<String, Trouble> {
    let reads = &connection.shared.served_reads;
    match read(connection, SERVED, reads, content)? {
        0 => Err(Failure::new(
            "the server got no READ request: the passthrough read proves nothing",
            CHECK_THE_LOG,
        )
        .into()),
        reads => Ok(format!(
            "without passthrough, for comparison: {reads} READ requests"
        )),
    }
}

/// Makes a client read the file, and returns the number of READ requests.
fn read(
    connection: &Connection,
    name: &str,
    reads: &AtomicU64,
    content: &[u8],
) -> Result<u64, Failure> {
    let failed = |cause| Failure::new(cause, CHECK_THE_LOG);
    let root = connection.root().map_err(|e| failed(e.to_string()))?;
    let ran = client::run(client::READ, name, root.into());
    ran.result?;
    if ran.printed != client::summary(content) {
        return Err(failed("the client read wrong bytes".to_owned()));
    }
    Ok(reads.load(Ordering::SeqCst))
}

fn close(connection: &Connection) -> Found<()> {
    let shared = &connection.shared;
    // The kernel sends RELEASE some time after close(2).
    let is_open = || shared.passed_through_opens.load(Ordering::SeqCst) > 0;
    within(PATIENCE, || !is_open());
    if is_open() {
        let cause = "no RELEASE came after the client ended";
        return Err(Failure::new(cause, CHECK_THE_LOG).into());
    }
    if let Some(backing) = shared.swap_backing(None) {
        backing.close().map_err(|error| error.cause())?;
    }
    Ok(("closed after the RELEASE".to_owned(), ()))
}

fn unmount(tmpfs: Tmpfs, private: rustix::io::Result<()>) -> Result<String, Trouble> {
    if let Err(errno) = private {
        let why = format!("/ is not a mount point that can be made private: {errno}");
        return Err(Trouble::Unknown(why));
    }
    tmpfs.unmount().map_err(|errno| {
        let cause = match errno {
            Errno::BUSY => "the closed backing file is still in use".to_owned(),
            errno => format!("cannot unmount the backing filesystem: {errno}"),
        };
        Failure::new(cause, CHECK_THE_LOG)
    })?;
    Ok("nothing pins the backing filesystem".to_owned())
}

/// Since Linux 6.12, `O_PATH` fds can be registered.
fn try_path_fd(ready: Done<&Scratch>) -> Feature {
    let Scratch {
        tmpfs, connection, ..
    } = match ready {
        Ok(scratch) => scratch,
        Err(blocker) => return Feature::unknown(needs_step(blocker)),
    };
    let file = match tmpfs.open(OFlags::PATH) {
        Ok(file) => file,
        Err(errno) => return Feature::unknown(cannot_open_backing(errno).cause),
    };
    match BackingFile::open(&*connection.device, file, Access::ReadOnly) {
        Ok(backing) => {
            drop(backing);
            Feature::present("O_PATH fds can be registered (since Linux 6.12)")
        }
        Err(error @ BackingError::PathOnlyFd) => Feature::absent(error),
        Err(error) => Feature::unknown(error),
    }
}

/// On a separate device, because it changes how the device works.
fn try_sync_init(device: Done<&Device>) -> Feature {
    if let Err(blocker) = device {
        return Feature::unknown(needs_step(blocker));
    }
    let device = match FuseDevice::open() {
        Ok(device) => device,
        Err(error) => return Feature::unknown(error),
    };
    match device.sync_init() {
        Ok(()) => Feature::present("mount(2) can wait for INIT (since Linux 6.18)"),
        Err(error @ DeviceError::UnsupportedKernel { .. }) => Feature::absent(error),
        Err(error) => Feature::unknown(error),
    }
}

/// Connections to try files at a PATH with, by `max_stack_depth`.
struct Depths {
    one: Done<Connection>,
    /// Made when the first file needs it.
    two: Option<Result<Connection, Failure>>,
    content: Arc<[u8]>,
}

impl Depths {
    fn examine(&mut self, path: &Path) -> PathReport {
        let (filesystem, verdict) = probe(path, self.one.as_ref().ok());
        let max_stack_depth = match (verdict, &self.one) {
            (Some(Verdict::Yes), _) => Ok(1),
            (Some(Verdict::TooDeep(_)), _) => self.try_two(path),
            (Some(Verdict::No(failure)), _) => Err(failure),
            (None, Err(blocker)) => {
                let cause = format!("not tried, {}", needs_step(blocker));
                Err(Failure::new(cause, ""))
            }
            (None, Ok(_)) => Err(did_not_tell()),
        };
        PathReport {
            path: path.to_owned(),
            filesystem,
            max_stack_depth,
        }
    }

    fn try_two(&mut self, path: &Path) -> Result<u32, Failure> {
        let two = self.two.get_or_insert_with(|| connect_two(&self.content));
        let two = two.as_ref().map_err(Failure::clone)?;
        match probe(path, Some(two)).1 {
            Some(Verdict::Yes) => Ok(2),
            Some(Verdict::TooDeep(failure) | Verdict::No(failure)) => Err(failure),
            None => Err(did_not_tell()),
        }
    }
}

fn connect_two(content: &Arc<[u8]>) -> Result<Connection, Failure> {
    let device = Arc::new(FuseDevice::open()?);
    let connection = Connection::new(device, MaxStackDepth::Two, Arc::clone(content))?;
    let _ = connection.offer()?.negotiated?;
    Ok(connection)
}

/// The filesystem's name, and, given a connection, whether a file there can be registered.
fn probe(path: &Path, connection: Option<&Connection>) -> (Option<String>, Option<Verdict>) {
    let stdin = match connection.map(Connection::device).transpose() {
        Ok(device) => device.map_or_else(Stdio::null, Stdio::from),
        Err(e) => return (None, Some(Verdict::No(Failure::new(e, CHECK_THE_LOG)))),
    };
    let ran = client::run(client::PROBE, path, stdin);
    let probed = Probed::parse(&ran.printed);
    let verdict = match ran.result {
        Ok(()) => probed.verdict,
        Err(failure) => Some(Verdict::No(failure)),
    };
    (probed.filesystem, verdict)
}

fn did_not_tell() -> Failure {
    Failure::new("the client process gave no answer", CHECK_THE_LOG)
}

/// Random content (xorshift64), so that a misplaced page changes the checksum.
fn content() -> Arc<[u8]> {
    let mut state = 0x9e37_79b9_7f4a_7c15_u64;
    let words = std::iter::repeat_with(|| {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        state.to_le_bytes()
    });
    words.take(SIZE / 8).flatten().collect()
}
