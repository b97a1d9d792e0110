//! HDR histogram of microseconds that also counts how many values were expected.

use std::time::Duration;

/// Largest recorded value: one minute. A larger value is recorded as this one, because a minute
/// means "broken" for everything that we time.
pub(super) const MICROS_MAX: u64 = 60_000_000;
pub(super) const SIGNIFICANT_DIGITS: u8 = 3;

/// Histogram of microseconds with three significant digits. An expected value that never came
/// counts as later than every value that came.
///
/// The expected count is what the recorder announced with [`Histogram::expect`], and never less
/// than the number of recorded values.
#[derive(Clone)]
pub struct Histogram {
    hdr: hdrhistogram::Histogram<u64>,
    expected: u64,
}

impl Default for Histogram {
    /// Allocates all memory at once; recording allocates nothing.
    fn default() -> Histogram {
        let hdr = hdrhistogram::Histogram::new_with_bounds(1, MICROS_MAX, SIGNIFICANT_DIGITS)
            .expect("bounds are constants that the library accepts");
        Histogram { hdr, expected: 0 }
    }
}

impl Histogram {
    /// Builds a histogram from what another host recorded and announced. `hdr` has our own bounds.
    pub(super) fn from_parts(hdr: hdrhistogram::Histogram<u64>, expected: u64) -> Histogram {
        Histogram { hdr, expected }
    }

    /// Announces `count` values that ought to be recorded. Histograms whose values need no
    /// announcement never call this.
    pub fn expect(&mut self, count: u64) {
        self.expected += count;
    }

    /// Returns a copy with the same values and `expected` as the announced count.
    #[must_use]
    pub fn expecting(&self, expected: u64) -> Histogram {
        Histogram {
            expected,
            ..self.clone()
        }
    }

    pub fn record(&mut self, value: Duration) {
        self.record_micros(value.as_micros() as u64);
    }

    pub fn record_micros(&mut self, micros: u64) {
        self.hdr.saturating_record(micros.min(MICROS_MAX));
    }

    pub fn count(&self) -> u64 {
        self.hdr.len()
    }

    /// Returns the count announced with [`Histogram::expect`], however many values came.
    pub(super) fn announced(&self) -> u64 {
        self.expected
    }

    pub fn expected(&self) -> u64 {
        self.expected.max(self.hdr.len())
    }

    /// Returns the value in microseconds below which `share` (0..=1) of the *expected* values lie.
    /// `None` if that rank falls among the missing values, or if nothing was expected.
    pub fn quantile(&self, share: f64) -> Option<u64> {
        let rank = (share * self.expected() as f64).ceil().max(1.0) as u64;
        (rank <= self.count()).then(|| self.value_at_rank(rank))
    }

    /// Returns the value at or below which `share` (0..=1) of the *expected* values lie, for a
    /// figure of which less is worse. Missing values count as the worst. `None` if the rank falls
    /// among them.
    pub fn low_quantile(&self, share: f64) -> Option<u64> {
        let rank = (share * self.expected() as f64).ceil().max(1.0) as u64;
        let rank = rank.checked_sub(self.expected() - self.count())?;
        (1..=self.count())
            .contains(&rank)
            .then(|| self.value_at_rank(rank))
    }

    /// Returns the value of the given rank; rank 1 is the smallest value.
    fn value_at_rank(&self, rank: u64) -> u64 {
        // The library multiplies the share by the count and rounds up. Half a rank less keeps the
        // product below the next rank: in floating point, 15 / 29 * 29 exceeds 15.
        self.hdr
            .value_at_quantile((rank as f64 - 0.5) / self.count() as f64)
    }

    /// Returns the smallest recorded value.
    pub fn min(&self) -> Option<u64> {
        (self.count() > 0).then(|| self.hdr.min())
    }

    /// Returns the mean of the recorded values.
    pub fn mean(&self) -> Option<f64> {
        (self.count() > 0).then(|| self.hdr.mean())
    }

    /// Returns the largest recorded value; `None` while an expected value is missing.
    pub fn max(&self) -> Option<u64> {
        (self.count() > 0 && self.count() == self.expected()).then(|| self.hdr.max())
    }

    /// Empties the histogram and keeps its memory. An empty histogram costs nothing to clear.
    pub fn clear(&mut self) {
        if !self.hdr.is_empty() {
            self.hdr.reset();
        }
        self.expected = 0;
    }

