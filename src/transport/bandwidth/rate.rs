//! Received rate over a sliding window, and the rate control of draft-ietf-rmcat-gcc-02, section
//! 5.5.

use std::time::Duration;

use super::delay::Usage;
use crate::units::{Bitrate, Time};

const BUCKETS: usize = 20;

/// Counts bytes in the last [`BUCKETS`] buckets of equal width.
#[derive(Clone, Debug)]
pub struct RateWindow {
    bytes: [u32; BUCKETS],
    width: Duration,
    /// Number of the newest bucket, counted from the clock's zero.
    newest: u64,
    since: Option<Time>,
}

/// A rate is reported only once packets have come for this long.
const SINCE_MIN: Duration = Duration::from_millis(150);

impl RateWindow {
    /// Creates a window of `length`, a multiple of 20 ms.
    pub fn new(length: Duration) -> RateWindow {
        RateWindow {
            bytes: [0; BUCKETS],
            width: length / BUCKETS as u32,
            newest: 0,
            since: None,
        }
    }

    /// Adds bytes. After a window without any packet the measurement begins anew.
    pub fn add(&mut self, bytes: usize, now: Time) {
        self.advance(now);
        if self.is_empty() {
            self.since = Some(now);
        }
        let bucket = &mut self.bytes[(self.newest % BUCKETS as u64) as usize];
        *bucket = bucket.saturating_add(u32::try_from(bytes).unwrap_or(u32::MAX));
    }

    /// Returns the rate in bits per second; `None` if nothing came within the window, or not for
    /// long enough.
    pub fn rate(&mut self, now: Time) -> Option<f64> {
        self.advance(now);
        let known = now.since(self.since?);
        if self.is_empty() || known < SINCE_MIN {
            return None;
        }
        // The newest bucket is only partly covered.
        let over = Duration::from_nanos(now.as_nanos() % self.width.as_nanos() as u64);
        let covered = known.min(self.width * (BUCKETS as u32 - 1) + over);
        let bytes: u64 = self.bytes.iter().map(|bytes| u64::from(*bytes)).sum();
        Some(bytes as f64 * 8.0 / covered.as_secs_f64())
    }

    fn is_empty(&self) -> bool {
        self.bytes.iter().all(|bytes| *bytes == 0)
    }

    fn advance(&mut self, now: Time) {
        let bucket = now.as_nanos() / self.width.as_nanos() as u64;
        for passed in (self.newest + 1..=bucket).rev().take(BUCKETS) {
            self.bytes[(passed % BUCKETS as u64) as usize] = 0;
        }
        self.newest = self.newest.max(bucket);
    }
}

/// Share of the received rate that the estimate drops to after overuse.
const BACKOFF: f64 = 0.85;
/// Growth factor per second, far from the limit.
const GROWTH: f64 = 1.08;
const GROWTH_MIN_BPS: f64 = 1_000.0;
/// Minimum growth per second near the limit. The usual growth there is one packet in two response
/// times.
const NEAR_GROWTH_MIN_BPS: f64 = 4_000.0;
/// Round trip assumed until one is measured.
const RTT_UNKNOWN: Duration = Duration::from_millis(200);
/// Limit of the estimate, as a multiple of the received rate, because a higher rate has not been
/// observed.
const HEADROOM: f64 = 1.5;
const HEADROOM_BPS: f64 = 10_000.0;
/// Lower limit of the estimate, as in libwebrtc (`kCongestionControllerMinBitrate`).
const MIN_BPS: f64 = 5_000.0;
/// The draft's bounds of the time between two decreases.
const REDUCE_MIN: Duration = Duration::from_millis(10);
const REDUCE_MAX: Duration = Duration::from_millis(200);

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum RateState {
    Hold,
    Increase,
    Decrease,
}

/// Rate control with additive increase and multiplicative decrease.
#[derive(Clone, Debug)]
pub struct AimdRateControl {
    /// Estimate in bits per second; `None` until there is a reason for one.
    estimate: Option<f64>,
    state: RateState,
    limit: LinkCapacity,
    throughput: f64,
    changed_at: Option<Time>,
    rtt: Duration,
}

impl AimdRateControl {
    pub fn new(start: Option<Bitrate>) -> AimdRateControl {
        AimdRateControl {
            estimate: start.map(|start| start.bps() as f64),
            state: RateState::Hold,
            limit: LinkCapacity::default(),
            throughput: 0.0,
            changed_at: None,
            rtt: RTT_UNKNOWN,
        }
    }

