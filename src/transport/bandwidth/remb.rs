//! Receiver-side estimate for senders that use REMB (draft-alvestrand-rmcat-remb), made from the
//! packets' abs-send-time and their arrivals.
//!
//! This follows libwebrtc's estimator for abs-send-time, with the trend line instead of the older
//! filter. It does not read the packet distances of the first two seconds as probes. So the first
//! estimate comes from the first overuse, or from the received rate after five seconds.

use std::time::Duration;

use super::delay::{DelayTrend, Usage};
use super::rate::{AimdRateControl, RateWindow};
use crate::units::{Bitrate, Time};

/// Window of the received rate.
const RATE_WINDOW: Duration = Duration::from_secs(1);
/// Time that the received rate is observed before it becomes the first estimate, if nothing
/// overuses the path.
const FIRST_ESTIMATE: Duration = Duration::from_secs(5);
/// Feedback may take 5 % of the estimate. This is the size of one message.
const MESSAGE_BITS: f64 = 80.0 * 8.0;
const MESSAGE_SHARE: f64 = 0.05;
/// Bounds of the interval between two messages.
const INTERVAL_MIN: Duration = Duration::from_millis(200);
const INTERVAL_MAX: Duration = Duration::from_secs(1);

/// abs-send-time has 24 bits, 18 of them for the fraction of a second.
const FRACTION_BITS: u32 = 18;
const CYCLE: i64 = 1 << 24;

/// Receive estimate of one connection.
#[derive(Debug)]
pub struct ReceiveEstimator {
    clock: SendClock,
    delay: DelayTrend,
    received: RateWindow,
    control: AimdRateControl,
    first_at: Option<Time>,
    updated_at: Option<Time>,
    /// Time when [`ReceiveEstimator::poll`] is due.
    next_at: Time,
}

impl Default for ReceiveEstimator {
    fn default() -> ReceiveEstimator {
        ReceiveEstimator {
            clock: SendClock::default(),
            delay: DelayTrend::default(),
            received: RateWindow::new(RATE_WINDOW),
            control: AimdRateControl::new(None),
            first_at: None,
            updated_at: None,
            next_at: Time::MAX,
        }
    }
}

impl ReceiveEstimator {
    /// Takes a packet of `bytes` bytes with its 24-bit abs-send-time.
    pub fn handle_packet(&mut self, abs_send_time: u32, arrival: Time, bytes: usize) {
        self.first_at.get_or_insert(arrival);
        self.received.add(bytes, arrival);
        self.delay
            .handle_packet(self.clock.unwrapped(abs_send_time), arrival);
        let interval = self.interval();
        let regular = self
            .updated_at
            .map_or(arrival + interval, |at| at + interval);
        self.next_at = self.next_at.min(regular);
        if self.delay.usage() == Usage::Over {
            let throughput = self.received.rate(arrival).unwrap_or(f64::INFINITY);
            if self.control.may_reduce(throughput, arrival) {
                self.next_at = arrival;
            }
        }
    }

    /// Returns when to poll; [`Time::MAX`] while nothing arrives.
    pub fn next_at(&self) -> Time {
        self.next_at
    }

    /// Returns the estimate to send to the sender, if it is due and there is one.
    pub fn poll(&mut self, now: Time, rtt: Duration) -> Option<Bitrate> {
        if now < self.next_at {
            return None;
        }
        self.next_at = Time::MAX;
        self.updated_at = Some(now);
        self.control.set_rtt(rtt);
        let received = self.received.rate(now);
        let waited = self
            .first_at
            .is_some_and(|first| now.since(first) >= FIRST_ESTIMATE);
        if let (None, true, Some(bps)) = (self.control.estimate(), waited, received) {
            self.control
                .set_estimate(Bitrate::from_bps(bps as u64), now);
        }
        self.control.update(self.delay.usage(), received, now);
        self.control.estimate()
    }

    fn interval(&self) -> Duration {
        let share = self.control.estimate().map_or(f64::INFINITY, |estimate| {
            estimate.bps() as f64 * MESSAGE_SHARE
        });
        Duration::from_secs_f64((MESSAGE_BITS / share).min(1e3)).clamp(INTERVAL_MIN, INTERVAL_MAX)
    }
}

/// The sender's clock without its wrap of 64 s. It starts some cycles above zero, so that a packet
/// older than the first one does not fall below zero.
#[derive(Debug, Default)]
struct SendClock {
    newest: i64,
}