    pub fn merge(&mut self, other: &Histogram) {
        if !other.hdr.is_empty() {
            self.hdr
                .add(&other.hdr)
                .expect("all histograms share their bounds");
        }
        self.expected += other.expected;
    }

    /// Returns what was recorded since `earlier`, an older state of the same histogram.
    pub fn since(&self, earlier: &Histogram) -> Histogram {
        let mut difference = self.clone();
        if !earlier.hdr.is_empty() {
            difference
                .hdr
                .subtract(&earlier.hdr)
                .expect("an earlier value of the same histogram never counts more");
        }
        difference.expected = self.expected.saturating_sub(earlier.expected);
        difference
    }

    /// Returns each recorded value with its count.
    pub fn sparse(&self) -> Vec<(u64, u64)> {
        let values = self.hdr.iter_recorded();
        values
            .map(|value| {
                (
                    value.value_iterated_to(),
                    value.count_since_last_iteration(),
                )
            })
            .collect()
    }

    /// Builds the histogram that [`Histogram::sparse`] was called on, without its expected count.
    pub fn from_sparse(values: &[(u64, u64)]) -> Histogram {
        let mut histogram = Histogram::default();
        for (value, count) in values {
            histogram
                .hdr
                .saturating_record_n((*value).min(MICROS_MAX), *count);
        }
        histogram
    }

    pub fn hdr(&self) -> &hdrhistogram::Histogram<u64> {
        &self.hdr
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_never_came_is_later_than_everything() {
        let mut histogram = Histogram::default();
        histogram.expect(100);
        (1..=90).for_each(|ms| histogram.record_micros(ms * 1_000));
        assert!(histogram.quantile(0.5).unwrap().abs_diff(50_000) <= 50);
        assert!(histogram.quantile(0.9).unwrap().abs_diff(90_000) <= 90);
        assert_eq!(histogram.quantile(0.95), None);
        assert_eq!(histogram.max(), None);
        assert_eq!(Histogram::default().quantile(0.5), None);
    }

    #[test]
    fn a_quantile_is_the_value_of_its_rank_whatever_the_count() {
        let mut histogram = Histogram::default();
        for count in 1..=1_000 {
            histogram.record_micros(count);
            for (share, thousandths) in [
                (0.5, 500),
                (0.9, 900),
                (0.95, 950),
                (0.99, 990),
                (0.999, 999),
            ] {
                let rank = (thousandths * count).div_ceil(1_000);
                assert_eq!(histogram.quantile(share), Some(rank), "{share} of {count}");
            }
        }
    }

    #[test]
    fn where_less_is_worse_what_never_came_is_worst() {
        let mut scores = Histogram::default();
        (1..=90).for_each(|score| scores.record_micros(score * 20));
        assert_eq!(
            (scores.low_quantile(0.01), scores.low_quantile(0.5)),
            (Some(20), Some(45 * 20))
        );
        scores.expect(100);
        assert_eq!(
            (scores.low_quantile(0.01), scores.low_quantile(0.1)),
            (None, None)
        );
        assert_eq!(
            (scores.low_quantile(0.11), scores.low_quantile(1.0)),
            (Some(20), Some(90 * 20))
        );
        assert_eq!(Histogram::default().low_quantile(0.5), None);
    }

    #[test]
    fn what_is_made_of_its_values_is_the_same_histogram() {
        let mut histogram = Histogram::default();
        (0..3_000).for_each(|n| histogram.record_micros(n * n));
        histogram.record_micros(u64::MAX);
        let again = Histogram::from_sparse(&histogram.sparse());
        assert_eq!(
            (again.hdr(), again.quantile(0.95)),
            (histogram.hdr(), histogram.quantile(0.95))
        );
        assert!(Histogram::default().sparse().is_empty());
    }

    #[test]
    fn a_merge_equals_one_histogram_of_all_values_and_a_difference_undoes_it() {
        let (mut left, mut right, mut both) = (
            Histogram::default(),
            Histogram::default(),
            Histogram::default(),
        );
        for value in 0..5_000u64 {
            let target = if value % 3 == 0 {
                &mut left
            } else {
                &mut right
            };
            target.record_micros(value * 37);
            both.record_micros(value * 37);
        }
        let before = left.clone();
        left.merge(&right);
        assert_eq!(left.hdr(), both.hdr());
        assert_eq!(left.since(&before).hdr(), right.hdr());
    }
}
