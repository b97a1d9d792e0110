//! Detects whether the queue of the bottleneck grows: draft-ietf-rmcat-gcc-02, sections 5.2 to 5.4,
//! with libwebrtc's trend line in place of the Kalman filter.

use std::time::Duration;

use crate::units::Time;

/// Packets sent within this time form one group, because the packets of a burst queue behind each
/// other.
const GROUP: Duration = Duration::from_millis(5);
/// Maximum length of a burst: packets that arrive together after a pause of the network form one
/// group, up to this length.
const BURST_MAX: Duration = Duration::from_millis(100);
/// Limit of a step between groups. Arrivals that jump by more than this say nothing about a queue.
const JUMP: Duration = Duration::from_secs(3);
/// Number of consecutive groups that arrive before their predecessor until the grouping starts
/// anew.
const REORDERED_MAX: u8 = 3;

/// Number of points that the trend line is fitted to.
const WINDOW: usize = 20;
/// Share of its old value that the smoothed delay keeps with each group.
const SMOOTHING: f64 = 0.9;
/// The slope is a very small number. It is multiplied by the number of groups, up to this limit,
/// and by the gain.
const GROUPS_MAX: u32 = 60;
const GAIN: f64 = 4.0;
/// The queue has to grow for this long, by the sender's clock, before it counts as overuse.
const OVERUSE_MS: f64 = 10.0;
/// The slope is compared with a threshold. The threshold follows the slope, so that a competing
/// flow that fills queues does not starve us. It rises more slowly than it falls.
const THRESHOLD_FIRST: f64 = 12.5;
const THRESHOLD_MIN: f64 = 6.0;
const THRESHOLD_MAX: f64 = 600.0;
const THRESHOLD_UP: f64 = 0.0087;
const THRESHOLD_DOWN: f64 = 0.039;
/// A slope this far above the threshold is a sudden loss of capacity. The threshold does not adapt
/// to it.
const ADAPT_MAX: f64 = 15.0;
const ADAPT_MS_MAX: f64 = 100.0;

/// State of the bottleneck's queue.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Usage {
    #[default]
    Normal,
    /// The queue grows.
    Over,
    /// The queue drains.
    Under,
}

/// Trend of the delay over the packets of one path.
#[derive(Clone, Debug, Default)]
pub struct DelayTrend {
    group: Option<Group>,
    before: Option<Group>,
    reordered: u8,
    line: TrendLine,
    detector: Detector,
}

/// Group of packets that were sent together or arrived together.
#[derive(Clone, Copy, Debug)]
struct Group {
    first_sent: Time,
    last_sent: Time,
    first_arrival: Time,
    last_arrival: Time,
}

impl Group {
    fn new(sent: Time, arrival: Time) -> Group {
        Group {
            first_sent: sent,
            last_sent: sent,
            first_arrival: arrival,
            last_arrival: arrival,
        }
    }

    /// Returns whether a packet belongs to the group: it was sent with the others, or it was held
    /// up together with them. A packet that was held up arrives close behind the group, and the
    /// distance is shorter than when it was sent.
    fn takes(&self, sent: Time, arrival: Time) -> bool {
        let apart = arrival.since(self.last_arrival);
        let caught_up = apart <= GROUP
            && arrival.since(self.first_arrival) < BURST_MAX
            && apart < sent.since(self.last_sent);
        sent == self.last_sent || caught_up || sent.since(self.first_sent) <= GROUP
    }
}

impl DelayTrend {
    pub fn usage(&self) -> Usage {
        self.detector.usage
    }

    /// Takes a packet. Only differences of `sent` matter, so it may come from any clock. Packets
    /// come in the order of their arrival.
    pub fn handle_packet(&mut self, sent: Time, arrival: Time) {
        let Some(group) = &mut self.group else {
            self.group = Some(Group::new(sent, arrival));
            return;
        };
        if sent < group.first_sent {
            return;
        }
        if group.takes(sent, arrival) {
            group.last_sent = group.last_sent.max(sent);
            group.last_arrival = arrival;
            return;
        }
        let complete = std::mem::replace(group, Group::new(sent, arrival));
        if let Some(before) = self.before {
            self.compare(&before, &complete);
        }
        // `compare` may have started over; then the completed group is forgotten too.
        if self.group.is_some() {
            self.before = Some(complete);
        }
    }

