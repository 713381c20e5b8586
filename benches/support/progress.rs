//! Shows progress and the time left on stderr.

use std::io::{IsTerminal, Write, stderr};
use std::time::{Duration, Instant};

pub struct Progress {
    what: String,
    done: usize,
    total: usize,
    start: Instant,
    told: Instant,
    every: Duration,
    /// A line on the terminal has to be erased at the end.
    line: bool,
}

impl Progress {
    pub fn new(what: impl Into<String>, total: usize) -> Self {
        let terminal = stderr().is_terminal();
        Self {
            what: what.into(),
            done: 0,
            total,
            start: Instant::now(),
            told: Instant::now(),
            every: Duration::from_millis(if terminal { 200 } else { 10_000 }),
            line: false,
        }
    }

    pub fn step(&mut self) {
        self.done += 1;
        if self.told.elapsed() < self.every || self.done == self.total {
            return;
        }
        self.told = Instant::now();
        let left =
            self.start.elapsed().as_secs_f64() / self.done as f64 * (self.total - self.done) as f64;
        let (what, percent) = (&self.what, 100 * self.done / self.total);
        let text = format!("{what}: {percent} %, {left:.0} s left");
        // On a terminal, each message overwrites the last.
        if stderr().is_terminal() {
            eprint!("\r{text:<78}");
            let _ = stderr().flush();
            self.line = true;
        } else {
            eprintln!("{text}");
        }
    }
}

impl Drop for Progress {
    fn drop(&mut self) {
        if self.line {
            eprint!("\r{:<78}\r", "");
        }
    }
}
