//! Compares ways to do the same thing: they take turns.

use std::time::Instant;

use super::progress::Progress;
use super::stats::Interval;

/// Nanoseconds per operation of a batch of `ops`.
#[inline]
pub fn per_op(ops: usize, batch: impl FnOnce()) -> f64 {
    let start = Instant::now();
    batch();
    start.elapsed().as_nanos() as f64 / ops as f64
}

/// Each batch returns one figure for each of `N` phases, usually in nanoseconds: for example one for
/// opening and one for closing.
pub struct Contest<'a, const N: usize> {
    phases: [&'static str; N],
    ways: Vec<(String, Batch<'a, N>)>,
}

type Batch<'a, const N: usize> = Box<dyn FnMut() -> [f64; N] + 'a>;

impl<'a, const N: usize> Contest<'a, N> {
    pub fn new(phases: [&'static str; N]) -> Self {
        Self {
            phases,
            ways: Vec::new(),
        }
    }

    /// Adds a way. The first way is the baseline.
    #[must_use]
    pub fn way(mut self, name: impl Into<String>, batch: impl FnMut() -> [f64; N] + 'a) -> Self {
        self.ways.push((name.into(), Box::new(batch)));
        self
    }

    /// Each round runs one batch of every way, in a new random order, so that no way always comes first
    /// or always after the way that leaves the coldest caches.
    pub fn run(mut self, rounds: usize) -> [Comparison; N] {
        let mut comparisons = self.phases.map(|phase| Comparison {
            phase,
            ways: self
                .ways
                .iter()
                .map(|(name, _)| Way {
                    name: name.clone(),
                    samples: Vec::with_capacity(rounds),
                })
                .collect(),
        });
        let mut order: Vec<usize> = (0..self.ways.len()).collect();
        let mut random = Random(0x9e37_79b9_7f4a_7c15);
        let warm_up = (rounds / 20).max(1);
        let mut progress = Progress::new(self.phases.join(", "), warm_up + rounds);
        for round in 0..warm_up + rounds {
            random.shuffle(&mut order);
            for &way in &order {
                let figures = (self.ways[way].1)();
                if round < warm_up {
                    continue;
                }
                for (comparison, figure) in comparisons.iter_mut().zip(figures) {
                    comparison.ways[way].samples.push(figure);
                }
            }
            progress.step();
        }
        comparisons
    }
}

/// The results of one phase.
#[derive(Clone, Debug)]
pub struct Comparison {
    pub phase: &'static str,
    pub ways: Vec<Way>,
}

#[derive(Clone, Debug)]
pub struct Way {
    pub name: String,
    /// One for each round.
    pub samples: Vec<f64>,
}

impl Way {
    pub fn absolute(&self) -> Interval {
        Interval::of_median(self.samples.clone())
    }
}

impl Comparison {
    pub fn rounds(&self) -> usize {
        self.ways.first().map_or(0, |way| way.samples.len())
    }

    /// The median of the ratios within each round.
    pub fn ratio(&self, of: &str, to: &str) -> Interval {
        let ratios = self.get(of).samples.iter().zip(&self.get(to).samples);
        Interval::of_median(ratios.map(|(of, to)| of / to).collect())
    }

    pub fn has(&self, name: &str) -> bool {
        self.ways.iter().any(|way| way.name == name)
    }

    pub fn get(&self, name: &str) -> &Way {
        let way = self.ways.iter().find(|way| way.name == name);
        way.unwrap_or_else(|| panic!("there is no way {name:?}"))
    }
}

/// xorshift64. Its quality does not matter; a fixed seed gives every run the same order.
pub struct Random(pub u64);

impl Random {
    pub fn next(&mut self) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0
    }

    /// The Fisher-Yates shuffle.
    pub fn shuffle<T>(&mut self, items: &mut [T]) {
        for last in (1..items.len()).rev() {
            items.swap(last, (self.next() % (last as u64 + 1)) as usize);
        }
    }
}