    pub fn estimate(&self) -> Option<Bitrate> {
        self.estimate.map(|bps| Bitrate::from_bps(bps as u64))
    }

    pub fn set_rtt(&mut self, rtt: Duration) {
        self.rtt = rtt;
    }

    /// Sets the estimate from another source: a probe, or the received rate at the beginning.
    pub fn set_estimate(&mut self, estimate: Bitrate, now: Time) {
        self.estimate = Some((estimate.bps() as f64).max(MIN_BPS));
        self.changed_at = Some(now);
    }

    /// Returns whether the estimate may be decreased again: after a round trip, or at once if less
    /// than half of the estimate arrives.
    pub fn may_reduce(&self, throughput: f64, now: Time) -> bool {
        let waited = self
            .changed_at
            .is_none_or(|at| now.since(at) >= self.rtt.clamp(REDUCE_MIN, REDUCE_MAX));
        waited
            || self
                .estimate
                .is_some_and(|estimate| throughput < estimate / 2.0)
    }

    /// Takes the state of the queue and the received rate in bits per second.
    pub fn update(&mut self, usage: Usage, throughput: Option<f64>, now: Time) {
        self.throughput = throughput.unwrap_or(self.throughput);
        if self.estimate.is_none() && usage != Usage::Over {
            return;
        }
        match usage {
            Usage::Over => self.state = RateState::Decrease,
            Usage::Under => self.state = RateState::Hold,
            Usage::Normal if self.state == RateState::Hold => {
                self.state = RateState::Increase;
                self.changed_at = Some(now);
            }
            Usage::Normal => {}
        }
        match self.state {
            RateState::Hold => {}
            RateState::Increase => self.increase(now),
            RateState::Decrease => self.decrease(now),
        }
    }

    fn increase(&mut self, now: Time) {
        let Some(estimate) = self.estimate else {
            return;
        };
        if self
            .limit
            .upper()
            .is_some_and(|upper| self.throughput > upper)
        {
            self.limit = LinkCapacity::default();
        }
        let most = HEADROOM * self.throughput + HEADROOM_BPS;
        if estimate < most {
            let elapsed = self
                .changed_at
                .map_or(Duration::ZERO, |at| now.since(at))
                .as_secs_f64();
            let growth = match self.limit.mean {
                Some(_) => self.near_growth() * elapsed,
                None => (estimate * (GROWTH.powf(elapsed.min(1.0)) - 1.0)).max(GROWTH_MIN_BPS),
            };
            self.estimate = Some((estimate + growth).min(most));
        }
        self.changed_at = Some(now);
    }

    /// Growth near the limit, in bits per second each second: half a packet of a 30 fps stream per
    /// response time.
    fn near_growth(&self) -> f64 {
        let frame_bits = self.estimate.unwrap_or_default() / 30.0;
        let packet_bits = frame_bits / (frame_bits / (1_200.0 * 8.0)).ceil().max(1.0);
        let response = self.rtt + Duration::from_millis(100);
        (packet_bits / (2.0 * response.as_secs_f64())).max(NEAR_GROWTH_MIN_BPS)
    }

    fn decrease(&mut self, now: Time) {
        let mut less = self.throughput * BACKOFF;
        let estimate = self.estimate.unwrap_or(f64::INFINITY);
        if less > estimate {
            less = self.limit.mean.map_or(less, |mean| mean * BACKOFF);
        }
        // Overuse never raises the estimate.
        self.estimate = Some(less.min(estimate).max(MIN_BPS));
        if self
            .limit
            .lower()
            .is_some_and(|lower| self.throughput < lower)
        {
            self.limit = LinkCapacity::default();
        }
        self.limit.add(self.throughput);
        // The rate holds until the queue is empty.
        self.state = RateState::Hold;
        self.changed_at = Some(now);
    }
}

/// Rate at which the queue began to grow: its mean and its variance.
#[derive(Clone, Debug)]
struct LinkCapacity {
    mean: Option<f64>,
    /// Variance in kbit/s, normalised by the mean.
    variance: f64,
}

impl Default for LinkCapacity {
    fn default() -> LinkCapacity {
        LinkCapacity {
            mean: None,
            variance: 0.4,
        }
    }
}

