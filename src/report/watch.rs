//! Checks thresholds during a hold: those that end the run, and those that every window of some
//! length must meet.
//!
//! Values come in once a second and are cumulative. A window is a difference of two of them. An
//! unknown value does not end the run.

use std::collections::VecDeque;
use std::time::Duration;

use super::judge::{Threshold, Value};
use crate::measure::{Histogram, Record};
use crate::units::Time;
use crate::words;

/// Tolerance in the time between two looks. A look happens just after each whole second, later if
/// the run is busy.
const LOOK_TOLERANCE: Duration = Duration::from_millis(60);

/// The thresholds of one hold that are checked while it lasts.
#[derive(Default)]
pub struct ThresholdWatch {
    watched: Vec<WatchedThreshold>,
    /// Index of the threshold that ended the run.
    broken: Option<usize>,
}

struct WatchedThreshold {
    threshold: Threshold,
    /// `None` if the hold is checked as a whole.
    windows: Option<Windows>,
    /// The first violation.
    violation: Option<String>,
}

/// The last values of one figure, and the number of windows so far.
struct Windows {
    length: Duration,
    /// Time of each look, and what had come since the look before.
    looks: VecDeque<(Time, Delta)>,
    last: Value,
    /// Sum over all of `looks` but the first.
    sum: Value,
    count: u64,
    violated: u64,
}

/// The difference of two cumulative values.
enum Delta {
    Counter(i64),
    /// Values, with how often each came, because a histogram has room for a hundred times as many.
    /// Then the number of additional missing values.
    Histogram(Vec<(u64, u64)>, i64),
}

impl ThresholdWatch {
    /// Starts a hold. `record` is the run's record at that moment.
    pub fn begin(thresholds: &[Threshold], record: &Record, now: Time) -> ThresholdWatch {
        let watched = thresholds
            .iter()
            .filter(|threshold| threshold.aborts || threshold.window.is_some());
        ThresholdWatch {
            watched: watched
                .map(|threshold| WatchedThreshold {
                    windows: threshold
                        .window
                        .map(|length| Windows::begin(length, threshold.value(record), now)),
                    threshold: threshold.clone(),
                    violation: None,
                })
                .collect(),
            broken: None,
        }
    }

    /// Whether [`ThresholdWatch::take`] wants the hold's own record.
    pub fn wants_hold(&self) -> bool {
        self.watched.iter().any(|watched| watched.windows.is_none())
    }

    /// Takes what was counted until `now`, over the run and since the hold began. Returns why the
    /// run must end, if it must.
    pub fn take(&mut self, record: &Record, hold: Option<&Record>, now: Time) -> Option<String> {
        let mut why = None;
        for (at, watched) in self.watched.iter_mut().enumerate() {
            let violation = match &mut watched.windows {
                Some(windows) => windows.take(&watched.threshold, record, now),
                None => hold.and_then(|hold| {
                    watched
                        .threshold
                        .known_violation(&watched.threshold.value(hold))
                }),
            };
            if watched.threshold.aborts && self.broken.is_none() && violation.is_some() {
                self.broken = Some(at);
                why.clone_from(&violation);
            }
            watched.violation = watched.violation.take().or(violation);
        }
        why
    }

    /// Returns which windows were violated, without the threshold that ended the run. Called after
    /// the hold. A hold too short for a window has not shown that the threshold holds.
    pub fn complaints(&self) -> Vec<String> {
        let complaint = |watched: &WatchedThreshold| {
            let windows = watched.windows.as_ref()?;
            match &watched.violation {
                Some(violation) => Some(format!(
                    "{violation} ({} of {} windows)",
                    windows.violated, windows.count
                )),
                None if windows.count == 0 => Some(format!(
                    "{} does not hold: there was no window so long",
                    watched.threshold
                )),
                None => None,
            }
        };
        let others = self
            .watched
            .iter()
            .enumerate()
            .filter(|(at, _)| self.broken != Some(*at));
        others
            .filter_map(|(_, watched)| complaint(watched))
            .collect()
    }
}

