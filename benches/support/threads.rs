//! Runs the same batch on several threads at once.

use std::sync::Barrier;
use std::thread;
use std::time::Instant;

use super::cpu;

/// Nanoseconds per operation, from the start of the first thread's batch to the end of the last. `ops`
/// counts the operations of all threads. The threads start their batches together and are spread over
/// the CPUs; starting threads is not counted.
pub fn per_op(threads: usize, ops: usize, batch: impl Fn(usize) + Sync) -> f64 {
    let barrier = Barrier::new(threads);
    let times: Vec<(Instant, Instant)> = thread::scope(|scope| {
        let running: Vec<_> = (0..threads)
            .map(|index| {
                let (barrier, batch) = (&barrier, &batch);
                scope.spawn(move || {
                    let _pinned = cpu::pin_nth(index);
                    barrier.wait();
                    let start = Instant::now();
                    batch(index);
                    (start, Instant::now())
                })
            })
            .collect();
        let ended = running.into_iter().map(thread::ScopedJoinHandle::join);
        ended.map(|times| times.expect("no panic")).collect()
    });
    let start = times.iter().map(|time| time.0).min().expect("a thread");
    let end = times.iter().map(|time| time.1).max().expect("a thread");
    (end - start).as_nanos() as f64 / ops as f64
}
