//! The table's concurrency, explored by shuttle: the ioctls replaced by a model of the kernel that
//! objects to whatever the real one answers with `EIO`.

#![allow(clippy::unwrap_used, clippy::panic, clippy::expect_used)]
#![allow(clippy::cast_possible_truncation)]

use std::collections::{HashMap, VecDeque};
use std::fs::File;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, RawFd};

use rustix::io::Errno;
use shuttle::rand::{Rng, thread_rng};
use shuttle::sync::Arc;
use shuttle::thread;

use crate::FuseDevice;
use crate::backing::BackingId;
use crate::error::{BackingCloseCause, BackingOpenError, NotPermitted};
use crate::open::{Access, OpenFlags};
use crate::table::{BackingTable, OpenFile, ServerReason, TableOpenError};

/// By the device's fd, which is unique while it is open. std's lock: not a point where threads switch,
/// and never held across one.
static KERNELS: std::sync::Mutex<Option<HashMap<RawFd, Kernel>>> = std::sync::Mutex::new(None);

#[derive(Default)]
struct Kernel {
    /// Registered: `st_ino` by id.
    ids: HashMap<i32, u64>,
    last_id: i32,
    /// Of each inode that clients have open: the id, or none in server mode, and how often.
    open: HashMap<u64, (Option<i32>, usize)>,
    /// The results of the next registrations; then they succeed.
    errors: VecDeque<BackingOpenError>,
    /// Whether the capability to close is there.
    may_close: bool,
    most_ids: usize,
}

fn kernel<T>(device: RawFd, f: impl FnOnce(&mut Kernel) -> T) -> T {
    let mut kernels = KERNELS
        .lock()
        .unwrap_or_else(std::sync::PoisonError::into_inner);
    f(kernels.get_or_insert_default().entry(device).or_default())
}

/// Stands for `device::backing_open`.
pub(crate) fn backing_open(
    device: BorrowedFd<'_>,
    backing: BorrowedFd<'_>,
) -> Result<BackingId, BackingOpenError> {
    thread::yield_now();
    let inode = rustix::fs::fstat(backing).unwrap().st_ino;
    let result = kernel(device.as_raw_fd(), |kernel| {
        if let Some(error) = kernel.errors.pop_front() {
            return Err(error);
        }
        kernel.last_id += 1;
        kernel.ids.insert(kernel.last_id, inode);
        kernel.most_ids = kernel.most_ids.max(kernel.ids.len());
        Ok(BackingId::from_raw(kernel.last_id).unwrap())
    });
    thread::yield_now();
    result
}

/// Stands for `device::backing_close`.
pub(crate) fn backing_close(
    device: BorrowedFd<'_>,
    id: &BackingId,
) -> Result<(), BackingCloseCause> {
    thread::yield_now();
    let result = kernel(device.as_raw_fd(), |kernel| {
        if !kernel.may_close {
            return Err(BackingCloseCause::NotPermitted(
                NotPermitted::MissingCapability,
            ));
        }
        match kernel.ids.remove(&id.as_raw()) {
            Some(_) => Ok(()),
            None => Err(BackingCloseCause::UnknownId),
        }
    });
    thread::yield_now();
    result
}

type Device = std::sync::Arc<FuseDevice<File>>;
type Table = BackingTable<Device>;

/// A device, two backing files, and what a server and its clients do with them.
#[derive(Clone)]
struct World {
    table: Arc<Table>,
    handle: Device,
    device: RawFd,
    files: std::sync::Arc<[File; 3]>,
}

impl World {
    fn new() -> Self {
        // Not a FUSE device: nothing but its number is looked at.
        let device = FuseDevice::unchecked(File::open("/dev/null").unwrap());
        let number = device.as_fd().as_raw_fd();
        kernel(number, |kernel| {
            *kernel = Kernel {
                may_close: true,
                ..Kernel::default()
            };
        });
        let file = || tempfile::tempfile().unwrap();
        let handle = std::sync::Arc::new(device);
        Self {
            table: Arc::new(BackingTable::new(std::sync::Arc::clone(&handle))),
            handle,
            device: number,
            files: std::sync::Arc::new([file(), file(), file()]),
        }
    }