impl Windows {
    fn begin(length: Duration, value: Value, now: Time) -> Windows {
        Windows {
            length,
            looks: VecDeque::from([(now, value.delta(&value))]),
            sum: value.empty(),
            last: value,
            count: 0,
            violated: 0,
        }
    }

    /// Returns why the window that ends now violates the threshold. `None` if it does not, or if
    /// there is no complete window yet.
    fn take(&mut self, threshold: &Threshold, record: &Record, now: Time) -> Option<String> {
        let value = threshold.value(record);
        let delta = value.delta(&self.last);
        self.sum.add(&delta);
        self.looks.push_back((now, delta));
        self.last = value;
        // Keep the shortest stretch that is long enough. The look at its start is the first.
        while self
            .looks
            .get(1)
            .is_some_and(|(at, _)| self.is_long_enough(*at, now))
        {
            self.looks.pop_front();
            if let Some((_, delta)) = self.looks.front() {
                self.sum.remove(delta);
            }
        }
        let (from, _) = self.looks.front()?;
        if !self.is_long_enough(*from, now) {
            return None;
        }
        self.count += 1;
        let why = threshold.violation_of(&self.sum)?;
        self.violated += 1;
        Some(format!(
            "{why} in the {} up to {:.0} s",
            words::duration(self.length),
            now.as_micros() as f64 / 1e6
        ))
    }

    fn is_long_enough(&self, from: Time, now: Time) -> bool {
        now.since(from) + LOOK_TOLERANCE >= self.length
    }
}

impl Value {
    fn delta(&self, earlier: &Value) -> Delta {
        match (self, earlier) {
            (Value::Counter(now), Value::Counter(before)) => Delta::Counter(now - before),
            (Value::Histogram(now, missing), Value::Histogram(before, were_missing)) => {
                Delta::Histogram(now.since(before).sparse(), missing - were_missing)
            }
            _ => unreachable!("a figure has one kind of value"),
        }
    }

    fn empty(&self) -> Value {
        match self {
            Value::Counter(_) => Value::Counter(0),
            Value::Histogram(..) => Value::Histogram(Histogram::default(), 0),
        }
    }

    fn add(&mut self, delta: &Delta) {
        match (self, delta) {
            (Value::Counter(sum), Delta::Counter(more)) => *sum += more,
            (Value::Histogram(sum, missing), Delta::Histogram(more, more_missing)) => {
                sum.merge(&Histogram::from_sparse(more));
                *missing += more_missing;
            }
            _ => unreachable!("a figure has one kind of value"),
        }
    }

