//! Percentile files (`.hgrm`) for HdrHistogram's plotter: one per histogram, values in
//! milliseconds.

use std::fmt::Write as _;
use std::io;
use std::path::Path;

use crate::measure::{Histogram, Record};

/// Reporting points per halving of the distance to 100 %. HdrHistogram's own tools use the same.
const TICKS_PER_HALF_DISTANCE: u32 = 5;

/// Writes `SCOPE.METRIC.hgrm` into `dir` for every histogram that applies.
pub fn write(dir: &Path, record: &Record) -> io::Result<()> {
    let session = record
        .session
        .histograms()
        .map(|(name, histogram)| ("session", name, histogram));
    let audio = record
        .audio
        .histograms()
        .map(|(name, histogram)| ("audio", name, histogram));
    let video = record
        .video
        .histograms()
        .map(|(name, histogram)| ("video", name, histogram));
    let bandwidth = record
        .bandwidth
        .histograms()
        .map(|(name, histogram)| ("bandwidth", name, histogram));
    let engine = record
        .engine
        .histograms()
        .map(|(name, histogram)| ("engine", name, histogram));
    for (scope, name, histogram) in session
        .chain(audio)
        .chain(video)
        .chain(bandwidth)
        .chain(engine)
    {
        if histogram.expected() > 0 {
            std::fs::write(dir.join(format!("{scope}.{name}.hgrm")), render(histogram))?;
        }
    }
    Ok(())
}

/// Renders one histogram. Percentiles are over the *expected* values: the curve ends where the
/// missing ones begin, and the last line counts them.
pub fn render(histogram: &Histogram) -> String {
    let (hdr, expected) = (histogram.hdr(), histogram.expected().max(1));
    let mut text = "       Value     Percentile TotalCount 1/(1-Percentile)\n\n".to_owned();
    let mut total = 0;
    for step in hdr.iter_quantiles(TICKS_PER_HALF_DISTANCE) {
        total += step.count_since_last_iteration();
        let share = total as f64 / expected as f64;
        let value = step.value_iterated_to().min(hdr.max()) as f64 / 1e3;
        let _ = if total == expected {
            writeln!(text, "{value:12.3} {share:14.12} {total:10}")
        } else {
            writeln!(
                text,
                "{value:12.3} {share:14.12} {total:10} {:14.2}",
                1.0 / (1.0 - share)
            )
        };
    }
    let _ = writeln!(
        text,
        "#[Mean    = {:12.3}, StdDeviation   = {:12.3}]",
        hdr.mean() / 1e3,
        hdr.stdev() / 1e3
    );
    let _ = writeln!(
        text,
        "#[Max     = {:12.3}, Total count    = {:12}]",
        hdr.max() as f64 / 1e3,
        hdr.len()
    );
    let _ = writeln!(
        text,
        "#[Missing = {:12} of {:12} expected]",
        expected.saturating_sub(hdr.len()),
        expected
    );
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_curve_ends_where_the_missing_begin() {
        let mut histogram = Histogram::default();
        histogram.expect(200);
        (1..=100).for_each(|ms| histogram.record_micros(ms * 1_000));
        let text = render(&histogram);
        let last = text.lines().rfind(|line| !line.starts_with('#')).unwrap();
        let fields: Vec<_> = last.split_whitespace().collect();
        assert_eq!(fields[1..], ["0.500000000000", "100", "2.00"]);
        assert!(text.ends_with("of          200 expected]\n"));
    }
}