    fn kernel<T>(&self, f: impl FnOnce(&mut Kernel) -> T) -> T {
        kernel(self.device, f)
    }

    fn open(&self, inode: u64) -> OpenFile<Device> {
        let file = &self.files[inode as usize];
        self.table.open(&inode, 0, file, Access::ReadOnly).unwrap()
    }

    /// The kernel reads the reply: the rules that it answers with EIO.
    fn reply(&self, inode: u64, open: &OpenFile<Device>) {
        thread::yield_now();
        let id = open.reply(OpenFlags::empty()).unwrap().backing_id();
        let id = (id != 0).then_some(id);
        self.kernel(|kernel| {
            if let Some(id) = id {
                assert!(
                    kernel.ids.contains_key(&id),
                    "EIO: id {id} is not registered"
                );
            }
            let (mode, opens) = kernel.open.entry(inode).or_insert((id, 0));
            assert_eq!(
                *mode, id,
                "EIO: inode {inode} is open in another mode or with another id"
            );
            *opens += 1;
        });
        thread::yield_now();
    }

    /// close(2), upon which the kernel counts and sends RELEASE.
    fn release(&self, inode: u64, open: OpenFile<Device>) {
        thread::yield_now();
        self.kernel(|kernel| {
            let (_, opens) = kernel.open.get_mut(&inode).unwrap();
            *opens -= 1;
            if *opens == 0 {
                kernel.open.remove(&inode);
            }
        });
        drop(open);
    }

    fn assert_empty(&self) {
        let left = self.kernel(|kernel| kernel.ids.len());
        assert_eq!((left, self.table.stats().ids), (0, 0));
        assert!(self.table.list().is_empty(), "{}", self.table.list());
    }
}

impl Drop for World {
    fn drop(&mut self) {
        if Arc::strong_count(&self.table) == 1 {
            kernel(self.device, |kernel| *kernel = Kernel::default());
        }
    }
}

fn explore(test: impl Fn() + Send + Sync + 'static) {
    let iterations = if cfg!(debug_assertions) {
        1_500
    } else {
        20_000
    };
    let test = std::sync::Arc::new(test);
    let again = std::sync::Arc::clone(&test);
    shuttle::check_random(move || test(), iterations);
    shuttle::check_pct(move || again(), iterations, 3);
}

fn threads(world: &World, count: usize, f: impl Fn(&World, usize) + Clone + Send + 'static) {
    let threads: Vec<_> = (0..count)
        .map(|n| {
            let (world, f) = (world.clone(), f.clone());
            thread::spawn(move || f(&world, n))
        })
        .collect();
    for thread in threads {
        thread.join().unwrap();
    }
}

#[test]
fn opens_and_releases() {
    explore(|| {
        let world = World::new();
        threads(&world, 3, |world, n| {
            for round in 0..2 {
                let inode = ((n + round) % 2) as u64;
                let open = world.open(inode);
                world.reply(inode, &open);
                world.release(inode, open);
            }
        });
        world.assert_empty();
    });
}

#[test]
fn shares() {
    explore(|| {
        let world = World::new();
        threads(&world, 3, |world, _| {
            for _ in 0..2 {
                let open = world.table.share(&0, 0).unwrap_or_else(|| world.open(0));
                world.reply(0, &open);
                world.release(0, open);
            }
        });
        world.assert_empty();
    });
}

#[test]
fn modes_do_not_mix() {
    explore(|| {
        let world = World::new();
        world.kernel(|kernel| kernel.errors.push_back(BackingOpenError::OutOfMemory));
        threads(&world, 3, |world, n| {
            for _ in 0..2 {
                let served = if n == 0 { world.table.serve(&0) } else { None };
                let open = served.unwrap_or_else(|| world.open(0));
                world.reply(0, &open);
                world.release(0, open);
            }
        });
        world.assert_empty();
    });
}