    fn remove(&mut self, delta: &Delta) {
        match (self, delta) {
            (Value::Counter(sum), Delta::Counter(less)) => *sum -= less,
            (Value::Histogram(sum, missing), Delta::Histogram(less, less_missing)) => {
                *sum = sum.since(&Histogram::from_sparse(less));
                *missing -= less_missing;
            }
            _ => unreachable!("a figure has one kind of value"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A hold from second 10 on with 50 frames a second. `latency(second)` is the latency of each,
    /// and `lost` is how many of them never came.
    fn held(
        thresholds: &[&str],
        seconds: u64,
        latency: impl Fn(u64) -> u64,
        lost: impl Fn(u64) -> u64,
    ) -> (Option<(u64, String)>, Vec<String>) {
        let thresholds: Vec<Threshold> = thresholds
            .iter()
            .map(|text| text.parse().unwrap())
            .collect();
        let mut record = Record::default();
        // Values from before the hold do not count.
        (0..500).for_each(|_| record.audio.one_way_latency.record_micros(900_000));
        (record.audio.frames_expected, record.audio.frames_delivered) = (500, 500);
        let before = record.clone();
        let mut watch = ThresholdWatch::begin(&thresholds, &record, Time::from_millis(9_700));
        for second in 0..seconds {
            let delivered = 50 - lost(second);
            (0..delivered)
                .for_each(|_| record.audio.one_way_latency.record_micros(latency(second)));
            record.audio.frames_expected += 50;
            record.audio.frames_delivered += delivered;
            record.audio.freezes += u64::from(latency(second) > 100_000);
            let mut hold = record.since(&before);
            let missing = hold.audio.frames_expected - hold.audio.frames_delivered;
            hold.audio
                .one_way_latency
                .expect(hold.audio.one_way_latency.count() + missing);
            if let Some(broken) = watch.take(
                &record,
                Some(&hold),
                Time::from_millis(10_750 + second * 1_000 + second % 3 * 20),
            ) {
                return (Some((second, broken)), watch.complaints());
            }
        }
        (None, watch.complaints())
    }

    const ALL_CAME: fn(u64) -> u64 = |_| 0;

    #[test]
    fn a_bad_stretch_that_the_whole_hides_is_found_by_its_windows() {
        let stretch = |second| {
            if (30..40).contains(&second) {
                400_000
            } else {
                20_000
            }
        };
        let (broken, complaints) = held(
            &["audio.one_way_latency.p50<150ms for 10s"],
            100,
            stretch,
            ALL_CAME,
        );
        assert_eq!(broken, None);
        // Windows with at least six bad seconds out of ten: those that end with seconds 35 to 43.
        assert_eq!(
            complaints,
            [
                "audio.one_way_latency.p50<150ms for 10s does not hold: it is 400 ms in the 10s up to 46 s (9 of 91 windows)"
            ]
        );
        let (_, complaints) = held(
            &[
                "audio.one_way_latency.p50<150ms for 30s",
                "audio.freezes<11 for 10s",
            ],
            100,
            stretch,
            ALL_CAME,
        );
        assert_eq!(complaints, Vec::<String>::new());
        let (_, complaints) = held(&["audio.freezes<10 for 10s"], 100, stretch, ALL_CAME);
        assert!(
            complaints[0].contains("it is 10 in the 10s up to 50 s (1 of 91 windows)"),
            "{complaints:?}"
        );
    }

    #[test]
    fn what_is_missing_in_a_window_is_later_than_everything() {
        let (_, complaints) = held(
            &["audio.one_way_latency.p95<150ms for 5s"],
            20,
            |_| 20_000,
            |second| if second == 7 { 20 } else { 0 },
        );
        assert!(
            complaints[0].contains("never") && complaints[0].contains("5 of 16 windows"),
            "{complaints:?}"
        );
    }

    #[test]
    fn a_threshold_that_aborts_does_so_at_the_second_that_breaks_it_and_not_for_want_of_values() {
        let worse = |second| if second < 7 { 20_000 } else { 300_000 };
        let (broken, _) = held(
            &[
                "audio.one_way_latency.p90<150ms:abort",
                "audio.jitter.p95<1ms:abort",
            ],
            60,
            worse,
            ALL_CAME,
        );
        assert_eq!(
            broken.unwrap(),
            (
                7,
                "audio.one_way_latency.p90<150ms:abort does not hold: it is 300 ms".to_owned()
            )
        );
        let (broken, complaints) = held(
            &["audio.one_way_latency.p90<150ms for 4s:abort"],
            60,
            worse,
            ALL_CAME,
        );
        assert_eq!((broken.unwrap().0, complaints), (7, Vec::new()));
    }

    #[test]
    fn a_hold_too_short_for_a_window_shows_nothing() {
        let (broken, complaints) = held(&["audio.freezes<1 for 30s"], 20, |_| 20_000, ALL_CAME);
        assert_eq!((broken, complaints.len()), (None, 1));
        assert!(
            complaints[0].contains("no window so long"),
            "{complaints:?}"
        );
    }
}