    fn compare(&mut self, before: &Group, group: &Group) {
        if group.last_arrival < before.last_arrival {
            self.reordered += 1;
            if self.reordered >= REORDERED_MAX {
                self.start_over();
            }
            return;
        }
        self.reordered = 0;
        let arrival_apart = group.last_arrival.since(before.last_arrival);
        let sent_apart = group.last_sent.since(before.last_sent);
        if arrival_apart.max(sent_apart) >= JUMP {
            return self.start_over();
        }
        let (arrival_ms, sent_ms) = (millis(arrival_apart), millis(sent_apart));
        let slope = self.line.add(arrival_ms - sent_ms, group.last_arrival);
        self.detector
            .handle_slope(slope, self.line.groups, sent_ms, group.last_arrival);
    }

    /// Resets the groups only. The trend line and the detector keep their state.
    fn start_over(&mut self) {
        (self.group, self.before, self.reordered) = (None, None, 0);
    }
}

fn millis(duration: Duration) -> f64 {
    duration.as_nanos() as f64 / 1e6
}

/// Least-squares line through the newest points of (arrival, smoothed delay).
#[derive(Clone, Debug, Default)]
struct TrendLine {
    points: [(Time, f64); WINDOW],
    /// Place of the next point.
    next: usize,
    groups: u32,
    delay_ms: f64,
    smoothed_ms: f64,
    slope: f64,
}

impl TrendLine {
    /// Takes the growth of the delay and returns the slope in ms per ms. The slope is 0 until there
    /// are enough points.
    fn add(&mut self, growth_ms: f64, arrival: Time) -> f64 {
        self.delay_ms += growth_ms;
        self.smoothed_ms = SMOOTHING * self.smoothed_ms + (1.0 - SMOOTHING) * self.delay_ms;
        self.points[self.next] = (arrival, self.smoothed_ms);
        self.next = (self.next + 1) % WINDOW;
        self.groups = self.groups.saturating_add(1);
        if self.groups as usize >= WINDOW {
            self.slope = self.fit().unwrap_or(self.slope);
        }
        self.slope
    }

    fn fit(&self) -> Option<f64> {
        let oldest = self.points[self.next].0;
        let points = self
            .points
            .map(|(at, delay)| (millis(at.since(oldest)), delay));
        let mean = |of: fn(&(f64, f64)) -> f64| points.iter().map(of).sum::<f64>() / WINDOW as f64;
        let (x_mean, y_mean) = (mean(|point| point.0), mean(|point| point.1));
        let (mut above, mut below) = (0.0, 0.0);
        for (x, y) in points {
            above += (x - x_mean) * (y - y_mean);
            below += (x - x_mean) * (x - x_mean);
        }
        (below > 0.0).then(|| above / below)
    }
}

/// Compares the slope with an adaptive threshold.
#[derive(Clone, Debug)]
struct Detector {
    usage: Usage,
    threshold: f64,
    slope_before: f64,
    /// Time that the slope has been above the threshold, in ms.
    over_ms: Option<f64>,
    times_over: u32,
    adapted_at: Option<Time>,
}

impl Default for Detector {
    fn default() -> Detector {
        Detector {
            usage: Usage::Normal,
            threshold: THRESHOLD_FIRST,
            slope_before: 0.0,
            over_ms: None,
            times_over: 0,
            adapted_at: None,
        }
    }
}

impl Detector {
    fn handle_slope(&mut self, slope: f64, groups: u32, sent_apart_ms: f64, now: Time) {
        if groups < 2 {
            return;
        }
        let weighed = f64::from(groups.min(GROUPS_MAX)) * slope * GAIN;
        if weighed > self.threshold {
            // For the first step above the threshold, growth may have begun anywhere within the
            // step.
            let over_ms = self
                .over_ms
                .map_or(sent_apart_ms / 2.0, |over_ms| over_ms + sent_apart_ms);
            self.over_ms = Some(over_ms);
            self.times_over += 1;
            if over_ms > OVERUSE_MS && self.times_over > 1 && slope >= self.slope_before {
                (self.over_ms, self.times_over) = (Some(0.0), 0);
                self.usage = Usage::Over;
            }
        } else {
            (self.over_ms, self.times_over) = (None, 0);
            self.usage = if weighed < -self.threshold {
                Usage::Under
            } else {
                Usage::Normal
            };
        }
        self.slope_before = slope;
        self.adapt(weighed.abs(), now);
    }