#[test]
fn idle_ids_and_limits() {
    explore(|| {
        let world = World::new();
        world.table.set_limit(2);
        world.table.set_idle_limit(1);
        threads(&world, 3, |world, n| {
            for round in 0..2 {
                let inode = ((n + round) % 3) as u64;
                let open = world.open(inode);
                world.reply(inode, &open);
                if n == 0 && round == 1 {
                    world.table.set_idle_limit(2);
                    world.table.set_limit(1);
                }
                world.release(inode, open);
            }
        });
        assert!(world.kernel(|kernel| kernel.most_ids) <= 2);
        world.table.set_idle_limit(0);
        world.assert_empty();
    });
}

/// A number that names another inode after `forget`: the kernel knows it by another one, here by
/// tens.
#[test]
fn forgotten_numbers() {
    explore(|| {
        let world = World::new();
        world.table.set_idle_limit(1);
        let held = world.open(0);
        world.reply(0, &held);
        let forgetting = {
            let world = world.clone();
            thread::spawn(move || {
                world.table.forget(&0);
                // From here on the number is another inode, with another file.
                let open = world
                    .table
                    .open(&0, 0, &world.files[1], Access::ReadOnly)
                    .unwrap();
                world.reply(10, &open);
                world.release(10, open);
                world.table.forget(&0);
            })
        };
        let other = world.open(2);
        world.reply(2, &other);
        world.release(0, held);
        world.release(2, other);
        forgetting.join().unwrap();
        world.table.set_idle_limit(0);
        world.assert_empty();
    });
}

#[test]
fn invalidate_meets_opens() {
    explore(|| {
        let world = World::new();
        world.table.set_idle_limit(2);
        threads(&world, 3, |world, n| {
            for _ in 0..2 {
                if n == 0 {
                    let _busy = world.table.invalidate(&0);
                } else {
                    let open = world.open(0);
                    world.reply(0, &open);
                    world.release(0, open);
                }
            }
        });
        world.table.invalidate(&0).unwrap();
        world.assert_empty();
    });
}

/// Nothing is lost while closing is not possible, and all of it goes once it is.
#[test]
fn failing_closes() {
    explore(|| {
        let world = World::new();
        world.table.set_limit(3);
        world.kernel(|kernel| kernel.may_close = false);
        threads(&world, 3, |world, n| {
            let inode = (n % 2) as u64;
            for round in 0..2 {
                if n == 0 && round == 1 {
                    let _failing = world.table.retry_closes();
                }
                let open = world.open(inode);
                world.reply(inode, &open);
                if n == 2 {
                    let _listed = world.table.list();
                }
                world.release(inode, open);
            }
            if n == 1 {
                world.table.forget(&1);
            }
        });
        let registered = world.kernel(|kernel| kernel.ids.len());
        assert_eq!(world.table.stats().ids, registered);
        assert_eq!(world.table.list().len(), registered);
        world.kernel(|kernel| kernel.may_close = true);
        world.table.retry_closes().unwrap();
        world.assert_empty();
    });
}