impl SendClock {
    fn unwrapped(&mut self, abs_send_time: u32) -> Time {
        let bits = i64::from(abs_send_time) % CYCLE;
        if self.newest == 0 {
            self.newest = 4 * CYCLE + bits;
        }
        let ahead = (bits - self.newest).rem_euclid(CYCLE);
        let at = self.newest
            + if ahead < CYCLE / 2 {
                ahead
            } else {
                ahead - CYCLE
            };
        self.newest = self.newest.max(at);
        Time::from_nanos(((i128::from(at) * 1_000_000_000) >> FRACTION_BITS) as u64)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Simulates a sender of `kbps(t)` at time t, in ms, over a bottleneck of `capacity(t)` kbit/s
    /// with a queue of half a second. Returns the receiver's estimates with their times.
    fn watch(
        seconds: u64,
        kbps: impl Fn(u64) -> u64,
        capacity: impl Fn(u64) -> u64,
    ) -> Vec<(u64, u64)> {
        let mut estimator = ReceiveEstimator::default();
        let (mut told, mut free_at_us, mut credit) = (Vec::new(), 0u64, 0u64);
        let mut arrivals = std::collections::VecDeque::new();
        for ms in 0..seconds * 1_000 {
            credit += kbps(ms);
            while credit >= 8_000 {
                credit -= 8_000;
                let start = free_at_us.max(ms * 1_000);
                if start - ms * 1_000 < 500_000 {
                    free_at_us = start + 8_000_000 / capacity(ms);
                    arrivals.push_back((free_at_us, ms));
                }
            }
            while let Some((at_us, sent_ms)) =
                arrivals.pop_front_if(|(at_us, _)| *at_us <= ms * 1_000)
            {
                let sent = ((u128::from(sent_ms) + 60_000) << FRACTION_BITS) / 1_000;
                estimator.handle_packet(sent as u32 & 0xFF_FFFF, Time::from_micros(at_us), 1_000);
            }
            let now = Time::from_millis(ms);
            told.extend(
                estimator
                    .poll(now, Duration::from_millis(20))
                    .map(|estimate| (ms, estimate.bps() / 1_000)),
            );
        }
        told
    }

    fn at(told: &[(u64, u64)], ms: u64) -> u64 {
        told.iter()
            .take_while(|(at, _)| *at <= ms)
            .last()
            .map_or(0, |(_, kbps)| *kbps)
    }

    #[test]
    fn on_a_free_path_the_estimate_follows_what_arrives() {
        let told = watch(30, |_| 2_000, |_| 100_000);
        assert!(told[0].0 >= 5_000, "nothing is known before: {:?}", told[0]);
        assert!(
            (2_900..3_100).contains(&at(&told, 30_000)),
            "1.5 times what arrives: {}",
            at(&told, 30_000)
        );
        let apart: Vec<u64> = told.windows(2).map(|pair| pair[1].0 - pair[0].0).collect();
        assert!(
            apart.iter().all(|ms| (200..300).contains(ms)),
            "each 200 ms: {apart:?}"
        );
    }

    #[test]
    fn a_bottleneck_is_found_within_a_second_and_told_at_once() {
        let told = watch(
            20,
            |_| 2_000,
            |ms| if ms < 10_000 { 100_000 } else { 1_000 },
        );
        assert!(at(&told, 9_900) > 2_000);
        let below = told
            .iter()
            .find(|(ms, kbps)| *ms > 10_000 && *kbps <= 1_000)
            .expect("noticed");
        assert!(below.0 < 11_500, "{below:?}");
        assert!(
            told.iter()
                .filter(|(ms, _)| (12_000..15_000).contains(ms))
                .all(|(_, kbps)| (700..1_000).contains(kbps)),
            "{told:?}"
        );
    }

    #[test]
    fn it_grows_again_when_the_sender_has_reacted_and_the_path_is_free() {
        let sender = |ms| match ms {
            0..10_000 => 2_000,
            10_000..20_000 => 600,
            _ => 2_000,
        };
        let told = watch(40, sender, |ms| {
            if (8_000..20_000).contains(&ms) {
                1_000
            } else {
                100_000
            }
        });
        assert!(at(&told, 11_000) < 1_000);
        assert!(at(&told, 40_000) > 1_800, "{}", at(&told, 40_000));
    }

    #[test]
    fn the_senders_clock_wraps_and_packets_overtake_each_other() {
        let mut clock = SendClock::default();
        let start = clock.unwrapped(0xFF_FF00);
        let second = |units: i64| {
            Duration::from_nanos(((i128::from(units) * 1_000_000_000) >> FRACTION_BITS) as u64)
        };
        assert_eq!(
            clock.unwrapped(0x00_0100).since(start).as_micros(),
            second(0x200).as_micros()
        );
        let before = clock.unwrapped(0xFF_FE00);
        assert_eq!(start.since(before).as_micros(), second(0x100).as_micros());
        assert_eq!(
            clock.unwrapped(0x00_0100).since(start).as_micros(),
            second(0x200).as_micros()
        );
    }
}
