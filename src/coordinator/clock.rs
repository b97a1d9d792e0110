//! Offset of another host's clock from ours, and its uncertainty, by NTP's exchange of four time
//! stamps (RFC 5905, section 8) over any connection.
//!
//! The only assumption is that both clocks run at nearly the right rate. The delays of the two
//! directions may differ by at most the whole round trip, so half of it is the uncertainty. A
//! stepped clock (a host that slept, a process that was restarted) is noticed because its estimates
//! contradict each other.

use std::collections::VecDeque;

use super::protocol::Exchange;

/// Number of exchanges that are kept; the one with the shortest round trip counts. At one a second
/// they cover about a minute.
const WINDOW: usize = 64;
/// Assumed drift: two crystals, each off by 50 parts in a million. This share of an exchange's age
/// is added to its uncertainty.
const DRIFT_PARTS_PER_MILLION: u64 = 100;

/// Knowledge of another clock.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Offset {
    /// The coordinator's clock minus the prober's.
    pub offset_us: i64,
    /// Largest distance of the true offset from `offset_us`, on either side.
    pub uncertainty_us: u64,
    /// Round trip of the exchange with the best estimate, without the time that the coordinator
    /// took to answer.
    pub round_trip_us: u64,
}

/// Estimates the offset from exchanges. Both sides use it.
#[derive(Clone, Debug, Default)]
pub struct ClockEstimate {
    /// Id of the coordinator process that the exchanges are with.
    life: Option<u64>,
    window: VecDeque<ClockSample>,
}

#[derive(Clone, Copy, Debug)]
struct ClockSample {
    /// When the answer was received, by the prober's clock.
    heard_at_us: u64,
    offset_us: i64,
    round_trip_us: u64,
}

impl ClockSample {
    fn uncertainty_us(&self, at_us: u64) -> u64 {
        let drift = at_us.abs_diff(self.heard_at_us) / 1_000 * DRIFT_PARTS_PER_MILLION / 1_000;
        self.round_trip_us.div_ceil(2) + drift
    }
}

impl ClockEstimate {
    /// Takes the time stamps of one exchange. They are not checked, because false ones only falsify
    /// the sender's own offset.
    pub fn handle(&mut self, exchange: &Exchange) {
        let there = exchange.received_at_us.cast_signed() - exchange.sent_at_us.cast_signed();
        let back = exchange.replied_at_us.cast_signed() - exchange.heard_at_us.cast_signed();
        let away = exchange.heard_at_us.saturating_sub(exchange.sent_at_us);
        let sample = ClockSample {
            heard_at_us: exchange.heard_at_us,
            offset_us: (there + back) / 2,
            round_trip_us: away.saturating_sub(
                exchange
                    .replied_at_us
                    .saturating_sub(exchange.received_at_us),
            ),
        };
        if self.life != Some(exchange.life) || self.contradicts(&sample) {
            self.window.clear();
            self.life = Some(exchange.life);
        }
        if self.window.len() == WINDOW {
            self.window.pop_front();
        }
        self.window.push_back(sample);
    }

    /// Returns the offset as of the last exchange; `None` before the first.
    pub fn offset(&self) -> Option<Offset> {
        let now_us = self.window.back()?.heard_at_us;
        let best = self
            .window
            .iter()
            .min_by_key(|sample| sample.uncertainty_us(now_us))?;
        Some(Offset {
            offset_us: best.offset_us,
            uncertainty_us: best.uncertainty_us(now_us),
            round_trip_us: best.round_trip_us,
        })
    }

    /// Returns the id of the coordinator process that the offset refers to.
    pub fn life(&self) -> Option<u64> {
        self.life
    }