/// The release of an inode that was forgotten leaves the one alone that has its number now.
#[test]
fn forgetting_meets_releasing_and_opening() {
    explore(|| {
        let world = World::new();
        let held = world.open(0);
        let spawn = |f: Box<dyn FnOnce(World) + Send>| {
            let world = world.clone();
            thread::spawn(move || f(world))
        };
        let forgetting = spawn(Box::new(|world| world.table.forget(&0)));
        let releasing = spawn(Box::new(move |_| drop(held)));
        let fresh = (0..3).find_map(|_| {
            let open = world.table.open(&0, 0, &world.files[1], Access::ReadOnly);
            thread::yield_now();
            open.ok()
        });
        forgetting.join().unwrap();
        if let Some(fresh) = fresh {
            let id = |open: &OpenFile<Device>| open.reply(OpenFlags::empty()).unwrap().backing_id();
            let forgotten = world
                .table
                .list()
                .iter()
                .any(|entry| entry.id == Some(id(&fresh)) && entry.forgotten);
            let again = world
                .table
                .open(&0, 0, &world.files[1], Access::ReadOnly)
                .unwrap();
            assert_ne!(id(&again) == id(&fresh), forgotten);
        }
        releasing.join().unwrap();
        world.assert_empty();
    });
}

/// What was forgotten or invalidated is not found again, and be it released at that very moment.
#[test]
fn nothing_comes_back_idle() {
    for failing in [false, true] {
        explore(move || {
            let world = World::new();
            world.table.set_idle_limit(1);
            let held = [world.open(0), world.open(1)];
            world.kernel(|kernel| kernel.may_close = !failing);
            let releasing = thread::spawn(move || drop(held));
            world.table.forget(&0);
            let busy = world.table.invalidate(&1);
            releasing.join().unwrap();
            assert!(world.table.share(&0, 0).is_none());
            assert_eq!(world.table.share(&1, 0).is_none(), busy.is_ok());
            world.kernel(|kernel| kernel.may_close = true);
            world.table.set_idle_limit(0);
            world.table.retry_closes().unwrap();
            world.assert_empty();
        });
    }
}

#[test]
fn table_is_dropped_before_its_files() {
    explore(|| {
        let mut world = World::new();
        world.table.set_idle_limit(1);
        let idle = world.open(1);
        drop(idle);
        let open = world.open(0);
        let device = world.device;
        let fresh = World::new();
        let table = std::mem::replace(&mut world.table, Arc::clone(&fresh.table));
        let dropping = thread::spawn(move || drop(table));
        drop(open);
        dropping.join().unwrap();
        // Looked at after the guard is gone, so through the registry.
        assert_eq!(kernel(device, |kernel| kernel.ids.len()), 0);
    });
}

#[test]
fn the_device_is_let_go() {
    for may_close in [false, true] {
        explore(move || {
            let device = FuseDevice::unchecked(File::open("/dev/null").unwrap());
            kernel(device.as_fd().as_raw_fd(), |kernel| {
                *kernel = Kernel {
                    may_close,
                    ..Kernel::default()
                };
            });
            let device = std::sync::Arc::new(device);
            let table = Table::new(std::sync::Arc::clone(&device));
            table.set_idle_limit(1);
            let file = tempfile::tempfile().unwrap();
            let open = table.open(&0, 0, &file, Access::ReadOnly).unwrap();
            let dropping = thread::spawn(move || drop(table));
            drop(open);
            dropping.join().unwrap();
            assert_eq!(std::sync::Arc::strong_count(&device), 1);
        });
    }
}

#[test]
fn a_lower_limit_holds() {
    explore(|| {
        let world = World::new();
        world.table.set_idle_limit(1);
        let held = world.open(0);
        let releasing = thread::spawn(move || drop(held));
        world.table.set_limit(0);
        releasing.join().unwrap();
        assert_eq!(world.table.stats().ids, 0);
    });
}

#[test]
fn retrying_meets_opening() {
    explore(|| {
        let world = World::new();
        world.kernel(|kernel| kernel.may_close = false);
        drop(world.open(0));
        world.kernel(|kernel| kernel.may_close = true);
        let retrying = {
            let world = world.clone();
            thread::spawn(move || world.table.retry_closes().unwrap())
        };
        let open = world.table.share(&0, 0).unwrap_or_else(|| world.open(0));
        world.reply(0, &open);
        world.release(0, open);
        retrying.join().unwrap();
        world.assert_empty();
    });
}

