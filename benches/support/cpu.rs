//! Pins benches to CPUs.

use rustix::thread::{CpuSet, sched_getaffinity, sched_setaffinity};

/// Keeps this thread, and the threads and processes that it starts, on one CPU until dropped.
#[derive(Debug)]
#[must_use = "dropping it lifts the restriction"]
pub struct Pinned {
    before: CpuSet,
    pub cpu: usize,
}

/// Pins to the last CPU that the process may use, because the first often handles the interrupts.
pub fn pin() -> Option<Pinned> {
    pin_nth(0)
}

/// Pins to the `n`th CPU from the last, modulo their number. With it, each of several threads gets its
/// own CPU; the scheduler might take longer to spread the threads than they run.
pub fn pin_nth(n: usize) -> Option<Pinned> {
    let before = sched_getaffinity(None).ok()?;
    let cpus: Vec<_> = (0..CpuSet::MAX_CPU)
        .rev()
        .filter(|&cpu| before.is_set(cpu))
        .collect();
    let cpu = *cpus.get(n % cpus.len().max(1))?;
    let mut one = CpuSet::new();
    one.set(cpu);
    sched_setaffinity(None, &one).ok()?;
    Some(Pinned { before, cpu })
}

impl Drop for Pinned {
    fn drop(&mut self) {
        let _ = sched_setaffinity(None, &self.before);
    }
}