    /// Returns whether the sample contradicts the earlier ones. Then one of the clocks was stepped
    /// in between.
    fn contradicts(&self, sample: &ClockSample) -> bool {
        let apart = |old: &ClockSample| {
            let bounds =
                old.uncertainty_us(sample.heard_at_us) + sample.uncertainty_us(sample.heard_at_us);
            old.offset_us.abs_diff(sample.offset_us) > bounds
        };
        self.window.back().is_some_and(apart)
            || self
                .window
                .iter()
                .min_by_key(|old| old.uncertainty_us(sample.heard_at_us))
                .is_some_and(apart)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::seeded::Seeded;

    const HOUR_US: i64 = 3_600_000_000;

    /// Exchanges with a prober whose clock is `offset_us` behind the coordinator's, with the delays
    /// of both directions.
    struct ClockLink {
        chance: Seeded,
        offset_us: i64,
        now_us: u64,
        life: u64,
    }

    impl ClockLink {
        fn new(seed: u64, offset_us: i64) -> ClockLink {
            ClockLink {
                chance: Seeded::new(seed),
                offset_us,
                now_us: 10 * HOUR_US as u64,
                life: 1,
            }
        }

        /// Makes an exchange one second later. Each direction takes at least 2 ms, and sometimes up
        /// to 300 ms more.
        fn exchange(&mut self) -> Exchange {
            self.now_us += 1_000_000;
            let way = |chance: &mut Seeded| {
                2_000
                    + if chance.chance(30) {
                        chance.below(300_000)
                    } else {
                        chance.below(100)
                    }
            };
            let (there, stay, back) = (
                way(&mut self.chance),
                self.chance.below(5_000),
                way(&mut self.chance),
            );
            let coordinator =
                |prober_us: u64| prober_us.checked_add_signed(self.offset_us).unwrap();
            Exchange {
                life: self.life,
                sent_at_us: self.now_us,
                received_at_us: coordinator(self.now_us + there),
                replied_at_us: coordinator(self.now_us + there + stay),
                heard_at_us: self.now_us + there + stay + back,
            }
        }
    }

    #[test]
    fn the_true_offset_always_lies_within_the_uncertainty() {
        for seed in 0..200 {
            let mut link = ClockLink::new(
                seed,
                Seeded::new(!seed).below(2 * HOUR_US as u64).cast_signed() - HOUR_US,
            );
            let mut estimate = ClockEstimate::default();
            assert_eq!(estimate.offset(), None);
            for second in 0..200 {
                estimate.handle(&link.exchange());
                let offset = estimate.offset().unwrap();
                assert!(
                    offset.offset_us.abs_diff(link.offset_us) <= offset.uncertainty_us,
                    "seed {seed}, second {second}"
                );
            }
            assert!(
                estimate.offset().unwrap().uncertainty_us < 10_000,
                "seed {seed}"
            );
        }
    }

    #[test]
    fn a_stepped_clock_is_believed_at_the_first_exchange_after_it() {
        for step_us in [HOUR_US, -HOUR_US, 2_000_000, -2_000_000] {
            let (mut link, mut estimate) = (ClockLink::new(7, 0), ClockEstimate::default());
            (0..90).for_each(|_| estimate.handle(&link.exchange()));
            link.offset_us += step_us;
            for _ in 0..90 {
                estimate.handle(&link.exchange());
                let offset = estimate.offset().unwrap();
                assert!(
                    offset.offset_us.abs_diff(link.offset_us) <= offset.uncertainty_us,
                    "{step_us}"
                );
            }
        }
    }

    #[test]
    fn another_life_of_the_coordinator_has_another_clock() {
        let (mut link, mut estimate) = (ClockLink::new(7, 40_000), ClockEstimate::default());
        (0..90).for_each(|_| estimate.handle(&link.exchange()));
        (link.life, link.offset_us) = (2, 41_000);
        estimate.handle(&link.exchange());
        let offset = estimate.offset().unwrap();
        assert!(offset.offset_us.abs_diff(41_000) <= offset.uncertainty_us);
        assert_eq!(estimate.life(), Some(2));
    }

    #[test]
    fn any_stamps_are_taken() {
        let mut estimate = ClockEstimate::default();
        let mut chance = Seeded::new(3);
        for _ in 0..10_000 {
            let mut stamp = || chance.draw() >> (11 + chance.draw() % 50);
            estimate.handle(&Exchange {
                life: 1,
                sent_at_us: stamp(),
                received_at_us: stamp(),
                replied_at_us: stamp(),
                heard_at_us: stamp(),
            });
            assert!(estimate.offset().is_some());
        }
    }
}
