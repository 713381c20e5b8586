//! The table's threads, whose interleavings shuttle explores. A model of the kernel replaces the ioctls. It panics
//! where the kernel would answer with `EIO`.

#![allow(clippy::unwrap_used, clippy::panic, clippy::expect_used)]
#![allow(clippy::cast_possible_truncation)]

use std::collections::{HashMap, VecDeque};
use std::fs::File;
use std::os::fd::{AsFd, BorrowedFd};

use rustix::io::Errno;
use shuttle::rand::{Rng, thread_rng};
use shuttle::sync::Arc;
use shuttle::thread;

use crate::access::Access;
use crate::error::{BackingCloseError, BackingError, NotPermitted, OpenError, ServerReason};
use crate::file::ServerFile;
use crate::fopen_flags::FopenFlags;
use crate::id::BackingId;
use crate::register::Register;
use crate::table::{BackingTable, OpenFile};

/// A registrar that stands for the kernel. Its lock is std's: shuttle does not switch threads at it. It is never
/// held where shuttle does.
#[derive(Default)]
struct Model(std::sync::Mutex<Kernel>);

#[derive(Default)]
struct Kernel {
    /// Registered files: `st_ino` and grant, by id.
    ids: HashMap<i32, (u64, Access)>,
    /// The id that was given last.
    last_id: i32,
    /// The inodes that clients have open, each with its id (`None` in server mode) and the number of opens.
    open: HashMap<u64, (Option<i32>, usize)>,
    /// The errors of the next registrations. Later registrations succeed.
    errors: VecDeque<BackingError>,
    /// Closes fail, as without `CAP_SYS_ADMIN`.
    may_not_close: bool,
    /// The most ids that have been registered at a time.
    most_ids: usize,
}

impl Model {
    fn kernel<T>(&self, f: impl FnOnce(&mut Kernel) -> T) -> T {
        f(&mut self
            .0
            .lock()
            .unwrap_or_else(std::sync::PoisonError::into_inner))
    }
}

impl Register for Model {
    fn register(&self, file: BorrowedFd<'_>, grant: Access) -> Result<BackingId, BackingError> {
        thread::yield_now();
        let inode = rustix::fs::fstat(file).unwrap().st_ino;
        let result = self.kernel(|kernel| {
            if let Some(error) = kernel.errors.pop_front() {
                return Err(error);
            }
            kernel.last_id += 1;
            kernel.ids.insert(kernel.last_id, (inode, grant));
            kernel.most_ids = kernel.most_ids.max(kernel.ids.len());
            Ok(BackingId::from_raw(kernel.last_id).unwrap())
        });
        thread::yield_now();
        result
    }

    fn unregister(&self, id: BackingId) -> Result<(), BackingCloseError<BackingId>> {
        thread::yield_now();
        let result = self.kernel(|kernel| {
            if kernel.may_not_close {
                return Err(BackingError::NotPermitted(NotPermitted::MissingCapability));
            }
            match kernel.ids.remove(&id.as_raw()) {
                Some(_) => Ok(()),
                None => Err(BackingError::UnknownId),
            }
        });
        thread::yield_now();
        result.map_err(|cause| BackingCloseError::new(id, cause))
    }
}

type Registrar = std::sync::Arc<Model>;
type Table = BackingTable<Registrar>;

/// A table on a [`Model`], three backing files, and what a server and its clients do with them.
#[derive(Clone)]
struct World {
    table: Arc<Table>,
    model: Registrar,
    files: std::sync::Arc<[File; 3]>,
}

impl World {
    fn new() -> Self {
        let model = Registrar::default();
        let file = || tempfile::tempfile().unwrap();
        Self {
            table: Arc::new(BackingTable::new(std::sync::Arc::clone(&model))),
            model,
            files: std::sync::Arc::new([file(), file(), file()]),
        }
    }

    fn kernel<T>(&self, f: impl FnOnce(&mut Kernel) -> T) -> T {
        self.model.kernel(f)
    }

