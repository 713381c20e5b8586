//! The bench harness. Ways to do the same thing take turns in small batches in one process, and the
//! report has the ratios within each round. Absolute times on a shared machine say little; the ratio
//! of two batches that ran within the same millisecond says more.
//!
//! ```text
//! let mut report = Report::new("name");
//! let pinned = cpu::pin();
//! let [pair] = Contest::new(["pair"])
//!     .way("baseline", || [per_op(100, || { ... })])
//!     .way("ours", || [per_op(100, || { ... })])
//!     .run(report.args().rounds(2_000));
//! report.comparison("pair", "Open and close", &pair);
//! report.at_most("open and close, ours / baseline", pair.ratio("ours", "baseline"), 1.01);
//! report.finish()
//! ```

pub mod args;
pub mod contest;
pub mod cpu;
pub mod machine;
pub mod plot;
pub mod progress;
pub mod report;
pub mod stats;
pub mod threads;

pub use args::Args;
pub use contest::{Comparison, Contest, per_op};
pub use plot::{Axis, Lines, Series};
pub use report::Report;
pub use stats::Interval;
