//! Medians, and how far to trust them.

/// A median with a 95 % confidence interval.
#[derive(Clone, Copy, Debug)]
pub struct Interval {
    pub low: f64,
    pub median: f64,
    pub high: f64,
}

impl Interval {
    /// The interval is that of the order statistics: the true median lies below the k-th smallest of n
    /// independent values with the probability of less than k heads in n throws. It assumes nothing of
    /// how the values are distributed. Of less than six values it is their whole range.
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
        // 1.0004 is not 1.000 to somebody who compares it with a bound of 0.5 %; and of a large ratio the
        // noise leaves no such digits.
        let digits = match median {
            ..0.5 => 3,
            ..2.0 => 4,
            ..10.0 => 2,
            _ => 1,
        };
        write!(f, "{median:.digits$} ({low:.digits$} to {high:.digits$})")
    }
}

/// Of sorted values.
fn median(sorted: &[f64]) -> f64 {
    let middle = sorted.len() / 2;
    if sorted.len() % 2 == 1 {
        sorted[middle]
    } else {
        f64::midpoint(sorted[middle - 1], sorted[middle])
    }
}