/// A key whose hash panics at its third call.
#[derive(Clone)]
struct Fused(u64, Option<std::sync::Arc<std::sync::atomic::AtomicUsize>>);

impl PartialEq for Fused {
    fn eq(&self, other: &Self) -> bool {
        self.0 == other.0
    }
}

impl Eq for Fused {}

impl std::hash::Hash for Fused {
    fn hash<H: std::hash::Hasher>(&self, state: &mut H) {
        let order = std::sync::atomic::Ordering::SeqCst;
        if self
            .1
            .as_ref()
            .is_some_and(|calls| calls.fetch_add(1, order) == 2)
        {
            std::panic::resume_unwind(Box::new("a key that cannot be hashed"));
        }
        self.0.hash(state);
    }
}

/// Where a panic would drop the last reference under the shard's lock, which the drop takes.
#[test]
fn invalidate_runs_no_code_of_the_key_with_a_reference() {
    explore(|| {
        let world = World::new();
        let table = BackingTable::<Device, Fused>::new(std::sync::Arc::clone(&world.handle));
        let file = &world.files[0];
        let held = table
            .open(&Fused(0, None), 0, file, Access::ReadOnly)
            .unwrap();
        let releasing = thread::spawn(move || drop(held));
        let key = Fused(0, Some(std::sync::Arc::default()));
        let invalidate = std::panic::AssertUnwindSafe(|| table.invalidate(&key));
        let _ = std::panic::catch_unwind(invalidate);
        releasing.join().unwrap();
    });
}

/// A listing that is made meanwhile is in nobody's way, and lists what it should.
mod listing {
    use super::{Access, World, explore, thread};

    fn meanwhile(world: &World) -> thread::JoinHandle<()> {
        let world = world.clone();
        thread::spawn(move || drop(world.table.list()))
    }

    #[test]
    fn costs_no_room() {
        explore(|| {
            let world = World::new();
            world.table.set_limit(1);
            world.table.set_idle_limit(1);
            drop(world.open(0));
            let listing = meanwhile(&world);
            assert_eq!(world.open(1).server_reason(), None);
            listing.join().unwrap();
        });
    }

    #[test]
    fn keeps_nothing_from_being_closed() {
        explore(|| {
            let world = World::new();
            world.table.set_idle_limit(1);
            world.kernel(|kernel| kernel.may_close = false);
            let open = world.open(0);
            // So that it is not idle but fails to be closed.
            world.table.set_limit(0);
            drop(open);
            world.table.set_limit(1);
            world.kernel(|kernel| kernel.may_close = true);
            let listing = meanwhile(&world);
            world.table.retry_closes().unwrap();
            listing.join().unwrap();
            assert_eq!(world.table.stats().ids, 0);
        });
    }

    #[test]
    fn misses_none_that_is_forgotten() {
        explore(|| {
            let world = World::new();
            let _held = world.open(0);
            let forgetting = {
                let world = world.clone();
                thread::spawn(move || world.table.forget(&0))
            };
            assert!(!world.table.list().is_empty());
            forgetting.join().unwrap();
        });
    }

    #[test]
    fn has_none_that_is_released() {
        explore(|| {
            let world = World::new();
            let held = world
                .table
                .open(&0, 0, &world.files[0], Access::ReadOnly)
                .unwrap();
            let releasing = thread::spawn(move || drop(held));
            assert!(world.table.list().iter().all(|entry| entry.opens == 1));
            releasing.join().unwrap();
        });
    }
}

/// What the connection cannot do is found out once.
#[test]
fn refusals_are_remembered() {
    explore(|| {
        let world = World::new();
        let error = BackingOpenError::NotPermitted(NotPermitted::MissingCapability);
        world.kernel(|kernel| kernel.errors.extend([error; 3]));
        threads(&world, 2, |world, n| {
            let open = world.open(n as u64);
            assert!(!open.is_passthrough());
            world.reply(n as u64, &open);
            world.release(n as u64, open);
        });
        let tried = 3 - world.kernel(|kernel| kernel.errors.len());
        assert!((1..=2).contains(&tried), "{tried}");
        let open = world.open(0);
        assert_eq!(open.server_reason(), Some(ServerReason::Remembered(error)));
        drop(open);
        world.kernel(|kernel| kernel.errors.clear());
        world.table.reset();
        assert!(world.open(0).is_passthrough());
        world.assert_empty();
    });
}

