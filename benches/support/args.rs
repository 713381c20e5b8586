//! The command line of a bench.

/// How long to measure.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Effort {
    /// Without `--bench`, as `cargo test --benches` runs it: only checks that the bench works.
    Smoke,
    /// `--quick`
    Quick,
    Full,
}

#[derive(Clone, Debug)]
pub struct Args {
    pub effort: Effort,
    /// Run only parts whose id contains one of these. If empty, run all parts.
    filters: Vec<String>,
}

impl Args {
    pub fn parse() -> Self {
        let mut filters = Vec::new();
        let (mut bench, mut quick) = (false, false);
        for arg in std::env::args().skip(1) {
            match arg.as_str() {
                "--bench" => bench = true,
                "--quick" => quick = true,
                // `cargo test` passes its harness options to benches too.
                option if option.starts_with('-') => eprintln!("ignoring option {option}"),
                _ => filters.push(arg),
            }
        }
        let effort = match (bench, quick) {
            (false, _) => Effort::Smoke,
            (true, true) => Effort::Quick,
            (true, false) => Effort::Full,
        };
        Self { effort, filters }
    }

    pub fn wants(&self, id: &str) -> bool {
        self.filters.is_empty() || self.filters.iter().any(|filter| id.contains(filter))
    }

    /// The number of rounds, given that of a full run.
    pub fn rounds(&self, full: usize) -> usize {
        match self.effort {
            Effort::Smoke => 3,
            Effort::Quick => (full / 10).max(20),
            Effort::Full => full,
        }
    }

    /// The number of items to set up, given that of a full run.
    pub fn size(&self, full: usize) -> usize {
        match self.effort {
            Effort::Smoke => full.min(1_000),
            Effort::Quick | Effort::Full => full,
        }
    }
}