    fn file(&self, n: usize) -> ServerFile<'_, &File> {
        ServerFile::new(&self.files[n]).access(Access::ReadOnly)
    }

    fn open(&self, inode: u64) -> OpenFile<Registrar> {
        self.table
            .open(&inode, 0, self.file(inode as usize))
            .unwrap()
    }

    /// The kernel reads the reply. Panics where it would give the client `EIO`.
    fn reply(&self, inode: u64, open: &OpenFile<Registrar>) {
        thread::yield_now();
        let id = open.reply(FopenFlags::empty()).backing_id();
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

    /// A client's close(2): the kernel counts it and sends RELEASE.
    fn release(&self, inode: u64, open: OpenFile<Registrar>) {
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

fn explore(test: impl Fn() + Send + Sync + 'static) {
    explore_times(
        if cfg!(debug_assertions) {
            1_500
        } else {
            20_000
        },
        test,
    );
}

fn explore_times(iterations: usize, test: impl Fn() + Send + Sync + 'static) {
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
fn sharing_meets_opens_and_releases() {
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
        world.kernel(|kernel| kernel.errors.push_back(BackingError::OutOfMemory));
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

/// An inode that was opened before the registrar came stays in server mode until its last release.
#[test]
fn attaching_meets_opens() {
    explore(|| {
        let world = World {
            table: Arc::default(),
            ..World::new()
        };
        threads(&world, 3, |world, n| {
            if n == 0 {
                assert!(world.table.attach(world.model.clone()).is_ok());
            }
            for _ in 0..2 {
                let open = world.open(0);
                world.reply(0, &open);
                world.release(0, open);
            }
        });
        assert!(world.open(0).is_passthrough());
        world.assert_empty();
    });
}

/// Opens share an adopted id, and it is closed once.
#[test]
fn adopted_ids_meet_opens() {
    explore(|| {
        let world = World::new();
        let fd = world.files[0].as_fd();
        let id = world.model.register(fd, Access::ReadOnly).unwrap();
        let adopted = [(); 2].map(|()| {
            let open = world.table.adopt(&0, &id, world.file(0)).unwrap();
            world.reply(0, &open);
            std::sync::Mutex::new(Some(open))
        });
        let adopted = std::sync::Arc::new(adopted);
        threads(&world, 3, move |world, n| {
            if let Some(open) = adopted.get(n) {
                let open = open.lock().unwrap().take().unwrap();
                return world.release(0, open);
            }
            for _ in 0..2 {
                let open = world.open(0);
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

/// After `forget` the number 0 names another inode, with another file. The model of the kernel knows this inode by the
/// number 10.
#[test]
fn a_forgotten_number_names_another_file() {
    explore(|| {
        let world = World::new();
        world.table.set_idle_limit(1);
        let held = world.open(0);
        world.reply(0, &held);
        let forgetting = {
            let world = world.clone();
            thread::spawn(move || {
                world.table.forget(&0);
                let open = world.table.open(&0, 0, world.file(1)).unwrap();
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
                    let _done = world.table.invalidate(&0);
                } else {
                    let open = world.open(0);
                    world.reply(0, &open);
                    world.release(0, open);
                }
            }
        });
        assert!(world.table.invalidate(&0));
        world.assert_empty();
    });
}

/// No id is lost while closes fail, and all are closed once closes succeed.
#[test]
fn failing_closes() {
    explore(|| {
        let world = World::new();
        world.table.set_limit(3);
        world.kernel(|kernel| kernel.may_not_close = true);
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
        world.kernel(|kernel| kernel.may_not_close = false);
        world.table.retry_closes().unwrap();
        world.assert_empty();
    });
}

/// The release of a forgotten inode does not affect the inode that has its number now.
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
            let open = world.table.open(&0, 0, world.file(1));
            thread::yield_now();
            open.ok()
        });
        forgetting.join().unwrap();
        if let Some(fresh) = fresh {
            let id = |open: &OpenFile<Registrar>| open.reply(FopenFlags::empty()).backing_id();
            let forgotten = world
                .table
                .list()
                .iter()
                .any(|entry| entry.id == id(&fresh) && entry.detached);
            let again = world.table.open(&0, 0, world.file(1)).unwrap();
            assert_ne!(id(&again) == id(&fresh), forgotten);
        }
        releasing.join().unwrap();
        world.assert_empty();
    });
}

/// A forgotten or invalidated inode is not found again, even if it is released at the same time.
#[test]
fn forgotten_and_invalidated_inodes_are_not_found() {
    for failing in [false, true] {
        explore(move || {
            let world = World::new();
            world.table.set_idle_limit(1);
            let held = [world.open(0), world.open(1)];
            world.kernel(|kernel| kernel.may_not_close = failing);
            let releasing = thread::spawn(move || drop(held));
            world.table.forget(&0);
            let invalidated = world.table.invalidate(&1);
            releasing.join().unwrap();
            assert!(world.table.share(&0, 0).is_none());
            assert_eq!(world.table.share(&1, 0).is_none(), invalidated);
            world.kernel(|kernel| kernel.may_not_close = false);
            world.table.set_idle_limit(0);
            world.table.retry_closes().unwrap();
            world.assert_empty();
        });
    }
}

#[test]
fn table_is_dropped_before_its_files() {
    explore(|| {
        let World {
            table,
            model,
            files,
        } = World::new();
        table.set_idle_limit(1);
        let file = |n: usize| ServerFile::new(&files[n]).access(Access::ReadOnly);
        drop(table.open(&1, 0, file(1)).unwrap());
        let open = table.open(&0, 0, file(0)).unwrap();
        let dropping = thread::spawn(move || drop(table));
        drop(open);
        dropping.join().unwrap();
        assert_eq!(model.kernel(|kernel| kernel.ids.len()), 0);
    });
}

#[test]
fn the_registrar_is_dropped_with_the_table_and_its_files() {
    for may_not_close in [false, true] {
        explore(move || {
            let World {
                table,
                model,
                files,
            } = World::new();
            model.kernel(|kernel| kernel.may_not_close = may_not_close);
            table.set_idle_limit(1);
            let file = ServerFile::new(&files[0]).access(Access::ReadOnly);
            let open = table.open(&0, 0, file).unwrap();
            let dropping = thread::spawn(move || drop(table));
            drop(open);
            dropping.join().unwrap();
            assert_eq!(std::sync::Arc::strong_count(&model), 1);
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
        world.kernel(|kernel| kernel.may_not_close = true);
        drop(world.open(0));
        world.kernel(|kernel| kernel.may_not_close = false);
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

/// A listing that another thread makes disturbs no operation, and is right.
mod listing {
    use super::{World, explore, thread};

    fn list_in_a_thread(world: &World) -> thread::JoinHandle<()> {
        let world = world.clone();
        thread::spawn(move || drop(world.table.list()))
    }

    #[test]
    fn leaves_the_limit_to_opens() {
        explore(|| {
            let world = World::new();
            world.table.set_limit(1);
            world.table.set_idle_limit(1);
            drop(world.open(0));
            let listing = list_in_a_thread(&world);
            assert_eq!(world.open(1).server_reason(), None);
            listing.join().unwrap();
        });
    }

    #[test]
    fn does_not_prevent_closes() {
        explore(|| {
            let world = World::new();
            world.table.set_idle_limit(1);
            world.kernel(|kernel| kernel.may_not_close = true);
            let open = world.open(0);
            // At this limit the release does not keep the id idle: it tries to close it, and fails.
            world.table.set_limit(0);
            drop(open);
            world.table.set_limit(1);
            world.kernel(|kernel| kernel.may_not_close = false);
            let listing = list_in_a_thread(&world);
            world.table.retry_closes().unwrap();
            listing.join().unwrap();
            assert_eq!(world.table.stats().ids, 0);
        });
    }

    #[test]
    fn includes_an_open_inode_that_is_forgotten() {
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
    fn omits_an_inode_that_is_released() {
        explore(|| {
            let world = World::new();
            let held = world.table.open(&0, 0, world.file(0)).unwrap();
            let releasing = thread::spawn(move || drop(held));
            assert!(world.table.list().iter().all(|entry| entry.opens == 1));
            releasing.join().unwrap();
        });
    }
}

/// After an error that holds for the whole connection, no further registration is tried.
#[test]
fn refusals_are_remembered() {
    explore(|| {
        let world = World::new();
        let error = BackingError::NotPermitted(NotPermitted::NotNegotiatedOrDenied);
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
        assert_eq!(open.server_reason(), Some(ServerReason::Refused(error)));
        drop(open);
        let left = world.kernel(|kernel| kernel.errors.len());
        assert_eq!(left, 3 - tried, "it was tried again");
        world.kernel(|kernel| kernel.errors.clear());
        world.table.retry_registrations();
        assert!(world.open(0).is_passthrough());
        world.assert_empty();
    });
}

/// An error that holds for one thread does not keep other threads from registering.
#[test]
fn a_refusal_of_a_thread_is_not_remembered() {
    explore(|| {
        let world = World::new();
        let error = BackingError::NotPermitted(NotPermitted::MissingCapability);
        world.kernel(|kernel| kernel.errors.push_back(error));
        let reason = std::sync::Arc::new(std::sync::Mutex::new(Vec::new()));
        let reasons = std::sync::Arc::clone(&reason);
        threads(&world, 2, move |world, n| {
            let open = world.open(n as u64);
            reasons.lock().unwrap().push(open.server_reason());
            world.reply(n as u64, &open);
            world.release(n as u64, open);
        });
        let reasons = reason.lock().unwrap();
        assert!(reasons.contains(&None), "{reasons:?}");
        assert!(reasons.contains(&Some(ServerReason::Refused(error))));
        world.assert_empty();
    });
}

/// An error of an ioctl that began before `retry_registrations` is not remembered after it.
#[test]
fn a_reset_is_not_undone() {
    explore(|| {
        let world = World::new();
        let error = BackingError::NotPermitted(NotPermitted::NotNegotiatedOrDenied);
        world.kernel(|kernel| kernel.errors.push_back(error));
        let opening = {
            let world = world.clone();
            thread::spawn(move || drop(world.open(0)))
        };
        while world.kernel(|kernel| !kernel.errors.is_empty()) {
            thread::yield_now();
        }
        world.table.retry_registrations();
        opening.join().unwrap();
        let refused = world.table.stats().refused;
        assert!(refused.is_none(), "{refused:?}");
    });
}

/// One thread opens and releases an inode, so that each open is a first one. Nothing that another thread does in the
/// meantime may change that.
mod not_disturbed_by {
    use super::{Arc, BackingError, Errno, World, explore_times, thread};

    fn sequential(prepare: fn(&World), open: fn(&World, u64), meanwhile: fn(&World)) {
        // Fewer iterations than in other tests: each test calls this ten times.
        explore_times(300, move || {
            let world = World::new();
            prepare(&world);
            let other = {
                let world = world.clone();
                thread::spawn(move || (0..2).for_each(|_| meanwhile(&world)))
            };
            for round in 0..3 {
                open(&world, round);
            }
            other.join().unwrap();
            world.table.set_idle_limit(0);
            world.assert_empty();
            assert_eq!(Arc::strong_count(&world.table), 1);
        });
    }

    /// Alternates between two files. `DifferentFile` would mean that the inode is still open with the other.
    fn with_another_file(world: &World, round: u64) {
        let file = world.file(round as usize % 2);
        let open = world.table.open(&0, 0, file).expect("nothing is open");
        assert!(open.is_passthrough());
    }

    fn served(world: &World, _: u64) {
        drop(world.open(0));
        assert!(world.table.serve(&0).is_some(), "nothing is open");
    }

    fn invalidated(world: &World, _: u64) {
        drop(world.open(0));
        assert!(world.table.invalidate(&0), "nothing is open");
    }

    /// Alternates between two inodes, at a limit of one id.
    fn within_the_limit(world: &World, round: u64) {
        assert_eq!(world.open(round % 2).server_reason(), None);
    }

    /// Each first open of an inode tries again to register.
    fn after_a_failure(world: &World, _: u64) {
        assert!(world.table.invalidate(&0), "nothing is open");
        world.kernel(|kernel| {
            kernel.errors.push_back(BackingError::Other(Errno::ACCESS));
        });
        assert!(!world.open(0).is_passthrough());
        assert!(world.open(0).is_passthrough());
    }

    const OPENS: [fn(&World, u64); 5] = [
        with_another_file,
        served,
        invalidated,
        within_the_limit,
        after_a_failure,
    ];

    fn keeping(idle: usize) -> fn(&World) {
        match idle {
            0 => |world| world.table.set_limit(1),
            _ => |world| {
                world.table.set_limit(1);
                world.table.set_idle_limit(1);
            },
        }
    }

    fn no_open_is_disturbed_by(meanwhile: fn(&World)) {
        for open in OPENS {
            for idle in [0, 1] {
                sequential(keeping(idle), open, meanwhile);
            }
        }
    }

    #[test]
    fn share_that_refuses() {
        // Asks to write, which is granted to no open.
        no_open_is_disturbed_by(|world| assert!(world.table.share(&0, 1).is_none()));
    }

    #[test]
    fn list() {
        no_open_is_disturbed_by(|world| {
            for entry in &world.table.list() {
                assert!(entry.opens <= 1, "{entry:?}");
            }
        });
    }

    #[test]
    fn trimming() {
        no_open_is_disturbed_by(|world| {
            world.table.set_idle_limit(0);
            world.table.set_idle_limit(1);
        });
    }

    #[test]
    fn invalidate() {
        no_open_is_disturbed_by(|world| {
            // Either result is right: the inode may be open.
            let _done = world.table.invalidate(&0);
            let _done = world.table.invalidate(&1);
        });
    }
}

/// An open that waits for the first open to decide, and is refused then, was never counted.
#[test]
fn a_refused_open_is_not_counted() {
    let refused: [fn(&World) -> bool; 2] = [
        |world| world.table.open(&0, 0, world.file(1)).is_err(),
        |world| world.table.serve(&0).is_none(),
    ];
    for refused in refused {
        explore(move || {
            let world = World::new();
            let other = {
                let world = world.clone();
                thread::spawn(move || refused(&world))
            };
            let open = world.table.open(&0, 0, world.file(0));
            let was_first = open.as_ref().is_ok_and(OpenFile::is_passthrough);
            drop(open);
            let invalidated = world.table.invalidate(&0);
            if other.join().unwrap() && was_first {
                assert!(invalidated);
            }
            world.assert_empty();
        });
    }
}

/// A claim that an open has made void does not stay counted as being closed.
#[test]
fn void_claims_are_not_counted() {
    explore(|| {
        let world = World::new();
        world.table.set_idle_limit(1);
        drop(world.open(0));
        threads(&world, 3, |world, n| match n {
            0 => world.table.set_idle_limit(0),
            1 => drop(world.open(0)),
            _ => world.table.set_limit(10),
        });
        world.table.set_idle_limit(0);
        world.assert_empty();
    });
}

/// A grant that the registrar enforces.
mod grants {
    use super::*;

    #[derive(Clone, Default)]
    struct Enforcing(Registrar);

    impl Register for Enforcing {
        fn register(&self, file: BorrowedFd<'_>, grant: Access) -> Result<BackingId, BackingError> {
            self.0.register(file, grant)
        }

        fn unregister(&self, id: BackingId) -> Result<(), BackingCloseError<BackingId>> {
            self.0.unregister(id)
        }

        fn enforces_grant(&self) -> bool {
            true
        }
    }

    /// No open gets more than was registered, whichever open comes first.
    #[test]
    fn meet_wider_opens() {
        explore(|| {
            let registrar = Enforcing::default();
            let table = Arc::new(BackingTable::<_, u64>::new(registrar.clone()));
            let file = std::sync::Arc::new(tempfile::tempfile().unwrap());
            let open = |access, flags| {
                let (table, file) = (Arc::clone(&table), std::sync::Arc::clone(&file));
                let model = std::sync::Arc::clone(&registrar.0);
                thread::spawn(move || {
                    let file = ServerFile::new(&*file).access(access);
                    table.open(&0, flags, file).map(|open| {
                        let id = open.id().unwrap().as_raw();
                        let (_, grant) = model.kernel(|kernel| kernel.ids[&id]);
                        assert!(grant.allows(access), "{access} by an id for {grant}");
                    })
                })
            };
            let reading = open(Access::ReadOnly, 0);
            let writing = open(Access::ReadWrite, 2);
            reading.join().unwrap().unwrap();
            match writing.join().unwrap() {
                Ok(()) => {}
                Err(error) => assert_eq!(error.errno(), Errno::BUSY),
            }
            assert!(table.list().is_empty());
            assert!(registrar.0.kernel(|kernel| kernel.ids.is_empty()));
        });
    }
}

/// Random operations on two inodes, by three threads.
#[test]
fn random_operations() {
    explore(|| {
        let world = World::new();
        world.table.set_idle_limit(1);
        threads(&world, 3, |world, _| {
            let mut held: Vec<(u64, OpenFile<Registrar>)> = Vec::new();
            for _ in 0..6 {
                let inode = thread_rng().gen_range(0..2);
                match thread_rng().gen_range(0..10) {
                    0..=2 => held.push((inode, world.open(inode))),
                    3 => held.extend(world.table.share(&inode, 0).map(|open| (inode, open))),
                    4 => held.extend(world.table.serve(&inode).map(|open| (inode, open))),
                    5 => {
                        let _done = world.table.invalidate(&inode);
                    }
                    6 => world.table.set_limit(thread_rng().gen_range(0..3)),
                    7 => world.kernel(|kernel| {
                        kernel.errors.push_back(BackingError::Other(Errno::ACCESS));
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

/// An inode has one file at a time, whichever open comes first: the file of the open that succeeded.
#[test]
fn one_file_for_an_inode() {
    explore(|| {
        let world = World::new();
        threads(&world, 2, |world, n| {
            match world.table.open(&0, 0, world.file(n)) {
                Ok(open) => {
                    world.reply(0, &open);
                    let id = open.id().unwrap().as_raw();
                    let (file, _) = world.kernel(|kernel| kernel.ids[&id]);
                    assert_eq!(file, rustix::fs::fstat(&world.files[n]).unwrap().st_ino);
                    world.release(0, open);
                }
                Err(error) => assert_eq!(error, OpenError::DifferentFile),
            }
        });
        world.assert_empty();
    });
}

/// Controls: the model panics where the kernel would answer with `EIO`.
mod controls {
    use super::{World, explore};

    #[test]
    #[should_panic(expected = "EIO: id")]
    fn reply_after_release() {
        explore(|| {
            let world = World::new();
            let open = world.open(0);
            let id = open.id().unwrap().as_raw();
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
            let second = crate::BackingTable::new(std::sync::Arc::clone(&world.model));
            let first = world.open(0);
            world.reply(0, &first);
            let open = second.open(&0, 0, world.file(0)).unwrap();
            world.reply(0, &open);
        });
    }
}