/// Also where they come from an ioctl that began before the table was told to forget them.
#[test]
fn a_reset_is_not_undone() {
    explore(|| {
        let world = World::new();
        let error = BackingOpenError::NotPermitted(NotPermitted::MissingCapability);
        world.kernel(|kernel| kernel.errors.push_back(error));
        let opening = {
            let world = world.clone();
            thread::spawn(move || drop(world.open(0)))
        };
        while world.kernel(|kernel| !kernel.errors.is_empty()) {
            thread::yield_now();
        }
        world.table.reset();
        opening.join().unwrap();
        let refused = world.table.stats().refused;
        assert!(refused.is_none(), "{refused:?}");
    });
}

/// Everything at once, at random.
#[test]
fn anything() {
    explore(|| {
        let world = World::new();
        world.table.set_idle_limit(1);
        threads(&world, 3, |world, _| {
            let mut held: Vec<(u64, OpenFile<Device>)> = Vec::new();
            for _ in 0..6 {
                let inode = thread_rng().gen_range(0..2);
                match thread_rng().gen_range(0..10) {
                    0..=2 => held.push((inode, world.open(inode))),
                    3 => held.extend(world.table.share(&inode, 0).map(|open| (inode, open))),
                    4 => held.extend(world.table.serve(&inode).map(|open| (inode, open))),
                    5 => drop(world.table.invalidate(&inode)),
                    6 => world.table.set_limit(thread_rng().gen_range(0..3)),
                    7 => world.kernel(|kernel| {
                        kernel
                            .errors
                            .push_back(BackingOpenError::Other(Errno::ACCESS));
                    }),
                    _ => {
                        if let Some((inode, open)) = held.pop() {
                            world.reply(inode, &open);
                            world.release(inode, open);
                        }
                    }
                }
            }
            for (inode, open) in held {
                world.reply(inode, &open);
                world.release(inode, open);
            }
        });
        world.table.set_idle_limit(0);
        world.assert_empty();
    });
}

/// One file under an inode at a time, whoever comes first.
#[test]
fn another_file() {
    explore(|| {
        let world = World::new();
        threads(&world, 2, |world, n| {
            match world.table.open(&0, 0, &world.files[n], Access::ReadOnly) {
                Ok(open) => {
                    world.reply(0, &open);
                    world.release(0, open);
                }
                Err(error) => assert_eq!(error, TableOpenError::DifferentFile),
            }
        });
        world.assert_empty();
    });
}

/// The controls: the model objects to what the kernel objects to.
mod controls {
    use super::{World, explore};

    #[test]
    #[should_panic(expected = "EIO: id")]
    fn reply_after_release() {
        explore(|| {
            let world = World::new();
            let open = world.open(0);
            let id = open.reply(crate::OpenFlags::empty()).unwrap().backing_id();
            drop(open);
            world.kernel(|kernel| assert!(kernel.ids.contains_key(&id), "EIO: id"));
        });
    }

    /// A server without a table: each open registers.
    #[test]
    #[should_panic(expected = "EIO: inode 0 is open in another mode")]
    fn two_tables_for_one_connection() {
        explore(|| {
            let world = World::new();
            let second = crate::BackingTable::new(std::sync::Arc::clone(&world.handle));
            let first = world.open(0);
            world.reply(0, &first);
            let file = &world.files[0];
            let open = second.open(&0, 0, file, crate::Access::ReadOnly).unwrap();
            world.reply(0, &open);
        });
    }
}