impl LinkCapacity {
    const WEIGHT: f64 = 0.05;

    fn add(&mut self, bps: f64) {
        let mean = self
            .mean
            .map_or(bps, |mean| mean + LinkCapacity::WEIGHT * (bps - mean));
        let error_kbps = (bps - mean) / 1e3;
        let sample = error_kbps * error_kbps / (mean / 1e3).max(1.0);
        self.mean = Some(mean);
        self.variance = ((1.0 - LinkCapacity::WEIGHT) * self.variance
            + LinkCapacity::WEIGHT * sample)
            .clamp(0.4, 2.5);
    }

    fn spread(&self, mean: f64) -> f64 {
        3.0 * (self.variance * mean / 1e3).sqrt() * 1e3
    }

    fn upper(&self) -> Option<f64> {
        self.mean.map(|mean| mean + self.spread(mean))
    }

    fn lower(&self) -> Option<f64> {
        self.mean.map(|mean| (mean - self.spread(mean)).max(0.0))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_window_tells_the_rate_of_the_last_second() {
        let mut window = RateWindow::new(Duration::from_secs(1));
        assert_eq!(window.rate(Time::from_millis(10)), None);
        for n in 0..500 {
            window.add(1_250, Time::from_millis(5_000 + n * 10));
        }
        let rate = window.rate(Time::from_millis(9_995)).unwrap();
        assert!((rate - 1e6).abs() < 2e4, "{rate}");
        // Twice the rate for half a second more.
        for n in 0..50 {
            window.add(2_500, Time::from_millis(10_000 + n * 10));
        }
        let rate = window.rate(Time::from_millis(10_495)).unwrap();
        assert!((rate - 1.5e6).abs() < 5e4, "{rate}");
        assert_eq!(
            window.rate(Time::from_millis(20_000)),
            None,
            "nothing came any more"
        );
        window.add(1_250, Time::from_millis(20_000));
        assert_eq!(
            window.rate(Time::from_millis(20_020)),
            None,
            "too soon to say"
        );
    }

    /// Calls `update` every 100 ms with a given usage and throughput.
    fn updates(
        control: &mut AimdRateControl,
        from_ms: u64,
        count: u64,
        usage: Usage,
        throughput: f64,
    ) {
        for n in 0..count {
            control.update(
                usage,
                Some(throughput),
                Time::from_millis(from_ms + n * 100),
            );
        }
    }

    #[test]
    fn overuse_halts_at_a_share_of_what_arrives_and_growth_begins_slowly_there() {
        let mut control = AimdRateControl::new(Some(Bitrate::from_bps(1_000_000)));
        updates(&mut control, 0, 100, Usage::Normal, 5e6);
        let grown = control.estimate().unwrap().bps();
        assert!(
            (2_000_000..2_300_000).contains(&grown),
            "8 % a second for 10 s: {grown}"
        );
        updates(&mut control, 10_000, 1, Usage::Over, 1e6);
        assert_eq!(control.estimate().unwrap().bps(), 850_000);
        updates(&mut control, 10_100, 100, Usage::Normal, 850_000.0);
        let near = control.estimate().unwrap().bps() - 850_000;
        assert!(
            (40_000..400_000).contains(&near),
            "slower than 8 % a second: {near}"
        );
        // The received rate exceeds the known limit, so this is a new path.
        updates(&mut control, 20_100, 50, Usage::Normal, 4e6);
        assert!(control.estimate().unwrap().bps() > 1_150_000);
    }

    #[test]
    fn nothing_grows_beyond_half_as_much_again_as_what_arrives() {
        let mut control = AimdRateControl::new(Some(Bitrate::from_bps(300_000)));
        updates(&mut control, 0, 1_000, Usage::Normal, 500_000.0);
        assert_eq!(control.estimate().unwrap().bps(), 760_000);
    }

    #[test]
    fn an_emptying_queue_holds_and_without_a_reason_there_is_no_estimate() {
        let mut control = AimdRateControl::new(None);
        updates(&mut control, 0, 10, Usage::Normal, 1e6);
        assert_eq!(control.estimate(), None);
        updates(&mut control, 1_000, 1, Usage::Over, 1e6);
        assert_eq!(control.estimate().unwrap().bps(), 850_000);
        updates(&mut control, 1_100, 10, Usage::Under, 1e6);
        assert_eq!(control.estimate().unwrap().bps(), 850_000);
    }
}