    fn adapt(&mut self, weighed: f64, now: Time) {
        let before = self.adapted_at.replace(now).unwrap_or(now);
        if weighed > self.threshold + ADAPT_MAX {
            return;
        }
        let gain = if weighed < self.threshold {
            THRESHOLD_DOWN
        } else {
            THRESHOLD_UP
        };
        let elapsed = millis(now.since(before)).min(ADAPT_MS_MAX);
        // These bounds come from the draft. They keep the control loop stable.
        self.threshold = (self.threshold + gain * (weighed - self.threshold) * elapsed)
            .clamp(THRESHOLD_MIN, THRESHOLD_MAX);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::seeded::Seeded;

    /// Sends packets every 10 ms by the sender's clock. Each arrives `delay(n)` us later at the
    /// receiver.
    fn run(
        trend: &mut DelayTrend,
        packets: std::ops::Range<u64>,
        mut delay: impl FnMut(u64) -> u64,
    ) -> Vec<Usage> {
        packets
            .map(|n| {
                let sent = Time::from_millis(1_000 + 10 * n);
                trend.handle_packet(sent, sent + Duration::from_micros(5_000 + delay(n)));
                trend.usage()
            })
            .collect()
    }

    #[test]
    fn a_queue_that_grows_is_overuse_and_one_that_empties_is_underuse() {
        let mut trend = DelayTrend::default();
        assert!(
            run(&mut trend, 0..100, |_| 0)
                .iter()
                .all(|usage| *usage == Usage::Normal)
        );
        // The queue grows by 1 ms every 10 ms.
        let growing = run(&mut trend, 100..140, |n| (n - 100) * 1_000);
        let noticed = growing
            .iter()
            .position(|usage| *usage == Usage::Over)
            .expect("noticed");
        assert!(
            (3..30).contains(&noticed),
            "after some groups, not the first: {noticed}"
        );
        let emptying = run(&mut trend, 140..200, |n| {
            40_000 - ((n - 140) * 2_000).min(40_000)
        });
        assert!(emptying.contains(&Usage::Under), "{emptying:?}");
        assert_eq!(
            run(&mut trend, 200..300, |_| 0).last(),
            Some(&Usage::Normal)
        );
    }

    #[test]
    fn jitter_without_a_trend_and_a_constant_delay_are_no_overuse() {
        for seed in 0..20 {
            let (mut trend, mut random) = (DelayTrend::default(), Seeded::new(seed));
            let usages = run(&mut trend, 0..2_000, |_| random.below(4_000));
            let over = usages.iter().filter(|usage| **usage == Usage::Over).count();
            assert!(over < 20, "seed {seed}: {over} of 2,000");
            let mut constant = DelayTrend::default();
            assert!(
                run(&mut constant, 0..500, |_| 300_000)
                    .iter()
                    .all(|usage| *usage == Usage::Normal)
            );
        }
    }

    #[test]
    fn a_burst_is_one_group_however_long_its_tail_queues() {
        let mut trend = DelayTrend::default();
        for frame in 0..200 {
            for packet in 0..10 {
                let sent = Time::from_millis(1_000 + 33 * frame);
                // The packets of a frame queue behind each other at the bottleneck.
                trend.handle_packet(sent, sent + Duration::from_millis(5 + packet));
            }
            assert_eq!(trend.usage(), Usage::Normal, "frame {frame}");
        }
    }

    #[test]
    fn jumps_and_disorder_do_no_harm() {
        let (mut trend, mut random) = (DelayTrend::default(), Seeded::new(4));
        for _ in 0..20_000 {
            trend.handle_packet(
                Time::from_nanos(random.draw() >> 24),
                Time::from_nanos(random.draw() >> 24),
            );
        }
        assert!(trend.line.smoothed_ms.is_finite() && trend.detector.threshold.is_finite());
    }
}
