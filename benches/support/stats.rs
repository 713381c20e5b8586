//! Medians with confidence intervals.

/// A median with a 95 % confidence interval.
#[derive(Clone, Copy, Debug)]
pub struct Interval {
    pub low: f64,
    pub median: f64,
    pub high: f64,
}

impl Interval {
    /// The interval comes from order statistics: the true median is below the k-th smallest of n
    /// independent values with the probability of fewer than k heads in n coin tosses. This assumes
    /// nothing about the distribution of the values. For fewer than six values, it is their whole range.
    pub fn of_median(mut values: Vec<f64>) -> Self {
        assert!(!values.is_empty(), "no values");
        values.sort_by(f64::total_cmp);
        let n = values.len() as f64;
        // 1.96 standard deviations of the number of heads.
        let reach = 1.96 * n.sqrt() / 2.0;
        let low = (n / 2.0 - reach).floor().max(0.0) as usize;
        Self {
            low: values[low],
            median: median(&values),
            high: values[values.len() - 1 - low],
        }
    }
}

impl std::fmt::Display for Interval {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let Self { low, median, high } = self;
        // Ratios near 1 need four digits to compare with a limit of 0.5 %. In larger ratios, noise makes
        // such digits meaningless.
        let digits = match median {
            ..0.5 => 3,
            ..2.0 => 4,
            ..10.0 => 2,
            _ => 1,
        };
        write!(f, "{median:.digits$} ({low:.digits$} to {high:.digits$})")
    }
}

/// The median of sorted values.
fn median(sorted: &[f64]) -> f64 {
    let middle = sorted.len() / 2;
    if sorted.len() % 2 == 1 {
        sorted[middle]
    } else {
        f64::midpoint(sorted[middle - 1], sorted[middle])
    }
}
