//! The end of a bench: criterion's estimates as one table, with ratios to a floor of the same run.

use std::path::PathBuf;
use std::time::{Duration, SystemTime};

use criterion::Criterion;

/// Rows of one bench, in the order in which they ran.
pub struct Table {
    title: &'static str,
    started: SystemTime,
    rows: Vec<Row>,
}

struct Row {
    group: String,
    name: &'static str,
    /// Units of work in one criterion iteration.
    per: f64,
}

/// Returns criterion as all benches configure it. Times are short, because there are many rows, and
/// rows that are compared run one after the other.
pub fn criterion() -> Criterion {
    Criterion::default()
        .warm_up_time(Duration::from_millis(300))
        .measurement_time(Duration::from_millis(1_200))
        .sample_size(20)
        .without_plots()
        .output_directory(&directory())
        .configure_from_args()
}

fn directory() -> PathBuf {
    PathBuf::from(env!("CARGO_TARGET_TMPDIR")).join("criterion")
}

impl Table {
    pub fn new(title: &'static str) -> Table {
        Table {
            title,
            started: SystemTime::now(),
            rows: Vec::new(),
        }
    }

    /// The first row of a group is its floor.
    pub fn add(&mut self, group: &str, name: &'static str) {
        self.add_per(group, name, 1.0);
    }

    /// A row whose iterations do `per` units of work each.
    pub fn add_per(&mut self, group: &str, name: &'static str, per: f64) {
        self.rows.push(Row {
            group: group.to_owned(),
            name,
            per,
        });
    }

    /// Prints what has been measured in this run, or nothing if nothing was.
    pub fn print(&self) {
        let measured: Vec<(&Row, Estimate)> = self
            .rows
            .iter()
            .filter_map(|row| Some((row, self.estimate(row)?)))
            .collect();
        if measured.is_empty() {
            return;
        }
        println!("\n{}", self.title);
        let mut floor: Option<(&str, f64)> = None;
        for (row, estimate) in measured {
            let group = row.group.as_str();
            if floor.is_none_or(|(of, _)| of != group) {
                floor = Some((group, estimate.median));
                println!("  {group}");
            }
            let ratio = floor.map_or(1.0, |(_, floor)| estimate.median / floor);
            println!(
                "    {:<28} {:>12}  [{} .. {}]  {ratio:.2}x",
                row.name,
                time(estimate.median),
                time(estimate.low),
                time(estimate.high)
            );
        }
    }

    /// Returns the estimate in nanoseconds per unit of work, or `None` if the row did not run this
    /// time.
    fn estimate(&self, row: &Row) -> Option<Estimate> {
        let path = directory()
            .join(&row.group)
            .join(row.name)
            .join("new/estimates.json");
        let age = std::fs::metadata(&path).ok()?.modified().ok()?;
        if age < self.started {
            return None;
        }
        let estimates: serde_json::Value =
            serde_json::from_str(&std::fs::read_to_string(path).ok()?).ok()?;
        let median = &estimates["median"];
        Some(Estimate {
            median: median["point_estimate"].as_f64()? / row.per,
            low: median["confidence_interval"]["lower_bound"].as_f64()? / row.per,
            high: median["confidence_interval"]["upper_bound"].as_f64()? / row.per,
        })
    }
}

/// A median with its 95 % interval.
struct Estimate {
    median: f64,
    low: f64,
    high: f64,
}

fn time(nanos: f64) -> String {
    match nanos {
        _ if nanos < 10_000.0 => format!("{nanos:.0} ns"),
        _ if nanos < 10_000_000.0 => format!("{:.1} us", nanos / 1e3),
        _ => format!("{:.1} ms", nanos / 1e6),
    }
}
