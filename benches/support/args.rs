//! What a bench is asked to do.

/// How much of it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Effort {
    /// Without `--bench`, as `cargo test --benches` runs it: to see that it works.
    Smoke,
    /// `--quick`
    Quick,
    Full,
}

#[derive(Clone, Debug)]
pub struct Args {
    pub effort: Effort,
    /// Parts whose id contains one of these; all, if there is none.
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
                // `cargo test` hands its harnesses' options to benches as well.
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

    /// How many rounds, where a full run has this many.
    pub fn rounds(&self, full: usize) -> usize {
        match self.effort {
            Effort::Smoke => 3,
            Effort::Quick => (full / 10).max(20),
            Effort::Full => full,
        }
    }

    /// What to set up in which number, where a full run has this many.
    pub fn size(&self, full: usize) -> usize {
        match self.effort {
            Effort::Smoke => full.min(1_000),
            Effort::Quick | Effort::Full => full,
        }
    }
}
